//! Protocols that are judged request by request.

pub(crate) mod judge;
pub(crate) mod rest;
pub(crate) mod websocket;
