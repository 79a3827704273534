//! What users would pick instead, doing the same work in the same run: the `smmu` crate's translate, and the lookup
//! of vm-memory's `Iotlb`.

use std::hint::black_box;

use smmu::prelude::{
    AccessType, IOVA, PA, PASID, PagePermissions, SMMU, SecurityState, StreamConfig, StreamID,
};
use vm_memory::iommu::Iotlb;
use vm_memory::{GuestAddress, Permissions};

use super::timing::{in_rmw, shuffled};
use super::{Figure, Goal};

const N: usize = 1 << 15;

fn peer(what: &str, ns: f64, ratio: f64) -> Figure {
    let (figure_unit, ratio_unit) = ("ns", "RMW");
    Figure { goal_number: 0, what: what.into(), figure: ns, figure_unit, ratio, ratio_unit, goal: Goal::None }
}

/// A random order of `pages` pages, repeated up to [`N`] accesses.
fn order(pages: u64) -> Vec<u64> {
    shuffled(pages, 3).iter().cycle().take(N).map(|p| 0x10_0000 + (p << 12)).collect()
}

/// The peers' figures; a peer whose set-up fails is left out.
pub fn peers() -> Vec<Figure> {
    let mut out = Vec::new();
    for pages in [64, 4096] {
        out.extend(smmu_crate(pages));
    }
    for pages in [64, 4096] {
        out.extend(iotlb(pages));
    }
    out
}

fn smmu_crate(pages: u64) -> Option<Figure> {
    let smmu = SMMU::new();
    let stream = StreamID::new(1).ok()?;
    let config = StreamConfig::builder()
        .translation_enabled(true)
        .stage1_enabled(true)
        .pasid_enabled(true)
        .max_pasid(256)
        .build()
        .ok()?;
    smmu.configure_stream(stream, config).ok()?;
    let pasid = PASID::new(0).ok()?;
    smmu.create_pasid(stream, pasid).ok()?;
    let frames = shuffled(pages, 7);
    for (i, f) in frames.iter().enumerate() {
        let iova = IOVA::new(0x10_0000 + ((i as u64) << 12)).ok()?;
        let pa = PA::new(0x4000_0000 + (f << 12)).ok()?;
        let perms = PagePermissions::read_write();
        smmu.map_page(stream, pasid, iova, pa, perms, SecurityState::NonSecure).ok()?;
    }
    smmu.enable_stream(stream).ok()?;
    let list: Vec<IOVA> = order(pages).into_iter().filter_map(|a| IOVA::new(a).ok()).collect();
    let once = |iova| smmu.translate(stream, pasid, iova, AccessType::Read, SecurityState::NonSecure);
    once(*list.first()?).ok()?;
    let (ns, ratio) = in_rmw(N as u64, || {
        for &iova in &list {
            let _ = black_box(once(iova));
        }
    });
    Some(peer(&format!("peer: crate smmu 1.8 translate, {pages} pages"), ns, ratio))
}

fn iotlb(pages: u64) -> Option<Figure> {
    let mut tlb = Iotlb::new();
    let frames = shuffled(pages, 7);
    for (i, f) in frames.iter().enumerate() {
        let iova = GuestAddress(0x10_0000 + ((i as u64) << 12));
        let gpa = GuestAddress(0x4000_0000 + (f << 13));
        tlb.set_mapping(iova, gpa, 4096, Permissions::ReadWrite).ok()?;
    }
    let list = order(pages);
    let (ns, ratio) = in_rmw(N as u64, || {
        for &iova in &list {
            if let Ok(mut found) = Iotlb::lookup(&tlb, GuestAddress(iova), 8, Permissions::Read) {
                black_box(found.next().map(|r| r.base));
            }
        }
    });
    Some(peer(&format!("peer: vm-memory 0.18 Iotlb lookup, {pages} mappings"), ns, ratio))
}
