//! DMA channels, PL writers and their transfers.

use portcullis_arch::Iova;
use portcullis_arch::plwriter::Response;
use portcullis_board::sim::{EngineSlot, Registers};
use portcullis_board::system::{Channel, Tester, Writer};
use portcullis_drivers::dmaengine::Segment;
use portcullis_drivers::testdev::{Pasid, TestDeviceError};
use portcullis_drivers::zdma::{Cookie, Progress};
use portcullis_hal::Mmio;
use rhai::{Engine, Map};

use super::board::Board;
use super::{Result, address, fail, length, number, word};

/// AxCACHE of normal non-cacheable memory.
const NON_CACHEABLE: i64 = 2;

/// How long a transfer through a loop may take, in microseconds of simulated time.
const LOOP_TIMEOUT_US: u64 = 20_000;

/// A DMA channel or PL writer.
#[derive(Clone)]
pub struct EngineHandle {
    pub board: Board,
    pub name: String,
}

/// A transfer that was started.
#[derive(Clone)]
struct Transfer {
    engine: EngineHandle,
    work: Work,
}

/// What it is known by.
#[derive(Clone, Copy)]
enum Work {
    /// At a DMA channel.
    Channel(Cookie),
    /// At a test device: transfers that had ended before, and bytes.
    Tester(u32, u64),
}

/// What a transfer came to.
pub fn result(ok: bool, stalled: bool, error: String, moved: u64) -> Map {
    let values = [
        ("ok", ok.into()),
        ("stalled", stalled.into()),
        ("error", error.into()),
        ("moved", (moved as i64).into()),
    ];
    values.into_iter().map(|(key, value)| (key.into(), value)).collect()
}

impl EngineHandle {
    pub fn channel(&self) -> Result<&Channel> {
        match self.board.world.system.channel(&self.name) {
            Some(c) => Ok(c),
            None => fail(format!("{} is no DMA channel", self.name)),
        }
    }

    pub fn writer(&self) -> Result<&Writer> {
        match self.board.world.system.writer(&self.name) {
            Some(w) => Ok(w),
            None => fail(format!("{} is no PL writer", self.name)),
        }
    }

    pub fn tester(&self) -> Result<&Tester> {
        match self.board.world.system.tester(&self.name) {
            Some(t) => Ok(t),
            None => fail(format!("{} is no test device", self.name)),
        }
    }

    fn slot(&self) -> Result<&EngineSlot> {
        match self.board.world.system.machine().engine(&self.name) {
            Some(slot) => Ok(slot),
            None => fail(format!("there is no engine {}", self.name)),
        }
    }

    /// A transfer through the loop of an AXI DMA core; `None` for other engines.
    fn through_loop(&mut self, dst: i64, src: i64, len: i64) -> Result<Option<Map>> {
        let os = self.board.world.system.os();
        let Some(stack) = os.axi().get(&self.name) else { return Ok(None) };
        let len = length(len)? as u64;
        let segment = |at: i64| Segment { address: Iova(address(at)), len };
        let looped = stack.begin(&[segment(dst)], &[segment(src)]).or_else(fail)?;
        let ended = looped.wait(&os.host().clock(), LOOP_TIMEOUT_US);
        self.board.drain();
        let error = ended.as_ref().err().map(ToString::to_string).unwrap_or_default();
        Ok(Some(result(ended.is_ok(), false, error, ended.unwrap_or(0))))
    }

    /// A transfer by the channel's registers, without letting it run.
    fn begin(&mut self, dst: i64, src: i64, len: i64) -> Result<Transfer> {
        let (dst, src) = (Iova(address(dst)), Iova(address(src)));
        if let Ok(tester) = self.tester() {
            let (driver, len) = (&tester.driver, length(len)? as u64);
            let work = Work::Tester(driver.count(), len);
            driver.start(dst, src, len).or_else(fail)?;
            return Ok(Transfer { engine: self.clone(), work });
        }
        let len = number("length", len)?;
        let cookie = self.channel()?.driver.start_simple(dst, src, len).or_else(fail)?;
        Ok(Transfer { engine: self.clone(), work: Work::Channel(cookie) })
    }

    fn start(&mut self, dst: i64, src: i64, len: i64) -> Result<Transfer> {
        let transfer = self.begin(dst, src, len)?;
        self.board.settle()?;
        Ok(transfer)
    }

    /// A transfer by a list of descriptors in memory.
    fn start_list(&mut self, dst: i64, src: i64, len: i64) -> Result<Transfer> {
        let len = number("length", len)?;
        let driver = &self.channel()?.driver;
        let cookie = driver.submit_memcpy(Iova(address(dst)), Iova(address(src)), len).or_else(fail)?;
        driver.issue_pending();
        self.board.settle()?;
        Ok(Transfer { engine: self.clone(), work: Work::Channel(cookie) })
    }

    fn write(&mut self, dst: i64, value: i64, axi_id: i64, cache: i64) -> Result<Map> {
        let (axi_id, cache) = (number("AXI ID", axi_id)?, number("AxCACHE", cache)?);
        let driver = &self.writer()?.driver;
        driver.write(Iova(address(dst)), word(value)?, axi_id, cache).or_else(fail)?;
        self.board.settle()?;
        Ok(self.written(self.writer()?))
    }

    fn status(&mut self) -> Result<Map> {
        Ok(self.written(self.writer()?))
    }

    fn written(&self, writer: &Writer) -> Map {
        let status = writer.driver.status();
        let ok = status.done() && !status.error();
        let error = match status.response() {
            _ if !status.error() => "",
            Response::DecErr => "AXI response DECERR: nothing is at the address",
            _ => "AXI response SLVERR: refused",
        };
        result(ok, status.busy(), error.into(), if ok { 4 } else { 0 })
    }

    fn registers(&self) -> Result<Registers> {
        let slot = self.slot()?;
        Ok(self.board.world.system.machine().engine_registers(slot))
    }

    fn register(&mut self, offset: i64) -> Result<i64> {
        Ok(i64::from(self.registers()?.read32(length(offset)?)))
    }

    fn set_register(&mut self, offset: i64, value: i64) -> Result<()> {
        self.registers()?.write32(length(offset)?, word(value)?);
        self.board.settle()
    }
}

impl Transfer {
    /// How it stands.
    fn result(&mut self) -> Result<Map> {
        let cookie = match self.work {
            Work::Channel(cookie) => cookie,
            Work::Tester(before, len) => return self.test_result(before, len),
        };
        let channel = self.engine.channel()?;
        Ok(match channel.driver.progress(cookie) {
            Progress::Complete(c) => {
                let error = c.result.err().map(|e| e.to_string()).unwrap_or_default();
                result(c.result.is_ok(), false, error, c.transferred)
            }
            Progress::Running { residue } => result(false, true, format!("{residue} bytes wait"), 0),
            Progress::Queued => result(false, true, "waits for the transfer before it".into(), 0),
            Progress::Unknown => result(false, false, "no such transfer any more".into(), 0),
        })
    }
}

impl Transfer {
    /// How a transfer of a test device stands.
    fn test_result(&self, before: u32, len: u64) -> Result<Map> {
        let driver = &self.engine.tester()?.driver;
        if driver.is_busy() {
            return Ok(result(false, true, "an access waits".into(), 0));
        }
        if driver.count() == before {
            return Ok(result(false, false, "no such transfer any more".into(), 0));
        }
        Ok(match driver.result() {
            Ok(()) => result(true, false, String::new(), len),
            Err(e @ TestDeviceError::Failed { done, .. }) => result(false, false, e.to_string(), done.into()),
            Err(e) => result(false, false, e.to_string(), 0),
        })
    }
}

/// A test device's own matters.
impl EngineHandle {
    /// On whose behalf transfers are made: a substream, with `privileged` and `execute` in the map.
    fn set_pasid(&mut self, id: i64, options: Map) -> Result<()> {
        let mut pasid = Pasid::new(number("substream", id)?);
        for (key, value) in options {
            match (key.as_str(), value.as_bool().ok()) {
                ("privileged", Some(on)) => pasid.privileged = on,
                ("execute", Some(on)) => pasid.execute = on,
                _ => {
                    return fail(format!("set_pasid: {key} is not privileged or execute with true or false"));
                }
            }
        }
        self.tester()?.driver.set_pasid(Some(pasid)).or_else(fail)
    }

    fn no_pasid(&mut self) -> Result<()> {
        self.tester()?.driver.set_pasid(None).or_else(fail)
    }

    /// What the engine's own translation cache did.
    fn atc(&mut self) -> Result<Map> {
        let Some(atc) = &self.slot()?.atc else {
            return fail(format!("{} has no address translation services", self.name));
        };
        let stats = atc.stats();
        let values = [
            ("cached", atc.cached() as u64),
            ("hits", stats.hits),
            ("requests", stats.requests),
            ("unsupported", stats.unsupported),
            ("aborted", stats.aborted),
            ("invalidations", stats.invalidations),
            ("page_requests", stats.page_requests),
        ];
        Ok(values.into_iter().map(|(key, value)| (key.into(), (value as i64).into())).collect())
    }

    /// The engine no longer answers invalidations of its translation cache, or does again.
    fn hang(&mut self, on: bool) -> Result<()> {
        match &self.slot()?.atc {
            Some(atc) => {
                atc.hang(on);
                Ok(())
            }
            None => fail(format!("{} has no address translation services", self.name)),
        }
    }
}

/// Gives `engine` the functions of engines and transfers.
pub fn register(engine: &mut Engine) {
    engine.register_type_with_name::<EngineHandle>("Engine");
    engine.register_get("name", |e: &mut EngineHandle| e.name.clone());
    engine
        .register_get("stream", |e: &mut EngineHandle| Ok(i64::from(e.slot()?.stream.get())) as Result<i64>);
    engine.register_get("base", |e: &mut EngineHandle| Ok(e.slot()?.base.get() as i64) as Result<i64>);
    engine
        .register_get("bus_width", |e: &mut EngineHandle| Ok(i64::from(e.slot()?.bus_width)) as Result<i64>);
    engine.register_fn("begin", EngineHandle::begin);
    engine.register_fn("start", EngineHandle::start);
    engine.register_fn("start_list", EngineHandle::start_list);
    engine.register_fn("copy", |e: &mut EngineHandle, dst: i64, src: i64, len: i64| {
        if let Some(looped) = e.through_loop(dst, src, len)? {
            return Ok(looped);
        }
        e.start(dst, src, len)?.result()
    });
    engine.register_fn("memcpy", |e: &mut EngineHandle, dst: i64, src: i64, len: i64| {
        e.start_list(dst, src, len)?.result()
    });
    engine.register_fn("write", |e: &mut EngineHandle, dst: i64, value: i64| {
        e.write(dst, value, 0, NON_CACHEABLE)
    });
    engine.register_fn("write", EngineHandle::write);
    engine.register_fn("set_pasid", |e: &mut EngineHandle, id: i64| e.set_pasid(id, Map::new()));
    engine.register_fn("set_pasid", EngineHandle::set_pasid);
    engine.register_fn("no_pasid", EngineHandle::no_pasid);
    engine.register_get("atc", EngineHandle::atc);
    engine.register_fn("hang", EngineHandle::hang);
    engine.register_fn("status", EngineHandle::status);
    engine.register_fn("register", EngineHandle::register);
    engine.register_fn("set_register", EngineHandle::set_register);

    engine.register_type_with_name::<Transfer>("Transfer");
    engine.register_fn("result", Transfer::result);
}
