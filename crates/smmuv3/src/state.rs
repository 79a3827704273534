//! Everything an SMMUv3 remembers, as one plain struct; reset, save and restore.

use portcullis_arch::smmuv3::regs::{
    CMDQ_ERR_SHIFT, Cr0, Cr1, Cr2, Gbpa, Gerror, INDEX_MASK, IrqCtrl, OVERFLOW,
};
use portcullis_bus::AtcTicket;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::caps::Caps;
use crate::decision::TableRegs;
use crate::irq::Message;
use crate::queue::{Queue, Shape};
use crate::registers::masks;
use crate::stall::Stalls;

/// One programming interface: the non-secure one, or the secure one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Interface {
    pub secure: bool,
    pub cr0: u32,
    pub cr0ack: u32,
    pub cr1: u32,
    pub cr2: u32,
    /// With Update while the old value may still be in use.
    pub gbpa: u32,
    pub irq_ctrl: u32,
    pub gerror: u32,
    pub gerrorn: u32,
    pub gerror_irq: Message,
    pub strtab_base: u64,
    pub strtab_base_cfg: u32,
    pub cmdq: Queue,
    pub eventq: Queue,
    pub eventq_irq: Message,
    /// The record written last, and the producer index after it: what the next one may be merged with.
    pub last_event: Option<(u32, [u64; 4])>,
    pub priq: Queue,
    pub priq_irq: Message,
    pub gatos_ctrl: u32,
    pub gatos_sid: u64,
    pub gatos_addr: u64,
    pub gatos_par: u64,
    /// ATC invalidations that no CMD_SYNC has waited for yet.
    pub atc: Vec<AtcWait>,
    /// One of them has failed: the next CMD_SYNC says so.
    pub atc_failed: bool,
}

/// An ATC invalidation under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AtcWait {
    pub stream: u32,
    pub ticket: AtcTicket,
}

impl Interface {
    fn reset(secure: bool) -> Self {
        Self { secure, gbpa: GBPA_RESET, ..Self::default() }
    }
    /// CR0 as it works. A field takes effect when it is written; CR0ACK follows when nothing uses the old value.
    pub fn cr0(&self) -> Cr0 {
        Cr0::from_bits(self.cr0)
    }
    pub fn cr1(&self) -> Cr1 {
        Cr1::from_bits(self.cr1)
    }
    pub fn gbpa(&self) -> Gbpa {
        Gbpa::from_bits(self.gbpa)
    }
    pub fn irq_ctrl(&self) -> IrqCtrl {
        IrqCtrl::from_bits(self.irq_ctrl)
    }
    /// The errors that are active.
    pub fn errors(&self) -> Gerror {
        Gerror::from_bits(self.gerror ^ self.gerrorn)
    }
    /// Bits that are set in CR0 or CR0ACK: what closes the guards.
    pub fn enabled(&self) -> Cr0 {
        Cr0::from_bits(self.cr0 | self.cr0ack)
    }
    /// CR0ACK follows CR0: at once for the queues, for what transactions depend on when it has settled.
    pub fn acknowledge(&mut self, settled: bool) {
        let slow = if settled { 0 } else { SETTLING };
        self.cr0ack = self.cr0ack & slow | self.cr0 & !slow;
        if settled {
            self.gbpa = self.gbpa().with_update(false).into_bits();
        }
    }
    /// Something that was written has not taken effect everywhere.
    pub fn in_transition(&self) -> bool {
        self.cr0 != self.cr0ack || self.gbpa().update()
    }
}

/// The fields of CR0 on which transactions depend.
pub(crate) const SETTLING: u32 =
    Cr0::new().with_smmuen(true).with_atschk(true).with_sif(true).with_nsstalld(true).into_bits();

/// SHCFG: use incoming.
const GBPA_RESET: u32 = 0x1000;

/// The shapes of an interface's queues.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shapes {
    pub cmdq: Shape,
    pub eventq: Shape,
    pub priq: Shape,
}

impl Shapes {
    pub fn new(c: &Caps) -> Self {
        let output_mask = c.output_mask();
        let shape = |most_log2, entry| Shape { most_log2, entry, output_mask };
        Self { cmdq: shape(c.cmdq_log2, 16), eventq: shape(c.eventq_log2, 32), priq: shape(c.priq_log2, 16) }
    }
}

/// All registers, and the transactions that wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Regs {
    /// Non-secure, secure.
    pub side: [Interface; 2],
    pub stalls: Stalls,
}

impl Regs {
    pub fn reset(caps: &Caps) -> Self {
        Self { side: [Interface::reset(false), Interface::reset(true)], stalls: Stalls::new(caps.stall_max) }
    }

    /// S_CR0.NSSTALLD takes stalling away from non-secure streams.
    pub fn no_stalls(&self) -> bool {
        self.side[1].cr0().nsstalld()
    }

    /// The registers on which the look-ups of one security state depend.
    pub fn table_regs(&self, caps: &Caps, secure: bool) -> TableRegs {
        let i = &self.side[usize::from(secure)];
        let stall_model = if secure { caps.stall_model } else { caps.non_secure_stalls(self.no_stalls()) };
        TableRegs {
            secure,
            stall_model,
            cr0: i.cr0(),
            cr1: i.cr1(),
            cr2: Cr2::from_bits(i.cr2),
            gbpa: i.gbpa(),
            strtab_base: i.strtab_base,
            strtab_base_cfg: i.strtab_base_cfg,
        }
    }
}

/// A saved SMMU: everything but the wiring. Opaque; `serde` writes it in any format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    version: u32,
    caps: Caps,
    regs: Regs,
}

/// A saved state that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// Written by another version of the format.
    #[error("saved state has version {0}, this model reads version {VERSION}")]
    Version(u32),
    /// Saved from an SMMU with other capabilities.
    #[error("saved state is of an SMMU with other capabilities")]
    Caps,
    /// Inconsistent contents.
    #[error("saved state is damaged: {0}")]
    Damaged(&'static str),
}

pub(crate) const VERSION: u32 = 1;

/// Most ATC invalidations that may be under way on one queue before commands wait.
pub(crate) const MOST_ATC: usize = 256;

impl State {
    pub(crate) fn new(caps: &Caps, regs: &Regs) -> Self {
        // Naming every field makes a new one break the build until it is handled here and in `into_regs`.
        let Regs { side, stalls } = regs.clone();
        Self { version: VERSION, caps: caps.clone(), regs: Regs { side, stalls } }
    }

    pub(crate) fn into_regs(self, caps: &Caps) -> Result<Regs, RestoreError> {
        let Self { version, caps: saved, regs } = self;
        if version != VERSION {
            return Err(RestoreError::Version(version));
        }
        if saved != *caps {
            return Err(RestoreError::Caps);
        }
        let [ns, s] = &regs.side;
        if ns.secure || !s.secure {
            return Err(RestoreError::Damaged("the interfaces are not in their order"));
        }
        let found = damage(caps, ns).or(damage(caps, s)).or(regs.stalls.damage(caps.stall_max));
        match found {
            Some(what) => Err(RestoreError::Damaged(what)),
            None => Ok(regs),
        }
    }
}

/// What is wrong with a saved interface: values that no write could have left.
fn damage(caps: &Caps, i: &Interface) -> Option<&'static str> {
    // Naming every field makes a new one break the build until it is checked here.
    let Interface {
        secure,
        cr0,
        cr0ack,
        cr1,
        cr2,
        gbpa,
        irq_ctrl,
        gerror,
        gerrorn,
        gerror_irq,
        strtab_base,
        strtab_base_cfg,
        cmdq,
        eventq,
        eventq_irq,
        // Only compared with: any value is harmless.
        last_event: _,
        priq,
        priq_irq,
        gatos_ctrl,
        gatos_sid,
        gatos_addr,
        gatos_par: _,
        atc,
        atc_failed,
    } = i;
    let m = masks(caps, *secure);
    if *secure && caps.secure.is_none() && *i != Interface::reset(true) {
        return Some("there is no secure interface");
    }
    let only = |value: u32, mask: u32| value & !mask == 0;
    let only64 = |value: u64, mask: u64| value & !mask == 0;
    let message = |q: &Message, mask: crate::registers::MessageMask| {
        only64(q.address, mask.address) && only(q.data, mask.data) && only(q.attributes, mask.attributes)
    };
    let out = INDEX_MASK | OVERFLOW;
    let rules = [
        (only(*cr0, m.cr0) && only(*cr0ack, m.cr0), "CR0 has bits that do not exist"),
        (only(*cr1, m.cr1) && only(*cr2, m.cr2), "CR1 or CR2 has bits that do not exist"),
        (only(*gbpa, m.gbpa), "GBPA has bits that do not exist"),
        (only(*irq_ctrl, m.irq_ctrl), "IRQ_CTRL has bits that do not exist"),
        (only(*gerror, m.gerror) && only(*gerrorn, m.gerror), "GERROR has bits that do not exist"),
        (
            message(gerror_irq, m.gerror_irq)
                && message(eventq_irq, m.eventq_irq)
                && message(priq_irq, m.priq_irq),
            "an interrupt's message has bits that do not exist",
        ),
        (
            only64(*strtab_base, m.strtab_base) && only(*strtab_base_cfg, m.strtab_base_cfg),
            "STRTAB_BASE has bits that do not exist",
        ),
        (
            only64(cmdq.base, Queue::BASE)
                && only64(eventq.base, Queue::BASE)
                && only64(priq.base, m.priq_base),
            "a queue base has bits that do not exist",
        ),
        (
            only(cmdq.prod, INDEX_MASK)
                && only(cmdq.cons, INDEX_MASK | 0x7f << CMDQ_ERR_SHIFT)
                && only(eventq.prod | eventq.cons, out)
                && only(priq.prod | priq.cons, m.priq_index),
            "a queue index has bits that do not exist",
        ),
        (
            only(*gatos_ctrl, m.gatos_ctrl)
                && only64(*gatos_sid, m.gatos_sid)
                && only64(*gatos_addr, m.gatos_addr),
            "an address translation operation has bits that do not exist",
        ),
        (
            atc.len() <= MOST_ATC && (caps.ats && !*secure || atc.is_empty() && !*atc_failed),
            "there are ATC invalidations that cannot be",
        ),
    ];
    rules.iter().find(|(fine, _)| !*fine).map(|(_, what)| *what)
}
