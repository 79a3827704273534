//! Virtual machines: memory of their own, devices that the host gives them, a guest that runs.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use portcullis_arch::{Access, Iova, Ipa, Pa};
use portcullis_board::guest::aim::Aim;
use portcullis_board::guest::{BoardGuestMemory, BoardVm, Guest, new_vm};
use portcullis_drivers::dmaengine::Segment;
use portcullis_hal::DmaMemory as _;
use portcullis_iommu::dma::{DmaAttrs, DmaDevice, SgEntry, SgMapping};
use portcullis_iommu::{Process, ProcessConfig, Prot};
use portcullis_vfio::{AssignOptions, Assignment, Owner, Vm as _};
use rhai::{Array, Dynamic, Engine, Map};

use super::board::Board;
use super::proxy::{Looping, ProxyHandle, map};
use super::{Result, address, fail, length, number, word};
use crate::scenario::vms::Vms;

/// Bytes of a page that is aimed at.
const PAGE: u64 = 4096;
/// How long a transfer of a guest may take, in microseconds of simulated time.
const TIMEOUT_US: u64 = 20_000;
/// Bytes that are read or written in one piece.
const PIECE: usize = 64 << 10;

/// A virtual machine.
#[derive(Clone)]
pub struct VmHandle {
    board: Board,
    name: String,
    /// Gone when it has died: its memory is free when nobody holds it any more.
    vm: Rc<RefCell<Option<Arc<BoardVm>>>>,
    guest: Rc<RefCell<Option<Rc<Guest>>>>,
}

impl Board {
    fn vms(&self) -> &Vms {
        &self.world.vms
    }

    fn vm(&mut self, name: &str, bytes: i64, seed: i64) -> Result<VmHandle> {
        let vm = new_vm(&self.world.system, name, address(bytes), address(seed)).or_else(fail)?;
        let vm = Rc::new(RefCell::new(Some(vm)));
        Ok(VmHandle { board: self.clone(), name: name.to_string(), vm, guest: Rc::default() })
    }

    fn bind_driver(&mut self, device: &str, driver: &str) -> Result<()> {
        let result = self.world.system.os().registry().bind(device, driver);
        self.drain();
        result.or_else(fail)
    }
    fn unbind_driver(&mut self, device: &str) -> Result<()> {
        let result = self.world.system.os().registry().unbind(device);
        self.drain();
        result.or_else(fail)
    }
    fn driver_of(&mut self, device: &str) -> Result<String> {
        Ok(match self.world.system.os().registry().owner(device).or_else(fail)? {
            Owner::None => String::new(),
            Owner::Host(name) => name,
            Owner::Vfio => portcullis_vfio::VFIO_DRIVER.into(),
            Owner::Changing => "changing".into(),
        })
    }
    fn group(&mut self, device: &str) -> Result<i64> {
        let core = self.world.system.core();
        let Some(device) = core.find_device(device) else {
            return fail(format!("{device} is behind no SMMU"));
        };
        Ok(i64::from(core.device(device).or_else(fail)?.group.0))
    }

    /// Gives an engine to a machine, with its whole group.
    fn assign(&mut self, vm: VmHandle, engine: &str, options: Map) -> Result<()> {
        self.same(&vm.board)?;
        let mut assign = AssignOptions::default();
        for (key, value) in options {
            match (key.as_str(), value.as_bool().ok()) {
                ("nested", Some(on)) => assign.viommu = on,
                ("coherent", Some(on)) => assign.coherent = on,
                _ => return fail(format!("assign: {key} is not nested or coherent with true or false")),
            }
        }
        let os = self.world.system.os();
        if os.registry().owner(engine).or_else(fail)? == Owner::None {
            os.registry().bind(engine, portcullis_vfio::VFIO_DRIVER).or_else(fail)?;
        }
        let machine = vm.vm()?;
        let dynamic: Arc<dyn portcullis_vfio::Vm> = machine.clone();
        let assignment = os.passthrough().assign(engine, dynamic, assign);
        self.drain();
        self.vms().add(&machine, assignment.or_else(fail)?);
        Ok(())
    }

    /// Takes an engine back from its machine, and from the passthrough driver.
    fn release(&mut self, engine: &str) -> Result<()> {
        let os = self.world.system.os();
        let Some(assignment) = os.passthrough().find(engine) else {
            return fail(format!("no machine has {engine}"));
        };
        let result = os.passthrough().release(&assignment);
        self.vms().forget(&assignment);
        self.drain();
        result.or_else(fail)?;
        os.registry().unbind(engine).or_else(fail)
    }

    /// Takes back what dead machines had.
    fn reap(&mut self) -> Array {
        let results = self.world.system.os().passthrough().reap();
        self.drain();
        let each = |(device, vm, result): (String, String, std::result::Result<(), _>)| {
            let text = match &result {
                Ok(()) => "stopped, cleared, taken back".to_string(),
                Err(error) => portcullis_vfio::VfioError::to_string(error),
            };
            self.vms().forget_device(&device);
            Dynamic::from(map([
                ("device", device.into()),
                ("vm", vm.into()),
                ("ok", result.is_ok().into()),
                ("text", text.into()),
            ]))
        };
        results.into_iter().map(each).collect()
    }

    /// Lets every engine work so many steps, without anybody taking interrupts.
    fn work(&mut self, steps: i64) -> Result<()> {
        for _ in 0..number::<u32>("steps", steps)? {
            self.world.system.machine().step();
        }
        self.drain();
        Ok(())
    }

    /// Every page of the board's memory. There are more than a script's list holds.
    fn pages(&self) -> Vec<u64> {
        let regions = self.world.system.machine().memory().regions();
        regions.flat_map(|(base, size)| (base..base + size).step_by(PAGE as usize)).collect()
    }

    /// How many 32-bit words of these pages hold a value.
    fn count_in_pages(&mut self, pages: Array, value: i64) -> Result<i64> {
        let (value, mut found) = (word(value)?, 0);
        let memory = self.world.system.machine().dma_memory();
        let mut bytes = [0; PAGE as usize];
        for page in addresses(pages)? {
            memory.read(Pa(page), &mut bytes);
            found += bytes.chunks_exact(4).filter(|w| **w == value.to_le_bytes()).count();
        }
        Ok(found as i64)
    }

    /// Machine `vm` tries to write and to read each of the pages, and the other proxies go on with their loop test meanwhile.
    fn aim(&mut self, vm: VmHandle, pages: Vec<u64>, others: Array, bytes: i64) -> Result<Map> {
        self.same(&vm.board)?;
        let own: BTreeSet<u64> = vm.pages()?;
        let machine = vm.vm()?;
        let guest = vm.guest()?;
        let system = &self.world.system;
        let Some(aim) = Aim::new(system, &guest, 0) else { return fail("the machine has no engine to aim") };
        let engine = system.os().passthrough().assignments().into_iter().find_map(|a| {
            let here: Arc<dyn portcullis_vfio::Vm> = machine.clone();
            Arc::ptr_eq(a.vm(), &here).then(|| a.device().to_string())
        });
        let mut others: Vec<Looping> = others
            .into_iter()
            .filter_map(|p| p.try_cast::<ProxyHandle>())
            .map(|p| Ok(Looping::new(p.client, u32::MAX, length(bytes)?)))
            .collect::<Result<_>>()?;
        let (mut attempts, mut blocked, mut reported, mut undisturbed) = (0, 0, 0, 0);
        let mut first = true;
        self.drain();
        // What happens on the way is counted and not told, but for the first attempt.
        system.machine().tracer().mute(true);
        for page in pages.iter().filter(|page| !own.contains(page)) {
            for write in [true, false] {
                let access = if write { Access::Write } else { Access::Read };
                let attempt = aim.attempt(*page, Pa(*page), write);
                attempts += 1;
                blocked += i64::from(attempt.refused && !attempt.got_through);
                system.run_for(1000);
                let batch = system.core().take_faults();
                let hit = batch.faults.iter().find(|f| {
                    let there = f.report.iova.get() & !(PAGE - 1) == *page;
                    f.name == engine && there && f.report.access == access
                });
                reported += i64::from(hit.is_some());
                if let Some(fault) = hit.filter(|_| std::mem::take(&mut first)) {
                    self.world.tell_fault(&self.context, fault);
                }
                undisturbed += others.iter_mut().map(Looping::step).filter(|done| *done).count() as i64;
            }
        }
        system.machine().tracer().mute(false);
        drop(aim);
        self.drain();
        let disturbed = others.iter().filter(|l| l.error.is_some()).count() as i64;
        if let Some(error) = others.iter().find_map(|l| l.error.as_ref()) {
            self.context.emit(crate::output::Item::Say { text: error.clone() });
        }
        Ok(map([
            ("attempts", attempts.into()),
            ("blocked", blocked.into()),
            ("reported", reported.into()),
            ("owner", engine.unwrap_or_default().into()),
            ("undisturbed", undisturbed.into()),
            ("disturbed", disturbed.into()),
        ]))
    }
}

fn addresses(pages: Array) -> Result<Vec<u64>> {
    pages.into_iter().map(|p| p.as_int().map(address).or_else(|_| fail("a list of addresses"))).collect()
}

impl VmHandle {
    fn boot(&mut self) -> Result<()> {
        let assignments: Vec<Arc<Assignment>> = self.board.vms().of(&self.vm()?);
        let guest = Guest::boot(&self.board.world.system, &self.vm()?, &assignments);
        self.board.drain();
        *self.guest.borrow_mut() = Some(Rc::new(guest.or_else(fail)?));
        Ok(())
    }
    pub fn guest(&self) -> Result<Rc<Guest>> {
        match &*self.guest.borrow() {
            Some(guest) => Ok(guest.clone()),
            None => fail(format!("machine {} has not booted", self.name)),
        }
    }
    fn proxy(&mut self) -> Result<ProxyHandle> {
        let guest = self.guest()?;
        match guest.cores().first() {
            Some(core) => Ok(ProxyHandle { board: self.board.clone(), client: core.proxy.clone() }),
            None => fail(format!("machine {} has no engine", self.name)),
        }
    }
    fn engines(&mut self) -> Result<Array> {
        let guest = self.guest()?;
        let lines = |c: &portcullis_board::guest::GuestCore| -> Array {
            c.lines.iter().map(|l| i64::from(*l).into()).collect()
        };
        let each = |c: &portcullis_board::guest::GuestCore| {
            Dynamic::from(map([
                ("name", c.name.clone().into()),
                ("base", (c.base as i64).into()),
                ("lines", Dynamic::from(lines(c))),
            ]))
        };
        Ok(guest.cores().iter().map(each).collect())
    }
    fn base(&mut self) -> Result<i64> {
        Ok(self.vm()?.guest_memory().range().0.get() as i64)
    }
    /// The pages of the board that are its memory.
    fn pages(&self) -> Result<BTreeSet<u64>> {
        let ranges = self.vm()?.memory().into_iter().flat_map(|r| r.backing);
        let pages = |r: portcullis_vfio::HostRange| (r.pa.get()..r.pa.get() + r.len).step_by(PAGE as usize);
        Ok(ranges.flat_map(pages).collect())
    }
    fn host_pages(&mut self) -> Result<Array> {
        Ok(self.pages()?.into_iter().map(|page| Dynamic::from(page as i64)).collect())
    }
    fn host_address(&mut self, ipa: i64) -> Result<i64> {
        match self.vm()?.guest_memory().host_address(Ipa(address(ipa))) {
            Some(pa) => Ok(pa.get() as i64),
            None => fail(format!("machine {} has no memory at {ipa:#x}", self.name)),
        }
    }
    fn alloc(&mut self, bytes: i64) -> Result<i64> {
        match self.vm()?.guest_memory().alloc(length(bytes)?, PAGE as usize) {
            Some(block) => Ok(block.pa.get() as i64),
            None => fail(format!("machine {} has no {bytes} bytes left", self.name)),
        }
    }
    fn fill32(&mut self, ipa: i64, value: i64, bytes: i64) -> Result<()> {
        let (vm, word) = (self.vm()?, word(value)?.to_le_bytes().repeat(PIECE / 4));
        let memory = vm.guest_memory();
        let (start, bytes) = (address(ipa), length(bytes)?);
        for at in (0..bytes).step_by(PIECE) {
            let n = PIECE.min(bytes - at);
            memory.write(Pa(start.wrapping_add(at as u64)), &word[..n]);
            memory.clean(Pa(start.wrapping_add(at as u64)), n);
        }
        Ok(())
    }
    fn count32(&mut self, ipa: i64, value: i64, bytes: i64) -> Result<i64> {
        let (value, vm) = (word(value)?.to_le_bytes(), self.vm()?);
        let memory = vm.guest_memory();
        let (start, bytes, mut found) = (address(ipa), length(bytes)?, 0);
        let mut piece = vec![0; PIECE];
        for at in (0..bytes).step_by(PIECE) {
            let n = PIECE.min(bytes - at);
            memory.invalidate(Pa(start.wrapping_add(at as u64)), n);
            memory.read(Pa(start.wrapping_add(at as u64)), &mut piece[..n]);
            found += piece[..n].chunks_exact(4).filter(|w| **w == value).count();
        }
        Ok(found as i64)
    }
    fn segment(at: i64, len: i64) -> Result<Segment> {
        Ok(Segment { address: Iova(address(at)), len: length(len)? as u64 })
    }
    /// Starts a transfer with the guest's driver and lets nothing run.
    fn begin(&mut self, to: i64, from: i64, len: i64) -> Result<()> {
        let guest = self.guest()?;
        let Some(core) = guest.cores().first() else { return fail("the machine has no engine") };
        let (to, from) = (Self::segment(to, len)?, Self::segment(from, len)?);
        core.stack.begin(&[to], &[from]).or_else(fail)?;
        Ok(())
    }
    /// A transfer with the guest's driver.
    fn copy(&mut self, to: i64, from: i64, len: i64) -> Result<Map> {
        let guest = self.guest()?;
        let Some(core) = guest.cores().first() else { return fail("the machine has no engine") };
        let (to, from) = (Self::segment(to, len)?, Self::segment(from, len)?);
        let ended = core.stack.begin(&[to], &[from]).or_else(fail)?.wait(&**guest.clock(), TIMEOUT_US);
        self.board.drain();
        Ok(super::engine::result(
            ended.is_ok(),
            false,
            ended.as_ref().err().map(ToString::to_string).unwrap_or_default(),
            ended.unwrap_or(0),
        ))
    }
    /// Receives without anybody sending.
    fn receive(&mut self, to: i64, len: i64) -> Result<Map> {
        let guest = self.guest()?;
        let Some(core) = guest.cores().first() else { return fail("the machine has no engine") };
        let ended = core.stack.receive(&[Self::segment(to, len)?], &**guest.clock(), TIMEOUT_US);
        self.board.drain();
        Ok(super::engine::result(
            ended.is_ok(),
            false,
            ended.as_ref().err().map(ToString::to_string).unwrap_or_default(),
            ended.unwrap_or(0),
        ))
    }
    /// It dies, and nobody here holds it any more.
    fn kill(&mut self) -> Result<()> {
        self.vm()?.kill();
        *self.guest.borrow_mut() = None;
        *self.vm.borrow_mut() = None;
        self.board.drain();
        Ok(())
    }
    fn vm(&self) -> Result<Arc<BoardVm>> {
        match &*self.vm.borrow() {
            Some(vm) => Ok(vm.clone()),
            None => fail(format!("machine {} is dead", self.name)),
        }
    }
}

/// A process of a guest.
#[derive(Clone)]
struct GuestProcess {
    vm: VmHandle,
    process: Arc<Process<BoardGuestMemory>>,
}

/// A buffer of a process that the guest's engine may use.
#[derive(Clone)]
struct Given {
    device: DmaDevice<BoardGuestMemory>,
    list: Rc<RefCell<Option<SgMapping>>>,
    pieces: i64,
}

impl VmHandle {
    /// A user process in the guest, with page tables in the guest's memory.
    fn process(&mut self) -> Result<GuestProcess> {
        let memory = self.vm()?.guest_memory().clone();
        let process = Process::new(memory, ProcessConfig::default()).or_else(fail)?;
        Ok(GuestProcess { vm: self.clone(), process })
    }
    fn dma(&self) -> Result<DmaDevice<BoardGuestMemory>> {
        let guest = self.guest()?;
        match guest.cores().first() {
            Some(core) => Ok(core.stack.dma().clone()),
            None => fail(format!("machine {} has no engine", self.name)),
        }
    }
    /// The guest's kernel maps something for its engine, whatever it may be.
    fn map_raw(&mut self, iova: i64, ipa: i64, len: i64) -> Result<()> {
        let guest = self.guest()?;
        let Some(side) = guest.cores().first().and_then(|core| core.iommu.clone()) else {
            return fail(format!("machine {} has no IOMMU of its own", self.name));
        };
        let (iova, ipa, len) = (Iova(address(iova)), Pa(address(ipa)), length(len)? as u64);
        side.space.domain().map(iova, ipa, len, Prot::RW.noexec()).or_else(fail)
    }
    /// Faults that the guest's own IOMMU reported to it.
    fn faults(&mut self) -> Result<Array> {
        let guest = self.guest()?;
        guest.clock().take_interrupts();
        let Some(side) = guest.cores().first().and_then(|core| core.iommu.clone()) else {
            return Ok(Array::new());
        };
        let faults = side.core.take_faults().faults;
        Ok(faults.iter().map(|f| Dynamic::from(crate::scenario::reports::fault_map(f, None, 1))).collect())
    }
}

impl GuestProcess {
    fn mmap(&mut self, len: i64) -> Result<i64> {
        let prot = Prot::RW.noexec().cached();
        self.process.mmap(length(len)? as u64, prot).map(|va| va.get() as i64).or_else(fail)
    }
    fn fill32(&mut self, va: i64, value: i64, len: i64) -> Result<()> {
        let bytes = word(value)?.to_le_bytes().repeat(length(len)? / 4);
        self.process.write(Iova(address(va)), &bytes).or_else(fail)
    }
    fn count32(&mut self, va: i64, value: i64, len: i64) -> Result<i64> {
        let mut bytes = vec![0; length(len)?];
        self.process.read(Iova(address(va)), &mut bytes).or_else(fail)?;
        let value = word(value)?.to_le_bytes();
        Ok(bytes.chunks_exact(4).filter(|w| **w == value).count() as i64)
    }
    /// The guest's kernel makes a buffer of the process reachable for its engine.
    fn give(&mut self, va: i64, len: i64, way: &str) -> Result<Given> {
        let (start, len, direction) = (address(va), length(len)? as u64, super::dma::direction(way)?);
        let mut entries = Vec::new();
        for at in (0..len).step_by(PAGE as usize) {
            let va = Iova(start.wrapping_add(at));
            let Some(pa) = self.process.lookup(va) else { return fail(format!("nothing at {va:#x}")) };
            entries.push(SgEntry { pa, len: PAGE.min(len - at) });
        }
        let device = self.vm.dma()?;
        let list = device.map_sg(&entries, direction, DmaAttrs::NONE).or_else(fail)?;
        let pieces = entries.windows(2).filter(|w| w[0].pa.get() + w[0].len != w[1].pa.get()).count();
        Ok(Given { device, list: Rc::new(RefCell::new(Some(list))), pieces: pieces as i64 + 1 })
    }
}

impl Given {
    fn iova(&mut self) -> Result<i64> {
        match self.list.borrow().as_ref().and_then(SgMapping::start) {
            Some(iova) => Ok(iova.get() as i64),
            None => fail("it was taken back"),
        }
    }
    fn segments(&mut self) -> i64 {
        self.list.borrow().as_ref().map_or(0, |list| list.segments().len() as i64)
    }
    fn take_back(&mut self, way: &str) -> Result<()> {
        let Some(list) = self.list.borrow_mut().take() else { return fail("it was taken back") };
        self.device.unmap_sg(list, super::dma::direction(way)?, DmaAttrs::NONE).or_else(fail)
    }
}

pub fn register(engine: &mut Engine) {
    engine
        .register_type_with_name::<GuestProcess>("GuestProcess")
        .register_fn("mmap", GuestProcess::mmap)
        .register_fn("fill32", GuestProcess::fill32)
        .register_fn("count32", GuestProcess::count32)
        .register_fn("give", GuestProcess::give);
    engine
        .register_type_with_name::<Given>("Given")
        .register_get("iova", Given::iova)
        .register_get("pieces", |g: &mut Given| g.pieces)
        .register_get("segments", Given::segments)
        .register_fn("take_back", Given::take_back);
    engine
        .register_fn("process", VmHandle::process)
        .register_fn("map_raw", VmHandle::map_raw)
        .register_fn("faults", VmHandle::faults);
    engine
        .register_fn("vm", Board::vm)
        .register_fn("vm", |b: &mut Board, name: &str, bytes: i64| b.vm(name, bytes, 1))
        .register_fn("bind_driver", Board::bind_driver)
        .register_fn("unbind_driver", Board::unbind_driver)
        .register_fn("driver_of", Board::driver_of)
        .register_fn("group", Board::group)
        .register_fn("assign", Board::assign)
        .register_fn("assign", |b: &mut Board, vm: VmHandle, engine: &str| b.assign(vm, engine, Map::new()))
        .register_fn("release", Board::release)
        .register_fn("reap", Board::reap)
        .register_fn("work", Board::work)
        .register_fn("count_in_pages", Board::count_in_pages)
        .register_fn("aim", |b: &mut Board, vm: VmHandle, pages: Array, others: Array, bytes: i64| {
            b.aim(vm, addresses(pages)?, others, bytes)
        })
        .register_fn("aim_everywhere", |b: &mut Board, vm: VmHandle, others: Array, bytes: i64| {
            let pages = b.pages();
            b.aim(vm, pages, others, bytes)
        });
    engine
        .register_type_with_name::<VmHandle>("Vm")
        .register_get("name", |vm: &mut VmHandle| vm.name.clone())
        .register_get("base", VmHandle::base)
        .register_fn("boot", VmHandle::boot)
        .register_fn("proxy", VmHandle::proxy)
        .register_fn("engines", VmHandle::engines)
        .register_fn("host_pages", VmHandle::host_pages)
        .register_fn("host_address", VmHandle::host_address)
        .register_fn("alloc", VmHandle::alloc)
        .register_fn("fill32", VmHandle::fill32)
        .register_fn("count32", VmHandle::count32)
        .register_fn("begin", VmHandle::begin)
        .register_fn("copy", VmHandle::copy)
        .register_fn("receive", VmHandle::receive)
        .register_fn("kill", VmHandle::kill);
}
