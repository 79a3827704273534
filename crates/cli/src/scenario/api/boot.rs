//! The options of `boot`: how the software comes up, and what is changed about the board before.

use std::collections::BTreeMap;

use portcullis_arch::Pa;
use portcullis_board::MachineDescription;
use portcullis_board::machine::MemoryRegion;
use portcullis_board::system::BootOptions;
use portcullis_board::tree::Region;
use portcullis_iommu::DefaultDomain;
use rhai::{Array, Dynamic, Map};

const KNOWN: &str = "cpu_cache, bypass_unmatched, default_domain, streams, coherent, memory";

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
            for (node, coherent) in smmus.chain(channels).chain(writers) {
                if node.name == *name || node.path == *name || node.labels.contains(name) {
                    *coherent = *on;
                    found = true;
                }
            }
            if !found {
                return Err(format!("boot: coherent names {name:?}, which is no node of this board"));
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
