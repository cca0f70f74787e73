//! Protocols that are judged request by request.

pub(crate) mod content;
mod graphql;
mod json;
mod jsonrpc;
pub(crate) mod rest;
