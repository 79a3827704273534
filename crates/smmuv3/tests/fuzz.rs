//! Hundreds of thousands (and, ignored by default, millions) of random register accesses, commands, tables and
//! transactions: no panic, no hang, nothing beyond the output size touched, and states that survive saving.

#[path = "rig/random.rs"]
mod random;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use portcullis_arch::{Attributes, Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{
    AtsPort, BusError, DmaFault, DmaPort, Initiator, InterruptSink, IrqLevels, Memory, Mmio, PageRequest,
    StallState, StallTag, SystemMemory,
};
use portcullis_smmuv3::{Caps, Httu, Interrupts, SecureCaps, SmmuV3, StallModel, State, TableEndian, Wires};
use random::*;

/// Memory that notes every access above the output size.
#[derive(Clone)]
struct Fence {
    mem: SystemMemory,
    limit: u64,
    beyond: Arc<AtomicU64>,
}

impl Fence {
    fn check(&self, pa: Pa, len: usize) {
        if pa.get() >= self.limit || self.limit - pa.get() < len as u64 {
            self.beyond.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Memory for Fence {
    fn read(&self, pa: Pa, a: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        self.check(pa, buf.len());
        self.mem.read(pa, a, buf)
    }
    fn write(&self, pa: Pa, a: Attributes, buf: &[u8]) -> Result<(), BusError> {
        self.check(pa, buf.len());
        self.mem.write(pa, a, buf)
    }
    fn load64(&self, pa: Pa, a: Attributes) -> Result<u64, BusError> {
        self.check(pa, 8);
        self.mem.load64(pa, a)
    }
    fn load32(&self, pa: Pa, a: Attributes) -> Result<u32, BusError> {
        self.check(pa, 4);
        self.mem.load32(pa, a)
    }
    fn cas64(&self, pa: Pa, a: Attributes, old: u64, new: u64) -> Result<u64, BusError> {
        self.check(pa, 8);
        self.mem.cas64(pa, a, old, new)
    }
}

/// What the run did, so that the test knows that it was worth something.
#[derive(Default, Debug)]
struct Seen {
    completed: u64,
    terminated: u64,
    stalled: u64,
    retried: u64,
    refused_by_memory: u64,
    events: u64,
    commands: u64,
    command_errors: u64,
    restored: u64,
    hits: u64,
    walks: u64,
}

fn run(caps: Caps, seed: u64, steps: u64) -> Seen {
    let limit = 1u64 << caps.oas_bits;
    let guard = 0x1_0000u64;
    let mem = SystemMemory::new(&[(RAM, RAM_SIZE), (limit, guard), (limit | RAM, guard)]).unwrap();
    let pattern = vec![0xa5u8; guard as usize];
    for base in [limit, limit | RAM] {
        mem.write(Pa(base), Attributes::DEVICE_DEFAULT, &pattern).unwrap();
    }
    let fence = Fence { mem: mem.clone(), limit, beyond: Arc::default() };
    let sink: Arc<dyn InterruptSink> = Arc::new(IrqLevels::default());
    let interrupts = Interrupts {
        non_secure: Wires::separate(&sink, [1, 2, 3, 4]),
        secure: Wires::combined(sink.clone(), 5),
        messages: Some(sink),
    };
    let smmu = SmmuV3::builder(caps.clone())
        .memory(fence.clone())
        .interrupts(interrupts)
        .msi_doorbell(MSI + 0x800..MSI + 0x1000)
        .build()
        .unwrap();
    let windows = [smmu.window(false), smmu.window(true)];
    let mut ports = [smmu.port(fence.clone()), smmu.port(fence.clone())];
    let mut tags: Vec<StallTag> = Vec::new();
    let mut rng = Rng(seed);
    let mut seen = Seen::default();
    let mut buf = vec![0u8; 0x3000];
    let mut saved: Option<State> = None;
    let secure = caps.secure.is_some();
    let mut cons = 0;
    let mut last = (Initiator::new(StreamId(0)), Iova(0));
    for step in 0..steps {
        match rng.below(100) {
            0..6 => {
                let window = &windows[usize::from(rng.one_in(3))];
                let at = offset(&mut rng);
                let size = rng.pick(&[4, 4, 4, 4, 4, 8, 8, 8, 1, 2, 3, 16]);
                let at = if rng.one_in(16) { at } else { at / size * size };
                let bytes = value(&mut rng).to_le_bytes();
                let data = &mut buf[..size as usize];
                if rng.one_in(4) {
                    let _ = window.mmio_read(at, data);
                } else {
                    let n = data.len().min(8);
                    data.fill(0);
                    data[..n].copy_from_slice(&bytes[..n]);
                    let _ = window.mmio_write(at, data);
                }
            }
            6..16 => {
                let (at, value) = descriptor(&mut rng);
                mem.store64(Pa(at), value).unwrap();
            }
            16..20 => {
                let (at, words) = match rng.below(8) {
                    0..3 => (STRTAB + 64 * rng.below(8), ste(&mut rng, &caps)),
                    3..6 => (CDS + 64 * rng.below(8), cd(&mut rng, &caps)),
                    6 => (L1, [0; 8].map(|_: u64| l1std(&mut rng))),
                    _ => (L1CDS, [0; 8].map(|_: u64| l1cd(&mut rng))),
                };
                for (n, w) in words.iter().enumerate() {
                    mem.store64(Pa(at + 8 * n as u64), *w).unwrap();
                }
            }
            20..28 => {
                // A few commands, and the errors of earlier ones acknowledged.
                let s = secure && rng.one_in(4);
                let (window, bank) = (&windows[usize::from(s)], if s { 0x8000 } else { 0 });
                let error = window.read32(bank + 0x60).unwrap();
                if error ^ window.read32(bank + 0x64).unwrap() != 0 {
                    seen.command_errors += 1;
                    let at = window.read32(bank + 0x9c).unwrap() & 63;
                    for (n, w) in [0x46, 0].iter().enumerate() {
                        mem.store64(Pa(CMDQ + 16 * u64::from(at) + 8 * n as u64), *w).unwrap();
                    }
                    window.write32(bank + 0x64, error).unwrap();
                }
                let stags: Vec<u16> = smmu.stalled().iter().filter_map(|s| s.stag).collect();
                let prod = window.read32(bank + 0x98).unwrap();
                let many = 1 + rng.below(4) as u32;
                for n in 0..many {
                    let at = CMDQ + 16 * u64::from((prod + n) & 63);
                    for (k, w) in command(&mut rng, &stags).iter().enumerate() {
                        mem.store64(Pa(at + 8 * k as u64), *w).unwrap();
                    }
                }
                window.write32(bank + 0x98, prod + many).unwrap();
                let now = windows[0].read32(0x9c).unwrap() & 0xfffff;
                seen.commands += u64::from(now != cons);
                cons = now;
            }
            28..32 => {
                // Consume events and page requests.
                for (window, prod, cons) in
                    [(0, 0x1_00a8, 0x1_00ac), (0, 0x1_00c8, 0x1_00cc), (1, 0x80a8, 0x80ac)]
                {
                    let p = windows[window].read32(prod).unwrap();
                    seen.events += u64::from(p != windows[window].read32(cons).unwrap());
                    windows[window].write32(cons, p).unwrap();
                }
            }
            32..92 => {
                let attrs = Attributes::from_bits(
                    0x100f ^ if rng.one_in(4) { rng.next() as u32 & 0x7fff } else { 0 },
                );
                let id = if rng.one_in(16) { rng.next() as u32 } else { rng.below(8) as u32 };
                let substream = match rng.below(16) {
                    0 => Some(SubstreamId(rng.next() as u32)),
                    1 | 2 => Some(SubstreamId(rng.below(8) as u32)),
                    _ => None,
                };
                let from = Initiator { substream, ..Initiator::new(StreamId(id)).with_attrs(attrs) };
                // Now and then the same again, so that there are hits.
                let (from, va) = if rng.one_in(2) { last } else { (from, Iova(address(&mut rng))) };
                last = (from, va);
                let port = &mut ports[rng.below(2) as usize];
                let len = if rng.one_in(16) { rng.below(0x3000) } else { rng.below(64) } as usize;
                let fault = match rng.below(12) {
                    0 => {
                        let _ = smmu.explain(from, va, portcullis_arch::Access::Write);
                        None
                    }
                    1 => {
                        let _ = port.translation_request(from, va, rng.one_in(2));
                        None
                    }
                    2 => {
                        let group = rng.next() as u16;
                        port.page_request(PageRequest {
                            from,
                            addr: va,
                            read: rng.one_in(2),
                            write: rng.one_in(2),
                            execute: rng.one_in(2),
                            privileged: rng.one_in(2),
                            group,
                            last: rng.one_in(2),
                        });
                        None
                    }
                    3 => port.read_translated(from, va.get(), &mut buf[..len]).err().map(|e| e.fault),
                    4 => port
                        .write_translated(from, DATA + rng.below(0x8000), &vec![3; len])
                        .err()
                        .map(|e| e.fault),
                    5..8 => port.read(from, va, &mut buf[..len]).err().map(|e| e.fault),
                    8..11 => port.write(from, va, &vec![rng.next() as u8; len]).err().map(|e| e.fault),
                    _ => {
                        let to = Iova(address(&mut rng));
                        port.copy((from, va), (from, to), len).err().map(|e| e.error.fault)
                    }
                };
                if fault.is_none() && rng.one_in(2) {
                    // Neighbours: hits, if there are any to be had.
                    for _ in 0..8 {
                        let near = Iova(va.get() & !0xfff | rng.below(0xff0));
                        let _ = port.read(from, near, &mut buf[..8]);
                    }
                }
                match fault {
                    None => seen.completed += 1,
                    Some(DmaFault::Terminated) => seen.terminated += 1,
                    Some(DmaFault::Bus(_)) => seen.refused_by_memory += 1,
                    Some(DmaFault::Stalled(t)) => {
                        seen.stalled += 1;
                        tags.push(t);
                    }
                }
            }
            92..96 => {
                let tag = if tags.is_empty() || rng.one_in(8) {
                    StallTag(rng.next())
                } else {
                    tags[rng.below(tags.len() as u64) as usize]
                };
                if ports[0].stall_state(tag) != StallState::Waiting {
                    seen.retried += 1;
                    tags.retain(|t| *t != tag);
                }
            }
            96..98 if step < 10 || rng.one_in(4) => {
                for s in [false, true] {
                    let bank = if s { 0x8000 } else { 0 };
                    for (at, value, size) in working(&mut rng, &caps, s) {
                        let data = &value.to_le_bytes()[..size];
                        windows[usize::from(s)].mmio_write(bank + at, data).unwrap();
                    }
                }
                tags.truncate(100);
            }
            98 if rng.one_in(16) => match saved.take() {
                Some(state) => {
                    smmu.restore(state).unwrap();
                    seen.restored += 1;
                }
                None => saved = Some(smmu.save()),
            },
            99 if rng.one_in(512) => smmu.reset(),
            _ => {}
        }
    }
    // Whatever has been done to it, it comes to rest.
    let mut polls = 0;
    while smmu.poll() {
        polls += 1;
        assert!(polls < 1000, "commands without end");
    }
    for p in &ports {
        seen.hits += p.stats().hits;
        seen.walks += p.stats().walks;
    }
    assert_eq!(fence.beyond.load(Ordering::Relaxed), 0, "an access beyond the output size");
    for base in [limit, limit | RAM] {
        let mut now = vec![0; guard as usize];
        mem.read(Pa(base), Attributes::DEVICE_DEFAULT, &mut now).unwrap();
        assert!(now == pattern, "memory at {base:#x} has changed");
    }
    println!("{seen:?}");
    assert!(
        seen.completed > steps / 50
            && seen.walks > steps / 50
            && seen.hits > steps / 100
            && seen.commands > steps / 100
            && seen.events > steps / 500
            && seen.restored > 0
            && (caps.stall_max == 0 || seen.stalled > steps / 2000 && seen.retried > steps / 2000),
        "the run was too dull: {seen:?}"
    );
    seen
}

/// Parts that differ in what random words can mean.
fn parts() -> [Caps; 5] {
    let full = Caps::full();
    [
        Caps { sid_bits: 16, oas_bits: 44, stall_max: 8, secure: None, ..full.clone() },
        Caps { sid_bits: 12, secure: Some(SecureCaps { sid_bits: 8, msi: true }), ..full.clone() },
        Caps {
            sid_bits: 6,
            oas_bits: 40,
            aarch64: false,
            httu: Httu::None,
            stt: false,
            ds: false,
            va52: false,
            secure: None,
            tlb_entries: 4,
            endian: TableEndian::Little,
            ..full.clone()
        },
        Caps {
            stall_model: StallModel::Forced,
            abort_only: true,
            oas_bits: 40,
            stall_max: 3,
            secure: None,
            ds: false,
            va52: false,
            httu: Httu::Access,
            ..full
        },
        Caps::qemu_virt(),
    ]
}

const STEPS: u64 = 80_000;

#[test]
fn random_use_of_a_full_part_with_44_bits() {
    run(parts()[0].clone(), 1, STEPS);
}

#[test]
fn random_use_of_both_security_states_with_52_bits() {
    run(parts()[1].clone(), 2, STEPS);
}

#[test]
fn random_use_of_an_aarch32_part() {
    run(parts()[2].clone(), 3, STEPS);
}

#[test]
fn random_use_of_a_part_that_must_stall() {
    run(parts()[3].clone(), 4, STEPS);
}

#[test]
fn random_use_of_the_qemu_part() {
    run(parts()[4].clone(), 5, STEPS);
}

/// `cargo test --release -- --ignored`
#[test]
#[ignore = "takes minutes"]
fn millions_of_random_steps() {
    for (n, caps) in parts().into_iter().enumerate() {
        for seed in 0..4 {
            run(caps.clone(), 100 + 10 * n as u64 + seed, 1_000_000);
        }
    }
}
