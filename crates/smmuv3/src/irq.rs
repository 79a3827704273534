//! Interrupt outputs: wires that pulse, and messages (IHI 0070 section 3.18).

use std::ops::Range;
use std::sync::Arc;

use portcullis_arch::attrs::{MemoryType, Shareability};
use portcullis_arch::smmuv3::regs::IrqCfg2;
use portcullis_arch::{Attributes, Pa};
use portcullis_bus::{BusError, InterruptSink, IrqLine, Memory};
use serde::{Deserialize, Serialize};

/// The wired outputs of one security state. All are pulses: the line goes high and low again.
pub struct Wires {
    /// The event queue is no longer empty.
    pub eventq: IrqLine,
    /// The page request queue is no longer empty, or has taken the last request of a group.
    pub priq: IrqLine,
    /// A CMD_SYNC that asked for an interrupt has completed.
    pub cmdq_sync: IrqLine,
    /// A global error.
    pub gerror: IrqLine,
    /// Any of these.
    pub combined: IrqLine,
}

impl Default for Wires {
    fn default() -> Self {
        Self {
            eventq: IrqLine::unconnected(),
            priq: IrqLine::unconnected(),
            cmdq_sync: IrqLine::unconnected(),
            gerror: IrqLine::unconnected(),
            combined: IrqLine::unconnected(),
        }
    }
}

impl Wires {
    /// All on one line (`interrupt-names = "combined"`).
    pub fn combined(sink: Arc<dyn InterruptSink>, line: u32) -> Self {
        Self { combined: IrqLine::new(sink, line), ..Self::default() }
    }

    /// One line each, in the order of a device tree's `"eventq", "priq", "cmdq-sync", "gerror"`.
    pub fn separate(sink: &Arc<dyn InterruptSink>, [eventq, priq, cmdq_sync, gerror]: [u32; 4]) -> Self {
        let line = |n| IrqLine::new(sink.clone(), n);
        Self {
            eventq: line(eventq),
            priq: line(priq),
            cmdq_sync: line(cmdq_sync),
            gerror: line(gerror),
            combined: IrqLine::unconnected(),
        }
    }
}

/// Where the interrupts of an SMMUv3 go. Sinks are called while the SMMU's registers are locked, so that pulses arrive in
/// order: a sink must not access the registers itself.
#[derive(Default)]
pub struct Interrupts {
    /// Wires of the non-secure interface.
    pub non_secure: Wires,
    /// Wires of the secure interface.
    pub secure: Wires,
    /// Takes messages to the doorbell range; without it they are memory writes like any other.
    pub messages: Option<Arc<dyn InterruptSink>>,
}

impl Interrupts {
    /// Non-secure interrupts on one line.
    pub fn combined(sink: Arc<dyn InterruptSink>, line: u32) -> Self {
        Self { non_secure: Wires::combined(sink, line), ..Self::default() }
    }
    /// Non-secure interrupts on one line each: event queue, page request queue, CMD_SYNC, global errors.
    pub fn separate(sink: &Arc<dyn InterruptSink>, lines: [u32; 4]) -> Self {
        Self { non_secure: Wires::separate(sink, lines), ..Self::default() }
    }
    /// The same with messages to the doorbell range delivered to `sink`.
    #[must_use]
    pub fn with_messages(self, sink: Arc<dyn InterruptSink>) -> Self {
        Self { messages: Some(sink), ..self }
    }
}

/// The sources of interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    EventQueue,
    PriQueue,
    Sync,
    Gerror,
}

/// The registers of one source's message (x_IRQ_CFG0 to 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Message {
    /// Address, bits 55:2. 0: no message.
    pub address: u64,
    pub data: u32,
    /// Shareability and memory type as in x_IRQ_CFG2 (with PRIQ_IRQ_CFG2.LO).
    pub attributes: u32,
}

impl Message {
    /// Bits of x_IRQ_CFG0.
    pub const ADDRESS: u64 = 0x00ff_ffff_ffff_fffc;
}

/// The interrupt outputs with the range of addresses that are doorbells.
pub(crate) struct Outputs {
    pub interrupts: Interrupts,
    pub doorbell: Range<u64>,
}

impl Outputs {
    /// Pulses the wire of a source.
    pub fn pulse(&self, secure: bool, source: Source) {
        let wires = if secure { &self.interrupts.secure } else { &self.interrupts.non_secure };
        let line = match source {
            Source::EventQueue => &wires.eventq,
            Source::PriQueue => &wires.priq,
            Source::Sync => &wires.cmdq_sync,
            Source::Gerror => &wires.gerror,
        };
        line.pulse();
        wires.combined.pulse();
    }

    /// Sends a message: to the doorbell, or to memory.
    ///
    /// # Errors
    /// Memory has refused it.
    pub fn send<M: Memory>(
        &self,
        memory: &M,
        secure: bool,
        message: Message,
        output_mask: u64,
    ) -> Result<(), BusError> {
        let address = message.address & output_mask;
        if let Some(sink) = &self.interrupts.messages
            && self.doorbell.contains(&address)
        {
            sink.message(Pa(address), message.data);
            return Ok(());
        }
        let cfg = IrqCfg2::from_bits(message.attributes);
        let shareability = match cfg.sh() {
            1 => Shareability::Non,
            code => Shareability::from_code(code),
        };
        let attrs = Attributes::DEVICE_DEFAULT
            .with_memory(MemoryType::from_code(cfg.memattr()))
            .with_shareability(shareability)
            .with_non_secure(!secure)
            .with_privileged(true)
            .consistent();
        memory.write(Pa(address), attrs, &message.data.to_le_bytes())
    }
}
