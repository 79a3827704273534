//! Permissions of both stages in every combination, against rules written down a second time: a hand-made table of what
//! AP allows, and one sentence of the sheet per line after it.

mod common;

use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_walk::{FaultKind, NoRecord, Stage1, TableFormat};

const ROOT: u64 = 0x1000;

/// AP[2:1]: (privileged read, write, unprivileged read, write).
const AP: [(bool, bool, bool, bool); 4] = [
    (true, true, false, false),
    (true, true, true, true),
    (true, false, false, false),
    (true, false, true, false),
];

#[derive(Clone, Copy, Debug)]
struct Case {
    ap: usize,
    uxn: bool,
    pxn: bool,
    ap_table: usize,
    uxn_table: bool,
    pxn_table: bool,
    wxn: bool,
    uwxn: bool,
    flat: bool,
}

impl Case {
    fn all() -> impl Iterator<Item = Self> {
        (0..1u32 << 11).map(|n| {
            let bit = |i: u32| n >> i & 1 != 0;
            Self {
                ap: n as usize & 3,
                ap_table: n as usize >> 2 & 3,
                uxn: bit(4),
                pxn: bit(5),
                uxn_table: bit(6),
                pxn_table: bit(7),
                wxn: bit(8),
                uwxn: bit(9),
                flat: bit(10),
            }
        })
    }

    /// What the sheets say, line by line.
    fn allows(
        self,
        format: TableFormat,
        single: bool,
        (write, fetch, privileged): (bool, bool, bool),
    ) -> bool {
        let on = |b: bool| b && !self.flat;
        let (mut pr, mut pw, mut ur, mut uw) = AP[self.ap];
        // APTable bit 62 removes writes, bit 61 removes unprivileged access.
        if on(self.ap_table & 2 != 0) {
            (pw, uw) = (false, false);
        }
        if on(self.ap_table & 1 != 0) {
            (ur, uw) = (false, false);
        }
        let xn = self.uxn || on(self.uxn_table);
        let pxn = self.pxn || on(self.pxn_table);
        if single {
            // HYPC, MONC: no PXN, AP[1], APTable[0], PXNTable, UWXN.
            let writable = self.ap & 2 == 0 && !on(self.ap_table & 2 != 0);
            (pr, pw, ur, uw) = (true, writable, true, writable);
            return match (write, fetch) {
                (true, _) => pw || uw,
                (_, true) => !xn && !(self.wxn && writable),
                _ => pr && ur,
            };
        }
        let (r, w) = if privileged { (pr, pw) } else { (ur, uw) };
        if write {
            return w;
        }
        if !fetch {
            return r;
        }
        // WXN: memory that is writable; UWXN: memory that unprivileged accesses may write.
        if self.wxn && w || self.uwxn && uw {
            return false;
        }
        let aarch64 = format == TableFormat::Aarch64;
        match (privileged, aarch64) {
            // A page writable by unprivileged is privileged-execute-never in VMSAv8-64.
            (true, true) => !pxn && !uw,
            (false, true) => !xn,
            // AArch32: XN stops both, and execution needs read permission.
            (true, false) => !pxn && !xn && r,
            (false, false) => !xn && r,
        }
    }
}

fn stage(case: Case, format: TableFormat, single: bool) -> Stage1 {
    let mut r = region(ROOT, Granule::K4, 1, 39);
    r.flat_attributes = case.flat;
    let mut s1 = stage1(Some(r), None);
    (s1.wxn, s1.uwxn, s1.single_privilege, s1.format) = (case.wxn, case.uwxn, single, format);
    s1
}

#[test]
fn stage_1_permissions_in_all_combinations() {
    let (mut allowed, mut refused) = (0, 0);
    for (format, single) in
        [(TableFormat::Aarch64, false), (TableFormat::Aarch64, true), (TableFormat::Long, false)]
    {
        for case in Case::all() {
            // The table attribute bits stand at level 1 or level 2, by turns.
            let attrs = (case.ap_table as u64) << 61
                | if case.uxn_table { d::T_UXN } else { 0 }
                | if case.pxn_table { d::T_PXN } else { 0 };
            for at_level2 in [false, true] {
                let words = Words::default();
                words.set(ROOT, 0x2000 | d::TABLE | if at_level2 { 0 } else { attrs });
                words.set(0x2000, 0x3000 | d::TABLE | if at_level2 { attrs } else { 0 });
                let leaf = 0x9000
                    | d::PAGE
                    | d::AF
                    | (case.ap as u64) << 6
                    | if case.uxn { d::UXN } else { 0 }
                    | if case.pxn { d::PXN } else { 0 };
                words.set(0x3000, leaf);
                let n = only1(stage(case, format, single));
                for k in KINDS {
                    let got = n.translate(&words, 0x10, kind(k), Updates::Apply, &mut NoRecord);
                    let want = case.allows(format, single, k);
                    match got {
                        Ok(w) => assert!(want && w.pa == 0x9010, "{format:?} {single} {case:?} {k:?}"),
                        Err(f) => {
                            assert_eq!((f.kind, f.level, f.stage), (FaultKind::Permission, 3, 1));
                            assert!(!want, "{format:?} {single} {case:?} {k:?}");
                        }
                    }
                    *(if want { &mut allowed } else { &mut refused }) += 1;
                }
            }
        }
    }
    assert!(allowed > 10_000 && refused > 10_000, "{allowed} {refused}");
}

#[test]
fn stage_2_permissions_know_no_privilege() {
    for format in [TableFormat::Aarch64, TableFormat::Long] {
        for n in 0..8u64 {
            let (r, w, xn) = (n & 1 != 0, n & 2 != 0, n & 4 != 0);
            let words = Words::default();
            // Table attributes do not exist at stage 2: all of them set change nothing.
            words.set(ROOT, 0x2000 | d::TABLE | 0x1f << 59);
            words.set(0x2000, 0x3000 | d::TABLE | 0x1f << 59);
            let leaf = 0x9000 | d::PAGE | d::AF | 0xf << 2 | (n & 3) << 6 | if xn { d::UXN } else { 0 };
            words.set(0x3000, leaf);
            let mut s2 = stage2(region(ROOT, Granule::K4, 1, 39));
            s2.format = format;
            for k in KINDS {
                let (write, fetch, _) = k;
                let want = match (write, fetch) {
                    (true, _) => w,
                    // The AArch32 format asks for read permission before a fetch.
                    (_, true) => !xn && (r || format == TableFormat::Aarch64),
                    _ => r,
                };
                let got = only2(s2.clone()).translate(&words, 0x10, kind(k), Updates::Apply, &mut NoRecord);
                match got {
                    Ok(_) => assert!(want, "{format:?} {n} {k:?}"),
                    Err(f) => {
                        assert_eq!((f.kind, f.level, f.stage, f.ipa), (FaultKind::Permission, 3, 2, 0x10));
                        assert!(!want, "{format:?} {n} {k:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn both_stages_must_allow_an_access_and_stage_1_is_asked_first() {
    for one in 0..4u64 {
        for two in 0..4u64 {
            let words = Words::default();
            words.set(0x3000, 0x9000 | d::PAGE | d::AF | one << 6 | d::NG);
            // Stage 2 maps everything flat by blocks, except the page: read and write as `two` says.
            let rw = d::BLOCK | d::AF | d::S2R | 0xf << 2;
            words.set(0x8000, 0xa000 | d::TABLE);
            words.set(0xa000, 0xb000 | d::TABLE);
            for page in 0..512u64 {
                let ap = if page == 9 { two << 6 } else { d::S2R };
                words.set(0xb000 + page * 8, page << 12 | d::PAGE | rw & !0b11 & !d::S2R | ap);
            }
            let s1 = stage1(Some(region(0x3000, Granule::K4, 3, 21)), None);
            let n = both(s1, stage2(region(0x8000, Granule::K4, 1, 39)));
            for k in KINDS {
                let (write, fetch, privileged) = k;
                let (pr, pw, ur, uw) = AP[one as usize];
                let first = match (write, fetch, privileged) {
                    (true, _, p) => {
                        if p {
                            pw
                        } else {
                            uw
                        }
                    }
                    (_, true, true) => !uw,
                    (_, true, false) => true,
                    (_, _, p) => {
                        if p {
                            pr
                        } else {
                            ur
                        }
                    }
                };
                let second = if write { two & 2 != 0 } else { fetch || two & 1 != 0 };
                let got = n.translate(&words, 0x44, kind(k), Updates::Apply, &mut NoRecord);
                match (first, second) {
                    (true, true) => assert_eq!(got.unwrap().pa, 0x9044),
                    (false, _) => {
                        assert_eq!(got.map_err(|f| (f.stage, f.kind)), Err((1, FaultKind::Permission)))
                    }
                    (true, false) => {
                        let f = got.unwrap_err();
                        assert_eq!((f.stage, f.kind, f.ipa), (2, FaultKind::Permission, 0x9044));
                        assert!(!f.on_stage1_walk);
                    }
                }
            }
        }
    }
}

#[test]
fn a_secure_fetch_from_non_secure_memory_is_refused_if_sif_says_so() {
    for (leaf_ns, table_ns, sif, secure, flat) in (0..32).map(|n| (n & 1, n & 2, n & 4, n & 8, n & 16)) {
        let (leaf_ns, table_ns, secure) = (leaf_ns != 0, table_ns != 0, secure != 0);
        let (sif, flat) = (sif != 0 && secure, flat != 0);
        let words = Words::default();
        words.set(ROOT, 0x2000 | d::TABLE | if table_ns { d::T_NS } else { 0 });
        words.set(0x2000, 0x3000 | d::TABLE);
        words.set(0x3000, 0x9000 | d::PAGE | d::AF | d::USER | if leaf_ns { d::NS } else { 0 });
        let mut r = region(ROOT, Granule::K4, 1, 39);
        (r.flat_attributes, r.walk_attrs) = (flat, A.with_non_secure(!secure));
        let mut s1 = stage1(Some(r), None);
        (s1.secure, s1.secure_fetch_only) = (secure, sif);
        let n = only1(s1);
        let ns = !secure || leaf_ns || table_ns;
        let w = n.translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap();
        assert_eq!(w.attrs.non_secure(), ns);
        // What is below an NS table is read non-secure, and not global. Disabling hierarchical permissions does not
        // concern NSTable.
        let levels: Vec<bool> = words.take_log().iter().map(|l| l.2.non_secure()).collect();
        let below = !secure || table_ns;
        assert_eq!(levels, [!secure, below, below]);
        assert_eq!(w.global, !(secure && table_ns));
        let fetch = n.translate(&words, 0, kind((false, true, false)), Updates::Apply, &mut NoRecord);
        assert_eq!(fetch.is_err(), sif && ns);
    }
}

#[test]
fn global_means_ng_is_clear_and_two_privileges_exist() {
    for (ng, single) in [(false, false), (true, false), (false, true), (true, true)] {
        let words = Words::default();
        words.set(ROOT, 0x9000 | d::PAGE | d::AF | d::USER | if ng { d::NG } else { 0 });
        let mut s1 = stage1(Some(region(ROOT, Granule::K4, 3, 21)), None);
        s1.single_privilege = single;
        let w = only1(s1).translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap();
        assert_eq!(w.global, !ng && !single);
    }
}
