//! A board behind the window: memory, interrupts, time, the record.
//!
//! [`Session`] has one peer and one machine and works in its caller's thread: [`turn`](Session::turn) answers what the
//! peer asked, lets engines work, and sends interrupts; it waits only where nothing is to be done. The machine is built
//! when the peer has told of the guest's memory and switches the window on.
//!
//! Time is the host's: a board's clock follows it, so that two runs are never quite the same.

mod config;
mod ghost;
pub mod pci;
pub mod ram;
pub mod window;
pub mod wires;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use portcullis_arch::Pa;
use portcullis_arch::smmuv3::cmd::Opcode;
use portcullis_board::MachineDescription;
use portcullis_board::sim::{BuildError, Event, Machine, Options, SmmuModel, Traffic};
use portcullis_board::tree::Interrupt;
use portcullis_bus::Activity;
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::Serialize;
use thiserror::Error;

use crate::guest_tree::PciFunction;
use crate::vfio_user::{Connection, ConnectionError, Interest, Pumped, RequestError};
use ghost::Ghost;
use pci::TestFunction;
use ram::GuestRamError;
use window::{DeviceTouches, Window};
use wires::{WireCounts, Wires};

/// Messages handled before engines get their turn.
const MESSAGES: usize = 64;
/// Steps of engines before the peer gets its turn; after so many of them a look at the clock, for with many engines at work
/// on large pieces the processors of the guest would wait too long for an answer.
const STEPS: u32 = 256;
const STEPS_AT_ONCE: u32 = 16;
const SLICE: Duration = Duration::from_millis(1);
/// Writes to the guest that wait for their answer at most.
const OUTSTANDING: usize = 64;

/// What a session serves.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The board as it is in the guest: register addresses inside the window, the guest's memory.
    pub description: MachineDescription,
    /// Recording and the like.
    pub options: Options,
    /// First address and bytes of the window.
    pub window: (Pa, u64),
    /// The distributor of the guest's GIC.
    pub gicd: Pa,
    /// Interrupts (SPI numbers) that the guest's tree calls edges.
    pub edges: BTreeSet<u32>,
}

impl Plan {
    /// The edge triggered ones among interrupts.
    pub fn edges<'a>(interrupts: impl IntoIterator<Item = &'a Interrupt>) -> BTreeSet<u32> {
        let edge = |i: &&Interrupt| i.is_edge();
        let number = |i: &Interrupt| match i {
            Interrupt::Spi { number, .. } => Some(*number),
            _ => None,
        };
        interrupts.into_iter().filter(edge).filter_map(number).collect()
    }
}

/// Why a session ends before its peer does.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The connection is not usable any more.
    #[error("the connection to QEMU: {0}")]
    Connection(#[from] ConnectionError),
    /// The peer cannot be asked for a write.
    #[error("an interrupt cannot be sent: {0}")]
    Request(#[from] RequestError),
    /// The host.
    #[error("waiting for QEMU: {0}")]
    Host(#[from] std::io::Error),
    /// The guest's memory.
    #[error("{0}")]
    Ram(#[from] GuestRamError),
    /// No machine can be made of the board.
    #[error("{0}")]
    Build(#[from] BuildError),
}

/// What a turn came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Goes on.
    Open,
    /// The peer is gone.
    Closed,
}

/// A board and the peer that drives it.
pub struct Session {
    plan: Plan,
    connection: Connection,
    ghost: Ghost,
    wires: Arc<Wires>,
    started: Instant,
    activity: Activity,
    writes: u64,
    functions: Vec<(TestFunction, Connection)>,
    idle: bool,
    latency: Latency,
}

impl Session {
    /// Serves `plan` to a peer.
    pub fn new(plan: Plan, connection: Connection) -> Self {
        let wires = Arc::new(Wires::new(plan.gicd, plan.edges.clone()));
        let ghost = Ghost::new(plan.window.1, wires.clone());
        Self {
            plan,
            connection,
            ghost,
            wires,
            started: Instant::now(),
            activity: Activity::Idle,
            writes: 0,
            functions: Vec::new(),
            idle: false,
            latency: Latency::default(),
        }
    }

    /// Serves one of the board's PCI functions as well, to the same peer.
    pub fn add_function(&mut self, what: PciFunction, connection: Connection) {
        let mut function = TestFunction::new(what);
        if let Some(machine) = &self.ghost.machine {
            function.connect(machine);
        }
        self.functions.push((function, connection));
    }

    /// The machine, once the guest's memory is there and the window is on.
    pub fn machine(&self) -> Option<&Arc<Machine>> {
        self.ghost.machine.as_ref()
    }

    /// Nothing was to be done in the last turn.
    pub fn is_idle(&self) -> bool {
        self.idle
    }

    /// How often the peer reset the function: at its start, and at every reset of the guest.
    pub fn resets(&self) -> u64 {
        self.ghost.resets
    }

    /// Where the window is in the guest, if it is on.
    pub fn window_at(&self) -> Option<Pa> {
        let config = &self.ghost.config;
        config.memory_on().then(|| Pa(config.bar0().into()))
    }

    /// Answers what is there, lets engines work, sends interrupts. If there was nothing to do it waits for the peer, until
    /// something of its own is due, or for `patience`.
    ///
    /// # Errors
    /// The connection broke, or the guest's memory or the board are not usable.
    pub fn turn(&mut self, patience: Duration) -> Result<Turn, SessionError> {
        let pumped = self.connection.pump(&mut self.ghost, MESSAGES)?;
        let mut more = pumped == Pumped::More;
        for (function, connection) in &mut self.functions {
            more |= connection.pump(function, MESSAGES)? == Pumped::More;
        }
        if let Some(trouble) = self.ghost.trouble.take() {
            return Err(trouble.into());
        }
        if pumped == Pumped::Closed {
            return Ok(Turn::Closed);
        }
        self.build()?;
        if let Some(machine) = &self.ghost.machine {
            machine.tracer().advance_to(nanos(self.started.elapsed()));
            let begun = Instant::now();
            for _ in 0..STEPS / STEPS_AT_ONCE {
                self.activity = machine.work(STEPS_AT_ONCE);
                if self.activity != Activity::Busy || begun.elapsed() > SLICE {
                    break;
                }
            }
        }
        for done in self.connection.take_completions() {
            self.latency.note(done.elapsed, done.result.is_err());
        }
        self.send_interrupts()?;
        self.idle = !more && self.activity != Activity::Busy;
        if self.idle {
            self.wait(self.pause(patience))?;
        }
        Ok(Turn::Open)
    }

    /// Waits for any of the connections.
    fn wait(&self, pause: Duration) -> Result<(), SessionError> {
        if self.functions.is_empty() {
            self.connection.wait(Some(pause))?;
            return Ok(());
        }
        // A function that went away alone would be ready for ever.
        let functions = self.functions.iter().map(|(_, c)| c).filter(|c| !c.is_closed());
        let all = std::iter::once(&self.connection).chain(functions);
        let mut fds: Vec<PollFd<'_>> = all
            .map(|c| {
                let Interest { input, output } = c.interest();
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, input);
                flags.set(PollFlags::OUT, output);
                PollFd::new(c, flags)
            })
            .collect();
        let timeout = Timespec::try_from(pause).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(SessionError::Host(error.into())),
        }
    }

    /// How long nothing has to be done.
    fn pause(&self, patience: Duration) -> Duration {
        let now = Instant::now();
        let mut pause = patience;
        if let Some(at) = self.wires.next().filter(|_| self.may_write()) {
            pause = pause.min(at.saturating_duration_since(now));
        }
        if let Activity::Until(at) = self.activity {
            pause = pause.min(Duration::from_nanos(at.saturating_sub(nanos(self.started.elapsed()))));
        }
        pause
    }

    /// Builds the machine as soon as the window is switched on.
    fn build(&mut self) -> Result<(), SessionError> {
        if self.ghost.machine.is_some() || !self.ghost.config.memory_on() {
            return Ok(());
        }
        let needed: Vec<_> =
            self.plan.description.memory.iter().map(|m| (m.region.base.get(), m.region.size)).collect();
        let memory = self.ghost.ram.build(needed)?;
        let machine = Machine::build_on(self.plan.description.clone(), self.plan.options, memory)?;
        machine.tracer().forward_interrupts(self.wires.clone());
        let (base, size) = self.plan.window;
        self.ghost.window = Some(Window::new(&machine, base.get(), size));
        for (function, _) in &mut self.functions {
            function.connect(&machine);
        }
        self.ghost.machine = Some(machine);
        Ok(())
    }

    /// Whether the peer takes a write now. What is due waits until it does: bus mastering comes on, an answer comes, the
    /// socket takes bytes; each of these wakes [`wait`](Self::wait).
    fn may_write(&self) -> bool {
        // Without bus mastering QEMU refuses writes.
        self.ghost.config.master_on()
            && self.connection.interest().input
            && self.connection.outstanding() < OUTSTANDING
    }

    fn send_interrupts(&mut self) -> Result<(), SessionError> {
        while self.may_write() {
            let Some(write) = self.wires.take(Instant::now(), 1).pop() else { break };
            match self.connection.dma_write(write.address, &write.value.to_le_bytes()) {
                Ok(_) => self.writes += 1,
                // A message to where no memory can be: the guest's own doing.
                Err(RequestError::Size { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// What happened since the last call, and how many more events were not kept.
    pub fn take_events(&self) -> (Vec<Event>, u64) {
        self.ghost.machine.as_ref().map_or_else(Default::default, |m| m.tracer().take())
    }

    /// What the session came to so far.
    pub fn summary(&self) -> Summary {
        let mut summary = Summary {
            seconds: self.started.elapsed().as_secs_f64(),
            resets: self.ghost.resets,
            devices: self.ghost.window.as_ref().map(Window::touches).unwrap_or_default(),
            outside: self.ghost.window.as_ref().map_or(self.ghost.early, Window::outside),
            interrupts: self.wires.counts(),
            writes: self.writes,
            latency: self.latency,
            ..Summary::default()
        };
        let Some(machine) = &self.ghost.machine else { return summary };
        for smmu in machine.smmus() {
            if let SmmuModel::V3(model) = &smmu.model {
                let name = |code| {
                    Opcode::from_code(code).map_or_else(|| format!("{code:#04x}"), |o| format!("{o:?}"))
                };
                summary.commands.extend(model.commands_done().into_iter().map(|(code, n)| (name(code), n)));
            }
        }
        for engine in machine.engines() {
            let traffic = *engine.traffic.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if traffic.transactions > 0 {
                summary.engines.push(EngineTraffic::new(&engine.name, engine.stream.get(), traffic));
            }
        }
        summary
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What went through an engine's port.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EngineTraffic {
    /// The engine.
    pub engine: String,
    /// Its stream.
    pub stream: u32,
    /// Transactions, both sides of a copy counted.
    pub transactions: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Transactions that ended with an error.
    pub errors: u64,
    /// Translations that the port's TLB answered.
    pub hits: u64,
    /// Translations that needed a walk.
    pub walks: u64,
    /// Stream table entries and contexts looked up.
    pub lookups: u64,
}

impl EngineTraffic {
    fn new(name: &str, stream: u32, t: Traffic) -> Self {
        Self {
            engine: name.into(),
            stream,
            transactions: t.transactions,
            bytes: t.bytes,
            errors: t.errors,
            hits: t.port.hits,
            walks: t.port.walks,
            lookups: t.port.resolutions,
        }
    }

    /// Which part of the translations the TLB answered; `None` if nothing was translated.
    pub fn hit_rate(&self) -> Option<f64> {
        let all = self.hits + self.walks;
        (all > 0).then(|| self.hits as f64 / all as f64)
    }
}

/// What a session came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// How long it lasted.
    pub seconds: f64,
    /// Resets of the function by the peer.
    pub resets: u64,
    /// What the guest did to registers.
    pub devices: Vec<DeviceTouches>,
    /// Accesses to the window where no device is.
    pub outside: u64,
    /// Commands that SMMUs consumed, by name.
    pub commands: Vec<(String, u64)>,
    /// Engines that moved something.
    pub engines: Vec<EngineTraffic>,
    /// Interrupts.
    pub interrupts: WireCounts,
    /// Writes to the guest's interrupt controllers.
    pub writes: u64,
    /// How long they took.
    pub latency: Latency,
}

/// How long the peer took to answer writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// Answers.
    pub answered: u64,
    /// Of these, refusals.
    pub refused: u64,
    /// All of them together, in microseconds.
    pub total_us: u64,
    /// The longest, in microseconds.
    pub longest_us: u64,
}

impl Latency {
    fn note(&mut self, time: Duration, refused: bool) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.answered += 1;
        self.refused += u64::from(refused);
        self.total_us = self.total_us.saturating_add(us);
        self.longest_us = self.longest_us.max(us);
    }
}
