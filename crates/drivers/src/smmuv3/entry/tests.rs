//! The published transitions, and an observer that looks at the entry as hardware may.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use alloc::{format, string::ToString};

use portcullis_hal::Block;
use portcullis_hal::fake::FakeMemory;
use spin::Mutex;

use super::*;

type Words = [u64; WORDS];

type Look = Box<dyn FnMut(&FakeMemory) + Send>;

/// Memory that calls somebody after every single store.
struct Watched {
    memory: FakeMemory,
    look: Mutex<Option<Look>>,
}

impl Watched {
    fn seen(&self) {
        if let Some(look) = &mut *self.look.lock() {
            look(&self.memory);
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
        self.seen();
    }
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        self.memory.cas64(pa, expected, new)
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        self.memory.read(pa, buf);
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        self.memory.write(pa, buf);
        self.seen();
    }
    fn clean(&self, pa: Pa, len: usize) {
        self.memory.clean(pa, len);
        self.seen();
    }
    fn invalidate(&self, pa: Pa, len: usize) {
        self.memory.invalidate(pa, len);
    }
    fn wmb(&self) {
        self.memory.wmb();
        self.seen();
    }
}

fn bits(ranges: &[(u32, u32)]) -> u64 {
    ranges.iter().fold(0, |all, &(high, low)| all | (u64::MAX >> (63 - high + low)) << low)
}

/// What hardware makes of an STE: the fields that decide, from the bit positions of the manual (section 5.2), written
/// down without a look at the code under test.
fn ste_view(e: &Words) -> Words {
    let mut view = [0; WORDS];
    if e[0] & 1 == 0 {
        return view;
    }
    view[0] = 1;
    let config = e[0] >> 1 & 7;
    if config & 4 == 0 {
        return view;
    }
    let (s1, s2) = (config & 1 != 0, config & 2 != 0);
    view[0] |= e[0] & bits(&[(3, 1)]);
    // DRE, CONT, DCP, MEV, NSCFG, PRIVCFG, INSTCFG.
    view[1] = e[1] & bits(&[(12, 12), (16, 13), (17, 17), (19, 19), (47, 46), (49, 48), (51, 50)]);
    if s1 {
        view[0] |= e[0] & bits(&[(5, 4), (55, 6), (63, 59)]);
        view[1] |= e[1] & bits(&[(1, 0), (3, 2), (5, 4), (7, 6), (26, 26), (27, 27)]);
        view[2] |= e[2] & bits(&[(15, 0)]);
        if !s2 {
            view[1] |= e[1] & bits(&[(31, 30)]);
        }
    }
    if s1 || s2 {
        view[1] |= e[1] & bits(&[(29, 28), (18, 18)]);
    }
    if s2 {
        view[1] |= e[1] & bits(&[(11, 8), (25, 25)]);
        view[2] |= e[2] & bits(&[(15, 0), (63, 32)]);
        view[3] |= e[3] & bits(&[(3, 2), (55, 4)]);
    }
    // MemAttr, MTCFG, ALLOCCFG, SHCFG: for what stage 1 does not give attributes.
    if !s1 || s2 || e[1] & 3 == 1 {
        view[1] |= e[1] & bits(&[(35, 32), (36, 36), (40, 37), (45, 44)]);
    }
    view
}

/// The same for a CD (section 5.4).
fn cd_view(e: &Words) -> Words {
    if e[0] >> 31 & 1 == 0 {
        return [0; WORDS];
    }
    let mut view = *e;
    if e[0] >> 14 & 1 != 0 {
        view[0] &= !bits(&[(13, 0)]);
        view[1] &= !bits(&[(51, 4)]);
    }
    view
}

type View = fn(&Words) -> Words;

/// What the observer found out.
#[derive(Debug, Default)]
struct Seen {
    /// Values of each word since the last sync. Hardware reads words in any order at any of these moments.
    since_sync: [Vec<u64>; WORDS],
    invalid: bool,
    wrong: Option<String>,
}

impl Seen {
    fn add(&mut self, entry: &Words) {
        for (values, word) in self.since_sync.iter_mut().zip(entry) {
            if !values.contains(word) {
                values.push(*word);
            }
        }
    }

    /// Every entry that hardware may have put together since the last sync is the old one, the new one or invalid.
    fn check(&mut self, view: View, old: &Words, new: &Words) {
        let mut combinations: Vec<Words> = vec![[0; WORDS]];
        for (index, values) in self.since_sync.iter().enumerate() {
            let with = |words: &Words| {
                let words = *words;
                values.iter().map(move |value| {
                    let mut words = words;
                    words[index] = *value;
                    words
                })
            };
            combinations = combinations.iter().flat_map(with).collect();
        }
        for entry in combinations {
            let seen = view(&entry);
            if seen == [0; WORDS] {
                self.invalid = true;
            } else if seen != view(old) && seen != view(new) {
                self.wrong = Some(format!("{entry:x?} between {old:x?} and {new:x?}"));
            }
        }
    }
}

/// Updates from `old` to `new` in memory of the given kind; gives the number of syncs and whether an invalid entry
/// was to be seen.
fn observe<T: Entry + core::fmt::Debug>(
    memory: FakeMemory,
    coherent: bool,
    view: View,
    old: T,
    new: T,
) -> Result<(usize, bool), String> {
    let memory = Watched { memory, look: Mutex::new(None) };
    let at = memory.alloc(64, 64).unwrap().pa;
    let live = Live::new(&memory, at, coherent);
    live.fill(&old);
    let read = move |memory: &FakeMemory| -> Words {
        core::array::from_fn(|index| memory.device_load64(at.wrapping_add(index as u64 * 8)))
    };
    assert_eq!(read(&memory.memory), old.words());
    let seen = Arc::new(Mutex::new(Seen::default()));
    seen.lock().add(&old.words());
    let watcher = seen.clone();
    *memory.look.lock() = Some(Box::new(move |memory| watcher.lock().add(&read(memory))));
    let mut syncs = 0;
    update(&live, &new, &mut || -> Result<(), ()> {
        let mut seen = seen.lock();
        let now = read(&memory.memory);
        seen.add(&now);
        seen.check(view, &old.words(), &new.words());
        seen.since_sync = Default::default();
        seen.add(&now);
        syncs += 1;
        Ok(())
    })
    .unwrap();
    let mut seen = seen.lock();
    seen.check(view, &old.words(), &new.words());
    if let Some(wrong) = seen.wrong.take() {
        return Err(wrong);
    }
    match read(&memory.memory) == new.words() {
        true => Ok((syncs, seen.invalid)),
        false => Err("the entry is not the new one in the end".to_string()),
    }
}

const INCOMING: u64 = 1 << 44;
const ATS: u64 = 1 << 28;
const PTR: u64 = 0xf0f0_f0f0_f000 & ((1 << 48) - 1);
/// S1CIR, S1COR, S1CSH.
const FETCH: u64 = 1 << 2 | 1 << 4 | 3 << 6;
const S1STALLD: u64 = 1 << 27;
const S2S: u64 = 1 << 57;

const fn ste(words: [u64; 4]) -> Ste {
    Ste([words[0], words[1], words[2], words[3], 0, 0, 0, 0])
}
const ABORT: Ste = ste([1, 0, 0, 0]);
const BYPASS: Ste = ste([1 | 4 << 1, INCOMING, 0, 0]);
/// Stage 1 with a table of substreams; `s1dss` 1 bypass, 2 descriptor 0.
const fn cdtable(pointer: u64, s1dss: u64, stall: bool) -> Ste {
    let shared = if s1dss == 1 { INCOMING } else { 0 };
    let stall = if stall { 0 } else { S1STALLD };
    ste([1 | 5 << 1 | 2 << 4 | pointer | 8 << 59, s1dss | FETCH | ATS | shared | stall, 0, 0])
}
/// VTCR, S2AA64, S2PTW and S2R.
const STAGE2: u64 = 0x0004_3539 << 32 | 1 << 51 | 1 << 54 | 1 << 58;
const fn stage2(stall: bool) -> Ste {
    ste([1 | 6 << 1, INCOMING | ATS, STAGE2 | if stall { S2S } else { 0 }, 0x8765_4321_0000])
}
const NESTED_S1DSS_BYPASS: Ste = ste([
    1 | 7 << 1 | 2 << 4 | PTR | 8 << 59,
    1 | FETCH | ATS | INCOMING | S1STALLD,
    STAGE2,
    0x8765_4321_0000,
]);

const S1_CD0: u64 =
    16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 1 << 45 | 1 << 46;
const fn s1_cd(asid: u64) -> Cd {
    Cd([S1_CD0 | 1 << 47 | asid << 48, 0x8765_4321_0000, 0, 0xf404_ff44, 0, 0, 0, 0])
}
/// A process's, which may stall.
const SVA_CD: Cd = Cd([S1_CD0 | 1 << 44 | 561 << 48, 0x1234_5678_9000, 0, 0xf404_ff44, 0, 0, 0, 0]);
/// After the process has ended: EPD0, no fields of TTB0, neither S nor R.
const SVA_RELEASED_CD: Cd = Cd([
    1 << 14 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 1 << 46 | 561 << 48,
    0,
    0,
    0xf404_ff44,
    0,
    0,
    0,
    0,
]);
const NO_CD: Cd = Cd([0; 8]);

/// The case list of Linux's `arm-smmu-v3-test.c`: from, to, syncs, and whether V = 0 is to be seen.
#[rustfmt::skip]
const STES: [(&str, Ste, Ste, usize, bool); 21] = [
    ("bypass to abort", BYPASS, ABORT, 2, false),
    ("abort to bypass", ABORT, BYPASS, 2, false),
    ("cdtable to abort", cdtable(PTR, 2, false), ABORT, 2, false),
    ("abort to cdtable", ABORT, cdtable(PTR, 2, false), 2, false),
    ("cdtable to bypass", cdtable(PTR, 2, false), BYPASS, 3, false),
    ("bypass to cdtable", BYPASS, cdtable(PTR, 2, false), 3, false),
    ("s1dss to bypass", cdtable(PTR, 2, false), cdtable(PTR, 1, false), 1, false),
    ("s1dss from bypass", cdtable(PTR, 1, false), cdtable(PTR, 2, false), 1, false),
    ("s1dss bypass to ste bypass", cdtable(PTR, 1, false), BYPASS, 2, false),
    ("ste bypass to s1dss bypass", BYPASS, cdtable(PTR, 1, false), 2, false),
    ("s2 to abort", stage2(false), ABORT, 2, false),
    ("abort to s2", ABORT, stage2(false), 2, false),
    ("s2 to bypass", stage2(false), BYPASS, 2, false),
    ("bypass to s2", BYPASS, stage2(false), 2, false),
    ("s1 to s2", cdtable(PTR, 2, false), stage2(false), 3, false),
    ("s2 to s1", stage2(false), cdtable(PTR, 2, false), 3, false),
    ("non-hitless", cdtable(PTR, 2, false), cdtable(0x4_b4b4_b4f0_f000, 1, false), 3, true),
    ("s1 to s2 stall", cdtable(PTR, 2, true), stage2(true), 3, false),
    ("s2 to s1 stall", stage2(true), cdtable(PTR, 2, true), 3, false),
    ("nested s1dss bypass to s1 bypass", NESTED_S1DSS_BYPASS, stage2(false), 2, false),
    ("s1 bypass to nested s1dss bypass", stage2(false), NESTED_S1DSS_BYPASS, 2, false),
];
/// Both ways of a case are two rows.
#[rustfmt::skip]
const CDS: [(&str, Cd, Cd, usize, bool); 7] = [
    ("s1 set", NO_CD, s1_cd(778), 2, true),
    ("s1 clear", s1_cd(778), NO_CD, 2, true),
    ("s1 change asid", s1_cd(778), s1_cd(777), 1, false),
    ("sva set", NO_CD, SVA_CD, 2, true),
    ("sva clear", SVA_CD, NO_CD, 2, true),
    ("sva release", SVA_CD, SVA_RELEASED_CD, 2, false),
    ("sva clear after release", SVA_RELEASED_CD, NO_CD, 2, true),
];

/// Every kind of memory, with whether it is coherent.
fn memories() -> impl Iterator<Item = (FakeMemory, bool)> {
    const BASE: u64 = 0x8000_0000;
    let reordering = (0..24).map(|seed| (FakeMemory::reordering(BASE, 4096, seed), true));
    let evicting = (0..24).map(|seed| (FakeMemory::non_coherent_reordering(BASE, 4096, seed), false));
    [(FakeMemory::plain(BASE, 4096), true), (FakeMemory::non_coherent(BASE, 4096), false)]
        .into_iter()
        .chain(reordering)
        .chain(evicting)
}

#[test]
fn published_ste_transitions_take_their_syncs_and_never_show_a_mixture() {
    for (name, from, to, syncs, invalid) in STES {
        for (memory, coherent) in memories() {
            assert_eq!(observe(memory, coherent, ste_view, from, to), Ok((syncs, invalid)), "{name}");
        }
    }
}

#[test]
fn published_cd_transitions_take_their_syncs_and_never_show_a_mixture() {
    for (name, from, to, syncs, invalid) in CDS {
        for (memory, coherent) in memories() {
            assert_eq!(observe(memory, coherent, cd_view, from, to), Ok((syncs, invalid)), "{name}");
        }
    }
}

#[test]
fn the_observer_notices_stores_in_the_wrong_order() {
    // Stage 1 to bypass with word 0 first, for which SHCFG is not ready yet.
    let (old, new) = (cdtable(PTR, 2, false), BYPASS);
    let mut seen = Seen::default();
    seen.add(&old.0);
    let mut wrong = old.0;
    wrong[0] = new.0[0];
    seen.add(&wrong);
    seen.check(ste_view, &old.0, &new.0);
    assert!(seen.wrong.is_some());
}

#[test]
fn used_bits_are_those_of_the_manual() {
    // Flipping a bit changes what hardware sees only if the bit is used. (The reverse need not hold: what is called
    // used without need costs a sync, not a mixture.)
    for (_, entry, ..) in STES {
        let used = entry.used();
        for word in 0..WORDS {
            for bit in 0..64 {
                let mut flipped = entry.0;
                flipped[word] ^= 1 << bit;
                let looked_at = ste_view(&flipped) != ste_view(&entry.0);
                assert!(!looked_at || used[word] >> bit & 1 != 0, "{:x?}: word {word} bit {bit}", entry.0);
            }
        }
        assert!(entry.0.iter().zip(used).all(|(word, used)| word & !used == 0), "{:x?}", entry.0);
    }
    for (_, entry, ..) in CDS {
        let used = entry.used();
        for word in 0..WORDS {
            for bit in 0..64 {
                let mut flipped = entry.0;
                flipped[word] ^= 1 << bit;
                let looked_at = cd_view(&flipped) != cd_view(&entry.0);
                assert!(!looked_at || used[word] >> bit & 1 != 0, "{:x?}: word {word} bit {bit}", entry.0);
            }
        }
    }
}

#[test]
fn any_two_entries_change_without_a_mixture() {
    let mut random = 0x1234_5678_9abc_def1_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let make = |next: &mut dyn FnMut() -> u64| -> Ste {
        let mut entry = Ste(core::array::from_fn(|_| next() & next()));
        // A small choice of values, so that words are equal as often as not.
        entry.0[2] &= 0x0000_0003_0000_0001;
        entry.0[3] &= 0x10_0000;
        entry.0[1] &= bits(&[(1, 0), (28, 28), (44, 44), (49, 49)]);
        entry.0[0] = entry.0[0] & 0x4000_000e | u64::from(next() & 7 != 0);
        let used = entry.used();
        Ste(core::array::from_fn(|index| entry.0[index] & used[index]))
    };
    let (mut invalid, mut hitless) = (0, 0);
    for round in 0..4000 {
        let (old, new) = (make(&mut next), make(&mut next));
        let memory = FakeMemory::reordering(0x8000_0000, 256, round);
        let (syncs, seen) = observe(memory, true, ste_view, old, new).unwrap();
        assert!(syncs <= 3);
        if seen && old.valid() && new.valid() {
            invalid += 1;
        } else {
            hitless += 1;
        }
    }
    assert!(invalid > 50 && hitless > 1000, "{invalid} {hitless}");
}

#[test]
fn an_error_of_a_sync_leaves_the_old_the_new_or_an_invalid_entry_and_can_be_repeated() {
    for (name, from, to, syncs, _) in STES {
        for fail in 0..syncs {
            let memory = FakeMemory::plain(0x8000_0000, 4096);
            let at = memory.alloc(64, 64).unwrap().pa;
            let live = Live::new(&memory, at, true);
            live.fill(&from);
            let mut count = 0;
            let result = update(&live, &to, &mut || {
                count += 1;
                if count > fail { Err(fail) } else { Ok(()) }
            });
            assert_eq!(result, Err(fail), "{name}");
            let left = ste_view(&live.read::<Ste>().0);
            assert!([ste_view(&from.0), ste_view(&to.0), [0; WORDS]].contains(&left), "{name} {fail}");
            update(&live, &to, &mut || Ok::<(), ()>(())).unwrap();
            assert_eq!(live.read::<Ste>(), to, "{name} {fail}");
        }
    }
}

#[test]
fn an_entry_that_is_right_already_is_not_touched() {
    let memory = FakeMemory::plain(0x8000_0000, 4096);
    let at = memory.alloc(64, 64).unwrap().pa;
    let live = Live::new(&memory, at, true);
    live.fill(&BYPASS);
    update(&live, &BYPASS, &mut || Err(())).unwrap();
}
