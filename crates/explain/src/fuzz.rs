//! Whatever the registers and tables hold: explanations come out, and agree with the walker that they explain.

use portcullis_arch::smmuv2::offset::{cb, gr0, gr1};
use portcullis_arch::{Access, Attributes, Iova};
use portcullis_bus::{Initiator, SystemMemory};
use portcullis_smmuv2::{Config, Outcome};
use portcullis_walk::FaultKind;
use proptest::prelude::*;

use crate::permission::{self, Why};
use crate::testing::{Board, PAGE, RAM, ROOT, STREAM};
use crate::{CauseContext, causes, story};

/// Descriptors that point into the tables or the data often enough for walks to go on.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => any::<u64>(),
        1 => Just(0),
        4 => (0u64..16, 0u64..4, any::<u8>()).prop_map(|(page, kind, high)| {
            (ROOT + page * 0x1000) | kind | u64::from(high) << 56
        }),
        4 => (0u64..256, any::<u16>(), any::<u16>()).prop_map(|(page, low, high)| {
            (0x6000_0000 + page * 0x1000) | u64::from(low & 0xfff) | u64::from(high & 0x7ff) << 52
        }),
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), 0u64..1 << 40, 0u64..1 << 32, 0x6000_0000u64..0x6010_0000]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_state_is_explained(
        words in prop::collection::vec((0usize..0x2000, word()), 0..200),
        cbar in (0u32..4, any::<u16>(), 0u32..3),
        banks in prop::collection::vec((any::<[u32; 6]>(), word(), word(), any::<bool>()), 3),
        cr0: u32,
        s2cr in prop_oneof![3 => Just(0u32), 1 => any::<u32>()],
        attrs: u32,
        va in address(),
        write: bool,
        everything: bool,
    ) {
        let config = if everything { Config::default() } else { Config::mmu500_zynqmp() };
        let board = Board::over(SystemMemory::new(&RAM).unwrap(), config);
        for (at, word) in words {
            board.store(ROOT + at as u64 * 8, word);
        }
        let base = if everything { 0x1_0000 * 2 } else { 0x1_0000 };
        for (n, (r, ttbr0, ttbr1, va64)) in banks.iter().enumerate() {
            let kind = if n == 0 { cbar.0 << 16 | u32::from(cbar.1 & 0xff) | cbar.2 << 8 } else { 0 };
            board.global(0x1000 + gr1::CBAR + 4 * n, kind);
            board.global(0x1000 + gr1::CBA2R + 4 * n, u32::from(*va64));
            for (at, value) in [
                (cb::TCR, r[0]), (cb::TCR2, r[1]), (cb::MAIR0, r[2]), (cb::MAIR1, r[3]),
                (cb::TTBR0, *ttbr0 as u32), (cb::TTBR0 + 4, (*ttbr0 >> 32) as u32),
                (cb::TTBR1, *ttbr1 as u32), (cb::TTBR1 + 4, (*ttbr1 >> 32) as u32),
                (cb::SCTLR, r[4] | u32::from(r[5] % 4 != 0)),
            ] {
                let offset = base + n as u64 * 0x1000 + at as u64;
                portcullis_bus::Mmio::write32(&board.window, offset, value).unwrap();
            }
        }
        board.global(gr0::CR0, cr0 & !(u32::from(cr0 & 0xe0 != 0)));
        board.global(gr0::S2CR, s2cr);
        let from = Initiator::new(STREAM).with_attrs(Attributes::from_bits(attrs).with_non_secure(true));
        let access = if write { Access::Write } else { Access::Read };
        let e = board.smmu.explain(from, Iova(va), access);
        let told = story(&e, None);
        prop_assert!(!told.to_string().is_empty());
        prop_assert!(serde_json::to_string(&told).is_ok());
        let ctx = CauseContext { zynqmp: true, ram: &RAM, ..CauseContext::default() };
        let found = causes(&board.smmu, &e, &ctx);
        prop_assert!(matches!(e.outcome, Outcome::Translated { .. }) || !found.is_empty(), "{told}");
        // Nothing has changed.
        prop_assert_eq!(board.smmu.explain(from, Iova(va), access), e);
    }

    #[test]
    fn every_permission_fault_has_a_bit_that_explains_it(
        leaf: u16, xn in 0u64..4, table in 0u64..32, sctlr in 0u32..8, s2cr in 0u32..16, write: bool, instruction: bool,
        format in 0u8..3,
    ) {
        let board = Board::over(SystemMemory::new(&RAM).unwrap(), Config::default());
        let bank = 0x2_0000;
        let set = |at: usize, value: u32| {
            portcullis_bus::Mmio::write32(&board.window, bank + at as u64, value).unwrap();
        };
        // Permission bits of the leaf: AP[2:1], XN and PXN; of a table: 63 to 59.
        let bits = PAGE & !0xc0 | u64::from(leaf) & 0xc0;
        set(cb::MAIR0, 0xf404_ff44);
        set(cb::TTBR0, ROOT as u32);
        set(cb::TTBR0 + 4, 0);
        set(cb::SCTLR, 0x61 | (sctlr & 3) << 9 | (sctlr & 4));
        match format {
            0 => {
                board.global(0x1000 + gr1::CBA2R, 1);
                set(cb::TCR, 0x0080_2010);
                board.store(board.slot(ROOT, 0, 0x7000_0000), 0x6000_0000 | bits | xn << 53);
                board.store(ROOT, board.load(ROOT) | table << 59);
            }
            1 => {
                board.global(0x1000 + gr1::CBA2R, 0);
                set(cb::TCR, 1 << 31);
                board.store(board.slot(ROOT, 1, 0x7000_0000), 0x6000_0000 | bits | xn << 53);
                let at = ROOT + 8;
                board.store(at, board.load(at) | table << 59);
            }
            _ => {
                board.global(0x1000 + gr1::CBA2R, 0);
                set(cb::TCR, 0);
                // A section: XN, PXN, AP; AFE as SCTLR says.
                let af = if sctlr & 4 != 0 { 1 << 10 } else { 0 };
                let d = 0x6000_0002 | af | u64::from(leaf & 0x8c11) | xn & 1;
                let at = ROOT + (0x7000_0000u64 >> 20) * 4;
                board.store(at & !7, d << (8 * (at & 4)));
            }
        }
        board.global(gr0::S2CR, (s2cr & 3) << 24 | (s2cr >> 2) << 26);
        let from = Initiator::new(STREAM).with_attrs(Attributes::DEVICE_DEFAULT.with_instruction(instruction));
        let access = if write { Access::Write } else { Access::Read };
        let e = board.smmu.explain(from, Iova(0x7000_0000), access);
        if let Outcome::Fault { fault, incoming } = e.outcome {
            prop_assert_eq!(fault.kind, FaultKind::Permission, "{}", story(&e, None));
            let why = permission::forbidden(&e, &fault, incoming);
            prop_assert!(why.iter().all(|f| f.why != Why::Secure), "{}", story(&e, None));
        }
    }
}
