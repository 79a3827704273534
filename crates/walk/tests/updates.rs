//! Hardware updates of access flags and dirty state (sheet, section 8): exact descriptors before and after, in one stage
//! and two, with somebody else changing them at the worst moment, and not at all where a walk only pretends.

mod common;

use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_walk::{
    AccessKind, Fault, FaultKind, FlagUpdate, Nested, NoRecord, Perms, Rule, Stage1, Stage2, TableFormat,
    Trace, Walked,
};

const DBM: u64 = 1 << 51;
const HA: FlagUpdate = FlagUpdate { access: true, dirty: false };
const HD: FlagUpdate = FlagUpdate { access: true, dirty: true };
const ROOT: u64 = 0x1000;
const WRITES: Perms = Perms(0b010_010);

/// An unprivileged page at 0x9000, clean and accessed: what a first write changes to [`DIRTY`].
const CLEAN: u64 = 0x9000 | d::PAGE | d::AF | d::USER | d::RO | DBM;
const DIRTY: u64 = CLEAN & !d::RO;

fn write() -> AccessKind {
    kind((true, false, false))
}

fn one(flags: FlagUpdate) -> Stage1 {
    Stage1 { flags, ..stage1(Some(region(ROOT, Granule::K4, 3, 21)), None) }
}

fn go(n: &Nested, words: &Words, k: AccessKind) -> Result<Walked, Fault> {
    n.translate(words, 0x234, k, Updates::Apply, &mut NoRecord)
}

/// What a stage 1 leaf of `value` becomes after an access of `k`.
fn after1(s1: Stage1, value: u64, k: AccessKind) -> (Result<Walked, Fault>, u64) {
    let words = Words::default();
    words.set(ROOT, value);
    let got = go(&only1(s1), &words, k);
    assert_eq!(words.take_addresses(), [ROOT], "read once");
    (got, words.get(ROOT))
}

#[test]
fn ha_sets_the_access_flag_and_nothing_else() {
    let old = CLEAN & !d::AF;
    for (flags, affd, ok, new) in [
        (FlagUpdate::OFF, false, false, old),
        (FlagUpdate::OFF, true, true, old),
        // HD without HA acts as neither.
        (FlagUpdate { access: false, dirty: true }, false, false, old),
        (HA, false, true, old | d::AF),
        // AFFD does not count with HA.
        (HA, true, true, old | d::AF),
        (HD, false, true, old | d::AF),
    ] {
        let (got, now) = after1(Stage1 { affd, ..one(flags) }, old, read());
        assert_eq!((got.is_ok(), now), (ok, new), "{flags:?}");
        if let Err(f) = got {
            assert_eq!(f, Fault::new(FaultKind::AccessFlag, 1, 3));
        }
    }
    // AArch32 descriptors are never updated.
    let long = Stage1 { format: TableFormat::Long, ..one(HD) };
    let (got, now) = after1(long, old, read());
    assert_eq!((got.map_err(|f| f.kind), now), (Err(FaultKind::AccessFlag), old));
}

#[test]
fn a_write_makes_a_clean_page_writable_and_accessed() {
    for value in [CLEAN, CLEAN & !d::AF] {
        let (got, now) = after1(one(HD), value, write());
        assert_eq!((got.unwrap().pa, now), (0x9234, DIRTY));
        assert_eq!(got.unwrap().perms.0 & WRITES.0, WRITES.0, "a TLB may keep it with writes");
    }
    // Without HD, or without DBM, a read-only page is read-only.
    for (flags, value) in [(HA, CLEAN), (FlagUpdate::OFF, CLEAN), (HD, CLEAN & !DBM)] {
        let (got, now) = after1(one(flags), value, write());
        assert_eq!((got, now), (Err(Fault::new(FaultKind::Permission, 1, 3)), value));
    }
    // A privileged page stays privileged.
    let (got, now) = after1(one(HD), CLEAN & !d::USER, write());
    assert_eq!((got.map_err(|f| f.kind), now), (Err(FaultKind::Permission), CLEAN & !d::USER));
    let (got, now) = after1(one(HD), CLEAN & !d::USER, kind((true, false, true)));
    assert_eq!((got.is_ok(), now), (true, DIRTY & !d::USER));
}

#[test]
fn a_read_of_a_clean_page_marks_nothing_and_may_not_be_kept_with_writes() {
    let (got, now) = after1(one(HD), CLEAN, read());
    let w = got.unwrap();
    assert_eq!((w.pa, now, w.perms.0 & WRITES.0), (0x9234, CLEAN, 0));
    let (got, now) = after1(one(HD), DIRTY, read());
    assert_eq!((got.unwrap().perms.0 & WRITES.0, now), (WRITES.0, DIRTY));
}

#[test]
fn a_clean_page_counts_as_writable_for_execution() {
    let fetch = |privileged| kind((false, true, privileged));
    // WXN, and the rule that what is writable by unprivileged is privileged execute never.
    for (wxn, privileged, dbm, ok) in [
        (false, false, true, true),
        (true, false, true, false),
        (true, false, false, true),
        (false, true, true, false),
        (false, true, false, true),
    ] {
        let value = if dbm { CLEAN } else { CLEAN & !DBM };
        let (got, now) = after1(Stage1 { wxn, ..one(HD) }, value, fetch(privileged));
        assert_eq!((got.is_ok(), now), (ok, value), "{wxn} {privileged} {dbm}");
    }
}

#[test]
fn ap_table_is_not_lifted_by_dbm() {
    let words = Words::default();
    words.set(ROOT, 0x2000 | d::TABLE | d::T_AP1);
    words.set(0x2000, CLEAN);
    let mut s1 = Stage1 { flags: HD, ..stage1(Some(region(ROOT, Granule::K4, 2, 30)), None) };
    let n = only1(s1.clone());
    assert_eq!(go(&n, &words, write()), Err(Fault::new(FaultKind::Permission, 1, 3)));
    assert_eq!(words.get(0x2000), CLEAN);
    // Hierarchical attributes off: now it is.
    s1.regions[0].as_mut().unwrap().flat_attributes = true;
    assert!(go(&only1(s1), &words, write()).is_ok());
    assert_eq!(words.get(0x2000), DIRTY);
}

#[test]
fn big_endian_tables_are_updated_in_their_own_order() {
    let words = Words::default();
    words.set(ROOT, (CLEAN & !d::AF).swap_bytes());
    let n = only1(Stage1 { big_endian: true, ..one(HD) });
    assert!(go(&n, &words, write()).is_ok());
    assert_eq!(words.get(ROOT), DIRTY.swap_bytes());
}

#[test]
fn memory_that_cannot_update_gives_an_external_fault_at_the_descriptor() {
    for (value, k) in [(CLEAN & !d::AF, read()), (CLEAN, write())] {
        let words = Words::default();
        words.set(ROOT, value);
        words.refuse_update(ROOT);
        let want = Fault { fetch: ROOT, ..Fault::new(FaultKind::External, 1, 3) };
        assert_eq!(go(&only1(one(HD)), &words, k), Err(want));
        assert_eq!(words.get(ROOT), value);
    }
}

#[test]
fn a_descriptor_that_changes_before_its_access_flag_is_set_is_looked_at_again() {
    let old = CLEAN & !d::AF;
    let moved = old & !0x9000 | 0xa000;
    for (now, want, left) in [
        // Moved, removed, accessed by somebody else, made a wrong address.
        (moved, Ok(0xa234), moved | d::AF),
        (0, Err(FaultKind::Translation), 0),
        (old | d::AF, Ok(0x9234), old | d::AF),
        (old | 1 << 47, Err(FaultKind::AddressSize), old | 1 << 47),
    ] {
        let words = Words::default();
        words.set(ROOT, old);
        words.race(ROOT, &[now]);
        let n = only1(Stage1 { output_bits: 44, ..one(HA) });
        let got = go(&n, &words, read()).map(|w| w.pa).map_err(|f| f.kind);
        assert_eq!((got, words.get(ROOT)), (want, left));
        assert_eq!(words.take_addresses(), [ROOT], "the update has said what it holds");
    }
    // At level 2 a page table may have taken the place of a block.
    let words = Words::default();
    let block = 0x20_0000 | d::BLOCK | d::USER;
    words.set(ROOT, block);
    words.set(0x2000, CLEAN & !d::AF);
    words.race(ROOT, &[0x2000 | d::TABLE]);
    let n = only1(Stage1 { flags: HA, ..stage1(Some(region(ROOT, Granule::K4, 2, 30)), None) });
    assert_eq!(go(&n, &words, read()).unwrap().pa, 0x9234);
    assert_eq!((words.get(ROOT), words.get(0x2000)), (0x2000 | d::TABLE, CLEAN));
}

#[test]
fn a_descriptor_that_changes_before_it_is_marked_is_walked_again() {
    for (now, want, left) in [
        (CLEAN & !0x9000 | 0xa000, Ok(0xa234), DIRTY & !0x9000 | 0xa000),
        (CLEAN & !DBM, Err(FaultKind::Permission), CLEAN & !DBM),
        (0, Err(FaultKind::Translation), 0),
        // Somebody else has marked it just so.
        (DIRTY, Ok(0x9234), DIRTY),
        // Software has taken the access flag away again.
        (CLEAN & !d::AF, Ok(0x9234), DIRTY),
    ] {
        let words = Words::default();
        words.set(ROOT, CLEAN);
        words.race(ROOT, &[now]);
        let got = go(&only1(one(HD)), &words, write()).map(|w| w.pa).map_err(|f| f.kind);
        assert_eq!((got, words.get(ROOT)), (want, left), "{now:#x}");
    }
}

#[test]
fn a_descriptor_that_never_keeps_still_ends_in_a_fault() {
    for (first, k) in [(CLEAN, write()), (CLEAN & !d::AF, read())] {
        let words = Words::default();
        words.set(ROOT, first);
        let others: Vec<u64> = (0..10_000).map(|i| first | (i & 1) << 55 | (i >> 1 & 1) << 56).collect();
        // Each value differs from the one before.
        words.race(ROOT, &others[1..]);
        let f = go(&only1(one(HD)), &words, k).unwrap_err();
        assert_eq!((f.kind, f.fetch), (FaultKind::External, ROOT));
        assert!(words.take_addresses().len() < 100);
    }
}

#[test]
fn a_run_whose_dirty_state_is_kept_is_translated_page_by_page() {
    let words = Words::default();
    (0..16).for_each(|i| words.set(ROOT + i * 8, (0x1_0000 + (i << 12)) | CLEAN & !0x9000 | d::CONT));
    assert_eq!(go(&only1(one(HD)), &words, write()).unwrap().size_log2, 12);
    assert_eq!(words.take_updates().len(), 1);
    assert_eq!(go(&only1(one(HA)), &words, read()).unwrap().size_log2, 16);
}

// Two stages. Stage 1 is one table at IPA 0x1000; its page is IPA 0x9000. Stage 2 is one table of 16 pages at 0x8000 that
// puts IPA p << 12 at 0x10_0000 | p << 12.
const S2: u64 = 0x8000;
const TABLE_PAGE: u64 = S2 + 8;
const DATA_PAGE: u64 = S2 + 9 * 8;
const LEAF1: u64 = 0x10_1000;

fn page2(page: u64, ap: u64) -> u64 {
    0x10_0000 | page << 12 | d::PAGE | d::AF | 0xf << 2 | ap
}

/// With both stages updating: the leaf of stage 1, and the stage 2 pages of its table and of the data.
fn nest(leaf1: u64, table: u64, data: u64) -> (Nested, Words) {
    let words = Words::default();
    words.set(LEAF1, leaf1);
    words.set(TABLE_PAGE, table);
    words.set(DATA_PAGE, data);
    let s2 = Stage2 { flags: HD, ..stage2(region(S2, Granule::K4, 3, 16)) };
    (both(one(HD), s2), words)
}

const RO2: u64 = d::S2R;
const RW2: u64 = d::S2R | d::S2W;

#[test]
fn an_update_of_stage_1_is_a_write_at_stage_2() {
    let refused = Fault {
        on_stage1_walk: true,
        write: true,
        ..Fault::new(FaultKind::Permission, 2, 3).with_ipa(0x1000)
    };
    // (stage 1 leaf, access, ends well only if the table's page can be written)
    for (leaf1, k, needs) in [
        (CLEAN, read(), false),
        (CLEAN & !d::AF, read(), true),
        (CLEAN, write(), true),
        (DIRTY, write(), false),
        (DIRTY & !d::AF, write(), true),
    ] {
        let marked = if k == write() { DIRTY } else { leaf1 | d::AF };
        for (table, writable, table_after) in [
            (page2(1, RO2), false, page2(1, RO2)),
            (page2(1, RW2), true, page2(1, RW2)),
            // A clean page: hardware may write it, and marks it if it does.
            (page2(1, RO2 | DBM), true, page2(1, if needs { RW2 | DBM } else { RO2 | DBM })),
        ] {
            let (n, words) = nest(leaf1, table, page2(9, RW2));
            let got = go(&n, &words, k);
            if needs && !writable {
                assert_eq!(got, Err(refused));
                assert_eq!(words.take_updates(), []);
            } else {
                assert_eq!(got.unwrap().pa, 0x10_9234);
                assert_eq!((words.get(LEAF1), words.get(TABLE_PAGE)), (marked, table_after));
            }
            let mut reads = words.take_addresses();
            reads.sort_unstable();
            reads.windows(2).for_each(|w| assert_ne!(w[0], w[1], "read twice"));
        }
    }
}

#[test]
fn a_fault_leaves_no_dirty_state_behind() {
    let data_refused = Fault::new(FaultKind::Permission, 2, 3).with_ipa(0x9234);
    // Stage 2 refuses the data, or has nothing there: neither stage 1 nor the table's page is marked.
    for (data, want) in [
        (page2(9, RO2), data_refused),
        (0, Fault { kind: FaultKind::Translation, ..data_refused }),
        (page2(9, RO2 | DBM) | 1 << 40, Fault { kind: FaultKind::AddressSize, ..data_refused }),
    ] {
        let (mut n, words) = nest(CLEAN, page2(1, RO2 | DBM), data);
        n.stage2.as_mut().unwrap().output_bits = 40;
        assert_eq!(go(&n, &words, write()), Err(want));
        assert_eq!(words.take_updates(), []);
    }
    // Stage 1 refuses: stage 2 is not asked.
    let (n, words) = nest(CLEAN & !DBM, page2(1, RW2), page2(9, RO2 | DBM));
    assert_eq!(go(&n, &words, write()), Err(Fault::new(FaultKind::Permission, 1, 3)));
    assert_eq!(words.take_updates(), []);
    // The table cannot be written: that is found before the output is looked at.
    let (n, words) = nest(CLEAN, page2(1, RO2), 0);
    let f = go(&n, &words, write()).unwrap_err();
    assert_eq!((f.kind, f.ipa, f.write, f.on_stage1_walk), (FaultKind::Permission, 0x1000, true, true));
    assert_eq!(words.take_updates(), []);
    // An access flag may be set before the access is refused.
    let (n, words) = nest((CLEAN & !DBM) & !d::AF, page2(1, RW2), page2(9, RW2));
    assert_eq!(go(&n, &words, write()), Err(Fault::new(FaultKind::Permission, 1, 3)));
    assert_eq!(words.get(LEAF1), CLEAN & !DBM);
}

#[test]
fn a_write_through_two_clean_stages_marks_all_three_pages_in_order() {
    let af = d::AF;
    let (n, words) = nest(CLEAN & !af, page2(1, RO2 | DBM) & !af, page2(9, RO2 | DBM) & !af);
    let w = go(&n, &words, write()).unwrap();
    assert_eq!((w.pa, w.perms.0 & WRITES.0), (0x10_9234, WRITES.0));
    let (table, data) = (page2(1, RO2 | DBM), page2(9, RO2 | DBM));
    assert_eq!(
        words.take_updates(),
        [
            (TABLE_PAGE, table & !af, table),
            (TABLE_PAGE, table, table | d::S2W),
            (LEAF1, CLEAN & !af, CLEAN),
            (DATA_PAGE, data & !af, data),
            (LEAF1, CLEAN, DIRTY),
            (DATA_PAGE, data, data | d::S2W),
        ]
    );
    // Reads through the same stages: no writes are kept, whichever stage is clean.
    for (leaf1, data) in [(CLEAN, page2(9, RW2)), (DIRTY, page2(9, RO2 | DBM)), (CLEAN, page2(9, RO2 | DBM))]
    {
        let (n, words) = nest(leaf1, page2(1, RO2 | DBM), data);
        assert_eq!(go(&n, &words, read()).unwrap().perms.0 & WRITES.0, 0);
        assert_eq!(words.take_updates(), []);
    }
}

#[test]
fn tables_and_data_in_one_stage_2_block_are_marked_once() {
    let words = Words::default();
    let block = d::BLOCK | d::AF | d::S2R | 0xf << 2 | DBM;
    words.set(S2, block);
    words.set(0x1000, CLEAN);
    let s2 = Stage2 { flags: HD, ..stage2(region(S2, Granule::K4, 2, 30)) };
    assert_eq!(go(&both(one(HD), s2), &words, write()).unwrap().pa, 0x9234);
    assert_eq!(words.take_updates(), [(S2, block, block | d::S2W), (0x1000, CLEAN, DIRTY)]);
}

#[test]
fn races_at_stage_2_are_settled() {
    let clean = page2(9, RO2 | DBM);
    for (now, want, left) in [
        (page2(10, RO2 | DBM), Ok(0x10_a234), page2(10, RW2 | DBM)),
        (page2(9, RO2), Err(FaultKind::Permission), page2(9, RO2)),
        (clean | d::S2W, Ok(0x10_9234), clean | d::S2W),
    ] {
        let (n, words) = nest(CLEAN, page2(1, RW2), clean);
        words.race(DATA_PAGE, &[now]);
        let got = go(&n, &words, write()).map(|w| w.pa).map_err(|f| f.kind);
        assert_eq!((got, words.get(DATA_PAGE)), (want, left));
    }
    // The page of the stage 1 table moves while it is marked: the update goes where it is now.
    let (n, words) = nest(CLEAN & !d::AF, page2(1, RO2 | DBM), page2(9, RW2));
    words.race(TABLE_PAGE, &[page2(2, RO2 | DBM)]);
    words.set(0x10_2000, 0xb000 | CLEAN & !0x9000 & !d::AF);
    words.set(S2 + 11 * 8, page2(11, RW2));
    assert_eq!(go(&n, &words, write()).unwrap().pa, 0x10_b234);
    assert_eq!(words.get(LEAF1), CLEAN & !d::AF);
    assert_eq!(words.get(0x10_2000), 0xb000 | DIRTY & !0x9000);
    // And it may lose its permission.
    let (n, words) = nest(CLEAN & !d::AF, page2(1, RO2 | DBM), page2(9, RW2));
    words.race(TABLE_PAGE, &[page2(1, RO2)]);
    let f = go(&n, &words, write()).unwrap_err();
    assert_eq!((f.kind, f.stage, f.write, f.ipa), (FaultKind::Permission, 2, true, 0x1000));
}

#[test]
fn external_faults_of_nested_updates_name_the_descriptor_in_memory() {
    for (fixed, stage, write_too, on_walk) in
        [(LEAF1, 1, false, false), (TABLE_PAGE, 2, true, true), (DATA_PAGE, 2, false, false)]
    {
        let (n, words) = nest(CLEAN, page2(1, RO2 | DBM), page2(9, RO2 | DBM));
        words.refuse_update(fixed);
        let f = go(&n, &words, write()).unwrap_err();
        assert_eq!((f.kind, f.stage, f.fetch), (FaultKind::External, stage, fixed));
        assert_eq!((f.write, f.on_stage1_walk), (write_too, on_walk));
    }
}

#[test]
fn pretending_answers_as_applying_would_and_changes_nothing() {
    let af = d::AF;
    let leaves = [CLEAN, CLEAN & !af, DIRTY, DIRTY & !af, CLEAN & !DBM, CLEAN & !DBM & !af, 0];
    let tables = [RO2, RW2, RO2 | DBM].map(|ap| page2(1, ap));
    let datas = [RO2, RW2, RO2 | DBM, 0].map(|ap| page2(9, ap));
    let mut updates = 0;
    for leaf1 in leaves {
        for table in tables.into_iter().flat_map(|t| [t, t & !af]) {
            for data in datas.into_iter().flat_map(|t| [t, t & !af]) {
                for k in [read(), write()] {
                    let (n, words) = nest(leaf1, table, data);
                    let mut pretended = Trace::default();
                    let got = n.translate(&words, 0x234, k, Updates::Pretend, &mut pretended);
                    assert_eq!(words.take_updates(), []);
                    assert_eq!([LEAF1, TABLE_PAGE, DATA_PAGE].map(|a| words.get(a)), [leaf1, table, data]);
                    let mut applied = Trace::default();
                    assert_eq!(got, n.translate(&words, 0x234, k, Updates::Apply, &mut applied));
                    assert_eq!(pretended, applied, "the same story");
                    let made = words.take_updates();
                    let told = applied.steps.iter().filter(|s| matches!(s.rule, Rule::Update { .. }));
                    assert_eq!(told.count(), made.len());
                    updates += made.len();
                }
            }
        }
    }
    assert!(updates > 200, "{updates}");
    // Memory that refuses updates is not asked.
    let words = Words::default();
    words.set(ROOT, CLEAN & !af);
    words.refuse_update(ROOT);
    let n = only1(one(HD));
    assert!(n.translate(&words, 0, write(), Updates::Pretend, &mut NoRecord).is_ok());
}

#[test]
fn stage_1_alone_is_marked_as_well() {
    let (n, words) = nest(CLEAN, page2(1, RO2 | DBM), 0);
    let w = n.translate_stage1(&words, 0x234, write(), Updates::Apply, &mut NoRecord).unwrap();
    assert_eq!((w.pa, words.get(LEAF1), words.get(TABLE_PAGE)), (0x9234, DIRTY, page2(1, RW2 | DBM)));
    let (n, words) = nest(CLEAN, page2(1, RO2 | DBM), 0);
    n.translate_stage1(&words, 0x234, write(), Updates::Pretend, &mut NoRecord).unwrap();
    assert_eq!(words.take_updates(), []);
}

#[test]
fn structures_of_the_smmu_go_through_stage_2_alone() {
    let s2 = |words: &Words, value: u64| {
        words.set(DATA_PAGE, value);
        Stage2 { flags: HD, fwb: false, protect_walks: true, ..stage2(region(S2, Granule::K4, 3, 16)) }
    };
    let go = |s2: &Stage2, words: &Words, write| {
        s2.translate_ipa(words, 0x9040, write, Updates::Apply, &mut NoRecord)
            .map(|(pa, _, log2)| (pa.get(), log2))
    };
    let words = Words::default();
    // A read sets the access flag and leaves the page clean.
    let clean = page2(9, RO2 | DBM);
    let stage = s2(&words, clean & !d::AF);
    assert_eq!(go(&stage, &words, false), Ok((0x10_9040, 12)));
    assert_eq!(words.get(DATA_PAGE), clean);
    assert_eq!(go(&stage, &words, true), Ok((0x10_9040, 12)));
    assert_eq!(words.get(DATA_PAGE), clean | d::S2W);
    let refused = Fault::new(FaultKind::Permission, 2, 3).with_ipa(0x9040);
    let stage = s2(&words, page2(9, RO2));
    assert_eq!(go(&stage, &words, true), Err(refused));
    let stage = s2(&words, page2(9, d::S2W));
    assert_eq!(go(&stage, &words, false), Err(refused));
    // S2PTW keeps them out of Device memory.
    let mut stage = s2(&words, page2(9, RW2) & !(0xf << 2) | 1 << 2);
    assert_eq!(go(&stage, &words, false), Err(refused));
    stage.protect_walks = false;
    let (_, attrs, _) = stage.translate_ipa(&words, 0x9040, false, Updates::Apply, &mut NoRecord).unwrap();
    assert!(attrs.memory().is_device());
    let range = Fault { kind: FaultKind::Translation, level: 0, ..refused }.with_ipa(1 << 16);
    assert_eq!(
        stage.translate_ipa(&words, 1 << 16, false, Updates::Apply, &mut NoRecord).map(|_| ()),
        Err(range)
    );
}
