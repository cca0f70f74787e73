//! The proxy over real sockets: real TLS upstreams, real curl, each test in a network namespace of
//! its own. Only the supervisor's end of the control socket is a double.
#![cfg(feature = "proxy")]

#[path = "proxy/h2_upstream.rs"]
mod h2_upstream;
#[path = "proxy/rig.rs"]
mod rig;
#[path = "proxy/upstream.rs"]
mod upstream;

#[path = "proxy/admin.rs"]
mod admin;
#[path = "proxy/bypasses.rs"]
mod bypasses;
#[path = "proxy/captured.rs"]
mod captured;
#[path = "proxy/content.rs"]
mod content;
#[path = "proxy/curl.rs"]
mod curl;
#[path = "proxy/destinations.rs"]
mod destinations;
#[path = "proxy/dns.rs"]
mod dns;
#[path = "proxy/gateway.rs"]
mod gateway;
#[path = "proxy/h2_frames.rs"]
mod h2_frames;
#[path = "proxy/h2.rs"]
mod h2_streams;
#[path = "proxy/half_closed.rs"]
mod half_closed;
#[path = "proxy/hostile.rs"]
mod hostile;
#[path = "proxy/ipv6.rs"]
mod ipv6;
#[path = "proxy/live.rs"]
mod live;
#[path = "proxy/policy_dns.rs"]
mod policy_dns;
#[path = "proxy/sessions.rs"]
mod sessions;
#[path = "proxy/tunnels.rs"]
mod tunnels;
#[path = "proxy/upstream_proxy.rs"]
mod upstream_proxy;
#[path = "proxy/websocket.rs"]
mod websocket;
