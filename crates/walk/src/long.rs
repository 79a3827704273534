//! Walks of 64-bit descriptors: VMSAv8-64 (DDI 0487 D8.2 to D8.4) and the AArch32 long format (G5.5).

use portcullis_arch::attrs::{Allocate, MemoryType, Shareability};
use portcullis_arch::vmsa::long as bits;
use portcullis_arch::{Attributes, Pa};
use portcullis_bus::Memory;

use crate::perms::Perms;
use crate::record::{Recorder, Rule, Step};
use crate::stage::{
    AddressFormat, FORCED, Fault, FaultKind, FlagUpdate, Leaf, Nested, Region, Stage1, Stage2, TableFormat,
    Updates, combine, exceeds,
};
use crate::update::{Direct, Spot, TRIES, Tables, change, contended};

/// What both stages share about one walk.
struct Lookup<'a> {
    stage: u8,
    region: &'a Region,
    input: u64,
    output_bits: u8,
    big_endian: bool,
    secure: bool,
    /// Access flag faults are off.
    affd: bool,
    flags: FlagUpdate,
    updates: Updates,
    /// Level that a table base above the output size reports.
    base_level: i8,
}

struct Found<U> {
    level: i8,
    output: u64,
    size_log2: u8,
    /// OR of the table descriptors on the way.
    tables: u64,
    /// The leaf's descriptor.
    spot: Spot<U>,
}

/// A walk down through tables that lie in memory where they say, to the first descriptor that is no table: the usual
/// case of [`Lookup::run`], with nothing in it that it does not need.
pub(crate) struct Descent {
    table: u64,
    table_mask: u64,
    too_large: u64,
    level: i8,
    shift: u32,
    width: u32,
    stride: u32,
    walk_attrs: Attributes,
}

/// Where a descent ended.
pub(crate) struct Landing {
    address: u64,
    /// `None` if memory refused it.
    value: Option<u64>,
    level: i8,
    shift: u32,
    tables: u64,
}

impl Descent {
    // Not inlined: alone it fits into registers.
    #[inline(never)]
    fn descend<M: Memory>(self, memory: &M, input: u64) -> Landing {
        self.go(memory, input)
    }

    #[inline(always)]
    fn go<M: Memory>(&self, memory: &M, input: u64) -> Landing {
        let &Self { mut table, table_mask, too_large, mut level, mut shift, width, stride, walk_attrs } =
            self;
        let (mut index_mask, next_mask) = ((1u64 << width) - 1, (1u64 << stride) - 1);
        let mut tables = 0;
        loop {
            let address = table | (input >> shift & index_mask) << 3;
            let Ok(value) = memory.load64(Pa(address), walk_attrs) else {
                return Landing { address, value: None, level, shift, tables };
            };
            let is_table = value & bits::TYPE == bits::TYPE_TABLE_OR_PAGE && level < 3;
            if !is_table || value & bits::ADDRESS & too_large != 0 {
                return Landing { address, value: Some(value), level, shift, tables };
            }
            table = value & table_mask;
            tables |= value;
            level += 1;
            shift -= stride;
            index_mask = next_mask;
        }
    }
}

/// The descent of nearly all walks, prepared once for a context: stage 1 alone, 64-bit descriptors in their usual form, the lower
/// half of the address space.
pub(crate) struct Usual {
    descent: Descent,
    /// Addresses of more bits are not for this descent.
    input_bits: u32,
}

impl Usual {
    /// `None` if the context is not of that kind.
    pub(crate) fn of(stages: &Nested) -> Option<Self> {
        let (Some(s1), None) = (&stages.stage1, &stages.stage2) else { return None };
        let region = s1.regions[0].as_ref()?;
        let input_bits = u32::from(region.input_bits);
        let special = !stages.is_plain()
            || s1.format == TableFormat::Short
            || s1.big_endian
            || s1.secure
            || s1.e0pd[0]
            || !(1..=55).contains(&input_bits)
            || !(-1..=3).contains(&region.start_level)
            || exceeds(region.base, s1.output_bits);
        let last = (1u64 << (input_bits & 63)) - 1;
        if special || s1.split.select(0) != Some((0, 0)) || s1.split.select(last) != Some((0, last)) {
            return None;
        }
        let (granule, stride) = (region.granule, u32::from(region.granule.stride()));
        let shift = u32::from(granule.log2()) + stride * u32::from((3 - region.start_level).unsigned_abs());
        let width = input_bits.checked_sub(shift).filter(|width| *width > 0)?;
        let descent = Descent {
            table: region.base,
            table_mask: !(granule.bytes() - 1) & bits::ADDRESS,
            too_large: u64::MAX.checked_shl(s1.output_bits.into()).unwrap_or(0),
            level: region.start_level,
            shift,
            width,
            stride,
            walk_attrs: region.walk_attrs,
        };
        Some(Self { descent, input_bits })
    }

    /// Walks down, if the address is for this descent.
    #[inline(always)]
    pub(crate) fn descend<M: Memory>(&self, memory: &M, input: u64) -> Option<Landing> {
        (input >> self.input_bits == 0).then(|| self.descent.go(memory, input))
    }

    /// The output of a page or block that `seen` stands for.
    #[inline(always)]
    pub(crate) fn output(&self, end: &Landing, seen: &Alike) -> Option<u64> {
        let value = end.value?;
        let differs = (value ^ seen.value) & !bits::ADDRESS
            | (end.tables ^ seen.tables) & !bits::ADDRESS
            | u64::from(end.shift ^ seen.shift)
            | value & bits::ADDRESS & self.descent.too_large;
        (differs == 0).then_some(value & bits::ADDRESS & (u64::MAX << end.shift))
    }
}

/// Everything of a walk but addresses: walks of one context that agree in it lead to leaves that agree in all but their addresses.
pub(crate) struct Alike {
    value: u64,
    tables: u64,
    /// log2 of what the leaf covers.
    pub(crate) shift: u32,
}

impl Alike {
    /// Agrees with no walk.
    pub(crate) const NOTHING: Self = Self { value: 0, tables: 0, shift: u32::MAX };

    /// What a descent that led to a good leaf agrees with. `None` for a run of pages, where the addresses have a say, and for a leaf
    /// that counts only in part.
    pub(crate) fn of(end: &Landing, size_log2: u8) -> Option<Self> {
        let value = end.value.filter(|value| value & bits::CONTIGUOUS == 0)?;
        let whole = end.shift == u32::from(size_log2);
        whole.then_some(Self { value, tables: end.tables, shift: end.shift })
    }
}

impl AddressFormat {
    /// The address in a descriptor; for leaves the bits below their size are not part of it.
    #[inline(always)]
    fn address(self, value: u64) -> u64 {
        match self {
            Self::Bits48 => value & bits::ADDRESS,
            Self::Lpa64K => value & 0xffff_ffff_0000 | (value >> 12 & 0xf) << 48,
            Self::Ds => value & 0x3_ffff_ffff_f000 | (value >> 8 & 3) << 50,
        }
    }
}

impl Region {
    /// True if `level` may hold a leaf: with 52-bit addresses one level more may.
    #[inline(always)]
    fn leaf_allowed(&self, level: i8) -> bool {
        let (granule, wide) = (self.granule, self.address != AddressFormat::Bits48);
        granule.leaf_allowed(level) || wide && granule.leaf_allowed(level + 1)
    }
}

/// The updates that a format knows: VMSAv8-64 only.
#[inline]
fn updates_of(format: TableFormat, flags: FlagUpdate) -> FlagUpdate {
    let on = format == TableFormat::Aarch64 && flags.access;
    FlagUpdate { access: on, dirty: on && flags.dirty }
}

impl Lookup<'_> {
    // Inlined, because a leaf that is returned through memory costs as much as reading a level.
    #[inline(always)]
    fn run<M: Memory, R: Recorder, T: Tables<M, R>>(
        &self,
        memory: &M,
        recorder: &mut R,
        tables_at: &T,
        landed: Option<&Landing>,
    ) -> Result<Found<T::Under>, Fault> {
        let region = self.region;
        let (granule, stride) = (region.granule, u32::from(region.granule.stride()));
        let mut level = region.start_level;
        if !(-1..=3).contains(&level) {
            return Err(self.fault(FaultKind::Translation, self.base_level));
        }
        let mut shift = u32::from(granule.log2()) + stride * u32::from((3 - level).unsigned_abs());
        // The first table resolves what is left of the input above its own level; it may be smaller than a granule
        // or, at stage 2, several tables in a row.
        let mut width = u32::from(region.input_bits.min(64)).saturating_sub(shift);
        if width == 0 {
            return Err(self.fault(FaultKind::Translation, self.base_level));
        }
        let mut table = region.base;
        let mut tables = 0;
        let mut walk_attrs = region.walk_attrs;
        if exceeds(table, self.output_bits) {
            return Err(self.fault(FaultKind::AddressSize, self.base_level));
        }
        let too_large = u64::MAX.checked_shl(self.output_bits.into()).unwrap_or(0);
        let table_mask = !(granule.bytes() - 1);
        // What the descent has read already.
        let mut read = None;
        if !T::FULL && R::SILENT && !self.big_endian && !self.secure {
            let table_mask = table_mask & bits::ADDRESS;
            let place = Descent { table, table_mask, too_large, level, shift, width, stride, walk_attrs };
            if let Some(under) = T::DIRECT {
                // Field by field: what is copied as a whole goes through memory, which takes longer than a level.
                let (address, value);
                match landed {
                    Some(end) => {
                        (level, shift, tables) = (end.level, end.shift, end.tables);
                        (address, value) = (end.address, end.value);
                    }
                    None => {
                        let end = place.descend(memory, self.input);
                        (level, shift, tables) = (end.level, end.shift, end.tables);
                        (address, value) = (end.address, end.value);
                    }
                }
                let Some(value) = value else {
                    let refused = self.fault(FaultKind::External, level);
                    return Err(Fault { fetch: address, ..refused });
                };
                let at = address;
                read = Some(Spot { address, at, attrs: walk_attrs, value, under });
            }
        }
        'level: loop {
            let mut spot = match read.take() {
                Some(spot) => spot,
                None => {
                    let index = self.input >> shift & ((1 << width) - 1);
                    let address = table | index << 3;
                    let placed = tables_at.place(memory, address, recorder)?;
                    let attrs = match placed.attrs {
                        None => walk_attrs,
                        Some(s2) => combine(walk_attrs, s2),
                    };
                    let value = match memory.load64(Pa(placed.at), attrs) {
                        Ok(v) if self.big_endian => v.swap_bytes(),
                        Ok(v) => v,
                        Err(e) => {
                            recorder.step(self.step(level, address, 0, Rule::External(e)));
                            let refused = self.fault(FaultKind::External, level);
                            return Err(Fault { fetch: placed.at, ..refused });
                        }
                    };
                    Spot { address, at: placed.at, attrs, value, under: placed.under }
                }
            };
            let address = spot.address;
            let mut tries = 0;
            loop {
                let value = spot.value;
                let out = if T::FULL { region.address.address(value) } else { value & bits::ADDRESS };
                let kind = value & bits::TYPE;
                let is_table = kind == bits::TYPE_TABLE_OR_PAGE && level < 3;
                if is_table && out & too_large == 0 {
                    table = out & table_mask;
                    recorder.step(self.step(level, address, value, Rule::Table { next: table }));
                    tables |= value;
                    if self.secure && value & bits::NS_TABLE != 0 {
                        walk_attrs = walk_attrs.with_non_secure(true);
                    }
                    level += 1;
                    shift -= stride;
                    width = stride;
                    continue 'level;
                }
                let is_leaf = if level == 3 {
                    kind == bits::TYPE_TABLE_OR_PAGE
                } else {
                    let allowed =
                        if T::FULL { region.leaf_allowed(level) } else { granule.leaf_allowed(level) };
                    kind == bits::TYPE_BLOCK && allowed
                };
                if !is_table && !is_leaf {
                    recorder.step(self.step(level, address, value, Rule::Invalid));
                    return Err(self.fault(FaultKind::Translation, level));
                }
                if out & too_large != 0 {
                    let rule = Rule::AddressSize { address: out, bits: self.output_bits };
                    recorder.step(self.step(level, address, value, rule));
                    return Err(self.fault(FaultKind::AddressSize, level));
                }
                if value & bits::AF == 0 {
                    if T::FULL && self.flags.access {
                        tries += 1;
                        let last = tries == TRIES;
                        spot = self.set_access_flag(memory, level, spot, last, tables_at, recorder)?;
                        continue;
                    }
                    if !self.affd {
                        recorder.step(self.step(level, address, value, Rule::AccessFlag));
                        return Err(self.fault(FaultKind::AccessFlag, level));
                    }
                }
                let tables = if region.flat_attributes { tables & bits::NS_TABLE } else { tables };
                let mut size_log2 = shift as u8;
                let mut output = out & !((1 << shift) - 1);
                // The pages of a run whose dirty state hardware keeps are told apart, and no run is defined for
                // the blocks that only 52-bit addresses have.
                let whole =
                    granule.leaf_allowed(level) && !(T::FULL && self.flags.dirty && value & bits::DBM != 0);
                if value & bits::CONTIGUOUS != 0 && whole {
                    let run = u32::from(granule.contiguous_log2(level));
                    let mask = (1u64 << run) - 1;
                    // It is a hint: a run that is not laid out as the architecture demands is not used.
                    if shift + run <= u32::from(region.input_bits)
                        && (output ^ self.input) >> shift & mask == 0
                    {
                        size_log2 += run as u8;
                        output &= !((1 << size_log2) - 1);
                    }
                }
                recorder.step(self.step(level, address, value, Rule::Leaf { output, size_log2 }));
                return Ok(Found { level, output, size_log2, tables, spot });
            }
        }
    }

    /// Sets the access flag of a leaf. The descriptor holds it then, or something else that must be looked at.
    #[cold]
    fn set_access_flag<M: Memory, R: Recorder, T: Tables<M, R>>(
        &self,
        memory: &M,
        level: i8,
        spot: Spot<T::Under>,
        last: bool,
        tables: &T,
        recorder: &mut R,
    ) -> Result<Spot<T::Under>, Fault> {
        let spot = tables.before_write(memory, &spot, recorder)?;
        let ipa = if self.stage == 2 { self.input } else { 0 };
        let refused = contended(self.stage, level, ipa, spot.at);
        let (old, new) = (spot.value, spot.value | bits::AF);
        match change(memory, (spot.at, spot.attrs), (old, new), self.big_endian, self.updates) {
            Ok(Some(_)) if last => Err(refused),
            Ok(Some(now)) => Ok(Spot { value: now, ..spot }),
            Ok(None) => {
                recorder.step(self.step(level, spot.address, old, Rule::Update { new }));
                Ok(Spot { value: new, ..spot })
            }
            Err(e) => {
                recorder.step(self.step(level, spot.address, old, Rule::External(e)));
                Err(refused)
            }
        }
    }

    fn step(&self, level: i8, address: u64, value: u64, rule: Rule) -> Step {
        Step { stage: self.stage, level, address, value, rule }
    }

    fn fault(&self, kind: FaultKind, level: i8) -> Fault {
        let ipa = if self.stage == 2 { self.input } else { 0 };
        Fault::new(kind, self.stage, level).with_ipa(ipa)
    }
}

/// Walks stage 1 for `inside`, the address bits that the tables of `region`, half `half` of the space, resolve. Goes on from where a
/// [`Usual`] descent has landed.
#[inline(always)]
pub(crate) fn stage1<M: Memory, R: Recorder, T: Tables<M, R>>(
    memory: &M,
    s1: &Stage1,
    (region, half): (&Region, usize),
    inside: u64,
    updates: Updates,
    recorder: &mut R,
    (tables, landed): (&T, Option<&Landing>),
) -> Result<(Leaf, Spot<T::Under>), Fault> {
    let (output_bits, big_endian, secure) = (s1.output_bits, s1.big_endian, s1.secure);
    let flags = if T::FULL { updates_of(s1.format, s1.flags) } else { FlagUpdate::OFF };
    let lookup = Lookup {
        stage: 1,
        region,
        input: inside,
        output_bits,
        big_endian,
        secure,
        affd: s1.affd,
        flags,
        updates,
        base_level: s1.range_fault_level,
    };
    let found = lookup.run(memory, recorder, tables, landed)?;
    let value = found.spot.value;
    // What non-secure memory says leads to non-secure memory.
    let ns_table = secure && (found.tables & bits::NS_TABLE != 0 || region.walk_attrs.non_secure());
    let mair = (s1.mair >> (8 * (value >> bits::ATTR_INDEX_SHIFT & 7))) as u8;
    let ns = !secure || ns_table || value & bits::NS != 0;
    let shareability = s1.sh_override[half].unwrap_or(shareability_of(value));
    let attrs = mair_attributes(mair).with_shareability(shareability).with_non_secure(ns).consistent();
    let read_only = value & bits::AP_READ_ONLY != 0;
    let clean =
        flags.dirty && read_only && value & bits::DBM != 0 && found.tables & bits::AP_TABLE_READ_ONLY == 0;
    let perms = stage1_perms(s1, value, found.tables, clean);
    let leaf = Leaf {
        output: found.output,
        size_log2: found.size_log2,
        leaf_log2: found.size_log2,
        perms: perms.fetch_if(!(s1.secure_fetch_only && ns)),
        attrs,
        level: found.level,
        global: !s1.single_privilege && value & bits::NG == 0 && !ns_table,
        clean,
    };
    Ok((leaf, found.spot))
}

#[inline]
fn shareability_of(value: u64) -> Shareability {
    Shareability::from_code((value >> bits::SH_SHIFT) as u8)
}

/// A `clean` leaf counts as writable, also for the rules that take execution away from writable memory.
#[inline(always)]
fn stage1_perms(s1: &Stage1, leaf: u64, tables: u64, clean: bool) -> Perms {
    let has = |mask: u64| leaf & mask != 0;
    let above = |mask: u64| tables & mask != 0;
    let writable = (!has(bits::AP_READ_ONLY) || clean) && !above(bits::AP_TABLE_READ_ONLY);
    if s1.single_privilege {
        let fetch = !has(bits::UXN) && !above(bits::UXN_TABLE) && !(s1.wxn && writable);
        return Perms::new((true, writable, fetch), (true, writable, fetch));
    }
    let user = has(bits::AP_UNPRIVILEGED) && !above(bits::AP_TABLE_PRIVILEGED);
    let user_writable = user && writable;
    // The AArch32 format asks for read permission before a fetch; VMSAv8-64 knows execute-only memory.
    let user_readable_enough = user || s1.format == TableFormat::Aarch64;
    let user_fetch = !has(bits::UXN)
        && !above(bits::UXN_TABLE)
        && user_readable_enough
        && !(user_writable && (s1.wxn || s1.uwxn && s1.uwxn_for_all));
    let never = match s1.format {
        TableFormat::Aarch64 => has(bits::PXN) || above(bits::PXN_TABLE) || user_writable,
        // XN stops both privileges in the AArch32 format.
        _ => {
            has(bits::PXN | bits::UXN)
                || above(bits::PXN_TABLE | bits::UXN_TABLE)
                || (s1.uwxn && user_writable)
        }
    };
    let fetch = !never && !(s1.wxn && writable);
    // PAN: privileged data accesses stay away from what unprivileged ones may access.
    let data = !(s1.pan && user);
    Perms::new((data, data && writable, fetch), (user, user_writable, user_fetch))
}

/// Attributes of one byte of MAIR: the memory type, and the allocation hints of the inner caches (of the outer ones
/// where the inner ones do not keep it).
pub(crate) fn mair_attributes(byte: u8) -> Attributes {
    const NON_CACHEABLE: u8 = 0b0100;
    const TRANSIENT: u8 = 3;
    let hint = |set: bool| if set { Allocate::Yes } else { Allocate::No };
    let attrs = Attributes::from_bits(0).with_memory(MemoryType::from_mair(byte));
    if !attrs.memory().is_cacheable() {
        return attrs;
    }
    let hints = match byte & 0xf {
        // UNPREDICTABLE for a CPU; an SMMU takes it as write-through transient with both hints set.
        0 => 0b0011,
        NON_CACHEABLE => byte >> 4,
        inner => inner,
    };
    // 00RW and 01RW are transient. What never allocates is not.
    let transient = if hints & 8 == 0 && hints & 3 != 0 { TRANSIENT } else { 0 };
    attrs
        .with_read_allocate(hint(hints & 2 != 0))
        .with_write_allocate(hint(hints & 1 != 0))
        .with_transient(transient)
}

/// Walks stage 2 for `ipa`.
#[inline]
pub(crate) fn stage2<M: Memory, R: Recorder, const FULL: bool>(
    memory: &M,
    s2: &Stage2,
    region: &Region,
    ipa: u64,
    updates: Updates,
    recorder: &mut R,
) -> Result<(Leaf, Spot<()>), Fault> {
    let (output_bits, big_endian) = (s2.output_bits, s2.big_endian);
    let flags = if FULL { updates_of(s2.format, s2.flags) } else { FlagUpdate::OFF };
    let lookup = Lookup {
        stage: 2,
        region,
        input: ipa,
        output_bits,
        big_endian,
        secure: false,
        affd: s2.affd,
        flags,
        updates,
        base_level: s2.range_fault_level,
    };
    let found = lookup.run(memory, recorder, &Direct::<FULL>, None)?;
    let v = found.spot.value;
    let clean = flags.dirty && v & bits::S2AP_WRITE == 0 && v & bits::DBM != 0;
    let leaf = Leaf {
        output: found.output,
        size_log2: found.size_log2,
        leaf_log2: found.size_log2,
        perms: stage2_perms(s2, v, clean),
        attrs: stage2_attributes(s2, v),
        level: found.level,
        global: false,
        clean,
    };
    Ok((leaf, found.spot))
}

#[inline]
fn stage2_perms(s2: &Stage2, v: u64, clean: bool) -> Perms {
    let (read, write) = (v & bits::S2AP_READ != 0, v & bits::S2AP_WRITE != 0 || clean);
    // Privileged, unprivileged: XN[1:0] is 0 for both, 1 unprivileged only, 2 for none, 3 privileged only.
    let (px, ux) = match v >> 53 & 3 {
        xn if !s2.xnx => (xn & 2 == 0, xn & 2 == 0),
        0 => (true, true),
        1 => (false, true),
        2 => (false, false),
        _ => (true, false),
    };
    // The AArch32 format asks for read permission before a fetch.
    let readable_enough = read || s2.format == TableFormat::Aarch64;
    Perms::new((read, write, px && readable_enough), (read, write, ux && readable_enough))
}

#[inline]
fn stage2_attributes(s2: &Stage2, v: u64) -> Attributes {
    let code = (v >> bits::S2_MEMATTR_SHIFT) as u8 & 0xf;
    // With S2FWB the codes 5 and 7 are what combining with NC and with WB gives; only 6 is a rule of its own.
    let (memory, forced) = match (s2.fwb, code & 7) {
        (false, _) => (MemoryType::from_code(code), false),
        (true, 5) => (MemoryType::NORMAL_NC, false),
        (true, 6) => (MemoryType::NORMAL_WB, true),
        (true, 7) => (MemoryType::NORMAL_WB, false),
        (true, device) => (MemoryType::from_code(device), false),
    };
    let attrs = Attributes::from_bits(0)
        .with_memory(memory)
        .with_shareability(s2.sh_override.unwrap_or(shareability_of(v)))
        .with_transient(if forced { FORCED } else { 0 })
        .with_non_secure(true);
    if !s2.leaf_hints {
        return attrs;
    }
    attrs
        .with_read_allocate(Allocate::from_code((v >> bits::S2_RACFG_SHIFT) as u8))
        .with_write_allocate(Allocate::from_code((v >> bits::S2_WACFG_SHIFT) as u8))
}
