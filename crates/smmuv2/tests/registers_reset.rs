//! What a Zynq UltraScale+ finds in its SMMU after reset, word by word, as secure and as non-secure software.

mod rig;

use rig::*;

/// Offset, secure value, non-secure value: everything that is not zero in the 64 KiB of global pages, stream mapping
/// and context attribute registers left aside. From UG1087, IHI 0062D and the reset values of Xilinx's own model.
const GLOBAL: &[(u64, u32, u32)] = &[
    (0x0_0000, 0x0020_0001, 0x0020_0001), // CR0: SMCFCFG, CLIENTPD
    (0x0_0004, 0x0201_3010, 0),           // SCR1: 16 banks, 48 groups, GEFRO
    (0x0_0010, 0x0400_0004, 0x0400_001c), // ACR
    (0x0_0020, 0xfc01_3e30, 0x7c01_3e30), // IDR0: SES only for secure software
    (0x0_0024, 0x3000_0f10, 0x3000_0010), // IDR1: NUMSSDNDXB only for secure software
    (0x0_0028, 0x0000_5555, 0x0000_5555), // IDR2
    (0x0_003c, 0x0000_0021, 0x0000_0021), // IDR7: r2p1
    (0x0_0400, 0x0020_0001, 0),           // NSCR0
    (0x0_0410, 0x0400_001c, 0),           // NSACR
    (0x0_0fd0, 0x04, 0x04),               // PIDR4
    (0x0_0fe0, 0x81, 0x81),
    (0x0_0fe4, 0xb4, 0xb4),
    (0x0_0fe8, 0x1b, 0x1b),
    (0x0_0ff0, 0x0d, 0x0d), // CIDR0
    (0x0_0ff4, 0xf0, 0xf0),
    (0x0_0ff8, 0x05, 0x05),
    (0x0_0ffc, 0xb1, 0xb1),
    (0x0_2204, 0x3f, 0x3f), // TBU_PWR_STATUS: six TBUs
];

fn expected(offset: u64) -> (u32, u32) {
    let group = |base: u64| (base..base + 48 * 4).contains(&offset);
    if group(0xc00) || (0x1000..0x1000 + 16 * 4).contains(&offset) {
        // S2CR: fault. CBAR: stage 1 with stage 2 fault.
        return (0x0002_0000, 0x0002_0000);
    }
    if (0x1_0000..0x2_0000).contains(&offset) {
        let v = match offset & 0xfff {
            0x000 => 0x100, // SCTLR: HUPCF
            0x004 => 3,     // ACTLR: CPRE, CMTLB
            0x010 => 0x60,  // TCR2: TBI1, TBI0
            _ => 0,
        };
        return (v, v);
    }
    GLOBAL.iter().find(|(o, ..)| *o == offset).map_or((0, 0), |(_, s, ns)| (*s, *ns))
}

#[test]
fn every_word_of_the_window_has_its_reset_value() {
    let r = Rig::zynqmp();
    for offset in (0..0x2_0000).step_by(4) {
        let (s, ns) = expected(offset);
        assert_eq!(r.rs(offset), s, "secure read of {offset:#x}");
        assert_eq!(r.r(offset), ns, "non-secure read of {offset:#x}");
    }
}

#[test]
fn reset_brings_every_word_back() {
    let r = Rig::zynqmp();
    for offset in (0..0x2_0000).step_by(4) {
        r.ws(offset, 0xffff_ffff);
        r.w(offset, 0x5555_aaaa);
    }
    r.smmu.reset();
    every_word_is_reset(&r);
    assert!(r.irqs.pending().is_empty());
}

fn every_word_is_reset(r: &Rig) {
    for offset in (0..0x2_0000).step_by(4) {
        assert_eq!((r.rs(offset), r.r(offset)), expected(offset), "{offset:#x}");
    }
}

#[test]
fn the_window_ends_after_its_128_kib() {
    use portcullis_bus::{BusError, Mmio};
    let r = Rig::zynqmp();
    assert_eq!(r.smmu.config().window_size(), 0x2_0000);
    assert_eq!(r.ns.read32(0x2_0000), Err(BusError::Decode));
    assert_eq!(r.ns.write32(0x2_0000, 0), Err(BusError::Decode));
    assert_eq!(r.ns.read32(!3), Err(BusError::Decode));
}

/// Offset, what is left after a write of ones, and after a write of zeros: by secure software.
#[test]
fn fixed_bits_of_an_mmu_500_do_not_move() {
    const ROWS: &[(u64, u32, u32)] = &[
        // SMCFCFG 1; GSE, STALLD, GCFGFIE, GCFGFRE, EXIDENABLE 0; secure copy: no VMIDPNE, HYPMODE, VMID16EN.
        (0x000, 0x3fff_f4c7, 0x0020_0000),
        // NSCAFRO 0, NSNUMIRPTO 1, no NSCOMPINDEXDISABLE.
        (0x004, 0x0f01_ffff, 0x0001_0000),
        (0x008, 0x0000_00ff, 0), // CR2: BPVMID
        (0x010, 0x0c01_0704, 0), // SACR
        // Non-secure copies: VMIDPNE there, NSCFG not.
        (0x400, 0x0fff_fcc7, 0x0020_0000),
        (0x408, 0x0000_00ff, 0),
        (0x410, 0x0f01_071c, 0),
        (0x020, 0xfc01_3e30, 0xfc01_3e30), // IDRs are read only
        (0x024, 0x3000_0f10, 0x3000_0f10),
        (0x028, 0x0000_5555, 0x0000_5555),
        (0x03c, 0x21, 0x21),
        (0x040, 0xffff_ffff, 0),  // SGFAR
        (0x044, 0x0001_ffff, 0),  // its high word has 17 bits
        (0x050, 0x0000_ff3e, 0),  // SGFSYNR0: no NESTED, ATS fixed
        (0x054, 0x7fff_7fff, 0),  // SGFSYNR1
        (0x450, 0x0000_ff2f, 0),  // NSGFSYNR0: no NSSTATE, ATS fixed
        (0x800, 0xffff_7fff, 0),  // SMR: VALID, MASK 15, ID 15
        (0xc00, 0x3fff_fbff, 0),  // S2CR: no EXIDVALID
        (0x1000, 0x00ff_ffff, 0), // CBAR: no IRPTNDX
        (0x1400, 0x7fff_7fff, 0), // CBFRSYNRA
        (0x1800, 0x0000_0003, 0), // CBA2R: MONC, VA64
    ];
    let r = Rig::zynqmp();
    for &(offset, ones, zeros) in ROWS {
        r.ws(offset, 0xffff_ffff);
        assert_eq!(r.rs(offset), ones, "{offset:#x} after ones");
        r.ws(offset, 0);
        assert_eq!(r.rs(offset), zeros, "{offset:#x} after zeros");
    }
}
