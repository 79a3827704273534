//! Attributes on the way: what comes in, overrides, both stages' tables, and the SMMU's own accesses to tables.

mod rig;

use std::sync::{Arc, Mutex};

use portcullis_arch::attrs::{Allocate, MemoryType, Shareability};
use portcullis_arch::{Access, Attributes, Iova, Pa};
use portcullis_bus::{BusError, DmaPort, Memory, Mmio, SystemMemory};
use portcullis_smmuv3::{Caps, SmmuV3};
use rig::*;

fn attributes(r: &Rig, a: Attributes) -> Attributes {
    r.port().translate(&from(1).with_attrs(a), Iova(0x1008), Access::Read).unwrap().attrs
}

/// Allocation hints of the tables with those of a cacheable input: not allocating and transient win.
#[test]
fn hints_of_a_cacheable_input_are_combined_with_those_of_stage_1() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A | R);
    r.map(root, 0x1000, DATA | RW);
    let wb = Attributes::DEVICE_DEFAULT;
    let hints = |a: Attributes| (a.read_allocate(), a.write_allocate(), a.transient());
    use Allocate::{No, Yes};
    assert_eq!(hints(attributes(&r, wb)), (Yes, Yes, 0), "MAIR 0xff");
    assert_eq!(hints(attributes(&r, wb.with_read_allocate(No))), (No, Yes, 0));
    assert_eq!(hints(attributes(&r, wb.with_write_allocate(No).with_transient(3))), (Yes, No, 3));
    let neither = wb.with_write_allocate(No).with_read_allocate(No).with_transient(3);
    assert_eq!(hints(attributes(&r, neither)), (No, No, 0), "what never allocates is not transient");
    // Other types say nothing about allocation.
    let nc = wb.with_memory(MemoryType::NORMAL_NC).with_read_allocate(No);
    assert_eq!(hints(attributes(&r, nc)), (Yes, Yes, 0));
    // A hit says the same as a miss, for both kinds of input.
    let mut p = r.port();
    for a in [wb, wb.with_read_allocate(No), wb, wb.with_read_allocate(No)] {
        let t = p.translate(&from(1).with_attrs(a), Iova(0x1008), Access::Read).unwrap();
        assert_eq!(t.attrs.read_allocate(), if a == wb { Yes } else { No });
    }
    assert_eq!(p.stats().walks, 1);
    // The STE's ALLOCCFG comes before: 1RWT, no write allocation.
    r.store(STRTAB + 64 + 8, &[1 << 2 | 1 << 4 | 3 << 6 | 0b1100 << 37 | 1 << 44]);
    r.cfgi_all();
    assert_eq!(hints(attributes(&r, wb)).1, No);
}

/// Memory that remembers with which attributes each word was read.
#[derive(Clone)]
struct Seen {
    mem: SystemMemory,
    loads: Arc<Mutex<Vec<(u64, Attributes)>>>,
}

impl Memory for Seen {
    fn read(&self, pa: Pa, a: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        self.mem.read(pa, a, buf)
    }
    fn write(&self, pa: Pa, a: Attributes, buf: &[u8]) -> Result<(), BusError> {
        self.mem.write(pa, a, buf)
    }
    fn load64(&self, pa: Pa, a: Attributes) -> Result<u64, BusError> {
        self.loads.lock().unwrap().push((pa.get(), a));
        self.mem.load64(pa, a)
    }
    fn load32(&self, pa: Pa, a: Attributes) -> Result<u32, BusError> {
        self.mem.load32(pa, a)
    }
    fn cas64(&self, pa: Pa, a: Attributes, old: u64, new: u64) -> Result<u64, BusError> {
        self.mem.cas64(pa, a, old, new)
    }
}

/// IDR3.PTWNNC: stage 1 tables and CDs that stage 2 puts into Device memory are read as Normal non-cacheable; without it
/// as Device.
#[test]
fn device_memory_is_walked_as_non_cacheable_where_ptwnnc_says_so() {
    for ptwnnc in [true, false] {
        let c = Caps { ptwnnc, revision: if ptwnnc { 3 } else { 2 }, ..caps() };
        let mut r = Rig::new(c.clone());
        let seen = Seen { mem: r.mem.clone(), loads: Arc::default() };
        let smmu = SmmuV3::builder(c).memory(seen.clone()).build().unwrap();
        let w = smmu.window(false);
        w.write32(0x28, 0xd75).unwrap();
        w.write64(0x80, STRTAB).unwrap();
        w.write32(0x88, 6).unwrap();
        let s2 = r.table();
        let device = S2_RO & !(0xf << 2) | 1 << 2;
        let s1 = r.table();
        let ipa = 0x10_0000;
        r.ste(4, [1 | 7 << 1 | 0x20_0000, 1 << 2 | 1 << 4 | 3 << 6, s2_dw2(1 << 58), s2, 0, 0, 0, 0]);
        r.map(s2, 0x20_0000, CDS | device);
        r.map(s2, ipa, s1 | device);
        r.map(s2, 0x4000_7000, DATA | S2_RW);
        r.cd(0, cd(ipa, A | R));
        // Level 0 to a table in the same page, and so on: one page is all levels.
        let next = [r.table(), r.table(), r.table()];
        for (n, t) in next.iter().enumerate() {
            r.map(s2, ipa + 0x1000 * (n as u64 + 1), t | S2_RO);
        }
        r.store(s1, &[(ipa + 0x1000) | 3]);
        r.store(next[0], &[(ipa + 0x2000) | 3]);
        r.store(next[1], &[(ipa + 0x3000) | 3]);
        r.store(next[2], &[0x4000_7000 | RW]);
        w.write32(0x20, 1).unwrap();
        let mut p = smmu.port(seen.clone());
        let mut b = [0; 4];
        p.read(from(4), Iova(8), &mut b).unwrap();
        let of = |at: u64| seen.loads.lock().unwrap().iter().find(|(pa, _)| *pa == at).unwrap().1;
        let want = if ptwnnc { MemoryType::NORMAL_NC } else { MemoryType::DEVICE_NGNRE };
        assert_eq!((of(s1).memory(), of(CDS).memory()), (want, want), "PTWNNC {ptwnnc}");
        assert_eq!(of(s1).shareability(), Shareability::Outer);
        assert_eq!(of(next[0]).memory(), MemoryType::NORMAL_WB);
    }
}

/// CD.UWXN is about privileged fetches; VMSAv8-32 only.
#[test]
fn uwxn_stops_privileged_fetches_alone() {
    let mut r = Rig::started(caps());
    let (one, two) = (r.table(), r.table());
    // T0SZ 0: level 1 with four entries.
    let mut words = cd(one, A | R | 1 << 37);
    words[0] &= !(0x3f | 1 << 41);
    r.cd(1, words);
    r.ste(1, [1 | 5 << 1 | (CDS + 64), 1 << 2 | 1 << 4 | 3 << 6, 0, 0, 0, 0, 0, 0]);
    r.store(one, &[two | 3]);
    r.store(two, &[DATA & !0x1f_ffff | RW & !2]);
    let wants = |privileged| {
        let a = Attributes::DEVICE_DEFAULT.with_instruction(true).with_privileged(privileged);
        r.port().translate(&from(1).with_attrs(a), Iova(0x1000), Access::Read).is_ok()
    };
    assert_eq!((wants(false), wants(true)), (true, false));
}

#[test]
fn a_write_leaves_as_data() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A | R);
    r.map(root, 0x1000, DATA | RW & !(1 << 54));
    // INSTCFG 3, also for the stream that passes untranslated.
    r.store(STRTAB + 64 + 8, &[1 << 2 | 1 << 4 | 3 << 6 | 3 << 50 | 1 << 44]);
    r.ste(2, [1 | 4 << 1, 3 << 50 | 1 << 44, 0, 0, 0, 0, 0, 0]);
    let mut p = r.port();
    for (sid, va) in [(1, 0x1000), (2, DATA)] {
        for _ in 0..2 {
            for (access, fetch) in [(Access::Read, true), (Access::Write, false)] {
                let t = p.translate(&from(sid), Iova(va), access).unwrap();
                assert_eq!(t.attrs.instruction(), fetch, "stream {sid} {access}");
            }
        }
    }
}

/// Secure streams: what is reached through a non-secure table is non-secure, whatever its descriptor says and whether or
/// not hierarchical permissions are disabled.
#[test]
fn a_non_secure_table_leads_to_non_secure_memory() {
    let secure = from(3).with_attrs(Attributes::DEVICE_DEFAULT.with_non_secure(false));
    for (nscfg, ns_table, ns, had) in (0..16).map(|n: u64| (n & 1, n >> 1 & 1, n >> 2 & 1, n >> 3)) {
        let mut r = Rig::started(secure_caps());
        r.start_secure();
        let root = r.table();
        let mut words = cd(root, A | R);
        words[1] |= nscfg | had << 1;
        r.cd(3, words);
        r.store(S_STRTAB + 64 * 3, &[1 | 5 << 1 | (CDS + 192), 1 << 2 | 1 << 4 | 3 << 6, 0, 0, 0, 0, 0, 0]);
        r.map(root, 0x1000, DATA | RW | ns << 5);
        r.store(root, &[r.load(root) | ns_table << 63]);
        let t = r.port().translate(&secure, Iova(0x1000), Access::Read).unwrap();
        assert_eq!(t.attrs.non_secure(), nscfg | ns_table | ns != 0, "{nscfg} {ns_table} {ns} {had}");
    }
}
