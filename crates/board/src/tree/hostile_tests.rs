//! Damaged and hostile trees: whatever the bytes are, there is a tree or an error, soon.

use std::time::{Duration, Instant};

use super::Tree;
use crate::machine::MachineDescription;
use crate::report::report;
use crate::testing::board_file;
use crate::{apply_protect, protect_overlay};

/// A small generator of numbers, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

fn blob() -> Vec<u8> {
    blob_of("zynqmp-thesis.dtb")
}

fn blob_of(name: &str) -> Vec<u8> {
    std::fs::read(board_file(name)).unwrap()
}

/// Does with the bytes what a user can make happen, all of it if `thorough`. True if they were a machine.
fn use_all(bytes: &[u8], thorough: bool) -> bool {
    let Ok(tree) = Tree::from_dtb(bytes) else { return false };
    let Ok(desc) = MachineDescription::from_tree(&tree) else { return false };
    if !thorough {
        return true;
    }
    let text = report(&desc).to_string();
    assert!(!text.is_empty());
    if let Some(master) = desc.masters.first() {
        let overlay = protect_overlay(&desc, &master.node.path);
        let applied = apply_protect(&tree, &master.node.path);
        assert_eq!(overlay.is_ok(), applied.is_ok(), "{overlay:?}\n{applied:?}");
    }
    true
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = blob();
    for len in 0..bytes.len() {
        assert!(Tree::from_dtb(&bytes[..len]).is_err(), "{len} bytes");
        // The same with a header that claims the shorter size.
        let mut cut = bytes[..len].to_vec();
        if let Some(size) = cut.get_mut(4..8) {
            size.copy_from_slice(&(len as u32).to_be_bytes());
        }
        assert!(Tree::from_dtb(&cut).is_err(), "{len} bytes");
    }
}

#[test]
fn changed_bytes_give_a_machine_or_an_error() {
    changed_bytes(&blob());
}

#[test]
fn so_do_those_of_a_tree_with_maps_and_functions() {
    changed_bytes(&blob_of("smmuv3.dtb"));
}

fn changed_bytes(original: &[u8]) {
    const PARTS: u64 = 8;
    const ROUNDS: usize = 25_000;
    // Each part has its own seed, so the inputs are the same however many threads there are.
    let machines: usize = std::thread::scope(|scope| {
        let parts: Vec<_> = (0..PARTS)
            .map(|part| {
                scope.spawn(move || {
                    let mut random = Random(0x9E37_79B9_7F4A_7C15 ^ part);
                    (0..ROUNDS).filter(|n| use_all(&changed(original, &mut random), n % 8 == 0)).count()
                })
            })
            .collect();
        parts.into_iter().map(|p| p.join().unwrap()).sum()
    });
    // If nothing or everything got through, the changes would be no test.
    let all = ROUNDS * PARTS as usize;
    assert!(machines > all / 50 && machines < all * 49 / 50, "{machines} of {all}");
}

fn changed(original: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = original.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        match random.below(4) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes[at] = 0,
            _ => {
                // A whole word, often a token or a small number.
                let at = at & !3;
                let word = [random.below(10) as u32, random.next() as u32, u32::MAX][random.below(3)];
                if let Some(place) = bytes.get_mut(at..at + 4) {
                    place.copy_from_slice(&word.to_be_bytes());
                }
            }
        }
    }
    bytes
}

#[test]
fn changed_overlays_give_a_tree_or_an_error() {
    let tree = Tree::from_dtb(&blob()).unwrap();
    let mut overlay = crate::testing::Dt::new();
    overlay.prop("/fragment@0", "target", vec![0xFF; 4]);
    overlay.prop("/fragment@0/__overlay__", "status", b"disabled\0".to_vec());
    overlay.prop("/fragment@1", "target-path", b"/axi/dma-controller@fd500000\0".to_vec());
    overlay.prop("/fragment@1/__overlay__", "iommus", vec![0, 0, 0, 1, 0, 0, 2, 0]);
    overlay.prop("/fragment@1/__overlay__/new", "phandle", vec![0, 0, 0, 1]);
    overlay.prop("/fragment@1/__overlay__/new", "#iommu-cells", vec![0, 0, 0, 1]);
    overlay.prop("/__fixups__", "smmu", b"/fragment@0:target:0\0".to_vec());
    overlay.prop("/__local_fixups__/fragment@1/__overlay__", "iommus", vec![0; 4]);
    overlay.prop("/__symbols__", "fresh", b"/fragment@1/__overlay__/new\0".to_vec());
    let original = overlay.blob();
    let merged = tree.apply_overlay(&original).unwrap();
    assert_eq!(merged.resolve("fresh").unwrap().path, "/axi/dma-controller@fd500000/new");
    let mut random = Random(42);
    let mut applied = 0;
    for _ in 0..20_000 {
        let mut bytes = original.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }
        applied += usize::from(tree.apply_overlay(&bytes).is_ok());
    }
    assert!(applied > 100, "{applied}");
}

#[test]
fn random_bytes_after_a_good_header_are_an_error() {
    let original = blob();
    let mut random = Random(7);
    for _ in 0..20_000 {
        let mut bytes = original[..56].to_vec();
        bytes.resize_with(original.len(), || random.next() as u8);
        assert!(Tree::from_dtb(&bytes).is_err());
    }
}

#[test]
fn the_largest_input_is_handled_in_time() {
    // 16 MiB of structure: NOPs, then one property that fills the rest, as wide as the tree may be.
    let size = super::MAX_BYTES;
    let structure = 56;
    let strings_size = 8;
    let structure_size = size - structure - strings_size;
    let header =
        [0xD00D_FEED, size, structure, size - strings_size, 40, 17, 16, 0, strings_size, structure_size];
    for word in [4u32, 0x0101_0101] {
        let mut bytes: Vec<u8> = header.into_iter().flat_map(|w| (w as u32).to_be_bytes()).collect();
        bytes.extend([0; 16]);
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 0]);
        if word != 4 {
            let len = structure_size - 8 - 12 - 8;
            bytes.extend([3, len as u32, 0].into_iter().flat_map(u32::to_be_bytes));
        }
        while bytes.len() < size - strings_size - 8 {
            bytes.extend(word.to_be_bytes());
        }
        bytes.extend([0, 0, 0, 2, 0, 0, 0, 9]);
        bytes.extend(*b"regular\0");
        let start = Instant::now();
        let tree = Tree::from_dtb(&bytes);
        assert!(tree.is_ok(), "{tree:?}");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        bytes.push(0);
        assert!(Tree::from_dtb(&bytes).unwrap_err().to_string().contains("too large"));
    }
}
