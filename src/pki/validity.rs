//! From when until when a certificate is valid, read from its DER.
//!
//! rustls' parser keeps what it verifies to itself. The walk knows the one shape of X.509 v3 (RFC
//! 5280, 4.1), which every certificate that verifies has, and gives up at anything else.

use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use time::{Date, Month, PrimitiveDateTime, Time};

/// The two ends of a certificate's validity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Its notBefore.
    pub not_before: SystemTime,
    /// Its notAfter.
    pub not_after: SystemTime,
}

/// The validity in the certificate, or None where it is not a certificate as we know it
/// (RFC 5280, 4.1).
#[must_use]
pub fn validity(certificate: &CertificateDer<'_>) -> Option<Validity> {
    let (certificate, _) = element(0x30, certificate)?;
    let (to_be_signed, _) = element(0x30, certificate)?;
    let (_, rest) = element(0xa0, to_be_signed)?; // version
    let (_, rest) = element(0x02, rest)?; // serialNumber
    let (_, rest) = element(0x30, rest)?; // signature
    let (_, rest) = element(0x30, rest)?; // issuer
    let (validity, _) = element(0x30, rest)?;
    let (not_before, rest) = instant(validity)?;
    let (not_after, _) = instant(rest)?;
    Some(Validity { not_before, not_after })
}

/// The content of the element of type `tag` that `der` begins with, and what follows it.
fn element(tag: u8, der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (head, rest) = der.split_first()?;
    if *head != tag {
        return None;
    }
    let (first, rest) = rest.split_first()?;
    let (length, rest) = match *first {
        short @ 0..=0x7f => (usize::from(short), rest),
        0x81 => (usize::from(*rest.first()?), rest.get(1..)?),
        0x82 => (usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?])), rest.get(2..)?),
        _ => return None,
    };
    rest.split_at_checked(length)
}

/// A `UTCTime` or `GeneralizedTime` in the form RFC 5280 asks for, and what follows it.
fn instant(der: &[u8]) -> Option<(SystemTime, &[u8])> {
    let two_digits = |text: &[u8]| -> Option<u8> {
        let [tens @ b'0'..=b'9', ones @ b'0'..=b'9'] = text else { return None };
        Some((tens - b'0') * 10 + (ones - b'0'))
    };
    let (year, text, rest) = if let Some((text, rest)) = element(0x17, der) {
        let year = i32::from(two_digits(text.get(..2)?)?);
        (if year < 50 { 2000 + year } else { 1900 + year }, text.get(2..)?, rest)
    } else {
        let (text, rest) = element(0x18, der)?;
        let century = i32::from(two_digits(text.get(..2)?)?);
        (century * 100 + i32::from(two_digits(text.get(2..4)?)?), text.get(4..)?, rest)
    };
    if text.len() != 11 || text.last() != Some(&b'Z') {
        return None;
    }
    let part = |index: usize| two_digits(text.get(index * 2..index * 2 + 2)?);
    let date = Date::from_calendar_date(year, Month::try_from(part(0)?).ok()?, part(1)?).ok()?;
    let time = Time::from_hms(part(2)?, part(3)?, part(4)?).ok()?;
    let seconds = PrimitiveDateTime::new(date, time).assume_utc().unix_timestamp();
    let since = Duration::from_secs(u64::try_from(seconds).ok()?);
    Some((SystemTime::UNIX_EPOCH.checked_add(since)?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::Authority;

    #[test]
    fn the_ends_are_those_it_was_made_with() {
        // The second is beyond 2049, where the encoding changes.
        for days in [3650, 30 * 365] {
            let life = Duration::from_secs(days * 86_400);
            let before = SystemTime::now();
            let authority = Authority::ephemeral("test CA", life).expect("an authority");
            let read = validity(authority.certificate_der()).expect("a validity");
            let second = Duration::from_secs(1);
            let near = |instant: SystemTime, wanted: SystemTime| {
                instant + second >= wanted && instant <= wanted + 30 * second
            };
            assert!(near(read.not_after, before + life), "{read:?}");
            assert!(near(read.not_before, before - Duration::from_secs(86_400)), "{read:?}");
        }
    }

    #[test]
    fn what_is_cut_short_or_something_else_has_none() {
        let authority = Authority::ephemeral("test CA", Duration::from_secs(60)).expect("made");
        let whole = authority.certificate_der();
        for length in 0..whole.len() {
            assert_eq!(validity(&CertificateDer::from(&whole[..length])), None, "{length}");
        }
        assert_eq!(validity(&CertificateDer::from(vec![0xff; 300])), None);
    }
}
