//! Linux 6.12's arm-smmu on a Zynq UltraScale+, register by register: the offsets, values and orders of its probe,
//! reset, attach, map, unmap, fault handlers and shutdown.

mod rig;

use portcullis_arch::{Access, Attributes, Iova};
use portcullis_bus::{DmaFault, DmaPort};
use rig::*;

/// A register access: R offset value, W offset value, W64.
enum Do {
    R(u64, u32),
    R64(u64, u64),
    W(u64, u32),
    W64(u64, u64),
}
use Do::*;

fn replay(r: &Rig, trace: &[Do]) {
    for (n, step) in trace.iter().enumerate() {
        match *step {
            R(offset, want) => {
                let got = r.r(offset);
                assert_eq!(got, want, "step {n}: read of {offset:#x} is {got:#x}");
            }
            R64(offset, want) => {
                let got = r.r64(offset);
                assert_eq!(got, want, "step {n}: read of {offset:#x} is {got:#x}");
            }
            W(offset, value) => r.w(offset, value),
            W64(offset, value) => r.w64(offset, value),
        }
    }
}

const fn cb(n: u64, reg: u64) -> u64 {
    0x1_0000 + n * 0x1000 + reg
}

fn identification() -> Vec<Do> {
    vec![R(0x20, 0x7c01_3e30), R(0x24, 0x3000_0010), R(0x28, 0x0000_5555)]
}

/// arm_smmu_rmr_install_bypass_smr and arm_smmu_device_reset with arm_mmu500_reset, from hardware reset.
fn reset_sequence() -> Vec<Do> {
    let mut t = vec![R(0x000, 0x0020_0001), W(0x000, 0x0020_0001)];
    t.extend([R(0x048, 0), W(0x048, 0)]);
    for n in 0..48 {
        t.extend([W(0xc00 + 4 * n, 0x0002_0000), W(0x800 + 4 * n, 0)]);
    }
    for n in 0..16 {
        t.extend([W(cb(n, 0x000), 0), W(cb(n, 0x058), 0xc000_01fe)]);
    }
    t.extend([W(0x06c, 0xffff_ffff), W(0x068, 0xffff_ffff), R(0x000, 0x0020_0001)]);
    t.extend([R(0x03c, 0x21), R(0x010, 0x0400_001c), W(0x010, 0x0000_051c)]);
    for n in 0..16 {
        t.extend([R(cb(n, 0x004), 3), W(cb(n, 0x004), 1), R(cb(n, 0x004), 1)]);
    }
    t.extend([W(0x070, 0xffff_ffff), R(0x074, 0), W(0x000, 0x0020_1c36)]);
    // GCFGFRE and GCFGFIE do not stick.
    t.push(R(0x000, 0x0020_1c06));
    t
}

/// arm_smmu_test_smr_masks on group 0.
fn smr_masks() -> Vec<Do> {
    vec![
        W(0x800, 0x0000_7fff),
        R(0x800, 0x0000_7fff),
        W(0x800, 0x7fff_0000),
        R(0x800, 0x7fff_0000),
        W(0x800, 0),
    ]
}

/// Device probe: group 0 for stream 0x200, nothing else.
fn device(sid: u32) -> Vec<Do> {
    vec![W(0xc00, 0x0002_0000), W(0x800, 0x8000_0000 | sid)]
}

/// arm_smmu_init_domain_context, request_irq and arm_smmu_domain_add_master for bank 0, ASID 0.
fn attach(root: u64) -> Vec<Do> {
    vec![
        W(0x1800, 1),           // CBA2R: VA64
        W(0x1000, 0x0001_f300), // CBAR: type 1, BPSHCFG 3, MemAttr 0xf
        W(cb(0, 0x010), 0x0003_8015),
        W(cb(0, 0x030), 0x0080_2010),
        W64(cb(0, 0x020), root),
        W64(cb(0, 0x028), 0),
        W(cb(0, 0x038), 0xf404_ff44),
        W(cb(0, 0x03c), 0),
        W(cb(0, 0x000), 0x1067),
        W(0xc00, 0), // S2CR: translate through bank 0
    ]
}

fn linux() -> (Rig, Tables, u64) {
    let r = Rig::zynqmp();
    replay(&r, &identification());
    replay(&r, &reset_sequence());
    replay(&r, &smr_masks());
    replay(&r, &device(0x200));
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    replay(&r, &attach(root));
    (r, t, root)
}

#[test]
fn probe_reads_what_the_boot_log_prints() {
    let r = Rig::zynqmp();
    replay(&r, &identification());
    let (id0, id1, id2) = (r.r(IDR0), r.r(IDR1), r.r(IDR2));
    assert!(id0 & 1 << 30 != 0 && id0 & 1 << 29 != 0 && id0 & 1 << 28 != 0, "stage 1, stage 2, nested");
    assert!(id0 & 1 << 26 != 0, "no address translation ops");
    assert_eq!(id0 >> 14 & 1, 0, "non-coherent table walk");
    assert_eq!(id0 & 0xff, 48, "stream matching with 48 register groups");
    assert_eq!((id1 & 0xff, id1 >> 16 & 0xff), (16, 0), "16 context banks (0 stage-2 only)");
    // The size check of the driver: (NUMPAGE << pgshift) * 2.
    assert_eq!((1u64 << ((id1 >> 28 & 7) + 1)) << 12 << 1, 0x2_0000);
    assert_eq!((id2 & 0xf, id2 >> 4 & 0xf, id2 >> 8 & 0xf), (5, 5, 5), "48-bit VA, IPA, PA");
    assert_eq!(id2 >> 12 & 7, 5, "4K and 64K");
}

#[test]
fn reset_leaves_everything_blocked() {
    let r = Rig::zynqmp();
    // What a boot loader left behind.
    r.w(GFSRRESTORE, 0x8000_0002);
    r.w(GFSR, 0x8000_0002);
    r.group(7, 0x868, 0x0001_0000);
    r.wb(3, SCTLR, M);
    replay(&r, &reset_sequence());
    let mut p = r.port();
    assert_eq!(rd(&mut p, 0x868, DATA), Err(ABORT));
    assert_eq!(r.r(GFSR), 2);
    for n in 0..16 {
        assert_eq!((r.rb(n, SCTLR), r.rb(n, FSR) & 0x8000_01fe), (0, 0), "bank {n}");
    }
}

#[test]
fn bypass_by_default_is_another_value_of_cr0() {
    let r = Rig::zynqmp();
    replay(&r, &reset_sequence());
    replay(&r, &[W(0x000, 0x0020_1836), R(0x000, 0x0020_1806)]);
    assert_eq!(rd(&mut r.port(), 0x868, DATA), Ok(DATA));
}

#[test]
fn the_mask_test_sees_fifteen_bits_and_installs_nothing() {
    let r = Rig::zynqmp();
    replay(&r, &reset_sequence());
    // All ones in each field: the 16-bit fields of the driver's shifts.
    replay(&r, &[W(0x800, 0x0000_ffff), R(0x800, 0x0000_7fff)]);
    assert_eq!(rd(&mut r.port(), 0x7fff, DATA), Err(ABORT), "not valid");
    replay(&r, &[W(0x800, 0x7fff_0000), R(0x800, 0x7fff_0000)]);
    assert_eq!(rd(&mut r.port(), 0x1234, DATA), Err(ABORT));
    assert_eq!(r.r(GFSR), 0x8000_0002);
}

#[test]
fn attach_reads_back_but_for_what_an_mmu_500_fixes() {
    let (r, _, root) = linux();
    let reads = vec![
        R(0x1800, 1),
        R(0x1000, 0x0001_f300),
        R(cb(0, 0x010), 0x0003_8075), // TBI reads as one
        R(cb(0, 0x030), 0x0080_2010),
        R64(cb(0, 0x020), root),
        R(cb(0, 0x038), 0xf404_ff44),
        R(cb(0, 0x000), 0x0067), // ASIDPNE is fixed at 0
        R(0x800, 0x8000_0200),
        R(0xc00, 0),
    ];
    replay(&r, &reads);
}

#[test]
fn map_dma_unmap() {
    let (r, mut t, root) = linux();
    let mut p = r.port();
    t.page(root, 0x7000_2000, DATA | RW);
    p.write(stream(0x200), Iova(0x7000_2000), &0xcafe_beefu32.to_le_bytes()).unwrap();
    assert_eq!(r.peek(DATA), 0xcafe_beef);
    // Unmap: the descriptor, TLBIVAL with iova >> 12 and ASID 0, TLBSYNC, TLBSTATUS.
    t.unmap(root, 0x7000_2000);
    replay(&r, &[W64(cb(0, 0x620), 0x7_0002), W(cb(0, 0x7f0), 0xffff_ffff), R(cb(0, 0x7f4), 0)]);
    let e = p.write(stream(0x200), Iova(0x7000_2000), &[0]).unwrap_err();
    assert_eq!(e.fault, DmaFault::Terminated);
    assert_eq!(r.peek(DATA), 0xcafe_beef);
}

#[test]
fn flush_all_is_by_asid() {
    let (r, mut t, root) = linux();
    let mut p = r.port();
    for n in 0..32u64 {
        t.page(root, 0x7000_0000 + 0x1000 * n, (DATA + 0x1000 * n) | RW);
        assert_eq!(fetch(&mut p, 0x200, 0x7000_0000 + 0x1000 * n), 0);
        t.unmap(root, 0x7000_0000 + 0x1000 * n);
    }
    replay(&r, &[W(cb(0, 0x610), 0), W(cb(0, 0x7f0), 0), R(cb(0, 0x7f4), 0)]);
    for n in 0..32u64 {
        assert_eq!(rd(&mut p, 0x200, 0x7000_0000 + 0x1000 * n), Err(ABORT));
    }
}

/// fsr=0x402, iova=0x70002000, fsynr=0x11, cbfrsynra=0x200, cb=0.
#[test]
fn the_context_fault_handler() {
    let (r, mut t, root) = linux();
    t.page(root, 0, DATA | RW); // a level 1 table, but nothing at 1 GiB
    let mut p = r.port();
    assert_eq!(wr(&mut p, 0x200, 0x7000_2000), Err(ABORT));
    assert_eq!(r.irqs.pending(), [0, COMBINED_NS]);
    let handler = [
        R64(cb(0, 0x060), 0x7000_2000),
        R(cb(0, 0x058), 0x402),
        R(cb(0, 0x068), 0x11),
        R(0x1400, 0x200),
        W(cb(0, 0x058), 0x402),
    ];
    replay(&r, &handler);
    assert!(r.irqs.pending().is_empty());
    // Until then every transaction of the bank was terminated, and MULTI stayed 0: the next fault reads the same.
    for _ in 0..3 {
        assert_eq!(wr(&mut p, 0x200, 0x7000_2000), Err(ABORT));
        assert_eq!(wr(&mut p, 0x200, 0x7000_2000), Err(ABORT));
        assert_eq!(wr(&mut p, 0x200, 0), Err(ABORT), "mapped, but the bank is closed");
        replay(&r, &handler);
    }
    assert_eq!(wr(&mut p, 0x200, 0), Ok(DATA));
}

/// "Blocked unknown Stream ID 0x201": GFSR 0x80000002, GFSYNR0 0x00000000, GFSYNR1 0x00000201, GFSYNR2 0x00000000.
#[test]
fn the_global_fault_handler() {
    let (r, ..) = linux();
    let mut p = r.port();
    assert_eq!(rd(&mut p, 0x201, 0x7000_0000), Err(ABORT));
    assert_eq!(rd(&mut p, 0x201, 0x7000_0040), Err(ABORT));
    assert_eq!(r.irqs.pending(), [GLOBAL_NS, COMBINED_NS]);
    replay(
        &r,
        &[
            R(0x048, 0x8000_0002),
            R(0x050, 0),
            R(0x054, 0x201),
            R(0x058, 0),
            W(0x048, 0x8000_0002),
            R(0x048, 0),
        ],
    );
    assert!(r.irqs.pending().is_empty());
}

#[test]
fn identity_and_blocked_domains() {
    let (r, ..) = linux();
    let mut p = r.port();
    r.w(S2CR, 0x0001_0000);
    assert_eq!(wr(&mut p, 0x200, DATA), Ok(DATA));
    r.w(S2CR, 0x0002_0000);
    assert_eq!(wr(&mut p, 0x200, DATA), Err(ABORT));
    assert_eq!(r.r(GFSR), 1, "Unexpected global fault, this could be serious");
}

/// A stage 2 domain: CBAR type 0 with VMID bank + 1, VTCR, SCTLR 0x67.
#[test]
fn a_stage_2_domain() {
    let (r, mut t, _) = linux();
    let root = t.alloc(2);
    t.page2(root, 0x7000_2000, DATA | 3 | 0xf << 2 | 0xc0 | 3 << 8 | AF);
    replay(
        &r,
        &[
            W(0x1804, 1),
            W(0x1004, 2),
            W(cb(1, 0x030), 0x8005_2058),
            W64(cb(1, 0x020), root),
            W(cb(1, 0x000), 0x67),
            W(0xc00, 1),
        ],
    );
    let mut p = r.port();
    assert_eq!(wr(&mut p, 0x200, 0x7000_2010), Ok(DATA + 0x10));
    // Unmap: TLBIIPAS2L with ipa >> 12, sync; flush_all: TLBIVMID, sTLBGSYNC.
    t.page2(root, 0x7000_2000, 0);
    assert_eq!(wr(&mut p, 0x200, 0x7000_2010), Ok(DATA + 0x10));
    replay(&r, &[W64(cb(1, 0x638), 0x7_0002), W(cb(1, 0x7f0), 0), R(cb(1, 0x7f4), 0)]);
    assert_eq!(wr(&mut p, 0x200, 0x7000_2010), Err(ABORT));
    replay(&r, &[R(cb(1, 0x058), 0x402), W(cb(1, 0x058), 0x402), W(0x064, 2), W(0x070, 0), R(0x074, 0)]);
}

#[test]
fn sixteen_domains_at_once_and_freeing_one() {
    let (r, mut t, _) = linux();
    for n in 0..16u64 {
        let root = t.alloc(1);
        t.page(root, 0x1000, (DATA + 0x1000 * n) | RW);
        replay(
            &r,
            &[
                W(0x1800 + 4 * n, 1),
                W(0x1000 + 4 * n, 0x0001_f300),
                W(cb(n, 0x010), 0x0003_8015),
                W(cb(n, 0x030), 0x0080_2010),
                W64(cb(n, 0x020), root | n << 48),
                W64(cb(n, 0x028), n << 48),
                W(cb(n, 0x038), 0xf404_ff44),
                W(cb(n, 0x03c), 0),
                W(cb(n, 0x000), 0x1067),
                W(0xc00 + 4 * n, n as u32),
                W(0x800 + 4 * n, 0x8000_0868 + n as u32),
            ],
        );
    }
    let mut p = r.port();
    for n in 0..16u64 {
        assert_eq!(wr(&mut p, 0x868 + n as u32, 0x1000), Ok(DATA + 0x1000 * n));
    }
    // The domain of bank 5 goes: its stream is blocked, its bank off, its entries flushed.
    replay(&r, &[W(0xc14, 0x0002_0000), W(cb(5, 0), 0), W(cb(5, 0x610), 5), W(cb(5, 0x7f0), 0)]);
    for n in 0..16u64 {
        let want = if n == 5 { Err(ABORT) } else { Ok(DATA + 0x1000 * n) };
        assert_eq!(wr(&mut p, 0x868 + n as u32, 0x1000), want);
    }
}

/// CONFIG: coherent walks use other attributes for the same tables.
#[test]
fn tcr_of_a_coherent_walk_translates_alike() {
    let (r, mut t, root) = linux();
    t.page(root, 0x1000, DATA | RW);
    r.wb(0, TCR, 0x0080_3510);
    assert_eq!(wr(&mut r.port(), 0x200, 0x1000), Ok(DATA));
}

#[test]
fn shutdown_bypasses_everything() {
    let (r, ..) = linux();
    let mut p = r.port();
    assert_eq!(wr(&mut p, 0x200, 0x9000), Err(ABORT));
    replay(&r, &[W(0x000, 1)]);
    assert_eq!(wr(&mut p, 0x200, 0x9000), Ok(0x9000));
    assert_eq!(wr(&mut p, 0x7777, DATA), Ok(DATA));
    assert!(r.irqs.level(0), "the context fault is still there");
    // Resume from suspend: the whole reset again, on whatever is left.
    let r2 = Rig::zynqmp();
    replay(&r2, &[W(0x000, 1), R(0x000, 0x0020_0001)]);
}

/// The writes of AxPROT-driven attributes that S2's fourth experiment met: PXN/UXN user pages and a master that says
/// "instruction".
#[test]
fn a_process_table_with_an_instruction_master() {
    let (r, mut t, root) = linux();
    t.page(root, 0x40_0000, DATA | RW | PXN | UXN);
    let mut p = r.port();
    let master = stream(0x200).with_attrs(Attributes::from_axi(0xf, 0b110));
    assert_eq!(go(&mut p, master, 0x40_0000, Access::Read), Err(ABORT));
    replay(&r, &[R(cb(0, 0x058), 0x408), R(cb(0, 0x068), 0x43), W(cb(0, 0x058), 0x408)]);
    r.w(S2CR, 2 << 26); // INSTCFG: data
    assert_eq!(go(&mut p, master, 0x40_0000, Access::Read), Ok(DATA));
}
