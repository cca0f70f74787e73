//! Answers of the kernel, bent. The kernel is trusted, and a socket that is connected to it hears
//! nobody else; still no answer may end the supervisor. See [`crate::fuzz`].

use std::net::{Ipv4Addr, SocketAddrV4};

use super::*;
use crate::fence::sockdiag::SockDiag;
use crate::fuzz::{Random, alone, fuzz, number};

const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 200, 0, 2), 40_000);
const SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 200, 0, 1), 3128);

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;

/// A `struct inet_diag_msg` with what its socket says about IPv6.
fn socket(state: u8) -> Vec<u8> {
    let mut bytes = vec![2, state, 0, 0];
    bytes.extend(CLIENT.port().to_be_bytes());
    bytes.extend(SERVER.port().to_be_bytes());
    for address in [CLIENT.ip(), SERVER.ip()] {
        bytes.extend(address.octets());
        bytes.resize(bytes.len() + 12, 0);
    }
    bytes.extend([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
    bytes.resize(72, 0);
    // INET_DIAG_SKV6ONLY.
    attribute(&mut bytes, 11, &[1]);
    bytes
}

fn message(random: &mut Random, sequence: u32) -> Vec<u8> {
    let (kind, payload) = match random.below(4) {
        0 => (ERROR, 0_u32.to_ne_bytes().to_vec()),
        1 => (DONE, (-i32::from(random.byte())).to_ne_bytes().to_vec()),
        _ => (BY_FAMILY, socket(if random.once_in(2) { 1 } else { 10 })),
    };
    let words = ["\0\0", "\u{4}\0\u{1}\0", "\0\0\u{1}\0", "\u{5}\0\u{b}\0\u{1}\0\0\0"];
    let payload = if random.once_in(2) { payload } else { random.bend(&payload, &words) };
    framed(kind, sequence, &payload)
}

fn framed(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + payload.len()).expect("short");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend([0, 0]);
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(payload);
    pad(&mut bytes);
    bytes
}

#[test]
fn answers_of_the_kernel() {
    let mut found = 0_u64;
    fuzz("answers_of_the_kernel", 300, |random| {
        let pair = || {
            let (flags, kind) = (SocketFlags::CLOEXEC, SocketType::DGRAM);
            rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).expect("sockets")
        };
        let (ours, kernel) = pair();
        // Other tests send too: then these are answers to somebody else.
        let sequence = SEQUENCE.load(Ordering::Relaxed);
        for _ in 0..=random.below(3) {
            let mut datagram = Vec::new();
            for _ in 0..=random.below(3) {
                let behind = u32::from(random.once_in(8));
                datagram.extend(message(random, sequence.wrapping_add(behind)));
            }
            if random.once_in(2) {
                datagram = random.bend(&datagram, &["\0", "\u{10}\0\0\0", "\u{7f}\u{7f}"]);
            }
            let sent: usize = messages(&datagram).map(|m| HEADER + m.payload.len()).sum();
            assert!(sent <= datagram.len());
            rustix::net::send(&kernel, &datagram, SendFlags::empty()).expect("sent");
        }
        if !random.once_in(4) {
            let end = framed(ERROR, sequence, &[0; 4]);
            rustix::net::send(&kernel, &end, SendFlags::empty()).expect("sent");
        }
        match random.below(3) {
            0 => {
                let cookie = SockDiag::from_fd(ours).cookie(CLIENT, SERVER);
                found += u64::from(matches!(cookie, Ok(Some(_))));
            }
            1 => drop(SockDiag::from_fd(ours).listening()),
            _ => {
                let replies = {
                    let mut batch = Batch::new();
                    batch.push("list", "links", BY_FAMILY, NLM_F_DUMP, &[]);
                    batch.exchange(&ours)
                };
                for reply in replies.map(|replies| replies.messages).unwrap_or_default() {
                    type Message = netlink_packet_route::RouteNetlinkMessage;
                    // The same bytes as links, addresses, routes and rules.
                    for kind in [16, 20, 24, 28, 32] {
                        let reply = Reply { kind, payload: reply.payload.clone() };
                        drop(reply.parse::<Message>("list", "links"));
                    }
                }
            }
        }
    });
    // Beside other tests each answer may be one to somebody else: their numbers are one sequence.
    let by_itself = number("RINGFENCE_FUZZ_CASES").is_some() && !alone();
    assert!(!by_itself || found > 0, "no connection was found");
}
