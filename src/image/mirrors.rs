//! Other places where a registry's images are: asked before the registry itself.

use std::collections::BTreeMap;
use std::str::FromStr;

use oci_client::Reference;

/// Where images of a registry are too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The registry whose images they are, as references name it: `docker.io`.
    registry: String,
    /// Host, and port where it has one.
    host: String,
    /// What stands before the image's own path there; may be empty.
    path: String,
}

impl FromStr for Mirror {
    type Err = String;

    /// `REGISTRY=HOST[:PORT][/PATH]`
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write REGISTRY=HOST[:PORT][/PATH], as in docker.io=mirror.example/hub";
        let (registry, place) = text.split_once('=').ok_or_else(wrong)?;
        let (host, path) = place.split_once('/').unwrap_or((place, ""));
        let is_host = |host: &str| {
            !host.is_empty()
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b))
        };
        let path = path.trim_end_matches('/');
        // A whole reference has to come out of it.
        let fits = format!("{host}/{path}{}image", if path.is_empty() { "" } else { "/" });
        let parsed = fits.parse::<Reference>();
        let names_host = parsed.is_ok_and(|parsed| parsed.registry() == host);
        if !is_host(registry) || !is_host(host) || !names_host {
            return Err(wrong().to_owned());
        }
        let registry = super::credentials::hub_name(&registry.to_ascii_lowercase()).to_owned();
        Ok(Self { registry, host: host.to_owned(), path: path.to_owned() })
    }
}

/// All mirrors, by registry.
#[derive(Debug, Clone, Default)]
pub struct Mirrors(BTreeMap<String, Vec<Mirror>>);

impl FromIterator<Mirror> for Mirrors {
    fn from_iter<T: IntoIterator<Item = Mirror>>(mirrors: T) -> Self {
        let mut all = Self::default();
        for mirror in mirrors {
            all.0.entry(mirror.registry.clone()).or_default().push(mirror);
        }
        all
    }
}

impl Mirrors {
    /// The image's names on the mirrors of its registry, in the order given.
    pub(super) fn of(&self, image: &Reference) -> Vec<Reference> {
        let registry = image.registry().to_ascii_lowercase();
        let mirrors = self.0.get(super::credentials::hub_name(&registry));
        mirrors.into_iter().flatten().map(|mirror| mirror.name_of(image)).collect()
    }
}

impl Mirror {
    fn name_of(&self, image: &Reference) -> Reference {
        let path = if self.path.is_empty() {
            image.repository().to_owned()
        } else {
            format!("{}/{}", self.path, image.repository())
        };
        let host = self.host.clone();
        match (image.tag(), image.digest()) {
            (Some(tag), Some(digest)) => {
                Reference::with_tag_and_digest(host, path, tag.to_owned(), digest.to_owned())
            }
            (None, Some(digest)) => Reference::with_digest(host, path, digest.to_owned()),
            (tag, None) => Reference::with_tag(host, path, tag.unwrap_or("latest").to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_its_name_on_each_mirror_of_its_registry() {
        let mirrors: Mirrors =
            ["index.docker.io=m.example:5000/hub/", "docker.io=n.example", "r.example=n.example/r"]
                .map(|text| text.parse().expect(text))
                .into_iter()
                .collect();
        let names = |image: &str| -> Vec<String> {
            mirrors.of(&image.parse().expect(image)).iter().map(Reference::whole).collect()
        };
        let digest = format!("sha256:{}", "a".repeat(64));
        assert_eq!(
            names("busybox"),
            ["m.example:5000/hub/library/busybox:latest", "n.example/library/busybox:latest"]
        );
        assert_eq!(
            names(&format!("r.example/a:1@{digest}")),
            [format!("n.example/r/a:1@{digest}")]
        );
        assert_eq!(names(&format!("R.example/a@{digest}")), [format!("n.example/r/a@{digest}")]);
        assert!(names("other.example/a").is_empty());
    }

    #[test]
    fn what_is_no_mirror_is_told_how_to_be_one() {
        for text in [
            "docker.io",
            "=m.example",
            "docker.io=",
            "docker.io=/hub",
            "docker.io=m",
            "a b=m.example",
            "docker.io=https://m.example",
        ] {
            let error = text.parse::<Mirror>().expect_err(text);
            assert!(error.contains("REGISTRY=HOST"), "{text}: {error}");
        }
    }
}
