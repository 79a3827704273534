//! Walks of 32-bit descriptors: the AArch32 short format (DDI 0487 G5.4). Domains do not exist in an SMMU: the field is
//! ignored (IHI 0062D).

use portcullis_arch::attrs::{Allocate, MemoryType, Shareability};
use portcullis_arch::vmsa::short as bits;
use portcullis_arch::{Attributes, Pa};
use portcullis_bus::Memory;

use crate::perms::Perms;
use crate::record::{Recorder, Rule, Step};
use crate::stage::{Fault, FaultKind, Leaf, Region, Stage1, combine, exceeds};
use crate::update::{Spot, Tables};

/// The fields that sections and pages keep in different places.
struct Fields {
    output: u64,
    size_log2: u8,
    level: i8,
    ap: u8,
    tex: u8,
    cb: u8,
    xn: bool,
    pxn: bool,
    shareable: bool,
    global: bool,
    ns: bool,
}

#[inline]
pub(crate) fn walk<M: Memory, R: Recorder, T: Tables<M, R>>(
    memory: &M,
    s1: &Stage1,
    region: &Region,
    va: u32,
    recorder: &mut R,
    tables: &T,
) -> Result<(Leaf, Spot<T::Under>), Fault> {
    let fault = |kind, level| Fault::new(kind, 1, level);
    let mut attrs = region.walk_attrs;
    let read = |address: u64, level: i8, attrs: Attributes, r: &mut R| {
        let placed = tables.place(memory, address, r)?;
        let attrs = placed.attrs.map_or(attrs, |s2| combine(attrs, s2));
        let value = match memory.load32(Pa(placed.at), attrs) {
            Ok(v) if s1.big_endian => v.swap_bytes(),
            Ok(v) => v,
            Err(e) => {
                r.step(Step { stage: 1, level, address, value: 0, rule: Rule::External(e) });
                return Err(Fault { fetch: placed.at, ..fault(FaultKind::External, level) });
            }
        };
        Ok((value, Spot { address, at: placed.at, attrs, value: value.into(), under: placed.under }))
    };
    let step =
        |level, address, value: u32, rule| Step { stage: 1, level, address, value: value.into(), rule };

    let index = u64::from(va) >> 20 & ((1 << (region.input_bits.clamp(20, 32) - 20)) - 1);
    let address = region.base | index << 2;
    let (d, spot) = read(address, 1, attrs, recorder)?;
    let (fields, address, value, spot) = match d & bits::TYPE {
        bits::TYPE_TABLE => {
            let next = u64::from(d & bits::TABLE_BASE);
            recorder.step(step(1, address, d, Rule::Table { next }));
            if s1.secure && d & bits::TABLE_NS != 0 {
                attrs = attrs.with_non_secure(true);
            }
            let at = next | (u64::from(va) >> 12 & 0xff) << 2;
            let (p, spot) = read(at, 2, attrs, recorder)?;
            let Some(fields) = page(d, p) else {
                recorder.step(step(2, at, p, Rule::Invalid));
                return Err(fault(FaultKind::Translation, 2));
            };
            (fields, at, p, spot)
        }
        t if t & bits::TYPE_SECTION_OR_SMALL != 0 => (section(d), address, d, spot),
        _ => {
            recorder.step(step(1, address, d, Rule::Invalid));
            return Err(fault(FaultKind::Translation, 1));
        }
    };
    if exceeds(fields.output, s1.output_bits) {
        let rule = Rule::AddressSize { address: fields.output, bits: s1.output_bits };
        recorder.step(step(fields.level, address, value, rule));
        return Err(fault(FaultKind::AddressSize, fields.level));
    }
    if s1.access_flag_enable && fields.ap & 1 == 0 && !s1.affd {
        recorder.step(step(fields.level, address, value, Rule::AccessFlag));
        return Err(fault(FaultKind::AccessFlag, fields.level));
    }
    let rule = Rule::Leaf { output: fields.output, size_log2: fields.size_log2 };
    recorder.step(step(fields.level, address, value, rule));
    let leaf = Leaf {
        output: fields.output,
        size_log2: fields.size_log2,
        leaf_log2: fields.size_log2,
        perms: perms(s1, &fields).fetch_if(!(s1.secure_fetch_only && fields.ns)),
        attrs: attributes(s1, &fields).with_non_secure(!s1.secure || fields.ns).consistent(),
        level: fields.level,
        global: fields.global,
        clean: false,
    };
    Ok((leaf, spot))
}

fn section(d: u32) -> Fields {
    let d64 = u64::from(d);
    let (output, size_log2) = if d & bits::SUPERSECTION != 0 {
        (d64 & 0xff00_0000 | (d64 >> 20 & 0xf) << 32 | (d64 >> 5 & 0xf) << 36, 24)
    } else {
        (d64 & 0xfff0_0000, 20)
    };
    Fields {
        output,
        size_log2,
        level: 1,
        ap: (d >> 13 & 4 | d >> 10 & 3) as u8,
        tex: (d >> 12 & 7) as u8,
        cb: (d >> 2 & 3) as u8,
        xn: d & bits::SECTION_XN != 0,
        pxn: d & bits::SECTION_PXN != 0,
        shareable: d & bits::SECTION_S != 0,
        global: d & bits::SECTION_NG == 0,
        ns: d & bits::SECTION_NS != 0,
    }
}

fn page(table: u32, p: u32) -> Option<Fields> {
    let small = p & bits::TYPE_SECTION_OR_SMALL != 0;
    if !small && p & bits::TYPE != bits::TYPE_LARGE {
        return None;
    }
    let p64 = u64::from(p);
    Some(Fields {
        output: if small { p64 & 0xffff_f000 } else { p64 & 0xffff_0000 },
        size_log2: if small { 12 } else { 16 },
        level: 2,
        ap: (p >> 7 & 4 | p >> 4 & 3) as u8,
        tex: (if small { p >> 6 & 7 } else { p >> 12 & 7 }) as u8,
        cb: (p >> 2 & 3) as u8,
        xn: p & if small { bits::SMALL_XN } else { bits::LARGE_XN } != 0,
        pxn: table & bits::TABLE_PXN != 0,
        shareable: p & bits::PAGE_S != 0,
        global: p & bits::PAGE_NG == 0,
        ns: table & bits::TABLE_NS != 0,
    })
}

fn perms(s1: &Stage1, f: &Fields) -> Perms {
    // (privileged read, privileged write, unprivileged read, unprivileged write) by AP[2:0] while AFE = 0.
    const BY_AP: [(bool, bool, bool, bool); 8] = [
        (false, false, false, false),
        (true, true, false, false),
        (true, true, true, false),
        (true, true, true, true),
        (false, false, false, false),
        (true, false, false, false),
        (true, false, true, false),
        (true, false, true, false),
    ];
    let (pr, pw, ur, uw) = if s1.access_flag_enable {
        let (writable, user) = (f.ap & 4 == 0, f.ap & 2 != 0);
        (true, writable, user, user && writable)
    } else {
        BY_AP[usize::from(f.ap & 7)]
    };
    let px = pr && !f.xn && !f.pxn && !(s1.wxn && pw) && !(s1.uwxn && uw);
    let ux = ur && !f.xn && !(uw && (s1.wxn || s1.uwxn && s1.uwxn_for_all));
    Perms::new((pr, pw, px), (ur, uw, ux))
}

/// Allocation hints of the 2-bit codes 0 NC, 1 WB write-allocate, 2 WT, 3 WB no write-allocate.
fn cache_code(outer: u32, inner: u32) -> Attributes {
    const TYPE: [u8; 4] = [1, 3, 2, 3];
    let memory = MemoryType::normal(TYPE[(outer & 3) as usize], TYPE[(inner & 3) as usize]);
    let write = if inner & 3 == 1 { Allocate::Yes } else { Allocate::No };
    Attributes::from_bits(0).with_memory(memory).with_read_allocate(Allocate::Yes).with_write_allocate(write)
}

fn attributes(s1: &Stage1, f: &Fields) -> Attributes {
    let device =
        |m: MemoryType| Attributes::from_bits(0).with_memory(m).with_shareability(Shareability::Outer);
    let share = |yes: bool, inner: bool| match (yes, inner) {
        (false, _) => Shareability::Non,
        (true, true) => Shareability::Inner,
        (true, false) => Shareability::Outer,
    };
    if s1.tex_remap {
        let (prrr, nmrr) = (s1.mair as u32, (s1.mair >> 32) as u32);
        let n = u32::from((f.tex & 1) << 2 | f.cb);
        return match prrr >> (2 * n) & 3 {
            0 => device(MemoryType::DEVICE_NGNRNE),
            1 => device(MemoryType::DEVICE_NGNRE),
            _ => {
                let shareable = prrr >> if f.shareable { 19 } else { 18 } & 1 != 0;
                let inner = prrr >> (24 + n) & 1 != 0;
                cache_code(nmrr >> (16 + 2 * n), nmrr >> (2 * n)).with_shareability(share(shareable, inner))
            }
        };
    }
    let normal = |outer, inner| cache_code(outer, inner).with_shareability(share(f.shareable, true));
    match (f.tex, f.cb) {
        (0, 0) => device(MemoryType::DEVICE_NGNRNE),
        (0, 1) | (2, 0) => device(MemoryType::DEVICE_NGNRE),
        (0, 2) => normal(2, 2),
        (0, 3) => normal(3, 3),
        (1, 3) => normal(1, 1),
        (4..=7, cb) => normal(u32::from(f.tex & 3), u32::from(cb)),
        _ => normal(0, 0),
    }
}
