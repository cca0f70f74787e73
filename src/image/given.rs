//! Images whose configuration is given, for registries that nobody here reaches.
//!
//! The file is what `ringfence inject --image-config` reads as well: a map of image to what it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use oci_client::Reference;
use serde::Deserialize;

use super::Config;

/// Why such a file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GivenError {
    /// It is not such a map; the reader's words name the line.
    #[error(transparent)]
    Malformed(#[from] serde_saphyr::Error),
    /// A key is no image reference.
    #[error("`{image}` is not an image reference: {reason}")]
    Reference {
        /// The key.
        image: String,
        /// What the parser said.
        reason: String,
    },
    /// Two keys are spellings of one image.
    #[error("image `{0}` stands twice")]
    Twice(String),
    /// A digest is none.
    #[error("image {image}: digest {digest:?} is not sha256:<64 hex digits>")]
    Digest {
        /// The image.
        image: String,
        /// Its digest as written.
        digest: String,
    },
}

/// An image as the file has it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Image {
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    user: String,
    working_dir: String,
    volumes: Vec<String>,
    digest: Option<String>,
}

/// The images of one file, by their full names: `agent` is `docker.io/library/agent:latest`.
#[derive(Debug, Clone, Default)]
pub struct Given(BTreeMap<String, Arc<Config>>);

impl Given {
    /// Reads the file's text, YAML or JSON.
    ///
    /// # Errors
    /// See [`GivenError`].
    pub fn read(text: &str) -> Result<Self, GivenError> {
        let images: BTreeMap<String, Image> = serde_saphyr::from_str(text)?;
        let mut all = BTreeMap::new();
        for (name, image) in images {
            let full = full_name(&name)
                .map_err(|reason| GivenError::Reference { image: name.clone(), reason })?;
            if let Some(digest) = image.digest.as_deref().filter(|digest| !is_digest(digest)) {
                return Err(GivenError::Digest { image: name, digest: digest.to_owned() });
            }
            if all.insert(full, Arc::new(image.into())).is_some() {
                return Err(GivenError::Twice(name));
            }
        }
        Ok(Self(all))
    }

    /// What is given of the image, which is written in any way.
    #[must_use]
    pub fn find(&self, image: &str) -> Option<Arc<Config>> {
        self.0.get(&full_name(image).ok()?).cloned()
    }
}

fn full_name(image: &str) -> Result<String, String> {
    let parsed: Reference =
        image.parse().map_err(|error: oci_client::ParseError| error.to_string())?;
    Ok(parsed.whole())
}

fn is_digest(digest: &str) -> bool {
    let is_hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    let hex = digest.strip_prefix("sha256:").map(str::as_bytes);
    hex.is_some_and(|hex| hex.len() == 64 && hex.iter().all(is_hex))
}

impl From<Image> for Config {
    fn from(image: Image) -> Self {
        let mut volumes = image.volumes;
        volumes.sort_unstable();
        Self {
            entrypoint: image.entrypoint,
            cmd: image.cmd,
            user: image.user,
            working_dir: image.working_dir,
            env: Vec::new(),
            volumes,
            digest: image.digest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_found_by_any_of_its_names() {
        let given = Given::read(
            "agent: {cmd: [run], volumes: [/b, /a]}\nr.example/team/app:1: {user: '7'}\n",
        );
        let given = given.expect("reads");
        for name in ["agent", "docker.io/agent", "docker.io/library/agent:latest"] {
            let found = given.find(name).expect(name);
            assert_eq!(
                (&found.cmd[0][..], &found.volumes[..]),
                ("run", &["/a".into(), "/b".into()][..])
            );
        }
        assert_eq!(given.find("r.example/team/app:1").expect("there").user, "7");
        for name in ["r.example/team/app", "r.example/team/app:2", "other", "Not An Image"] {
            assert!(given.find(name).is_none(), "{name}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("a: {entrypiont: [x]}", "entrypiont"),
            ("a: {digest: 'sha256:12'}", "64 hex"),
            ("a: {}\ndocker.io/library/a:latest: {}", "twice"),
            ("'A b': {}", "A b"),
            ("- a", "line 1"),
        ] {
            let error = Given::read(text).expect_err(text).to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
