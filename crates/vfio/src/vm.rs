//! What passthrough needs from a virtual machine: [`Vm`].
//!
//! [`LocalVm`](crate::LocalVm) is one inside of this process. A machine whose CPU is an emulator of its own implements the same
//! trait: its memory is a list of ranges, its interrupt controller takes levels, and its bus takes windows.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::{Ipa, Pa};
use portcullis_hal::Mmio;
use thiserror::Error;

use crate::PinMemory;

/// A range of host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostRange {
    /// First address.
    pub pa: Pa,
    /// Bytes.
    pub len: u64,
}

/// A range of guest memory and what is behind it, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First address in the guest.
    pub ipa: Ipa,
    /// Bytes; the sum of the backing.
    pub len: u64,
    /// Host memory behind it.
    pub backing: Vec<HostRange>,
    /// Devices may write it.
    pub writable: bool,
}

/// A device region on its way into a guest.
#[derive(Clone)]
pub struct DeviceWindow {
    /// The device.
    pub device: String,
    /// Number of the region.
    pub region: usize,
    /// Bytes.
    pub size: u64,
    /// Where the guest should see it; another address may be chosen.
    pub wanted: Ipa,
    /// Access, checked, and dead as soon as the device is taken away: reads give ones, writes are dropped.
    pub registers: Arc<dyn Mmio>,
    /// Where the pages are if a guest may be given them without trapping. They have to be taken from it again in
    /// [`Vm::withdraw`].
    pub host: Option<Pa>,
}

impl fmt::Debug for DeviceWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {} of {} ({:#x} bytes)", self.region, self.device, self.size)
    }
}

/// Who hears that a guest has ended an interrupt (KVM: `resamplefd`). Closures are listeners.
pub trait EndOfInterrupt: Send + Sync {
    /// The guest is done with it. Called without a lock.
    fn ended(&self, line: u32);
}

impl<F: Fn(u32) + Send + Sync> EndOfInterrupt for F {
    fn ended(&self, line: u32) {
        self(line);
    }
}

/// A request that a virtual machine did not fulfil.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VmError {
    /// It is dead.
    #[error("virtual machine {vm} is dead")]
    Dead {
        /// Its name.
        vm: String,
    },
    /// There is no room for a window.
    #[error("virtual machine {vm} has no room for {size:#x} bytes of device registers")]
    NoRoom {
        /// Its name.
        vm: String,
        /// Bytes.
        size: u64,
    },
    /// All lines are in use, or the wanted one.
    #[error("virtual machine {vm} has no free interrupt line{}", DisplayLine(*.wanted))]
    NoLine {
        /// Its name.
        vm: String,
        /// The line asked for.
        wanted: Option<u32>,
    },
    /// No window begins there.
    #[error("virtual machine {vm} has no device window at {ipa:#x}")]
    NoWindow {
        /// Its name.
        vm: String,
        /// The address.
        ipa: Ipa,
    },
    /// The host has not enough memory for it.
    #[error("no memory for the {len:#x} bytes of virtual machine {vm}: {got:#x} were to be had")]
    NoMemory {
        /// Its name.
        vm: String,
        /// Bytes asked for.
        len: u64,
        /// Bytes that there were.
        got: u64,
    },
    /// Its memory cannot look like that.
    #[error("memory of virtual machine {vm}: {problem}")]
    Layout {
        /// Its name.
        vm: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Anything else, in the machine's own words.
    #[error("virtual machine {vm}: {problem}")]
    Other {
        /// Its name.
        vm: String,
        /// What went wrong.
        problem: String,
    },
}

struct DisplayLine(Option<u32>);

impl fmt::Display for DisplayLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |line| write!(f, " {line}"))
    }
}

/// A virtual machine that devices can be given to.
///
/// Its memory stays where it is and belongs to it for as long as anybody holds the machine or has pinned the memory.
pub trait Vm: Send + Sync {
    /// Its name.
    fn name(&self) -> String;
    /// False once it is dead. Never true again.
    fn is_alive(&self) -> bool;
    /// Its memory; does not change.
    fn memory(&self) -> Vec<GuestRange>;
    /// Who pins that memory.
    fn pins(&self) -> Arc<dyn PinMemory>;
    /// Shows a device region to the guest and says where.
    fn place(&self, window: DeviceWindow) -> Result<Ipa, VmError>;
    /// Takes the region at `ipa` away; a dead machine too.
    fn withdraw(&self, ipa: Ipa) -> Result<(), VmError>;
    /// Takes an interrupt line, the wanted one if it is given. `eoi` hears when the guest has ended an interrupt of it.
    fn connect_line(&self, wanted: Option<u32>, eoi: Arc<dyn EndOfInterrupt>) -> Result<u32, VmError>;
    /// Gives the line back; it is low afterwards.
    fn disconnect_line(&self, line: u32);
    /// Raises or lowers a line.
    fn set_line(&self, line: u32, high: bool);
}
