//! The driver against recorded register traffic: Linux's traces as data, and registers that behave.

use alloc::format;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

use portcullis_arch::{Access, Asid, Iova, Ipa, Pa, StreamId, Vmid};
use portcullis_hal::DmaMemory;
use portcullis_hal::fake::{FakeClock, FakeMemory, FakeMmio, MmioAccess, Registers};
use portcullis_pgtable::{Config, Granule, NoFlush, PageTable, Prot, Stage1};
use spin::Mutex;

use super::*;
use crate::fault::{FaultReason, FaultReport, FaultResponse};

type Smmu = SmmuV2<Arc<FakeMmio>, Arc<FakeMemory>, Arc<FakeClock>>;

const CB: usize = 0x1_0000;
const fn bank(n: usize, offset: usize) -> usize {
    CB + n * 0x1000 + offset
}
const SMR: usize = 0x800;
const S2CR: usize = 0xc00;
const CBAR: usize = 0x1000;
const CBFRSYNRA: usize = 0x1400;
const CBA2R: usize = 0x1800;

/// Register behaviour that the driver relies on, for `id_bits` ID and `mask_bits` MASK bits.
fn behave(
    id_bits: u32,
    mask_bits: u32,
) -> impl FnMut(&mut Registers, MmioAccess) -> Option<u64> + Send + 'static {
    move |registers, access| {
        if !access.write {
            return None;
        }
        let value = access.value;
        let old = u64::from(registers.get32(access.offset));
        match access.offset {
            0x800..0xa00 => Some(value & u64::from(1 << 31 | mask_bits << 16 | id_bits)),
            // Identification is read only, status is write one to clear.
            0x20..0x40 => Some(old),
            0x48 => Some(old & !value),
            CB.. if access.offset & 0xfff == 0x58 => Some(old & !(value & 0x8000_01fe)),
            // RESUME ends a stall.
            CB.. if access.offset & 0xfff == 0x8 => {
                let fsr = access.offset + 0x50;
                registers.set32(fsr, registers.get32(fsr) & !(1 << 30));
                None
            }
            _ => None,
        }
    }
}

/// The registers of a ZynqMP after reset, as non-secure software reads them.
fn zynqmp_registers(mmio: &FakeMmio) {
    mmio.set32(0x000, 0x0020_0001);
    mmio.set32(0x010, 0x0400_001c);
    mmio.set32(0x020, 0x7c01_3e30);
    mmio.set32(0x024, 0x3000_0010);
    mmio.set32(0x028, 0x0000_5555);
    mmio.set32(0x03c, 0x21);
    for n in 0..16 {
        mmio.set32(bank(n, 0x004), 0x3);
    }
}

struct Rig {
    smmu: Smmu,
    mmio: Arc<FakeMmio>,
    memory: Arc<FakeMemory>,
}

fn rig_with(mmio: FakeMmio, change: impl FnOnce(&FakeMmio, &mut Options)) -> Rig {
    let mmio = Arc::new(mmio);
    zynqmp_registers(&mmio);
    let mut options = Options::new(0x2_0000, "arm,mmu-500");
    change(&mmio, &mut options);
    let memory = Arc::new(FakeMemory::plain(0x1000_0000, 8 << 20));
    let smmu = SmmuV2::probe(mmio.clone(), memory.clone(), Arc::new(FakeClock::new()), options).unwrap();
    Rig { smmu, mmio, memory }
}

fn rig() -> Rig {
    let rig = rig_with(FakeMmio::with_handler(behave(0x7fff, 0x7fff)), |_, _| ());
    rig.mmio.take_log();
    rig
}

impl Rig {
    fn stage1(&self) -> Arc<Domain<Arc<FakeMmio>, Arc<FakeMemory>, Arc<FakeClock>>> {
        self.smmu.new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default()).unwrap()
    }
    /// Makes a bank look as after a fault.
    fn fault(&self, n: usize, fsr: u32, far: u64, fsynr0: u32, stream: u32) {
        self.mmio.set64(bank(n, 0x060), far);
        self.mmio.set32(bank(n, 0x058), fsr);
        self.mmio.set32(bank(n, 0x068), fsynr0);
        self.mmio.set32(CBFRSYNRA + n * 4, stream);
    }
}

#[test]
fn probe_writes_what_linux_writes() {
    let rig = rig_with(FakeMmio::with_handler(behave(0x7fff, 0x7fff)), |_, _| ());
    let mut expected: Vec<(usize, u64)> = vec![(0x000, 0x0020_0001), (0x048, 0)];
    for n in 0..48 {
        expected.push((S2CR + n * 4, 0x0002_0000));
        expected.push((SMR + n * 4, 0));
    }
    for n in 0..16 {
        expected.push((bank(n, 0x000), 0));
        expected.push((bank(n, 0x058), 0xc000_01fe));
    }
    expected.extend([(0x06c, 0xffff_ffff), (0x068, 0xffff_ffff), (0x010, 0x0000_051c)]);
    for n in 0..16 {
        expected.push((bank(n, 0x004), 0x1));
    }
    expected.extend([(0x070, 0xffff_ffff), (0x000, 0x0020_1c36), (SMR, 0x7fff), (SMR, 0x7fff_0000)]);
    assert_eq!(rig.mmio.take_writes(), expected);
    assert!(!rig.smmu.prefetch_locked());
}

#[test]
fn probe_reads_identification_first_and_in_order() {
    let rig = rig_with(FakeMmio::with_handler(behave(0x7fff, 0x7fff)), |_, _| ());
    let reads: Vec<usize> = rig.mmio.take_log().iter().take(5).map(|access| access.offset).collect();
    assert_eq!(reads, [0x020, 0x024, 0x028, 0x03c, 0x000]);
}

#[test]
fn identification_prints_linux_lines() {
    let rig = rig();
    assert_eq!(
        rig.smmu.identification().to_string(),
        "SMMUv2 with:\n\tstage 1 translation\n\tstage 2 translation\n\tnested translation\n\
         \tstream matching with 48 register groups\n\t16 context banks (0 stage-2 only)\n\
         \tSupported page sizes: 0x61311000\n\tStage-1: 48-bit VA -> 48-bit IPA\n\
         \tStage-2: 48-bit IPA -> 48-bit PA\n"
    );
    assert_eq!(rig.smmu.identification().revision, (2, 1));
    assert_eq!(rig.smmu.preserved(), 0);
}

#[test]
fn unmatched_streams_bypass_only_when_asked_for() {
    let rig = rig_with(FakeMmio::with_handler(behave(0x7fff, 0x7fff)), |_, options| {
        options.bypass_unmatched = true;
    });
    assert_eq!(rig.mmio.get32(0), 0x0020_1836);
    assert_eq!(rig.mmio.get32(S2CR), 0x0001_0000);
}

#[test]
fn what_cannot_be_driven_is_refused_with_the_register_that_says_so() {
    type Check = fn(&ProbeError) -> bool;
    let cases: [(&str, usize, u32, u64, Check); 7] = [
        ("no stage", 0x20, 0x0800_3e30, 0x2_0000, |e| matches!(e, ProbeError::NoTranslation { .. })),
        ("no groups", 0x20, 0x7c01_3e00, 0x2_0000, |e| matches!(e, ProbeError::NoStreamMatchGroups { .. })),
        ("s2 banks", 0x24, 0x3011_0010, 0x2_0000, |e| matches!(e, ProbeError::ContextBanks { .. })),
        ("no banks", 0x24, 0x3000_0000, 0x2_0000, |e| matches!(e, ProbeError::ContextBanks { .. })),
        ("64K pages", 0x24, 0xb000_0010, 0x2_0000, |e| {
            matches!(e, ProbeError::Window { page_bytes: 0x1_0000, needed: 0x20_0000, .. })
        }),
        ("small window", 0x24, 0x3000_0010, 0x1_f000, |e| {
            matches!(e, ProbeError::Window { needed: 0x2_0000, .. })
        }),
        ("no granule", 0x28, 0x0000_0555, 0x2_0000, |e| matches!(e, ProbeError::NoGranule { .. })),
    ];
    for (name, offset, value, window, check) in cases {
        let mmio = Arc::new(FakeMmio::new());
        zynqmp_registers(&mmio);
        mmio.set32(offset, value);
        let memory = Arc::new(FakeMemory::plain(0x1000_0000, 0x1000));
        let options = Options::new(window, "arm,mmu-500");
        let error =
            SmmuV2::probe(mmio.clone(), memory, Arc::new(FakeClock::new()), options).map(drop).unwrap_err();
        assert!(check(&error), "{name}: {error}");
        assert!(mmio.take_writes().is_empty(), "{name}: nothing is written to what cannot be driven");
    }
}

#[test]
fn a_window_of_another_size_is_mentioned() {
    let rig =
        rig_with(FakeMmio::with_handler(behave(0x7fff, 0x7fff)), |_, options| options.window = 0x4_0000);
    assert!(
        rig.smmu.identification().to_string().contains("(0x20000) differs from mapped region size (0x40000)")
    );
}

#[test]
fn mask_probing_finds_the_bits_that_exist() {
    // Ten bits of each, as in a TBU of its own.
    let rig = rig_with(FakeMmio::with_handler(behave(0x7fff, 0x3ff)), |_, _| ());
    let id = rig.smmu.identification();
    assert_eq!((id.stream_id_mask, id.stream_mask_mask), (0x7fff, 0x3ff));
    let error = rig.smmu.add_master(&[StreamMatch::masked(0x200, 0x7c00)]).unwrap_err();
    assert_eq!(error, StreamError::MaskRange { mask: 0x7c00, limit: 0x3ff }.into());
    let rig = rig_with(FakeMmio::with_handler(behave(0x3ff, 0x3ff)), |_, _| ());
    assert_eq!(rig.smmu.identification().stream_id_mask, 0x3ff);
    let error = rig.smmu.add_master(&[StreamMatch::exact(0x14e8)]).unwrap_err();
    assert_eq!(error.to_string(), "stream ID 0x14e8 out of range for SMMU (0x3ff)");
}

#[test]
fn mask_probing_leaves_a_preserved_mapping_alone() {
    let rig = rig_with(FakeMmio::with_handler(behave(0x7fff, 0x7fff)), |_, options| {
        options.preserve = vec![StreamMatch::exact(0xce3)];
    });
    assert_eq!(rig.smmu.preserved(), 1);
    assert_eq!(rig.mmio.get32(SMR), 0x8000_0ce3);
    assert_eq!(rig.mmio.get32(S2CR), 0x0001_0000);
    let first = rig.mmio.take_log()[5];
    assert_eq!((first.write, first.offset, first.value & 1), (true, 0, 1), "clients bypass meanwhile");
    // The device that claims the stream gets that entry.
    let master = rig.smmu.add_master(&[StreamMatch::exact(0xce3)]).unwrap();
    assert_eq!(master.entries(), [0]);
    assert_eq!(rig.mmio.get32(S2CR), 0x0001_0000, "still bypassing until a domain is attached");
}

#[test]
fn a_locked_prefetcher_is_reported() {
    let lock = |registers: &mut Registers, access: MmioAccess| {
        (access.write && access.offset >= CB && access.offset & 0xfff == 4)
            .then(|| u64::from(registers.get32(access.offset)))
    };
    assert!(rig_with(FakeMmio::with_handler(lock), |_, _| ()).smmu.prefetch_locked());
}

#[test]
fn the_overlap_rule() {
    use StreamMatch as S;
    let m = S::masked;
    // (what is there, what comes, entry it gets or the entry it collides with)
    let cases: [(&[S], S, Result<usize, usize>); 9] = [
        (&[], S::exact(0x200), Ok(0)),
        (&[S::exact(0x200)], S::exact(0x200), Ok(0)),
        (&[S::exact(0x200)], S::exact(0x201), Ok(1)),
        (&[m(0x200, 0x3f)], S::exact(0x217), Ok(0)),
        (&[m(0x200, 0x3f)], m(0x210, 0x0f), Ok(0)),
        (&[m(0x200, 0x3f)], S::exact(0x240), Ok(1)),
        (&[S::exact(0x200), S::exact(0x201)], m(0x200, 0x1), Err(0)),
        (&[S::exact(0x868), m(0x200, 0x0f)], m(0x200, 0x30), Err(1)),
        (&[S::exact(0x868), m(0x200, 0x0f)], m(0x21f, 0x10), Err(1)),
    ];
    for (there, comes, expected) in cases {
        let rig = rig();
        for stream in there {
            rig.smmu.add_master(&[*stream]).unwrap();
        }
        let before = rig.smmu.stream_entries();
        let got = rig.smmu.add_master(&[comes]);
        match expected {
            Ok(index) => assert_eq!(got.unwrap().entries(), [index], "{there:?} + {comes}"),
            Err(index) => {
                let error = StreamError::Overlap { new: comes, existing: there[index], index };
                assert_eq!(got.unwrap_err(), error.into());
                assert_eq!(rig.smmu.stream_entries(), before);
                let text = error.to_string();
                assert!(
                    text.contains(&comes.to_string()) && text.contains(&there[index].to_string()),
                    "{text}"
                );
            }
        }
    }
}

#[test]
fn a_device_is_entered_as_a_whole_or_not_at_all_and_s2cr_comes_before_smr() {
    let rig = rig();
    rig.smmu.add_master(&[StreamMatch::exact(0x868)]).unwrap();
    rig.mmio.take_log();
    let error = rig.smmu.add_master(&[StreamMatch::exact(0xe80), StreamMatch::masked(0x868, 1)]).unwrap_err();
    assert!(matches!(error, Error::Stream(StreamError::Overlap { index: 0, .. })));
    assert!(rig.mmio.take_writes().is_empty(), "hardware only after all streams have found a place");
    let master = rig.smmu.add_master(&[StreamMatch::exact(0xe80), StreamMatch::masked(0xe84, 1)]).unwrap();
    assert_eq!(master.entries(), [1, 2], "the refused device left nothing behind");
    let expected =
        [(S2CR + 4, 0x0002_0000), (SMR + 4, 0x8000_0e80), (S2CR + 8, 0x0002_0000), (SMR + 8, 0x8001_0e84)];
    assert_eq!(rig.mmio.take_writes(), expected);
    rig.smmu.remove_master(master);
    let expected = [(SMR + 4, 0), (S2CR + 4, 0x0002_0000), (SMR + 8, 0), (S2CR + 8, 0x0002_0000)];
    assert_eq!(rig.mmio.take_writes(), expected, "an entry stops matching before it changes");
    assert_eq!(rig.smmu.stream_entries().len(), 1);
}

#[test]
fn a_shared_entry_lives_as_long_as_its_last_user() {
    let rig = rig();
    let a = rig.smmu.add_master(&[StreamMatch::masked(0x200, 0x3f)]).unwrap();
    let b = rig.smmu.add_master(&[StreamMatch::exact(0x201)]).unwrap();
    assert_eq!(a.entries(), b.entries());
    rig.smmu.remove_master(a);
    assert_eq!(rig.smmu.stream_entries().len(), 1);
    rig.smmu.remove_master(b);
    assert!(rig.smmu.stream_entries().is_empty());
}

#[test]
fn the_49th_group_is_refused() {
    let rig = rig();
    let masters: Vec<_> = (0..48).map(|n| rig.smmu.add_master(&[StreamMatch::exact(n)]).unwrap()).collect();
    let error = rig.smmu.add_master(&[StreamMatch::exact(48)]).unwrap_err();
    assert_eq!(error.to_string(), "no free stream match group for stream 0x30: all 48 are in use");
    for master in masters {
        rig.smmu.remove_master(master);
    }
    rig.smmu.add_master(&[StreamMatch::exact(48)]).unwrap();
}

#[test]
fn stream_indexing_has_no_smrs_and_no_masks() {
    let rig = rig_with(FakeMmio::new(), |mmio, _| mmio.set32(0x20, 0x7400_0c00));
    assert!(!rig.mmio.take_writes().iter().any(|(offset, _)| (0x800..0xa00).contains(offset)));
    let master = rig.smmu.add_master(&[StreamMatch::exact(5)]).unwrap();
    assert_eq!(master.entries(), [5]);
    assert_eq!(rig.mmio.take_writes(), [(S2CR + 20, 0x0002_0000)]);
    assert!(rig.smmu.add_master(&[StreamMatch::masked(4, 1)]).is_err());
    assert!(rig.smmu.add_master(&[StreamMatch::exact(64)]).is_err(), "NUMSIDB = 6");
}

#[test]
fn sixteen_bit_ids_use_the_extended_format() {
    // EXIDS, NUMSIDB = 15.
    let rig = rig_with(FakeMmio::new(), |mmio, _| mmio.set32(0x20, 0x7c01_3f30));
    assert_eq!(rig.mmio.get32(0) & 8, 8, "EXIDENABLE");
    rig.mmio.take_log();
    rig.smmu.add_master(&[StreamMatch::masked(0x8001, 0xf0)]).unwrap();
    assert_eq!(rig.mmio.take_writes(), [(S2CR, 0x0002_0400), (SMR, 0x00f0_8001)]);
}

#[test]
fn attach_writes_what_linux_writes() {
    let rig = rig();
    let master = rig.smmu.add_master(&[StreamMatch::exact(0x14e8)]).unwrap();
    let first = rig.stage1();
    rig.mmio.take_log();
    let domain = rig.stage1();
    let root = domain.table_root().unwrap().ttbr0.get();
    let expected = [
        (CBA2R + 4, 1),
        (CBAR + 4, 0x0001_f300),
        (bank(1, 0x010), 0x0003_8015),
        (bank(1, 0x030), 0x0080_2010),
        (bank(1, 0x020), root | 1 << 48),
        (bank(1, 0x028), 1 << 48),
        (bank(1, 0x038), 0xf404_ff44),
        (bank(1, 0x03c), 0),
        (bank(1, 0x000), 0x1067),
    ];
    assert_eq!(rig.mmio.take_writes(), expected);
    assert_eq!((domain.bank(), domain.asid(), domain.vmid()), (Some(1), Some(Asid(1)), None));
    rig.smmu.attach(&master, &domain).unwrap();
    assert_eq!(rig.mmio.take_writes(), [(S2CR, 1)]);
    rig.smmu.attach(&master, &first).unwrap();
    assert_eq!(rig.mmio.take_writes(), [(S2CR, 0)]);
    rig.smmu.detach(&master);
    assert_eq!(rig.mmio.take_writes(), [(S2CR, 0x0002_0000)]);
}

#[test]
fn coherent_walks_change_tcr() {
    let rig = rig_with(FakeMmio::new(), |_, options| options.coherent_walk = Some(true));
    rig.stage1();
    assert!(rig.mmio.take_writes().contains(&(bank(0, 0x030), 0x0080_3510)));
}

#[test]
fn a_stage_2_domain_has_a_vmid_and_no_stage_1_registers() {
    let rig = rig();
    let paging = Paging { input_bits: Some(40), output_bits: Some(40), ..Paging::default() };
    let domain = rig.smmu.new_domain(DomainConfig::Stage2(paging), DomainOptions::default()).unwrap();
    let writes = rig.mmio.take_writes();
    let offsets: Vec<usize> = writes.iter().map(|write| write.0).collect();
    assert_eq!(offsets, [CBA2R, CBAR, bank(0, 0x030), bank(0, 0x020), bank(0, 0x000)]);
    assert_eq!((writes[1].1, writes[4].1), (0x0000_0001, 0x67), "CBAR type 0 with VMID bank + 1; SCTLR");
    assert_eq!((domain.vmid(), domain.asid()), (Some(Vmid(1)), None));
}

#[test]
fn identity_and_blocked_need_no_bank() {
    let rig = rig();
    let master = rig.smmu.add_master(&[StreamMatch::exact(1)]).unwrap();
    rig.mmio.take_log();
    for (config, s2cr) in [(DomainConfig::Identity, 0x0001_0000), (DomainConfig::Blocked, 0x0002_0000)] {
        let domain = rig.smmu.new_domain(config, DomainOptions::default()).unwrap();
        rig.smmu.attach(&master, &domain).unwrap();
        assert_eq!(rig.mmio.take_writes(), [(S2CR, s2cr)]);
        let error = domain.map(Iova(0), Pa(0), 0x1000, Prot::RW).unwrap_err();
        assert!(matches!(error, Error::NoPageTable { .. }));
        assert_eq!(domain.bank(), None);
        drop(domain);
        assert_eq!(rig.mmio.take_writes(), [(S2CR, 0x0002_0000)], "its streams are blocked when it goes");
    }
    let identity = rig.smmu.new_domain(DomainConfig::Identity, DomainOptions::default()).unwrap();
    assert_eq!(identity.iova_to_phys(Iova(0x1234)), Some(Pa(0x1234)));
}

#[test]
fn sixteen_domains_fit_and_the_seventeenth_is_refused_with_the_numbers() {
    let rig = rig();
    let mut domains: Vec<_> = (0..16).map(|_| rig.stage1()).collect();
    assert_eq!(rig.smmu.free_banks(), 0);
    let seventeenth = || {
        rig.smmu
            .new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default())
            .map(|domain| domain.bank())
    };
    let error = seventeenth().unwrap_err();
    assert_eq!(
        error.to_string(),
        "no free context bank for a stage 1 domain: all 16 usable of 16 banks are taken (0 are stage-2 only, 0 given up \
         after an invalidation that did not complete)"
    );
    domains.remove(7);
    assert_eq!(seventeenth(), Ok(Some(7)));
    domains.clear();
    rig.memory.assert_clean();
}

#[test]
fn stage_2_only_banks_are_for_stage_2() {
    // Two of four banks.
    let rig = rig_with(FakeMmio::new(), |mmio, _| mmio.set32(0x24, 0x3002_0004));
    assert_eq!(rig.stage1().bank(), Some(2));
    let stage2 =
        || rig.smmu.new_domain(DomainConfig::Stage2(Paging::default()), DomainOptions::default()).unwrap();
    let held = [rig.stage1(), rig.stage1(), stage2(), stage2()];
    assert_eq!(held.map(|domain| domain.bank().unwrap()), [2, 3, 0, 1]);
}

#[test]
fn a_freed_bank_is_disabled_and_invalidated_before_its_tables_go() {
    let rig = rig();
    let master = rig.smmu.add_master(&[StreamMatch::exact(0x868)]).unwrap();
    let domain = rig.stage1();
    domain.map(Iova(0x7000_0000), Pa(0x6000_0000), 0x1000, Prot::RW).unwrap();
    rig.smmu.attach(&master, &domain).unwrap();
    rig.mmio.take_log();
    drop(domain);
    let expected =
        [(S2CR, 0x0002_0000), (bank(0, 0x000), 0), (bank(0, 0x610), 0), (bank(0, 0x7f0), 0xffff_ffff)];
    assert_eq!(rig.mmio.take_writes(), expected);
    rig.memory.assert_clean();
}

#[test]
fn map_writes_no_register_and_unmap_invalidates_the_page_and_syncs_once() {
    let rig = rig();
    let _first = rig.stage1();
    let domain = rig.stage1();
    rig.mmio.take_log();
    domain.map(Iova(0x7000_0000), Pa(0x6000_0000), 0x4000, Prot::RW).unwrap();
    assert_eq!(domain.iova_to_phys(Iova(0x7000_2345)), Some(Pa(0x6000_2345)));
    assert!(rig.mmio.take_log().is_empty());
    assert_eq!(domain.unmap(Iova(0x7000_1000), 0x2000), Ok(0x2000));
    let tag = 1 << 48;
    let expected =
        [(bank(1, 0x620), tag | 0x7_0001), (bank(1, 0x620), tag | 0x7_0002), (bank(1, 0x7f0), 0xffff_ffff)];
    assert_eq!(rig.mmio.take_writes(), expected);
    assert_eq!(domain.iova_to_phys(Iova(0x7000_1000)), None);
    assert_eq!(domain.unmap(Iova(0x7000_1000), 0x2000), Ok(0), "holes are no error");
    assert!(rig.mmio.take_log().is_empty(), "and cost nothing");
}

#[test]
fn a_lazy_unmap_leaves_pages_to_a_flush_of_everything_but_not_tables() {
    let rig = rig();
    let domain = rig.stage1();
    domain.map(Iova(0x7000_0000), Pa(0x6000_0000), 0x4000, Prot::RW).unwrap();
    domain.map(Iova(0x4000_0000), Pa(0x6020_1000), 0x20_0000, Prot::RW).unwrap();
    rig.mmio.take_log();
    assert_eq!(domain.unmap_lazy(Iova(0x7000_1000), 0x2000), Ok(0x2000));
    assert_eq!(domain.iova_to_phys(Iova(0x7000_1000)), None);
    assert!(rig.mmio.take_log().is_empty());
    domain.invalidate_all().unwrap();
    assert_eq!(rig.mmio.take_writes(), [(bank(0, 0x610), 0), (bank(0, 0x7f0), 0xffff_ffff)]);
    let tables = domain.table_count();
    assert_eq!(domain.unmap_lazy(Iova(0x4000_0000), 0x20_0000), Ok(0x20_0000));
    assert_eq!(domain.table_count(), tables - 1);
    assert_eq!(rig.mmio.take_writes(), [(bank(0, 0x610), 0), (bank(0, 0x7f0), 0xffff_ffff)]);
}

#[test]
fn a_block_takes_one_invalidation_and_many_pages_take_one_by_asid() {
    let rig = rig();
    let domain = rig.stage1();
    domain.map(Iova(0x4020_0000), Pa(0x6020_0000), 0x20_0000, Prot::RW).unwrap();
    domain.map(Iova(0x1000), Pa(0x6000_1000), 100 * 0x1000, Prot::RW).unwrap();
    rig.mmio.take_log();
    domain.unmap(Iova(0x4020_0000), 0x20_0000).unwrap();
    assert_eq!(rig.mmio.take_writes(), [(bank(0, 0x620), 0x4_0200), (bank(0, 0x7f0), 0xffff_ffff)]);
    domain.unmap(Iova(0x1000), 100 * 0x1000).unwrap();
    assert_eq!(rig.mmio.take_writes(), [(bank(0, 0x610), 0), (bank(0, 0x7f0), 0xffff_ffff)]);
}

#[test]
fn stage_2_invalidates_by_ipa_and_then_the_combined_entries_of_nested_domains() {
    let rig = rig();
    let parent =
        rig.smmu.new_domain(DomainConfig::Stage2(Paging::default()), DomainOptions::default()).unwrap();
    parent.map(Iova(0x8000_0000), Pa(0x6000_0000), 0x2000, Prot::RW).unwrap();
    rig.mmio.take_log();
    parent.unmap(Iova(0x8000_0000), 0x1000).unwrap();
    assert_eq!(rig.mmio.take_writes(), [(bank(0, 0x638), 0x8_0000), (bank(0, 0x7f0), 0xffff_ffff)]);
    let config = DomainConfig::Nested(parent.clone(), Paging::default());
    let _nested = rig.smmu.new_domain(config, DomainOptions::default()).unwrap();
    rig.mmio.take_log();
    parent.unmap(Iova(0x8000_1000), 0x1000).unwrap();
    let expected =
        [(bank(0, 0x638), 0x8_0001), (bank(0, 0x7f0), 0xffff_ffff), (0x0b8, 1), (0x070, 0xffff_ffff)];
    assert_eq!(rig.mmio.take_writes(), expected);
}

#[test]
fn a_nested_domain_walks_through_its_parent_and_leaves_it_clean() {
    let rig = rig();
    let parent =
        rig.smmu.new_domain(DomainConfig::Stage2(Paging::default()), DomainOptions::default()).unwrap();
    parent.map(Iova(0x8000_0000), Pa(0x6000_0000), 0x1000, Prot::RW).unwrap();
    rig.mmio.take_log();
    let config = DomainConfig::Nested(parent.clone(), Paging::default());
    let nested = rig.smmu.new_domain(config, DomainOptions::default()).unwrap();
    let cbar = rig.mmio.take_writes().into_iter().find(|write| write.0 == CBAR + 4).unwrap().1;
    assert_eq!(cbar, 0x0003_0001, "type 3, stage 2 bank 0, the parent's VMID");
    assert_eq!((nested.kind(), nested.bank(), nested.vmid()), (DomainKind::Nested, Some(1), Some(Vmid(1))));
    let root = nested.table_root().unwrap().ttbr0;
    assert_eq!(parent.iova_to_phys(Iova(root.get())), Some(root), "the walker finds the tables");
    nested.map(Iova(0x1000), Pa(0x8000_0000), 0x1000, Prot::RW).unwrap();
    assert_eq!(nested.iova_to_phys(Iova(0x1234)), Some(Pa(0x6000_0234)));
    drop(nested);
    assert_eq!(parent.iova_to_phys(Iova(root.get())), None);
    drop(parent);
    rig.memory.assert_clean();
}

#[test]
fn the_parent_of_a_nested_domain_must_be_stage_2_here() {
    let rig = rig();
    let error = rig
        .smmu
        .new_domain(DomainConfig::Nested(rig.stage1(), Paging::default()), DomainOptions::default())
        .unwrap_err();
    assert_eq!(error, Error::Parent { kind: DomainKind::Stage1 });
    let other = self::rig();
    let parent =
        other.smmu.new_domain(DomainConfig::Stage2(Paging::default()), DomainOptions::default()).unwrap();
    let config = DomainConfig::Nested(parent.clone(), Paging::default());
    assert!(matches!(rig.smmu.new_domain(config, DomainOptions::default()), Err(Error::Parent { .. })));
    let master = rig.smmu.add_master(&[StreamMatch::exact(1)]).unwrap();
    assert_eq!(rig.smmu.attach(&master, &parent), Err(Error::OtherInstance));
}

fn process_table(rig: &Rig) -> (PageTable<Stage1, Arc<FakeMemory>>, TableRoot) {
    let table = PageTable::new(rig.memory.clone(), Config::new(Granule::K4, 39, 40)).unwrap();
    let root = TableRoot::from_registers(&table.registers(), Granule::K4);
    (table, root)
}

#[test]
fn a_process_domain_gets_the_processs_own_registers() {
    let rig = rig();
    let (_table, root) = process_table(&rig);
    let root = TableRoot { asid: Some(Asid(0x42)), mair: 0x1122_3344_5566_7788, ..root };
    let domain = rig.smmu.new_domain(DomainConfig::Process(root), DomainOptions::default()).unwrap();
    let expected = [
        (CBA2R, 1),
        (CBAR, 0x0001_f300),
        (bank(0, 0x010), 0x0003_8012),
        (bank(0, 0x030), 0x0080_3519),
        (bank(0, 0x020), root.ttbr0.get() | 0x42 << 48),
        (bank(0, 0x028), 0x42 << 48),
        (bank(0, 0x038), 0x5566_7788),
        (bank(0, 0x03c), 0x1122_3344),
        (bank(0, 0x000), 0x1067),
    ];
    assert_eq!(rig.mmio.take_writes(), expected);
    assert!(domain.map(Iova(0), Pa(0), 0x1000, Prot::RW).is_err(), "the table is the process's");
    domain.invalidate(Iova(0x5123), 0x1000).unwrap();
    let tag = 0x42 << 48;
    let expected = [(bank(0, 0x600), tag | 5), (bank(0, 0x600), tag | 6), (bank(0, 0x7f0), 0xffff_ffff)];
    assert_eq!(rig.mmio.take_writes(), expected);
    domain.stop_walks().unwrap();
    let expected = [(bank(0, 0x030), 0x0080_3599), (bank(0, 0x610), 0x42), (bank(0, 0x7f0), 0xffff_ffff)];
    assert_eq!(rig.mmio.take_writes(), expected, "EPD0, then everything under the ASID");
}

#[test]
fn an_asid_tags_one_address_space() {
    let rig = rig();
    let (_a, a) = process_table(&rig);
    let (_b, b) = process_table(&rig);
    let process = |root| {
        rig.smmu
            .new_domain(DomainConfig::Process(root), DomainOptions::default())
            .inspect(|domain| assert_eq!(domain.asid(), Some(Asid(1))))
    };
    let first = process(TableRoot { asid: Some(Asid(1)), ..a }).unwrap();
    let second = process(TableRoot { asid: Some(Asid(1)), ..a }).unwrap();
    assert_ne!(first.bank(), second.bank(), "the same tables may be in two banks");
    let error = process(TableRoot { asid: Some(Asid(1)), ..b }).unwrap_err();
    assert!(matches!(error, Error::AsidInUse { asid: Asid(1), bank: 0 }));
    drop(second);
    // The next free bank is 1, whose ASID of choice is taken.
    let domain = rig.stage1();
    assert_eq!((domain.bank(), domain.asid()), (Some(1), Some(Asid(2))));
}

#[test]
fn overrides_stay_with_the_stream() {
    let rig = rig();
    let master = rig.smmu.add_master(&[StreamMatch::exact(0x200)]).unwrap();
    let (a, b) = (rig.stage1(), rig.stage1());
    rig.smmu.attach(&master, &a).unwrap();
    rig.mmio.take_log();
    let overrides = StreamOverrides { privileged: Some(true), instruction: Some(false) };
    rig.smmu.set_overrides(&master, overrides);
    rig.smmu.attach(&master, &b).unwrap();
    assert_eq!(rig.mmio.take_writes(), [(S2CR, 0x0b00_0000), (S2CR, 0x0b00_0001)]);
    rig.smmu.set_overrides(&master, StreamOverrides::default());
    assert_eq!(rig.mmio.take_writes(), [(S2CR, 0x0000_0001)]);
}

#[test]
fn a_sync_that_does_not_end_is_an_error_and_the_memory_is_kept() {
    let stuck = Arc::new(AtomicUsize::new(0));
    let flag = stuck.clone();
    let mut normal = behave(0x7fff, 0x7fff);
    let rig = rig_with(
        FakeMmio::with_handler(move |registers, access| {
            let status = !access.write && access.offset >= CB && access.offset & 0xfff == 0x7f4;
            if status { Some(flag.load(Ordering::Relaxed) as u64) } else { normal(registers, access) }
        }),
        |_, options| options.tlb_timeout_us = 500,
    );
    let domain = rig.stage1();
    domain.map(Iova(0x20_0000), Pa(0x6000_0000), 0x1000, Prot::RW).unwrap();
    stuck.store(1, Ordering::Relaxed);
    // The whole 2 MiB: the table goes too.
    let error = domain.unmap(Iova(0x20_0000), 0x20_0000).unwrap_err();
    let Error::TlbSync { scope: SyncScope::Bank(0), timeout } = error else { panic!("{error}") };
    assert!(timeout.waited_us >= 500 && timeout.seen == 1);
    assert!(error.to_string().contains("CBn_TLBSTATUS.SACTIVE == 0"), "{error}");
    assert_eq!(domain.kept_bytes(), 0x1000, "the walker may still be in it");
    drop(domain);
    assert!(rig.memory.outstanding() >= 4, "none of the tables was freed");
    assert_eq!(rig.smmu.free_banks(), 15, "nor is the bank used again");
    stuck.store(0, Ordering::Relaxed);
    let next = rig.stage1();
    assert_eq!((next.bank(), next.asid()), (Some(1), Some(Asid(1))));
}

#[test]
fn a_reset_that_does_not_end_fails_the_probe() {
    let mmio =
        Arc::new(FakeMmio::with_handler(|_, access| (!access.write && access.offset == 0x074).then_some(1)));
    zynqmp_registers(&mmio);
    let memory = Arc::new(FakeMemory::plain(0x1000_0000, 0x1000));
    let options = Options::new(0x2_0000, "arm,mmu-500");
    let error =
        SmmuV2::probe(mmio, memory, Arc::new(FakeClock::new()), options).map(drop).unwrap_err().to_string();
    assert!(
        error.contains("SMMU may be deadlocked (global)") && error.contains("TLBGSTATUS.GSACTIVE"),
        "{error}"
    );
}

#[test]
fn the_context_fault_handler_reads_in_linux_order_and_clears() {
    let rig = rig();
    let domain = rig.stage1();
    rig.fault(0, 0x402, 0x7000_2000, 0x11, 0x200);
    rig.mmio.take_log();
    let fault = rig.smmu.handle_context_fault(0).unwrap();
    let log: Vec<(bool, usize)> =
        rig.mmio.take_log().iter().map(|access| (access.write, access.offset)).collect();
    let expected = [
        (false, bank(0, 0x060)),
        (false, bank(0, 0x058)),
        (false, bank(0, 0x068)),
        (false, CBFRSYNRA),
        (true, bank(0, 0x058)),
    ];
    assert_eq!(log, expected);
    assert_eq!((fault.iova, fault.stream, fault.access), (Iova(0x7000_2000), StreamId(0x200), Access::Write));
    assert_eq!(rig.smmu.handle_context_fault(0), None, "cleared");
    let batch = rig.smmu.take_faults();
    assert_eq!((batch.faults.len(), batch.lost), (1, 0));
    assert_eq!(batch.faults[0].reason, FaultReason::Translation);
    drop(domain);
    assert_eq!(rig.smmu.handle_context_fault(0), None, "a free bank has no owner");
}

#[test]
fn a_stalled_fault_is_answered_after_fsr_is_cleared() {
    let rig = rig();
    let answers = Arc::new(Mutex::new(vec![FaultResponse::Terminate, FaultResponse::Resolved]));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (next, log) = (answers, seen.clone());
    let handler: Arc<dyn FaultHandler> = Arc::new(move |report: &FaultReport| {
        log.lock().push((report.iova, report.stalled));
        next.lock().pop().unwrap()
    });
    let fault_model = FaultModel { stall: true, keep_processing: true };
    let options = DomainOptions { fault_model, handler: Some(handler) };
    let _domain = rig.smmu.new_domain(DomainConfig::Stage1(Paging::default()), options).unwrap();
    assert_eq!(rig.mmio.get32(bank(0, 0x000)), 0x11e7, "CFCFG and HUPCF");
    for tnr in [0, 1] {
        rig.fault(0, 0x4000_0402, 0x5000, 0x3, 0x868);
        rig.mmio.take_log();
        assert!(rig.smmu.handle_context_fault(0).unwrap().stalled);
        assert_eq!(rig.mmio.take_writes(), [(bank(0, 0x058), 0x4000_0402), (bank(0, 0x008), tnr)]);
    }
    assert_eq!(*seen.lock(), [(Iova(0x5000), true), (Iova(0x5000), true)]);
}

#[test]
fn a_deferred_fault_masks_the_interrupt_until_it_is_answered() {
    let rig = rig();
    rig.smmu.set_fault_handler(Some(Arc::new(|_: &FaultReport| FaultResponse::Deferred)));
    let options =
        DomainOptions { fault_model: FaultModel { stall: true, keep_processing: false }, handler: None };
    let domain = rig.smmu.new_domain(DomainConfig::Stage1(Paging::default()), options).unwrap();
    rig.fault(0, 0x4000_0402, 0x5000, 0x3, 0x868);
    rig.mmio.take_log();
    assert_eq!(rig.smmu.handle_irq(), 1);
    assert_eq!(rig.mmio.take_writes(), [(bank(0, 0x000), 0x10a7), (bank(0, 0x058), 0x4000_0402)]);
    assert_eq!(rig.smmu.handle_irq(), 0, "it is known");
    rig.mmio.take_log();
    assert_eq!(rig.smmu.resume_stalled(0, FaultResponse::Resolved), Ok(()));
    assert_eq!(rig.mmio.take_writes(), [(bank(0, 0x008), 0), (bank(0, 0x000), 0x10e7)]);
    assert_eq!(rig.smmu.resume_stalled(0, FaultResponse::Resolved), Err(Error::NothingStalled { bank: 0 }));
    // A domain that goes away does not leave a transaction behind.
    rig.fault(0, 0x4000_0402, 0x6000, 0x3, 0x868);
    rig.smmu.handle_irq();
    rig.mmio.take_log();
    drop(domain);
    let expected = [(bank(0, 0x000), 0x20), (bank(0, 0x008), 1), (bank(0, 0x000), 0)];
    assert_eq!(rig.mmio.take_writes()[..3], expected, "it ends with an error: CFRE");
}

#[test]
fn a_fault_that_nobody_has_read_is_not_left_for_the_next_owner_of_the_bank() {
    let rig = rig();
    let options =
        DomainOptions { fault_model: FaultModel { stall: true, keep_processing: false }, handler: None };
    let domain = rig.smmu.new_domain(DomainConfig::Stage1(Paging::default()), options).unwrap();
    rig.fault(0, 0x4000_0402, 0x5000, 0x3, 0x868);
    rig.mmio.take_log();
    drop(domain);
    let sctlr = bank(0, 0x000);
    let expected = [(sctlr, 0x20), (bank(0, 0x058), 0x4000_0402), (bank(0, 0x008), 1), (sctlr, 0)];
    assert_eq!(rig.mmio.take_writes()[..4], expected, "cleared and terminated");
    let faults = rig.smmu.take_faults().faults;
    assert_eq!(faults.iter().map(|f| f.iova).collect::<Vec<_>>(), [Iova(0x5000)]);
}

#[test]
fn a_handler_may_map_and_attach() {
    let rig = rig();
    let domain = rig.stage1();
    let (target, master) = (domain.clone(), rig.smmu.add_master(&[StreamMatch::exact(0x868)]).unwrap());
    let smmu = rig.smmu.clone();
    rig.smmu.set_fault_handler(Some(Arc::new(move |report: &FaultReport| {
        target.map(Iova(report.iova.get() & !0xfff), Pa(0x6000_0000), 0x1000, Prot::RW).unwrap();
        smmu.attach(&master, &target).unwrap();
        FaultResponse::Resolved
    })));
    rig.fault(0, 0x402, 0x5008, 0x3, 0x868);
    assert_eq!(rig.smmu.handle_irq(), 1);
    assert_eq!(domain.iova_to_phys(Iova(0x5008)), Some(Pa(0x6000_0008)));
    rig.smmu.set_fault_handler(None);
}

#[test]
fn a_stage_2_fault_brings_its_ipa() {
    let rig = rig();
    let _domain =
        rig.smmu.new_domain(DomainConfig::Stage2(Paging::default()), DomainOptions::default()).unwrap();
    rig.fault(0, 0x402, 0x5000, 0x5_0006, 0x868);
    rig.mmio.set64(bank(0, 0x070), 0x9000);
    let fault = rig.smmu.handle_context_fault(0).unwrap();
    assert_eq!((fault.stage, fault.ipa, fault.stage1_bank), (2, Some(Ipa(0x9000)), Some(5)));
}

#[test]
fn a_global_fault_is_read_cleared_and_told() {
    let rig = rig();
    let told = Arc::new(AtomicUsize::new(0));
    let count = told.clone();
    rig.smmu.set_fault_handler(Some(Arc::new(move |report: &FaultReport| {
        assert_eq!((report.reason, report.stream), (FaultReason::UnknownStream, Some(StreamId(0x201))));
        count.fetch_add(1, Ordering::Relaxed);
        FaultResponse::Terminate
    })));
    rig.mmio.set32(0x048, 0x8000_0002);
    rig.mmio.set32(0x054, 0x201);
    rig.mmio.set64(0x040, 0x7000_0000);
    assert_eq!(rig.smmu.handle_irq(), 1);
    let log: Vec<(bool, usize)> =
        rig.mmio.take_log().iter().map(|access| (access.write, access.offset)).collect();
    let reads = [0x048, 0x050, 0x054, 0x058, 0x040].map(|offset| (false, offset));
    assert_eq!((&log[..5], log[5]), (&reads[..], (true, 0x048)));
    assert_eq!((rig.smmu.handle_irq(), told.load(Ordering::Relaxed)), (0, 1));
    let fault = rig.smmu.take_faults().faults[0];
    assert_eq!(fault.to_string(), "unknown stream: stream 0x201 unprivileged read of iova 0x70000000");
}

#[test]
fn the_fault_log_keeps_the_first_and_counts_the_rest() {
    let rig = rig_with(FakeMmio::with_handler(behave(0x7fff, 0x7fff)), |_, options| options.fault_log = 3);
    let _domain = rig.stage1();
    for n in 0..5 {
        rig.fault(0, 0x402, n << 12, 0x3, 0x868);
        assert_eq!(rig.smmu.handle_irq(), 1);
    }
    let batch = rig.smmu.take_faults();
    let iovas: Vec<u64> = batch.faults.iter().map(|fault| fault.iova.get()).collect();
    assert_eq!((iovas, batch.lost), (vec![0, 0x1000, 0x2000], 2));
    assert_eq!((rig.smmu.take_faults().lost, rig.smmu.faults_total()), (0, 5));
}

#[test]
fn resume_programs_everything_again() {
    let rig = rig();
    let master = rig.smmu.add_master(&[StreamMatch::exact(0x868)]).unwrap();
    let (s1, s2) = (rig.stage1(), {
        rig.smmu.new_domain(DomainConfig::Stage2(Paging::default()), DomainOptions::default()).unwrap()
    });
    rig.smmu.attach(&master, &s1).unwrap();
    let registers = |rig: &Rig| {
        let global = [0x000, SMR, S2CR, CBAR, CBAR + 4, CBA2R].map(|offset| rig.mmio.get32(offset));
        let banks = [0x000, 0x010, 0x020, 0x028, 0x030, 0x038]
            .map(|offset| (rig.mmio.get64(bank(0, offset)), rig.mmio.get64(bank(1, offset))));
        (global, banks)
    };
    let before = registers(&rig);
    // Power off.
    for offset in (0x800..0x2000).chain(CB..CB + 0x2000).step_by(4) {
        rig.mmio.set32(offset, 0);
    }
    zynqmp_registers(&rig.mmio);
    assert_ne!(registers(&rig), before);
    rig.smmu.resume().unwrap();
    assert_eq!(registers(&rig), before);
    drop((s1, s2));
}

#[test]
fn shutdown_lets_everything_through_and_resume_takes_it_back() {
    let rig = rig();
    assert!(!rig.smmu.shutdown());
    let _domain = rig.stage1();
    rig.mmio.take_log();
    assert!(rig.smmu.shutdown(), "domains were in use");
    assert_eq!(rig.mmio.take_writes(), [(0, 1)]);
    rig.smmu.resume().unwrap();
    assert_eq!(rig.mmio.get32(0) & 1, 0);
}

#[test]
fn tables_reach_a_walker_that_does_not_snoop() {
    let mmio = Arc::new(FakeMmio::new());
    zynqmp_registers(&mmio);
    let memory = Arc::new(FakeMemory::non_coherent(0x1000_0000, 1 << 20));
    let options = Options::new(0x2_0000, "arm,mmu-500");
    let smmu = SmmuV2::probe(mmio, memory.clone(), Arc::new(FakeClock::new()), options).unwrap();
    let domain = smmu.new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default()).unwrap();
    domain.map(Iova(0), Pa(0x6000_0000), 0x1000, Prot::RW).unwrap();
    let mut table = domain.table_root().unwrap().ttbr0;
    for _ in 0..3 {
        table = Pa(memory.device_load64(table) & 0xffff_ffff_f000);
    }
    assert_eq!(memory.device_load64(table) & 0xffff_ffff_f000, 0x6000_0000);
    assert_eq!(memory.device_load64(table), memory.load64(table));
}

#[test]
fn memory_that_runs_out_leaves_nothing_behind() {
    for budget in 0..4 {
        let rig = rig();
        rig.memory.fail_after(budget);
        let made = rig
            .smmu
            .new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default())
            .and_then(|domain| domain.map(Iova(0), Pa(0), 0x1000, Prot::RW));
        assert!(made.is_err(), "{budget}");
        assert_eq!(rig.smmu.free_banks(), 16);
        rig.memory.assert_clean();
    }
}

#[test]
fn an_unmap_that_no_hardware_saw_is_the_page_tables_own_business() {
    // The process owns its table: unmapping there and telling the domain is all there is to do.
    let rig = rig();
    let (table, root) = process_table(&rig);
    let domain = rig.smmu.new_domain(DomainConfig::Process(root), DomainOptions::default()).unwrap();
    table.map(Iova(0x1000), Pa(0x6000_0000), 0x1000, Prot::RW).unwrap();
    assert_eq!(table.unmap(Iova(0x1000), 0x1000, &mut NoFlush), Ok(0x1000));
    rig.mmio.take_log();
    domain.invalidate(Iova(0x1000), 0x1000).unwrap();
    assert_eq!(rig.mmio.take_writes().len(), 2);
    assert!(format!("{domain:?}").contains("Process"));
}

#[test]
fn a_handler_may_own_domains() {
    let rig = rig();
    let other = rig.stage1();
    let handler: Arc<dyn FaultHandler> = Arc::new(move |_: &FaultReport| {
        let _kept = &other;
        FaultResponse::Terminate
    });
    let options = DomainOptions { fault_model: FaultModel::default(), handler: Some(handler) };
    drop(rig.smmu.new_domain(DomainConfig::Stage1(Paging::default()), options).unwrap());
    assert_eq!(rig.smmu.free_banks(), 16);
    let other = rig.stage1();
    rig.smmu.set_fault_handler(Some(Arc::new(move |_: &FaultReport| {
        let _kept = &other;
        FaultResponse::Terminate
    })));
    rig.smmu.set_fault_handler(None);
    assert_eq!(rig.smmu.free_banks(), 16);
    rig.memory.assert_clean();
}

#[test]
fn protect_invalidates_the_pages_whose_permission_changed() {
    let rig = rig();
    let domain = rig.stage1();
    domain.map(Iova(0x1000), Pa(0x6000_0000), 0x2000, Prot::RW).unwrap();
    rig.mmio.take_log();
    domain.protect(Iova(0x2000), 0x1000, Prot::READ).unwrap();
    assert_eq!(rig.mmio.take_writes(), [(bank(0, 0x620), 2), (bank(0, 0x7f0), 0xffff_ffff)]);
    assert!(domain.protect(Iova(0x2000), 0x2000, Prot::RW).is_err(), "a hole");
}

/// Registers that read as anything: whatever the hardware says, the driver answers with an error or goes on.
#[test]
fn no_register_value_makes_the_driver_panic_or_hang() {
    let mut probed = 0;
    for seed in 0..3000u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mmio = Arc::new(FakeMmio::with_handler(move |_, access| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (!access.write).then_some(if access.size == 8 { random } else { random & 0xffff_ffff })
        }));
        let memory = Arc::new(FakeMemory::plain(0x1000_0000, 1 << 20));
        let options = Options { tlb_timeout_us: 3, ..Options::new(u64::MAX, "arm,mmu-500") };
        let clock = Arc::new(FakeClock::new());
        let Ok(smmu) = SmmuV2::probe(mmio, memory.clone(), clock, options) else { continue };
        probed += 1;
        let masters: Vec<_> =
            [1, 2, 0x8001].iter().filter_map(|id| smmu.add_master(&[StreamMatch::exact(*id)]).ok()).collect();
        let paging = Paging::default;
        let configs =
            [DomainConfig::Stage1(paging()), DomainConfig::Stage2(paging()), DomainConfig::Identity];
        let mut domains = Vec::new();
        for config in configs {
            let fault_model = FaultModel { stall: seed & 1 != 0, keep_processing: seed & 2 != 0 };
            let Ok(domain) = smmu.new_domain(config, DomainOptions { fault_model, handler: None }) else {
                continue;
            };
            for master in &masters {
                smmu.attach(master, &domain).unwrap();
            }
            let granule = u64::from(domain.page_sizes().trailing_zeros() != 64)
                << domain.page_sizes().trailing_zeros().min(63);
            let mapped = domain.map(Iova(0), Pa(0), 3 * granule, Prot::RW);
            assert_eq!(mapped.is_ok(), domain.page_sizes() != 0);
            let _it_may_time_out = domain.unmap(Iova(0), 2 * granule);
            domains.push(domain);
        }
        for _ in 0..3 {
            smmu.handle_irq();
        }
        assert!(smmu.take_faults().faults.iter().all(|fault| !fault.to_string().is_empty()));
        let _it_may_time_out = smmu.resume();
        for master in masters {
            smmu.remove_master(master);
        }
    }
    assert!(probed > 200, "{probed} of 3000 random SMMUs were accepted");
}
