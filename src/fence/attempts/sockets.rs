//! Sockets that are not TCP, UDP, unix or route netlink: the families are an allow list, since
//! kernels get new ones faster than deny lists do.

use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketType};

use super::Attempt::{Call, Do};
use super::Layer::{Credentials, Seccomp};
use super::raw::{DIRT, NO_FD};
use super::{EPERM, Expect, Row, Seen, raw};

const STREAM: u64 = 1;
const DGRAM: u64 = 2;
const RAW: u64 = 3;
const SEQPACKET: u64 = 5;

const fn socket(
    id: &'static str,
    what: &'static str,
    family: u64,
    kind: u64,
    protocol: u64,
) -> Row {
    Row::new(id, Seccomp, EPERM, what, Call(libc::SYS_socket, [family, kind, protocol, 0, 0, 0]))
}

const EOPNOTSUPP: &[Expect] = &[Expect::Errno(libc::EOPNOTSUPP)];
const ENOPROTOOPT: &[Expect] = &[Expect::Errno(libc::ENOPROTOOPT)];
const MSG_FASTOPEN: u64 = 0x2000_0000;
const TCP: u64 = 6;

pub(super) const ROWS: &[Row] = &[
    socket("socket-alg", "the kernel's crypto by a socket (AF_ALG)", 38, SEQPACKET, 0).mistake(5),
    socket("socket-ax25", "amateur radio (AF_AX25)", 3, DGRAM, 0).mistake(5),
    socket("socket-bluetooth", "AF_BLUETOOTH", 31, RAW, 1).mistake(5),
    socket("socket-can", "AF_CAN", 29, RAW, 1).mistake(5),
    socket("socket-ib", "AF_IB", 27, RAW, 0).mistake(5),
    socket("socket-kcm", "AF_KCM", 41, DGRAM, 0).mistake(5),
    socket("socket-key", "IPsec keys (AF_KEY)", 15, RAW, 2).mistake(5),
    socket("socket-llc", "AF_LLC", 26, DGRAM, 0).mistake(5),
    socket("socket-nfc", "AF_NFC", 39, RAW, 1).mistake(5),
    socket("socket-qipcrtr", "AF_QIPCRTR", 42, DGRAM, 0).mistake(5),
    socket("socket-rds", "AF_RDS", 21, SEQPACKET, 0).mistake(5),
    socket("socket-smc", "AF_SMC", 43, STREAM, 0).mistake(5),
    socket("socket-tipc", "AF_TIPC", 30, SEQPACKET, 0).mistake(5),
    socket("socket-vsock", "the hypervisor (AF_VSOCK)", 40, STREAM, 0).mistake(5),
    socket("socket-xdp", "AF_XDP", 44, RAW, 0).mistake(5).also(&[Credentials]),
    socket("socket-unknown-family", "a family that no kernel has yet (63)", 63, STREAM, 0)
        .mistake(5),
    socket("socket-packet-raw", "frames (AF_PACKET, SOCK_RAW)", 17, RAW, 0).also(&[Credentials]),
    socket("socket-packet-dgram", "AF_PACKET, SOCK_DGRAM", 17, DGRAM, 0).also(&[Credentials]),
    socket("socket-inet-packet", "SOCK_PACKET in the internet family", 2, 10, 0)
        .also(&[Credentials]),
    socket("socket-raw-icmp", "a raw ICMP socket", 2, RAW, 1).also(&[Credentials]),
    socket("socket-raw-ip", "a raw socket with its own IP header", 2, RAW, 255)
        .also(&[Credentials]),
    socket("socket-raw-dirty", "a raw socket, bits set above the type", 2 | DIRT, RAW | DIRT, 1)
        .mistake(2)
        .also(&[Credentials]),
    socket("socket-raw6", "a raw ICMPv6 socket", 10, RAW, 58).also(&[Credentials]),
    socket("socket-ping", "a ping socket (needs no capability)", 2, DGRAM, 1),
    socket("socket-ping6", "a ping socket of IPv6", 10, DGRAM, 58),
    socket("socket-mptcp", "MPTCP: connections of which connect(2) says nothing", 2, STREAM, 262),
    socket("socket-mptcp6", "MPTCP over IPv6", 10, STREAM, 262),
    socket("socket-smc-inet", "SMC as a protocol of the internet family", 2, STREAM, 256),
    socket("socket-sctp", "SCTP", 2, STREAM, 132),
    socket("socket-sctp-seqpacket", "SCTP, one to many", 2, SEQPACKET, 132),
    socket("socket-dccp", "DCCP", 2, 6, 33),
    socket("socket-udplite", "UDP-Lite", 2, DGRAM, 136),
    socket("socket-l2tp", "L2TP", 2, DGRAM, 115),
    socket("socket-netlink-audit", "netlink to the audit log", 16, RAW, 9),
    socket("socket-netlink-generic", "generic netlink", 16, RAW, 16),
    socket("socket-netlink-netfilter", "netlink to the packet rules", 16, RAW, 12),
    socket("socket-netlink-sockdiag", "netlink to other processes' sockets", 16, RAW, 4),
    socket("socket-netlink-uevent", "netlink to device events", 16, RAW, 15),
    socket("socket-netlink-xfrm", "netlink to IPsec", 16, RAW, 6),
    socket("socket-netlink-crypto", "netlink to the kernel's crypto", 16, RAW, 21),
    socket("socket-netlink-rdma", "netlink to RDMA", 16, RAW, 20),
    Row::new(
        "socketpair-tipc",
        Seccomp,
        EPERM,
        "socketpair(2) of another family",
        Call(libc::SYS_socketpair, [30, SEQPACKET, 0, 0, 0, 0]),
    )
    .mistake(5),
    Row::new(
        "fastopen-sendto",
        Seccomp,
        EOPNOTSUPP,
        "a connection that opens by sendto(2), past connect(2)",
        Call(libc::SYS_sendto, [NO_FD, 0, 0, MSG_FASTOPEN, 0, 0]),
    ),
    Row::new(
        "fastopen-sendmsg",
        Seccomp,
        EOPNOTSUPP,
        "the same by sendmsg(2)",
        Call(libc::SYS_sendmsg, [NO_FD, 0, MSG_FASTOPEN | DIRT, 0, 0, 0]),
    )
    .mistake(2),
    Row::new(
        "fastopen-sendmmsg",
        Seccomp,
        EOPNOTSUPP,
        "the same by sendmmsg(2)",
        Call(libc::SYS_sendmmsg, [NO_FD, 0, 0, MSG_FASTOPEN, 0, 0]),
    ),
    Row::new(
        "fastopen-connect",
        Seccomp,
        ENOPROTOOPT,
        "TCP_FASTOPEN_CONNECT: connect(2) that does not connect",
        Do(|_| tcp_option(30, 1)),
    ),
    Row::new(
        "tcp-ulp",
        Seccomp,
        ENOPROTOOPT,
        "another protocol on a TCP socket (TCP_ULP)",
        Call(libc::SYS_setsockopt, [NO_FD, TCP | DIRT, 31, 0, 0, 0]),
    )
    .mistake(2),
    Row::new(
        "tcp-repair",
        Credentials,
        EPERM,
        "a TCP connection out of nothing (TCP_REPAIR)",
        Do(|_| tcp_option(19, 1)),
    ),
];

fn tcp_option(name: i32, value: i32) -> Seen {
    fresh(SocketType::STREAM, |socket| raw::set_option(socket, libc::SOL_TCP, name, value))
}

/// A fresh socket of the internet family, for attempts with it.
pub(super) fn fresh(kind: SocketType, then: impl FnOnce(&OwnedFd) -> Seen) -> Seen {
    match rustix::net::socket(AddressFamily::INET, kind, None) {
        Ok(socket) => then(&socket),
        Err(errno) => Seen::Broken(format!("no socket: {errno}")),
    }
}
