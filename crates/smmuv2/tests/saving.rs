//! Save and restore: nothing observable changes, and damaged states are refused.

#[path = "rig/random.rs"]
mod random;
mod rig;

use portcullis_arch::{Access, Attributes, Iova, Pa, StreamId};
use portcullis_bus::{DmaFault, DmaPort, Initiator, Memory, Mmio, StallState, StallTag, SystemMemory};
use portcullis_smmuv2::{Config, Port, RestoreError, State};
use random::{Rng, Shape, address, descriptor, value};
use rig::*;
use serde_json::Value;

/// One of the two machines in lockstep.
struct Machine {
    rig: Rig,
    port: Port<SystemMemory>,
}

impl Machine {
    fn new(c: Config, mem: SystemMemory) -> Self {
        let rig = Rig::with_memory(c, mem);
        let port = rig.port();
        Self { rig, port }
    }

    /// Saves, and goes on in a new SMMU with new ports on the same memory.
    fn move_house(self) -> Self {
        let text = serde_json::to_string(&self.rig.smmu.save()).unwrap();
        let config = self.rig.smmu.config().clone();
        let new = Self::new(config, self.rig.mem.clone());
        new.rig.smmu.restore(serde_json::from_str(&text).unwrap()).unwrap();
        new
    }

    /// An empty TLB is always right, a full one need not be the same: nothing may depend on it here.
    fn flush(&self) {
        self.rig.w(TLBIALLNSNH, 0);
        self.rig.w(TLBIALLH, 0);
        self.rig.ws(TLBIALLNSNH, 0);
        self.rig.ws(TLBIALLH, 0);
        self.rig.ws(STLBIALL, 0);
    }

    fn transact(&mut self, kind: u64, from: Initiator, va: u64, to: u64, len: usize) -> String {
        self.flush();
        let mut b = vec![0x11; len];
        match kind {
            0 => format!("{:?}", self.port.translate(&from, Iova(va), Access::Read)),
            1 => format!("{:?} {b:?}", self.port.read(from, Iova(va), &mut b)),
            2 => format!("{:?}", self.port.write(from, Iova(va), &b)),
            _ => {
                // Without a TLB the two halves may meet the same old entries: none.
                let r = self.port.copy((from, Iova(va)), (from, Iova(to)), len);
                format!("{r:?}")
            }
        }
    }
}

fn lockstep(c: Config, seed: u64, steps: u64) {
    let mut a = Machine::new(c.clone(), memory());
    let mut b = Machine::new(c.clone(), memory());
    let shape = Shape::of(&c);
    let mut rng = Rng(seed);
    let mut tags: Vec<u64> = Vec::new();
    let (mut moves, mut stalls) = (0, 0);
    for step in 0..steps {
        match rng.below(64) {
            0 => {
                b = b.move_house();
                moves += 1;
            }
            1..16 => {
                let offset = shape.offset(&mut rng);
                let size = rng.pick(&[4u64, 4, 4, 8, 8, 1]);
                let (offset, secure) = (offset / size * size, rng.one_in(3));
                let data = value(&mut rng, TABLES).to_le_bytes();
                let (mut x, mut y) = ([0; 8], [0; 8]);
                let n = size as usize;
                let write = !rng.one_in(3);
                let go = |m: &Machine, out: &mut [u8; 8]| {
                    let window = if secure { &m.rig.s } else { &m.rig.ns };
                    if write {
                        window.mmio_write(offset, &data[..n])
                    } else {
                        window.mmio_read(offset, &mut out[..n])
                    }
                };
                assert_eq!(go(&a, &mut x), go(&b, &mut y), "step {step}");
                assert_eq!(x, y, "step {step}: {offset:#x}");
            }
            16..26 => {
                let at = random::slot(&mut rng, TABLES);
                let d = descriptor(&mut rng, TABLES, DATA);
                a.rig.poke(at, d);
                b.rig.poke(at, d);
            }
            26..60 => {
                let attrs = if rng.one_in(4) { rng.next() as u32 & 0x7fff } else { 0x100f };
                let from =
                    Initiator::new(StreamId(rng.below(4) as u32)).with_attrs(Attributes::from_bits(attrs));
                let (va, to) = (address(&mut rng, TABLES, DATA), address(&mut rng, TABLES, DATA));
                let (kind, len) = (rng.below(4), rng.below(0x1800) as usize);
                let (x, y) = (a.transact(kind, from, va, to, len), b.transact(kind, from, va, to, len));
                assert_eq!(x, y, "step {step}: {kind} {from:?} {va:#x}");
                if let Some(at) = x.find("StallTag(") {
                    let digits: String = x[at + 9..].chars().take_while(char::is_ascii_digit).collect();
                    tags.push(digits.parse().unwrap());
                    stalls += 1;
                }
            }
            60 if !tags.is_empty() => {
                let t = StallTag(tags[rng.below(tags.len() as u64) as usize]);
                assert_eq!(a.port.stall_state(t), b.port.stall_state(t), "step {step}");
            }
            61..63 => {
                for (offset, value) in shape.working(&mut rng, TABLES) {
                    let bytes = value.to_le_bytes();
                    for m in [&a, &b] {
                        m.rig.s.mmio_write(offset, &bytes[..if value >> 32 == 0 { 4 } else { 8 }]).unwrap();
                    }
                }
            }
            _ => {}
        }
        assert_eq!(a.rig.irqs.pending(), b.rig.irqs.pending(), "step {step}");
    }
    assert_eq!(a.rig.smmu.save(), b.rig.smmu.save());
    for (base, size) in [(TABLES, 0x1_0000usize), (DATA, 0x1_0000)] {
        let (mut x, mut y) = (vec![0; size], vec![0; size]);
        a.rig.mem.read(Pa(base), Attributes::DEVICE_DEFAULT, &mut x).unwrap();
        b.rig.mem.read(Pa(base), Attributes::DEVICE_DEFAULT, &mut y).unwrap();
        assert!(x == y, "memory at {base:#x}");
    }
    assert!(moves > 10 && stalls > 10, "too dull: {moves} moves, {stalls} stalls");
}

#[test]
fn a_saved_and_restored_zynqmp_behaves_like_one_that_was_left_alone() {
    lockstep(Config::mmu500_zynqmp(), 11, 40_000);
}

#[test]
fn a_saved_and_restored_plain_smmu_does_too() {
    lockstep(Config { secure: true, ..Config::default() }, 12, 40_000);
    let c = Config { compressed_index: true, stream_matching: false, ..Config::default() };
    lockstep(c, 13, 20_000);
}

#[test]
fn a_stalled_transaction_survives() {
    let (r, mut t, root) = one_domain(M | CFRE | CFIE | CFCFG);
    let mut p = r.port();
    let stalled = tag(wr(&mut p, SID, 0x1000));
    let behind = tag(rd(&mut p, SID, 0x2000));
    let state = r.smmu.save();
    let r2 = Rig::with_memory(r.smmu.config().clone(), r.mem.clone());
    r2.smmu.restore(state).unwrap();
    assert_eq!(r2.irqs.pending(), [0, COMBINED_NS]);
    let mut p2 = r2.port();
    assert_eq!(p2.stall_state(stalled), StallState::Waiting);
    t.page(root, 0x1000, DATA | RW);
    r2.wb(0, FSR, 2);
    r2.wb(0, RESUME, 1);
    assert_eq!(p2.stall_state(stalled), StallState::Terminated { abort: true });
    assert_eq!(p2.stall_state(behind), StallState::Retry);
    // A tag is not given out twice.
    let next = tag(wr(&mut p2, SID, 0x3000));
    assert!(next > behind);
}

#[test]
fn restoring_forgets_what_the_ports_had_cached() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, 0x1000, DATA | RW);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, 0x1000), Ok(DATA));
    let state = r.smmu.save();
    t.page(root, 0x1000, (DATA + 0x1000) | RW);
    assert_eq!(rd(&mut p, SID, 0x1000), Ok(DATA));
    r.smmu.restore(state).unwrap();
    assert_eq!(rd(&mut p, SID, 0x1000), Ok(DATA + 0x1000));
}

/// A busy SMMU's state as JSON.
fn busy() -> (Rig, Value) {
    let (r, ..) = one_domain(M | CFRE | CFIE | CFCFG);
    let mut p = r.port();
    let e = p.write(stream(SID), Iova(0x1000), &[1]).unwrap_err();
    assert!(matches!(e.fault, DmaFault::Stalled(_)));
    let json = serde_json::to_value(r.smmu.save()).unwrap();
    (r, json)
}

fn at<'a>(v: &'a mut Value, path: &str) -> &'a mut Value {
    v.pointer_mut(path).unwrap_or_else(|| panic!("no {path}"))
}

#[test]
fn damaged_states_are_refused_and_change_nothing() {
    type Damage = fn(&mut Value);
    let rows: &[(&str, Damage)] = &[
        ("version", |v| *at(v, "/version") = 99.into()),
        ("another configuration", |v| *at(v, "/config/context_banks") = 15.into()),
        ("counts", |v| {
            at(v, "/regs/banks").as_array_mut().unwrap().pop();
        }),
        ("counts", |v| {
            at(v, "/regs/smr").as_array_mut().unwrap().push(0.into());
        }),
        ("counts", |v| {
            at(v, "/regs/s2cr").as_array_mut().unwrap().pop();
        }),
        ("counts", |v| at(v, "/regs/compindex").as_array_mut().unwrap().push(0.into())),
        ("global register", |v| *at(v, "/regs/side/0/cr0") = 0x0000_0030.into()),
        ("global register", |v| *at(v, "/regs/side/0/gfsr") = 0x200.into()),
        ("global register", |v| *at(v, "/regs/side/0/gfar") = u64::MAX.into()),
        ("global register", |v| *at(v, "/regs/side/1/acr") = 0x8.into()),
        ("SCR1", |v| *at(v, "/regs/scr1") = 0.into()),
        ("stream mapping", |v| *at(v, "/regs/smr/3") = 0x8000.into()),
        ("stream mapping", |v| *at(v, "/regs/s2cr/3") = 0xc000_0000u32.into()),
        ("context bank", |v| *at(v, "/regs/banks/2/cbar") = 0x0100_0000.into()),
        ("context bank", |v| *at(v, "/regs/banks/2/fsr") = 0x1.into()),
        ("context bank", |v| *at(v, "/regs/banks/2/sctlr") = 0x1000.into()),
        ("context bank", |v| *at(v, "/regs/banks/2/tcr2") = 0.into()),
        ("SS", |v| *at(v, "/regs/banks/2/fsr") = 0x4000_0002.into()),
        ("SS", |v| *at(v, "/regs/banks/0/fsr") = 2.into()),
        ("tag", |v| *at(v, "/regs/stalls/next_tag") = 1.into()),
        ("tag", |v| *at(v, "/regs/stalls/next_tag") = u64::MAX.into()),
        ("bank", |v| *at(v, "/regs/stalls/waiting/1/bank") = 16.into()),
        ("decided", |v| *at(v, "/regs/stalls/decided") = serde_json::json!({"1": "Retry"})),
    ];
    for (n, (what, damage)) in rows.iter().enumerate() {
        let (r, mut json) = busy();
        damage(&mut json);
        let before = r.smmu.save();
        let state: State = serde_json::from_value(json).unwrap();
        let error = r.smmu.restore(state).unwrap_err();
        assert!(error.to_string().contains(what), "row {n}: {error}");
        assert_eq!(r.smmu.save(), before, "row {n}");
    }
    let (r, json) = busy();
    r.smmu.restore(serde_json::from_value(json).unwrap()).unwrap();
    assert_eq!(
        Rig::new(Config::default()).smmu.restore(r.smmu.save()),
        Err(RestoreError::Config),
        "the state of another kind of SMMU"
    );
}

/// Any number anywhere may have been changed: a refusal or a working SMMU, never a panic.
#[test]
fn randomly_changed_states_never_break_the_model() {
    fn numbers<'a>(v: &'a mut Value, out: &mut Vec<&'a mut Value>) {
        match v {
            Value::Number(_) => out.push(v),
            Value::Array(items) => items.iter_mut().for_each(|i| numbers(i, out)),
            Value::Object(map) => map.values_mut().for_each(|i| numbers(i, out)),
            _ => {}
        }
    }
    let mut rng = Rng(21);
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..1500 {
        let (r, mut json) = busy();
        {
            let mut all = Vec::new();
            numbers(at(&mut json, "/regs"), &mut all);
            for _ in 0..1 + rng.below(3) {
                let i = rng.below(all.len() as u64) as usize;
                *all[i] = value(&mut rng, TABLES).into();
            }
        }
        let Ok(state) = serde_json::from_value::<State>(json) else {
            refused += 1;
            continue;
        };
        match r.smmu.restore(state) {
            Ok(()) => taken += 1,
            Err(_) => refused += 1,
        }
        let mut p = r.port();
        for id in [SID, 0, 1] {
            let _ = rd(&mut p, id, 0x1000);
            let _ = wr(&mut p, id, DATA);
        }
        for offset in (0..0x2_0000).step_by(0x104) {
            r.r(offset & !3);
        }
        r.smmu.restore(r.smmu.save()).unwrap();
    }
    assert!(taken > 100 && refused > 100, "{taken} taken, {refused} refused");
}
