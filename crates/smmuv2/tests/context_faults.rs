//! What a context bank records of a fault, and the interrupt it raises.

mod rig;

use portcullis_arch::{Access, Attributes, Iova};
use portcullis_bus::{DmaFault, DmaPort, Initiator};
use rig::*;

/// (FSR, FSYNR0) of bank 0, cleared afterwards.
fn take(r: &Rig) -> (u32, u32) {
    let got = (r.rb(0, FSR), r.rb(0, FSYNR0));
    r.wb(0, FSR, 0x8000_01fe);
    got
}

/// An unmapped address of S2's second experiment: fsr=0x402, iova=0x70002000, fsynr=0x11, cbfrsynra=0x200, cb=0.
#[test]
fn an_unmapped_address_is_recorded_as_linux_prints_it() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    r.group(0, 0x200, 0);
    let mut p = r.port();
    // A level 1 table exists, its entry for 1 GiB does not: fault at level 1.
    t.page(root, 0, DATA | RW);
    assert_eq!(wr(&mut p, 0x200, 0x7000_2000), Err(ABORT));
    assert_eq!(r.rb64(0, FAR), 0x7000_2000);
    assert_eq!((r.rb(0, FSR), r.rb(0, FSYNR0), r.rb(0, FSYNR1)), (0x402, 0x11, 0));
    assert_eq!(r.r(r.cbfrsynra(0)), 0x200);
    // 0x402 and fsynr 0x3, the line seen most: a read, level 3.
    r.wb(0, FSR, 0x402);
    assert_eq!(r.rb(0, FSR), 0x400);
    t.page(root, 0x7000_0000, DATA | RW);
    assert_eq!(rd(&mut p, 0x200, 0x7000_2abc), Err(ABORT));
    assert_eq!((r.rb64(0, FAR), take(&r)), (0x7000_2abc, (0x402, 0x3)));
}

#[test]
fn translation_faults_report_the_level_of_the_descriptor() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    let mut p = r.port();
    let va = 0x0040_8060_5000;
    for level in 0..4 {
        assert_eq!(rd(&mut p, SID, va), Err(ABORT));
        assert_eq!(take(&r), (0x402, level));
        let at = t.slot(root, 0, va, level);
        // A reserved type at level 3, an address that no table has above.
        if level < 3 {
            let next = t.alloc(1);
            t.store(at, next | 3);
        } else {
            t.store(at, DATA | 0x701);
            assert_eq!(rd(&mut p, SID, va), Err(ABORT));
            assert_eq!(take(&r), (0x402, 3), "type 1 is reserved at level 3");
            t.store(at, DATA | RW);
        }
    }
    assert_eq!(rd(&mut p, SID, va), Ok(DATA));
}

#[test]
fn the_access_flag() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, 0x1000, DATA | RW & !AF);
    let mut p = r.port();
    assert_eq!(wr(&mut p, SID, 0x1000), Err(ABORT));
    assert_eq!(take(&r), (0x404, 0x13));
    r.wb(0, SCTLR, LINUX_SCTLR | AFFD);
    assert_eq!(wr(&mut p, SID, 0x1000), Ok(DATA), "AFFD: no access flag faults");
}

#[test]
fn permissions() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    let user = Attributes::DEVICE_DEFAULT;
    let kernel = user.with_privileged(true);
    let x = |a: Attributes| a.with_instruction(true);
    let (rd, wr) = (Access::Read, Access::Write);
    // Leaf, attributes, access, and the FSYNR0 of the permission fault, if there is one.
    let rows: &[(u64, Attributes, Access, Option<u32>)] = &[
        (USER, user, rd, None),
        (USER, user, wr, None),
        (USER | READ_ONLY, user, rd, None),
        (USER | READ_ONLY, user, wr, Some(0x13)),
        (USER | READ_ONLY, kernel, wr, Some(0x33)),
        (0, user, rd, Some(0x03)),
        (0, user, wr, Some(0x13)),
        (0, kernel, wr, None),
        (READ_ONLY, kernel, wr, Some(0x33)),
        (USER | UXN, x(user), rd, Some(0x43)),
        (USER | READ_ONLY, x(user), rd, None),
        (PXN, x(kernel), rd, Some(0x63)),
        (0, x(kernel), rd, None),
        (USER, x(kernel), rd, Some(0x63)), // writable by EL0: never executable at EL1
        (USER | UXN, x(user), wr, None),   // writes are data
        (USER | READ_ONLY | UXN, x(user), wr, Some(0x13)),
    ];
    for (n, (leaf, attrs, access, want)) in rows.iter().enumerate() {
        t.page(root, 0x1000, DATA | PAGE | NG | leaf);
        r.wb(0, TLBIALL, 0);
        let got = go(&mut r.port(), stream(SID).with_attrs(*attrs), 0x1000, *access);
        match want {
            None => assert_eq!(got, Ok(DATA), "row {n}"),
            Some(syndrome) => {
                assert_eq!(got, Err(ABORT), "row {n}");
                assert_eq!(take(&r), (0x408, *syndrome), "row {n}");
            }
        }
    }
}

#[test]
fn a_block_reports_its_own_level() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    let at = t.slot(root, 0, 0x20_0000, 2);
    t.store(at, 0x6000_0000 | (RW & !2) | READ_ONLY);
    assert_eq!(rd(&mut r.port(), SID, 0x3f_fff8), Ok(0x601f_fff8));
    assert_eq!(wr(&mut r.port(), SID, 0x3f_fff8), Err(ABORT));
    assert_eq!(take(&r), (0x408, 0x12));
}

#[test]
fn an_aborted_table_read_is_an_external_fault_with_ptwf() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    let mut p = r.port();
    // No memory at 0x1_0000_0000.
    for level in 0..3 {
        let at = t.slot(root, 0, 0x4000_0000, level);
        t.store(at, 0x1_0000_0003);
        assert_eq!(wr(&mut p, SID, 0x4000_0000), Err(ABORT));
        assert_eq!(take(&r), (0x410, 0x411 + level), "EF, PTWF, the level of the read that failed");
        t.store(at, 0);
    }
    r.wb64(0, TTBR0, 0x1_0000_0000);
    assert_eq!(wr(&mut p, SID, 0x4000_0000), Err(ABORT));
    assert_eq!(take(&r), (0x410, 0x410));
}

#[test]
fn an_abort_of_the_access_itself_goes_to_the_master_only() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, 0x1000, 0x1_0000_0000 | RW);
    let e = r.port().write(stream(SID), Iova(0x1000), &[1]).unwrap_err();
    assert!(matches!(e.fault, DmaFault::Bus(_)));
    assert_eq!((r.rb(0, FSR), r.r(GFSR)), (0x400, 0));
}

#[test]
fn an_address_above_pasize_is_an_address_size_fault() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    let mut p = r.port();
    r.wb(0, TCR2, 0x0003_8012); // PASize 40 bits
    t.page(root, 0x1000, 1 << 40 | RW);
    assert_eq!(wr(&mut p, SID, 0x1000), Err(ABORT));
    assert_eq!(take(&r), (0x480, 0x13));
    for level in 0..3 {
        let at = t.slot(root, 0, 0x0100_0000_0000, level);
        t.store(at, 1 << 47 | 3);
        assert_eq!(rd(&mut p, SID, 0x0100_0000_0000), Err(ABORT));
        assert_eq!(take(&r), (0x480, level), "a table address");
        t.store(at, 0);
    }
    r.wb64(0, TTBR0, 1 << 40);
    assert_eq!(rd(&mut p, SID, 0x1000), Err(ABORT));
    assert_eq!(take(&r), (0x480, 0), "TTBR0");
}

#[test]
fn bits_that_no_walk_sets_come_and_go_by_fsrrestore() {
    let (r, ..) = one_domain(LINUX_SCTLR);
    for bit in [1, 2, 3, 4, 5, 6, 7, 8, 31] {
        r.wb(0, FSRRESTORE, 1 << bit);
        assert_eq!(r.rb(0, FSR), 1 << bit | 0x400, "bit {bit}");
        assert!(r.irqs.level(0));
        r.wb(0, FSR, !(1 << bit));
        assert_eq!(r.rb(0, FSR), 1 << bit | 0x400);
        r.wb(0, FSR, 1 << bit);
        assert_eq!(r.rb(0, FSR), 0x400);
        assert!(!r.irqs.level(0));
    }
    r.wb(0, FSRRESTORE, 0xffff_ffff);
    assert_eq!(r.rb(0, FSR), 0x8000_05fe, "no SS, and FORMAT is the bank's");
    r.wb(0, FSRRESTORE, 2);
    assert_eq!(r.rb(0, FSR), 0x402, "it replaces, it does not add");
    // Write one to clear, several at a time; FORMAT does not move.
    r.wb(0, FSRRESTORE, 0x8000_01fe);
    for (write, left) in
        [(0x600, 0x8000_05fe), (0x6, 0x8000_05f8), (0x8000_0000, 0x5f8), (0xffff_ffff, 0x400)]
    {
        r.wb(0, FSR, write);
        assert_eq!(r.rb(0, FSR), left);
    }
}

#[test]
fn a_restored_fault_stops_the_bank_like_a_real_one() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, 0x1000, DATA | RW);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, 0x1000), Ok(DATA));
    r.wb(0, FSRRESTORE, 0x100);
    assert_eq!(rd(&mut p, SID, 0x1000), Err(ABORT), "although the TLB has it");
    r.wb(0, FSR, 0x100);
    assert_eq!(rd(&mut p, SID, 0x1000), Ok(DATA));
}

#[test]
fn far_is_the_input_as_the_bus_delivers_it() {
    let (r, ..) = one_domain(LINUX_SCTLR);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, 0xffff_8000_1234_5678), Err(ABORT));
    assert_eq!(r.rb64(0, FAR), 0x0001_8000_1234_5678);
}

#[test]
fn cbfrsynra_names_the_stream_that_was_first() {
    let (r, ..) = one_domain(LINUX_SCTLR);
    r.group(1, 0x7fff, 0);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 0x7fff, 0x1000), Err(ABORT));
    assert_eq!(rd(&mut p, SID, 0x2000), Err(ABORT));
    assert_eq!(r.r(r.cbfrsynra(0)), 0x7fff);
    assert_eq!(r.smmu.faulting_stream(0), Some(portcullis_arch::StreamId(0x7fff)));
    r.wb(0, FSR, 2);
    assert_eq!(r.smmu.faulting_stream(0), None);
}

#[test]
fn the_bank_interrupt_is_a_level() {
    let (r, ..) = one_domain(M | CFRE);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, 0x1000), Err(ABORT));
    assert!(r.irqs.pending().is_empty(), "CFIE is 0");
    r.wb(0, SCTLR, LINUX_SCTLR);
    assert_eq!(r.irqs.pending(), [0, COMBINED_NS]);
    assert!(r.smmu.context_interrupt(0) && !r.smmu.context_interrupt(1));
    r.wb(0, SCTLR, M | CFRE);
    assert!(r.irqs.pending().is_empty());
    r.wb(0, SCTLR, LINUX_SCTLR);
    r.wb(0, FSR, 0x4);
    assert_eq!(r.irqs.pending(), [0, COMBINED_NS], "another bit was cleared");
    r.wb(0, FSR, 0x2);
    assert!(r.irqs.pending().is_empty());
    assert_eq!(r.irqs.rises(0), 2);
}

#[test]
fn the_combined_output_is_the_or_of_all() {
    let (r, ..) = one_domain(LINUX_SCTLR);
    r.wb(15, SCTLR, CFIE);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, 0x1000), Err(ABORT));
    assert_eq!(rd(&mut p, 0x123, 0x1000), Err(ABORT));
    r.wb(15, FSRRESTORE, 2);
    assert_eq!(r.irqs.pending(), [0, 15, GLOBAL_NS, COMBINED_NS]);
    r.wb(0, FSR, 2);
    r.w(GFSR, 2);
    assert_eq!(r.irqs.pending(), [15, COMBINED_NS]);
    r.wb(15, FSR, 2);
    assert!(r.irqs.pending().is_empty());
    assert_eq!(r.irqs.rises(COMBINED_NS), 1, "it never went low in between");
}

#[test]
fn a_bank_that_changes_hands_takes_its_interrupt_along() {
    let (r, ..) = one_domain(LINUX_SCTLR);
    r.wb(9, SCTLR, CFIE);
    r.wb(9, FSRRESTORE, 2);
    assert_eq!(r.irqs.pending(), [9, COMBINED_NS]);
    r.ws(SCR1, 0x0201_3008);
    assert_eq!(r.irqs.pending(), [9, COMBINED_S]);
}

#[test]
fn each_bank_records_its_own() {
    let r = Rig::zynqmp_on();
    let mut t = Tables::new(&r);
    for n in 0..16u8 {
        let root = t.alloc(1);
        t.page(root, 0x1000, (DATA + 0x1000 * u64::from(n)) | RW);
        r.stage1(n, root, LINUX_SCTLR);
        r.group(n.into(), 0x868 + u32::from(n), n.into());
    }
    let mut p = r.port();
    for n in 0..16u8 {
        let id = 0x868 + u32::from(n);
        assert_eq!(rd(&mut p, id, 0x1008), Ok(DATA + 0x1008 * u64::from(n) - 8 * u64::from(n) + 8));
        if n % 2 == 0 {
            assert_eq!(wr(&mut p, id, 0x9000 + u64::from(n)), Err(ABORT));
        }
    }
    for n in 0..16u8 {
        let (fsr, far, sid) =
            if n % 2 == 0 { (0x402, 0x9000 + u64::from(n), 0x868 + u32::from(n)) } else { (0x400, 0, 0) };
        assert_eq!((r.rb(n, FSR), r.rb64(n, FAR), r.r(r.cbfrsynra(n))), (fsr, far, sid), "bank {n}");
        assert_eq!(r.irqs.level(n.into()), n % 2 == 0);
    }
}

#[test]
fn cfre_decides_between_an_abort_and_silence() {
    let (r, mut t, root) = one_domain(M | CFIE);
    t.page(root, 0x1000, DATA | RW);
    r.poke(DATA + 0xff8, 0x1111_2222_3333_4444);
    let mut p = r.port();
    let who: Initiator = stream(SID);
    // The second half of the transfer is unmapped: it reads as zero, and writes to it are ignored.
    let mut b = [0xee; 16];
    p.read(who, Iova(0x1ff8), &mut b).unwrap();
    assert_eq!(u64::from_le_bytes(b[..8].try_into().unwrap()), 0x1111_2222_3333_4444);
    assert_eq!(b[8..], [0; 8]);
    assert_eq!(r.rb(0, FSR), 0x402);
    r.wb(0, FSR, 2);
    p.write(who, Iova(0x1ff8), &[0x55; 16]).unwrap();
    assert_eq!(r.peek(DATA + 0xff8), 0x5555_5555_5555_5555);
    assert_eq!(r.peek(DATA + 0x1000), 0);
    r.wb(0, FSR, 2);
    r.wb(0, SCTLR, LINUX_SCTLR);
    let e = p.write(who, Iova(0x1ff8), &[0x66; 16]).unwrap_err();
    assert_eq!((e.done, e.fault), (8, DmaFault::Terminated));
}
