//! Global faults: the order of checks before a context is used, what is recorded, and how it ends for the master.

mod rig;

use portcullis_arch::{Access, Attributes, Iova};
use portcullis_bus::DmaPort;
use portcullis_smmuv2::{Aarch32, Config};
use rig::*;

const ICF: u32 = 1;
const USF: u32 = 2;
const SMCF: u32 = 4;
const UCBF: u32 = 8;
const NESTED: u32 = 1;

fn set_cbar(r: &Rig, bank: u8, cbar: u32, va64: u32) {
    r.w(r.cbar(bank), cbar);
    r.w(r.cba2r(bank), va64);
}

/// (GFSR, GFSYNR0) after a read of stream 1.
fn faulted(r: &Rig) -> (u32, u32) {
    assert_eq!(rd(&mut r.port(), 1, 0x7000_2000), Err(ABORT));
    let got = (r.r(GFSR), r.r(GFSYNR0));
    assert_eq!((r.r(GFSYNR1), r.r64(GFAR)), (1, 0x7000_2000));
    r.w(GFSR, 0xffff_ffff);
    got
}

#[test]
fn a_faulting_stream_is_an_invalid_context() {
    let r = Rig::plain_on();
    r.group(0, 1, 0x0002_0000);
    assert_eq!(faulted(&r), (ICF, 0));
    r.group(0, 1, 0x0003_0000);
    assert_eq!(faulted(&r), (ICF, 0));
}

#[test]
fn a_bank_that_does_not_exist_is_unimplemented() {
    let r = Rig::plain_on();
    for bank in [32, 200, 255] {
        r.group(0, 1, bank);
        assert_eq!(faulted(&r), (UCBF, 0), "bank {bank}");
    }
}

#[test]
fn a_stage_that_is_not_implemented_is_an_invalid_context() {
    let on = |c: Config| {
        let r = Rig::new(c);
        r.w(CR0, 0x0020_0402);
        r.group(0, 1, 0);
        r
    };
    let r = on(Config { stage1: false, nested: false, translation_ops: false, ..Config::default() });
    for (cbar, want) in [(0x0001_0000, true), (0x0003_0000, true), (0, false)] {
        set_cbar(&r, 0, cbar, 1);
        if want {
            assert_eq!(faulted(&r), (ICF, NESTED), "no stage 1, {cbar:#x}");
        } else {
            assert_eq!(rd(&mut r.port(), 1, DATA), Ok(DATA));
        }
    }
    let r = on(Config { stage2: false, nested: false, ..Config::default() });
    for cbar in [0, 0x0003_0000] {
        set_cbar(&r, 0, cbar, 1);
        assert_eq!(faulted(&r), (ICF, NESTED), "no stage 2, {cbar:#x}");
    }
    let r = on(Config { nested: false, ..Config::default() });
    set_cbar(&r, 0, 0x0003_0100, 1);
    assert_eq!(faulted(&r), (ICF, NESTED), "no nesting");
}

#[test]
fn a_stage_2_only_bank_has_no_stage_1() {
    let r = Rig::new(Config { stage2_only_banks: 2, ..Config::default() });
    r.w(CR0, 0x0020_0402);
    r.group(0, 1, 1);
    for cbar in [0x0001_0000, 0x0002_0000, 0x0003_0000] {
        set_cbar(&r, 1, cbar, 1);
        assert_eq!(faulted(&r), (ICF, NESTED), "{cbar:#x}");
    }
    set_cbar(&r, 1, 0, 1);
    assert_eq!(rd(&mut r.port(), 1, DATA), Ok(DATA));
    r.group(0, 1, 2);
    set_cbar(&r, 2, 0x0001_0000, 1);
    assert_eq!(rd(&mut r.port(), 1, DATA), Ok(DATA), "bank 2 has both formats");
}

#[test]
fn cbar_type_2_is_an_invalid_context() {
    let r = Rig::zynqmp_on();
    r.group(0, 1, 0);
    assert_eq!(faulted(&r), (ICF, NESTED), "what an MMU-500's banks are after reset");
}

#[test]
fn the_stage_2_bank_is_checked_after_the_first_one() {
    let r = Rig::plain_on();
    r.group(0, 1, 0);
    // Step 8: it does not exist.
    set_cbar(&r, 0, 0x0003_2000, 1);
    assert_eq!(faulted(&r), (UCBF, NESTED));
    // Step 9: it is not a stage 2 bank.
    for cbar in [0x0001_0000, 0x0002_0000, 0x0003_0000] {
        set_cbar(&r, 1, cbar, 1);
        set_cbar(&r, 0, 0x0003_0100, 1);
        assert_eq!(faulted(&r), (ICF, NESTED), "{cbar:#x}");
    }
    // AArch64 on top of AArch32 is not possible, the other way round is.
    set_cbar(&r, 1, 0, 0);
    assert_eq!(faulted(&r), (ICF, NESTED));
    set_cbar(&r, 0, 0x0003_0100, 0);
    assert_eq!(rd(&mut r.port(), 1, DATA), Ok(DATA));
    set_cbar(&r, 1, 0, 1);
    assert_eq!(rd(&mut r.port(), 1, DATA), Ok(DATA));
    set_cbar(&r, 0, 0x0003_0100, 1);
    assert_eq!(rd(&mut r.port(), 1, DATA), Ok(DATA));
    // A bank nested on itself.
    set_cbar(&r, 0, 0x0003_0000, 1);
    assert_eq!(faulted(&r), (ICF, NESTED));
}

#[test]
fn a_bank_of_the_other_side_is_unimplemented() {
    let r = Rig::zynqmp();
    r.ws(SCR1, 0x0201_2008);
    r.ws(CR0, 0x0020_0402);
    r.w(CR0, 0x0020_0402);
    // Non-secure stream to a secure bank.
    r.group(0, 1, 8);
    r.ws(r.cbar(8), LINUX_CBAR);
    assert_eq!(faulted(&r), (UCBF, 0));
    // Secure stream to a non-secure bank.
    r.ws(S2CR + 4 * 40, 7);
    r.ws(SMR + 4 * 40, 0x8000_0001);
    r.w(r.cbar(7), LINUX_CBAR);
    assert_eq!(go(&mut r.port(), secure(1), 0x1000, Access::Read), Err(ABORT));
    assert_eq!((r.rs(GFSR), r.rs(GFSYNR0), r.rs(GFSYNR1)), (UCBF, 0, 1));
    r.ws(GFSR, UCBF);
    // A secure bank can only be of type 1: nothing else is ICF, and SGFSYNR0 has no NESTED.
    r.ws(S2CR + 4 * 40, 9);
    for cbar in [0, 0x0002_0000, 0x0003_0a00] {
        r.ws(r.cbar(9), cbar);
        assert_eq!(go(&mut r.port(), secure(1), 0x1000, Access::Read), Err(ABORT));
        assert_eq!((r.rs(GFSR), r.rs(GFSYNR0)), (ICF, 0), "{cbar:#x}");
        r.ws(GFSR, ICF);
    }
    r.ws(r.cbar(9), LINUX_CBAR);
    assert_eq!(go(&mut r.port(), secure(1), DATA, Access::Read), Ok(DATA));
    // A stage 2 bank of the other side.
    r.ws(r.cbar(8), 0);
    r.w(r.cbar(0), 0x0003_0800);
    r.group(0, 1, 0);
    assert_eq!(faulted(&r), (UCBF, NESTED));
}

#[test]
fn earlier_checks_win() {
    // Conflict before type, type before bank, bank before CBAR, CBAR before the stage 2 bank.
    let r = Rig::plain_on();
    r.group(0, 1, 0x0002_00ff);
    r.group(1, 1, 0x0002_00ff);
    assert_eq!(faulted(&r).0, SMCF);
    r.w(SMR, 0);
    r.w(SMR + 4, 0);
    assert_eq!(faulted(&r).0, USF);
    r.group(0, 1, 0x0002_00ff);
    assert_eq!(faulted(&r), (ICF, 0));
    r.group(0, 1, 0xff);
    assert_eq!(faulted(&r), (UCBF, 0));
    r.group(0, 1, 0);
    set_cbar(&r, 0, 0x0002_ff00, 1);
    assert_eq!(faulted(&r), (ICF, NESTED));
}

#[test]
fn the_syndrome_has_the_incoming_attributes() {
    let r = Rig::zynqmp_on();
    // PRIVCFG and INSTCFG would change both.
    r.group(0, 1, 0x0e02_0000);
    let mut p = r.port();
    for (privileged, instruction, access, want) in [
        (false, false, Access::Read, 0x0),
        (false, false, Access::Write, 0x2),
        (true, false, Access::Read, 0x4), // GFSYNR0 0x4 with GFSR 1: a Xen log from this chip
        (true, false, Access::Write, 0x6),
        (false, true, Access::Read, 0x8),
        (true, true, Access::Read, 0xc),
    ] {
        let a = Attributes::DEVICE_DEFAULT.with_privileged(privileged).with_instruction(instruction);
        assert_eq!(go(&mut p, stream(1).with_attrs(a), 0x1000, access), Err(ABORT));
        assert_eq!((r.r(GFSR), r.r(GFSYNR0)), (1, want));
        r.w(GFSR, 1);
    }
}

#[test]
fn gfar_has_the_address_bits_of_the_bus() {
    let r = Rig::zynqmp_on();
    assert_eq!(rd(&mut r.port(), 9, 0xfff5_5555_7777_8888), Err(ABORT));
    assert_eq!(r.r64(GFAR), 0x0001_5555_7777_8888);
}

/// A log of this chip shows GFSR 0x80000002, GFSYNR0 0, GFSYNR1 0x201, GFSYNR2 0: a second PL master on HPC0.
#[test]
fn a_second_fault_sets_multi_and_changes_nothing_else() {
    let r = Rig::zynqmp_on();
    let mut p = r.port();
    assert_eq!(rd(&mut p, 0x201, 0x7000_0000), Err(ABORT));
    assert_eq!(r.r(GFSR), 2);
    r.group(0, 1, 0x0002_0000);
    assert_eq!(wr(&mut p, 1, 0x8000_0000), Err(ABORT));
    assert_eq!(
        (r.r(GFSR), r.r(GFSYNR0), r.r(GFSYNR1), r.r(GFSYNR2), r.r64(GFAR)),
        (0x8000_0002, 0, 0x201, 0, 0x7000_0000)
    );
    // MULTI alone still keeps the record closed.
    r.w(GFSR, 2);
    assert_eq!(r.r(GFSR), 0x8000_0000);
    assert_eq!(wr(&mut p, 1, 0x8000_0000), Err(ABORT));
    assert_eq!((r.r(GFSR), r.r(GFSYNR1)), (0x8000_0000, 0x201));
    r.w(GFSR, 0x8000_0000);
    assert_eq!(wr(&mut p, 1, 0x8000_0000), Err(ABORT));
    assert_eq!((r.r(GFSR), r.r(GFSYNR1)), (1, 1));
}

#[test]
fn gfsr_is_write_one_to_clear() {
    let r = Rig::zynqmp_on();
    r.w(GFSRRESTORE, 0x8000_01ff);
    for (write, left) in [(0, 0x8000_01ff), (0x3, 0x8000_01fc), (0x8000_0000, 0x1fc), (0xffff_ffff, 0)] {
        r.w(GFSR, write);
        assert_eq!(r.r(GFSR), left);
    }
}

#[test]
fn gfre_decides_between_an_abort_and_silence() {
    let r = Rig::zynqmp();
    r.poke(DATA, 0x1111_2222_3333_4444);
    let mut p = r.port();
    r.w(CR0, 0x0020_0402);
    let mut b = [0xee; 8];
    let e = p.read(stream(1), Iova(DATA), &mut b).unwrap_err();
    assert_eq!((e.done, e.fault), (0, portcullis_bus::DmaFault::Terminated));
    assert_eq!(b, [0xee; 8]);
    assert!(p.write(stream(1), Iova(DATA), &[0xff; 8]).is_err());
    r.w(CR0, 0x0020_0400);
    p.read(stream(1), Iova(DATA), &mut b).unwrap();
    assert_eq!(b, [0; 8], "reads as zero");
    p.write(stream(1), Iova(DATA), &[0xff; 8]).unwrap();
    assert_eq!(r.peek(DATA), 0x1111_2222_3333_4444, "and writes are ignored");
    assert_eq!(r.r(GFSR), 0x8000_0002, "recorded either way");
}

#[test]
fn the_global_interrupt_is_a_level() {
    let r = Rig::zynqmp();
    r.w(CR0, 0x0020_0402); // no GFIE
    let mut p = r.port();
    assert_eq!(rd(&mut p, 1, 0), Err(ABORT));
    assert!(r.irqs.pending().is_empty());
    r.w(CR0, 0x0020_0406);
    assert_eq!(r.irqs.pending(), [GLOBAL_NS, COMBINED_NS], "enabled while a fault is recorded");
    r.w(CR0, 0x0020_0402);
    assert!(r.irqs.pending().is_empty());
    r.w(CR0, 0x0020_0406);
    r.w(GFSR, 2);
    assert!(r.irqs.pending().is_empty());
    // The secure side's own.
    r.ws(CR0, 0x0020_0406);
    assert_eq!(go(&mut p, secure(1), 0, Access::Read), Err(ABORT));
    assert_eq!(r.irqs.pending(), [GLOBAL_S, COMBINED_S]);
    assert_eq!((r.rs(GFSR), r.r(GFSR)), (2, 0));
    r.ws(GFSR, 2);
    assert!(r.irqs.pending().is_empty());
}

#[test]
fn global_faults_never_stall() {
    let r = Rig::zynqmp_on();
    r.group(0, 1, 0);
    r.wb(0, SCTLR, CFCFG | CFRE);
    assert_eq!(rd(&mut r.port(), 1, 0), Err(ABORT), "CBAR type 2 with CFCFG 1");
    assert_eq!((r.r(GFSR), r.rb(0, FSR)), (1, 0), "and the bank records nothing");
}

#[test]
fn an_smmu_without_aarch32_takes_banks_as_they_come_out_of_reset() {
    let r = Rig::new(Config { aarch32: Aarch32::None, ..Config::default() });
    r.w(CR0, 0x0020_0402);
    r.group(0, 1, 0);
    set_cbar(&r, 0, 0x0003_0100, 0);
    set_cbar(&r, 1, 0, 0);
    assert_eq!(rd(&mut r.port(), 1, 0x1_2345_6789_a000), Err(SILENT));
    assert_eq!((r.r(GFSR), r.rb(0, FSR)), (0, 0x480), "VA64 is fixed at 1: an address of 49 bits is an ASF");
}
