//! The command queue: legality of every opcode, errors that stop it, restart, wrapping, CMD_SYNC and its signals.

mod rig;

use portcullis_bus::Mmio;
use portcullis_smmuv3::{Caps, StallModel};
use rig::*;

/// What the opcodes need: (opcode, needed, secure queue only).
#[derive(Clone, Copy, PartialEq, Debug)]
enum Needs {
    Nothing,
    Stage1,
    Stage2,
    Hyp,
    Ats,
    Pri,
    Stalls,
    Never,
}

const OPCODES: &[(u64, Needs, bool)] = &[
    (0x01, Needs::Nothing, false),
    (0x02, Needs::Nothing, false),
    (0x03, Needs::Nothing, false),
    (0x04, Needs::Nothing, false),
    (0x05, Needs::Stage1, false),
    (0x06, Needs::Stage1, false),
    (0x07, Needs::Never, false),
    (0x10, Needs::Stage1, false),
    (0x11, Needs::Stage1, false),
    (0x12, Needs::Stage1, false),
    (0x13, Needs::Stage1, false),
    (0x18, Needs::Stage1, true),
    (0x1a, Needs::Stage1, true),
    (0x20, Needs::Hyp, false),
    (0x21, Needs::Hyp, false),
    (0x22, Needs::Hyp, false),
    (0x23, Needs::Hyp, false),
    (0x28, Needs::Stage2, false),
    (0x2a, Needs::Stage2, false),
    (0x30, Needs::Nothing, false),
    (0x40, Needs::Ats, false),
    (0x41, Needs::Pri, false),
    (0x44, Needs::Stalls, false),
    (0x45, Needs::Stalls, false),
    (0x46, Needs::Nothing, false),
    (0x60, Needs::Nothing, true),
];

fn there(caps: &Caps, needs: Needs) -> bool {
    match needs {
        Needs::Nothing => true,
        Needs::Stage1 => caps.stage1,
        Needs::Stage2 => caps.stage2,
        Needs::Hyp => caps.hyp,
        Needs::Ats => caps.ats,
        Needs::Pri => caps.pri,
        Needs::Stalls => caps.stall_model != StallModel::Terminate,
        Needs::Never => false,
    }
}

fn stage2_only() -> Caps {
    Caps {
        stage1: false,
        hyp: false,
        ats: true,
        split_stage_ats: false,
        asid16: false,
        ssid_bits: 0,
        cd2l: false,
        hierarchy_disable: false,
        e0pd: false,
        ..caps()
    }
}

#[test]
fn every_opcode_is_legal_exactly_where_its_feature_is() {
    let parts = [caps(), Caps::small(), Caps::qemu_virt(), stage2_only(), terminating_caps(), secure_caps()];
    for part in parts {
        let r = Rig::started(part.clone());
        for opcode in 0..=0xff {
            let rule = OPCODES.iter().find(|(o, ..)| *o == opcode);
            let legal = rule.is_some_and(|(_, needs, secure)| there(&part, *needs) && !secure);
            let before = r.cons().0;
            r.command([opcode, 0]);
            assert_eq!(r.command_error(), (!legal).then_some(1), "{opcode:#x}");
            assert_eq!(r.cons().0 != before, legal, "CONS stays on an illegal command");
            if !legal {
                // As Linux does: a CMD_SYNC in its place.
                r.store(CMDQ + 16 * u64::from(r.cons().0 & 63), &SYNC);
                r.acknowledge();
                assert_eq!(r.cons().0, r.r(CMDQ_PROD));
            }
        }
    }
}

#[test]
fn the_secure_queue_takes_secure_opcodes_and_neither_ats_nor_pri() {
    let r = Rig::started(secure_caps());
    r.start_secure();
    for opcode in 0..=0xff {
        let rule = OPCODES.iter().find(|(o, ..)| *o == opcode);
        let legal = rule.is_some_and(|(_, needs, _)| {
            there(r.smmu.caps(), *needs) && !matches!(needs, Needs::Ats | Needs::Pri)
        });
        r.secure_command([opcode, 0]);
        let error = (r.s.read32(S + GERROR).unwrap() ^ r.s.read32(S + GERRORN).unwrap()) & 1 != 0;
        assert_eq!(error, !legal, "{opcode:#x}");
        if error {
            let cons = r.s.read32(S + CMDQ_CONS).unwrap();
            r.store(S_CMDQ + 16 * u64::from(cons & 63), &SYNC);
            r.s.write32(S + GERRORN, r.s.read32(S + GERROR).unwrap()).unwrap();
        }
    }
    assert_eq!(r.r(GERROR), 0, "the non-secure side hears nothing of it");
}

#[test]
fn reserved_values_and_ssec_are_illegal() {
    const SSEC: u64 = 1 << 10;
    let cases: &[([u64; 2], bool)] = &[
        ([0x46 | 3 << 12, 0], false),
        ([0x46 | 2 << 12, 0], true),
        ([0x41, 3 << 12], false),
        ([0x41, 2 << 12], true),
        ([0x40, 52], true),
        ([0x40, 53], false),
        ([0x12, 1 << 10], false),
        ([0x12, 1 << 10 | 3 << 8], true),
        ([0x12 | 1 << 12, 1 << 10], true),
        ([0x12 | 1 << 20, 1 << 10], true),
        ([0x13, 3 << 10], false),
        ([0x22, 2 << 10], false),
        ([0x23, 2 << 10], false),
        ([0x2a, 1 << 10], false),
        ([0x12, 0], true),
        ([0x01 | SSEC, 0], false),
        ([0x02 | SSEC, 0], false),
        ([0x03 | SSEC, 0], false),
        ([0x04 | SSEC, 31], false),
        ([0x05 | SSEC, 0], false),
        ([0x06 | SSEC, 0], false),
        ([0x40 | SSEC, 0], false),
        ([0x41 | SSEC, 0], false),
        ([0x44 | SSEC, 0], false),
        ([0x45 | SSEC, 0], false),
    ];
    for (command, legal) in cases {
        let r = Rig::started(caps());
        r.command(*command);
        assert_eq!(r.command_error().is_none(), *legal, "{command:x?}");
    }
    // Illegal comes before ignored.
    let r = Rig::started(caps());
    r.w(CR0, CMDQEN);
    r.command([0x41, 3 << 12]);
    assert_eq!(r.command_error(), Some(1));
}

#[test]
fn nsstalld_makes_resume_illegal() {
    let r = Rig::started(secure_caps());
    r.command([0x44, 0]);
    assert_eq!(r.command_error(), None);
    r.start_secure();
    r.s.write32(S + CR0, SMMUEN | CMDQEN | EVENTQEN | 1 << 9).unwrap();
    r.command([0x44, 0]);
    assert_eq!(r.command_error(), Some(1));
    r.secure_command([0x44, 0]);
    assert_eq!(r.s.read32(S + GERROR).unwrap(), 0, "the secure queue may still");
}

#[test]
fn an_error_stops_the_queue_and_acknowledging_restarts_it() {
    let r = Rig::started(caps());
    r.put(0, [0x30, 0]);
    r.put(1, [0xff, 0]);
    r.put(2, [0x30, 0]);
    r.kick(3);
    assert_eq!(r.cons(), (1, 1));
    assert_eq!((r.r(GERROR), r.rises(LINE_GERROR)), (1, 1));
    // More commands do not help, and the same error is raised again if nothing has changed.
    r.command([0x30, 0]);
    assert_eq!(r.cons(), (1, 1));
    r.acknowledge();
    assert_eq!((r.cons(), r.r(GERROR), r.rises(LINE_GERROR)), ((1, 1), 0, 2));
    r.store(CMDQ + 16, &SYNC);
    r.acknowledge();
    assert_eq!(r.cons().0, 4);
    assert_eq!(r.command_error(), None);
}

#[test]
fn going_back_over_a_bad_command_is_possible() {
    let r = Rig::started(caps());
    r.command([0xff, 0]);
    r.w(CMDQ_PROD, 0);
    r.acknowledge();
    assert_eq!((r.cons().0, r.command_error()), (0, None));
    r.command([0x30, 0]);
    assert_eq!(r.cons().0, 1);
}

#[test]
fn a_command_that_cannot_be_fetched_is_cerror_abt() {
    let r = Rig::started(caps());
    r.w(CR0, SMMUEN);
    r.w64(CMDQ_BASE, NOWHERE | 4);
    r.w(CR0, SMMUEN | CMDQEN);
    r.w(CMDQ_PROD, 1);
    assert_eq!((r.command_error(), r.cons()), (Some(2), (0, 2)));
}

#[test]
fn the_queue_wraps() {
    let r = Rig::started(caps());
    for n in 1..=300u32 {
        r.command(if n % 3 == 0 { SYNC } else { [0x30, 0] });
        assert_eq!(r.cons().0, n & 127);
    }
    // A full queue at once.
    for n in 0..64 {
        r.put(n, [0x30, 0]);
    }
    r.kick(64);
    assert_eq!(r.cons().0, r.r(CMDQ_PROD));
}

#[test]
fn commands_wait_for_cmdqen() {
    let r = Rig::started(caps());
    r.w(CR0, SMMUEN | EVENTQEN);
    r.command([0x30, 0]);
    r.command(SYNC);
    assert_eq!(r.cons().0, 0);
    r.w(CR0, SMMUEN | EVENTQEN | CMDQEN);
    assert_eq!(r.cons().0, 2);
}

#[test]
fn a_long_queue_is_worked_off_in_turns() {
    let r = Rig::new(caps());
    r.w64(CMDQ_BASE, DATA | 13);
    for n in 0..0x2000u64 {
        r.store(DATA + 16 * n, &[0x30, 0]);
    }
    r.w(CMDQ_PROD, 0x2000);
    r.w(CR0, CMDQEN);
    let first = r.cons().0;
    assert!(first > 0, "CONS tells the truth");
    let mut turns = 0;
    while r.smmu.poll() {
        turns += 1;
        assert!(turns < 100);
    }
    assert_eq!(r.cons().0, 0x2000);
}

#[test]
fn sync_signals_as_asked() {
    let r = Rig::started(caps());
    let word = DATA + 0x40;
    r.store(word, &[0x1111_1111_2222_2222]);
    let msi = |cs: u64, address: u64| [0x46 | cs << 12 | 3 << 22 | 0xf << 24 | 0xcafe_f00d << 32, address];
    r.command(msi(0, word));
    r.command(msi(2, word));
    assert_eq!(
        (r.load(word), r.rises(LINE_SYNC)),
        (0x1111_1111_2222_2222, 0),
        "CS = NONE and SEV write nothing"
    );
    r.command(msi(1, word));
    assert_eq!((r.load(word), r.rises(LINE_SYNC)), (0x1111_1111_cafe_f00d, 1));
    r.command(msi(1, 0));
    assert_eq!(r.rises(LINE_SYNC), 2, "address 0: the wire only");
    r.command(msi(1, DOORBELL + 0x40));
    assert_eq!(r.messages(), [(DOORBELL + 0x40, 0xcafe_f00d)]);
    r.command(msi(1, NOWHERE));
    assert_eq!((r.r(GERROR), r.cons().0), (1 << 4, 6), "the message was lost, the CMD_SYNC is complete");
}

#[test]
fn without_msi_a_sync_writes_nothing() {
    let r = Rig::started(Caps { msi: false, ..caps() });
    r.command([0x46 | 1 << 12 | 7 << 32, DATA]);
    assert_eq!((r.load(DATA), r.rises(LINE_SYNC), r.cons().0), (0, 1, 1));
}

/// Linux's MSI polling: the message overwrites the CMD_SYNC itself.
#[test]
fn a_sync_may_overwrite_its_own_command_word() {
    let r = Rig::started(caps());
    r.put(0, [0x46 | 1 << 12 | 3 << 22 | 0xf << 24, CMDQ]);
    r.kick(1);
    assert_eq!(r.cons().0, 1);
    assert_eq!(r.load(CMDQ) as u32, 0);
    assert_eq!(r.load(CMDQ + 8), CMDQ);
}

#[test]
fn out_of_range_parameters_do_nothing() {
    let r = Rig::started(caps());
    for command in [
        [0x03 | 0xffff_ffff << 32, 0],
        [0x04 | 0xffff_ffff << 32, 30],
        [0x05 | 0xf_ffff << 12 | 0xffff_ffff << 32, 1],
        [0x44 | 1 << 12 | 0xffff_ffff << 32, 0xffff],
        [0x45 | 0xffff_ffff << 32, 0],
        [0x40 | 0xffff_ffff << 32, 52],
        [0x41 | 0xffff_ffff << 32, 2 << 12],
        [0x02 | 0xffff_ffff << 32, !0],
        [0x12 | 31 << 12 | 63 << 20, !0],
    ] {
        r.command(command);
        assert_eq!(r.command_error(), None, "{command:x?}");
    }
    assert_eq!(r.events(), [] as [[u64; 4]; 0], "prefetches record nothing");
}

#[test]
fn the_memory_type_of_commands_is_cr1s() {
    // Nothing to see in plain memory: but no CR1 value stops the queue.
    for cr1 in [0, 0x3f, 0xd75, 0x2a] {
        let r = Rig::new(caps());
        r.w(CR1, cr1);
        r.w64(CMDQ_BASE, CMDQ | 6);
        r.w(CR0, CMDQEN);
        r.command(SYNC);
        assert_eq!(r.cons().0, 1);
    }
}
