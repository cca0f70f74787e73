//! Frames that no client would send, written by hand: malformed requests, and floods.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::rig::{Rig, in_namespace};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

const PROTOCOL_ERROR: u32 = 1;
const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("length").to_be_bytes();
    let mut out = vec![length[1], length[2], length[3], kind, flags];
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// HPACK without any compression: literal fields that are not indexed.
fn hpack(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    let text = |out: &mut Vec<u8>, text: &str| {
        let mut length = text.len();
        if length < 127 {
            out.push(u8::try_from(length).expect("short"));
        } else {
            out.push(127);
            length -= 127;
            while length >= 128 {
                out.push(u8::try_from(length % 128).expect("seven bits") | 128);
                length /= 128;
            }
            out.push(u8::try_from(length).expect("seven bits"));
        }
        out.extend_from_slice(text.as_bytes());
    };
    for (name, value) in fields {
        out.push(0);
        text(&mut out, name);
        text(&mut out, value);
    }
    out
}

fn get(path: &str) -> Vec<u8> {
    hpack(&[
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", "rpc.test:8081"),
        (":path", path),
    ])
}

#[derive(Debug, Clone)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Frame {
    /// The code of a `RST_STREAM` or GOAWAY.
    fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().expect("code"))
    }
}

/// A connection in the clear to an endpoint that is inspected.
struct Raw {
    tcp: TcpStream,
}

impl Raw {
    fn new(rig: &Rig) -> Self {
        let mut tcp = rig.tunnel("rpc.test:8081");
        tcp.write_all(PREFACE).expect("preface");
        tcp.write_all(&frame(SETTINGS, 0, 0, &[])).expect("settings");
        tcp.write_all(&frame(SETTINGS, ACK, 0, &[])).expect("ack");
        tcp.set_write_timeout(Some(Duration::from_secs(20))).expect("timeout");
        Self { tcp }
    }

    /// Whether the proxy took it all; it may have hung up before.
    fn send(&mut self, bytes: &[u8]) -> bool {
        self.tcp.write_all(bytes).is_ok()
    }

    /// The next frame; none at the end of the connection, however it comes.
    fn next(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        let mut read = |buffer: &mut [u8]| match self.tcp.read_exact(buffer) {
            Ok(()) => Some(()),
            Err(error) => {
                let waited = error.kind() == std::io::ErrorKind::WouldBlock;
                assert!(!waited, "nothing came");
                None
            }
        };
        read(&mut head)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        read(&mut payload)?;
        let stream = u32::from_be_bytes(head[5..9].try_into().expect("four")) & 0x7fff_ffff;
        Some(Frame { kind: head[3], flags: head[4], stream, payload })
    }

    fn until(&mut self, wanted: impl Fn(&Frame) -> bool) -> Option<Frame> {
        std::iter::from_fn(|| self.next()).find(wanted)
    }

    /// What the stream was answered with: the code of its reset, or its head's first bytes.
    fn answer(&mut self, stream: u32) -> Frame {
        let wanted = |f: &Frame| {
            f.kind == GOAWAY || f.stream == stream && matches!(f.kind, HEADERS | RST_STREAM)
        };
        self.until(wanted).expect("an answer")
    }

    /// The connection's end: GOAWAY's code, if it could be read before the end.
    fn gone(mut self) -> Option<u32> {
        let end = self.until(|frame| frame.kind == GOAWAY).map(|frame| frame.code());
        while self.next().is_some() {}
        end
    }
}

/// That the proxy serves others as if nothing had been.
fn lives(rig: &Rig) {
    let mut raw = Raw::new(rig);
    assert!(raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &get("/ok/alive"))));
    let answer = raw.answer(1);
    assert_eq!(answer.kind, HEADERS);
    assert_eq!(answer.payload[0], 0x88, ":status 200");
}

#[test]
fn malformed_requests_are_refused_each_by_itself() {
    in_namespace(|rig| {
        let method = (":method", "GET");
        let scheme = (":scheme", "http");
        let authority = (":authority", "rpc.test:8081");
        let path = (":path", "/ok/bad");
        let post = (":method", "POST");
        let unary = (":path", "/echo.Echo/Bad");
        let reset: &[&[(&str, &str)]] = &[
            &[scheme, authority, path],
            &[method, authority, path],
            &[method, scheme, authority],
            &[method, scheme, authority, (":path", "")],
            &[method, method, scheme, authority, path],
            &[method, scheme, authority, authority, path],
            &[method, scheme, authority, ("x", "y"), path],
            &[method, scheme, authority, path, (":status", "200")],
            &[method, scheme, authority, path, ("connection", "close")],
            &[method, scheme, authority, path, ("transfer-encoding", "chunked")],
            &[method, scheme, authority, path, ("upgrade", "h2c")],
            &[method, scheme, authority, path, ("keep-alive", "1")],
            &[method, scheme, authority, path, ("proxy-connection", "close")],
            &[method, scheme, authority, path, ("te", "gzip")],
            &[post, scheme, authority, unary, ("content-length", "5")],
            &[post, scheme, authority, unary, ("content-length", "0"), ("content-length", "5")],
            &[(":method", "CONNECT"), scheme, authority, path],
            &[(":method", "CONNECT"), (":protocol", "websocket"), scheme, authority, path],
            &[method, (":protocol", "websocket"), scheme, authority, path],
        ];
        for fields in reset {
            let mut raw = Raw::new(&rig);
            raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &hpack(fields)));
            let answer = raw.answer(1);
            assert_eq!((answer.kind, answer.code()), (RST_STREAM, PROTOCOL_ERROR), "{fields:?}");
            // The connection lives on.
            raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 3, &get("/ok/next")));
            assert_eq!(raw.answer(3).payload[0], 0x88, "{fields:?}");
        }
        let told: &[(&[(&str, &str)], &str)] = &[
            (&[(":method", "CONNECT"), authority], "400"),
            (&[method, scheme, path], "400"),
            (&[method, (":scheme", "https"), authority, path], "400"),
            (&[method, scheme, (":authority", "other.test"), path], "403"),
            (&[method, scheme, authority, path, ("host", "other.test")], "403"),
            (&[method, scheme, authority, path, ("host", "rpc.test"), ("host", "rpc.test")], "400"),
            (&[method, scheme, authority, path, ("x", " y")], "400"),
            (&[method, scheme, authority, (":path", "/ok/%2e%2e/secret")], "403"),
            (&[method, scheme, authority, (":path", "/ok/%zz")], "400"),
            (&[method, scheme, authority, (":path", "/ok/\u{e9}")], "400"),
            (&[method, scheme, authority, (":path", "*")], "400"),
            (&[method, scheme, authority, (":path", "ok/a")], "400"),
            (&[(":method", "G\u{1}T"), scheme, authority, path], "RST"),
            (&[method, scheme, authority, (":path", "http://other.test/ok/a")], "400"),
        ];
        for (fields, expected) in told {
            let mut raw = Raw::new(&rig);
            raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &hpack(fields)));
            let answer = raw.answer(1);
            let status = match answer.kind {
                HEADERS => hpack_status(&answer.payload),
                _ => "RST".to_owned(),
            };
            assert!(status == *expected || status == "RST", "{fields:?}: {answer:?}");
            assert!(*expected != "403" || status == "403", "{fields:?}: {answer:?}");
        }
        let seen = rig.upstream.requests();
        assert!(seen.iter().all(|one| one.contains("/ok/next")), "{seen:?}");
        // Translated from HTTP/1.1, there may be no `:authority` (RFC 9113, section 8.3.1).
        let mut raw = Raw::new(&rig);
        let host = hpack(&[method, scheme, (":path", "/ok/host"), ("host", "rpc.test")]);
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &host));
        assert_eq!(hpack_status(&raw.answer(1).payload), "200");
        let seen = rig.upstream.requests();
        assert!(seen.iter().any(|one| one == "GET http://rpc.test/ok/host\n"), "{seen:?}");
        lives(&rig);
    });
}

/// The status of a response's head: one of the static table, or a literal by Huffman's code.
fn hpack_status(block: &[u8]) -> String {
    match block {
        [0x88, ..] => "200".to_owned(),
        [0x8c, ..] => "400".to_owned(),
        [0x48 | 0x08, length, rest @ ..] if length & 0x80 != 0 => {
            let bits = rest[..usize::from(length & 0x7f)].iter();
            let mut bits = bits.flat_map(|byte| (0..8).rev().map(move |at| byte >> at & 1));
            let mut take = |count| (0..count).try_fold(0, |all, _| Some(all << 1 | bits.next()?));
            // 0 to 2 have five bits, 3 to 9 six.
            std::iter::from_fn(|| match take(5)? {
                low @ 0..=2 => Some(char::from(b'0' + low)),
                high @ 12..=15 => Some(char::from(b'3' + (high << 1 | take(1)?) - 25)),
                _ => None,
            })
            .collect()
        }
        other => panic!("{other:x?}"),
    }
}

#[test]
fn connections_that_break_the_rules_end() {
    in_namespace(|rig| {
        let upper = hpack(&[(":method", "GET"), (":scheme", "http"), ("X-Upper", "1")]);
        let rows: &[(&str, Vec<u8>)] = &[
            ("upper case", frame(HEADERS, END_HEADERS | END_STREAM, 1, &upper)),
            ("even stream", frame(HEADERS, END_HEADERS | END_STREAM, 2, &get("/ok/bad"))),
            ("stream zero", frame(HEADERS, END_HEADERS | END_STREAM, 0, &get("/ok/bad"))),
            ("data on idle stream", frame(DATA, 0, 1, b"x")),
            (
                "bad hpack",
                frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0xff, 0xff, 0xff, 0xff, 0xff]),
            ),
            ("lone continuation", frame(CONTINUATION, END_HEADERS, 1, &get("/ok/bad"))),
            ("short ping", frame(PING, 0, 0, &[0; 4])),
            ("settings on a stream", frame(SETTINGS, 0, 1, &[])),
            ("ack nobody waits for", frame(SETTINGS, ACK, 0, &[])),
            ("window overflow", {
                let mut twice = frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffffu32.to_be_bytes());
                twice.extend(twice.clone());
                twice
            }),
            ("frame too long", frame(DATA, 0, 1, &vec![0; 20_000])),
            ("push from a client", frame(5, END_HEADERS, 1, &[0, 0, 0, 2])),
            ("interrupted head", {
                let mut bytes = frame(HEADERS, END_STREAM, 1, &get("/ok/bad"));
                bytes.extend(frame(PING, 0, 0, &[0; 8]));
                bytes
            }),
        ];
        for (what, bytes) in rows {
            let mut raw = Raw::new(&rig);
            raw.send(bytes);
            let code = raw.gone();
            assert!(code.is_some_and(|code| code != 0), "{what}: {code:?}");
        }
        // No HTTP/2 at all behind its first words.
        let mut tcp = rig.tunnel("rpc.test:8081");
        tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n").expect("send");
        let _ = crate::rig::read_to_end(&mut tcp);
        assert!(rig.upstream.requests().is_empty());
        lives(&rig);
    });
}

/// Sends frames until the proxy hangs up or all are gone; the code of its goodbye.
fn flood(rig: &Rig, count: usize, mut one: impl FnMut(u32) -> Vec<u8>) -> Option<u32> {
    let mut raw = Raw::new(rig);
    let mut reader = Raw { tcp: raw.tcp.try_clone().expect("clone") };
    let reading = std::thread::spawn(move || {
        let code = reader.until(|frame| frame.kind == GOAWAY).map(|frame| frame.code());
        while reader.next().is_some() {}
        code
    });
    let mut taken = true;
    for n in 0..u32::try_from(count / 100).expect("count") {
        let batch: Vec<u8> = (0..100).flat_map(|m| one(n * 100 + m)).collect();
        taken = raw.send(&batch);
        if !taken {
            break;
        }
    }
    let _ = raw.tcp.shutdown(std::net::Shutdown::Write);
    let code = reading.join().expect("reader");
    assert!(!taken || code.is_some(), "all {count} were taken");
    code
}

#[test]
fn floods_end_the_connection() {
    in_namespace(|rig| {
        let odd = |n: u32| 2 * n + 1;
        let calm = |what: &str, code: Option<u32>| {
            // A reset of the connection may overtake the frame.
            assert!(code.is_none_or(|code| code == ENHANCE_YOUR_CALM), "{what}: {code:?}");
            lives(&rig);
        };
        calm("pings", flood(&rig, 20_000, |_| frame(PING, 0, 0, &[7; 8])));
        calm("settings", flood(&rig, 20_000, |_| frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9])));
        calm("priorities", flood(&rig, 20_000, |n| frame(PRIORITY, 0, odd(n), &[0, 0, 0, 0, 1])));
        calm("windows", flood(&rig, 20_000, |_| frame(WINDOW_UPDATE, 0, 0, &1u32.to_be_bytes())));
        calm("unknown frames", flood(&rig, 20_000, |_| frame(0xfe, 0, 0, &[])));
        calm("empty data", {
            let mut open = frame(HEADERS, END_HEADERS, 1, &{
                hpack(&[
                    (":method", "POST"),
                    (":scheme", "http"),
                    (":authority", "rpc.test:8081"),
                    (":path", "/echo.Echo/Stream"),
                ])
            });
            flood(&rig, 20_000, |_| {
                let mut bytes = std::mem::take(&mut open);
                bytes.extend(frame(DATA, 0, 1, &[]));
                bytes
            })
        });
        // CVE-2023-44487: opened and reset at once, judged or denied or not looked at.
        for path in ["/ok/hang", "/denied"] {
            calm("rapid reset", {
                flood(&rig, 20_000, |n| {
                    let mut bytes = frame(HEADERS, END_HEADERS | END_STREAM, odd(n), &get(path));
                    bytes.extend(frame(RST_STREAM, 0, odd(n), &8u32.to_be_bytes()));
                    bytes
                })
            });
        }
        // A head that never ends: small fields, nothing at all, and one huge field.
        let mut begun = false;
        calm(
            "continuations",
            flood(&rig, 20_000, |n| {
                let kind = if std::mem::replace(&mut begun, true) { CONTINUATION } else { HEADERS };
                frame(kind, 0, 1, &hpack(&[(&format!("x-{n}"), "y")]))
            }),
        );
        let mut begun = false;
        calm(
            "empty continuations",
            flood(&rig, 20_000, |_| {
                let kind = if std::mem::replace(&mut begun, true) { CONTINUATION } else { HEADERS };
                frame(kind, 0, 1, &[])
            }),
        );
        let mut begun = false;
        let code = flood(&rig, 2_000, |_| {
            if std::mem::replace(&mut begun, true) {
                frame(CONTINUATION, 0, 1, &[b'y'; 16_000])
            } else {
                // A value of some 16 MiB.
                frame(HEADERS, 0, 1, &[0, 1, b'x', 127, 0xff, 0xff, 0xff, 0x07])
            }
        });
        assert!(code.is_none_or(|code| code != 0), "{code:?}");
        lives(&rig);
    });
}

#[test]
fn heads_that_are_too_large_are_told_so() {
    in_namespace(|rig| {
        let long = "y".repeat(9_000);
        let fields = [
            (":method", "GET"),
            (":scheme", "http"),
            (":authority", "rpc.test:8081"),
            (":path", "/ok/bad"),
            ("a", &long),
            ("b", &long),
            ("c", &long),
        ];
        let block = hpack(&fields);
        let mut raw = Raw::new(&rig);
        raw.send(&frame(HEADERS, END_STREAM, 1, &block[..16_000]));
        raw.send(&frame(CONTINUATION, END_HEADERS, 1, &block[16_000..]));
        assert_eq!(hpack_status(&raw.answer(1).payload), "431");
        // Small on the wire, large when unpacked: one entry of the table (62), many times.
        let mut bomb = vec![0x40];
        bomb.extend_from_slice(&hpack(&[("x", &"z".repeat(3_000))])[1..]);
        bomb.extend(std::iter::repeat_n(0xbe, 2_000));
        let mut raw = Raw::new(&rig);
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &bomb));
        let answer = raw.answer(1);
        assert!(answer.kind != HEADERS || hpack_status(&answer.payload) == "431", "{answer:?}");
        // Many small ones: told by us.
        let mut many = get("/ok/bad");
        for n in 0..101 {
            many.extend(hpack(&[(&format!("x{n}"), "")]));
        }
        let mut raw = Raw::new(&rig);
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &many));
        assert_eq!(hpack_status(&raw.answer(1).payload), "431");
        assert!(rig.upstream.requests().is_empty());
        lives(&rig);
    });
}

#[test]
fn slow_bodies_take_no_more_than_their_share() {
    in_namespace(|rig| {
        let mut raw = Raw::new(&rig);
        let call = hpack(&[
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "rpc.test:8081"),
            (":path", "/echo.Echo/Stream"),
        ]);
        // A byte each, and nothing more.
        for n in 0..100 {
            raw.send(&frame(HEADERS, END_HEADERS, 2 * n + 1, &call));
            raw.send(&frame(DATA, 0, 2 * n + 1, b"x"));
        }
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 201, &get("/ok/more")));
        let refused = raw.answer(201);
        assert_eq!((refused.kind, refused.code()), (RST_STREAM, REFUSED_STREAM));
        lives(&rig);
        // One that ends makes room for another.
        raw.send(&frame(DATA, END_STREAM, 1, b"y"));
        assert!(raw.until(|f| f.stream == 1 && f.flags & END_STREAM != 0).is_some());
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 203, &get("/ok/more")));
        assert_eq!(raw.answer(203).kind, HEADERS);
        // More than the window holds is an error of the client's.
        let mut raw = Raw::new(&rig);
        raw.send(&frame(HEADERS, END_HEADERS, 1, &call.clone()));
        for _ in 0..40 {
            if !raw.send(&frame(DATA, 0, 1, &[b'x'; 16_000])) {
                break;
            }
        }
        // The echo is not read, so that window closes as well.
        let end = raw.until(|f| matches!(f.kind, RST_STREAM | GOAWAY)).expect("an end");
        assert_eq!(end.code(), 3, "FLOW_CONTROL_ERROR");
        lives(&rig);
    });
}

#[test]
fn all_connections_together_have_a_limit() {
    in_namespace(|rig| {
        let call = hpack(&[
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "rpc.test:8081"),
            (":path", "/echo.Echo/Stream"),
        ]);
        // Streams that never end: 1,024 on all connections.
        let mut open: Vec<Raw> = (0..10).map(|_| Raw::new(&rig)).collect();
        for raw in &mut open {
            for n in 0..100 {
                raw.send(&frame(HEADERS, END_HEADERS, 2 * n + 1, &call));
            }
            assert_eq!(raw.answer(199).kind, HEADERS);
        }
        let mut last = Raw::new(&rig);
        for n in 0..25 {
            last.send(&frame(HEADERS, END_HEADERS, 2 * n + 1, &call));
        }
        // A refusal comes at once, the others' answers from the upstream.
        let answers: Vec<_> =
            std::iter::from_fn(|| last.until(|frame| matches!(frame.kind, HEADERS | RST_STREAM)))
                .take(25)
                .collect();
        let refused: Vec<_> = answers.iter().filter(|answer| answer.kind == RST_STREAM).collect();
        assert!(matches!(refused[..], [one] if one.stream == 49 && one.code() == REFUSED_STREAM));
        drop(open.pop());
        // Their end is seen soon, not at once.
        let again = (25..2_000).map(|n| 2 * n + 1).find(|stream| {
            last.send(&frame(HEADERS, END_HEADERS, *stream, &call));
            std::thread::sleep(Duration::from_millis(10));
            last.answer(*stream).kind == HEADERS
        });
        assert!(again.is_some());
        drop((open, last));

        // Connections: 128.
        let mut open: Vec<Raw> = Vec::new();
        let mut refused = false;
        while open.len() < 140 && !refused {
            let mut raw = Raw::new(&rig);
            refused = raw.until(|frame| frame.kind == SETTINGS && frame.flags & ACK != 0).is_none();
            open.push(raw);
        }
        assert!(refused && open.len() > 100, "{}", open.len());
        let ask = |alpn: &[&str]| {
            let mut tls = rig.tls("rpc.test:4433", "rpc.test", alpn);
            tls.write_all(b"x").and_then(|()| tls.flush()).map_err(|error| error.to_string())
        };
        let only = ask(&["h2"]).expect_err("no place");
        assert!(only.contains("NoApplicationProtocol"), "{only}");
        let mut tls = rig.tls("api.test:443", "api.test", &["h2", "http/1.1"]);
        tls.write_all(b"GET /ok/1 HTTP/1.1\r\nHost: api.test\r\n\r\n").expect("send");
        let (head, _) = crate::rig::read_response(&mut tls);
        assert!(head.starts_with("HTTP/1.1 200 "), "in HTTP/1.1 instead: {head}");
        drop(open);
        let lived = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            ask(&["h2"]).is_ok()
        });
        assert!(lived, "the proxy did not recover");
    });
}

/// Interim responses are held back by no window.
#[test]
fn interim_responses_have_a_size_together() {
    in_namespace(|rig| {
        let mut raw = Raw::new(&rig);
        assert!(raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &get("/ok/many-hints"))));
        let mut hints = 0;
        let last = loop {
            let answer = raw.answer(1);
            match answer.kind {
                // Long ones have CONTINUATION frames behind them.
                HEADERS if answer.flags & END_HEADERS == 0 || answer.payload.len() > 8_000 => {
                    hints += 1;
                }
                _ => break answer,
            }
        };
        assert!(hints > 0 && hints < 5, "{hints} passed");
        assert_ne!(last.payload[0], 0x88, ":status 200");
        lives(&rig);
    });
}

/// Nor are heads: what a client does not read counts as long as it is kept for it.
#[test]
fn answers_that_nobody_reads_keep_their_streams_places() {
    in_namespace(|rig| {
        // 6 MB of heads, and less room in the kernel.
        let mut deaf = Raw::new(&rig);
        let small = 16 << 10;
        socket2::SockRef::from(&deaf.tcp).set_recv_buffer_size(small).expect("buffer");
        for n in 0..100 {
            let ask = frame(HEADERS, END_HEADERS | END_STREAM, 2 * n + 1, &get("/ok/long-head"));
            assert!(deaf.send(&ask));
        }
        let asked =
            || rig.upstream.requests().iter().filter(|one| one.contains("long-head")).count();
        while asked() < 100 {
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_millis(500));
        let call = hpack(&[
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "rpc.test:8081"),
            (":path", "/echo.Echo/Stream"),
        ]);
        // As many others as there is room for.
        let mut open: Vec<Raw> = (0..11).map(|_| Raw::new(&rig)).collect();
        let mut taken = 0;
        for raw in &mut open {
            for n in 0..100 {
                raw.send(&frame(HEADERS, END_HEADERS, 2 * n + 1, &call));
            }
            for _ in 0..100 {
                let answer = raw.until(|frame| matches!(frame.kind, HEADERS | RST_STREAM));
                taken += usize::from(answer.expect("an answer").kind == HEADERS);
            }
        }
        assert!(taken < 1_024, "{taken} were taken beside those");
        // With the connection, they are given back.
        drop((deaf, open));
        let mut last = Raw::new(&rig);
        let again = (0..500).map(|n| 2 * n + 1).find(|stream| {
            last.send(&frame(HEADERS, END_HEADERS, *stream, &call));
            std::thread::sleep(Duration::from_millis(10));
            last.answer(*stream).kind == HEADERS
        });
        assert!(again.is_some());
    });
}
