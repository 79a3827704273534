//! A guest that aims its engine at memory that is not its own: register by register, with no driver in between.

use portcullis_arch::axidma::{BdControl, Descriptor, Dmacr, Dmasr, MM2S, S2MM, error, reg};
use portcullis_arch::{Ipa, Pa};
use portcullis_hal::{DmaMemory, Mmio};
use portcullis_vfio::GuestMmio;

use super::Guest;
use crate::system::System;

/// Bytes of each attempt.
const BYTES: u32 = 64;
/// What the guest's own buffer holds before an attempt to read.
const CANARY: u8 = 0xa5;
/// Time that an attempt gets, in nanoseconds.
const PATIENCE_NS: u64 = 20_000;
const ERRORS: u32 = error::DMA_SLAVE | error::DMA_DECODE;

/// What became of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The engine's channel halted with a bus error.
    pub refused: bool,
    /// Memory changed, or was read.
    pub got_through: bool,
}

/// A guest's engine, its registers and its descriptors.
pub struct Aim<'a> {
    system: &'a System,
    guest: &'a Guest,
    registers: GuestMmio,
    /// Guest memory: descriptors, then a buffer.
    own: Pa,
}

impl<'a> Aim<'a> {
    /// Takes a core of a guest from its driver. Only for cores with scatter-gather; `None` if there is no such core, or no memory.
    pub fn new(system: &'a System, guest: &'a Guest, core: usize) -> Option<Self> {
        let core = guest.cores().get(core)?;
        let base = core.base;
        let registers = guest.vm().bus().window(Ipa(base), 0x1000).ok()?;
        let own = guest.vm().guest_memory().alloc(0x1000, 0x1000)?.pa;
        Some(Self { system, guest, registers, own })
    }

    fn buffer(&self) -> Pa {
        self.own.wrapping_add(0x800)
    }

    fn start(&self, block: u32, descriptor: Pa, target: Descriptor) {
        let memory = self.guest.vm().guest_memory();
        memory.write(descriptor, &target.bytes());
        memory.clean(descriptor, 64);
        memory.wmb();
        let write = |offset: u32, value: u32| self.registers.write32((block + offset) as usize, value);
        write(reg::CURDESC, descriptor.get() as u32);
        write(reg::CURDESC_MSB, (descriptor.get() >> 32) as u32);
        write(reg::DMACR, Dmacr::new().with_rs(true).with_irq_threshold(1).into_bits());
        write(reg::TAILDESC, descriptor.get() as u32);
        write(reg::TAILDESC_MSB, (descriptor.get() >> 32) as u32);
    }

    /// Moves 64 bytes between the guest's own buffer and `target`, which is an address that the guest has no memory at. `host` is
    /// where the board has the memory that is being aimed at.
    pub fn attempt(&self, target: u64, host: Pa, write: bool) -> Attempt {
        let memory = self.guest.vm().guest_memory();
        let machine = self.system.machine();
        let host_memory = machine.dma_memory();
        let (mut before, mut after) = ([0; BYTES as usize], [0; BYTES as usize]);
        host_memory.read(host, &mut before);
        let own = if write { before.map(|b| !b) } else { [CANARY; BYTES as usize] };
        memory.write(self.buffer(), &own);
        memory.clean(self.buffer(), own.len());
        self.registers.write32((MM2S + reg::DMACR) as usize, Dmacr::new().with_reset(true).into_bits());
        let control = BdControl::new().with_length(BYTES).with_sof(true).with_eof(true);
        let bd = |buffer, control| Descriptor { next: 0, buffer, control, status: Default::default() };
        let (from, to) = if write { (self.buffer().get(), target) } else { (target, self.buffer().get()) };
        self.start(S2MM, self.own.wrapping_add(64), bd(to, BdControl::new().with_length(BYTES)));
        self.start(MM2S, self.own, bd(from, control));
        machine.run_for(PATIENCE_NS);
        let block = if write { S2MM } else { MM2S };
        let status = Dmasr::from_bits(self.registers.read32((block + reg::DMASR) as usize));
        let refused = status.into_bits() & ERRORS != 0 && status.halted();
        let got_through = if write {
            host_memory.read(host, &mut after);
            after != before
        } else {
            memory.invalidate(self.buffer(), own.len());
            memory.read(self.buffer(), &mut after);
            after != own
        };
        Attempt { refused, got_through }
    }
}

impl Drop for Aim<'_> {
    /// The core is left as after reset, for its driver to find again.
    fn drop(&mut self) {
        self.registers.write32((MM2S + reg::DMACR) as usize, Dmacr::new().with_reset(true).into_bits());
        let block = portcullis_hal::Block { pa: self.own, len: 0x1000 };
        self.guest.vm().guest_memory().free(block);
    }
}
