//! The walk through one or two stages, in the order in which the architecture detects faults (IHI 0062D chapter 2, IHI
//! 0070 7.3.22).
//!
//! For each stage 1 descriptor first stage 2 of its address, then the descriptor; after the last level access flag and
//! permissions of stage 1; then stage 2 of the output. Dirty state is written last, when nothing can refuse the access
//! any more.

use portcullis_arch::{Access, Attributes, Pa};
use portcullis_bus::Memory;

use crate::long::Landing;
use crate::perms::{AccessKind, Perms};
use crate::record::{NoRecord, Recorder, Step};
use crate::stage::{
    AddressFormat, Fault, FaultKind, FlagUpdate, Flat, Leaf, Nested, Region, Stage1, Stage2, TableFormat,
    Updates, Walked, combine, exceeds, low,
};
use crate::update::{Direct, Spot, TRIES, Tables, Through, contended, dirty_stage1, dirty_stage2, mark};
use crate::{long, short};

/// Why a walk ended without an answer.
enum Stop {
    Fault(Fault),
    /// A descriptor changed before it could be marked: walk again. The fault counts if that never ends.
    Raced(Fault),
}

impl Stop {
    fn into_fault(self) -> Fault {
        match self {
            Self::Fault(fault) | Self::Raced(fault) => fault,
        }
    }
}

impl From<Fault> for Stop {
    #[inline]
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Walks until nobody changes a descriptor in between.
#[inline(always)]
fn settle<T>(mut walk: impl FnMut() -> Result<T, Stop>) -> Result<T, Fault> {
    let mut tries = 1;
    loop {
        match walk() {
            Ok(done) => return Ok(done),
            Err(Stop::Raced(_)) if tries < TRIES => tries += 1,
            Err(Stop::Fault(fault) | Stop::Raced(fault)) => return Err(fault),
        }
    }
}

impl Nested {
    /// Translates `va` for an access of `kind` by reading tables from `memory`, and updates the descriptors that say so
    /// in the manner of `updates`.
    #[inline(always)]
    pub fn translate<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        va: u64,
        kind: AccessKind,
        updates: Updates,
        recorder: &mut R,
    ) -> Result<Walked, Fault> {
        if self.is_plain() {
            // Nothing is marked, so that no race can be lost and one walk is enough. The most frequent one stays in
            // registers: nothing but its answer is between it and its caller.
            if let (Some(s1), None) = (&self.stage1, &self.stage2) {
                let (leaf, _) = s1.walk(memory, va, kind, updates, (&Direct::<false>, None), recorder)?;
                check(leaf.perms, kind, 1, leaf.level, va)?;
                return Ok(finish(va, leaf, leaf.leaf_log2, leaf.perms, leaf.attrs, leaf.global));
            }
            self.walk_others(memory, va, kind, updates, recorder)
        } else {
            self.translate_full(memory, va, kind, updates, recorder)
        }
    }

    /// [`translate`](Self::translate) from where the descent of [`Usual`](crate::long::Usual) has landed.
    #[inline(never)]
    pub(crate) fn translate_landed<M: Memory>(
        &self,
        memory: &M,
        va: u64,
        kind: AccessKind,
        end: &Landing,
    ) -> Result<Walked, Fault> {
        let Some(s1) = &self.stage1 else {
            return self.translate(memory, va, kind, Updates::Apply, &mut NoRecord);
        };
        let tables = (&Direct::<false>, Some(end));
        let (leaf, _) = s1.walk(memory, va, kind, Updates::Apply, tables, &mut NoRecord)?;
        check(leaf.perms, kind, 1, leaf.level, va)?;
        Ok(finish(va, leaf, leaf.leaf_log2, leaf.perms, leaf.attrs, leaf.global))
    }

    #[inline(never)]
    fn walk_others<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        va: u64,
        kind: AccessKind,
        updates: Updates,
        recorder: &mut R,
    ) -> Result<Walked, Fault> {
        self.walk::<_, _, false>(memory, va, kind, updates, recorder).map_err(Stop::into_fault)
    }

    /// No stage has descriptors that hardware updates or that hold 52-bit addresses.
    #[inline(always)]
    pub(crate) fn is_plain(&self) -> bool {
        let plain = |flags: FlagUpdate, region: Option<&Region>| {
            !flags.access && region.is_none_or(|r| r.address == AddressFormat::Bits48)
        };
        let one = |s: &Stage1| s.regions.iter().all(|r| plain(s.flags, r.as_ref()));
        self.stage1.as_ref().is_none_or(one)
            && self.stage2.as_ref().is_none_or(|s| plain(s.flags, s.region.as_ref()))
    }

    // A walk of its own, so that plain walks carry nothing of what updates and 52 bits need.
    #[inline(never)]
    fn translate_full<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        va: u64,
        kind: AccessKind,
        updates: Updates,
        recorder: &mut R,
    ) -> Result<Walked, Fault> {
        settle(|| self.walk::<_, _, true>(memory, va, kind, updates, recorder))
    }

    #[inline(always)]
    fn walk<M: Memory, R: Recorder, const FULL: bool>(
        &self,
        memory: &M,
        va: u64,
        kind: AccessKind,
        updates: Updates,
        recorder: &mut R,
    ) -> Result<Walked, Stop> {
        match (&self.stage1, &self.stage2) {
            (Some(s1), None) => {
                let (leaf, spot) = s1.walk(memory, va, kind, updates, (&Direct::<FULL>, None), recorder)?;
                check(leaf.perms, kind, 1, leaf.level, va)?;
                let perms = s1.write_to(memory, &leaf, &spot, kind, (&Direct::<FULL>, updates), recorder)?;
                Ok(finish(va, leaf, leaf.leaf_log2, perms, leaf.attrs, leaf.global))
            }
            (Some(s1), Some(s2)) => both::<_, _, FULL>(s1, s2, memory, (va, kind), updates, recorder),
            (None, s2) => {
                let flat = self.flat_first_stage();
                flat.check(va)?;
                match s2 {
                    None => Ok(Walked::flat(va)),
                    Some(s2) => s2.alone::<_, _, FULL>(memory, flat, (va, kind), updates, recorder),
                }
            }
        }
    }

    /// The checks of the first stage while it is off.
    fn flat_first_stage(&self) -> Flat {
        if self.flat.stage == 2 && self.stage2.is_some() { Flat::UNCHECKED } else { self.flat }
    }

    /// Translates `va` through stage 1 alone (its tables still go through stage 2): what address translation
    /// operations for stage 1 answer. With stage 1 off the address is its own output.
    pub fn translate_stage1<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        va: u64,
        kind: AccessKind,
        updates: Updates,
        recorder: &mut R,
    ) -> Result<Walked, Fault> {
        let Some(s1) = &self.stage1 else {
            self.flat_first_stage().check(va)?;
            return Ok(Walked::flat(va));
        };
        match &self.stage2 {
            None => s1.alone(memory, va, kind, (&Direct::<true>, updates), recorder),
            Some(stage2) => {
                s1.alone(memory, va, kind, (&Through::<true> { stage2, updates }, updates), recorder)
            }
        }
    }
}

// Each combination of stages is a function of its own: together they have more state than there are registers.
#[inline(never)]
fn both<M: Memory, R: Recorder, const FULL: bool>(
    s1: &Stage1,
    s2: &Stage2,
    memory: &M,
    (va, kind): (u64, AccessKind),
    updates: Updates,
    recorder: &mut R,
) -> Result<Walked, Stop> {
    let tables = Through::<FULL> { stage2: s2, updates };
    let (leaf1, spot1) = s1.walk(memory, va, kind, updates, (&tables, None), recorder)?;
    check(leaf1.perms, kind, 1, leaf1.level, va)?;
    if leaf1.clean && kind.is_write() {
        Tables::<M, R>::may_write(&tables, spot1.address, &spot1.under)?;
    }
    let ipa = leaf1.at(va);
    let (leaf2, spot2) = s2.walk::<_, _, FULL>(memory, ipa, updates, recorder)?;
    check(leaf2.perms, kind, 2, leaf2.level, ipa)?;
    let perms1 = s1.write_to(memory, &leaf1, &spot1, kind, (&tables, updates), recorder)?;
    let perms2 = s2.write_to(memory, &leaf2, &spot2, (ipa, kind), updates, recorder)?;
    let leaf2 = leaf2.within(ipa, leaf1.size_log2);
    let attrs = combine(leaf1.attrs, leaf2.attrs);
    Ok(finish(ipa, leaf2, leaf1.leaf_log2, perms1.and(perms2), attrs, leaf1.global))
}

impl Walked {
    /// Address in, address out.
    fn flat(va: u64) -> Self {
        let attrs = Attributes::DEVICE_DEFAULT;
        Self { pa: va, size_log2: 12, leaf_log2: 12, perms: Perms::ALL, attrs, global: true }
    }
}

impl Leaf {
    /// Where `input`, an address that this leaf covers, comes out.
    #[inline]
    pub(crate) fn at(&self, input: u64) -> u64 {
        self.output | input & low(self.size_log2)
    }

    /// The part around `input` of at most `1 << limit_log2` bytes.
    #[inline]
    fn within(self, input: u64, limit_log2: u8) -> Self {
        if self.size_log2 <= limit_log2 {
            return self;
        }
        Self { output: self.at(input) & !low(limit_log2), size_log2: limit_log2, ..self }
    }

    /// The leaf may be kept with these permissions after an access of `kind` that marks nothing.
    #[inline(always)]
    fn unmarked(&self, kind: AccessKind) -> Option<Perms> {
        match (self.clean, kind.is_write()) {
            (false, _) => Some(self.perms),
            // The first write has to come back here.
            (true, false) => Some(self.perms.write_if(false)),
            (true, true) => None,
        }
    }
}

#[inline]
pub(crate) fn check(perms: Perms, kind: AccessKind, stage: u8, level: i8, input: u64) -> Result<(), Fault> {
    if perms.allows(kind) {
        return Ok(());
    }
    let ipa = if stage == 2 { input } else { 0 };
    Err(Fault::new(FaultKind::Permission, stage, level).with_ipa(ipa))
}

#[inline]
fn finish(input: u64, leaf: Leaf, leaf_log2: u8, perms: Perms, attrs: Attributes, global: bool) -> Walked {
    let size_log2 = leaf.size_log2;
    Walked { pa: leaf.at(input), size_log2, leaf_log2: leaf_log2.max(size_log2), perms, attrs, global }
}

impl Stage1 {
    /// Finds the leaf of `va`, and sets its access flag if it is hardware's to set.
    #[inline(always)]
    fn walk<M: Memory, R: Recorder, T: Tables<M, R>>(
        &self,
        memory: &M,
        va: u64,
        kind: AccessKind,
        updates: Updates,
        (tables, landed): (&T, Option<&Landing>),
        recorder: &mut R,
    ) -> Result<(Leaf, Spot<T::Under>), Fault> {
        let range = Fault::new(FaultKind::Translation, 1, self.range_fault_level);
        let (half, inside) = self.split.select(va).ok_or(range)?;
        let region = self.regions[half].as_ref().ok_or(range)?;
        let closed = self.e0pd[half] && !self.single_privilege;
        if closed && !kind.is_privileged() {
            return Err(range);
        }
        let (mut leaf, spot) = match self.format {
            TableFormat::Short => short::walk(memory, self, region, inside as u32, recorder, tables),
            _ => long::stage1(memory, self, (region, half), inside, updates, recorder, (tables, landed)),
        }?;
        if closed {
            leaf.perms = leaf.perms.privileged_only();
        }
        // A TLB must not answer from this leaf for addresses that another region or no region at all translates.
        let limit = self.split.block_limit(half).min(region.input_bits).min(self.output_bits);
        Ok((leaf.within(va, limit), spot))
    }

    /// Marks the leaf dirty if the access is its first write, and says what a TLB may allow from now on.
    #[inline(always)]
    fn write_to<M: Memory, R: Recorder, T: Tables<M, R>>(
        &self,
        memory: &M,
        leaf: &Leaf,
        spot: &Spot<T::Under>,
        kind: AccessKind,
        (tables, updates): (&T, Updates),
        recorder: &mut R,
    ) -> Result<Perms, Stop> {
        match leaf.unmarked(kind) {
            Some(perms) => Ok(perms),
            None => self.mark_dirty(memory, leaf, spot, (tables, updates), recorder).map(|()| leaf.perms),
        }
    }

    #[cold]
    fn mark_dirty<M: Memory, R: Recorder, T: Tables<M, R>>(
        &self,
        memory: &M,
        leaf: &Leaf,
        spot: &Spot<T::Under>,
        (tables, updates): (&T, Updates),
        recorder: &mut R,
    ) -> Result<(), Stop> {
        let spot = tables.before_write(memory, spot, recorder)?;
        let refused = contended(1, leaf.level, 0, spot.at);
        let step =
            |rule| Step { stage: 1, level: leaf.level, address: spot.address, value: spot.value, rule };
        let new = dirty_stage1(spot.value);
        match mark(memory, &spot, new, self.big_endian, updates, step, recorder) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Stop::Raced(refused)),
            Err(_) => Err(Stop::Fault(refused)),
        }
    }

    fn alone<M: Memory, R: Recorder, T: Tables<M, R>>(
        &self,
        memory: &M,
        va: u64,
        kind: AccessKind,
        (tables, updates): (&T, Updates),
        recorder: &mut R,
    ) -> Result<Walked, Fault> {
        settle(|| {
            let (leaf, spot) = self.walk(memory, va, kind, updates, (tables, None), recorder)?;
            check(leaf.perms, kind, 1, leaf.level, va)?;
            let perms = self.write_to(memory, &leaf, &spot, kind, (tables, updates), recorder)?;
            Ok(finish(va, leaf, leaf.leaf_log2, perms, leaf.attrs, leaf.global))
        })
    }
}

impl Stage2 {
    /// Finds the leaf of `ipa`, and sets its access flag if it is hardware's to set.
    #[inline]
    pub(crate) fn walk<M: Memory, R: Recorder, const FULL: bool>(
        &self,
        memory: &M,
        ipa: u64,
        updates: Updates,
        recorder: &mut R,
    ) -> Result<(Leaf, Spot<()>), Fault> {
        let range = Fault::new(FaultKind::Translation, 2, self.range_fault_level).with_ipa(ipa);
        let region = self.region.as_ref().ok_or(range)?;
        let limit = self.input_limit_bits.min(region.input_bits);
        if exceeds(ipa, limit) {
            return Err(range);
        }
        let (leaf, spot) = long::stage2::<_, _, FULL>(memory, self, region, ipa, updates, recorder)?;
        Ok((leaf.within(ipa, limit.min(self.output_bits)), spot))
    }

    #[inline(never)]
    fn alone<M: Memory, R: Recorder, const FULL: bool>(
        &self,
        memory: &M,
        flat: Flat,
        (va, kind): (u64, AccessKind),
        updates: Updates,
        recorder: &mut R,
    ) -> Result<Walked, Stop> {
        let (leaf, spot) = self.walk::<_, _, FULL>(memory, va, updates, recorder)?;
        check(leaf.perms, kind, 2, leaf.level, va)?;
        let perms = self.write_to(memory, &leaf, &spot, (va, kind), updates, recorder)?;
        let leaf = leaf.within(va, flat.input_bits.min(flat.output_bits));
        Ok(finish(va, leaf, leaf.leaf_log2, perms, leaf.attrs, false))
    }

    /// The fault if a leaf may not hold a structure that the SMMU itself reads or writes at `ipa`.
    #[inline]
    pub(crate) fn check_structure(&self, leaf: &Leaf, ipa: u64, write: bool) -> Result<(), Fault> {
        let access = if write { Access::Write } else { Access::Read };
        check(leaf.perms, AccessKind::new(access, Attributes::DEVICE_DEFAULT), 2, leaf.level, ipa)?;
        if self.protect_walks && leaf.attrs.memory().is_device() {
            return Err(Fault::new(FaultKind::Permission, 2, leaf.level).with_ipa(ipa));
        }
        Ok(())
    }

    /// Translates the address of a structure that the SMMU itself reads (a context descriptor) or writes: its address in
    /// memory, stage 2's attributes for [`combine`], and log2 of the block around it for which that holds. Reads set
    /// access flags and never mark anything dirty. The fault names the IPA; what it was for is the caller's to add.
    pub fn translate_ipa<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        ipa: u64,
        write: bool,
        updates: Updates,
        recorder: &mut R,
    ) -> Result<(Pa, Attributes, u8), Fault> {
        settle(|| {
            let (leaf, spot) = self.walk::<_, _, true>(memory, ipa, updates, recorder)?;
            self.check_structure(&leaf, ipa, write)?;
            if write && leaf.clean && !self.mark_dirty(memory, &leaf, &spot, ipa, updates, recorder)? {
                return Err(Stop::Raced(contended(2, leaf.level, ipa, spot.at)));
            }
            Ok((Pa(leaf.at(ipa)), leaf.attrs, leaf.size_log2))
        })
    }

    #[inline(always)]
    fn write_to<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        leaf: &Leaf,
        spot: &Spot<()>,
        (ipa, kind): (u64, AccessKind),
        updates: Updates,
        recorder: &mut R,
    ) -> Result<Perms, Stop> {
        match leaf.unmarked(kind) {
            Some(perms) => Ok(perms),
            None if self.mark_dirty(memory, leaf, spot, ipa, updates, recorder)? => Ok(leaf.perms),
            None => Err(Stop::Raced(contended(2, leaf.level, ipa, spot.at))),
        }
    }

    /// Marks a leaf dirty. False if its descriptor has changed meanwhile.
    #[cold]
    pub(crate) fn mark_dirty<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        leaf: &Leaf,
        spot: &Spot<()>,
        ipa: u64,
        updates: Updates,
        recorder: &mut R,
    ) -> Result<bool, Fault> {
        let step =
            |rule| Step { stage: 2, level: leaf.level, address: spot.address, value: spot.value, rule };
        let new = dirty_stage2(spot.value);
        mark(memory, spot, new, self.big_endian, updates, step, recorder)
            .map_err(|_| contended(2, leaf.level, ipa, spot.at))
    }
}
