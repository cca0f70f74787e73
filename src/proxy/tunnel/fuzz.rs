//! The first bytes of both ends, bent: what is recognised never depends on how they are split, nor
//! does what is read in a `ClientHello`. See [`crate::fuzz`].

use std::sync::LazyLock;

use super::*;
use crate::fuzz::{Random, alone, fuzz};

const STARTS: [&str; 9] = [
    "GET / HTTP/1.1\r\nHost: h\r\n\r\n",
    "\r\n\nPOST http://h/x?y HTTP/1.0\r\n",
    "GET\t/\tHTTP/1.1\r\n",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "PRI * HTTP/1.1\r\n",
    "SSH-2.0-x\r\n",
    "EHLO client.test\r\n",
    "*1\r\n$4\r\nPING\r\n",
    "\u{16}\u{3}\u{1}",
];
const WORDS: [&str; 20] = [
    "\r\n",
    "\n",
    "\r",
    "\t",
    " ",
    "  ",
    "HTTP/",
    "http/1.1",
    "HTTP/2.0",
    "PRI",
    "* ",
    "GET",
    "~",
    "\0",
    "\u{16}",
    "é",
    "/",
    ":",
    "HTTP",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
];

#[test]
fn recognised() {
    let mut seen = [false; 4];
    fuzz("recognised", 1_000, |random| {
        let mut bytes = random.bent(&STARTS, &WORDS);
        if random.once_in(64) {
            // Beyond what a head may have.
            let long = random.pick(&["\r\n", "\n", " ", "a", "/ "]).repeat(REQUEST_MAX);
            let at = random.below(bytes.len() + 1);
            bytes.splice(at..at, long.bytes().take(REQUEST_MAX + 8));
        }
        let whole = recognise(&bytes);
        let cuts = random.cuts(bytes.len());
        let pieces = cuts.iter().find_map(|cut| recognise(&bytes[..*cut]));
        assert_eq!(pieces, whole, "{:?} {cuts:?}", String::from_utf8_lossy(&bytes));
        let kinds = [First::Tls, First::Http, First::Http2, First::Other];
        if let Some(at) = whole.and_then(|first| kinds.iter().position(|kind| *kind == first)) {
            seen[at] = true;
        }
    });
    assert!(alone() || seen == [true; 4], "{seen:?}");
}

#[test]
fn greetings_of_servers() {
    let settings = "\0\0\u{12}\u{4}\0\0\0\0\0\0\u{3}\0\0\0d";
    let words = ["\0", "\u{4}", "\0\0", "220 hello\r\n", "\0\0\0\u{4}\u{1}"];
    fuzz("greetings_of_servers", 1_000, |random| {
        let bytes = random.bend(settings.as_bytes(), &words);
        let cuts = random.cuts(bytes.len());
        let pieces = cuts.iter().find_map(|cut| greets(&bytes[..*cut]));
        assert_eq!(pieces, greets(&bytes), "{bytes:?} {cuts:?}");
    });
}

/// What clients of rustls send: with and without a name, and what they offer by ALPN.
static HELLOS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let hello =
        |name: &str, alpn: &[&str], versions: &[&'static rustls::SupportedProtocolVersion]| {
            let mut config = rustls::ClientConfig::builder_with_provider(crate::pki::provider())
                .with_protocol_versions(versions)
                .expect("versions")
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
            config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
            let name = name.to_owned().try_into().expect("name");
            let mut client = rustls::ClientConnection::new(config.into(), name).expect("client");
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).expect("hello");
            bytes
        };
    let (tls12, tls13) = (&rustls::version::TLS12, &rustls::version::TLS13);
    vec![
        hello("api.example.com", &["h2", "http/1.1"], &[tls13, tls12]),
        hello("api.example.com", &[], &[tls12]),
        hello("10.0.0.1", &["http/1.1"], &[tls13]),
        hello("a.b", &["imap"], &[tls13, tls12]),
    ]
});

/// The same message in records of other lengths.
fn in_records(hello: &[u8], random: &mut Random) -> Vec<u8> {
    let message = &hello[5..];
    let mut from = 0;
    let mut bytes = Vec::new();
    for to in random.cuts(message.len()) {
        let length = u16::try_from(to - from).expect("short").to_be_bytes();
        bytes.extend([0x16, 3, 1, length[0], length[1]]);
        bytes.extend(&message[from..to]);
        from = to;
    }
    bytes
}

/// In words: what is read in it when it arrives in these pieces.
fn read(bytes: &[u8], cuts: &[usize]) -> String {
    let mut hello = Hello::default();
    for &cut in cuts {
        match hello.read(&bytes[..cut]) {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let alpn = hello.alpn().map(|all| all.map(<[u8]>::to_vec).collect::<Vec<_>>());
                return format!("{:?} {alpn:?}", hello.server_name());
            }
            Ok(None) => {}
            Err((reason, alert)) => {
                assert!(alert.len() < 64, "{alert:?}");
                return reason.split(':').next().unwrap_or_default().to_owned();
            }
        }
    }
    "more".to_owned()
}

#[test]
fn client_hellos() {
    let (mut good, mut bad) = (0_u64, 0_u64);
    fuzz("client_hellos", 300, |random| {
        let valid = &HELLOS[random.below(HELLOS.len())];
        // What is inside, and how it is wrapped.
        let bytes = match random.below(4) {
            0 => in_records(valid, random),
            1 => {
                let records = in_records(valid, random);
                random.bend(&records, &["\u{16}\u{3}\u{1}", "\0", "\u{1}", "example", "\u{15}"])
            }
            _ => {
                let mut bytes =
                    random.bend(&valid[9..], &["\0\0", "\0\u{10}", "h2", "\u{7f}", "."]);
                let length = u32::try_from(bytes.len()).expect("short").to_be_bytes();
                let record = u16::try_from(bytes.len() + 4).expect("short").to_be_bytes();
                let head = [0x16, 3, 1, record[0], record[1], 1, length[1], length[2], length[3]];
                bytes.splice(0..0, head);
                bytes
            }
        };
        let whole = read(&bytes, &[bytes.len()]);
        let cuts = random.cuts(bytes.len());
        assert_eq!(read(&bytes, &cuts), whole, "{bytes:x?} {cuts:?}");
        if whole.starts_with("ClientHello") {
            bad += 1;
        } else if whole != "more" {
            good += 1;
        }
    });
    assert!(alone() || (good > 0 && bad > 0), "{good} {bad}");
}
