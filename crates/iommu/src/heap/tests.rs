//! Heaps and buffers on a machine with devices that have a domain each, and memory with a view of its own for devices.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use portcullis_arch::{Asid, Iova, Pa};
use portcullis_drivers::ops::{DomainKind, DomainOps, IommuError, TableRoot};
use portcullis_drivers::smmuv2;
use portcullis_hal::fake::FakeMemory;
use portcullis_hal::{Block, DmaMemory};
use portcullis_pgtable::{Config, Flush, Granule, LazyFlush, PageTable, Stage1};
use spin::Mutex;

use super::*;
use crate::dma::{DeviceConfig, Direction, DmaDevice, DmaError, DmaSpace, Mode, SgEntry, SpaceConfig};
use crate::{Domain, InstanceId, Prot};

use Direction::{Bidirectional, FromDevice, ToDevice};

const PAGE: u64 = HEAP_PAGE;
const MIB: u64 = 1 << 20;

/// Memory that refuses some allocations and remembers what was asked for.
struct Fussy {
    inner: FakeMemory,
    refuses: Mutex<Box<dyn FnMut(usize) -> bool + Send>>,
    asked: Mutex<Vec<usize>>,
}

impl Fussy {
    fn new(inner: FakeMemory) -> Arc<Self> {
        let refuses = Mutex::new(Box::new(|_: usize| false) as Box<dyn FnMut(usize) -> bool + Send>);
        Arc::new(Self { inner, refuses, asked: Mutex::default() })
    }
    fn refuse(&self, refuses: impl FnMut(usize) -> bool + Send + 'static) {
        *self.refuses.lock() = Box::new(refuses);
    }
    fn cpu(&self, pa: Pa, len: u64) -> Vec<u8> {
        let mut bytes = vec![0xff; len as usize];
        self.inner.read(pa, &mut bytes);
        bytes
    }
    fn device(&self, pa: Pa, len: u64) -> Vec<u8> {
        let mut bytes = vec![0xff; len as usize];
        self.inner.device_read(pa, &mut bytes);
        bytes
    }
}

impl DmaMemory for Fussy {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        self.asked.lock().push(len);
        if (*self.refuses.lock())(len) { None } else { self.inner.alloc(len, align) }
    }
    fn free(&self, block: Block) {
        self.inner.free(block);
    }
    fn load64(&self, pa: Pa) -> u64 {
        self.inner.load64(pa)
    }
    fn store64(&self, pa: Pa, value: u64) {
        self.inner.store64(pa, value);
    }
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        self.inner.cas64(pa, expected, new)
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        self.inner.read(pa, buf);
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        self.inner.write(pa, buf);
    }
    fn clean(&self, pa: Pa, len: usize) {
        self.inner.clean(pa, len);
    }
    fn invalidate(&self, pa: Pa, len: usize) {
        self.inner.invalidate(pa, len);
    }
    fn wmb(&self) {
        self.inner.wmb();
    }
}

type Memory = Arc<Fussy>;

fn coherent() -> Memory {
    Fussy::new(FakeMemory::plain(0x8000_0000, 8 << 20))
}

fn non_coherent() -> Memory {
    Fussy::new(FakeMemory::non_coherent(0x8000_0000, 4 << 20))
}

/// A domain with a TLB that forgets only when told.
struct TestDomain {
    table: PageTable<Stage1, Arc<FakeMemory>>,
    tlb: Mutex<BTreeMap<u64, (u64, Prot)>>,
    dead: AtomicBool,
}

struct Forget<'a>(&'a TestDomain);

impl Flush for Forget<'_> {
    fn leaf(&mut self, iova: u64, len: u64, _: u64) {
        self.0.tlb.lock().retain(|page, _| *page < iova || *page >= iova + len);
    }
    fn table(&mut self, iova: u64, len: u64) {
        self.leaf(iova, len, PAGE);
    }
}

impl TestDomain {
    fn alive(&self) -> Result<(), IommuError> {
        match self.dead.load(Ordering::Relaxed) {
            true => Err(IommuError::Unsupported { what: "working TLB" }),
            false => Ok(()),
        }
    }
}

impl DomainOps for TestDomain {
    fn kind(&self) -> DomainKind {
        DomainKind::Stage1
    }
    fn bank(&self) -> Option<u8> {
        None
    }
    fn asid(&self) -> Option<Asid> {
        None
    }
    fn map(&self, iova: Iova, pa: Pa, len: u64, prot: Prot) -> Result<(), IommuError> {
        self.table.map(iova, pa, len, prot).map_err(|error| smmuv2::Error::Map(error).into())
    }
    fn unmap(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        let bytes = self.table.unmap(iova, len, &mut Forget(self)).unwrap();
        self.alive().map(|()| bytes)
    }
    fn unmap_lazy(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        Ok(self.table.unmap(iova, len, &mut LazyFlush(Forget(self))).unwrap())
    }
    fn protect(&self, _: Iova, _: u64, _: Prot) -> Result<(), IommuError> {
        Err(IommuError::Unsupported { what: "protect" })
    }
    fn iova_to_phys(&self, iova: Iova) -> Option<Pa> {
        Some(self.table.lookup(iova)?.pa)
    }
    fn input_range(&self) -> Option<(Iova, Iova)> {
        Some(self.table.input_range())
    }
    fn page_sizes(&self) -> u64 {
        self.table.page_sizes()
    }
    fn table_root(&self) -> Option<TableRoot> {
        None
    }
    fn invalidate(&self, iova: Iova, len: u64) -> Result<(), IommuError> {
        self.alive()?;
        Forget(self).leaf(iova.get(), len, PAGE);
        Ok(())
    }
    fn invalidate_all(&self) -> Result<(), IommuError> {
        self.alive()?;
        self.tlb.lock().clear();
        Ok(())
    }
    fn stop_walks(&self) -> Result<(), IommuError> {
        Err(IommuError::Unsupported { what: "stop_walks" })
    }
}

/// A device behind an IOMMU, in a domain of its own.
struct Engine {
    domain: Arc<TestDomain>,
    device: DmaDevice<Memory>,
    memory: Memory,
}

impl Engine {
    fn new(name: &str, memory: &Memory, mode: Mode, config: DeviceConfig) -> Self {
        let tables = Arc::new(FakeMemory::plain(0x4000_0000, 1 << 20));
        let table = PageTable::new(tables, Config::new(Granule::K4, 40, 40)).unwrap();
        let domain = Arc::new(TestDomain { table, tlb: Mutex::default(), dead: AtomicBool::new(false) });
        let space_config = SpaceConfig { mode, ..SpaceConfig::default() };
        let space = DmaSpace::new(Domain::new(domain.clone(), InstanceId(0)), space_config).unwrap();
        let device = DmaDevice::translated(name, space, memory.clone(), config);
        Self { domain, device, memory: memory.clone() }
    }

    fn strict(name: &str, memory: &Memory) -> Self {
        let config = DeviceConfig { max_segment: u64::MAX, ..DeviceConfig::default() };
        Self::new(name, memory, Mode::Strict, config)
    }

    fn reach(&self, iova: Iova, write: bool) -> Option<Pa> {
        let page = iova.get() & !(PAGE - 1);
        let mut tlb = self.domain.tlb.lock();
        let (target, prot) = match tlb.get(&page) {
            Some(entry) => *entry,
            None => {
                let found = self.domain.table.lookup(Iova(page))?;
                tlb.insert(page, (found.pa.get(), found.prot));
                (found.pa.get(), found.prot)
            }
        };
        let allowed = if write { prot.write } else { prot.read };
        allowed.then(|| Pa(target + (iova.get() - page)))
    }

    /// Inside of a page.
    fn read(&self, iova: Iova, len: u64) -> Option<Vec<u8>> {
        Some(self.memory.device(self.reach(iova, false)?, len))
    }

    fn write(&self, iova: Iova, bytes: &[u8]) -> Option<()> {
        self.memory.inner.device_write(self.reach(iova, true)?, bytes);
        Some(())
    }
}

fn bytes(buffer: &DmaBuf<Memory>, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; len];
    buffer.read(offset, &mut bytes).unwrap();
    bytes
}

fn lens(buffer: &DmaBuf<Memory>) -> Vec<u64> {
    buffer.pieces().iter().map(|piece| piece.len).collect()
}

/// All kinds, over the same memory.
fn heaps(memory: &Memory) -> Vec<Box<dyn Heap<Memory>>> {
    let carved = memory.inner.alloc(128 << 10, 4096).unwrap();
    vec![
        Box::new(SystemHeap::new(memory.clone())),
        Box::new(CmaHeap::new("linux,cma", memory.clone(), 128 << 10).unwrap()),
        Box::new(CarveoutHeap::new("carved", memory.clone(), carved.pa, 128 << 10).unwrap()),
    ]
}

#[test]
fn the_system_heap_takes_the_largest_pieces_first() {
    let memory = coherent();
    let heap = SystemHeap::new(memory.clone());
    let buffer = heap.alloc(2 * MIB + 0x2_3001).unwrap();
    let k64 = 64 << 10;
    assert_eq!(lens(&buffer), [MIB, MIB, k64, k64, PAGE, PAGE, PAGE, PAGE]);
    assert!(buffer.pieces().iter().all(|piece| piece.pa.is_aligned(piece.len)));
    assert_eq!((buffer.len(), buffer.heap()), (2 * MIB + 0x2_4000, "system"));
    assert_eq!(heap.usage(), HeapUsage { buffers: 1, bytes: buffer.len(), kept: 0 });
    drop(buffer);
    assert_eq!(heap.usage(), HeapUsage::default());
    memory.inner.assert_clean();
}

#[test]
fn the_system_heap_never_goes_back_up() {
    let memory = coherent();
    // The second large piece is refused; later ones would not be.
    let mut large = 0;
    memory.refuse(move |len| {
        large += usize::from(len == 1 << 20);
        len == 1 << 20 && large == 2
    });
    let buffer = SystemHeap::new(memory.clone()).alloc(3 * MIB).unwrap();
    let small = 64u64 << 10;
    assert_eq!(lens(&buffer), [vec![MIB], vec![small; 32]].concat());
    assert_eq!(memory.asked.lock().iter().filter(|len| **len == 1 << 20).count(), 2);
}

#[test]
fn a_system_heap_without_memory_gives_back_what_it_had() {
    let memory = coherent();
    let mut left = 3;
    memory.refuse(move |len| {
        left -= i32::from(len == 4096);
        left < 0 || len > 4096
    });
    let error = SystemHeap::new(memory.clone()).alloc(5 * PAGE).unwrap_err();
    assert_eq!(error, HeapError::NoMemory { heap: "system".into(), len: 5 * PAGE, largest: 0 });
    memory.inner.assert_clean();
}

#[test]
fn buffers_are_zeroed_and_nothing_of_an_earlier_one_is_in_them() {
    for memory in
        [coherent(), non_coherent(), Fussy::new(FakeMemory::non_coherent_reordering(0x8000_0000, 1 << 20, 3))]
    {
        for heap in heaps(&memory) {
            for round in 0..3 {
                let buffer = heap.alloc(68 << 10).unwrap();
                for piece in buffer.pieces().to_vec() {
                    let zero = vec![0; piece.len as usize];
                    assert!(
                        memory.device(piece.pa, piece.len) == zero,
                        "{}: a device sees zeroes",
                        heap.name()
                    );
                    assert!(memory.cpu(piece.pa, piece.len) == zero, "{}: the CPU sees zeroes", heap.name());
                    // Secrets of the CPU, left in its cache, and of a device.
                    memory.write(piece.pa, &vec![0xaa; piece.len as usize / 2]);
                    let half = piece.pa.wrapping_add(piece.len / 2);
                    memory.inner.device_write(half, &vec![0xbb + round; piece.len as usize / 2]);
                }
            }
        }
    }
}

#[test]
fn cma_runs_are_contiguous_and_aligned_up_to_a_cap() {
    let memory = coherent();
    let heap = CmaHeap::new("linux,cma", memory.clone(), 5 * MIB).unwrap();
    let buffers = [PAGE, 3 * PAGE, 100 * PAGE, 3 * MIB].map(|len| heap.alloc(len).unwrap());
    for (buffer, align) in buffers.iter().zip([PAGE, 4 * PAGE, 128 * PAGE, MIB]) {
        assert_eq!(buffer.pieces().len(), 1);
        assert!(buffer.pieces()[0].pa.is_aligned(align));
    }
    let error = heap.alloc(3 * MIB).unwrap_err();
    let HeapError::NoMemory { largest, .. } = error else { panic!("{error}") };
    assert!(heap.alloc(largest).is_err() || largest <= MIB, "{largest:#x}");
    drop(buffers);
    // All of it has merged again.
    assert!(heap.alloc(5 * MIB).is_ok());
    drop(heap);
    memory.inner.assert_clean();
}

#[test]
fn a_region_in_use_stays_after_its_heap_is_gone() {
    let memory = coherent();
    let heap = CmaHeap::new("linux,cma", memory.clone(), MIB).unwrap();
    let buffer = heap.alloc(PAGE).unwrap();
    drop(heap);
    buffer.write(0, b"still there").unwrap();
    assert_eq!(memory.inner.outstanding(), 1);
    drop(buffer);
    memory.inner.assert_clean();
}

#[test]
fn a_carveout_stays_inside_of_its_region() {
    let memory = coherent();
    let carved = memory.inner.alloc(64 << 10, 4096).unwrap().pa;
    // Not quite on page boundaries.
    let heap = CarveoutHeap::new("carved", memory.clone(), carved.wrapping_add(8), 5 * PAGE).unwrap();
    let all: Vec<_> = core::iter::from_fn(|| heap.alloc(PAGE).ok()).collect();
    let at: Vec<u64> = all.iter().map(|buffer| buffer.pieces()[0].pa.get() - carved.get()).collect();
    assert_eq!(at, [PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE]);
    drop(all);
    // Pages are its only alignment.
    assert_eq!(heap.alloc(3 * PAGE).unwrap().pieces()[0].pa, carved.wrapping_add(PAGE));
    for (start, len) in [(Pa(0x1000), 0), (Pa(0x1001), PAGE), (Pa(u64::MAX), 1), (Pa(0), u64::MAX)] {
        let made = CarveoutHeap::new("bad", memory.clone(), start, len);
        assert_eq!(made.is_err(), len != u64::MAX, "{start}+{len:#x}");
    }
}

#[test]
fn impossible_sizes_are_refused() {
    let memory = coherent();
    for heap in heaps(&memory) {
        for len in [0, u64::MAX, u64::MAX - 4094] {
            let error = heap.alloc(len).err();
            assert!(matches!(error, Some(HeapError::Length { .. })), "{}: {len:#x}: {error:?}", heap.name());
        }
        assert!(matches!(heap.alloc(1 << 40), Err(HeapError::NoMemory { .. })), "{}", heap.name());
    }
}

#[test]
fn accesses_cross_pieces_and_stay_inside() {
    let memory = coherent();
    let buffer = SystemHeap::new(memory).alloc(4 * PAGE).unwrap();
    assert_eq!(buffer.pieces().len(), 4);
    let pattern: Vec<u8> = (0..3 * PAGE).map(|i| (i % 251) as u8).collect();
    buffer.write(PAGE / 2, &pattern).unwrap();
    assert!(bytes(&buffer, PAGE / 2, pattern.len()) == pattern);
    assert_eq!(bytes(&buffer, PAGE, 2), [pattern[2048], pattern[2049]]);
    assert_eq!(bytes(&buffer, 0, 8), [0; 8]);
    let size = 4 * PAGE;
    for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (0, size as usize + 1)] {
        let error = buffer.read(offset, &mut vec![0; len]).unwrap_err();
        assert_eq!(error, HeapError::Bounds { offset, len: len as u64, size });
        assert!(buffer.write(offset, &vec![0; len]).is_err());
    }
    buffer.read(size, &mut []).unwrap();
}

#[test]
fn one_buffer_two_devices_two_addresses_and_one_process_exits() {
    let memory = non_coherent();
    let heap = SystemHeap::new(memory.clone());
    let (camera, display) = (Engine::strict("camera", &memory), Engine::strict("display", &memory));
    // Something of its own keeps the display's addresses apart from the camera's.
    let other = heap.alloc(PAGE).unwrap().attach(&display.device);
    other.map(ToDevice).unwrap();

    let producer = HandleTable::new("producer");
    let consumer = HandleTable::new("consumer");
    consumer.export(other.buffer().clone()).unwrap();
    let handle = producer.export(heap.alloc(3 * PAGE).unwrap()).unwrap();
    let passed = producer.pass(handle, &consumer).unwrap();
    assert_ne!(handle, passed, "numbers are each process's own");
    assert!(producer.import(handle).unwrap().is_same(&consumer.import(passed).unwrap()));

    let in_camera = producer.import(handle).unwrap().attach(&camera.device);
    let in_display = consumer.import(passed).unwrap().attach(&display.device);
    let from = in_camera.map(FromDevice).unwrap()[0].iova;
    let to = in_display.map(ToDevice).unwrap()[0].iova;
    assert_ne!(from, to, "one buffer, two addresses");
    assert_eq!(camera.reach(from, true), display.reach(to, false));
    assert_eq!(camera.read(to, 1), None, "an address means something to its own device only");

    camera.write(from, b"a frame").unwrap();
    assert_eq!(display.read(to, 7).unwrap(), b"a frame");
    assert_eq!(display.write(to, b"x"), None, "mapped to be read");

    // The producer dies: its handle and its attachment go, and with it the camera's access.
    drop(in_camera);
    drop(producer);
    assert_eq!(camera.write(from, b"x"), None);
    assert_eq!(display.read(to, 7).unwrap(), b"a frame", "the consumer has references of its own");
    assert_eq!(bytes(&consumer.import(passed).unwrap(), 0, 7), b"a frame");

    drop(consumer);
    assert_eq!(display.read(to, 7).unwrap(), b"a frame", "and so has what is mapped");
    drop(in_display);
    assert_eq!(display.read(to, 1), None);
    assert_eq!(heap.usage().buffers, 1);
    drop(other);
    memory.inner.assert_clean();
}

#[test]
fn cpu_access_syncs_every_mapped_attachment() {
    let memory = non_coherent();
    let buffer = SystemHeap::new(memory.clone()).alloc(PAGE).unwrap();
    let (a, b) = (Engine::strict("a", &memory), Engine::strict("b", &memory));
    let attached = [buffer.attach(&a.device), buffer.attach(&b.device)];
    let at = attached.each_ref().map(|attachment| attachment.map(Bidirectional).unwrap()[0].iova);
    let idle = buffer.attach(&a.device);

    assert_eq!(bytes(&buffer, 0, 5), [0; 5], "the line is in the CPU's cache now");
    a.write(at[0], b"fresh").unwrap();
    assert_eq!(bytes(&buffer, 0, 5), [0; 5], "stale without a sync");
    buffer.begin_cpu_access().unwrap();
    assert_eq!(bytes(&buffer, 0, 5), b"fresh");

    buffer.write(0, b"reply").unwrap();
    assert_eq!(b.read(at[1], 5).unwrap(), b"fresh", "still in the CPU's cache");
    buffer.end_cpu_access().unwrap();
    assert_eq!(b.read(at[1], 5).unwrap(), b"reply");
    assert_eq!(buffer.attachments(), 3);
    drop((attached, idle));
    assert_eq!(buffer.attachments(), 0);
    buffer.begin_cpu_access().unwrap();
    buffer.end_cpu_access().unwrap();
}

#[test]
fn syncs_use_the_direction_of_each_mapping() {
    let memory = non_coherent();
    let buffer = SystemHeap::new(memory.clone()).alloc(PAGE).unwrap();
    let config = DeviceConfig::default().debug();
    let reader = Engine::new("reader", &memory, Mode::Strict, config);
    let writer = Engine::new("writer", &memory, Mode::Strict, config);
    let attached = [buffer.attach(&reader.device), buffer.attach(&writer.device)];
    attached[0].map(ToDevice).unwrap();
    attached[1].map(FromDevice).unwrap();
    buffer.begin_cpu_access().unwrap();
    buffer.end_cpu_access().unwrap();
    drop(attached);
    for engine in [&reader, &writer] {
        assert_eq!(engine.device.take_reports(), [], "the DMA API's debug mode has nothing to say");
        assert_eq!(engine.device.teardown(), 0);
    }
}

#[test]
fn scattered_memory_is_one_range_behind_an_iommu_only() {
    let memory = non_coherent();
    // Pieces with gaps between them.
    let held: Vec<_> = core::iter::from_fn(|| memory.inner.alloc(4096, 4096)).collect();
    held.iter().step_by(2).take(8).for_each(|block| memory.inner.free(*block));
    let system = SystemHeap::new(memory.clone()).alloc(4 * PAGE).unwrap();
    let engine = Engine::strict("behind", &memory);
    let config = DeviceConfig { mask_bits: 40, ..DeviceConfig::default() };
    let direct = DmaDevice::direct("bare", memory.clone(), config);
    let (behind, bare) = (system.attach(&engine.device), system.attach(&direct));
    assert_eq!(behind.map(ToDevice).unwrap().len(), 1);
    let list = bare.map(ToDevice).unwrap();
    assert_eq!(list.len(), 4, "the device has to follow a list");
    assert!(list.iter().zip(system.pieces()).all(|(segment, piece)| segment.iova.get() == piece.pa.get()));

    let memory = non_coherent();
    let cma = CmaHeap::new("linux,cma", memory.clone(), MIB).unwrap().alloc(4 * PAGE).unwrap();
    let direct = DmaDevice::direct("bare", memory, config);
    assert_eq!(cma.attach(&direct).map(ToDevice).unwrap().len(), 1, "which is what this heap is for");
}

#[test]
fn an_attachment_is_mapped_once_at_a_time() {
    let memory = coherent();
    let buffer = SystemHeap::new(memory.clone()).alloc(PAGE).unwrap();
    let engine = Engine::strict("engine", &memory);
    let (one, two) = (buffer.attach(&engine.device), buffer.attach(&engine.device));
    let not_mapped = Err(HeapError::NotMapped { device: "engine".into() });
    assert_eq!((one.unmap(), one.segments()), (not_mapped.clone(), None));
    let segments = one.map(ToDevice).unwrap();
    assert_eq!(one.segments().as_ref(), Some(&segments));
    assert_eq!(one.map(ToDevice), Err(HeapError::Mapped { device: "engine".into() }));
    // Another attachment of the same device is another mapping.
    assert_ne!(two.map(FromDevice).unwrap(), segments);
    one.unmap().unwrap();
    assert_eq!(one.unmap(), not_mapped);
    one.map(Bidirectional).unwrap();
    assert_eq!(buffer.references(), 3);
}

#[test]
fn a_failed_map_leaves_the_attachment_as_it_was() {
    let memory = coherent();
    let buffer = SystemHeap::new(memory.clone()).alloc(PAGE).unwrap();
    let direct = DmaDevice::direct("small", memory.clone(), DeviceConfig::default().mask(20));
    let attachment = buffer.attach(&direct);
    assert!(matches!(attachment.map(ToDevice), Err(HeapError::Dma(DmaError::BeyondMask { .. }))));
    assert_eq!(attachment.segments(), None);
    drop((attachment, buffer));
    memory.inner.assert_clean();
}

#[test]
fn memory_that_a_device_may_still_reach_is_never_reused() {
    let memory = coherent();
    let heap = SystemHeap::new(memory.clone());
    let engine = Engine::strict("stuck", &memory);
    let buffer = heap.alloc(PAGE).unwrap();
    let attachment = buffer.attach(&engine.device);
    attachment.map(Bidirectional).unwrap();
    engine.domain.dead.store(true, Ordering::Relaxed);
    assert!(matches!(attachment.unmap(), Err(HeapError::Dma(DmaError::Unmap { .. }))));
    drop((attachment, buffer));
    assert_eq!(heap.usage(), HeapUsage { buffers: 0, bytes: 0, kept: PAGE });
    assert_eq!(memory.inner.outstanding(), 1);
}

#[test]
fn a_lazy_space_is_flushed_before_memory_is_free() {
    let memory = coherent();
    let heap = SystemHeap::new(memory.clone());
    let engine = Engine::new("lazy", &memory, Mode::Lazy, DeviceConfig::default().coherent(true));
    let map = || {
        let attachment = heap.alloc(PAGE).unwrap().attach(&engine.device);
        let iova = attachment.map(Bidirectional).unwrap()[0].iova;
        engine.write(iova, b"known to the TLB").unwrap();
        (attachment, iova)
    };
    let (attachment, iova) = map();
    attachment.unmap().unwrap();
    assert!(engine.reach(iova, true).is_some(), "the trade that lazy mode makes");
    drop(attachment);
    assert_eq!(engine.reach(iova, true), None, "but not for memory that is free");
    memory.inner.assert_clean();

    let (attachment, iova) = map();
    engine.domain.dead.store(true, Ordering::Relaxed);
    drop(attachment);
    assert!(engine.reach(iova, true).is_some());
    assert_eq!((heap.usage().kept, memory.inner.outstanding()), (PAGE, 1));
}

#[test]
fn handles_are_the_lowest_free_numbers_and_bounded() {
    let memory = coherent();
    let heap: Arc<dyn Heap<Memory>> = Arc::new(SystemHeap::new(memory.clone()));
    let process = HandleTable::with_limit("app", 3);
    let new = || process.export(heap.alloc(PAGE).unwrap());
    assert_eq!([new(), new(), new()], [Ok(Handle(0)), Ok(Handle(1)), Ok(Handle(2))]);
    assert_eq!(new(), Err(HeapError::TooManyHandles { process: "app".into(), limit: 3 }));
    process.close(Handle(1)).unwrap();
    assert_eq!((process.len(), heap.usage().buffers), (2, 2), "the buffer went with its last handle");
    for bad in [Handle(1), Handle(3), Handle(u32::MAX)] {
        let error = HeapError::BadHandle { process: "app".into(), handle: bad };
        assert_eq!(process.close(bad), Err(error.clone()));
        assert_eq!(process.import(bad).map(drop), Err(error.clone()));
        assert_eq!(process.pass(bad, &process), Err(error));
    }
    assert_eq!(process.pass(Handle(2), &process), Ok(Handle(1)), "a second number for the same buffer");
    process.close(Handle(2)).unwrap();
    assert_eq!(process.import(Handle(1)).unwrap().references(), 2);
    drop(process);
    memory.inner.assert_clean();
}

#[test]
fn the_list_of_pieces_is_what_the_buffer_consists_of() {
    let memory = coherent();
    let buffer = CmaHeap::new("linux,cma", memory, MIB).unwrap().alloc(PAGE + 1).unwrap();
    let SgEntry { pa, len } = buffer.pieces()[0];
    assert_eq!((len, buffer.len(), buffer.is_empty()), (2 * PAGE, 2 * PAGE, false));
    buffer.write(PAGE - 1, b"ab").unwrap();
    assert_eq!(bytes(&buffer, PAGE, 1), b"b");
    assert!(pa.is_aligned(2 * PAGE));
}
