//! What the proxy reads and that fits in one file: authorities, the certificates of an image and
//! the store for Java that is made of them. See [`crate::fuzz`].

use std::sync::LazyLock;
use std::time::Duration;

use super::connect::authority;
use super::{bundle, java_store};
use crate::fuzz::{alone, fuzz};
use crate::pki::Authority;

#[test]
fn authorities() {
    let valid = ["example.com:443", "10.0.0.1:80", "[2001:db8::1]:8443", "h:1", "A.b.:65535"];
    let words = [
        ":",
        "::",
        "[",
        "]",
        "@",
        "%",
        "/",
        ".",
        "0",
        "00",
        "65536",
        "+1",
        " ",
        "http://",
        "é",
        "\0",
        "::ffff:1.2.3.4",
        "%25eth0",
        "0x7f.1",
    ];
    let mut good = 0_u64;
    fuzz("authorities", 2_000, |random| {
        let text = random.bent_text(&valid, &words);
        let default = random.once_in(2).then_some(80);
        let Ok((host, port)) = authority(&text, default) else { return };
        good += 1;
        assert!(text.is_ascii() && !text.contains(['@', '/', '%', ' ', '\0']), "{text:?}");
        let again = authority(&format!("{host}:{port}"), None);
        assert_eq!(again, Ok((host, port)), "{text:?}");
    });
    assert!(alone() || good > 0, "nothing was accepted");
}

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

static STORES: LazyLock<[String; 3]> = LazyLock::new(|| {
    let made = Authority::ephemeral("one", Duration::from_secs(86_400)).expect("made");
    let one = made.certificate_pem();
    [
        format!("# a comment\n{one}{one}"),
        format!(
            "{BEGIN}\nQUJD\n{END}\n-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n{one}"
        ),
        format!("{BEGIN}\r\nQUJD\r\nREVG==\r\n{END}\r\n"),
    ]
});
const LINES: [&str; 14] = [
    BEGIN,
    END,
    "-----",
    "----",
    "\n",
    "\r\n",
    "-----BEGIN TRUSTED CERTIFICATE-----",
    "-----BEGIN PRIVATE KEY-----\n",
    "-----END PRIVATE KEY-----\n",
    "====",
    "secret!",
    "\0",
    "é",
    " ",
];

#[test]
fn certificates() {
    let mut kept = 0_u64;
    fuzz("certificates", 500, |random| {
        let store = {
            let valid = random.below(3);
            random.bend(STORES[valid].as_bytes(), &LINES)
        };
        let copy = |store: &[u8], piece| {
            let mut pem = Vec::new();
            bundle::copy_certificates(store, &mut pem, piece).expect("memory takes it");
            pem
        };
        let pem = copy(&store, 1 + random.below(2 * store.len() + 1));
        assert!(pem.len() <= store.len() + 1);
        kept += u64::from(!pem.is_empty());
        let text = std::str::from_utf8(&pem).expect("ASCII");
        let mut rest = text;
        while !rest.is_empty() {
            let body = rest.strip_prefix(BEGIN).expect("a certificate");
            let (body, after) = body.split_once(END).expect("its end");
            let base64 = |b: u8| b.is_ascii_alphanumeric() || b"+/=\r\n".contains(&b);
            assert!(body.bytes().all(base64), "{text}");
            rest = after.strip_prefix('\n').expect("the end of a line");
        }
        assert_eq!(copy(&pem, 4096), pem, "what was kept is kept");
    });
    assert!(alone() || kept > 0, "nothing was kept");
}

#[test]
fn java_stores() {
    let mut stored = 0_u64;
    fuzz("java_stores", 500, |random| {
        let pem = {
            let valid = random.below(3);
            random.bend(STORES[valid].as_bytes(), &LINES)
        };
        let store = java_store::store(&pem);
        // As `sun.security.provider.JavaKeyStore` reads it.
        let number = |at: usize| {
            let bytes = store.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            u32::from_be_bytes(bytes.expect("a number")) as usize
        };
        let text = |at: usize| usize::from(u16::from_be_bytes([store[at], store[at + 1]]));
        assert_eq!((number(0), number(4)), (0xFEED_FEED, 2));
        let (count, mut at) = (number(8), 12);
        for _ in 0..count {
            stored += 1;
            assert_eq!(number(at), 2);
            at += 4;
            at += 2 + text(at) + 8;
            at += 2 + text(at);
            at += 4 + number(at);
        }
        assert_eq!(store.len(), at + 20, "the digest is all that is left");
    });
    assert!(alone() || stored > 0, "nothing was stored");
}
