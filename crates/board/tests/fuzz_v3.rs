//! Whatever software writes into the registers and memory of the SMMUv3 board: no panic, no endless loop, and after a
//! reset the board works.

mod common;

use common::{Board, RAM_V3 as RAM, Random, map, smmuv3};
use portcullis_arch::Pa;
use portcullis_board::MachineDescription;
use portcullis_board::machine::MemoryRegion;
use portcullis_board::sim::{Machine, Options};
use portcullis_board::system::{BootOptions, System};
use portcullis_board::tree::Region;
use portcullis_bus::Memory as _;
use portcullis_hal::Mmio as _;

const RAM_BYTES: u64 = 0x40_0000;
/// Where the stream table, the context descriptors and the queues are put, from the start of memory.
const STRTAB: u64 = RAM;
const CDS: u64 = RAM + 0x2_0000;
const CMDQ: u64 = RAM + 0x3_0000;
const EVENTQ: u64 = RAM + 0x4_0000;
const PRIQ: u64 = RAM + 0x5_0000;

fn small() -> MachineDescription {
    let mut description = smmuv3();
    let region = Region { base: Pa(RAM), size: RAM_BYTES };
    description.memory = vec![MemoryRegion { path: "/memory".into(), region }];
    description.reserved.clear();
    description
}

fn page(random: &mut Random) -> u64 {
    RAM + random.below(RAM_BYTES / 0x1000) * 0x1000
}

/// A word that means something to somebody: a table entry, an address, a small number.
fn word(random: &mut Random) -> u64 {
    let page = page(random);
    match random.below(8) {
        0..3 => page | 0x3,
        3 => page | 0x7c3 | random.below(16) << 6,
        4 => page | 0x7c1,
        5 => page + random.below(64) * 64,
        6 => random.below(0x4000) | random.below(32) << 32,
        _ => random.next(),
    }
}

fn store(machine: &Machine, at: u64, value: u64) {
    machine.memory().store64(Pa(at), value).unwrap();
}

/// Stream table entries and context descriptors that often lead somewhere.
fn tables(machine: &Machine, random: &mut Random) {
    for stream in (0x10..0x14).chain([0x408, 0x410]) {
        let ste = STRTAB + stream * 64;
        let config = [0, 4, 5, 5, 5, 6, 7, 7][random.below(8) as usize];
        let cd = CDS + random.below(16) * 0x400;
        store(machine, ste, 1 | config << 1 | cd | random.below(5) << 59);
        store(machine, ste + 8, random.next() & [0xff, 0x3000_00ff, !0][random.below(3) as usize]);
        let vtcr = (16 + random.below(24)) | random.below(3) << 6 | random.below(3) << 14 | 5 << 16 | 1 << 19;
        store(machine, ste + 16, random.below(4) | vtcr << 32 | random.below(4) << 57);
        store(machine, ste + 24, page(random));
    }
    for i in 0..64 {
        let cd = CDS + i * 64;
        let dw0 = (16 + random.below(24)) | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41;
        store(machine, cd, dw0 | random.below(8) << 44 | random.below(256) << 48);
        store(machine, cd + 8, page(random));
        store(machine, cd + 24, 0xf404_ff44);
        if random.below(8) == 0 {
            store(machine, cd + 8 * random.below(8), random.next());
        }
    }
}

/// Fills the command queue with commands, most of them legal, and shows them to the SMMU.
fn commands(machine: &Machine, random: &mut Random) {
    const OPCODES: [u64; 24] = [
        0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x10, 0x11, 0x12, 0x13, 0x20, 0x22, 0x28, 0x2a, 0x30, 0x40, 0x41, 0x44,
        0x45, 0x46, 0x46, 0x46, 0x46, 0x99,
    ];
    let smmu = machine.smmu_registers().unwrap();
    for i in 0..256 {
        let opcode = OPCODES[random.below(24) as usize];
        let stream = [0x10, 0x11, 0x408, 0x410, random.next() & 0xffff][random.below(5) as usize];
        let low = opcode | (random.next() & 0xffff_f800) & !(1 << 10) | stream << 32;
        store(machine, CMDQ + 16 * i, low);
        store(machine, CMDQ + 16 * i + 8, if opcode == 0x46 { page(random) } else { word(random) });
    }
    smmu.write32(0x98, random.next() as u32 & 0x1ff);
    // Go on after an error.
    let gerror = smmu.read32(0x60);
    smmu.write32(0x64, gerror);
}

/// Turns the SMMU on with queues and a stream table in memory.
fn enable(machine: &Machine, random: &mut Random) {
    let smmu = machine.smmu_registers().unwrap();
    smmu.write32(0x20, 0);
    smmu.write32(0x28, 0xd75);
    smmu.write32(0x2c, random.next() as u32 & 0xf);
    smmu.write64(0x80, STRTAB | 1 << 62);
    smmu.write32(0x88, 11);
    for (base, prod, cons, at) in
        [(0x90, 0x98, 0x9c, CMDQ), (0xa0, 0x1_00a8, 0x1_00ac, EVENTQ), (0xc0, 0x1_00c8, 0x1_00cc, PRIQ)]
    {
        smmu.write64(base, at | 7);
        smmu.write32(prod, 0);
        smmu.write32(cons, 0);
    }
    smmu.write64(0xb0, [0, 0x2f03_0040, RAM + 0x6_0000][random.below(3) as usize]);
    smmu.write32(0x50, 7);
    smmu.write32(0x20, 0x1f);
}

/// Writes or reads some register of some device, in some size.
fn access(machine: &Machine, random: &mut Random) {
    let smmu = machine.smmus()[0].base.get();
    let engine = &machine.engines()[random.below(6) as usize];
    let base = match random.below(4) {
        0 => engine.base.get() + random.below(0x84) * 4,
        1 => engine.base.get() + [0x200, 0x110, 0x18, 0x30][random.below(4) as usize],
        2 => smmu + random.below(0x48) * 4 + random.below(2) * 0x1_0000,
        _ => smmu + random.below(0x2_0000),
    };
    let Ok((registers, offset)) = machine.window_at(Pa(base)) else { return };
    let (offset, value) = (offset as usize, word(random));
    match random.below(8) {
        0 => drop(registers.read32(offset)),
        1 => drop(registers.read64(offset)),
        2 => registers.write64(offset, value),
        3 => registers.write32(offset, random.below(2) as u32),
        _ => registers.write32(offset, value as u32),
    }
}

/// A transfer of each test device to somewhere, with or without a substream and translations of its own.
fn transfers(machine: &Machine, random: &mut Random) {
    for engine in machine.engines().iter().filter(|e| e.atc.is_some()) {
        let registers = machine.engine_registers(engine);
        let atc = engine.atc.as_ref().unwrap();
        let pri = random.below(2) == 0;
        atc.enable_pri(pri);
        atc.enable_ats(random.below(2) == 0);
        atc.hang(random.below(16) == 0);
        registers.write32(0x00, word(random) as u32);
        registers.write32(0x08, word(random) as u32);
        registers.write32(0x10, 1 + random.below(0x4000) as u32);
        registers.write32(0x100, random.below(16) as u32 | (random.below(8) as u32) << 29);
        registers.write32(0x18, 1);
    }
}

fn run(seed: u64, cpu_cache: bool, accesses: usize) -> usize {
    let options = Options { cpu_cache, plain_ports: !cpu_cache, ..Options::default() };
    let machine = Machine::build(small(), options).unwrap();
    let mut random = Random(seed);
    for _ in 0..RAM_BYTES / 16 {
        let at = RAM + random.below(RAM_BYTES / 8) * 8;
        store(&machine, at, word(&mut random));
    }
    let mut records = 0;
    for i in 0..accesses {
        if i % 400 == 0 {
            enable(&machine, &mut random);
        }
        match random.below(100) {
            0 => tables(&machine, &mut random),
            1 | 2 => commands(&machine, &mut random),
            3 | 4 => transfers(&machine, &mut random),
            _ => access(&machine, &mut random),
        }
        if random.below(8) == 0 {
            machine.step();
        }
        if i % 100 == 0 {
            let smmu = machine.smmu_registers().unwrap();
            let (prod, cons) = (smmu.read32(0x1_00a8), smmu.read32(0x1_00ac));
            records += usize::from(prod != cons);
            smmu.write32(0x1_00ac, prod);
            machine.tracer().take();
        }
    }
    // Rings of descriptors and aggressive devices have no end, and need none.
    let _may_still_be_at_work = machine.run(200);
    machine.smmu_v3().unwrap().reset();
    for engine in machine.engines() {
        engine.reset();
        if let Some(atc) = &engine.atc {
            atc.hang(false);
            atc.enable_ats(false);
            atc.enable_pri(false);
        }
    }
    machine.memory().write(Pa(RAM), Default::default(), &vec![0; RAM_BYTES as usize]).unwrap();
    let board = Board { system: System::boot(machine, &BootOptions::default()).unwrap() };
    let (pool, _) = board.machine().dma_memory().pool().range();
    let free = if pool.get() > RAM + 0x4000 { RAM } else { RAM + RAM_BYTES - 0x4000 };
    for name in ["dma0", "dma3"] {
        let domain = board.domain_for(name);
        map(&domain, 0x1000_0000, free, 0x4000);
        board.works(name, (0x1000_2001, free + 0x2001), (0x1000_0000, free), 0x1000);
    }
    board.no_faults();
    records
}

#[test]
fn random_registers_commands_and_tables_break_nothing() {
    let records: usize = (1..=3).map(|seed| run(seed * 0x9e37_79b9, false, 12_000)).sum();
    assert!(records > 10, "the engines hardly met the SMMU: {records}");
}

#[test]
fn nor_do_they_with_caches_and_a_record() {
    run(77, true, 5000);
}

#[test]
#[ignore = "a minute"]
fn nor_do_very_many() {
    for seed in 1..=40 {
        run(seed * 0x2545_f491, seed % 2 == 0, 20_000);
    }
}
