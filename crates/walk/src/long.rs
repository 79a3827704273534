//! Walks of 64-bit descriptors: VMSAv8-64 (DDI 0487 D8.2 to D8.4) and the AArch32 long format (G5.5).

use portcullis_arch::attrs::{Allocate, MemoryType, Shareability};
use portcullis_arch::vmsa::long as bits;
use portcullis_arch::{Attributes, Pa};
use portcullis_bus::Memory;

use crate::perms::Perms;
use crate::record::{Recorder, Rule, Step};
use crate::stage::{Fault, FaultKind, Leaf, Region, Stage1, Stage2, TableFormat, combine, exceeds};

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
    /// Level that a table base above the output size reports.
    base_level: i8,
}

struct Found {
    value: u64,
    level: i8,
    output: u64,
    size_log2: u8,
    /// OR of the table descriptors on the way.
    tables: u64,
}

impl Lookup<'_> {
    // Inlined, because a leaf that is returned through memory costs as much as reading a level.
    #[inline(always)]
    fn run<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        recorder: &mut R,
        mut place: impl FnMut(u64, &mut R) -> Result<(u64, Option<Attributes>), Fault>,
    ) -> Result<Found, Fault> {
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
        let table_mask = bits::ADDRESS & !(granule.bytes() - 1);
        loop {
            let index = self.input >> shift & ((1 << width) - 1);
            let address = table | index << 3;
            let (at, stage2) = place(address, recorder)?;
            let attrs = match stage2 {
                None => walk_attrs,
                Some(s2) => combine(walk_attrs, s2),
            };
            let value = match memory.load64(Pa(at), attrs) {
                Ok(v) if self.big_endian => v.swap_bytes(),
                Ok(v) => v,
                Err(e) => {
                    recorder.step(self.step(level, address, 0, Rule::External(e)));
                    return Err(self.fault(FaultKind::External, level));
                }
            };
            let out = value & bits::ADDRESS;
            let kind = value & bits::TYPE;
            let is_table = kind == bits::TYPE_TABLE_OR_PAGE && level < 3;
            if is_table && out & too_large == 0 {
                table = value & table_mask;
                recorder.step(self.step(level, address, value, Rule::Table { next: table }));
                tables |= value;
                if self.secure && !region.flat_attributes && value & bits::NS_TABLE != 0 {
                    walk_attrs = walk_attrs.with_non_secure(true);
                }
                level += 1;
                shift -= stride;
                width = stride;
                continue;
            }
            let is_leaf = if level == 3 {
                kind == bits::TYPE_TABLE_OR_PAGE
            } else {
                kind == bits::TYPE_BLOCK && granule.leaf_allowed(level)
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
            let tables = if region.flat_attributes { 0 } else { tables };
            if value & bits::AF == 0 && !self.affd {
                recorder.step(self.step(level, address, value, Rule::AccessFlag));
                return Err(self.fault(FaultKind::AccessFlag, level));
            }
            let mut size_log2 = shift as u8;
            let mut output = out & !((1 << shift) - 1);
            if value & bits::CONTIGUOUS != 0 {
                let run = u32::from(granule.contiguous_log2(level));
                let mask = (1u64 << run) - 1;
                // It is a hint: a run that is not laid out as the architecture demands is not used.
                if shift + run <= u32::from(region.input_bits) && (output ^ self.input) >> shift & mask == 0 {
                    size_log2 += run as u8;
                    output &= !((1 << size_log2) - 1);
                }
            }
            return Ok(Found { value, level, output, size_log2, tables }).inspect(|f| {
                let rule = Rule::Leaf { output: f.output, size_log2: f.size_log2 };
                recorder.step(self.step(level, address, value, rule));
            });
        }
    }

    fn step(&self, level: i8, address: u64, value: u64, rule: Rule) -> Step {
        Step { stage: self.stage, level, address, value, rule }
    }

    fn fault(&self, kind: FaultKind, level: i8) -> Fault {
        let ipa = if self.stage == 2 { self.input } else { 0 };
        Fault { kind, stage: self.stage, level, ipa, on_stage1_walk: false }
    }
}

/// Walks stage 1 for `inside`, the address bits that `region`'s tables resolve.
#[inline(always)]
pub(crate) fn stage1<M: Memory, R: Recorder>(
    memory: &M,
    s1: &Stage1,
    region: &Region,
    inside: u64,
    recorder: &mut R,
    place: impl FnMut(u64, &mut R) -> Result<(u64, Option<Attributes>), Fault>,
) -> Result<Leaf, Fault> {
    let (output_bits, big_endian, secure) = (s1.output_bits, s1.big_endian, s1.secure);
    let lookup = Lookup {
        stage: 1,
        region,
        input: inside,
        output_bits,
        big_endian,
        secure,
        affd: s1.affd,
        base_level: s1.range_fault_level,
    };
    let found = lookup.run(memory, recorder, place)?;
    let ns_table = secure && found.tables & bits::NS_TABLE != 0;
    let mair = (s1.mair >> (8 * (found.value >> bits::ATTR_INDEX_SHIFT & 7))) as u8;
    let ns = !secure || ns_table || found.value & bits::NS != 0;
    let attrs = mair_attributes(mair)
        .with_shareability(Shareability::from_code((found.value >> bits::SH_SHIFT) as u8))
        .with_non_secure(ns)
        .consistent();
    Ok(Leaf {
        output: found.output,
        size_log2: found.size_log2,
        leaf_log2: found.size_log2,
        perms: stage1_perms(s1, found.value, found.tables).fetch_if(!(s1.secure_fetch_only && ns)),
        attrs,
        level: found.level,
        global: !s1.single_privilege && found.value & bits::NG == 0 && !ns_table,
    })
}

fn stage1_perms(s1: &Stage1, leaf: u64, tables: u64) -> Perms {
    let has = |mask: u64| leaf & mask != 0;
    let above = |mask: u64| tables & mask != 0;
    let writable = !has(bits::AP_READ_ONLY) && !above(bits::AP_TABLE_READ_ONLY);
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
        && !(user_writable && (s1.wxn || s1.uwxn));
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
    Perms::new((true, writable, fetch), (user, user_writable, user_fetch))
}

/// Attributes of one byte of MAIR: the memory type, and the allocation hints of the inner caches (of the outer ones
/// where the inner ones do not keep it).
pub(crate) fn mair_attributes(byte: u8) -> Attributes {
    const NON_CACHEABLE: u8 = 0b0100;
    let hint = |set: bool| if set { Allocate::Yes } else { Allocate::No };
    let attrs = Attributes::from_bits(0).with_memory(MemoryType::from_mair(byte));
    if !attrs.memory().is_cacheable() {
        return attrs;
    }
    let hints = match byte & 0xf {
        // UNPREDICTABLE for a CPU; an SMMU takes it as write-through with both hints set.
        0 => 0b11,
        NON_CACHEABLE => byte >> 4,
        inner => inner,
    };
    attrs.with_read_allocate(hint(hints & 2 != 0)).with_write_allocate(hint(hints & 1 != 0))
}

/// Walks stage 2 for `ipa`.
#[inline]
pub(crate) fn stage2<M: Memory, R: Recorder>(
    memory: &M,
    s2: &Stage2,
    region: &Region,
    ipa: u64,
    recorder: &mut R,
) -> Result<Leaf, Fault> {
    let (output_bits, big_endian) = (s2.output_bits, s2.big_endian);
    let lookup = Lookup {
        stage: 2,
        region,
        input: ipa,
        output_bits,
        big_endian,
        secure: false,
        affd: s2.affd,
        base_level: s2.range_fault_level,
    };
    let found = lookup.run(memory, recorder, |at, _: &mut R| Ok((at, None)))?;
    let v = found.value;
    let (read, write) = (v & bits::S2AP_READ != 0, v & bits::S2AP_WRITE != 0);
    let fetch = v & bits::UXN == 0 && (read || s2.format == TableFormat::Aarch64);
    let attrs = Attributes::from_bits(0)
        .with_memory(MemoryType::from_code((v >> bits::S2_MEMATTR_SHIFT) as u8))
        .with_shareability(Shareability::from_code((v >> bits::SH_SHIFT) as u8))
        .with_read_allocate(Allocate::from_code((v >> bits::S2_RACFG_SHIFT) as u8))
        .with_write_allocate(Allocate::from_code((v >> bits::S2_WACFG_SHIFT) as u8))
        .with_non_secure(true);
    Ok(Leaf {
        output: found.output,
        size_log2: found.size_log2,
        leaf_log2: found.size_log2,
        perms: Perms::stage2(read, write, fetch),
        attrs,
        level: found.level,
        global: false,
    })
}
