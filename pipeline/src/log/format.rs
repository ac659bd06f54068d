//! The bytes of a segment: written and read back. The layout is in the module above.

use bytes::Bytes;

use super::Record;

pub(super) const SEGMENT_MAGIC: [u8; 8] = *b"TAILWLOG";
const VERSION: u32 = 1;
/// Bytes of a segment's header before its head.
pub(super) const SEGMENT_HEADER: usize = 28;

/// The first byte is rare in text, so that looking for a group in a damaged place is quick.
const GROUP_MAGIC: [u8; 4] = [0xF7, b'G', b'R', b'P'];
/// Bytes of a group's header before its records.
pub(super) const GROUP_HEADER: usize = 32;
/// Bytes of a record's header before its metadata and payload.
pub(super) const RECORD_HEADER: usize = 17;
/// The kind of a record that was lost to damage: it only keeps its number.
pub(super) const LOST: u8 = 255;
/// The most bytes of one group. The format ends at 4 GiB; this leaves every machine able to hold a group in memory.
pub(super) const GROUP_BYTES_MAX: usize = 1 << 30;

/// The first bytes of a segment: its header and its head.
pub(super) fn segment_header(first_lsn: u64, head: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SEGMENT_HEADER + head.len());
    bytes.extend_from_slice(&SEGMENT_MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    // The caller bounds it by `GROUP_BYTES_MAX`.
    bytes.extend_from_slice(&(head.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&first_lsn.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[8..24]), head);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(head);
    bytes
}

/// Length of the header with its head, from the first [`SEGMENT_HEADER`] bytes of a segment.
pub(super) fn segment_header_length(bytes: &[u8]) -> Result<usize, &'static str> {
    if bytes.len() < SEGMENT_HEADER {
        return Err("the file ends within its header");
    }
    if bytes[..8] != SEGMENT_MAGIC {
        return Err("this is not a log segment");
    }
    if u32_at(bytes, 8) != VERSION {
        return Err("the format version is not known to this program");
    }
    Ok(SEGMENT_HEADER + u32_at(bytes, 12) as usize)
}

/// The head of a segment, from its header with the head.
pub(super) fn segment_head(bytes: &Bytes, first_lsn: u64) -> Result<Bytes, &'static str> {
    let length = segment_header_length(bytes)?;
    if bytes.len() < length {
        return Err("the file ends within its header");
    }
    let head = bytes.slice(SEGMENT_HEADER..length);
    if u32_at(bytes, 24) != crc32c::crc32c_append(crc32c::crc32c(&bytes[8..24]), &head) {
        return Err("the checksum of the header is wrong");
    }
    if u64_at(bytes, 16) != first_lsn {
        return Err("the header names another first record than the file name");
    }
    Ok(head)
}

/// Appends a record. The lengths are checked when the group is sealed: it holds at most [`GROUP_BYTES_MAX`].
pub(super) fn push_record(buffer: &mut Vec<u8>, kind: u8, ingest_us: i64, metadata: &[u8], payload: &[u8]) {
    let mut header = [0; RECORD_HEADER];
    header[0] = kind;
    header[1..9].copy_from_slice(&ingest_us.to_le_bytes());
    header[9..13].copy_from_slice(&(metadata.len() as u32).to_le_bytes());
    header[13..17].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    buffer.reserve(RECORD_HEADER + metadata.len() + payload.len());
    buffer.extend_from_slice(&header);
    buffer.extend_from_slice(metadata);
    buffer.extend_from_slice(payload);
}

/// Fills the header of a group whose records follow the first [`GROUP_HEADER`] bytes.
///
/// The checksum covers the group's place in the file too: a copy of a group, as part of a message or written to the wrong
/// place, is never taken for one.
pub(super) fn seal(group: &mut [u8], offset: u64, first_lsn: u64, count: u32, synced: u64) {
    let body = (group.len() - GROUP_HEADER) as u32;
    group[..4].copy_from_slice(&GROUP_MAGIC);
    group[4..8].copy_from_slice(&body.to_le_bytes());
    group[12..20].copy_from_slice(&first_lsn.to_le_bytes());
    group[20..24].copy_from_slice(&count.to_le_bytes());
    group[24..32].copy_from_slice(&synced.to_le_bytes());
    let crc = group_crc(group, offset);
    group[8..12].copy_from_slice(&crc.to_le_bytes());
}

fn group_crc(group: &[u8], offset: u64) -> u32 {
    let crc = crc32c::crc32c(&offset.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &group[4..8]);
    crc32c::crc32c_append(crc, &group[12..])
}

/// What a group's header says.
#[derive(Clone, Copy, Debug)]
pub(super) struct GroupHeader {
    /// Bytes of the whole group.
    pub(super) length: usize,
    pub(super) first_lsn: u64,
    pub(super) count: u32,
    pub(super) synced: u64,
}

/// The header of a group, from its first [`GROUP_HEADER`] bytes; nothing is proven until [`check_group`].
pub(super) fn group_header(bytes: &[u8]) -> Result<GroupHeader, &'static str> {
    if bytes.len() < GROUP_HEADER {
        return Err("the file ends within the header of a group");
    }
    if bytes[..4] != GROUP_MAGIC {
        return Err("no group begins here");
    }
    Ok(GroupHeader {
        length: GROUP_HEADER.saturating_add(u32_at(bytes, 4) as usize),
        first_lsn: u64_at(bytes, 12),
        count: u32_at(bytes, 20),
        synced: u64_at(bytes, 24),
    })
}

/// Whether these bytes are the group that `header` says, written at `offset`.
pub(super) fn check_group(bytes: &[u8], header: &GroupHeader, offset: u64) -> Result<(), &'static str> {
    let Some(group) = bytes.get(..header.length) else { return Err("the file ends within a group") };
    if u32_at(group, 8) != group_crc(group, offset) {
        return Err("the checksum of a group is wrong");
    }
    Ok(())
}

/// Length of the record at the start of `bytes`, or nothing if it does not fit in them.
pub(super) fn record_length(bytes: &[u8]) -> Option<usize> {
    if bytes.len() < RECORD_HEADER {
        return None;
    }
    let length = RECORD_HEADER.checked_add(u32_at(bytes, 9) as usize)?.checked_add(u32_at(bytes, 13) as usize)?;
    (length <= bytes.len()).then_some(length)
}

/// The record at the start of `bytes` without copying it, and its length.
pub(super) fn record(bytes: &Bytes, lsn: u64) -> Option<(Record, usize)> {
    let length = record_length(bytes)?;
    let payload_at = RECORD_HEADER + u32_at(bytes, 9) as usize;
    let record = Record {
        lsn,
        kind: bytes[0],
        ingest_us: u64_at(bytes, 1).cast_signed(),
        metadata: bytes.slice(RECORD_HEADER..payload_at),
        payload: bytes.slice(payload_at..length),
    };
    Some((record, length))
}

/// Where a group after a damaged place proves that this place was durable when it was written: its offset in `bytes`,
/// which begin at the damaged place `offset`, where record `lsn` was expected.
///
/// Cheap guards come before the checksum: as many records as were jumped over must fit between.
pub(super) fn proof_of_durability(bytes: &[u8], offset: u64, lsn: u64) -> Option<usize> {
    (1..bytes.len().saturating_sub(GROUP_HEADER)).find(|at| {
        let rest = &bytes[*at..];
        let Ok(header) = group_header(rest) else { return false };
        let jumped = header.first_lsn.wrapping_sub(lsn);
        jumped >= 1
            && jumped <= (*at / RECORD_HEADER) as u64
            && header.count as usize <= header.length / RECORD_HEADER
            && header.synced > offset
            && check_group(rest, &header, offset + *at as u64).is_ok()
    })
}

/// The bytes of a segment with the checksums that fit them, as far as groups can be told in it.
#[cfg(any(test, fuzzing))]
pub(crate) fn resealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let Ok(mut at) = segment_header_length(&bytes) else { return bytes };
    if at > bytes.len() {
        return bytes;
    }
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[8..24]), &bytes[SEGMENT_HEADER..at]);
    bytes[24..28].copy_from_slice(&crc.to_le_bytes());
    while let Ok(GroupHeader { length, first_lsn, count, synced }) = group_header(&bytes[at..])
        && let Some(group) = bytes.get_mut(at..at + length)
    {
        seal(group, at as u64, first_lsn, count, synced);
        at += length;
    }
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}
