//! A port: what a device holds instead of the SMMU.
//!
//! A [`Tbu`] belongs to one device and is used through `&mut self`. It keeps the configuration of the streams it has
//! seen and a private [`Tlb`]; it asks the SMMU (the [`Tcu`]) only when it has not seen a stream since registers last
//! changed, or to record a fault. A hit therefore takes no lock and writes only the port's own mark; a miss whose
//! configuration is cached walks the tables in the port's own thread, without a lock. A walk reads every descriptor; what a leaf
//! and the tables above it say besides addresses is worked out only where it differs from the last walk of the stream.
//!
//! The memory access happens inside the translation's guard: between the port's mark going up and down.
//! [`crate::sync`] says how an invalidation waits for that.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use portcullis_arch::attrs::Allocate;
use portcullis_arch::{Access, Attributes, Iova, Pa};
use portcullis_bus::{
    BusError, CopyError, CopySide, DmaError, DmaFault, DmaPort, Initiator, Memory, StallState, StallTag,
};

use crate::long::{Alike, Landing};
use crate::perms::{AccessKind, Perms};
use crate::record::NoRecord;
use crate::runs::{Known, KnownRuns};
use crate::slot::{Cached, Config, Hot, NO_SUBSTREAM, Seen, Slot, forget_slots, keep, key_of, outgoing_of};
use crate::stage::{Fault, Nested, Updates, Walked, canonical, combine};
use crate::sync::{InFlight, Invalidation, SyncLog, light_barrier};
use crate::tlb::{ContextKey, Entry, Hit, Sizes, Tlb};

/// A translation context as a port caches it: everything a walk needs, decoded from registers or tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// TLB tags.
    pub key: ContextKey,
    /// The SMMU's own word for it (SMMUv2: the context bank), handed back with faults.
    pub token: u64,
    /// The address bits that count: those that the bus delivers, without the top byte where both halves (or the only
    /// one) ignore it. Agrees with `key.va_bits`.
    pub va_mask: u64,
    /// The stages.
    pub stages: Nested,
    /// The transaction's attributes after all overrides that precede translation.
    pub incoming: Attributes,
    /// Attributes that a bypassed stage 2 adds, if any.
    pub after: Option<Attributes>,
    /// Walks may be kept in the TLB (not while every stage is off).
    pub cacheable: bool,
    /// Where stage 1 translates, allocation hints that come in with a cacheable type are combined with those of the
    /// tables (SMMUv3); otherwise the tables' replace them.
    pub keeps_hints: bool,
}

impl Context {
    /// The outgoing attributes for what the tables say.
    #[inline(always)]
    pub fn outgoing(&self, tables: Attributes) -> Attributes {
        let i = self.incoming;
        match (&self.stages.stage1, &self.stages.stage2) {
            (Some(_), _) => self.hinted(tables).or_bits(i.security_privilege_bits()),
            (None, Some(_)) => combine(i, tables),
            (None, None) => i,
        }
    }

    /// True if what comes in takes allocation hints away from what the tables say: allocating and not transient are the
    /// weaker values, and what says nothing says these.
    fn narrows_hints(&self) -> bool {
        let i = self.incoming;
        let narrow =
            i.read_allocate() == Allocate::No || i.write_allocate() == Allocate::No || i.transient() == 3;
        self.keeps_hints && narrow && i.memory().is_cacheable()
    }

    fn hinted(&self, tables: Attributes) -> Attributes {
        if !self.narrows_hints() || !tables.memory().is_cacheable() {
            return tables;
        }
        let i = self.incoming;
        let stronger = |one: Allocate, two: Allocate| if one == Allocate::No { one } else { two };
        let read = stronger(i.read_allocate(), tables.read_allocate());
        let write = stronger(i.write_allocate(), tables.write_allocate());
        // What never allocates has no transient hint.
        let transient = match (read, write) {
            (Allocate::No, Allocate::No) => 0,
            _ if i.transient() == 3 => 3,
            _ => tables.transient(),
        };
        tables.with_read_allocate(read).with_write_allocate(write).with_transient(transient)
    }

    fn table_attributes(&self, walked: Attributes) -> Attributes {
        self.after.map_or(walked, |after| combine(walked, after))
    }
}

/// What an SMMU makes of a stream.
#[derive(Clone, Debug)]
pub enum Resolution<'m> {
    /// No translation; the address keeps the bits of `mask`. May be cached.
    Bypass {
        /// Attributes after overrides.
        attrs: Attributes,
        /// Address bits that exist at the output.
        mask: u64,
        /// An address with other bits is not truncated: the SMMU is asked again and refuses it.
        strict: bool,
    },
    /// Translation through a context, which lies in the port's memo. May be cached.
    Translate(Decoded<'m>),
    /// Refused, recorded by the SMMU as it demands. Never cached.
    Refused(FaultOutcome),
}

/// A context in a port's memo.
#[derive(Clone, Copy, Debug)]
pub struct Decoded<'m> {
    /// The context.
    pub context: &'m Context,
    /// Two contexts with the same number that one memo gives are equal, so that a port which has the one need not take over
    /// the other. `None` says nothing.
    pub number: Option<NonZeroU64>,
}

/// What becomes of a transaction that faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// Configuration changed meanwhile: look again.
    Retry,
    /// Over.
    Terminate {
        /// Error response (true), or read zeros and ignore writes (false).
        abort: bool,
    },
    /// Waits for software.
    Stall(StallTag),
}

/// The SMMU as its ports see it.
pub trait Tcu: Send + Sync {
    /// The memory that table walks read.
    type Walker: Memory;
    /// What a port keeps for [`resolve`](Tcu::resolve) between the streams it asks about: what was worked out from
    /// registers, and from table words that are compared before it is used again.
    type Memo: Default + Send;

    /// The invalidation log.
    fn log(&self) -> &SyncLog;
    /// The memory that table walks read.
    fn walker(&self) -> &Self::Walker;
    /// The configuration of a stream for a transaction to `va`. Records a fault if there is one.
    ///
    /// `memo` is the port's own. The port begins a new one whenever registers may have changed
    /// ([`Invalidation::Config`], [`Invalidation::Everything`]), so that what depends on registers alone may stay in it
    /// as it is. What was read from tables may not: `CMD_CFGI_*` leave the memo alone, so that every use of it has to
    /// compare the words that the tables hold now.
    fn resolve<'m>(
        &self,
        memo: &'m mut Self::Memo,
        from: &Initiator,
        va: u64,
        access: Access,
    ) -> Resolution<'m>;
    /// Records the fault of a walk through `context`. If the configuration may have changed since generation `seen`
    /// the answer is [`FaultOutcome::Retry`] and nothing is recorded; `None` records whatever happened meanwhile.
    fn fault(
        &self,
        from: &Initiator,
        va: u64,
        access: Access,
        context: &Context,
        seen: Option<u64>,
        fault: Fault,
    ) -> FaultOutcome;
    /// What became of a stalled transaction.
    fn stall_state(&self, tag: StallTag) -> StallState;
}

/// A finished translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated {
    /// Output address.
    pub pa: Pa,
    /// Bytes from there for which the translation holds (to the end of the page).
    pub left: u64,
    /// Attributes of the outgoing transaction.
    pub attrs: Attributes,
}

impl Translated {
    /// One byte, where nothing more is known.
    fn byte(pa: u64) -> Self {
        Self { pa: Pa(pa), left: 1, attrs: Attributes::DEVICE_DEFAULT }
    }
}

/// A TLB entry, for explanations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedEntry {
    /// Output address of the byte asked for.
    pub pa: Pa,
    /// log2 of the page size.
    pub size_log2: u8,
    /// What it allows.
    pub perms: Perms,
    /// Global.
    pub global: bool,
}

/// What a port did since it was made. Plain counters, private to the port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Translations answered by the TLB.
    pub hits: u64,
    /// Walks.
    pub walks: u64,
    /// Streams looked up in the SMMU's configuration.
    pub resolutions: u64,
    /// Transactions refused or stalled.
    pub refused: u64,
}

/// Runs shorter than this are not worth remembering.
const SHORTEST_RUN: usize = 8192;
/// Streams that a port keeps the configuration of, at most; two with the same hash share a place.
const SLOTS_LOG2: u32 = 6;
const MAX_CONTEXTS: usize = 1024;
const MAX_ATTRS: usize = 256;
/// Longest piece moved inside one guard, so that an invalidation never waits for more than one such memcpy.
const PIECE: usize = 256 * 1024;
/// How often a transaction looks again because the configuration changed under it. Software that rewrites registers
/// without end must not hold a device for ever.
const RETRIES: usize = 64;
/// Default TLB size: 8192 entries of 16 bytes.
pub const DEFAULT_ENTRIES: usize = 8192;

/// A port of an SMMU `T` that accesses memory through `M`.
pub struct Tbu<T: Tcu, M> {
    tcu: Arc<T>,
    memory: M,
    in_flight: Arc<InFlight>,
    /// The mark outside of accesses.
    mark: u64,
    seen: u64,
    asymmetric: bool,
    /// The slot used last.
    last: usize,
    /// Slots with an older stamp are forgotten.
    stamp: u64,
    /// Found by a hash of the initiator; empty until the first use.
    slots: Vec<Slot>,
    tlb: Tlb,
    known: KnownRuns,
    attrs: Box<[Attributes; MAX_ATTRS]>,
    attrs_used: usize,
    stats: Stats,
    memo: T::Memo,
}

/// True if `next` continues a run of `len` bytes that began at `first`.
#[inline(always)]
fn follows(first: &Translated, len: usize, next: &Translated) -> bool {
    next.pa.get() == first.pa.get().wrapping_add(len as u64) && next.attrs == first.attrs
}

/// What is left of a page after its first `n` bytes.
#[inline(always)]
fn rest(t: Translated, n: usize) -> Option<Translated> {
    let left = t.left - n as u64;
    (left != 0).then(|| Translated { pa: t.pa.wrapping_add(n as u64), left, attrs: t.attrs })
}

struct Run {
    pa: Pa,
    len: usize,
    attrs: Attributes,
}

/// The port's mark is up as long as this lives, also if what runs inside panics: a mark left standing would make
/// synchronisations wait for ever, and the next access would seem to be over while it runs.
struct Guard<'a, T: Tcu, M> {
    port: &'a mut Tbu<T, M>,
}

impl<T: Tcu, M> Drop for Guard<'_, T, M> {
    #[inline(always)]
    fn drop(&mut self) {
        self.port.mark += 2;
        self.port.in_flight.leave(self.port.mark);
    }
}

impl<T: Tcu, M: Memory> Tbu<T, M> {
    /// A port with a TLB of `entries` entries.
    pub fn new(tcu: Arc<T>, memory: M, entries: usize) -> Self {
        let in_flight = tcu.log().register();
        let asymmetric = tcu.log().asymmetric();
        let seen = tcu.log().generation();
        Self {
            tcu,
            memory,
            in_flight,
            mark: 0,
            seen,
            asymmetric,
            last: 0,
            stamp: 1,
            slots: Vec::new(),
            tlb: Tlb::new(entries),
            known: KnownRuns::default(),
            attrs: Box::new([Attributes::DEVICE_DEFAULT; MAX_ATTRS]),
            attrs_used: 0,
            stats: Stats::default(),
            memo: T::Memo::default(),
        }
    }

    /// The SMMU behind this port.
    pub fn tcu(&self) -> &Arc<T> {
        &self.tcu
    }

    /// The memory this port accesses.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Translates `va` and calls `f` with the result and the memory, inside the guard: an invalidation that begins now
    /// is not reported complete before `f` returns. `f` should only make the access.
    ///
    /// # Errors
    /// The transaction was terminated or is stalled; the SMMU has recorded why.
    #[inline]
    pub fn with_translation<R>(
        &mut self,
        from: &Initiator,
        va: Iova,
        access: Access,
        f: impl FnOnce(Translated, &M) -> R,
    ) -> Result<R, FaultOutcome> {
        self.raise_mark();
        // Two calls of `f`, and nothing but a hit here: it then stays in registers instead of meeting a miss in memory.
        if self.tcu.log().generation() == self.seen
            && let Some(t) = self.hit(from, va.get(), access)
        {
            let inside = Guard { port: self };
            return Ok(f(t, &inside.port.memory));
        }
        self.with_slow_translation(from, va, access, f)
    }

    /// The rest of [`with_translation`](Tbu::with_translation), with the mark up.
    #[inline(never)]
    fn with_slow_translation<R>(
        &mut self,
        from: &Initiator,
        va: Iova,
        access: Access,
        f: impl FnOnce(Translated, &M) -> R,
    ) -> Result<R, FaultOutcome> {
        let inside = self.inside();
        let t = inside.port.translate_inside(from, va.get(), access)?;
        Ok(f(t, &inside.port.memory))
    }

    /// Translates `va` without making an access. The answer may be out of date by the time it is looked at; use
    /// [`with_translation`](Tbu::with_translation) to act on it.
    ///
    /// # Errors
    /// As for [`with_translation`](Tbu::with_translation).
    #[inline]
    pub fn translate(
        &mut self,
        from: &Initiator,
        va: Iova,
        access: Access,
    ) -> Result<Translated, FaultOutcome> {
        self.with_translation(from, va, access, |t, _| t)
    }

    /// The TLB entry that a transaction would hit, if any, without side effects other than catching up with
    /// invalidations.
    pub fn cached(&mut self, from: &Initiator, va: Iova) -> Option<CachedEntry> {
        self.catch_up();
        let slot = self.slot(key_of(from))?;
        let hit = self.tlb.lookup(&slot.hot.sizes, va.get() & slot.hot.va_mask)?;
        Some(CachedEntry { pa: Pa(hit.pa), size_log2: hit.size_log2, perms: hit.perms, global: hit.global })
    }

    /// The port is inside an access from here on. A [`Guard`] has to take the mark down again.
    #[inline(always)]
    fn raise_mark(&self) {
        self.in_flight.set(self.mark + 1, Ordering::Relaxed);
        light_barrier(self.asymmetric);
    }

    /// Inside, with everything forgotten that was invalidated.
    #[inline(always)]
    fn inside(&mut self) -> Guard<'_, T, M> {
        let guard = Guard { port: self };
        if guard.port.tcu.log().generation() != guard.port.seen {
            guard.port.catch_up();
        }
        guard
    }

    #[inline(always)]
    fn enter(&mut self) -> Guard<'_, T, M> {
        self.raise_mark();
        self.inside()
    }

    #[cold]
    fn catch_up(&mut self) {
        let (tlb, stamp, slots) = (&mut self.tlb, &mut self.stamp, &mut self.slots);
        let (mut renumbered, mut registers) = (false, false);
        self.known.forget();
        self.seen = self.tcu.log().catch_up(self.seen, |what| match what {
            None | Some(Invalidation::Everything) => {
                tlb.clear();
                *stamp += 1;
                registers = true;
            }
            Some(Invalidation::Config) => {
                *stamp += 1;
                registers = true;
            }
            Some(Invalidation::Contexts(scope)) => {
                tlb.forget_contexts(&scope);
                renumbered = true;
            }
            Some(Invalidation::Address(scope, va)) => renumbered |= tlb.forget_address(&scope, va),
            Some(Invalidation::Range { scope, start, last, granule_log2 }) => {
                tlb.forget_range(&scope, start, last, granule_log2);
            }
            Some(Invalidation::Streams { first, last }) => {
                forget_slots(slots, |stream, _| (first..=last).contains(&stream));
            }
            Some(Invalidation::Substream { stream, substream }) => {
                // Without a substream a transaction may use the descriptor of substream 0, and the other way round.
                let named = |s: u64| s == NO_SUBSTREAM || s == u64::from(substream.unwrap_or(0));
                forget_slots(slots, |at, s| at == stream && named(s));
            }
        });
        if renumbered {
            self.refresh();
        }
        if registers {
            self.memo = T::Memo::default();
        }
    }

    /// Takes the TLB's page sizes of every slot anew.
    fn refresh(&mut self) {
        for slot in self.slots.iter_mut().filter(|s| s.hot.stamp == self.stamp) {
            if let Config::Translate(c) = &slot.config {
                slot.hot.sizes = self.tlb.sizes(c.index);
            }
        }
    }

    /// Where a slot for `key` is, if there is one.
    #[inline(always)]
    fn place(key: [u64; 2]) -> usize {
        let mixed = (key[0] ^ key[1].rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> (64 - SLOTS_LOG2)) as usize
    }

    #[inline(always)]
    fn slot_at(&self, at: usize, key: [u64; 2]) -> Option<&Slot> {
        let slot = self.slots.get(at)?;
        let hot = &slot.hot;
        let differs = (hot.key[0] ^ key[0]) | (hot.key[1] ^ key[1]) | (hot.stamp ^ self.stamp);
        (differs == 0).then_some(slot)
    }

    /// The slot of an initiator, if the port knows its configuration.
    #[inline(always)]
    fn slot(&self, key: [u64; 2]) -> Option<&Slot> {
        self.slot_at(Self::place(key), key)
    }

    #[inline(always)]
    fn translate_inside(
        &mut self,
        from: &Initiator,
        va: u64,
        access: Access,
    ) -> Result<Translated, FaultOutcome> {
        match self.hit(from, va, access) {
            Some(t) => Ok(t),
            None => self.translate_slow(from, va, access, true),
        }
    }

    /// What the TLB answers for the initiator used last, from the first of its page sizes. The others are looked at by
    /// [`translate_slow`](Self::translate_slow), which makes the one that has the page the first.
    // No call here: an answer that may come from one goes through memory, and takes as long as all of this.
    #[inline(always)]
    fn hit(&mut self, from: &Initiator, va: u64, access: Access) -> Option<Translated> {
        let slot = self.slot_at(self.last, key_of(from))?;
        let hit = self.tlb.lookup_first(&slot.hot.sizes, va & slot.hot.va_mask)?;
        let t = self.answer(slot, hit, access)?;
        self.stats.hits += 1;
        Some(t)
    }

    fn hit_another_size(&mut self, va: u64, access: Access) -> Option<Translated> {
        let hot = &mut self.slots.get_mut(self.last)?.hot;
        let hit = self.tlb.lookup_rest(&mut hot.sizes, va & hot.va_mask)?;
        let t = self.answer(self.slots.get(self.last)?, hit, access)?;
        self.stats.hits += 1;
        Some(t)
    }

    /// A hit, if it allows the access.
    #[inline(always)]
    fn answer(&self, slot: &Slot, hit: Hit, access: Access) -> Option<Translated> {
        if hit.perms.0 & slot.hot.need[access as usize] == 0 {
            return None;
        }
        let attrs = self.outgoing(slot, hit.attrs, access);
        Some(Translated { pa: Pa(hit.pa), left: hit.left, attrs })
    }

    /// The outgoing attributes for what the tables say, by its place in the port's table.
    #[inline(always)]
    fn outgoing(&self, slot: &Slot, at: u8, access: Access) -> Attributes {
        let tables = self.attrs[usize::from(at)];
        if slot.hot.simple {
            tables.or_bits(slot.hot.overlay[access as usize])
        } else {
            outgoing_of(slot, tables, access)
        }
    }

    /// The path of a miss. Without `record`, a fault is not reported to the SMMU.
    #[inline(never)]
    fn translate_slow(
        &mut self,
        from: &Initiator,
        va: u64,
        access: Access,
        record: bool,
    ) -> Result<Translated, FaultOutcome> {
        let over = FaultOutcome::Terminate { abort: true };
        let key = key_of(from);
        let at = Self::place(key);
        for attempt in 0..RETRIES {
            let known = self.slot_at(at, key).is_some();
            if !known {
                if !record {
                    return Err(over);
                }
                match self.learn(from, va, access) {
                    Ok(()) => {}
                    Err(FaultOutcome::Retry) => {
                        self.catch_up();
                        continue;
                    }
                    Err(outcome) => {
                        self.stats.refused += 1;
                        return Err(outcome);
                    }
                }
            }
            if !known || self.last != at || attempt > 0 {
                // Not what the caller has looked up already: it may hit after all.
                self.last = at;
                if let Some(t) = self.hit(from, va, access) {
                    return Ok(t);
                }
            }
            if self.slots.get(at).is_some_and(|slot| slot.hot.sizes.are_several())
                && let Some(t) = self.hit_another_size(va, access)
            {
                return Ok(t);
            }
            let Some(slot) = self.slot_at(at, key) else { continue };
            let c = match &slot.config {
                Config::Bypass { mask, strict: true, .. } if va & !mask != 0 => {
                    match self.refuse(from, va, access, record) {
                        FaultOutcome::Retry => {
                            self.catch_up();
                            continue;
                        }
                        outcome => return Err(outcome),
                    }
                }
                Config::Bypass { attrs, mask, .. } => {
                    let pa = va & mask;
                    let attrs = attrs.of(access);
                    return Ok(Translated { pa: Pa(pa), left: 4096 - (pa & 4095), attrs });
                }
                Config::Translate(c) => c,
            };
            let input = va & c.context.va_mask;
            let walker = self.tcu.walker();
            let mut landing = None;
            if let Some(usual) = &c.usual
                && let Some(end) = usual.descend(walker, input)
            {
                if c.seen.perms.0 & slot.hot.need[access as usize] != 0
                    && let Some(page) = usual.output(&end, &c.seen.alike)
                {
                    self.stats.walks += 1;
                    return Ok(self.fill_alike(input, page, access));
                }
                landing = Some(end);
            }
            let kind = AccessKind::new(access, c.context.incoming);
            let walked = match &landing {
                Some(end) => c.context.stages.translate_landed(walker, input, kind, end),
                None => c.context.stages.translate(walker, input, kind, Updates::Apply, &mut NoRecord),
            };
            let outcome = match walked {
                Err(fault) if record => {
                    let seen = (attempt + 1 < RETRIES).then_some(self.seen);
                    Some(self.tcu.fault(from, va, access, &c.context, seen, fault))
                }
                _ => None,
            };
            self.stats.walks += 1;
            match (walked, outcome) {
                (Ok(walked), _) => return Ok(self.fill(input, walked, access, landing.as_ref())),
                (Err(_), None) => return Err(over),
                (Err(_), Some(FaultOutcome::Retry)) => self.catch_up(),
                (Err(_), Some(outcome)) => {
                    self.stats.refused += 1;
                    return Err(outcome);
                }
            }
        }
        self.stats.refused += 1;
        Err(over)
    }

    /// Asks the SMMU about an address that a strict bypass does not let pass, and keeps nothing.
    #[cold]
    fn refuse(&mut self, from: &Initiator, va: u64, access: Access, record: bool) -> FaultOutcome {
        if !record {
            return FaultOutcome::Terminate { abort: true };
        }
        self.stats.resolutions += 1;
        let outcome = match self.tcu.resolve(&mut self.memo, from, va, access) {
            Resolution::Refused(outcome) => outcome,
            // The configuration has changed.
            Resolution::Bypass { .. } | Resolution::Translate(_) => FaultOutcome::Retry,
        };
        self.stats.refused += u64::from(outcome != FaultOutcome::Retry);
        outcome
    }

    /// Asks the SMMU about a stream and keeps the answer.
    #[cold]
    fn learn(&mut self, from: &Initiator, va: u64, access: Access) -> Result<(), FaultOutcome> {
        self.stats.resolutions += 1;
        if self.tlb.contexts() > MAX_CONTEXTS {
            self.tlb.clear();
            self.stamp += 1;
        }
        if self.slots.is_empty() {
            self.slots.resize_with(1 << SLOTS_LOG2, Slot::empty);
        }
        let (key, stamp) = (key_of(from), self.stamp);
        let resolution = self.tcu.resolve(&mut self.memo, from, va, access);
        let Some(place) = self.slots.get_mut(Self::place(key)) else { return Ok(()) };
        let mut hot = Hot::new(key, stamp);
        let config = match resolution {
            Resolution::Bypass { attrs, mask, strict } => Config::Bypass { attrs, mask, strict },
            Resolution::Translate(Decoded { context, number }) => {
                // A stamp is not older than the memo.
                if let Config::Translate(c) = &place.config
                    && number.is_some()
                    && (c.number, place.hot.stamp) == (number, stamp)
                {
                    // Streams that share a context: only the name is new.
                    place.hot.key = key;
                    place.hot.sizes = self.tlb.sizes(c.index);
                    return Ok(());
                }
                let index = self.tlb.context(context.key);
                let accesses = [Access::Read, Access::Write];
                hot.va_mask = context.va_mask;
                hot.need = accesses.map(|a| AccessKind::new(a, context.incoming).bit());
                hot.simple = context.stages.stage1.is_some() && !context.narrows_hints();
                hot.overlay = accesses.map(|a| context.incoming.of(a).security_privilege_bits());
                hot.sizes = self.tlb.sizes(index);
                // A stream that takes another's place takes its memory too.
                if let Config::Translate(c) = &mut place.config {
                    place.hot = hot;
                    c.take(context, number, index);
                    return Ok(());
                }
                Config::Translate(Cached::new(context, number, index))
            }
            Resolution::Refused(outcome) => return Err(outcome),
        };
        *place = Slot { hot, config };
        Ok(())
    }

    /// Fills the TLB for the slot used last with a page whose leaf is like the last one's.
    #[inline(always)]
    fn fill_alike(&mut self, input: u64, page: u64, access: Access) -> Translated {
        let Some(slot) = self.slots.get(self.last) else { return Translated::byte(page) };
        let Config::Translate(c) = &slot.config else { return Translated::byte(page) };
        let seen = &c.seen;
        let shift = seen.alike.shift as u8;
        let inside = (1u64 << shift) - 1;
        let attrs = self.outgoing(slot, seen.attrs, access);
        let entry = Entry {
            page,
            size_log2: shift,
            leaf_log2: shift,
            perms: seen.perms,
            attrs: seen.attrs,
            global: seen.global,
        };
        if let Some(slot) = self.slots.get_mut(self.last) {
            keep(&mut self.tlb, &mut self.stamp, slot, input, entry);
        }
        Translated { pa: Pa(page | input & inside), left: inside + 1 - (input & inside), attrs }
    }

    /// Fills the TLB for the slot used last. `landing` is where the descent of the walk ended, if it was a usual one.
    #[inline(never)]
    fn fill(&mut self, input: u64, w: Walked, access: Access, landing: Option<&Landing>) -> Translated {
        let size = 1u64 << w.size_log2;
        let left = size - (input & (size - 1));
        let Some(slot) = self.slots.get_mut(self.last) else { return Translated::byte(w.pa) };
        let Config::Translate(c) = &mut slot.config else { return Translated::byte(w.pa) };
        let tables = c.context.table_attributes(w.attrs);
        let attrs = c.context.outgoing(tables).of(access);
        // An address whose top byte is ignored by one half of the space alone must not be kept: an invalidation of
        // the same page by another name would not find it.
        let named = (canonical(input) ^ input) & c.context.va_mask == 0;
        if c.context.cacheable && named {
            let known = self.attrs.iter().take(self.attrs_used).position(|a| *a == tables);
            let epoch = self.tlb.epoch();
            if known.is_none() && self.attrs_used == MAX_ATTRS {
                // The table of attributes starts over, and with it everything that points into it.
                self.attrs_used = 0;
                self.tlb.clear();
                c.index = self.tlb.context(c.context.key);
                c.seen = Seen::NOTHING;
                slot.hot.sizes = Sizes::default();
            }
            let at = known.unwrap_or(self.attrs_used);
            if known.is_none() {
                self.attrs[at] = tables;
                self.attrs_used += 1;
            }
            if let Some(alike) = landing.and_then(|end| Alike::of(end, w.size_log2)) {
                c.seen = Seen { alike, perms: w.perms, global: w.global, attrs: at as u8 };
            }
            if self.tlb.epoch() != epoch {
                self.stamp += 1;
                slot.hot.stamp = self.stamp;
            }
            let entry = Entry {
                page: w.pa & !(size - 1),
                size_log2: w.size_log2,
                leaf_log2: w.leaf_log2,
                perms: w.perms,
                attrs: at as u8,
                global: w.global,
            };
            keep(&mut self.tlb, &mut self.stamp, slot, input, entry);
        }
        Translated { pa: Pa(w.pa), left, attrs }
    }

    /// The longest run from `va`, which translates to `t`, whose output is contiguous; at most `max` bytes. Called
    /// inside the guard. A fault behind the first page ends the run and is left for the next piece to find and report.
    #[inline]
    fn run(&mut self, from: &Initiator, va: u64, access: Access, max: usize, t: Translated) -> Run {
        let mut len = usize::try_from(t.left).unwrap_or(usize::MAX).min(max);
        if len < max
            && let Some(known) = self.known.find(key_of(from), va, access)
            && (known.pa, known.attrs) == (t.pa, t.attrs)
        {
            let left = usize::try_from(known.left).unwrap_or(usize::MAX);
            len = len.max(left.min(max));
        }
        let looked_up = len;
        while len < max {
            let next = va.wrapping_add(len as u64);
            let Some(more) = self.quiet(from, next, access) else { break };
            if more.pa.get() != t.pa.get().wrapping_add(len as u64) || more.attrs != t.attrs {
                break;
            }
            len += usize::try_from(more.left).unwrap_or(usize::MAX).min(max - len);
        }
        if len > looked_up {
            self.remember(from, va, access, t, len);
        }
        Run { pa: t.pa, len, attrs: t.attrs }
    }

    /// Keeps a run of `len` bytes that begins at `va`, if that saves something.
    #[inline]
    fn remember(&mut self, from: &Initiator, va: u64, access: Access, t: Translated, len: usize) {
        if len >= SHORTEST_RUN {
            let (key, len) = (key_of(from), len as u64);
            self.known.remember(Known { key, access, va, len, pa: t.pa, attrs: t.attrs });
        }
    }

    /// A translation for a copy: of a run, or of a page. Reports nothing to the SMMU if there is none.
    #[inline]
    fn stretch(&mut self, from: &Initiator, va: u64, access: Access) -> Option<Translated> {
        match self.known.find(key_of(from), va, access) {
            Some(t) => {
                self.stats.hits += 1;
                Some(t)
            }
            None => self.quiet(from, va, access),
        }
    }

    /// A translation that reports nothing to the SMMU if there is none.
    #[inline]
    fn quiet(&mut self, from: &Initiator, va: u64, access: Access) -> Option<Translated> {
        match self.hit(from, va, access) {
            Some(t) => Some(t),
            None => self.translate_slow(from, va, access, false).ok(),
        }
    }

    /// Moves one piece inside a guard: `Ok(bytes)`, or the fault. A run that memory refuses is tried again up to the
    /// next 4 KiB boundary, so that what lies before the refused page is transferred however the tables map it.
    #[inline]
    fn piece(
        &mut self,
        from: &Initiator,
        va: u64,
        access: Access,
        max: usize,
        mut transfer: impl FnMut(&M, Option<&Run>, usize) -> Result<(), BusError>,
    ) -> Result<usize, DmaFault> {
        let to_boundary = |address: u64| 4096 - (address & 4095) as usize;
        let inside = self.enter();
        let port = &mut *inside.port;
        match port.translate_inside(from, va, access) {
            Ok(t) => {
                let run = port.run(from, va, access, max.min(PIECE), t);
                let Err(e) = transfer(&port.memory, Some(&run), run.len) else { return Ok(run.len) };
                let less = to_boundary(run.pa.get());
                if run.len <= less {
                    return Err(e.into());
                }
                transfer(&port.memory, Some(&run), less).map(|()| less).map_err(Into::into)
            }
            Err(FaultOutcome::Terminate { abort: false }) => {
                let n = to_boundary(va).min(max);
                // Read as zero, write ignored: nothing reaches memory.
                transfer(&port.memory, None, n).map(|()| n).map_err(Into::into)
            }
            Err(FaultOutcome::Stall(tag)) => Err(DmaFault::Stalled(tag)),
            Err(_) => Err(DmaFault::Terminated),
        }
    }
}

impl<T: Tcu, M: Memory> DmaPort for Tbu<T, M> {
    #[inline]
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < buf.len() {
            let rest = &mut buf[done..];
            let max = rest.len();
            let va = addr.get().wrapping_add(done as u64);
            let n = self.piece(&from, va, Access::Read, max, |memory, run, n| match run {
                Some(run) => memory.read(run.pa, run.attrs, &mut rest[..n]),
                None => {
                    rest[..n].fill(0);
                    Ok(())
                }
            });
            done += n.map_err(|fault| DmaError { done, fault })?;
        }
        Ok(())
    }

    #[inline]
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < buf.len() {
            let rest = &buf[done..];
            let va = addr.get().wrapping_add(done as u64);
            let n = self.piece(&from, va, Access::Write, rest.len(), |memory, run, n| match run {
                Some(run) => memory.write(run.pa, run.attrs, &rest[..n]),
                None => Ok(()),
            });
            done += n.map_err(|fault| DmaError { done, fault })?;
        }
        Ok(())
    }

    fn copy(&mut self, src: (Initiator, Iova), dst: (Initiator, Iova), len: usize) -> Result<(), CopyError> {
        let mut done = 0;
        while done < len {
            let max = (len - done).min(PIECE);
            let (s, d) = (src.1.wrapping_add(done as u64), dst.1.wrapping_add(done as u64));
            let moved = self.enter().port.copy_inside((&src.0, s.get()), (&dst.0, d.get()), max);
            done += moved;
            if moved == 0 {
                // The general way: page by page through a buffer, with every rule about zeros, stalls and refusals.
                let n = (4096 - (s.get() & 4095) as usize).min(4096 - (d.get() & 4095) as usize).min(max);
                self.copy_slowly((src.0, s), (dst.0, d), n).map_err(|e| CopyError {
                    side: e.side,
                    error: DmaError { done: done + e.error.done, fault: e.error.fault },
                })?;
                done += n;
            }
        }
        Ok(())
    }

    fn stall_state(&mut self, tag: StallTag) -> StallState {
        self.tcu.stall_state(tag)
    }
}

impl<T: Tcu, M: Memory> Tbu<T, M> {
    /// Memory to memory inside the guard, without a buffer: each page is looked up once, and neighbours that are
    /// contiguous on both sides move in one copy. Stops before anything out of the ordinary, without reporting it;
    /// returns the bytes moved.
    #[inline]
    fn copy_inside(&mut self, src: (&Initiator, u64), dst: (&Initiator, u64), max: usize) -> usize {
        // What is left of the current stretch on each side, and a run that is decided and not yet moved: where it begins in
        // the copy, and its bytes.
        let (mut source, mut target): (Option<Translated>, Option<Translated>) = (None, None);
        let mut run: Option<(Translated, Translated, usize)> = None;
        let (mut moved, mut ahead, mut stretches) = (0, 0, 0);
        while ahead < max {
            let at = ahead as u64;
            // The target is not looked at (and marked dirty) before there is something to write.
            let Some(s) = source.or_else(|| self.stretch(src.0, src.1.wrapping_add(at), Access::Read)) else {
                break;
            };
            let Some(d) = target.or_else(|| self.stretch(dst.0, dst.1.wrapping_add(at), Access::Write))
            else {
                break;
            };
            let n = usize::try_from(s.left.min(d.left)).unwrap_or(usize::MAX).min(max - ahead);
            stretches += 1;
            run = match run {
                Some((rs, rd, len)) if follows(&rs, len, &s) && follows(&rd, len, &d) => {
                    Some((rs, rd, len + n))
                }
                Some(full) => {
                    if !self.move_run(full) {
                        return moved;
                    }
                    moved += full.2;
                    Some((s, d, n))
                }
                None => Some((s, d, n)),
            };
            (source, target) = (rest(s, n), rest(d, n));
            ahead += n;
        }
        match run {
            Some(last) if self.move_run(last) => {
                if stretches > 1 {
                    let at = moved as u64;
                    self.remember(src.0, src.1.wrapping_add(at), Access::Read, last.0, last.2);
                    self.remember(dst.0, dst.1.wrapping_add(at), Access::Write, last.1, last.2);
                }
                moved + last.2
            }
            _ => moved,
        }
    }

    #[inline]
    fn move_run(&self, (s, d, n): (Translated, Translated, usize)) -> bool {
        self.memory.copy((s.pa, s.attrs), (d.pa, d.attrs), n).is_ok()
    }

    #[cold]
    fn copy_slowly(
        &mut self,
        src: (Initiator, Iova),
        dst: (Initiator, Iova),
        len: usize,
    ) -> Result<(), CopyError> {
        let mut buf = [0u8; 4096];
        let buf = &mut buf[..len.min(4096)];
        let side = |side| move |error| CopyError { side, error };
        let read = self.read(src.0, src.1, buf);
        let have = read.err().map_or(buf.len(), |e| e.done);
        self.write(dst.0, dst.1, &buf[..have]).map_err(side(CopySide::Destination))?;
        read.map_err(side(CopySide::Source))
    }
}
