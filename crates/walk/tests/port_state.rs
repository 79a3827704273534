//! What a port remembers and forgets: configuration, contexts, attributes, invalidations, the mark of an access.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use common::unit::{FROM, OnFault, SUBSTREAM, Setting, Unit, context, key};
use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Access, Attributes, Iova, MemoryType, Pa, Shareability, StreamId, SubstreamId};
use portcullis_bus::{BusError, CopySide, DmaFault, DmaPort, Initiator, Memory, SystemMemory};
use portcullis_walk::{
    Context, FaultOutcome, Invalidation, Scope, Split, StageScope, TableFormat, Tbu, TlbStage, Translated,
};

const TABLE: u64 = 0x1000;
const LEAF: u64 = d::PAGE | d::AF | d::USER | d::NG;

fn memory() -> SystemMemory {
    SystemMemory::new(&[(0, 64 << 20)]).unwrap()
}

/// One table of pages at `base`.
fn pages(base: u64, asid: u16) -> Context {
    context(key(TlbStage::Stage1, asid), only1(stage1(Some(region(base, Granule::K4, 3, 21)), None)))
}

fn at(port: &mut Tbu<Unit, SystemMemory>, va: u64) -> Result<u64, FaultOutcome> {
    port.translate(&FROM, Iova(va), Access::Read).map(|t| t.pa.get())
}

const ASID1: Scope =
    Scope { secure: false, regime: None, vmid: None, asid: Some(1), stages: StageScope::Stage1AndCombined };
const ABORT: FaultOutcome = FaultOutcome::Terminate { abort: true };

#[test]
fn an_old_translation_stays_until_it_is_invalidated_and_not_longer() {
    let m = memory();
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    let mut port = unit.port(64);
    type Forget = (Invalidation, bool);
    let kinds: [Forget; 8] = [
        (Invalidation::Config, false),
        (Invalidation::Everything, true),
        (Invalidation::Contexts(ASID1), true),
        (Invalidation::Contexts(Scope { asid: Some(2), ..ASID1 }), false),
        (Invalidation::Contexts(Scope { stages: StageScope::Stage2, asid: None, ..ASID1 }), false),
        (Invalidation::Address(ASID1, 0x5123), true),
        (Invalidation::Address(ASID1, 0x6000), false),
        (Invalidation::Address(Scope { secure: true, ..ASID1 }, 0x5000), false),
    ];
    for (what, forgets) in kinds {
        m.store64(Pa(TABLE + 5 * 8), 0xa000 | LEAF).unwrap();
        unit.log.publish(Invalidation::Everything);
        assert_eq!(at(&mut port, 0x5008), Ok(0xa008));
        m.store64(Pa(TABLE + 5 * 8), 0xb000 | LEAF).unwrap();
        assert_eq!(at(&mut port, 0x5008), Ok(0xa008), "cached");
        unit.log.publish(what);
        let now = if forgets { 0xb008 } else { 0xa008 };
        assert_eq!(at(&mut port, 0x5008), Ok(now), "{what:?}");
        assert_eq!(port.cached(&FROM, Iova(0x5008)).map(|e| e.pa.get()), Some(now));
    }
}

#[test]
fn faults_are_not_cached() {
    let m = memory();
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    let mut port = unit.port(64);
    assert_eq!(at(&mut port, 0x5000), Err(ABORT));
    m.store64(Pa(TABLE + 5 * 8), 0xa000 | LEAF & !d::AF).unwrap();
    assert_eq!(at(&mut port, 0x5000), Err(ABORT));
    m.store64(Pa(TABLE + 5 * 8), 0xa000 | LEAF).unwrap();
    assert_eq!(at(&mut port, 0x5000), Ok(0xa000), "no invalidation is needed for a fault");
    assert_eq!(unit.faults().len(), 2);
}

#[test]
fn a_port_that_missed_more_than_the_log_holds_forgets_everything() {
    let m = memory();
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    let mut port = unit.port(64);
    m.store64(Pa(TABLE + 5 * 8), 0xa000 | LEAF).unwrap();
    assert_eq!(at(&mut port, 0x5000), Ok(0xa000));
    m.store64(Pa(TABLE + 5 * 8), 0xb000 | LEAF).unwrap();
    unit.log.publish(Invalidation::Address(ASID1, 0x5000));
    (0..1000).for_each(|_| unit.log.publish(Invalidation::Config));
    assert_eq!(at(&mut port, 0x5000), Ok(0xb000));
}

#[test]
fn streams_and_contexts_beyond_every_limit_stay_apart() {
    let m = memory();
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    let mut port = unit.port(8192);
    const STREAMS: u64 = 1500;
    for s in 0..STREAMS {
        let table = 0x10_0000 + s * 0x1000;
        m.store64(Pa(table + 8), (0x1000 + s) << 12 | LEAF).unwrap();
        unit.configure(s as u32, Setting::Translate(Arc::new(pages(table, s as u16))));
    }
    let mut r = Random(3);
    for i in 0..4 * STREAMS {
        let s = if i < STREAMS { i } else { r.below(STREAMS) };
        let from = Initiator::new(StreamId(s as u32));
        let t = port.translate(&from, Iova(0x1234), Access::Read).unwrap();
        assert_eq!(t.pa.get(), (0x1000 + s) << 12 | 0x234, "stream {s}");
        assert!(port.translate(&from, Iova(0x2000), Access::Read).is_err());
    }
    // Numbers of contexts wrap round while several streams share one context.
    for i in 0..6000u64 {
        let s = i % 3;
        let from = Initiator::new(StreamId(s as u32));
        let t = port.translate(&from, Iova(0x1000), Access::Read).unwrap();
        assert_eq!(t.pa.get(), (0x1000 + s) << 12);
        unit.log.publish(Invalidation::Contexts(Scope { asid: Some((i % 3) as u16), ..ASID1 }));
    }
}

#[test]
fn substreams_are_told_apart() {
    let m = memory();
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    let mut port = unit.port(8192);
    m.store64(Pa(TABLE + 8), 0x1f_f000 | LEAF).unwrap();
    for s in 0..300u64 {
        let table = 0x10_0000 + s * 0x1000;
        m.store64(Pa(table + 8), (0x1000 + s) << 12 | LEAF).unwrap();
        let asid = 2 + s as u16;
        unit.configure(SUBSTREAM | s as u32, Setting::Translate(Arc::new(pages(table, asid))));
    }
    for _ in 0..2 {
        for s in 0..300u64 {
            let from = Initiator { substream: Some(SubstreamId(s as u32)), ..FROM };
            let t = port.translate(&from, Iova(0x1000), Access::Read).unwrap();
            assert_eq!(t.pa.get(), (0x1000 + s) << 12);
            assert_eq!(at(&mut port, 0x1000), Ok(0x1f_f000), "no substream is not substream 0");
        }
    }
}

#[test]
fn a_stream_kept_while_context_numbers_wrap_round_keeps_its_own_translations() {
    let m = memory();
    m.store64(Pa(TABLE + 8), 0xa000 | LEAF).unwrap();
    // The others share tables with leaves of five sizes: five numbers for each of their contexts.
    let (l1, l2, l3) = (0x2000, 0x3000, 0x4000);
    let block = LEAF & !2;
    m.store64(Pa(l1), l2 | d::TABLE).unwrap();
    m.store64(Pa(l1 + 8), 1 << 30 | block).unwrap();
    m.store64(Pa(l2), l3 | d::TABLE).unwrap();
    m.store64(Pa(l2 + 8), 1 << 21 | block).unwrap();
    m.store64(Pa(l3 + 8), 0xb000 | LEAF).unwrap();
    (0..16u64).for_each(|i| m.store64(Pa(l2 + (32 + i) * 8), (32 + i) << 21 | block | d::CONT).unwrap());
    (0..16u64).for_each(|i| m.store64(Pa(l3 + (16 + i) * 8), (16 + i) << 12 | LEAF | d::CONT).unwrap());
    let sizes = [0x1000, 0x1_0000, 0x20_0000, 0x400_0000, 0x4000_0000];
    let others = |asid| {
        context(key(TlbStage::Stage1, asid), only1(stage1(Some(region(l1, Granule::K4, 1, 39)), None)))
    };
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    let one = |s: u32| Initiator::new(StreamId(s));
    for s in 2..1000u32 {
        unit.configure(s, Setting::Translate(Arc::new(others(s as u16))));
    }
    // Those that a port can keep beside the first stream.
    let mut port = unit.port(64);
    let beside: Vec<u32> = (2..1000)
        .filter(|&s| {
            at(&mut port, 0x1000).unwrap();
            port.translate(&one(s), Iova(0x1000), Access::Read).unwrap();
            let before = port.stats().resolutions;
            at(&mut port, 0x1000).unwrap();
            port.stats().resolutions == before
        })
        .collect();
    assert!(beside.len() > 850, "{}", beside.len());
    for few in 0..5 {
        let mut port = unit.port(8192);
        assert_eq!(at(&mut port, 0x1000), Ok(0xa000));
        for (i, &s) in beside.iter().enumerate() {
            // The first of them use one size only, so that the numbers wrap at another place each time.
            for &va in &sizes[..if i < few { 1 } else { 5 }] {
                port.translate(&one(s), Iova(va), Access::Read).unwrap();
            }
        }
        assert_eq!(at(&mut port, 0x1000), Ok(0xa000));
    }
}

#[test]
fn streams_of_one_context_share_entries_and_not_rights() {
    let m = memory();
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    let mut port = unit.port(64);
    m.store64(Pa(TABLE + 5 * 8), 0xa000 | LEAF & !d::USER).unwrap();
    let privileged = FROM.with_attrs(A.with_privileged(true));
    let t = port.translate(&privileged, Iova(0x5000), Access::Write).unwrap();
    assert!(t.attrs.privileged());
    assert_eq!(at(&mut port, 0x5000), Err(ABORT));
    assert!(port.translate(&privileged, Iova(0x5000), Access::Read).is_ok());
    let fetch = privileged.with_attrs(A.with_privileged(true).with_instruction(true));
    assert!(port.translate(&fetch, Iova(0x5000), Access::Read).unwrap().attrs.instruction());
    assert_eq!(port.stats().walks, 2, "one for the page, one that finds the unprivileged access refused");
}

#[test]
fn more_kinds_of_attributes_than_a_port_numbers_are_still_told_apart() {
    let m = memory();
    let s2 = stage2(region(TABLE, Granule::K4, 3, 21));
    let mut c = context(key(TlbStage::Stage2, 0), only2(s2));
    let incoming = MemoryType::normal(2, 3);
    c.incoming = Attributes::DEVICE_DEFAULT.with_memory(incoming);
    let unit = Unit::new(m.clone(), c);
    let mut port = unit.port(8192);
    // Memory types, shareability and both hints: more than 256 combinations on as many pages.
    let all: Vec<(u64, u64, u64, u64)> = (0..16u64)
        .flat_map(|t| {
            (0..4).flat_map(move |sh| [0, 2, 3].map(move |ra| [0, 2, 3].map(move |wa| (t, sh, ra, wa))))
        })
        .flatten()
        .take(512)
        .collect();
    assert!(all.len() == 512);
    for (i, &(t, sh, ra, wa)) in all.iter().enumerate() {
        let i = i as u64;
        let entry = i << 12 | d::PAGE | d::AF | d::S2R | t << 2 | sh << 8 | ra << 60 | wa << 62;
        m.store64(Pa(TABLE + i * 8), entry).unwrap();
    }
    for _ in 0..3 {
        for (i, &(t, sh, ra, _)) in all.iter().enumerate() {
            let walked = port.translate(&FROM, Iova(i as u64 * 4096), Access::Read).unwrap();
            let got = port.translate(&FROM, Iova(i as u64 * 4096), Access::Read).unwrap();
            assert_eq!(walked, got, "the TLB answers as the walk did");
            assert_eq!(got.pa.get(), i as u64 * 4096);
            let memory = incoming.combine(MemoryType::from_code(t as u8));
            assert_eq!(got.attrs.memory(), memory, "page {i}");
            if memory.is_cacheable() {
                assert_eq!(got.attrs.shareability(), Shareability::from_code(sh as u8));
                assert_eq!(got.attrs.read_allocate() as u64, ra);
            }
        }
    }
}

#[test]
fn a_stage_1_block_over_smaller_stage_2_pages_is_invalidated_as_a_whole() {
    let m = memory();
    // Stage 2: 16 MiB flat by pages. Stage 1: a block of 2 MiB at VA 0, its table at IPA 0x2000.
    m.store64(Pa(TABLE), 0x10_0000 | d::TABLE).unwrap();
    let rw = d::PAGE | d::AF | d::S2R | d::S2W | 0xf << 2;
    for block in 0..8u64 {
        m.store64(Pa(TABLE + block * 8), (0x10_0000 + block * 0x1000) | d::TABLE).unwrap();
        for p in 0..512 {
            m.store64(Pa(0x10_0000 + block * 0x1000 + p * 8), block << 21 | p << 12 | rw).unwrap();
        }
    }
    let block = |n: u64| n << 21 | d::BLOCK | d::AF | d::USER | d::NG;
    m.store64(Pa(0x2000), block(2)).unwrap();
    m.store64(Pa(0x2008), block(4)).unwrap();
    let stages = both(
        stage1(Some(region(0x2000, Granule::K4, 2, 30)), None),
        stage2(region(TABLE, Granule::K4, 2, 30)),
    );
    let unit = Unit::new(m.clone(), context(key(TlbStage::Combined, 1), stages));
    let mut port = unit.port(8192);
    let everywhere: Vec<u64> = (0..1024).map(|p| p << 12 | 0x10).collect();
    for &va in &everywhere {
        assert_eq!(at(&mut port, va), Ok(va + (2 + (va >> 21)) * (1 << 21)));
    }
    // Software moves the first block and invalidates one address of it.
    m.store64(Pa(0x2000), block(6)).unwrap();
    unit.log.publish(Invalidation::Address(ASID1, 0x4_2000));
    let walks = port.stats().walks;
    for &va in &everywhere[..512] {
        assert_eq!(at(&mut port, va), Ok(va + 6 * (1 << 21)), "a piece of the old block at {va:#x}");
    }
    assert_eq!(port.stats().walks, walks + 512);
    for &va in &everywhere[512..] {
        assert_eq!(at(&mut port, va), Ok(va + 3 * (1 << 21)));
    }
    assert_eq!(port.stats().walks, walks + 512, "the other block was left alone");
}

#[test]
fn a_stage_1_block_in_very_many_pieces_is_invalidated_as_a_whole() {
    // Stage 1: a block of 1 GiB at VA 0; stage 2: 4 MiB of it by pages.
    let m = memory();
    m.store64(Pa(TABLE), 0x10_0000 | d::TABLE).unwrap();
    let rw = d::PAGE | d::AF | d::S2R | d::S2W | 0xf << 2;
    let block = |gib: u64| gib << 30 | d::BLOCK | d::AF | d::USER | d::NG;
    for gib in [0, 1] {
        let (table, pages) = (0x10_0000 + gib * 0x1000, 0x20_0000 + gib * 0x1000);
        m.store64(Pa(TABLE + gib * 8), table | d::TABLE).unwrap();
        m.store64(Pa(table), pages | d::TABLE).unwrap();
        for p in 0..512 {
            m.store64(Pa(pages + p * 8), gib << 24 | p << 12 | rw).unwrap();
        }
    }
    m.store64(Pa(0x2000), block(0)).unwrap();
    let stages = both(
        stage1(Some(region(0x2000, Granule::K4, 1, 39)), None),
        stage2(region(TABLE, Granule::K4, 1, 39)),
    );
    let unit = Unit::new(m.clone(), context(key(TlbStage::Combined, 1), stages));
    let mut port = unit.port(8192);
    for p in 0..512u64 {
        assert_eq!(at(&mut port, p << 12), Ok(p << 12));
    }
    m.store64(Pa(0x2000), block(1)).unwrap();
    unit.log.publish(Invalidation::Address(ASID1, 0x3fff_f000));
    for p in 0..512u64 {
        assert_eq!(at(&mut port, p << 12), Ok(1 << 24 | p << 12), "a piece of the old block");
    }
}

#[test]
fn a_block_of_one_half_never_answers_for_the_other() {
    // AArch32 long, T0SZ = 7: the first 32 MiB belong to TTBR0, whose table is empty; TTBR1 maps the first GiB.
    let m = memory();
    m.store64(Pa(0x2000), d::BLOCK | d::AF | d::USER).unwrap();
    let mut s1 = stage1(Some(region(TABLE, Granule::K4, 2, 25)), Some(region(0x2000, Granule::K4, 1, 32)));
    (s1.format, s1.split, s1.output_bits) = (TableFormat::Long, Split::Long { tsz: [7, 0] }, 40);
    let unit = Unit::new(m.clone(), context(key(TlbStage::Stage1, 1), only1(s1)));
    let mut port = unit.port(64);
    assert_eq!(at(&mut port, 0x0200_0000), Ok(0x0200_0000));
    assert_eq!(at(&mut port, 0x1000), Err(ABORT), "TTBR0 has nothing here");
    assert_eq!(at(&mut port, 0x01ff_ffff), Err(ABORT));
    assert_eq!(at(&mut port, 0x3fff_ffff), Ok(0x3fff_ffff));
    // And one address takes the whole block out.
    m.store64(Pa(0x2000), 0).unwrap();
    unit.log.publish(Invalidation::Address(ASID1, 0x0300_0000));
    assert_eq!(at(&mut port, 0x0200_0000), Err(ABORT));
    assert_eq!(at(&mut port, 0x3fff_ffff), Err(ABORT));
}

#[test]
fn new_configuration_counts_from_the_next_access_on() {
    let m = memory();
    m.store64(Pa(TABLE + 8), 0xa000 | LEAF).unwrap();
    m.store64(Pa(0x2008), 0xb000 | LEAF).unwrap();
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    let mut port = unit.port(64);
    assert_eq!(at(&mut port, 0x1000), Ok(0xa000));
    unit.configure(1, Setting::Translate(Arc::new(pages(0x2000, 2))));
    assert_eq!(at(&mut port, 0x1000), Ok(0xb000));
    unit.configure(1, Setting::Bypass(0xffff));
    assert_eq!(at(&mut port, 0x12_3456), Ok(0x3456));
    unit.configure(1, Setting::Refuse(FaultOutcome::Terminate { abort: false }));
    assert_eq!(at(&mut port, 0x1000), Err(FaultOutcome::Terminate { abort: false }));
    let mut buf = [1; 8];
    port.read(FROM, Iova(0xffc), &mut buf).unwrap();
    assert_eq!(buf, [0; 8]);
    unit.configure(1, Setting::Translate(Arc::new(pages(TABLE, 1))));
    assert_eq!(at(&mut port, 0x1000), Ok(0xa000));
}

#[test]
fn a_bypass_keeps_the_address_and_its_pages_in_order() {
    let m = memory();
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    unit.configure(1, Setting::Bypass((1 << 40) - 1));
    let mut port = unit.port(64);
    let data: Vec<u8> = (0..100_000u32).map(|i| (i * 7) as u8).collect();
    port.write(FROM, Iova(1 << 44 | 0x12_3456), &data).unwrap();
    let mut back = vec![0; data.len()];
    port.read(FROM, Iova(0x12_3456), &mut back).unwrap();
    assert!(back == data);
    port.copy((FROM, Iova(0x12_3456)), (FROM, Iova(0x80_0001)), data.len()).unwrap();
    port.read(FROM, Iova(0x80_0001), &mut back).unwrap();
    assert!(back == data);
    let e = port.read(FROM, Iova((64 << 20) - 10), &mut back).unwrap_err();
    assert_eq!(e.done, 10);
}

#[test]
fn a_context_with_both_stages_off_is_not_cached() {
    let m = memory();
    let mut c = pages(TABLE, 1);
    (c.stages.stage1, c.cacheable) = (None, false);
    let unit = Unit::new(m, c);
    let mut port = unit.port(64);
    for _ in 0..3 {
        assert_eq!(at(&mut port, 0x1234), Ok(0x1234));
    }
    assert_eq!((port.stats().hits, port.cached(&FROM, Iova(0x1234))), (0, None));
}

#[test]
fn an_smmu_that_always_says_look_again_does_not_hold_the_device_for_ever() {
    let m = memory();
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    let mut port = unit.port(64);
    unit.state.lock().unwrap().retries = 10;
    assert_eq!(at(&mut port, 0x1000), Err(ABORT));
    assert_eq!(unit.faults().len(), 1, "looked again ten times, then reported once");
    unit.state.lock().unwrap().retries = usize::MAX;
    assert_eq!(at(&mut port, 0x1000), Err(ABORT));
    unit.configure(1, Setting::Refuse(FaultOutcome::Retry));
    assert_eq!(at(&mut port, 0x1000), Err(ABORT));
    let mut buf = [0; 4];
    assert_eq!(port.read(FROM, Iova(0), &mut buf).unwrap_err().fault, DmaFault::Terminated);
}

#[test]
fn a_synchronisation_waits_for_the_access_and_for_nothing_else() {
    let m = memory();
    m.store64(Pa(TABLE + 8), 0xa000 | LEAF).unwrap();
    let unit = Unit::new(m, pages(TABLE, 1));
    let (mut one, mut two) = (unit.port(64), unit.port(64));
    let log = &unit.log;
    assert!(log.begin_sync().poll());
    let mut before = one
        .with_translation(&FROM, Iova(0x1000), Access::Read, |t: Translated, _| {
            assert_eq!(t.pa, Pa(0xa000));
            log.publish(Invalidation::Everything);
            let mut sync = log.begin_sync();
            assert!(!sync.poll(), "this access may use what was invalidated");
            // Another port comes and goes meanwhile.
            assert!(two.translate(&FROM, Iova(0x1000), Access::Read).is_ok());
            assert!(!sync.poll());
            sync
        })
        .unwrap();
    assert!(before.poll());
    // Neither a fault nor a stall leaves the mark up.
    unit.on_fault(OnFault::Stall);
    assert!(matches!(at(&mut one, 0x9000), Err(FaultOutcome::Stall(_))));
    assert!(log.begin_sync().poll());
}

#[test]
fn an_access_that_panics_has_ended() {
    let m = memory();
    m.store64(Pa(TABLE + 8), 0xa000 | LEAF).unwrap();
    let unit = Unit::new(m, pages(TABLE, 1));
    let mut port = unit.port(64);
    let mut during = None;
    let crash = catch_unwind(AssertUnwindSafe(|| {
        let _ = port.with_translation(&FROM, Iova(0x1000), Access::Read, |_, _| {
            during = Some(unit.log.begin_sync());
            panic!("the device model crashed");
        });
    }));
    assert!(crash.is_err());
    assert!(during.unwrap().poll(), "a synchronisation begun during the access ends");
    assert!(unit.log.begin_sync().poll(), "and so does a new one");
    port.with_translation(&FROM, Iova(0x1000), Access::Read, |_, _| {
        assert!(!unit.log.begin_sync().poll(), "the next access is seen while it runs");
    })
    .unwrap();
}

#[test]
fn a_fault_of_a_configuration_that_is_no_longer_true_is_not_reported() {
    let m = memory();
    m.store64(Pa(0x2008), 0xb000 | LEAF).unwrap();
    let unit = Unit::new(m, pages(TABLE, 1));
    let mut port = unit.port(64);
    unit.state.lock().unwrap().changes_to = Some(Setting::Translate(Arc::new(pages(0x2000, 2))));
    assert_eq!(at(&mut port, 0x1000), Ok(0xb000));
    assert!(unit.faults().is_empty());
    assert_eq!(port.stats().resolutions, 2);
}

/// Memory that writes down each access.
struct Logged(SystemMemory, Arc<Mutex<Vec<(u64, usize, MemoryType)>>>);

impl Memory for Logged {
    fn read(&self, pa: Pa, attrs: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        self.1.lock().unwrap().push((pa.get(), buf.len(), attrs.memory()));
        self.0.read(pa, attrs, buf)
    }
    fn write(&self, pa: Pa, attrs: Attributes, buf: &[u8]) -> Result<(), BusError> {
        self.1.lock().unwrap().push((pa.get(), buf.len(), attrs.memory()));
        self.0.write(pa, attrs, buf)
    }
    fn load64(&self, pa: Pa, attrs: Attributes) -> Result<u64, BusError> {
        self.0.load64(pa, attrs)
    }
    fn load32(&self, pa: Pa, attrs: Attributes) -> Result<u32, BusError> {
        self.0.load32(pa, attrs)
    }
    fn cas64(&self, pa: Pa, attrs: Attributes, expected: u64, new: u64) -> Result<u64, BusError> {
        self.0.cas64(pa, attrs, expected, new)
    }
    fn copy(
        &self,
        src: (Pa, Attributes),
        dst: (Pa, Attributes),
        len: usize,
    ) -> Result<(), (CopySide, BusError)> {
        self.1.lock().unwrap().push((src.0.get(), len, src.1.memory()));
        self.1.lock().unwrap().push((dst.0.get(), len, dst.1.memory()));
        self.0.copy(src, dst, len)
    }
}

#[test]
fn pages_move_in_one_piece_as_long_as_address_and_attributes_go_on() {
    let m = memory();
    let (nc, wb) = (MemoryType::NORMAL_NC, MemoryType::NORMAL_WB);
    // Pages 0 to 5 at 0x10_0000 with types NC NC WB WB NC WB; page 6 elsewhere. Pages 16 to 22: 0x20_0000, all WB.
    for (i, index) in [0u64, 0, 1, 1, 0, 1].into_iter().enumerate() {
        let i = i as u64;
        m.store64(Pa(TABLE + i * 8), (0x10_0000 + (i << 12)) | LEAF | index << 2).unwrap();
    }
    m.store64(Pa(TABLE + 6 * 8), 0x18_0000 | LEAF | 1 << 2).unwrap();
    for i in 0..7u64 {
        m.store64(Pa(TABLE + (16 + i) * 8), (0x20_0000 + (i << 12)) | LEAF | 1 << 2).unwrap();
    }
    let unit = Unit::new(m.clone(), pages(TABLE, 1));
    let log = Arc::new(Mutex::default());
    let mut port = Tbu::new(unit, Logged(m, log.clone()), 64);
    let pieces = [
        (0x10_0800, 0x1800, nc),
        (0x10_2000, 0x2000, wb),
        (0x10_4000, 0x1000, nc),
        (0x10_5000, 0x1000, wb),
        (0x18_0000, 0x1000, wb),
    ];
    let taken = || std::mem::take(&mut *log.lock().unwrap());
    let mut buf = vec![0; 0x6800];
    port.read(FROM, Iova(0x800), &mut buf).unwrap();
    assert_eq!(taken(), pieces);
    port.write(FROM, Iova(0x800), &buf).unwrap();
    assert_eq!(taken(), pieces);
    for _ in 0..2 {
        // The first time configuration is not cached and the first page goes the slow way.
        taken();
        port.copy((FROM, Iova(0x800)), (FROM, Iova(0x1_0000)), buf.len()).unwrap();
    }
    let mut to = 0x20_0000;
    let both: Vec<_> = pieces
        .into_iter()
        .flat_map(|p| {
            let at = to;
            to += p.1 as u64;
            [p, (at, p.1, wb)]
        })
        .collect();
    assert_eq!(taken(), both);
    // The other way round, destinations of different types cut the run just as well.
    port.copy((FROM, Iova(0x1_0000)), (FROM, Iova(0x800)), buf.len()).unwrap();
    let destinations: Vec<_> = taken().into_iter().skip(1).step_by(2).collect();
    assert_eq!(destinations, pieces);
}
