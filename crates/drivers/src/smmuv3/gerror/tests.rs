//! Every bit of GERROR.

use alloc::string::ToString;
use alloc::vec::Vec;

use portcullis_arch::smmuv3::regs::offset;
use portcullis_hal::fake::FakeMemory;

use super::*;
use crate::smmuv3::cmdq::testing::{BASE, FakeSmmu, ILL, Pace, options, platform, queue};

fn handled(queue: &CommandQueue<impl Platform>) -> Vec<GlobalError> {
    let mut seen = Vec::new();
    let count = handle(queue, |error| seen.push(error));
    assert_eq!(count, seen.len());
    seen
}

#[test]
fn every_bit_is_told_and_acknowledged_alone_and_together_and_toggles_back() {
    let smmu = FakeSmmu::new(FakeMemory::plain(BASE, 1 << 16), Pace::Eager);
    let queue = queue(platform(&smmu), options(4, true, true));
    let bits = [
        (2, GlobalError::EventQueueAbort),
        (3, GlobalError::PageRequestQueueAbort),
        (4, GlobalError::MessageAbort(Message::CommandSync)),
        (5, GlobalError::MessageAbort(Message::EventQueue)),
        (6, GlobalError::MessageAbort(Message::PageRequestQueue)),
        (7, GlobalError::MessageAbort(Message::GlobalError)),
        (8, GlobalError::ServiceFailure),
        (9, GlobalError::EnhancedCommandQueue),
        (10, GlobalError::DevicePermissionTable),
        (11, GlobalError::Unknown(1 << 11)),
        (1, GlobalError::Unknown(1 << 1)),
        (31, GlobalError::Unknown(1 << 31)),
    ];
    for _ in 0..2 {
        for (bit, error) in bits {
            smmu.with(|device| device.raise(1 << bit));
            assert_eq!(handled(&queue), [error]);
            assert_eq!(smmu.with(|device| device.active()), 0);
            assert!(!error.to_string().is_empty());
        }
        assert_eq!(handled(&queue), []);
    }
    smmu.with(|device| device.raise(0x7fc));
    assert_eq!(handled(&queue), bits[..9].iter().map(|(_, error)| *error).collect::<Vec<_>>());
}

#[test]
fn an_aborted_sync_message_turns_messages_off() {
    let smmu = FakeSmmu::new(FakeMemory::plain(BASE, 1 << 16), Pace::Eager);
    let queue = queue(platform(&smmu), options(4, true, true));
    assert!(queue.completes_by_message());
    smmu.with(|device| device.raise(1 << 4));
    handled(&queue);
    assert!(!queue.completes_by_message());
}

#[test]
fn a_command_error_and_another_one_are_both_handled() {
    let smmu = FakeSmmu::new(FakeMemory::plain(BASE, 1 << 16), Pace::Eager);
    let queue = queue(platform(&smmu), options(4, true, false));
    smmu.with(|device| {
        device.inject.insert(1, [ILL].into());
        device.raise(1 << 2);
    });
    queue.issue(&[crate::smmuv3::cmdq::commands::cfgi_all(); 3]).unwrap();
    let seen = handled(&queue);
    assert!(matches!(
        seen[..],
        [GlobalError::Command(CommandFailure { position: 1, .. }), GlobalError::EventQueueAbort]
    ));
    smmu.with(|device| {
        assert_eq!((device.active(), device.get(offset::CMDQ_CONS)), (0, 3));
    });
}
