//! The DMA API over a page table, a TLB that forgets only when told, and memory with a view of its own for devices.

mod bounce;
mod coherent;
mod debug;
mod lazy;
mod over_smmu;
mod sg;
mod single;

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use portcullis_arch::{Asid, Iova, Pa};
use portcullis_drivers::ops::{DomainKind, DomainOps, IommuError, TableRoot};
use portcullis_drivers::smmuv2;
use portcullis_hal::DmaMemory;
use portcullis_hal::fake::FakeMemory;
use portcullis_pgtable::{Config, Flush, Granule, LazyFlush, PageTable, Stage1};
use spin::Mutex;

use super::*;
use crate::{Domain, InstanceId, Prot};

const PAGE: u64 = 0x1000;
const NONE: DmaAttrs = DmaAttrs::NONE;

/// A domain with a TLB.
struct TestDomain {
    table: PageTable<Stage1, Arc<FakeMemory>>,
    tlb: Mutex<BTreeMap<u64, (u64, Prot)>>,
    /// Calls of `invalidate_all`.
    flushes: AtomicUsize,
    /// `invalidate_all` fails.
    stuck: AtomicBool,
    /// And so does every other invalidation.
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

fn failed() -> IommuError {
    IommuError::Unsupported { what: "working TLB" }
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
        if self.dead.load(Ordering::Relaxed) { Err(failed()) } else { Ok(bytes) }
    }
    fn unmap_lazy(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        Ok(self.table.unmap(iova, len, &mut LazyFlush(Forget(self))).unwrap())
    }
    fn protect(&self, _: Iova, _: u64, _: Prot) -> Result<(), IommuError> {
        Err(failed())
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
        if self.dead.load(Ordering::Relaxed) {
            return Err(failed());
        }
        Forget(self).leaf(iova.get(), len, PAGE);
        Ok(())
    }
    fn invalidate_all(&self) -> Result<(), IommuError> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        if self.stuck.load(Ordering::Relaxed) {
            return Err(failed());
        }
        self.tlb.lock().clear();
        Ok(())
    }
    fn stop_walks(&self) -> Result<(), IommuError> {
        Err(failed())
    }
}

/// A machine with one device.
struct Rig {
    memory: Arc<FakeMemory>,
    tables: Arc<FakeMemory>,
    domain: Arc<TestDomain>,
    space: Arc<DmaSpace>,
}

fn space_over(domain: &Arc<TestDomain>, config: SpaceConfig<'_>) -> Result<Arc<DmaSpace>, DmaError> {
    DmaSpace::new(Domain::new(domain.clone(), InstanceId(0)), config)
}

impl Rig {
    fn with(memory: FakeMemory, config: SpaceConfig<'_>) -> Self {
        let tables = Arc::new(FakeMemory::plain(0x4000_0000, 2 << 20));
        let table = PageTable::new(tables.clone(), Config::new(Granule::K4, 40, 40)).unwrap();
        let domain = Arc::new(TestDomain {
            table,
            tlb: Mutex::default(),
            flushes: AtomicUsize::new(0),
            stuck: AtomicBool::new(false),
            dead: AtomicBool::new(false),
        });
        let space = space_over(&domain, config).unwrap();
        Self { memory: Arc::new(memory), tables, domain, space }
    }

    fn coherent() -> Self {
        Self::with(FakeMemory::plain(0x8000_0000, 8 << 20), SpaceConfig::default())
    }

    fn non_coherent() -> Self {
        Self::with(FakeMemory::non_coherent(0x8000_0000, 1 << 20), SpaceConfig::default())
    }

    fn lazy() -> Self {
        let config = SpaceConfig { mode: Mode::Lazy, ..SpaceConfig::default() };
        Self::with(FakeMemory::plain(0x8000_0000, 8 << 20), config)
    }

    /// A coherent device, with the debug mode off.
    fn device(&self) -> DmaDevice<Arc<FakeMemory>> {
        self.device_with(DeviceConfig::default().coherent(true))
    }

    fn device_with(&self, config: DeviceConfig) -> DmaDevice<Arc<FakeMemory>> {
        DmaDevice::translated("a0000000.dma", self.space.clone(), self.memory.clone(), config)
    }

    /// Whole pages of memory with a pattern.
    fn buffer(&self, len: usize) -> Pa {
        let pa = self.memory.alloc(len, PAGE as usize).unwrap().pa;
        self.memory.write(pa, &pattern(len));
        pa
    }

    fn cpu(&self, pa: Pa, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(pa, &mut bytes);
        bytes
    }

    /// Where the device gets with an access inside a page: what the TLB remembers, or a walk.
    fn reach(&self, iova: Iova, write: bool) -> Option<Pa> {
        let page = iova.get() & !(PAGE - 1);
        let mut tlb = self.domain.tlb.lock();
        let (target, prot) = match tlb.get(&page) {
            Some(entry) => *entry,
            None => {
                let mapping = self.domain.table.lookup(Iova(page))?;
                tlb.insert(page, (mapping.pa.get(), mapping.prot));
                (mapping.pa.get(), mapping.prot)
            }
        };
        let allowed = if write { prot.write } else { prot.read };
        allowed.then(|| Pa(target + (iova.get() - page)))
    }

    fn device_read(&self, iova: Iova, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        for (i, byte) in bytes.iter_mut().enumerate() {
            let pa = self.reach(iova.wrapping_add(i as u64), false)?;
            self.memory.device_read(pa, core::slice::from_mut(byte));
        }
        Some(bytes)
    }

    fn device_write(&self, iova: Iova, bytes: &[u8]) -> Option<()> {
        for (i, byte) in bytes.iter().enumerate() {
            let pa = self.reach(iova.wrapping_add(i as u64), true)?;
            self.memory.device_write(pa, &[*byte]);
        }
        Some(())
    }

    fn flushes(&self) -> usize {
        self.domain.flushes.load(Ordering::Relaxed)
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 256) as u8 | 1).collect()
}
