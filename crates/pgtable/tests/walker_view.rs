//! What a walker sees while a table changes: at every moment the old translation, the new one or a fault, never
//! anything else; and after a call has returned, the new state for certain.

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::{MEMORY, Walker};
use portcullis_arch::{Iova, Pa};
use portcullis_hal::fake::FakeMemory;
use portcullis_hal::{Block, DmaMemory};
use portcullis_pgtable::{Config, Flush, Granule, NoFlush, PageTable, Prot, Stage1};

type Hook = Box<dyn FnMut(&FakeMemory) + Send>;

/// Memory that calls a hook around every store.
struct Watched {
    memory: FakeMemory,
    /// After every store, clean and barrier.
    after: Mutex<Option<Hook>>,
    /// Once, before the next compare-and-swap.
    before_cas: Mutex<Option<Hook>>,
    /// Once, after the next compare-and-swap.
    after_cas: Mutex<Option<Hook>>,
}

impl Watched {
    fn new(memory: FakeMemory) -> Arc<Self> {
        let none = || Mutex::new(None);
        Arc::new(Self { memory, after: none(), before_cas: none(), after_cas: none() })
    }
    fn look(&self) {
        // A hook that stores must not be called for its own stores.
        if let Ok(mut hook) = self.after.try_lock()
            && let Some(hook) = hook.as_mut()
        {
            hook(&self.memory);
        }
    }
    fn once(&self, hook: &Mutex<Option<Hook>>) {
        let taken = hook.lock().unwrap().take();
        if let Some(mut hook) = taken {
            hook(&self.memory);
        }
    }
}

impl DmaMemory for Watched {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        self.memory.alloc(len, align)
    }
    fn free(&self, block: Block) {
        self.memory.free(block);
    }
    fn load64(&self, pa: Pa) -> u64 {
        self.memory.load64(pa)
    }
    fn store64(&self, pa: Pa, value: u64) {
        self.memory.store64(pa, value);
        self.look();
    }
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        self.once(&self.before_cas);
        let result = self.memory.cas64(pa, expected, new);
        self.once(&self.after_cas);
        self.look();
        result
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        self.memory.read(pa, buf);
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        self.memory.write(pa, buf);
    }
    fn clean(&self, pa: Pa, len: usize) {
        self.memory.clean(pa, len);
        self.look();
    }
    fn invalidate(&self, pa: Pa, len: usize) {
        self.memory.invalidate(pa, len);
    }
    fn wmb(&self) {
        self.memory.wmb();
        self.look();
    }
}

const KINDS: usize = 3;
const LEN: usize = 1 << 20;

fn memory(kind: usize, seed: u64) -> FakeMemory {
    match kind {
        0 => FakeMemory::reordering(MEMORY, LEN, seed),
        1 => FakeMemory::non_coherent(MEMORY, LEN),
        _ => FakeMemory::non_coherent_reordering(MEMORY, LEN, seed),
    }
}

fn config(kind: usize) -> Config<Stage1> {
    Config::new(Granule::K4, 48, 48).coherent_walk(kind == 0)
}

type Table = PageTable<Stage1, Arc<Watched>>;

/// Descriptors that a walk to an address may end at (0 for a fault).
type Allowed = Arc<Mutex<BTreeMap<u64, Vec<u64>>>>;

/// Watches a table: after every store, walks to all watched addresses.
fn watch(memory: &Watched, walker: Walker) -> Allowed {
    let allowed = Allowed::default();
    let watched = allowed.clone();
    *memory.after.lock().unwrap() = Some(Box::new(move |memory| {
        for (&iova, descriptors) in watched.lock().unwrap().iter() {
            let seen = walker.device(memory, iova).map_or(0, |leaf| leaf.descriptor);
            assert!(descriptors.contains(&seen), "{iova:#x}: walker found {seen:#x}, not {descriptors:x?}");
        }
    }));
    allowed
}

fn allow(allowed: &Allowed, iovas: &[u64], descriptor: impl Fn(u64) -> Vec<u64>) {
    *allowed.lock().unwrap() = iovas.iter().map(|&iova| (iova, descriptor(iova))).collect();
}

/// A flush that demands that the changed range can no longer be reached as it was.
struct Demands<'a> {
    memory: &'a Watched,
    walker: Walker,
    /// What a walk must not find any more.
    old: &'a dyn Fn(u64) -> u64,
    blocks: usize,
    calls: usize,
    /// True if a table goes after each call of `table`.
    frees: bool,
}

impl Demands<'_> {
    fn check(&mut self, iova: u64, len: u64) {
        self.calls += 1;
        assert_eq!(self.memory.memory.outstanding(), self.blocks, "nothing is freed before its flush");
        for at in (iova..iova + len).step_by(0x1000) {
            let seen = self.walker.device(&self.memory.memory, at).map_or(0, |leaf| leaf.descriptor);
            assert_ne!(seen, (self.old)(at), "{at:#x} is still visible when it is flushed");
        }
    }
}

impl Flush for Demands<'_> {
    fn leaf(&mut self, iova: u64, len: u64, _: u64) {
        self.check(iova, len);
    }
    fn table(&mut self, iova: u64, len: u64) {
        self.check(iova, len);
        self.blocks -= usize::from(self.frees);
    }
}

#[test]
fn a_walker_sees_old_or_new_at_every_moment() {
    let first = 0x7000_0000;
    let wb = |iova: u64| (0x10_0000_0000 + iova) | 0xf47;
    let ro = |iova: u64| (0x10_0000_0000 + iova) | 0xfc7;
    let device = |iova: u64| (0x10_0000_0000 + iova) | 0xe4b;
    for kind in 0..KINDS {
        for seed in 0..12 {
            let memory = Watched::new(memory(kind, seed));
            let table = PageTable::new(memory.clone(), config(kind)).unwrap();
            let walker = Walker::stage1(&table.registers());
            let allowed = watch(&memory, walker);
            // Over two tables; neighbours on both sides stay unmapped.
            let (iova, len) = (first + 0x1f_c000, 0x8000);
            let inside: Vec<u64> = (iova..iova + len).step_by(0x1000).collect();
            let outside = [iova - 0x1000, iova + len, first, first + 0x40_0000];
            let all: Vec<u64> = inside.iter().chain(&outside).copied().collect();
            let step = |old: &dyn Fn(u64) -> u64, new: &dyn Fn(u64) -> u64, call: &dyn Fn(&Table)| {
                let is_inside = |at: &u64| inside.contains(at);
                allow(&allowed, &all, |at| if is_inside(&at) { vec![0, old(at), new(at)] } else { vec![0] });
                call(&table);
                allow(&allowed, &all, |at| if is_inside(&at) { vec![new(at)] } else { vec![0] });
                memory.look();
            };
            let demands = |old| Demands {
                memory: &memory,
                walker,
                old,
                blocks: memory.memory.outstanding(),
                calls: 0,
                frees: false,
            };
            let none = |_| 0;
            step(&none, &wb, &|table| {
                table.map(Iova(iova), Pa(0x10_0000_0000 + iova), len, Prot::RW.cached()).unwrap();
            });
            step(&wb, &ro, &|table| {
                let mut flush = demands(&wb);
                table.protect(Iova(iova), len, Prot::READ.cached(), &mut flush).unwrap();
                assert_eq!(flush.calls, 2, "one per table");
            });
            step(&ro, &device, &|table| {
                let mut flush = demands(&ro);
                table.protect(Iova(iova), len, Prot::RW.device(), &mut flush).unwrap();
            });
            step(&device, &none, &|table| {
                let mut flush = demands(&device);
                assert_eq!(table.unmap(Iova(iova), len, &mut flush), Ok(len));
                assert_eq!(flush.calls, 2, "one per table");
            });
            step(&none, &wb, &|table| {
                table.map(Iova(iova), Pa(0x10_0000_0000 + iova), len, Prot::RW.cached()).unwrap();
            });
            step(&wb, &none, &|table| {
                let mut flush = Demands { frees: true, ..demands(&wb) };
                assert_eq!(table.unmap(Iova(first), 0x40_0000, &mut flush), Ok(len));
                assert_eq!((flush.calls, table.table_count()), (2, 3), "both tables were flushed and freed");
            });
            *memory.after.lock().unwrap() = None;
            drop(table);
            memory.memory.assert_clean();
        }
    }
}

#[test]
fn a_block_is_visible_when_map_returns_and_gone_when_it_is_flushed() {
    let block = |iova: u64| (iova & !0x1f_ffff) | 0xf45;
    for kind in 0..KINDS {
        for seed in 0..12 {
            let memory = Watched::new(memory(kind, seed));
            let table = PageTable::new(memory.clone(), config(kind)).unwrap();
            let walker = Walker::stage1(&table.registers());
            let allowed = watch(&memory, walker);
            let iovas = [0x60_0000, 0x80_0000, 0xa0_0000];
            allow(&allowed, &iovas, |at| vec![0, block(at)]);
            table.map(Iova(0x60_0000), Pa(0x60_0000), 0x60_0000, Prot::RW.cached()).unwrap();
            allow(&allowed, &iovas, |at| vec![block(at)]);
            memory.look();
            allow(&allowed, &iovas, |at| vec![0, block(at)]);
            let blocks = memory.memory.outstanding();
            let mut flush = Demands { memory: &memory, walker, old: &block, blocks, calls: 0, frees: false };
            assert_eq!(table.unmap(Iova(0x60_0000), 0x60_0000, &mut flush), Ok(0x60_0000));
            assert_eq!(flush.calls, 1, "neighbouring blocks are one report");
        }
    }
}

/// A second caller, in the middle of a first one's call, on another page of the same table.
fn second_caller(table: &Arc<Table>, walker: Walker) -> Hook {
    let table = table.clone();
    Box::new(move |memory| {
        table.map(Iova(0x5000), Pa(0x9_5000), 0x1000, Prot::RW).unwrap();
        assert_eq!(walker.device(memory, 0x5000).unwrap().pa, 0x9_5000, "visible when its map returns");
    })
}

#[test]
fn a_caller_that_finds_a_table_just_installed_does_not_rely_on_its_maker_to_clean_it() {
    for (kind, neighbour) in (0..KINDS).flat_map(|kind| [(kind, false), (kind, true)]) {
        let memory = Watched::new(memory(kind, 7));
        let table = Arc::new(PageTable::new(memory.clone(), config(kind)).unwrap());
        let walker = Walker::stage1(&table.registers());
        if neighbour {
            // So that only the last table is new.
            table.map(Iova(0x20_0000), Pa(0), 0x1000, Prot::RW).unwrap();
        }
        *memory.after_cas.lock().unwrap() = Some(second_caller(&table, walker));
        table.map(Iova(0x3000), Pa(0x9_3000), 0x1000, Prot::RW).unwrap();
        assert_eq!(walker.device(&memory.memory, 0x3000).unwrap().pa, 0x9_3000);
        assert_eq!(walker.device(&memory.memory, 0x5000).unwrap().pa, 0x9_5000);
        drop(table);
        memory.memory.assert_clean();
    }
}

#[test]
fn a_caller_whose_table_comes_second_uses_the_first() {
    for kind in 0..KINDS {
        let memory = Watched::new(memory(kind, 7));
        let table = Arc::new(PageTable::new(memory.clone(), config(kind)).unwrap());
        let walker = Walker::stage1(&table.registers());
        *memory.before_cas.lock().unwrap() = Some(second_caller(&table, walker));
        table.map(Iova(0x3000), Pa(0x9_3000), 0x1000, Prot::RW).unwrap();
        assert_eq!(walker.device(&memory.memory, 0x3000).unwrap().pa, 0x9_3000);
        assert_eq!(table.table_count(), 4);
        assert_eq!(memory.memory.outstanding(), 4, "the loser gave its table back");
        drop(table);
        memory.memory.assert_clean();
    }
}

#[test]
fn overlapping_callers_get_an_error_and_lose_no_table() {
    use portcullis_pgtable::MapError;
    // A page is mapped by the second caller at the place where the first one is about to store a block.
    let memory = Watched::new(FakeMemory::plain(MEMORY, LEN));
    let table = Arc::new(PageTable::new(memory.clone(), config(0)).unwrap());
    table.map(Iova(0x4000_0000), Pa(0), 0x1000, Prot::RW).unwrap();
    let second = table.clone();
    *memory.before_cas.lock().unwrap() = Some(Box::new(move |_| {
        second.map(Iova(0x4020_1000), Pa(0x1000), 0x1000, Prot::RW).unwrap();
    }));
    let raced = table.map(Iova(0x4020_0000), Pa(0), 0x20_0000, Prot::RW);
    assert_eq!(raced, Err(MapError::Raced { iova: 0x4020_0000 }));
    assert_eq!(table.lookup(Iova(0x4020_1000)).unwrap().pa, Pa(0x1000));
    // Two callers unmap the same table: one frees it.
    let second = table.clone();
    *memory.before_cas.lock().unwrap() = Some(Box::new(move |_| {
        assert_eq!(second.unmap(Iova(0x4020_0000), 0x20_0000, &mut NoFlush), Ok(0x1000));
    }));
    assert_eq!(table.unmap(Iova(0x4020_0000), 0x20_0000, &mut NoFlush), Ok(0));
    drop(table);
    memory.memory.assert_clean();
}
