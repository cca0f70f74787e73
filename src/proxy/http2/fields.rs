//! Header fields: which are refused, which belong to one connection, and how they look in HTTP/1.1.

use http::header::{CONTENT_LENGTH, COOKIE, HOST, TE};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::proxy::http::head::{REQUEST_FIELDS, REQUEST_MAX};

/// The largest request head, as HTTP/2 counts it (RFC 9113, section 6.5.2): what HTTP/1.1 may have,
/// and 32 bytes for each field.
pub(super) const LIST_MAX: usize = REQUEST_MAX + 32 * REQUEST_FIELDS;

/// Of one connection, or of the proxy before us. The library refuses most of these when they come in
/// (RFC 9113, section 8.2.2); those of an upstream that speaks HTTP/1.1 end here.
const OF_ONE_CONNECTION: [&str; 9] = [
    "connection",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// Never in trailers (RFC 9110, section 6.5.1): who merges them with the head would route, frame or
/// authorise by them.
const NOT_IN_TRAILERS: [&str; 6] =
    ["authorization", "content-length", "cookie", "host", "trailer", "set-cookie"];

/// Refuses what HTTP/1.1 would be refused for: status, code and reason.
pub(super) fn check(fields: &HeaderMap) -> Result<(), (u16, &'static str, &'static str)> {
    let invalid = |reason| Err((400, "invalid_request", reason));
    if fields.len() > REQUEST_FIELDS {
        return Err((431, "head_too_large", "too many header fields"));
    }
    for value in fields.values().map(HeaderValue::as_bytes) {
        if value.trim_ascii().len() != value.len() {
            return invalid("a field's value begins or ends with a blank");
        }
    }
    if fields.get_all(HOST).iter().count() > 1 {
        return invalid("more than one Host");
    }
    let mut lengths = fields.get_all(CONTENT_LENGTH).iter();
    if let Some(length) = lengths.next() {
        if lengths.next().is_some() {
            return invalid("more than one Content-Length");
        }
        let digits = length.as_bytes();
        if digits.is_empty() || digits.len() > 18 || !digits.iter().all(u8::is_ascii_digit) {
            return invalid("Content-Length is not a plain number");
        }
    }
    Ok(())
}

/// A request's fields as they go on. The authority goes by itself.
pub(super) fn of_request(mut fields: HeaderMap) -> HeaderMap {
    // The only value that the library lets in: the client can read trailers, which gRPC asks for.
    let trailers = fields.contains_key(TE);
    remove(&mut fields, &OF_ONE_CONNECTION);
    fields.remove(HOST);
    if trailers {
        fields.insert(TE, HeaderValue::from_static("trailers"));
    }
    fields
}

/// A response's fields as they go on.
pub(super) fn of_response(mut fields: HeaderMap) -> HeaderMap {
    remove(&mut fields, &OF_ONE_CONNECTION);
    fields
}

/// Trailers as they go on.
pub(super) fn of_trailers(mut fields: HeaderMap) -> HeaderMap {
    remove(&mut fields, &OF_ONE_CONNECTION);
    remove(&mut fields, &NOT_IN_TRAILERS);
    fields
}

fn remove(fields: &mut HeaderMap, names: &[&str]) {
    for name in names {
        fields.remove(*name);
    }
}

/// Appends a request's fields as HTTP/1.1 has them, each line with its end, but for those that
/// belong to the connection and to framing.
pub(super) fn write_http1(out: &mut Vec<u8>, fields: &HeaderMap) {
    let mut line = |name: &HeaderName, value: &[u8]| {
        for part in [name.as_str().as_bytes(), b": ", value, b"\r\n"] {
            out.extend_from_slice(part);
        }
    };
    for (name, value) in fields {
        let own = [HOST, CONTENT_LENGTH, COOKIE].contains(name) || name == "trailer";
        if !own && !OF_ONE_CONNECTION.contains(&name.as_str()) {
            line(name, value.as_bytes());
        }
    }
    // HTTP/2 may split it, HTTP/1.1 has one (RFC 9113, section 8.2.3).
    let cookies: Vec<&[u8]> = fields.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if !cookies.is_empty() {
        line(&COOKIE, &cookies.join(&b"; "[..]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&str, &str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(name, value)| {
                (
                    name.parse::<HeaderName>().expect("name"),
                    HeaderValue::from_str(value).expect("v"),
                )
            })
            .fold(HeaderMap::new(), |mut map, (name, value)| {
                map.append(name, value);
                map
            })
    }

    #[test]
    fn odd_heads_are_refused() {
        assert!(check(&map(&[("a", "b c"), ("host", "h"), ("content-length", "5")])).is_ok());
        for bad in [
            &[("a", " b")][..],
            &[("a", "b\t")],
            &[("host", "h"), ("host", "h")],
            &[("content-length", "5"), ("content-length", "5")],
            &[("content-length", "+5")],
            &[("content-length", "")],
            &[("content-length", "5,5")],
        ] {
            assert!(check(&map(bad)).is_err(), "{bad:?}");
        }
        let many = vec![("a", "b"); REQUEST_FIELDS + 1];
        assert!(check(&map(&many)).is_err_and(|(status, ..)| status == 431));
    }

    #[test]
    fn what_belongs_to_one_connection_stays_there() {
        let fields = of_request(map(&[
            ("te", "trailers"),
            ("host", "h"),
            ("proxy-authorization", "x"),
            ("http2-settings", "x"),
            ("grpc-timeout", "1S"),
        ]));
        let mut names: Vec<_> = fields.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["grpc-timeout", "te"]);
        let trailers = of_trailers(map(&[("grpc-status", "0"), ("host", "x"), ("te", "x")]));
        assert_eq!(trailers.keys().collect::<Vec<_>>(), ["grpc-status"]);
    }

    #[test]
    fn as_http1_has_them() {
        let mut out = Vec::new();
        let fields = [("cookie", "a=1"), ("x", "1"), ("cookie", "b=2"), ("te", "trailers")];
        write_http1(&mut out, &map(&fields));
        assert_eq!(String::from_utf8_lossy(&out), "x: 1\r\ncookie: a=1; b=2\r\n");
    }
}
