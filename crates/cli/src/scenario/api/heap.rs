//! dma-buf heaps: buffers that several devices and several programs share.

use std::cell::RefCell;
use std::rc::Rc;

use portcullis_board::os::heaps::BoardHeap;
use portcullis_board::sim::Memory;
use portcullis_iommu::heap::{Attachment, DmaBuf, Handle, HandleTable};
use rhai::{Array, Dynamic, Engine};

use super::board::Board;
use super::dma::{DmaHandle, direction};
use super::proxy::map;
use super::{Result, fail, length, word};

/// Bytes that are read or written in one piece.
const PIECE: usize = 64 << 10;

#[derive(Clone)]
struct HeapHandle {
    board: Board,
    heap: BoardHeap,
}

/// A reference to a buffer, as long as the script keeps it.
#[derive(Clone)]
struct BufferHandle {
    board: Board,
    buffer: Rc<RefCell<Option<DmaBuf<Memory>>>>,
}

#[derive(Clone)]
struct AttachmentHandle(Rc<RefCell<Option<Attachment<Memory>>>>);

/// A user program with its table of handles.
#[derive(Clone)]
struct ProgramHandle {
    board: Board,
    table: Rc<RefCell<Option<HandleTable<Memory>>>>,
}

fn number_of(handle: i64) -> Result<Handle> {
    Ok(Handle(super::number("handle", handle)?))
}

impl Board {
    fn heap(&mut self, name: &str) -> Result<HeapHandle> {
        let heaps = self.world.system.os().heaps();
        match heaps.iter().find(|h| h.name() == name) {
            Some(heap) => Ok(HeapHandle { board: self.clone(), heap: heap.clone() }),
            None => {
                let names: Vec<_> = heaps.iter().map(|h| h.name()).collect();
                fail(format!("there is no heap {name:?}; there are: {}", names.join(", ")))
            }
        }
    }
    fn program(&mut self, name: &str) -> ProgramHandle {
        let table = Rc::new(RefCell::new(Some(HandleTable::new(name))));
        ProgramHandle { board: self.clone(), table }
    }
}

impl HeapHandle {
    fn alloc(&mut self, len: i64) -> Result<BufferHandle> {
        let buffer = self.heap.alloc(length(len)? as u64).or_else(fail)?;
        Ok(BufferHandle { board: self.board.clone(), buffer: Rc::new(RefCell::new(Some(buffer))) })
    }
    fn usage(&mut self) -> rhai::Map {
        let usage = self.heap.usage();
        map([
            ("buffers", (usage.buffers as i64).into()),
            ("bytes", (usage.bytes as i64).into()),
            ("kept", (usage.kept as i64).into()),
        ])
    }
}

impl BufferHandle {
    fn with<T>(&self, f: impl FnOnce(&DmaBuf<Memory>) -> Result<T>) -> Result<T> {
        match &*self.buffer.borrow() {
            Some(buffer) => f(buffer),
            None => fail("this reference was given up"),
        }
    }
    fn pieces(&mut self) -> Result<Array> {
        self.with(|b| {
            let piece = |p: &portcullis_iommu::dma::SgEntry| {
                Dynamic::from(vec![Dynamic::from(p.pa.get() as i64), Dynamic::from(p.len as i64)])
            };
            Ok(b.pieces().iter().map(piece).collect())
        })
    }
    fn fill32(&mut self, value: i64) -> Result<()> {
        let bytes = word(value)?.to_le_bytes().repeat(PIECE / 4);
        self.with(|b| {
            let len = b.len() as usize;
            (0..len)
                .step_by(PIECE)
                .try_for_each(|at| b.write(at as u64, &bytes[..PIECE.min(len - at)]).or_else(fail))
        })
    }
    fn count32(&mut self, value: i64) -> Result<i64> {
        let value = word(value)?.to_le_bytes();
        let found = self.with(|b| {
            let (len, mut found, mut bytes) = (b.len() as usize, 0, vec![0; PIECE]);
            for at in (0..len).step_by(PIECE) {
                let piece = &mut bytes[..PIECE.min(len - at)];
                b.read(at as u64, piece).or_else(fail)?;
                found += piece.chunks_exact(4).filter(|w| **w == value).count();
            }
            Ok(found as i64)
        });
        let machine = self.board.world.system.machine();
        machine.tracer().note_stale_reads(machine.memory());
        self.board.drain();
        found
    }
    fn attach(&mut self, device: DmaHandle) -> Result<AttachmentHandle> {
        let attachment = self.with(|b| Ok(b.attach(&device.device)))?;
        Ok(AttachmentHandle(Rc::new(RefCell::new(Some(attachment)))))
    }
    fn cpu(&mut self, begin: bool) -> Result<()> {
        self.with(|b| if begin { b.begin_cpu_access() } else { b.end_cpu_access() }.or_else(fail))
    }
}

impl AttachmentHandle {
    fn with<T>(&self, f: impl FnOnce(&Attachment<Memory>) -> Result<T>) -> Result<T> {
        match &*self.0.borrow() {
            Some(attachment) => f(attachment),
            None => fail("it is detached"),
        }
    }
    fn map(&mut self, way: &str) -> Result<Array> {
        let way = direction(way)?;
        let segments = self.with(|a| a.map(way).or_else(fail))?;
        let segment = |s: &portcullis_iommu::dma::SgSegment| {
            Dynamic::from(vec![Dynamic::from(s.iova.get() as i64), Dynamic::from(s.len as i64)])
        };
        Ok(segments.iter().map(segment).collect())
    }
}

impl ProgramHandle {
    fn with<T>(&self, f: impl FnOnce(&HandleTable<Memory>) -> Result<T>) -> Result<T> {
        match &*self.table.borrow() {
            Some(table) => f(table),
            None => fail("this program has exited"),
        }
    }
    fn open(&mut self, buffer: BufferHandle) -> Result<i64> {
        let own = buffer.with(|b| Ok(b.clone()))?;
        self.with(|t| t.export(own).map(|h| i64::from(h.0)).or_else(fail))
    }
    fn buffer(&mut self, handle: i64) -> Result<BufferHandle> {
        let buffer = self.with(|t| t.import(number_of(handle)?).or_else(fail))?;
        Ok(BufferHandle { board: self.board.clone(), buffer: Rc::new(RefCell::new(Some(buffer))) })
    }
    fn pass(&mut self, handle: i64, to: ProgramHandle) -> Result<i64> {
        self.with(|t| {
            to.with(|other| t.pass(number_of(handle)?, other).map(|h| i64::from(h.0)).or_else(fail))
        })
    }
    fn close(&mut self, handle: i64) -> Result<()> {
        self.with(|t| t.close(number_of(handle)?).or_else(fail))
    }
}

pub fn register(engine: &mut Engine) {
    engine.register_fn("heap", Board::heap).register_fn("program", Board::program);
    engine
        .register_type_with_name::<HeapHandle>("Heap")
        .register_fn("alloc", HeapHandle::alloc)
        .register_get("usage", HeapHandle::usage);
    engine
        .register_type_with_name::<BufferHandle>("Buffer")
        .register_get("pieces", BufferHandle::pieces)
        .register_get("references", |b: &mut BufferHandle| b.with(|b| Ok(b.references() as i64)))
        .register_get("bytes", |b: &mut BufferHandle| b.with(|b| Ok(b.len() as i64)))
        .register_fn("fill32", BufferHandle::fill32)
        .register_fn("count32", BufferHandle::count32)
        .register_fn("attach", BufferHandle::attach)
        .register_fn("begin_cpu_access", |b: &mut BufferHandle| b.cpu(true))
        .register_fn("end_cpu_access", |b: &mut BufferHandle| b.cpu(false))
        .register_fn("close", |b: &mut BufferHandle| drop(b.buffer.borrow_mut().take()));
    engine
        .register_type_with_name::<AttachmentHandle>("Attachment")
        .register_fn("map", AttachmentHandle::map)
        .register_fn("unmap", |a: &mut AttachmentHandle| a.with(|a| a.unmap().or_else(fail)))
        .register_fn("detach", |a: &mut AttachmentHandle| drop(a.0.borrow_mut().take()));
    engine
        .register_type_with_name::<ProgramHandle>("Program")
        .register_fn("open", ProgramHandle::open)
        .register_fn("buffer", ProgramHandle::buffer)
        .register_fn("pass", ProgramHandle::pass)
        .register_fn("close", ProgramHandle::close)
        .register_fn("exit", |p: &mut ProgramHandle| drop(p.table.borrow_mut().take()));
}
