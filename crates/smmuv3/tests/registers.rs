//! Every register: access rights, reset values, guards, halves, sizes.

mod rig;

use portcullis_bus::Mmio;
use portcullis_smmuv3::{Caps, SecureCaps, StallModel};
use rig::*;

/// What a register of the full part does with all ones while everything is off: (offset, bytes, what reads back).
const WRITABLE: &[(u64, u8, u64)] = &[
    (0x020, 4, 0x1df),
    (0x028, 4, 0xfff),
    (0x02c, 4, 0xb),
    (0x050, 4, 0x7),
    (0x064, 4, 0x1fd),
    (0x068, 8, 0x00ff_ffff_ffff_fffc),
    (0x070, 4, 0xffff_ffff),
    (0x074, 4, 0x3f),
    (0x080, 8, 0x40ff_ffff_ffff_ffc0),
    (0x088, 4, 0x3_07ff),
    (0x090, 8, 0x40ff_ffff_ffff_ffff),
    (0x0a0, 8, 0x40ff_ffff_ffff_ffff),
    (0x0b0, 8, 0x00ff_ffff_ffff_fffc),
    (0x0b8, 4, 0xffff_ffff),
    (0x0bc, 4, 0x3f),
    (0x0c0, 8, 0x40ff_ffff_ffff_ffff),
    (0x0d0, 8, 0x00ff_ffff_ffff_fffc),
    (0x0d8, 4, 0xffff_ffff),
    (0x0dc, 4, 0x8000_003f),
    (0x108, 8, 0x001f_ffff_ffff_ffff),
    (0x110, 8, 0xffff_ffff_ffff_ffc0),
];

/// Reset values that are not 0.
fn reset_value(at: u64) -> u32 {
    const ID: [u32; 12] = [0x04, 0, 0, 0, 0x84, 0xb4, 0xf0, 0x10, 0x0d, 0xf0, 0x05, 0xb1];
    match at {
        // Everything but BTM, HAFT, DORMHINT, NS1ATS, VATOS; both stages, stall and abort models 0.
        0x000 => 0x088f_f69f,
        0x004 => 32 | 20 << 6 | 19 << 11 | 19 << 16 | 19 << 21 | 1 << 26 | 1 << 27,
        0x00c => 1 << 2 | 1 << 4 | 1 << 8 | 1 << 9 | 1 << 10 | 2 << 11 | 1 << 13 | 1 << 14,
        0x014 => 6 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 10 | 1024 << 16,
        0x018 => 0x4870_043b,
        0x01c => 3,
        0x044 => 0x1000,
        0xfd0..=0xfff => ID[((at - 0xfd0) / 4) as usize],
        _ => 0,
    }
}

fn full() -> Caps {
    Caps { secure: None, ..Caps::full() }
}

#[test]
fn every_offset_has_its_reset_value() {
    let r = Rig::new(full());
    for at in (0..0x2_0000).step_by(4) {
        assert_eq!(r.r(at), reset_value(at), "{at:#x}");
    }
}

#[test]
fn every_offset_keeps_exactly_the_bits_that_exist() {
    let mut r = Rig::new(full());
    for at in (0..0x2_0000u64).step_by(4) {
        let before = r.r(at);
        r.w(at, u32::MAX);
        let expected = match (at, WRITABLE.iter().find(|(o, n, _)| (*o..*o + u64::from(*n)).contains(&at))) {
            // GBPA: Update with everything; done at once.
            (0x044, _) => 0x001f_3f1f & !0xc000,
            (0x024 | 0x054, _) => 0,
            // The indices are cut to a queue of one entry.
            (0x098 | 0x09c, _) => 1,
            (0x1_00a8 | 0x1_00ac | 0x1_00c8 | 0x1_00cc, _) => 0x8000_0001,
            (_, Some((o, _, mask))) => (*mask >> (8 * (at - o))) as u32,
            (_, None) => before,
        };
        assert_eq!(r.r(at), expected, "{at:#x}");
        if expected != before {
            r = Rig::new(full());
        }
    }
}

#[test]
fn wide_registers_take_halves_and_eight_bytes() {
    let r = Rig::new(full());
    for (at, _, mask) in WRITABLE.iter().filter(|(_, n, _)| *n == 8) {
        r.w64(*at, u64::MAX);
        assert_eq!(r.r64(*at), *mask);
        r.w(at + 4, 0);
        assert_eq!(r.r64(*at), mask & 0xffff_ffff, "the lower half stays");
        r.w(*at, 0);
        r.w(at + 4, u32::MAX);
        assert_eq!(r.r64(*at), mask & !0xffff_ffff);
        assert_eq!((r.r(*at), r.r(at + 4)), (0, (mask >> 32) as u32));
    }
}

#[test]
fn other_sizes_and_alignments_read_zero_and_write_nothing() {
    let r = Rig::new(full());
    r.w64(0x080, 0x1234_5678_9ac0);
    r.w(0x028, 0xd75);
    for size in [1usize, 2, 3, 5, 6, 7, 8, 9, 16, 64] {
        for at in [0x028u64, 0x029, 0x02a, 0x080, 0x081, 0x082, 0x084, 0x1_00a8, 0x1_ffff] {
            if size == 8 && at == 0x080 {
                continue;
            }
            let mut data = vec![0x55; size];
            r.ns.mmio_read(at, &mut data).unwrap();
            assert!(data.iter().all(|b| *b == 0), "{size} bytes at {at:#x}");
            r.ns.mmio_write(at, &vec![0xff; size]).unwrap();
        }
    }
    for at in [0x081u64, 0x082, 0x083] {
        let mut data = [0x55; 4];
        r.ns.mmio_read(at, &mut data).unwrap();
        assert_eq!(data, [0; 4]);
        r.ns.mmio_write(at, &[0xff; 4]).unwrap();
    }
    r.ns.mmio_read(0x080, &mut []).unwrap();
    r.ns.mmio_write(0x080, &[]).unwrap();
    assert_eq!((r.r64(0x080), r.r(0x028)), (0x1234_5678_9ac0, 0xd75));
    // Two 32-bit registers are not one 64-bit register.
    assert_eq!((r.r64(0x020), r.r64(0x098)), (0, 0));
    assert!(r.ns.read32(0x2_0000).is_err() && r.ns.write32(u64::MAX, 0).is_err());
}

#[test]
fn features_that_are_missing_take_their_bits_with_them() {
    let r = Rig::new(Caps::qemu_virt());
    for (at, value) in [(0x020, u32::MAX), (0x02c, u32::MAX), (0x050, u32::MAX), (0x064, u32::MAX)] {
        r.w(at, value);
    }
    assert_eq!(r.r(0x020), 0xd, "no PRIQEN, ATSCHK, VMW");
    assert_eq!((r.r(0x050), r.r(0x054)), (5, 5));
    assert_eq!(r.r(0x064), 0x105, "CMDQ, EVENTQ_ABT, SFM");
    let r = Rig::new(Caps::qemu_virt());
    r.w(0x02c, u32::MAX);
    assert_eq!(r.r(0x02c), 2, "RECINVSID only");
    for at in [0x068, 0x06c, 0x070, 0x074, 0x0b0, 0x0b8, 0x0bc, 0x0c0, 0x0d0, 0x0dc, 0x100, 0x108, 0x110] {
        r.w(at, u32::MAX);
        assert_eq!(r.r(at), 0, "{at:#x}");
    }
    r.w(PRIQ_PROD, 1);
    assert_eq!(r.r(PRIQ_PROD), 0);
    let one = Caps { sid_bits: 6, two_level_streams: false, ..Caps::small() };
    let r = Rig::new(one);
    r.w(STRTAB_CFG, u32::MAX);
    assert_eq!(r.r(STRTAB_CFG), 0x3f, "FMT and SPLIT need two-level tables");
    // LO counts for the wire too.
    let no_msi = Caps { msi: false, ..full() };
    let r = Rig::new(no_msi);
    r.w(0x0dc, u32::MAX);
    assert_eq!(r.r(0x0dc), 0x8000_0000);
}

/// Each guarded register with what closes its guard.
#[test]
fn guards_close_while_the_enable_is_set() {
    let guarded: &[(u64, u8, u32)] = &[
        (0x02c, 4, SMMUEN),
        (0x080, 8, SMMUEN),
        (0x088, 4, SMMUEN),
        (0x090, 8, CMDQEN),
        (0x09c, 4, CMDQEN),
        (0x0a0, 8, EVENTQEN),
        (0x1_00a8, 4, EVENTQEN),
        (0x0c0, 8, PRIQEN),
        (0x1_00c8, 4, PRIQEN),
    ];
    for (at, size, enable) in guarded {
        for bit in [SMMUEN, CMDQEN, EVENTQEN, PRIQEN] {
            let r = Rig::new(full());
            r.w(CR0, bit);
            r.w(*at, u32::MAX);
            let (value, closed) = (r.r(*at), bit == *enable);
            assert_eq!(value == 0, closed, "{at:#x} while CR0 = {bit:#x}");
            if *size == 8 {
                r.w64(*at, u64::MAX);
                assert_eq!(r.r64(*at) == 0, closed);
            }
            r.w(CR0, 0);
            r.w(*at, u32::MAX);
            assert_ne!(r.r(*at), 0);
        }
    }
    for (first, enable) in [(GERROR_IRQ, 1), (PRIQ_IRQ, 2), (EVENTQ_IRQ, 4)] {
        for bit in [1, 2, 4] {
            let r = Rig::new(full());
            r.w(IRQ_CTRL, bit);
            for at in [first, first + 4, first + 8, first + 12] {
                r.w(at, u32::MAX);
                assert_eq!(r.r(at) == 0, bit == enable, "{at:#x} while IRQ_CTRL = {bit}");
            }
        }
    }
}

#[test]
fn cr1_has_two_guards() {
    for (bit, open) in [(SMMUEN, 0x03f), (CMDQEN, 0xfc0), (EVENTQEN, 0xfc0), (PRIQEN, 0xfc0), (0, 0xfff)] {
        let r = Rig::new(full());
        r.w(CR0, bit);
        r.w(CR1, u32::MAX);
        assert_eq!(r.r(CR1), open, "CR0 = {bit:#x}");
    }
}

#[test]
fn unguarded_registers_are_always_writable() {
    let r = Rig::started(full());
    r.w(EVENTQ_CONS, 0x8000_0000);
    assert_eq!(r.r(EVENTQ_CONS), 0x8000_0000);
    r.w(PRIQ_CONS, 0x8000_0001);
    assert_eq!(r.r(PRIQ_CONS), 0x8000_0001);
    r.w(IRQ_CTRL, 0);
    assert_eq!(r.r(IRQ_CTRLACK), 0);
}

#[test]
fn cr0ack_follows_only_what_exists() {
    let r = Rig::new(Caps::small());
    r.w(CR0, u32::MAX);
    assert_eq!((r.r(CR0), r.r(CR0ACK)), (0xd, 0xd));
    let r = Rig::new(full());
    r.w(CR0, 0x1f);
    assert_eq!(r.r(CR0ACK), 0x1f, "all that Linux enables");
    r.w(CR0ACK, 0);
    assert_eq!(r.r(CR0ACK), 0x1f);
}

#[test]
fn gbpa_takes_a_value_only_with_update() {
    let r = Rig::new(full());
    r.w(GBPA, 0x10_0000);
    assert_eq!(r.r(GBPA), 0x1000);
    r.w(GBPA, 0x8010_0000);
    assert_eq!(r.r(GBPA), 0x10_0000, "Update is clear again");
    r.w(GBPA, 0x8000_c000);
    assert_eq!(r.r(GBPA), 0, "NSCFG exists in S_GBPA only");
}

#[test]
fn a_smaller_queue_cuts_its_indices() {
    let r = Rig::new(full());
    r.w64(CMDQ_BASE, 10);
    r.w(CMDQ_PROD, 0x7ff);
    r.w(CMDQ_CONS, 0xffff_ffff);
    assert_eq!((r.r(CMDQ_PROD), r.r(CMDQ_CONS)), (0x7ff, 0x7ff));
    r.w64(CMDQ_BASE, 4);
    assert_eq!((r.r(CMDQ_PROD), r.r(CMDQ_CONS)), (0x1f, 0x1f));
    r.w64(EVENTQ_BASE, 31);
    r.w(EVENTQ_PROD, u32::MAX);
    assert_eq!(r.r(EVENTQ_PROD), 0x800f_ffff, "capped to 2^19 entries");
    assert_eq!(r.r64(EVENTQ_BASE), 31, "reads give what was written");
}

#[test]
fn the_secure_bank_is_zero_for_non_secure_software() {
    let r = Rig::new(secure_caps());
    for at in (S..0x1_0000).chain(0x1_8000..0x2_0000).step_by(4) {
        assert_eq!(r.r(at), 0);
        r.w(at, u32::MAX);
    }
    assert_eq!(r.s.read32(S + CR0).unwrap(), 0);
    // Without a secure interface there is none for anybody.
    let r = Rig::new(caps());
    for at in (S..0x1_0000).step_by(4) {
        r.s.write32(at, u32::MAX).unwrap();
        assert_eq!(r.s.read32(at).unwrap(), 0);
    }
    assert_eq!(r.s.read32(0).unwrap(), r.r(0), "secure software sees the non-secure registers");
}

#[test]
fn the_secure_bank_has_its_own_bits() {
    let caps = Caps { secure: Some(SecureCaps { sid_bits: 8, msi: true }), ..full() };
    let expected: &[(u64, u32)] = &[
        (0x020, 0x3ed),
        (0x024, 0x3ed),
        (0x028, 0),
        (0x02c, 0),
        (0x050, 5),
        (0x054, 5),
        (0x064, 0x1b5),
        (0x080, 0),
        (0x0c0, 0),
        (0x0d0, 0),
    ];
    let r = Rig::new(caps.clone());
    for (at, _) in expected {
        r.s.write32(S + at, u32::MAX).unwrap();
    }
    for (at, value) in expected {
        assert_eq!(r.s.read32(S + at).unwrap(), *value, "{at:#x}");
    }
    let r = Rig::new(caps);
    assert_eq!(r.s.read32(S).unwrap(), 1 << 13);
    assert_eq!(r.s.read32(S + 4).unwrap(), 8 | 1 << 31);
    assert_eq!(r.s.read32(S + 0xc).unwrap(), 1 << 6);
    assert_eq!(r.s.read32(S + 0x14).unwrap(), 0, "there is no S_IDR5");
    r.s.write32(S + CR2, u32::MAX).unwrap();
    assert_eq!(r.s.read32(S + CR2).unwrap(), 2);
    r.s.write32(S + GBPA, 0x8000_c000).unwrap();
    assert_eq!(r.s.read32(S + GBPA).unwrap(), 0xc000);
    r.s.write64(S + EVENTQ_BASE, 4).unwrap();
    r.s.write32(S_EVENTQ_PROD, u32::MAX).unwrap();
    assert_eq!(r.s.read32(S_EVENTQ_PROD).unwrap(), 0x8000_001f);
    assert_eq!(r.r(EVENTQ_PROD), 0, "the non-secure one is another");
    r.s.write32(S + 0x3c, 1).unwrap();
    assert_eq!(r.s.read32(S + 0x3c).unwrap(), 0, "S_INIT is done at once");
}

#[test]
fn nsstalld_hides_stalling_from_non_secure_software() {
    let r = Rig::new(secure_caps());
    assert_eq!(r.r(IDR0) >> 24 & 3, 0);
    r.s.write32(S + CR0, 1 << 9).unwrap();
    assert_eq!(r.r(IDR0) >> 24 & 3, 1);
    assert_eq!(r.s.read32(S).unwrap() >> 24 & 3, 0);
    let forced = Caps { stall_model: StallModel::Forced, ..secure_caps() };
    let r = Rig::new(forced);
    r.s.write32(S + CR0, 1 << 9).unwrap();
    assert_eq!(r.r(IDR0) >> 24 & 3, 2, "there is nothing else to fall back to");
}

#[test]
fn plain_accesses_are_those_of_non_secure_software() {
    let r = Rig::new(secure_caps());
    r.smmu.mmio_write(CR1, &0xd75u32.to_le_bytes()).unwrap();
    let mut word = [0; 4];
    r.smmu.mmio_read(CR1, &mut word).unwrap();
    assert_eq!(u32::from_le_bytes(word), 0xd75);
    r.smmu.mmio_read(S + 4, &mut word).unwrap();
    assert_eq!(word, [0; 4]);
}
