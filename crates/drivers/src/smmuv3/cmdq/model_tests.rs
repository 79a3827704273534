//! The ring under a model checker: every interleaving (up to a number of preemptions) and every value that weak
//! memory allows, on the code that runs in the driver.
//!
//! The slots are atomics that are only ever accessed relaxed, so that the ring alone makes the SMMU see commands before
//! PROD covers them, and keeps submitters from slots that are not free. Registers are what they are: one value that
//! all see, here with a way to sleep until it changes, because a model checker has to try every turn of a loop.

extern crate std;

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::vec::Vec;

use loom::sync::atomic::{AtomicBool, AtomicU64};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use super::atomics::{Atomics, atomic64};
use super::ring::{Left, Ring};

#[derive(Debug)]
struct Loom;

impl Atomics for Loom {
    type U64 = AtomicU64;
}

atomic64!(AtomicU64);

const PLAIN: u64 = 1;
const SYNC: u64 = 2;

/// A command: its kind, who submitted it, and its number there. Never 0 in the low word.
fn command(kind: u64, thread: u64, number: u64) -> u64 {
    kind | thread << 4 | number << 8
}

/// An index register.
struct Register {
    /// The value, and how often something happened that a sleeper may wait for.
    value: Mutex<(u32, u32)>,
    changed: Condvar,
}

impl Register {
    fn new() -> Self {
        Self { value: Mutex::new((0, 0)), changed: Condvar::new() }
    }
    fn read(&self) -> u32 {
        self.value.lock().unwrap().0
    }
    fn write(&self, value: u32) {
        let mut held = self.value.lock().unwrap();
        *held = (value, held.1 + 1);
        self.changed.notify_all();
    }
    /// Wakes sleepers for another reason.
    fn nudge(&self) {
        self.value.lock().unwrap().1 += 1;
        self.changed.notify_all();
    }
    fn look(&self) -> (u32, u32) {
        *self.value.lock().unwrap()
    }
    /// Sleeps until something has happened since.
    fn sleep(&self, since: u32) {
        let mut held = self.value.lock().unwrap();
        while held.1 == since {
            held = self.changed.wait(held).unwrap();
        }
    }
}

struct Queue {
    ring: Ring<Loom>,
    prod: Register,
    cons: Register,
    slots: Vec<AtomicU64>,
    /// Per thread: its CMD_SYNC was consumed.
    synced: Vec<AtomicBool>,
    messages: bool,
}

impl Queue {
    fn new(log2: u32, threads: usize, messages: bool) -> Arc<Self> {
        Arc::new(Self {
            ring: Ring::new(log2),
            prod: Register::new(),
            cons: Register::new(),
            slots: (0..1 << log2).map(|_| AtomicU64::new(0)).collect(),
            synced: (0..threads).map(|_| AtomicBool::new(false)).collect(),
            messages,
        })
    }

    fn slot(&self, position: u64) -> &AtomicU64 {
        &self.slots[self.ring.slot(position) as usize]
    }

    /// Up to where the SMMU has consumed, and what to sleep on if that is not enough.
    fn refresh(&self) -> (u64, u32) {
        let look = |position| match self.slot(position).load(Relaxed) {
            0 => Left::Complete,
            word if word & 0xf == SYNC && self.messages => Left::Pending,
            word if word & 0xf == SYNC => Left::Complete,
            _ => Left::Command,
        };
        let mut since = 0;
        let read = || {
            let (value, happened) = self.cons.look();
            since = happened;
            value
        };
        let progress = self.ring.refresh(read, |from, to| Ring::<Loom>::pinned(from, to, look));
        (progress.hardware, since)
    }

    fn submit(&self, commands: &[u64]) -> u64 {
        let count = commands.len() as u64;
        let from = loop {
            if let Some(from) = self.ring.reserve(count) {
                break from;
            }
            let (_, since) = self.refresh();
            if let Some(from) = self.ring.reserve(count) {
                break from;
            }
            self.cons.sleep(since);
        };
        for (position, &command) in (from..).zip(commands) {
            self.slot(position).store(command, Relaxed);
        }
        self.ring.fill(from, count);
        self.ring.publish(|index| self.prod.write(index));
        from + count
    }

    fn wait(&self, end: u64) {
        loop {
            let message = self.messages && self.slot(end - 1).load(Acquire) == 0;
            if message || self.ring.consumed() >= end {
                return;
            }
            let (consumed, since) = self.refresh();
            if consumed >= end {
                return;
            }
            self.cons.sleep(since);
        }
    }

    /// The SMMU: consumes `total` commands and checks what it gets.
    fn consume(&self, total: u64, threads: usize) {
        let mut next = std::vec![0; threads];
        let mut message: Option<(u64, u64)> = None;
        let send = |message: &mut Option<(u64, u64)>| {
            if let Some((position, sync)) = message.take() {
                let sent = self.slot(position).compare_exchange(sync, 0, Release, Relaxed);
                assert_eq!(sent, Ok(sync), "the slot of a CMD_SYNC was used before its message came");
                self.cons.nudge();
            }
        };
        let mut at = 0;
        while at < total {
            let (prod, since) = self.prod.look();
            if prod == self.ring.index(at) {
                // Nobody may depend on a message that waits for the next command.
                send(&mut message);
                self.prod.sleep(since);
                continue;
            }
            let ahead = prod.wrapping_sub(self.ring.index(at)) & (2 * self.ring.len() as u32 - 1);
            assert!(u64::from(ahead) <= self.ring.len(), "PROD is more than a queue ahead of CONS");
            let word = self.slot(at).load(Relaxed);
            let (kind, thread, number) = (word & 0xf, (word >> 4 & 0xf) as usize, word >> 8);
            assert!(kind == PLAIN || kind == SYNC, "slot {at} was not written: {word:#x}");
            assert_eq!(number, next[thread], "each command once, in the order of its thread");
            next[thread] += 1;
            if kind == SYNC {
                // A CMD_SYNC waits for the message of the one before, not for its own.
                send(&mut message);
                self.synced[thread].store(true, Relaxed);
                message = self.messages.then_some((at, word));
            }
            at += 1;
            self.cons.write(self.ring.index(at));
        }
        send(&mut message);
    }
}

/// Runs `check` in all interleavings with up to `preemptions` involuntary switches.
fn explore(preemptions: usize, check: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.max_branches = 20_000;
    model.check(check);
}

/// One or two threads that each submit the batches given (numbers of plain commands, then a CMD_SYNC and a wait at the
/// end), and the SMMU.
fn scenario(log2: u32, threads: &'static [&'static [usize]], messages: bool) {
    let queue = Queue::new(log2, threads.len(), messages);
    let total = threads.iter().map(|batches| batches.iter().sum::<usize>() as u64 + 1).sum();
    let submitters: Vec<_> = threads
        .iter()
        .enumerate()
        .map(|(thread, batches)| {
            let queue = queue.clone();
            thread::spawn(move || {
                let mut number = 0;
                let mut make = |kind| {
                    number += 1;
                    command(kind, thread as u64, number - 1)
                };
                let mut end = 0;
                for (i, &count) in batches.iter().enumerate() {
                    let mut commands: Vec<u64> = (0..count).map(|_| make(PLAIN)).collect();
                    if i + 1 == batches.len() {
                        commands.push(make(SYNC));
                    }
                    end = queue.submit(&commands);
                }
                queue.wait(end);
                assert!(
                    queue.synced[thread].load(Relaxed),
                    "the wait ended before the CMD_SYNC was consumed"
                );
            })
        })
        .collect();
    queue.consume(total, threads.len());
    for submitter in submitters {
        submitter.join().unwrap();
    }
}

#[test]
fn two_threads_on_a_queue_with_room() {
    explore(1, || scenario(2, &[&[1], &[1]], false));
}

#[test]
fn two_threads_on_a_queue_that_fills_and_wraps() {
    explore(1, || scenario(1, &[&[1, 1], &[0]], false));
}

#[test]
fn a_thread_that_wraps_the_queue_while_another_waits() {
    explore(1, || scenario(0, &[&[0], &[1, 0]], false));
}

#[test]
fn completion_by_message_on_a_queue_that_wraps() {
    explore(1, || scenario(1, &[&[1], &[1, 0]], true));
}

/// The same with more preemptions. Minutes.
#[test]
#[ignore = "takes minutes"]
fn deeper() {
    explore(3, || scenario(2, &[&[1], &[1]], false));
    explore(2, || scenario(1, &[&[1, 1], &[1]], false));
    explore(2, || scenario(0, &[&[0], &[1, 0]], false));
    explore(2, || scenario(1, &[&[1], &[1, 0]], true));
}

#[test]
fn three_threads_publish_for_each_other() {
    explore(2, || {
        let queue = Queue::new(2, 3, false);
        let submitters: Vec<_> = (0..3)
            .map(|thread| {
                let queue = queue.clone();
                thread::spawn(move || {
                    queue.submit(&[command(PLAIN, thread, 0)]);
                })
            })
            .collect();
        for submitter in submitters {
            submitter.join().unwrap();
        }
        // Nobody waits and nobody comes back: all of it must have been published by those three.
        assert_eq!(queue.prod.read(), 3, "a command was left behind");
        queue.consume(3, 3);
    });
}
