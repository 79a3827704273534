//! Devices' streams and substreams, and which domain each of them uses.
//!
//! All of this is under one lock, which is held while commands are waited for, but is not a lock to hang at: whoever
//! does not get it in time gives up with an error ([`ConfigLock`]).

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::smmuv3::{Cd, Command, Ste};
use portcullis_arch::{Pa, StreamId, SubstreamId};
use portcullis_hal::{Clock, DmaMemory};
use spin::{Mutex, MutexGuard};

use super::cdtab::CdTable;
use super::cmdq::commands::{AtcScope, atc_inv_all, cfgi_cd, cfgi_ste, stall_term};
use super::domain::Domain;
use super::entry::{Entry, update};
use super::fault::{Answers, Whose};
use super::link::{Attachment, Link, atc_scope};
use super::ste::{CdPointer, StreamFacts};
use super::strtab::{StreamTable, abort_ste};
use super::{Error, Platform, Shared};
use crate::ops::{DomainKind, MasterOptions, StreamOverrides};

/// One stream.
pub struct Stream<M: DmaMemory> {
    /// Devices that have it.
    users: u32,
    pub options: MasterOptions,
    overrides: StreamOverrides,
    /// The STE.
    at: Pa,
    /// Its descriptors, if it has substreams.
    cds: Option<CdTable<M>>,
    /// What transactions without a substream use; `None` aborts.
    main: Option<Arc<Link>>,
    /// The STE points to `cds`, or will when it needs descriptors.
    main_in_table: bool,
    substreams: BTreeMap<u32, Arc<Link>>,
}

impl<M: DmaMemory> Stream<M> {
    fn facts(&self) -> StreamFacts {
        StreamFacts { can_stall: self.options.can_stall, ats: self.options.ats, overrides: self.overrides }
    }

    fn pointer(&self) -> Option<CdPointer> {
        let table = self.cds.as_ref()?;
        Some(CdPointer { at: table.base(), format: table.format(), bits: table.substream_bits() })
    }

    pub fn main_kind(&self) -> DomainKind {
        self.main.as_ref().map_or(DomainKind::Blocked, |link| link.kind)
    }
}

/// Kinds whose streams have descriptor 0 in their own table, if they have one.
fn uses_cd0(kind: DomainKind) -> bool {
    matches!(kind, DomainKind::Stage1 | DomainKind::Process)
}

/// Kinds that leave room for substreams.
fn allows_substreams(kind: DomainKind) -> bool {
    uses_cd0(kind) || matches!(kind, DomainKind::Blocked | DomainKind::Identity)
}

/// Everything that changes under the lock.
pub struct Configuration<M: DmaMemory> {
    pub table: StreamTable<M>,
    pub streams: BTreeMap<u32, Stream<M>>,
}

impl<M: DmaMemory> Configuration<M> {
    pub fn new(table: StreamTable<M>) -> Self {
        Self { table, streams: BTreeMap::new() }
    }

    pub fn stream(&self, stream: StreamId) -> Result<&Stream<M>, Error> {
        self.streams.get(&stream.get()).ok_or(Error::UnknownStream { stream })
    }

    fn stream_mut(&mut self, stream: StreamId) -> Result<&mut Stream<M>, Error> {
        self.streams.get_mut(&stream.get()).ok_or(Error::UnknownStream { stream })
    }
}

/// A lock that is given up on.
pub struct ConfigLock<M: DmaMemory>(Mutex<Configuration<M>>);

impl<M: DmaMemory> ConfigLock<M> {
    pub fn new(configuration: Configuration<M>) -> Self {
        Self(Mutex::new(configuration))
    }

    /// Tables are not freed when this is dropped.
    pub fn keep_memory(&mut self) {
        let config = self.0.get_mut();
        config.table.keep();
        for stream in config.streams.values_mut() {
            stream.cds.iter_mut().for_each(CdTable::keep);
        }
    }

    fn lock(&self, clock: &impl Clock, timeout_us: u64) -> Result<MutexGuard<'_, Configuration<M>>, Error> {
        let start = clock.now_ns();
        let mut waited_us = 0;
        let mut delay = 1;
        loop {
            if let Some(guard) = self.0.try_lock() {
                return Ok(guard);
            }
            if waited_us >= timeout_us {
                return Err(Error::ConfigurationBusy { waited_us });
            }
            clock.delay_us(delay);
            // A clock that stands still must not make the wait endless.
            waited_us = (clock.now_ns().saturating_sub(start) / 1000).max(waited_us + delay);
            delay = (delay * 2).min(1000);
        }
    }
}

impl<P: Platform> Shared<P> {
    /// The configuration, for a change.
    pub fn configuration(&self) -> Result<MutexGuard<'_, Configuration<P::Memory>>, Error> {
        self.config.lock(self.platform.clock(), self.options.timeout_us)
    }

    /// Enters one stream of a device; its entry aborts until a domain is attached, or goes on with what was preserved.
    pub fn claim(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
        options: MasterOptions,
    ) -> Result<(), Error> {
        let options = self.limit(options)?;
        if config.stream(stream).is_ok_and(|known| known.users == 0 && known.cds.is_some()) {
            // Its last device went when the SMMU did not answer.
            self.take_out(config, stream)?;
        }
        if let Some(known) = config.streams.get_mut(&stream.get()) {
            if known.users > 0 && known.options != options {
                return Err(Error::StreamOptions { stream });
            }
            if known.users == 0 {
                known.options = options;
            }
            known.users = known.users.saturating_add(1);
            return Ok(());
        }
        let place = config.table.place(stream)?;
        let entered = Stream {
            users: 1,
            options,
            overrides: StreamOverrides::default(),
            at: place.at,
            cds: None,
            main: None,
            main_in_table: true,
            substreams: BTreeMap::new(),
        };
        // Also where the array is not fresh: the first try may not have got as far as this.
        self.sync(&[cfgi_ste(stream, false)])?;
        config.streams.insert(stream.get(), entered);
        Ok(())
    }

    /// Enters a stream that no device has claimed yet but that firmware uses.
    pub fn enter_preserved(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
    ) -> Result<(), Error> {
        self.claim(config, stream, MasterOptions::default())?;
        config.stream_mut(stream)?.users = 0;
        Ok(())
    }

    /// What a device wants, as far as it can be had.
    fn limit(&self, mut options: MasterOptions) -> Result<MasterOptions, Error> {
        options.substream_bits = options.substream_bits.min(self.features.substream_bits);
        // A device with translations of its own must not wait for the SMMU (PCIe).
        options.ats &= self.features.ats;
        options.can_stall &= self.features.can_stall() && !options.ats;
        Ok(options)
    }

    /// Takes one stream of a device out.
    pub fn release(&self, config: &mut Configuration<P::Memory>, stream: StreamId) -> Result<(), Error> {
        let known = config.stream_mut(stream)?;
        known.users = known.users.saturating_sub(1);
        if known.users > 0 {
            return Ok(());
        }
        self.take_out(config, stream)
    }

    /// Nothing of a stream stays.
    fn take_out(&self, config: &mut Configuration<P::Memory>, stream: StreamId) -> Result<(), Error> {
        let substreams: Vec<u32> = config.stream(stream)?.substreams.keys().copied().collect();
        for substream in substreams {
            self.detach_substream(config, stream, SubstreamId(substream))?;
        }
        self.detach_stream(config, stream)?;
        // Its descriptors go with it: nothing points to them any more.
        config.streams.remove(&stream.get());
        Ok(())
    }

    /// Changes a stream's entry and waits until the SMMU has taken notice.
    fn write_ste(
        &self,
        config: &Configuration<P::Memory>,
        stream: StreamId,
        target: &Ste,
    ) -> Result<(), Error> {
        let live = config.table.live(config.stream(stream)?.at);
        let command = [cfgi_ste(stream, true)];
        update(&live, target, &mut || self.sync(&command))
    }

    /// Has the SMMU carry out invalidations, and waits. While its queue is off it has nothing to forget, because it
    /// forgets everything when the queue is turned on.
    pub fn sync(&self, commands: &[Command]) -> Result<(), Error> {
        if self.is_enabled() && !commands.is_empty() { self.queue.issue_sync(commands) } else { Ok(()) }
    }

    /// Makes room for a descriptor in a stream's own table.
    fn prepare_cd(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
        substream: SubstreamId,
    ) -> Result<Pa, Error> {
        let known = config.stream_mut(stream)?;
        let table = match &mut known.cds {
            Some(table) => table,
            none => {
                let memory = self.platform.memory().clone();
                let bits = known.options.substream_bits;
                none.insert(CdTable::new(memory, &self.features, self.coherent, bits)?)
            }
        };
        let place = table.place(substream)?;
        if place.fresh {
            self.sync(&[cfgi_cd(stream, substream, false)])?;
        }
        Ok(place.at)
    }

    /// Changes a descriptor in a stream's own table and waits until the SMMU has taken notice.
    pub fn write_cd(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
        substream: SubstreamId,
        cd: &Cd,
    ) -> Result<(), Error> {
        let at = self.prepare_cd(config, stream, substream)?;
        self.update_cd(config, stream, substream, at, cd)
    }

    fn update_cd(
        &self,
        config: &Configuration<P::Memory>,
        stream: StreamId,
        substream: SubstreamId,
        at: Pa,
        cd: &Cd,
    ) -> Result<(), Error> {
        let command = [cfgi_cd(stream, substream, true)];
        let live = config.table.live(at);
        update(&live, cd, &mut || self.sync(&command))
    }

    /// Invalidates a descriptor in a stream's own table, if it has one.
    fn clear_cd(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
        substream: SubstreamId,
    ) -> Result<(), Error> {
        let known = config.stream(stream)?;
        let Some(at) = known.cds.as_ref().and_then(|table| table.find(substream)) else { return Ok(()) };
        self.update_cd(config, stream, substream, at, &Cd::default())
    }

    /// The device forgets what it asked for while it used a domain.
    fn forget_in_device(
        &self,
        config: &Configuration<P::Memory>,
        stream: StreamId,
        substream: Option<SubstreamId>,
        of: &Link,
    ) -> Result<(), Error> {
        let options = config.stream(stream)?.options;
        if !options.ats {
            return Ok(());
        }
        let command = atc_inv_all(stream, atc_scope(substream));
        // A guest's substreams go with it.
        if substream.is_none() && options.substream_bits > 0 && of.kind == DomainKind::Nested {
            return self.sync(&[command, atc_inv_all(stream, AtcScope::AllSubstreams)]);
        }
        self.sync(&[command])
    }

    /// Checks whether a stream can use a domain, and gets the memory for it: what can be refused is refused here.
    pub fn prepare_stream(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
        domain: &Domain<P>,
    ) -> Result<(), Error> {
        let kind = domain.kind();
        let known = config.stream(stream)?;
        if !known.substreams.is_empty() && !allows_substreams(kind) {
            return Err(Error::SubstreamsBelow { stream, kind });
        }
        let can_stall = known.options.can_stall;
        if uses_cd0(kind) && known.options.substream_bits > 0 {
            self.prepare_cd(config, stream, SubstreamId(0))?;
        } else if domain.cd(can_stall).is_some() {
            domain.own_cd(can_stall)?;
        }
        Ok(())
    }

    /// Points a stream at a domain, wherever it pointed before. If it had a domain before, its transactions see the old
    /// one or the new one, and nothing else where a single word decides (see [`super::entry`]).
    ///
    /// After an error the stream uses the old domain, the new one, or aborts, and both are told about invalidations.
    pub fn attach_stream(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
        domain: &Domain<P>,
    ) -> Result<(), Error> {
        self.prepare_stream(config, stream, domain)?;
        let kind = domain.kind();
        let known = config.stream(stream)?;
        let facts = known.facts();
        let in_table = uses_cd0(kind) && known.options.substream_bits > 0;
        let own_cd = !in_table && domain.cd(facts.can_stall).is_some();
        let own = if own_cd { Some(domain.own_cd(facts.can_stall)?) } else { None };

        let attachment = Attachment {
            stream,
            substream: None,
            ats: facts.ats,
            own_cd,
            guest_substreams: domain.guest.is_some() && known.options.substream_bits > 0,
            nested: false,
        };
        domain.link.add(attachment);
        let known = config.stream_mut(stream)?;
        let before = known.main.replace(domain.link.clone());
        known.main_in_table = in_table || !uses_cd0(kind);
        self.routes.lock().insert((stream.get(), None), domain.link.clone());
        let switch = |config: &mut Configuration<P::Memory>| {
            if let (true, Some(cd)) = (in_table, domain.cd(facts.can_stall)) {
                self.write_cd(config, stream, SubstreamId(0), &cd)?;
            }
            let known = config.stream(stream)?;
            let ste = match known.pointer() {
                Some(cds) if !uses_cd0(kind) && !known.substreams.is_empty() => {
                    Domain::substreams_only(self, facts, cds, kind)
                }
                pointer => domain.ste(facts, if in_table { pointer } else { own }),
            };
            self.write_ste(config, stream, &ste)
        };
        switch(config)?;
        self.leave(config, stream, before)?;
        if !in_table {
            self.clear_cd(config, stream, SubstreamId(0))?;
        }
        Ok(())
    }

    /// After a stream's entry has changed: the device forgets the old domain's translations, then the old domain
    /// forgets the device.
    fn leave(
        &self,
        config: &Configuration<P::Memory>,
        stream: StreamId,
        before: Option<Arc<Link>>,
    ) -> Result<(), Error> {
        let Some(before) = before else { return Ok(()) };
        self.forget_in_device(config, stream, None, &before)?;
        before.remove(stream, None);
        Ok(())
    }

    /// Points a stream at no domain: its transactions abort. Substreams go on.
    pub fn detach_stream(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
    ) -> Result<(), Error> {
        let known = config.stream(stream)?;
        let ste = match known.pointer() {
            Some(cds) if !known.substreams.is_empty() => {
                Domain::substreams_only(self, known.facts(), cds, DomainKind::Blocked)
            }
            _ => abort_ste(),
        };
        self.write_ste(config, stream, &ste)?;
        let known = config.stream_mut(stream)?;
        let before = known.main.take();
        known.main_in_table = true;
        self.routes.lock().remove(&(stream.get(), None));
        self.leave(config, stream, before)?;
        self.clear_cd(config, stream, SubstreamId(0))?;
        let known = config.stream(stream)?;
        // Nobody is left to answer what waits, or to be asked about what has been recorded already.
        if !known.substreams.is_empty() {
            return self.router.refuse(self, stream, Whose::Main);
        }
        self.router.refuse(self, stream, Whose::All)?;
        if known.options.can_stall {
            self.queue(&[stall_term(stream)])?;
        }
        Ok(())
    }

    /// Points a substream at a domain, wherever it pointed before.
    pub fn attach_substream(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
        substream: SubstreamId,
        domain: &Domain<P>,
    ) -> Result<(), Error> {
        let kind = domain.kind();
        if !uses_cd0(kind) {
            return Err(Error::NotForSubstreams { kind });
        }
        let known = config.stream(stream)?;
        let bits = known.options.substream_bits;
        // Descriptor 0 belongs to transactions without a substream.
        if bits == 0 || substream.get() == 0 || u64::from(substream.get()) >> bits != 0 {
            return Err(Error::SubstreamRange { stream, substream, bits });
        }
        let main = known.main_kind();
        if !allows_substreams(main) || !known.main_in_table {
            return Err(Error::SubstreamsBelow { stream, kind: main });
        }
        let facts = known.facts();
        let first = known.substreams.is_empty();
        let cd = domain.cd(facts.can_stall).ok_or(Error::NoContext { kind })?;
        let at = self.prepare_cd(config, stream, substream)?;
        domain.link.add(Attachment {
            stream,
            substream: Some(substream),
            ats: facts.ats,
            own_cd: false,
            guest_substreams: false,
            nested: false,
        });
        let known = config.stream_mut(stream)?;
        let before = known.substreams.insert(substream.get(), domain.link.clone());
        self.routes.lock().insert((stream.get(), Some(substream.get())), domain.link.clone());
        self.update_cd(config, stream, substream, at, &cd)?;
        if let Some(before) = before {
            self.forget_in_device(config, stream, Some(substream), &before)?;
            before.remove(stream, Some(substream));
        }
        if first && !uses_cd0(main) {
            self.write_main(config, stream)?;
        }
        Ok(())
    }

    /// Points a substream at nothing: its transactions fault. The others of the stream go on.
    pub fn detach_substream(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
        substream: SubstreamId,
    ) -> Result<(), Error> {
        if !config.stream(stream)?.substreams.contains_key(&substream.get()) {
            return Ok(());
        }
        self.clear_cd(config, stream, substream)?;
        if let Some(before) = config.stream(stream)?.substreams.get(&substream.get()) {
            self.forget_in_device(config, stream, Some(substream), before)?;
        }
        let known = config.stream_mut(stream)?;
        let before = known.substreams.remove(&substream.get());
        self.routes.lock().remove(&(stream.get(), Some(substream.get())));
        if let Some(before) = before {
            before.remove(stream, Some(substream));
        }
        self.router.refuse(self, stream, Whose::Substream(substream))?;
        let known = config.stream(stream)?;
        if known.substreams.is_empty() && !uses_cd0(known.main_kind()) {
            self.write_main(config, stream)?;
        }
        Ok(())
    }

    /// The entry of a stream that is blocked or bypasses, with or without substreams.
    fn write_main(&self, config: &Configuration<P::Memory>, stream: StreamId) -> Result<(), Error> {
        let known = config.stream(stream)?;
        let (facts, main) = (known.facts(), known.main_kind());
        let ste = match known.pointer() {
            Some(cds) if !known.substreams.is_empty() => Domain::substreams_only(self, facts, cds, main),
            _ if main == DomainKind::Identity => Domain::bypass(self, facts),
            _ => abort_ste(),
        };
        self.write_ste(config, stream, &ste)
    }

    /// A domain ends: what still uses it is blocked or detached.
    pub fn abandon(
        &self,
        config: &mut Configuration<P::Memory>,
        link: &Arc<Link>,
        user: Attachment,
    ) -> Result<(), Error> {
        let Attachment { stream, substream, .. } = user;
        let is_this = |other: Option<&Arc<Link>>| other.is_some_and(|other| Arc::ptr_eq(other, link));
        let Ok(known) = config.stream(stream) else { return Ok(()) };
        match substream {
            None if is_this(known.main.as_ref()) => self.detach_stream(config, stream),
            Some(substream) if is_this(known.substreams.get(&substream.get())) => {
                self.detach_substream(config, stream, substream)
            }
            // A change to or from it did not complete: the SMMU may still have the old entry.
            _ => {
                self.sync(&[cfgi_ste(stream, true)])?;
                self.forget_in_device(config, stream, substream, link)
            }
        }
    }

    /// Overrides privilege and instruction/data of a stream.
    pub fn override_stream(
        &self,
        config: &mut Configuration<P::Memory>,
        stream: StreamId,
        overrides: StreamOverrides,
    ) -> Result<(), Error> {
        config.stream_mut(stream)?.overrides = overrides;
        if !self.features.override_permissions {
            return Ok(());
        }
        let ste: Ste = config.table.live(config.stream(stream)?.at).read();
        if ste.used()[1] == 0 {
            return Ok(());
        }
        self.write_ste(config, stream, &Domain::<P>::override_ste(ste, overrides))
    }
}
