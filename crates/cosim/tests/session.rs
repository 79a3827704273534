//! A board behind the window, driven over the protocol alone: no QEMU, no kernel. First as a good driver does it, then as
//! nobody should.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use portcullis_arch::Pa;
use portcullis_arch::smmuv3::regs::{PAGE, offset};
use portcullis_arch::smmuv3::{EventCode, EventRecord};
use portcullis_arch::testdev::PciIdentity;
use portcullis_arch::zdma::{interrupt, reg};
use portcullis_board::Tree;
use portcullis_cosim::guest_tree::{self, GuestTree, guest_tree};
use portcullis_cosim::linux::plan;
use portcullis_cosim::session::{Session, SessionError, Summary, Turn};
use portcullis_cosim::vfio_user::peer::{Outside, Peer, Written};
use portcullis_cosim::vfio_user::{Connection, Errno, Limits, pci, wire};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// The memory of `virt` in the test's tree.
const RAM: u64 = 0x4000_0000;
const RAM_BYTES: u64 = 0x4000_0000;
/// GICD_ISPENDR0 and GICD_ICPENDR0 of its interrupt controller.
const ISPENDR: u64 = 0x0800_0200;
const ICPENDR: u64 = 0x0800_0280;
const READ_WRITE: u32 = wire::map_flags::READ | wire::map_flags::WRITE;

/// RAM as QEMU makes it: a file that cannot shrink, with the guest's device tree in it.
fn memfd(bytes: u64) -> File {
    let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len(bytes).unwrap();
    file.write_all_at(&[0xd0, 0x0d, 0xfe, 0xed], 0).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

/// How a session ended, and what it was then.
type Ended = (Result<(), SessionError>, Summary);

/// A session in a thread, and its peer.
struct Rig {
    tree: GuestTree,
    peer: Peer,
    functions: Vec<Peer>,
    ram: File,
    turns: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Ended>>,
}

impl Rig {
    /// Connected and nothing more.
    fn new(board: &str) -> Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let virt = Tree::load(root.join("tests/guest_tree/virt.dtb")).unwrap();
        let board = Tree::load(root.join(format!("../../boards/{board}.dtb"))).unwrap();
        let options = guest_tree::Options { pci_first_slot: 2, ..guest_tree::Options::default() };
        let tree = guest_tree(&board, &virt, &options).unwrap();
        let plan = plan(&tree, Default::default()).unwrap();
        let pair = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            (Peer::new(ours).unwrap(), Connection::new(theirs, Limits::default()).unwrap())
        };
        let (peer, connection) = pair();
        let mut functions = Vec::new();
        let mut more = Vec::new();
        for function in &tree.pci {
            let (peer, connection) = pair();
            functions.push(peer);
            more.push((function.clone(), connection));
        }
        let (turns, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, asked) = (turns.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut session = Session::new(plan, connection);
            for (function, connection) in more {
                session.add_function(function, connection);
            }
            let end = loop {
                match session.turn(Duration::from_millis(5)) {
                    Ok(Turn::Open) if asked.load(Ordering::Relaxed) => break Ok(()),
                    Ok(Turn::Open) => drop(session.take_events()),
                    Ok(Turn::Closed) => break Ok(()),
                    Err(error) => break Err(error),
                }
                counted.fetch_add(1, Ordering::Relaxed);
            };
            (end, session.summary())
        });
        Self { tree, peer, functions, ram: memfd(RAM_BYTES), turns, stop, thread: Some(thread) }
    }

    /// With the guest's memory and the window on, as QEMU does it.
    fn ready(board: &str) -> Self {
        let mut rig = Self::new(board);
        rig.peer.version().unwrap();
        rig.peer.map(RAM, RAM_BYTES, 0, READ_WRITE, Some(rig.ram.as_fd())).unwrap();
        rig.place();
        rig
    }

    /// BAR 0, memory and bus mastering.
    fn place(&mut self) {
        let bar = self.tree.window.base.get() as u32;
        self.peer.write(pci::CONFIG, 0x10, &bar.to_le_bytes()).unwrap();
        self.peer.write(pci::CONFIG, 4, &6u16.to_le_bytes()).unwrap();
        // The machine comes with the turn after the one that answered.
        let begun = self.turns.load(Ordering::Relaxed);
        while self.turns.load(Ordering::Relaxed) < begun + 2 && !self.thread.as_ref().unwrap().is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Where a device is in the window, and its first interrupt in the guest.
    fn device(&self, name: &str) -> (u64, u32) {
        let placed = self.tree.placed.iter().find(|p| p.name == name).unwrap_or_else(|| {
            panic!("no {name} in {:?}", self.tree.placed.iter().map(|p| &p.name).collect::<Vec<_>>())
        });
        (self.tree.offset(placed), placed.interrupts.first().map_or(0, |(_, guest)| *guest))
    }

    fn write32(&mut self, at: u64, value: u32) {
        self.peer.post(pci::BAR0, at, &value.to_le_bytes()).unwrap();
    }

    fn write64(&mut self, at: u64, value: u64) {
        self.peer.post(pci::BAR0, at, &value.to_le_bytes()).unwrap();
    }

    fn read32(&mut self, at: u64) -> u32 {
        self.peer.read_u32(pci::BAR0, at).unwrap()
    }

    fn put(&self, pa: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.ram.write_all_at(&bytes, pa - RAM).unwrap();
    }

    fn get(&self, pa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_exact_at(&mut bytes, pa - RAM).unwrap();
        bytes
    }

    /// Waits for a write to the interrupt controller and takes it, with everything before it.
    fn awaits(&mut self, wanted: &Written) {
        let begun = Instant::now();
        loop {
            if let Some(at) = self.peer.written.iter().position(|w| w == wanted) {
                self.peer.written.drain(..=at);
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "no {wanted:x?} in {:x?}", self.peer.written);
            self.peer.answer_dma(Duration::from_millis(2)).unwrap();
        }
    }

    /// Ends the session from the peer's side.
    fn close(mut self) -> Ended {
        let thread = self.thread.take().unwrap();
        // A stream that is shut down is closed, whoever else holds it.
        let _ = self.peer.stream().shutdown(std::net::Shutdown::Both);
        thread.join().unwrap()
    }

    /// Waits for the session to end by itself.
    fn error(mut self) -> String {
        let thread = self.thread.take().unwrap();
        let begun = Instant::now();
        while !thread.is_finished() {
            assert!(begun.elapsed() < Duration::from_secs(10), "the session goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
        thread.join().unwrap().0.unwrap_err().to_string()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

fn pending(register: u64, spi: u32) -> Written {
    let id = spi + 32;
    Written { address: register + u64::from(id / 32) * 4, data: (1u32 << (id % 32)).to_le_bytes().to_vec() }
}

const TABLE: u64 = RAM + 0x10_0000;
const CONTEXT: u64 = RAM + 0x11_0000;
const LEVEL1: u64 = RAM + 0x12_0000;
const EVENTS: u64 = RAM + 0x13_0000;
/// The stream of `dma0`.
const STREAM: u64 = 0x10;
/// Where stage 1 puts the first GiB.
const IN: u64 = 0;

/// SMMUv3: one stream at stage 1, its first GiB on the guest's memory; event queue and its interrupt on.
fn translate(rig: &mut Rig, smmu: u64) {
    // STE (IHI 0070, 5.2): valid, stage 1 translates, stage 2 bypassed.
    rig.put(TABLE + 64 * STREAM, &[CONTEXT | 0b101 << 1 | 1, 0, 0, 0, 0, 0, 0, 0]);
    // CD (5.4): 39 bits of input in 4 KiB granules, cached walks, no TTB1, 40 bits of output, AArch64, faults recorded.
    let t0 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 2u64 << 32 | 1 << 41 | 1 << 45 | 1 << 46;
    rig.put(CONTEXT, &[t0 | 1 << 48, LEVEL1, 0, 0xff, 0, 0, 0, 0]);
    // A block of 1 GiB: access flag, inner shareable, for everybody.
    rig.put(LEVEL1, &[RAM | 1 << 10 | 3 << 8 | 1 << 6 | 1, 0]);
    rig.write64(smmu + offset::STRTAB_BASE, TABLE);
    rig.write32(smmu + offset::STRTAB_BASE_CFG, 8);
    rig.write64(smmu + offset::EVENTQ_BASE, EVENTS | 4);
    rig.write32(smmu + PAGE + offset::EVENTQ_PROD, 0);
    rig.write32(smmu + PAGE + offset::EVENTQ_CONS, 0);
    rig.write32(smmu + offset::CR1, 0xd75);
    rig.write32(smmu + offset::IRQ_CTRL, 1 << 2);
    rig.write32(smmu + offset::CR0, 1 | 1 << 2);
    assert_eq!(rig.read32(smmu + offset::CR0ACK) & 5, 5);
}

/// zynqmp_dma's register sequence in simple mode, DMA_DONE and errors unmasked.
fn copy(rig: &mut Rig, dma: u64, to: u64, from: u64, len: u32) {
    let at = |register: u32| dma + u64::from(register);
    rig.write32(at(reg::IDS), interrupt::ALL);
    let status = rig.read32(at(reg::ISR));
    rig.write32(at(reg::ISR), status);
    rig.write32(at(reg::IEN), interrupt::DMA_DONE | interrupt::AXI_RD_DATA | interrupt::AXI_WR_DATA);
    for (low, high, size, address) in [
        (reg::SRC_DSCR_WORD0, reg::SRC_DSCR_WORD1, reg::SRC_DSCR_WORD2, from),
        (reg::DST_DSCR_WORD0, reg::DST_DSCR_WORD1, reg::DST_DSCR_WORD2, to),
    ] {
        rig.write32(at(low), address as u32);
        rig.write32(at(high), (address >> 32) as u32);
        rig.write32(at(size), len);
    }
    rig.write32(at(reg::CTRL0), 0);
    rig.write32(at(reg::CTRL2), 1);
}

#[test]
fn a_driver_over_the_protocol_moves_data_and_hears_of_it() {
    let mut rig = Rig::ready("smmuv3");
    let (smmu, _) = rig.device("smmu");
    let (dma, spi) = rig.device("dma0");
    translate(&mut rig, smmu);
    let text: Vec<u64> = (0..512u64).map(|i| i.wrapping_mul(0x0101_0101_0303_0707)).collect();
    rig.put(RAM + 0x20_0000, &text);
    copy(&mut rig, dma, IN + 0x30_0004, IN + 0x20_0000, 4096);
    rig.awaits(&pending(ISPENDR, spi));
    assert_eq!(rig.get(RAM + 0x30_0004, 4096), rig.get(RAM + 0x20_0000, 4096));
    assert_eq!(rig.get(RAM + 0x30_0000, 4), [0; 4]);
    // A level is pended again while it is high, and cleared when the driver has seen to it.
    rig.awaits(&pending(ISPENDR, spi));
    let status = rig.read32(dma + u64::from(reg::ISR));
    assert_eq!(status & interrupt::DMA_DONE, interrupt::DMA_DONE);
    rig.write32(dma + u64::from(reg::ISR), status);
    rig.awaits(&pending(ICPENDR, spi));

    // Beyond what is mapped: an event, its interrupt, an error of the channel.
    copy(&mut rig, dma, IN + 0x30_0000, 0x4000_0040, 64);
    let (_, event) = rig.device("smmu");
    let events = rig.tree.placed.iter().find(|p| p.name == "smmu").unwrap().interrupts.clone();
    let begun = Instant::now();
    while !events.iter().any(|(_, spi)| rig.peer.written.contains(&pending(ISPENDR, *spi))) {
        assert!(begun.elapsed() < Duration::from_secs(10), "{event}: {:x?}", rig.peer.written);
        rig.peer.answer_dma(Duration::from_millis(2)).unwrap();
    }
    let prod = rig.read32(smmu + PAGE + offset::EVENTQ_PROD);
    let bytes = rig.get(EVENTS, 32);
    let word = |i: usize| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap());
    let record = EventRecord([word(0), word(1), word(2), word(3)]);
    assert_eq!((prod & 0xf, record.code()), (1, Some(EventCode::Translation)));
    assert_eq!(word(0) >> 32, STREAM);
    assert_eq!(word(2), 0x4000_0040);
    assert_ne!(rig.read32(dma + u64::from(reg::ISR)) & interrupt::AXI_RD_DATA, 0);

    let (end, summary) = rig.close();
    end.unwrap();
    let engine = summary.engines.iter().find(|e| e.engine == "dma0").unwrap();
    assert!(engine.errors > 0 && engine.bytes >= 8192, "{engine:?}");
    assert!(summary.interrupts.lines[&spi] >= 2, "{:?}", summary.interrupts);
}

#[test]
fn a_reset_at_any_time_gives_a_board_as_new() {
    let mut rig = Rig::ready("smmuv3");
    let (smmu, _) = rig.device("smmu");
    let (dma, spi) = rig.device("dma0");
    for round in 0..20u32 {
        translate(&mut rig, smmu);
        // Far more than one turn of work, so that the reset comes in the middle; or an interrupt that nobody saw to.
        let len = if round % 2 == 0 { 64 << 20 } else { 64 };
        copy(&mut rig, dma, IN + 0x1000_0000, IN + 0x0800_0000, len);
        if round % 2 == 1 {
            rig.awaits(&pending(ISPENDR, spi));
        }
        rig.peer.reset().unwrap();
        assert_eq!(rig.peer.read_u32(pci::CONFIG, 4).unwrap() & 0xffff, 0, "memory and mastering are off");
        // What comes in one breath with the reset is for the new board.
        rig.place();
        assert_eq!(rig.read32(smmu + offset::CR0), 0);
        assert_eq!(rig.read32(dma + u64::from(reg::CTRL2)) & 1, 0);
        rig.peer.answer_dma(Duration::from_millis(1)).unwrap();
        rig.peer.written.clear();
        rig.peer.answer_dma(Duration::from_millis(20)).unwrap();
        assert_eq!(rig.peer.written, [], "interrupts of before the reset");
    }
    // And it works.
    translate(&mut rig, smmu);
    rig.put(RAM + 0x20_0000, &[7; 8]);
    copy(&mut rig, dma, IN + 0x30_0000, IN + 0x20_0000, 64);
    rig.awaits(&pending(ISPENDR, spi));
    assert_eq!(rig.get(RAM + 0x30_0000, 8), 7u64.to_le_bytes());
}

#[test]
fn registers_written_in_one_breath_with_a_reset_stay_written() {
    let mut rig = Rig::ready("smmuv3");
    let (smmu, _) = rig.device("smmu");
    for _ in 0..50 {
        rig.write64(smmu + offset::STRTAB_BASE, TABLE);
        // Without waiting for any answer.
        rig.peer.send(wire::Command::DeviceReset, wire::NO_REPLY, &[], &[]).unwrap();
        rig.peer.post(pci::CONFIG, 4, &6u16.to_le_bytes()).unwrap();
        rig.write64(smmu + offset::STRTAB_BASE, CONTEXT);
        // At once, and in a later turn.
        for _ in 0..2 {
            assert_eq!(rig.read32(smmu + offset::STRTAB_BASE), CONTEXT as u32);
        }
    }
}

#[test]
fn memory_taken_away_under_a_running_engine_is_an_error_of_the_engine() {
    let mut rig = Rig::ready("smmuv3");
    let (smmu, _) = rig.device("smmu");
    let (dma, spi) = rig.device("dma0");
    translate(&mut rig, smmu);
    copy(&mut rig, dma, IN + 0x1000_0000, IN + 0x0800_0000, 128 << 20);
    rig.peer.unmap(RAM, RAM_BYTES).unwrap();
    rig.awaits(&pending(ISPENDR, spi));
    let status = rig.read32(dma + u64::from(reg::ISR));
    assert_ne!(status & (interrupt::AXI_RD_DATA | interrupt::AXI_WR_DATA), 0, "{status:#x}");
    // Given back it is the same memory.
    rig.peer.map(RAM, RAM_BYTES, 0, READ_WRITE, Some(rig.ram.as_fd())).unwrap();
    rig.peer.reset().unwrap();
    rig.place();
    rig.peer.written.clear();
    translate(&mut rig, smmu);
    rig.put(RAM + 0x20_0000, &[9; 8]);
    copy(&mut rig, dma, IN + 0x30_0000, IN + 0x20_0000, 64);
    rig.awaits(&pending(ISPENDR, spi));
    assert_eq!(rig.get(RAM + 0x30_0000, 8), 9u64.to_le_bytes());
}

#[test]
fn memory_that_is_not_what_it_should_be_ends_the_session_with_the_remedy() {
    // As QEMU tells of memory of its own.
    let mut rig = Rig::new("smmuv3");
    rig.peer.version().unwrap();
    rig.peer.map(RAM, RAM_BYTES, 0, READ_WRITE, None).unwrap();
    rig.place();
    let error = rig.error();
    assert!(error.contains("memory-backend-memfd") && error.contains("share=on"), "{error}");

    // None at all.
    let mut rig = Rig::new("zynqmp-thesis");
    rig.peer.version().unwrap();
    rig.place();
    let error = rig.error();
    assert!(error.contains("0x40000000") && error.contains("memory-backend-memfd"), "{error}");

    // A file that may shrink under us: touching what it lost would kill us.
    let mut rig = Rig::new("smmuv3");
    rig.peer.version().unwrap();
    rig.peer.share(RAM, RAM_BYTES).unwrap();
    rig.place();
    let error = rig.error();
    assert!(error.contains("seal"), "{error}");

    // A file that stays empty, for QEMU keeps the pages to itself (share=off).
    let mut rig = Rig::new("smmuv3");
    rig.peer.version().unwrap();
    rig.ram.write_all_at(&[0; 8], 0).unwrap();
    rig.peer.map(RAM, RAM_BYTES, 0, READ_WRITE, Some(rig.ram.as_fd())).unwrap();
    rig.place();
    let error = rig.error();
    assert!(error.contains("not shared") && error.contains("share=on"), "{error}");

    // A file that ends before the range does; a range beyond everything.
    for (size, bytes) in [(RAM_BYTES, RAM_BYTES / 2), (1 << 47, RAM_BYTES), (u64::MAX - RAM, RAM_BYTES)] {
        let mut rig = Rig::new("smmuv3");
        rig.peer.version().unwrap();
        let file = memfd(bytes);
        rig.peer.map(RAM, size, 0, READ_WRITE, Some(file.as_fd())).unwrap();
        rig.place();
        let error = rig.error();
        assert!(error.contains("0x40000000"), "{error}");
    }

    // Other memory in the place of what is in use.
    let mut rig = Rig::ready("smmuv3");
    rig.peer.unmap(RAM, RAM_BYTES).unwrap();
    let other = memfd(RAM_BYTES);
    let refused = rig.peer.map(RAM, RAM_BYTES, 0, READ_WRITE, Some(other.as_fd()));
    assert!(refused.is_err());
    let error = rig.error();
    assert!(error.contains("replaced"), "{error}");
}

#[test]
fn maps_beside_the_guests_memory_are_nobodys_business() {
    let mut rig = Rig::new("smmuv3");
    rig.peer.version().unwrap();
    let huge = memfd(1 << 40);
    // Roms, flash, a hole of a terabyte, before and after the machine is there; overlaps are refused by the protocol.
    rig.peer.map(0, 0x400_0000, 0, wire::map_flags::READ, Some(huge.as_fd())).unwrap();
    rig.peer.map(RAM, RAM_BYTES, 0, READ_WRITE, Some(rig.ram.as_fd())).unwrap();
    assert!(rig.peer.map(RAM + 0x1000, 0x1000, 0, READ_WRITE, Some(huge.as_fd())).is_err());
    rig.peer.map(1 << 40, 1 << 40, 0, READ_WRITE, Some(huge.as_fd())).unwrap();
    rig.peer.map(u64::MAX - 0xffff, 0x1_0000, 0, READ_WRITE, None).unwrap();
    rig.place();
    rig.peer.map(1 << 44, 1 << 40, 0, READ_WRITE, Some(huge.as_fd())).unwrap();
    for i in 0..2000u64 {
        rig.peer.map((1 << 50) + i * 0x2000, 0x1000, 0, READ_WRITE, Some(huge.as_fd())).unwrap();
    }
    assert!(rig.peer.unmap(RAM + 0x1000, 0x1000).is_err());
    let (smmu, _) = rig.device("smmu");
    translate(&mut rig, smmu);
    let (end, _) = rig.close();
    end.unwrap();
}

#[test]
fn configuration_space_takes_anything() {
    let mut rig = Rig::ready("smmuv3");
    let mut random = Random(1);
    for peer in &mut rig.functions {
        peer.version().unwrap();
    }
    for peer in std::iter::once(&mut rig.peer).chain(&mut rig.functions) {
        for _ in 0..3000 {
            let at = random.next() % 4096;
            let len = (1 + random.next() % 8).min(4096 - at) as usize;
            peer.post(pci::CONFIG, at, &random.next().to_le_bytes()[..len]).unwrap();
        }
    }
    let mut whole = vec![0; 4096];
    rig.peer.read(pci::CONFIG, 0, &mut whole).unwrap();
    assert_eq!(whole[..4], [0xff; 4], "nobody may see it");
    let id = PciIdentity::DEVICE;
    for peer in &mut rig.functions {
        let mut head = [0; 4];
        peer.read(pci::CONFIG, 0, &mut head).unwrap();
        assert_eq!(head, (u32::from(id.device) << 16 | u32::from(id.vendor)).to_le_bytes());
    }
    rig.place();
    let (smmu, _) = rig.device("smmu");
    assert_ne!(rig.read32(smmu + offset::IDR0), u32::MAX);
}

#[test]
fn accesses_of_any_size_and_place_before_and_after_the_machine_is_there() {
    let mut rig = Rig::new("zynqmp-thesis");
    rig.peer.version().unwrap();
    let size = rig.tree.window.size;
    let mut bytes = vec![0; 64 << 10];
    rig.peer.read(pci::BAR0, 0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|b| *b == 0xff), "nothing answers before the window is on");
    rig.peer.post(pci::BAR0, 0, &[0; 8]).unwrap();
    rig.peer.map(RAM, RAM_BYTES, 0, READ_WRITE, Some(rig.ram.as_fd())).unwrap();
    rig.place();
    // The whole window in large pieces, at odd places and lengths.
    let mut at = 0;
    while at < size {
        let n = (size - at).min(65_533) as usize;
        rig.peer.read(pci::BAR0, at, &mut bytes[..n]).unwrap();
        rig.peer.post(pci::BAR0, at, &bytes[..n]).unwrap();
        at += n as u64;
    }
    // The edge, and beyond it.
    rig.peer.read(pci::BAR0, size - 1, &mut bytes[..1]).unwrap();
    assert!(rig.peer.read(pci::BAR0, size - 1, &mut bytes[..2]).is_err());
    assert!(rig.peer.read(pci::BAR0, u64::MAX, &mut bytes[..2]).is_err());
    rig.peer.reset().unwrap();
    rig.place();
    let (smmu, _) = rig.device("smmu");
    assert_ne!(rig.read32(smmu + 0x20), u32::MAX);
    let (end, summary) = rig.close();
    end.unwrap();
    assert!(summary.outside > 0);
}

/// Random values, small ones and large ones alike.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn a_guest_that_scribbles_over_every_register_harms_nobody_and_a_reset_mends_it() {
    let seconds = std::env::var("PORTCULLIS_SCRIBBLE").ok().and_then(|s| s.parse().ok()).unwrap_or(3);
    for board in ["smmuv3", "zynqmp-thesis"] {
        let mut rig = Rig::ready(board);
        let mut random = Random(0x1234_5678_9abc_def1);
        let windows: Vec<(u64, u64)> = rig.tree.placed.iter().map(|p| (rig.tree.offset(p), p.size)).collect();
        let begun = Instant::now();
        let mut longest = Duration::ZERO;
        let mut before = 0;
        while begun.elapsed() < Duration::from_secs(seconds) {
            for _ in 0..200 {
                let (base, size) = windows[random.next() as usize % windows.len()];
                let choice = random.next();
                let width = 1u64 << (choice & 3);
                let at = base + random.next() % size / width * width;
                // Addresses of memory are as welcome as nonsense.
                let value = match choice >> 4 & 3 {
                    0 => random.next() & 0xff,
                    1 => RAM + (random.next() & 0x3fff_fff8),
                    _ => random.next(),
                };
                rig.peer.post(pci::BAR0, at, &value.to_le_bytes()[..width as usize]).unwrap();
            }
            let asked = Instant::now();
            rig.read32(windows[0].0);
            longest = longest.max(asked.elapsed());
            rig.peer.written.clear();
            if before == 0 && begun.elapsed() > Duration::from_secs(seconds) / 3 {
                before = resident();
            }
        }
        // What engines wrote to the guest's memory is counted too, as it is mapped here.
        let grown = resident().saturating_sub(before);
        println!("{board}: longest answer {longest:?}, grown by {} KiB", grown >> 10);
        assert!(longest < Duration::from_secs(2), "{longest:?}");
        rig.peer.reset().unwrap();
        rig.peer.outside = Outside::Accept;
        rig.place();
        if board == "smmuv3" {
            let (smmu, _) = rig.device("smmu");
            let (dma, spi) = rig.device("dma0");
            translate(&mut rig, smmu);
            rig.put(RAM + 0x20_0000, &[5; 8]);
            copy(&mut rig, dma, IN + 0x30_0000, IN + 0x20_0000, 64);
            rig.awaits(&pending(ISPENDR, spi));
            assert_eq!(rig.get(RAM + 0x30_0000, 8), 5u64.to_le_bytes());
        }
        let (end, _) = rig.close();
        end.unwrap();
    }
}

#[test]
fn a_peer_that_answers_nothing_costs_no_processor_time_and_loses_no_level() {
    let mut rig = Rig::ready("smmuv3");
    let (smmu, _) = rig.device("smmu");
    let (dma, spi) = rig.device("dma0");
    translate(&mut rig, smmu);
    copy(&mut rig, dma, IN + 0x30_0000, IN + 0x20_0000, 64);
    // Stopped: the level is pended again and again, until no more is sent.
    std::thread::sleep(Duration::from_millis(4500));
    let before = rig.turns.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(1000));
    let turns = rig.turns.load(Ordering::Relaxed) - before;
    assert!(turns < 1000, "{turns} turns in a second with nothing to do");
    // It comes back.
    let answered = rig.peer.answer_dma(Duration::from_millis(10)).unwrap();
    assert!((64..200).contains(&answered), "{answered}");
    rig.awaits(&pending(ISPENDR, spi));
}

#[test]
fn a_peer_that_dies_with_an_interrupt_due_is_closed_and_no_error() {
    for round in 0..20 {
        let mut rig = Rig::ready("smmuv3");
        let (smmu, _) = rig.device("smmu");
        let (dma, _) = rig.device("dma0");
        translate(&mut rig, smmu);
        copy(&mut rig, dma, IN + 0x30_0000, IN + 0x20_0000, 64);
        std::thread::sleep(Duration::from_millis(round % 5));
        let (end, _) = rig.close();
        end.unwrap();
    }
}

#[test]
fn garbage_in_the_middle_ends_the_session_with_the_place() {
    let mut rig = Rig::ready("smmuv3");
    let (smmu, _) = rig.device("smmu");
    translate(&mut rig, smmu);
    rig.peer.send_raw(&[0x5a; 64], &[]).unwrap();
    let error = rig.error();
    assert!(error.contains("the connection to QEMU") && error.contains("byte"), "{error}");

    // Well framed nonsense is refused and the session goes on.
    let mut rig = Rig::ready("smmuv3");
    for command in [0u16, 3, 99, 0xffff] {
        let mut message = vec![7, 0];
        message.extend(command.to_le_bytes());
        message.extend(24u32.to_le_bytes());
        message.extend([0; 8]);
        message.extend([0xee; 8]);
        rig.peer.send_raw(&message, &[]).unwrap();
        let answer = rig.peer.receive().unwrap();
        assert_ne!(answer.header.flags.get() & wire::ERROR, 0);
    }
    rig.peer.outside = Outside::Refuse(Errno::PERM);
    let (smmu, _) = rig.device("smmu");
    let (dma, _) = rig.device("dma0");
    translate(&mut rig, smmu);
    // Interrupts that are refused are no reason to end. The level stays, and is sent again, each time later.
    copy(&mut rig, dma, IN + 0x30_0000, IN + 0x20_0000, 64);
    assert!(rig.peer.answer_dma(Duration::from_millis(10)).unwrap() > 0);
    let (end, summary) = rig.close();
    end.unwrap();
    assert!(summary.latency.refused > 0, "{:?}", summary.latency);
}

#[test]
fn a_function_that_goes_away_or_speaks_nonsense_is_noticed() {
    let mut rig = Rig::ready("smmuv3");
    assert!(!rig.functions.is_empty());
    let gone = rig.functions.remove(0);
    drop(gone);
    std::thread::sleep(Duration::from_millis(20));
    let before = rig.turns.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(500));
    let turns = rig.turns.load(Ordering::Relaxed) - before;
    assert!(turns < 500, "{turns} turns in half a second with nothing to do");
    let (smmu, _) = rig.device("smmu");
    translate(&mut rig, smmu);
    if let Some(other) = rig.functions.first() {
        other.send_raw(&[0; 64], &[]).unwrap();
        assert!(rig.error().contains("the connection to QEMU"));
    }
}

#[test]
fn the_window_is_where_the_tree_says() {
    let rig = Rig::ready("zynqmp-thesis");
    assert_eq!(rig.tree.gicd, Pa(0x0800_0000));
    assert!(rig.tree.placed.iter().all(|p| rig.tree.offset(p) + p.size <= rig.tree.window.size));
}
