//! The host's driver of dma-proxies, and what a proxy looks like to a program, on a host or in a virtual machine.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use portcullis_arch::{Iova, Pa};
use portcullis_drivers::dmaengine::{Registry, RequestError};
use portcullis_hal::{Clock as _, DmaMemory};
use portcullis_iommu::dma::DmaDevice;
use portcullis_proxy::{Dma, Proxy, ProxyStatus, RX_NAME, Side, TEST_SIZE, TX_NAME};
use portcullis_vfio::{HostDriver, PlatformDevice};
use thiserror::Error;

use super::host::{Host, lock};
use super::stack::{AnyClock, AxiStack};
use crate::compatible::DMA_PROXY;
use crate::machine::{DmaProxy, DmaSpecifier};
use crate::sim::Memory;

/// Its name on the platform bus.
pub const PROXY_DRIVER: &str = "dma_proxy";

/// A proxy as a program uses it, whatever memory it is on.
pub trait LoopClient: Send + Sync {
    /// Its name.
    fn name(&self) -> String;
    /// Longest transfer.
    fn max_bytes(&self) -> usize;
    /// The test at load (`internal_test=1`): what the module logs.
    ///
    /// # Errors
    /// The same, if a byte was wrong or a transfer failed.
    fn internal_test(&self) -> Result<String, String>;
    /// Starts round `n` of the loop test and waits for nothing.
    ///
    /// # Errors
    /// A channel refused.
    fn begin(&self, n: u32, bytes: usize) -> Result<(), String>;
    /// Whether the round has ended, and whether every byte came back.
    fn poll(&self) -> Option<Result<(), String>>;
    /// The program, from its arguments to its last word; waits for each transfer.
    ///
    /// # Errors
    /// The buffers cannot be reached.
    fn run(
        &self,
        arguments: portcullis_proxy::test::Arguments,
        report: &mut dyn FnMut(&str),
    ) -> Result<portcullis_proxy::test::Summary, String>;
    /// Where the buffer of a channel is: for the engine, and in memory.
    fn buffer(&self, channel: &str) -> Option<(Iova, Option<Pa>)>;
}

/// A proxy over any memory.
pub type AnyProxy<M> = Arc<ProxyOf<M>>;

/// A proxy, its device, and the round of the loop test that is under way.
pub struct ProxyOf<M: DmaMemory + Clone + 'static> {
    name: String,
    proxy: Proxy<M, AnyClock>,
    dma: DmaDevice<M>,
    round: Mutex<Option<Vec<u8>>>,
}

/// A proxy that does not come up.
#[derive(Debug, Error)]
pub enum ProxyError {
    /// The driver refused.
    #[error(transparent)]
    Proxy(#[from] portcullis_proxy::ProxyError),
    /// Its channels cannot be entered.
    #[error(transparent)]
    Channel(#[from] RequestError),
}

impl<M: DmaMemory + Clone + 'static> ProxyOf<M> {
    fn new(
        name: &str,
        registry: &Registry,
        dmas: &[DmaSpecifier],
        dma: DmaDevice<M>,
        clock: AnyClock,
    ) -> Result<AnyProxy<M>, ProxyError> {
        let entry = |d: &DmaSpecifier| (d.name.clone(), d.provider.clone(), d.channel);
        let owned: Vec<_> = dmas.iter().map(entry).collect();
        let dmas: Vec<_> =
            owned.iter().map(|(name, provider, cell)| Dma { name, provider, cell: *cell }).collect();
        let proxy = Proxy::probe(registry, &dmas, &dma, clock)?;
        Ok(Arc::new(Self { name: name.to_string(), proxy, dma, round: Mutex::default() }))
    }
    /// The proxy itself.
    pub fn proxy(&self) -> &Proxy<M, AnyClock> {
        &self.proxy
    }

    fn verify(&self, sent: &[u8]) -> Result<(), String> {
        for side in [Side::Rx, Side::Tx] {
            let status = self.proxy.finish(side);
            if status != ProxyStatus::NoError {
                let log = self.proxy.take_log().join("; ");
                return Err(format!("Proxy {side} transfer error: {status:?} {log}"));
            }
        }
        let mut got = vec![0; sent.len()];
        self.proxy.interface(Side::Rx).read(0, &mut got).map_err(|e| e.to_string())?;
        match sent.iter().zip(&got).position(|(sent, got)| sent != got) {
            None => Ok(()),
            Some(index) => Err(format!(
                "buffer not equal, index = {index}: {:#04x} was sent, {:#04x} came back",
                sent[index], got[index]
            )),
        }
    }
}

impl<M: DmaMemory + Clone + 'static> LoopClient for ProxyOf<M> {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn max_bytes(&self) -> usize {
        TEST_SIZE as usize
    }
    fn internal_test(&self) -> Result<String, String> {
        let mut log = Vec::new();
        let ok = self.proxy.internal_test(|line| log.push(line.to_string())).map_err(|e| e.to_string())?;
        let log = log.join("; ");
        if ok { Ok(log) } else { Err(log) }
    }
    fn begin(&self, n: u32, bytes: usize) -> Result<(), String> {
        let sent: Vec<u8> = (0..bytes).map(|i| (n as usize).wrapping_add(i) as u8).collect();
        let (tx, rx) = (self.proxy.interface(Side::Tx), self.proxy.interface(Side::Rx));
        let text = |e: portcullis_proxy::ProxyError| e.to_string();
        tx.write(0, &sent).map_err(text)?;
        rx.fill(0, bytes as u64, 0).map_err(text)?;
        for side in [Side::Tx, Side::Rx] {
            self.proxy.interface(side).set_length(u32::try_from(bytes).unwrap_or(u32::MAX));
            if let Err(error) = self.proxy.start(side) {
                // The side that was started has nobody to wait for.
                let _settled = self.proxy.finish(Side::Tx);
                return Err(format!("{}: {side}: {error}", self.name));
            }
        }
        *lock(&self.round) = Some(sent);
        Ok(())
    }
    fn poll(&self) -> Option<Result<(), String>> {
        // Whoever waits takes interrupts meanwhile.
        self.proxy.clock().delay_us(1);
        let (tx, rx) = (self.proxy.is_done(Side::Tx), self.proxy.is_done(Side::Rx));
        // One side that failed leaves the other waiting for ever.
        let failed = |side: Side| self.proxy.is_done(side) && self.proxy.finish(side) != ProxyStatus::NoError;
        if !(tx && rx) && !((tx && failed(Side::Tx)) || (rx && failed(Side::Rx))) {
            return None;
        }
        let sent = lock(&self.round).take()?;
        Some(self.verify(&sent))
    }
    fn run(
        &self,
        arguments: portcullis_proxy::test::Arguments,
        report: &mut dyn FnMut(&str),
    ) -> Result<portcullis_proxy::test::Summary, String> {
        portcullis_proxy::test::run(&self.proxy, arguments, report).map_err(|e| e.to_string())
    }
    fn buffer(&self, channel: &str) -> Option<(Iova, Option<Pa>)> {
        let side =
            [(TX_NAME, Side::Tx), (RX_NAME, Side::Rx)].into_iter().find(|(name, _)| *name == channel)?.1;
        let iova = self.proxy.interface(side).iova();
        let pa = match self.dma.space() {
            Some(space) => space.domain().iova_to_phys(iova),
            None => Some(Pa(iova.get())),
        };
        Some((iova, pa))
    }
}

/// A proxy over the channels of a stack that nobody else uses: a registry of its own.
///
/// # Errors
/// The stack lacks a channel, or there is no memory for the buffers.
pub fn proxy_of<M: DmaMemory + Clone + 'static>(
    name: &str,
    stack: &AxiStack<M>,
    dma: DmaDevice<M>,
    clock: AnyClock,
) -> Result<AnyProxy<M>, ProxyError> {
    let registry = Registry::new();
    let mut dmas = Vec::new();
    for (number, name) in [(0, TX_NAME), (1, RX_NAME)] {
        if let Some(channel) = stack.numbered(number) {
            registry.register("core", number, channel)?;
            dmas.push(DmaSpecifier { name: name.into(), provider: "core".into(), channel: number });
        }
    }
    ProxyOf::new(name, &registry, &dmas, dma, clock)
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
    /// The names of those it has.
    pub fn names(&self) -> Vec<String> {
        lock(&self.proxies).keys().cloned().collect()
    }
}

impl HostDriver for ProxyHost {
    fn name(&self) -> &str {
        PROXY_DRIVER
    }
    fn compatible(&self) -> Vec<String> {
        vec![DMA_PROXY.to_string()]
    }
    fn probe(&self, device: &PlatformDevice) -> Result<(), String> {
        let node = lock(&self.nodes).get(&device.name).cloned();
        let node = node.ok_or("no node of the tree describes it")?;
        let dma = self.host.dma_device(&device.name, device.device, node.dma_coherent, 64);
        let dma = dma.map_err(|e| e.to_string())?;
        let clock: AnyClock = Arc::new(self.host.clock());
        let proxy = ProxyOf::new(&device.name, &self.host.channels, &node.dmas, dma, clock);
        lock(&self.proxies).insert(device.name.clone(), proxy.map_err(|e| e.to_string())?);
        Ok(())
    }
    fn remove(&self, device: &PlatformDevice) -> Result<(), String> {
        let proxy = lock(&self.proxies).remove(&device.name);
        // Dropping it stops its channels and gives them back.
        drop(proxy);
        Ok(())
    }
}
