//! The allocator as its users see it.

extern crate std;

use alloc::sync::Arc;
use alloc::vec::Vec;
use std::string::ToString;

use super::*;

const PAGE: u64 = 4096;
const MAX32: Iova = Iova(0xffff_ffff);
const MAX48: Iova = Iova((1 << 48) - 1);

fn domain(first: u64, last: u64, cpus: usize) -> Arc<IovaDomain> {
    Arc::new(
        IovaDomain::new(IovaConfig { granule: PAGE, first: Iova(first), last: Iova(last), cpus }).unwrap(),
    )
}

#[test]
fn the_first_allocations_come_from_the_top_down() {
    for cpus in [0, 2] {
        let domain = domain(0, MAX48.get(), cpus);
        assert_eq!(domain.alloc(0, 1, MAX32), Ok(Iova(0xffff_f000)));
        assert_eq!(domain.alloc(0, PAGE, MAX32), Ok(Iova(0xffff_e000)));
        assert_eq!(
            domain.alloc(0, PAGE, MAX48),
            Ok(Iova(if cpus == 0 { 0xffff_ffff_f000 } else { 0xffff_d000 }))
        );
    }
}

#[test]
fn sizes_are_rounded_as_linux_does_and_aligned_to_themselves() {
    let domain = domain(0, MAX48.get(), 0);
    for (pages, taken) in [(1, 1), (3, 4), (17, 32), (31, 32), (32, 32), (33, 33), (100, 100)] {
        let before = domain.usage().free;
        let iova = domain.alloc(0, pages * PAGE - 5, MAX32).unwrap();
        assert_eq!(before - domain.usage().free, taken * PAGE, "{pages} pages");
        assert!(iova.is_aligned(taken.next_power_of_two() * PAGE));
        domain.free(0, iova, pages * PAGE).unwrap();
        assert_eq!(domain.usage().free, before);
    }
    assert_eq!(domain.alloc(0, 0, MAX32), Err(IovaError::BadLength { len: 0 }));
}

#[test]
fn address_zero_and_what_lies_outside_of_the_aperture_are_never_used() {
    let domain = domain(0, 8 * PAGE + 5, 1);
    let mut all: Vec<u64> = (0..).map_while(|_| domain.alloc(0, PAGE, MAX48).ok()).map(Iova::get).collect();
    all.sort_unstable();
    assert_eq!(all, (1..8).map(|page| page * PAGE).collect::<Vec<_>>(), "the last page is not whole");
    for (first, last, granule) in [(0, 4095, PAGE), (PAGE, 0, PAGE), (0, 1 << 20, 512), (0, 1 << 20, 5000)] {
        let (first, last) = (Iova(first), Iova(last));
        let made = IovaDomain::new(IovaConfig { granule, first, last, cpus: 0 });
        assert_eq!(made.err(), Some(IovaError::BadConfig { granule, first, last }));
    }
}

#[test]
fn the_whole_of_64_bits_can_be_an_aperture() {
    let domain = domain(0, u64::MAX, 1);
    let top = u64::MAX - 128 * PAGE + 1;
    assert_eq!(domain.alloc(0, 100 * PAGE, Iova(u64::MAX)), Ok(Iova(top)));
    assert_eq!(domain.alloc(0, PAGE, Iova(u64::MAX)), Ok(Iova(top - PAGE)), "a whole run does not fit above");
    assert!(matches!(domain.alloc(0, u64::MAX, Iova(u64::MAX)), Err(IovaError::Full { .. })));
    assert!(domain.free(0, Iova(PAGE), u64::MAX).is_err());
}

#[test]
fn limits_hold_also_for_what_comes_from_a_cache() {
    let domain = domain(0, MAX48.get(), 1);
    let high: Vec<_> = (0..100).map(|_| domain.alloc(0, PAGE, MAX48).unwrap()).collect();
    for iova in high {
        domain.free(0, iova, PAGE).unwrap();
    }
    for limit in [MAX32, Iova(0x10_0000), Iova(0x1_ffff), Iova(0x1_0ffe)] {
        let iova = domain.alloc(0, PAGE, limit).unwrap();
        assert!(iova.get() + PAGE - 1 <= limit.get(), "{iova} under {limit}");
    }
    for limit in [0, PAGE - 1, 2 * PAGE - 2] {
        assert!(matches!(domain.alloc(0, PAGE, Iova(limit)), Err(IovaError::Full { .. })), "{limit:#x}");
    }
}

#[test]
fn reserved_windows_are_never_handed_out() {
    let domain = domain(0, 0x10_0000 - 1, 2);
    domain.reserve(Iova(0x4_0800), Iova(0x5_0000)).unwrap();
    domain.reserve(Iova(0x4_8000), Iova(0x5_8fff)).unwrap();
    // Outside of the aperture, and on its edge.
    domain.reserve(Iova(0x10_0000), Iova(u64::MAX)).unwrap();
    domain.reserve(Iova(0), Iova(0xfff)).unwrap();
    let all: Vec<_> = (0..).map_while(|cpu| domain.alloc(cpu, PAGE, MAX32).ok()).map(Iova::get).collect();
    assert_eq!(all.len(), 255 - 0x19);
    assert!(!all.iter().any(|iova| (0x4_0000..0x5_9000).contains(iova)));
    let taken = domain.reserve(Iova(0x1000), Iova(0x1fff));
    assert_eq!(taken, Err(IovaError::InUse { first: Iova(0x1000), last: Iova(0x1fff) }));
    let inside = domain.free(0, Iova(0x4_2000), PAGE);
    assert_eq!(inside, Err(IovaError::NotAllocated { iova: Iova(0x4_2000), len: PAGE }));
}

#[test]
fn a_full_space_takes_back_what_caches_hold_and_tries_again() {
    let domain = domain(0, 1024 * PAGE - 1, 4);
    let all: Vec<_> = (0..1023).map(|_| domain.alloc(0, PAGE, MAX32).unwrap()).collect();
    assert!(matches!(domain.alloc(0, PAGE, MAX32), Err(IovaError::Full { free: 0, .. })));
    // Into the caches of all CPUs, and the depot.
    for (cpu, &iova) in all.iter().enumerate() {
        domain.free(if cpu < 600 { 0 } else { cpu }, iova, PAGE).unwrap();
    }
    assert!(domain.usage().free < 512 * PAGE);
    assert!(matches!(domain.try_alloc(1, 512 * PAGE, MAX32), Err(IovaError::Full { .. })));
    assert_eq!(domain.alloc(1, 512 * PAGE, MAX32), Ok(Iova(512 * PAGE)));
    assert_eq!(domain.usage(), IovaUsage { free: 511 * PAGE, gaps: 1, largest: 256 * PAGE });
}

#[test]
fn a_failing_allocation_reaches_the_owners_of_handles() {
    let domain = domain(0, 256 * PAGE - 1, 0);
    let mut idle = domain.local();
    let mine: Vec<_> = (0..255).map(|_| idle.alloc(PAGE, MAX32).unwrap()).collect();
    for iova in mine {
        idle.free(iova, PAGE).unwrap();
    }
    let error = domain.alloc(0, 128 * PAGE, MAX32).unwrap_err();
    assert!(matches!(error, IovaError::Full { handles: 1, .. }), "{error}");
    assert!(domain.usage().free < 128 * PAGE, "an idle handle keeps what it has");
    idle.poll();
    assert_eq!(domain.alloc(0, 128 * PAGE, MAX32), Ok(Iova(128 * PAGE)));
}

#[test]
fn a_dropped_handle_gives_everything_back() {
    let domain = domain(0, MAX32.get(), 0);
    let before = domain.usage();
    let mut a = domain.local();
    let mut b = domain.local();
    let mut all = Vec::new();
    for i in 0..2000u64 {
        all.push((a.alloc((1 + i % 40) * PAGE, MAX48).unwrap(), (1 + i % 40) * PAGE));
    }
    for (iova, len) in all {
        b.free(iova, len).unwrap();
    }
    drop((a, b));
    domain.flush();
    assert_eq!(domain.usage(), before);
}

#[test]
fn a_handle_uses_its_own_run_of_addresses() {
    let domain = domain(0, MAX48.get(), 0);
    let (mut a, mut b) = (domain.local(), domain.local());
    let runs = |iovas: [Iova; 3]| iovas.map(|iova| iova.get() / (64 * PAGE));
    let a = runs([0; 3].map(|_| a.alloc(PAGE, MAX48).unwrap()));
    let b = runs([0; 3].map(|_| b.alloc(PAGE, MAX48).unwrap()));
    assert!(a.iter().all(|run| *run == a[0]) && b.iter().all(|run| *run == b[0]));
    assert_ne!(a[0], b[0]);
}

#[test]
fn wrong_frees_are_refused_and_named() {
    for cpus in [0, 1] {
        let domain = domain(0, MAX32.get(), cpus);
        let mut handle = domain.local();
        for len in [PAGE, 4 * PAGE, 40 * PAGE] {
            let iova = domain.alloc(0, len, MAX32).unwrap();
            let wrong = domain.free(0, iova, 8 * PAGE);
            assert_eq!(wrong, Err(IovaError::WrongSize { iova, len: 8 * PAGE, allocated: len }));
            let large = handle.free(iova, 50 * PAGE);
            assert_eq!(large, Err(IovaError::WrongSize { iova, len: 50 * PAGE, allocated: len }));
            let inner = Iova(iova.get() + 8);
            assert_eq!(domain.free(0, inner, len), Err(IovaError::NotAllocated { iova: inner, len }));
            domain.free(0, iova, len).unwrap();
            let twice = domain.free(0, iova, len);
            assert_eq!(twice, Err(IovaError::DoubleFree { iova, len }));
            assert_eq!(handle.free(iova, len), twice, "by another CPU as well");
            domain.flush();
            assert_eq!(domain.free(0, iova, len), twice, "and when the tree has it");
        }
        let large = domain.alloc(0, 40 * PAGE, MAX32).unwrap();
        for page in 1..40 {
            let iova = Iova(large.get() + page * PAGE);
            assert_eq!(domain.free(0, iova, PAGE), Err(IovaError::NotAllocated { iova, len: PAGE }));
        }
        for iova in [Iova(0), Iova(1 << 40), Iova(u64::MAX), Iova(!(PAGE - 1))] {
            assert!(matches!(domain.free(0, iova, PAGE), Err(IovaError::NotAllocated { .. })), "{iova}");
        }
    }
}

#[test]
fn errors_say_what_is_needed() {
    let domain = domain(0, 64 * PAGE - 1, 1);
    let error = domain.alloc(0, 128 * PAGE, MAX32).unwrap_err().to_string();
    assert!(
        error.contains("0x80000 bytes up to 0xffffffff") && error.contains("0x3f000 bytes are free"),
        "{error}"
    );
    assert!(error.contains("0x20000 (anywhere)"), "{error}");
    let error = domain.free(0, Iova(0x3000), PAGE).unwrap_err().to_string();
    assert_eq!(error, "double free of IOVA 0x3000, 0x1000 bytes");
}

#[test]
fn the_depot_is_bounded_and_trimmed_to_the_number_of_cpus() {
    let domain = domain(0, MAX48.get(), 2);
    let all: Vec<_> = (0..20_000).map(|_| domain.alloc(0, PAGE, MAX48).unwrap()).collect();
    let before = domain.usage().free;
    for iova in all {
        domain.free(0, iova, PAGE).unwrap();
    }
    let kept = 20_000 + 32 - (domain.usage().free - before) / PAGE;
    let magazines = kept as usize / 160;
    assert!(
        (32..34).contains(&magazines),
        "{magazines}: 32 in the depot, and two of the CPU, not quite full"
    );
    assert_eq!((0..).take_while(|_| domain.trim() != 0).count(), 30);
    domain.flush();
    assert_eq!(domain.usage().gaps, 1);
}

#[test]
fn short_addresses_are_preferred_until_there_are_none() {
    let domain = domain(0, MAX48.get(), 1);
    domain.reserve(Iova(0), Iova(0xfff0_0000 - 1)).unwrap();
    let device = Preference::new(true);
    let alloc = |limit, last_try| match last_try {
        true => domain.alloc(0, PAGE, limit),
        false => domain.try_alloc(0, PAGE, limit),
    };
    let all: Vec<_> = (0..256).map(|_| device.alloc(MAX48, alloc).unwrap()).collect();
    assert!(all.iter().all(|iova| *iova <= MAX32) && device.is_32bit());
    assert!(device.alloc(MAX48, alloc).unwrap() > MAX32);
    assert!(!device.is_32bit());
    for iova in all {
        domain.free(0, iova, PAGE).unwrap();
    }
    domain.flush();
    assert!(device.alloc(MAX48, alloc).unwrap() > MAX32, "given up for good");
    assert!(Preference::new(false).alloc(MAX48, alloc).unwrap() > MAX32);
    // A device of 32 bits has no choice, and no preference to lose.
    let short = Preference::new(true);
    let none = |_, _| domain.alloc(0, 1 << 33, MAX32);
    assert!(short.alloc(MAX32, none).is_err() && short.is_32bit());
}
