//! A guest's device registers: windows at guest addresses.

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use portcullis_arch::Ipa;
use portcullis_hal::Mmio;
use spin::Mutex;

use crate::{DeviceWindow, VmError};

#[derive(Default)]
struct State {
    windows: Mutex<BTreeMap<u64, DeviceWindow>>,
    dead: AtomicBool,
}

/// The addresses of a guest that are not memory. Clones are handles to the same one.
#[derive(Clone)]
pub struct GuestBus {
    vm: String,
    devices: (Ipa, Ipa),
    memory: (Ipa, Ipa),
    state: Arc<State>,
}

/// Alignment of windows that are placed somewhere else than wanted.
const PAGE: u64 = 0x1000;

impl GuestBus {
    pub(super) fn new(vm: &str, devices: (Ipa, Ipa), memory: (Ipa, Ipa)) -> Self {
        Self { vm: vm.to_string(), devices, memory, state: Arc::default() }
    }

    /// The end of whatever is in the way of a window.
    fn blocker(&self, windows: &BTreeMap<u64, DeviceWindow>, first: u64, last: u64) -> Option<u64> {
        let (start, end) = (self.memory.0.get(), self.memory.1.get());
        if first <= end && start <= last {
            return Some(end);
        }
        let (at, window) = windows.range(..=last).next_back()?;
        let its_last = at + (window.size - 1);
        (its_last >= first).then_some(its_last)
    }

    pub(super) fn place(&self, window: DeviceWindow) -> Result<Ipa, VmError> {
        let size = window.size;
        let no_room = || VmError::NoRoom { vm: self.vm.clone(), size };
        let mut windows = self.state.windows.lock();
        if self.state.dead.load(Ordering::Acquire) {
            return Err(VmError::Dead { vm: self.vm.clone() });
        }
        let length = size.checked_sub(1).ok_or_else(no_room)?;
        let wanted = window.wanted.get();
        let free =
            |at: u64| at.checked_add(length).is_some_and(|last| self.blocker(&windows, at, last).is_none());
        let mut at = wanted;
        if !free(wanted) {
            at = self.devices.0.get();
            loop {
                at = at.checked_next_multiple_of(PAGE).ok_or_else(no_room)?;
                let last = at.checked_add(length).filter(|last| *last <= self.devices.1.get());
                match self.blocker(&windows, at, last.ok_or_else(no_room)?) {
                    None => break,
                    Some(its_last) => at = its_last.checked_add(1).ok_or_else(no_room)?,
                }
            }
        }
        windows.insert(at, window);
        Ok(Ipa(at))
    }

    pub(super) fn withdraw(&self, ipa: Ipa) -> Result<(), VmError> {
        let window = self.state.windows.lock().remove(&ipa.get());
        window.map(drop).ok_or(VmError::NoWindow { vm: self.vm.clone(), ipa })
    }

    pub(super) fn kill(&self) {
        self.state.dead.store(true, Ordering::Release);
    }

    /// Registers for a guest's driver: `size` bytes at `ipa`, which lie in one device region. The handle survives the device:
    /// when it has been taken away, reads give ones.
    pub fn window(&self, ipa: Ipa, size: u64) -> Result<GuestMmio, VmError> {
        let windows = self.state.windows.lock();
        let found = windows.range(..=ipa.get()).next_back();
        let inside = found.and_then(|(at, window)| {
            let offset = ipa.get() - at;
            offset.checked_add(size).filter(|end| *end <= window.size)?;
            Some((usize::try_from(offset).ok()?, usize::try_from(size).ok()?, window.registers.clone()))
        });
        let (offset, size, registers) = inside.ok_or(VmError::NoWindow { vm: self.vm.clone(), ipa })?;
        Ok(GuestMmio { state: self.state.clone(), registers, offset, size })
    }

    /// What is where: address, bytes, device, number of the region.
    pub fn windows(&self) -> alloc::vec::Vec<(Ipa, u64, String, usize)> {
        let windows = self.state.windows.lock();
        let each = |(at, window): (&u64, &DeviceWindow)| {
            (Ipa(*at), window.size, window.device.clone(), window.region)
        };
        windows.iter().map(each).collect()
    }
}

impl fmt::Debug for GuestBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.windows()).finish()
    }
}

/// Registers of a device in a guest.
#[derive(Clone)]
pub struct GuestMmio {
    state: Arc<State>,
    registers: Arc<dyn Mmio>,
    offset: usize,
    size: usize,
}

impl GuestMmio {
    /// Where an access is in the region; `None` if the guest cannot make it.
    fn at(&self, offset: usize, bytes: usize) -> Option<usize> {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.size);
        (inside && !self.state.dead.load(Ordering::Acquire)).then(|| self.offset + offset)
    }
}

impl Mmio for GuestMmio {
    fn read32(&self, offset: usize) -> u32 {
        self.at(offset, 4).map_or(u32::MAX, |at| self.registers.read32(at))
    }
    fn write32(&self, offset: usize, value: u32) {
        if let Some(at) = self.at(offset, 4) {
            self.registers.write32(at, value);
        }
    }
    fn read64(&self, offset: usize) -> u64 {
        self.at(offset, 8).map_or(u64::MAX, |at| self.registers.read64(at))
    }
    fn write64(&self, offset: usize, value: u64) {
        if let Some(at) = self.at(offset, 8) {
            self.registers.write64(at, value);
        }
    }
}

impl fmt::Debug for GuestMmio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMmio").field("offset", &self.offset).field("size", &self.size).finish()
    }
}
