//! Global errors: GERROR against GERRORN, decoded, dealt with where the driver can, acknowledged, and reported.

use core::fmt;

use portcullis_arch::smmuv3::regs::Gerror;

use super::Platform;
use super::cmdq::{CommandFailure, CommandQueue};

/// One global error. It has been acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GlobalError {
    /// The SMMU stopped at a command, and goes on.
    Command(CommandFailure),
    /// More of those than there was room for.
    CommandsLost(u64),
    /// The SMMU stopped at a command and cannot go on: it is not acknowledged. See
    /// [`CommandQueue::restart`].
    CommandQueueStuck,
    /// A write to the event queue was aborted; events are lost.
    EventQueueAbort,
    /// A write to the page request queue was aborted; requests are lost and were answered with failure.
    PageRequestQueueAbort,
    /// A message was aborted.
    MessageAbort(Message),
    /// Service failure mode: the SMMU has given up, and needs a reset.
    ServiceFailure,
    /// An enhanced command queue failed. This driver uses none.
    EnhancedCommandQueue,
    /// A device permission table lookup failed. This driver uses none.
    DevicePermissionTable,
    /// Bits that the architecture does not define.
    Unknown(u32),
}

/// Which message was aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// That of a CMD_SYNC. From now on completion is read from CONS.
    CommandSync,
    /// That of the event queue.
    EventQueue,
    /// That of the page request queue.
    PageRequestQueue,
    /// That of global errors.
    GlobalError,
}

impl fmt::Display for GlobalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command(failure) => failure.fmt(f),
            Self::CommandsLost(count) => write!(f, "{count} more command errors"),
            Self::CommandQueueStuck => {
                f.write_str("the command queue is stuck: repeating a command did not help")
            }
            Self::EventQueueAbort => f.write_str("EVENTQ write aborted, events are lost"),
            Self::PageRequestQueueAbort => f.write_str("PRIQ write aborted, page requests are lost"),
            Self::MessageAbort(message) => write!(f, "{message} MSI write aborted"),
            Self::ServiceFailure => f.write_str("device has entered service failure mode"),
            Self::EnhancedCommandQueue => f.write_str("enhanced command queue error"),
            Self::DevicePermissionTable => f.write_str("device permission table error"),
            Self::Unknown(bits) => write!(f, "unknown global errors {bits:#010x}"),
        }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CommandSync => "CMDQ",
            Self::EventQueue => "EVENTQ",
            Self::PageRequestQueue => "PRIQ",
            Self::GlobalError => "GERROR",
        })
    }
}

/// What a bit means. CMDQ_ERR is not here: the command queue deals with it.
const ERRORS: [(Gerror, GlobalError); 9] = [
    (Gerror::new().with_eventq_abt_err(true), GlobalError::EventQueueAbort),
    (Gerror::new().with_priq_abt_err(true), GlobalError::PageRequestQueueAbort),
    (Gerror::new().with_msi_cmdq_abt_err(true), GlobalError::MessageAbort(Message::CommandSync)),
    (Gerror::new().with_msi_eventq_abt_err(true), GlobalError::MessageAbort(Message::EventQueue)),
    (Gerror::new().with_msi_priq_abt_err(true), GlobalError::MessageAbort(Message::PageRequestQueue)),
    (Gerror::new().with_msi_gerror_abt_err(true), GlobalError::MessageAbort(Message::GlobalError)),
    (Gerror::new().with_sfm_err(true), GlobalError::ServiceFailure),
    (Gerror::new().with_cmdqp_err(true), GlobalError::EnhancedCommandQueue),
    (Gerror::new().with_dpt_err(true), GlobalError::DevicePermissionTable),
];

/// Handles the interrupt of GERROR: repairs the command queue, acknowledges everything, and tells `each` about every
/// error, also about those of the command queue that a waiting thread has repaired in the meantime. Gives how many
/// there were. `each` is called without a lock, after the acknowledgement.
pub fn handle<P: Platform>(commands: &CommandQueue<P>, mut each: impl FnMut(GlobalError)) -> usize {
    let (active, stuck, (failures, lost)) = commands.with_errors(|recovery| {
        commands.recover(recovery);
        let (active, gerrorn) = commands.active_errors();
        let stuck = active.cmdq_err() && commands.is_stuck();
        let mut active = active;
        // What the command queue has not acknowledged stays: it is stuck, or has failed once more since.
        active.set_cmdq_err(false);
        if active.msi_cmdq_abt_err() {
            commands.abandon_messages();
        }
        if active.into_bits() != 0 {
            commands.acknowledge(gerrorn, active);
        }
        (active, stuck, recovery.take_log())
    });
    let mut count = 0;
    let mut tell = |error| {
        count += 1;
        each(error);
    };
    failures.into_iter().for_each(|failure| tell(GlobalError::Command(failure)));
    if lost > 0 {
        tell(GlobalError::CommandsLost(lost));
    }
    if stuck {
        tell(GlobalError::CommandQueueStuck);
    }
    let mut unknown = active.into_bits();
    for (bit, error) in ERRORS {
        if active.into_bits() & bit.into_bits() != 0 {
            unknown &= !bit.into_bits();
            tell(error);
        }
    }
    if unknown != 0 {
        tell(GlobalError::Unknown(unknown));
    }
    count
}

#[cfg(test)]
mod tests;
