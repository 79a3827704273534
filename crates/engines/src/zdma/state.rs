//! Saving and restoring a channel.

use portcullis_arch::zdma::{ADDRESS_MASK, REGISTERS, SIZE_MASK, register_at};
use serde::{Deserialize, Serialize};

use super::Zdma;
use super::registers::Registers;
use super::run::{Phase, Plan, Run, Side, Staged};
use crate::RestoreError;

const VERSION: u32 = 1;

/// Everything about a [`Zdma`] that changes at run time, parked transactions included. What it was built with
/// is not part of it: restore into a channel with the same configuration, behind a port that knows its stalls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZdmaState {
    version: u32,
    /// Offset and value of every register.
    registers: Vec<(u32, u32)>,
    run: Run,
}

impl Zdma {
    /// The state now.
    pub fn save(&self) -> ZdmaState {
        let Self { config: _, port: _, irq: _, registers, run, scratch: _ } = self;
        let registers = REGISTERS.iter().map(|r| (r.offset, registers.get(r.offset))).collect();
        ZdmaState { version: VERSION, registers, run: run.clone() }
    }

    /// Continues from a saved state and drives the interrupt line to match. On an error nothing changes.
    pub fn restore(&mut self, state: ZdmaState) -> Result<(), RestoreError> {
        let ZdmaState { version, registers: saved, run } = state;
        if version != VERSION {
            return Err(RestoreError::Version { found: version, expected: VERSION });
        }
        let mut registers = Registers::default();
        for (offset, value) in saved {
            let register = register_at(offset).ok_or(RestoreError::UnknownRegister(offset))?;
            registers.set(offset, value & register.mask);
        }
        let room = self.config.buffer_entries() * self.config.bus.bytes();
        check(&run, room).map_err(RestoreError::Impossible)?;
        (self.registers, self.run) = (registers, run);
        self.drive_irq();
        Ok(())
    }
}

fn check(run: &Run, room: usize) -> Result<(), &'static str> {
    let Run { phase, plan, source, destination, staged, fill_at, parked } = run;
    check_side(source)?;
    check_side(destination)?;
    let Staged { data, written } = staged;
    // A burst of zeros may come on top of a full buffer.
    if data.len() > room + 256 || *written > data.len() {
        return Err("more data in the common buffer than it holds");
    }
    if *fill_at >= 16 {
        return Err("a fill position past the fill data");
    }
    if parked.is_some() && *phase != Phase::Busy {
        return Err("a stalled transaction in a channel that is not busy");
    }
    if *plan == Plan::ScatterGather && destination.loaded && destination.left == 0 {
        return Err("a full destination descriptor in work");
    }
    if *phase == Phase::Busy {
        // What a simple run needs was loaded when it started, and it ends when the data does.
        let complete = match plan {
            Plan::ScatterGather => true,
            Plan::SimpleRead | Plan::SimpleFill => data.is_empty(),
            Plan::SimpleCopy => destination.left as usize == source.left as usize + (data.len() - written),
        };
        let loaded = match plan {
            Plan::ScatterGather => true,
            Plan::SimpleFill => destination.loaded || destination.left == 0,
            Plan::SimpleRead => source.loaded,
            Plan::SimpleCopy => source.loaded && (destination.loaded || destination.left == 0),
        };
        if !complete || !loaded {
            return Err("a simple transfer without its descriptors");
        }
    }
    Ok(())
}

fn check_side(side: &Side) -> Result<(), &'static str> {
    let Side { loaded: _, at, left, control: _, current, next, fetched: _, have } = side;
    if (at | current | next) & !ADDRESS_MASK != 0 || left & !SIZE_MASK != 0 {
        return Err("an address or size with bits that do not exist");
    }
    if *have > 32 {
        return Err("a descriptor of more than 32 bytes");
    }
    Ok(())
}
