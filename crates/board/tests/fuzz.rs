//! Whatever software writes into registers and memory: no panic, no endless loop, and after a reset the board works.

mod common;

use common::{Board, RAM, Random, map, thesis};
use portcullis_arch::Pa;
use portcullis_board::MachineDescription;
use portcullis_board::machine::MemoryRegion;
use portcullis_board::sim::{Machine, Options};
use portcullis_board::system::{BootOptions, System};
use portcullis_board::tree::Region;
use portcullis_bus::Memory as _;

const RAM_BYTES: u64 = 0x40_0000;

fn small() -> MachineDescription {
    let mut description = thesis();
    let region = Region { base: Pa(RAM), size: RAM_BYTES };
    description.memory = vec![MemoryRegion { path: "/memory".into(), region }];
    description.reserved.clear();
    description
}

/// A word that means something to somebody: a descriptor of a table or of a list, an address, a small number.
fn word(random: &mut Random) -> u64 {
    let page = RAM + random.below(RAM_BYTES / 0x1000) * 0x1000;
    match random.below(8) {
        0..3 => page | 0x3,
        3 => page | 0x7c3 | random.below(16) << 6,
        4 => page | 0x7c1,
        5 => page + random.below(64) * 64,
        6 => random.below(0x4000) | random.below(32) << 32,
        _ => random.next(),
    }
}

fn fill(machine: &Machine, random: &mut Random, words: u64) {
    for _ in 0..words {
        let at = RAM + random.below(RAM_BYTES / 8) * 8;
        machine.memory().store64(Pa(at), word(random)).unwrap();
    }
}

/// Writes or reads some register of some device, in some size.
fn access(machine: &Machine, random: &mut Random) {
    let smmu = machine.smmus()[0].base.get();
    let base = match random.below(4) {
        0 => machine.engines()[random.below(17) as usize].base.get() + random.below(0x84) * 4,
        1 => {
            machine.engines()[random.below(17) as usize].base.get()
                + [0x200, 0x110, 0x44][random.below(3) as usize]
        }
        // Banks, then everything.
        2 => smmu + 0x1_0000 + random.below(16) * 0x1000 + random.below(0x40) * 4,
        _ => smmu + random.below(0x2_0000),
    };
    let Ok((registers, offset)) = machine.window_at(Pa(base)) else { return };
    let (offset, value) = (offset as usize, word(random));
    use portcullis_hal::Mmio;
    match random.below(8) {
        0 => drop(registers.read32(offset)),
        1 => drop(registers.read64(offset)),
        2 => registers.write64(offset, value),
        3 => registers.write32(offset, random.below(2) as u32),
        _ => registers.write32(offset, value as u32),
    }
}

/// Streams that lead into banks, so that what follows meets tables.
fn connect(machine: &Machine, random: &mut Random) {
    use portcullis_hal::Mmio;
    let smmu = machine.smmu_registers().unwrap();
    for (i, engine) in machine.engines().iter().enumerate() {
        smmu.write32(0xc00 + 4 * i, random.below(16) as u32);
        smmu.write32(0x800 + 4 * i, 0x8000_0000 | engine.stream.get());
    }
    for bank in 0..16 {
        let at = 0x1_0000 + 0x1000 * bank;
        smmu.write32(0x1800 + 4 * bank, 1);
        smmu.write32(0x1000 + 4 * bank, (random.below(4) as u32) << 16 | random.below(16) as u32);
        smmu.write32(at + 0x10, 0x3_8000 | random.below(6) as u32);
        smmu.write32(at + 0x30, (16 + random.below(24) as u32) | (random.below(4) as u32) << 14 | 1 << 6);
        smmu.write64(at + 0x20, RAM + random.below(RAM_BYTES / 0x1000) * 0x1000);
        smmu.write32(at, 0x61 | (random.next() as u32 & 0x1a6));
    }
    smmu.write32(0, 0x0020_0000 | (random.next() as u32 & 0x1436));
}

fn run(seed: u64, cpu_cache: bool, accesses: usize) -> u64 {
    let options = Options { cpu_cache, plain_ports: !cpu_cache, ..Options::default() };
    let machine = Machine::build(small(), options).unwrap();
    let mut random = Random(seed);
    fill(&machine, &mut random, RAM_BYTES / 16);
    let mut faults = 0;
    for i in 0..accesses {
        if i % 2000 == 0 {
            connect(&machine, &mut random);
            fill(&machine, &mut random, 100);
        }
        access(&machine, &mut random);
        if random.below(32) == 0 {
            machine.step();
        }
        if i % 500 == 0 {
            faults += machine.tracer().lines().rises(155);
            machine.tracer().take();
        }
    }
    // Rings of descriptors have no end, and need none.
    let _may_still_be_at_work = machine.run(200);
    machine.smmu().unwrap().reset();
    for engine in machine.engines() {
        engine.reset();
    }
    machine.memory().write(Pa(RAM), Default::default(), &vec![0; RAM_BYTES as usize]).unwrap();
    let board = Board { system: System::boot(machine, &BootOptions::default()).unwrap() };
    let (pool, _) = board.machine().dma_memory().pool().range();
    let free = if pool.get() > RAM + 0x4000 { RAM } else { RAM + RAM_BYTES - 0x4000 };
    for name in ["fpd-dma0", "lpd-dma7"] {
        let domain = board.domain_for(name);
        map(&domain, 0x7000_0000, free, 0x4000);
        board.works(name, (0x7000_2001, free + 0x2001), (0x7000_0000, free), 0x1000);
    }
    board.no_faults();
    faults
}

#[test]
fn random_registers_and_random_tables_break_nothing() {
    let faults: u64 = (1..=3).map(|seed| run(seed * 0x9e37_79b9, false, 10_000)).sum();
    assert!(faults > 10, "the engines hardly met the SMMU");
}

#[test]
fn nor_do_they_with_caches_and_a_record() {
    run(77, true, 4000);
}
