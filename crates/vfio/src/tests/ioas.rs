//! Areas, limits and pins of an I/O address space.

use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use portcullis_arch::{Iova, Pa};
use portcullis_drivers::ops::Paging;
use portcullis_iommu::{Prot, ReservedKind, ReservedRegion};
use proptest::prelude::*;
use spin::Mutex;

use crate::ranges::Counted;
use crate::testing::{host, smmu};
use crate::{
    HostRange, Ioas, IoasError, IoasOptions, Limits, PinError, PinMemory, PlatformDevice, Resident,
    VFIO_DRIVER, VfioError,
};

/// Pins that are counted, must never be doubled, and fail in one place.
#[derive(Default)]
struct Book {
    pinned: Mutex<Counted>,
    bad: Mutex<Option<u64>>,
}

impl PinMemory for Book {
    fn pin(&self, pa: Pa, len: u64) -> Result<(), PinError> {
        let (start, end) = (pa.get(), pa.get() + len);
        if self.bad.lock().is_some_and(|bad| (start..end).contains(&bad)) {
            return Err(PinError { pa, len, reason: "a hole" });
        }
        let mut pinned = self.pinned.lock();
        assert!(!pinned.touches(start, end), "each page is pinned once");
        pinned.add(start, end);
        Ok(())
    }
    fn unpin(&self, pa: Pa, len: u64) {
        let mut pinned = self.pinned.lock();
        let gone: u64 = pinned.remove(pa.get(), pa.get() + len).iter().map(|(a, b)| b - a).sum();
        assert_eq!(gone, len, "only what was pinned is unpinned");
    }
}

fn at(pa: u64, len: u64) -> HostRange {
    HostRange { pa: Pa(pa), len }
}

fn booked(limits: Limits) -> (Arc<Ioas>, Arc<Book>) {
    let book = Arc::new(Book::default());
    (Ioas::new(book.clone(), IoasOptions { limits, ..IoasOptions::default() }), book)
}

#[test]
fn pages_are_pinned_once_however_often_they_are_mapped() {
    let (ioas, book) = booked(Limits::default());
    ioas.map(Iova(0x1000), &[at(0x8000_0000, 0x4000)], Prot::RW).unwrap();
    ioas.map(Iova(0x10_0000), &[at(0x8000_2000, 0x4000), at(0x7000_0000, 0x1000)], Prot::READ).unwrap();
    assert_eq!((ioas.pinned_bytes(), book.pinned.lock().bytes()), (0x7000, 0x7000));
    assert_eq!(ioas.lookup(Iova(0x10_4010)), Some(Pa(0x7000_0010)));
    assert_eq!(ioas.lookup(Iova(0x10_5000)), None);
    assert_eq!(ioas.unmap(Iova(0x1000), Iova(0x4fff)), Ok(0x4000));
    assert_eq!(book.pinned.lock().bytes(), 0x5000);
    ioas.close().unwrap();
    assert_eq!(book.pinned.lock().bytes(), 0);
    assert_eq!(ioas.map(Iova(0x1000), &[at(0x8000_0000, 0x1000)], Prot::RW), Err(IoasError::Closed));
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let (ioas, book) = booked(Limits { pinned_bytes: 0x8000, areas: 3 });
    let ram = at(0x8000_0000, 0x1000);
    ioas.map(Iova(0x5000), &[at(0x8000_0000, 0x3000)], Prot::RW).unwrap();
    let map = |iova, memory: &[HostRange]| ioas.map(Iova(iova), memory, Prot::RW).unwrap_err();
    assert_eq!(map(0x1000, &[]), IoasError::Empty { iova: Iova(0x1000) });
    assert_eq!(map(0x1000, &[at(0x8000_0000, 0)]), IoasError::Empty { iova: Iova(0x1000) });
    assert_eq!(map(0x1800, &[ram]), IoasError::Unaligned { value: 0x1800, page: 0x1000 });
    assert_eq!(
        map(0x1000, &[at(0x8000_0800, 0x1000)]),
        IoasError::Unaligned { value: 0x8000_0800, page: 0x1000 }
    );
    assert_eq!(map(0x1000, &[at(0x8000_0000, 0x800)]), IoasError::Unaligned { value: 0x800, page: 0x1000 });
    assert!(matches!(map(!0xfff, &[ram, ram]), IoasError::Wraps { .. }));
    assert!(matches!(map(0x1000, &[at(!0xfff, 0x2000)]), IoasError::Wraps { .. }));
    assert!(matches!(map(0x1000, &[at(0x1000, !0xfff), at(0, 0x2000)]), IoasError::Wraps { .. }));
    for iova in [0x4000, 0x7000] {
        let error = map(iova, &[at(0x9000_0000, 0x2000)]);
        assert!(matches!(
            error,
            IoasError::Exists { there_first: Iova(0x5000), there_last: Iova(0x7fff), .. }
        ));
    }
    assert_eq!(
        map(0x10_0000, &[at(0x9000_0000, 0x6000)]),
        IoasError::PinLimit { pinned: 0x3000, more: 0x6000, limit: 0x8000 }
    );
    *book.bad.lock() = Some(0x9000_1000);
    let error = map(0x10_0000, &[at(0xa000_0000, 0x1000), at(0x9000_0000, 0x2000)]);
    assert_eq!(error.to_string(), "0x90000000+0x2000 cannot be pinned: a hole");
    assert_eq!((ioas.pinned_bytes(), book.pinned.lock().bytes(), ioas.areas().len()), (0x3000, 0x3000, 1));
    ioas.map(Iova(0x1_0000), &[ram], Prot::RW).unwrap();
    ioas.map(Iova(0x2_0000), &[ram], Prot::RW).unwrap();
    assert_eq!(map(0x3_0000, &[ram]), IoasError::AreaLimit { limit: 3 });
    assert_eq!(ioas.pinned_bytes(), 0x3000);
}

#[test]
fn areas_are_unmapped_whole_and_ranges_are_inclusive() {
    let (ioas, _) = booked(Limits::default());
    for page in [1u64, 2, 5] {
        ioas.map(Iova(page << 12), &[at(0x8000_0000 + (page << 12), 0x1000)], Prot::RW).unwrap();
    }
    ioas.map(Iova(0x8000), &[at(0x9000_0000, 0x3000)], Prot::RW).unwrap();
    let unmap = |first, last| ioas.unmap(Iova(first), Iova(last));
    assert!(matches!(unmap(0x5000, 0x9fff), Err(IoasError::Cut { there_first: Iova(0x8000), .. })));
    assert!(matches!(unmap(0x9000, 0x9fff), Err(IoasError::Cut { there_first: Iova(0x8000), .. })));
    assert!(matches!(unmap(0x9000, 0xffff), Err(IoasError::Cut { .. })));
    assert!(matches!(unmap(0x3000, 0x4fff), Err(IoasError::NoArea { .. })));
    assert!(matches!(unmap(0x3000, 0x2fff), Err(IoasError::Backwards { .. })));
    assert_eq!(ioas.areas().len(), 4);
    assert_eq!(unmap(0, 0x4fff), Ok(0x2000));
    assert_eq!(ioas.unmap_all(), Ok(0x4000));
    assert_eq!((ioas.unmap_all(), ioas.pinned_bytes()), (Ok(0), 0));
}

#[test]
fn the_last_page_of_the_address_space_can_be_mapped() {
    let (ioas, _) = booked(Limits::default());
    ioas.map(Iova(!0xfff), &[at(0x8000_0000, 0x1000)], Prot::RW).unwrap();
    assert_eq!(ioas.unmap(Iova(!0xfff), Iova(u64::MAX)), Ok(0x1000));
}

#[test]
fn a_free_address_is_never_zero_and_as_aligned_as_the_memory() {
    let (ioas, _) = booked(Limits::default());
    let ram = [at(0x8020_0000, 0x20_0000)];
    let first = ioas.map_anywhere(&ram, Prot::RW).unwrap();
    assert_eq!(first, Iova(0x20_0000));
    assert_eq!(ioas.map_anywhere(&[at(0x8000_1000, 0x1000)], Prot::RW), Ok(Iova(0x1000)));
    assert_eq!(ioas.map_anywhere(&ram, Prot::RW), Ok(Iova(0x40_0000)));
}

#[test]
fn groups_behind_one_iommu_share_a_domain_and_another_iommu_gets_its_own() {
    let host = host();
    let (ops, _mmio, _stuck) = smmu(&host.memory);
    let second = host.core.register("second", ops);
    host.vfio_dma("dma0", &[0xe80]);
    host.vfio_dma("dma1", &[0xe83]);
    let spec = portcullis_iommu::FwSpec::from_cells(&[0xe80], 1, None).unwrap();
    let other = host.core.add_device("other", second, &spec, &[]).unwrap();
    let core = crate::testing::AxiCore::new();
    let other = PlatformDevice { device: Some(other), ..crate::testing::axi_device("other", &core) };
    host.registry.add_device(other).unwrap();
    host.registry.bind("other", VFIO_DRIVER).unwrap();
    let book = Arc::new(Book::default());
    let ioas = Ioas::new(book.clone(), IoasOptions::default());
    ioas.map(Iova(0x10_0000), &[at(0x1100_0000, 0x2000)], Prot::RW).unwrap();
    let groups: Vec<_> =
        ["dma0", "dma1", "other"].iter().map(|name| host.registry.take_group(name).unwrap()).collect();
    for group in &groups {
        group.attach(&ioas).unwrap();
    }
    let (one, two) = (ioas.domain(host.smmu).unwrap(), ioas.domain(second).unwrap());
    assert!(Arc::ptr_eq(&host.core.domain_of(host.core.find_device("dma1").unwrap()).unwrap(), &one));
    ioas.map(Iova(0x20_0000), &[at(0x1200_0000, 0x1000)], Prot::RW).unwrap();
    for domain in [&one, &two] {
        assert_eq!(
            domain.iova_to_phys(Iova(0x10_1004)),
            Some(Pa(0x1100_1004)),
            "mapped before the group came"
        );
        assert_eq!(domain.iova_to_phys(Iova(0x20_0000)), Some(Pa(0x1200_0000)));
    }
    assert_eq!(book.pinned.lock().bytes(), 0x3000);
    assert_eq!(ioas.close(), Err(IoasError::InUse(3)));
    ioas.unmap(Iova(0x10_0000), Iova(0x10_1fff)).unwrap();
    assert_eq!((one.iova_to_phys(Iova(0x10_0000)), two.iova_to_phys(Iova(0x10_0000))), (None, None));
    drop((one, two));
    groups[2].release().unwrap();
    assert!(ioas.domain(second).is_none() && ioas.domain(host.smmu).is_some());
    drop(groups);
    drop(ioas);
    assert_eq!(book.pinned.lock().bytes(), 0);
}

#[test]
fn reserved_regions_and_the_aperture_confine_areas_in_either_order() {
    let host = host();
    let region = ReservedRegion {
        start: Iova(0xc000_0000),
        len: 0x1_0000,
        kind: ReservedKind::Reserved,
        prot: Prot::RW,
    };
    let device = host.iommu_device("dma0", &[0xe80], &[region]);
    let core = crate::testing::AxiCore::new();
    let device = PlatformDevice { device: Some(device), ..crate::testing::axi_device("dma0", &core) };
    host.registry.add_device(device).unwrap();
    host.registry.bind("dma0", VFIO_DRIVER).unwrap();
    let group = host.registry.take_group("dma0").unwrap();
    let paging = Paging { input_bits: Some(36), ..Paging::default() };
    let ioas = Ioas::new(Arc::new(Resident), IoasOptions { paging, ..IoasOptions::default() });
    ioas.map(Iova(0xc000_f000), &[at(0x1100_0000, 0x1000)], Prot::RW).unwrap();
    let error = group.attach(&ioas).unwrap_err();
    assert!(
        matches!(error, VfioError::Ioas(IoasError::Reserved { start: Iova(0xc000_0000), .. })),
        "{error}"
    );
    ioas.unmap_all().unwrap();
    group.attach(&ioas).unwrap();
    let map = |iova| ioas.map(Iova(iova), &[at(0x1100_0000, 0x2000)], Prot::RW);
    assert!(matches!(map(0xc000_f000), Err(IoasError::Reserved { .. })));
    assert!(matches!(map(0x0800_0000), Err(IoasError::Reserved { kind: ReservedKind::SoftwareMsi, .. })));
    assert!(matches!(map(0xf_ffff_f000), Err(IoasError::Aperture { end: Iova(0xf_ffff_ffff), .. })));
    map(0xc001_0000).unwrap();
    let kinds: Vec<_> = ioas.reserved_regions().iter().map(|region| region.kind).collect();
    assert_eq!(kinds, [ReservedKind::SoftwareMsi, ReservedKind::Reserved]);
}

#[test]
fn a_map_that_the_iommu_cannot_finish_leaves_nothing_at_any_allocation() {
    let host = host();
    host.vfio_dma("dma0", &[0xe80]);
    let group = host.registry.take_group("dma0").unwrap();
    let book = Arc::new(Book::default());
    let ioas = Ioas::new(book.clone(), IoasOptions::default());
    group.attach(&ioas).unwrap();
    let memory = [at(0x1100_0000, 0x1000), at(0x1200_0000, 0x40_0000), at(0x1180_0000, 0x1000)];
    for n in 0.. {
        host.memory.fail_after(n);
        let mapped = ioas.map(Iova(0x3fff_f000), &memory, Prot::RW);
        host.memory.fail_never();
        if mapped.is_ok() {
            assert!(n > 2, "it takes several tables");
            break;
        }
        assert!(matches!(mapped, Err(IoasError::Iommu(_))), "{mapped:?}");
        let domain = ioas.domain(host.smmu).unwrap();
        assert_eq!(domain.iova_to_phys(Iova(0x3fff_f000)), None);
        assert_eq!((ioas.areas(), book.pinned.lock().bytes()), (vec![], 0));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Map { page: u64, pages: u64, memory: u64 },
    Anywhere { pages: u64, memory: u64 },
    Unmap { first: u64, pages: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u64..64, 1u64..12, 0u64..32).prop_map(|(page, pages, memory)| Step::Map { page, pages, memory }),
        (1u64..6, 0u64..32).prop_map(|(pages, memory)| Step::Anywhere { pages, memory }),
        (0u64..70, 1u64..24).prop_map(|(first, pages)| Step::Unmap { first, pages }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// The model is an array of pages; the IOMMU's own table is asked too.
    #[test]
    fn an_address_space_is_what_was_mapped_and_not_unmapped(steps in proptest::collection::vec(step(), 1..60)) {
        let host = host();
        host.vfio_dma("dma0", &[0xe80]);
        let group = host.registry.take_group("dma0").unwrap();
        let book = Arc::new(Book::default());
        let ioas = Ioas::new(book.clone(), IoasOptions::default());
        group.attach(&ioas).unwrap();
        let domain = ioas.domain(host.smmu).unwrap();
        // Per page: which area it belongs to (its first page and pages), and the memory page.
        let mut model: Vec<Option<(u64, u64, u64)>> = vec![None; 256];
        let put = |model: &mut Vec<Option<(u64, u64, u64)>>, page: u64, pages: u64, memory: u64| {
            for n in 0..pages {
                model[(page + n) as usize] = Some((page, pages, memory + n));
            }
        };
        for step in steps {
            match step {
                Step::Map { page, pages, memory } => {
                    let free = (page..page + pages).all(|n| model[n as usize].is_none());
                    let range = at(0x1100_0000 + (memory << 12), pages << 12);
                    let mapped = ioas.map(Iova(page << 12), &[range], Prot::RW);
                    prop_assert_eq!(mapped.is_ok(), free, "{:?}", mapped);
                    if free {
                        put(&mut model, page, pages, memory);
                    }
                }
                Step::Anywhere { pages, memory } => {
                    let range = at(0x1100_0000 + (memory << 12), pages << 12);
                    let iova = ioas.map_anywhere(&[range], Prot::RW).unwrap();
                    let page = iova.get() >> 12;
                    prop_assert!(page > 0 && page + pages < 256);
                    prop_assert!((page..page + pages).all(|n| model[n as usize].is_none()));
                    put(&mut model, page, pages, memory);
                }
                Step::Unmap { first, pages } => {
                    let range = first..first + pages;
                    let inside: Vec<_> = range.clone().filter_map(|n| model[n as usize]).collect();
                    let whole = inside.iter().all(|(page, n, _)| *page >= range.start && page + n <= range.end);
                    let unmapped = ioas.unmap(Iova(first << 12), Iova((range.end << 12) - 1));
                    if whole && !inside.is_empty() {
                        prop_assert_eq!(unmapped, Ok((inside.len() as u64) << 12));
                        for n in range {
                            model[n as usize] = None;
                        }
                    } else {
                        prop_assert!(unmapped.is_err());
                    }
                }
            }
            let mut pages: Vec<u64> = model.iter().flatten().map(|(_, _, memory)| *memory).collect();
            pages.sort_unstable();
            pages.dedup();
            prop_assert_eq!(book.pinned.lock().bytes(), (pages.len() as u64) << 12);
            for (n, page) in model.iter().enumerate() {
                let expected = page.map(|(_, _, memory)| Pa(0x1100_0000 + (memory << 12) + 4));
                let iova = Iova(((n as u64) << 12) + 4);
                prop_assert_eq!(ioas.lookup(iova), expected);
                prop_assert_eq!(domain.iova_to_phys(iova), expected);
            }
        }
    }
}
