//! What Linux's `dmatest` does, on all sixteen channels at once, each through a domain of its own: random offsets and
//! lengths, a pattern that tells every byte apart, and a look before, inside of and behind both buffers.

mod common;

use std::sync::Arc;

use common::{Board, Random, thesis};
use portcullis_arch::{Iova, Pa};
use portcullis_drivers::zdma::{Cookie, Segment};
use portcullis_hal::{Block, DmaMemory};
use portcullis_iommu::{Domain, DomainSpec, Paging, Prot};

/// dmatest's default `test_buf_size`.
const BUFFER: usize = 16384;
/// dmatest's patterns; the lower five bits count down.
const SRC: u8 = 0x80;
const COPY: u8 = 0x40;
const OVERWRITE: u8 = 0x20;
const COUNT: u8 = 0x1f;

fn pattern(bits: u8, index: usize) -> u8 {
    bits | !(index as u8) & COUNT
}

fn fill(start: usize, len: usize, outside: u8, inside: u8) -> Vec<u8> {
    let bits = |i| if (start..start + len).contains(&i) { inside } else { outside };
    (0..BUFFER).map(|i| pattern(bits(i), i)).collect()
}

/// Number and first place of the bytes that are not as they should be.
fn mismatches(what: &str, seen: &[u8], expected: impl Fn(usize) -> u8) -> Result<(), String> {
    let wrong: Vec<usize> = (0..seen.len()).filter(|&i| seen[i] != expected(i)).collect();
    match wrong.first() {
        None => Ok(()),
        Some(&i) => Err(format!(
            "{} bytes of the {what} differ, the first at {i:#x}: {:#x} instead of {:#x}",
            wrong.len(),
            seen[i],
            expected(i)
        )),
    }
}

struct Thread {
    name: String,
    domain: Arc<Domain>,
    source: Block,
    target: Block,
}

struct Test {
    src_off: usize,
    dst_off: usize,
    len: usize,
    iovas: [Iova; 2],
    cookie: Cookie,
}

impl Thread {
    fn new(board: &Board, name: &str, domain: Arc<Domain>) -> Self {
        board.attach(name, &domain);
        let memory = board.machine().dma_memory();
        // Not aligned to a page, as kmalloc's are not.
        let buffer = |offset| {
            let block = memory.alloc(BUFFER + 0x1000, 64).unwrap();
            Block { pa: block.pa.wrapping_add(offset), len: BUFFER }
        };
        Self { name: name.into(), domain, source: buffer(0x9c0), target: buffer(0x240) }
    }

    /// What `dma_map_page` does: the pages that the buffer lies on, at an address of the device with the same offset.
    fn map(&self, buffer: Block, at: u64, prot: Prot) -> Iova {
        let offset = buffer.pa.get() % 0x1000;
        let len = (offset + BUFFER as u64).next_multiple_of(0x1000);
        self.domain.map(Iova(at), Pa(buffer.pa.get() - offset), len, prot).unwrap();
        Iova(at + offset)
    }

    fn unmap(&self, at: Iova) {
        let offset = at.get() % 0x1000;
        let len = (offset + BUFFER as u64).next_multiple_of(0x1000);
        assert_eq!(self.domain.unmap(Iova(at.get() - offset), len), Ok(len));
    }

    fn begin(&self, board: &Board, random: &mut Random, coherent: bool) -> Test {
        let len = 1 + random.below(BUFFER as u64) as usize;
        let src_off = random.below((BUFFER - len + 1) as u64) as usize;
        let dst_off = random.below((BUFFER - len + 1) as u64) as usize;
        let memory = board.machine().dma_memory();
        memory.write(self.source.pa, &fill(src_off, len, SRC, SRC | COPY));
        memory.write(self.target.pa, &fill(dst_off, len, 0, OVERWRITE));
        let mut prots = [Prot::READ.noexec(), Prot::WRITE.noexec()];
        if coherent {
            prots = prots.map(Prot::cached);
        } else {
            memory.clean(self.source.pa, BUFFER);
            memory.clean(self.target.pa, BUFFER);
        }
        let at = 0x1_0000_0000 + random.below(0x1000) * 0x2_0000;
        let iovas = [self.map(self.source, at, prots[0]), self.map(self.target, at + 0x1_0000, prots[1])];
        let driver = &board.channel(&self.name).driver;
        let (from, to) = (iovas[0].wrapping_add(src_off as u64), iovas[1].wrapping_add(dst_off as u64));
        let cookie = if random.below(2) == 0 {
            driver.submit_memcpy(to, from, len as u64)
        } else {
            let (cut, other) = (1 + random.below(len as u64), 1 + random.below(len as u64));
            driver.submit_sg(&pieces(to, len as u64, cut), &pieces(from, len as u64, other))
        };
        driver.issue_pending();
        Test { src_off, dst_off, len, iovas, cookie: cookie.unwrap() }
    }

    fn end(&self, board: &Board, test: &Test, coherent: bool) -> Result<(), String> {
        let Test { src_off, dst_off, len, .. } = *test;
        let done = board.completion(&self.name, test.cookie);
        done.result.map_err(|e| e.to_string())?;
        let memory = board.machine().dma_memory();
        if !coherent {
            memory.invalidate(self.source.pa, BUFFER);
            memory.invalidate(self.target.pa, BUFFER);
        }
        let (mut source, mut target) = (vec![0; BUFFER], vec![0; BUFFER]);
        memory.read(self.source.pa, &mut source);
        memory.read(self.target.pa, &mut target);
        for at in test.iovas {
            self.unmap(at);
        }
        let expected = fill(src_off, len, SRC, SRC | COPY);
        mismatches("source", &source, |i| expected[i])?;
        let (before, after) = (0..dst_off, dst_off + len..BUFFER);
        mismatches("target before", &target[before], |i| pattern(0, i))?;
        mismatches("target behind", &target[after.clone()], |i| pattern(0, after.start + i))?;
        mismatches("copy", &target[dst_off..dst_off + len], |i| pattern(SRC | COPY, src_off + i))
    }
}

/// A range in pieces of `piece` bytes, at most eight.
fn pieces(at: Iova, len: u64, piece: u64) -> Vec<Segment> {
    let piece = piece.max(len.div_ceil(8));
    let segment = |start| Segment { address: at.wrapping_add(start), len: piece.min(len - start) };
    (0..len).step_by(piece as usize).map(segment).collect()
}

fn run(board: &Board, iterations: usize, spec: impl Fn(usize) -> DomainSpec, coherent: fn(&str) -> bool) {
    let names: Vec<String> = board.system.channels().iter().map(|c| c.name.to_string()).collect();
    assert_eq!(names.len(), 16);
    let threads: Vec<Thread> =
        names.iter().enumerate().map(|(i, n)| Thread::new(board, n, board.alloc(spec(i)))).collect();
    let mut random = Random(0xd3a7e57);
    for iteration in 1..=iterations {
        let tests: Vec<Test> =
            threads.iter().map(|t| t.begin(board, &mut random, coherent(&t.name))).collect();
        board.settle();
        for (thread, test) in threads.iter().zip(&tests) {
            if let Err(error) = thread.end(board, test, coherent(&thread.name)) {
                let Test { src_off, dst_off, len, .. } = test;
                panic!(
                    "{}: result #{iteration}: '{error}' with src_off={src_off:#x} dst_off={dst_off:#x} len={len:#x}",
                    thread.name
                );
            }
        }
    }
    board.no_faults();
    let stale = board.machine().memory().cpu_cache().map(|c| c.take_reports().0).unwrap_or_default();
    assert!(stale.is_empty(), "{}", stale[0]);
    let (events, _) = board.machine().tracer().take();
    let stale = events.iter().find(|e| matches!(e.kind, portcullis_board::sim::EventKind::Stale(_)));
    assert!(stale.is_none(), "{stale:?}");
}

#[test]
fn sixteen_channels_in_sixteen_stage_1_domains() {
    run(&Board::new(), 20, |_| DomainSpec::Stage1(Paging::default()), |_| false);
}

#[test]
fn sixteen_channels_in_stage_1_and_stage_2_domains_behind_a_cache() {
    let spec = |i| match i % 2 {
        0 => DomainSpec::Stage1(Paging::default()),
        _ => DomainSpec::Stage2(Paging::default()),
    };
    run(&Board::cached(), 6, spec, |_| false);
}

#[test]
fn coherent_channels_need_no_maintenance() {
    let mut description = thesis();
    description.smmus[0].dma_coherent = true;
    for channel in &mut description.dma_channels {
        channel.dma_coherent = channel.bus_width == 64;
    }
    let board = Board::of(description, true);
    run(&board, 6, |_| DomainSpec::Stage1(Paging::default()), |name| name.starts_with("lpd"));
}
