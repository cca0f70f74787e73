//! The pod's PID 1: builds the fence, runs the agent in it, and ends with the agent's exit code.
//!
//! [`run`] reads as the order in which a fence is built. Four processes come of it: this one
//! (uid 0; small blocking threads; parses nothing hostile), the proxy ([`proxy_process`]), the
//! keeper ([`keeper`]) and the agent. [`init`] is what this process does while the agent runs.
#![forbid(unsafe_code)]

mod agent_files;
pub mod args;
mod attestation;
pub mod caller;
pub mod doctor;
pub mod enter;
mod entered;
mod environment;
pub mod failure;
mod filesystem;
#[cfg(test)]
mod fuzz;
mod gateway;
mod identity;
mod image_file;
mod init;
pub mod install;
mod keeper;
mod launch;
mod links;
mod live;
mod losses;
mod mounted;
pub mod openshell;
mod own_path;
mod packet;
mod policy_files;
mod process_limit;
mod progress;
pub mod proxy_process;
mod proxy_service;
mod resolv_conf;
pub mod run;
pub mod run_dir;
mod signals;
mod sockets;
pub mod status;
mod stdio;
mod steering;
pub mod taint;
mod trust_store;
pub mod upstream_proxy;
mod volumes;
