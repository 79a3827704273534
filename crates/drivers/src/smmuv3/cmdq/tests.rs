//! The command queue against an SMMU that plays by the manual.

extern crate std;

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use std::string::ToString;

use portcullis_arch::smmuv3::cmd::{AtcInv, Cfgi};
use portcullis_arch::smmuv3::regs::{CommandError, offset};
use portcullis_arch::smmuv3::{Command, Opcode};
use portcullis_arch::{Iova, StreamId, SubstreamId};
use portcullis_hal::fake::FakeMemory;

use super::commands::*;
use super::testing::*;
use super::*;

/// Command `number` of `thread`.
fn numbered(thread: u32, number: u32) -> Command {
    Cfgi::new().with_opcode(Opcode::CfgiCd as u8).with_sid(thread).with_ssid(number).into()
}

fn numbers(commands: &[Command], thread: u32) -> Vec<u32> {
    let commands = commands.iter().map(|&command| Cfgi::from(command));
    commands.filter(|command| command.sid() == thread).map(|command| command.ssid()).collect()
}

fn four() -> Vec<Command> {
    (0..4).map(|number| numbered(7, number)).collect()
}

#[test]
fn programming_writes_base_and_indices() {
    let smmu = FakeSmmu::new(plain(), Pace::Eager);
    let queue = queue(platform(&smmu), options(7, true, false));
    smmu.with(|device| {
        let base = device.registers[&(offset::CMDQ_BASE as usize)];
        assert_eq!(base, 1 << 62 | BASE | 7);
        assert_eq!((device.get(offset::CMDQ_PROD), device.get(offset::CMDQ_CONS)), (0, 0));
    });
    assert_eq!(queue.entries(), 128);
    drop(queue);
    smmu.memory.assert_clean();
}

#[test]
fn the_queue_gets_smaller_when_memory_is_short_and_gives_up_when_there_is_none() {
    let smmu = FakeSmmu::new(FakeMemory::plain(BASE, 1024), Pace::Eager);
    let small = CommandQueue::new(platform(&smmu), options(10, true, false)).unwrap();
    assert_eq!(small.entries(), 64);
    smmu.memory.fail_after(0);
    let error = CommandQueue::new(platform(&smmu), options(10, true, false)).unwrap_err();
    assert_eq!(error, Error::NoMemory { what: "the command queue", bytes: 32 });
}

#[test]
fn a_queue_beyond_the_output_addresses_is_refused() {
    let smmu = FakeSmmu::new(FakeMemory::plain(0x1_0000_0000, 1 << 16), Pace::Eager);
    let narrow = QueueOptions { address_bits: 32, ..options(7, true, false).queue };
    let error =
        CommandQueue::new(platform(&smmu), CommandOptions { queue: narrow, ..options(7, true, false) });
    assert_eq!(
        error.unwrap_err(),
        Error::TableAddress { what: "the command queue", pa: 0x1_0000_0000, bits: 32 }
    );
    smmu.memory.assert_clean();
}

#[test]
fn commands_arrive_in_order_with_one_register_write_for_a_batch() {
    let smmu = FakeSmmu::new(plain(), Pace::Eager);
    let queue = queue(platform(&smmu), options(7, true, false));
    let before = smmu.with(|device| device.prod_writes);
    queue.issue_sync(&four()).unwrap();
    smmu.with(|device| {
        assert_eq!(device.prod_writes - before, 1);
        assert_eq!(device.consumed.len(), 5);
        assert_eq!(device.consumed[4], sync());
    });
    assert_eq!(smmu.commands(), four());
}

#[test]
fn the_queue_wraps_any_number_of_times_at_every_size() {
    for log2 in 1..=8 {
        let smmu = FakeSmmu::new(plain(), Pace::PerAccess(2));
        let queue = queue(platform(&smmu), options(log2, true, false));
        let mut sent = Vec::new();
        for round in 0..40 {
            let commands: Vec<_> = (0..round % 7).map(|i| numbered(1, round * 10 + i)).collect();
            match round % 3 {
                0 => queue.issue(&commands).unwrap(),
                _ => queue.issue_sync(&commands).unwrap(),
            }
            sent.extend(commands);
        }
        queue.issue_sync(&[]).unwrap();
        assert_eq!(smmu.commands(), sent, "2^{log2} entries");
    }
}

#[test]
fn more_commands_than_the_queue_holds_go_in_pieces() {
    for messages in [false, true] {
        let smmu = FakeSmmu::new(plain(), Pace::Manual);
        smmu.with(|device| device.late_messages = messages);
        let queue = queue(platform_with_steps(&smmu, 3), options(4, true, messages));
        let commands: Vec<_> = (0..1000).map(|number| numbered(3, number)).collect();
        queue.issue_sync(&commands).unwrap();
        assert_eq!(smmu.commands(), commands);
        let mut batch = queue.batch();
        assert!(batch.is_empty());
        batch.extend(commands.iter().copied());
        batch.submit_sync().unwrap();
        assert!(batch.is_empty());
        assert_eq!(smmu.commands().len(), 2000);
    }
}

#[test]
fn completion_by_message_reads_no_register() {
    let smmu = FakeSmmu::new(plain(), Pace::Eager);
    let queue = queue(platform(&smmu), options(4, true, true));
    queue.issue_sync(&four()).unwrap();
    smmu.with(|device| assert_eq!((device.messages, device.reads), (1, 0)));
    let sync = portcullis_arch::smmuv3::cmd::Sync::from(smmu.with(|device| device.consumed[4]));
    assert_eq!((sync.cs(), sync.msidata(), sync.msiaddr_55_2() << 2), (1, 0, BASE + 4 * 16));
    for _ in 0..50 {
        queue.issue_sync(&four()).unwrap();
    }
    assert_eq!(smmu.commands().len(), 51 * 4);
}

#[test]
fn messages_need_a_coherent_smmu() {
    let smmu = FakeSmmu::new(FakeMemory::non_coherent(BASE, 1 << 16), Pace::Eager);
    let queue = queue(platform(&smmu), options(4, false, true));
    assert!(!queue.completes_by_message());
    queue.issue_sync(&four()).unwrap();
    assert_eq!(smmu.with(|device| (device.messages, device.consumed[4])), (0, sync()));
}

#[test]
fn a_late_message_never_hits_a_command_that_has_taken_the_slot() {
    let smmu = FakeSmmu::new(plain(), Pace::Eager);
    smmu.with(|device| device.late_messages = true);
    let queue = queue(platform(&smmu), options(2, true, true));
    queue.issue_sync(&[]).unwrap();
    // CONS has passed the CMD_SYNC, its message is on its way, and its slot is the next one but three.
    for number in 0..3 {
        queue.issue(&[numbered(1, number)]).unwrap();
    }
    let timeout = queue.issue(&[numbered(1, 3)]).unwrap_err();
    assert!(matches!(timeout, Error::CommandQueue { what: "room in the command queue", .. }), "{timeout}");
    smmu.flush();
    queue.issue(&[numbered(1, 4)]).unwrap();
    assert_eq!(numbers(&smmu.commands(), 1), [0, 1, 2, 4]);
    assert_eq!(smmu.with(|device| device.errors), 0);
}

#[test]
fn an_aborted_message_costs_no_completion_and_is_the_last_one() {
    let smmu = FakeSmmu::new(plain(), Pace::Eager);
    smmu.with(|device| device.abort_messages = true);
    let queue = queue(platform(&smmu), options(3, true, true));
    for _ in 0..20 {
        queue.issue_sync(&four()).unwrap();
    }
    assert_eq!(smmu.commands().len(), 80);
    let mut seen = Vec::new();
    crate::smmuv3::gerror::handle(&queue, |error| seen.push(error));
    assert!(!queue.completes_by_message());
    queue.issue_sync(&four()).unwrap();
    assert_eq!(seen.len(), 1);
}

#[test]
fn a_non_snooping_smmu_finds_every_command_in_memory() {
    for seed in 0..30 {
        let smmu = FakeSmmu::new(FakeMemory::non_coherent_reordering(BASE, 1 << 16, seed), Pace::Eager);
        let queue = queue(platform(&smmu), options(4, false, false));
        let mut sent = Vec::new();
        for number in 0..60 {
            let commands = vec![numbered(1, number); (number % 6) as usize];
            queue.issue_sync(&commands).unwrap();
            sent.extend(commands);
        }
        assert_eq!(smmu.commands(), sent);
    }
}

#[test]
fn stores_that_linger_are_visible_before_prod() {
    for seed in 0..30 {
        let smmu = FakeSmmu::new(FakeMemory::reordering(BASE, 1 << 16, seed), Pace::Eager);
        let queue = queue(platform(&smmu), options(4, true, seed % 2 == 0));
        let mut sent = Vec::new();
        for number in 0..60 {
            let commands = vec![numbered(1, number); (number % 6) as usize];
            queue.issue_sync(&commands).unwrap();
            sent.extend(commands);
        }
        assert_eq!(smmu.commands(), sent);
    }
}

#[test]
fn a_wait_that_runs_out_names_what_it_waited_for_and_the_registers() {
    let smmu = FakeSmmu::new(plain(), Pace::Manual);
    let queue = queue(platform(&smmu), options(2, true, false));
    let error = queue.issue_sync(&[numbered(1, 0)]).unwrap_err();
    let Error::CommandQueue { what, waited_us, seen } = error else { panic!("{error}") };
    assert_eq!((what, seen.prod, seen.cons, seen.gerror), ("CMD_SYNC to complete", 2, 0, 0));
    assert!(waited_us >= 1_000_000);
    assert!(error.to_string().contains("PROD 0x00000002"), "{error}");
    queue.issue(&four()[..2]).unwrap();
    let error = queue.issue(&[numbered(1, 1)]).unwrap_err();
    let Error::CommandQueue { what, seen, .. } = error else { panic!("{error}") };
    assert_eq!((what, seen.prod, seen.cons), ("room in the command queue", 4, 0));
    // Nothing was lost, and the queue goes on.
    smmu.with(|device| device.pace = Pace::Eager);
    smmu.step(4);
    queue.issue_sync(&[numbered(1, 2)]).unwrap();
    assert_eq!(smmu.commands().len(), 4);
}

#[test]
fn registers_of_an_smmu_that_is_gone_free_nothing() {
    let smmu = FakeSmmu::new(plain(), Pace::Manual);
    let queue = queue(platform(&smmu), options(2, true, false));
    queue.issue(&four()).unwrap();
    smmu.with(|device| device.set(offset::CMDQ_CONS, u32::MAX));
    let error = queue.issue_sync(&four()).unwrap_err();
    assert!(matches!(error, Error::CommandQueue { .. }), "{error}");
}

/// Runs `four` and a CMD_SYNC with an error at one of the five, and once more without.
fn injected(
    at: usize,
    codes: &[u8],
    messages: bool,
) -> (Arc<FakeSmmu>, CommandQueue<FakePlatform>, Result<(), Error>) {
    let smmu = FakeSmmu::new(plain(), Pace::Eager);
    smmu.with(|device| device.inject.insert(at, codes.iter().copied().collect()));
    let queue = queue(platform(&smmu), options(7, true, messages));
    let result = queue.issue_sync(&four());
    (smmu, queue, result)
}

#[test]
fn an_illegal_command_is_named_and_replaced_and_the_others_are_carried_out() {
    for messages in [false, true] {
        for at in 0..5 {
            let (smmu, queue, result) = injected(at, &[ILL], messages);
            let Err(Error::Command { code, command }) = result else { panic!("{result:?}") };
            assert_eq!(code, CommandError::Ill);
            if let Some(expected) = four().get(at) {
                assert_eq!(command, *expected);
            } else {
                assert_eq!(command.opcode(), Some(Opcode::Sync));
            }
            let mut left = four();
            if at < 4 {
                left.remove(at);
            }
            assert_eq!(smmu.commands(), left);
            assert_eq!(smmu.with(|device| (device.active(), device.consumed.len())), (0, 5));
            // The next one has nothing to do with it.
            queue.issue_sync(&four()).unwrap();
            let mut told = Vec::new();
            crate::smmuv3::gerror::handle(&queue, |error| told.push(error));
            assert!(
                matches!(told[..], [crate::smmuv3::gerror::GlobalError::Command(failure)]
                    if failure.position == at as u64 && failure.command == command),
                "{told:?}"
            );
        }
    }
}

#[test]
fn an_aborted_fetch_is_repeated_and_nobody_notices() {
    for at in 0..5 {
        let (smmu, queue, result) = injected(at, &[ABT; 7], true);
        result.unwrap();
        assert_eq!(smmu.commands(), four());
        let mut told = 0;
        crate::smmuv3::gerror::handle(&queue, |_| told += 1);
        assert_eq!(told, 7);
    }
}

#[test]
fn a_fetch_that_keeps_aborting_stops_everybody_at_once_until_the_restart() {
    let (smmu, queue, result) = injected(2, &[ABT; 8], true);
    let stuck = Error::Command { code: CommandError::Abt, command: four()[2] };
    assert_eq!(result, Err(stuck));
    assert!(queue.is_stuck());
    // No second is lost on it.
    assert_eq!(queue.issue_sync(&[numbered(9, 0)]), Err(stuck));
    assert_eq!(smmu.with(|device| device.active()), GERROR_CMDQ);
    let mut told = Vec::new();
    crate::smmuv3::gerror::handle(&queue, |error| told.push(error));
    assert_eq!(told.last(), Some(&crate::smmuv3::gerror::GlobalError::CommandQueueStuck));
    assert!(queue.restart() && !queue.is_stuck());
    queue.issue_sync(&[numbered(9, 1)]).unwrap();
    assert_eq!(numbers(&smmu.commands(), 7), [0, 1, 2, 3]);
    assert_eq!(numbers(&smmu.commands(), 9), [0, 1]);
}

#[test]
fn an_atc_invalidation_that_timed_out_is_told_to_whoever_waits_for_it() {
    let (smmu, queue, result) = injected(4, &[ATC], false);
    let Err(Error::Command { code, command }) = result else { panic!("{result:?}") };
    assert_eq!((code, command.opcode()), (CommandError::AtcInvSync, Some(Opcode::Sync)));
    assert_eq!(smmu.commands(), four());
    queue.issue_sync(&four()).unwrap();
}

#[test]
fn an_atc_error_at_another_threads_sync_is_told_to_the_owner_of_the_batch_around_it() {
    let smmu = FakeSmmu::new(plain(), Pace::Eager);
    let queue = queue(platform(&smmu), options(7, true, true));
    let mut batch = queue.batch();
    let atc = atc_inv_all(StreamId(1), AtcScope::Stream);
    batch.extend(vec![atc; MAX_BATCH + 1]);
    // The first 64 are queued; somebody else's CMD_SYNC comes in between and gets the error.
    smmu.with(|device| device.inject.insert(MAX_BATCH + 1, [ATC].into()));
    assert!(queue.issue_sync(&[numbered(1, 0)]).is_err());
    assert!(matches!(batch.submit_sync(), Err(Error::Command { code: CommandError::AtcInvSync, .. })));
    batch.push(atc);
    batch.submit_sync().unwrap();
}

#[test]
fn errors_found_by_the_interrupt_are_told_to_the_waiter_too() {
    let smmu = FakeSmmu::new(plain(), Pace::Eager);
    let queue = queue(platform(&smmu), options(7, true, false));
    smmu.with(|device| device.inject.insert(0, [ILL].into()));
    queue.issue(&[numbered(5, 0)]).unwrap();
    assert_eq!(crate::smmuv3::gerror::handle(&queue, |_| ()), 1);
    assert_eq!(smmu.with(|device| device.active()), 0);
    // Somebody else's.
    queue.issue_sync(&four()).unwrap();
}

#[test]
fn many_errors_are_all_found() {
    let smmu = FakeSmmu::new(plain(), Pace::Eager);
    let queue = queue(platform(&smmu), options(4, true, true));
    for round in 0..200u32 {
        let at = smmu.with(|device| device.consumed.len());
        smmu.with(|device| device.inject.insert(at + (round % 5) as usize, [ABT, ILL].into()));
        assert!(matches!(queue.issue_sync(&four()), Err(Error::Command { .. })));
    }
    let mut lost = 0;
    crate::smmuv3::gerror::handle(&queue, |error| {
        if let crate::smmuv3::gerror::GlobalError::CommandsLost(count) = error {
            lost = count;
        }
    });
    assert_eq!(lost, 400 - 64);
}

#[test]
fn programming_again_after_a_loss_of_power_goes_on_where_the_queue_was() {
    let smmu = FakeSmmu::new(plain(), Pace::Manual);
    let queue = queue(platform(&smmu), options(2, true, false));
    queue.issue(&four()[..3]).unwrap();
    smmu.with(|device| device.registers.clear());
    queue.program();
    smmu.with(|device| {
        assert_eq!((device.get(offset::CMDQ_PROD), device.get(offset::CMDQ_CONS)), (3, 3));
        device.pace = Pace::Eager;
    });
    queue.issue_sync(&four()).unwrap();
    assert_eq!(smmu.commands(), four());
}

/// Threads that submit batches of all sizes; gives what was consumed, checked for order and completeness.
fn storm(log2: u8, memory: FakeMemory, coherent: bool, messages: bool, errors: bool) {
    const THREADS: u32 = 4;
    const ROUNDS: u32 = 150;
    let smmu = FakeSmmu::new(memory, Pace::PerAccess(3));
    smmu.with(|device| {
        device.late_messages = messages;
        if errors {
            for at in 0..400 {
                device.inject.insert(at * 17, if at % 2 == 0 { [ABT].into() } else { [ILL].into() });
            }
        }
    });
    let mut setup = options(log2, coherent, messages);
    setup.timeout_us = 30_000_000;
    let queue = Arc::new(queue(threaded(&smmu), setup));
    let refused: Vec<usize> = std::thread::scope(|scope| {
        let run = |thread: u32| {
            let (queue, smmu) = (queue.clone(), smmu.clone());
            scope.spawn(move || {
                let mut number = 0;
                let mut refused = 0;
                for round in 0..ROUNDS {
                    let count = (round * 7 + thread) % 9;
                    let commands: Vec<_> = (0..count).map(|i| numbered(thread, number + i)).collect();
                    number += count;
                    if round % 3 == 0 {
                        queue.issue(&commands).unwrap();
                        continue;
                    }
                    let before = number;
                    match queue.issue_sync(&commands) {
                        Ok(()) => {}
                        Err(Error::Command { code: CommandError::Ill, .. }) if errors => refused += 1,
                        Err(error) => panic!("{error}"),
                    }
                    if round % 30 == 1 && !errors {
                        // Everything of this thread has been consumed by now.
                        assert_eq!(numbers(&smmu.commands(), thread).len() as u32, before);
                    }
                }
                queue.issue_sync(&[]).map(|()| refused).unwrap_or(refused + 1)
            })
        };
        let threads: Vec<_> = (0..THREADS).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let commands = smmu.commands();
    for thread in 0..THREADS {
        let seen = numbers(&commands, thread);
        let total: u32 = (0..ROUNDS).map(|round| (round * 7 + thread) % 9).sum();
        if errors {
            assert!(seen.is_sorted_by(|a, b| a < b), "thread {thread}: out of order or twice");
        } else {
            assert_eq!(seen, (0..total).collect::<Vec<_>>(), "thread {thread}");
        }
    }
    if errors {
        let mut ill = 0;
        crate::smmuv3::gerror::handle(&queue, |_| ill += 1);
        assert!(ill > 0 && refused.iter().sum::<usize>() > 0);
    }
    assert_eq!(smmu.with(|device| device.active()) & GERROR_CMDQ, 0);
    drop(queue);
    smmu.memory.assert_clean();
}

#[test]
fn many_threads_on_a_small_full_queue() {
    storm(4, plain(), true, false, false);
}

#[test]
fn many_threads_with_late_messages() {
    storm(4, plain(), true, true, false);
    storm(6, plain(), true, true, false);
}

#[test]
fn many_threads_on_memory_that_delays_and_reorders() {
    storm(5, FakeMemory::reordering(BASE, 1 << 16, 1), true, true, false);
    storm(5, FakeMemory::non_coherent_reordering(BASE, 1 << 16, 2), false, false, false);
}

#[test]
fn many_threads_with_errors_all_over() {
    storm(4, plain(), true, false, true);
    storm(6, plain(), true, true, true);
}

#[test]
fn commands_have_their_fields_where_the_manual_has_them() {
    let (stream, substream) = (StreamId(0x8765_4321), SubstreamId(0xabcde));
    let cases = [
        (cfgi_ste(stream, true), [0x8765_4321_0000_0003, 1]),
        (cfgi_ste(stream, false), [0x8765_4321_0000_0003, 0]),
        (cfgi_all(), [0x4, 31]),
        (cfgi_cd(stream, substream, true), [0x8765_4321_abcd_e005, 1]),
        (cfgi_cd_all(stream), [0x8765_4321_0000_0006, 0]),
        (prefetch_config(stream), [0x8765_4321_0000_0001, 0]),
        (atc_inv_all(stream, AtcScope::Stream), [0x8765_4321_0000_0040, 52]),
        (atc_inv_all(stream, AtcScope::Substream(substream)), [0x8765_4321_abcd_e840, 52]),
        (pri_resp(stream, Some(substream), 0x1ff, PageResponse::Success), [0x8765_4321_abcd_e841, 0x21ff]),
        (pri_resp(stream, None, 3, PageResponse::Invalid), [0x8765_4321_0000_0041, 0x1003]),
        (pri_resp(stream, None, 3, PageResponse::Failure), [0x8765_4321_0000_0041, 3]),
        (resume(stream, 0xbeef, StallAnswer::Retry), [0x8765_4321_0000_1044, 0xbeef]),
        (resume(stream, 0xbeef, StallAnswer::Abort), [0x8765_4321_0000_2044, 0xbeef]),
        (resume(stream, 0xbeef, StallAnswer::Ignore), [0x8765_4321_0000_0044, 0xbeef]),
        (stall_term(stream), [0x8765_4321_0000_0045, 0]),
        (sync(), [0x2046, 0]),
        (sync_silent(), [0x46, 0]),
        (sync_msi(Pa(0x12_3456_7890)), [0x0fc0_1046, 0x12_3456_7890]),
    ];
    for (command, words) in cases {
        assert_eq!(command.0, words, "{command:x?}");
    }
}

#[test]
fn atc_spans_cover_the_range_and_are_the_smallest_that_do() {
    let span = |start, len| {
        let command = AtcInv::from(atc_inv(StreamId(0), AtcScope::Stream, Iova(start), len));
        (command.addr_63_12() << 12, command.size())
    };
    let cases = [
        ((0x1000, 1), (0x1000, 0)),
        ((0x1000, 0x1000), (0x1000, 0)),
        ((0x1fff, 2), (0, 2)),
        ((0x7000, 0x2000), (0, 4)),
        ((0x8000, 0x4000), (0x8000, 2)),
        ((0xffff_ffff_ffff_f000, 0x1000), (0xffff_ffff_ffff_f000, 0)),
        ((0, u64::MAX), (0, 52)),
        ((0x7fff_ffff_ffff_f000, 0x2000), (0, 52)),
    ];
    for ((start, len), expected) in cases {
        assert_eq!(span(start, len), expected, "{start:#x} + {len:#x}");
    }
}
