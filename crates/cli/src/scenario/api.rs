//! What scripts can call. See CONTRIBUTING for the list with examples.

use std::rc::Rc;
use std::sync::Arc;

use portcullis_arch::{Access, Attributes, Iova, Pa, StreamId};
use portcullis_board::sim::Memory;
use portcullis_board::system::{Channel, Writer};
use portcullis_bus::Initiator;
use portcullis_drivers::ops::{DomainSpec, FaultModel, Paging, StreamOverrides};
use portcullis_drivers::zdma::{Cookie, Progress};
use portcullis_explain::story;
use portcullis_hal::{DmaMemory, Mmio};
use portcullis_iommu::{
    AddressSpace, BindOptions, DeviceId, Domain, FaultReport, FaultResponse, Process, ProcessConfig, Prot,
};
use rhai::{Array, Dynamic, Engine, EvalAltResult, Map};

use super::Context;
use super::world::{BootRequest, World};
use crate::output::Item;

type Result<T> = std::result::Result<T, Box<EvalAltResult>>;

fn fail<T>(message: impl ToString) -> Result<T> {
    Err(message.to_string().into())
}

/// A booted board.
#[derive(Clone)]
struct Board(Rc<World>, Rc<Context>);

/// A DMA channel or PL writer.
#[derive(Clone)]
struct EngineHandle {
    board: Board,
    name: String,
}

#[derive(Clone)]
struct DomainHandle {
    domain: Arc<Domain>,
}

#[derive(Clone)]
struct ProcessHandle {
    board: Board,
    process: Arc<Process<Memory>>,
}

/// A transfer that was started.
#[derive(Clone)]
struct Started {
    engine: EngineHandle,
    cookie: Cookie,
}

fn address(value: i64) -> u64 {
    value as u64
}

fn length(value: i64) -> Result<usize> {
    match usize::try_from(value) {
        Ok(n) if n <= 1 << 30 => Ok(n),
        _ => fail(format!("{value} is no length of at most 1 GiB")),
    }
}

impl Board {
    fn settle(&self) -> Result<()> {
        self.0.settle(&self.1).or_else(fail)
    }

    fn device(&self, name: &str) -> Result<DeviceId> {
        match self.0.system.device(name) {
            Some(d) => Ok(d),
            None => fail(format!("{name} is not behind the SMMU: its device-tree node has no iommus")),
        }
    }

    fn alloc(&self, spec: DomainSpec, model: FaultModel) -> Result<DomainHandle> {
        let Some((instance, _)) = self.0.system.smmu() else {
            return fail("this board has no SMMU in use");
        };
        let domain = self.0.system.core().alloc_domain_with(instance, spec, model).or_else(fail)?;
        Ok(DomainHandle { domain })
    }

    fn domain(&mut self, kind: &str) -> Result<DomainHandle> {
        let paging = Paging::default();
        let (spec, model) = match kind {
            "stage1" => (DomainSpec::Stage1(paging), FaultModel::default()),
            "stage2" => (DomainSpec::Stage2(paging), FaultModel::default()),
            "stall" => {
                let stall = FaultModel { stall: true, ..FaultModel::default() };
                let handle = self.alloc(DomainSpec::Stage1(paging), stall)?;
                // The script decides, with `resume`.
                handle.domain.set_fault_handler(Some(Arc::new(|_: &FaultReport| FaultResponse::Deferred)));
                return Ok(handle);
            }
            "identity" => (DomainSpec::Identity, FaultModel::default()),
            "blocked" => (DomainSpec::Blocked, FaultModel::default()),
            other => {
                return fail(format!(
                    "there is no kind of domain {other:?}; there are stage1, stage2, stall, identity, blocked"
                ));
            }
        };
        self.alloc(spec, model)
    }

    fn nested(&mut self, parent: DomainHandle) -> Result<DomainHandle> {
        let domain = self.0.system.core().nested_domain(&parent.domain, Paging::default()).or_else(fail)?;
        Ok(DomainHandle { domain })
    }

    fn attach(&mut self, engine: EngineHandle, domain: DomainHandle) -> Result<()> {
        let device = self.device(&engine.name)?;
        self.0.system.core().attach_device(device, &domain.domain).or_else(fail)?;
        if let Some(channel) = self.0.system.channel(&engine.name)
            && domain.domain.input_range().is_some()
        {
            self.0.system.map_descriptors(channel, &domain.domain).or_else(fail)?;
        }
        self.0.drain(&self.1);
        Ok(())
    }

    fn detach(&mut self, engine: EngineHandle) -> Result<()> {
        let device = self.device(&engine.name)?;
        self.0.system.core().detach_device(device).or_else(fail)?;
        self.0.drain(&self.1);
        Ok(())
    }

    fn overrides(&mut self, engine: EngineHandle, map: Map) -> Result<()> {
        let device = self.device(&engine.name)?;
        let mut overrides = StreamOverrides::default();
        for (key, value) in map {
            let on = value.as_bool().ok();
            match (key.as_str(), on) {
                ("instruction", on @ Some(_)) => overrides.instruction = on,
                ("privileged", on @ Some(_)) => overrides.privileged = on,
                _ => {
                    return fail(format!(
                        "overrides: {key} is not instruction or privileged with true or false"
                    ));
                }
            }
        }
        self.0.system.core().set_overrides(device, overrides).or_else(fail)
    }

    fn process(&mut self, options: Map) -> Result<ProcessHandle> {
        let mut config = ProcessConfig::default();
        for (key, value) in options {
            match (key.as_str(), value.as_int().ok().and_then(|v| u8::try_from(v).ok()), value.as_bool().ok())
            {
                ("va_bits", Some(v), _) => config.va_bits = v,
                ("pa_bits", Some(v), _) => config.pa_bits = v,
                ("coherent", _, Some(v)) => config.coherent_walk = v,
                _ => {
                    return fail(format!(
                        "process: {key} is not va_bits, pa_bits or coherent, or its value is wrong"
                    ));
                }
            }
        }
        let process = Process::new(self.0.system.machine().dma_memory(), config).or_else(fail)?;
        Ok(ProcessHandle { board: self.clone(), process })
    }

    fn bind(&mut self, engine: EngineHandle, process: ProcessHandle, changes: Map) -> Result<DomainHandle> {
        let device = self.device(&engine.name)?;
        let mut options = BindOptions::default();
        if !changes.is_empty() {
            let Some(mut root) = process.process.table_root() else { return fail("the process has exited") };
            for (key, value) in changes {
                let number = value.as_int().ok();
                match (key.as_str(), number) {
                    ("t0sz", Some(v)) => root.t0sz = u8::try_from(v).or_else(fail)?,
                    ("ips", Some(v)) => root.ips = u8::try_from(v).or_else(fail)?,
                    ("ttbr0", Some(v)) => root.ttbr0 = Pa(address(v)),
                    _ => return fail(format!("bind: {key} is not t0sz, ips or ttbr0 with a number")),
                }
            }
            options.root = Some(root);
        }
        let domain =
            self.0.system.core().bind_with(device, process.process.clone(), options).or_else(fail)?;
        self.0.drain(&self.1);
        Ok(DomainHandle { domain })
    }

    fn unbind(&mut self, engine: EngineHandle) -> Result<()> {
        let device = self.device(&engine.name)?;
        self.0.system.core().unbind(device).or_else(fail)
    }

    fn resume(&mut self, domain: DomainHandle, retry: bool) -> Result<()> {
        let (Some((instance, _)), Some(bank)) = (self.0.system.smmu(), domain.domain.bank()) else {
            return fail("this domain has no context bank");
        };
        let response = if retry { FaultResponse::Resolved } else { FaultResponse::Terminate };
        self.0.system.core().resume_stalled(instance, bank, response).or_else(fail)?;
        self.settle()
    }

    fn read(&mut self, pa: i64, bytes: usize) -> Result<u64> {
        let mut buf = [0; 8];
        self.0
            .system
            .machine()
            .cpu_read(Pa(address(pa)), &mut buf[..bytes])
            .or_else(|e| fail(format!("{pa:#x}: {e}")))?;
        self.0.drain(&self.1);
        Ok(u64::from_le_bytes(buf))
    }

    fn write(&mut self, pa: i64, value: u64, bytes: usize) -> Result<()> {
        let done = self.0.system.machine().cpu_write(Pa(address(pa)), &value.to_le_bytes()[..bytes]);
        done.or_else(|e| fail(format!("{pa:#x}: {e}")))
    }

    fn fill32(&mut self, pa: i64, value: i64, len: i64) -> Result<()> {
        let bytes: Vec<u8> =
            (value as u32).to_le_bytes().iter().copied().cycle().take(length(len)?).collect();
        self.0.system.machine().cpu_write(Pa(address(pa)), &bytes).or_else(|e| fail(format!("{pa:#x}: {e}")))
    }

    /// How many 32-bit words of a range hold a value, as the CPU reads them.
    fn count32(&mut self, pa: i64, value: i64, len: i64) -> Result<i64> {
        let mut bytes = vec![0; length(len)?];
        self.0
            .system
            .machine()
            .cpu_read(Pa(address(pa)), &mut bytes)
            .or_else(|e| fail(format!("{pa:#x}: {e}")))?;
        self.0.drain(&self.1);
        let words = bytes.chunks_exact(4).filter(|w| **w == (value as u32).to_le_bytes());
        Ok(words.count() as i64)
    }

    fn clean(&mut self, pa: i64, len: i64) -> Result<()> {
        self.0.system.machine().dma_memory().clean(Pa(address(pa)), length(len)?);
        Ok(())
    }

    fn invalidate(&mut self, pa: i64, len: i64) -> Result<()> {
        self.0.system.machine().dma_memory().invalidate(Pa(address(pa)), length(len)?);
        Ok(())
    }

    fn smmu_register(&self) -> Result<portcullis_board::sim::Registers> {
        self.0.system.machine().smmu_registers().map_or_else(|| fail("this board has no SMMU in use"), Ok)
    }

    fn explain(&mut self, engine: EngineHandle, iova: i64, access: &str) -> Result<String> {
        let access = match access {
            "read" => Access::Read,
            "write" => Access::Write,
            other => return fail(format!("{other:?} is not \"read\" or \"write\"")),
        };
        let machine = self.0.system.machine();
        let (Some(smmu), Some(slot)) = (machine.smmu(), machine.engine(&engine.name)) else {
            return fail("this board has no SMMU in use");
        };
        let from = Initiator::new(slot.stream).with_attrs(Attributes::DEVICE_DEFAULT);
        let story = story(&smmu.explain(from, Iova(address(iova)), access), None);
        let text = story.to_string();
        self.1.emit(Item::Explain { engine: engine.name, story });
        Ok(text)
    }

    fn owner(&mut self, stream: i64) -> Dynamic {
        let stream = StreamId(u32::try_from(stream).unwrap_or(u32::MAX));
        self.0.system.owner_of(stream).map_or(Dynamic::UNIT, Into::into)
    }
}

impl EngineHandle {
    fn channel(&self) -> Result<&Channel> {
        match self.board.0.system.channel(&self.name) {
            Some(c) => Ok(c),
            None => fail(format!("{} is no DMA channel", self.name)),
        }
    }
    fn writer(&self) -> Result<&Writer> {
        match self.board.0.system.writer(&self.name) {
            Some(w) => Ok(w),
            None => fail(format!("{} is no PL writer", self.name)),
        }
    }

    /// A transfer by the channel's registers.
    fn start(&mut self, dst: i64, src: i64, len: i64) -> Result<Started> {
        let len = u32::try_from(len).or_else(fail)?;
        let channel = self.channel()?;
        let cookie =
            channel.driver.start_simple(Iova(address(dst)), Iova(address(src)), len).or_else(fail)?;
        self.board.settle()?;
        Ok(Started { engine: self.clone(), cookie })
    }

    /// A transfer by a list of descriptors in memory.
    fn start_list(&mut self, dst: i64, src: i64, len: i64) -> Result<Started> {
        let channel = self.channel()?;
        let cookie = channel
            .driver
            .submit_memcpy(Iova(address(dst)), Iova(address(src)), address(len))
            .or_else(fail)?;
        channel.driver.issue_pending();
        self.board.settle()?;
        Ok(Started { engine: self.clone(), cookie })
    }

    fn write(&mut self, dst: i64, value: i64, axi_id: i64, cache: i64) -> Result<Map> {
        let (axi_id, cache) = (u8::try_from(axi_id).or_else(fail)?, u8::try_from(cache).or_else(fail)?);
        let writer = self.writer()?;
        writer.driver.write(Iova(address(dst)), value as u32, axi_id, cache).or_else(fail)?;
        self.board.settle()?;
        let status = writer.driver.status();
        let mut m = Map::new();
        m.insert("ok".into(), (status.done() && !status.error()).into());
        m.insert("stalled".into(), status.busy().into());
        let error =
            if status.error() { format!("AXI response {:?}", status.response()) } else { String::new() };
        m.insert("error".into(), error.into());
        Ok(m)
    }

    fn stream(&mut self) -> i64 {
        let slot = self.board.0.system.machine().engine(&self.name);
        slot.map_or(-1, |s| i64::from(s.stream.get()))
    }

    fn register(&self) -> Result<portcullis_board::sim::Registers> {
        let machine = self.board.0.system.machine();
        match machine.engine(&self.name) {
            Some(slot) => Ok(machine.engine_registers(slot)),
            None => fail(format!("there is no engine {}", self.name)),
        }
    }
}

impl Started {
    /// How it stands.
    fn result(&mut self) -> Result<Map> {
        let channel = self.engine.channel()?;
        let mut m = Map::new();
        let (ok, stalled, error, moved) = match channel.driver.progress(self.cookie) {
            Progress::Complete(c) => {
                let error = c.result.err().map(|e| e.to_string()).unwrap_or_default();
                (c.result.is_ok(), false, error, c.transferred)
            }
            Progress::Running { residue } => (false, true, format!("{residue} bytes wait"), 0),
            Progress::Queued => (false, true, "queued".into(), 0),
            Progress::Unknown => (false, false, "unknown transfer".into(), 0),
        };
        m.insert("ok".into(), ok.into());
        m.insert("stalled".into(), stalled.into());
        m.insert("error".into(), error.into());
        m.insert("moved".into(), (moved as i64).into());
        Ok(m)
    }
}

impl DomainHandle {
    fn map(&mut self, iova: i64, pa: i64, len: i64, prot: &str) -> Result<()> {
        let prot = parse_prot(prot)?;
        self.domain.map(Iova(address(iova)), Pa(address(pa)), address(len), prot).or_else(fail)
    }
    fn unmap(&mut self, iova: i64, len: i64) -> Result<i64> {
        self.domain.unmap(Iova(address(iova)), address(len)).map(|n| n as i64).or_else(fail)
    }
    fn protect(&mut self, iova: i64, len: i64, prot: &str) -> Result<()> {
        self.domain.protect(Iova(address(iova)), address(len), parse_prot(prot)?).or_else(fail)
    }
    fn phys(&mut self, iova: i64) -> Dynamic {
        self.domain.iova_to_phys(Iova(address(iova))).map_or(Dynamic::UNIT, |p| (p.get() as i64).into())
    }
    fn bank(&mut self) -> i64 {
        self.domain.bank().map_or(-1, i64::from)
    }
}

/// "r", "w", "rw", with "x" for executable and "+cached", "+device", "+privileged" behind.
fn parse_prot(text: &str) -> Result<Prot> {
    let mut parts = text.split('+');
    let access = parts.next().unwrap_or_default();
    if access.is_empty() || !access.chars().all(|c| "rwx".contains(c)) {
        return fail(format!(
            "{text:?} is no permission: r, w, x letters, then +cached, +device, +privileged"
        ));
    }
    let mut prot = Prot::new(access.contains('r'), access.contains('w'));
    if !access.contains('x') {
        prot = prot.noexec();
    }
    for part in parts {
        prot = match part {
            "cached" => prot.cached(),
            "device" => prot.device(),
            "privileged" => prot.privileged(),
            other => return fail(format!("{other:?} is not cached, device or privileged")),
        };
    }
    Ok(prot)
}

impl ProcessHandle {
    fn mmap(&mut self, len: i64) -> Result<i64> {
        let va = self.process.mmap(address(len), Prot::RW.noexec().cached()).or_else(fail)?;
        Ok(va.get() as i64)
    }
    fn mmap_at(&mut self, va: i64, len: i64) -> Result<()> {
        let prot = Prot::RW.noexec().cached();
        self.process.mmap_at(Iova(address(va)), address(len), prot).or_else(fail)
    }
    fn reserve(&mut self, len: i64) -> Result<i64> {
        let va = self.process.reserve(address(len), Prot::RW.noexec().cached()).or_else(fail)?;
        Ok(va.get() as i64)
    }
    fn fault_in(&mut self, va: i64) -> Result<bool> {
        self.process.fault_in(Iova(address(va))).or_else(fail)
    }
    fn munmap(&mut self, va: i64) -> Result<i64> {
        self.process.munmap(Iova(address(va))).map(|n| n as i64).or_else(fail)
    }
    fn read32(&mut self, va: i64) -> Result<i64> {
        let mut b = [0; 4];
        self.process.read(Iova(address(va)), &mut b).or_else(fail)?;
        // A read through a stale line is noticed by the machine.
        self.board.0.system.machine().step();
        self.board.0.drain(&self.board.1);
        Ok(i64::from(u32::from_le_bytes(b)))
    }
    fn write32(&mut self, va: i64, value: i64) -> Result<()> {
        self.process.write(Iova(address(va)), &(value as u32).to_le_bytes()).or_else(fail)
    }
    fn clean(&mut self, va: i64, len: i64) -> Result<()> {
        self.process.clean(Iova(address(va)), length(len)?).or_else(fail)
    }
    fn invalidate(&mut self, va: i64, len: i64) -> Result<()> {
        self.process.invalidate(Iova(address(va)), length(len)?).or_else(fail)
    }
    fn phys(&mut self, va: i64) -> Dynamic {
        self.process.lookup(Iova(address(va))).map_or(Dynamic::UNIT, |p| (p.get() as i64).into())
    }
    fn exit(&mut self) -> Result<()> {
        self.process.exit().or_else(fail)?;
        self.board.0.drain(&self.board.1);
        Ok(())
    }
}

/// Gives `engine` everything that scripts can call.
pub fn register(engine: &mut Engine, context: &Rc<Context>) {
    register_words(engine, context);
    register_board(engine, context);
    register_engines(engine);
    register_spaces(engine);
}

/// Words about the run: steps, remarks, expectations.
fn register_words(engine: &mut Engine, context: &Rc<Context>) {
    let c = context.clone();
    engine.register_fn("step", move |text: &str| {
        if let Some(world) = &*c.world.borrow() {
            let note = portcullis_board::sim::EventKind::Note(text.to_string());
            world.system.machine().tracer().push(0, note);
        }
        c.emit(Item::Step { text: text.into() });
    });
    let c = context.clone();
    engine.register_fn("say", move |text: &str| c.emit(Item::Say { text: text.into() }));
    let c = context.clone();
    let check = move |ok: bool, text: &str| {
        *c.checks.borrow_mut() += 1;
        if !ok {
            *c.failures.borrow_mut() += 1;
        }
        c.emit(Item::Check { ok, text: text.into() });
        ok
    };
    engine.register_fn("expect", check);
    let c = context.clone();
    engine.on_print(move |text| c.emit(Item::Say { text: text.into() }));
    engine.register_fn("hex", |value: i64| format!("{value:#x}"));
}

fn register_board(engine: &mut Engine, context: &Rc<Context>) {
    engine.register_type_with_name::<Board>("Board");
    let boot = |c: &Rc<Context>, map: Map| -> Result<Board> {
        let request = BootRequest::from_map(map).or_else(fail)?;
        if let Some(before) = c.world.take() {
            before.drain(c);
        }
        let world = World::boot(c, &request).or_else(fail)?;
        *c.world.borrow_mut() = Some(world.clone());
        Ok(Board(world, c.clone()))
    };
    let c = context.clone();
    engine.register_fn("boot", move || boot(&c, Map::new()));
    let c = context.clone();
    engine.register_fn("boot", move |map: Map| boot(&c, map));

    let one = |b: &mut Board, name: &str| -> Result<EngineHandle> {
        match b.0.system.machine().engine(name) {
            Some(e) => Ok(EngineHandle { board: b.clone(), name: e.name.to_string() }),
            None => fail(format!("there is no engine {name:?} on this board")),
        }
    };
    engine.register_fn("engine", one);
    engine.register_fn("channel", one);
    engine.register_fn("writer", one);
    engine.register_fn("channels", |b: &mut Board| -> Array {
        let make = |c: &Channel| Dynamic::from(EngineHandle { board: b.clone(), name: c.name.to_string() });
        b.0.system.channels().iter().map(make).collect()
    });
    engine.register_fn("domain", |b: &mut Board| b.domain("stage1"));
    engine.register_fn("domain", Board::domain);
    engine.register_fn("nested", Board::nested);
    engine.register_fn("attach", Board::attach);
    engine.register_fn("detach", Board::detach);
    engine.register_fn("overrides", Board::overrides);
    engine.register_fn("process", |b: &mut Board| b.process(Map::new()));
    engine.register_fn("process", Board::process);
    engine.register_fn("bind", |b: &mut Board, e: EngineHandle, p: ProcessHandle| b.bind(e, p, Map::new()));
    engine.register_fn("bind", Board::bind);
    engine.register_fn("unbind", Board::unbind);
    engine.register_fn("resume", Board::resume);
    engine.register_fn("settle", |b: &mut Board| b.settle());
    engine.register_fn("read32", |b: &mut Board, pa: i64| b.read(pa, 4).map(|v| v as i64));
    engine.register_fn("read64", |b: &mut Board, pa: i64| b.read(pa, 8).map(|v| v as i64));
    engine.register_fn("write32", |b: &mut Board, pa: i64, v: i64| b.write(pa, v as u64, 4));
    engine.register_fn("write64", |b: &mut Board, pa: i64, v: i64| b.write(pa, v as u64, 8));
    engine.register_fn("fill32", Board::fill32);
    engine.register_fn("count32", Board::count32);
    engine.register_fn("clean", Board::clean);
    engine.register_fn("invalidate", Board::invalidate);
    engine.register_fn("smmu_read", |b: &mut Board, at: i64| -> Result<i64> {
        Ok(i64::from(b.smmu_register()?.read32(length(at)?)))
    });
    engine.register_fn("smmu_write", |b: &mut Board, at: i64, value: i64| -> Result<()> {
        b.smmu_register()?.write32(length(at)?, value as u32);
        Ok(())
    });
    engine.register_fn("explain", Board::explain);
    engine.register_fn("owner", Board::owner);
    engine.register_fn("faults", |b: &mut Board| b.0.take_faults());
    engine.register_fn("stale_reads", |b: &mut Board| b.0.take_stale());
}

fn register_engines(engine: &mut Engine) {
    engine.register_type_with_name::<EngineHandle>("Engine");
    engine.register_get("name", |e: &mut EngineHandle| e.name.clone());
    engine.register_get("stream", EngineHandle::stream);
    engine.register_fn("start", EngineHandle::start);
    engine.register_fn("start_list", EngineHandle::start_list);
    engine.register_fn("copy", |e: &mut EngineHandle, dst: i64, src: i64, len: i64| {
        e.start(dst, src, len)?.result()
    });
    engine.register_fn("memcpy", |e: &mut EngineHandle, dst: i64, src: i64, len: i64| {
        e.start_list(dst, src, len)?.result()
    });
    engine.register_fn("write", |e: &mut EngineHandle, dst: i64, value: i64| e.write(dst, value, 0, 2));
    engine.register_fn("write", EngineHandle::write);
    engine.register_fn("register", |e: &mut EngineHandle, at: i64| -> Result<i64> {
        Ok(i64::from(e.register()?.read32(length(at)?)))
    });
    engine.register_type_with_name::<Started>("Transfer");
    engine.register_fn("result", Started::result);
}

fn register_spaces(engine: &mut Engine) {
    engine.register_type_with_name::<DomainHandle>("Domain");
    engine
        .register_fn("map", |d: &mut DomainHandle, iova: i64, pa: i64, len: i64| d.map(iova, pa, len, "rw"));
    engine.register_fn("map", DomainHandle::map);
    engine.register_fn("unmap", DomainHandle::unmap);
    engine.register_fn("protect", DomainHandle::protect);
    engine.register_fn("phys", DomainHandle::phys);
    engine.register_get("bank", DomainHandle::bank);
    engine.register_type_with_name::<ProcessHandle>("Process");
    engine.register_fn("mmap", ProcessHandle::mmap);
    engine.register_fn("mmap", ProcessHandle::mmap_at);
    engine.register_fn("reserve", ProcessHandle::reserve);
    engine.register_fn("fault_in", ProcessHandle::fault_in);
    engine.register_fn("munmap", ProcessHandle::munmap);
    engine.register_fn("read32", ProcessHandle::read32);
    engine.register_fn("write32", ProcessHandle::write32);
    engine.register_fn("clean", ProcessHandle::clean);
    engine.register_fn("invalidate", ProcessHandle::invalidate);
    engine.register_fn("clean_tables", |p: &mut ProcessHandle| p.process.clean_tables());
    engine.register_fn("phys", ProcessHandle::phys);
    engine.register_fn("exit", ProcessHandle::exit);
}
