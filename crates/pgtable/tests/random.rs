//! Random calls against a shadow that is nothing but a list of segments; an independent walk sees the same.

mod common;

use common::{Leaf, Walker, plain};
use portcullis_arch::Pa;
use portcullis_hal::DmaMemory;
use portcullis_hal::fake::FakeMemory;
use portcullis_pgtable::{
    Concatenation, Config, Flush, Granule, Half, MapError, PageTable, Prot, ProtectError, Stage, Stage1,
    Stage2, UnmapError,
};
use proptest::collection::vec;
use proptest::prelude::*;
use std::sync::Arc;

/// In units of pages, so that every granule gets the same calls.
#[derive(Clone, Debug)]
enum Call {
    Map { at: u64, pa: u64, pages: u64, prot: usize },
    Unmap { at: u64, pages: u64 },
    Protect { at: u64, pages: u64, prot: usize },
    FreeEmpty,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Segment {
    at: u64,
    len: u64,
    pa: u64,
    prot: usize,
}

impl Segment {
    fn end(&self) -> u64 {
        self.at + self.len
    }
    fn cut(&self, from: u64, to: u64) -> Option<Segment> {
        let (from, to) = (self.at.max(from), self.end().min(to));
        (from < to).then(|| Segment { at: from, len: to - from, pa: self.pa + (from - self.at), ..*self })
    }
}

/// Collects what was reported and checks that nothing of it can be reached any more.
struct Checked<'a> {
    memory: &'a FakeMemory,
    walker: &'a Walker,
    reported: Vec<(u64, u64)>,
    /// False while only permissions change.
    gone: bool,
}

impl Checked<'_> {
    fn note(&mut self, iova: u64, len: u64) {
        if self.gone {
            for at in [iova, iova + len / 2, iova + len - 1] {
                assert_eq!(self.walker.device(self.memory, at), None);
            }
        }
        self.reported.push((iova, len));
    }
    fn covers(&self, at: u64) -> bool {
        self.reported.iter().any(|&(iova, len)| at >= iova && at - iova < len)
    }
}

impl Flush for Checked<'_> {
    fn leaf(&mut self, iova: u64, len: u64, granule: u64) {
        assert!(len > 0 && len.is_multiple_of(granule) && iova.is_multiple_of(granule));
        self.note(iova, len);
    }
    fn table(&mut self, iova: u64, len: u64) {
        // Of a break only: the new leaf comes after this.
        let gone = core::mem::replace(&mut self.gone, true);
        self.note(iova, len);
        self.gone = gone;
    }
}

struct World<S: Stage> {
    memory: Arc<FakeMemory>,
    table: PageTable<S, Arc<FakeMemory>>,
    walker: Walker,
    prots: [Prot<S>; 4],
    granule: u64,
    first: u64,
    shadow: Vec<Segment>,
}

impl<S: Stage> World<S> {
    fn leaf(&self, at: u64) -> Option<Leaf> {
        self.walker.walk(at, |pa| self.memory.load64(Pa(pa)))
    }

    /// The block that a range cuts, at its start or at its end.
    fn cut_block(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        let block = |at: u64| self.leaf(at).map(|leaf| (at & !(leaf.size - 1), leaf.size));
        let start = block(from).filter(|&(base, size)| base < from || to - base < size);
        start.or_else(|| block(to - 1).filter(|&(base, size)| base + (size - 1) > to - 1))
    }

    fn mapped(&self, from: u64, to: u64) -> u64 {
        self.shadow.iter().filter_map(|segment| segment.cut(from, to)).map(|s| s.len).sum()
    }

    fn remove(&mut self, from: u64, to: u64) {
        let keep =
            |s: &Segment| [s.cut(0, from), s.cut(to, u64::MAX)].into_iter().flatten().collect::<Vec<_>>();
        self.shadow = self.shadow.iter().flat_map(keep).collect();
    }

    fn apply(&mut self, call: &Call) {
        let granule = self.granule;
        let range = |at: u64, pages: u64| (self.first + at * granule, pages * granule);
        let flush = |gone| Checked { memory: &self.memory, walker: &self.walker, reported: vec![], gone };
        match *call {
            Call::Map { at, pa, pages, prot } => {
                let (at, len) = range(at, pages);
                let pa = pa * granule;
                let taken = self.shadow.iter().filter_map(|s| s.cut(at, at + len)).map(|s| s.at).min();
                let result = self.table.map(at.into(), Pa(pa), len, self.prots[prot]);
                assert_eq!(result, taken.map_or(Ok(()), |iova| Err(MapError::AlreadyMapped { iova })));
                if taken.is_none() {
                    self.shadow.push(Segment { at, len, pa, prot });
                }
            }
            Call::Unmap { at, pages } => {
                let (at, len) = range(at, pages);
                let cut = self.cut_block(at, at + len);
                let mut flush = flush(true);
                let result = self.table.unmap(at.into(), len, &mut flush);
                if let Some((block, size)) = cut {
                    assert_eq!(result, Err(UnmapError::PartialBlock { block, size }));
                    assert!(flush.reported.is_empty());
                    return;
                }
                assert_eq!(result, Ok(self.mapped(at, at + len)));
                for segment in self.shadow.iter().filter_map(|s| s.cut(at, at + len)) {
                    assert!(flush.covers(segment.at) && flush.covers(segment.end() - 1), "{segment:x?}");
                }
                self.remove(at, at + len);
            }
            Call::Protect { at, pages, prot } => {
                let (at, len) = range(at, pages);
                let cut = self.cut_block(at, at + len);
                let mut flush = flush(false);
                let result = self.table.protect(at.into(), len, self.prots[prot], &mut flush);
                if self.mapped(at, at + len) < len {
                    // Which of both reasons comes first is not promised.
                    assert!(matches!(
                        result,
                        Err(ProtectError::NotMapped { .. })
                            | Err(ProtectError::Range(UnmapError::PartialBlock { .. }))
                    ));
                } else if let Some((block, size)) = cut {
                    assert_eq!(result, Err(UnmapError::PartialBlock { block, size }.into()));
                } else {
                    assert_eq!(result, Ok(()));
                    let inside: Vec<_> = self.shadow.iter().filter_map(|s| s.cut(at, at + len)).collect();
                    for segment in &inside {
                        let changed = self.prots[segment.prot] != self.prots[prot];
                        assert!(!changed || flush.covers(segment.at) && flush.covers(segment.end() - 1));
                    }
                    self.remove(at, at + len);
                    self.shadow.extend(inside.into_iter().map(|s| Segment { prot, ..s }));
                    return;
                }
                assert!(flush.reported.is_empty());
            }
            Call::FreeEmpty => {
                let (memory, walker) = (self.memory.clone(), self.walker);
                let mut flush = Checked { memory: &memory, walker: &walker, reported: vec![], gone: true };
                self.table.free_empty_tables(&mut flush);
            }
        }
    }

    /// Lookup and walk agree with the shadow at the edges of every segment.
    fn check(&self) {
        for segment in &self.shadow {
            let middle = segment.at + segment.len / 2;
            for at in [segment.at, segment.at + 1, middle, segment.end() - 1] {
                let pa = segment.pa + (at - segment.at);
                let mapping = self.table.lookup(at.into()).unwrap();
                assert_eq!((mapping.pa, mapping.prot), (Pa(pa), self.prots[segment.prot]), "at {at:#x}");
                let leaf = self.leaf(at).unwrap();
                assert_eq!((leaf.pa, leaf.size), (pa, mapping.page_size));
                assert_eq!(
                    self.walker.device(&self.memory, at),
                    Some(leaf),
                    "visible when the call has returned"
                );
                assert_eq!((leaf.descriptor, leaf.level), (mapping.descriptor, mapping.level.into()));
            }
            for at in [segment.at.wrapping_sub(1), segment.end()] {
                let expected = self.mapped(at, at.saturating_add(1)) > 0;
                assert_eq!(self.table.lookup(at.into()).is_some(), expected, "at {at:#x}");
                assert_eq!(self.leaf(at).is_some(), expected, "at {at:#x}");
            }
        }
    }
}

fn run<S: Stage>(
    memory: Arc<FakeMemory>,
    config: Config<S>,
    walker: impl Fn(&S::Registers) -> Walker,
    prots: [Prot<S>; 4],
    calls: &[Call],
) {
    let table = PageTable::new(memory.clone(), config).unwrap();
    let (walker, granule) = (walker(&table.registers()), config.granule.size());
    let first = portcullis_pgtable::InputAddress::get(table.input_range().0);
    let mut world = World { memory: memory.clone(), table, walker, prots, granule, first, shadow: vec![] };
    for call in calls {
        world.apply(call);
        world.check();
    }
    drop(world);
    memory.assert_clean();
}

/// Pages numbers near the places where tables and blocks of the 4K granule begin.
fn place() -> impl Strategy<Value = u64> {
    let base = prop_oneof![4 => 0u64..4, 2 => Just(512), 2 => Just(1024), 1 => Just(1 << 18)];
    (base, prop_oneof![3 => Just(0u64), 2 => 0u64..20, 1 => 500u64..512]).prop_map(|(base, more)| base + more)
}

fn pages() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 1u64..40, 4 => (1u64..4).prop_map(|n| n * 512), 2 => 500u64..1200, 1 => Just(1 << 18)]
}

fn call() -> impl Strategy<Value = Call> {
    let map =
        (place(), place(), any::<bool>(), pages(), 0usize..4).prop_map(|(at, other, same, pages, prot)| {
            // A long run of pages that cannot be blocks is only slow.
            let same = same || pages > 2000;
            Call::Map { at, pa: if same { at + 4096 } else { other }, pages, prot }
        });
    prop_oneof![
        8 => map,
        5 => (place(), pages()).prop_map(|(at, pages)| Call::Unmap { at, pages }),
        3 => (place(), pages(), 0usize..4).prop_map(|(at, pages, prot)| Call::Protect { at, pages, prot }),
        1 => Just(Call::FreeEmpty),
    ]
}

fn stage1_prots() -> [Prot<Stage1>; 4] {
    [Prot::RW.cached(), Prot::READ.cached().noexec(), Prot::RW.privileged(), Prot::READ.device()]
}

fn stage2_prots() -> [Prot<Stage2>; 4] {
    [Prot::RW.cached(), Prot::READ.cached().noexec(), Prot::WRITE.cached(), Prot::RW.device()]
}

fn granule() -> impl Strategy<Value = Granule> {
    prop_oneof![3 => Just(Granule::K4), 1 => Just(Granule::K16), 1 => Just(Granule::K64)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]

    #[test]
    fn stage_1_does_what_the_shadow_does(
        granule in granule(), bits in 40u8..=48, upper in any::<bool>(), coherent in any::<bool>(),
        calls in vec(call(), 1..30),
    ) {
        let half = if upper { Half::Upper } else { Half::Lower };
        let config = Config::<Stage1>::new(granule, bits, 48).half(half).coherent_walk(coherent);
        run(plain(24 << 20), config, Walker::stage1, stage1_prots(), &calls);
    }

    #[test]
    fn stage_2_does_what_the_shadow_does(
        granule in granule(), bits in 40u8..=43, forced in any::<bool>(), calls in vec(call(), 1..30),
    ) {
        let choice = if forced { Concatenation::Forced } else { Concatenation::Linux };
        let possible = granule != Granule::K16 || bits <= 40;
        let choice = if possible && granule == Granule::K4 { choice } else { Concatenation::Linux };
        let config = Config::<Stage2>::new(granule, bits, 48).concatenation(choice);
        run(plain(24 << 20), config, Walker::stage2, stage2_prots(), &calls);
    }

    /// The flush is behind a barrier and clean: what it reports is gone for a device that sees stores late.
    #[test]
    fn a_late_device_sees_what_the_shadow_sees(
        seed in any::<u64>(), kind in 0..3, calls in vec(call(), 1..12),
    ) {
        let len = 8 << 20;
        let memory = match kind {
            0 => FakeMemory::reordering(common::MEMORY, len, seed),
            1 => FakeMemory::non_coherent(common::MEMORY, len),
            _ => FakeMemory::non_coherent_reordering(common::MEMORY, len, seed),
        };
        let config = Config::<Stage1>::new(Granule::K4, 48, 48).coherent_walk(kind == 0);
        let small = |call: &Call| !matches!(call, Call::Map { pages: 600.., .. });
        let calls: Vec<_> = calls.into_iter().filter(small).collect();
        run(Arc::new(memory), config, Walker::stage1, stage1_prots(), &calls);
    }
}
