//! The window as a PCI function: configuration space, BAR 0, and what the peer says about memory.
//!
//! The function answers vendor and device id 0xffff, as an empty slot does, so that the guest's kernel never sees it, while
//! QEMU decodes its BAR all the same. QEMU reads the BAR's kind from here and does the sizing itself; where the BAR is
//! and whether it is on comes back as writes to configuration space.

use std::sync::Arc;

use portcullis_board::sim::Machine;

use crate::session::config::{CONFIG_BYTES, Config};
use crate::session::ram::{GuestRam, GuestRamError};
use crate::session::window::Window;
use crate::session::wires::Wires;
use crate::vfio_user::{DmaMap, DmaUnmap, Function, IrqInfo, Refusal, RegionInfo, SetIrqs, pci};

/// The PCI function that nobody sees.
pub struct Ghost {
    pub config: Config,
    pub ram: GuestRam,
    /// Bytes of BAR 0.
    size: u64,
    /// The registers, once the machine is there.
    pub window: Option<Window>,
    /// The machine, once it is there.
    pub machine: Option<Arc<Machine>>,
    wires: Arc<Wires>,
    /// The peer resets the function.
    pub resets: u64,
    /// The first thing that is wrong with the guest's memory.
    pub trouble: Option<GuestRamError>,
    /// Accesses before the machine was there.
    pub early: u64,
}

impl Ghost {
    /// A function with a BAR 0 of `size` bytes, whose interrupts go over `wires`.
    pub fn new(size: u64, wires: Arc<Wires>) -> Self {
        Self {
            config: Self::config(),
            ram: GuestRam::default(),
            size,
            window: None,
            machine: None,
            wires,
            resets: 0,
            trouble: None,
            early: 0,
        }
    }

    fn config() -> Config {
        // Class ff: no class that anybody binds to. BAR 0 is 32 bits wide and not prefetchable: zeroes.
        Config::new(
            &[(0, &[0xff; 4]), (8, &[0, 0, 0, 0xff]), (0x2c, &[0xff; 4])],
            &[(4, &[0xff; 2]), (0x10, &[0xff; 24])],
        )
    }

    fn note(&mut self, result: Result<(), GuestRamError>) -> Result<(), Refusal> {
        result.map_err(|error| {
            self.trouble.get_or_insert(error);
            Refusal::INVALID
        })
    }
}

impl Function for Ghost {
    fn region(&self, index: u32) -> RegionInfo {
        match index {
            pci::BAR0 => RegionInfo::read_write(self.size),
            pci::CONFIG => RegionInfo::read_write(CONFIG_BYTES as u64),
            _ => RegionInfo::ABSENT,
        }
    }

    fn irq(&self, _: u32) -> IrqInfo {
        IrqInfo::ABSENT
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) {
        match (region, &mut self.window) {
            (pci::CONFIG, _) => self.config.read(offset, data),
            (pci::BAR0, Some(window)) => window.read(offset, data),
            _ => {
                self.early += 1;
                data.fill(0xff);
            }
        }
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        match (region, &mut self.window) {
            (pci::CONFIG, _) => self.config.write(offset, data),
            (pci::BAR0, Some(window)) => window.write(offset, data),
            _ => self.early += 1,
        }
    }

    fn set_irqs(&mut self, _: SetIrqs) -> Result<(), Refusal> {
        // There are none; switching off what is not there is no error.
        Ok(())
    }

    fn dma_map(&mut self, map: DmaMap) -> Result<(), Refusal> {
        let Some(file) = map.fd.filter(|_| map.readable && map.writable) else { return Ok(()) };
        let result = self.ram.map(map.iova, map.size, file, map.offset);
        self.note(result)
    }

    fn dma_unmap(&mut self, unmap: DmaUnmap) -> Result<(), Refusal> {
        match unmap {
            DmaUnmap::All => self.ram.unmap_all(),
            DmaUnmap::Range { iova, size } => self.ram.unmap(iova, size),
        }
        Ok(())
    }

    /// A reset of the guest is a reset of the board, at once: a peer need not wait before it writes registers again.
    fn reset(&mut self) {
        self.resets += 1;
        self.config = Self::config();
        if let Some(machine) = &self.machine {
            for smmu in machine.smmus() {
                smmu.model.reset();
            }
            for engine in machine.engines() {
                engine.reset();
            }
        }
        // Last: what models withdraw while they are reset is not the new guest's business.
        self.wires.reset();
    }
}
