//! The driver on a fake SMMU: what it writes, and what hardware with the worst caches makes of it.

mod faults;
mod hardware;
mod invalidation;
mod random;

use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use portcullis_arch::{Asid, Iova, Pa, StreamId, SubstreamId, Vmid};
use portcullis_hal::DmaMemory;
use portcullis_hal::fake::{FakeClock, FakeMemory, FakeMmio};
use portcullis_pgtable::{Config, Granule, PageTable, Prot, Stage1};
use spin::Mutex;

use super::*;
use crate::ops::{FaultModel, TableRoot};
use hardware::{CR0, Did, GBPA, Hardware, STRTAB_BASE, STRTAB_BASE_CFG, Words};

type Smmu = SmmuV3<Parts<Arc<FakeMmio>, Arc<FakeMemory>, Arc<FakeClock>>>;
type TestDomain = Domain<Parts<Arc<FakeMmio>, Arc<FakeMemory>, Arc<FakeClock>>>;

const BASE: u64 = 0x8000_0000;
const BYTES: usize = 64 << 20;
const WINDOW: u64 = 0x2_0000;

/// Both stages, everything that the driver uses, 16-bit streams, 20-bit substreams, 48-bit addresses.
const FULL: [u32; 4] = [
    0b11 | 2 << 2
        | 1 << 4
        | 1 << 9
        | 1 << 10
        | 1 << 12
        | 1 << 13
        | 1 << 16
        | 1 << 18
        | 1 << 19
        | 2 << 21
        | 1 << 27,
    16 | 20 << 6 | 8 << 11 | 8 << 16 | 8 << 21 | 1 << 26 | 1 << 27,
    1 << 2 | 1 << 4 | 1 << 8 | 1 << 10 | 2 << 11,
    5 | 7 << 4 | 16 << 16,
];
/// A small one: 6-bit streams in a linear table, no substreams, stalls, ATS, messages or ranges; not coherent.
const SMALL: [u32; 4] =
    [0b11 | 2 << 2 | 2 << 21 | 1 << 24 | 1 << 26, 6 | 7 << 16 | 7 << 21, 1 << 2, 5 | 1 << 4];

/// IDR0.COHACC.
const COHACC: u32 = 1 << 4;

struct Rig {
    smmu: Smmu,
    hardware: Hardware,
    memory: Arc<FakeMemory>,
}

fn rig_in(memory: FakeMemory, ids: [u32; 4], change: impl FnOnce(&Hardware, &mut Options)) -> Rig {
    let memory = Arc::new(memory);
    let hardware = Hardware::new(memory.clone(), ids);
    let mut options = Options { timeout_us: 1000, ..Options::new(WINDOW) };
    change(&hardware, &mut options);
    let clock = Arc::new(FakeClock::new());
    let smmu = SmmuV3::probe(hardware.mmio.clone(), memory.clone(), clock, options).unwrap();
    Rig { smmu, hardware, memory }
}

fn rig() -> Rig {
    let rig = rig_in(FakeMemory::plain(BASE, BYTES), FULL, |_, _| ());
    rig.hardware.take();
    rig
}

const SUBSTREAMS: MasterOptions = MasterOptions { substream_bits: 20, can_stall: true, ats: false };
const ATS: MasterOptions = MasterOptions { substream_bits: 0, can_stall: false, ats: true };

impl Rig {
    fn master(&self, ids: &[u32], options: MasterOptions) -> Master {
        let streams: Vec<StreamMatch> = ids.iter().copied().map(StreamMatch::exact).collect();
        self.smmu.add_master(&streams, options).unwrap()
    }
    fn domain(
        &self,
        config: DomainConfig<Parts<Arc<FakeMmio>, Arc<FakeMemory>, Arc<FakeClock>>>,
    ) -> Arc<TestDomain> {
        self.smmu.new_domain(config, DomainOptions::default()).unwrap()
    }
    fn stage1(&self) -> Arc<TestDomain> {
        self.domain(DomainConfig::Stage1(Paging::default()))
    }
    fn stage2(&self) -> Arc<TestDomain> {
        self.domain(DomainConfig::Stage2(Paging::default()))
    }
    fn stalling(&self) -> Arc<TestDomain> {
        let fault_model = FaultModel { stall: true, ..FaultModel::default() };
        let options = DomainOptions { fault_model, handler: None };
        self.smmu.new_domain(DomainConfig::Stage1(Paging::default()), options).unwrap()
    }
    /// A process's table and a domain for it.
    fn process(&self) -> (PageTable<Stage1, Arc<FakeMemory>>, Arc<TestDomain>) {
        let table = PageTable::new(self.memory.clone(), Config::new(Granule::K4, 39, 48)).unwrap();
        let root = TableRoot::from_registers(&table.registers(), Granule::K4);
        let fault_model = FaultModel { stall: true, ..FaultModel::default() };
        let options = DomainOptions { fault_model, handler: None };
        let domain = self.smmu.new_domain(DomainConfig::Process(root), options).unwrap();
        (table, domain)
    }
    /// Everything is given back when the SMMU goes.
    #[track_caller]
    fn end(self) {
        let Self { smmu, hardware, memory } = self;
        drop(smmu);
        // The last look at its entries is over.
        drop(hardware);
        memory.assert_clean();
    }
}

/// A field of a word.
fn field(word: u64, high: u32, low: u32) -> u64 {
    word >> low & (u64::MAX >> (63 - high + low))
}

fn config(ste: &Words) -> u64 {
    field(ste[0], 3, 1)
}

fn ttb0(cd: &Words) -> u64 {
    cd[1] & 0x000f_ffff_ffff_fff0
}

fn asid(cd: &Words) -> u64 {
    field(cd[0], 63, 48)
}

#[test]
fn probe_writes_what_linux_writes() {
    let rig = rig_in(FakeMemory::plain(BASE, BYTES), FULL, |_, _| ());
    let log = rig.hardware.take();
    let (strtab, config) = (rig.hardware.mmio.get64(STRTAB_BASE), rig.hardware.mmio.get32(STRTAB_BASE_CFG));
    assert_eq!((strtab >> 62, config), (1, 1 << 16 | 8 << 6 | 16));
    assert!((strtab & 0x00ff_ffff_ffff_ffc0).is_multiple_of(8 << 8));
    let queue = |offset| rig.hardware.mmio.get64(offset);
    let mut expected = vec![
        Did::Write(CR0, 0),
        Did::Write(0x28, 0xd75),
        Did::Write(0x2c, 0x6),
        Did::Write(0x80, strtab),
        Did::Write(0x88, config.into()),
        Did::Write(0x90, queue(0x90)),
        Did::Write(0x98, 0),
        Did::Write(0x9c, 0),
        Did::Write(CR0, 0x8),
    ];
    for (index, command) in [(0x04, 0x1f), (0x20, 0), (0x30, 0)].into_iter().enumerate() {
        expected.push(Did::Write(0x98, index as u64 * 2 + 2));
        expected.push(Did::Command(command.0, command.1));
        expected.push(Did::Command(0x46, 0));
    }
    expected.extend([
        Did::Write(0xa0, queue(0xa0)),
        Did::Write(0x1_00a8, 0),
        Did::Write(0x1_00ac, 0),
        Did::Write(CR0, 0xc),
        Did::Write(0xc0, queue(0xc0)),
        Did::Write(0x1_00c8, 0),
        Did::Write(0x1_00cc, 0),
        Did::Write(CR0, 0xe),
        Did::Write(CR0, 0x1e),
        Did::Write(0x50, 0),
        Did::Write(0x68, 0),
        Did::Write(0xb0, 0),
        Did::Write(0xd0, 0),
        Did::Write(0x50, 7),
        Did::Write(CR0, 0x1f),
    ]);
    let plain = |did: Did| match did {
        Did::Command(first, _) if first as u8 == 0x46 => Did::Command(0x46, 0),
        did => did,
    };
    let log: Vec<Did> = log.into_iter().map(plain).collect();
    assert_eq!(log, expected);
    assert!(!rig.smmu.was_enabled());
    rig.end();
}

#[test]
fn a_small_smmu_gets_a_linear_table_and_only_what_it_has() {
    let rig = rig_in(FakeMemory::non_coherent(BASE, BYTES), SMALL, |_, _| ());
    let writes: Vec<usize> = rig
        .hardware
        .take()
        .into_iter()
        .filter_map(|did| match did {
            Did::Write(offset, _) => Some(offset),
            Did::Command(..) => None,
        })
        .collect();
    assert!(!writes.iter().any(|offset| [0xc0, 0xd0, 0x68, 0xb0].contains(offset)), "{writes:x?}");
    assert_eq!(rig.hardware.mmio.get32(STRTAB_BASE_CFG), 6);
    assert_eq!(rig.hardware.mmio.get32(CR0), 0xd);
    for stream in 0..64 {
        assert_eq!(rig.hardware.config(stream), Some(0), "stream {stream} aborts");
    }
    rig.end();
}

#[test]
fn what_cannot_be_driven_is_refused_with_the_register_that_says_so() {
    type Check = fn(&ProbeError) -> bool;
    let cases: [(&str, [u32; 4], u64, Check); 11] = [
        ("window", FULL, 0x1_0000, |e| matches!(e, ProbeError::Window { window: 0x1_0000 })),
        ("no stage", [FULL[0] & !3, FULL[1], FULL[2], FULL[3]], WINDOW, |e| {
            matches!(e, ProbeError::NoTranslation { .. })
        }),
        ("32-bit tables", [FULL[0] & !(3 << 2) | 1 << 2, FULL[1], FULL[2], FULL[3]], WINDOW, |e| {
            matches!(e, ProbeError::TableFormat { ttf: 1, .. })
        }),
        ("big endian", [FULL[0] | 3 << 21, FULL[1], FULL[2], FULL[3]], WINDOW, |e| {
            matches!(e, ProbeError::Endianness { ttendian: 3, .. })
        }),
        ("reserved endianness", [FULL[0] & !(3 << 21) | 1 << 21, FULL[1], FULL[2], FULL[3]], WINDOW, |e| {
            matches!(e, ProbeError::Endianness { ttendian: 1, .. })
        }),
        ("relative bases", [FULL[0], FULL[1] | 1 << 28, FULL[2], FULL[3]], WINDOW, |e| {
            matches!(e, ProbeError::Preset { .. })
        }),
        ("queues preset", [FULL[0], FULL[1] | 1 << 29, FULL[2], FULL[3]], WINDOW, |e| {
            matches!(e, ProbeError::Preset { .. })
        }),
        ("tables preset", [FULL[0], FULL[1] | 1 << 30, FULL[2], FULL[3]], WINDOW, |e| {
            matches!(e, ProbeError::Preset { .. })
        }),
        ("small queue", [FULL[0], FULL[1] & !(0x1f << 21) | 6 << 21, FULL[2], FULL[3]], WINDOW, |e| {
            matches!(e, ProbeError::CommandQueue { log2: 6, .. }) && e.to_string().contains("of 64 entries")
        }),
        ("stream ids", [FULL[0], FULL[1] & !0x3f | 33, FULL[2], FULL[3]], WINDOW, |e| {
            matches!(e, ProbeError::StreamBits { bits: 33, .. })
        }),
        ("no granule", [FULL[0], FULL[1], FULL[2], 5], WINDOW, |e| matches!(e, ProbeError::NoGranule { .. })),
    ];
    for (name, ids, window, check) in cases {
        let memory = Arc::new(FakeMemory::plain(BASE, 0x1000));
        let hardware = Hardware::new(memory.clone(), ids);
        let clock = Arc::new(FakeClock::new());
        let error =
            SmmuV3::probe(hardware.mmio.clone(), memory, clock, Options::new(window)).map(drop).unwrap_err();
        assert!(check(&error), "{name}: {error}");
        assert!(hardware.take().is_empty(), "{name}: nothing is written to what cannot be driven");
    }
}

#[test]
fn features_say_what_the_registers_say() {
    let rig = rig();
    let features = rig.smmu.features();
    assert!(features.stage1 && features.stage2 && features.hyp && features.ats && features.pri);
    assert_eq!((features.asid_bits, features.vmid_bits), (16, 16));
    assert_eq!((features.stream_bits, features.substream_bits, features.output_bits), (16, 20, 48));
    assert_eq!(features.page_sizes(), 0x6221_5000);
    assert!(features.to_string().starts_with("SMMUv3.0 with:\n\tstage 1 translation\n"));
    assert!(features.to_string().ends_with("\tias 48-bit, oas 48-bit\n"));
}

#[test]
fn a_live_smmu_is_taken_over_without_letting_an_unknown_stream_through() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let watched = seen.clone();
    let rig = rig_in(FakeMemory::plain(BASE, BYTES), FULL, |hardware, options| {
        hardware.mmio.set32(CR0, 0x1f);
        hardware.mmio.set32(0x24, 0x1f);
        options.preserve = vec![
            Preserved { stream: StreamId(0x10), regions: Vec::new() },
            Preserved {
                stream: StreamId(0x20),
                regions: vec![DirectRegion { start: Iova(0x4000_0000), len: 0x20_0000, prot: Prot::RW }],
            },
        ];
        let watch = move |now: &hardware::Configuration<'_>, _| {
            let enabled = now.registers.get32(0x24) & 1 != 0;
            watched.lock().push((enabled, now.ste(0x10), now.ste(0x20), now.ste(0x11)));
        };
        hardware.inside.lock().watch = Some(alloc::boxed::Box::new(watch));
    });
    assert!(rig.smmu.was_enabled());
    let log = rig.hardware.take();
    // Before anything else, what is not translated aborts.
    assert_eq!(log[..2], [Did::Write(GBPA, 1 << 31 | 1 << 20), Did::Write(CR0, 0)]);
    assert_eq!(log.last(), Some(&Did::Write(CR0, 0x1f)));
    // Until translation was on again, it was off; and then the two streams were ready.
    assert!(seen.lock().iter().all(|(enabled, ..)| !enabled));
    assert_eq!((rig.hardware.config(0x10), rig.hardware.config(0x20)), (Some(4), Some(5)));
    assert_eq!(rig.hardware.config(0x11), Some(0));
    assert_eq!(rig.hardware.config(0x2000), None, "no array: C_BAD_STREAMID");
    assert_eq!(rig.smmu.stream_domain(StreamId(0x20)), Some(DomainKind::Stage1));

    // A device that claims them keeps them going until it has a domain of its own.
    let master = rig.master(&[0x20], SUBSTREAMS);
    assert_eq!(rig.hardware.config(0x20), Some(5));
    let ptr = rig.hardware.look(0x20, None).0[0];
    let domain = rig.stage1();
    rig.smmu.attach(&master, &domain).unwrap();
    assert_ne!(rig.hardware.look(0x20, None).0[0], ptr);
    rig.smmu.remove_master(master).unwrap();
    assert_eq!(rig.hardware.config(0x20), Some(0));
    drop(domain);
    rig.end();
}

#[test]
fn a_stream_without_entry_gets_one_that_aborts_although_its_level_1_descriptor_was_cached() {
    let rig = rig();
    assert_eq!(rig.hardware.config(0x1234), None);
    let master = rig.master(&[0x1234], MasterOptions::default());
    assert_eq!(rig.hardware.commands(), [(0x1234_0000_0003, 0), (0x46, 0)]);
    assert_eq!(rig.hardware.config(0x1234), Some(0));
    assert_eq!(rig.hardware.config(0x12ff), Some(0), "the whole array aborts");
    rig.smmu.remove_master(master).unwrap();
    rig.end();
}

#[test]
fn streams_that_cannot_be_entered_are_refused_and_nothing_stays() {
    let rig = rig();
    let add = |streams: &[StreamMatch]| {
        rig.smmu.add_master(streams, MasterOptions::default()).map(drop).unwrap_err()
    };
    assert_eq!(add(&[]), Error::NoStream);
    let range = Error::StreamRange { stream: StreamId(0x1_0000), bits: 16 };
    assert_eq!(add(&[StreamMatch::exact(5), StreamMatch::exact(0x1_0000)]), range);
    let mask = Error::StreamMask { stream: StreamId(8), mask: 7 };
    assert_eq!(add(&[StreamMatch::masked(8, 7)]), mask);
    let first = rig.master(&[5], SUBSTREAMS);
    assert_eq!(
        add(&[StreamMatch::exact(6), StreamMatch::exact(5)]),
        Error::StreamOptions { stream: StreamId(5) }
    );
    assert_eq!(rig.smmu.stream_domain(StreamId(6)), None);
    // With the same options a stream can be shared.
    let second = rig.master(&[5], SUBSTREAMS);
    let domain = rig.stage1();
    rig.smmu.attach(&first, &domain).unwrap();
    rig.smmu.remove_master(first).unwrap();
    assert_eq!(rig.hardware.config(5), Some(5), "the other device goes on");
    rig.smmu.remove_master(second).unwrap();
    assert_eq!(rig.hardware.config(5), Some(0));
    drop(domain);
    rig.end();
}

#[test]
fn stage_1_writes_linux_fields_into_entry_and_descriptor() {
    let rig = rig();
    let master = rig.master(&[7], MasterOptions::default());
    let domain = rig.stage1();
    rig.smmu.attach(&master, &domain).unwrap();
    let (ste, cd) = rig.hardware.look(7, None);
    assert_eq!(config(&ste), 5);
    // S1DSS 2, S1CIR and S1COR write-back, S1CSH inner, no stalls; not translated ones get no attributes.
    assert_eq!(ste[1], 2 | 1 << 2 | 1 << 4 | 3 << 6 | 1 << 27);
    assert_eq!((field(ste[0], 5, 4), field(ste[0], 63, 59)), (0, 0), "one descriptor");
    assert_eq!(ste[2..], [0; 6]);
    let root = domain.table_root().unwrap();
    assert_eq!(ttb0(&cd), root.ttbr0.get());
    assert_eq!(asid(&cd), 1);
    // T0SZ 16, 4K, write-back inner shareable walks, EPD1, V, IPS 48 bits, AA64, R, A, ASET; no S.
    let low = 16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31;
    assert_eq!(cd[0] & 0x0000_ffff_ffff_ffff, low | 5 << 32 | 1 << 41 | 1 << 45 | 1 << 46 | 1 << 47);
    assert_eq!(cd[3], 0xf404_ff44);
    rig.smmu.remove_master(master).unwrap();
    drop(domain);
    rig.end();
}

#[test]
fn changing_between_stage_1_domains_is_one_word_and_one_sync() {
    let rig = rig();
    let master = rig.master(&[7], MasterOptions::default());
    let (first, second) = (rig.stage1(), rig.stage1());
    rig.smmu.attach(&master, &first).unwrap();
    rig.hardware.look(7, None);
    rig.hardware.take();
    rig.smmu.attach(&master, &second).unwrap();
    assert_eq!(rig.hardware.commands(), [(7 << 32 | 3, 1), (0x46, 0)]);
    let (_, cd) = rig.hardware.look(7, None);
    assert_eq!((ttb0(&cd), asid(&cd)), (second.table_root().unwrap().ttbr0.get(), 2));
    assert_eq!((first.users(), second.users().len()), (vec![], 1));
}

#[test]
fn every_kind_of_domain_follows_every_other() {
    let memories: [(FakeMemory, u32); 4] = [
        (FakeMemory::plain(BASE, BYTES), COHACC),
        (FakeMemory::reordering(BASE, BYTES, 7), COHACC),
        (FakeMemory::non_coherent(BASE, BYTES), 0),
        (FakeMemory::non_coherent_reordering(BASE, BYTES, 9), 0),
    ];
    for (memory, cohacc) in memories {
        let ids = [FULL[0] & !COHACC | cohacc, FULL[1], FULL[2], FULL[3]];
        let rig = rig_in(memory, ids, |_, _| ());
        for options in [MasterOptions::default(), SUBSTREAMS, ATS] {
            let parent = rig.stage2();
            let kinds: Vec<(u64, Arc<TestDomain>)> = vec![
                (0, rig.domain(DomainConfig::Blocked)),
                (4, rig.domain(DomainConfig::Identity)),
                (5, rig.stage1()),
                (5, rig.stalling()),
                (6, rig.stage2()),
                (7, rig.domain(DomainConfig::Nested(parent.clone(), Paging::default()))),
                (
                    7,
                    rig.domain(DomainConfig::Guest(
                        parent.clone(),
                        GuestSte { dw0: 1 | 5 << 1 | (BASE + BYTES as u64 - 0x1000), dw1: 2 },
                    )),
                ),
                (6, rig.domain(DomainConfig::Guest(parent.clone(), GuestSte { dw0: 1 | 4 << 1, dw1: 0 }))),
                (0, rig.domain(DomainConfig::Guest(parent.clone(), GuestSte::default()))),
            ];
            let master = rig.master(&[3, 0x300], options);
            for (_, from) in &kinds {
                for (expected, to) in &kinds {
                    rig.smmu.attach(&master, from).unwrap();
                    rig.hardware.look(0x300, None);
                    rig.smmu.attach(&master, to).unwrap();
                    let (ste, cd) = rig.hardware.look(0x300, None);
                    assert_eq!((ste[0] & 1, config(&ste)), (1, *expected), "{from:?} to {to:?}");
                    if let Some(root) = to.table_root() {
                        assert_eq!(ttb0(&cd), root.ttbr0.get(), "{from:?} to {to:?}");
                        assert_eq!(asid(&cd), to.asid().unwrap().get().into());
                    }
                    if *expected >= 6 {
                        assert_eq!(Some(Vmid(ste[2] as u16)), to.vmid(), "{from:?} to {to:?}");
                    }
                    if *expected == 4 {
                        assert_eq!(ste[1..4], [1 << 44, 0, 0], "nothing is left over");
                    }
                    if *expected == 0 {
                        assert_eq!(ste[1..4], [0; 3], "nothing is left over");
                    }
                    assert_eq!(to.users().len(), 2, "{from:?} to {to:?}");
                }
            }
            rig.smmu.remove_master(master).unwrap();
        }
        rig.end();
    }
}

#[test]
fn stage_2_has_the_fields_of_linux() {
    let rig = rig();
    let master = rig.master(&[7], MasterOptions::default());
    let domain = rig.stage2();
    rig.smmu.attach(&master, &domain).unwrap();
    let (ste, _) = rig.hardware.look(7, None);
    assert_eq!((ste[0], ste[1]), (1 | 6 << 1, 1 << 44));
    assert_eq!(field(ste[2], 15, 0), 1, "VMID");
    // 48 bits in and out, 4K: T0SZ 16, SL0 2 (level 0).
    assert_eq!((field(ste[2], 37, 32), field(ste[2], 39, 38), field(ste[2], 50, 48)), (16, 2, 5));
    assert_eq!(ste[2] >> 51, 1 | 1 << 3 | 1 << 7, "S2AA64, S2PTW, S2R and nothing else");
    assert_eq!(domain.asid(), None);
    rig.smmu.remove_master(master).unwrap();
    drop(domain);
    rig.end();
}

#[test]
fn nested_descriptor_and_tables_are_mapped_in_the_parent() {
    let rig = rig();
    let master = rig.master(&[7], MasterOptions::default());
    let parent = rig.stage2();
    let nested = rig.domain(DomainConfig::Nested(parent.clone(), Paging::default()));
    rig.smmu.attach(&master, &nested).unwrap();
    nested.map(Iova(0x7000_0000), Pa(0x4000_0000), 0x1000, Prot::RW).unwrap();
    let (ste, cd) = rig.hardware.look(7, None);
    let context = ste[0] & 0x00ff_ffff_ffff_ffc0;
    assert_eq!(parent.iova_to_phys(Iova(context)), Some(Pa(context)));
    assert_eq!(parent.iova_to_phys(Iova(ttb0(&cd))), Some(Pa(ttb0(&cd))));
    assert_eq!(nested.iova_to_phys(Iova(0x7000_0000)), None, "the parent does not map it yet");
    parent.map(Iova(0x4000_0000), Pa(0x9000_0000), 0x1000, Prot::RW).unwrap();
    assert_eq!(nested.iova_to_phys(Iova(0x7000_0010)), Some(Pa(0x9000_0010)));
    rig.smmu.remove_master(master).unwrap();
    drop((nested, parent));
    rig.end();
}

#[test]
fn nesting_wants_a_stage_2_of_the_same_smmu() {
    let (rig, other) = (rig(), rig_in(FakeMemory::plain(BASE, BYTES), FULL, |_, _| ()));
    let make = |parent| {
        let config = DomainConfig::Nested(parent, Paging::default());
        rig.smmu.new_domain(config, DomainOptions::default()).map(drop)
    };
    assert_eq!(make(rig.stage1()), Err(Error::Parent { kind: DomainKind::Stage1 }));
    assert_eq!(make(other.stage2()), Err(Error::Parent { kind: DomainKind::Stage2 }));
    let master = rig.master(&[1], MasterOptions::default());
    assert_eq!(rig.smmu.attach(&master, &other.stage1()), Err(Error::OtherInstance));
    let guest = |dw0, dw1| {
        let config = DomainConfig::Guest(rig.stage2(), GuestSte { dw0, dw1 });
        rig.smmu.new_domain(config, DomainOptions::default()).map(drop)
    };
    assert_eq!(guest(1 | 5 << 1, 1 << 44), Err(Error::GuestEntry { word: 1, bits: 1 << 44 }));
    assert_eq!(guest(1 | 6 << 1, 0), Err(Error::GuestEntry { word: 0, bits: 2 << 1 }));
    assert_eq!(guest(1 | 7 << 1, 0), Err(Error::GuestEntry { word: 0, bits: 2 << 1 }));
    assert_eq!(guest(1 | 5 << 1 | 1 << 56, 0), Err(Error::GuestEntry { word: 0, bits: 1 << 56 }));
    assert_eq!(guest(1 | 5 << 1 | 21 << 59, 0), Err(Error::GuestEntry { word: 0, bits: 21 << 59 }));
}

#[test]
fn three_processes_on_one_device_and_one_exits() {
    for (memory, cohacc) in
        [(FakeMemory::plain(BASE, BYTES), COHACC), (FakeMemory::non_coherent_reordering(BASE, BYTES, 3), 0)]
    {
        let ids = [FULL[0] & !COHACC | cohacc, FULL[1], FULL[2], FULL[3]];
        let rig = rig_in(memory, ids, |_, _| ());
        let master = rig.master(&[9], SUBSTREAMS);
        let kernel = rig.stage1();
        rig.smmu.attach(&master, &kernel).unwrap();
        let processes = [rig.process(), rig.process(), rig.process()];
        // Far apart, so that the third has a leaf of its own; the SMMU has looked there before.
        let substreams = [SubstreamId(1), SubstreamId(2), SubstreamId(0x1_2345)];
        rig.hardware.look(9, Some(0x1_2345));
        for (substream, (_, domain)) in substreams.iter().zip(&processes) {
            rig.smmu.attach_substream(&master, *substream, domain).unwrap();
        }
        let root = |index: usize| processes[index].1.table_root().unwrap().ttbr0.get();
        for (index, substream) in substreams.iter().enumerate() {
            let (ste, cd) = rig.hardware.look(9, Some(substream.get()));
            assert_eq!((config(&ste), field(ste[0], 5, 4), field(ste[0], 63, 59)), (5, 2, 20));
            assert_eq!(ttb0(&cd), root(index));
            assert_eq!(field(cd[0], 46, 44), 0b111, "stalls, records, aborts");
        }
        let (_, second) = &processes[1];
        let invalid = Arc::new(Mutex::new(0));
        rig.hardware.take();
        second.stop_walks().unwrap();
        let commands = rig.hardware.commands();
        assert_eq!(
            commands.iter().filter(|(first, _)| *first as u8 == 0x05).count(),
            2,
            "hitless: two steps"
        );
        assert_eq!(commands[commands.len() - 2].0, u64::from(second.asid().unwrap().get()) << 48 | 0x11);
        let (_, cd) = rig.hardware.look(9, Some(2));
        assert_eq!((cd[0] >> 31 & 1, cd[0] >> 14 & 1, ttb0(&cd), field(cd[0], 46, 44)), (1, 1, 0, 0b100));
        for index in [0, 2] {
            assert_eq!(ttb0(&rig.hardware.look(9, Some(substreams[index].get())).1), root(index));
        }
        assert_eq!(ttb0(&rig.hardware.look(9, None).1), kernel.table_root().unwrap().ttbr0.get());
        drop(invalid);
        for substream in substreams {
            rig.smmu.detach_substream(&master, substream).unwrap();
            assert_eq!(rig.hardware.look(9, Some(substream.get())).1, [0; 8]);
        }
        rig.smmu.remove_master(master).unwrap();
        drop((processes, kernel));
        rig.end();
    }
}

#[test]
fn substreams_work_next_to_a_bypassing_or_blocked_stream() {
    let rig = rig();
    let master = rig.master(&[9], SUBSTREAMS);
    let (identity, kernel) = (rig.domain(DomainConfig::Identity), rig.stage1());
    let (table, process) = rig.process();
    let root = process.table_root().unwrap().ttbr0.get();
    rig.smmu.attach(&master, &identity).unwrap();
    rig.smmu.attach_substream(&master, SubstreamId(1), &process).unwrap();
    let (ste, cd) = rig.hardware.look(9, Some(1));
    assert_eq!((config(&ste), ste[1] & 3, ttb0(&cd)), (5, 1, root), "S1DSS bypasses");
    assert_eq!(field(ste[1], 45, 44), 1, "with its own attributes");
    // From bypass to the descriptor of a domain, and to nothing, under a substream in use.
    rig.smmu.attach(&master, &kernel).unwrap();
    let (ste, cd) = rig.hardware.look(9, None);
    assert_eq!((ste[1] & 3, ttb0(&cd)), (2, kernel.table_root().unwrap().ttbr0.get()));
    rig.smmu.detach(&master).unwrap();
    let (ste, cd) = rig.hardware.look(9, Some(1));
    assert_eq!((config(&ste), ste[1] & 3, ttb0(&cd)), (5, 0, root), "S1DSS terminates");
    assert_eq!(rig.hardware.look(9, None).1, [0; 8]);
    let stage2 = rig.stage2();
    let refused = Error::SubstreamsBelow { stream: StreamId(9), kind: DomainKind::Stage2 };
    assert_eq!(rig.smmu.attach(&master, &stage2), Err(refused));
    rig.smmu.attach(&master, &identity).unwrap();
    rig.smmu.detach_substream(&master, SubstreamId(1)).unwrap();
    assert_eq!(rig.hardware.look(9, None).0[..2], [1 | 4 << 1, 1 << 44], "a plain bypass again");
    rig.smmu.attach(&master, &stage2).unwrap();
    assert_eq!(rig.smmu.attach_substream(&master, SubstreamId(1), &process), Err(refused));
    rig.smmu.remove_master(master).unwrap();
    drop((identity, kernel, process, table, stage2));
    rig.end();
}

#[test]
fn substreams_that_cannot_be_are_refused() {
    let rig = rig();
    let (plain, few) = (
        rig.master(&[1], MasterOptions::default()),
        rig.master(&[2], MasterOptions { substream_bits: 4, ..MasterOptions::default() }),
    );
    let domain = rig.stage1();
    let attach = |master, id| rig.smmu.attach_substream(master, SubstreamId(id), &domain);
    let range = |stream, id, bits| {
        Err(Error::SubstreamRange { stream: StreamId(stream), substream: SubstreamId(id), bits })
    };
    assert_eq!(attach(&plain, 1), range(1, 1, 0));
    assert_eq!(attach(&few, 16), range(2, 16, 4));
    assert_eq!(attach(&few, 0), range(2, 0, 4), "descriptor 0 is for transactions without a substream");
    attach(&few, 15).unwrap();
    let stage2 = rig.stage2();
    let refused = rig.smmu.attach_substream(&few, SubstreamId(3), &stage2);
    assert_eq!(refused, Err(Error::NotForSubstreams { kind: DomainKind::Stage2 }));
    assert_eq!((rig.smmu.substream_bits(&plain), rig.smmu.substream_bits(&few)), (Ok(0), Ok(4)));
}

#[test]
fn a_domain_that_goes_blocks_its_streams_and_frees_its_tag_last() {
    let rig = rig();
    let masters = [rig.master(&[1], MasterOptions::default()), rig.master(&[2], SUBSTREAMS)];
    let domain = rig.stage1();
    for master in &masters {
        rig.smmu.attach(master, &domain).unwrap();
    }
    rig.smmu.attach_substream(&masters[1], SubstreamId(5), &domain).unwrap();
    assert_eq!(domain.users().len(), 3);
    domain.map(Iova(0x1000), Pa(0x9000_0000), 0x1000, Prot::RW).unwrap();
    rig.hardware.look(2, Some(5));
    let tags = rig.smmu.tags_in_use();
    rig.hardware.take();
    drop(domain);
    let last = rig.hardware.commands();
    assert_eq!(last[last.len() - 2..], [(1 << 48 | 0x11, 0), (0x46, 0)], "TLBI_NH_ASID is the last");
    for stream in [1, 2] {
        assert_eq!(rig.hardware.config(stream), Some(0));
    }
    assert_eq!(rig.hardware.look(2, Some(5)).1, [0; 8]);
    assert_eq!((tags, rig.smmu.tags_in_use()), ((1, 0), (0, 0)));
    assert_eq!(rig.stage1().asid(), Some(Asid(1)), "and may be used again");
    for master in masters {
        rig.smmu.remove_master(master).unwrap();
    }
    rig.end();
}

#[test]
fn what_an_smmu_does_not_confirm_is_not_freed() {
    let rig = rig();
    let master = rig.master(&[1], MasterOptions::default());
    let domain = rig.stage1();
    rig.smmu.attach(&master, &domain).unwrap();
    domain.map(Iova(0x1000), Pa(0x9000_0000), 0x1000, Prot::RW).unwrap();
    rig.hardware.inside.lock().stopped = true;
    let error = domain.unmap(Iova(0x1000), 0x1000).unwrap_err();
    let Error::CommandQueue { what, waited_us, seen } = error else { panic!("{error}") };
    assert!(what.contains("CMD_SYNC") && waited_us >= 1000, "{error}");
    assert_ne!(seen.prod, seen.cons);
    let before = rig.memory.outstanding();
    let (_, table) = (domain.table_count(), domain.table_root().unwrap().ttbr0);
    drop(domain);
    // Its entry is invalid or aborts, and the tables stay.
    assert!(rig.memory.outstanding() >= before - 1, "tables were freed");
    assert_eq!(rig.memory.uses_after_free(), 0);
    assert_eq!(rig.memory.load64(table), rig.memory.device_load64(table));
    rig.hardware.inside.lock().stopped = false;
    assert_eq!(rig.smmu.tags_in_use().0, 1, "the ASID is given up");
    assert_eq!(rig.stage1().asid(), Some(Asid(2)));
}

#[test]
fn an_smmu_that_does_not_answer_is_an_error_with_the_register() {
    let memory = Arc::new(FakeMemory::plain(BASE, BYTES));
    let hardware = Hardware::new(memory.clone(), FULL);
    hardware.inside.lock().deaf = true;
    hardware.mmio.set32(0x24, 1);
    let options = Options { timeout_us: 50, ..Options::new(WINDOW) };
    let error = SmmuV3::probe(hardware.mmio.clone(), memory, Arc::new(FakeClock::new()), options)
        .map(drop)
        .unwrap_err();
    let ProbeError::Reset(Error::Register(timeout)) = error else { panic!("{error}") };
    assert_eq!((timeout.what, timeout.seen), ("CR0ACK == CR0", 1));
}

#[test]
fn overrides_are_one_word_and_survive_attaches() {
    let rig = rig();
    let master = rig.master(&[1], MasterOptions::default());
    let (domain, identity) = (rig.stage1(), rig.domain(DomainConfig::Identity));
    rig.smmu.attach(&master, &domain).unwrap();
    rig.hardware.take();
    let overrides = StreamOverrides { privileged: Some(true), instruction: Some(false) };
    rig.smmu.set_overrides(&master, overrides).unwrap();
    assert_eq!(rig.hardware.commands().len(), 2);
    let code = |ste: Words| (field(ste[1], 49, 48), field(ste[1], 51, 50));
    assert_eq!(code(rig.hardware.look(1, None).0), (3, 2));
    rig.smmu.attach(&master, &identity).unwrap();
    assert_eq!(code(rig.hardware.look(1, None).0), (3, 2));
    rig.smmu.set_overrides(&master, StreamOverrides::default()).unwrap();
    assert_eq!(code(rig.hardware.look(1, None).0), (0, 0));
}

#[test]
fn stalls_follow_the_device_the_domain_and_the_hardware() {
    // STALL_MODEL, may the device stall, does the domain want it: S1STALLD, CD.S.
    let cases = [
        (0, false, false, 1, 0),
        (0, true, false, 0, 0),
        (0, true, true, 0, 1),
        (0, false, true, 1, 0),
        (1, true, true, 0, 0),
        (2, false, false, 0, 1),
        (2, true, true, 0, 1),
    ];
    for (model, can_stall, wanted, s1stalld, s) in cases {
        let ids = [FULL[0] | model << 24, FULL[1], FULL[2], FULL[3]];
        let rig = rig_in(FakeMemory::plain(BASE, BYTES), ids, |_, _| ());
        let master = rig.master(&[1], MasterOptions { can_stall, ..MasterOptions::default() });
        let domain = if wanted { rig.stalling() } else { rig.stage1() };
        rig.smmu.attach(&master, &domain).unwrap();
        let (ste, cd) = rig.hardware.look(1, None);
        assert_eq!((ste[1] >> 27 & 1, cd[0] >> 44 & 1), (s1stalld, s), "model {model}");
    }
}

#[test]
fn a_shared_domain_has_one_descriptor_for_devices_that_stall_and_one_for_others() {
    let rig = rig();
    let stall = MasterOptions { can_stall: true, ..MasterOptions::default() };
    let masters =
        [rig.master(&[1], stall), rig.master(&[2], MasterOptions::default()), rig.master(&[3], stall)];
    let domain = rig.stalling();
    for master in &masters {
        rig.smmu.attach(master, &domain).unwrap();
    }
    let context = |stream| rig.hardware.look(stream, None).0[0] & 0x00ff_ffff_ffff_ffc0;
    assert_eq!(context(1), context(3));
    assert_ne!(context(1), context(2));
    for (stream, s) in [(1, 1), (2, 0), (3, 1)] {
        let (_, cd) = rig.hardware.look(stream, None);
        assert_eq!((cd[0] >> 44 & 1, asid(&cd)), (s, 1));
    }
    // Ending its walks reaches all of them.
    domain.stop_walks().unwrap();
    for stream in [1, 2, 3] {
        assert_eq!(rig.hardware.look(stream, None).1[0] >> 14 & 1, 1, "EPD0 of stream {stream}");
    }
}

#[test]
fn asids_of_processes_are_shared_by_table_and_refused_otherwise() {
    let rig = rig();
    let (table, _domain) = rig.process();
    let root = TableRoot::from_registers(&table.registers(), Granule::K4);
    let make = |root, asid| {
        let root = TableRoot { asid: Some(Asid(asid)), ..root };
        rig.smmu.new_domain(DomainConfig::Process(root), DomainOptions::default())
    };
    let first = make(root, 77).unwrap();
    let second = make(root, 77).unwrap();
    assert_eq!((first.asid(), second.asid()), (Some(Asid(77)), Some(Asid(77))));
    let other = TableRoot { ttbr0: Pa(0x4000), ..root };
    assert_eq!(make(other, 77).map(drop), Err(Error::AsidInUse { asid: Asid(77) }));
    drop(first);
    assert_eq!(make(other, 77).map(drop), Err(Error::AsidInUse { asid: Asid(77) }));
    drop(second);
    make(other, 77).unwrap();
}

#[test]
fn tags_run_out_with_an_error() {
    let ids = [FULL[0] & !(1 << 12), FULL[1], FULL[2], FULL[3]];
    let rig = rig_in(FakeMemory::plain(BASE, BYTES), ids, |_, _| ());
    let domains: Vec<_> = (1..256).map(|_| rig.stage1()).collect();
    assert_eq!(domains.last().unwrap().asid(), Some(Asid(255)));
    let make = || rig.smmu.new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default());
    assert_eq!(make().map(drop), Err(Error::NoIdentifier { what: "ASIDs", count: 255 }));
    drop(domains);
    make().unwrap();
}

#[test]
fn memory_that_runs_out_leaves_everything_as_it_was() {
    let rig = rig();
    let master = rig.master(&[1], SUBSTREAMS);
    let (first, second) = (rig.stage1(), rig.stage1());
    let plain = rig.master(&[2], MasterOptions::default());
    rig.smmu.attach(&plain, &first).unwrap();
    rig.memory.fail_after(0);
    assert!(matches!(rig.smmu.attach(&master, &first), Err(Error::NoMemory { .. })));
    assert!(matches!(rig.smmu.attach(&plain, &second), Err(Error::NoMemory { .. })));
    assert!(matches!(
        rig.smmu.attach_substream(&master, SubstreamId(4), &first),
        Err(Error::NoMemory { .. })
    ));
    assert_eq!(rig.hardware.config(1), Some(0));
    assert_eq!(ttb0(&rig.hardware.look(2, None).1), first.table_root().unwrap().ttbr0.get());
    assert_eq!((first.users().len(), second.users().len()), (1, 0));
    rig.memory.fail_never();
    rig.smmu.attach(&master, &first).unwrap();
    for master in [master, plain] {
        rig.smmu.remove_master(master).unwrap();
    }
    drop((first, second));
    rig.end();
}

#[test]
fn resume_programs_everything_again() {
    let rig = rig();
    let master = rig.master(&[7], MasterOptions::default());
    let domain = rig.stage1();
    rig.smmu.attach(&master, &domain).unwrap();
    assert_eq!(rig.smmu.shutdown(), Ok(true));
    assert_eq!((rig.hardware.mmio.get32(CR0), rig.hardware.mmio.get32(GBPA)), (0, 1 << 20));
    for offset in (0x20..0x100).step_by(4) {
        rig.hardware.mmio.set32(offset, 0);
    }
    rig.smmu.resume().unwrap();
    assert_eq!(rig.hardware.mmio.get32(CR0), 0x1f);
    assert_eq!(rig.hardware.config(7), Some(5));
    domain.map(Iova(0x1000), Pa(0x9000_0000), 0x1000, Prot::RW).unwrap();
    assert_eq!(domain.unmap(Iova(0x1000), 0x1000), Ok(0x1000));
    rig.smmu.remove_master(master).unwrap();
    drop(domain);
    rig.end();
}

#[test]
fn while_the_smmu_is_off_nothing_waits_for_it() {
    let rig = rig();
    let master = rig.master(&[7], ATS);
    let (first, second) = (rig.stage1(), rig.stage1());
    rig.smmu.attach(&master, &first).unwrap();
    first.map(Iova(0x1000), Pa(0x9000_0000), 0x1000, Prot::RW).unwrap();
    rig.smmu.shutdown().unwrap();
    rig.hardware.take();
    assert_eq!(first.unmap(Iova(0x1000), 0x1000), Ok(0x1000));
    rig.smmu.attach(&master, &second).unwrap();
    drop(first);
    assert!(rig.hardware.commands().is_empty());
    // An error that is left over does not keep the queue from running.
    rig.hardware.mmio.set32(0x60, 1);
    rig.smmu.resume().unwrap();
    assert_eq!(rig.hardware.mmio.get32(0x64), 1);
    assert_eq!(ttb0(&rig.hardware.look(7, None).1), second.table_root().unwrap().ttbr0.get());
}

#[test]
fn interrupts_go_where_they_are_told() {
    let rig = rig_in(FakeMemory::plain(BASE, BYTES), FULL, |_, options| {
        let target = |data| Some(MsiTarget { address: 0x0808_0040, data });
        options.msi = Some(MsiTargets { events: target(11), requests: None, gerror: target(12) });
    });
    let mmio = &rig.hardware.mmio;
    assert_eq!((mmio.get64(0xb0), mmio.get32(0xb8), mmio.get32(0xbc)), (0x0808_0040, 11, 1));
    assert_eq!((mmio.get64(0x68), mmio.get32(0x70)), (0x0808_0040, 12));
    assert_eq!(mmio.get64(0xd0), 0);
}

#[test]
fn el2_streams_use_their_own_world_and_commands() {
    let rig = rig_in(FakeMemory::plain(BASE, BYTES), FULL, |_, options| options.el2 = true);
    assert_eq!(rig.hardware.mmio.get32(0x2c), 0x7, "CR2.E2H");
    let master = rig.master(&[1], MasterOptions::default());
    let domain = rig.stage1();
    rig.smmu.attach(&master, &domain).unwrap();
    assert_eq!(field(rig.hardware.look(1, None).0[1], 31, 30), 2);
    rig.hardware.take();
    domain.invalidate_all().unwrap();
    assert_eq!(rig.hardware.commands(), [(1 << 48 | 0x21, 0), (0x46, 0)]);
}
