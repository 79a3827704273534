//! Millions of random register accesses, transactions and table bytes: no panic, no hang, and nothing beyond the output
//! size of the SMMU is ever touched.

#[path = "rig/random.rs"]
mod random;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use portcullis_arch::{Access, Attributes, Iova, Pa, StreamId};
use portcullis_bus::{
    BusError, DmaFault, DmaPort, Initiator, InterruptSink, IrqLevels, IrqLine, Memory, Mmio, StallTag,
    SystemMemory,
};
use portcullis_smmuv2::{Aarch32, Config, Interrupts, SmmuV2};
use random::{Rng, Shape, address, descriptor, value};

const TABLES: u64 = 0x4000_0000;
const DATA: u64 = 0x6000_0000;

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
    refused_by_memory: u64,
    beyond_window: u64,
    hits: u64,
    walks: u64,
}

fn run(config: Config, seed: u64, steps: u64) -> Seen {
    let limit = 1u64 << config.pa_bits;
    let guard = 0x1_0000u64;
    let regions = [(TABLES, 0x1_0000), (DATA, 0x1_0000), (limit, guard), (limit << 2, guard)];
    let mem = SystemMemory::new(&regions).unwrap();
    let pattern = vec![0xa5u8; guard as usize];
    for base in [limit, limit << 2] {
        mem.write(Pa(base), Attributes::DEVICE_DEFAULT, &pattern).unwrap();
    }
    let fence = Fence { mem: mem.clone(), limit, beyond: Arc::default() };
    let irqs = Arc::new(IrqLevels::default());
    let line = |n| IrqLine::new(irqs.clone() as Arc<dyn InterruptSink>, n);
    let wires = Interrupts {
        global: [line(200), line(201)],
        config: [line(202), line(203)],
        context: (0..u32::from(config.context_banks)).map(line).collect(),
        combined: [line(210), line(211)],
    };
    let shape = Shape::of(&config);
    let smmu = SmmuV2::new(config, fence.clone(), wires).unwrap();
    let windows = [smmu.window(false), smmu.window(true)];
    let mut ports = [smmu.port(fence.clone()), smmu.port(fence.clone())];
    let mut tags: Vec<StallTag> = Vec::new();
    let mut rng = Rng(seed);
    let mut seen = Seen::default();
    let mut buf = vec![0u8; 0x3000];
    let mut saved = None;
    for _ in 0..steps {
        match rng.below(100) {
            0..10 => {
                let window = &windows[usize::from(rng.one_in(3))];
                let offset = shape.offset(&mut rng);
                let size = rng.pick(&[4, 4, 4, 4, 4, 8, 8, 8, 1, 2, 3, 16]);
                let offset = if rng.one_in(16) { offset } else { offset / size * size };
                let bytes = value(&mut rng, TABLES).to_le_bytes();
                let data = &mut buf[..size as usize];
                let result = if rng.one_in(4) {
                    window.mmio_read(offset, data)
                } else {
                    let n = data.len().min(8);
                    data.fill(0);
                    data[..n].copy_from_slice(&bytes[..n]);
                    window.mmio_write(offset, data)
                };
                seen.beyond_window += u64::from(result.is_err());
            }
            10..20 => {
                let at = random::slot(&mut rng, TABLES);
                mem.store64(Pa(at), descriptor(&mut rng, TABLES, DATA)).unwrap();
            }
            20..92 => {
                let attrs = Attributes::from_bits(
                    0x100f ^ if rng.one_in(4) { rng.next() as u32 & 0x7fff } else { 0 },
                );
                let id = if rng.one_in(16) { rng.next() as u32 } else { rng.below(4) as u32 };
                let from = Initiator::new(StreamId(id)).with_attrs(attrs);
                let va = Iova(address(&mut rng, TABLES, DATA));
                let port = &mut ports[rng.below(2) as usize];
                let len = if rng.one_in(16) { rng.below(0x3000) } else { rng.below(64) } as usize;
                let fault = match rng.below(5) {
                    0 => {
                        let access = if rng.one_in(2) { Access::Read } else { Access::Write };
                        let _ = port.translate(&from, va, access);
                        let _ = smmu.explain(from, va, access);
                        None
                    }
                    1 | 2 => port.read(from, va, &mut buf[..len]).err().map(|e| e.fault),
                    3 => port.write(from, va, &bytes(&mut rng, len)).err().map(|e| e.fault),
                    _ => {
                        let to = Iova(address(&mut rng, TABLES, DATA));
                        port.copy((from, va), (from, to), len).err().map(|e| e.error.fault)
                    }
                };
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
            92..93 => {
                let tag = if tags.is_empty() || rng.one_in(8) {
                    StallTag(rng.next())
                } else {
                    tags.swap_remove(rng.below(tags.len() as u64) as usize)
                };
                ports[0].stall_state(tag);
            }
            93..98 => {
                for (offset, value) in shape.working(&mut rng, TABLES) {
                    windows[1]
                        .mmio_write(offset, &value.to_le_bytes()[..if value >> 32 == 0 { 4 } else { 8 }])
                        .unwrap();
                }
                tags.truncate(100);
            }
            98 if rng.one_in(64) => match saved.take() {
                Some(state) => smmu.restore(state).unwrap(),
                None => saved = Some(smmu.save()),
            },
            99 if rng.one_in(512) => smmu.reset(),
            _ => {}
        }
    }
    for p in &ports {
        seen.hits += p.stats().hits;
        seen.walks += p.stats().walks;
    }
    assert_eq!(fence.beyond.load(Ordering::Relaxed), 0, "an access beyond the output size");
    for base in [limit, limit << 2] {
        let mut now = vec![0; guard as usize];
        mem.read(Pa(base), Attributes::DEVICE_DEFAULT, &mut now).unwrap();
        assert!(now == pattern, "memory at {base:#x} has changed");
    }
    assert!(
        seen.completed > steps / 20
            && seen.hits > steps / 50
            && seen.walks > steps / 20
            && seen.stalled > steps / 1000,
        "the run was too dull: {seen:?}"
    );
    println!("{seen:?}");
    seen
}

fn bytes(rng: &mut Rng, len: usize) -> Vec<u8> {
    let fill = rng.next() as u8;
    vec![fill; len]
}

const STEPS: u64 = 600_000;

#[test]
fn random_use_of_the_zynqmp() {
    run(Config::mmu500_zynqmp(), 1, STEPS);
}

#[test]
fn random_use_of_a_plain_smmu_with_uneven_sizes() {
    let c = Config { pa_bits: 40, ipa_bits: 44, upstream_bits: 64, secure: true, ..Config::default() };
    run(c, 2, STEPS);
}

#[test]
fn random_use_of_an_smmu_with_a_small_ipa() {
    let c = Config {
        pa_bits: 42,
        ipa_bits: 36,
        context_banks: 4,
        stage2_only_banks: 1,
        tlb_entries: 4,
        ..Config::default()
    };
    run(c, 3, STEPS);
}

#[test]
fn random_use_of_extended_groups_and_ids() {
    let c = Config { stream_groups: 300, extended_ids: true, secure: true, pa_bits: 36, ..Config::default() };
    run(c, 4, STEPS);
}

#[test]
fn random_use_of_compressed_indexing_in_64k_pages() {
    let c = Config {
        compressed_index: true,
        stream_matching: false,
        page_64k: true,
        aarch32: Aarch32::LongOnly,
        pa_bits: 44,
        ..Config::default()
    };
    run(c, 5, STEPS);
}
