//! Scatter-gather lists.

use super::*;
use portcullis_arch::{Access, MemoryType, Shareability};

const LIST: u64 = RAM + 0x1000;
const OTHER: u64 = RAM + 0x8000;

#[test]
fn a_linked_list_goes_where_its_pointers_say() {
    let port = port();
    let mut z = fpd(&port);
    let data = Random(7).bytes(3000);
    port.put(SRC, &data);
    let next = control(Command::Next, false);
    put_linked(&port, LIST, SRC, 1000, next, LIST + 0x400);
    put_linked(&port, LIST + 0x400, SRC + 1000, 2000, control(Command::Stop, false), 0);
    put_linked(&port, OTHER, DST, 1000, next, OTHER + 0x60);
    put_linked(&port, OTHER + 0x60, DST + 5000, 2000, control(Command::Stop, true), 0);
    z.start_lists(LIST, OTHER);
    assert_eq!(z.r64(reg::SRC_CUR_DSCR_LSB), LIST, "current pointers are set by EN");
    assert_eq!(z.settle(2), Activity::Idle);
    assert_eq!(port.bytes(DST, 1000), data[..1000]);
    assert_eq!(port.bytes(DST + 5000, 2000), data[1000..]);
    assert_eq!(z.r(reg::ISR), 0x404);
    assert_eq!((z.r(reg::IRQ_SRC_ACCT), z.r(reg::IRQ_DST_ACCT)), (0, 1));
    assert_eq!(z.r64(reg::SRC_CUR_DSCR_LSB), LIST + 0x400);
    assert_eq!(z.r64(reg::DST_CUR_DSCR_LSB), OTHER + 0x60);
    assert_eq!((z.r(reg::STATUS), z.r(reg::CTRL2)), (0, 0));
}

#[test]
fn source_and_destination_lists_may_differ_in_size() {
    let port = port();
    let mut z = fpd(&port);
    let data = Random(9).bytes(600);
    port.put(SRC, &data);
    // Sources of 100, 200, 300 bytes into destinations of 250, 250, 100 bytes.
    let mut from = SRC;
    for (i, size) in [100, 200, 300].into_iter().enumerate() {
        let command = if i == 2 { Command::Stop } else { Command::Next };
        put_linear(&port, LIST + 16 * i as u64, from, size, control(command, true));
        from += size as u64;
    }
    for (i, size) in [250, 250, 100].into_iter().enumerate() {
        let to = DST + 0x1000 * i as u64;
        put_linear(&port, OTHER + 16 * i as u64, to, size, control(Command::Next, true));
    }
    z.start_lists(LIST, OTHER);
    z.settle(2);
    assert_eq!(port.bytes(DST, 251), [&data[..250], &[0]].concat());
    assert_eq!(port.bytes(DST + 0x1000, 251), [&data[250..500], &[0]].concat());
    assert_eq!(port.bytes(DST + 0x2000, 101), [&data[500..], &[0]].concat());
    assert_eq!(z.r(reg::ISR), 0x406);
    assert_eq!((z.r(reg::IRQ_SRC_ACCT), z.r(reg::IRQ_DST_ACCT)), (3, 3));
    assert_eq!(z.r(reg::TOTAL_BYTE), 600);
}

#[test]
fn a_hybrid_list_chains_linear_runs_by_linked_elements() {
    let port = port();
    let mut z = lpd(&port);
    let data = Random(11).bytes(500);
    port.put(SRC, &data);
    let next = control(Command::Next, false);
    put_linear(&port, LIST, SRC, 100, next);
    put_linear(&port, LIST + 16, SRC + 100, 100, next);
    put_linked(&port, LIST + 32, SRC + 200, 100, next, LIST + 0x210);
    put_linear(&port, LIST + 0x210, SRC + 300, 100, next);
    put_linear(&port, LIST + 0x220, SRC + 400, 100, control(Command::Stop, false));
    put_linear(&port, OTHER, DST, 500, next);
    z.start_lists(LIST, OTHER);
    z.settle(2);
    assert_eq!(port.bytes(DST, 500), data);
    assert_eq!(z.r(reg::ISR), 0x400);
}

#[test]
fn descriptors_are_read_with_their_own_attributes_and_never_written() {
    let port = port();
    let mut z = lpd(&port);
    z.w(reg::DSCR_ATTR, 0x1f0);
    put_linear(&port, LIST, SRC, 64, control(Command::Stop, false));
    put_linked(&port, OTHER, DST, 64, control(Command::Next, false), 0);
    let before = port.bytes(RAM, 0x10000);
    z.start_lists(LIST, OTHER);
    z.settle(2);
    assert_eq!(port.bytes(RAM, 0x10000), before);
    let log = port.take_log();
    let fetches: Vec<_> = log.iter().filter(|s| s.addr < SRC).collect();
    let ranges: Vec<_> = fetches.iter().map(|s| (s.addr, s.len)).collect();
    assert_eq!(ranges, [(LIST, 16), (OTHER, 16), (OTHER + 16, 16)]);
    for fetch in fetches {
        assert_eq!(fetch.access, Access::Read);
        assert_eq!(fetch.from.attrs.memory(), MemoryType::NORMAL_WB);
        assert_eq!(fetch.from.attrs.shareability(), Shareability::Outer);
    }
}

#[test]
fn fixed_bursts_and_modes_are_for_simple_mode_only() {
    let port = port();
    let mut z = fpd(&port);
    port.put(SRC, &[5; 64]);
    put_linear(&port, LIST, SRC, 64, control(Command::Stop, false));
    put_linear(&port, OTHER, DST, 64, control(Command::Next, false));
    z.w(reg::DATA_ATTR, 0);
    z.w64(reg::SRC_START_LSB, LIST);
    z.w64(reg::DST_START_LSB, OTHER);
    z.w(reg::CTRL0, SG | 1 << 4);
    z.w(reg::CTRL2, 1);
    z.settle(2);
    assert_eq!(port.bytes(DST, 64), [5; 64]);
}

#[test]
fn a_ring_runs_on_across_bounded_steps() {
    let port = port();
    let mut z = fpd(&port);
    port.put(SRC, &[3; 16]);
    for size in [16, 0] {
        put_linked(&port, LIST, SRC, size, control(Command::Next, true), LIST);
        put_linked(&port, OTHER, DST, 16, control(Command::Next, true), OTHER);
        z.start_lists(LIST, OTHER);
        for _ in 0..1000 {
            assert_eq!(z.step(0), Activity::Busy);
            let accesses = port.take_log().len();
            assert!((1..=1024).contains(&accesses), "{accesses} accesses in a step");
        }
        assert_eq!(z.r(reg::ISR) & 0x400, 0, "never done");
        assert_ne!(z.r(reg::ISR) & 0x10, 0, "the source counter wrapped");
        // The ring is opened while it runs.
        put_linked(&port, LIST, SRC, size, control(Command::Stop, false), LIST);
        assert_eq!(z.settle(2), Activity::Idle);
        assert_eq!(z.r(reg::ISR) & 0x400, 0x400);
        z.reset();
    }
}

#[test]
fn a_counter_that_wraps_says_so_and_the_run_goes_on() {
    let port = port();
    let mut z = fpd(&port);
    for i in 0..256u64 {
        let command = if i == 255 { Command::Stop } else { Command::Next };
        put_linear(&port, LIST + 16 * i, SRC + i, 1, control(command, true));
    }
    put_linear(&port, OTHER, DST, 256, control(Command::Next, true));
    z.start_lists(LIST, OTHER);
    z.settle(10);
    assert_eq!(z.r(reg::ISR), 0x416);
    assert_eq!((z.r(reg::IRQ_SRC_ACCT), z.r(reg::IRQ_DST_ACCT)), (0, 1));
    assert_eq!(z.r(reg::TOTAL_BYTE), 256);
}

#[test]
fn a_destination_that_is_not_full_is_not_done() {
    let port = port();
    let mut z = fpd(&port);
    put_linear(&port, LIST, SRC, 64, control(Command::Stop, true));
    put_linear(&port, OTHER, DST, 65, control(Command::Next, true));
    z.start_lists(LIST, OTHER);
    z.settle(2);
    assert_eq!(z.r(reg::ISR), 0x402);
    assert_eq!(z.r(reg::IRQ_DST_ACCT), 0);
}

/// A source list 100 + 100 (pause after the first) into one destination of 200.
fn paused(port: &TestPort) -> Zdma {
    let mut z = fpd(port);
    port.put(SRC, &(0..200).collect::<Vec<u8>>());
    put_linear(port, LIST, SRC, 100, control(Command::Pause, false));
    put_linear(port, LIST + 16, SRC + 100, 100, control(Command::Stop, false));
    put_linear(port, OTHER, DST, 200, control(Command::Next, true));
    z.start_lists(LIST, OTHER);
    assert_eq!(z.settle(2), Activity::Idle);
    assert_eq!((z.r(reg::STATUS), z.r(reg::CTRL2)), (1, 1));
    assert_eq!(z.r(reg::ISR), 0x800, "pause, not done");
    assert_eq!(port.bytes(DST, 101), (0..100).chain([0]).collect::<Vec<u8>>());
    z
}

#[test]
fn cont_goes_on_with_the_next_descriptor() {
    let port = port();
    let mut z = paused(&port);
    z.w(reg::CTRL2, 1);
    assert_eq!(z.step(0), Activity::Idle, "EN alone does not leave the pause");
    z.w(reg::CTRL0, SG | 2);
    assert_eq!(z.r(reg::CTRL0), SG, "CONT is used up");
    assert_eq!(z.settle(2), Activity::Idle);
    assert_eq!(port.bytes(DST, 200), (0..200).collect::<Vec<u8>>());
    assert_eq!((z.r(reg::ISR), z.r(reg::STATUS), z.r(reg::IRQ_DST_ACCT)), (0xc04, 0, 1));
}

#[test]
fn cont_with_cont_addr_starts_over_at_the_start_registers() {
    let port = port();
    let mut z = paused(&port);
    put_linear(&port, RAM + 0x3000, SRC + 50, 10, control(Command::Stop, false));
    put_linear(&port, RAM + 0x3800, DST + 0x1000, 10, control(Command::Next, false));
    z.w64(reg::SRC_START_LSB, RAM + 0x3000);
    z.w64(reg::DST_START_LSB, RAM + 0x3800);
    z.w(reg::CTRL0, SG | 6);
    assert_eq!(z.r(reg::CTRL0), SG | 4);
    z.settle(2);
    assert_eq!(port.bytes(DST + 0x1000, 11), (50..60).chain([0]).collect::<Vec<u8>>());
    assert_eq!(port.bytes(DST + 100, 100), [0; 100]);
    assert_eq!(z.r(reg::STATUS), 0);
}

#[test]
fn a_paused_channel_is_disabled_by_cont_with_en_0() {
    let port = port();
    let mut z = paused(&port);
    z.w(reg::CTRL2, 0);
    assert_eq!(z.r(reg::STATUS), 1, "still paused");
    z.w(reg::CTRL0, SG | 2);
    assert_eq!((z.r(reg::STATUS), z.r(reg::ISR)), (0, 0x800));
    assert_eq!(z.step(0), Activity::Idle);
    z.w(reg::CTRL2, 1);
    assert_eq!(z.settle(2), Activity::Idle);
    assert_eq!(z.r(reg::STATUS), 1, "a new start begins at the first descriptor, and pauses again");
    assert_eq!(z.r(reg::TOTAL_BYTE), 200);
}

#[test]
fn a_channel_can_be_started_again_after_it_is_done() {
    let port = port();
    let mut z = fpd(&port);
    put_linear(&port, LIST, SRC, 64, control(Command::Stop, false));
    put_linear(&port, OTHER, DST, 64, control(Command::Next, true));
    for round in 1..4u8 {
        port.put(SRC, &[round; 64]);
        z.start_lists(LIST, OTHER);
        z.settle(2);
        assert_eq!(port.bytes(DST, 64), [round; 64]);
        assert_eq!(z.r(reg::IRQ_DST_ACCT), 1);
    }
}

/// A random list at `list` of `total` bytes of payload, linear and linked mixed: where each piece lies, its place
/// in the whole, and its size.
fn random_list(
    port: &TestPort,
    random: &mut Random,
    list: u64,
    payload: u64,
    total: usize,
) -> Vec<(u64, usize, usize)> {
    let mut pieces = Vec::new();
    let (mut at, mut to, mut offset) = (list, payload, 0);
    while offset < total {
        to += random.below(64);
        let size = total / 100 + 1 + random.below(total as u64 / 10 + 1) as usize;
        let size = size.min(total - offset);
        pieces.push((to, offset, size));
        let command = if offset + size == total { Command::Stop } else { Command::Next };
        if at.is_multiple_of(32) && random.below(2) == 0 {
            let next = at + 32 + 16 * random.below(8);
            put_linked(port, at, to, size, control(command, true), next);
            at = next;
        } else {
            put_linear(port, at, to, size, control(command, true));
            at += 16;
        }
        to += size as u64;
        offset += size;
    }
    pieces
}

#[test]
fn random_lists_move_every_byte_in_order() {
    let mut random = Random(0xfeed_beef);
    for round in 0..300 {
        let port = port();
        let mut z = if round % 2 == 0 { fpd(&port) } else { lpd(&port) };
        let total = 1 + random.below(100_000) as usize;
        let data = random.bytes(total);
        let (sources, destinations) = (RAM + 0x1_0000, RAM + 0x1_8000);
        let from = random_list(&port, &mut random, sources, SRC, total);
        let to = random_list(&port, &mut random, destinations, DST, total);
        for (at, offset, size) in &from {
            port.put(*at, &data[*offset..offset + size]);
        }
        z.start_lists(sources, destinations);
        assert_eq!(z.settle(100), Activity::Idle);
        assert_eq!((z.r(reg::STATUS), z.r(reg::ISR)), (0, 0x406), "round {round}");
        assert_eq!(z.r(reg::TOTAL_BYTE), total as u32);
        assert_eq!(z.r(reg::IRQ_SRC_ACCT), from.len() as u32);
        assert_eq!(z.r(reg::IRQ_DST_ACCT), to.len() as u32);
        for (at, offset, size) in to {
            assert_eq!(port.bytes(at, size), data[offset..offset + size], "round {round}");
        }
    }
}
