//! Where each chunk of a copy stands.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a chunk of a copy stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ChunkState {
    /// Nobody copies it yet.
    Pending = b'p',
    /// A worker copies it, or waits for the answers to its documents.
    Claimed = b'c',
    /// Failed at least once and is tried again.
    Retrying = b'r',
    /// Elasticsearch has answered for its last document.
    Done = b'd',
}

impl ChunkState {
    /// The state that `byte` stands for; an unknown byte is `Pending`, the state that claims least.
    #[must_use]
    pub fn from_byte(byte: u8) -> Self {
        match byte {
            b'c' => ChunkState::Claimed,
            b'r' => ChunkState::Retrying,
            b'd' => ChunkState::Done,
            _ => ChunkState::Pending,
        }
    }
}

/// The chunks of one table in order, a byte each ([`ChunkState`]).
///
/// Serialised run-length coded, as `d1590c4p326`: 25,600 chunks are then a few bytes.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ChunkMap(pub Vec<u8>);

impl ChunkMap {
    /// The states in order.
    pub fn states(&self) -> impl Iterator<Item = ChunkState> + '_ {
        self.0.iter().map(|&byte| ChunkState::from_byte(byte))
    }

    /// How many chunks there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// There is no chunk: the copy is not planned yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many chunks are done.
    #[must_use]
    pub fn done(&self) -> usize {
        self.0.iter().filter(|&&byte| byte == ChunkState::Done as u8).count()
    }
}

impl fmt::Display for ChunkMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for run in self.0.chunk_by(|a, b| a == b) {
            write!(f, "{}{}", char::from(run[0]), run.len())?;
        }
        Ok(())
    }
}

impl fmt::Debug for ChunkMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkMap({self})")
    }
}

impl Serialize for ChunkMap {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ChunkMap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bad = || serde::de::Error::custom(format!("`{text}` is no list of chunk states such as d12c4p8"));
        let mut states = Vec::new();
        let mut rest = text.as_str();
        while let Some(state) = rest.chars().next() {
            let digits = rest[state.len_utf8()..].chars().take_while(char::is_ascii_digit).count();
            let end = state.len_utf8() + digits;
            let count: u32 = rest[state.len_utf8()..end].parse().map_err(|_| bad())?;
            if !"pcrd".contains(state) || count > 100_000_000 {
                return Err(bad());
            }
            states.resize(states.len() + count as usize, state as u8);
            rest = &rest[end..];
        }
        Ok(ChunkMap(states))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_travel_as_runs() {
        let chunks = ChunkMap(b"ddddccp".to_vec());
        let json = serde_json::to_string(&chunks).expect("a string");
        assert_eq!(json, "\"d4c2p1\"");
        assert_eq!(serde_json::from_str::<ChunkMap>(&json).expect("its own text"), chunks);
        for bad in ["\"x4\"", "\"d\"", "\"4\"", "\"d99999999999\"", "\"d4 \""] {
            assert!(serde_json::from_str::<ChunkMap>(bad).is_err(), "{bad}");
        }
    }
}
