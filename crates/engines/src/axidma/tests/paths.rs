//! Straight from source to destination, or through the FIFO: nobody can tell.

use portcullis_arch::Access;
use portcullis_bus::StallState;

use super::*;
use crate::testport::Rule;

/// What software sees at the end, and how often a channel stalled.
type Outcome = (Vec<u32>, Vec<u8>, Vec<u8>, usize);

/// A scenario that is the same for the same seed.
pub(super) fn scenario(seed: u64, port: &TestPort, random: &mut Random) -> AxiDmaConfig {
    let sg = !seed.is_multiple_of(5);
    port.put(SRC, &random.bytes(0x8000));
    for (base, buffers, out) in [(TX, SRC, true), (RX, DST, false)] {
        let n = 1 + random.below(12);
        for i in 0..n {
            let length = match random.below(10) {
                0 => 4096 + random.below(3000),
                1 => random.below(3),
                _ => 1 + random.below(300),
            };
            let flags = if out { (random.next() as u32 & 3) << 26 } else { 0 };
            let buffer = buffers + random.below(0x100) + 0x1000 * (i % 6);
            let next = base + 64 * if random.below(40) == 0 { random.below(n) } else { (i + 1) % n };
            put(port, base + 64 * i, next, buffer, length as u32 | flags);
        }
    }
    for _ in 0..random.below(6) {
        let (at, access) = match random.below(4) {
            0 => (SRC + random.below(0x6000), Access::Read),
            1 => (DST + random.below(0x6000), Access::Write),
            2 => ([TX, RX][random.below(2) as usize] + 64 * random.below(12), Access::Read),
            _ => ([TX, RX][random.below(2) as usize] + 64 * random.below(12) + 0x1c, Access::Write),
        };
        let rule = if random.below(4) == 0 { Rule::Terminate } else { Rule::Stall };
        port.add(at..at + 1 + random.below(8), access, rule);
    }
    AxiDmaConfig { sg, fifo_bytes: 1 + random.below(700) as usize, length_bits: 14, ..s0() }
}

/// Runs a scenario; `between` may exchange the core after a step.
pub(super) fn outcome(
    seed: u64,
    cut_through: bool,
    mut between: impl FnMut(&mut AxiDma, &TestPort),
) -> Outcome {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let port = port();
    let config = scenario(seed, &port, &mut random);
    let mut dma = build(config, &port);
    dma.cut_through = cut_through;
    let decision = [StallState::Retry, StallState::Retry, StallState::Terminated { abort: false }]
        .get(random.below(4) as usize)
        .copied()
        .unwrap_or(StallState::Terminated { abort: true });
    let mut stalls = 0;
    for block in [MM2S, S2MM] {
        dma.w(block + reg::DMACR, 0x7000 | (1 + random.next() as u32 % 3) << 16);
    }
    for round in 0..6 {
        for block in [MM2S, S2MM] {
            let (base, buffer) = if block == MM2S { (TX, SRC) } else { (RX, DST) };
            let (bd, at, length) = (64 * random.below(8), random.below(0x3000), 1 + random.below(900));
            if round == 0 {
                dma.start(block, base);
            }
            if random.below(3) > 0 {
                match config.sg {
                    true => dma.tail(block, base + bd),
                    false => dma.transfer(block, buffer + at, length as u32),
                }
            }
        }
        for _ in 0..200 {
            let activity = dma.step(0);
            between(&mut dma, &port);
            match activity {
                Activity::Busy => {}
                Activity::Stalled => {
                    stalls += port.waiting();
                    port.resume_all(decision);
                }
                Activity::Idle => break,
                Activity::Until(_) => panic!("no delay was set"),
            }
        }
        assert!(!dma.is_stalled(), "seed {seed}");
    }
    let rings = port.bytes(TX, 0x8000);
    // What is left in the stream is software's to see too.
    let mut left = dma.registers();
    left.push(dma.fifo_level() as u32);
    (left, rings, port.bytes(DST, 0x8000), stalls)
}

#[test]
fn random_rings_give_the_same_memory_status_words_and_registers_on_both_paths() {
    let mut errors = 0;
    let mut packets = 0;
    let mut stalls = 0;
    for seed in 0..600 {
        let straight = outcome(seed, true, |_, _| {});
        let through = outcome(seed, false, |_, _| {});
        assert_eq!(straight.0, through.0, "registers, seed {seed}");
        assert_eq!(straight.1, through.1, "descriptors, seed {seed}");
        assert_eq!(straight.2, through.2, "data, seed {seed}");
        errors += u32::from(straight.0[1] & ERR != 0) + u32::from(straight.0[13] & ERR != 0);
        packets += u32::from(straight.0[13] & IOC != 0);
        stalls += straight.3;
    }
    assert!(errors > 100 && packets > 100 && stalls > 100, "{errors} {packets} {stalls}");
}

#[test]
fn a_whole_run_is_one_copy() {
    let port = port();
    let mut dma = core(&port);
    dma.go(MM2S, TX, ring(&port, TX, &[(SRC, 0x1_0000 | SOF | EOF)]));
    dma.settle(2);
    dma.go(S2MM, RX, ring(&port, RX, &[(DST, 0x1_0000)]));
    port.take_log();
    dma.settle(2);
    let reads: Vec<_> = port.take_log().into_iter().filter(|s| s.addr >= SRC && s.addr < DST).collect();
    assert_eq!(
        reads.iter().map(|s| s.len).collect::<Vec<_>>(),
        [0x1_0000 - 4096],
        "after what was in the FIFO"
    );
}
