//! A machine that runs: the models of a [`MachineDescription`](crate::MachineDescription) on one bus, with time,
//! interrupts and a record of everything that happens.
//!
//! [`Machine`] is the hardware: nothing in it knows a driver. [`platform`] is what drivers get from it: register
//! windows, memory, a clock. A machine runs in its caller's thread and in simulated time; the same calls give the same
//! trace.

mod ats;
mod build;
mod build_pl;
mod build_v3;
mod explanation;
mod machine;
mod model;
pub mod platform;
mod pool;
mod port;
mod route;
pub mod trace;

pub use build::{BuildError, Options};
pub use explanation::Explanation;
pub use machine::{EngineKind, EngineSlot, Machine, SmmuSlot, Stuck};
pub use model::SmmuModel;
pub use platform::{Clock, Memory, Registers};
pub use pool::Pool;
pub use port::{SharedTraffic, TracingPort, Traffic};
pub use route::{IOU_SLCR, IouRoute, ROUTE};
pub use trace::{AtsEvent, Event, EventKind, Fault, Recording, Tracer, TransactionEvent};
