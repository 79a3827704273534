//! The driver and the core on the model against a shadow of what they were told: random domains, processes and devices,
//! random DMA with and without translations that devices keep, on coherent and non-coherent hardware, with the SMMU saved
//! and restored into another one on the way. Every byte lands where the shadow says, or the access fails.

mod common;
mod smmuv3_rig;

use std::collections::BTreeMap;
use std::sync::Arc;

use portcullis_arch::{Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{DmaFault, DmaPort, StallState};
use portcullis_drivers::fault::{FaultReport, FaultResponse};
use portcullis_drivers::ops::{DomainOptions, FaultModel, MasterOptions, Paging, StreamMatch};
use portcullis_drivers::smmuv3::{DomainConfig, Options};
use portcullis_engines::{AtcConfig, AtcPort, AtcShared};
use portcullis_iommu::{
    BindOptions, DefaultDomain, DeviceId, Domain, DomainSpec, FwSpec, InstanceId, IommuCore, Process,
    ProcessConfig, Prot,
};
use portcullis_smmuv3::{Caps, Port, State};
use smmuv3_rig::{
    Bus, Driver, Mem, RAM, Random, Rig, caps, exact, from, from_substream, map, rw, stalling, write64,
};

/// Test pages in RAM, and addresses of domains.
const PAGES: u64 = 48;
const SLOTS: u64 = 24;
/// Where a domain's addresses begin; an identity domain has them too, as physical ones.
const AT: u64 = RAM;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapped {
    page: u64,
    write: bool,
}

struct Space {
    domain: Arc<Domain>,
    identity: bool,
    /// Slot to page.
    map: BTreeMap<u64, Mapped>,
    /// A nested domain's parent, in which everything of the test is mapped but the pages in here.
    below: Option<(Arc<Domain>, Vec<u64>)>,
}

impl Space {
    fn lookup(&self, slot: u64) -> Option<Mapped> {
        if self.identity {
            return Some(Mapped { page: slot, write: true });
        }
        let found = *self.map.get(&slot)?;
        let hidden = self.below.as_ref().is_some_and(|(_, hidden)| hidden.contains(&found.page));
        (!hidden).then_some(found)
    }
}

struct Owned {
    process: Arc<Process<Mem>>,
    /// Slot to what is allowed.
    map: BTreeMap<u64, bool>,
    exited: bool,
}

struct Device {
    id: DeviceId,
    stream: u32,
    /// Index of its domain; `None` after boot: blocked.
    main: Option<usize>,
    substreams: BTreeMap<usize, SubstreamId>,
    atc: Option<Arc<AtcShared>>,
    ats_on: bool,
    ported: Option<AtcPort<Port<Bus>>>,
    plain: Port<Bus>,
}

struct World {
    rig: Rig,
    driver: Arc<Driver>,
    core: IommuCore,
    instance: InstanceId,
    spaces: Vec<Space>,
    processes: Vec<Owned>,
    devices: Vec<Device>,
    /// Test memory as it should be.
    shadow: Vec<u8>,
    random: Random,
    reached: u64,
    refused: u64,
}

impl World {
    fn new(caps: Caps, seed: u64) -> Self {
        Self::with(caps, seed, false)
    }

    fn with(caps: Caps, seed: u64, el2: bool) -> Self {
        let bits = caps.ssid_bits.min(12);
        let coherent = caps.coherent;
        let rig = Rig::new(caps);
        let options = Options { coherent: Some(coherent), queue_log2: [7, 10, 6], el2, ..Rig::options() };
        let driver = Arc::new(rig.driver_with(options));
        let core = IommuCore::new(DefaultDomain::Blocked);
        let instance = core.register("smmu", driver.clone());
        let mut world = Self {
            rig,
            driver,
            core,
            instance,
            spaces: Vec::new(),
            processes: Vec::new(),
            devices: Vec::new(),
            shadow: vec![0; (PAGES * 0x1000) as usize],
            random: Random(seed),
            reached: 0,
            refused: 0,
        };
        for stream in [3, 4, 0x105, 0x106] {
            let ats = stream & 1 != 0;
            let options =
                MasterOptions { substream_bits: if stream == 4 { 0 } else { bits }, can_stall: false, ats };
            let spec = FwSpec { streams: vec![StreamMatch::exact(stream)] };
            let id = world.core.add_device_with("d", instance, &spec, &[], options).unwrap();
            let atc =
                ats.then(|| AtcShared::new(AtcConfig { pri: false, ats: false, ..AtcConfig::default() }));
            world.devices.push(Device {
                id,
                stream,
                main: None,
                substreams: BTreeMap::new(),
                atc,
                ats_on: false,
                ported: None,
                plain: world.rig.port(),
            });
        }
        world.plug();
        let spec = [
            DomainSpec::Stage1(Paging::default()),
            DomainSpec::Stage1(Paging::default()),
            DomainSpec::Stage2(Paging::default()),
            DomainSpec::Stage2(Paging::default()),
            DomainSpec::Identity,
        ];
        for spec in spec {
            let identity = matches!(spec, DomainSpec::Identity);
            let domain = world.core.alloc_domain(instance, spec).unwrap();
            world.spaces.push(Space { domain, identity, map: BTreeMap::new(), below: None });
        }
        let below = world.core.alloc_domain(instance, DomainSpec::Stage2(Paging::default())).unwrap();
        for page in 0..PAGES {
            below
                .map(Iova(0x100_0000 + page * 0x1000), Pa(RAM + page * 0x1000), 0x1000, world.prot(true))
                .unwrap();
        }
        let domain = world.core.nested_domain(&below, Paging::default()).unwrap();
        world.spaces.push(Space {
            domain,
            identity: false,
            map: BTreeMap::new(),
            below: Some((below, Vec::new())),
        });
        for _ in 0..4 {
            let process = world.process();
            world.processes.push(process);
        }
        world
    }

    fn coherent(&self) -> bool {
        self.rig.caps.coherent
    }

    fn prot(&self, write: bool) -> Prot {
        let prot = if write { Prot::RW } else { Prot::READ };
        if self.coherent() { prot.cached().noexec() } else { prot.noexec() }
    }

    fn process(&self) -> Owned {
        let config =
            ProcessConfig { coherent_walk: self.coherent(), pa_bits: 44, ..ProcessConfig::default() };
        let process = Process::new(self.rig.memory(), config).unwrap();
        Owned { process, map: BTreeMap::new(), exited: false }
    }

    /// New ports and translation caches' wires, onto the SMMU that there is.
    fn plug(&mut self) {
        for device in &mut self.devices {
            if let Some(atc) = &device.atc {
                self.rig.model().attach_ats(StreamId(device.stream), atc.clone());
                device.ported = Some(AtcPort::new(atc.clone(), self.rig.port()));
            }
            device.plain = self.rig.port();
        }
    }

    /// Another SMMU takes the place of the one there is, with its state.
    fn replace(&mut self) {
        let state = serde_json::to_string(&self.rig.model().save()).unwrap();
        let fresh = self.rig.another();
        fresh.restore(serde_json::from_str::<State>(&state).unwrap()).unwrap();
        self.rig.model().reset();
        *self.rig.registers.model.write().unwrap() = fresh;
        self.plug();
    }

    /// ATS is on where it can be, as software does it.
    fn enable_ats(&mut self, d: usize) {
        let device = &mut self.devices[d];
        if let Some(atc) = &device.atc {
            let translates = device.main.is_some_and(|m| !self.spaces[m].identity);
            let on = translates || !device.substreams.is_empty();
            if on != device.ats_on {
                atc.enable_ats(on);
                device.ats_on = on;
            }
        }
    }

    fn change(&mut self) {
        match self.random.below(20) {
            0..8 => {
                let s = self.random.below(self.spaces.len() as u64) as usize;
                if !self.spaces[s].identity {
                    self.change_map(s);
                }
            }
            8..11 => {
                let d = self.random.below(4) as usize;
                if self.random.below(8) == 0 {
                    self.core.detach_device(self.devices[d].id).unwrap();
                    self.devices[d].main = None;
                } else {
                    let s = self.random.below(self.spaces.len() as u64) as usize;
                    let result = self.core.attach_device(self.devices[d].id, &self.spaces[s].domain);
                    // Under stage 2 there is no place for substreams of the driver.
                    let stage2 = matches!(s, 2 | 3 | 5);
                    assert_eq!(
                        result.is_err(),
                        stage2 && !self.devices[d].substreams.is_empty(),
                        "{result:?}"
                    );
                    if result.is_ok() {
                        self.devices[d].main = Some(s);
                    }
                }
                self.enable_ats(d);
            }
            11..14 => self.bind(),
            14..18 => self.change_process(),
            18 => {
                let Some((below, hidden)) = &mut self.spaces[5].below else { panic!() };
                let page = self.random.below(PAGES);
                let ipa = Iova(0x100_0000 + page * 0x1000);
                match hidden.iter().position(|h| *h == page) {
                    Some(i) => {
                        hidden.remove(i);
                        let prot = if self.rig.caps.coherent { rw() } else { Prot::RW.noexec() };
                        below.map(ipa, Pa(RAM + page * 0x1000), 0x1000, prot).unwrap();
                    }
                    None => {
                        hidden.push(page);
                        assert_eq!(below.unmap(ipa, 0x1000).unwrap(), 0x1000);
                    }
                }
            }
            _ => self.replace(),
        }
    }

    fn change_map(&mut self, s: usize) {
        let start = self.random.below(SLOTS);
        let count = 1 + self.random.below(4).min(SLOTS - start - 1);
        let range = start..start + count;
        let (iova, len) = (Iova(AT + start * 0x1000), count * 0x1000);
        let write = self.random.below(3) > 0;
        let prot = self.prot(write);
        let space = &mut self.spaces[s];
        let there = range.clone().filter(|slot| space.map.contains_key(slot)).count() as u64;
        if there == 0 {
            let page = self.random.below(PAGES - count);
            let base = if space.below.is_some() { 0x100_0000 } else { RAM };
            space.domain.map(iova, Pa(base + page * 0x1000), len, prot).unwrap();
            for slot in range {
                space.map.insert(slot, Mapped { page: page + slot - start, write });
            }
        } else if there == count && self.random.below(3) == 0 {
            space.domain.protect(iova, len, prot).unwrap();
            for slot in range {
                space.map.get_mut(&slot).unwrap().write = write;
            }
        } else {
            assert_eq!(space.domain.unmap(iova, len).unwrap(), there * 0x1000);
            for slot in range {
                space.map.remove(&slot);
            }
        }
    }

    fn bind(&mut self) {
        let d = [0, 2, 3][self.random.below(3) as usize];
        let p = self.random.below(self.processes.len() as u64) as usize;
        let id = self.devices[d].id;
        if let Some(substream) = self.devices[d].substreams.remove(&p) {
            self.core.unbind_substream(id, substream).unwrap();
        } else if !self.processes[p].exited {
            let process = self.processes[p].process.clone();
            let result = self.core.bind_substream(id, process, BindOptions::default());
            let stage2 = self.devices[d].main.is_some_and(|m| matches!(m, 2 | 3 | 5));
            assert_eq!(result.is_err(), stage2, "{:?}", result.err());
            if let Ok((substream, _)) = result {
                self.devices[d].substreams.insert(p, substream);
            }
        }
        self.enable_ats(d);
    }

    fn change_process(&mut self) {
        let p = self.random.below(self.processes.len() as u64) as usize;
        if self.processes[p].exited {
            if self.devices.iter().all(|d| !d.substreams.contains_key(&p)) {
                self.processes[p] = self.process();
            }
            return;
        }
        if self.random.below(12) == 0 {
            self.processes[p].process.exit().unwrap();
            self.processes[p].exited = true;
            self.processes[p].map.clear();
            return;
        }
        let slot = self.random.below(SLOTS);
        let va = Iova(AT + slot * 0x1000);
        let write = self.random.below(3) > 0;
        let prot = self.prot(write);
        let owned = &mut self.processes[p];
        if owned.map.remove(&slot).is_some() {
            owned.process.munmap(va).unwrap();
        } else {
            owned.process.mmap_at(va, 0x1000, prot).unwrap();
            if !self.rig.caps.coherent {
                // Data are the process's own business.
                owned.process.clean(va, 0x1000).unwrap();
            }
            owned.map.insert(slot, write);
        }
    }

    /// One access of eight bytes by some device.
    fn access(&mut self) {
        let d = self.random.below(4) as usize;
        let slot = self.random.below(SLOTS);
        let offset = self.random.below(0x200) * 8;
        let write = self.random.below(2) == 0;
        let value = self.random.next();
        let device = &mut self.devices[d];
        let nth = self.random.below(device.substreams.len() as u64 + 1) as usize;
        let bound = device.substreams.iter().nth(nth).map(|(p, s)| (*p, *s));
        let stray = device.stream != 4 && self.random.below(20) == 0;
        let from = match bound {
            _ if stray => from_substream(device.stream, 0xf1),
            Some((_, substream)) => from_substream(device.stream, substream.get()),
            None => from(device.stream),
        };
        // With its cache, or past it as a device that does not use it now.
        let port: &mut dyn DmaPort = match &mut device.ported {
            Some(port) if self.random.below(4) > 0 => port,
            _ => &mut device.plain,
        };
        let at = Iova(AT + slot * 0x1000 + offset);
        let mut bytes = value.to_le_bytes();
        let result = if write { port.write(from, at, &bytes) } else { port.read(from, at, &mut bytes) };
        let main = device.main;
        let (allowed, place) = match bound {
            _ if stray => (false, None),
            Some((p, _)) => {
                let found = self.processes[p].map.get(&slot).copied();
                (found.is_some_and(|w| w || !write), found.map(|_| (Some(p), 0)))
            }
            None => {
                let found = main.and_then(|m| self.spaces[m].lookup(slot));
                (found.is_some_and(|f| f.write || !write), found.map(|f| (None, f.page)))
            }
        };
        let what = || format!("device {d} {from:?} slot {slot} write {write} main {main:?} bound {bound:?}");
        assert_eq!(result.is_ok(), allowed, "{}: {result:?}", what());
        if !allowed {
            self.refused += 1;
            return;
        }
        self.reached += 1;
        let Some((process, page)) = place else { panic!() };
        let mut there = [0; 8];
        match process {
            Some(p) => {
                let process = &self.processes[p].process;
                if !self.coherent() {
                    process.invalidate(at, 8).unwrap();
                }
                process.read(at, &mut there).unwrap();
            }
            None => {
                let place = (page * 0x1000 + offset) as usize;
                if write {
                    self.shadow[place..place + 8].copy_from_slice(&bytes);
                }
                there.copy_from_slice(&self.shadow[place..place + 8]);
            }
        }
        assert_eq!(bytes, there, "{}", what());
    }

    fn check_memory(&self) {
        let mut seen = vec![0; self.shadow.len()];
        self.rig.ram.invalidate(Pa(RAM), seen.len());
        portcullis_bus::Memory::read(&self.rig.ram, Pa(RAM), Default::default(), &mut seen).unwrap();
        let first = seen.iter().zip(&self.shadow).position(|(a, b)| a != b);
        assert_eq!(first, None, "something was written that should not have been");
        if let Some(cache) = self.rig.ram.cpu_cache() {
            let (stale, more) = cache.take_reports();
            assert!(stale.is_empty() && more == 0, "{stale:?}");
        }
    }

    fn run(&mut self, steps: u64) {
        for step in 0..steps {
            self.change();
            for _ in 0..8 {
                self.access();
            }
            if step % 32 == 0 {
                self.check_memory();
                self.core.handle_irq(self.instance).unwrap();
                self.core.take_faults();
                assert_eq!(self.rig.reg(0x60), self.rig.reg(0x64));
            }
        }
        self.check_memory();
        assert!(self.reached > steps && self.refused > steps, "{} {}", self.reached, self.refused);
        assert_eq!(self.driver.waiting(), (0, 0));
    }
}

#[test]
fn every_byte_lands_where_it_should_or_the_access_fails() {
    for seed in 1..=6 {
        World::new(caps(), seed * 0x1234_5677).run(1500);
    }
}

#[test]
fn the_same_without_ranges_messages_and_large_ids() {
    for seed in 1..=2 {
        let caps = Caps {
            msi: false,
            ril: false,
            revision: 1,
            fwb: false,
            bbml: 0,
            e0pd: false,
            ptwnnc: false,
            asid16: false,
            vmid16: false,
            cd2l: false,
            ..caps()
        };
        World::new(caps, seed * 0x777_1235).run(1200);
    }
}

#[test]
fn the_same_where_nothing_snoops_and_no_descriptor_is_ever_stale() {
    for seed in 1..=4 {
        World::new(Caps { coherent: false, ..caps() }, seed * 0x9_8765_4321).run(800);
    }
}

#[test]
fn a_saved_smmu_goes_on_elsewhere_with_its_stalls() {
    let rig = Rig::new(caps());
    let driver = rig.driver();
    let handler = Arc::new(|_: &FaultReport| FaultResponse::Deferred);
    let model = FaultModel { stall: true, ..FaultModel::default() };
    let options = DomainOptions { fault_model: model, handler: Some(handler) };
    let domain = driver.new_domain(DomainConfig::Stage1(Paging::default()), options).unwrap();
    let mut tags = Vec::new();
    for stream in 1..=40 {
        let master = driver.add_master(&exact(stream), stalling()).unwrap();
        driver.attach(&master, &domain).unwrap();
        let mut port = rig.port();
        let error = write64(&mut port, from(stream), AT, 1).unwrap_err();
        let DmaFault::Stalled(tag) = error.fault else { panic!("{error}") };
        tags.push((stream, tag));
        if stream == 20 {
            driver.handle_irq();
        }
    }
    // Half of the stalls have been seen by the driver.
    let state = serde_json::to_string(&rig.model().save()).unwrap();
    let fresh = rig.another();
    fresh.restore(serde_json::from_str::<State>(&state).unwrap()).unwrap();
    *rig.registers.model.write().unwrap() = fresh;
    driver.handle_irq();
    assert_eq!(driver.waiting().0, 40);
    map(&domain, AT, RAM, 0x1000);
    let faults = driver.take_faults().faults;
    assert_eq!(faults.len(), 40);
    for (i, report) in faults.iter().enumerate() {
        let response = if i % 3 == 0 { FaultResponse::Terminate } else { FaultResponse::Resolved };
        driver.answer(report, response).unwrap();
        driver.commands().issue_sync(&[]).unwrap();
        let stream = report.stream.unwrap().get();
        let (_, tag) = *tags.iter().find(|(s, _)| *s == stream).unwrap();
        let mut port = rig.port();
        let state = port.stall_state(tag);
        if i % 3 == 0 {
            assert_eq!(state, StallState::Terminated { abort: true });
        } else {
            assert_eq!(state, StallState::Retry);
            assert_eq!(write64(&mut port, from(stream), AT, 9), Ok(()));
        }
    }
    assert!(rig.model().stalled().is_empty());
    assert_eq!(domain.unmap(Iova(AT), 0x1000), Ok(0x1000));
}

#[test]
fn the_same_in_the_el2_regime_with_two_level_tables_and_with_a_linear_stream_table() {
    for seed in 1..=2 {
        World::with(Caps { ssid_bits: 12, ..caps() }, seed * 0x51_8151_8151, true).run(1000);
        World::with(Caps { sid_bits: 9, two_level_streams: true, ..caps() }, seed * 0x88_1818, false)
            .run(500);
    }
}

#[test]
#[ignore = "a minute"]
fn the_same_for_very_long() {
    for seed in 1..=60 {
        World::with(caps(), seed * 0x1111_7771, seed % 3 == 0).run(4000);
        World::new(Caps { coherent: false, ssid_bits: 12, ..caps() }, seed * 0x3_9b1d_7775).run(2000);
    }
}

/// The board where nothing snoops, with its own engines and record.
#[test]
fn the_non_coherent_board_never_reads_a_stale_descriptor() {
    use portcullis_board::sim::EventKind;
    let board = common::Board::of(common::smmuv3_noncoherent(), true);
    let mut random = Random(31);
    let domains = [board.stage1(), board.stage2(), board.stage1()];
    let mut mapped = [const { BTreeMap::<u64, u64>::new() }; 3];
    let names = ["dma0", "dma1", "dma2", "dma3"];
    let mut of = [None; 4];
    for _ in 0..300 {
        match random.below(4) {
            0 => {
                let (n, d) = (random.below(4) as usize, random.below(3) as usize);
                board.attach(names[n], &domains[d]);
                of[n] = Some(d);
            }
            1 | 2 => {
                let (d, slot) = (random.below(3) as usize, random.below(16));
                let at = 0x1000_0000 + slot * 0x1000;
                if mapped[d].remove(&slot).is_some() {
                    domains[d].unmap(Iova(at), 0x1000).unwrap();
                } else {
                    let pa = common::RAM_V3 + random.below(64) * 0x1000;
                    domains[d].map(Iova(at), Pa(pa), 0x1000, Prot::RW.noexec()).unwrap();
                    mapped[d].insert(slot, pa);
                }
            }
            _ => {
                let n = random.below(4) as usize;
                let Some(d) = of[n] else { continue };
                let (to, source) = (random.below(16), random.below(16));
                let address = |slot: u64| 0x1000_0000 + slot * 0x1000;
                let expected = mapped[d].contains_key(&to) && mapped[d].contains_key(&source);
                if expected {
                    board.put(mapped[d][&source], &[slot_byte(source); 64]);
                }
                let done = board.copy(names[n], address(to) + 0x40, address(source), 64);
                assert_eq!(done.result.is_ok(), expected, "{done:?}");
                if expected {
                    assert_eq!(board.get(mapped[d][&to] + 0x40, 64), [slot_byte(source); 64]);
                }
                board.faults();
            }
        }
        assert!(board.events().iter().all(|e| !matches!(e.kind, EventKind::Stale(_))));
    }
}

fn slot_byte(slot: u64) -> u8 {
    slot as u8 + 1
}
