//! A booted board for end-to-end tests: what a test would otherwise repeat.
//!
//! [`Board`] is a machine with its software. [`Board::domain_for`] gives a channel a domain of its own, [`Board::copy`]
//! moves bytes, [`Board::put`] and [`Board::get`] are the CPU's side of memory with the maintenance that it needs.
#![allow(dead_code, missing_docs)]

pub mod workload;

use std::sync::Arc;

use portcullis_arch::{Iova, Pa};
use portcullis_board::sim::{Event, Machine, Options, Recording};
use portcullis_board::system::{BootOptions, Channel, System};
use portcullis_board::{MachineDescription, Tree};
use portcullis_bus::Memory as _;
use portcullis_drivers::fault::FaultReason;
use portcullis_drivers::zdma::{Completion, Cookie, Progress, Segment};
use portcullis_iommu::{DeviceId, Domain, DomainSpec, FaultModel, InstanceId, Paging, Prot, RoutedFault};

/// Physical memory for tests: reserved on the thesis board, so no driver allocates there.
pub const RAM: u64 = 0x6000_0000;
pub const RAM_BYTES: u64 = 0x10_0000;

pub fn thesis_tree() -> Tree {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../boards/zynqmp-thesis.dtb");
    Tree::load(file).unwrap()
}

pub fn thesis() -> MachineDescription {
    MachineDescription::from_tree(&thesis_tree()).unwrap()
}

/// The SMMUv3 board.
pub fn smmuv3() -> MachineDescription {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../boards/smmuv3.dtb");
    MachineDescription::from_tree(&Tree::load(file).unwrap()).unwrap()
}

/// The SMMUv3 board where nothing snoops.
pub fn smmuv3_noncoherent() -> MachineDescription {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../boards/smmuv3-noncoherent.dtb");
    MachineDescription::from_tree(&Tree::load(file).unwrap()).unwrap()
}

/// Physical memory for tests on it: reserved, so no driver allocates there.
pub const RAM_V3: u64 = 0x9000_0000;

/// The thesis board with everything that can be coherent coherent.
pub fn coherent() -> MachineDescription {
    let mut description = thesis();
    description.smmus[0].dma_coherent = true;
    for channel in description.dma_channels.iter_mut().filter(|c| c.bus_width == 64) {
        channel.dma_coherent = true;
    }
    for writer in &mut description.pl_writers {
        writer.dma_coherent = true;
    }
    description
}

/// A random number generator that is the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
}

pub struct Board {
    pub system: System,
}

impl Board {
    /// The thesis board.
    pub fn new() -> Self {
        Self::of(thesis(), false)
    }

    /// The thesis board with the CPU's cache.
    pub fn cached() -> Self {
        Self::of(thesis(), true)
    }

    pub fn of(description: MachineDescription, cpu_cache: bool) -> Self {
        Self::booted(description, cpu_cache, &BootOptions::default())
    }

    pub fn booted(description: MachineDescription, cpu_cache: bool, options: &BootOptions) -> Self {
        let recording = Recording { registers: true, explain: false };
        let machine =
            Machine::build(description, Options { cpu_cache, recording, plain_ports: false }).unwrap();
        Self { system: System::boot(machine, options).unwrap() }
    }

    pub fn machine(&self) -> &Arc<Machine> {
        self.system.machine()
    }
    pub fn instance(&self) -> InstanceId {
        self.system.iommu().unwrap()
    }
    pub fn channel(&self, name: &str) -> &Channel {
        self.system.channel(name).unwrap()
    }
    pub fn device(&self, name: &str) -> DeviceId {
        self.system.device(name).unwrap()
    }

    pub fn alloc(&self, spec: DomainSpec) -> Arc<Domain> {
        self.system.core().alloc_domain(self.instance(), spec).unwrap()
    }
    pub fn stage1(&self) -> Arc<Domain> {
        self.alloc(DomainSpec::Stage1(Paging::default()))
    }
    pub fn stage2(&self) -> Arc<Domain> {
        self.alloc(DomainSpec::Stage2(Paging::default()))
    }
    /// A stage 1 domain in which faults stall.
    pub fn stalling(&self) -> Arc<Domain> {
        let model = FaultModel { stall: true, ..FaultModel::default() };
        let spec = DomainSpec::Stage1(Paging::default());
        self.system.core().alloc_domain_with(self.instance(), spec, model).unwrap()
    }

    /// Attaches a channel, its descriptors included.
    pub fn attach(&self, name: &str, domain: &Arc<Domain>) {
        self.system.core().attach_device(self.device(name), domain).unwrap();
        if domain.input_range().is_some() {
            self.system.map_descriptors(self.channel(name), domain).unwrap();
        }
    }

    /// A stage 1 domain with this channel in it.
    pub fn domain_for(&self, name: &str) -> Arc<Domain> {
        let domain = self.stage1();
        self.attach(name, &domain);
        domain
    }

    /// The CPU writes, and hands the memory to devices.
    pub fn put(&self, pa: u64, bytes: &[u8]) {
        let memory = self.machine().memory();
        memory.write(Pa(pa), Default::default(), bytes).unwrap();
        memory.clean_invalidate(Pa(pa), bytes.len());
    }
    /// The CPU takes the memory back from devices, and reads.
    pub fn get(&self, pa: u64, len: usize) -> Vec<u8> {
        let memory = self.machine().memory();
        let mut bytes = vec![0; len];
        memory.invalidate(Pa(pa), len);
        memory.read(Pa(pa), Default::default(), &mut bytes).unwrap();
        bytes
    }
    pub fn put32(&self, pa: u64, value: u32) {
        self.put(pa, &value.to_le_bytes());
    }
    pub fn get32(&self, pa: u64) -> u32 {
        u32::from_le_bytes(self.get(pa, 4).try_into().unwrap())
    }

    pub fn settle(&self) {
        self.system.settle().unwrap();
    }

    /// A scatter-gather copy that ends; its completion.
    pub fn copy(&self, name: &str, to: u64, from: u64, len: u64) -> Completion {
        let cookie = self.start(name, to, from, len);
        self.settle();
        self.completion(name, cookie)
    }

    pub fn start(&self, name: &str, to: u64, from: u64, len: u64) -> Cookie {
        let channel = self.channel(name);
        let cookie = channel.driver.submit_memcpy(Iova(to), Iova(from), len).unwrap();
        channel.driver.issue_pending();
        cookie
    }

    /// A copy with the descriptor in registers; its completion.
    pub fn copy_simple(&self, name: &str, to: u64, from: u64, len: u32) -> Completion {
        let cookie = self.channel(name).driver.start_simple(Iova(to), Iova(from), len).unwrap();
        self.settle();
        self.completion(name, cookie)
    }

    pub fn completion(&self, name: &str, cookie: Cookie) -> Completion {
        let driver = &self.channel(name).driver;
        driver.take_completion(cookie).unwrap_or_else(|| {
            panic!("{name} {cookie:?}: {:?}, {:?}", driver.progress(cookie), driver.channel_state())
        })
    }

    pub fn is_running(&self, name: &str, cookie: Cookie) -> bool {
        matches!(self.channel(name).driver.progress(cookie), Progress::Running { .. })
    }

    /// The PL writer writes; true if the response was OK.
    pub fn pl_write(&self, to: u64, value: u32, axi_id: u8) -> bool {
        let writer = &self.system.writers()[0].driver;
        writer.write(Iova(to), value, axi_id, 0b0010).unwrap();
        self.settle();
        let status = writer.status();
        assert!(status.done());
        !status.error()
    }

    /// The events since the last time.
    pub fn events(&self) -> Vec<Event> {
        let (events, lost) = self.machine().tracer().take();
        assert_eq!(lost, 0);
        events
    }

    pub fn faults(&self) -> Vec<RoutedFault> {
        let batch = self.system.core().take_faults();
        assert_eq!(batch.lost, 0);
        batch.faults
    }

    /// The one fault since the last time.
    pub fn fault(&self) -> RoutedFault {
        let faults = self.faults();
        let [fault] = faults.as_slice() else { panic!("{faults:#?}") };
        fault.clone()
    }

    /// Asserts that nothing faulted.
    pub fn no_faults(&self) {
        let faults = self.faults();
        assert!(faults.is_empty(), "{faults:#?}");
    }

    /// Asserts that a copy through the channel works and arrives.
    pub fn works(&self, name: &str, to: (u64, u64), from: (u64, u64), len: usize) {
        let mut random = Random(to.0 ^ from.0.rotate_left(32) ^ len as u64 | 1);
        let data: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        self.put(from.1, &data);
        self.put(to.1, &vec![0xee; len]);
        let done = self.copy(name, to.0, from.0, len as u64);
        assert_eq!(done.result, Ok(()), "{name}: {:?}", self.faults());
        assert!(self.get(to.1, len) == data, "{name}: other bytes arrived");
    }

    /// Asserts that a copy of one word fails, for this reason and at this address, and changes nothing.
    pub fn refused(&self, name: &str, to: (u64, u64), from: u64, reason: FaultReason, at: u64) {
        self.put(to.1, &[0xee; 4]);
        let done = self.copy(name, to.0, from, 4);
        assert!(done.result.is_err(), "{name}: {done:?}");
        assert_eq!((done.transferred, done.residue), (0, 4));
        let fault = self.fault();
        assert_eq!((fault.report.reason, fault.report.iova), (reason, Iova(at)), "{}", fault.report);
        assert_eq!(self.get(to.1, 4), [0xee; 4]);
    }
}

pub fn map(domain: &Domain, iova: u64, pa: u64, len: u64) {
    domain.map(Iova(iova), Pa(pa), len, Prot::RW.noexec()).unwrap();
}

pub fn segment(address: u64, len: u64) -> Segment {
    Segment { address: Iova(address), len }
}
