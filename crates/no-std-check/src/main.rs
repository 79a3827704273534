//! Links all software crates into a program without std: its own allocator, panic handler and entry point.
//!
//! std brings a panic handler of its own, so if one of the crates, or one of their dependencies, pulled std in, this would not
//! compile ("found duplicate lang item `panic_impl`"). It instantiates the drivers and runs them, because generic code that
//! nobody uses is not compiled. No C library either: `memcpy` and its like are here, as a kernel brings its own. Built
//! and run by `scripts/check-no-std`.
#![no_std]
#![no_main]

extern crate alloc;

mod mem;
mod platform;

use alloc::sync::Arc;
use core::panic::PanicInfo;

use portcullis_arch::{Iova, Pa};
use portcullis_drivers::axidma::{self, AxiDma, ChannelConfig};
use portcullis_drivers::dmaengine::{Direction, Registry};
use portcullis_drivers::ops::DomainSpec;
use portcullis_drivers::plwriter::PlWriter;
use portcullis_drivers::smmuv2::{Options, SmmuV2};
use portcullis_drivers::smmuv3::{self, SmmuV3};
use portcullis_drivers::zdma::{Config, DescriptorPool, POOL_BYTES, Zdma};
use portcullis_hal::{Clock, DmaMemory};
use portcullis_iommu::dma::{DeviceConfig, DmaDevice};
use portcullis_iommu::{
    BindOptions, FwSpec, InstanceId, IommuCore, MasterOptions, Paging, Process, ProcessConfig, Prot,
};
use portcullis_proxy::{Dma, Proxy, ProxyError, test};
use portcullis_vfio::{
    self as vfio, AssignOptions, GuestIommu, Interrupt, LocalVm, LocalVmConfig, Passthrough, PlatformDevice,
    Region, VFIO_DRIVER,
};

use platform::{Acknowledging, Memory, Resetting, Ticks, Window};

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    platform::exit(101)
}

/// What the kernel jumps to, with a stack that is aligned as before a call.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    core::arch::naked_asm!("call {main}", "ud2", main = sym main)
}

extern "C" fn main() -> ! {
    platform::exit(run().map_or_else(|step| step, |()| 0))
}

/// Core and alloc of the host's toolchain mention the personality of unwinding; with `panic = "abort"` nobody calls
/// it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// The same: the host's alloc mentions it where it formats text.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    platform::exit(102)
}

/// One device, from probe to process exit. The error is the number of the step that failed.
fn run() -> Result<(), i32> {
    let memory = Memory::new(0x1000_0000, 2 << 20);
    let window = Window::new(0x2_0000);
    for (offset, value) in [(0x20, 0x7c01_3e30), (0x24, 0x3000_0010), (0x28, 0x5555)] {
        window.set(offset, value);
    }
    let options = Options::new(0x2_0000, "arm,mmu-500");
    let smmu = SmmuV2::probe(window, memory.clone(), Ticks::default(), options).map_err(|_| 1)?;
    let core = IommuCore::default();
    let instance = core.register("smmu", Arc::new(smmu));
    let spec = FwSpec::from_cells(&[0x868], 1, None).map_err(|_| 2)?;
    let device = core.add_device("dma", instance, &spec, &[]).map_err(|_| 3)?;
    let domain = core.paging_domain(instance).map_err(|_| 4)?;
    core.attach_device(device, &domain).map_err(|_| 5)?;
    domain.map(Iova(0x7000_0000), Pa(0x6000_0000), 0x40_0000, Prot::RW).map_err(|_| 6)?;
    if domain.iova_to_phys(Iova(0x7012_3456)) != Some(Pa(0x6012_3456)) {
        return Err(7);
    }
    domain.unmap(Iova(0x7000_0000), 0x40_0000).map_err(|_| 8)?;
    let stage2 = core.alloc_domain(instance, DomainSpec::Stage2(Paging::default())).map_err(|_| 9)?;
    core.nested_domain(&stage2, Paging::default()).map_err(|_| 10)?;
    core.detach_device(device).map_err(|_| 11)?;
    let process = Process::new(memory.clone(), ProcessConfig::default()).map_err(|_| 12)?;
    process.mmap(0x3000, Prot::RW.cached()).map_err(|_| 13)?;
    core.bind(device, process.clone()).map_err(|_| 14)?;
    process.exit().map_err(|_| 15)?;
    core.unbind(device).map_err(|_| 16)?;
    core.handle_irq(instance).map_err(|_| 17)?;

    let block = memory.alloc(POOL_BYTES, 64).ok_or(18)?;
    let pool = DescriptorPool { block, iova: Iova(block.pa.get()) };
    let channel = Zdma::new(Window::new(0x1000), memory.clone(), pool, Config::default()).map_err(|_| 19)?;
    channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 0x100).map_err(|_| 20)?;
    channel.issue_pending();
    let ended = channel.terminate(&Ticks::default(), 10).map_err(|_| 21)?;
    if ended != 1 {
        return Err(22);
    }
    PlWriter::new(Window::new(0x100)).write(Iova(0x1000), 0xcafe_beef, 0, 0xf).map_err(|_| 23)?;
    proxy(&memory)?;
    passthrough(core, instance, &memory)?;
    smmuv3(memory)
}

/// A dma-proxy on an AXI DMA without scatter-gather. Its buffers are larger than this program's memory.
fn proxy(memory: &Memory) -> Result<(), i32> {
    let width = ChannelConfig { data_width: 32, ..ChannelConfig::default() };
    let config =
        axidma::Config { mm2s: Some(width), s2mm: Some(width), length_bits: 26, ..axidma::Config::default() };
    let driver = AxiDma::new("dma", Resetting::new(0x1000), memory.clone(), Ticks::default(), config);
    let driver = driver.map_err(|_| 24)?;
    let registry = Registry::new();
    for (cell, direction) in [(0, Direction::MemToDev), (1, Direction::DevToMem)] {
        let channel = driver.channel(direction).ok_or(25)?;
        registry.register("dma", cell, channel.clone()).map_err(|_| 26)?;
    }
    let device = DmaDevice::direct("proxy", memory.clone(), DeviceConfig::default());
    let names = [("dma_proxy_tx", 0), ("dma_proxy_rx", 1)];
    let dmas = names.map(|(name, cell)| Dma { name, provider: "dma", cell });
    match Proxy::probe(&registry, &dmas, &device, Ticks::default()) {
        Err(ProxyError::Memory(_)) => {}
        Err(_) => return Err(27),
        Ok(proxy) => {
            let arguments = test::Arguments::parse(&["1", "4096"]).map_err(|_| 28)?;
            test::run(&proxy, arguments, |_| ()).map_err(|_| 29)?;
        }
    }
    driver.stop().map_err(|_| 30)
}

/// A channel goes to a virtual machine with an IOMMU of its own, and comes back.
fn passthrough(core: IommuCore, instance: InstanceId, memory: &Memory) -> Result<(), i32> {
    let spec = FwSpec::from_cells(&[0x869], 1, None).map_err(|_| 45)?;
    let device = core.add_device("channel", instance, &spec, &[]).map_err(|_| 46)?;
    let clock: Arc<dyn Clock> = Arc::new(Ticks::default());
    let passthrough = Passthrough::new(vfio::Registry::new(core, clock.clone()));
    let registry = passthrough.registry();
    let channel = PlatformDevice {
        name: "channel".into(),
        compatible: ["xlnx,zynqmp-dma-1.0".into()].into(),
        device: Some(device),
        regions: [Region::new(Pa(0xffa8_0000), 0x1000, Arc::new(Window::new(0x1000)))].into(),
        interrupts: [Interrupt::level(77)].into(),
    };
    registry.add_device(channel).map_err(|_| 47)?;
    registry.bind("channel", VFIO_DRIVER).map_err(|_| 48)?;
    let mut config = LocalVmConfig::new("guest", 0x1_0000);
    config.memory.block = 0x1000;
    let vm = LocalVm::new(config, memory.clone(), clock).map_err(|_| 49)?;
    let options = AssignOptions { viommu: true, ..AssignOptions::default() };
    let assignment = passthrough.assign("channel", vm.clone(), options).map_err(|_| 50)?;
    let viommu = assignment.viommu().ok_or(51)?;
    let guest = IommuCore::default();
    let driver = GuestIommu::new(viommu, vm.guest_memory().clone()).map_err(|_| 52)?;
    let instance = guest.register("viommu", driver);
    let spec = FwSpec::from_cells(&[0], 1, None).map_err(|_| 53)?;
    let device = guest.add_device("channel", instance, &spec, &[]).map_err(|_| 54)?;
    let domain = guest.paging_domain(instance).map_err(|_| 55)?;
    guest.attach_device(device, &domain).map_err(|_| 56)?;
    let buffer = vm.guest_memory().alloc(0x1000, 0x1000).ok_or(57)?;
    domain.map(Iova(0x7000_0000), buffer.pa, 0x1000, Prot::RW).map_err(|_| 58)?;
    domain.unmap(Iova(0x7000_0000), 0x1000).map_err(|_| 59)?;
    vm.kill();
    let reaped = passthrough.reap();
    if reaped.len() == 1 && reaped.iter().all(|(_, _, result)| result.is_ok()) { Ok(()) } else { Err(60) }
}

/// The same for an SMMUv3 with substreams.
fn smmuv3(memory: Memory) -> Result<(), i32> {
    let window = Acknowledging::new(0x2_0000);
    for (offset, value) in [(0x00, 0x0844_100b), (0x04, 0x00e7_3a08), (0x0c, 1 << 10), (0x14, 0x15)] {
        window.set(offset, value);
    }
    let options = smmuv3::Options { queue_log2: [7, 7, 7], ..smmuv3::Options::new(0x2_0000) };
    let smmu = SmmuV3::probe(window, memory.clone(), Ticks::default(), options).map_err(|_| 31)?;
    let core = IommuCore::default();
    let instance = core.register("smmu", Arc::new(smmu));
    let spec = FwSpec::from_cells(&[0x42], 1, None).map_err(|_| 32)?;
    let master = MasterOptions { substream_bits: 8, can_stall: true, ats: false };
    let device = core.add_device_with("dma", instance, &spec, &[], master).map_err(|_| 33)?;
    let domain = core.paging_domain(instance).map_err(|_| 34)?;
    core.attach_device(device, &domain).map_err(|_| 35)?;
    domain.map(Iova(0x7000_0000), Pa(0x6000_0000), 0x40_0000, Prot::RW).map_err(|_| 36)?;
    domain.unmap(Iova(0x7000_0000), 0x40_0000).map_err(|_| 37)?;
    let process = Process::new(memory, ProcessConfig::default()).map_err(|_| 38)?;
    process.mmap(0x3000, Prot::RW.cached()).map_err(|_| 39)?;
    let (substream, _) =
        core.bind_substream(device, process.clone(), BindOptions::default()).map_err(|_| 40)?;
    process.exit().map_err(|_| 41)?;
    core.unbind_substream(device, substream).map_err(|_| 42)?;
    core.handle_irq(instance).map_err(|_| 43)?;
    core.remove_device(device).map_err(|_| 44)
}
