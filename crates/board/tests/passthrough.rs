//! Cores in virtual machines, end to end: a guest's own driver stack on guest addresses, stage 2 in the real SMMUv2, and the
//! ways in which cores change hands.

mod axidma_rig;

use std::sync::Arc;

use axidma_rig::{KIB, MIB, NONE, PAGE, Rig, description, options, pattern, pieces, segment};
use portcullis_arch::{Access, Iova, Ipa, Pa};
use portcullis_board::guest::aim::{Aim, Attempt};
use portcullis_board::guest::own_clock::OwnClock;
use portcullis_board::guest::{BoardGuestMemory, BoardVm, Guest, new_vm};
use portcullis_board::os::host::AXI_DRIVER;
use portcullis_board::os::proxy::PROXY_DRIVER;
use portcullis_board::os::stack::AxiStack;
use portcullis_board::system::BootOptions;
use portcullis_drivers::axidma::{AxiDma, ChannelConfig, Config, pool_bytes};
use portcullis_drivers::dmaengine::{
    BusAccess, BusResponse, DescriptorPool, Direction, DmaChannel as _, State, TransferError, WaitError,
};
use portcullis_drivers::fault::FaultReason;
use portcullis_drivers::ops::{StreamMatch, TableRoot};
use portcullis_hal::{Block, Clock, DmaMemory as _, Mmio as _};
use portcullis_iommu::dma::{DeviceConfig, Direction as Way, DmaDevice, DmaSpace, SpaceConfig};
use portcullis_iommu::{
    DefaultDomain, DeviceId, FwSpec, InstanceId, IommuCore, Process, ProcessConfig, Prot,
};
use portcullis_vfio::{
    AssignOptions, Assignment, GuestIommu, Owner, VFIO_DRIVER, VfioError, ViommuHost, ViommuTable, Vm as _,
};

/// Simulated time that a transfer in a guest gets. Guests on threads share the board's time.
const PATIENCE_US: u64 = 100_000_000;
const GUEST_BYTES: u64 = 32 * MIB;

/// Takes a core from the host's driver and gives it to a machine.
fn assign_with(rig: &Rig, vm: &Arc<BoardVm>, core: &str, options: AssignOptions) -> Arc<Assignment> {
    let registry = rig.system.os().registry();
    if registry.owner(core) == Ok(Owner::Host(AXI_DRIVER.into())) {
        registry.unbind(core).unwrap();
    }
    if registry.owner(core) == Ok(Owner::None) {
        registry.bind(core, VFIO_DRIVER).unwrap();
    }
    rig.system.os().passthrough().assign(core, vm.clone(), options).unwrap()
}

fn assign(rig: &Rig, vm: &Arc<BoardVm>, core: &str) -> Arc<Assignment> {
    assign_with(rig, vm, core, AssignOptions::default())
}

fn machine(rig: &Rig, name: &str, seed: u64) -> Arc<BoardVm> {
    new_vm(&rig.system, name, GUEST_BYTES, seed).unwrap()
}

/// A machine with a core, booted.
fn guest(rig: &Rig, name: &str, core: &str, seed: u64) -> (Guest, Arc<Assignment>) {
    let vm = machine(rig, name, seed);
    let assignment = assign(rig, &vm, core);
    let guest = Guest::boot(&rig.system, &vm, std::slice::from_ref(&assignment)).unwrap();
    (guest, assignment)
}

/// A loop by a driver stack over guest memory; the bytes are compared.
fn loop_on(
    stack: &AxiStack<BoardGuestMemory>,
    clock: &impl Clock,
    seed: u64,
    len: u64,
) -> Result<u64, WaitError> {
    let (memory, dma) = (stack.dma().memory().clone(), stack.dma());
    let [from, to] = [(); 2].map(|()| memory.alloc(len as usize, PAGE as usize).unwrap());
    let data = pattern(seed, len);
    memory.write(from.pa, &data);
    memory.write(to.pa, &vec![0xee; len as usize]);
    let source = dma.map_single(from.pa, len, Way::ToDevice, NONE).unwrap();
    let target = dma.map_single(to.pa, len, Way::FromDevice, NONE).unwrap();
    let running = stack.begin(&[segment(target, len)], &[segment(source, len)]).unwrap();
    let ended = running.wait(clock, PATIENCE_US);
    dma.unmap_single(source, len, Way::ToDevice, NONE).unwrap();
    dma.unmap_single(target, len, Way::FromDevice, NONE).unwrap();
    let mut seen = vec![0; len as usize];
    memory.read(to.pa, &mut seen);
    assert!(ended.is_err() || seen == data, "a loop of {len} bytes: other bytes arrived");
    memory.free(from);
    memory.free(to);
    ended
}

fn loops(guest: &Guest, seed: u64, len: u64) {
    let ended = loop_on(&guest.cores()[0].stack, guest.clock(), seed, len);
    assert_eq!(ended, Ok(len), "machine {}", guest.vm().name());
}

fn refused(access: BusAccess, at: Iova) -> WaitError {
    let error = TransferError::Bus { access, response: BusResponse::Slave, at };
    WaitError::Failed { error, transferred: 0 }
}

#[test]
fn a_guest_s_driver_loops_through_stage_2() {
    let rig = Rig::new();
    let (guest, assignment) = guest(&rig, "A", "axidma0", 1);
    let ranges = guest.vm().memory();
    let backing = &ranges[0].backing;
    let scattered = backing.windows(2).filter(|w| w[0].pa.get() + w[0].len != w[1].pa.get()).count();
    assert!(scattered * 2 > backing.len(), "its memory is scattered");
    for len in [1, 64, 4095, 64 * KIB, 100_001, 3 * MIB] {
        loops(&guest, len, len);
    }
    // Core 1 is still the host's.
    rig.loops(1, MIB);
    rig.no_faults();
    let [region] = assignment.regions().try_into().unwrap();
    assert_eq!((region.device.as_str(), guest.cores()[0].base), ("axidma0", region.ipa.get()));
}

#[test]
fn interrupts_of_the_core_reach_the_guest_and_come_again() {
    let rig = Rig::new();
    let (guest, assignment) = guest(&rig, "A", "axidma0", 1);
    let core = &guest.cores()[0];
    assert_eq!(core.lines.len(), 2);
    assert_eq!(assignment.lines().iter().map(|l| l.line).collect::<Vec<_>>(), core.lines);
    let dma = core.stack.dma();
    let [from, to] = [(); 2].map(|()| dma.alloc_coherent(4 * KIB).unwrap());
    let rises = |line| rig.machine().tracer().lines().rises(line);
    let before = rises(89);
    for round in 0..5 {
        from.write(0, &pattern(round, 4 * KIB)).unwrap();
        let running =
            core.stack.begin(&[segment(to.iova(), 4 * KIB)], &[segment(from.iova(), 4 * KIB)]).unwrap();
        // Nobody asks the channel: its handlers are the guest's.
        for _ in 0..100 {
            guest.clock().delay_us(10);
        }
        let (sent, received) = running.status();
        assert_eq!((sent.state, received.state), (State::Complete, State::Complete), "round {round}");
        let mut seen = vec![0; 4 * KIB as usize];
        to.read(0, &mut seen).unwrap();
        assert!(seen == pattern(round, 4 * KIB));
    }
    assert_eq!(rises(89) - before, 5);
    assert!(guest.vm().lines().high().is_empty(), "acknowledged and unmasked");
}

#[test]
fn two_guests_on_two_threads_loop_at_the_same_time() {
    let rig = Rig::new();
    let make = |name: &str, core: &str, seed| {
        let vm = machine(&rig, name, seed);
        let assignment = [assign(&rig, &vm, core)];
        let clock = Arc::new(OwnClock::new(&rig.system, &assignment));
        Guest::boot_with(&rig.system, &vm, &assignment, clock).unwrap()
    };
    let guests = [make("A", "axidma0", 1), make("B", "axidma1", 2)];
    let bases = guests.each_ref().map(|g| (g.vm().memory()[0].ipa, g.vm().memory()[0].backing[0].pa));
    assert!(bases[0].0 == bases[1].0 && bases[0].1 != bases[1].1, "the same addresses, other memory");
    let start = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        for (n, guest) in (0u64..).zip(&guests) {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                for round in 0..12 {
                    for len in [1, 100, 4096, 65_536, 262_147, 3_000_000] {
                        // The largest twice only.
                        if len < MIB || round < 2 {
                            loops(guest, n << 32 | round << 24 | len, len);
                        }
                    }
                }
            });
        }
    });
    rig.no_faults();
}

#[test]
fn a_guest_that_aims_at_memory_of_others_is_refused_and_named() {
    let rig = Rig::new();
    let (a, _a) = guest(&rig, "A", "axidma0", 1);
    let (b, _b) = guest(&rig, "B", "axidma1", 2);
    let pages_of = |guest: &Guest| -> Vec<u64> {
        let backing = guest.vm().memory()[0].backing.clone();
        backing.iter().map(|range| range.pa.get() + range.len / 2).collect()
    };
    // Pages of B; pages of A itself by their host address; pages all over the board.
    let mut targets: Vec<u64> = pages_of(&b).into_iter().step_by(8).collect();
    targets.extend(pages_of(&a).into_iter().step_by(64));
    targets.extend((0..0x2000_0000).step_by(8 << 20));
    let aim = Aim::new(&rig.system, &a, 0).unwrap();
    for (n, target) in (0..).zip(targets) {
        for write in [false, true] {
            let attempt = aim.attempt(target, Pa(target), write);
            assert_eq!(attempt, Attempt { refused: true, got_through: false }, "{target:#x} {write}");
            let fault = rig.fault();
            assert_eq!((fault.name.as_deref(), fault.report.iova), (Some("axidma0"), Iova(target)));
            assert_eq!((fault.report.stage, fault.report.reason), (Some(2), FaultReason::Translation));
            assert_eq!(fault.report.access, if write { Access::Write } else { Access::Read });
        }
        if n % 16 == 0 {
            loops(&b, n, 64 * KIB);
        }
    }
    drop(aim);
    loops(&a, 5, MIB);
    loops(&b, 6, MIB);
    rig.no_faults();
}

#[test]
fn a_machine_that_dies_in_the_middle_leaves_nothing_for_the_next_one() {
    const LEN: u64 = 3 * MIB;
    let rig = Rig::new();
    let (a, assignment) = guest(&rig, "A", "axidma0", 1);
    loops(&a, 1, 64 * KIB);
    let registers = a.vm().bus().window(Ipa(a.cores()[0].base), 0x1000).unwrap();
    let memory = a.vm().guest_memory().clone();
    let [from, to] = [(); 2].map(|()| memory.alloc(LEN as usize, PAGE as usize).unwrap());
    memory.write(from.pa, &[0x5e; LEN as usize]);
    let dma = a.cores()[0].stack.dma();
    let source = dma.map_single(from.pa, LEN, Way::ToDevice, NONE).unwrap();
    let target = dma.map_single(to.pa, LEN, Way::FromDevice, NONE).unwrap();
    let _running = a.cores()[0].stack.begin(&[segment(target, LEN)], &[segment(source, LEN)]).unwrap();
    for _ in 0..3 {
        rig.machine().step();
    }
    let mut seen = vec![0; LEN as usize];
    memory.read(to.pa, &mut seen);
    let arrived = seen.iter().filter(|b| **b == 0x5e).count() as u64;
    assert!(0 < arrived && arrived < LEN, "{arrived} bytes");
    assert_eq!(registers.read32(0x00) & 1, 1, "it runs");
    let pages: Vec<_> = a.vm().memory()[0].backing.clone();
    a.vm().kill();
    assert_eq!((registers.read32(0x00), registers.read32(0x04)), (u32::MAX, u32::MAX));
    let dead = rig.system.os().passthrough().assign("axidma1", a.vm().clone(), AssignOptions::default());
    assert!(matches!(dead, Err(VfioError::Vm(_) | VfioError::NotBound { .. })), "{dead:?}");

    let reaped = rig.system.os().passthrough().reap();
    assert_eq!(reaped, [("axidma0".to_string(), "A".to_string(), Ok(()))]);
    assert!(assignment.is_released() && rig.system.os().passthrough().assignments().is_empty());
    let own = rig.machine().engine_registers(rig.machine().engine("axidma0").unwrap());
    for block in [0x00, 0x30] {
        assert_eq!(own.read32(block) & 0x7001, 0, "stopped and masked");
        assert_eq!(own.read32(block + 4) & 0x7001, 1, "halted, nothing pending");
    }
    registers.write32(0x00, 0x7001);
    assert_eq!(own.read32(0x00) & 0x7001, 0, "the old machine's registers are dead");
    rig.machine().run_for(1_000_000);
    rig.no_faults();
    // The last handles go.
    drop((a, assignment, memory, registers, _running));
    for range in &pages {
        assert!(rig.get(range.pa, range.len).iter().all(|b| *b == 0), "{range:?} was not zeroed");
    }
    assert_eq!(rig.system.os().registry().owner("axidma0"), Ok(Owner::Vfio));

    let (c, _c) = guest(&rig, "C", "axidma0", 3);
    let again = c.vm().memory()[0].backing.iter().filter(|range| pages.contains(range)).count();
    assert!(again > 0, "memory is used again");
    // No stray byte of A waits in the core.
    let buffer = c.cores()[0].stack.dma().alloc_coherent(4 * KIB).unwrap();
    let waited = c.cores()[0].stack.receive(&[segment(buffer.iova(), 4 * KIB)], c.clock(), 2_000);
    assert!(matches!(waited, Err(WaitError::Timeout { residue: 4096, .. })), "{waited:?}");
    loops(&c, 9, LEN);
    rig.no_faults();
}

#[test]
fn a_released_core_is_the_host_s_again() {
    let rig = Rig::new();
    rig.loops(0, 64 * KIB);
    for seed in 0..3 {
        let (a, assignment) = guest(&rig, "A", "axidma0", seed);
        let registers = a.vm().bus().window(Ipa(a.cores()[0].base), 0x1000).unwrap();
        loops(&a, seed, 256 * KIB);
        let os = rig.system.os();
        os.passthrough().release(&assignment).unwrap();
        assert!(os.passthrough().find("axidma0").is_none());
        assert_eq!(registers.read32(0x04), u32::MAX, "its registers are gone, and it lives");
        assert!(a.vm().is_alive() && a.vm().bus().windows().is_empty());
        assert_eq!(a.vm().guest_memory().pinned_bytes(), 0);
        os.registry().unbind("axidma0").unwrap();
        os.registry().bind("axidma0", AXI_DRIVER).unwrap();
        rig.loops(0, 256 * KIB);
        // What the guest believes to be its core does nothing.
        let stack = &a.cores()[0].stack;
        assert!(loop_on(stack, &rig.clock(), 1, KIB).is_err());
        rig.loops(0, KIB);
    }
    rig.no_faults();
}

#[test]
fn two_cores_of_one_machine_share_its_memory() {
    let rig = Rig::new();
    let vm = machine(&rig, "A", 4);
    let both = [assign(&rig, &vm, "axidma0"), assign(&rig, &vm, "axidma1")];
    let guest = Guest::boot(&rig.system, &vm, &both).unwrap();
    assert!(Arc::ptr_eq(both[0].ioas(), both[1].ioas()));
    for core in guest.cores() {
        assert_eq!(loop_on(&core.stack, guest.clock(), 1, MIB), Ok(MIB));
    }
    let passthrough = rig.system.os().passthrough();
    passthrough.release(&both[0]).unwrap();
    assert_eq!(loop_on(&guest.cores()[1].stack, guest.clock(), 2, MIB), Ok(MIB));
    assert!(vm.guest_memory().pinned_bytes() == GUEST_BYTES);
    passthrough.release(&both[1]).unwrap();
    assert_eq!(vm.guest_memory().pinned_bytes(), 0);
    rig.no_faults();
}

#[test]
fn a_core_whose_client_has_its_channels_stays_the_host_s() {
    let boot = BootOptions { default_domain: DefaultDomain::Translated, ..BootOptions::default() };
    let rig = Rig::booted(description(), false, &boot);
    let registry = rig.system.os().registry();
    let refused = registry.unbind("axidma0").unwrap_err().to_string();
    assert!(refused.contains("dma-proxy0"), "{refused}");
    assert_eq!(registry.owner("axidma0"), Ok(Owner::Host(AXI_DRIVER.into())));
    registry.unbind("dma-proxy0").unwrap();
    registry.unbind("axidma0").unwrap();
    let error = registry.bind("dma-proxy0", PROXY_DRIVER).unwrap_err();
    assert!(matches!(error, VfioError::Driver { action: "probe", .. }), "{error}");
    registry.bind("axidma0", AXI_DRIVER).unwrap();
    registry.bind("dma-proxy0", PROXY_DRIVER).unwrap();
    rig.loops(0, 64 * KIB);
}

#[test]
fn a_group_is_taken_whole_or_not_at_all() {
    // Proxy 1, which uses core 1, is said to have a stream of core 0.
    let mut boot = BootOptions { default_domain: DefaultDomain::Translated, ..BootOptions::default() };
    boot.streams.insert("dma-proxy1".into(), vec![0xe81]);
    let rig = Rig::booted(description(), false, &boot);
    let (registry, passthrough) = (rig.system.os().registry(), rig.system.os().passthrough());
    registry.unbind("dma-proxy0").unwrap();
    registry.unbind("axidma0").unwrap();
    registry.bind("axidma0", VFIO_DRIVER).unwrap();
    let vm = machine(&rig, "A", 1);
    let error = passthrough.assign("axidma0", vm.clone(), AssignOptions::default()).unwrap_err();
    let VfioError::NotViable { device, users, .. } = &error else { panic!("{error}") };
    assert_eq!((device.as_str(), users.len()), ("axidma0", 1));
    assert_eq!((users[0].device.as_str(), users[0].driver.as_deref()), ("dma-proxy1", Some(PROXY_DRIVER)));
    assert_eq!(users[0].shared, [StreamMatch::exact(0xe81)]);
    assert!(error.to_string().contains("dma-proxy1 is bound to dma_proxy and shares stream"), "{error}");
    // Nothing has changed: the host can have it again.
    assert!(passthrough.assignments().is_empty());
    registry.unbind("dma-proxy1").unwrap();
    let assignment = passthrough.assign("axidma0", vm.clone(), AssignOptions::default()).unwrap();
    assert_eq!(assignment.group().devices().count(), 3, "the core and both proxies");
    // While the group is away, the host gets none of it.
    let taken = registry.bind("dma-proxy0", PROXY_DRIVER).unwrap_err();
    assert!(matches!(taken, VfioError::GroupTaken { .. }), "{taken}");
    let taken = registry.unbind("axidma0").unwrap_err();
    assert!(matches!(taken, VfioError::GroupTaken { .. }), "{taken}");
    let again = passthrough.assign("axidma0", vm, AssignOptions::default()).unwrap_err();
    assert!(matches!(&again, VfioError::Assigned { vm, .. } if vm == "A"), "{again}");
}

#[test]
fn what_cannot_be_stopped_or_confined_is_not_given_away() {
    let mut boot = options();
    boot.streams.insert("axidma1".into(), vec![]);
    boot.unbound.insert("axidma1".into());
    let rig = Rig::booted(description(), false, &boot);
    let (registry, passthrough) = (rig.system.os().registry(), rig.system.os().passthrough());
    let vm = machine(&rig, "A", 1);
    let assign = |name: &str| passthrough.assign(name, vm.clone(), AssignOptions::default()).unwrap_err();
    assert!(
        matches!(registry.bind("axidma1", VFIO_DRIVER), Err(VfioError::NoIommu(name)) if name == "axidma1")
    );
    // A proxy has no hardware and so no reset driver.
    assert!(matches!(registry.bind("dma-proxy0", VFIO_DRIVER), Err(VfioError::NoResetFunction { .. })));
    assert!(matches!(registry.bind("axidma0", VFIO_DRIVER), Err(VfioError::Bound { .. })));
    assert!(matches!(assign("axidma0"), VfioError::NotBound { .. }));
    assert!(matches!(assign("axidma7"), VfioError::UnknownDevice(_)));
    registry.unbind("axidma0").unwrap();
    registry.bind("axidma0", VFIO_DRIVER).unwrap();
    let too_much = AssignOptions {
        limits: portcullis_vfio::Limits { pinned_bytes: MIB, ..Default::default() },
        ..AssignOptions::default()
    };
    let error = passthrough.assign("axidma0", vm.clone(), too_much).unwrap_err();
    assert!(matches!(error, VfioError::Ioas(_)), "{error}");
    vm.kill();
    assert!(matches!(assign("axidma0"), VfioError::Vm(_)));
    // After all these refusals it can still be had, and the host can have it back.
    assert_eq!(vm.guest_memory().pinned_bytes(), 0);
    registry.unbind("axidma0").unwrap();
    registry.bind("axidma0", AXI_DRIVER).unwrap();
    rig.loops(0, 64 * KIB);
}

/// A machine with a core behind a virtual IOMMU of its own.
struct Nested {
    rig: Rig,
    vm: Arc<BoardVm>,
    assignment: Arc<Assignment>,
    host: Arc<dyn ViommuHost>,
    core: IommuCore,
    instance: InstanceId,
    device: DeviceId,
}

type GuestDriver =
    AxiDma<portcullis_vfio::GuestMmio, BoardGuestMemory, portcullis_board::os::clock::SleepingClock>;

impl Nested {
    /// `default` is what the guest does with devices that nobody has attached.
    fn new(default: DefaultDomain) -> Self {
        let rig = Rig::new();
        let vm = machine(&rig, "A", 1);
        let options = AssignOptions { viommu: true, ..AssignOptions::default() };
        let assignment = assign_with(&rig, &vm, "axidma0", options);
        let host = assignment.viommu().unwrap();
        let core = IommuCore::new(default);
        let ops = GuestIommu::new(host.clone(), vm.guest_memory().clone()).unwrap();
        let instance = core.register("viommu", ops);
        let streams = host.endpoints().into_iter().map(StreamMatch::exact).collect();
        let device = core.add_device("dma", instance, &FwSpec { streams }, &[]).unwrap();
        Self { rig, vm, assignment, host, core, instance, device }
    }

    fn registers(&self) -> portcullis_vfio::GuestMmio {
        let [region] = self.assignment.regions().try_into().unwrap();
        self.vm.bus().window(region.ipa, region.size).unwrap()
    }

    /// The guest's driver with addresses of its default domain.
    fn stack(&self) -> AxiStack<BoardGuestMemory> {
        let domain = self.core.domain_of(self.device).unwrap();
        let space = DmaSpace::new(domain, SpaceConfig::default()).unwrap();
        let config = DeviceConfig { max_segment: u64::MAX, ..DeviceConfig::default().mask(64) };
        let dma = DmaDevice::translated("dma", space, self.vm.guest_memory().clone(), config);
        let node = &self.rig.machine().description().axi_dmas[0];
        let clock = Arc::new(self.rig.clock());
        AxiStack::new("dma", node, Arc::new(self.registers()), clock, dma).unwrap()
    }

    fn process(&self) -> Arc<Process<BoardGuestMemory>> {
        let info = self.host.info();
        let config = ProcessConfig {
            granule: info.smallest_granule(),
            pa_bits: info.ipa_bits,
            coherent_walk: info.coherent_walk,
            ..ProcessConfig::default()
        };
        Process::new(self.vm.guest_memory().clone(), config).unwrap()
    }

    /// A driver whose descriptors and buffers are the process's, at its virtual addresses.
    fn driver(&self, process: &Process<BoardGuestMemory>) -> GuestDriver {
        let channel = || {
            let va = process.mmap(PAGE, Prot::RW).unwrap();
            let block = Block { pa: process.lookup(va).unwrap(), len: pool_bytes(32) };
            let pool = Some(DescriptorPool { block, iova: va });
            Some(ChannelConfig { pool, include_dre: true, ..ChannelConfig::default() })
        };
        let (mm2s, s2mm) = (channel(), channel());
        let config = Config { address_bits: 64, length_bits: 26, mm2s, s2mm, ..Config::default() };
        let memory = self.vm.guest_memory().clone();
        GuestDriver::new("dma", self.registers(), memory, self.rig.clock(), config).unwrap()
    }

    /// Moves bytes between virtual addresses: receiver's end, sender's end.
    fn copy(&self, driver: &GuestDriver, to: Iova, from: Iova, len: u64) -> (State, State) {
        let start = |direction: Direction, at| {
            let channel = driver.channel(direction).unwrap();
            let descriptor = channel.prep_slave_sg(&pieces(at, len, 2 * KIB), direction).unwrap();
            let cookie = channel.submit(descriptor, None).unwrap();
            channel.issue_pending();
            cookie
        };
        let cookies = [start(Direction::DevToMem, to), start(Direction::MemToDev, from)];
        let channels = [Direction::DevToMem, Direction::MemToDev].map(|d| driver.channel(d).unwrap());
        for _ in 0..20 {
            self.rig.clock().delay_us(50);
            // The receiver first: where both were refused, its error came first.
            for channel in channels {
                channel.handle_irq();
            }
        }
        let ends = [0, 1].map(|i| channels[i].status(cookies[i]).state);
        for channel in channels {
            channel.terminate().unwrap();
        }
        (ends[0], ends[1])
    }

    /// What the guest's own IOMMU driver hears.
    fn guest_faults(&self) -> Vec<portcullis_iommu::RoutedFault> {
        self.rig.system.take_interrupts();
        self.core.handle_irq(self.instance).unwrap();
        self.core.take_faults().faults
    }
}

const DONE: (State, State) = (State::Complete, State::Complete);

fn failed(access: BusAccess, at: Iova) -> State {
    State::Failed(TransferError::Bus { access, response: BusResponse::Slave, at })
}

#[test]
fn a_guest_translates_its_core_s_addresses_by_itself() {
    let nested = Nested::new(DefaultDomain::Translated);
    let stack = nested.stack();
    for len in [1, 4097, MIB] {
        assert_eq!(loop_on(&stack, &nested.rig.clock(), len, len), Ok(len));
    }
    // Unmapped by the guest: refused by the guest's stage, and the guest is told.
    let dma = stack.dma();
    let buffer = dma.alloc_coherent(4 * KIB).unwrap();
    let source = buffer.iova();
    let target = dma.alloc_coherent(4 * KIB).unwrap();
    let run = |from| {
        let running = stack.begin(&[segment(target.iova(), KIB)], &[segment(from, KIB)]).unwrap();
        running.wait(&nested.rig.clock(), PATIENCE_US)
    };
    assert_eq!(run(source), Ok(KIB));
    buffer.free().unwrap();
    assert_eq!(run(source), Err(refused(BusAccess::Read, source)));
    let line = nested.host.info().line.unwrap();
    let faults = nested.guest_faults();
    assert!(nested.vm.lines().take().contains(&line), "by an interrupt");
    let [fault] = faults.as_slice() else { panic!("{faults:#?}") };
    assert_eq!((fault.name.as_deref(), fault.report.iova), (Some("dma"), source));
    assert_eq!((fault.report.stage, fault.report.reason), (Some(1), FaultReason::Translation));
    assert_eq!(loop_on(&stack, &nested.rig.clock(), 3, 64 * KIB), Ok(64 * KIB));
}

#[test]
fn a_guest_process_gives_its_own_addresses_to_the_core() {
    let nested = Nested::new(DefaultDomain::Blocked);
    let process = nested.process();
    let domain = nested.core.bind(nested.device, process.clone()).unwrap();
    assert_eq!(process.domains().len(), 1);
    let driver = nested.driver(&process);
    let [from, to] = [(); 2].map(|()| process.mmap(16 * KIB, Prot::RW).unwrap());
    for round in 0..4 {
        let data = pattern(round, 16 * KIB);
        process.write(from, &data).unwrap();
        process.clean(from, 16 * KIB as usize).unwrap();
        assert_eq!(nested.copy(&driver, to, from, 16 * KIB), DONE, "{:#?}", nested.rig.faults());
        process.invalidate(to, 16 * KIB as usize).unwrap();
        let mut seen = vec![0; 16 * KIB as usize];
        process.read(to, &mut seen).unwrap();
        assert!(seen == data);
    }
    // The process unmaps, and the very next access is refused.
    process.munmap(from).unwrap();
    let (received, sent) = nested.copy(&driver, to, from, 16 * KIB);
    assert_eq!(sent, failed(BusAccess::Read, from), "{received:?}");
    let faults = nested.guest_faults();
    let told = |f: &portcullis_iommu::RoutedFault| (f.report.iova, f.report.stage);
    assert!(!faults.is_empty() && faults.iter().all(|f| told(f) == (from, Some(1))), "{faults:#?}");
    // And what it maps anew is there without further words.
    let other = process.mmap(16 * KIB, Prot::RW).unwrap();
    process.write(other, &pattern(9, 16 * KIB)).unwrap();
    process.clean(other, 16 * KIB as usize).unwrap();
    assert_eq!(nested.copy(&driver, to, other, 16 * KIB), DONE);
    // When it exits, its devices are blocked.
    drop(domain);
    process.exit().unwrap();
    let (received, sent) = nested.copy(&driver, to, other, 16 * KIB);
    assert!(matches!(sent, State::Failed(_)) && received != State::Complete, "{received:?} {sent:?}");
}

#[test]
fn a_guest_that_maps_what_is_not_its_own_meets_stage_2() {
    let nested = Nested::new(DefaultDomain::Translated);
    let stack = nested.stack();
    let secret = nested.rig.buffer(0, PAGE);
    nested.rig.put(secret.pa, &[0x5e; PAGE as usize]);
    let domain = nested.core.domain_of(nested.device).unwrap();
    let theirs = Iova(0x10_0000);
    domain.map(theirs, secret.pa, PAGE, Prot::RW).unwrap();
    let buffer = stack.dma().alloc_coherent(4 * KIB).unwrap();
    let run = |to, from| {
        let running = stack.begin(&[segment(to, KIB)], &[segment(from, KIB)]).unwrap();
        running.wait(&nested.rig.clock(), PATIENCE_US).unwrap_err()
    };
    let told = |access| {
        let fault = nested.rig.fault();
        assert_eq!(
            (fault.name.as_deref(), fault.report.stage),
            (Some("axidma0"), Some(2)),
            "{}",
            fault.report
        );
        assert_eq!((fault.report.iova, fault.report.ipa), (theirs, Some(Ipa(secret.pa.get()))));
        assert_eq!(fault.report.access, access);
        assert!(nested.guest_faults().is_empty(), "stage 2 is none of the guest's business");
    };
    assert_eq!(run(buffer.iova(), theirs), refused(BusAccess::Read, theirs));
    told(Access::Read);
    assert_eq!(run(theirs, buffer.iova()), refused(BusAccess::Write, theirs));
    told(Access::Write);
    assert!(nested.rig.get(secret.pa, PAGE).iter().all(|b| *b == 0x5e));
    assert_eq!(loop_on(&stack, &nested.rig.clock(), 3, 64 * KIB), Ok(64 * KIB));

    // Tables in memory of others: not even a descriptor of them is read.
    let root = domain.table_root().unwrap();
    let forged = ViommuTable::Stage1(TableRoot { ttbr0: secret.pa, ..root });
    nested.host.set_table(0, forged).unwrap();
    let at = buffer.iova();
    assert!(matches!(run(at, at), WaitError::Failed { .. } | WaitError::Timeout { .. }));
    let fault = nested.rig.faults().into_iter().next().unwrap();
    assert_eq!((fault.name.as_deref(), fault.report.stage), (Some("axidma0"), Some(2)), "{}", fault.report);
    assert_eq!(fault.report.ipa.map(|ipa| ipa.get() & !(PAGE - 1)), Some(secret.pa.get()));
    nested.host.set_table(0, ViommuTable::Stage1(root)).unwrap();
    assert_eq!(loop_on(&stack, &nested.rig.clock(), 4, 64 * KIB), Ok(64 * KIB));
}

#[test]
fn the_same_guest_boots_with_an_iommu_of_its_own() {
    let rig = Rig::new();
    let vm = machine(&rig, "A", 1);
    let options = AssignOptions { viommu: true, ..AssignOptions::default() };
    let assignment = assign_with(&rig, &vm, "axidma0", options);
    let guest = Guest::boot(&rig.system, &vm, &[assignment]).unwrap();
    let core = &guest.cores()[0];
    let side = core.iommu.as_ref().unwrap();
    for len in [1, 64 * KIB, 3_000_000] {
        loops(&guest, len, len);
    }
    // Guest physical addresses mean nothing to the core now, and the guest hears of it by its own interrupt.
    let buffer = core.stack.dma().alloc_coherent(4 * KIB).unwrap();
    let physical = Iova(buffer.pa(0).unwrap().get());
    assert_ne!(physical, buffer.iova());
    let running = core.stack.begin(&[segment(buffer.iova(), KIB)], &[segment(physical, KIB)]).unwrap();
    assert_eq!(running.wait(guest.clock(), PATIENCE_US), Err(refused(BusAccess::Read, physical)));
    guest.clock().delay_us(1000);
    let faults = side.core.take_faults().faults;
    let [fault] = faults.as_slice() else { panic!("{faults:#?}") };
    assert_eq!((fault.device, fault.report.iova), (Some(side.device), physical));
    loops(&guest, 7, 64 * KIB);
}

#[test]
fn a_guest_s_iommu_ends_with_its_assignment() {
    let nested = Nested::new(DefaultDomain::Translated);
    let stack = nested.stack();
    assert_eq!(loop_on(&stack, &nested.rig.clock(), 1, KIB), Ok(KIB));
    let root = nested.core.domain_of(nested.device).unwrap().table_root().unwrap();
    nested.rig.system.os().passthrough().release(&nested.assignment).unwrap();
    let gone = nested.host.set_table(0, ViommuTable::Stage1(root));
    assert_eq!(gone, Err(portcullis_vfio::ViommuError::Gone));
    assert_eq!(nested.host.invalidate(0, None), Err(portcullis_vfio::ViommuError::Gone));
    let registry = nested.rig.system.os().registry();
    registry.unbind("axidma0").unwrap();
    registry.bind("axidma0", AXI_DRIVER).unwrap();
    nested.rig.loops(0, 64 * KIB);
    nested.rig.no_faults();
}
