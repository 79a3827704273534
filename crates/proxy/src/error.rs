//! What keeps a proxy from being set up, or a transfer from being started.

use alloc::boxed::Box;
use alloc::string::String;

use portcullis_drivers::dmaengine::{ChannelError, RequestError};
use portcullis_iommu::dma::DmaError;
use thiserror::Error;

/// A proxy that could not be set up, or a transfer that was not started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// A channel was refused.
    #[error("channel {name}: {error}")]
    Request {
        /// `dma_proxy_tx` or the like.
        name: String,
        /// Why.
        error: Box<RequestError>,
    },
    /// `dma-names` lacks one.
    #[error("dma-names has no {name}")]
    Missing {
        /// Which.
        name: &'static str,
    },
    /// The channel goes the wrong way, or is none of a stream.
    #[error("{channel} cannot {what}")]
    WrongChannel {
        /// The channel.
        channel: String,
        /// "send" or "receive".
        what: &'static str,
    },
    /// No memory, or none that the device can reach.
    #[error("buffers: {0}")]
    Memory(#[from] DmaError),
    /// The channel did not take the transfer.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The user asked for more than the buffer holds.
    #[error("{len} bytes do not fit into a buffer of {size}")]
    Length {
        /// What was asked for.
        len: u64,
        /// Bytes of a buffer.
        size: u64,
    },
    /// There is no such channel or buffer.
    #[error("there is no {what} {index}")]
    Index {
        /// "channel" or "buffer".
        what: &'static str,
        /// Its number.
        index: usize,
    },
    /// A transfer of the buffer is under way.
    #[error("a transfer of this buffer is under way")]
    Busy,
}
