//! A booted board.

use std::rc::Rc;
use std::sync::Arc;

use portcullis_arch::smmuv3::Command;
use portcullis_arch::{Access, Attributes, Iova, Pa, StreamId, SubstreamId};
use portcullis_board::sim::{Explanation, Registers};
use portcullis_board::system::{Channel, SmmuV3};
use portcullis_bus::Initiator;
use portcullis_drivers::ops::{DomainSpec, FaultModel, Paging, StreamOverrides};
use portcullis_explain::Seen;
use portcullis_hal::{DmaMemory, Mmio};
use portcullis_iommu::{BindOptions, DeviceId, FaultReport, FaultResponse, Process, ProcessConfig};
use rhai::{Array, Dynamic, Engine, Map};

use super::boot::BootRequest;
use super::engine::EngineHandle;
use super::space::{DomainHandle, ProcessHandle};
use super::{Result, address, fail, length, number, word};
use crate::output::Item;
use crate::scenario::{Context, World};

/// Bytes that are read or written in one piece.
const PIECE: usize = 64 << 10;

/// A booted board.
#[derive(Clone)]
pub struct Board {
    pub world: Rc<World>,
    pub context: Rc<Context>,
}

fn no_memory<T>(pa: u64, error: impl ToString) -> Result<T> {
    fail(format!("{pa:#x}: {}", error.to_string()))
}

impl Board {
    fn boot(context: &Rc<Context>, map: Map) -> Result<Self> {
        let request = BootRequest::from_map(map).or_else(fail)?;
        if let Some(before) = context.world.take() {
            before.drain(context);
            context.epoch.set(context.epoch.get().saturating_add(before.now()));
        }
        let world = World::boot(context, &request).or_else(fail)?;
        *context.world.borrow_mut() = Some(world.clone());
        Ok(Self { world, context: context.clone() })
    }

    /// Lets everything come to rest.
    pub fn settle(&self) -> Result<()> {
        self.world.settle(&self.context).or_else(fail)
    }

    /// Prints what happened.
    pub fn drain(&self) {
        self.world.drain(&self.context);
    }

    /// Whatever else a call is given has to be of this board, too.
    pub fn same(&self, other: &Self) -> Result<()> {
        if Rc::ptr_eq(&self.world, &other.world) {
            return Ok(());
        }
        fail("this board was booted again since: get its engines, domains and processes anew")
    }

    fn device(&self, engine: &EngineHandle) -> Result<DeviceId> {
        self.same(&engine.board)?;
        match self.world.system.device(&engine.name) {
            Some(device) => Ok(device),
            None => fail(format!(
                "{} is not behind an SMMU that is in use: its node has no iommus, or the SMMU's status is not okay",
                engine.name
            )),
        }
    }

    fn engine(&mut self, name: &str) -> Result<EngineHandle> {
        let engines = self.world.system.machine().engines();
        match self.world.system.machine().engine(name) {
            Some(e) => Ok(EngineHandle { board: self.clone(), name: e.name.to_string() }),
            None => {
                let names: Vec<&str> = engines.iter().map(|e| &*e.name).collect();
                fail(format!("there is no engine {name:?} on this board; there are: {}", names.join(", ")))
            }
        }
    }

    fn channel(&mut self, name: &str) -> Result<EngineHandle> {
        let engine = self.engine(name)?;
        engine.channel().map(|_| ())?;
        Ok(engine)
    }

    fn writer(&mut self, name: &str) -> Result<EngineHandle> {
        let engine = self.engine(name)?;
        engine.writer().map(|_| ())?;
        Ok(engine)
    }

    fn tester(&mut self, name: &str) -> Result<EngineHandle> {
        let engine = self.engine(name)?;
        engine.tester().map(|_| ())?;
        Ok(engine)
    }

    fn channels(&mut self) -> Array {
        let make = |c: &Channel| EngineHandle { board: self.clone(), name: c.name.to_string() };
        self.world.system.channels().iter().map(|c| Dynamic::from(make(c))).collect()
    }

    fn alloc_domain(&self, spec: DomainSpec, model: FaultModel) -> Result<DomainHandle> {
        let Some(instance) = self.world.system.iommu() else {
            return fail("this board has no SMMU in use");
        };
        let domain = self.world.system.core().alloc_domain_with(instance, spec, model).or_else(fail)?;
        Ok(DomainHandle { board: self.clone(), domain })
    }

    fn domain(&mut self, kind: &str) -> Result<DomainHandle> {
        let paging = Paging::default();
        let spec = match kind {
            "stage1" => DomainSpec::Stage1(paging),
            "stage2" => DomainSpec::Stage2(paging),
            "identity" => DomainSpec::Identity,
            "blocked" => DomainSpec::Blocked,
            "stall" => {
                let stall = FaultModel { stall: true, ..FaultModel::default() };
                let handle = self.alloc_domain(DomainSpec::Stage1(paging), stall)?;
                // The script decides, with `resume`.
                handle.domain.set_fault_handler(Some(Arc::new(|_: &FaultReport| FaultResponse::Deferred)));
                return Ok(handle);
            }
            other => {
                return fail(format!(
                    "there is no kind of domain {other:?}; there are stage1, stage2, stall, identity, blocked"
                ));
            }
        };
        self.alloc_domain(spec, FaultModel::default())
    }

    fn nested(&mut self, parent: DomainHandle) -> Result<DomainHandle> {
        self.same(&parent.board)?;
        let domain =
            self.world.system.core().nested_domain(&parent.domain, Paging::default()).or_else(fail)?;
        Ok(DomainHandle { board: self.clone(), domain })
    }

    fn attach(&mut self, engine: EngineHandle, domain: DomainHandle) -> Result<()> {
        self.same(&domain.board)?;
        let device = self.device(&engine)?;
        self.world.system.core().attach_device(device, &domain.domain).or_else(fail)?;
        self.world.note_attached(&engine.name, Some(&domain.domain));
        if let Some(channel) = self.world.system.channel(&engine.name)
            && domain.domain.input_range().is_some()
        {
            self.world.system.map_descriptors(channel, &domain.domain).or_else(fail)?;
        }
        self.drain();
        Ok(())
    }

    fn detach(&mut self, engine: EngineHandle) -> Result<()> {
        let device = self.device(&engine)?;
        self.world.system.core().detach_device(device).or_else(fail)?;
        self.world.note_attached(&engine.name, None);
        self.drain();
        Ok(())
    }

    fn overrides(&mut self, engine: EngineHandle, map: Map) -> Result<()> {
        let device = self.device(&engine)?;
        let mut overrides = StreamOverrides::default();
        for (key, value) in map {
            match (key.as_str(), value.as_bool().ok()) {
                ("instruction", on @ Some(_)) => overrides.instruction = on,
                ("privileged", on @ Some(_)) => overrides.privileged = on,
                _ => {
                    return fail(format!(
                        "overrides: {key} is not instruction or privileged with true or false"
                    ));
                }
            }
        }
        self.world.system.core().set_overrides(device, overrides).or_else(fail)
    }

    fn process(&mut self, options: Map) -> Result<ProcessHandle> {
        let mut config = ProcessConfig::default();
        for (key, value) in options {
            let bits = value.as_int().ok().and_then(|v| u8::try_from(v).ok());
            match (key.as_str(), bits, value.as_bool().ok()) {
                ("va_bits", Some(v), _) => config.va_bits = v,
                ("pa_bits", Some(v), _) => config.pa_bits = v,
                ("coherent", _, Some(v)) => config.coherent_walk = v,
                _ => {
                    return fail(format!(
                        "process: {key} is not va_bits or pa_bits with a number of bits, or coherent with true or false"
                    ));
                }
            }
        }
        let process = Process::new(self.world.system.machine().dma_memory(), config).or_else(fail)?;
        Ok(ProcessHandle { board: self.clone(), process })
    }

    fn bind(&mut self, engine: EngineHandle, process: ProcessHandle, changes: Map) -> Result<DomainHandle> {
        self.same(&process.board)?;
        let device = self.device(&engine)?;
        let mut options = BindOptions::default();
        if !changes.is_empty() {
            let Some(mut root) = process.root() else { return fail("the process has exited") };
            for (key, value) in changes {
                match (key.as_str(), value.as_int().ok()) {
                    ("t0sz", Some(v)) => root.t0sz = number("bind: t0sz", v)?,
                    ("ips", Some(v)) => root.ips = number("bind: ips", v)?,
                    ("ttbr0", Some(v)) => root.ttbr0 = Pa(address(v)),
                    _ => return fail(format!("bind: {key} is not t0sz, ips or ttbr0 with a number")),
                }
            }
            options.root = Some(root);
        }
        let domain =
            self.world.system.core().bind_with(device, process.process.clone(), options).or_else(fail)?;
        self.world.note_attached(&engine.name, None);
        self.drain();
        Ok(DomainHandle { board: self.clone(), domain })
    }

    fn unbind(&mut self, engine: EngineHandle) -> Result<()> {
        let device = self.device(&engine)?;
        self.world.system.core().unbind(device).or_else(fail)?;
        self.drain();
        Ok(())
    }

    fn bind_substream(&mut self, engine: EngineHandle, process: ProcessHandle, changes: Map) -> Result<i64> {
        self.same(&process.board)?;
        let device = self.device(&engine)?;
        let mut options = BindOptions::default();
        for (key, value) in changes {
            match (key.as_str(), value.as_bool().ok()) {
                ("stall", Some(on)) => options.fault_model.stall = on,
                _ => return fail(format!("bind_substream: {key} is not stall with true or false")),
            }
        }
        let core = self.world.system.core();
        let (substream, _) = core.bind_substream(device, process.process.clone(), options).or_else(fail)?;
        self.drain();
        Ok(i64::from(substream.get()))
    }

    fn unbind_substream(&mut self, engine: EngineHandle, substream: i64) -> Result<()> {
        let device = self.device(&engine)?;
        let substream = SubstreamId(number("substream", substream)?);
        self.world.system.core().unbind_substream(device, substream).or_else(fail)?;
        self.drain();
        Ok(())
    }

    fn ats(&mut self, engine: EngineHandle, on: bool, page_requests: bool) -> Result<()> {
        self.same(&engine.board)?;
        if !self.world.system.enable_ats(&engine.name, on, page_requests) {
            return fail(format!("{} has no address translation services", engine.name));
        }
        Ok(())
    }

    /// Answers a fault that waits: one of those that `faults` gave.
    fn answer(&mut self, fault: Map, retry: bool) -> Result<()> {
        let id = fault.get("id").and_then(|v| v.as_int().ok()).and_then(|v| usize::try_from(v).ok());
        let Some(fault) = id.and_then(|id| self.world.waiting(id)) else {
            return fail("nobody waits for an answer to this: it is no stalled fault of this board");
        };
        let response = if retry { FaultResponse::Resolved } else { FaultResponse::Terminate };
        self.world.system.core().answer(fault.instance, &fault.report, response).or_else(fail)?;
        self.settle()
    }

    fn resume(&mut self, domain: DomainHandle, retry: bool) -> Result<()> {
        self.same(&domain.board)?;
        let Some(bank) = domain.domain.bank() else { return fail("this domain has no context bank") };
        let response = if retry { FaultResponse::Resolved } else { FaultResponse::Terminate };
        let instance = domain.domain.instance();
        self.world.system.core().resume_stalled(instance, bank, response).or_else(fail)?;
        self.settle()
    }
}

/// Memory, as the CPU sees it.
impl Board {
    fn read<const N: usize>(&mut self, pa: i64) -> Result<[u8; N]> {
        let (pa, mut bytes) = (address(pa), [0; N]);
        self.world.system.machine().cpu_read(Pa(pa), &mut bytes).or_else(|e| no_memory(pa, e))?;
        self.drain();
        Ok(bytes)
    }

    fn write(&mut self, pa: i64, bytes: &[u8]) -> Result<()> {
        let pa = address(pa);
        self.world.system.machine().cpu_write(Pa(pa), bytes).or_else(|e| no_memory(pa, e))
    }

    /// Calls `each` for the pieces of a range: address and bytes.
    fn pieces(pa: i64, len: i64, mut each: impl FnMut(u64, usize) -> Result<()>) -> Result<()> {
        let (pa, len) = (address(pa), length(len)?);
        if !len.is_multiple_of(4) {
            return fail(format!("{len} bytes are no whole number of 32-bit words"));
        }
        if pa.checked_add(len as u64).is_none() {
            return fail(format!("{pa:#x}+{len:#x} is past the end of memory"));
        }
        (0..len).step_by(PIECE).try_for_each(|at| each(pa + at as u64, PIECE.min(len - at)))
    }

    fn fill32(&mut self, pa: i64, value: i64, len: i64) -> Result<()> {
        let bytes = word(value)?.to_le_bytes().repeat(PIECE / 4);
        let machine = self.world.system.machine();
        Self::pieces(pa, len, |pa, n| machine.cpu_write(Pa(pa), &bytes[..n]).or_else(|e| no_memory(pa, e)))
    }

    /// How many 32-bit words of a range hold a value.
    fn count32(&mut self, pa: i64, value: i64, len: i64) -> Result<i64> {
        let (value, mut bytes, mut found) = (word(value)?.to_le_bytes(), vec![0; PIECE], 0);
        let machine = self.world.system.machine();
        Self::pieces(pa, len, |pa, n| {
            machine.cpu_read(Pa(pa), &mut bytes[..n]).or_else(|e| no_memory(pa, e))?;
            found += bytes[..n].chunks_exact(4).filter(|w| **w == value).count();
            Ok(())
        })?;
        self.drain();
        Ok(found as i64)
    }

    fn clean(&mut self, pa: i64, len: i64) -> Result<()> {
        self.world.system.machine().dma_memory().clean(Pa(address(pa)), length(len)?);
        Ok(())
    }

    fn invalidate(&mut self, pa: i64, len: i64) -> Result<()> {
        self.world.system.machine().dma_memory().invalidate(Pa(address(pa)), length(len)?);
        Ok(())
    }
}

/// Registers, and looking inside.
impl Board {
    fn smmu_registers(&self) -> Result<Registers> {
        let registers = self.world.system.machine().smmu_registers();
        registers.map_or_else(|| fail("this board has no SMMU in use"), Ok)
    }

    fn smmu_read(&mut self, offset: i64) -> Result<i64> {
        Ok(i64::from(self.smmu_registers()?.read32(length(offset)?)))
    }

    fn smmu_read64(&mut self, offset: i64) -> Result<i64> {
        Ok(self.smmu_registers()?.read64(length(offset)?) as i64)
    }

    fn smmu_write64(&mut self, offset: i64, value: i64) -> Result<()> {
        self.smmu_registers()?.write64(length(offset)?, address(value));
        self.settle()
    }

    fn smmu_write(&mut self, offset: i64, value: i64) -> Result<()> {
        self.smmu_registers()?.write32(length(offset)?, word(value)?);
        self.settle()
    }

    fn window(&self, pa: i64) -> Result<(Registers, usize)> {
        let pa = address(pa);
        match self.world.system.machine().window_at(Pa(pa)) {
            Ok((registers, offset)) => Ok((registers, offset as usize)),
            Err(_) => fail(format!("{pa:#x}: no device that is modelled has registers there")),
        }
    }

    fn mmio_read32(&mut self, pa: i64) -> Result<i64> {
        let (registers, offset) = self.window(pa)?;
        Ok(i64::from(registers.read32(offset)))
    }

    fn mmio_write32(&mut self, pa: i64, value: i64) -> Result<()> {
        let (registers, offset) = self.window(pa)?;
        registers.write32(offset, word(value)?);
        self.settle()
    }

    fn smmu_v3(&self) -> Result<&SmmuV3> {
        match self.world.system.smmu_v3() {
            Some((_, driver)) => Ok(driver),
            None => fail("this board has no SMMUv3 in use"),
        }
    }

    /// Puts a command of two words into the SMMUv3's queue as it is, then CMD_SYNC, and waits. Gives what the driver says
    /// about it: nothing, or why it was refused.
    fn command(&mut self, first: i64, second: i64) -> Result<String> {
        let command = Command([address(first), address(second)]);
        let result = self.smmu_v3()?.commands().issue_sync(&[command]);
        self.settle()?;
        Ok(result.err().map_or(String::new(), |e| e.to_string()))
    }

    /// Lets the driver of every SMMU look at its queues and error registers, as an interrupt would.
    fn poll(&mut self) -> Result<i64> {
        let mut handled = 0;
        for smmu in self.world.system.smmus() {
            handled += self.world.system.core().handle_irq(smmu.instance).or_else(fail)?;
        }
        self.settle()?;
        Ok(handled as i64)
    }

    /// Where the STE of an engine's stream is, or a CD of it.
    fn config_address(&mut self, engine: &EngineHandle, substream: Option<i64>, cd: bool) -> Result<i64> {
        let explanation = self.look(engine, substream, 0, Access::Read)?;
        let Some(e) = explanation.v3() else { return fail("this board has no SMMUv3 in use") };
        let at = if cd { e.cd.map(|(at, _)| at) } else { e.ste.map(|(at, _)| at) };
        match at {
            Some(at) => Ok(at.get() as i64),
            None => fail(format!("{} has none: {}", engine.name, e.rule)),
        }
    }

    fn look(
        &self,
        engine: &EngineHandle,
        substream: Option<i64>,
        iova: i64,
        access: Access,
    ) -> Result<Explanation> {
        self.same(&engine.board)?;
        let machine = self.world.system.machine();
        let slot = machine.engine(&engine.name);
        let Some((slot, smmu)) = slot.and_then(|s| Some((s, machine.smmu_at(s.smmu?)?))) else {
            return fail(format!("{} is not behind an SMMU that is in use", engine.name));
        };
        let mut from = Initiator::new(slot.stream).with_attrs(Attributes::DEVICE_DEFAULT);
        if let Some(n) = substream {
            from.substream = Some(SubstreamId(number("substream", n)?));
        }
        let explain = || smmu.model.explain(from, Iova(address(iova)), access);
        Ok(self.world.teller(&self.context, |teller| teller.quietly(explain)))
    }

    fn explain(&mut self, engine: EngineHandle, iova: i64, access: &str) -> Result<String> {
        self.explain_of(engine, None, iova, access)
    }

    fn explain_of(
        &mut self,
        engine: EngineHandle,
        substream: Option<i64>,
        iova: i64,
        access: &str,
    ) -> Result<String> {
        let access = match access {
            "read" => Access::Read,
            "write" => Access::Write,
            other => return fail(format!("{other:?} is not \"read\" or \"write\"")),
        };
        let look = self.look(&engine, substream, iova, access)?;
        let story =
            self.world.teller(&self.context, |teller| teller.tell(&engine.name, &look, Seen::default()));
        let text = story.to_string();
        self.context.emit(Item::Explain { engine: engine.name, story });
        Ok(text)
    }

    fn owner(&mut self, stream: i64) -> Dynamic {
        let owner = u32::try_from(stream).ok().and_then(|s| self.world.system.owner_of(StreamId(s)));
        owner.map_or(Dynamic::UNIT, Into::into)
    }
}

/// Gives `engine` the functions of boards.
pub fn register(engine: &mut Engine, context: &Rc<Context>) {
    let c = context.clone();
    engine.register_fn("boot", move || Board::boot(&c, Map::new()));
    let c = context.clone();
    engine.register_fn("boot", move |options: Map| Board::boot(&c, options));

    engine.register_type_with_name::<Board>("Board");
    engine.register_fn("engine", Board::engine);
    engine.register_fn("channel", Board::channel);
    engine.register_fn("writer", Board::writer);
    engine.register_fn("tester", Board::tester);
    engine.register_fn("channels", Board::channels);
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
    engine.register_fn("bind_substream", |b: &mut Board, e: EngineHandle, p: ProcessHandle| {
        b.bind_substream(e, p, Map::new())
    });
    engine.register_fn("bind_substream", Board::bind_substream);
    engine.register_fn("unbind_substream", Board::unbind_substream);
    engine.register_fn("ats", |b: &mut Board, e: EngineHandle, on: bool| b.ats(e, on, false));
    engine.register_fn("ats", Board::ats);
    engine.register_fn("resume", Board::resume);
    engine.register_fn("resume", Board::answer);
    engine.register_fn("settle", |b: &mut Board| b.settle());

    engine
        .register_fn("read32", |b: &mut Board, pa: i64| b.read(pa).map(|v| i64::from(u32::from_le_bytes(v))));
    engine.register_fn("read64", |b: &mut Board, pa: i64| b.read(pa).map(i64::from_le_bytes));
    engine.register_fn("write32", |b: &mut Board, pa: i64, v: i64| b.write(pa, &word(v)?.to_le_bytes()));
    engine.register_fn("write64", |b: &mut Board, pa: i64, v: i64| b.write(pa, &v.to_le_bytes()));
    engine.register_fn("fill32", Board::fill32);
    engine.register_fn("count32", Board::count32);
    engine.register_fn("clean", Board::clean);
    engine.register_fn("invalidate", Board::invalidate);

    engine.register_fn("smmu_read", Board::smmu_read);
    engine.register_fn("smmu_write", Board::smmu_write);
    engine.register_fn("smmu_read64", Board::smmu_read64);
    engine.register_fn("smmu_write64", Board::smmu_write64);
    engine.register_fn("mmio_read32", Board::mmio_read32);
    engine.register_fn("mmio_write32", Board::mmio_write32);
    engine.register_fn("explain", Board::explain);
    engine.register_fn(
        "explain",
        |b: &mut Board, e: EngineHandle, substream: i64, iova: i64, access: &str| {
            b.explain_of(e, Some(substream), iova, access)
        },
    );
    engine.register_fn("command", Board::command);
    engine.register_fn("poll", Board::poll);
    engine.register_fn("ste", |b: &mut Board, e: EngineHandle| b.config_address(&e, None, false));
    engine.register_fn("cd", |b: &mut Board, e: EngineHandle| b.config_address(&e, None, true));
    engine.register_fn("cd", |b: &mut Board, e: EngineHandle, substream: i64| {
        b.config_address(&e, Some(substream), true)
    });
    engine.register_fn("owner", Board::owner);
    engine.register_fn("faults", |b: &mut Board| b.world.take_faults());
    engine.register_fn("stale_reads", |b: &mut Board| b.world.take_stale());
    engine.register_fn("ats_events", |b: &mut Board| b.world.take_ats());
    engine.register_fn("messages", |b: &mut Board| b.world.take_messages());
}
