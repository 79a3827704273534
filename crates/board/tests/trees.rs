//! Machines of unusual trees: several SMMUs, ports around the SMMU, masters that nobody knows a stream of, shared and
//! missing interrupts, impossible memory.

mod common;

use common::{Board, RAM, map, thesis};
use portcullis_arch::zynqmp::PlPort;
use portcullis_arch::{Pa, StreamId};
use portcullis_board::MachineDescription;
use portcullis_board::compatible::Kind;
use portcullis_board::machine::{DeclaredStream, MemoryRegion};
use portcullis_board::sim::{BuildError, EventKind, Machine, Options};
use portcullis_board::system::{BootError, BootOptions, System};
use portcullis_board::tree::{Interrupt, Region};
use portcullis_drivers::fault::FaultReason;
use portcullis_hal::Mmio as _;
use portcullis_iommu::{DomainSpec, Paging};

const IN: u64 = 0x7000_0000;

fn error(description: MachineDescription) -> BuildError {
    Machine::build(description, Options::default()).err().unwrap()
}

/// The thesis board with a second, generic SMMU in front of the low power domain's channels.
fn two_smmus() -> MachineDescription {
    let mut description = thesis();
    let mut second = description.smmus[0].clone();
    second.kind = Kind::SmmuV2;
    second.region.base = Pa(0xfe00_0000);
    (second.node.path, second.node.name) = ("/axi/smmu@fe000000".into(), "smmu@fe000000".into());
    for interrupt in &mut second.interrupts {
        if let Interrupt::Spi { number, .. } = interrupt {
            *number = 170;
        }
    }
    description.smmus.push(second);
    for channel in description.dma_channels.iter_mut().filter(|c| c.bus_width == 64) {
        for stream in &mut channel.streams.declared {
            stream.smmu = 1;
        }
    }
    description
}

#[test]
fn each_of_two_smmus_has_its_devices_domains_and_interrupts() {
    let board = Board::of(two_smmus(), false);
    let [first, second] = board.system.smmus() else { panic!("two SMMUs") };
    let core = board.system.core();
    let allocate = |instance| core.alloc_domain(instance, DomainSpec::Stage1(Paging::default())).unwrap();
    let (one, two) = (allocate(first.instance), allocate(second.instance));
    board.attach("fpd-dma0", &one);
    board.attach("lpd-dma0", &two);
    // The same bank and the same address, and other memory.
    assert_eq!((one.bank(), two.bank()), (Some(0), Some(0)));
    map(&one, IN, RAM, 0x2000);
    map(&two, IN, RAM + 0x8000, 0x2000);
    board.works("fpd-dma0", (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
    board.works("lpd-dma0", (IN + 0x1000, RAM + 0x9000), (IN, RAM + 0x8000), 0x1000);
    for (name, smmu) in [("fpd-dma0", first), ("lpd-dma0", second)] {
        assert!(board.copy(name, IN + 0x2000, IN, 4).result.is_err());
        let fault = board.fault();
        assert_eq!((fault.instance, fault.name.as_deref()), (smmu.instance, Some(name)));
    }
    let error = core.attach_device(board.device("lpd-dma1"), &one).unwrap_err();
    assert!(matches!(error, portcullis_iommu::Error::OtherInstance { .. }), "{error}");
    let window = |pa| board.machine().window_at(Pa(pa)).map(|(_, offset)| offset);
    assert_eq!((window(0xfd80_0004), window(0xfe00_0008)), (Ok(4), Ok(8)));
    assert!(board.system.describe().matches("stream matching").count() == 2);
}

#[test]
fn of_two_smmus_one_may_be_off() {
    let mut description = two_smmus();
    description.smmus[0].node.available = false;
    let board = Board::of(description, false);
    // In front of the full power domain there is nothing any more.
    board.works("fpd-dma0", (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 64);
    let at = board.channel("lpd-dma0").driver.pool().iova.get();
    board.refused("lpd-dma0", (RAM, RAM), RAM + 0x1000, FaultReason::InvalidContext, at);
    assert_eq!(board.system.smmus().len(), 1);
    let domain = board.domain_for("lpd-dma0");
    map(&domain, IN, RAM, 0x2000);
    board.works("lpd-dma0", (IN + 0x1000, RAM + 0x1000), (IN, RAM), 64);
}

#[test]
fn a_generic_smmu_has_as_many_banks_as_its_window_has_room_for() {
    for (size, banks) in [(0x2_0000, 16), (0x8_0000, 64), (0x100_0000, 128)] {
        let mut description = thesis();
        description.smmus[0].kind = Kind::SmmuV2;
        description.smmus[0].region.size = size;
        let board = Board::of(description, false);
        let (_, driver) = board.system.smmu().unwrap();
        assert_eq!(driver.identification().context_banks, banks);
        assert!(!driver.identification().coherent_walk, "as the tree says");
        let domain = board.domain_for("fpd-dma0");
        map(&domain, IN, RAM, 0x2000);
        board.works("fpd-dma0", (IN + 0x1000, RAM + 0x1000), (IN, RAM), 64);
    }
}

#[test]
fn a_window_that_is_too_small_for_the_smmu_is_an_error_that_names_the_node() {
    let mut description = thesis();
    description.smmus[0].region.size = 0x1_0000;
    let machine = Machine::build(description, Options::default()).unwrap();
    let error = System::boot(machine, &BootOptions::default()).err().unwrap();
    assert!(matches!(error, BootError::Probe { .. }));
    assert!(error.to_string().starts_with("/axi/smmu@fd800000: the window of 0x10000 bytes"), "{error}");
}

#[test]
fn a_writer_on_a_port_around_the_smmu_is_never_translated() {
    let mut description = thesis();
    let writer = &mut description.pl_writers[0];
    (writer.port, writer.streams.actual) = (PlPort::Acp, Vec::new());
    let board = Board::of(description, false);
    assert_eq!(board.machine().engine("pl-writer0").unwrap().smmu, None);
    assert!(board.pl_write(RAM + 4, 77, 3));
    assert_eq!(board.get32(RAM + 4), 77);
    board.no_faults();
}

#[test]
fn the_writer_s_axi_id_after_reset_is_that_of_the_tree() {
    let mut description = thesis();
    description.pl_writers[0].axi_id = 5;
    description.pl_writers[0].streams.actual = vec![StreamId(0x205)];
    let board = Board::of(description, false);
    let slot = board.machine().engine("pl-writer0").unwrap();
    assert_eq!(board.machine().engine_registers(slot).read32(0x40), 5);
    // Triggered without choosing one: stream 0x205, which nobody declared.
    board.machine().engine_registers(slot).write32(0x44, 1);
    board.settle();
    let fault = board.fault().report;
    assert_eq!((fault.reason, fault.stream), (FaultReason::UnknownStream, Some(StreamId(0x205))));
}

#[test]
fn a_channel_of_which_nobody_knows_a_stream_reaches_memory_directly() {
    let mut description = thesis();
    let channel = &mut description.dma_channels[0];
    (channel.chip, channel.streams) = (None, Default::default());
    let board = Board::of(description, false);
    let slot = &board.machine().engines()[0];
    assert_eq!((&*slot.name, slot.smmu), ("dma0", None));
    board.works("dma0", (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 64);
}

#[test]
fn a_channel_without_iommus_still_passes_the_smmu_of_its_chip() {
    let mut description = thesis();
    description.dma_channels[0].streams.declared.clear();
    let board = Board::of(description, false);
    let at = board.channel("fpd-dma0").driver.pool().iova.get();
    board.refused("fpd-dma0", (RAM, RAM), RAM + 0x1000, FaultReason::UnknownStream, at);
}

#[test]
fn lines_that_devices_share_stay_high_until_all_are_served() {
    let mut description = thesis();
    let shared = description.dma_channels[0].interrupt.clone();
    for channel in &mut description.dma_channels {
        channel.interrupt = shared.clone();
    }
    let board = Board::of(description, false);
    let identity = board.alloc(DomainSpec::Identity);
    let names = ["fpd-dma0", "fpd-dma1", "lpd-dma0"];
    names.iter().for_each(|name| board.attach(name, &identity));
    let started = names.map(|name| (name, board.start(name, RAM + 0x1000, RAM, 64)));
    board.machine().run(1000).unwrap();
    let line = shared.unwrap().spi().unwrap();
    assert!(board.machine().tracer().lines().level(line));
    assert!(board.channel(names[0]).driver.handle_irq().is_some());
    assert!(board.machine().tracer().lines().level(line), "two more are waiting");
    board.settle();
    assert!(!board.machine().tracer().lines().level(line));
    for (name, cookie) in started {
        assert_eq!(board.completion(name, cookie).result, Ok(()));
    }
    let changes =
        board.events().into_iter().filter(|e| matches!(e.kind, EventKind::Interrupt { .. })).count();
    assert_eq!(changes, 2, "one rise and one fall");
}

#[test]
fn a_context_interrupt_that_is_not_wired_does_not_move_the_others() {
    let mut description = thesis();
    // A line of its own for every bank, and none for bank 0.
    for (i, interrupt) in description.smmus[0].interrupts.iter_mut().enumerate() {
        if let Interrupt::Spi { number, .. } = interrupt {
            *number = 200 + i as u32;
        }
    }
    let Interrupt::Spi { number, trigger } = description.smmus[0].interrupts[1].clone() else { panic!() };
    description.smmus[0].interrupts[1] = Interrupt::Ppi { number: number % 16, trigger };
    let board = Board::of(description, false);
    let domains = ["fpd-dma0", "fpd-dma1"].map(|name| (name, board.domain_for(name)));
    for (name, domain) in &domains {
        let cookie = board.start(name, IN, IN, 4);
        board.machine().run(1000).unwrap();
        let pending = board.machine().tracer().lines().pending();
        let line = 201 + u32::from(domain.bank().unwrap());
        assert_eq!(pending.contains(&line), *name == "fpd-dma1", "{name}: {pending:?}");
        board.settle();
        assert!(board.completion(name, cookie).result.is_err());
    }
    // Bank 0's fault came with bank 1's interrupt.
    assert_eq!(board.faults().len(), 2);
}

#[test]
fn memory_that_cannot_be_is_a_message_that_names_the_node() {
    let with = |regions: &[(u64, u64)]| {
        let mut description = thesis();
        description.memory = regions
            .iter()
            .map(|&(base, size)| MemoryRegion {
                path: format!("/memory@{base:x}"),
                region: Region { base: Pa(base), size },
            })
            .collect();
        description
    };
    assert_eq!(error(with(&[])), BuildError::NoMemory);
    // More than any host has; at the very end of the address space; not whole pages.
    for region in [(0, 1 << 62), (u64::MAX - 0xfff, 0x1000), (0x1000, 0x800)] {
        let message = error(with(&[region])).to_string();
        assert!(message.starts_with(&format!("/memory@{:x}", region.0)), "{message}");
    }
    // No room for the drivers' own memory.
    assert_eq!(error(with(&[(0x1000_0000, 0x8_0000)])), BuildError::NoPool);
    assert_eq!(error(with(&[(0xffff_ffff_fff0_0000, 0x8_0000)])), BuildError::NoPool);
    // A little: enough to boot and to copy.
    let mut small = with(&[(RAM, 0x40_0000), (0xffff_ffff_ff00_0000, 0x10_0000)]);
    small.reserved.clear();
    let board = Board::of(small, true);
    let domain = board.domain_for("fpd-dma0");
    let (pool, size) = board.machine().dma_memory().pool().range();
    assert!(pool.get() >= RAM && pool.get() + size <= RAM + 0x40_0000);
    map(&domain, IN, RAM, 0x2000);
    board.works("fpd-dma0", (IN + 0x1000, RAM + 0x1000), (IN, RAM), 64);
}

#[test]
fn reserved_memory_is_left_alone() {
    let mut description = thesis();
    description.memory.retain(|m| m.region.base.get() == 0);
    // Everything but two stretches.
    let mut reserve = |base: u64, end: u64| {
        let mut region = description.reserved[0].clone();
        region.region = Some(Region { base: Pa(base), size: end - base });
        description.reserved.push(region);
    };
    reserve(0, 0x1000_0000);
    reserve(0x1080_0000, 0x7000_0000);
    reserve(0x7400_0000, 0x8000_0000);
    let machine = Machine::build(description, Options::default()).unwrap();
    let (base, size) = machine.dma_memory().pool().range();
    assert!(
        base.get() >= 0x7000_0000 && base.get() + size <= 0x7400_0000 && size >= 0x100_0000,
        "{base:?}+{size:#x}"
    );
}

#[test]
fn an_address_without_a_device_is_a_bus_error_and_reads_as_all_ones() {
    let board = Board::new();
    assert!(board.machine().window_at(Pa(0xfd90_0000)).is_err());
    let (registers, offset) = board.machine().window_at(Pa(0xfd50_011c)).unwrap();
    assert_eq!((registers.read32(offset as usize), registers.read64(offset as usize)), (0, u64::MAX));
    registers.write64(offset as usize, 1);
    // What the channel does not decode is an error by default (ERR_CTRL).
    assert_eq!(registers.read32(0xffc), u32::MAX);
    let mut bytes = [0; 4];
    assert!(board.machine().cpu_read(Pa(0x9000_0000), &mut bytes).is_err());
    assert!(board.machine().cpu_write(Pa(0x7fff_fffe), &bytes).is_err());
}

#[test]
fn a_stream_declared_at_the_other_smmu_is_not_entered_at_this_one() {
    let mut description = two_smmus();
    let declared = DeclaredStream { smmu: 1, id: StreamId(0x14e8), mask: 0 };
    description.dma_channels[0].streams.declared.push(declared);
    let board = Board::of(description, false);
    let info = board.system.core().device(board.device("fpd-dma0")).unwrap();
    assert_eq!(info.streams.len(), 1);
    assert_eq!(board.system.owner_of(StreamId(0x14e8)).as_deref(), Some("fpd-dma0"));
    assert_eq!(board.system.owner_of(StreamId(0x3f00)), None);
}
