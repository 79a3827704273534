//! A host for tests: an SMMUv2 driver over registers that remember, and AXI DMA cores that can be made to misbehave.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use portcullis_arch::Pa;
use portcullis_drivers::smmuv2::{Options, SmmuV2};
use portcullis_hal::fake::{FakeClock, FakeMemory, FakeMmio};
use portcullis_hal::{Clock, DmaMemory};
use portcullis_iommu::{DefaultDomain, DeviceId, FwSpec, InstanceId, IommuCore, ReservedRegion};
use spin::Mutex;

use crate::{HostDriver, Interrupt, LocalVm, LocalVmConfig, Passthrough, PlatformDevice, Region, Registry};

const CR: [usize; 2] = [0x00, 0x30];
const CR_RESET: u32 = 0x0001_0002;
const SR_RESET: u32 = 0x0001_0009;

#[derive(Default)]
struct Moods {
    never_halts: AtomicBool,
    stuck: AtomicBool,
    /// A core that is stuck obeys again while this holds.
    obeys: Mutex<Option<Box<dyn Fn() -> bool + Send>>>,
}

/// The registers of an AXI DMA core.
#[derive(Clone)]
pub struct AxiCore {
    regs: Arc<FakeMmio>,
    moods: Arc<Moods>,
}

impl AxiCore {
    pub fn new() -> Self {
        let moods = Arc::new(Moods::default());
        let seen = moods.clone();
        let regs = Arc::new(FakeMmio::with_handler(move |regs, access| {
            let block = CR.into_iter().find(|cr| access.offset & !4 == *cr)?;
            let (held, value) = (regs.get32(access.offset), access.value as u32);
            if !access.write {
                return None;
            }
            if access.offset == block + 4 {
                return Some(u64::from(held & !(value & 0x7000)));
            }
            let obeys = seen.obeys.lock().as_ref().is_some_and(|obeys| obeys());
            let stuck = seen.stuck.load(Ordering::Relaxed) && !obeys;
            if value & 4 != 0 && !stuck {
                for cr in CR {
                    regs.set32(cr, CR_RESET);
                    regs.set32(cr + 4, SR_RESET);
                }
                return Some(CR_RESET.into());
            }
            let sr = regs.get32(block + 4);
            if value & 1 != 0 {
                regs.set32(block + 4, sr & !1);
            } else if !seen.never_halts.load(Ordering::Relaxed) && !stuck {
                regs.set32(block + 4, sr | 1);
            }
            Some((value | 2).into())
        }));
        for cr in CR {
            regs.set32(cr, CR_RESET);
            regs.set32(cr + 4, SR_RESET);
        }
        Self { regs, moods }
    }

    pub fn registers(&self) -> &Arc<FakeMmio> {
        &self.regs
    }

    /// Both channels run, with interrupts.
    pub fn start(&self) {
        for cr in CR {
            self.regs.set32(cr, CR_RESET | 0x7001);
            self.regs.set32(cr + 4, SR_RESET & !1);
        }
        self.regs.take_log();
    }

    pub fn is_stopped(&self) -> bool {
        CR.iter().all(|cr| self.regs.get32(*cr) == CR_RESET && self.regs.get32(cr + 4) & 0x7001 == 1)
    }

    pub fn never_halts(&self, on: bool) {
        self.moods.never_halts.store(on, Ordering::Relaxed);
    }

    /// Nothing stops it.
    pub fn stuck(&self, on: bool) {
        self.moods.stuck.store(on, Ordering::Relaxed);
    }

    /// Nothing stops it unless `obeys()`.
    pub fn stuck_unless(&self, obeys: impl Fn() -> bool + Send + 'static) {
        *self.moods.obeys.lock() = Some(Box::new(obeys));
        self.stuck(true);
    }
}

pub fn axi_device(name: &str, core: &AxiCore) -> PlatformDevice {
    PlatformDevice {
        name: name.to_string(),
        compatible: vec!["xlnx,axi-dma-1.00.a".to_string()],
        device: None,
        regions: vec![Region::new(Pa(0xa000_0000), 0x1000, core.regs.clone())],
        interrupts: vec![Interrupt::level(89), Interrupt::level(90)],
    }
}

/// A host driver that remembers what it was asked.
pub struct FakeDriver {
    pub name: &'static str,
    pub compatible: &'static str,
    pub log: Mutex<Vec<String>>,
    pub refuses: AtomicBool,
}

impl FakeDriver {
    pub fn new(name: &'static str, compatible: &'static str) -> Arc<Self> {
        Arc::new(Self { name, compatible, log: Mutex::default(), refuses: AtomicBool::new(false) })
    }
    fn note(&self, what: &str, device: &PlatformDevice) -> Result<(), String> {
        self.log.lock().push(alloc::format!("{what} {}", device.name));
        if self.refuses.load(Ordering::Relaxed) { Err("busy".to_string()) } else { Ok(()) }
    }
}

impl HostDriver for FakeDriver {
    fn name(&self) -> &str {
        self.name
    }
    fn compatible(&self) -> Vec<String> {
        vec![self.compatible.to_string()]
    }
    fn probe(&self, device: &PlatformDevice) -> Result<(), String> {
        self.note("probe", device)
    }
    fn remove(&self, device: &PlatformDevice) -> Result<(), String> {
        self.note("remove", device)
    }
}

const S2CR: usize = 0xc00;

/// An SMMUv2 whose TLB never synchronises while the flag is set.
pub fn smmu<M: DmaMemory + Clone + 'static>(
    memory: &M,
) -> (Arc<dyn portcullis_iommu::IommuOps>, Arc<FakeMmio>, Arc<AtomicBool>) {
    let stuck = Arc::new(AtomicBool::new(false));
    let busy = stuck.clone();
    let mmio = Arc::new(FakeMmio::with_handler(move |registers, access| {
        let page = access.offset & 0xfff;
        match (access.write, access.offset >= 0x1_0000) {
            (true, true) if page == 0x58 => {
                Some(u64::from(registers.get32(access.offset)) & !(access.value & 0x8000_01fe))
            }
            (true, false) if access.offset == 0x48 => {
                Some(u64::from(registers.get32(access.offset)) & !access.value)
            }
            // CBn_TLBSTATUS and sTLBGSTATUS.
            (false, true) if page == 0x7f4 => Some(busy.load(Ordering::Relaxed).into()),
            (false, false) if access.offset == 0x74 => Some(busy.load(Ordering::Relaxed).into()),
            _ => None,
        }
    }));
    for (offset, value) in
        [(0x00, 0x0020_0001), (0x20, 0x7c01_3e30), (0x24, 0x3000_0010), (0x28, 0x5555), (0x3c, 0x21)]
    {
        mmio.set32(offset, value);
    }
    let options = Options { tlb_timeout_us: 100, ..Options::new(0x2_0000, "arm,mmu-500") };
    let smmu = SmmuV2::probe(mmio.clone(), memory.clone(), Arc::new(FakeClock::new()), options).unwrap();
    (Arc::new(smmu), mmio, stuck)
}

pub struct Host {
    pub core: IommuCore,
    pub smmu: InstanceId,
    pub mmio: Arc<FakeMmio>,
    pub tlb_stuck: Arc<AtomicBool>,
    pub memory: Arc<FakeMemory>,
    pub clock: Arc<FakeClock>,
    pub registry: Registry,
    pub passthrough: Passthrough,
}

pub fn host() -> Host {
    host_with(DefaultDomain::Blocked)
}

pub fn host_with(default: DefaultDomain) -> Host {
    let memory = Arc::new(FakeMemory::plain(0x1000_0000, 32 << 20));
    let (ops, mmio, tlb_stuck) = smmu(&memory);
    let core = IommuCore::new(default);
    let smmu = core.register("fd800000.iommu", ops);
    let clock = Arc::new(FakeClock::new());
    let registry = Registry::new(core.clone(), clock.clone() as Arc<dyn Clock>);
    let passthrough = Passthrough::new(registry.clone());
    Host { core, smmu, mmio, tlb_stuck, memory, clock, registry, passthrough }
}

impl Host {
    pub fn iommu_device(&self, name: &str, ids: &[u32], reserved: &[ReservedRegion]) -> DeviceId {
        let spec = FwSpec::from_cells(ids, 1, None).unwrap();
        self.core.add_device(name, self.smmu, &spec, reserved).unwrap()
    }

    /// An AXI DMA, entered everywhere and bound to nothing. Gives its registers.
    pub fn dma(&self, name: &str, ids: &[u32]) -> AxiCore {
        let core = AxiCore::new();
        let device = self.iommu_device(name, ids, &[]);
        let device = PlatformDevice { device: Some(device), ..axi_device(name, &core) };
        self.registry.add_device(device).unwrap();
        core
    }

    /// The same, bound to the passthrough driver.
    pub fn vfio_dma(&self, name: &str, ids: &[u32]) -> AxiCore {
        let core = self.dma(name, ids);
        self.registry.bind(name, crate::VFIO_DRIVER).unwrap();
        core
    }

    pub fn vm(&self, name: &str, bytes: u64) -> Arc<LocalVm<Arc<FakeMemory>>> {
        LocalVm::new(LocalVmConfig::new(name, bytes), self.memory.clone(), self.clock.clone()).unwrap()
    }

    pub fn s2cr(&self, n: usize) -> u32 {
        self.mmio.get32(S2CR + n * 4)
    }

    /// Whether the first stream match groups are blocked (S2CR type fault).
    pub fn is_blocked(&self, n: usize) -> bool {
        self.s2cr(n) >> 16 & 3 == 2
    }

    /// A context fault as the hardware would show it.
    pub fn fault(&self, bank: u8, stream: u32, iova: u64) {
        let at = |offset| 0x1_0000 + usize::from(bank) * 0x1000 + offset;
        self.mmio.set64(at(0x060), iova);
        self.mmio.set32(at(0x058), 0x402);
        self.mmio.set32(at(0x068), 0x3);
        self.mmio.set32(0x1400 + usize::from(bank) * 4, stream);
        self.core.handle_irq(self.smmu).unwrap();
    }
}
