//! What a port remembers of registers never shows: a port that has been used for long answers as one that is new, whatever
//! was written between two accesses.

#[path = "rig/random.rs"]
mod random;
mod rig;

use portcullis_arch::{Access, Iova};
use random::Rng;
use rig::*;

const VA: u64 = 0x1000;

#[test]
fn a_port_that_is_in_use_answers_as_a_new_one_after_every_register_write() {
    let (mut passed, mut asked) = (0u32, 0u32);
    for seed in 0..60 {
        let mut rng = Rng(seed);
        let r = Rig::zynqmp_on();
        let mut t = Tables::new(&r);
        let roots = [t.alloc(1), t.alloc(1)];
        for (i, root) in roots.into_iter().enumerate() {
            t.page(root, VA, (DATA + 0x1000 * i as u64) | RW);
            r.stage1(i as u8, root, LINUX_SCTLR);
            r.group(i as u64, i as u32, i as u32);
        }
        let mut old = r.port();
        for step in 0..200 {
            let bank = rng.below(2) as u8;
            let group = 4 * rng.below(3);
            match rng.below(16) {
                0 => r.wb64(bank, TTBR0, rng.pick(&roots) | rng.below(3) << 48),
                1 => r.wb(bank, TCR, rng.pick(&[LINUX_TCR, LINUX_TCR | 1 << 7, LINUX_TCR & !0x3f | 39])),
                2 => r.wb(bank, TCR2, rng.pick(&[LINUX_TCR2, LINUX_TCR2 & !7])),
                3 => r.wb(bank, MAIR0, rng.pick(&[LINUX_MAIR0, 0x4444_4444])),
                // Never CFCFG: outcomes are compared, and stalls have tags.
                4 => r.wb(bank, SCTLR, rng.pick(&[LINUX_SCTLR, LINUX_SCTLR & !M, LINUX_SCTLR | HUPCF])),
                5 => r.w(r.cbar(bank), rng.pick(&[LINUX_CBAR, 0, 2 << 16])),
                6 => r.w(r.cba2r(bank), rng.pick(&[1, 1, 0])),
                7 => r.w(S2CR + group, rng.pick(&[0, 1, 1 << 16, 2 << 16, 3 << 24, 3 << 26])),
                8 => r.w(SMR + group, rng.pick(&[0x8000_0000, 0x8000_0001, 0x8003_0000, 0, 0x8000_0002])),
                9 => r.w(CR0, rng.pick(&[0x0020_1c36, 0x0020_1c37, 0x0020_1836])),
                10 => {
                    r.stage1(bank, roots[usize::from(bank)], LINUX_SCTLR);
                    r.group(bank.into(), bank.into(), bank.into());
                }
                _ => {}
            }
            for _ in 0..rng.below(8) {
                let id = rng.below(4) as u32;
                let from = stream(id);
                let attrs = from.attrs.with_privileged(rng.one_in(2)).with_instruction(rng.one_in(3));
                let from = from.with_attrs(attrs);
                // A page that is there, or a fault.
                let va = Iova(if rng.one_in(3) { VA + 0x1000 } else { VA });
                // What is compared is configuration, so TLBs are empty and no fault stands, unless it is to stand.
                r.w(TLBIALLNSNH, 0);
                let stands = rng.one_in(8);
                let clear = || (0..2).for_each(|b| r.wb(b, FSR, u32::MAX));
                if !stands {
                    clear();
                }
                let got = old.translate(&from, va, Access::Read);
                if !stands {
                    clear();
                }
                let new = r.port().translate(&from, va, Access::Read);
                asked += 1;
                passed += u32::from(new.is_ok());
                assert_eq!(got, new, "seed {seed}, step {step}: stream {id}, {va:?}");
            }
        }
    }
    assert!(passed * 5 > asked, "{passed} of {asked} pass: too few to say anything");
}

#[test]
fn a_fault_that_stands_blocks_streams_that_a_port_remembers_and_clearing_it_lets_them_pass() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, VA, DATA | RW);
    let mut p = r.port();
    // Streams of one bank, each new to the port.
    (1..64).for_each(|n| r.w(SMR + 4, 0x8000_0000 | n));
    r.w(S2CR + 4, 0);
    r.w(SMR + 4, 0x80ff_0000);
    (0..32).for_each(|id| assert_eq!(rd(&mut p, id, VA), Ok(DATA)));
    assert_eq!(rd(&mut r.port(), 40, VA + 0x1000), Err(ABORT), "another port's fault");
    // HUPCF is 0.
    (0..64).for_each(|id| assert_eq!(rd(&mut p, id, VA), Err(ABORT)));
    r.wb(0, FSR, u32::MAX);
    (0..64).for_each(|id| assert_eq!(rd(&mut p, id, VA), Ok(DATA)));
}
