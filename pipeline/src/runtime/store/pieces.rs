//! States cut into pieces, so that a checkpoint writes those alone that have changed since the one before.
//!
//! The cuts follow the content: a state that grew or shrank in the middle has the same pieces before and after that
//! place. What a piece holds does not matter here; its hash names it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use xxhash_rust::xxh3::xxh3_128;

/// Bytes of a piece: no cut before the least, one after the most, and between them one in so many places.
const PIECE_BYTES_MIN: usize = 8 << 10;
const PIECE_BYTES_MAX: usize = 128 << 10;
const CUT_MASK: u64 = (1 << 15) - 1;

/// A piece of a state, and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) hash: u128,
    pub(crate) length: u64,
    /// The checkpoint whose file of pieces has it.
    pub(crate) file: u64,
    pub(crate) offset: u64,
}

/// One word per byte, as good as random: where the sum of the last 64 has a pattern, a cut is made.
const GEAR: [u64; 256] = {
    let mut gear = [0; 256];
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut index = 0;
    while index < gear.len() {
        // splitmix64.
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        gear[index] = word ^ (word >> 31);
        index += 1;
    }
    gear
};

/// Cuts a state where its content says so.
pub(crate) fn cut(state: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = state;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, after) = rest.split_at(first_cut(rest));
        rest = after;
        Some(piece)
    })
}

fn first_cut(bytes: &[u8]) -> usize {
    let most = bytes.len().min(PIECE_BYTES_MAX);
    let mut sum = 0_u64;
    // The last 64 bytes alone decide: what is further back has left the sum.
    for index in PIECE_BYTES_MIN.saturating_sub(64)..most {
        sum = (sum << 1).wrapping_add(GEAR[usize::from(bytes[index])]);
        if index >= PIECE_BYTES_MIN && sum >> 49 & CUT_MASK == 0 {
            return index + 1;
        }
    }
    most
}

/// The pieces that kept checkpoints name, and the files they are in.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    known: HashMap<u128, Piece>,
    /// Bytes of each file.
    files: BTreeMap<u64, u64>,
}

/// New pieces on their way to a file.
#[derive(Debug, Default)]
pub(crate) struct Fresh {
    file: u64,
    pub(crate) bytes: Vec<u8>,
    by_hash: HashMap<u128, Piece>,
}

impl Fresh {
    pub(crate) fn new(file: u64) -> Self {
        Self { file, ..Self::default() }
    }

    fn add(&mut self, hash: u128, bytes: &[u8]) -> Piece {
        let (file, offset, length) = (self.file, self.bytes.len() as u64, bytes.len() as u64);
        *self.by_hash.entry(hash).or_insert_with(|| {
            self.bytes.extend_from_slice(bytes);
            Piece { hash, length, file, offset }
        })
    }
}

impl Pieces {
    /// The pieces of a state; those that no file has go to `fresh`, and so do those in the files `leaving`.
    pub(crate) fn place(&self, state: &[u8], leaving: &BTreeSet<u64>, fresh: &mut Fresh) -> Vec<Piece> {
        let place = |bytes: &[u8]| {
            let hash = xxh3_128(bytes);
            match self.known.get(&hash) {
                Some(piece) if !leaving.contains(&piece.file) => *piece,
                _ => fresh.add(hash, bytes),
            }
        };
        cut(state).map(place).collect()
    }

    /// Files of which less than half is still asked for: their pieces move, so that the files can go.
    pub(crate) fn sparse(&self) -> BTreeSet<u64> {
        let mut used: BTreeMap<u64, u64> = BTreeMap::new();
        for piece in self.known.values() {
            *used.entry(piece.file).or_default() += piece.length;
        }
        let is_sparse = |(file, bytes): (&u64, &u64)| (used.get(file).unwrap_or(&0) * 2 < *bytes).then_some(*file);
        self.files.iter().filter_map(is_sparse).collect()
    }

    /// A checkpoint names these pieces now, and the one after it looks for its own among them.
    pub(crate) fn note(&mut self, pieces: impl Iterator<Item = Piece>) {
        self.known = pieces.map(|piece| (piece.hash, piece)).collect();
        for piece in self.known.values() {
            let bytes = self.files.entry(piece.file).or_default();
            *bytes = (*bytes).max(piece.offset + piece.length);
        }
        let named: BTreeSet<u64> = self.known.values().map(|piece| piece.file).collect();
        self.files.retain(|file, _| named.contains(file));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::simulated::Random;

    fn random(bytes: usize, seed: u64) -> Vec<u8> {
        let mut random = Random::new(seed);
        (0..bytes).map(|_| random.below(256) as u8).collect()
    }

    #[test]
    fn a_change_in_the_middle_changes_few_pieces() {
        let before = random(2 << 20, 1);
        let mut fresh = Fresh::new(1);
        let mut pieces = Pieces::default();
        let placed = pieces.place(&before, &BTreeSet::new(), &mut fresh);
        assert_eq!(fresh.bytes, before);
        assert!((20..200).contains(&placed.len()), "{}", placed.len());
        assert!(placed.iter().all(|piece| piece.length <= PIECE_BYTES_MAX as u64));
        pieces.note(placed.into_iter());
        for (case, after) in [
            ("the same", before.clone()),
            ("grown at the end", [&before[..], b"more"].concat()),
            ("grown in the middle", [&before[..1 << 20], b"more", &before[1 << 20..]].concat()),
            ("shrunk in the middle", [&before[..1 << 20], &before[(1 << 20) + 7..]].concat()),
        ] {
            let mut fresh = Fresh::new(2);
            let placed = pieces.place(&after, &BTreeSet::new(), &mut fresh);
            assert_eq!(placed.iter().map(|piece| piece.length).sum::<u64>(), after.len() as u64, "{case}");
            assert!(fresh.bytes.len() <= 3 * PIECE_BYTES_MAX, "{case}: {}", fresh.bytes.len());
            assert_eq!(fresh.bytes.is_empty(), case == "the same", "{case}");
        }
    }

    #[test]
    fn repeated_content_is_kept_once_and_files_that_are_hardly_used_are_left() {
        let mut pieces = Pieces::default();
        let mut fresh = Fresh::new(1);
        let zeros = vec![0; 1 << 20];
        let mixed = random(1 << 20, 2);
        let placed =
            [pieces.place(&zeros, &BTreeSet::new(), &mut fresh), pieces.place(&mixed, &BTreeSet::new(), &mut fresh)];
        assert!(fresh.bytes.len() < mixed.len() + 2 * PIECE_BYTES_MAX, "{}", fresh.bytes.len());
        pieces.note(placed.concat().into_iter());
        assert!(pieces.sparse().is_empty());
        // Most of the first file is no longer asked for.
        let quarter = &mixed[..1 << 18];
        let mut fresh = Fresh::new(2);
        let placed = pieces.place(quarter, &pieces.sparse(), &mut fresh);
        pieces.note(placed.into_iter());
        assert_eq!(pieces.sparse(), BTreeSet::from([1]));
        let mut fresh = Fresh::new(3);
        let placed = pieces.place(quarter, &pieces.sparse(), &mut fresh);
        assert!(placed.iter().all(|piece| piece.file != 1));
        pieces.note(placed.into_iter());
        assert!(!pieces.files.contains_key(&1));
    }
}
