//! Which SPI numbers the board's interrupts get in the guest.
//!
//! A number of the board stays what it is where QEMU's machine has it and does not use it, so that what a person reads in
//! `/proc/interrupts` is what is in the board's manual. The others get the next numbers that are free, from 100 up.
//! Lines that are one on the board are one in the guest.

use std::collections::{BTreeMap, BTreeSet};

use portcullis_board::Tree;
use portcullis_board::tree::{Interrupt, Trigger};

use super::virt::SPIS;
use super::{Device, GuestTreeError};

/// The first number for interrupts that cannot keep theirs: after the devices of `virt`.
const FIRST: u32 = 100;

/// Numbers given, and those that are taken.
pub(super) struct Spis {
    taken: BTreeSet<u32>,
    given: BTreeMap<u32, u32>,
}

impl Spis {
    /// Gives a number to every interrupt of the devices.
    pub fn assign(
        board: &Tree,
        devices: &[&Device<'_>],
        used: &BTreeSet<u32>,
    ) -> Result<Self, GuestTreeError> {
        let mut numbers = BTreeSet::new();
        for device in devices {
            for (entry, interrupt) in device.node.interrupts.iter().enumerate() {
                let Some((number, _)) = shared(board, interrupt) else {
                    return Err(GuestTreeError::Interrupt { node: device.node.path.clone(), entry });
                };
                numbers.insert(number);
            }
        }
        let mut spis = Self { taken: used.clone(), given: BTreeMap::new() };
        let (kept, moved): (Vec<u32>, Vec<u32>) =
            numbers.into_iter().partition(|n| *n < SPIS && !used.contains(n));
        for number in kept {
            spis.taken.insert(number);
            spis.given.insert(number, number);
        }
        for number in moved {
            let free = spis.free(&format!("the board's SPI {number}"))?;
            spis.given.insert(number, free);
        }
        Ok(spis)
    }

    /// The guest's number for one of the board's.
    pub fn get(&self, number: u32) -> Option<u32> {
        self.given.get(&number).copied()
    }

    /// A number that nobody uses.
    pub fn free(&mut self, what: &str) -> Result<u32, GuestTreeError> {
        let number = (FIRST..SPIS).chain(0..FIRST).find(|n| !self.taken.contains(n));
        let number = number.ok_or_else(|| GuestTreeError::NoInterrupts { what: what.into(), limit: SPIS })?;
        self.taken.insert(number);
        Ok(number)
    }
}

/// The number and trigger flags of a shared peripheral interrupt of a GIC, of three cells or, with a partition of CPUs, four.
pub(super) fn shared(board: &Tree, interrupt: &Interrupt) -> Option<(u32, u32)> {
    match interrupt {
        Interrupt::Spi { number, trigger } => Some((*number, flags(*trigger))),
        Interrupt::Other { controller, cells } => match cells.as_slice() {
            [0, number, flags, _] => {
                let gic = board.node(*controller)?.compatible.iter().any(|c| c.contains("gic"));
                gic.then_some((*number, *flags))
            }
            _ => None,
        },
        Interrupt::Ppi { .. } => None,
    }
}

fn flags(trigger: Trigger) -> u32 {
    match trigger {
        Trigger::EdgeRising => 1,
        Trigger::EdgeFalling => 2,
        Trigger::LevelHigh => 4,
        Trigger::LevelLow => 8,
        Trigger::Other(flags) => flags,
    }
}
