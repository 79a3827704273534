//! The TLB against a plain model: after legal invalidation a port never uses what was unmapped, and before it nothing but
//! what was mapped once.

#[path = "rig/random.rs"]
mod random;
mod rig;

use std::collections::BTreeMap;

use portcullis_arch::{Access, Iova};
use portcullis_bus::SystemMemory;
use portcullis_smmuv3::Port;
use random::Rng;
use rig::*;

const PAGES: u64 = 24;

/// What a page leads to: a data page, and whether it may be written.
type Leaf = Option<(u64, bool)>;

struct Space {
    root: u64,
    asid: u64,
    now: BTreeMap<u64, Leaf>,
    /// What a TLB may still hold of a page.
    stale: BTreeMap<u64, Vec<Leaf>>,
}

fn leaf_word(leaf: Leaf, global: bool) -> u64 {
    let global = if global { 0 } else { 1 << 11 };
    leaf.map_or(0, |(page, write)| page | (RW & !(1 << 11)) | global | u64::from(!write) << 7)
}

fn check(p: &mut Port<SystemMemory>, s: &Space, sid: u32, va: u64, access: Access) {
    let page = va >> 12;
    let found = p.translate(&from(sid), Iova(va), access).ok().map(|t| t.pa.get());
    let answer = |leaf: &Leaf| {
        leaf.filter(|(_, write)| *write || access == Access::Read).map(|(at, _)| at | va & 0xfff)
    };
    let now = s.now.get(&page).copied().unwrap_or(None);
    let mut may = vec![answer(&now)];
    may.extend(s.stale.get(&page).into_iter().flatten().map(answer));
    assert!(may.contains(&found), "stream {sid}, page {page:#x}, {access}: {found:x?}, not one of {may:x?}");
}

#[test]
fn a_port_agrees_with_the_tables_after_legal_invalidation() {
    for seed in 0..12 {
        let mut rng = Rng(seed);
        let mut r = Rig::started(caps());
        let mut spaces: Vec<Space> = (1..=3u32)
            .map(|sid| {
                let root = r.stage1(sid, A | R);
                // An ASID of its own for each stream.
                let mut words = cd(root, A | R);
                words[0] = words[0] & !(0xffff << 48) | u64::from(sid) << 48;
                r.cd(u64::from(sid), words);
                Space { root, asid: sid.into(), now: BTreeMap::new(), stale: BTreeMap::new() }
            })
            .collect();
        let mut ports = [r.port(), r.port()];
        for _ in 0..6000 {
            let n = rng.below(3) as usize;
            let page = rng.below(PAGES);
            match rng.below(30) {
                0 | 1 => {
                    let s = &mut spaces[n];
                    let leaf = if rng.one_in(3) {
                        None
                    } else {
                        Some((DATA + 0x1000 * rng.below(64), rng.one_in(2)))
                    };
                    let old = s.now.insert(page, leaf).unwrap_or(None);
                    s.stale.entry(page).or_default().push(old);
                    r.map(s.root, page << 12, leaf_word(leaf, false));
                }
                2 => {
                    // A legal invalidation of some shape, and what it covers.
                    let (asid, first) = (spaces[n].asid, page);
                    let (command, all, count) = match rng.below(6) {
                        0 => ([0x12 | asid << 48, page << 12 | rng.below(2)], false, 1),
                        1 => ([0x13, page << 12], true, 1),
                        2 => {
                            let num = rng.below(4);
                            (
                                [0x12 | num << 12 | 1 << 20 | asid << 48, page << 12 | 1 << 10],
                                false,
                                2 * (num + 1),
                            )
                        }
                        3 => ([0x11 | asid << 48, 0], false, u64::MAX),
                        4 => ([0x10, 0], true, u64::MAX),
                        _ => ([0x30, 0], true, u64::MAX),
                    };
                    let first = if count == u64::MAX { 0 } else { first };
                    r.command(command);
                    r.command(SYNC);
                    assert_eq!(r.command_error(), None);
                    for (k, s) in spaces.iter_mut().enumerate() {
                        if all || k == n {
                            s.stale.retain(|p, _| *p < first || *p - first >= count);
                        }
                    }
                }
                3 if rng.one_in(8) => r.cfgi_all(),
                _ => {
                    let access = if rng.one_in(2) { Access::Read } else { Access::Write };
                    let va = page << 12 | rng.below(0x1000);
                    let port = &mut ports[rng.below(2) as usize];
                    check(port, &spaces[n], n as u32 + 1, va, access);
                }
            }
            if r.r(EVENTQ_PROD) != r.r(EVENTQ_CONS) {
                r.events();
            }
        }
        let hits: u64 = ports.iter().map(|p| p.stats().hits).sum();
        assert!(hits > 200, "only {hits} hits");
    }
}
