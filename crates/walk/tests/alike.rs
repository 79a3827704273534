//! A port that walks to a leaf like the last one takes over what that leaf said. Leaves that differ in one thing only have to be
//! told apart.

mod common;

use std::sync::Arc;

use common::unit::{FROM, Unit, context, key};
use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Access, Attributes, Iova, Pa};
use portcullis_bus::SystemMemory;
use portcullis_walk::{FaultKind, Tbu, TlbStage, Translated};

const L0: u64 = 0x4000;
const L1: u64 = 0x1000;
const L2: u64 = 0x2000;
const L3: u64 = 0x3000;
const LEAF: u64 = d::AF | d::USER | d::NG;
/// Addresses that a page, a block of 2 MiB and one of 1 GiB translate.
const PAGE: u64 = 0x3000;
const MIB2: u64 = 2 << 20;
const GIB1: u64 = 3 << 30;

/// 4K tables of four levels (so that blocks of both sizes have tables above them that say the same), output addresses of 40 bits, and a port that keeps four entries.
fn rig() -> (SystemMemory, Arc<Unit>, Tbu<Unit, SystemMemory>) {
    let memory = SystemMemory::new(&[(0, 0x10_000)]).unwrap();
    set(&memory, L0, L1 | d::TABLE);
    set(&memory, L1, L2 | d::TABLE);
    set(&memory, L2, L3 | d::TABLE);
    let mut s1 = stage1(Some(region(L0, Granule::K4, 0, 48)), None);
    s1.output_bits = 40;
    let unit = Unit::new(memory.clone(), context(key(TlbStage::Stage1, 1), only1(s1)));
    let port = unit.port(4);
    (memory, unit, port)
}

fn set(memory: &SystemMemory, at: u64, value: u64) {
    memory.store64(Pa(at), value).unwrap();
}

fn page(memory: &SystemMemory, n: u64, value: u64) {
    set(memory, L3 + 8 * n, value);
}

fn read(port: &mut Tbu<Unit, SystemMemory>, va: u64) -> Option<Translated> {
    port.translate(&FROM, Iova(va), Access::Read).ok()
}

#[test]
fn blocks_of_two_sizes_that_say_the_same() {
    let (memory, _, mut port) = rig();
    page(&memory, 3, 0x5000 | LEAF | d::PAGE);
    set(&memory, L2 + 8, 0x4000_0000 | LEAF | d::BLOCK);
    set(&memory, L1 + 24, 0x80_0000_0000 | LEAF | d::BLOCK);
    // Their tables say the same, too, and so many addresses evict each other.
    for round in 0..64u64 {
        let inside = round * 0x1230 % 0x1000;
        let got = [PAGE, MIB2, GIB1].map(|va| {
            let t = read(&mut port, va + inside).unwrap();
            (t.pa.get(), t.left)
        });
        let expected = [(0x5000, 1u64 << 12), (0x4000_0000, 1 << 21), (0x80_0000_0000, 1 << 30)];
        assert_eq!(got, expected.map(|(pa, size)| (pa + inside, size - inside)));
        port_forgets(&mut port);
    }
}

/// Has the port walk again.
fn port_forgets(port: &mut Tbu<Unit, SystemMemory>) {
    port.tcu().log.publish(portcullis_walk::Invalidation::Contexts(portcullis_walk::Scope {
        secure: false,
        regime: None,
        vmid: None,
        asid: None,
        stages: portcullis_walk::StageScope::All,
    }));
}

#[test]
fn pages_of_every_size_hit_whichever_was_used_last() {
    let (memory, unit, _) = rig();
    let mut port = unit.port(64);
    page(&memory, 3, 0x5000 | LEAF | d::PAGE);
    set(&memory, L2 + 8, 0x4000_0000 | LEAF | d::BLOCK);
    set(&memory, L1 + 24, 0x80_0000_0000 | LEAF | d::BLOCK);
    let all = [PAGE, MIB2, GIB1];
    assert!(all.iter().all(|va| read(&mut port, *va).is_some()));
    let before = port.stats();
    for va in [0, 1, 2, 2, 1, 0, 0, 2, 0, 1, 1].map(|i| all[i]) {
        assert_eq!(read(&mut port, va).map(|t| t.left), read(&mut port, va).map(|t| t.left));
    }
    let after = port.stats();
    assert_eq!((after.walks - before.walks, after.hits - before.hits), (0, 22));
}

#[test]
fn runs_of_pages_that_are_laid_out_as_one_and_that_are_not() {
    let (memory, _, mut port) = rig();
    for n in 0..16 {
        page(&memory, 16 + n, (0x10_0000 + (n << 12)) | LEAF | d::CONT | d::PAGE);
        page(&memory, 32 + n, (0x20_0000 + (n << 12)) | LEAF | d::CONT | d::PAGE);
        page(&memory, 48 + n, (0x30_0000 + (n << 13)) | LEAF | d::CONT | d::PAGE);
    }
    for _ in 0..3 {
        let got = [0x1_2000, 0x2_3000, 0x3_1000, 0x3_2000, 0x1_f000].map(|va| {
            let t = read(&mut port, va).unwrap();
            (t.pa.get(), t.left)
        });
        let expected = [
            (0x10_2000, 0xe000),
            (0x20_3000, 0xd000),
            (0x30_2000, 0x1000),
            (0x30_4000, 0x1000),
            (0x10_f000, 0x1000),
        ];
        assert_eq!(got, expected);
        port_forgets(&mut port);
    }
}

#[test]
fn an_address_beyond_the_output_size() {
    let (memory, unit, mut port) = rig();
    page(&memory, 3, 0x5000 | LEAF | d::PAGE);
    page(&memory, 4, 1 << 40 | 0x5000 | LEAF | d::PAGE);
    for _ in 0..3 {
        assert_eq!(read(&mut port, PAGE).map(|t| t.pa), Some(Pa(0x5000)));
        assert_eq!(read(&mut port, PAGE + 0x1000), None);
        assert_eq!(unit.faults()[0].2.kind, FaultKind::AddressSize);
        port_forgets(&mut port);
    }
}

#[test]
fn attributes_permissions_and_what_tables_say() {
    let (memory, unit, mut port) = rig();
    page(&memory, 3, 0x5000 | LEAF | d::PAGE);
    page(&memory, 4, 0x6000 | LEAF | d::RO | d::PAGE);
    page(&memory, 5, 0x7000 | LEAF | 1 << 2 | d::PAGE);
    page(&memory, 6, 0x8000 | d::USER | d::NG | d::PAGE);
    // The same page by way of a table that takes writing away.
    set(&memory, L2 + 16, L3 | d::T_AP1 | d::TABLE);
    let write = |port: &mut Tbu<Unit, SystemMemory>, va| {
        port.translate(&FROM, Iova(va), Access::Write).map(|t| (t.pa.get(), t.attrs)).ok()
    };
    let mut kinds: Vec<Option<Attributes>> = Vec::new();
    for round in 0..3 {
        let got = [3, 4, 5, 6, 3, 0x400 + 3].map(|n: u64| write(&mut port, n << 12));
        assert_eq!(got.map(|t| t.map(|t| t.0)), [Some(0x5000), None, Some(0x7000), None, Some(0x5000), None]);
        kinds.push(got[2].map(|t| t.1));
        assert_ne!(got[0].map(|t| t.1), got[2].map(|t| t.1), "another entry of MAIR");
        assert_eq!(kinds[0], kinds[round]);
        let faults: Vec<_> = unit.faults().iter().map(|f| f.2.kind).collect();
        assert_eq!(faults, [FaultKind::Permission, FaultKind::AccessFlag, FaultKind::Permission]);
        port_forgets(&mut port);
    }
}
