//! A virtual machine inside of this process: [`LocalVm`].
//!
//! It has memory of its own, scattered over the host's ([`GuestMemory`]), a bus for device registers ([`GuestBus`]), interrupt
//! lines ([`GuestLines`]) and time ([`GuestClock`]). What runs in it is any code over the traits of `portcullis-hal`: drivers
//! that know only guest addresses. Machines are independent of each other and can run on threads of their own.
//!
//! ```text
//! let vm = LocalVm::new(LocalVmConfig::new("a", 64 << 20), host_memory, host_clock)?;
//! let registers = vm.bus().window(ipa, size)?;      // a device that was assigned
//! let driver = SomeDriver::new(registers, vm.guest_memory().clone(), ..);
//! for line in vm.lines().take() { driver.handle_irq(); vm.lines().end(line); }
//! ```

mod bus;
mod clock;
mod heap;
mod lines;
mod memory;
#[cfg(test)]
mod tests;

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::Ipa;
use portcullis_hal::{Clock, DmaMemory};

use crate::{DeviceWindow, EndOfInterrupt, GuestRange, PinMemory, Vm, VmError};

pub use bus::{GuestBus, GuestMmio};
pub use clock::GuestClock;
pub use lines::GuestLines;
pub use memory::{GuestMemory, GuestMemoryConfig};

/// What a machine shall be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalVmConfig {
    /// Its name.
    pub name: String,
    /// Its memory.
    pub memory: GuestMemoryConfig,
    /// First and last address of the space for devices whose wanted address is taken.
    pub devices: (Ipa, Ipa),
    /// Number of interrupt lines.
    pub lines: u32,
}

impl LocalVmConfig {
    /// Memory of `bytes` from 1 GiB up in blocks of 64 KiB, devices wherever the host has them or from 256 MiB up, 256 lines.
    pub fn new(name: &str, bytes: u64) -> Self {
        Self {
            name: name.to_string(),
            memory: GuestMemoryConfig::new(Ipa(0x4000_0000), bytes),
            devices: (Ipa(0x1000_0000), Ipa(0x3fff_ffff)),
            lines: 256,
        }
    }
}

/// A virtual machine inside of this process, with memory from `M`. Handles are [`Arc`]s.
pub struct LocalVm<M: DmaMemory + 'static> {
    name: String,
    memory: GuestMemory<M>,
    bus: GuestBus,
    lines: GuestLines,
    clock: GuestClock,
}

impl<M: DmaMemory + 'static> fmt::Debug for LocalVm<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalVm").field("name", &self.name).field("memory", &self.memory).finish()
    }
}

impl<M: DmaMemory + 'static> LocalVm<M> {
    /// Makes a machine with memory from `host`; its time begins now.
    pub fn new(config: LocalVmConfig, host: M, clock: Arc<dyn Clock>) -> Result<Arc<Self>, VmError> {
        let memory = GuestMemory::new(&config.name, host, config.memory)?;
        let (first, last) = memory.range();
        let bus = GuestBus::new(&config.name, config.devices, (first, last));
        let lines = GuestLines::new(&config.name, config.lines);
        Ok(Arc::new(Self { name: config.name, memory, bus, lines, clock: GuestClock::new(clock) }))
    }

    /// Its memory as the guest sees it.
    pub fn guest_memory(&self) -> &GuestMemory<M> {
        &self.memory
    }
    /// Its device registers.
    pub fn bus(&self) -> &GuestBus {
        &self.bus
    }
    /// Its interrupt lines.
    pub fn lines(&self) -> &GuestLines {
        &self.lines
    }
    /// Its time.
    pub fn clock(&self) -> &GuestClock {
        &self.clock
    }

    /// The machine dies, in the middle of whatever it does: its memory and registers are out of its reach at once. Its
    /// devices go on until the host takes them ([`Passthrough::reap`](crate::Passthrough::reap)); its memory is zeroed and
    /// given back as soon as no device can reach it any more, whatever of the guest still holds a handle.
    pub fn kill(&self) {
        self.memory.kill();
        self.bus.kill();
        self.lines.kill();
    }
}

impl<M: DmaMemory + 'static> Vm for LocalVm<M> {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn is_alive(&self) -> bool {
        self.memory.is_alive()
    }
    fn memory(&self) -> Vec<GuestRange> {
        Vec::from([self.memory.guest_range()])
    }
    fn pins(&self) -> Arc<dyn PinMemory> {
        self.memory.pins()
    }
    fn place(&self, window: DeviceWindow) -> Result<Ipa, VmError> {
        self.bus.place(window)
    }
    fn withdraw(&self, ipa: Ipa) -> Result<(), VmError> {
        self.bus.withdraw(ipa)
    }
    fn connect_line(&self, wanted: Option<u32>, eoi: Arc<dyn EndOfInterrupt>) -> Result<u32, VmError> {
        self.lines.connect(wanted, eoi)
    }
    fn disconnect_line(&self, line: u32) {
        self.lines.disconnect(line);
    }
    fn set_line(&self, line: u32, high: bool) {
        self.lines.set(line, high);
    }
}
