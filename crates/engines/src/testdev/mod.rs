//! The PCIe DMA test device of system S3: copies memory when its doorbell rings, or by itself (aggressive mode).
//!
//! Build a [`TestDev`] from a [`TestDevConfig`] and a port, put [`TestDevBar`] where BAR0 is, and step it. With
//! `extended` it has a second block of registers, from 0x100 up, for what an IOMMU test needs: PASIDs, a result, a
//! count, an interrupt and 64-bit addresses ([`portcullis_arch::testdev::reg`]). Give it ATS by wrapping its port
//! ([`crate::atc`]).
//!
//! | Feature | State |
//! |---|---|
//! | SRCADDR to AGGRESSIVE, access sizes 1, 2, 4 and 8 with their quirks | covered: 8 bytes are two accesses of 4, a 4-byte write clears the upper half, unaligned is refused |
//! | BUSY_DELAY, addresses and size taken when the delay ends, doorbell while busy ignored | covered; the delay begins at the first step after the doorbell |
//! | Read everything, then write everything | covered: overlap is no problem, one bad source page suppresses the write |
//! | STATUS back to 0 whatever the result | covered |
//! | Bad source page | different: reading stops at the first fault; the original goes on and reports the same result |
//! | Bad destination page | covered: the other pages are written; one fault for each bad page, or a stop at the first with `stop_at_fault` |
//! | Aggressive mode, also two tick chains after a quick off and on | covered; bounded to [`MAX_TIMERS`] timers, what is more is ignored |
//! | Aggression delay 0 | different: one tick per microsecond of the board's time, so that time passes |
//! | SIZE | bounded by `max_bytes` (the buffer): a larger transfer moves nothing; the original allocates any size |
//! | Transfer at once | different: in steps of [`STEP_BYTES`]; STATUS is 1 meanwhile; another timer waits for it |
//! | Stalled access | parks, STATUS stays 1, goes on where it was; ended without an abort: zeros, or ignored, up to the 4 KiB boundary |
//! | Bus master enable | [`TestDev::set_bus_master`]; aggressive mode at power-up sets it |
//! | Interrupt (extension) | wired until acknowledged, or a message; a message that stalls or is refused is lost and counted |
//! | Function-level reset | keeps all registers: there is nothing to call; [`Engine::reset`] is power-up |
//! | Configuration space | not covered: the identity is in the configuration, for whoever presents the function |

mod registers;
mod state;
#[cfg(test)]
mod tests;
mod transfer;

use std::sync::Arc;

use portcullis_arch::testdev::{IrqCtrl, PasidCtrl, PciIdentity, TransferResult};
use portcullis_arch::{Attributes, Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{Activity, DmaPort, Engine, Initiator, InterruptSink, IrqLine};
use serde::{Deserialize, Serialize};

pub use registers::TestDevBar;
pub use state::TestDevState;
use transfer::Transfer;

/// Timers that may run at a time: doorbells and aggressive tick chains.
pub const MAX_TIMERS: usize = 16;
/// Bytes that one step reads or writes at most.
pub const STEP_BYTES: usize = 256 * 1024;

const NS_PER_MS: u64 = 1_000_000;
/// The shortest time between two aggressive ticks.
const MIN_TICK_NS: u64 = 1_000;

/// What is fixed about a test device, and what its registers hold at power-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TestDevConfig {
    /// The stream that all its transactions belong to (its requester ID, mapped).
    pub stream: StreamId,
    /// Who it says it is.
    pub identity: PciIdentity,
    /// The extension block from 0x100 up exists.
    pub extended: bool,
    /// Bus mastering is on at power-up.
    pub bus_master: bool,
    /// Property `aggressive`: makes transfers by itself from power-up.
    pub aggressive: bool,
    /// Property `aggression_delay_ms`: the pause between aggressive transfers.
    pub aggression_delay_ms: u64,
    /// Property `srcaddr`.
    pub srcaddr: u64,
    /// Property `dstaddr`.
    pub dstaddr: u64,
    /// Property `size`.
    pub size: u64,
    /// Property `busy_delay_ms`.
    pub busy_delay_ms: u64,
    /// The largest transfer: what the device may allocate.
    pub max_bytes: usize,
    /// A transfer ends at the first bad destination page instead of writing the others.
    pub stop_at_fault: bool,
}

impl TestDevConfig {
    /// The published device, without the extension block; bus mastering on, transfers up to 16 MiB.
    pub const fn new(stream: StreamId) -> Self {
        Self {
            stream,
            identity: PciIdentity::DEVICE,
            extended: false,
            bus_master: true,
            aggressive: false,
            aggression_delay_ms: 0,
            srcaddr: 0,
            dstaddr: 0,
            size: 0,
            busy_delay_ms: 0,
            max_bytes: 16 << 20,
            stop_at_fault: false,
        }
    }
}

/// Register values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Values {
    srcaddr: u64,
    dstaddr: u64,
    size: u64,
    busy: bool,
    busy_delay: u64,
    aggressive: bool,
    pasid: u32,
    result: u32,
    result_done: u32,
    count: u64,
    irq: u32,
    msi_data: u32,
    msi_addr: u64,
}

/// What a timer starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Cause {
    Doorbell,
    Tick,
}

/// When it starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum When {
    /// Nanoseconds from the next step.
    After(u64),
    /// The board's time in nanoseconds.
    At(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Timer {
    cause: Cause,
    when: When,
}

/// The test device.
pub struct TestDev {
    config: TestDevConfig,
    port: Box<dyn DmaPort>,
    irq: IrqLine,
    messages: Option<Arc<dyn InterruptSink>>,
    values: Values,
    bus_master: bool,
    timers: Vec<Timer>,
    transfer: Option<Transfer>,
    /// Interrupt messages that memory or the IOMMU refused.
    lost_messages: u64,
}

impl TestDev {
    /// A device after power-up, which reaches memory through `port` and drives `irq` (extension only). Interrupt messages
    /// are writes through `port`, unless [`TestDev::with_messages`] says otherwise.
    pub fn new(config: TestDevConfig, port: Box<dyn DmaPort>, irq: IrqLine) -> Self {
        let (values, bus_master, timers) = power_up(&config);
        Self {
            config,
            port,
            irq,
            messages: None,
            values,
            bus_master,
            timers,
            transfer: None,
            lost_messages: 0,
        }
    }

    /// Interrupt messages go straight to `sink`, past the IOMMU.
    pub fn with_messages(self, sink: Arc<dyn InterruptSink>) -> Self {
        Self { messages: Some(sink), ..self }
    }

    /// What the device was built with.
    pub fn config(&self) -> &TestDevConfig {
        &self.config
    }

    /// Bus Master Enable in the command register: while it is off, transfers fail.
    pub fn set_bus_master(&mut self, enabled: bool) {
        self.bus_master = enabled;
    }

    /// Transfers that ended, whatever their result.
    pub fn count(&self) -> u64 {
        self.values.count
    }

    /// How the last transfer ended, and the bytes that had arrived when it failed.
    pub fn result(&self) -> (TransferResult, u32) {
        (TransferResult::from_bits(self.values.result), self.values.result_done)
    }

    /// True while an access waits in the IOMMU (or in its ATC) for software.
    pub fn is_stalled(&self) -> bool {
        self.transfer.as_ref().is_some_and(Transfer::is_parked)
    }

    /// Interrupt messages that did not get through.
    pub fn lost_messages(&self) -> u64 {
        self.lost_messages
    }

    fn initiator(&self) -> Initiator {
        let from = Initiator::new(self.config.stream);
        let pasid = PasidCtrl::from_bits(self.values.pasid);
        if !pasid.enable() {
            return from;
        }
        let attrs =
            Attributes::DEVICE_DEFAULT.with_privileged(pasid.privileged()).with_instruction(pasid.execute());
        Initiator { substream: Some(SubstreamId(pasid.pasid())), attrs, ..from }
    }

    /// Adds a timer; false if there is no room.
    fn arm(&mut self, cause: Cause, when: When) -> bool {
        let room = self.timers.len() < MAX_TIMERS;
        if room {
            self.timers.push(Timer { cause, when });
        }
        room
    }

    /// Timers that were set since the last step begin to run.
    fn start_timers(&mut self, now: u64) {
        for timer in &mut self.timers {
            if let When::After(ns) = timer.when {
                timer.when = When::At(now.saturating_add(ns));
            }
        }
    }

    /// The timer that expires first, and when.
    fn next_timer(&self) -> Option<(usize, u64)> {
        let at = |t: &Timer| match t.when {
            When::At(at) => at,
            When::After(_) => 0,
        };
        self.timers.iter().map(at).enumerate().min_by_key(|t| t.1)
    }

    /// A transfer ended.
    fn finish(&mut self, cause: Cause, outcome: Outcome, now: u64) {
        let Outcome { result, done } = outcome;
        self.values.result = result.into_bits();
        self.values.result_done = done;
        self.values.count = self.values.count.wrapping_add(1);
        self.values.busy = false;
        if cause == Cause::Tick && self.values.aggressive {
            let pause = self.config.aggression_delay_ms.saturating_mul(NS_PER_MS).max(MIN_TICK_NS);
            self.arm(Cause::Tick, When::At(now.saturating_add(pause)));
        }
        let irq = IrqCtrl::from_bits(self.values.irq);
        if !irq.enable() {
            return;
        }
        if irq.message() {
            return self.send_message();
        }
        self.values.irq = irq.with_pending(true).into_bits();
        self.drive_irq();
    }

    fn send_message(&mut self) {
        let Values { msi_addr, msi_data, .. } = self.values;
        if let Some(sink) = &self.messages {
            return sink.message(Pa(msi_addr), msi_data);
        }
        let from = Initiator::new(self.config.stream);
        let sent = self.port.write(from, Iova(msi_addr), &msi_data.to_le_bytes());
        self.lost_messages += u64::from(sent.is_err());
    }

    fn drive_irq(&self) {
        self.irq.set(IrqCtrl::from_bits(self.values.irq).pending());
    }
}

/// How a transfer ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Outcome {
    result: TransferResult,
    /// Bytes that had arrived when it first failed.
    done: u32,
}

fn power_up(config: &TestDevConfig) -> (Values, bool, Vec<Timer>) {
    let TestDevConfig { aggressive, srcaddr, dstaddr, size, busy_delay_ms: busy_delay, .. } = *config;
    let values = Values {
        srcaddr,
        dstaddr,
        size,
        busy: false,
        busy_delay,
        aggressive,
        pasid: 0,
        result: 0,
        result_done: 0,
        count: 0,
        irq: 0,
        msi_data: 0,
        msi_addr: 0,
    };
    let first = Timer { cause: Cause::Tick, when: When::After(0) };
    (values, config.bus_master || aggressive, aggressive.then_some(first).into_iter().collect())
}

impl Engine for TestDev {
    fn step(&mut self, now: u64) -> Activity {
        self.start_timers(now);
        if self.transfer.is_none()
            && let Some((index, at)) = self.next_timer()
            && at <= now
        {
            let timer = self.timers.remove(index);
            self.values.busy = true;
            self.transfer = Some(self.begin(timer.cause));
        }
        if let Some(transfer) = self.transfer.take() {
            self.advance(transfer, now);
        }
        match &self.transfer {
            Some(t) if t.is_parked() => Activity::Stalled,
            Some(_) => Activity::Busy,
            None => match self.next_timer() {
                Some((_, at)) if at <= now => Activity::Busy,
                Some((_, at)) => Activity::Until(at),
                None => Activity::Idle,
            },
        }
    }

    fn reset(&mut self) {
        (self.values, self.bus_master, self.timers) = power_up(&self.config);
        self.transfer = None;
        self.lost_messages = 0;
        self.drive_irq();
    }
}
