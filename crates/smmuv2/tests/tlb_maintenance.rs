//! Every TLB invalidation: what it must remove, and that nothing goes stale-free by accident. The tables are rewritten
//! first; as long as the old entry lives the old page is seen.

mod rig;

use portcullis_arch::Access;
use portcullis_bus::Initiator;
use portcullis_smmuv2::{Config, Port};
use rig::*;

type P = Port<portcullis_bus::SystemMemory>;

const OLD: u64 = DATA;
const NEW: u64 = DATA + 0x1000;
const VA: u64 = 0x7000_0000;

fn secure_capable() -> Rig {
    let r = Rig::new(Config { secure: true, ..Config::default() });
    r.w(CR0, 0x0020_0402);
    r.ws(CR0, 0x0020_0402);
    r.ws(SCR1, 0x0001_2018); // banks 24 and up, groups 32 and up are secure
    r
}

/// A context whose entry for VA is watched.
struct Watch {
    name: &'static str,
    slot: u64,
    leaf: u64,
    from: Initiator,
    port: P,
}

impl Watch {
    fn look(&mut self) -> u64 {
        go(&mut self.port, self.from, VA, Access::Read).unwrap()
    }
    /// Fills the TLB with the old page, then changes the table behind its back.
    fn arm(&mut self, r: &Rig) {
        r.poke(self.slot, OLD | self.leaf);
        self.port = r.port();
        assert_eq!(self.look(), OLD, "{}", self.name);
        r.poke(self.slot, NEW | self.leaf);
        assert_eq!(self.look(), OLD, "{}: a changed table is not seen", self.name);
    }
}

/// Eight contexts that differ in one tag each.
///
/// | # | | VMID | ASID | |
/// |---|---|---|---|---|
/// | 0 | bank 0 | 1 | 0x10 | |
/// | 1 | bank 1 | 1 | 0x11 | |
/// | 2 | bank 2 | 2 | 0x10 | |
/// | 3 | bank 3 | 1 | 0x12 | global page |
/// | 4 | bank 4 on 5 | 3 | 0x10 | nested |
/// | 5 | bank 5 | 3 | | stage 2 |
/// | 6 | bank 6 | 1 | 0x10 | hyp |
/// | 7 | bank 24 | 1 | 0x10 | secure |
/// | 8 | bank 25 | 1 | 0x10 | monitor |
struct World {
    r: Rig,
    watches: Vec<Watch>,
}

impl World {
    fn new() -> Self {
        let r = secure_capable();
        let mut t = Tables::new(&r);
        let mut watches = Vec::new();
        let mut add =
            |r: &Rig, name, slot, leaf, from| watches.push(Watch { name, slot, leaf, from, port: r.port() });
        for (bank, vmid, asid, leaf, name) in [
            (0u8, 1u32, 0x10u64, RW, "bank 0"),
            (1, 1, 0x11, RW, "bank 1"),
            (2, 2, 0x10, RW, "bank 2"),
            (3, 1, 0x12, RW & !NG, "bank 3, global"),
            (4, 3, 0x10, RW, "bank 4, nested"),
            (6, 1, 0x10, PAGE, "bank 6, hyp"),
        ] {
            let root = t.alloc(1);
            let slot = t.slot(root, 0, VA, 3);
            r.stage1(bank, root, M | CFRE);
            r.wb64(bank, TTBR0, root | asid << 48);
            r.w(r.cbar(bank), LINUX_CBAR | vmid);
            r.group(bank.into(), 0x100 + u32::from(bank), bank.into());
            add(&r, name, slot, leaf, stream(0x100 + u32::from(bank)));
        }
        r.w(r.cbar(6), LINUX_CBAR | 1 << 10);
        // Bank 5: stage 2, flat but for VA's page, for itself; a nested walk needs the tables and both pages.
        let root2 = t.alloc(2);
        for page in 0..64 {
            let pa = TABLES + 0x1000 * page;
            t.page2(root2, pa, pa | S2_RW);
        }
        for pa in [OLD, NEW] {
            t.page2(root2, pa, pa | S2_RW);
        }
        let slot2 = t.slot(root2, 1, VA, 3);
        r.stage2(5, root2, 3, M | CFRE);
        r.nest(4, 5, 3);
        r.group(5, 0x105, 5);
        add(&r, "bank 5, stage 2", slot2, S2_RW, stream(0x105));
        for (bank, cbar, cba2r, leaf, name) in [
            (24u8, LINUX_CBAR | 1, 1, RW, "bank 24, secure"),
            (25, LINUX_CBAR | 1, 3, PAGE, "bank 25, monitor"),
        ] {
            let root = t.alloc(1);
            let slot = t.slot(root, 0, VA, 3);
            r.ws(r.cba2r(bank), cba2r);
            r.ws(r.cbar(bank), cbar);
            r.ws(r.cb(bank, TCR2), LINUX_TCR2);
            r.ws(r.cb(bank, TCR), LINUX_TCR);
            r.ws(r.cb(bank, TTBR0), root as u32);
            r.ws(r.cb(bank, TTBR0) + 4, 0x10 << 16);
            r.ws(r.cb(bank, MAIR0), LINUX_MAIR0);
            r.ws(r.cb(bank, SCTLR), M | CFRE);
            r.ws(S2CR + 4 * (8 + u64::from(bank)), bank.into());
            r.ws(SMR + 4 * (8 + u64::from(bank)), 0x8000_0100 | u32::from(bank));
            add(&r, name, slot, leaf, secure(0x100 + u32::from(bank)));
        }
        Self { r, watches }
    }

    fn index(name: &str) -> usize {
        const NAMES: [&str; 9] = ["0", "1", "2", "global", "nested", "hyp", "stage2", "secure", "monitor"];
        NAMES.iter().position(|n| *n == name).unwrap()
    }

    /// After `operation` exactly the named contexts have forgotten; `may` may have.
    fn check(&mut self, what: &str, operation: impl FnOnce(&Rig), must: &[&str], may: &[&str]) {
        for w in &mut self.watches {
            w.arm(&self.r);
        }
        operation(&self.r);
        let must: Vec<usize> = must.iter().map(|n| Self::index(n)).collect();
        let may: Vec<usize> = may.iter().map(|n| Self::index(n)).collect();
        for (i, w) in self.watches.iter_mut().enumerate() {
            let got = w.look();
            if must.contains(&i) {
                assert_eq!(got, NEW, "{what} must remove the entry of {}", w.name);
            } else if !may.contains(&i) {
                assert_eq!(got, OLD, "{what} has nothing to do with {}", w.name);
            }
        }
    }
}

const PAGE_VA: u64 = VA >> 12;

#[test]
fn global_operations() {
    let mut w = World::new();
    const NS: [&str; 6] = ["0", "1", "2", "global", "nested", "stage2"];
    w.check("TLBIALLNSNH", |r| r.w(TLBIALLNSNH, 0xffff_ffff), &NS, &[]);
    w.check("TLBIALLH", |r| r.w(TLBIALLH, 0xffff_ffff), &["hyp"], &[]);
    w.check("TLBIVMID 1", |r| r.w(TLBIVMID, 1), &["0", "1", "global"], &[]);
    w.check("TLBIVMID 2", |r| r.w(TLBIVMID, 2), &["2"], &[]);
    w.check("TLBIVMID 3", |r| r.w(TLBIVMID, 3), &["nested", "stage2"], &[]);
    w.check("TLBIVMID 4", |r| r.w(TLBIVMID, 4), &[], &[]);
    w.check("TLBIVMID takes 8 bits", |r| r.w(TLBIVMID, 0xabcd_ff02), &["2"], &[]);
    w.check("TLBIVMIDS1 3", |r| r.w(TLBIVMIDS1, 3), &["nested"], &[]);
    w.check("TLBIVMIDS1 1", |r| r.w(TLBIVMIDS1, 1), &["0", "1", "global"], &[]);
    w.check("TLBIVAH", |r| r.w(TLBIVAH, VA as u32 | 0xfff), &["hyp"], &[]);
    w.check("TLBIVAH of another page", |r| r.w(TLBIVAH, VA as u32 + 0x1000), &[], &[]);
    w.check("TLBIVAH64", |r| r.w64(TLBIVAH64, PAGE_VA), &["hyp"], &[]);
    w.check("TLBIVALH64", |r| r.w64(TLBIVALH64, PAGE_VA), &["hyp"], &[]);
    w.check("TLBIVAH64 of another page", |r| r.w64(TLBIVAH64, PAGE_VA + 1), &[], &[]);
    w.check("TLBIVAH64, low half", |r| r.w(TLBIVAH64, PAGE_VA as u32), &["hyp"], &[]);
    w.check("TLBIVAH64, high half", |r| r.w(TLBIVAH64 + 4, PAGE_VA as u32), &[], &[]);
    w.check("STLBIALL", |r| r.ws(STLBIALL, 0), &["secure", "monitor"], &[]);
    w.check("STLBIALLM", |r| r.ws(STLBIALLM, 0), &["monitor"], &[]);
    w.check("STLBIVAM", |r| r.s.write64(STLBIVAM, PAGE_VA).unwrap(), &["monitor"], &[]);
    w.check("STLBIVALM", |r| r.s.write64(STLBIVALM, PAGE_VA).unwrap(), &["monitor"], &[]);
    w.check("STLBIVAM of another page", |r| r.s.write64(STLBIVAM, PAGE_VA + 1).unwrap(), &[], &[]);
}

use portcullis_bus::Mmio;

#[test]
fn secure_operations_are_not_for_non_secure_software() {
    let mut w = World::new();
    for offset in [STLBIALL, STLBIALLM, STLBIVAM, STLBIVALM] {
        w.check("a non-secure write", |r| r.w(offset, PAGE_VA as u32), &[], &[]);
        w.check("a non-secure write", |r| r.w64(offset, PAGE_VA), &[], &[]);
    }
    // The other way round works.
    w.check("secure TLBIVMID", |r| r.ws(TLBIVMID, 2), &["2"], &[]);
}

#[test]
fn operations_of_a_stage_1_bank() {
    let mut w = World::new();
    let op = |bank: u8, reg: u64, value: u64| move |r: &Rig| r.wb64(bank, reg, value);
    // All of the VMID and security state.
    w.check("TLBIALL", |r| r.wb(0, TLBIALL, 0), &["0", "1", "global"], &[]);
    w.check("TLBIALL", |r| r.wb(2, TLBIALL, 0), &["2"], &[]);
    w.check("TLBIALL, nested", |r| r.wb(4, TLBIALL, 0), &["nested"], &["stage2"]);
    w.check("TLBIALL, hyp", |r| r.wb(6, TLBIALL, 0), &["hyp"], &[]);
    w.check("TLBIALL, secure", |r| r.ws(r.cb(24, TLBIALL), 0), &["secure"], &[]);
    w.check("TLBIALL, monitor", |r| r.ws(r.cb(25, TLBIALL), 0), &["monitor"], &[]);
    // By ASID, from any bank of the VMID.
    w.check("TLBIASID", |r| r.wb(0, TLBIASID, 0x10), &["0"], &[]);
    w.check("TLBIASID of the neighbour", |r| r.wb(0, TLBIASID, 0x11), &["1"], &[]);
    w.check("TLBIASID spares global entries", |r| r.wb(0, TLBIASID, 0x99), &[], &[]);
    w.check("TLBIASID, nested", |r| r.wb(4, TLBIASID, 0x10), &["nested"], &[]);
    // By VA and ASID, or global.
    for reg in [TLBIVA, TLBIVAL] {
        w.check("TLBIVA", op(0, reg, 0x10 << 48 | PAGE_VA), &["0", "global"], &[]);
        w.check("TLBIVA of the neighbour's ASID", op(0, reg, 0x11 << 48 | PAGE_VA), &["1", "global"], &[]);
        w.check("TLBIVA, no such ASID", op(0, reg, 0x77 << 48 | PAGE_VA), &["global"], &[]);
        w.check("TLBIVA, another page", op(0, reg, 0x10 << 48 | (PAGE_VA + 1)), &[], &[]);
        w.check("TLBIVA, nested", op(4, reg, 0x10 << 48 | PAGE_VA), &["nested"], &[]);
        w.check("TLBIVA, hyp", op(6, reg, 0x55 << 48 | PAGE_VA), &["hyp"], &[]);
        // A 32-bit write to the low word has ASID 0; one to the high word does nothing.
        w.check("TLBIVA, low half", |r| r.wb(0, reg, PAGE_VA as u32), &["global"], &[]);
        w.check("TLBIVA, high half", |r| r.wb(0, reg + 4, PAGE_VA as u32), &[], &[]);
    }
    for reg in [TLBIVAA, TLBIVAAL] {
        w.check("TLBIVAA", op(0, reg, PAGE_VA), &["0", "1", "global"], &[]);
        w.check("TLBIVAA, bits above the VA", op(0, reg, 0xffff << 48 | PAGE_VA), &["0", "1", "global"], &[]);
        w.check("TLBIVAA, another page", op(0, reg, PAGE_VA - 1), &[], &[]);
        w.check("TLBIVAA", op(2, reg, PAGE_VA), &["2"], &[]);
    }
}

#[test]
fn operations_of_a_stage_2_bank() {
    let mut w = World::new();
    let op = |reg: u64, value: u64| move |r: &Rig| r.wb64(5, reg, value);
    for reg in [TLBIIPAS2, TLBIIPAS2L] {
        w.check("TLBIIPAS2", op(reg, PAGE_VA), &["stage2"], &[]);
        w.check("TLBIIPAS2, another page", op(reg, PAGE_VA + 1), &[], &[]);
        w.check("TLBIIPAS2 takes 36 bits", op(reg, 0xfff << 40 | PAGE_VA), &["stage2"], &[]);
        w.check("TLBIIPAS2, low half", |r| r.wb(5, reg, PAGE_VA as u32), &["stage2"], &[]);
        w.check("TLBIIPAS2, high half", |r| r.wb(5, reg + 4, PAGE_VA as u32), &[], &[]);
    }
    // Stage 1 operations are not there, nor stage 2 ones in stage 1 banks.
    for reg in [TLBIALL, TLBIASID, TLBIVA, TLBIVAA, TLBIVAL, TLBIVAAL] {
        w.check("a stage 1 operation", op(reg, PAGE_VA), &[], &[]);
    }
    w.check("TLBIIPAS2 in a stage 1 bank", |r| r.wb64(4, TLBIIPAS2, PAGE_VA), &[], &[]);
}

#[test]
fn banks_of_the_other_side_are_out_of_reach() {
    let mut w = World::new();
    for reg in [TLBIALL, TLBIASID, TLBIVA, TLBIVAA] {
        w.check("a non-secure write", |r| r.wb64(24, reg, 0x10 << 48 | PAGE_VA), &[], &[]);
    }
    w.check("a secure write to a non-secure bank", |r| r.ws(r.cb(2, TLBIALL), 0), &["2"], &[]);
}

/// Banks with the same VMID and ASID share entries and are hit by each other's operations.
#[test]
fn entries_belong_to_tags_not_to_banks() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, VA, OLD | RW);
    r.stage1(1, root, LINUX_SCTLR);
    r.wb64(1, TTBR0, root); // ASID 0 as in bank 0
    r.group(1, 0x868, 1);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, VA), Ok(OLD));
    t.page(root, VA, NEW | RW);
    assert_eq!(rd(&mut p, 0x868, VA), Ok(OLD), "shared");
    assert_eq!(p.stats().walks, 1);
    r.wb64(1, TLBIVA, PAGE_VA);
    assert_eq!(rd(&mut p, SID, VA), Ok(NEW));
}

#[test]
fn an_invalidation_reaches_every_port() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, VA, OLD | RW);
    let mut ports: Vec<P> = (0..6).map(|_| r.port()).collect();
    assert!(ports.iter_mut().all(|p| rd(p, SID, VA) == Ok(OLD)));
    t.page(root, VA, NEW | RW);
    assert!(ports.iter_mut().all(|p| rd(p, SID, VA) == Ok(OLD)));
    r.wb64(0, TLBIVAL, PAGE_VA);
    assert!(ports.iter_mut().all(|p| rd(p, SID, VA) == Ok(NEW)));
}

#[test]
fn faults_are_not_cached() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    let mut p = r.port();
    for leaf in [0, OLD | RW & !AF] {
        t.page(root, VA, leaf);
        assert_eq!(rd(&mut p, SID, VA), Err(ABORT));
        r.wb(0, FSR, 0x8000_01fe);
    }
    t.page(root, VA, OLD | RW);
    assert_eq!(rd(&mut p, SID, VA), Ok(OLD), "without any invalidation");
}

#[test]
fn map_changes_that_need_no_invalidation_flush_nothing() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, VA, OLD | RW);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, VA), Ok(OLD));
    // Other streams, other banks, interrupts, fault registers.
    r.group(5, 0x5, 0x0001_0000);
    r.w(SMR + 20, 0);
    r.stage1(9, root, LINUX_SCTLR);
    r.wb(0, FSR, 0xffff_ffff);
    r.wb(0, TLBSYNC, 0);
    r.w(TLBGSYNC, 0);
    t.page(root, VA + 0x1000, NEW | RW);
    assert_eq!(rd(&mut p, SID, VA + 0x1000), Ok(NEW));
    assert_eq!(p.stats().walks, 2);
    t.page(root, VA, NEW | RW);
    for _ in 0..10 {
        assert_eq!(rd(&mut p, SID, VA), Ok(OLD));
    }
    assert_eq!(p.stats().walks, 2, "the entry was never dropped");
    // M is not cached: off and on again, and the entry is still there.
    r.wb(0, SCTLR, 0);
    assert_eq!(rd(&mut p, SID, VA), Ok(VA));
    r.wb(0, SCTLR, LINUX_SCTLR);
    assert_eq!(rd(&mut p, SID, VA), Ok(OLD));
}

#[test]
fn any_address_of_a_large_entry_invalidates_it() {
    // 16K and 64K pages, 2 MiB blocks and contiguous runs: the operand's low bits do not matter.
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    let block = t.slot(root, 0, 0x4000_0000, 2);
    let run = t.slot(root, 0, 0x5000_0000, 3);
    let fill = |offset: u64| {
        t.store(block, (0x6000_0000 + offset * 0x200) | (RW & !2));
        for i in 0..16 {
            t.store(run + 8 * i, (DATA + offset * 0x10 + 0x1000 * i) | RW | 1 << 52);
        }
    };
    for (va, operand) in [(0x4000_0000u64, 0x401f_f000u64), (0x401f_f000, 0x4000_0000)] {
        fill(0);
        let mut p = r.port();
        assert_eq!(rd(&mut p, SID, va), Ok(DATA + (va & 0x1f_ffff)));
        fill(0x1000);
        r.wb64(0, TLBIVA, operand >> 12);
        assert_eq!(rd(&mut p, SID, va), Ok(DATA + 0x20_0000 + (va & 0x1f_ffff)));
    }
    fill(0);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, 0x5000_3000), Ok(DATA + 0x3000));
    fill(0x1000);
    r.wb64(0, TLBIVA, 0x5000_f000 >> 12);
    assert_eq!(rd(&mut p, SID, 0x5000_3000), Ok(DATA + 0x1_3000));

    let r = Rig::plain_on();
    let mut t = Tables::new(&r);
    for (tg0, shift) in [(2u32, 14u32), (1, 16)] {
        // One level: T0SZ 39 is 25 bits.
        let table = t.alloc(16);
        r.stage1(0, table, M | CFRE);
        r.wb(0, TCR, 39 | tg0 << 14 | 1 << 23);
        r.group(0, 1, 0);
        let index = 3u64;
        r.poke(table + 8 * index, DATA | RW);
        let va = index << shift;
        let mut p = r.port();
        assert_eq!(rd(&mut p, 1, va), Ok(DATA));
        r.poke(table + 8 * index, (DATA + 0x1_0000) | RW);
        r.wb64(0, TLBIVA, (va >> 12) + 3);
        assert_eq!(rd(&mut p, 1, va), Ok(DATA + 0x1_0000), "granule 2^{shift}");
    }
}

#[test]
fn upper_half_addresses_are_invalidated_by_their_operand() {
    let r = Rig::plain_on();
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    r.stage1(0, root, M | CFRE);
    r.wb64(0, TTBR1, root);
    r.wb(0, TCR, 0x8010_2010);
    r.group(0, 1, 0);
    let va = 0xffff_8000_1234_5000u64;
    t.page(root, va, OLD | RW);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 1, va), Ok(OLD));
    t.page(root, va, NEW | RW);
    r.wb64(0, TLBIVA, va >> 12 & 0xfff_ffff_ffff);
    assert_eq!(rd(&mut p, 1, va), Ok(NEW));
}

#[test]
fn eight_and_sixteen_bit_asids() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    let mut p = r.port();
    let cycle = |p: &mut P, t: &mut Tables, operand: u64, want: u64| {
        t.page(root, VA, OLD | RW);
        r.w(TLBIALLNSNH, 0);
        assert_eq!(rd(p, SID, VA), Ok(OLD));
        t.page(root, VA, NEW | RW);
        r.wb64(0, TLBIVA, operand << 48 | PAGE_VA);
        assert_eq!(rd(p, SID, VA), Ok(want), "operand ASID {operand:#x}");
    };
    r.wb64(0, TTBR0, root | 0x1234 << 48);
    cycle(&mut p, &mut t, 0x1234, NEW);
    cycle(&mut p, &mut t, 0x0034, OLD);
    // AS = 0: the upper byte counts for nothing.
    r.wb(0, TCR2, LINUX_TCR2 & !0x10);
    cycle(&mut p, &mut t, 0x0034, NEW);
    cycle(&mut p, &mut t, 0x0035, OLD);
    // A1: the ASID is TTBR1's.
    r.wb64(0, TTBR1, 0x77 << 48);
    r.wb(0, TCR, LINUX_TCR | 1 << 22);
    cycle(&mut p, &mut t, 0x77, NEW);
    cycle(&mut p, &mut t, 0x34, OLD);
}

#[test]
fn aarch32_banks_take_32_bit_operands() {
    let r = Rig::plain_on();
    let mut t = Tables::new(&r);
    // Long: level 1 table, level 2 table, level 3 table. Short: a 16 KiB table of sections.
    let root = t.alloc(1);
    let slot = t.slot(root, 1, VA, 3);
    r.stage1(0, root, M | CFRE);
    r.w(r.cba2r(0), 0);
    r.wb(0, TCR, 0x8000_0000);
    r.wb64(0, TTBR0, root | 0xc2 << 48);
    r.group(0, 1, 0);
    let mut p = r.port();
    let cycle = |p: &mut P, operand: u64, want: u64| {
        r.poke(slot, OLD | RW);
        r.w(TLBIALLNSNH, 0);
        assert_eq!(rd(p, 1, VA), Ok(OLD));
        r.poke(slot, NEW | RW);
        r.wb64(0, TLBIVA, operand);
        assert_eq!(rd(p, 1, VA), Ok(want), "{operand:#x}");
    };
    cycle(&mut p, VA | 0xc2, NEW);
    cycle(&mut p, VA | 0x42, OLD);
    cycle(&mut p, VA + 0x10c2, OLD);
    cycle(&mut p, 0xdead_beef_0000_0000 | VA | 0xc2, NEW); // the upper word is ignored
    // Short: the ASID is CONTEXTIDR's.
    let table = t.alloc(4);
    let section = |pa: u64| r.poke(table + (VA >> 20) * 4, pa | 0x2_0c02); // nG, AP 3
    r.wb(0, TCR, 0);
    r.wb64(0, TTBR0, table);
    r.wb(0, CONTEXTIDR, 0xabcd_efc2);
    r.wb(0, SCTLR, M | CFRE);
    for (asid, stale) in [(0xc2u64, false), (0x42, true)] {
        section(0x6000_0000);
        r.wb(0, TLBIALL, 0);
        assert_eq!(rd(&mut p, 1, VA + 8), Ok(0x6000_0008));
        section(0x4000_0000);
        r.wb(0, TLBIVA, VA as u32 | asid as u32);
        assert_eq!(rd(&mut p, 1, VA + 8), Ok(if stale { 0x6000_0008 } else { 0x4000_0008 }));
    }
    // Stage 2 by IPA: operand bits 47:40 of the address count as zero.
    let root2 = t.alloc(2);
    let slot2 = t.slot(root2, 1, VA, 3);
    r.stage2(1, root2, 5, M | CFRE);
    r.w(r.cba2r(1), 0);
    r.wb(1, TCR, 0x0000_0058);
    r.group(1, 2, 1);
    r.poke(slot2, OLD | S2_RW);
    assert_eq!(rd(&mut p, 2, VA), Ok(OLD));
    r.poke(slot2, NEW | S2_RW);
    assert_eq!(rd(&mut p, 2, VA), Ok(OLD));
    r.wb64(1, TLBIIPAS2, 0xf0_0000_0000 >> 4 | PAGE_VA);
    r.wb64(1, TLBIIPAS2, 0xff << 28 | PAGE_VA);
    assert_eq!(rd(&mut p, 2, VA), Ok(NEW));
}

#[test]
fn sixteen_bit_vmids() {
    let (vmid, other) = (0x1234u32, 0x5634u32);
    let r = Rig::plain_on();
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    r.stage1(0, root, M | CFRE);
    r.w(r.cba2r(0), 1 | vmid << 16);
    r.group(0, 1, 0);
    let mut p = r.port();
    r.w(CR0, 0x8020_0402);
    let cycle = |p: &mut P, t: &mut Tables, op: &dyn Fn(), want: u64, what: &str| {
        t.page(root, VA, OLD | RW);
        r.w(TLBIALLNSNH, 0);
        assert_eq!(rd(p, 1, VA), Ok(OLD));
        t.page(root, VA, NEW | RW);
        op();
        assert_eq!(rd(p, 1, VA), Ok(want), "{what}");
    };
    cycle(&mut p, &mut t, &|| r.w(TLBIVMID, vmid), NEW, "CBA2R's VMID");
    cycle(&mut p, &mut t, &|| r.w(TLBIVMID, other), OLD, "another with the same low byte");
    cycle(&mut p, &mut t, &|| r.w(TLBIVMIDS1, vmid), NEW, "stage 1");
    cycle(&mut p, &mut t, &|| r.wb(0, TLBIALL, 0), NEW, "the bank's own");
    r.w(CR0, 0x0020_0402);
    cycle(&mut p, &mut t, &|| r.w(TLBIVMID, 0), NEW, "VMID16EN 0: CBAR's VMID");
    cycle(&mut p, &mut t, &|| r.w(TLBIVMID, 0x5600), NEW, "and eight bits of the operand");
}

/// The order for a changed stage 2: by IPA, sync, then the combined entries.
#[test]
fn a_changed_stage_2_needs_both_operations() {
    let mut w = World::new();
    let nested = World::index("nested");
    for watch in &mut w.watches {
        watch.arm(&w.r);
    }
    w.r.wb64(5, TLBIIPAS2, PAGE_VA);
    w.r.wb(5, TLBSYNC, 0);
    assert_eq!(w.watches[nested].look(), OLD, "the combined entry stays");
    w.r.w(TLBIVMIDS1, 3);
    assert_eq!(w.watches[nested].look(), NEW);
}
