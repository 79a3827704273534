//! The parameters of a translation, decoded once from registers or context descriptors, and what comes out of it.
//! [`crate::translate`] walks through them.

use portcullis_arch::Attributes;
use portcullis_arch::attrs::{Allocate, MemoryType, Shareability};
use portcullis_arch::vmsa::Granule;

use crate::perms::Perms;
pub use crate::split::Split;

/// The format of a stage's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableFormat {
    /// VMSAv8-64.
    Aarch64,
    /// AArch32 long descriptors (VMSAv8-32 LPAE).
    Long,
    /// AArch32 short descriptors.
    Short,
}

/// What a table register covers: one half of a stage 1 address space, or all of stage 2.
///
/// A start level outside of -1 to 3, or an input size that leaves the first table less than one bit to resolve,
/// makes every address a translation fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Address of the first table.
    pub base: u64,
    /// Granule (4 KiB for the AArch32 formats).
    pub granule: Granule,
    /// Level of the first table.
    pub start_level: i8,
    /// Input address bits that the tables resolve.
    pub input_bits: u8,
    /// Attributes of the walker's own accesses (cacheability, shareability, security).
    pub walk_attrs: Attributes,
    /// Ignore APTable, XNTable and PXNTable (NSTable always counts).
    pub flat_attributes: bool,
    /// Where descriptors keep the address.
    pub address: AddressFormat,
}

/// Where 64-bit descriptors keep an address, which also says which levels may hold leaves (DDI 0487 D8.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AddressFormat {
    /// Bits 47:12.
    #[default]
    Bits48,
    /// 52 bits with the 64 KiB granule: \[15:12\] of a descriptor are \[51:48\] of the address. Blocks at level 1.
    Lpa64K,
    /// 52 bits with the 4 and 16 KiB granules (DS): \[49:48\] stay where they are and \[9:8\] are \[51:50\]; the
    /// shareability comes from `sh_override` then. Blocks at level 0 (4 KiB) and 1 (16 KiB); level -1 exists.
    Ds,
}

/// What hardware updates in leaf descriptors (HTTU).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlagUpdate {
    /// HA: the access flag is set instead of reported as a fault. `affd` does not count then.
    pub access: bool,
    /// HD: a write makes a leaf with DBM writable. Counts only together with `access`.
    pub dirty: bool,
}

impl FlagUpdate {
    /// Neither.
    pub const OFF: Self = Self { access: false, dirty: false };
}

/// Whether a walk may write descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Updates {
    /// Access flags and dirty state are written, as for an access.
    Apply,
    /// Nothing is written; the walk goes on as if it had been. For explanations and address translation requests that
    /// must not mark anything.
    Pretend,
}

/// Stage 1 of a translation context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage1 {
    /// Descriptor format.
    pub format: TableFormat,
    /// TTBR0's and TTBR1's part, `None` where walks are disabled (EPD) or the size is illegal.
    pub regions: [Option<Region>; 2],
    /// AArch32 and split AArch64 spaces: picks the region of an address.
    pub split: Split,
    /// Output and table addresses must fit into this many bits.
    pub output_bits: u8,
    /// MAIR, or PRRR in the low and NMRR in the high half for [`TableFormat::Short`].
    pub mair: u64,
    /// Level that a fault of the input address reports.
    pub range_fault_level: i8,
    /// Access flag faults are off.
    pub affd: bool,
    /// Writable memory is execute never.
    pub wxn: bool,
    /// Memory writable by unprivileged accesses is execute never for privileged ones.
    pub uwxn: bool,
    /// `uwxn` stops unprivileged fetches as well (SMMUv2).
    pub uwxn_for_all: bool,
    /// Descriptors are big-endian.
    pub big_endian: bool,
    /// One privilege level only (hyp and monitor contexts): no PXN, AP\[1\], APTable\[0\], nG.
    pub single_privilege: bool,
    /// Short format: TEX remap (TRE) on.
    pub tex_remap: bool,
    /// Short format: AP\[0\] is the access flag (AFE).
    pub access_flag_enable: bool,
    /// The context may produce secure accesses, so that NS and NSTable count.
    pub secure: bool,
    /// Secure instruction fetches from non-secure memory are refused (SCR1.SIF).
    pub secure_fetch_only: bool,
    /// What hardware updates (HA, HD); VMSAv8-64 only.
    pub flags: FlagUpdate,
    /// Unprivileged accesses through this region are translation faults (E0PD).
    pub e0pd: [bool; 2],
    /// Privileged data accesses to what unprivileged ones may access are refused (PAN). Execute permissions do not count
    /// (no EPAN).
    pub pan: bool,
    /// The shareability of this region's leaves, where their descriptors do not hold it (SH0 and SH1 with DS).
    pub sh_override: [Option<Shareability>; 2],
}

/// Stage 2 of a translation context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage2 {
    /// [`TableFormat::Aarch64`] or [`TableFormat::Long`].
    pub format: TableFormat,
    /// The table register's part, `None` if its size or start level is illegal.
    pub region: Option<Region>,
    /// Input size in bits before the tables are looked at (IAS); an address above is a translation fault.
    pub input_limit_bits: u8,
    /// Output and table addresses must fit into this many bits.
    pub output_bits: u8,
    /// Access flag faults are off.
    pub affd: bool,
    /// Descriptors are big-endian.
    pub big_endian: bool,
    /// A stage 1 walk that lands in Device memory is a permission fault.
    pub protect_walks: bool,
    /// A stage 1 walk that lands in Device memory, and may, reads it as Normal non-cacheable (PTWNNC).
    pub device_walks_as_nc: bool,
    /// Level that a fault of the input address reports.
    pub range_fault_level: i8,
    /// What hardware updates (S2HA, S2HD); VMSAv8-64 only.
    pub flags: FlagUpdate,
    /// XN is two bits that tell privileged from unprivileged fetches (XNX).
    pub xnx: bool,
    /// MemAttr may replace stage 1's memory type instead of being combined with it (S2FWB).
    pub fwb: bool,
    /// Leaves carry allocation hints in bits 63:60 (SMMUv2; ignored bits in SMMUv3).
    pub leaf_hints: bool,
    /// The shareability of leaves, where their descriptors do not hold it (S2SH0 with DS).
    pub sh_override: Option<Shareability>,
}

/// What went wrong in a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// No valid descriptor, or the address is outside of the tables' range.
    Translation,
    /// An address does not fit the output size.
    AddressSize,
    /// The access flag is clear.
    AccessFlag,
    /// The access is not allowed.
    Permission,
    /// Memory refused a descriptor read.
    External,
}

/// A fault with everything that fault records need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What went wrong.
    pub kind: FaultKind,
    /// 1 or 2.
    pub stage: u8,
    /// Lookup level.
    pub level: i8,
    /// Stage 2 faults: the IPA that could not be translated.
    pub ipa: u64,
    /// Stage 2 faults: it was the address of a stage 1 descriptor.
    pub on_stage1_walk: bool,
    /// [`FaultKind::External`]: where in memory the descriptor is that could not be read or updated.
    pub fetch: u64,
    /// Stage 2 faults on a stage 1 walk: the descriptor was to be updated, not only read.
    pub write: bool,
}

impl Fault {
    /// A fault of this kind, stage and level; nothing else is known.
    pub const fn new(kind: FaultKind, stage: u8, level: i8) -> Self {
        Self { kind, stage, level, ipa: 0, on_stage1_walk: false, fetch: 0, write: false }
    }

    /// The same for an IPA.
    #[must_use]
    pub const fn with_ipa(self, ipa: u64) -> Self {
        Self { ipa, ..self }
    }
}

/// True if `address` needs more than `bits` bits.
#[inline]
pub(crate) fn exceeds(address: u64, bits: u8) -> bool {
    bits < 64 && address >> bits != 0
}

/// The address with bit 55 copied into its top byte.
#[inline]
pub(crate) fn canonical(va: u64) -> u64 {
    ((va << 8) as i64 >> 8) as u64
}

/// The low `log2` bits.
#[inline]
pub(crate) fn low(log2: u8) -> u64 {
    if log2 >= 64 { u64::MAX } else { (1 << log2) - 1 }
}

/// A leaf of one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Output address of the first byte of the leaf.
    pub output: u64,
    /// log2 of the size of the block around the input address for which it holds: what the descriptor covers (a
    /// contiguous run counted as one), cut to the range that may use these tables.
    pub size_log2: u8,
    /// log2 of what the descriptor covers.
    pub leaf_log2: u8,
    /// What it allows.
    pub perms: Perms,
    /// Memory type, shareability, hints and (bit NS) security.
    pub attrs: Attributes,
    /// Level it was found at.
    pub level: i8,
    /// Not tagged with an ASID.
    pub global: bool,
    /// `perms` allow writes only because hardware may mark the leaf dirty, which has to come first.
    pub clean: bool,
}

/// A finished translation of one or two stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// Output address of the byte asked for.
    pub pa: u64,
    /// log2 of the block around it for which this translation holds.
    pub size_log2: u8,
    /// log2 of what the first stage's leaf covers, at least the above: software that invalidates any address in it
    /// means all of it.
    pub leaf_log2: u8,
    /// What both stages allow.
    pub perms: Perms,
    /// Attributes from the tables of both stages, combined.
    pub attrs: Attributes,
    /// The stage 1 leaf was global.
    pub global: bool,
}

/// The stages of a context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nested {
    /// Stage 1, if on.
    pub stage1: Option<Stage1>,
    /// Stage 2, if on.
    pub stage2: Option<Stage2>,
    /// What the first stage demands of an address while it is off.
    pub flat: Flat,
}

/// The checks of a stage that maps flat: it has no tables, but its input and output sizes still count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flat {
    /// An address of more bits is a translation fault.
    pub input_bits: u8,
    /// An address of more bits is an address size fault.
    pub output_bits: u8,
    /// The stage that is off. If it is 2 and stage 2 is on, these checks do not count.
    pub stage: u8,
    /// Level that the fault reports.
    pub level: i8,
}

impl Flat {
    /// No checks.
    pub const UNCHECKED: Self = Self { input_bits: 64, output_bits: 64, stage: 1, level: 0 };

    #[inline]
    pub(crate) fn check(&self, address: u64) -> Result<(), Fault> {
        let kind = if exceeds(address, self.input_bits) {
            FaultKind::Translation
        } else if exceeds(address, self.output_bits) {
            FaultKind::AddressSize
        } else {
            return Ok(());
        };
        let ipa = if self.stage == 2 { address } else { 0 };
        Err(Fault::new(kind, self.stage, self.level).with_ipa(ipa))
    }
}

/// Transient hint of a stage 2 leaf whose attributes replace stage 1's memory type (S2FWB, MemAttr 0b110) instead of
/// being combined with it: [`combine`] looks for it. Descriptors and transactions never hold this code.
pub(crate) const FORCED: u8 = 1;

/// Combines stage 1 and stage 2 attributes: the stronger type and shareability, non-secure wins, stage 2's
/// allocation hints if it has any. A stage 2 leaf that forces write-back (S2FWB) replaces the type.
pub fn combine(stage1: Attributes, stage2: Attributes) -> Attributes {
    let hint = |one: Allocate, two: Allocate| if two == Allocate::Default { one } else { two };
    let forced = stage2.transient() == FORCED;
    let memory = if forced { stage2.memory() } else { stage1.memory().combine(stage2.memory()) };
    stage1
        .with_memory(memory)
        .with_shareability(stage1.shareability().combine(stage2.shareability()))
        .with_read_allocate(hint(stage1.read_allocate(), stage2.read_allocate()))
        .with_write_allocate(hint(stage1.write_allocate(), stage2.write_allocate()))
        .with_non_secure(stage1.non_secure() || stage2.non_secure())
        .consistent()
}

/// Attributes of a walker's accesses from TCR's IRGN, ORGN and SH codes.
pub fn walk_attributes(irgn: u8, orgn: u8, sh: u8, non_secure: bool) -> Attributes {
    // RGN codes: 0 NC, 1 WB write-allocate, 2 WT, 3 WB.
    const TYPE: [u8; 4] = [1, 3, 2, 3];
    Attributes::from_bits(0)
        .with_memory(MemoryType::normal(TYPE[usize::from(orgn & 3)], TYPE[usize::from(irgn & 3)]))
        .with_shareability(Shareability::from_code(sh))
        .with_non_secure(non_secure)
        .consistent()
}
