//! What an agent would meet without a fence: every address is there and answers, the proxy's place
//! is taken by one that lets everything pass, and DNS knows every name.

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::sync::OnceLock;

use super::run;

/// The ports of the table's rows.
const PORTS: [u16; 8] = [22, 80, 443, 853, 3128, 10250, 15001, 15053];

/// Makes it, once, in the test's own network namespace.
pub fn make() {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| {
        run("ip", &["route", "add", "local", "default", "dev", "lo"]);
        // A kernel without IPv6 has no such route, and no such rows.
        if std::path::Path::new("/proc/net/if_inet6").exists() {
            run("ip", &["-6", "route", "add", "local", "default", "dev", "lo"]);
        }
        for port in PORTS {
            tcp(port);
        }
        dns();
    });
}

/// Says yes to whatever is asked.
fn tcp(port: u16) {
    let listener = TcpListener::bind(("::", port))
        .or_else(|_| TcpListener::bind(("0.0.0.0", port)))
        .expect("a port");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        }
    });
}

/// The query with the answer's bit set: no error.
fn answer(query: &[u8]) -> Vec<u8> {
    let mut answer = query.to_vec();
    if let Some(flags) = answer.get_mut(2) {
        *flags |= 0x80;
    }
    answer
}

fn dns() {
    let udp = UdpSocket::bind("0.0.0.0:53").expect("a port");
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = udp.recv_from(&mut query) {
            let _ = udp.send_to(&answer(&query[..length]), from);
        }
    });
    let tcp = TcpListener::bind("0.0.0.0:53").expect("a port");
    std::thread::spawn(move || {
        for mut stream in tcp.incoming().flatten() {
            let mut length = [0; 2];
            if stream.read_exact(&mut length).is_ok() {
                let mut query = vec![0; u16::from_be_bytes(length).into()];
                let _ = stream.read_exact(&mut query);
                let _ = stream.write_all(&[&length[..], &answer(&query)].concat());
            }
        }
    });
}
