//! Methods that a server may take instead of the one in the request line: frameworks let a header
//! field, or `_method` in the query, change it. A request that asks for that is judged as both.
#![forbid(unsafe_code)]

/// The fields that frameworks read, in lower case and with dashes.
const FIELDS: [&str; 3] = ["x-http-method-override", "x-http-method", "x-method-override"];

/// The parameters.
const PARAMETERS: [&str; 2] = ["_method", "x-http-method-override"];

/// Fields that name another target than the request line, for servers behind a proxy that rewrote
/// it (IIS, Symfony and others).
const TARGETS: [&str; 2] = ["x-original-url", "x-rewrite-url"];

/// More ways than this to say what is meant are a trick.
const MOST: usize = 4;

/// What header fields ask a server to take instead of the request line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Instead {
    /// Methods: see [`Request::overrides`](super::Request::overrides).
    pub methods: Vec<String>,
    /// Another target.
    pub target: bool,
}

impl Instead {
    /// `fields` are names and values of those that are sent on.
    pub fn read<'a>(fields: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Self {
        let mut read = Self::default();
        for (name, value) in fields {
            if is_one_of(name, &FIELDS) {
                add(&mut read.methods, &String::from_utf8_lossy(value));
            }
            read.target |= is_one_of(name, &TARGETS);
        }
        read
    }
}

/// All methods beside `method` that the request asks for; `None`: too many.
pub(super) fn all(
    method: &str,
    fields: &[String],
    query: &[(String, String)],
) -> Option<Vec<String>> {
    let mut methods = fields.to_vec();
    for (name, value) in query {
        let plain = name.trim().trim_end_matches("[]");
        if PARAMETERS.iter().any(|parameter| plain.eq_ignore_ascii_case(parameter)) {
            add(&mut methods, value);
        }
    }
    methods.retain(|other| !other.eq_ignore_ascii_case(method));
    (methods.len() <= MOST).then_some(methods)
}

/// Servers do not tell `-` from `_` in names, once they are variables of CGI.
fn is_one_of(name: &[u8], names: &[&str]) -> bool {
    names.iter().any(|wanted| {
        name.len() == wanted.len()
            && name.iter().zip(wanted.bytes()).all(|(byte, wanted)| {
                byte.eq_ignore_ascii_case(&wanted) || (*byte == b'_' && wanted == b'-')
            })
    })
}

fn add(methods: &mut Vec<String>, value: &str) {
    for one in value.split(',').map(str::trim).filter(|one| !one.is_empty()) {
        let one = one.to_ascii_uppercase();
        if methods.len() <= MOST && !methods.contains(&one) {
            methods.push(one);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(fields: &[(&str, &str)]) -> Vec<String> {
        let fields = fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
        Instead::read(fields).methods
    }

    #[test]
    fn fields_and_parameters() {
        for name in ["X-HTTP-Method-Override", "x_http_method_override", "X-Method-Override"] {
            assert_eq!(read(&[(name, " delete ")]), ["DELETE"], "{name}");
        }
        assert_eq!(
            read(&[("X-HTTP-Method", "PUT, PATCH"), ("X-HTTP-Method", "put")]),
            ["PUT", "PATCH"]
        );
        assert!(read(&[("X-HTTP-Method-Overrides", "PUT"), ("Method", "PUT")]).is_empty());
        let pair = |name: &str| [(name.to_owned(), "Delete".to_owned())];
        for name in ["_method", "_METHOD", " _method", "_method[]", "X-HTTP-Method-Override"] {
            let all = all("POST", &[], &pair(name)).expect("one");
            assert_eq!(all, ["DELETE"], "{name}");
        }
        assert_eq!(all("delete", &[], &pair("_method")), Some(vec![]), "the same");
        assert_eq!(all("POST", &[], &pair("method")), Some(vec![]));
        let many = read(&[("X-HTTP-Method", "a,b,c,d,e,f,g")]);
        assert_eq!(all("POST", &many, &[]), None);
        let targets =
            |name: &str| Instead::read([(name.as_bytes(), &b"/x"[..])].into_iter()).target;
        assert!(targets("X-Original-URL") && targets("x_rewrite_url") && !targets("X-Original"));
    }
}
