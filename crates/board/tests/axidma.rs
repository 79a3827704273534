//! The AXI DMA driver on the model of the core, with the real SMMUv2 and its driver in between: what a client sees of loops,
//! rings, interrupts and faults, on a board where nothing snoops.

mod axidma_rig;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use axidma_rig::{
    Buffer, KIB, MIB, NONE, PAGE, Rig, complete, description, options, pattern, pieces, segment,
};
use portcullis_arch::{Access, Iova};
use portcullis_board::os::stack::{AxiStack, StackError};
use portcullis_board::sim::{Clock, Memory, Registers};
use portcullis_board::system::BootOptions;
use portcullis_bus::coherency::Maintenance;
use portcullis_drivers::axidma::{AxiDma, ChannelConfig, Config, pool_bytes};
use portcullis_drivers::dmaengine::{
    BusAccess, BusResponse, Callback, ChannelError, Completion, Cookie, DescriptorPool, Direction,
    DmaChannel, Segment, State, TransferError, WaitError,
};
use portcullis_drivers::fault::FaultReason;
use portcullis_hal::{Block, DmaMemory as _};
use portcullis_iommu::dma::{
    DeviceConfig, Direction as Way, DmaAttrs, DmaDevice, DmaSpace, SgEntry, SgMapping, SpaceConfig,
};
use portcullis_iommu::{DomainSpec, FaultModel, Paging, Prot};

/// Interrupt lines of core 0.
const TX_LINE: u32 = 89;
const RX_LINE: u32 = 90;
const TX: Direction = Direction::MemToDev;
const RX: Direction = Direction::DevToMem;

/// What became of transactions, in the order in which their owner heard of it.
type Heard = Arc<Mutex<Vec<Completion>>>;

fn listen(heard: &Heard) -> Option<Callback> {
    let heard = heard.clone();
    Some(Box::new(move |completion| heard.lock().unwrap().push(*completion)))
}

fn send(channel: &dyn DmaChannel, segments: &[Segment], callback: Option<Callback>) -> Cookie {
    let descriptor = channel.prep_slave_sg(segments, channel.caps().direction.unwrap()).unwrap();
    channel.submit(descriptor, callback).unwrap()
}

#[test]
fn bytes_of_any_number_come_back_as_they_were() {
    let rig = Rig::new();
    for len in [1, 2, 63, 64, 65, 100, 1023, 4095, 4096, 4097, 16 * KIB, 65_535, 1_000_003, 3 * MIB] {
        rig.loops(0, len);
        rig.loops(1, len);
    }
    rig.no_faults();
    assert_eq!(rig.core(0).dma().bounced_bytes(), 0);
}

#[test]
fn a_core_with_short_length_fields_uses_many_descriptors() {
    let rig = Rig::with(|d| {
        d.axi_dmas[0].length_bits = 14;
        d.axi_dmas[1].length_bits = 8;
    });
    // 193 descriptors each way, and as many as the ring has.
    assert_eq!(rig.tx(0).caps().max_segment, 16 * KIB - 64);
    rig.loops(0, 3 * MIB);
    assert_eq!((rig.rx(1).caps().max_segment, rig.rx(1).caps().max_segments), (192, 512));
    rig.loops(1, 192 * 512);
    let too_long = rig.tx(1).prep_slave_sg(&[segment(Iova(0x1000), 192 * 512 + 1)], Direction::MemToDev);
    assert_eq!(too_long.unwrap_err(), ChannelError::TooManySegments { needed: 513, max: 512 });
    // The ring goes round.
    for len in [192 * 300, 192 * 300 + 1, 5, 192 * 511] {
        rig.loops(1, len);
    }
}

#[test]
fn buffers_of_any_alignment_work_with_the_realignment_engine() {
    let rig = Rig::new();
    for (from, to, len) in [(1, 0, 5000), (0, 1, 5000), (3, 7, 1), (4095, 4093, 9000), (61, 62, 64)] {
        let flight = rig.begin(0, (from, to), len);
        assert_eq!((flight.source.get() % PAGE, flight.target.get() % PAGE), (from, to));
        rig.end(flight);
    }
    rig.no_faults();
}

#[test]
fn without_the_realignment_engine_unaligned_buffers_are_refused() {
    let rig = Rig::with(|d| {
        for channel in d.axi_dmas.iter_mut().flat_map(|core| core.channels.iter_mut().flatten()) {
            channel.realigns = false;
        }
        // Nor does a core that is wider than 64 bits realign.
        for channel in d.axi_dmas[1].channels.iter_mut().flatten() {
            (channel.realigns, channel.data_width) = (true, 128);
        }
    });
    for (core, align) in [(0, 4), (1, 16)] {
        assert_eq!(rig.tx(core).caps().align, align);
        let bad = Iova(0x1000 + align / 2);
        let refused = rig.tx(core).prep_slave_sg(&[segment(bad, 64)], Direction::MemToDev);
        assert_eq!(refused.unwrap_err(), ChannelError::Alignment { address: bad, align });
        let flight = rig.begin(core, (align, 3 * align), 4 * KIB + 1);
        rig.end(flight);
    }
}

/// Pages of the board in an order that has no neighbours, and what is on them.
fn scattered(rig: &Rig, pages: u64, from: u64, len: u64) -> (Block, Vec<SgEntry>) {
    let block = rig.memory().alloc((pages * PAGE) as usize, PAGE as usize).unwrap();
    let order = (0..pages).map(|i| i * 7 % pages);
    let entries = order.map(|page| SgEntry { pa: block.pa.wrapping_add(page * PAGE + from), len });
    (block, entries.collect())
}

#[test]
fn scattered_pages_are_one_buffer_behind_the_smmu() {
    let rig = Rig::new();
    let dma = rig.core(0).dma().clone();
    let (_, from) = scattered(&rig, 32, 0, PAGE);
    let (_, to) = scattered(&rig, 32, 0, PAGE);
    let data = pattern(7, 32 * PAGE);
    for (entry, bytes) in from.iter().zip(data.chunks(PAGE as usize)) {
        rig.put(entry.pa, bytes);
    }
    let out = dma.map_sg(&from, Way::ToDevice, NONE).unwrap();
    let into = dma.map_sg(&to, Way::FromDevice, NONE).unwrap();
    assert_eq!((out.segments().len(), into.segments().len()), (1, 1));
    let one = |sg: &SgMapping| segment(sg.segments()[0].iova, sg.len());
    let running = rig.core(0).begin(&[one(&into)], &[one(&out)]).unwrap();
    assert_eq!(running.wait(&rig.clock(), 1_000_000), Ok(32 * PAGE));
    dma.unmap_sg(out, Way::ToDevice, NONE).unwrap();
    dma.unmap_sg(into, Way::FromDevice, NONE).unwrap();
    let seen: Vec<u8> = to.iter().flat_map(|entry| rig.get(entry.pa, PAGE)).collect();
    assert!(seen == data);
}

#[test]
fn fragments_of_odd_sizes_are_gathered_into_one_packet() {
    let rig = Rig::new();
    let dma = rig.core(0).dma().clone();
    // Parts of pages: they cannot be joined.
    let (_, from) = scattered(&rig, 24, 13, 1501);
    let data = pattern(8, 24 * 1501);
    for (entry, bytes) in from.iter().zip(data.chunks(1501)) {
        rig.put(entry.pa, bytes);
    }
    let out = dma.map_sg(&from, Way::ToDevice, NONE).unwrap();
    assert_eq!(out.segments().len(), 24);
    let (to, target) = rig.map(&dma, data.len() as u64, Way::FromDevice);
    let list: Vec<Segment> = out.segments().iter().map(|s| segment(s.iova, s.len)).collect();
    let running = rig.core(0).begin(&[segment(target, to.len)], &list).unwrap();
    assert_eq!(running.wait(&rig.clock(), 1_000_000), Ok(to.len));
    dma.unmap_sg(out, Way::ToDevice, NONE).unwrap();
    dma.unmap_single(target, to.len, Way::FromDevice, NONE).unwrap();
    assert!(rig.get(to.pa, to.len) == data && rig.guards_hold(&to));
}

#[test]
fn without_an_smmu_scattered_pages_are_a_list_of_descriptors() {
    let rig = Rig::with(|d| d.smmus[0].node.available = false);
    let dma = rig.core(0).dma().clone();
    let (_, from) = scattered(&rig, 32, 0, PAGE);
    let data = pattern(9, 32 * PAGE);
    for (entry, bytes) in from.iter().zip(data.chunks(PAGE as usize)) {
        rig.put(entry.pa, bytes);
    }
    let out = dma.map_sg(&from, Way::ToDevice, NONE).unwrap();
    assert_eq!(out.segments().len(), 32);
    let list: Vec<Segment> = out.segments().iter().map(|s| segment(s.iova, s.len)).collect();
    assert_eq!(list[0].address, Iova(from[0].pa.get()), "addresses are physical");
    let (to, target) = rig.map(&dma, 32 * PAGE, Way::FromDevice);
    let running = rig.core(0).begin(&[segment(target, to.len)], &list).unwrap();
    assert_eq!(running.wait(&rig.clock(), 1_000_000), Ok(to.len));
    assert!(rig.get(to.pa, to.len) == data);
}

#[test]
fn both_cores_work_at_the_same_time() {
    let rig = Rig::new();
    for len in [65, 64 * KIB, MIB] {
        let flights = [rig.begin(0, (0, 0), len), rig.begin(1, (0, 0), len)];
        rig.machine().step();
        for flight in &flights {
            let (sent, received) = flight.running.status();
            // The clock has not let anybody take an interrupt yet.
            assert_eq!((sent.state, received.state), (State::Running, State::Running));
        }
        rig.settle();
        for flight in flights {
            assert_eq!(flight.running.status(), (complete(len), complete(len)));
            rig.end(flight);
        }
    }
    rig.no_faults();
}

#[test]
fn transactions_wait_for_issue_and_then_run_in_order() {
    let rig = Rig::new();
    let (tx, rx, dma) = (rig.tx(0), rig.rx(0), rig.core(0).dma().clone());
    // More than one batch of 255, and nearly the whole ring.
    const COUNT: u64 = 500;
    let (from, source) = rig.map(&dma, COUNT * 64, Way::ToDevice);
    let (to, target) = rig.map(&dma, COUNT * 64, Way::FromDevice);
    let heard: [Heard; 2] = Default::default();
    let submit = |n: u64| {
        let at = n * 64;
        let into = send(&*rx, &[segment(target.wrapping_add(at), 64)], listen(&heard[1]));
        (send(&*tx, &[segment(source.wrapping_add(at), 64)], listen(&heard[0])), into)
    };
    let cookies: Vec<_> = (0..COUNT).map(submit).collect();
    rig.settle();
    for (sent, received) in &cookies {
        assert_eq!(tx.status(*sent).state, State::Queued);
        assert_eq!(rx.status(*received).state, State::Queued);
    }
    let full = tx.prep_slave_sg(&pieces(source, 13 * 64, 64), TX).unwrap();
    let refused = tx.submit(full, None);
    assert_eq!(refused.unwrap_err(), ChannelError::NoDescriptors { needed: 13, free: 12 });
    rx.issue_pending();
    tx.issue_pending();
    rig.settle();
    for (heard, cookies) in heard
        .iter()
        .zip([cookies.iter().map(|c| c.0).collect::<Vec<_>>(), cookies.iter().map(|c| c.1).collect()])
    {
        let heard = heard.lock().unwrap();
        assert!(heard.iter().all(|c| c.result == Ok(()) && c.transferred == 64 && !c.ongoing));
        assert_eq!(heard.iter().map(|c| c.cookie).collect::<Vec<_>>(), cookies);
    }
    dma.unmap_single(target, to.len, Way::FromDevice, NONE).unwrap();
    assert!(rig.get(to.pa, to.len) == rig.get(from.pa, from.len));
    rig.no_faults();
}

#[test]
fn a_batch_of_packets_is_one_interrupt_of_the_sender() {
    let rig = Rig::new();
    let (tx, rx, dma) = (rig.tx(0), rig.rx(0), rig.core(0).dma().clone());
    let (_, source) = rig.map(&dma, 10 * KIB, Way::ToDevice);
    let (_, target) = rig.map(&dma, 10 * KIB, Way::FromDevice);
    let rises = |line| rig.machine().tracer().lines().rises(line);
    let before = (rises(TX_LINE), rises(RX_LINE));
    for n in 0..10 {
        send(&*rx, &[segment(target.wrapping_add(n * KIB), KIB)], None);
        send(&*tx, &[segment(source.wrapping_add(n * KIB), KIB)], None);
    }
    rx.issue_pending();
    tx.issue_pending();
    rig.settle();
    assert!(rig.core(0).driver().is_idle());
    assert_eq!(rises(TX_LINE) - before.0, 1, "the threshold is the number of packets");
    assert!((1..=10).contains(&(rises(RX_LINE) - before.1)), "each packet may be the last");
}

/// A driver that a test makes for itself.
type OwnDriver = AxiDma<Registers, Memory, Clock>;

#[test]
fn the_delay_interrupt_tells_of_packets_that_are_fewer_than_the_threshold() {
    let mut boot: BootOptions = options();
    boot.unbound.insert("axidma0".into());
    let rig = Rig::booted(description(), false, &boot);
    let (machine, host) = (rig.machine(), rig.system.os().host());
    let dma = host.dma_device("axidma0", rig.system.device("axidma0"), false, 64).unwrap();
    let pools = [(); 2].map(|()| dma.alloc_coherent(pool_bytes(16) as u64).unwrap());
    let channel = |i: usize, irq_delay| {
        let block = Block { pa: pools[i].pa(0).unwrap(), len: pool_bytes(16) };
        let pool = Some(DescriptorPool { block, iova: pools[i].iova() });
        Some(ChannelConfig { pool, irq_delay, include_dre: true, ..ChannelConfig::default() })
    };
    // 40 times 125 clocks of 10 ns.
    let config = Config {
        address_bits: 64,
        length_bits: 26,
        mm2s: channel(0, 0),
        s2mm: channel(1, 40),
        ..Config::default()
    };
    let registers = machine.engine_registers(machine.engine("axidma0").unwrap());
    let driver = OwnDriver::new("axidma0", registers, rig.memory(), machine.clock(), config).unwrap();
    let tx = driver.channel(TX).unwrap().clone();
    let rx = driver.channel(RX).unwrap().clone();
    for (line, channel) in [(TX_LINE, tx.clone()), (RX_LINE, rx.clone())] {
        host.interrupts.add(line, Arc::new(move || channel.handle_irq()));
    }
    let (_, source) = rig.map(&dma, 2 * KIB, Way::ToDevice);
    let (_, target) = rig.map(&dma, 3 * KIB, Way::FromDevice);
    let into: Vec<Cookie> = pieces(target, 3 * KIB, KIB).iter().map(|s| send(&*rx, &[*s], None)).collect();
    for piece in pieces(source, 2 * KIB, KIB) {
        send(&*tx, &[piece], None);
    }
    rx.issue_pending();
    tx.issue_pending();
    machine.run_for(20_000);
    rig.system.take_interrupts();
    assert_eq!(rx.status(into[0]).state, State::Running, "two packets have come, and nobody was told");
    let before = machine.tracer().now();
    rig.settle();
    assert!(machine.tracer().now() - before > 20_000, "the timer had to run out");
    assert_eq!(
        into.iter().map(|c| rx.status(*c).state).collect::<Vec<_>>(),
        [State::Complete, State::Complete, State::Running]
    );
    assert_eq!(machine.tracer().lines().rises(RX_LINE), 1);
    driver.stop().unwrap();
}

#[test]
fn cyclic_transfers_report_every_period_until_they_are_terminated() {
    let rig = Rig::new();
    let (tx, rx, dma) = (rig.tx(0), rig.rx(0), rig.core(0).dma().clone());
    const LEN: u64 = 32 * KIB;
    const PERIOD: u64 = 4 * KIB;
    let (from, source) = rig.map(&dma, LEN, Way::ToDevice);
    let (to, target) = rig.map(&dma, LEN, Way::FromDevice);
    let heard: [Heard; 2] = Default::default();
    let into = rx.prep_cyclic(target, LEN, PERIOD, RX).unwrap();
    let out = tx.prep_cyclic(source, LEN, PERIOD, TX).unwrap();
    let received = rx.submit(into, listen(&heard[1])).unwrap();
    let sent = tx.submit(out, listen(&heard[0])).unwrap();
    let another = tx.prep_slave_sg(&[segment(source, 64)], TX).unwrap();
    assert_eq!(tx.submit(another, None).unwrap_err(), ChannelError::Busy { what: "a cyclic transfer" });
    rx.issue_pending();
    tx.issue_pending();
    rig.system.run_for(200_000);
    for (channel, cookie, heard) in [(&tx, sent, &heard[0]), (&rx, received, &heard[1])] {
        let status = channel.status(cookie);
        assert_eq!(status.state, State::Running);
        let periods = heard.lock().unwrap().clone();
        assert!(periods.len() > 16, "{} periods", periods.len());
        for (n, period) in (1..).zip(&periods) {
            assert!(period.ongoing && period.result == Ok(()) && period.cookie == cookie);
            assert_eq!(period.residue, LEN - n % 8 * PERIOD, "periods come in order");
        }
        assert_eq!(status.transferred, periods.len() as u64 * PERIOD);
    }
    dma.sync_single_for_cpu(target, LEN, Way::FromDevice).unwrap();
    assert!(rig.get(to.pa, LEN) == rig.get(from.pa, LEN));

    assert_eq!((tx.terminate(), rx.terminate()), (Ok(1), Ok(1)));
    for heard in &heard {
        let last = *heard.lock().unwrap().last().unwrap();
        assert_eq!((last.result, last.ongoing), (Err(TransferError::Terminated), false));
    }
    let before = heard[0].lock().unwrap().len();
    rig.put(to.pa, &[0x11; LEN as usize]);
    rig.system.run_for(50_000);
    assert!(rig.get(to.pa, LEN).iter().all(|b| *b == 0x11), "nobody writes any more");
    assert_eq!(heard[0].lock().unwrap().len(), before);
    dma.unmap_single(source, LEN, Way::ToDevice, NONE).unwrap();
    dma.unmap_single(target, LEN, Way::FromDevice, NONE).unwrap();
    rig.loops(0, 100 * KIB);
    rig.no_faults();
}

#[test]
fn the_residue_shrinks_with_every_descriptor() {
    let rig = Rig::new();
    let (tx, dma) = (rig.tx(0), rig.core(0).dma().clone());
    let (_, source) = rig.map(&dma, 32 * KIB, Way::ToDevice);
    let (_, target) = rig.map(&dma, 32 * KIB, Way::FromDevice);
    let sent = send(&*tx, &pieces(source, 32 * KIB, 8 * KIB), None);
    assert_eq!(tx.status(sent).residue, 32 * KIB);
    tx.issue_pending();
    rig.settle();
    // Nobody receives: two descriptors fit into the FIFO.
    let status = tx.status(sent);
    assert_eq!((status.state, status.transferred, status.residue), (State::Running, 16 * KIB, 16 * KIB));
    let received = send(&*rig.rx(0), &[segment(target, 32 * KIB)], None);
    rig.rx(0).issue_pending();
    rig.settle();
    assert_eq!((tx.status(sent), rig.rx(0).status(received)), (complete(32 * KIB), complete(32 * KIB)));
}

#[test]
fn a_short_packet_ends_a_longer_receive_with_what_came() {
    let rig = Rig::new();
    let (rx, dma) = (rig.rx(0), rig.core(0).dma().clone());
    let (_, source) = rig.map(&dma, 1000, Way::ToDevice);
    let (_, target) = rig.map(&dma, 64 * KIB, Way::FromDevice);
    let received = send(&*rx, &[segment(target, 64 * KIB)], None);
    rx.issue_pending();
    send(&*rig.tx(0), &[segment(source, 1000)], None);
    rig.tx(0).issue_pending();
    rig.settle();
    let status = rx.status(received);
    assert_eq!((status.state, status.transferred, status.residue), (State::Complete, 1000, 64 * KIB - 1000));
}

#[test]
fn a_core_without_scatter_gather_moves_one_buffer_at_a_time() {
    let rig = Rig::with(|d| d.axi_dmas[0].scatter_gather = false);
    let (tx, rx, dma) = (rig.tx(0), rig.rx(0), rig.core(0).dma().clone());
    assert!(!rig.core(0).driver().has_scatter_gather() && tx.pool().is_none());
    assert!(!tx.caps().cyclic && tx.caps().max_segments == 1);
    for len in [1, 64, 4097, 64 * KIB, 3 * MIB] {
        rig.loops(0, len);
    }
    let two = tx.prep_slave_sg(&pieces(Iova(0x1000), 2 * KIB, KIB), Direction::MemToDev);
    assert_eq!(two.unwrap_err(), ChannelError::TooManySegments { needed: 2, max: 1 });
    // Several that wait are served one after the other.
    let (from, source) = rig.map(&dma, 20 * KIB, Way::ToDevice);
    let (to, target) = rig.map(&dma, 20 * KIB, Way::FromDevice);
    let cookies: Vec<_> = (0..20)
        .map(|n| {
            let into = send(&*rx, &[segment(target.wrapping_add(n * KIB), KIB)], None);
            (send(&*tx, &[segment(source.wrapping_add(n * KIB), KIB)], None), into)
        })
        .collect();
    rx.issue_pending();
    tx.issue_pending();
    rig.settle();
    for (sent, received) in cookies {
        assert_eq!((tx.status(sent), rx.status(received)), (complete(KIB), complete(KIB)));
    }
    dma.unmap_single(target, to.len, Way::FromDevice, NONE).unwrap();
    assert!(rig.get(to.pa, to.len) == rig.get(from.pa, from.len));
    // A fault is found, the core reset, and the next one works.
    dma.space().unwrap().domain().unmap(source, PAGE).unwrap();
    let failed = send(&*tx, &[segment(source, KIB)], None);
    tx.issue_pending();
    rig.settle();
    let error = TransferError::Bus { access: BusAccess::Read, response: BusResponse::Slave, at: source };
    assert_eq!(tx.status(failed).state, State::Failed(error));
    assert_eq!(rig.fault().report.iova, source);
    rig.loops(0, 64 * KIB);
}

#[test]
fn a_core_of_32_bits_gets_addresses_that_it_can_drive() {
    let rig = Rig::with(|d| d.axi_dmas[0].address_bits = 32);
    let [narrow, wide] = [0, 1].map(|core| rig.begin(core, (0, 0), MIB));
    assert!(narrow.source.get() >> 32 == 0 && narrow.target.get() >> 32 == 0, "{:#x}", narrow.source);
    assert!(rig.tx(0).pool().unwrap().iova.get() >> 32 == 0);
    assert!(wide.source.get() >> 32 != 0, "{:#x}: the other one has 64", wide.source);
    rig.end(narrow);
    rig.end(wide);
    let address = Iova(0xffff_ffc0);
    let refused = rig.tx(0).prep_slave_sg(&[segment(address, 65)], Direction::MemToDev);
    assert_eq!(refused.unwrap_err(), ChannelError::AddressRange { address, len: 65, bits: 32 });
}

#[test]
fn a_core_without_memory_for_descriptors_does_not_come_up() {
    let rig = Rig::new();
    // All of the drivers' memory is taken.
    let memory = rig.memory();
    let mut size = 1 << 28;
    while size >= 64 {
        while memory.pool().alloc(size, size).is_some() {}
        size /= 2;
    }
    let node = rig.machine().description().axi_dmas[0].clone();
    let dma = DmaDevice::direct("axidma0", memory, Default::default());
    let engine = rig.machine().engine("axidma0").unwrap();
    let registers = Arc::new(rig.machine().engine_registers(engine));
    let clock = Arc::new(rig.machine().clock());
    let stack = AxiStack::new("axidma0", &node, registers, clock, dma);
    assert!(matches!(stack.err(), Some(StackError::Pool(_))));
}

/// The masters of a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Master {
    Sg,
    Mm2s,
    S2mm,
}

/// Three transactions each way of 64 descriptors each, which is a page of descriptors. Something of the second is not mapped
/// for one of the masters.
struct Three {
    rig: Rig,
    dma: DmaDevice<Memory>,
    core: AxiStack<Memory>,
    buffers: Vec<((Buffer, Iova), (Buffer, Iova))>,
    hole: Iova,
    heard: [Heard; 2],
}

/// Bytes of each transaction, and where in the second the hole is.
const LEN: u64 = 64 * KIB;
const HOLE: u64 = 16 * KIB;

impl Three {
    /// With a driver on core 0 in a domain of this fault model.
    fn new(master: Master, model: FaultModel) -> Self {
        let mut boot: BootOptions = options();
        boot.unbound.insert("axidma0".into());
        let rig = Rig::booted(description(), false, &boot);
        let machine = rig.machine();
        let iommu = rig.system.core();
        let spec = DomainSpec::Stage1(Paging::default());
        let domain = iommu.alloc_domain_with(rig.system.iommu().unwrap(), spec, model).unwrap();
        let group = iommu.group_of(rig.system.device("axidma0").unwrap()).unwrap();
        iommu.attach_group(group, &domain).unwrap();
        let space = DmaSpace::new(domain.clone(), SpaceConfig::default()).unwrap();
        let config = DeviceConfig { max_segment: u64::MAX, ..DeviceConfig::default().mask(64) };
        let dma = DmaDevice::translated("axidma0", space, rig.memory(), config);
        let registers = Arc::new(machine.engine_registers(machine.engine("axidma0").unwrap()));
        let node = &machine.description().axi_dmas[0];
        let clock = Arc::new(machine.clock());
        let core = AxiStack::new("axidma0", node, registers, clock, dma.clone()).unwrap();
        for (number, line) in [TX_LINE, RX_LINE].into_iter().enumerate() {
            let channel = core.numbered(number as u32).unwrap();
            rig.system.os().host().interrupts.add(line, Arc::new(move || channel.handle_irq()));
        }
        let pair = || (rig.map(&dma, LEN, Way::ToDevice), rig.map(&dma, LEN, Way::FromDevice));
        let buffers: Vec<_> = (0..3).map(|_| pair()).collect();
        let ((_, source), (_, target)) = buffers[1];
        let hole = match master {
            Master::Sg => core.channel(TX).unwrap().pool().unwrap().iova.wrapping_add(PAGE),
            Master::Mm2s => source.wrapping_add(HOLE),
            Master::S2mm => target.wrapping_add(HOLE),
        };
        assert_eq!(domain.unmap(hole, PAGE), Ok(PAGE));
        Self { rig, dma, core, buffers, hole, heard: Default::default() }
    }

    /// Runs all three until nothing moves any more; what their owner heard: sent, received.
    fn run(&self) -> [Vec<Completion>; 2] {
        let [tx, rx] = [TX, RX].map(|direction| self.core.channel(direction).unwrap());
        for ((_, source), (_, target)) in &self.buffers {
            send(&*rx, &pieces(*target, LEN, KIB), listen(&self.heard[1]));
            send(&*tx, &pieces(*source, LEN, KIB), listen(&self.heard[0]));
        }
        rx.issue_pending();
        tx.issue_pending();
        self.rig.settle();
        [0, 1].map(|side| self.heard[side].lock().unwrap().clone())
    }

    /// The SMMU's fault, which is the device's and at the hole.
    fn reported(&self, master: Master) {
        let fault = self.rig.fault();
        assert_eq!(fault.name.as_deref(), Some("axidma0"));
        let (stream, access) = match master {
            Master::Sg => (0xe80, Access::Read),
            Master::Mm2s => (0xe81, Access::Read),
            Master::S2mm => (0xe82, Access::Write),
        };
        let report = fault.report;
        assert_eq!((report.stream.map(|s| s.get()), report.iova), (Some(stream), self.hole), "{report}");
        assert_eq!((report.reason, report.access), (FaultReason::Translation, access), "{report}");
    }

    /// Fills the hole and makes loops.
    fn works(&self, master: Master) {
        if master == Master::Sg {
            let pa = self.core.channel(TX).unwrap().pool().unwrap().block.pa.wrapping_add(PAGE);
            self.dma.space().unwrap().domain().map(self.hole, pa, PAGE, Prot::RW.noexec()).unwrap();
        }
        let ((from, source), (to, target)) = self.buffers[0];
        for round in 0..4 {
            let data = pattern(round, LEN);
            self.rig.put(from.pa, &data);
            let running = self.core.begin(&[segment(target, LEN)], &[segment(source, LEN)]).unwrap();
            assert_eq!(running.wait(&self.rig.clock(), 1_000_000), Ok(LEN));
            assert!(self.rig.get(to.pa, LEN) == data);
        }
        self.rig.no_faults();
    }
}

fn refused(access: BusAccess, at: Iova) -> Result<(), TransferError> {
    Err(TransferError::Bus { access, response: BusResponse::Slave, at })
}

/// In a domain that goes on after a fault (SCTLR.HUPCF), only the second is hurt.
fn only_its_transaction_fails(master: Master) {
    let three = Three::new(master, FaultModel { keep_processing: true, ..FaultModel::default() });
    let undisturbed = three.rig.begin(1, (0, 0), 3 * MIB);
    let [sent, received] = three.run();
    assert_eq!((sent.len(), received.len()), (3, 3), "{sent:?} {received:?}");
    for n in [0, 2] {
        assert_eq!((sent[n].result, received[n].result), (Ok(()), Ok(())), "{master:?} {n}");
        assert_eq!((sent[n].transferred, received[n].transferred), (LEN, LEN));
        let ((from, _), (to, _)) = three.buffers[n];
        assert!(three.rig.get(to.pa, LEN) == three.rig.get(from.pa, LEN), "{master:?}: data of {n}");
    }
    let reset = Err(TransferError::EngineReset);
    let (expected, name) = match master {
        Master::Sg => ((refused(BusAccess::Descriptor, three.hole), reset), "SGSlvErr"),
        Master::Mm2s => ((refused(BusAccess::Read, three.hole), reset), "DMASlvErr"),
        Master::S2mm => ((reset, refused(BusAccess::Write, three.hole)), "DMASlvErr"),
    };
    assert_eq!((sent[1].result, received[1].result), expected, "{master:?}");
    let (direction, failed) = if master == Master::S2mm { (RX, &received[1]) } else { (TX, &sent[1]) };
    assert_eq!(failed.transferred, if master == Master::Sg { 0 } else { HOLE });
    assert_eq!(failed.transferred + failed.residue, LEN);
    let last = three.core.channel(direction).unwrap().last_error().unwrap();
    assert_eq!(last.names().collect::<Vec<_>>(), [name]);
    three.reported(master);
    three.rig.end(undisturbed);
    three.works(master);
}

#[test]
fn a_fault_of_the_descriptor_master_fails_its_transaction_only() {
    only_its_transaction_fails(Master::Sg);
}

#[test]
fn a_fault_of_the_reading_master_fails_its_transaction_only() {
    only_its_transaction_fails(Master::Mm2s);
}

#[test]
fn a_fault_of_the_writing_master_fails_its_transaction_only() {
    only_its_transaction_fails(Master::S2mm);
}

#[test]
fn after_a_fault_the_smmu_refuses_the_whole_core_until_its_driver_has_looked() {
    // As Linux sets domains up (SCTLR.HUPCF = 0): the other channel's next access is refused as well, and no record tells.
    for master in [Master::Sg, Master::Mm2s, Master::S2mm] {
        let three = Three::new(master, FaultModel::default());
        let undisturbed = three.rig.begin(1, (0, 0), 3 * MIB);
        let [sent, received] = three.run();
        let second = match master {
            Master::Sg => (&sent[1], BusAccess::Descriptor),
            Master::Mm2s => (&sent[1], BusAccess::Read),
            Master::S2mm => (&received[1], BusAccess::Write),
        };
        assert_eq!(second.0.result, refused(second.1, three.hole), "{master:?}: the cause comes first");
        // A receiver that waits for data makes no access.
        let (other, hurt) = match master {
            Master::Sg => (&received, 1),
            Master::Mm2s => (&received, 0),
            Master::S2mm => (&sent, 1),
        };
        let refused = |c: &&Completion| matches!(c.result, Err(TransferError::Bus { .. }));
        assert_eq!(other.iter().filter(refused).count(), hurt, "{master:?}: {other:?}");
        assert_eq!(sent.len() + received.len(), if master == Master::Sg { 5 } else { 6 }, "{master:?}");
        // Core 1 is in a domain of its own.
        three.rig.end(undisturbed);
        three.reported(master);
        for direction in [TX, RX] {
            three.core.channel(direction).unwrap().terminate().unwrap();
        }
        three.works(master);
    }
}

#[test]
fn a_receiver_must_not_write_a_buffer_that_is_for_reading() {
    let rig = Rig::new();
    let dma = rig.core(0).dma().clone();
    let (_, source) = rig.map(&dma, KIB, Way::ToDevice);
    let (to, target) = rig.map(&dma, KIB, Way::ToDevice);
    let before = rig.get(to.pa, KIB);
    let running = rig.core(0).begin(&[segment(target, KIB)], &[segment(source, KIB)]).unwrap();
    assert!(running.wait(&rig.clock(), 1_000_000).is_err());
    assert_eq!(running.status().1.state, State::Failed(refused(BusAccess::Write, target).unwrap_err()));
    let report = rig.fault().report;
    assert_eq!((report.reason, report.iova), (FaultReason::Permission, target));
    assert!(rig.get(to.pa, KIB) == before);
    rig.loops(0, KIB);
}

#[test]
fn what_one_core_may_reach_the_other_may_not() {
    let rig = Rig::new();
    let (_, source) = rig.map(rig.core(0).dma(), KIB, Way::ToDevice);
    let (_, target) = rig.map(rig.core(1).dma(), KIB, Way::FromDevice);
    // The same number can mean something in both domains: not here.
    let foreign = source.wrapping_add(1 << 30);
    let iovas: BTreeSet<_> = [foreign, target].into();
    assert_eq!(iovas.len(), 2);
    let running = rig.core(1).begin(&[segment(target, KIB)], &[segment(foreign, KIB)]).unwrap();
    assert!(running.wait(&rig.clock(), 1_000_000).is_err());
    let fault = rig.fault();
    assert_eq!((fault.name.as_deref(), fault.report.iova), (Some("axidma1"), foreign));
    rig.loops(1, KIB);
    rig.loops(0, KIB);
}

#[test]
fn a_receiver_that_gets_nothing_can_be_terminated() {
    let rig = Rig::new();
    let (rx, dma) = (rig.rx(0), rig.core(0).dma().clone());
    let (to, target) = rig.map(&dma, 4 * KIB, Way::FromDevice);
    let before = rig.get(to.pa, to.len);
    let heard = Heard::default();
    for _ in 0..3 {
        send(&*rx, &[segment(target, 4 * KIB)], listen(&heard));
    }
    rx.issue_pending();
    rig.settle();
    assert!(heard.lock().unwrap().is_empty());
    assert_eq!(rx.terminate(), Ok(3));
    let ended = heard.lock().unwrap().clone();
    assert!(ended.iter().all(|c| c.result == Err(TransferError::Terminated) && c.transferred == 0));
    assert_eq!(ended.len(), 3);
    // The other way to the same end: a bounded wait.
    let waited = rig.core(0).receive(&[segment(target, 4 * KIB)], &rig.clock(), 5_000);
    assert!(matches!(waited, Err(WaitError::Timeout { residue: 4096, .. })), "{waited:?}");
    assert!(rig.core(0).driver().is_idle());
    // Mapped memory can go now, and nobody minds.
    dma.unmap_single(target, to.len, Way::FromDevice, NONE).unwrap();
    rig.loops(0, 64 * KIB);
    assert!(rig.get(to.pa, to.len) == before);
    rig.no_faults();
}

#[test]
fn terminating_one_channel_leaves_the_other_one_its_work() {
    let rig = Rig::new();
    let (tx, rx, dma) = (rig.tx(0), rig.rx(0), rig.core(0).dma().clone());
    let (_, source) = rig.map(&dma, 16 * KIB, Way::ToDevice);
    let (to, target) = rig.map(&dma, 8 * KIB, Way::FromDevice);
    let received = send(&*rx, &[segment(target, 8 * KIB)], None);
    rx.issue_pending();
    rig.settle();
    // Prepared and never issued: terminating takes them all the same.
    send(&*tx, &[segment(source, 8 * KIB)], None);
    assert_eq!(tx.terminate(), Ok(1));
    assert_eq!(rx.status(received).state, State::Running);
    send(&*tx, &[segment(source, 8 * KIB)], None);
    tx.issue_pending();
    rig.settle();
    assert_eq!(rx.status(received), complete(8 * KIB));
    dma.unmap_single(target, to.len, Way::FromDevice, NONE).unwrap();
}

#[test]
fn nothing_is_stale_where_everything_goes_through_the_dma_api() {
    let rig = Rig::cached();
    for len in [1, 65, 4 * KIB, 100 * KIB] {
        rig.loops(0, len);
        let flight = rig.begin(1, (3, 61), len);
        rig.end(flight);
    }
    // A buffer that is used again and again, with syncs in between.
    let dma = rig.core(0).dma().clone();
    let (from, source) = rig.map(&dma, 4 * KIB, Way::ToDevice);
    let (to, target) = rig.map(&dma, 4 * KIB, Way::FromDevice);
    for round in 0..4 {
        dma.sync_single_for_cpu(source, from.len, Way::ToDevice).unwrap();
        let data = pattern(round, from.len);
        rig.put(from.pa, &data);
        dma.sync_single_for_device(source, from.len, Way::ToDevice).unwrap();
        dma.sync_single_for_device(target, to.len, Way::FromDevice).unwrap();
        let running = rig.core(0).begin(&[segment(target, to.len)], &[segment(source, from.len)]).unwrap();
        assert_eq!(running.wait(&rig.clock(), 1_000_000), Ok(to.len));
        dma.sync_single_for_cpu(target, to.len, Way::FromDevice).unwrap();
        assert!(rig.get(to.pa, to.len) == data);
    }
    let stale = rig.stale();
    assert!(stale.is_empty(), "{} stale reads, the first: {}", stale.len(), stale[0]);
}

#[test]
fn a_sync_that_is_left_out_shows_as_stale_data_of_the_side_that_reads() {
    let rig = Rig::cached();
    let dma = rig.core(0).dma().clone();
    let (from, source) = rig.map(&dma, 4 * KIB, Way::ToDevice);
    let (to, target) = rig.map(&dma, 4 * KIB, Way::FromDevice);
    let go = || {
        let running = rig.core(0).begin(&[segment(target, to.len)], &[segment(source, from.len)]).unwrap();
        assert_eq!(running.wait(&rig.clock(), 1_000_000), Ok(to.len));
    };
    // For the device: the engine reads what memory had before.
    let old = rig.get(from.pa, from.len);
    let new = pattern(77, from.len);
    rig.put(from.pa, &new);
    rig.stale();
    go();
    let stale = rig.stale();
    assert!(stale.iter().all(|s| s.missing == Maintenance::Clean && &*s.reader == "axidma0"), "{stale:?}");
    assert!(!stale.is_empty());
    dma.sync_single_for_cpu(target, to.len, Way::FromDevice).unwrap();
    assert!(rig.get(to.pa, to.len) == old && rig.stale().is_empty());
    // For the CPU: it still has the old lines.
    dma.sync_single_for_device(source, from.len, Way::ToDevice).unwrap();
    go();
    assert!(rig.stale().is_empty(), "the engine reads well now");
    assert!(rig.get(to.pa, to.len) == old, "the CPU sees its cache");
    let stale = rig.stale();
    assert!(stale.iter().all(|s| s.missing == Maintenance::Invalidate && &*s.reader == "cpu"), "{stale:?}");
    assert!(!stale.is_empty());
    // Unmapping without a sync is the same mistake, and so is mapping without one.
    dma.unmap_single(target, to.len, Way::FromDevice, DmaAttrs::SKIP_CPU_SYNC).unwrap();
    assert!(rig.get(to.pa, to.len) == old);
    assert!(!rig.stale().is_empty());
    rig.memory().invalidate(to.pa, to.len as usize);
    assert!(rig.get(to.pa, to.len) == new, "it had been in memory all the time");
}
