//! Descriptor fetches: linear, linked and hybrid lists (UG1085 "Buffer Descriptor Format").
//!
//! TYPE is looked at per descriptor, so the first 16 bytes are read first and the rest of a linked descriptor
//! with a second read. Descriptors are never written, and never fetched ahead.

use portcullis_arch::Iova;
use portcullis_arch::zdma::{ADDRESS_MASK, Descriptor, DscrAttr, LINEAR_BYTES, LINKED_BYTES, reg};

use super::Zdma;
use super::run::{AccessKind, Which};

const LINEAR: u8 = LINEAR_BYTES as u8;
const LINKED: u8 = LINKED_BYTES as u8;

impl Zdma {
    /// Fetches the next descriptor of a list, or the part of it that is still missing.
    pub(super) fn fetch(&mut self, which: Which) {
        let access = AccessKind::Descriptor(which);
        let attr = DscrAttr::from_bits(self.registers.get(reg::DSCR_ATTR));
        let from = self.initiator(attr.axcache(), attr.coherent());
        let side = self.run.side(which);
        side.current = side.next;
        loop {
            let descriptor = decode(&side.fetched);
            let need = match side.have {
                0..LINEAR => LINEAR,
                _ if descriptor.control.linked() => LINKED,
                _ => LINEAR,
            };
            if !Iova(side.next).is_aligned(u64::from(need)) {
                return self.fail(access);
            }
            if side.have >= need {
                side.load(descriptor);
                break;
            }
            let have = usize::from(side.have);
            let Some(missing) = side.fetched.get_mut(have..usize::from(need)) else { break };
            if let Err(e) = self.port.read(from, Iova(side.next).wrapping_add(have as u64), missing) {
                side.have += e.done.min(usize::from(need) - have) as u8;
                return self.fault(access, e.fault);
            }
            side.have = need;
        }
        if which == Which::Destination && self.run.destination.left == 0 {
            self.destination_done();
        }
    }

    /// A stalled fetch was ended without an error: the rest of that read is zeros.
    pub(super) fn pass_over_descriptor(&mut self, which: Which) {
        let side = self.run.side(which);
        let end = if side.have < LINEAR { LINEAR } else { LINKED };
        if let Some(rest) = side.fetched.get_mut(usize::from(side.have)..usize::from(end)) {
            rest.fill(0);
        }
        side.have = end;
    }
}

impl super::run::Side {
    fn load(&mut self, descriptor: Descriptor) {
        let Descriptor { address, size, control, next } = descriptor;
        self.loaded = true;
        (self.at, self.left, self.control) = (address, size, control.into_bits());
        self.have = 0;
        self.next = match control.linked() {
            true => next,
            false => self.current.wrapping_add(LINEAR_BYTES) & ADDRESS_MASK,
        };
    }
}

fn decode(bytes: &[u8; 32]) -> Descriptor {
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*chunk);
    }
    Descriptor::from_words(words)
}
