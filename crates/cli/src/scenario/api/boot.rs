//! The options of `boot`: how the software comes up, and what is changed about the board before.

use std::collections::BTreeMap;

use portcullis_arch::Pa;
use portcullis_board::MachineDescription;
use portcullis_board::machine::{MemoryRegion, SmmuV3Preset};
use portcullis_board::system::BootOptions;
use portcullis_board::tree::Region;
use portcullis_iommu::DefaultDomain;
use rhai::{Array, Dynamic, Map};

const KNOWN: &str = "cpu_cache, bypass_unmatched, default_domain, streams, coherent, memory, smmu, messages, stream_bits, \
                     queue_log2, unbound";

/// What a script asked for at boot.
#[derive(Default)]
pub struct BootRequest {
    /// Model the CPU's data cache.
    pub cpu_cache: bool,
    /// For the software.
    pub options: BootOptions,
    /// Nodes whose `dma-coherent` is turned on or off.
    coherent: BTreeMap<String, bool>,
    /// RAM that the tree does not have: base and size.
    memory: Vec<(u64, u64)>,
    /// What every SMMUv3 is, instead of what the tree says.
    preset: Option<SmmuV3Preset>,
}

impl BootRequest {
    /// Reads the map that a script passed.
    pub fn from_map(map: Map) -> Result<Self, String> {
        let mut request = Self::default();
        for (key, value) in map {
            let want = request.set(&key, value);
            want.map_err(|want| match want {
                Some(want) => format!("boot: {key} must be {want}"),
                None => format!("boot: there is no option {key:?}; there are {KNOWN}"),
            })?;
        }
        Ok(request)
    }

    /// Sets one option. The error is what it must be, or `None` if there is no such option.
    fn set(&mut self, key: &str, value: Dynamic) -> Result<(), Option<&'static str>> {
        match key {
            "cpu_cache" => self.cpu_cache = boolean(value)?,
            "bypass_unmatched" => self.options.bypass_unmatched = boolean(value)?,
            "default_domain" => {
                const WANT: &str = "\"blocked\", \"identity\" or \"translated\"";
                self.options.default_domain = match value.into_string().as_deref() {
                    Ok("blocked") => DefaultDomain::Blocked,
                    Ok("identity") => DefaultDomain::Identity,
                    Ok("translated") => DefaultDomain::Translated,
                    _ => return Err(Some(WANT)),
                };
            }
            "streams" => {
                const WANT: &str = "a map of device name to a list of stream ids";
                for (device, ids) in value.try_cast::<Map>().ok_or(Some(WANT))? {
                    let ids = ids.into_typed_array::<i64>().map_err(|_| Some(WANT))?;
                    let ids = ids.into_iter().map(u32::try_from).collect::<Result<_, _>>();
                    self.options.streams.insert(device.to_string(), ids.map_err(|_| Some(WANT))?);
                }
            }
            "coherent" => {
                const WANT: &str = "a map of node name to true or false";
                for (node, on) in value.try_cast::<Map>().ok_or(Some(WANT))? {
                    self.coherent.insert(node.to_string(), on.as_bool().map_err(|_| Some(WANT))?);
                }
            }
            "memory" => {
                const WANT: &str = "a list of [address, bytes]";
                for region in value.try_cast::<Array>().ok_or(Some(WANT))? {
                    let region = region.into_typed_array::<i64>().map_err(|_| Some(WANT))?;
                    let [base, size] = region.as_slice() else { return Err(Some(WANT)) };
                    self.memory.push((super::address(*base), super::address(*size)));
                }
            }
            "smmu" => {
                self.preset = match value.into_string().as_deref() {
                    Ok("full") => Some(SmmuV3Preset::Full),
                    Ok("small") => Some(SmmuV3Preset::Small),
                    Ok("qemu-virt") => Some(SmmuV3Preset::QemuVirt),
                    _ => return Err(Some("\"full\", \"small\" or \"qemu-virt\"")),
                };
            }
            "messages" => self.options.v3.messages = boolean(value)?,
            "stream_bits" => {
                let bits = value.as_int().ok().and_then(|v| u8::try_from(v).ok()).filter(|v| *v <= 32);
                self.options.v3.stream_bits = Some(bits.ok_or(Some("a number of bits up to 32"))?);
            }
            "queue_log2" => {
                const WANT: &str = "a list of three: log2 of the entries for commands, events, page requests";
                let sizes = value.into_typed_array::<i64>().map_err(|_| Some(WANT))?;
                let sizes: Option<Vec<u8>> = sizes.into_iter().map(|v| u8::try_from(v).ok()).collect();
                let sizes = sizes.and_then(|v| <[u8; 3]>::try_from(v).ok());
                let sizes = sizes.filter(|v| v.iter().all(|n| *n <= 19)).ok_or(Some(WANT))?;
                self.options.v3.queue_log2 = Some(sizes);
            }
            "dma_debug" => self.options.dma.debug = boolean(value)?,
            "dma_lazy" => self.options.dma.lazy = boolean(value)?,
            "unbound" => {
                const WANT: &str = "a list of device names";
                for name in value.try_cast::<Array>().ok_or(Some(WANT))? {
                    self.options.unbound.insert(name.into_string().map_err(|_| Some(WANT))?);
                }
            }
            _ => return Err(None),
        }
        Ok(())
    }

    /// Changes the board as asked.
    pub fn change(&self, description: &mut MachineDescription) -> Result<(), String> {
        for (name, on) in &self.coherent {
            let smmus = description.smmus.iter_mut().map(|s| (&s.node, &mut s.dma_coherent));
            let channels = description.dma_channels.iter_mut().map(|c| (&c.node, &mut c.dma_coherent));
            let writers = description.pl_writers.iter_mut().map(|w| (&w.node, &mut w.dma_coherent));
            let mut found = false;
            let devices = description.test_devices.iter_mut().map(|d| (&d.node, &mut d.dma_coherent));
            let cores = description.axi_dmas.iter_mut().map(|d| (&d.node, &mut d.dma_coherent));
            let proxies = description.dma_proxies.iter_mut().map(|d| (&d.node, &mut d.dma_coherent));
            let others = writers.chain(devices).chain(cores).chain(proxies);
            for (node, coherent) in smmus.chain(channels).chain(others) {
                if node.name == *name || node.path == *name || node.labels.contains(name) {
                    *coherent = *on;
                    found = true;
                }
            }
            if !found {
                return Err(format!("boot: coherent names {name:?}, which is no node of this board"));
            }
        }
        if let Some(preset) = self.preset {
            let v3 = description.smmus.iter_mut().filter_map(|s| s.v3.as_mut());
            if v3.map(|v3| v3.preset = preset).count() == 0 {
                return Err("boot: smmu is for boards with an SMMUv3".into());
            }
        }
        for (base, size) in &self.memory {
            let region = Region { base: Pa(*base), size: *size };
            description.memory.push(MemoryRegion { path: format!("/memory@{base:x}"), region });
        }
        Ok(())
    }
}

fn boolean(value: Dynamic) -> Result<bool, Option<&'static str>> {
    value.as_bool().map_err(|_| Some("true or false"))
}
