//! Random configurations, legal ones and others: every transaction ends, and is recorded, as a second reading of the architecture says
//! (`isolation/sheet.rs`, which shares nothing with the model), also from a port that has it cached.

#[path = "isolation/build.rs"]
mod build;
#[path = "rig/random.rs"]
mod random;
#[path = "isolation/sheet.rs"]
mod sheet;
#[path = "isolation/watch.rs"]
mod watch;

use std::collections::BTreeMap;

use portcullis_arch::attrs::{MemoryType, Shareability};
use portcullis_arch::{Access, Attributes, Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{Initiator, Memory, Mmio};
use portcullis_smmuv3::{Caps, Httu, Port, StallModel, TableEndian};
use portcullis_walk::FaultOutcome;
use random::Rng;
use sheet::{How, Outcome, Sheet, Transaction, Type};
use watch::{Machine, Watch};

const SYNC: [u64; 2] = [0x46, 0];

fn initiator(t: &Transaction) -> Initiator {
    let memory = match t.memory {
        Type::Device(kind) => MemoryType::from_code(kind),
        Type::Normal(outer, inner) => MemoryType::normal(outer, inner),
    };
    let attrs = Attributes::DEVICE_DEFAULT
        .with_privileged(t.privileged)
        .with_instruction(t.instruction)
        .with_memory(memory)
        .with_shareability(Shareability::from_code(t.sh));
    Initiator { stream: StreamId(t.sid), substream: t.ssid.map(SubstreamId), attrs }
}

fn access(t: &Transaction) -> Access {
    if t.write { Access::Write } else { Access::Read }
}

/// What the model makes of a transaction, in the sheet's words. A stalled one is terminated.
fn outcome(m: &Machine, port: &mut Port<Watch>, t: &Transaction) -> Outcome {
    let got = port.translate(&initiator(t), Iova(t.va), access(t));
    let mut events = m.events();
    assert!(events.len() <= 1, "one transaction gives at most one event");
    let event = events.pop();
    let (record, recorded) = (event.unwrap_or([0; 4]), event.is_some());
    match got {
        Ok(to) => {
            assert_eq!(event, None);
            let code = to.attrs.memory().code();
            let memory = if code < 4 { Type::Device(code) } else { Type::Normal(code >> 2, code & 3) };
            Outcome::Pass { pa: to.pa.get(), memory, sh: to.attrs.shareability() as u8 }
        }
        Err(FaultOutcome::Stall(tag)) => {
            let stalled = m.smmu.stalled();
            assert_eq!((stalled.len(), stalled[0].tag, stalled[0].stream), (1, tag, t.sid));
            assert_eq!(record[1] & 0xffff, u64::from(stalled[0].stag.unwrap()));
            m.command([0x45 | u64::from(t.sid) << 32, 0]);
            let record = [record[0], record[1] & !0xffff, record[2], record[3]];
            Outcome::Fault { record, recorded, how: How::Stall }
        }
        Err(FaultOutcome::Terminate { abort }) => {
            let how = if abort { How::Abort } else { How::Zero };
            Outcome::Fault { record, recorded, how }
        }
        Err(FaultOutcome::Retry) => panic!("a port looks again by itself"),
    }
}

/// What of an outcome can be seen: a record that is not written cannot.
fn visible(o: Outcome) -> Outcome {
    match o {
        Outcome::Silent => Outcome::Fault { record: [0; 4], recorded: false, how: How::Abort },
        Outcome::Fault { recorded: false, how, .. } => {
            Outcome::Fault { record: [0; 4], recorded: false, how }
        }
        other => other,
    }
}

/// Parts that differ in what they have.
fn parts() -> Vec<Caps> {
    let full = || Caps { sid_bits: 16, ssid_bits: 8, secure: None, ..Caps::full() };
    let narrow = || Caps { oas_bits: 44, ds: false, va52: false, ..full() };
    vec![
        full(),
        narrow(),
        Caps { ds: false, ..full() },
        Caps { httu: Httu::Access, stall_model: StallModel::Terminate, stall_max: 0, ..narrow() },
        Caps { httu: Httu::None, stall_model: StallModel::Forced, endian: TableEndian::Little, ..narrow() },
        Caps { aarch32: false, stt: false, attr_perms_override: false, cd2l: false, ..full() },
        Caps { abort_only: true, endian: TableEndian::Big, attr_types_override: false, ..narrow() },
        Caps {
            aarch64: false,
            httu: Httu::None,
            stt: false,
            ds: false,
            va52: false,
            oas_bits: 40,
            gran16k: false,
            gran64k: false,
            ..full()
        },
        Caps::qemu_virt(),
        Caps::small(),
    ]
}

fn random_transaction(rng: &mut Rng, sids: u64) -> Transaction {
    let ssids = if rng.one_in(8) { 1 << 20 } else { 9 };
    Transaction {
        sid: if rng.one_in(64) { rng.next() as u32 } else { rng.below(sids) as u32 },
        ssid: if rng.one_in(3) { Some(rng.below(ssids) as u32) } else { None },
        va: random::address(rng),
        write: rng.one_in(2),
        privileged: rng.one_in(3),
        instruction: rng.one_in(4),
        memory: rng.pick(&[
            Type::Normal(3, 3),
            Type::Normal(1, 1),
            Type::Normal(2, 3),
            Type::Device(1),
            Type::Device(3),
        ]),
        sh: rng.pick(&[0, 2, 3]),
    }
}

/// Streams, CDs and tables of which every bit may be anything.
fn run_against_the_sheet(caps: &Caps, seed: u64, rounds: usize) -> BTreeMap<String, u64> {
    let mut rng = Rng(seed);
    let m = Machine::new(caps.clone(), random::CMDQ, random::EVENTQ);
    let mut seen = BTreeMap::new();
    for _ in 0..rounds {
        for n in 0..8 {
            m.store(random::STRTAB + 64 * n, &random::ste(&mut rng, caps));
            m.store(random::CDS + 64 * n, &random::cd(&mut rng, caps));
            m.store(random::L1 + 8 * n, &[random::l1std(&mut rng)]);
            m.store(random::L1CDS + 8 * n, &[random::l1cd(&mut rng)]);
        }
        m.mem.write(Pa(random::TABLES), Attributes::DEVICE_DEFAULT, &[0; 0x1_0000]).unwrap();
        for _ in 0..600 {
            let (at, value) = random::descriptor(&mut rng);
            m.store(at, &[value]);
        }
        let two_level = caps.two_level_streams && rng.one_in(4);
        let (strtab, cfg) = if two_level {
            (random::L1, 1 << 16 | rng.pick(&[6u32, 8, 10, 7]) << 6 | (6 + rng.below(5) as u32))
        } else {
            (random::STRTAB, 3)
        };
        let cr2 = rng.below(4) as u32 | u32::from(!rng.one_in(4)) << 1;
        m.start(strtab, cfg, cr2);
        let sheet = Sheet {
            caps: caps.clone(),
            mem: m.mem.clone(),
            strtab_base: strtab,
            strtab_cfg: cfg.into(),
            recinvsid: cr2 & 2 != 0,
            e2h: cr2 & 1 != 0 && caps.hyp,
        };
        for _ in 0..60 {
            let t = random_transaction(&mut rng, 8);
            let (expected, updates) = sheet.run(t);
            m.walks.take();
            let got = outcome(&m, &mut m.port(), &t);
            let expected = visible(expected);
            let ste: Vec<u64> =
                (0..8).map(|n| m.load(random::STRTAB + 64 * u64::from(t.sid & 7) + 8 * n)).collect();
            assert_eq!(got, expected, "{t:x?}, STE {ste:x?}, {cr2:x} seed {seed}, {caps:?}");
            count(&mut seen, &m, &got, &updates, &format!("{t:x?}, STE {ste:x?}, {cr2:x}"));
        }
    }
    seen
}

/// The descriptors that hardware has changed are those that it should, and what happened is counted.
fn count(
    seen: &mut BTreeMap<String, u64>,
    m: &Machine,
    got: &Outcome,
    updates: &BTreeMap<u64, u64>,
    about: &str,
) {
    let mut changed = BTreeMap::new();
    for (pa, _, new) in m.walks.take().iter().filter(|(_, len, _)| *len == 8) {
        if let Some(new) = new {
            changed.insert(*pa, *new);
        }
    }
    if matches!(got, Outcome::Pass { .. }) {
        assert_eq!(changed, *updates, "{about}");
    } else {
        // A fault behind an update may or may not leave it.
        assert!(
            changed.iter().all(|(at, v)| updates.get(at) == Some(v)),
            "{about}: {changed:x?} {updates:x?}"
        );
    }
    let name = match *got {
        Outcome::Pass { .. } if !updates.is_empty() => "updated".into(),
        Outcome::Pass { .. } => "passed".into(),
        Outcome::Silent => unreachable!(),
        Outcome::Fault { record, recorded: true, how } => {
            let class = record[1] >> 39 & 7;
            format!("{:02x} s2class {class} {how:?}", record[0] & 0xff)
        }
        Outcome::Fault { how, .. } => format!("unrecorded {how:?}"),
    };
    *seen.entry(name).or_insert(0) += 1;
}

/// The same with streams that are legal by construction, so that walks go deep.
fn run_deep(caps: &Caps, seed: u64, rounds: usize, seen: &mut BTreeMap<String, u64>) {
    let mut rng = Rng(seed);
    let m = Machine::new(caps.clone(), random::CMDQ, random::EVENTQ);
    for round in 0..rounds {
        let mut builder = build::Builder {
            caps,
            mem: m.mem.clone(),
            rng: &mut rng,
            next: build::FIRST,
            used: Vec::new(),
            delta: 0,
        };
        let (mut ste, inputs) = builder.stream();
        let damaged = rng.one_in(10);
        if damaged {
            ste[rng.below(4) as usize] ^= 1 << rng.below(64);
        }
        let sid = rng.below(8) as u32;
        m.store(random::STRTAB + 64 * u64::from(sid), &ste);
        let cr2 = 2 | rng.below(2) as u32;
        m.start(random::STRTAB, 3, cr2);
        let sheet = Sheet {
            caps: caps.clone(),
            mem: m.mem.clone(),
            strtab_base: random::STRTAB,
            strtab_cfg: 3,
            recinvsid: true,
            e2h: cr2 & 1 != 0 && caps.hyp,
        };
        // One port keeps what it has seen: nothing but hardware changes the tables.
        m.command([0x04, 31]);
        m.command([0x30, 0]);
        if caps.hyp {
            m.command([0x20, 0]);
        }
        m.command(SYNC);
        let mut old = m.port();
        for _ in 0..30 {
            let mut t = random_transaction(&mut rng, 8);
            t.sid = sid;
            t.ssid =
                if ste[0] >> 59 == 0 { None } else { rng.pick(&[None, Some(0), Some(1), Some(2), Some(3)]) };
            if !rng.one_in(8) && !inputs.is_empty() {
                t.va = rng.pick(&inputs) & !0xfff | rng.below(0x1000);
                if rng.one_in(10) {
                    t.va ^= 1 << rng.below(64);
                }
            }
            let (expected, updates) = sheet.run(t);
            let expected = visible(expected);
            let about = format!("{t:x?}, STE {ste:x?}, CR2 {cr2:x}, seed {seed} round {round}, {caps:?}");
            m.walks.take();
            let got = outcome(&m, &mut m.port(), &t);
            assert_eq!(got, expected, "{about}");
            count(seen, &m, &got, &updates, &about);
            if damaged {
                // Contexts with the same tags may be different ones.
                continue;
            }
            let again = outcome(&m, &mut old, &t);
            let (expected, _) = sheet.run(t);
            assert_eq!(again, visible(expected), "from a port that may have it cached: {about}");
        }
    }
}

#[test]
fn every_outcome_and_record_is_as_a_second_reading_says() {
    let mut all = BTreeMap::new();
    for (n, caps) in parts().iter().enumerate() {
        for (name, count) in run_against_the_sheet(caps, 1000 + n as u64, 60) {
            *all.entry(name).or_insert(0) += count;
        }
    }
    for (n, caps) in parts().iter().enumerate() {
        run_deep(caps, 2000 + n as u64, 120, &mut all);
    }
    println!("{all:#?}");
    for name in [
        "passed",
        "updated",
        "02 s2class 0 Abort",
        "03 s2class 0 Abort",
        "04 s2class 0 Abort",
        "06 s2class 0 Abort",
        "08 s2class 0 Abort",
        "0a s2class 0 Abort",
        "0b s2class 2 Abort",
        "10 s2class 4 Abort",
        "10 s2class 4 Zero",
        "10 s2class 4 Stall",
        "10 s2class 1 Abort",
        "10 s2class 3 Abort",
        "10 s2class 5 Abort",
        "11 s2class 4 Abort",
        "12 s2class 4 Abort",
        "13 s2class 4 Abort",
        "13 s2class 4 Stall",
        "13 s2class 5 Abort",
        "unrecorded Abort",
        "unrecorded Zero",
    ] {
        assert!(all.get(name).is_some_and(|n| *n > 0), "{name} did not happen: {all:#?}");
    }
}

#[test]
#[ignore = "a long run"]
fn a_million_outcomes_are_as_a_second_reading_says() {
    for seed in 0..200 {
        for caps in parts() {
            run_against_the_sheet(&caps, 5000 + seed, 10);
            run_deep(&caps, 7000 + seed, 20, &mut BTreeMap::new());
        }
    }
}

/// STE.MEV: an event is merged with the one before it only while that is still in the queue that software reads.
#[test]
fn events_are_not_merged_with_those_of_an_earlier_queue() {
    let m = Machine::new(Caps { secure: None, ..Caps::full() }, random::CMDQ, random::EVENTQ);
    // Stage 2 without tables, S2R, MEV.
    let two = 1 | 16 << 32 | 2 << 38 | 5 << 48 | 1 << 51 | 1 << 58;
    m.store(random::STRTAB, &[1 | 6 << 1, 1 << 19, two, random::TABLES, 0, 0, 0, 0]);
    m.start(random::STRTAB, 3, 2);
    let mut p = m.port();
    let mut fault = |va| p.translate(&Initiator::new(StreamId(0)), Iova(va), Access::Read).unwrap_err();
    fault(0x1000);
    fault(0x1008);
    assert_eq!(m.r(0x1_00a8), 1, "the same page: merged");
    fault(0x2000);
    assert_eq!(m.r(0x1_00a8), 2);
    // A new queue whose last record, from before, happens to have the index of the one written last.
    m.w.write32(0x20, 0x9).unwrap();
    m.w.write32(0x1_00a8, 2).unwrap();
    m.w.write32(0x1_00ac, 1).unwrap();
    m.w.write32(0x20, 0xd).unwrap();
    fault(0x2000);
    assert_eq!(m.r(0x1_00a8), 3);
    m.events();
    fault(0x2000);
    assert_eq!(m.events().len(), 1, "consumed ones are gone");
}
