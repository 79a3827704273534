//! Time for drivers that sleep: while it passes, engines work and interrupts are handled.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use portcullis_hal::Clock;
use portcullis_iommu::IommuCore;

use crate::sim::Machine;

/// Handles an interrupt line; true if it had something to do.
pub type Handler = Arc<dyn Fn() -> bool + Send + Sync>;

/// Is told of every line that is high; gives how many devices listened.
pub type Listener = Arc<dyn Fn(u32) -> usize + Send + Sync>;

/// A handler that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandlerId(u64);

#[derive(Default)]
struct Handlers {
    all: Vec<(HandlerId, u32, Handler)>,
    added: u64,
}

/// The interrupts of the machine and who handles them.
pub struct Interrupts {
    machine: Weak<Machine>,
    core: IommuCore,
    /// Instance and lines of each SMMU.
    smmus: Vec<(portcullis_iommu::InstanceId, Vec<u32>)>,
    handlers: Mutex<Handlers>,
    listener: Mutex<Option<Listener>>,
}

/// How often one call looks at the lines that stay high.
const ROUNDS: usize = 64;

impl Interrupts {
    /// With handlers of SMMUs only.
    pub fn new(
        machine: &Arc<Machine>,
        core: IommuCore,
        smmus: Vec<(portcullis_iommu::InstanceId, Vec<u32>)>,
    ) -> Arc<Self> {
        let (handlers, listener) = (Mutex::default(), Mutex::default());
        Arc::new(Self { machine: Arc::downgrade(machine), core, smmus, handlers, listener })
    }
    fn handlers(&self) -> std::sync::MutexGuard<'_, Handlers> {
        self.handlers.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Who is told of every line, after its handlers: passthrough.
    pub fn listen(&self, listener: Listener) {
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener);
    }
    /// Adds a handler of a line, which may have others.
    pub fn add(&self, line: u32, handler: Handler) -> HandlerId {
        let mut handlers = self.handlers();
        let id = HandlerId(handlers.added);
        handlers.added += 1;
        handlers.all.push((id, line, handler));
        id
    }
    /// Takes a handler away.
    pub fn remove(&self, id: HandlerId) {
        let gone: Vec<_> = self.handlers().all.extract_if(.., |(of, ..)| *of == id).collect();
        // Not under the lock: a handler may own a driver.
        drop(gone);
    }
    /// Runs the handlers of lines that are high, once each; gives how many had something to do.
    pub fn take(&self) -> usize {
        let Some(machine) = self.machine.upgrade() else { return 0 };
        let mut handled = 0;
        for line in machine.tracer().lines().pending() {
            for (instance, _) in self.smmus.iter().filter(|(_, lines)| lines.contains(&line)) {
                handled += self.core.handle_irq(*instance).unwrap_or(0);
            }
        }
        handled + self.take_devices()
    }
    /// The same without those of SMMUs.
    pub fn take_devices(&self) -> usize {
        let Some(machine) = self.machine.upgrade() else { return 0 };
        let mut handled = 0;
        for line in machine.tracer().lines().pending() {
            let handlers: Vec<Handler> = self
                .handlers()
                .all
                .iter()
                .filter(|(_, of, _)| *of == line)
                .map(|(.., h)| h.clone())
                .collect();
            handled += handlers.iter().filter(|handler| handler()).count();
            let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).clone();
            handled += listener.map_or(0, |listener| listener(line));
        }
        handled
    }
}

/// The clock of drivers that wait for interrupts.
#[derive(Clone)]
pub struct SleepingClock {
    machine: Weak<Machine>,
    interrupts: Weak<Interrupts>,
}

impl SleepingClock {
    /// A clock of `machine` that lets `interrupts` be handled.
    pub fn new(machine: &Arc<Machine>, interrupts: &Arc<Interrupts>) -> Self {
        Self { machine: Arc::downgrade(machine), interrupts: Arc::downgrade(interrupts) }
    }
}

impl Clock for SleepingClock {
    fn now_ns(&self) -> u64 {
        self.machine.upgrade().map_or(0, |machine| machine.tracer().now())
    }
    fn delay_us(&self, us: u64) {
        let (Some(machine), Some(interrupts)) = (self.machine.upgrade(), self.interrupts.upgrade()) else {
            return;
        };
        let until = machine.tracer().now().saturating_add(us.saturating_mul(1000));
        for _ in 0..ROUNDS {
            // Interrupts are late by a microsecond at most, as long as something happens at all.
            let slice = machine.tracer().now().saturating_add(1000).min(until);
            machine.run_until(slice);
            let handled = interrupts.take();
            if handled == 0 && machine.tracer().now() < slice {
                // Engines rest and nobody wants anything: the rest of the time is only waited.
                break;
            }
            if machine.tracer().now() >= until {
                break;
            }
        }
        machine.run_until(until);
        interrupts.take();
        machine.tracer().advance_to(until);
    }
}
