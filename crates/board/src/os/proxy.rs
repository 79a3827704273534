//! The host's driver of dma-proxies, and what a proxy looks like to a program, on a host or in a virtual machine.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use portcullis_arch::{Iova, Pa};
use portcullis_hal::DmaMemory;
use portcullis_iommu::dma::DmaDevice;
use portcullis_vfio::{HostDriver, PlatformDevice};
use thiserror::Error;

use super::host::{Host, lock};
use super::stack::{AnyClock, AxiStack};
use crate::compatible::DMA_PROXY;
use crate::machine::DmaProxy;
use crate::sim::Memory;

/// Its name on the platform bus.
pub const PROXY_DRIVER: &str = "dma_proxy";

/// A proxy as a program uses it.
pub trait LoopClient: Send + Sync {
    /// Its name.
    fn name(&self) -> String;
    /// Longest transfer.
    fn max_bytes(&self) -> usize;
    /// The test at load; what it says.
    fn internal_test(&self) -> Result<String, String>;
    /// Starts transfer number `n` of the loop test.
    fn begin(&self, n: u32, bytes: usize) -> Result<(), String>;
    /// Whether it has ended, and how.
    fn poll(&self) -> Option<Result<(), String>>;
    /// Where the buffer of a channel is: for the engine, in memory.
    fn buffer(&self, channel: &str) -> Option<(Iova, Pa)>;
}

/// A proxy over any memory.
pub type AnyProxy<M> = Arc<ProxyOf<M>>;
/// x
pub struct ProxyOf<M>(std::marker::PhantomData<M>);
impl<M: Send + Sync> LoopClient for ProxyOf<M> {
    fn name(&self) -> String {
        String::new()
    }
    fn max_bytes(&self) -> usize {
        0
    }
    fn internal_test(&self) -> Result<String, String> {
        Err("".into())
    }
    fn begin(&self, _: u32, _: usize) -> Result<(), String> {
        Err("".into())
    }
    fn poll(&self) -> Option<Result<(), String>> {
        None
    }
    fn buffer(&self, _: &str) -> Option<(Iova, Pa)> {
        None
    }
}

/// A proxy that does not come up.
#[derive(Debug, Error)]
pub enum ProxyError {
    /// x
    #[error("x")]
    X,
}

/// A proxy over the channels of a stack.
pub fn proxy_of<M: DmaMemory + Clone>(
    _name: &str,
    _stack: &AxiStack<M>,
    _dma: DmaDevice<M>,
    _clock: AnyClock,
) -> Result<AnyProxy<M>, ProxyError> {
    Err(ProxyError::X)
}

/// The host's driver.
pub struct ProxyHost {
    host: Arc<Host>,
    nodes: Mutex<BTreeMap<String, DmaProxy>>,
    proxies: Mutex<BTreeMap<String, AnyProxy<Memory>>>,
}

impl ProxyHost {
    /// The driver, without devices.
    pub fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self { host, nodes: Mutex::default(), proxies: Mutex::default() })
    }
    /// What the tree says about a proxy.
    pub(super) fn describe(&self, name: &str, node: &DmaProxy) {
        lock(&self.nodes).insert(name.to_string(), node.clone());
    }
    /// A proxy that it has, by name.
    pub fn get(&self, name: &str) -> Option<Arc<dyn LoopClient>> {
        let proxy = lock(&self.proxies).get(name).cloned()?;
        Some(proxy)
    }
}

impl HostDriver for ProxyHost {
    fn name(&self) -> &str {
        PROXY_DRIVER
    }
    fn compatible(&self) -> Vec<String> {
        vec![DMA_PROXY.to_string()]
    }
    fn probe(&self, _device: &PlatformDevice) -> Result<(), String> {
        let _ = &self.host;
        Ok(())
    }
    fn remove(&self, _device: &PlatformDevice) -> Result<(), String> {
        Ok(())
    }
}
