//! What a port remembers of contiguous pages: it saves looking pages up, and nothing that software may see changes.

mod common;

use std::sync::Arc;

use common::unit::{FROM, Unit, context, key};
use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Iova, Pa};
use portcullis_bus::{DmaPort, Initiator, Memory, SystemMemory};
use portcullis_walk::{Invalidation, Scope, StageScope, Tbu, TlbStage};

const TABLE: u64 = 0x1000;
const DATA: u64 = 0x10_0000;
const PAGE: u64 = 4096;
const PAGES: u64 = 16;
const SRC: Iova = Iova(0x10_000);
const DST: Iova = Iova(0x30_000);
const LEN: usize = (PAGES * PAGE) as usize;

fn map(m: &SystemMemory, va: Iova, first: u64, readonly: bool) {
    for i in 0..PAGES {
        let flags = d::PAGE | d::AF | d::USER | d::NG | if readonly { d::RO } else { 0 };
        m.store64(Pa(TABLE + (va.get() / PAGE + i) * 8), (first + i * PAGE) | flags).unwrap();
    }
}

fn rig() -> (SystemMemory, Arc<Unit>, Tbu<Unit, SystemMemory>) {
    let memory = SystemMemory::new(&[(0, 0x10_000), (DATA, 0x40_0000)]).unwrap();
    map(&memory, SRC, DATA, true);
    map(&memory, DST, DATA + 0x10_0000, false);
    let s1 = stage1(Some(region(TABLE, Granule::K4, 3, 21)), None);
    let unit = Unit::new(memory.clone(), context(key(TlbStage::Stage1, 1), only1(s1)));
    let port = unit.port(1024);
    (memory, unit, port)
}

fn copy(port: &mut Tbu<Unit, SystemMemory>) {
    port.copy((FROM, SRC), (FROM, DST), LEN).unwrap();
}

#[test]
fn a_later_copy_looks_each_buffer_up_once() {
    let (_, _, mut port) = rig();
    // The first page of the very first copy goes another way: the port does not know the stream yet.
    copy(&mut port);
    copy(&mut port);
    let first = port.stats();
    copy(&mut port);
    let second = port.stats();
    assert_eq!(second.hits - first.hits, 2);
    assert_eq!(second.walks, first.walks);
}

#[test]
fn an_invalidation_of_any_page_of_a_run_is_obeyed() {
    for page in [0, 7, PAGES - 1] {
        let (memory, unit, mut port) = rig();
        copy(&mut port);
        // One page of the source moves.
        let other = DATA + 0x20_0000;
        memory.write(Pa(other), A, &[0x77; PAGE as usize]).unwrap();
        let va = SRC.get() + page * PAGE;
        let flags = d::PAGE | d::AF | d::USER | d::NG | d::RO;
        memory.store64(Pa(TABLE + va / PAGE * 8), other | flags).unwrap();
        let scope = Scope {
            secure: false,
            regime: None,
            vmid: Some(0),
            asid: Some(1),
            stages: StageScope::Stage1AndCombined,
        };
        unit.log.publish(Invalidation::Address(scope, va));
        copy(&mut port);
        let mut got = vec![0; LEN];
        memory.read(Pa(DATA + 0x10_0000), A, &mut got).unwrap();
        for (i, bytes) in got.chunks(PAGE as usize).enumerate() {
            let expected = if i as u64 == page { 0x77 } else { 0 };
            assert!(bytes.iter().all(|b| *b == expected), "page {i} after page {page} moved");
        }
    }
}

#[test]
fn a_run_for_reading_is_none_for_writing_nor_for_another_stream() {
    let (memory, unit, mut port) = rig();
    copy(&mut port);
    let refused = port.copy((FROM, DST), (FROM, SRC), LEN).unwrap_err();
    assert_eq!(refused.error.done, 0, "the source is read only");
    assert_eq!(unit.faults().len(), 1);
    let stranger = Initiator { stream: portcullis_arch::StreamId(9), ..FROM };
    assert_eq!(port.copy((stranger, SRC), (stranger, DST), LEN).unwrap_err().error.done, 0);
    let mut got = [1; 8];
    memory.read(Pa(DATA), A, &mut got).unwrap();
    assert_eq!(got, [0; 8]);
}

#[test]
fn a_page_that_was_walked_anew_does_not_borrow_the_length_of_an_old_run() {
    // Without an invalidation either translation of each page may be used, but no page may be reached that neither maps.
    let (memory, unit, mut port) = rig();
    copy(&mut port);
    drop(unit);
    for i in 0..PAGES {
        let other = DATA + 0x20_0000 + i * 2 * PAGE;
        memory.write(Pa(other), A, &[0x55; PAGE as usize]).unwrap();
        let at = Pa(TABLE + (SRC.get() / PAGE + i) * 8);
        memory.store64(at, other | d::PAGE | d::AF | d::USER | d::NG | d::RO).unwrap();
    }
    let mut got = vec![0xff; LEN];
    port.read(FROM, SRC, &mut got).unwrap();
    for bytes in got.chunks(PAGE as usize) {
        assert!(bytes.iter().all(|b| *b == 0) || bytes.iter().all(|b| *b == 0x55));
    }
}
