//! Literal values: descriptors and registers as Linux writes them, shapes, and every error.

mod common;

use common::{Walker, plain};
use portcullis_arch::{Iova, Ipa, Pa};
use portcullis_hal::DmaMemory;
use portcullis_pgtable::{
    Concatenation, Config, ConfigError, Granule, Half, MAIR, MapError, NoFlush, PageTable, Prot,
    ProtectError, Stage1, Stage2, UnmapError,
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn stage1(granule: Granule, ias: u8, oas: u8) -> PageTable<Stage1, impl DmaMemory> {
    PageTable::new(plain(4 << 20), Config::new(granule, ias, oas)).unwrap()
}

fn stage2(granule: Granule, ias: u8, oas: u8) -> PageTable<Stage2, impl DmaMemory> {
    PageTable::new(plain(4 << 20), Config::new(granule, ias, oas)).unwrap()
}

#[test]
fn stage_1_leaves_have_linux_values() {
    let nx = 3 << 53;
    let cases: [(Prot<Stage1>, u64); 8] = [
        (Prot::RW.cached(), 0xf47),
        (Prot::RW, 0xe43),
        (Prot::RW.device(), 0xe4b),
        (Prot::READ.cached(), 0xfc7),
        (Prot::WRITE.cached(), 0xf47),
        (Prot::RW.cached().privileged(), 0xf07),
        (Prot::READ.privileged(), 0xe83),
        (Prot::RW.cached().noexec(), nx | 0xf47),
    ];
    let table = stage1(Granule::K4, 48, 48);
    for (prot, bits) in cases {
        table.map(Iova(0x7000_0000), Pa(0x6000_0000), 0x1000, prot).unwrap();
        let mapping = table.lookup(Iova(0x7000_0123)).unwrap();
        assert_eq!(mapping.descriptor, 0x6000_0000 | bits, "{prot:?}");
        assert_eq!((mapping.pa, mapping.level, mapping.page_size), (Pa(0x6000_0123), 3, 0x1000));
        let mut expected = prot;
        expected.read = true;
        assert_eq!(mapping.prot, expected, "a write-only page can be read at stage 1");
        table.unmap(Iova(0x7000_0000), 0x1000, &mut NoFlush).unwrap();
    }
    table.map(Iova(2 * MIB), Pa(4 * MIB), 2 * MIB, Prot::RW.cached()).unwrap();
    assert_eq!(table.lookup(Iova(2 * MIB)).unwrap().descriptor, (4 * MIB) | 0xf45, "a block");
}

#[test]
fn stage_2_leaves_have_linux_values() {
    let cases: [(Prot<Stage2>, u64); 6] = [
        (Prot::RW.cached(), 0x7ff),
        (Prot::RW, 0x6d7),
        (Prot::RW.device(), 0x6c7),
        (Prot::READ.cached(), 0x77f),
        (Prot::WRITE.cached(), 0x7bf),
        // Linux sets bit 53 too; see the crate's comment.
        (Prot::RW.cached().noexec(), 1 << 54 | 0x7ff),
    ];
    let table = stage2(Granule::K4, 40, 40);
    for (prot, bits) in cases {
        table.map(Ipa(0x7000_0000), Pa(0x6000_0000), 0x1000, prot).unwrap();
        let mapping = table.lookup(Ipa(0x7000_0000)).unwrap();
        assert_eq!((mapping.descriptor, mapping.prot), (0x6000_0000 | bits, prot));
        table.unmap(Ipa(0x7000_0000), 0x1000, &mut NoFlush).unwrap();
    }
}

#[test]
fn the_first_map_of_a_page_makes_linux_tables() {
    for (coherent, synced) in [(true, 0), (false, 1 << 55)] {
        let config = Config::<Stage1>::new(Granule::K4, 48, 48).coherent_walk(coherent);
        let memory = plain(1 << 20);
        let table = PageTable::new(memory.clone(), config).unwrap();
        table.map(Iova(0x70_1234_5000), Pa(0x6000_0000), 0x1000, Prot::RW.cached()).unwrap();
        let mut at = table.root();
        for index in [0, 0x1c0, 0x091] {
            let word = memory.load64(Pa(at.get() + index * 8));
            assert_eq!(word & !0xffff_ffff_f000, synced | 3, "a table entry has no attributes");
            at = Pa(word & 0xffff_ffff_f000);
        }
        assert_eq!(memory.load64(Pa(at.get() + 0x145 * 8)), 0x6000_0f47);
        assert_eq!(table.table_count(), 4);
    }
}

#[test]
fn stage_1_registers_are_what_linux_writes() {
    let registers = |config| PageTable::new(plain(1 << 20), config).unwrap().registers();
    let config = Config::<Stage1>::new(Granule::K4, 48, 48);
    // The low half of 0x00803510 and 0x00802010; bit 23 (EPD1) is the driver's.
    assert_eq!(registers(config).tcr(), 0x3510);
    assert_eq!(registers(config.coherent_walk(false)).tcr(), 0x2010);
    assert_eq!((registers(config).ips, registers(config).mair), (5, 0xf404_ff44));
    assert_eq!(MAIR, 0xf404_ff44);
    let upper = registers(Config::new(Granule::K64, 39, 44).half(Half::Upper));
    assert_eq!((upper.half, upper.tsz, upper.tg, upper.ips), (Half::Upper, 25, 3, 4));
    assert_eq!(upper.tcr(), 0xf519_0000);
}

#[test]
fn stage_2_registers_are_what_linux_writes() {
    let table = stage2(Granule::K4, 40, 40);
    let r = table.registers();
    assert_eq!((r.t0sz, r.sl0, r.tg, r.sh, r.irgn, r.orgn, r.ps), (24, 1, 0, 3, 1, 1, 2));
    assert_eq!(r.vtcr(), 0x2_3558);
    assert_eq!(r.vttbr, table.root());
}

#[test]
fn start_levels_and_concatenation_follow_linux() {
    use Concatenation::{Forced, Linux, Never};
    use Granule::{K4, K16, K64};
    // granule, input bits, choice, start level, SL0, entries of the first table
    let cases = [
        (K4, 32, Linux, 1, 1, 4),
        (K4, 39, Linux, 1, 1, 512),
        (K4, 40, Linux, 1, 1, 1024),
        (K4, 43, Linux, 1, 1, 8192),
        (K4, 44, Linux, 0, 2, 32),
        (K4, 48, Linux, 0, 2, 512),
        (K4, 40, Never, 0, 2, 2),
        (K4, 40, Forced, 1, 1, 1024),
        (K4, 34, Linux, 1, 1, 16),
        (K4, 34, Forced, 2, 0, 8192),
        (K16, 40, Linux, 1, 2, 16),
        (K16, 40, Forced, 2, 1, 32768),
        (K16, 47, Linux, 1, 2, 2048),
        (K16, 48, Linux, 1, 2, 4096),
        (K64, 44, Linux, 1, 2, 4),
        (K64, 44, Forced, 2, 1, 32768),
        (K64, 48, Linux, 1, 2, 64),
        (K64, 32, Linux, 2, 1, 8),
        (K64, 32, Forced, 3, 0, 65536),
    ];
    for (granule, bits, choice, start, sl0, entries) in cases {
        let memory = plain(4 << 20);
        let config = Config::<Stage2>::new(granule, bits, 48).concatenation(choice);
        let table = PageTable::new(memory.clone(), config).unwrap();
        let case = (granule, bits, choice);
        assert_eq!((table.start_level(), table.registers().sl0), (start, sl0), "{case:?}");
        assert!(table.root().is_aligned(entries * 8), "{case:?}");
        let walker = Walker::stage2(&table.registers());
        assert_eq!(walker.start(), u32::from(start), "{case:?}");
        // The last page uses the last entry of the first table.
        let last = (1 << bits) - granule.size();
        table.map(Ipa(last), Pa(0), granule.size(), Prot::RW).unwrap();
        assert_ne!(memory.load64(Pa(table.root().get() + (entries - 1) * 8)), 0, "{case:?}");
        assert_eq!(walker.walk(last + 5, |pa| memory.load64(Pa(pa))).unwrap().pa, 5, "{case:?}");
        drop(table);
        memory.assert_clean();
    }
}

#[test]
fn impossible_configurations_are_refused_with_the_reason() {
    let new1 =
        |granule, ias, oas| PageTable::new(plain(1 << 20), Config::<Stage1>::new(granule, ias, oas)).err();
    assert_eq!(
        new1(Granule::K4, 24, 48),
        Some(ConfigError::InputBits { bits: 24, granule: Granule::K4, max: 48 })
    );
    assert!(matches!(new1(Granule::K64, 52, 48), Some(ConfigError::InputBits { bits: 52, .. })));
    assert_eq!(new1(Granule::K4, 48, 39), Some(ConfigError::OutputBits { bits: 39 }));
    assert!(matches!(new1(Granule::K4, 48, 52), Some(ConfigError::OutputBits { bits: 52 })));
    assert_eq!(new1(Granule::K4, 25, 48), None);
    let new2 = |granule, ias, choice| {
        let config = Config::<Stage2>::new(granule, ias, 48).concatenation(choice);
        PageTable::new(plain(1 << 20), config).err()
    };
    for (granule, ias, choice, level, entries) in [
        (Granule::K4, 48, Concatenation::Forced, 0, 512),
        (Granule::K4, 31, Concatenation::Forced, 1, 2),
        (Granule::K4, 25, Concatenation::Forced, 2, 16),
        (Granule::K16, 48, Concatenation::Never, 0, 2),
    ] {
        let error = new2(granule, ias, choice);
        if granule == Granule::K4 && ias == 31 {
            assert_eq!(error, None, "two tables at level 2 are legal");
            continue;
        }
        let expected = ConfigError::Concatenation { granule, bits: ias, level, entries };
        assert_eq!(error, Some(expected));
    }
    // Tables above what the walker can address.
    let high = std::sync::Arc::new(portcullis_hal::fake::FakeMemory::plain(1 << 32, 1 << 20));
    let error = PageTable::new(high.clone(), Config::<Stage1>::new(Granule::K4, 32, 32)).err();
    assert_eq!(error, Some(ConfigError::TableAddress { pa: 1 << 32, bits: 32 }));
    high.assert_clean();
    high.fail_after(0);
    let error = PageTable::new(high, Config::<Stage2>::new(Granule::K4, 40, 40)).err();
    assert_eq!(error, Some(ConfigError::NoMemory { bytes: 8192 }));
}

#[test]
fn bad_ranges_are_refused_and_name_the_limit() {
    let table = stage1(Granule::K4, 39, 36);
    let map = |iova, pa, len| table.map(Iova(iova), Pa(pa), len, Prot::RW).unwrap_err();
    let (first, last) = (0, (1 << 39) - 1);
    for (iova, len) in [(1 << 39, 0x1000), ((1 << 39) - 0x1000, 0x2000), (u64::MAX - 0xfff, 0x1000)] {
        assert_eq!(map(iova, 0, len), MapError::InputRange { iova, len, first, last });
    }
    for (pa, len) in [(1 << 36, 0x1000), ((1 << 36) - 0x1000, 0x2000), (u64::MAX - 0xfff, 0x1000)] {
        assert_eq!(map(0, pa, len), MapError::OutputRange { pa, len, bits: 36 });
    }
    assert!(map(0, (1 << 36) - 0x1000, 0x2000).to_string().contains("36 output bits"));
    for (iova, pa, len) in [(1, 0, 0x1000), (0, 0x800, 0x1000), (0, 0, 0), (0, 0, 0x1001)] {
        assert_eq!(map(iova, pa, len), MapError::Unaligned { iova, pa, len, granule: 0x1000 });
    }
    assert_eq!(table.map(Iova(0), Pa(0), 0x1000, Prot::new(false, false)), Err(MapError::NoAccess));
    let unmap = |iova, len| table.unmap(Iova(iova), len, &mut NoFlush).unwrap_err();
    assert_eq!(unmap(0, 0), UnmapError::Unaligned { iova: 0, len: 0, granule: 0x1000 });
    assert_eq!(unmap(0, 0x800), UnmapError::Unaligned { iova: 0, len: 0x800, granule: 0x1000 });
    assert_eq!(unmap(0, !0xfff), UnmapError::InputRange { iova: 0, len: !0xfff, first, last });
    assert_eq!(table.lookup(Iova(1 << 39)), None);
    assert_eq!(table.lookup(Iova(u64::MAX)), None);
    assert_eq!(table.table_count(), 1, "nothing was made");
}

#[test]
fn the_upper_half_ends_at_the_top_of_the_address_space() {
    let memory = plain(1 << 20);
    let config = Config::<Stage1>::new(Granule::K4, 39, 48).half(Half::Upper);
    let table = PageTable::new(memory.clone(), config).unwrap();
    let first = 0xffff_ff80_0000_0000;
    assert_eq!(table.input_range(), (Iova(first), Iova(u64::MAX)));
    let walker = Walker::stage1(&table.registers());
    for iova in [first, u64::MAX - 0xfff] {
        table.map(Iova(iova), Pa(0x5000), 0x1000, Prot::RW).unwrap();
        assert_eq!(table.lookup(Iova(iova + 7)).unwrap().pa, Pa(0x5007));
        assert_eq!(walker.walk(iova + 7, |pa| memory.load64(Pa(pa))).unwrap().pa, 0x5007);
    }
    assert_eq!(table.lookup(Iova(0)), None);
    let outside = table.map(Iova(first - 0x1000), Pa(0), 0x1000, Prot::RW);
    assert!(matches!(outside, Err(MapError::InputRange { last: u64::MAX, .. })));
    let wraps = table.map(Iova(u64::MAX - 0xfff), Pa(0), 0x2000, Prot::RW);
    assert!(matches!(wraps, Err(MapError::InputRange { .. })));
    assert_eq!(table.unmap(Iova(first), 1 << 39, &mut NoFlush), Ok(0x2000));
}

#[test]
fn pages_are_as_large_as_addresses_and_length_allow() {
    // The mixed case of generic_pt's unit tests: 14 of 2M, 3 of 1G, 3 of 2M.
    let table = stage1(Granule::K4, 48, 48);
    let (first, end) = (0x3_fe40_0000, 0x4_c060_0000);
    table.map(Iova(first), Pa(first), end - first, Prot::RW).unwrap();
    let mut leaves = Vec::new();
    let mut at = first;
    while at < end {
        let size = table.lookup(Iova(at)).unwrap().page_size;
        leaves.push(size);
        at += size;
    }
    let expected = [vec![2 * MIB; 14], vec![GIB; 3], vec![2 * MIB; 3]].concat();
    assert_eq!(leaves, expected);
    // Addresses that do not agree below 2M: pages only.
    table.map(Iova(0xfef8_0000), Pa(0x20_8b95_d000), 0x2_0000, Prot::RW).unwrap();
    assert_eq!(table.lookup(Iova(0xfef9_ffff)).unwrap().pa, Pa(0x20_8b97_cfff));
}

#[test]
fn a_cut_block_is_refused_and_nothing_changes() {
    let table = stage1(Granule::K4, 48, 48);
    table.map(Iova(0), Pa(0), 0x1000, Prot::RW).unwrap();
    table.map(Iova(2 * MIB), Pa(2 * MIB), 4 * MIB, Prot::RW).unwrap();
    table.map(Iova(GIB), Pa(GIB), GIB, Prot::RW).unwrap();
    let refused = |iova, len, block, size| {
        let error = UnmapError::PartialBlock { block, size };
        assert_eq!(table.unmap(Iova(iova), len, &mut NoFlush), Err(error));
        let mapped = [0, 2 * MIB, 6 * MIB - 1, GIB, 2 * GIB - 1];
        assert!(mapped.iter().all(|&iova| table.lookup(Iova(iova)).unwrap().pa == Pa(iova)));
    };
    refused(2 * MIB, 0x1000, 2 * MIB, 2 * MIB);
    refused(4 * MIB - 0x1000, 0x1000, 2 * MIB, 2 * MIB);
    refused(0, 3 * MIB, 2 * MIB, 2 * MIB);
    refused(3 * MIB, 3 * MIB, 2 * MIB, 2 * MIB);
    refused(0, 5 * MIB, 4 * MIB, 2 * MIB);
    refused(0, GIB + 2 * MIB, GIB, GIB);
    refused(GIB + 0x1000, GIB, GIB, GIB);
    let error = UnmapError::PartialBlock { block: GIB, size: GIB };
    assert!(error.to_string().contains("0x40000000+0x40000000"));
    assert_eq!(table.unmap(Iova(0), 2 * GIB, &mut NoFlush), Ok(0x1000 + 4 * MIB + GIB));
}

#[test]
fn protect_changes_all_of_a_range_or_nothing() {
    let table = stage1(Granule::K4, 48, 48);
    table.map(Iova(0x1000), Pa(0x1000), 0x2000, Prot::RW).unwrap();
    table.map(Iova(0x3000), Pa(0x3000), 0x1000, Prot::READ).unwrap();
    table.map(Iova(2 * MIB), Pa(2 * MIB), 2 * MIB, Prot::RW).unwrap();
    let protect = |iova, len, prot| table.protect(Iova(iova), len, prot, &mut NoFlush);
    let prots = || [0x1000, 0x2000, 0x3000].map(|iova| table.lookup(Iova(iova)).unwrap().prot);
    assert_eq!(protect(0x1000, 0x4000, Prot::READ), Err(ProtectError::NotMapped { iova: 0x4000 }));
    assert_eq!(prots(), [Prot::RW, Prot::RW, Prot::READ]);
    assert_eq!(protect(0x1000, 0x3000, Prot::new(false, false)), Err(ProtectError::NoAccess));
    protect(0x1000, 0x3000, Prot::READ).unwrap();
    assert_eq!(prots(), [Prot::READ; 3], "some had it already");
    protect(0x2000, 0x1000, Prot::RW.device()).unwrap();
    assert_eq!(prots(), [Prot::READ, Prot::RW.device(), Prot::READ]);
    let cut = UnmapError::PartialBlock { block: 2 * MIB, size: 2 * MIB };
    assert_eq!(protect(2 * MIB, 0x1000, Prot::READ), Err(cut.into()));
    protect(2 * MIB, 2 * MIB, Prot::READ.cached().noexec()).unwrap();
    let block = table.lookup(Iova(3 * MIB)).unwrap();
    assert_eq!((block.pa, block.page_size), (Pa(3 * MIB), 2 * MIB));
    assert_eq!(block.prot, Prot::READ.cached().noexec());
}

#[test]
fn an_empty_table_in_the_place_of_a_block_is_used_or_freed() {
    let memory = plain(1 << 20);
    let mut table = PageTable::new(memory.clone(), Config::<Stage1>::new(Granule::K4, 39, 48)).unwrap();
    let map = |table: &PageTable<Stage1, _>, iova, len| table.map(Iova(iova), Pa(iova), len, Prot::RW);
    for page in 0..512 {
        map(&table, page * 0x1000, 0x1000).unwrap();
    }
    for page in 0..512 {
        assert_eq!(table.unmap(Iova(page * 0x1000), 0x1000, &mut NoFlush), Ok(0x1000));
    }
    assert_eq!(table.table_count(), 3, "pages went one by one, so the table stayed");
    map(&table, 0, 4 * MIB).unwrap();
    assert_eq!(table.lookup(Iova(0)).unwrap().page_size, 0x1000);
    assert_eq!(table.lookup(Iova(2 * MIB)).unwrap().page_size, 2 * MIB);
    assert_eq!(table.unmap(Iova(0), 2 * MIB, &mut NoFlush), Ok(2 * MIB));
    assert_eq!(table.table_count(), 2, "the whole range went, and the table with it");
    map(&table, 0, 0x1000).unwrap();
    map(&table, GIB, 0x1000).unwrap();
    table.unmap(Iova(0), 0x1000, &mut NoFlush).unwrap();
    table.unmap(Iova(GIB), 0x1000, &mut NoFlush).unwrap();
    assert_eq!(table.table_count(), 5);
    assert_eq!(table.free_empty_tables(&mut NoFlush), 3);
    assert_eq!(table.lookup(Iova(3 * MIB)).unwrap().pa, Pa(3 * MIB), "what is mapped stays");
    map(&table, GIB, GIB).unwrap();
    assert_eq!(table.lookup(Iova(GIB)).unwrap().page_size, GIB);
    drop(table);
    memory.assert_clean();
}
