//! Save, restore, reset: nothing that software or devices can see changes.

#[path = "rig/random.rs"]
mod random;
mod rig;

use portcullis_arch::{Attributes, Iova, Pa, StreamId};
use portcullis_bus::{DmaPort, Initiator, Memory, Mmio, StallTag, SystemMemory};
use portcullis_smmuv3::{Caps, RestoreError, SmmuV3, State, Window};
use random::Rng;
use rig::*;

fn through_json(state: &State) -> State {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

#[test]
fn a_restored_smmu_goes_on_where_the_saved_one_was() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, STALL);
    let mut p = r.port();
    let stall = p.read(from(1), Iova(0x1000), &mut [0; 4]).unwrap_err();
    let portcullis_bus::DmaFault::Stalled(tag) = stall.fault else { panic!() };
    r.command([0xff, 0]);
    let state = through_json(&r.smmu.save());

    // Another SMMU with the same memory.
    let other = SmmuV3::builder(caps()).memory(r.mem.clone()).build().unwrap();
    other.restore(state.clone()).unwrap();
    assert_eq!(other.save(), state);
    let (w, mut q) = (other.window(false), other.port(r.mem.clone()));
    for at in (0..0x2_0000).step_by(4) {
        assert_eq!(w.read32(at).unwrap(), r.r(at), "{at:#x}");
    }
    assert_eq!(other.stalled(), r.smmu.stalled());
    assert_eq!(q.stall_state(tag), portcullis_bus::StallState::Waiting);
    // The command error is acknowledged there, and the stall resumed.
    r.map(root, 0x1000, DATA | RW);
    let stag = u64::from(other.stalled()[0].stag.unwrap());
    r.store(CMDQ, &[0x44 | 1 << 12 | 1 << 32, stag]);
    w.write32(GERRORN, 1).unwrap();
    assert_eq!(q.stall_state(tag), portcullis_bus::StallState::Retry);
    q.read(from(1), Iova(0x1000), &mut [0; 4]).unwrap();
}

#[test]
fn a_restored_smmu_has_forgotten_its_tlbs() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A | R);
    r.map(root, 0x1000, DATA | RW);
    r.store(DATA, &[1]);
    r.store(DATA + 0x1000, &[2]);
    let mut p = r.port();
    assert_eq!(read4(&mut p, from(1), 0x1000).unwrap(), 1);
    let state = r.smmu.save();
    r.map(root, 0x1000, (DATA + 0x1000) | RW);
    assert_eq!(read4(&mut p, from(1), 0x1000).unwrap(), 1, "cached");
    r.smmu.restore(state).unwrap();
    assert_eq!(read4(&mut p, from(1), 0x1000).unwrap(), 2);
}

#[test]
fn a_record_that_waited_is_not_lost() {
    let mut r = Rig::started(caps());
    r.stage1(1, STALL);
    r.w(CR0, SMMUEN | CMDQEN);
    let mut p = r.port();
    let e = p.read(from(1), Iova(0x1000), &mut [0; 4]).unwrap_err();
    let portcullis_bus::DmaFault::Stalled(tag) = e.fault else { panic!() };
    let state = through_json(&r.smmu.save());
    r.smmu.restore(state).unwrap();
    r.w(CR0, SMMUEN | CMDQEN | EVENTQEN);
    // Tried again, because a restore forgets translations; the retry stalls and is recorded.
    assert_eq!(p.stall_state(tag), portcullis_bus::StallState::Retry);
    assert!(p.read(from(1), Iova(0x1000), &mut [0; 4]).is_err());
    assert_eq!(r.events().len(), 1);
}

#[test]
fn states_of_other_versions_and_parts_are_refused() {
    let r = Rig::started(caps());
    let state = r.smmu.save();
    let other = Rig::new(Caps::qemu_virt());
    assert_eq!(other.smmu.restore(state.clone()), Err(RestoreError::Caps));
    let mut json: serde_json::Value = serde_json::to_value(&state).unwrap();
    json["version"] = 2.into();
    assert_eq!(r.smmu.restore(serde_json::from_value(json).unwrap()), Err(RestoreError::Version(2)));
}

/// Each change makes a state that no SMMU could have saved.
#[test]
fn damaged_states_are_refused_and_change_nothing() {
    let mut r = Rig::started(caps());
    r.stage1(1, STALL);
    let _ = r.port().read(from(1), Iova(0x1000), &mut [0; 4]);
    let state = r.smmu.save();
    let good: serde_json::Value = serde_json::to_value(&state).unwrap();
    let all = u64::MAX;
    let changes: &[(&[&str], serde_json::Value)] = &[
        (&["side", "0", "cr0"], 0xffff_ffffu32.into()),
        (&["side", "0", "cr0ack"], 0x20.into()),
        (&["side", "0", "cr1"], 0x1000.into()),
        (&["side", "0", "cr2"], 4.into()),
        (&["side", "0", "gbpa"], 0x20.into()),
        (&["side", "0", "irq_ctrl"], 8.into()),
        (&["side", "0", "gerror"], 2.into()),
        (&["side", "0", "gerrorn"], 0x8000.into()),
        (&["side", "0", "gerror_irq", "address"], 1.into()),
        (&["side", "0", "priq_irq", "attributes"], 0x40.into()),
        (&["side", "0", "strtab_base"], all.into()),
        (&["side", "0", "strtab_base_cfg"], 0x8000_0000u32.into()),
        (&["side", "0", "cmdq", "base"], all.into()),
        (&["side", "0", "cmdq", "prod"], 0x10_0000.into()),
        (&["side", "0", "cmdq", "cons"], 0x8000_0000u32.into()),
        (&["side", "0", "eventq", "cons"], 0x10_0000.into()),
        (&["side", "0", "priq", "prod"], 0x10_0000.into()),
        (&["side", "0", "gatos_ctrl"], 2.into()),
        (&["side", "0", "gatos_sid"], all.into()),
        (&["side", "0", "secure"], true.into()),
        (&["side", "1", "cr1"], 1.into()),
        (&["side", "1", "atc_failed"], true.into()),
        (&["stalls", "next_tag"], 0.into()),
        (&["stalls", "next_tag"], 1.into()),
        (&["stalls", "most"], 9.into()),
        (&["stalls", "used"], serde_json::json!({})),
        (&["stalls", "used"], serde_json::json!({"5": 1})),
        (&["stalls", "decided"], serde_json::json!({"1": "Retry"})),
        (&["stalls", "waiting"], serde_json::json!({})),
        (&["stalls", "unwritten"], serde_json::json!([[false, 1]])),
        (&["stalls", "behind"], serde_json::json!([1])),
    ];
    for (path, value) in changes {
        let mut json = good.clone();
        let mut at = &mut json["regs"];
        for step in *path {
            at = match step.parse::<usize>() {
                Ok(n) => &mut at[n],
                Err(_) => &mut at[*step],
            };
        }
        assert_ne!(at, value, "{path:?} is no change");
        *at = value.clone();
        let damaged: State = serde_json::from_value(json).unwrap();
        assert!(matches!(r.smmu.restore(damaged), Err(RestoreError::Damaged(_))), "{path:?}");
        assert_eq!(r.smmu.save(), state);
    }
}

/// The same random steps on two SMMUs, one of which is saved and restored at random points: never a difference in what
/// registers, memory and transactions show.
#[test]
fn saving_at_random_points_changes_nothing_observable() {
    for seed in 0..8 {
        let part = || Caps { sid_bits: 16, stall_max: 4, ..Caps::full() };
        let build = || {
            let mem = SystemMemory::new(&[(random::RAM, random::RAM_SIZE)]).unwrap();
            (SmmuV3::builder(part()).memory(mem.clone()).build().unwrap(), mem)
        };
        let machines = [build(), build()];
        let mut ports = machines.each_ref().map(|(s, m)| s.port(m.clone()));
        let windows = machines.each_ref().map(|(s, _)| s.window(true));
        let mut rng = Rng(seed);
        let mut tags: Vec<StallTag> = Vec::new();
        for step in 0..4000 {
            // Drawn once, done twice.
            let kind = if step < 2 { 0 } else { rng.below(40) };
            let fixed = rng.next();
            let outcomes: Vec<String> = (0..2)
                .map(|n| {
                    let (smmu, mem) = &machines[n];
                    let (port, w) = (&mut ports[n], &windows[n]);
                    let mut rng = Rng(fixed);
                    let store = |at: u64, words: &[u64]| {
                        for (k, word) in words.iter().enumerate() {
                            mem.store64(Pa(at + 8 * k as u64), *word).unwrap();
                        }
                    };
                    match kind {
                        0 => {
                            for s in [0, 0x8000] {
                                for (at, v, size) in random::working(&mut rng, smmu.caps(), s != 0) {
                                    w.mmio_write(s + at, &v.to_le_bytes()[..size]).unwrap();
                                }
                            }
                            String::new()
                        }
                        1 => {
                            let at = random::offset(&mut rng) & !3;
                            let _ = w.write32(at, random::value(&mut rng) as u32);
                            String::new()
                        }
                        2 => format!("{:?}", w.read32(random::offset(&mut rng) & !3)),
                        3..8 => {
                            let (at, value) = random::descriptor(&mut rng);
                            store(at, &[value]);
                            invalidate_all(w);
                            String::new()
                        }
                        8 | 9 => {
                            store(random::STRTAB + 64 * rng.below(8), &random::ste(&mut rng, smmu.caps()));
                            invalidate_all(w);
                            String::new()
                        }
                        10 | 11 => {
                            store(random::CDS + 64 * rng.below(8), &random::cd(&mut rng, smmu.caps()));
                            invalidate_all(w);
                            String::new()
                        }
                        12..16 => {
                            let stags: Vec<u16> = smmu.stalled().iter().filter_map(|s| s.stag).collect();
                            let prod = w.read32(0x98).unwrap();
                            store(
                                random::CMDQ + 16 * u64::from(prod & 63),
                                &random::command(&mut rng, &stags),
                            );
                            w.write32(0x98, prod + 1).unwrap();
                            format!("{:x?} {:x?}", w.read32(0x9c), w.read32(0x60))
                        }
                        16 => {
                            w.write32(0x64, w.read32(0x60).unwrap()).unwrap();
                            String::new()
                        }
                        17 => {
                            w.write32(0x1_00ac, w.read32(0x1_00a8).unwrap()).unwrap();
                            String::new()
                        }
                        18 | 19 => format!("{:?}", tags.last().map(|t| port.stall_state(*t))),
                        _ => {
                            let id = rng.below(8) as u32;
                            let from = Initiator::new(StreamId(id));
                            let va = Iova(random::address(&mut rng));
                            let mut buf = [0; 16];
                            if rng.one_in(2) {
                                format!("{:x?} {buf:x?}", port.read(from, va, &mut buf))
                            } else {
                                format!("{:x?}", port.write(from, va, &buf))
                            }
                        }
                    }
                })
                .collect();
            assert_eq!(outcomes[0], outcomes[1], "seed {seed} step {step} kind {kind}");
            tags = machines[0].0.stalled().iter().map(|s| s.tag).collect();
            if rng.one_in(40) && machines[0].0.stalled().iter().all(|s| s.recorded || s.stag.is_none()) {
                let state = machines[1].0.save();
                machines[1].0.restore(through_json(&state)).unwrap();
            }
            if step % 64 == 0 {
                let regs = |n: usize| {
                    (0..0x2_0000u64).step_by(4).map(|at| windows[n].read32(at).unwrap()).collect::<Vec<_>>()
                };
                assert!(regs(0) == regs(1), "seed {seed} step {step}: registers differ");
                let bytes = |n: usize| {
                    let mut all = vec![0; random::RAM_SIZE as usize];
                    machines[n].1.read(Pa(random::RAM), Attributes::DEVICE_DEFAULT, &mut all).unwrap();
                    all
                };
                assert!(bytes(0) == bytes(1), "seed {seed} step {step}: memory differs");
            }
        }
    }
}

/// What software does after it has changed a table: everything invalidated, through S_INIT.
fn invalidate_all(w: &Window<SystemMemory>) {
    w.write32(0x803c, 1).unwrap();
}
