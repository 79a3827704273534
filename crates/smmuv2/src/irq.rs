//! Interrupt outputs and when they are high.

use std::sync::Arc;

use portcullis_arch::smmuv2::{Fsr, Gfsr, Sctlr};
use portcullis_bus::{InterruptSink, IrqLine};

use crate::config::Config;
use crate::state::Regs;

/// The wires of an SMMUv2. All are levels. Their sinks are called while the SMMU's registers are locked, so that levels
/// arrive in order: a sink must not access the registers itself.
pub struct Interrupts {
    /// Global faults: non-secure, secure.
    pub global: [IrqLine; 2],
    /// Configuration access faults: non-secure, secure. They never happen in this model.
    pub config: [IrqLine; 2],
    /// One per context bank; missing ones are not connected.
    pub context: Vec<IrqLine>,
    /// OR of the global and context interrupts of a security state, as MMU-500's `comb_irpt_ns` and `comb_irpt_s`.
    pub combined: [IrqLine; 2],
}

impl Default for Interrupts {
    fn default() -> Self {
        let pair = || [IrqLine::unconnected(), IrqLine::unconnected()];
        Self { global: pair(), config: pair(), context: Vec::new(), combined: pair() }
    }
}

impl Interrupts {
    /// Everything of both security states on one line, as on a ZynqMP (SPI 155).
    pub fn combined(sink: Arc<dyn InterruptSink>, line: u32) -> Self {
        Self { combined: [IrqLine::new(sink, line), IrqLine::unconnected()], ..Self::default() }
    }

    pub(crate) fn update(&self, config: &Config, regs: &Regs) {
        let mut any = [false; 2];
        for (s, side) in regs.side.iter().enumerate() {
            let caf = Gfsr::new().with_caf(true).into_bits();
            let global = side.cr0().gfie() && side.gfsr & !caf != 0;
            self.global[s].set(global);
            self.config[s].set(side.cr0().gcfgfie() && side.gfsr & caf != 0);
            any[s] |= global;
        }
        for (n, bank) in regs.banks.iter().enumerate() {
            let high = context_level(config, bank.sctlr, bank.fsr());
            if let Some(line) = self.context.get(n) {
                line.set(high);
            }
            any[usize::from(regs.bank_is_secure(config, n))] |= high;
        }
        for (s, line) in self.combined.iter().enumerate() {
            line.set(any[s]);
        }
    }
}

/// A bank's interrupt: CFIE and any fault bit. MMU-500 also keeps it high while a transaction is stalled.
pub(crate) fn context_level(config: &Config, sctlr: u32, fsr: Fsr) -> bool {
    let faults = fsr.into_bits() & Fsr::W1C != 0 || (config.mmu500 && fsr.ss());
    Sctlr::from_bits(sctlr).cfie() && faults
}
