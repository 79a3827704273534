//! dma-proxy: gives user programs two DMA channels and memory for them, and the program that tests it.
//!
//! The proxy is a client device without hardware: its `dmas` name a channel that sends (`dma_proxy_tx`) and one that
//! receives (`dma_proxy_rx`). It comes in the two shapes of the original:
//!
//! | | [`Proxy`] | [`MultiProxy`] |
//! |---|---|---|
//! | channels | tx and rx | any number |
//! | buffers of a channel | one of 3 MiB | 32 of 128 KiB |
//! | a transfer | blocks ([`Proxy::transfer`]) | start, finish, or both |
//! | test at load | 3 MiB | 1024 bytes |
//!
//! [`mod@test`] is `dma-proxy-test`. Everything is generic over memory and clock, so it runs on a host and in a virtual machine
//! alike. Buffers come from the DMA API of the **proxy's own** device, as in the original, so the engine reaches them only
//! if the proxy shares its domain: with neither an IOMMU in front of the engine, or with the engine's streams in
//! the proxy's `iommus` too.
//!
//! | | The original | here |
//! |---|---|---|
//! | length, which the user writes | handed to the engine unchecked | checked against the buffer |
//! | error of the engine | no callback, so it looks like a timeout | `Error`, with the reason in [`Proxy::take_log`] |
//! | timeout | the transfer stays under way | the channel is terminated: the buffer is the user's again |
//! | unload | frees what the engine may use | stops the channels first; keeps the memory of one that does not stop |
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod error;
mod multi;
mod port;
mod single;
pub mod test;
#[cfg(test)]
mod testing;

pub use error::ProxyError;
pub use multi::{BUFFER_COUNT, BUFFER_SIZE, BUFFER_STRIDE, MULTI_TEST_SIZE, MultiProxy};
pub use port::{Dma, ProxyStatus, RX_NAME, Side, TIMEOUT_MS, TX_NAME};
pub use single::{Interface, Proxy, TEST_SIZE};
