//! The TLB against a shadow that remembers everything it was told: a lookup may miss, but it never returns what the shadow
//! does not hold.

mod common;

use common::Random;
use portcullis_walk::tlb::{ContextIndex, Entry};
use portcullis_walk::{ContextKey, Perms, Regime, Scope, StageScope, Tlb, TlbStage};
use proptest::prelude::*;

const REGIMES: [Regime; 4] = [Regime::Guest, Regime::Hyp, Regime::HypHost, Regime::Monitor];
const STAGES: [TlbStage; 3] = [TlbStage::Stage1, TlbStage::Stage2, TlbStage::Combined];
const SCOPES: [StageScope; 3] = [StageScope::All, StageScope::Stage1AndCombined, StageScope::Stage2];
const VA_BITS: u8 = 40;

/// A few contexts that differ in one tag or another.
fn key(r: &mut Random) -> ContextKey {
    ContextKey {
        secure: r.below(4) == 0,
        regime: if r.below(4) == 0 { r.pick(&REGIMES) } else { Regime::Guest },
        stage: r.pick(&STAGES),
        vmid: r.below(2) as u16,
        asid: r.below(3) as u16,
        va_bits: VA_BITS,
    }
}

fn scope(r: &mut Random) -> Scope {
    Scope {
        secure: r.below(4) == 0,
        regime: (r.below(4) != 0)
            .then(|| r.pick(&[Regime::Guest, Regime::Guest, Regime::Hyp, Regime::Monitor])),
        vmid: r.flip().then(|| r.below(2) as u16),
        asid: r.flip().then(|| r.below(3) as u16),
        stages: r.pick(&SCOPES),
    }
}

#[derive(Clone, Copy, Debug)]
struct Held {
    key: ContextKey,
    first: u64,
    entry: Entry,
}

/// What a scope means, said once more in other words.
fn in_scope(s: &Scope, k: &ContextKey) -> bool {
    let stage = match s.stages {
        StageScope::All => true,
        StageScope::Stage1AndCombined => matches!(k.stage, TlbStage::Stage1 | TlbStage::Combined),
        StageScope::Stage2 => matches!(k.stage, TlbStage::Stage2),
    };
    let same = |a: Option<u16>, b: u16| a.is_none() || a == Some(b);
    stage && s.secure == k.secure && s.regime.is_none_or(|r| r == k.regime) && same(s.vmid, k.vmid)
}

struct Pair {
    tlb: Tlb,
    shadow: Vec<Held>,
    hits: usize,
    lookups: usize,
}

impl Pair {
    fn step(&mut self, r: &mut Random) {
        let sizes = [12u8, 12, 12, 14, 16, 16, 20, 21, 24, 25, 30];
        // Few pages, so that entries meet; some beyond what the invalidation's operand is cut to by its upper bits.
        let va =
            r.pick(&[0u64, 0, 1 << 21, 1 << 30, 0xff_c000_0000]) + r.below(64) * 0x1000 + r.below(0x1000);
        match r.below(100) {
            0..50 => {
                let key = key(r);
                let size_log2 = r.pick(&sizes);
                let leaf_log2 = if r.below(4) == 0 { r.pick(&sizes).max(size_log2) } else { size_log2 };
                let entry = Entry {
                    page: r.below(1 << 20) << 30,
                    size_log2,
                    leaf_log2,
                    perms: Perms(r.below(64) as u8),
                    attrs: r.next() as u8,
                    global: r.below(4) == 0,
                };
                let context = self.tlb.context(key);
                self.tlb.fill(context, va, entry);
                let first = va & !((1 << size_log2) - 1);
                let same = |h: &Held| {
                    h.key == key
                        && h.first == first
                        && (h.entry.size_log2, h.entry.leaf_log2) == (size_log2, leaf_log2)
                };
                self.shadow.retain(|h| !same(h));
                self.shadow.push(Held { key, first, entry });
                self.look(context, key, va);
            }
            50..85 => {
                let key = key(r);
                let context = self.tlb.context(key);
                self.look(context, key, va);
            }
            85..90 => {
                let s = scope(r);
                self.tlb.forget_contexts(&s);
                self.shadow.retain(|h| {
                    let asid = s.asid.is_none_or(|a| a == h.key.asid && !h.entry.global);
                    !(in_scope(&s, &h.key) && asid)
                });
                // Removing the global entries of that ASID as well is allowed, so only hits are compared.
            }
            90..93 => {
                let s = scope(r);
                let length = r.pick(&[1u64, 0x1000, 0x8000, 0x20_0000, 1 << 30, 1 << 39]) - 1;
                let top = r.pick(&[0, 0xffff_ff00_0000_0000]);
                let (start, last) = (va | top, (va + length) | top);
                let granule_log2 = r.pick(&[0, 12, 14, 16]);
                self.tlb.forget_range(&s, start, last, granule_log2);
                self.shadow.retain(|h| {
                    let size = 1u64 << h.entry.leaf_log2;
                    let first = h.first & !(size - 1) & ((1 << VA_BITS) - 1);
                    let covers = first <= (va & ((1 << VA_BITS) - 1)).saturating_add(length)
                        && (va & ((1 << VA_BITS) - 1)) < first + size;
                    let asid = s.asid.is_none_or(|a| a == h.key.asid) || h.entry.global;
                    // The granule is a hint: what it leaves may stay.
                    let named = h.entry.leaf_log2 >= granule_log2;
                    !(in_scope(&s, &h.key) && covers && asid && named)
                });
            }
            93..99 => {
                let s = scope(r);
                let operand = va | r.pick(&[0, 0xffff_ff00_0000_0000]);
                self.tlb.forget_address(&s, operand);
                self.shadow.retain(|h| {
                    let leaf = !((1u64 << h.entry.leaf_log2) - 1);
                    let covers = (h.first ^ va) & leaf & ((1 << VA_BITS) - 1) == 0;
                    let asid = s.asid.is_none_or(|a| a == h.key.asid) || h.entry.global;
                    !(in_scope(&s, &h.key) && covers && asid)
                });
            }
            _ if r.below(20) == 0 => {
                self.tlb.clear();
                self.shadow.clear();
            }
            _ => {}
        }
    }

    fn look(&mut self, context: ContextIndex, key: ContextKey, va: u64) {
        self.lookups += 1;
        let Some(hit) = self.tlb.lookup(&self.tlb.sizes(context), va) else { return };
        self.hits += 1;
        let size = 1u64 << hit.size_log2;
        assert_eq!(hit.left, size - va % size);
        let held = self.shadow.iter().find(|h| {
            h.key == key
                && h.first == va & !(size - 1)
                && h.entry.size_log2 == hit.size_log2
                && h.entry.page + va % size == hit.pa
                && (h.entry.perms, h.entry.attrs, h.entry.global) == (hit.perms, hit.attrs, hit.global)
        });
        assert!(held.is_some(), "{key:?} {va:#x} gave {hit:?}");
    }
}

fn pair(entries: usize) -> Pair {
    Pair { tlb: Tlb::new(entries), shadow: Vec::new(), hits: 0, lookups: 0 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_lookup_never_returns_what_the_shadow_does_not_hold(seed: u64, entries in prop::sample::select(vec![4usize, 16, 256, 4096])) {
        let mut r = Random(seed);
        let mut p = pair(entries);
        (0..400).for_each(|_| p.step(&mut r));
    }
}

#[test]
fn over_a_long_time_numbers_run_out_and_nothing_comes_back() {
    let mut r = Random(7);
    let mut p = pair(1024);
    let mut epochs = 0;
    let mut epoch = p.tlb.epoch();
    for _ in 0..400_000 {
        p.step(&mut r);
        if p.tlb.epoch() != epoch {
            epoch = p.tlb.epoch();
            epochs += 1;
        }
    }
    assert!(epochs > 10, "{epochs}");
    assert!(p.hits * 20 > p.lookups, "{} of {}", p.hits, p.lookups);
}
