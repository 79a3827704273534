//! Tables that `pgtable` builds, read by the walker of an SMMU that got the table's register values: the two independent
//! readings of one format have to agree, byte by byte.

use std::sync::Arc;

use portcullis_arch::attrs::{MemoryType, Shareability};
use portcullis_arch::smmuv2::offset::{cb, gr0, gr1};
use portcullis_arch::smmuv2::{CbType, Cbar, Cr0, Fsr, Fsynr0, Sctlr, Tcr2};
use portcullis_arch::{Access, Attributes, Iova, Pa, StreamId};
use portcullis_board::sim::{Memory, Pool};
use portcullis_bus::{Initiator, Mmio as _, SystemMemory, View};
use portcullis_pgtable::{
    Concatenation, Config, Granule, Half, InputAddress as _, MapError, MemoryKind, NoFlush, PageTable, Prot,
    Stage, Stage1, Stage2,
};
use portcullis_smmuv2::{Interrupts, Port, SmmuV2, Window};
use portcullis_walk::{FaultOutcome, Translated};
use proptest::collection::vec;
use proptest::prelude::*;

const TABLES: u64 = 0x8000_0000;
const TABLES_ORDER: u32 = 25;
const STREAM: StreamId = StreamId(5);
const BANK: u64 = 2;

/// An SMMU with all granules and one stream in one bank.
struct Rig {
    memory: SystemMemory,
    window: Window<SystemMemory>,
    port: Port<SystemMemory>,
    banks: u64,
}

/// PASize; addresses are sign-extended from the upstream bus's size on; 16-bit ASIDs.
fn tcr2(ips: u8) -> u32 {
    Tcr2::new().with_pasize(ips).with_sep(7).with_as16(true).into_bits()
}

impl Rig {
    fn new(coherent: bool) -> (Self, Memory) {
        // The cache model makes a forgotten clean visible, at every size of line and table.
        let memory = SystemMemory::with_cpu_cache(&[(TABLES, 1 << TABLES_ORDER)], 4096).unwrap();
        let view = if coherent { View::Coherent } else { View::NonCoherent };
        let config = portcullis_smmuv2::Config { coherent_walk: coherent, ..Default::default() };
        let banks = config.window_size() / 2;
        let smmu = SmmuV2::new(config, memory.view(view, "walker"), Interrupts::default()).unwrap();
        let (window, port) = (smmu.window(false), smmu.port(memory.clone()));
        let pool = Arc::new(Pool::new(Pa(TABLES), TABLES_ORDER));
        let tables = Memory::new(memory.clone(), pool);
        (Self { memory, window, port, banks }, tables)
    }

    fn write(&self, offset: usize, value: u32) {
        self.window.write32(offset as u64, value).unwrap();
    }
    fn bank(&self, offset: usize) -> u64 {
        self.banks + BANK * 0x1000 + offset as u64
    }
    fn write_bank(&self, offset: usize, value: u32) {
        self.window.write32(self.bank(offset), value).unwrap();
    }
    fn write_bank64(&self, offset: usize, value: u64) {
        self.window.write64(self.bank(offset), value).unwrap();
    }

    /// Gives the bank its type, which decides what its other registers are.
    fn begin(&self, cbar: Cbar) {
        self.write(0x1000 + gr1::CBA2R + 4 * BANK as usize, 1);
        self.write(0x1000 + gr1::CBAR + 4 * BANK as usize, cbar.into_bits());
    }

    /// Switches the bank on, and points the stream at it.
    fn start(&self) {
        // HUPCF: the next transaction does not wait for the fault record to be cleared.
        let sctlr = Sctlr::new().with_m(true).with_tre(true).with_afe(true).with_cfre(true).with_hupcf(true);
        self.write_bank(cb::SCTLR, sctlr.into_bits());
        self.write(gr0::S2CR, BANK as u32);
        self.write(gr0::SMR, 0x8000_0000 | STREAM.get());
        self.write(gr0::CR0, Cr0::new().with_usfcfg(true).with_gfre(true).into_bits());
    }

    fn stage1(&self, table: &PageTable<Stage1, Memory>) {
        let r = table.registers();
        // EPD of the other half.
        let (ttbr, epd) = match r.half {
            Half::Lower => (cb::TTBR0, 1 << 23),
            Half::Upper => (cb::TTBR1, 1 << 7),
        };
        // Stage 1 with a bypassed stage 2 that adds nothing: write-back, non-shareable.
        let cbar = Cbar::new().with_type_code(CbType::Stage1Bypass as u8);
        self.begin(cbar.with_memattr(0xf).with_bpshcfg(3));
        self.write_bank(cb::TCR2, tcr2(r.ips));
        self.write_bank(cb::TCR, r.tcr() | epd);
        self.write_bank64(ttbr, r.ttbr.get());
        self.write_bank(cb::MAIR0, r.mair as u32);
        self.write_bank(cb::MAIR1, (r.mair >> 32) as u32);
        self.start();
    }

    fn stage2(&self, table: &PageTable<Stage2, Memory>) {
        let r = table.registers();
        self.begin(Cbar::new().with_type_code(CbType::Stage2 as u8).with_vmid(7));
        self.write_bank(cb::TCR, r.vtcr());
        self.write_bank64(cb::TTBR0, r.vttbr.get());
        self.start();
    }

    fn go(&mut self, at: u64, access: Access, attrs: Attributes) -> Result<Translated, FaultOutcome> {
        self.port.translate(&Initiator::new(STREAM).with_attrs(attrs), Iova(at), access)
    }

    /// Kind and level of the recorded fault, which is cleared.
    fn fault(&self) -> (Fsr, u8) {
        let fsr = Fsr::from_bits(self.window.read32(self.bank(cb::FSR)).unwrap());
        let syndrome = Fsynr0::from_bits(self.window.read32(self.bank(cb::FSYNR0)).unwrap());
        self.write_bank(cb::FSR, fsr.into_bits());
        (fsr, syndrome.plvl())
    }
}

/// What both stages' tests need to know about a stage.
trait Checked: Stage {
    const PROTS: [Prot<Self>; 5];
    fn allows(prot: &Prot<Self>, access: Access, attrs: Attributes) -> bool;
}

impl Checked for Stage1 {
    const PROTS: [Prot<Self>; 5] = [
        Prot::RW.cached(),
        Prot::READ.noexec(),
        Prot::RW.privileged().noexec(),
        Prot::READ.device().privileged(),
        Prot::WRITE.cached().noexec(),
    ];
    fn allows(prot: &Prot<Self>, access: Access, attrs: Attributes) -> bool {
        let open = attrs.privileged() || !prot.is_privileged();
        match access {
            // There is no write-only page at stage 1.
            Access::Write => open && prot.write,
            // What unprivileged software can write, privileged software never executes (DDI 0487, AP = 01). To execute is
            // a right of its own: pages that unprivileged accesses may not read can be executable for them.
            Access::Read if attrs.instruction() => {
                prot.execute && !(attrs.privileged() && prot.write && !prot.is_privileged())
            }
            Access::Read => open,
        }
    }
}

impl Checked for Stage2 {
    const PROTS: [Prot<Self>; 5] = [
        Prot::RW.cached(),
        Prot::READ.cached().noexec(),
        Prot::WRITE.noexec(),
        Prot::RW.device(),
        Prot::RW.noexec(),
    ];
    fn allows(prot: &Prot<Self>, access: Access, attrs: Attributes) -> bool {
        match access {
            Access::Write => prot.write,
            Access::Read if attrs.instruction() => prot.execute && prot.read,
            Access::Read => prot.read,
        }
    }
}

fn memory_type(kind: MemoryKind) -> (MemoryType, Shareability) {
    match kind {
        MemoryKind::NonCached => (MemoryType::NORMAL_NC, Shareability::Outer),
        MemoryKind::Cached => (MemoryType::NORMAL_WB, Shareability::Inner),
        MemoryKind::Device => (MemoryType::DEVICE_NGNRE, Shareability::Outer),
    }
}

/// The six kinds of access, writes of an "instruction" being data.
fn kinds() -> impl Iterator<Item = (Access, Attributes)> {
    let access = [(Access::Read, false), (Access::Read, true), (Access::Write, false)];
    [false, true].into_iter().flat_map(move |privileged| {
        access.map(|(access, fetch)| {
            (access, Attributes::DEVICE_DEFAULT.with_privileged(privileged).with_instruction(fetch))
        })
    })
}

/// One byte: lookup and walk agree on where it is, how far that holds, what is allowed and which memory it is.
fn byte_agrees<S: Checked>(rig: &mut Rig, table: &PageTable<S, Memory>, at: u64) {
    let Some(expected) = table.lookup(at.into()) else {
        let answer = rig.go(at, Access::Read, Attributes::DEVICE_DEFAULT);
        assert_eq!(answer, Err(FaultOutcome::Terminate { abort: true }), "{at:#x} is not mapped");
        let (fsr, level) = rig.fault();
        assert!(fsr.tf() && !fsr.pf() && !fsr.asf(), "{at:#x}: {fsr:?}");
        // Outside of the region the walk does not even begin.
        let inside = (table.input_range().0..=table.input_range().1).contains(&at.into());
        let levels = if inside { table.start_level()..=3 } else { 0..=0 };
        assert!(levels.contains(&level), "{at:#x}: level {level}");
        return;
    };
    for (access, attrs) in kinds() {
        let answer = rig.go(at, access, attrs);
        let what = || format!("{access} {at:#x} with {attrs:?} through {expected:x?}");
        if !S::allows(&expected.prot, access, attrs) {
            assert_eq!(answer, Err(FaultOutcome::Terminate { abort: true }), "{}", what());
            let (fsr, level) = rig.fault();
            assert!(fsr.pf() && !fsr.tf(), "{}: {fsr:?}", what());
            assert_eq!(level, expected.level, "{}", what());
            continue;
        }
        let answer = answer.unwrap_or_else(|e| panic!("{}: {e:?} {:?}", what(), rig.fault()));
        assert_eq!(answer.pa, expected.pa, "{}", what());
        assert_eq!(answer.left, expected.page_size - at % expected.page_size, "{}", what());
        let (memory, shareability) = memory_type(expected.prot.memory);
        assert_eq!(
            (answer.attrs.memory(), answer.attrs.shareability()),
            (memory, shareability),
            "{}",
            what()
        );
        assert_eq!(answer.attrs.privileged(), attrs.privileged());
    }
}

/// In pages of the granule.
#[derive(Clone, Debug)]
enum Call {
    Map { at: u64, pa: u64, pages: u64, prot: usize },
    Unmap { at: u64, pages: u64 },
    Protect { at: u64, pages: u64, prot: usize },
}

/// Near the places where tables and blocks of the 4K granule begin, and where those of 16K and 64K do.
fn place() -> impl Strategy<Value = u64> {
    let base =
        prop_oneof![4 => 0u64..4, 3 => Just(512), 2 => Just(2048), 1 => Just(8192), 1 => Just(1 << 18)];
    (base, prop_oneof![3 => Just(0u64), 2 => 0u64..20, 1 => 500u64..512]).prop_map(|(base, more)| base + more)
}

fn pages() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 1u64..8, 4 => (1u64..3).prop_map(|n| n * 512), 2 => Just(2048), 1 => Just(8192)]
}

fn call() -> impl Strategy<Value = Call> {
    let map =
        (place(), place(), any::<bool>(), pages(), 0usize..5).prop_map(|(at, other, same, pages, prot)| {
            // Long runs of single pages are slow, and no different.
            let same = same || pages > 2000;
            Call::Map { at, pa: if same { at + (1 << 19) } else { other }, pages, prot }
        });
    prop_oneof![
        6 => map,
        2 => (place(), pages()).prop_map(|(at, pages)| Call::Unmap { at, pages }),
        1 => (place(), pages(), 0usize..5).prop_map(|(at, pages, prot)| Call::Protect { at, pages, prot }),
    ]
}

/// Builds the table, then looks at the edges and some inner bytes of everything that was ever mapped.
fn compare<S: Checked>(config: Config<S>, calls: &[Call], start: impl Fn(&Rig, &PageTable<S, Memory>)) {
    let (mut rig, tables) = Rig::new(config.coherent_walk);
    let table = PageTable::new(tables, config).unwrap();
    start(&rig, &table);
    let granule = config.granule.size();
    let (first, last) = (table.input_range().0.get(), table.input_range().1.get());
    let mut interesting = vec![first, last];
    for call in calls {
        match *call {
            Call::Map { at, pa, pages, prot } => {
                let at = first.wrapping_add(at * granule);
                let result = table.map(at.into(), Pa(pa * granule), pages * granule, S::PROTS[prot]);
                let refused = matches!(
                    result,
                    Err(MapError::AlreadyMapped { .. }
                        | MapError::InputRange { .. }
                        | MapError::OutputRange { .. })
                );
                assert!(result.is_ok() || refused, "{result:?}");
                let end = at.wrapping_add(pages * granule);
                let inner = (0..8).map(|i| at.wrapping_add(pages * granule / 8 * i + i * 13));
                interesting.extend(inner);
                interesting.extend([at.wrapping_sub(1), end.wrapping_sub(1), end]);
            }
            Call::Unmap { at, pages } => {
                let _partial_blocks_are_refused =
                    table.unmap(first.wrapping_add(at * granule).into(), pages * granule, &mut NoFlush);
            }
            Call::Protect { at, pages, prot } => {
                let at = first.wrapping_add(at * granule).into();
                let _holes_are_refused = table.protect(at, pages * granule, S::PROTS[prot], &mut NoFlush);
            }
        }
    }
    interesting.sort_unstable();
    interesting.dedup();
    for at in interesting {
        byte_agrees(&mut rig, &table, at);
        // The neighbours inside of the same table fault at the level of that table.
        let Some(leaf) = table.lookup(at.into()) else { continue };
        let page = at & !(leaf.page_size - 1);
        let group = leaf.page_size << (config.granule.log2() - 3);
        for next in [page.wrapping_sub(leaf.page_size), page.wrapping_add(leaf.page_size)] {
            let same_table = next & !(group - 1) == at & !(group - 1) && (first..=last).contains(&next);
            let table_below =
                || (0..8).any(|i| table.lookup((next + leaf.page_size / 8 * i).into()).is_some());
            if same_table && !table_below() && table.lookup(next.into()).is_none() {
                assert!(rig.go(next, Access::Write, Attributes::DEVICE_DEFAULT).is_err());
                let (fsr, level) = rig.fault();
                assert!(fsr.tf());
                assert!(level >= leaf.level, "{next:#x}, beside {leaf:x?}: level {level}");
            }
        }
    }
    let (stale, _) = rig.memory.cpu_cache().unwrap().take_reports();
    assert!(stale.is_empty(), "the walker read old descriptors: {}", stale[0]);
}

fn granule() -> impl Strategy<Value = Granule> {
    prop_oneof![2 => Just(Granule::K4), 1 => Just(Granule::K16), 1 => Just(Granule::K64)]
}

/// Output sizes that hold the tables.
fn output_bits() -> impl Strategy<Value = u8> {
    prop_oneof![Just(32u8), Just(36), Just(40), Just(42), Just(44), Just(48)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn stage_1_tables_walk_as_they_look_up(
        granule in granule(), bits in 25u8..=48, output in output_bits(), upper in any::<bool>(),
        coherent in any::<bool>(), calls in vec(call(), 1..8),
    ) {
        let half = if upper { Half::Upper } else { Half::Lower };
        let config = Config::<Stage1>::new(granule, bits, output).half(half).coherent_walk(coherent);
        compare(config, &calls, |rig, table| rig.stage1(table));
    }

    #[test]
    fn stage_2_tables_walk_as_they_look_up(
        granule in granule(), bits in 32u8..=48, output in output_bits(), choice in 0usize..3, coherent in any::<bool>(),
        calls in vec(call(), 1..8),
    ) {
        let choice = [Concatenation::Linux, Concatenation::Forced, Concatenation::Never][choice];
        let config = Config::<Stage2>::new(granule, bits, output).coherent_walk(coherent);
        // Not every start level is legal for every size.
        let (_, tables) = Rig::new(coherent);
        let legal = PageTable::new(tables, config.concatenation(choice)).is_ok();
        let config = if legal { config.concatenation(choice) } else { config };
        compare(config, &calls, |rig, table| rig.stage2(table));
    }
}

#[test]
fn addresses_beside_a_page_fault_at_level_3_and_far_ones_at_the_level_where_the_walk_ends() {
    let (mut rig, tables) = Rig::new(true);
    let table = PageTable::new(tables, Config::<Stage1>::new(Granule::K4, 48, 48)).unwrap();
    rig.stage1(&table);
    table.map(Iova(0x4020_3000), Pa(0x1000), 0x1000, Prot::RW).unwrap();
    let levels = [
        (0x4020_2fff, 3),
        (0x4020_4000, 3),
        (0x4000_0000, 2),
        (0x4040_0000, 2),
        (0x0000_0000, 1),
        (0x8000_0000, 1),
        (0x80_0000_0000, 0),
        (0xffff_ffff_ffff, 0),
        // Outside of the region.
        (0x1_0000_0000_0000, 0),
    ];
    for (at, expected) in levels {
        assert!(rig.go(at, Access::Read, Attributes::DEVICE_DEFAULT).is_err());
        let (fsr, level) = rig.fault();
        assert!(fsr.tf() && level == expected, "{at:#x}: level {level} instead of {expected}, {fsr:?}");
    }
}

#[test]
fn an_output_wider_than_the_smmu_was_told_is_an_address_size_fault() {
    let (mut rig, tables) = Rig::new(true);
    let table = PageTable::new(tables, Config::<Stage1>::new(Granule::K4, 39, 48)).unwrap();
    table.map(Iova(0), Pa(0x1_0000_0000), 0x1000, Prot::RW).unwrap();
    rig.stage1(&table);
    assert!(rig.go(0, Access::Read, Attributes::DEVICE_DEFAULT).is_ok());
    // PASize 32 bits instead.
    rig.write_bank(cb::TCR2, tcr2(0));
    rig.write_bank(cb::TLBIALL, 0);
    assert!(rig.go(0, Access::Read, Attributes::DEVICE_DEFAULT).is_err());
    let (fsr, level) = rig.fault();
    assert!(fsr.asf() && level == 3, "{fsr:?} at level {level}");
}
