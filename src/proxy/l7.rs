//! Protocols that are judged request by request.

pub(crate) mod content;
mod graphql;
pub(crate) mod graphql_ws;
pub(crate) mod held;
mod json;
mod jsonrpc;
pub(crate) mod judge;
pub(crate) mod rest;
pub(crate) mod websocket;
