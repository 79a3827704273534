//! What the driver stands on: registers, memory and time, as one type parameter.

use alloc::sync::Arc;

use portcullis_hal::{Clock, DmaMemory, Mmio};

/// The platform of one SMMU.
pub trait Platform: Send + Sync + 'static {
    /// The register window: both 64 KiB pages.
    type Registers: Mmio + 'static;
    /// Memory for tables, queues and descriptors.
    type Memory: DmaMemory + Clone + 'static;
    /// Time for bounded waits.
    type Clock: Clock + 'static;

    /// The register window.
    fn registers(&self) -> &Self::Registers;
    /// Memory for tables and queues.
    fn memory(&self) -> &Self::Memory;
    /// Time.
    fn clock(&self) -> &Self::Clock;
}

impl<P: Platform + ?Sized> Platform for Arc<P> {
    type Registers = P::Registers;
    type Memory = P::Memory;
    type Clock = P::Clock;

    fn registers(&self) -> &P::Registers {
        (**self).registers()
    }
    fn memory(&self) -> &P::Memory {
        (**self).memory()
    }
    fn clock(&self) -> &P::Clock {
        (**self).clock()
    }
}

/// A platform put together from its three parts.
#[derive(Clone, Debug)]
pub struct Parts<R, M, C> {
    /// The register window.
    pub registers: R,
    /// Memory.
    pub memory: M,
    /// Time.
    pub clock: C,
}

impl<R, M, C> Platform for Parts<R, M, C>
where
    R: Mmio + 'static,
    M: DmaMemory + Clone + 'static,
    C: Clock + 'static,
{
    type Registers = R;
    type Memory = M;
    type Clock = C;

    fn registers(&self) -> &R {
        &self.registers
    }
    fn memory(&self) -> &M {
        &self.memory
    }
    fn clock(&self) -> &C {
        &self.clock
    }
}
