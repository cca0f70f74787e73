//! The digest in an image's name. A tag may mean another image on the node than at admission, so under
//! `strict` what a tag meant when its image was read is written behind it: `agent:1@sha256:…`. The
//! tag stays, for people; runtimes pull by the digest.

use serde_json::{Map, Value, json};

use super::json::set;
use super::{Class, ImageConfig, Refusal};

/// Puts the digest into a container that is to be fenced, where its image has none.
///
/// # Errors
/// It is not known: `ringfence inject` was not told.
pub(super) fn pin(
    container: &mut Map<String, Value>,
    name: &str,
    known: &ImageConfig,
) -> Result<(), Refusal> {
    let image = container.get("image").and_then(Value::as_str).unwrap_or_default();
    if image.contains('@') {
        return Ok(());
    }
    let Some(digest) = &known.digest else {
        let what =
            format!("container {name}: image {image} is named by tag, and its digest is not known");
        return Err(Refusal::new(Class::ImageTag, what));
    };
    let pinned = format!("{image}@{digest}");
    set(container, "image", json!(pinned));
    Ok(())
}

/// Whether one name is the other with a digest behind it: the manifest of a pod that was pinned, applied
/// again, has the tag alone.
pub(super) fn is_pinned_from(pinned: &str, image: &str) -> bool {
    let digest = pinned.strip_prefix(image).and_then(|rest| rest.strip_prefix('@'));
    !image.contains('@') && digest.is_some_and(|digest| digest.starts_with("sha256:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_gets_its_digest_and_a_digest_stays() {
        let known = ImageConfig { digest: Some("sha256:ab".into()), ..ImageConfig::default() };
        for (image, expected) in [
            ("r/a:1", "r/a:1@sha256:ab"),
            ("a", "a@sha256:ab"),
            ("r:5000/a", "r:5000/a@sha256:ab"),
            ("r/a:1@sha256:cd", "r/a:1@sha256:cd"),
            ("r/a@sha256:cd", "r/a@sha256:cd"),
        ] {
            let mut container = json!({"image": image});
            pin(container.as_object_mut().unwrap(), "c", &known).unwrap();
            assert_eq!(container["image"], expected);
        }
        let mut container = json!({"image": "a"});
        let refusal =
            pin(container.as_object_mut().unwrap(), "c", &ImageConfig::default()).unwrap_err();
        assert_eq!((refusal.class, refusal.code), (Class::ImageTag, 422));
    }

    #[test]
    fn only_the_same_name_is_pinned_from_it() {
        assert!(is_pinned_from("r/a:1@sha256:ab", "r/a:1"));
        for (pinned, image) in [
            ("r/a:1", "r/a:1"),
            ("r/a:12@sha256:ab", "r/a:1"),
            ("r/a:1@sha256:ab", "r/a"),
            ("r/a:1@sha256:ab@sha256:cd", "r/a:1@sha256:ab"),
            ("r/a:1@x", "r/a:1"),
        ] {
            assert!(!is_pinned_from(pinned, image), "{pinned} {image}");
        }
    }
}
