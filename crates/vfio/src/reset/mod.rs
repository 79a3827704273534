//! Reset drivers: how a device of some kind is stopped so that it can change hands.
//!
//! The pattern of Linux's `vfio_platform_reset` modules: mask the interrupts, stop the engine, wait for it (bounded), clear
//! what the last owner left. Linux finds a module by its alias `vfio-reset:<compatible>`; here [`ResetDrivers`] is the table.

mod axidma;
mod zdma;

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_hal::{Clock, Mmio, Timeout};
use thiserror::Error;

use crate::PlatformDevice;

pub use axidma::AxiDmaReset;
pub use zdma::ZdmaReset;

/// A device that could not be reset.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{device} cannot be stopped: {what}{}", Registers(.registers))]
pub struct ResetError {
    /// Its name.
    pub device: String,
    /// What went wrong.
    pub what: ResetFailure,
    /// Registers afterwards.
    pub registers: Vec<(&'static str, u32)>,
}

/// Why.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ResetFailure {
    /// It did not get there in time.
    #[error("{0}")]
    Timeout(Timeout),
    /// The driver does not find the registers it expects.
    #[error("it has no region of registers of at least {needed:#x} bytes")]
    NoRegisters {
        /// Bytes needed.
        needed: u64,
    },
    /// An access to its registers, of whoever had it, does not end.
    #[error("an access to its registers does not end")]
    InUse,
    /// The registers are not those of such a device.
    #[error("its registers are not those of {kind}")]
    Unrecognised {
        /// What was expected.
        kind: &'static str,
    },
}

struct Registers<'a>(&'a [(&'static str, u32)]);

impl fmt::Display for Registers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (name, value)) in self.0.iter().enumerate() {
            write!(f, "{}{name} {value:#x}", if n == 0 { "; " } else { ", " })?;
        }
        Ok(())
    }
}

/// Stops devices of one kind.
pub trait ResetDriver: Send + Sync {
    /// The `compatible` of the devices it knows.
    fn compatible(&self) -> &[&'static str];
    /// Masks interrupts, stops the device, waits for it and clears what its owner left. When this returns `Ok`, the device
    /// does no DMA and raises no interrupt until somebody writes its registers.
    fn reset(&self, device: &PlatformDevice, clock: &Arc<dyn Clock>) -> Result<(), ResetError>;
}

/// The reset drivers there are, by compatible.
#[derive(Clone)]
pub struct ResetDrivers(Vec<Arc<dyn ResetDriver>>);

impl Default for ResetDrivers {
    /// Those of this crate: AXI DMA and ZDMA.
    fn default() -> Self {
        Self(Vec::from([Arc::new(AxiDmaReset) as Arc<dyn ResetDriver>, Arc::new(ZdmaReset)]))
    }
}

impl ResetDrivers {
    /// None at all.
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// The same with one more, which goes before the others.
    pub fn with(mut self, driver: Arc<dyn ResetDriver>) -> Self {
        self.0.insert(0, driver);
        self
    }

    /// The driver for a device: that of its most specific compatible that has one.
    pub fn of(&self, device: &PlatformDevice) -> Option<&Arc<dyn ResetDriver>> {
        let knows = |driver: &&Arc<dyn ResetDriver>, name: &str| driver.compatible().contains(&name);
        device.compatible.iter().find_map(|name| self.0.iter().find(|driver| knows(driver, name)))
    }
}

impl fmt::Debug for ResetDrivers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|driver| driver.compatible())).finish()
    }
}

/// The first region, if it is large enough.
fn registers(device: &PlatformDevice, needed: u64) -> Result<&dyn Mmio, ResetError> {
    let region = device.regions.first().filter(|region| region.size >= needed);
    region.map(|region| &*region.registers).ok_or_else(|| ResetError {
        device: device.name.to_string(),
        what: ResetFailure::NoRegisters { needed },
        registers: Vec::new(),
    })
}

/// An error with the named registers as they are now.
fn timed_out(
    device: &PlatformDevice,
    regs: &dyn Mmio,
    timeout: Timeout,
    shown: &[(&'static str, u32)],
) -> ResetError {
    let registers = read_all(regs, shown);
    ResetError { device: device.name.to_string(), what: ResetFailure::Timeout(timeout), registers }
}

fn read_all(regs: &dyn Mmio, shown: &[(&'static str, u32)]) -> Vec<(&'static str, u32)> {
    shown.iter().map(|(name, offset)| (*name, regs.read32(*offset as usize))).collect()
}
