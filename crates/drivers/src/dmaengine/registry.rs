//! Who provides channels and who has them.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::fmt;
use core::ops::Deref;

use spin::Mutex;

use super::{Capability, ChannelError, DmaChannel, RequestError};

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelRequest<'a> {
    /// The channel that a `dmas` entry names.
    Cell {
        /// Name of the engine that its phandle points to.
        provider: &'a str,
        /// Its cell. AXI DMA: 0 = MM2S, 1 = S2MM.
        cell: u32,
    },
    /// Any free channel that can do this (Linux `dma_request_channel` with a mask).
    Capable(Capability),
}

struct Entry {
    provider: String,
    cell: u32,
    channel: Arc<dyn DmaChannel>,
    owner: Option<String>,
    /// Why it is not handed out any more.
    stuck: Option<ChannelError>,
}

impl Entry {
    fn refusal(&self) -> Option<RequestError> {
        let channel = self.channel.name().to_string();
        let owner = self.owner.clone()?;
        Some(match self.stuck {
            Some(error) => RequestError::Stuck { channel, owner, error },
            None => RequestError::InUse { channel, owner },
        })
    }
}

/// All channels of a system. Cheap to clone; clones are the same registry.
#[derive(Clone, Default)]
pub struct Registry {
    entries: Arc<Mutex<Vec<Entry>>>,
    /// What channels may still use that did not stop. It goes with the registry.
    kept: Arc<Mutex<Vec<Box<dyn Any + Send>>>>,
}

impl Registry {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Enters a channel: `cell` of the engine `provider`.
    pub fn register(
        &self,
        provider: &str,
        cell: u32,
        channel: Arc<dyn DmaChannel>,
    ) -> Result<(), RequestError> {
        let mut entries = self.entries.lock();
        if entries.iter().any(|entry| entry.provider == provider && entry.cell == cell) {
            return Err(RequestError::Duplicate { provider: provider.to_string(), cell });
        }
        entries.push(Entry { provider: provider.to_string(), cell, channel, owner: None, stuck: None });
        Ok(())
    }

    /// Takes an engine's channels out, all or none: refused while somebody has one. Stuck ones go.
    pub fn unregister(&self, provider: &str) -> Result<(), RequestError> {
        let mut entries = self.entries.lock();
        let mut own = entries.iter().filter(|entry| entry.provider == provider && entry.stuck.is_none());
        if let Some(refusal) = own.find_map(Entry::refusal) {
            return Err(refusal);
        }
        entries.retain(|entry| entry.provider != provider);
        Ok(())
    }

    /// Gives a client a channel for itself. `client` is named to whoever asks next.
    pub fn request(&self, request: ChannelRequest<'_>, client: &str) -> Result<ChannelHandle, RequestError> {
        let mut entries = self.entries.lock();
        let entry = match request {
            ChannelRequest::Cell { provider, cell } => named(&mut entries, provider, cell)?,
            ChannelRequest::Capable(capability) => capable(&mut entries, capability)?,
        };
        entry.owner = Some(client.to_string());
        let channel = entry.channel.clone();
        Ok(ChannelHandle { registry: self.clone(), channel, held: true })
    }

    /// Every channel as (provider, cell, name, owner).
    pub fn channels(&self) -> Vec<(String, u32, String, Option<String>)> {
        let entries = self.entries.lock();
        let row = |entry: &Entry| {
            (entry.provider.clone(), entry.cell, entry.channel.name().to_string(), entry.owner.clone())
        };
        entries.iter().map(row).collect()
    }

    fn give_back(&self, channel: &Arc<dyn DmaChannel>, stuck: Option<ChannelError>) {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.iter_mut().find(|entry| Arc::ptr_eq(&entry.channel, channel)) {
            entry.stuck = stuck;
            if stuck.is_none() {
                entry.owner = None;
            }
        }
    }
}

fn named<'a>(entries: &'a mut [Entry], provider: &str, cell: u32) -> Result<&'a mut Entry, RequestError> {
    if !entries.iter().any(|entry| entry.provider == provider) {
        let mut known = String::new();
        for name in entries.iter().map(|entry| &entry.provider) {
            if !known.split(", ").any(|other| other == name) {
                known = if known.is_empty() { name.clone() } else { format!("{known}, {name}") };
            }
        }
        let known = if known.is_empty() { "none".to_string() } else { known };
        return Err(RequestError::NoProvider { provider: provider.to_string(), known });
    }
    let found = entries.iter_mut().find(|entry| entry.provider == provider && entry.cell == cell);
    let entry = found.ok_or_else(|| RequestError::NoChannel { provider: provider.to_string(), cell })?;
    match entry.refusal() {
        Some(refusal) => Err(refusal),
        None => Ok(entry),
    }
}

fn capable(entries: &mut [Entry], capability: Capability) -> Result<&mut Entry, RequestError> {
    let mut refusal = RequestError::NotCapable { capability };
    for entry in entries.iter_mut().filter(|entry| entry.channel.caps().has(capability)) {
        match entry.refusal() {
            Some(other) => refusal = other,
            None => return Ok(entry),
        }
    }
    Err(refusal)
}

/// A channel that one client has for itself. Dropping or [releasing](Self::release) it terminates what is under way.
/// A channel that does not stop stays taken.
pub struct ChannelHandle {
    registry: Registry,
    channel: Arc<dyn DmaChannel>,
    held: bool,
}

impl ChannelHandle {
    /// Stops the channel and gives it back.
    pub fn release(mut self) -> Result<(), ChannelError> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), ChannelError> {
        if !core::mem::take(&mut self.held) {
            return Ok(());
        }
        let stopped = self.channel.terminate();
        self.registry.give_back(&self.channel, stopped.err());
        stopped.map(drop)
    }

    /// Keeps memory for good that the channel may still use, because it did not stop: for as long as there is the registry.
    pub fn keep(&self, memory: impl Any + Send) {
        self.registry.kept.lock().push(Box::new(memory));
    }

    /// The channel, for an interrupt handler.
    pub fn channel(&self) -> Arc<dyn DmaChannel> {
        self.channel.clone()
    }
}

impl Deref for ChannelHandle {
    type Target = dyn DmaChannel;

    fn deref(&self) -> &Self::Target {
        &*self.channel
    }
}

impl Drop for ChannelHandle {
    fn drop(&mut self) {
        // A channel that does not stop stays taken, and the next request says why.
        let _stuck = self.give_back();
    }
}

impl fmt::Debug for ChannelHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChannelHandle").field("channel", &self.channel.name()).finish_non_exhaustive()
    }
}
