//! Descriptor lists: cutting transfers into pieces that a descriptor can hold, and writing them as linked lists.

use alloc::vec::Vec;

use portcullis_arch::zdma::{Command, Control, Descriptor, LINKED_BYTES, SIZE_MASK};
use portcullis_arch::{Iova, Pa};
use portcullis_hal::DmaMemory;

use super::{DescriptorPool, POOL_BYTES, Segment, ZdmaError};

/// The largest piece: a multiple of a page, so that pieces of an aligned transfer stay aligned.
pub(super) const MAX_CHUNK: u64 = SIZE_MASK as u64 & !0xfff;
/// Bits of an address inside a descriptor (UG1085; Linux's DMA mask).
pub(super) const DESCRIPTOR_BITS: u8 = 44;
/// Bits of an address in registers (UG1087).
pub(super) const REGISTER_BITS: u8 = 49;

/// One pair of descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub from: Iova,
    pub to: Iova,
    pub len: u32,
    /// The pair in the pool.
    pub slot: u8,
}

/// Cuts two lists, whose addresses may have `bits` bits, at the boundaries of both. Gives the pieces, and the bytes in all.
pub(super) fn split(to: &[Segment], from: &[Segment], bits: u8) -> Result<(Vec<Chunk>, u64), ZdmaError> {
    let (to_bytes, from_bytes) = (total(to, bits)?, total(from, bits)?);
    if to_bytes != from_bytes {
        return Err(ZdmaError::LengthMismatch { from: from_bytes, to: to_bytes });
    }
    let mut chunks = Vec::new();
    let (mut sources, mut destinations) = (from.iter(), to.iter());
    let (mut source, mut destination) = (sources.next().copied(), destinations.next().copied());
    while let (Some(s), Some(d)) = (source, destination) {
        let len = s.len.min(d.len).min(MAX_CHUNK);
        // The lists can be long, and a channel has few descriptors.
        if chunks.len() > super::POOL_DESCRIPTORS {
            break;
        }
        chunks.push(Chunk { from: s.address, to: d.address, len: len as u32, slot: 0 });
        source = advance(s, len).or_else(|| sources.next().copied());
        destination = advance(d, len).or_else(|| destinations.next().copied());
    }
    Ok((chunks, to_bytes))
}

fn total(list: &[Segment], bits: u8) -> Result<u64, ZdmaError> {
    if list.is_empty() {
        return Err(ZdmaError::Empty);
    }
    let mut bytes = 0u64;
    for &Segment { address, len } in list {
        if len == 0 {
            return Err(ZdmaError::Empty);
        }
        let fits = address.get().checked_add(len).is_some_and(|end| end <= 1 << bits);
        let error = ZdmaError::AddressRange { address, len, bits };
        bytes = bytes.checked_add(len).filter(|_| fits).ok_or(error)?;
    }
    Ok(bytes)
}

fn advance(segment: Segment, len: u64) -> Option<Segment> {
    let left = segment.len - len;
    (left > 0).then_some(Segment { address: segment.address.wrapping_add(len), len: left })
}

/// Addresses of the first descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct First {
    pub source: u64,
    pub destination: u64,
}

fn source_offset(slot: u8) -> u64 {
    u64::from(slot) * 2 * LINKED_BYTES
}

fn store(memory: &impl DmaMemory, at: Pa, descriptor: Descriptor) {
    for (i, word) in descriptor.words().into_iter().enumerate() {
        memory.store64(at.wrapping_add(i as u64 * 8), word);
    }
}

/// Writes transactions as one list of pairs: the last source says STOP, and the last destination of every transaction
/// asks for an interrupt.
pub(super) fn write<'a>(
    memory: &impl DmaMemory,
    pool: &DescriptorPool,
    coherent: bool,
    transactions: impl Iterator<Item = &'a [Chunk]>,
) -> First {
    let mut first = None;
    let base = Control::new().with_linked(true).with_coherent(coherent);
    let mut chunks = transactions
        .flat_map(|chunks| {
            let last = chunks.len().saturating_sub(1);
            chunks.iter().enumerate().map(move |(i, chunk)| (chunk, i == last))
        })
        .peekable();
    while let Some((chunk, last_of_transaction)) = chunks.next() {
        let offset = source_offset(chunk.slot);
        let (source, destination) = (offset, offset + LINKED_BYTES);
        first.get_or_insert(First {
            source: pool.iova.wrapping_add(source).get(),
            destination: pool.iova.wrapping_add(destination).get(),
        });
        let next = chunks.peek().map(|(next, _)| pool.iova.wrapping_add(source_offset(next.slot)).get());
        let command = if next.is_some() { Command::Next } else { Command::Stop };
        let control = base.with_command(command);
        store(
            memory,
            pool.block.pa.wrapping_add(source),
            Descriptor {
                address: chunk.from.get(),
                size: chunk.len,
                control,
                next: next.unwrap_or_default(),
            },
        );
        store(
            memory,
            pool.block.pa.wrapping_add(destination),
            Descriptor {
                address: chunk.to.get(),
                size: chunk.len,
                control: control.with_intr(last_of_transaction),
                next: next.map(|next| next + LINKED_BYTES).unwrap_or_default(),
            },
        );
    }
    publish(memory, pool, coherent);
    first.unwrap_or_default()
}

/// Makes every source descriptor a last one of one byte, for an engine that may be reading the list. Each changes
/// with one store.
pub(super) fn cut<'a>(
    memory: &impl DmaMemory,
    pool: &DescriptorPool,
    coherent: bool,
    chunks: impl Iterator<Item = &'a Chunk>,
) {
    let control =
        Control::new().with_linked(true).with_coherent(coherent).with_command(Command::Stop).into_bits();
    for chunk in chunks {
        let at = pool.block.pa.wrapping_add(source_offset(chunk.slot) + 8);
        memory.store64(at, u64::from(control) << 32 | 1);
    }
    publish(memory, pool, coherent);
}

fn publish(memory: &impl DmaMemory, pool: &DescriptorPool, coherent: bool) {
    if !coherent {
        memory.clean(pool.block.pa, POOL_BYTES);
    }
    memory.wmb();
}
