//! The DMA API as a driver of the host uses it, and the network device.

use portcullis_arch::{Iova, Pa};
use portcullis_board::sim::{EngineKind, Memory};
use portcullis_hal::{Block, DmaMemory as _};
use portcullis_iommu::dma::{Coherent, Direction, DmaAttrs, DmaDevice, SgEntry, SgMapping};
use rhai::{Array, Dynamic, Engine, Map};

use super::board::Board;
use super::proxy::map;
use super::{Result, address, fail, length, word};

/// Bytes of a page.
const PAGE: usize = 4096;

/// A device of the DMA API.
#[derive(Clone)]
pub struct DmaHandle {
    pub board: Board,
    pub device: DmaDevice<Memory>,
}

/// A mapped scatter list.
#[derive(Clone)]
struct ListHandle {
    dma: DmaHandle,
    list: std::rc::Rc<std::cell::RefCell<Option<SgMapping>>>,
    direction: Direction,
}

/// Coherent memory.
#[derive(Clone)]
struct CoherentHandle(std::rc::Rc<std::cell::RefCell<Option<Coherent<Memory>>>>);

/// A network device.
#[derive(Clone)]
struct NicHandle {
    board: Board,
    name: String,
}

pub fn direction(text: &str) -> Result<Direction> {
    Ok(match text {
        "to_device" => Direction::ToDevice,
        "from_device" => Direction::FromDevice,
        "both" => Direction::Bidirectional,
        other => return fail(format!("{other:?} is not to_device, from_device or both")),
    })
}

impl Board {
    fn dma(&mut self, name: &str) -> Result<DmaHandle> {
        let system = &self.world.system;
        let core = system.os().axi().get(name).map(|stack| stack.dma().clone());
        let device = core.or_else(|| system.nic(name).map(|nic| nic.dma.clone()));
        match device {
            Some(device) => Ok(DmaHandle { board: self.clone(), device }),
            None => fail(format!("no driver of the host uses {name:?} with the DMA API")),
        }
    }
    /// Memory for a buffer, by its physical address.
    fn alloc(&mut self, bytes: i64) -> Result<i64> {
        match self.world.system.machine().dma_memory().alloc(length(bytes)?, PAGE) {
            Some(block) => Ok(block.pa.get() as i64),
            None => fail(format!("no {bytes} bytes of memory are left")),
        }
    }
    fn free(&mut self, pa: i64, bytes: i64) -> Result<()> {
        let block = Block { pa: Pa(address(pa)), len: length(bytes)? };
        self.world.system.machine().dma_memory().free(block);
        Ok(())
    }
    fn nic(&mut self, name: &str) -> Result<NicHandle> {
        match self.world.system.nic(name) {
            Some(_) => Ok(NicHandle { board: self.clone(), name: name.to_string() }),
            None => fail(format!("no driver of the host has a network device {name:?}")),
        }
    }
    /// Lets simulated time pass, in microseconds.
    fn wait_us(&mut self, us: i64) -> Result<()> {
        let us = super::number::<u32>("microseconds", us)?;
        self.world.system.run_for(u64::from(us) * 1000);
        self.world.system.machine().tracer().advance(u64::from(us) * 1000);
        self.world.system.os().host().tick();
        self.drain();
        Ok(())
    }
}

impl DmaHandle {
    fn map(&mut self, pa: i64, len: i64, way: &str) -> Result<i64> {
        let (pa, len) = (Pa(address(pa)), length(len)? as u64);
        let iova = self.device.map_single(pa, len, direction(way)?, DmaAttrs::NONE).or_else(fail)?;
        Ok(iova.get() as i64)
    }
    fn unmap(&mut self, iova: i64, len: i64, way: &str) -> Result<()> {
        let (iova, len) = (Iova(address(iova)), length(len)? as u64);
        let result = self.device.unmap_single(iova, len, direction(way)?, DmaAttrs::NONE);
        self.board.drain();
        result.or_else(fail)
    }
    fn map_list(&mut self, pieces: Array, way: &str) -> Result<ListHandle> {
        let entry = |piece: Dynamic| -> Result<SgEntry> {
            let pair = piece.into_typed_array::<i64>().ok().and_then(|p| <[i64; 2]>::try_from(p).ok());
            let Some([pa, len]) = pair else { return fail("a list of [address, bytes]") };
            Ok(SgEntry { pa: Pa(address(pa)), len: length(len)? as u64 })
        };
        let entries = pieces.into_iter().map(entry).collect::<Result<Vec<_>>>()?;
        let direction = direction(way)?;
        let list = self.device.map_sg(&entries, direction, DmaAttrs::NONE).or_else(fail)?;
        let list = std::rc::Rc::new(std::cell::RefCell::new(Some(list)));
        Ok(ListHandle { dma: self.clone(), list, direction })
    }
    fn sync(&mut self, iova: i64, len: i64, way: &str, cpu: bool) -> Result<()> {
        let (iova, len, direction) = (Iova(address(iova)), length(len)? as u64, direction(way)?);
        let result = if cpu {
            self.device.sync_single_for_cpu(iova, len, direction)
        } else {
            self.device.sync_single_for_device(iova, len, direction)
        };
        self.board.drain();
        result.or_else(fail)
    }
    fn coherent(&mut self, len: i64) -> Result<CoherentHandle> {
        let memory = self.device.alloc_coherent(length(len)? as u64).or_else(fail)?;
        Ok(CoherentHandle(std::rc::Rc::new(std::cell::RefCell::new(Some(memory)))))
    }
    /// The CPU writes a buffer, and the debug mode hears of it.
    fn fill32(&mut self, pa: i64, value: i64, len: i64) -> Result<()> {
        let bytes = word(value)?.to_le_bytes().repeat(length(len)? / 4);
        self.device.write_buffer(Pa(address(pa)), &bytes);
        Ok(())
    }
    /// The CPU reads a buffer, and the debug mode hears of it.
    fn count32(&mut self, pa: i64, value: i64, len: i64) -> Result<i64> {
        let mut bytes = vec![0; length(len)?];
        self.device.read_buffer(Pa(address(pa)), &mut bytes);
        self.board.drain();
        let value = word(value)?.to_le_bytes();
        Ok(bytes.chunks_exact(4).filter(|w| **w == value).count() as i64)
    }
    fn reports(&mut self) -> Array {
        self.device.take_reports().iter().map(|r| Dynamic::from(r.to_string())).collect()
    }
    /// What the debug mode knows about the address of a fault.
    fn story(&mut self, iova: i64) -> String {
        self.device.explain_fault(Iova(address(iova))).map_or_else(String::new, |s| s.to_string())
    }
}

impl ListHandle {
    fn segments(&mut self) -> Array {
        let list = self.list.borrow();
        let segment = |s: &portcullis_iommu::dma::SgSegment| {
            Dynamic::from(vec![Dynamic::from(s.iova.get() as i64), Dynamic::from(s.len as i64)])
        };
        list.iter().flat_map(|l| l.segments()).map(segment).collect()
    }
    fn unmap(&mut self) -> Result<()> {
        let Some(list) = self.list.borrow_mut().take() else { return fail("it is unmapped already") };
        self.dma.device.unmap_sg(list, self.direction, DmaAttrs::NONE).or_else(fail)
    }
}

impl CoherentHandle {
    fn with<T>(&self, f: impl FnOnce(&Coherent<Memory>) -> Result<T>) -> Result<T> {
        match &*self.0.borrow() {
            Some(memory) => f(memory),
            None => fail("it is freed already"),
        }
    }
    fn fill32(&mut self, value: i64) -> Result<()> {
        let word = word(value)?.to_le_bytes();
        self.with(|m| m.write(0, &word.repeat(m.len() as usize / 4)).or_else(fail))
    }
    fn count32(&mut self, value: i64) -> Result<i64> {
        let value = word(value)?.to_le_bytes();
        self.with(|m| {
            let mut bytes = vec![0; m.len() as usize];
            m.read(0, &mut bytes).or_else(fail)?;
            Ok(bytes.chunks_exact(4).filter(|w| **w == value).count() as i64)
        })
    }
}

impl NicHandle {
    /// Maps a frame, sends it, unmaps it: what a network driver does.
    fn send(&mut self, text: &str) -> Result<Map> {
        let system = &self.board.world.system;
        let Some(nic) = system.nic(&self.name) else { return fail("the board was booted again since") };
        let memory = system.machine().dma_memory();
        let Some(block) = memory.alloc(PAGE, PAGE) else { return fail("no memory for the frame") };
        let len = text.len().min(PAGE);
        memory.write(block.pa, &text.as_bytes()[..len]);
        let iova = nic.dma.map_single(block.pa, len as u64, Direction::ToDevice, DmaAttrs::NONE);
        let iova = iova.or_else(fail)?;
        let clock = system.os().host().clock();
        let sent = nic.driver.send(&[(iova, len as u32)]).and_then(|()| nic.driver.wait(&clock));
        nic.dma.unmap_single(iova, len as u64, Direction::ToDevice, DmaAttrs::NONE).or_else(fail)?;
        memory.free(block);
        self.board.drain();
        let error = sent.as_ref().err().map(ToString::to_string).unwrap_or_default();
        Ok(map([
            ("ok", sent.is_ok().into()),
            ("error", error.into()),
            ("iova", (iova.get() as i64).into()),
            ("pa", (block.pa.get() as i64).into()),
        ]))
    }
    fn last_frame(&mut self) -> Result<String> {
        let engine = self.board.world.system.machine().engine(&self.name);
        match engine.map(|e| &e.engine) {
            Some(EngineKind::Nic(gem)) => {
                let gem = gem.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                Ok(String::from_utf8_lossy(gem.last_frame()).into_owned())
            }
            _ => fail(format!("{} is no network device", self.name)),
        }
    }
}

pub fn register(engine: &mut Engine) {
    engine
        .register_fn("dma", Board::dma)
        .register_fn("alloc", Board::alloc)
        .register_fn("free", Board::free)
        .register_fn("wait_us", Board::wait_us)
        .register_fn("nic", Board::nic);
    engine
        .register_type_with_name::<DmaHandle>("Dma")
        .register_fn("map", DmaHandle::map)
        .register_fn("unmap", DmaHandle::unmap)
        .register_fn("map_list", DmaHandle::map_list)
        .register_fn("sync_for_cpu", |d: &mut DmaHandle, at: i64, len: i64, way: &str| {
            d.sync(at, len, way, true)
        })
        .register_fn("sync_for_device", |d: &mut DmaHandle, at: i64, len: i64, way: &str| {
            d.sync(at, len, way, false)
        })
        .register_fn("coherent", DmaHandle::coherent)
        .register_fn("fill32", DmaHandle::fill32)
        .register_fn("count32", DmaHandle::count32)
        .register_fn("reports", DmaHandle::reports)
        .register_fn("story", DmaHandle::story);
    engine
        .register_type_with_name::<ListHandle>("DmaList")
        .register_get("segments", ListHandle::segments)
        .register_fn("unmap", ListHandle::unmap);
    engine
        .register_type_with_name::<CoherentHandle>("Coherent")
        .register_get("iova", |c: &mut CoherentHandle| c.with(|m| Ok(m.iova().get() as i64)))
        .register_fn("fill32", CoherentHandle::fill32)
        .register_fn("count32", CoherentHandle::count32)
        .register_fn("free", |c: &mut CoherentHandle| drop(c.0.borrow_mut().take()));
    engine
        .register_type_with_name::<NicHandle>("Nic")
        .register_fn("send", NicHandle::send)
        .register_fn("last_frame", NicHandle::last_frame);
}
