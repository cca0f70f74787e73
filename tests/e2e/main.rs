//! Cluster tests: what a person sees who installed Ringfence with its chart and labelled a
//! namespace. A real API server, kubelet and containerd (`scripts/cluster`); nothing is played.
//!
//! `tests/e2e/setup` puts everything into the cluster, `tests/e2e/run` runs this program in the
//! node's network namespace. Each test has a namespace of its own; they run beside each other. Those
//! that change the release (`upgrade`, `uninstall`) are ignored by default and run last, one by one.
#![forbid(unsafe_code)]

mod host;
mod place;
mod release;
mod rig;

mod admin;
mod annotations;
mod authors;
mod broken;
mod certificates;
mod doctor;
mod enable;
mod kernel;
mod lifecycle;
mod live;
mod network;
mod openings;
mod rotation;
mod shapes;
mod strict;
mod told;
mod uninstall;
mod upgrade;
mod values;
mod verified;
mod workloads;
