//! Walks of random tables: the recorder tells exactly what was read and changes nothing, and whatever parameters and table
//! bytes are given, a walk ends after a bounded number of reads without a panic.

mod common;

use std::sync::Mutex;

use common::unit::{FROM, OnFault, Unit, context, key};
use common::*;
use portcullis_arch::attrs::Shareability;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Access, Attributes, Iova, Pa};
use portcullis_bus::{BusError, DmaPort, Memory, SystemMemory};
use portcullis_walk::{
    AccessKind, AddressFormat, Context, FaultKind, FlagUpdate, Flat, Invalidation, Nested, NoRecord, Region,
    Rule, Scope, Split, Stage1, Stage2, StageScope, TableFormat, TlbStage, Trace, Walked,
};
use proptest::prelude::*;

/// Endless memory whose words follow from a seed and their address; mostly descriptors that lead somewhere.
struct Noise {
    seed: u64,
    log: Mutex<Vec<(u64, u64)>>,
}

impl Noise {
    fn new(seed: u64) -> Self {
        Self { seed, log: Mutex::default() }
    }
    fn word(&self, at: u64) -> u64 {
        let mut r = Random(self.seed ^ at.wrapping_mul(0x9e37_79b9));
        let v = r.next();
        match r.below(16) {
            // Tables and pages with addresses of 40 bits, blocks, and pure noise.
            0..=9 => v & 0x7f_ffff_f000 | 0x7c3 | v & 0xf8 << 56 & r.next() & r.next() | v & (1 << 52),
            10..=13 => v & 0x7f_ffff_f000 | 0x7c1 | v & (1 << 52),
            _ => v,
        }
    }
}

impl Memory for Noise {
    fn read(&self, _: Pa, _: Attributes, _: &mut [u8]) -> Result<(), BusError> {
        Err(BusError::Decode)
    }
    fn write(&self, _: Pa, _: Attributes, _: &[u8]) -> Result<(), BusError> {
        Err(BusError::Decode)
    }
    fn load64(&self, pa: Pa, _: Attributes) -> Result<u64, BusError> {
        let value = self.word(pa.get());
        let refused = value.is_multiple_of(61) || !pa.get().is_multiple_of(8);
        self.log.lock().unwrap().push((pa.get(), if refused { 0 } else { value }));
        if refused { Err(BusError::Decode) } else { Ok(value) }
    }
    fn load32(&self, pa: Pa, _: Attributes) -> Result<u32, BusError> {
        let value = self.word(pa.get() & !7) >> (8 * (pa.get() & 4)) & 0xffff_ffff;
        self.log.lock().unwrap().push((pa.get(), value));
        Ok(value as u32)
    }
    fn cas64(&self, _: Pa, _: Attributes, _: u64, _: u64) -> Result<u64, BusError> {
        Err(BusError::Slave)
    }
}

const GRANULES: [Granule; 3] = [Granule::K4, Granule::K16, Granule::K64];

/// What a model may pass.
fn legal_region(r: &mut Random, format: TableFormat, stage: u8) -> Region {
    if format == TableFormat::Short {
        return region(r.below(1 << 18) << 14, Granule::K4, 1, 25 + r.below(8) as u8);
    }
    let g = if format == TableFormat::Aarch64 { r.pick(&GRANULES) } else { Granule::K4 };
    let most: u64 = if format == TableFormat::Aarch64 { 48 } else { 32 + 8 * u64::from(stage == 2) };
    let bits = 25 + r.below(most - 24);
    let levels = (bits - u64::from(g.log2())).div_ceil(stride(g).into());
    let mut start = 4 - levels as i8;
    if stage == 2 && start < 3 && r.flip() && bits <= u64::from(shift(g, start)) + 4 {
        start += 1;
    }
    let mut region = region(r.below(1 << 16) << 20, g, start, bits as u8);
    region.flat_attributes = stage == 2 || r.below(4) == 0;
    region
}

/// Anything at all.
fn hostile_region(r: &mut Random) -> Region {
    let base = r.next() >> r.below(64);
    let mut region =
        region(base, r.pick(&GRANULES), r.next() as i8 >> r.below(8), r.next() as u8 >> r.below(8));
    region.flat_attributes = r.flip();
    region.address = r.pick(&[AddressFormat::Bits48, AddressFormat::Lpa64K, AddressFormat::Ds]);
    region
}

fn contexts(r: &mut Random, hostile: bool) -> Nested {
    let format = r.pick(&[TableFormat::Aarch64, TableFormat::Aarch64, TableFormat::Long, TableFormat::Short]);
    let small = |r: &mut Random| if hostile { r.next() as u8 >> r.below(8) } else { r.below(8) as u8 };
    let one = |r: &mut Random| if hostile { hostile_region(r) } else { legal_region(r, format, 1) };
    let regions = [r.below(8) != 0, r.flip()].map(|on| on.then(|| one(r)));
    let bits = |i: usize| regions[i].map_or(39, |r: Region| r.input_bits);
    let v3 = format == TableFormat::Aarch64 && r.flip();
    let split = match if hostile { r.pick(&[0, 1, 2, 3]) } else { [0, 1, 2][format as usize] } {
        3 => Split::Smmuv3 { region_bits: [small(r), small(r)], tbi: [r.flip(), r.flip()], single: r.flip() },
        0 if v3 => Split::Smmuv3 {
            region_bits: [bits(0), bits(1)],
            tbi: [r.flip(), r.flip()],
            single: r.below(4) == 0,
        },
        0 => Split::Aarch64 {
            va_bits: if hostile { small(r) } else { r.pick(&[32, 36, 40, 42, 44, 48, 49, 64]) },
            signed: r.flip(),
            region_bits: if hostile { [small(r), small(r)] } else { [bits(0), bits(1)] },
        },
        1 => Split::Long { tsz: if hostile { [small(r), small(r)] } else { [32 - bits(0).min(32), 0] } },
        _ => Split::Short { n: if hostile { small(r) } else { 32 - bits(0).clamp(25, 32) } },
    };
    let sizes = [32u8, 36, 40, 42, 44, 48];
    let size = |r: &mut Random| if hostile { r.next() as u8 } else { r.pick(&sizes) };
    let s1 = Stage1 {
        format,
        regions,
        split,
        output_bits: size(r),
        mair: r.next(),
        range_fault_level: 0,
        affd: r.flip(),
        wxn: r.below(4) == 0,
        uwxn: r.below(4) == 0,
        uwxn_for_all: true,
        big_endian: r.below(16) == 0,
        single_privilege: r.below(8) == 0,
        tex_remap: r.flip(),
        access_flag_enable: r.flip(),
        secure: r.below(4) == 0,
        secure_fetch_only: r.below(8) == 0,
        flags: FlagUpdate { access: hostile && r.flip(), dirty: r.flip() },
        e0pd: [r.below(16) == 0, r.below(4) == 0],
        pan: r.below(4) == 0,
        sh_override: [None, Some(Shareability::Inner)],
    };
    let two = if hostile { hostile_region(r) } else { legal_region(r, TableFormat::Aarch64, 2) };
    let s2 = Stage2 {
        format: TableFormat::Aarch64,
        region: (r.below(8) != 0).then_some(two),
        input_limit_bits: size(r),
        output_bits: size(r),
        affd: r.flip(),
        big_endian: r.below(16) == 0,
        protect_walks: r.below(4) == 0,
        device_walks_as_nc: r.below(4) == 0,
        range_fault_level: 0,
        flags: FlagUpdate { access: hostile && r.flip(), dirty: r.flip() },
        xnx: r.flip(),
        fwb: r.flip(),
        leaf_hints: r.flip(),
        sh_override: r.flip().then_some(Shareability::Outer),
    };
    let stage = if r.flip() { 1 } else { 2 };
    let flat = Flat { input_bits: size(r), output_bits: size(r), stage, level: 0 };
    Nested { stage1: (r.below(8) != 0).then_some(s1), stage2: r.flip().then_some(s2), flat }
}

fn address(r: &mut Random, n: &Nested) -> u64 {
    match r.below(4) {
        0 => r.next(),
        1 => r.next() >> r.below(64),
        _ => {
            let region = n.stage1.as_ref().and_then(|s| s.regions[0]);
            let bits = region.map_or(32, |r| r.input_bits.clamp(1, 63));
            r.next() & ((1 << bits) - 1)
        }
    }
}

/// Four levels and a level −1 of stage 1, each through five of stage 2, and five more for the output.
const MOST_READS: usize = 5 * 6 + 5;

/// Walks once with and once without a recorder and checks one against the other and both against memory's own log.
fn walk(n: &Nested, memory: &Noise, va: u64, k: AccessKind) -> Option<Walked> {
    memory.log.lock().unwrap().clear();
    let plain = n.translate(memory, va, k, Updates::Apply, &mut NoRecord);
    let reads = std::mem::take(&mut *memory.log.lock().unwrap());
    let mut trace = Trace::default();
    assert_eq!(plain, n.translate(memory, va, k, Updates::Apply, &mut trace));
    assert_eq!(reads, *memory.log.lock().unwrap());
    assert!(reads.len() <= MOST_READS);
    if n.stage1.as_ref().is_some_and(|s| s.flags.access) || n.stage2.as_ref().is_some_and(|s| s.flags.access)
    {
        return plain.ok();
    }

    assert_eq!(trace.steps.len(), reads.len(), "one step for each word");
    for (step, (at, value)) in trace.steps.iter().zip(&reads) {
        let stage1 = n.stage1.as_ref().filter(|_| step.stage == 1);
        let swapped = stage1.map_or_else(|| n.stage2.as_ref().unwrap().big_endian, |s| s.big_endian);
        let short = stage1.is_some_and(|s| s.format == TableFormat::Short);
        if !matches!(step.rule, Rule::External(_)) {
            let order = match (swapped, short) {
                (false, _) => *value,
                (true, false) => value.swap_bytes(),
                (true, true) => u64::from((*value as u32).swap_bytes()),
            };
            assert_eq!(step.value, order);
        }
        if step.stage == 2 || n.stage2.is_none() {
            assert_eq!(step.address, *at);
        }
    }
    // The last word explains the outcome.
    match (plain, trace.steps.last().map(|s| s.rule)) {
        (Ok(_), last) => assert!(last.is_none_or(|r| matches!(r, Rule::Leaf { .. }))),
        (Err(f), Some(Rule::AccessFlag)) => assert_eq!(f.kind, FaultKind::AccessFlag),
        (Err(f), Some(Rule::External(_))) => assert_eq!(f.kind, FaultKind::External),
        (Err(f), Some(Rule::AddressSize { .. })) => assert_eq!(f.kind, FaultKind::AddressSize),
        (Err(f), Some(Rule::Invalid)) => assert_eq!(f.kind, FaultKind::Translation),
        (Err(_), _) => {}
    }
    plain.ok()
}

/// The answer for one address is the answer for all of the block that a TLB would keep.
fn check_block(n: &Nested, memory: &Noise, va: u64, k: AccessKind, w: &Walked, r: &mut Random) {
    if n.stage1.is_none() && n.stage2.is_none() {
        return;
    }
    assert!(w.size_log2 <= w.leaf_log2);
    let inside = (1u64 << w.size_log2.min(63)) - 1;
    for offset in [0, inside, r.next() & inside] {
        let other = va & !inside | offset;
        // A contiguous run is what software says it is, so the entries beside it may differ in random memory.
        let run = trace_has_run(n, memory, va, k);
        match n.translate(memory, other, k, Updates::Apply, &mut NoRecord) {
            Ok(o) => {
                assert!(run || (o.pa == w.pa & !inside | offset && o.perms == w.perms && o.attrs == w.attrs))
            }
            Err(f) => assert!(run, "{f:?} at {other:#x} beside {va:#x}"),
        }
    }
}

/// True if a leaf on the way stands for several entries that software must write alike.
fn trace_has_run(n: &Nested, memory: &Noise, va: u64, k: AccessKind) -> bool {
    let short = n.stage1.as_ref().is_some_and(|s| s.format == TableFormat::Short);
    let mut trace = Trace::default();
    let _ = n.translate(memory, va, k, Updates::Apply, &mut trace);
    trace.steps.iter().any(|s| match s.rule {
        Rule::Leaf { size_log2, .. } if s.stage == 1 && short => matches!(size_log2, 16 | 24),
        Rule::Leaf { .. } => s.value >> 52 & 1 != 0,
        _ => false,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn what_a_recorder_hears_is_what_memory_was_asked(seed: u64) {
        let mut r = Random(seed);
        let n = contexts(&mut r, false);
        let memory = Noise::new(seed);
        for _ in 0..4 {
            let va = address(&mut r, &n);
            let k = kind(r.pick(&KINDS));
            if let Some(w) = walk(&n, &memory, va, k) {
                check_block(&n, &memory, va, k, &w, &mut r);
            }
        }
    }

    #[test]
    fn hostile_parameters_neither_panic_nor_loop(seed: u64) {
        let mut r = Random(seed);
        let n = contexts(&mut r, true);
        let memory = Noise::new(seed);
        for _ in 0..4 {
            let va = address(&mut r, &n);
            let k = kind(r.pick(&KINDS));
            walk(&n, &memory, va, k);
            let _ = n.translate_stage1(&memory, va, k, Updates::Apply, &mut NoRecord);
        }
    }
}

#[test]
fn the_random_walks_are_not_all_faults() {
    let (mut ok, mut all) = (0, 0);
    for seed in 0..2000 {
        let mut r = Random(seed);
        let n = contexts(&mut r, false);
        let memory = Noise::new(seed);
        let va = address(&mut r, &n);
        all += 1;
        ok += usize::from(
            n.translate(&memory, va, kind((false, false, true)), Updates::Apply, &mut NoRecord).is_ok(),
        );
    }
    assert!(ok * 10 > all, "{ok} of {all}");
}

/// RAM of 1 MiB full of descriptors that lead into it, without contiguous runs.
fn tables(r: &mut Random) -> SystemMemory {
    let m = SystemMemory::new(&[(0, 1 << 20)]).unwrap();
    for at in (0..1u64 << 20).step_by(8) {
        let v = r.next();
        let low = [0x7c3, 0x7c3, 0x7c3, 0x7c1, 0x7c1, v & 0xfff][(v >> 60) as usize % 6];
        m.store64(Pa(at), (v & 0xf_f000) | low | (v & 7 << 53)).unwrap();
    }
    m
}

fn behind_a_port(r: &mut Random, hostile: bool) -> Context {
    let mut stages = contexts(r, hostile);
    if !hostile {
        let base = |region: &mut Region| region.base &= 0xf_0000;
        if let Some(s1) = &mut stages.stage1 {
            s1.regions.iter_mut().flatten().for_each(base);
        }
        stages.stage2.iter_mut().filter_map(|s| s.region.as_mut()).for_each(base);
    }
    let mut c = context(key(TlbStage::Combined, 0), stages);
    if hostile {
        (c.key.va_bits, c.va_mask) = (r.next() as u8, r.next() >> r.below(64));
        c.after = r.flip().then(|| Attributes::from_bits(r.next() as u32));
        c.cacheable = r.below(4) != 0;
    }
    c
}

#[test]
fn what_a_port_keeps_is_what_a_walk_would_find() {
    let mut r = Random(11);
    let m = tables(&mut r);
    let (mut hits, mut compared) = (0, 0);
    for _ in 0..1500 {
        let c = behind_a_port(&mut r, false);
        // A large page and a supersection stand for sixteen entries, which random tables do not honour.
        if c.stages.stage1.as_ref().is_some_and(|s| s.format == TableFormat::Short) {
            continue;
        }
        let unit = Unit::new(m.clone(), c.clone());
        let mut port = unit.port(256);
        let near: Vec<u64> = (0..3).map(|_| address(&mut r, &c.stages)).collect();
        for _ in 0..60 {
            let va = r.pick(&near) ^ (r.next() & r.pick(&[0xfff, 0x3fff, 0x1f_ffff, 0x3fff_ffff]));
            let k = r.pick(&KINDS);
            let attrs = A.with_privileged(k.2).with_instruction(k.1);
            let access = if k.0 { Access::Write } else { Access::Read };
            let got = port.translate(&FROM.with_attrs(attrs), Iova(va), access).map(|t| t.pa.get());
            let walked =
                c.stages.translate(&m, va & c.va_mask, kind(k), Updates::Apply, &mut NoRecord).map(|w| w.pa);
            assert_eq!(got.ok(), walked.ok(), "{va:#x} {k:?} {c:?}");
            compared += 1;
        }
        hits += port.stats().hits;
    }
    assert!(hits > compared / 50, "{hits} of {compared}");
}

/// RAM of 1 MiB full of descriptors whose lower and upper bits are most often the same, each level's table bits too.
fn similar_tables(r: &mut Random) -> SystemMemory {
    let m = SystemMemory::new(&[(0, 1 << 20)]).unwrap();
    for at in (0..1u64 << 20).step_by(8) {
        let v = r.next();
        // Write access taken away, the access flag clear, a block, a run, no descriptor, another type, or a table's limits.
        let other =
            [0x7c3 ^ 1 << 7, 0x3c3, 0x7c1, 0x7c3 | 1 << 52, 0, 0x7c7, 0x7c3 | 1 << 62, 0x7c3 | 1 << 60];
        let low = if v >> 60 < 13 { 0x7c3 } else { r.pick(&other) };
        m.store64(Pa(at), v & 0xf_f000 | low).unwrap();
    }
    m
}

#[test]
fn a_leaf_like_the_last_one_and_one_unlike_it_are_what_a_walk_would_find() {
    let mut r = Random(13);
    let m = similar_tables(&mut r);
    let (mut good, mut compared) = (0, 0);
    for _ in 0..3000 {
        let c = behind_a_port(&mut r, false);
        if c.stages.stage1.as_ref().is_some_and(|s| s.format == TableFormat::Short) {
            continue;
        }
        let unit = Unit::new(m.clone(), c.clone());
        // So small that nearly every access walks.
        let mut port = unit.port(4);
        let privileged = r.flip();
        for _ in 0..40 {
            let va = address(&mut r, &c.stages);
            let (write, fetch) = (r.below(4) == 0, r.below(8) == 0);
            let incoming = A.with_privileged(privileged).with_instruction(fetch);
            let access = if write { Access::Write } else { Access::Read };
            let got = port.translate(&FROM.with_attrs(incoming), Iova(va), access);
            let input = va & c.va_mask;
            let kind = AccessKind::new(access, incoming);
            let walked = c.stages.translate(&m, input, kind, Updates::Apply, &mut NoRecord);
            compared += 1;
            match (got, walked) {
                (Ok(t), Ok(w)) => {
                    let size = 1u64 << w.size_log2;
                    let context = Context { incoming, ..c.clone() };
                    let attrs = context.outgoing(w.attrs).of(access);
                    let expected = (Pa(w.pa), size - (input & (size - 1)), attrs);
                    assert_eq!((t.pa, t.left, t.attrs), expected, "{va:#x} {access:?} {c:?}");
                    good += 1;
                }
                (Err(_), Err(fault)) => assert_eq!(unit.faults(), [(va, access, fault)]),
                (got, walked) => panic!("{va:#x} {access:?}: {got:?}, but {walked:?} {c:?}"),
            }
        }
    }
    assert!(good > compared / 4, "{good} of {compared}");
}

#[test]
fn a_port_survives_hostile_contexts_and_tables() {
    let mut r = Random(12);
    let m = tables(&mut r);
    let mut buf = [0; 9000];
    for _ in 0..1500 {
        let unit = Unit::new(m.clone(), behind_a_port(&mut r, true));
        unit.on_fault(r.pick(&[OnFault::Abort, OnFault::Ignore, OnFault::Stall]));
        let mut port = unit.port(r.below(300) as usize);
        for _ in 0..10 {
            let at = Iova(r.next() >> r.below(64));
            let len = r.below(9000) as usize;
            let _ = match r.below(4) {
                0 => port.read(FROM, at, &mut buf[..len]).is_ok(),
                1 => port.copy((FROM, at), (FROM, Iova(r.next() >> r.below(64))), len).is_ok(),
                2 => port.translate(&FROM, at, Access::Write).is_ok(),
                _ => {
                    let scope = Scope {
                        secure: false,
                        regime: None,
                        vmid: None,
                        asid: r.flip().then_some(0),
                        stages: StageScope::All,
                    };
                    unit.log.publish(Invalidation::Address(scope, r.next()));
                    let (start, last) = (r.next() >> r.below(64), r.next() >> r.below(64));
                    let granule_log2 = r.next() as u8 >> r.below(8);
                    unit.log.publish(Invalidation::Range { scope, start, last, granule_log2 });
                    unit.log.publish(Invalidation::Streams { first: r.next() as u32, last: r.next() as u32 });
                    port.cached(&FROM, at).is_some()
                }
            };
        }
    }
}
