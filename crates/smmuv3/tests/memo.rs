//! What a port remembers of earlier look-ups never shows: a port that has decoded many configurations answers as one that
//! has seen none, whatever changed between two accesses.

#[path = "rig/random.rs"]
mod random;
mod rig;

use portcullis_arch::{Access, Iova};
use portcullis_bus::{Initiator, SystemMemory};
use portcullis_smmuv3::Port;
use random::Rng;
use rig::*;

const VA: u64 = 0x1000;

/// A rig whose streams and CDs are made of few parts, so that most look-ups meet words that were decoded before.
struct Parts {
    rig: Rig,
    roots: [u64; 2],
    stage2: u64,
}

impl Parts {
    fn new() -> Self {
        // Nothing stalls, so that outcomes can be compared.
        let mut rig = Rig::started(terminating_caps());
        let roots = [rig.table(), rig.table()];
        for (i, root) in roots.into_iter().enumerate() {
            rig.map(root, VA, (DATA + 0x1000 * i as u64) | RW);
        }
        let stage2 = rig.table();
        for page in (0..RAM_SIZE).step_by(4096) {
            rig.map(stage2, RAM + page, (RAM + page) | S2_RW);
        }
        Self { rig, roots, stage2 }
    }

    fn write_cd(&self, rng: &mut Rng) {
        let mut words = cd(rng.pick(&self.roots), rng.pick(&[A | R, A]));
        words[0] |= rng.below(2) << 49;
        words[3] = rng.pick(&[0xff, 0x44]);
        if rng.one_in(3) {
            words[rng.below(2) as usize] ^= 1 << rng.below(64);
        }
        self.rig.cd(rng.below(8), words);
    }

    fn write_ste(&self, rng: &mut Rng, sid: u32) {
        let ptr = (CDS + 64 * 4 * rng.below(2)) | rng.pick(&[0, 2 << 59]);
        // Bypass, stage 1, stage 2, nested.
        let config = rng.pick(&[4, 5, 5, 6, 7]);
        let dw1 = rng.below(4) | 1 << 2 | 1 << 4 | 3 << 6 | rng.below(4) << 48 | rng.below(4) << 50;
        let mut words = [1 | config << 1 | ptr, dw1, s2_dw2(0), self.stage2, 0, 0, 0, 0];
        if rng.one_in(3) {
            words[rng.below(4) as usize] ^= 1 << rng.below(64);
        }
        self.rig.ste(sid, words);
    }

    /// The TLB is empty: what is compared is configuration.
    fn compare(&self, old: &mut Port<SystemMemory>, from: &Initiator, what: &str) -> bool {
        self.rig.tlbi_all();
        let new = self.rig.port().translate(from, Iova(VA), Access::Read);
        assert_eq!(old.translate(from, Iova(VA), Access::Read), new, "{what}: {from:?}");
        new.is_ok()
    }
}

fn initiator(rng: &mut Rng, sid: u32) -> Initiator {
    let from = if rng.one_in(3) { with_ssid(sid, rng.below(5) as u32) } else { from(sid) };
    let attrs = from.attrs.with_privileged(rng.one_in(2)).with_instruction(rng.one_in(3));
    from.with_attrs(attrs)
}

#[test]
fn a_stream_that_is_new_to_a_port_is_looked_up_in_the_tables_of_now_without_any_invalidation() {
    let (mut passed, mut asked) = (0, 0);
    for seed in 0..40 {
        let mut rng = Rng(seed);
        let parts = Parts::new();
        (0..16).for_each(|_| parts.write_cd(&mut rng));
        let mut port = parts.rig.port();
        // Each stream once: the port's own configuration cache knows none of them.
        for sid in 0..64 {
            parts.write_ste(&mut rng, sid);
            if rng.one_in(2) {
                parts.write_cd(&mut rng);
            }
            asked += 1;
            let from = initiator(&mut rng, sid);
            passed += u32::from(parts.compare(&mut port, &from, &format!("seed {seed}")));
        }
    }
    assert!(passed * 4 > asked, "{passed} of {asked} pass: too few to say anything");
}

#[test]
fn a_stream_whose_configuration_is_invalidated_is_looked_up_anew() {
    for seed in 0..20 {
        let mut rng = Rng(seed);
        let parts = Parts::new();
        (0..16).for_each(|_| parts.write_cd(&mut rng));
        (0..8).for_each(|sid| parts.write_ste(&mut rng, sid));
        let mut port = parts.rig.port();
        for step in 0..200 {
            let what = format!("seed {seed}, step {step}");
            let sid = rng.below(8) as u32;
            match rng.below(4) {
                0 => parts.write_ste(&mut rng, sid),
                1 => parts.write_cd(&mut rng),
                2 => {
                    // Another register: E2H, or another way to read the same tables.
                    let r = &parts.rig;
                    let on = r.r(CR0);
                    r.w(CR0, on & !SMMUEN);
                    parts.compare(&mut port, &from(sid), &what);
                    r.w(CR2, r.r(CR2) ^ 1);
                    r.w(STRTAB_CFG, rng.pick(&[2, 6]));
                    r.w(CR0, on);
                }
                _ => {}
            }
            parts.rig.cfgi_all();
            for _ in 0..4 {
                let sid = rng.below(8) as u32;
                let from = initiator(&mut rng, sid);
                parts.compare(&mut port, &from, &what);
            }
        }
    }
}

#[test]
fn each_field_that_changes_between_two_accesses_counts_for_the_next_stream() {
    let mut parts = Parts::new();
    let root = parts.roots[0];
    let ste = |r: &Rig, sid, dw1: u64| {
        r.ste(sid, [1 | 5 << 1 | CDS, 1 << 2 | 1 << 4 | 3 << 6 | dw1, 0, 0, 0, 0, 0, 0])
    };
    let r = &mut parts.rig;
    r.cd(0, cd(root, A | R));
    (0..8).for_each(|sid| ste(r, sid, 0));
    let mut p = r.port();
    let at = |p: &mut Port<SystemMemory>, from: Initiator| p.translate(&from, Iova(VA), Access::Read).ok();
    let first = at(&mut p, from(0)).unwrap();
    assert_eq!(at(&mut p, from(1)), Some(first), "the same words, another stream");
    // The CD: another table under another ASID, with nothing said to the SMMU.
    let mut words = cd(parts.roots[1], A | R);
    words[0] |= 1 << 49;
    parts.rig.cd(0, words);
    assert_eq!(at(&mut p, from(2)).unwrap().pa.get(), DATA + 0x1000);
    assert_eq!(at(&mut p, from(0)).unwrap().pa.get(), DATA, "the port's own cache holds until CMD_CFGI");
    // Attributes that come in.
    let privileged = from(2).with_attrs(from(2).attrs.with_privileged(true));
    assert!(at(&mut p, privileged).unwrap().attrs.privileged());
    // The STE: PRIVCFG privileged.
    ste(&parts.rig, 3, 3 << 48);
    assert!(at(&mut p, from(3)).unwrap().attrs.privileged());
    assert!(!at(&mut p, from(4)).unwrap().attrs.privileged());
    // And not valid any more.
    parts.rig.ste(5, [0; 8]);
    assert_eq!(at(&mut p, from(5)), None);
    // The CD is not valid any more; then it is again.
    parts.rig.cd(0, [0; 8]);
    assert_eq!(at(&mut p, from(6)), None);
    parts.rig.cd(0, words);
    assert_eq!(at(&mut p, from(6)).unwrap().pa.get(), DATA + 0x1000);
    // A register: the table ends before the stream.
    let on = parts.rig.r(CR0);
    parts.rig.w(CR0, on & !SMMUEN);
    parts.rig.w(STRTAB_CFG, 2);
    parts.rig.w(CR0, on);
    assert_eq!((at(&mut p, from(7)), at(&mut p, from(6))), (None, None));
    assert!(at(&mut p, from(3)).is_some());
}
