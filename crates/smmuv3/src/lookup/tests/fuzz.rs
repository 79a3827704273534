//! Random tables and registers: no panic, no access outside of the machine, and what is called legal can be walked.

use super::*;
use crate::caps::SecureCaps;
use portcullis_walk::{AccessKind, Updates};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.next() as usize % of.len()]
    }
    /// A word with a few bits of `base` changed, or anything.
    pub fn word(&mut self, base: u64) -> u64 {
        let flips = match self.next() % 32 {
            0 => return self.next(),
            n @ 1..=3 => n,
            4..=8 => 1,
            _ => 0,
        };
        (0..flips).fold(base, |w, _| w ^ 1 << (self.next() % 64))
    }
}

fn random_caps(r: &mut Random) -> Caps {
    let mut c = caps();
    let oas = r.pick(&[32, 36, 40, 42, 44, 48, 52]);
    (c.oas_bits, c.revision) = (oas, r.pick(&[0, 1, 2, 3]));
    (c.ds, c.va52, c.stt) = (r.one_in(2), r.one_in(2), r.one_in(2));
    (c.aarch32, c.hyp, c.ats) = (r.one_in(2), r.one_in(2), r.one_in(2));
    (c.ssid_bits, c.sid_bits) = (r.pick(&[0, 1, 8, 20]), r.pick(&[0, 4, 16, 32]));
    c.httu = r.pick(&[Httu::None, Httu::Access, Httu::Dirty]);
    c.secure = r.one_in(2).then_some(SecureCaps { sid_bits: 8, msi: true });
    c
}

#[test]
fn random_tables_never_surprise() {
    let mut r = Random(0x5eed);
    let (mut translated, mut walked) = (0, 0);
    for _ in 0..60_000 {
        let config = r.pick(&[
            SteConfig::Bypass,
            SteConfig::Stage1,
            SteConfig::Stage1,
            SteConfig::Stage2,
            SteConfig::Nested,
        ]);
        let e = Ste(ste(config).0.map(|w| r.word(w)));
        let c = Cd(cd().0.map(|w| r.word(w)));
        let mut s = Scene::new(e, c);
        s.caps = random_caps(&mut r);
        s.regs.secure = s.caps.secure.is_some() && r.one_in(4);
        s.regs.cr2 = Cr2::from_bits(r.next() as u32);
        s.regs.gbpa = Gbpa::from_bits(r.next() as u32);
        if r.one_in(4) {
            s.regs.strtab_base_cfg = r.next() as u32;
            s.regs.strtab_base = r.word(TABLE);
        }
        s.memory.put(S2TABLE, &[1 << 10 | 3 << 6 | 0xf << 2 | 1]);
        s.memory.put(0x40_0000, &[r.word(0x41_0003), r.word(0x4000_0441)]);
        let ssid = r.one_in(3).then(|| r.next() as u32 >> (r.next() % 32));
        let sid = if r.one_in(4) { r.next() as u32 } else { 0 };
        let from = who(sid, ssid);
        let from = from.with_attrs(Attributes::from_bits(r.next() as u32).with_non_secure(!s.regs.secure));
        let va = r.word(0x1000);
        let access = if r.one_in(2) { Access::Read } else { Access::Write };
        let (d, trail) = s.ask(from, va, access);
        assert!(!trail.rule.is_empty());
        match d {
            Decision::Fault(f) => {
                let stage2 = f.stage2.is_some();
                let code = f.code as u8;
                let walks = code == 0x0b || (0x10..=0x13).contains(&code);
                assert!(stage2 == walks || f.code == EventCode::Permission, "{f:?}");
            }
            Decision::Bypass { attrs, .. } => {
                assert!(s.regs.secure || attrs.non_secure(), "a non-secure stream stays non-secure");
            }
            Decision::Silent(_) => {}
            Decision::Translate(c) => {
                translated += 1;
                assert!(s.regs.secure || c.incoming.non_secure());
                assert_eq!(c.key.secure, s.regs.secure);
                if let Some(s2) = &c.stages.stage2 {
                    assert!(s2.region.is_some(), "a legal STE has a legal start level");
                    assert!(!s.regs.secure);
                }
                let kind = AccessKind::new(access, c.incoming);
                let input = va & c.va_mask;
                let result = c.stages.translate(&s.memory, input, kind, Updates::Apply, &mut NoRecord);
                if let Ok(w) = result {
                    walked += 1;
                    let most = if s.caps.aarch32 { s.caps.oas_bits.max(40) } else { s.caps.oas_bits };
                    assert_eq!(w.pa >> most, 0, "{:#x} is beyond OAS", w.pa);
                }
            }
        }
    }
    assert!(translated > 2000 && walked > 500, "{translated} {walked}: the test must reach what it tests");
}
