//! Who uses a domain, and what their devices have to forget.

use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::smmuv3::Command;
use portcullis_arch::{Iova, StreamId, SubstreamId};
use spin::Mutex;

use super::cmdq::commands::{AtcScope, atc_inv, atc_inv_all};
use crate::fault::FaultHandler;
use crate::ops::DomainKind;

/// One stream or substream that uses a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    pub stream: StreamId,
    pub substream: Option<SubstreamId>,
    /// The device may keep translations.
    pub ats: bool,
    /// The stream uses a context descriptor of the domain, not one in a table of its own.
    pub own_cd: bool,
    /// A guest has the stream's substreams: nobody knows which of them there are.
    pub guest_substreams: bool,
    /// A stage 1 lies on top of the domain: its addresses are not those of the device.
    pub nested: bool,
}

/// Who uses a domain, and whom to ask about faults. Streams hold on to it, not to the domain.
pub struct Link {
    pub number: u32,
    pub kind: DomainKind,
    pub handler: Option<Arc<dyn FaultHandler>>,
    users: Mutex<Vec<Attachment>>,
    parent: Option<Arc<Link>>,
}

impl Link {
    /// A domain that nobody uses yet; `parent` is the stage 2 below.
    pub fn new(
        number: u32,
        kind: DomainKind,
        handler: Option<Arc<dyn FaultHandler>>,
        parent: Option<Arc<Link>>,
    ) -> Arc<Self> {
        Arc::new(Self { number, kind, handler, users: Mutex::default(), parent })
    }

    /// Adds a user before the hardware can make use of the domain: from here on invalidations reach it.
    pub fn add(&self, attachment: Attachment) {
        self.users.lock().push(attachment);
        if let Some(parent) = &self.parent {
            parent.users.lock().push(Attachment { nested: true, own_cd: false, ..attachment });
        }
    }

    /// Takes one user out after the hardware has stopped using the domain for it.
    pub fn remove(&self, stream: StreamId, substream: Option<SubstreamId>) {
        let drop_one = |users: &mut Vec<Attachment>, nested: bool| {
            let same =
                |user: &Attachment| (user.stream, user.substream, user.nested) == (stream, substream, nested);
            if let Some(index) = users.iter().position(same) {
                users.swap_remove(index);
            }
        };
        drop_one(&mut self.users.lock(), false);
        if let Some(parent) = &self.parent {
            drop_one(&mut parent.users.lock(), true);
        }
    }

    /// A copy of the list.
    pub fn users(&self) -> Vec<Attachment> {
        self.users.lock().clone()
    }

    /// True if a device may keep translations of the domain.
    pub fn has_ats(&self) -> bool {
        self.users.lock().iter().any(|user| user.ats)
    }
}

/// Without a substream the device forgets what it asked for with substreams as well.
pub fn atc_scope(substream: Option<SubstreamId>) -> AtcScope {
    substream.map_or(AtcScope::Stream, AtcScope::Substream)
}

/// The commands that make devices forget a domain's translations: all of them, or those of `[first, last]`.
pub fn atc_commands(link: &Link, range: Option<(u64, u64)>) -> Vec<Command> {
    let users = link.users();
    let with_ats = users.iter().filter(|user| user.ats);
    with_ats
        .flat_map(|user| {
            let command = match range {
                // Through a stage 1 on top nobody knows which of the device's addresses are meant.
                Some((first, last)) if !user.nested => {
                    let len = (last - first).saturating_add(1);
                    atc_inv(user.stream, atc_scope(user.substream), Iova(first), len)
                }
                _ => atc_inv_all(user.stream, atc_scope(user.substream)),
            };
            let substreams = user.guest_substreams.then(|| atc_inv_all(user.stream, AtcScope::AllSubstreams));
            [Some(command), substreams]
        })
        .flatten()
        .collect()
}
