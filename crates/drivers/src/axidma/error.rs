//! What an AXI DMA cannot do, and what its error bits mean.

use portcullis_arch::Iova;
use portcullis_arch::axidma::error;
use portcullis_hal::Timeout;
use thiserror::Error;

use crate::dmaengine::{BusAccess, BusResponse, DescriptorPool, Direction, TransferError};

/// A core that cannot be used, or not now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AxiDmaError {
    /// The configuration names no channel.
    #[error("an AXI DMA with neither an MM2S nor an S2MM channel")]
    NoChannel,
    /// A parameter that no core is built with.
    #[error("{what} = {value}: there is no such core")]
    Parameter {
        /// The device tree's property.
        what: &'static str,
        /// Its value.
        value: u32,
    },
    /// A core with scatter-gather keeps its descriptors in memory.
    #[error("the core has scatter-gather, and the channel {channel} has no memory for descriptors")]
    NoPool {
        /// Which channel.
        channel: Direction,
    },
    /// The descriptor pool does not fit.
    #[error(
        "a descriptor pool needs {needed} bytes or more, at multiples of 64 that the core can address; the one for {channel} \
         has {} bytes at pa {:#x}, iova {:#x}", .pool.block.len, .pool.block.pa, .pool.iova
    )]
    Pool {
        /// Which channel.
        channel: Direction,
        /// The pool.
        pool: DescriptorPool,
        /// The least number of bytes.
        needed: usize,
    },
    /// The core did not come out of reset, for example because an access is stalled in the IOMMU. It may still access
    /// memory.
    #[error("{timeout}; DMACR {control:#x}, DMASR {status:#x}")]
    Reset {
        /// What was waited for.
        timeout: Timeout,
        /// DMACR afterwards.
        control: u32,
        /// DMASR afterwards.
        status: u32,
    },
    /// An earlier reset has not ended.
    #[error("the core is still in reset and may access memory; terminate a channel to try again")]
    Stuck,
    /// Another context is resetting the core and does not come to an end.
    #[error("{timeout}")]
    Recovering {
        /// What was waited for.
        timeout: Timeout,
    },
}

/// The registers of a channel when it reported an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HardwareError {
    /// DMASR.
    pub status: u32,
    /// CURDESC: the descriptor that the error is about. 0 in a core without scatter-gather.
    pub current: Iova,
    /// TAILDESC: the last descriptor that the channel was to process.
    pub tail: Iova,
}

impl HardwareError {
    /// PG021's names of the error bits that are set.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let status = self.status;
        error::NAMES.into_iter().filter(move |(bit, _)| status & bit != 0).map(|(_, name)| name)
    }
}

/// DMASR's error bits as an error, the most telling first: in direct mode a bus error sets DMAIntErr too, and where data was
/// refused, the write of the descriptor's status may have been refused as well. After an error of a descriptor no data moves.
pub(super) fn diagnose(status: u32, channel: Direction, descriptor: Iova, buffer: Iova) -> TransferError {
    let data = match channel {
        Direction::MemToDev => BusAccess::Read,
        Direction::DevToMem => BusAccess::Write,
    };
    let buses = [
        (error::DMA_SLAVE, data, BusResponse::Slave, buffer),
        (error::DMA_DECODE, data, BusResponse::Decode, buffer),
        (error::SG_SLAVE, BusAccess::Descriptor, BusResponse::Slave, descriptor),
        (error::SG_DECODE, BusAccess::Descriptor, BusResponse::Decode, descriptor),
    ];
    if let Some(&(_, access, response, at)) = buses.iter().find(|(bit, ..)| status & bit != 0) {
        return TransferError::Bus { access, response, at };
    }
    let what = match status {
        _ if status & error::SG_INTERNAL != 0 => "a fetched descriptor was complete already (SGIntErr)",
        _ if status & error::DMA_INTERNAL != 0 => {
            "a buffer of length 0, or a packet longer than the buffer (DMAIntErr)"
        }
        _ => "an error interrupt without an error bit",
    };
    TransferError::Internal { what }
}
