//! Every option of the configuration, as software finds it.

mod rig;

use portcullis_arch::Access;
use portcullis_bus::Mmio;
use portcullis_smmuv2::{Aarch32, Config, Granules, Interrupts, SmmuV2};
use rig::*;

fn with(change: impl FnOnce(&mut Config)) -> Config {
    let mut c = Config::default();
    change(&mut c);
    c
}

fn ids(c: Config) -> (u32, u32, u32) {
    let r = Rig::new(c);
    (r.r(IDR0), r.r(IDR1), r.r(IDR2))
}

#[test]
fn the_default_is_everything_but_what_is_optional_to_have() {
    // S1TS, S2TS, NTS, SMS; short and long; NUMIRPT 1; CTTW; 15 bits; 64 groups.
    assert_eq!(ids(Config::default()).0, 0x7801_5e40);
    // 32 global pages, as many as banks; SMCD, 32 banks.
    assert_eq!(ids(Config::default()).1, 0x4000_8020);
    // HADS, VMID16S, 64K, 16K, 4K, UBS 5, OAS 5, IAS 5.
    assert_eq!(ids(Config::default()).2, 0x1000_f555);
}

#[test]
fn each_option_has_its_identification_bit() {
    let (d0, d1, d2) = ids(Config::default());
    let check = |c: Config, want: (u32, u32, u32), what: &str| assert_eq!(ids(c), want, "{what}");
    check(with(|c| c.stream_groups = 1), (d0 - 0x40 + 1, d1, d2), "one group");
    check(with(|c| c.stream_groups = 128), (d0 - 0x40 + 128, d1, d2), "128 groups");
    check(
        with(|c| c.stream_groups = 1024),
        ((d0 - 0x40 + 128) | 1 << 15, d1, d2 | 1024 << 16),
        "EXSMRGS, EXNUMSMRG",
    );
    check(with(|c| c.context_banks = 1), (d0, 0x3000_8001, d2), "one bank, 16 global pages");
    check(with(|c| c.context_banks = 128), (d0, 0x6000_8080, d2), "128 banks, 128 global pages");
    check(with(|c| c.stage2_only_banks = 8), (d0, d1 | 8 << 16, d2), "NUMS2CB");
    check(with(|c| c.nested = false), (d0 & !(1 << 28), d1, d2), "NTS");
    check(
        with(|c| (c.stage1, c.nested, c.translation_ops) = (false, false, false)),
        (d0 & !(5 << 28) | 1 << 26, d1, d2),
        "S1TS, NTS, ATOSNS",
    );
    check(with(|c| (c.stage2, c.nested) = (false, false)), (d0 & !(3 << 28), d1, d2), "S2TS");
    check(with(|c| c.translation_ops = false), (d0 | 1 << 26, d1, d2), "ATOSNS");
    check(with(|c| c.stream_matching = false), (d0 & !(1 << 27), d1, d2), "SMS");
    check(with(|c| c.stream_id_bits = 7), (d0 & !(0xf << 9) | 7 << 9, d1, d2), "NUMSIDB");
    check(with(|c| c.extended_ids = true), (d0 | 1 << 8, d1, d2), "EXIDS");
    check(
        with(|c| (c.extended_ids, c.stream_id_bits) = (true, 8)),
        (d0 | 1 << 8, d1, d2),
        "EXIDS has NUMSIDB 15",
    );
    check(
        with(|c| (c.compressed_index, c.stream_matching) = (true, false)),
        (d0 & !(1 << 27), d1, d2 | 1 << 29),
        "COMPINDEXS",
    );
    check(
        with(|c| (c.compressed_index, c.stream_matching, c.context_banks) = (true, false, 1)),
        (d0 & !(1 << 27), 0x4000_8001, d2 | 1 << 29),
        "pages 8 to 23 need 32 global pages",
    );
    check(with(|c| c.conflict_detection = false), (d0, d1 & !(1 << 15), d2), "SMCD");
    check(with(|c| c.aarch32 = Aarch32::LongOnly), (d0 | 1 << 24, d1, d2), "PTFS 1");
    check(with(|c| c.aarch32 = Aarch32::None), (d0 | 2 << 24, d1, d2), "PTFS 2");
    let granules = |k4, k16, k64| Granules { k4, k16, k64 };
    check(with(|c| c.granules = granules(true, false, false)), (d0, d1, d2 & !(6 << 12)), "4K only");
    check(with(|c| c.granules = granules(false, true, false)), (d0, d1, d2 & !(5 << 12)), "16K only");
    check(with(|c| c.granules = granules(false, false, true)), (d0, d1, d2 & !(3 << 12)), "64K only");
    for (bits, code) in [(32, 0), (36, 1), (40, 2), (42, 3), (44, 4), (48, 5)] {
        check(with(|c| c.ipa_bits = bits), (d0, d1, d2 & !0xf | code), "IAS");
        check(with(|c| c.pa_bits = bits), (d0, d1, d2 & !0xf0 | code << 4), "OAS");
    }
    for (bits, code) in [(32, 0), (36, 1), (40, 2), (42, 3), (44, 4), (49, 5), (64, 15)] {
        check(with(|c| c.upstream_bits = bits), (d0, d1, d2 & !0xf00 | code << 8), "UBS");
    }
    check(with(|c| c.page_64k = true), (d0, d1 | 1 << 31, d2), "PAGESIZE");
    check(with(|c| c.coherent_walk = false), (d0 & !(1 << 14), d1, d2), "CTTW");
    check(with(|c| c.broadcast = true), (d0 | 1 << 13, d1, d2), "BTM");
    check(with(|c| c.vmid16 = false), (d0, d1, d2 & !(1 << 15)), "VMID16S");
    check(with(|c| c.hierarchy_disable = false), (d0, d1, d2 & !(1 << 28)), "HADS");
    let r = Rig::new(with(|c| c.secure = true));
    assert_eq!((r.rs(IDR0), r.r(IDR0)), (d0 | 1 << 31, d0), "SES");
    let r = Rig::new(with(|c| c.revision = 0x31));
    assert_eq!(r.r(0x3c), 0x31);
    assert_eq!(r.r(0xfe0), 0, "identification of Arm's parts is the MMU-500's");
}

#[test]
fn illegal_configurations_are_refused_by_name() {
    let no = |change: fn(&mut Config)| {
        let c = with(change);
        SmmuV2::new(c, memory(), Interrupts::default()).err().expect("refused").to_string()
    };
    for (change, says) in [
        ((|c| c.stream_groups = 0) as fn(&mut Config), "stream_groups is 0"),
        (|c| c.stream_groups = 1025, "stream_groups is 1025"),
        (|c| c.context_banks = 0, "context_banks is 0"),
        (|c| c.context_banks = 129, "context_banks is 129"),
        (|c| c.stage2_only_banks = 33, "stage2_only_banks is 33"),
        (|c| c.stream_id_bits = 0, "stream_id_bits is 0"),
        (|c| c.stream_id_bits = 16, "stream_id_bits is 16"),
        (|c| c.ipa_bits = 47, "ipa_bits is 47"),
        (|c| c.pa_bits = 49, "pa_bits is 49"),
        (|c| c.upstream_bits = 48, "upstream_bits is 48"),
        (|c| c.tlb_entries = usize::MAX, "tlb_entries"),
        (|c| (c.stage1, c.stage2) = (false, false), "at least one stage"),
        (|c| c.stage1 = false, "nested translation needs both stages"),
        (|c| (c.stream_groups, c.stream_matching) = (200, false), "more than 128 groups"),
        (|c| (c.extended_ids, c.stream_matching) = (true, false), "extended ids"),
        (|c| c.compressed_index = true, "compressed indexing"),
        (
            |c| {
                c.aarch32 = Aarch32::None;
                c.granules = Granules { k4: false, k16: false, k64: false };
            },
            "a table format",
        ),
    ] {
        let said = no(change);
        assert!(said.contains(says), "{said}");
    }
}

#[test]
fn pages_of_64_kib_move_every_register() {
    let r = Rig::new(with(|c| (c.page_64k, c.context_banks) = (true, 16)));
    assert_eq!(r.smmu.config().window_size(), 32 * 0x1_0000);
    r.w(0x1_0004, LINUX_CBAR); // CBAR1
    r.w(0x1_0804, 1); // CBA2R1
    r.w64(0x11_0020, 0x0123_4567_8000); // TTBR0 of bank 1
    assert_eq!(r.r(r.cbar(1)), LINUX_CBAR);
    assert_eq!(r.r64(0x11_0020), 0x0123_4567_8000);
    assert_eq!(r.r(0x11_0058), 0x400);
    assert_eq!(r.r(0x1000), 0, "nothing where 4 KiB pages would be");
    assert_eq!(r.r(0x800), 0);
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    t.page(root, 0x7000_0000, DATA | RW);
    r.w(CR0, 0x402);
    r.stage1(1, root, LINUX_SCTLR);
    r.group(63, 5, 1);
    assert_eq!(wr(&mut r.port(), 5, 0x7000_0123), Ok(DATA | 0x123));
}

#[test]
fn the_last_of_128_banks_translates() {
    let r = Rig::new(with(|c| c.context_banks = 128));
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    t.page(root, 0x7000_0000, DATA | RW);
    r.w(CR0, 0x402);
    r.stage1(127, root, LINUX_SCTLR);
    r.group(0, 5, 127);
    assert_eq!(wr(&mut r.port(), 5, 0x7000_0000), Ok(DATA));
    assert!(!r.irqs.level(127));
    assert_eq!(wr(&mut r.port(), 5, 0x7000_1000), Err(ABORT));
    assert!(r.irqs.level(127));
    // The window has as many context pages as global ones: all of them are banks here.
    assert_eq!(r.smmu.config().window_size(), 0x10_0000);
    let small = Rig::new(with(|c| c.context_banks = 3));
    small.wb(3, TTBR0, 0xffff_ffff);
    assert_eq!(small.rb(3, TTBR0), 0, "a page above the last bank");
    assert_eq!(small.r(small.cbar(3)), 0);
}

#[test]
fn stream_indexing_selects_the_group_by_number() {
    let r = Rig::new(with(|c| (c.stream_matching, c.stream_groups) = (false, 4)));
    r.w(CR0, 0x402);
    for n in 0..4u64 {
        r.w(SMR + 4 * n, 0xffff_ffff);
        assert_eq!(r.r(SMR + 4 * n), 0, "SMR is not there");
        r.w(S2CR + 4 * n, 0x0002_0000);
    }
    r.w(S2CR + 8, 0x0001_0000);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 2, DATA), Ok(DATA));
    assert_eq!(rd(&mut p, 3, DATA), Err(ABORT));
    assert_eq!(r.r(GFSR), 1, "S2CR3 is fault");
    r.w(GFSR, 1);
    assert_eq!(rd(&mut p, 4, DATA), Err(ABORT));
    assert_eq!(r.r(GFSR), 2, "there is no S2CR4");
}

#[test]
fn compressed_indexing_looks_the_group_up() {
    let r = Rig::new(with(|c| (c.compressed_index, c.stream_matching) = (true, false)));
    const TABLE: u64 = 8 * 0x1000;
    r.w(CR0, 0x402);
    r.w(S2CR + 4 * 5, 0x0001_0000);
    r.w(S2CR + 4 * 6, 0x0002_0000);
    r.w(TABLE, 0x0505_0505);
    assert_eq!(r.r(TABLE), 0, "not while COMPINDEXENABLE is 0");
    r.w(CR2, 1 << 29);
    assert_eq!(r.r(CR2), 1 << 29);
    // By word and by byte: stream 0x1234 is byte 0 of word 0x48d, 0x1237 byte 3.
    r.w(TABLE + 0x1234, 0x0506_0906);
    assert_eq!(r.r(TABLE + 0x1234), 0x0506_0906);
    r.ns.mmio_write(TABLE + 0x1235, &[0x05]).unwrap();
    let mut b = [0];
    r.ns.mmio_read(TABLE + 0x1235, &mut b).unwrap();
    assert_eq!((b[0], r.r(TABLE + 0x1234)), (5, 0x0506_0506));
    let mut p = r.port();
    assert_eq!(rd(&mut p, 0x1235, DATA), Ok(DATA));
    assert_eq!(rd(&mut p, 0x1237, DATA), Ok(DATA));
    assert_eq!(rd(&mut p, 0x1234, DATA), Err(ABORT));
    assert_eq!(r.r(GFSR), 1);
    r.w(GFSR, 1);
    r.w(TABLE + 0x1234, 0xc8); // no such group
    assert_eq!(rd(&mut p, 0x1234, DATA), Err(ABORT));
    assert_eq!(r.r(GFSR), 2);
    // The table ends with the last stream id.
    r.w(TABLE + 0x8000, 0xffff_ffff);
    assert_eq!(r.r(TABLE + 0x8000), 0);
    r.ns.mmio_write(TABLE + 0x7fff, &[7]).unwrap();
    assert_eq!(r.r(TABLE + 0x7ffc), 0x0700_0000);
    // Off again: the id is the index.
    r.w(CR2, 0);
    r.w(GFSR, 0xffff_ffff);
    assert_eq!(rd(&mut p, 5, DATA), Ok(DATA));
    assert_eq!(rd(&mut p, 0x1235, DATA), Err(ABORT));
}

#[test]
fn the_secure_side_can_turn_compressed_indexing_off_for_the_other() {
    let r = Rig::new(with(|c| (c.compressed_index, c.stream_matching, c.secure) = (true, false, true)));
    r.w(CR0, 0x402);
    r.w(CR2, 1 << 29);
    r.w(S2CR + 4 * 5, 0x0001_0000);
    r.w(0x8000, 5);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 0, DATA), Ok(DATA));
    r.ws(SCR1, r.rs(SCR1) | 1 << 29);
    assert_eq!(rd(&mut p, 5, DATA), Ok(DATA));
    assert_eq!(rd(&mut p, 0x10, DATA), Ok(DATA), "S2CR16 is type 0: bank 0, whose M is 0");
}

#[test]
fn sixteen_bit_stream_ids() {
    let r = Rig::new(with(|c| c.extended_ids = true));
    r.w(CR0, 0x402);
    r.w(S2CR, 0x0001_0000);
    r.w(SMR, 0x8000_0042);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 0x42, DATA), Ok(DATA), "the old format while EXIDENABLE is 0");
    assert_eq!(rd(&mut p, 0x8042, DATA), Err(ABORT), "ids have 15 bits then");
    r.w(CR0, 0x40a);
    assert_eq!(r.r(CR0), 0x40a);
    assert_eq!(rd(&mut p, 0x42, DATA), Err(ABORT), "SMR bit 31 is a mask bit now, and EXIDVALID is 0");
    r.w(SMR, 0x00f0_8042);
    r.w(S2CR, 0x0001_0400);
    assert_eq!(r.r(S2CR), 0x0001_0400);
    assert_eq!(r.r(SMR), 0x00f0_8042);
    for (id, want) in [(0x8042, Ok(DATA)), (0x80f2, Ok(DATA)), (0x0042, Err(ABORT)), (0x8043, Err(ABORT))] {
        assert_eq!(rd(&mut p, id, DATA), want, "{id:#x}");
    }
    r.w(GFSR, 0xffff_ffff);
    assert_eq!(rd(&mut p, 0xffff, DATA), Err(ABORT));
    assert_eq!(r.r(GFSYNR1), 0xffff);
    // EXIDENABLE is not there without IDR0.EXIDS.
    let r = Rig::new(Config::default());
    r.w(CR0, 0x40a);
    assert_eq!(r.r(CR0), 0x402);
}

fn extended() -> Rig {
    let r = Rig::new(with(|c| (c.stream_groups, c.secure) = (300, true)));
    r.ws(CR0, 0x402);
    r.w(CR0, 0x402);
    r
}
const EXSMR: u64 = 6 * 0x1000;
const EXS2CR: u64 = 7 * 0x1000;

#[test]
fn the_first_registers_are_the_last_128_of_an_extended_smmu() {
    let r = extended();
    r.ws(SCR1, 0x0001_8020); // all 128 visible groups non-secure
    r.w(SMR + 4 * 127, 0x8000_0042);
    r.w(S2CR + 4 * 127, 0x0001_0000);
    r.w(EXSMR + 4 * 299, 0x1234);
    assert_eq!(r.r(EXSMR + 4 * 299), 0, "EXSMRGENABLE is 0");
    assert_eq!(rd(&mut r.port(), 0x42, DATA), Ok(DATA));
    r.ws(CR2, 1 << 31 | 300 << 16);
    r.w(CR2, 1 << 31);
    assert_eq!(r.rs(CR2), 1 << 31 | 300 << 16);
    assert_eq!(r.r(EXSMR + 4 * 299), 0x8000_0042);
    assert_eq!(r.r(EXS2CR + 4 * 299), 0x0001_0000);
    assert_eq!(r.r(SMR + 4 * 127), 0x8000_0042);
    r.w(EXSMR + 4 * 172, 0x8000_0007);
    assert_eq!(r.r(SMR), 0x8000_0007, "SMR0 is group 172");
    r.w(EXSMR + 4 * 300, 0x8000_0007);
    assert_eq!(r.r(EXSMR + 4 * 300), 0);
}

#[test]
fn groups_beyond_128_match_once_enabled() {
    let r = extended();
    r.ws(CR2, 1 << 31 | 250 << 16);
    r.w(CR2, 1 << 31);
    r.w(EXS2CR, 0x0001_0000);
    r.w(EXSMR, 0x8000_0001);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 1, DATA), Ok(DATA));
    // Groups 250 and up are secure.
    r.ws(EXS2CR + 4 * 250, 0x0001_0000);
    r.ws(EXSMR + 4 * 250, 0x8000_0002);
    assert_eq!(r.r(EXSMR + 4 * 250), 0);
    assert_eq!(rd(&mut p, 2, DATA), Err(ABORT));
    assert_eq!(go(&mut p, secure(2), DATA, Access::Read), Ok(DATA));
    // Forbidden by the secure side: accesses and matching.
    r.ws(CR2, 1 << 31 | 1 << 30 | 250 << 16);
    assert_eq!(r.r(EXSMR), 0);
    assert_eq!(rd(&mut p, 1, DATA), Err(ABORT));
    r.ws(CR2, 1 << 31 | 250 << 16);
    assert_eq!(rd(&mut p, 1, DATA), Ok(DATA));
    r.w(CR2, 0);
    assert_eq!(rd(&mut p, 1, DATA), Err(ABORT), "its own enable");
}

#[test]
fn identification_counts_extended_groups_per_side() {
    let r = extended();
    r.ws(SCR1, 0x0001_4020);
    // 300 groups, 64 of the last 128 secure: 236 are non-secure.
    assert_eq!((r.rs(IDR2) >> 16 & 0x7ff, r.r(IDR2) >> 16 & 0x7ff), (300, 236));
    assert_eq!((r.rs(IDR0) & 0xff, r.r(IDR0) & 0xff), (128, 64));
    r.ws(CR2, 1 << 31 | 77 << 16);
    assert_eq!(r.r(IDR2) >> 16 & 0x7ff, 77);
}

#[test]
fn one_group_and_one_bank_are_enough() {
    let r = Rig::new(with(|c| (c.stream_groups, c.context_banks) = (1, 1)));
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    t.page(root, 0x1000, DATA | RW);
    r.w(CR0, 0x402);
    r.stage1(0, root, LINUX_SCTLR);
    r.group(0, 9, 0);
    assert_eq!(rd(&mut r.port(), 9, 0x1000), Ok(DATA));
    r.w(SMR + 4, 0x8000_0001);
    assert_eq!(r.r(SMR + 4), 0);
}
