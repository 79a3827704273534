//! An open device: its regions and interrupts, reset and close.

use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_hal::Mmio;
use portcullis_iommu::DeviceId;
use spin::Mutex;

use crate::group::GroupCore;
use crate::irq::Line;
use crate::{
    EventSink, Interrupt, PlatformDevice, Region, RegionWindow, ResetError, ResetFailure, VfioError,
};

/// A device that its user program or virtual machine has open. Closing it stops the device.
pub struct VfioDevice {
    group: Arc<GroupCore>,
    id: DeviceId,
    device: Arc<PlatformDevice>,
    /// Replaced by new ones after a reset of the region's user; revoked at the end.
    windows: Vec<Arc<RegionWindow>>,
    lines: Mutex<Vec<Line>>,
    closed: Mutex<bool>,
}

impl fmt::Debug for VfioDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioDevice").field("device", &self.device.name).finish_non_exhaustive()
    }
}

impl VfioDevice {
    pub(crate) fn new(group: Arc<GroupCore>, id: DeviceId, device: Arc<PlatformDevice>) -> Arc<Self> {
        let windows = device.regions.iter().map(RegionWindow::new).collect();
        let lines = device.interrupts.iter().copied().map(Line::new).collect();
        let (lines, closed) = (Mutex::new(lines), Mutex::new(false));
        Arc::new(Self { group, id, device, windows, lines, closed })
    }

    /// What the host knows about it.
    pub fn device(&self) -> &Arc<PlatformDevice> {
        &self.device
    }
    /// Its number at the IOMMU core.
    pub fn id(&self) -> DeviceId {
        self.id
    }
    /// True after [`close`](Self::close).
    pub fn is_closed(&self) -> bool {
        *self.closed.lock()
    }

    fn no_such(&self, what: &'static str, index: usize) -> VfioError {
        VfioError::NoSuch { device: self.device.name.to_string(), what, index }
    }

    fn is_open(&self) -> Result<(), VfioError> {
        if self.is_closed() { Err(VfioError::Closed(self.device.name.clone())) } else { Ok(()) }
    }

    /// A region as a window for somebody else, who may keep it: it is dead when the device is closed.
    pub fn region(&self, index: usize) -> Result<Arc<RegionWindow>, VfioError> {
        self.is_open()?;
        self.windows.get(index).cloned().ok_or_else(|| self.no_such("region", index))
    }

    fn access(
        &self,
        region: usize,
        offset: u64,
        bytes: usize,
    ) -> Result<(Arc<RegionWindow>, usize), VfioError> {
        let window = self.region(region)?;
        let refused = VfioError::Access {
            device: self.device.name.clone(),
            region,
            offset,
            bytes,
            size: window.size(),
        };
        let fits = matches!(bytes, 4 | 8) && window.contains(offset, bytes as u64);
        match usize::try_from(offset) {
            Ok(offset) if fits => Ok((window, offset)),
            _ => Err(refused),
        }
    }

    /// Reads an aligned register of 4 or 8 bytes.
    pub fn read(&self, region: usize, offset: u64, bytes: usize) -> Result<u64, VfioError> {
        let (window, at) = self.access(region, offset, bytes)?;
        Ok(if bytes == 8 { window.read64(at) } else { window.read32(at).into() })
    }

    /// Writes an aligned register of 4 or 8 bytes.
    pub fn write(&self, region: usize, offset: u64, bytes: usize, value: u64) -> Result<(), VfioError> {
        let (window, at) = self.access(region, offset, bytes)?;
        if bytes == 8 {
            window.write64(at, value);
        } else {
            window.write32(at, value as u32);
        }
        Ok(())
    }

    fn with_line<T>(&self, index: usize, work: impl FnOnce(&mut Line) -> T) -> Result<T, VfioError> {
        let mut lines = self.lines.lock();
        lines.get_mut(index).map(work).ok_or_else(|| self.no_such("interrupt", index))
    }

    /// Who is told when an interrupt comes; `None` disables it. The line is as unmasked as before.
    pub fn set_trigger(&self, index: usize, sink: Option<Arc<dyn EventSink>>) -> Result<(), VfioError> {
        self.is_open()?;
        let old = self.with_line(index, |line| line.set_sink(sink))?;
        drop(old);
        Ok(())
    }

    /// Masks an interrupt.
    pub fn mask(&self, index: usize) -> Result<(), VfioError> {
        self.is_open()?;
        self.with_line(index, Line::mask)
    }

    /// Unmasks an interrupt. A level-triggered line that is still high fires again when the host looks at its lines next.
    pub fn unmask(&self, index: usize) -> Result<(), VfioError> {
        self.is_open()?;
        if let Some(sink) = self.with_line(index, Line::unmask)? {
            sink.signal();
        }
        Ok(())
    }

    /// Tells the sink without the hardware.
    pub fn trigger(&self, index: usize) -> Result<(), VfioError> {
        self.is_open()?;
        if let Some(sink) = self.with_line(index, |line| line.trigger())? {
            sink.signal();
        }
        Ok(())
    }

    /// For the host's interrupt handler: the line is high, or had an edge. A level-triggered line is masked from here on.
    /// `false` if nobody was told, because it is masked or disabled.
    pub fn interrupt(&self, index: usize) -> Result<bool, VfioError> {
        let sink = self.with_line(index, Line::fire)?;
        if let Some(sink) = &sink {
            sink.signal();
        }
        Ok(sink.is_some())
    }

    /// The same by the host's number; gives how many interrupts of the device were told.
    pub(crate) fn host_line(&self, line: u32) -> usize {
        let mut told = 0;
        for index in 0..self.device.interrupts.len() {
            let mine = |own: &mut Line| if own.interrupt.line == line { own.fire() } else { None };
            if let Ok(Some(sink)) = self.with_line(index, mine) {
                sink.signal();
                told += 1;
            }
        }
        told
    }

    /// True if it is masked, by itself or by its owner.
    pub fn is_masked(&self, index: usize) -> Result<bool, VfioError> {
        self.with_line(index, |line| line.is_masked())
    }

    /// The lines that the host should look at: those that are neither masked nor disabled, with their index.
    pub fn enabled_lines(&self) -> Vec<(usize, Interrupt)> {
        let lines = self.lines.lock();
        let enabled = lines.iter().enumerate().filter(|(_, line)| line.is_enabled());
        enabled.map(|(index, line)| (index, line.interrupt)).collect()
    }

    /// Stops and clears the device at its owner's wish; the interrupts stay connected.
    pub fn reset(&self) -> Result<(), VfioError> {
        self.is_open()?;
        if self.group.registry.reset_driver(&self.device).is_none() {
            let compatible = self.device.compatible.clone();
            return Err(VfioError::NoResetFunction { device: self.device.name.clone(), compatible });
        }
        // Through its owner's registers, which end with the owner's time.
        let windows = self.device.regions.iter().zip(&self.windows);
        let regions = windows.map(|(region, own)| Region { registers: own.clone(), ..region.clone() });
        let own = PlatformDevice { regions: regions.collect(), ..(*self.device).clone() };
        let stopped = self.group.stop(self.id, &own);
        self.is_open()?;
        stopped
    }

    /// Nobody but the host touches the device any more, and it tells nobody anything. Then it is stopped and cleared. Further
    /// calls do nothing.
    ///
    /// # Errors
    /// [`VfioError::Quarantined`]: it does not stop, or somebody does not come back from its registers, and its group is blocked
    /// for good. It is closed all the same.
    pub fn close(&self) -> Result<(), VfioError> {
        if core::mem::replace(&mut *self.closed.lock(), true) {
            return Ok(());
        }
        let mut quiet = true;
        for window in &self.windows {
            quiet &= window.revoke();
        }
        let sinks: Vec<_> = self.lines.lock().iter_mut().filter_map(|line| line.set_sink(None)).collect();
        drop(sinks);
        let mut result = Ok(());
        if !quiet {
            // Whoever is still inside of a register access could start it again, whenever that is.
            let (device, what) = (self.device.name.clone(), ResetFailure::InUse);
            result = Err(self.group.distrust(&ResetError { device, what, registers: Vec::new() }));
        }
        result.and(self.group.stop(self.id, &self.device))
    }
}

impl Drop for VfioDevice {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _quarantined_on_error = self.close();
    }
}
