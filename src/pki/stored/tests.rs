use super::*;

fn ca() -> Ca {
    Ca::make(CA_LIFE).expect("a CA")
}

fn until(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn full() -> Held<Ca> {
    let previous = [ca(), ca()].map(|ca| Previous { pem: ca.pem().to_owned(), until: until(77) });
    Held { current: ca(), next: Some(ca()), previous: previous.into(), requested: false }
}

fn shown(held: &Held<Ca>) -> String {
    let key = |ca: &Ca| format!("{}{}", ca.pem(), ca.authority().key_pem());
    let next = held.next.as_ref().map(key);
    format!("{} {next:?} {:?} {}", key(&held.current), held.previous, held.requested)
}

#[test]
fn what_is_stored_is_read_back() {
    for held in [full(), Held::first(ca())] {
        let again = super::held(&fill(Secret::default(), &held)).expect("reads back");
        assert_eq!(shown(&again), shown(&held));
    }
}

#[test]
fn the_secret_of_a_version_without_rotation_is_read() {
    let ca = ca();
    let secret = fill(Secret::default(), &Held::first(ca.clone()));
    let data = secret.data.as_ref().expect("data");
    assert_eq!(data.keys().collect::<Vec<_>>(), ["tls.crt", "tls.key"]);
    let valid = ca.expires().duration_since(ca.issued()).expect("a life");
    assert!(valid.abs_diff(CA_LIFE) < Duration::from_secs(2), "{valid:?}");
}

#[test]
fn what_is_over_is_taken_out_and_what_others_wrote_stays() {
    let mut secret = fill(Secret::default(), &full());
    let annotations = secret.metadata.annotations.get_or_insert_default();
    annotations.insert(ROTATE.to_owned(), "now".to_owned());
    annotations.insert("other".to_owned(), "stays".to_owned());
    assert!(held(&secret).expect("held").requested);
    let first = Held::first(ca());
    let secret = fill(secret, &first);
    assert_eq!(secret.data.as_ref().map(BTreeMap::len), Some(2));
    let annotations = secret.metadata.annotations.expect("annotations");
    assert_eq!(annotations.get("other").map(String::as_str), Some("stays"));
    assert_eq!(annotations.get(CURRENT), Some(&first.current.mark()));
    assert!(!annotations.contains_key(ROTATE));
}

#[test]
fn a_request_that_is_not_met_yet_stays() {
    let mut secret = Secret::default();
    secret.metadata.annotations.get_or_insert_default().insert(ROTATE.into(), "1".into());
    let secret = fill(secret, &Held { requested: true, ..full() });
    assert!(held(&secret).expect("held").requested);
}

#[test]
fn half_of_it_is_nothing() {
    let good = fill(Secret::default(), &full());
    let text = |text: &str| Some(ByteString(text.as_bytes().to_vec()));
    let other = ca().authority().key_pem();
    for (key, value) in [
        ("tls.crt", None),
        ("tls.key", None),
        ("tls.crt", text("x")),
        ("tls.key", text(&other)),
        ("next.crt", None),
        ("next.key", None),
        ("next.key", text(&other)),
        ("next.crt", Some(ByteString(vec![0xff]))),
        ("previous.until", None),
        ("previous.until", text("77\n")),
        ("previous.until", text("77\n77\n77\n")),
        ("previous.until", text("77\n-1\n")),
        ("previous.until", text("77\n18446744073709551615\n")),
        ("previous.crt", None),
        ("previous.crt", text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")),
    ] {
        let mut secret = good.clone();
        let data = secret.data.get_or_insert_default();
        match value.clone() {
            Some(value) => data.insert(key.to_owned(), value),
            None => data.remove(key),
        };
        assert!(held(&secret).is_err(), "{key} {value:?}");
    }
    held(&good).expect("whole");
}
