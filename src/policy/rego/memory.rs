//! What was answered before: a verdict depends on nothing but the question.
//!
//! Bounded in entries and in bytes, and in shards, so that no question waits for all others.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Mutex, PoisonError};

const SHARDS: usize = 8;
/// Entries of a shard. When it is full it is emptied: the next questions are evaluated again.
const ENTRIES: usize = 64;
/// Longer questions are not remembered, in bytes.
const LONGEST: usize = 2048;

/// A question, unambiguous: each part with its length before it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Question(Vec<u8>);

impl Question {
    pub fn part(&mut self, part: &[u8]) {
        self.0.extend_from_slice(&part.len().to_le_bytes());
        self.0.extend_from_slice(part);
    }
}

/// Answers by question. A clone remembers nothing.
#[derive(Debug)]
pub(super) struct Memory<V> {
    shards: [Mutex<HashMap<Question, V>>; SHARDS],
    hasher: RandomState,
}

impl<V> Default for Memory<V> {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::default()), hasher: RandomState::new() }
    }
}

impl<V> Clone for Memory<V> {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl<V: Clone> Memory<V> {
    /// The remembered answer, else what `answer` says. Errors are not remembered.
    pub fn get<E>(
        &self,
        question: Question,
        answer: impl FnOnce() -> Result<V, E>,
    ) -> Result<V, E> {
        let hash = self.hasher.hash_one(&question);
        let shard = &self.shards[usize::try_from(hash % SHARDS as u64).unwrap_or(0)];
        let lock = || shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&question) {
            return Ok(known.clone());
        }
        let answer = answer()?;
        if question.0.len() <= LONGEST {
            let mut shard = lock();
            if shard.len() >= ENTRIES {
                shard.clear();
            }
            shard.insert(question, answer.clone());
        }
        Ok(answer)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().unwrap().len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(parts: &[&str]) -> Question {
        let mut question = Question::default();
        for part in parts {
            question.part(part.as_bytes());
        }
        question
    }

    #[test]
    fn remembers_answers_and_no_errors() {
        let memory = Memory::default();
        assert_eq!(memory.get(question(&["a"]), || Err::<u8, _>("busy")), Err("busy"));
        assert_eq!(memory.get(question(&["a"]), || Ok::<_, ()>(1)), Ok(1));
        assert_eq!(memory.get(question(&["a"]), || Ok::<_, ()>(2)), Ok(1));
        assert_eq!(memory.clone().get(question(&["a"]), || Ok::<_, ()>(3)), Ok(3));
    }

    #[test]
    fn boundaries_count() {
        assert_ne!(question(&["a", "bc"]), question(&["ab", "c"]));
        assert_ne!(question(&["a"]), question(&["a", ""]));
    }

    #[test]
    fn is_bounded() {
        let memory = Memory::default();
        for n in 0..100 * ENTRIES {
            memory.get(question(&[&n.to_string()]), || Ok::<_, ()>(n)).unwrap();
        }
        assert!(memory.len() <= SHARDS * ENTRIES);
        let before = memory.len();
        memory.get(question(&["x".repeat(LONGEST).as_str()]), || Ok::<_, ()>(0)).unwrap();
        assert_eq!(memory.len(), before);
    }
}
