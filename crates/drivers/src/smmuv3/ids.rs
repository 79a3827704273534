//! Who has which ASID and VMID.

use alloc::collections::BTreeMap;
use alloc::collections::btree_map::Entry;

use portcullis_arch::Pa;

use super::Error;

/// The owners of an identifier.
#[derive(Clone, Copy, Debug)]
struct Owner {
    /// The table of somebody else that it tags; the same table under the same tag is one address space.
    root: Option<Pa>,
    users: u32,
}

/// Identifiers from 1 up. 0 is nobody's: it tags the entries of streams without stage 2.
#[derive(Debug)]
pub struct Identifiers {
    what: &'static str,
    bits: u8,
    taken: BTreeMap<u16, Owner>,
    /// Entries with these tags may still be in the TLB: never given out again.
    lost: u32,
}

impl Identifiers {
    /// `what` is "ASIDs" or "VMIDs", of `bits` bits (8 or 16).
    pub fn new(what: &'static str, bits: u8) -> Self {
        Self { what, bits, taken: BTreeMap::new(), lost: 0 }
    }

    /// The lowest free one.
    pub fn allocate(&mut self) -> Result<u16, Error> {
        let last = u32::MAX >> (32 - u32::from(self.bits));
        let mut free = 1;
        for &taken in self.taken.keys() {
            if u32::from(taken) > free {
                break;
            }
            free = u32::from(taken) + 1;
        }
        if free > last {
            return Err(Error::NoIdentifier { what: self.what, count: last });
        }
        let id = free as u16;
        self.taken.insert(id, Owner { root: None, users: 1 });
        Ok(id)
    }

    /// A certain one, for the table at `root`. `Ok(false)`: it tags something else.
    pub fn take(&mut self, id: u16, root: Pa) -> bool {
        match self.taken.entry(id) {
            Entry::Vacant(entry) => {
                entry.insert(Owner { root: Some(root), users: 1 });
                true
            }
            Entry::Occupied(mut entry) if entry.get().root == Some(root) => {
                entry.get_mut().users = entry.get().users.saturating_add(1);
                true
            }
            Entry::Occupied(_) => false,
        }
    }

    /// Gives one back, or gives it up.
    pub fn release(&mut self, id: u16, lost: bool) {
        if lost {
            self.lost = self.lost.saturating_add(1);
            if let Some(owner) = self.taken.get_mut(&id) {
                owner.root = None;
            }
            return;
        }
        if let Some(owner) = self.taken.get_mut(&id) {
            owner.users = owner.users.saturating_sub(1);
            if owner.users == 0 {
                self.taken.remove(&id);
            }
        }
    }

    /// The table behind a tag is gone; another one may not join.
    pub fn forget_root(&mut self, id: u16) {
        if let Some(owner) = self.taken.get_mut(&id) {
            owner.root = None;
        }
    }

    /// How many are in use, given up ones included.
    pub fn in_use(&self) -> usize {
        self.taken.len()
    }
}
