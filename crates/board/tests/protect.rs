//! From a tree that leaves the SMMU off to DMA through a domain: what `apply_protect` and the overlay promise.

mod common;

use std::path::PathBuf;
use std::process::Command;

use common::{Board, map};
use portcullis_board::{MachineDescription, Tree, apply_protect};
use portcullis_drivers::fault::FaultReason;

const RAM: u64 = 0x6000_0000;
const IN: u64 = 0x7000_0000;
const PROTECTED: &str = "fpd-dma0";
const OTHER: &str = "lpd-dma0";

fn data(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data")).join(name)
}

fn unprotected() -> Tree {
    Tree::load(data("unprotected.dtb")).unwrap()
}

fn describe(tree: &Tree) -> MachineDescription {
    MachineDescription::from_tree(tree).unwrap()
}

#[test]
fn the_test_tree_s_source_and_blob_agree() {
    if Command::new("dtc").arg("--version").output().is_err() {
        eprintln!("skipped: dtc is not installed");
        return;
    }
    let source = Tree::load(data("unprotected.dts")).unwrap();
    assert!(source == unprotected(), "compile tests/data/unprotected.dts again");
}

#[test]
fn with_the_smmu_off_devices_reach_memory_directly() {
    let board = Board::of(describe(&unprotected()), false);
    assert!(board.machine().smmu().is_none() && board.system.smmu().is_none());
    assert!(board.system.describe().contains("no SMMU"));
    let names: Vec<_> = board.machine().engines().iter().map(|e| e.name.to_string()).collect();
    assert_eq!(names, [OTHER], "the other channel is disabled");
    assert_eq!(board.system.device(OTHER), None);
    board.works(OTHER, (RAM + 0x1_0003, RAM + 0x1_0003), (RAM + 5, RAM + 5), 0x5001);
    // Where no memory is, the bus says so; what lies before has been copied.
    let done = board.copy(OTHER, 0x67ff_f000, RAM, 0x2000);
    assert_eq!((done.transferred, done.residue, done.result.is_err()), (0x1000, 0x1000, true));
    // Transactions are in the record all the same.
    let events = board.events();
    let transactions =
        events.iter().filter(|e| matches!(e.kind, portcullis_board::sim::EventKind::Transaction(_)));
    assert!(transactions.count() > 6);
}

#[test]
fn a_protected_channel_works_through_its_domain_and_is_kept_to_it() {
    let tree = apply_protect(&unprotected(), "/axi/dma-controller@fd500000").unwrap();
    let board = Board::of(describe(&tree), true);
    assert!(board.machine().smmu().is_some());
    let domain = board.domain_for(PROTECTED);
    map(&domain, IN, RAM, 0x1_0000);
    board.works(PROTECTED, (IN + 0x8001, RAM + 0x8001), (IN + 2, RAM + 2), 0x4000);
    board.refused(PROTECTED, (RAM, RAM), IN, FaultReason::Translation, RAM);
    // The other one is still without `iommus`, and so it is blocked now, as Linux would block it.
    let at = board.channel(OTHER).driver.pool().iova.get();
    board.refused(OTHER, (RAM, RAM), RAM + 0x1000, FaultReason::UnknownStream, at);

    // Protected in turn, both work.
    let tree = apply_protect(&tree, "LPD DMA channel 0").unwrap();
    let board = Board::of(describe(&tree), true);
    for name in [PROTECTED, OTHER] {
        let domain = board.domain_for(name);
        map(&domain, IN, RAM, 0x1_0000);
        board.works(name, (IN + 0x8001, RAM + 0x8001), (IN + 2, RAM + 2), 0x4000);
        board.refused(name, (RAM, RAM), IN, FaultReason::Translation, RAM);
    }
}

#[test]
fn the_thesis_board_with_its_smmu_taken_away_is_protected_again() {
    // As the tree would be without the SMMU's line: the `iommus` are there and have no effect.
    let mut description = common::thesis();
    description.smmus[0].node.available = false;
    let board = Board::of(description, false);
    assert!(board.machine().engines().iter().all(|e| e.smmu.is_none()));
    assert!(board.machine().smmu_registers().is_none());
    for name in ["fpd-dma0", "lpd-dma7"] {
        board.works(name, (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 0x800);
    }
    assert!(board.pl_write(RAM, 0x1234_5678, 9));
    assert_eq!(board.get32(RAM), 0x1234_5678);
}
