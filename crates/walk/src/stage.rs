//! The parameters of a translation, decoded once from registers or context descriptors, and the walk through
//! one or two stages of it.

use portcullis_arch::attrs::{Allocate, MemoryType, Shareability};
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Access, Attributes};
use portcullis_bus::Memory;

use crate::perms::{AccessKind, Perms};
use crate::record::Recorder;
use crate::{long, short};

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
    /// Ignore APTable, XNTable, PXNTable and NSTable.
    pub flat_attributes: bool,
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
}

/// How a stage 1 input address selects TTBR0 or TTBR1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// AArch64: an address of `va_bits` bits as it comes from the bus, sign-extended from its top bit if `signed`.
    /// Region 0 holds addresses whose upper bits are all 0, region 1 those with all 1.
    Aarch64 {
        /// Bits that the bus delivers, or up to the sign extension position; higher bits must be 0.
        va_bits: u8,
        /// The top bit of these is the sign.
        signed: bool,
        /// T0SZ and T1SZ region sizes in bits.
        region_bits: [u8; 2],
    },
    /// AArch32 long: T0SZ and T1SZ.
    Long {
        /// T0SZ and T1SZ.
        tsz: [u8; 2],
    },
    /// AArch32 short: N = T0SZ.
    Short {
        /// T0SZ.
        n: u8,
    },
}

impl Split {
    /// The region (0 or 1) of `va` and the bits that its tables resolve, or `None` if it lies in neither.
    #[inline]
    pub fn select(self, va: u64) -> Option<(usize, u64)> {
        match self {
            Self::Aarch64 { va_bits, signed, region_bits } => {
                if exceeds(va, va_bits) {
                    return None;
                }
                let extend = 64 - u32::from(va_bits.clamp(1, 64));
                let x = if signed { ((va << extend) as i64 >> extend) as u64 } else { va };
                let half = (x >> 63) as usize;
                let bits = region_bits[half];
                let top = if bits >= 64 { 0 } else { x >> bits };
                let want = if half == 0 || bits >= 64 { 0 } else { u64::MAX >> bits };
                let inside = if bits >= 64 { x } else { x & ((1 << bits) - 1) };
                (top == want).then_some((half, inside))
            }
            Self::Long { tsz: [t0, t1] } => {
                if va >> 32 != 0 {
                    return None;
                }
                let size = |sz: u8| 1u64 << (32 - sz.min(32));
                let below = |sz: u8| va < size(sz);
                let above = |sz: u8| va >= (1 << 32) - size(sz);
                let half = match (t0, t1) {
                    (0, 0) => 0,
                    (m, 0) => usize::from(!below(m)),
                    (0, n) => usize::from(above(n)),
                    (m, _) if below(m) => 0,
                    (_, n) if above(n) => 1,
                    _ => return None,
                };
                Some((half, va & (size([t0, t1][half]) - 1)))
            }
            Self::Short { n } => {
                if va >> 32 != 0 {
                    return None;
                }
                let half = usize::from(n > 0 && va >> (32 - n.min(32)) != 0);
                Some((half, va))
            }
        }
    }

    /// log2 of the largest naturally aligned block that lies in region `half` as a whole. The AArch32 regions without
    /// a size of their own begin or end in the middle of what one descriptor can cover.
    #[inline]
    fn block_limit(self, half: usize) -> u8 {
        match (self, half) {
            (Self::Aarch64 { region_bits: [bits, _], .. }, 0) => bits,
            (Self::Aarch64 { region_bits: [_, bits], .. }, _) => bits,
            (Self::Long { tsz: [0, t1] }, 0) => 32u8.saturating_sub(t1),
            (Self::Long { tsz: [t0, 0] }, 1) => 32u8.saturating_sub(t0),
            (Self::Long { tsz }, _) => 32u8.saturating_sub(tsz[half & 1]),
            (Self::Short { n }, _) => 32u8.saturating_sub(n),
        }
    }
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
    /// Level that a fault of the input address reports.
    pub range_fault_level: i8,
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
}

/// True if `address` needs more than `bits` bits.
#[inline]
pub(crate) fn exceeds(address: u64, bits: u8) -> bool {
    bits < 64 && address >> bits != 0
}

/// The low `log2` bits.
#[inline]
fn low(log2: u8) -> u64 {
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
    fn check(&self, address: u64) -> Result<(), Fault> {
        let kind = if exceeds(address, self.input_bits) {
            FaultKind::Translation
        } else if exceeds(address, self.output_bits) {
            FaultKind::AddressSize
        } else {
            return Ok(());
        };
        let ipa = if self.stage == 2 { address } else { 0 };
        Err(Fault { kind, stage: self.stage, level: self.level, ipa, on_stage1_walk: false })
    }
}

impl Nested {
    /// Translates `va` for an access of `kind` by reading tables from `memory`.
    ///
    /// Order of detection: for each stage 1 descriptor first stage 2 of its address, then the descriptor;
    /// after the last level access flag and permissions of stage 1; then stage 2 of the output.
    #[inline]
    pub fn translate<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        va: u64,
        kind: AccessKind,
        recorder: &mut R,
    ) -> Result<Walked, Fault> {
        let Some(s1) = &self.stage1 else {
            let flat = self.flat_first_stage();
            flat.check(va)?;
            let Some(s2) = &self.stage2 else { return Ok(Walked::flat(va)) };
            let leaf = s2.walk(memory, va, recorder)?.within(va, flat.input_bits.min(flat.output_bits));
            check(leaf.perms, kind, 2, leaf.level, va)?;
            return Ok(finish(va, leaf, leaf.leaf_log2, leaf.perms, leaf.attrs, false));
        };
        let leaf1 = self.stage1_leaf(s1, memory, va, recorder)?;
        check(leaf1.perms, kind, 1, leaf1.level, va)?;
        let Some(s2) = &self.stage2 else {
            return Ok(finish(va, leaf1, leaf1.leaf_log2, leaf1.perms, leaf1.attrs, leaf1.global));
        };
        let ipa = leaf1.at(va);
        let leaf2 = s2.walk(memory, ipa, recorder)?;
        check(leaf2.perms, kind, 2, leaf2.level, ipa)?;
        let leaf2 = leaf2.within(ipa, leaf1.size_log2);
        let attrs = combine(leaf1.attrs, leaf2.attrs);
        Ok(finish(ipa, leaf2, leaf1.leaf_log2, leaf1.perms.and(leaf2.perms), attrs, leaf1.global))
    }

    /// The checks of the first stage while it is off.
    fn flat_first_stage(&self) -> Flat {
        if self.flat.stage == 2 && self.stage2.is_some() { Flat::UNCHECKED } else { self.flat }
    }

    #[inline]
    fn stage1_leaf<M: Memory, R: Recorder>(
        &self,
        s1: &Stage1,
        memory: &M,
        va: u64,
        recorder: &mut R,
    ) -> Result<Leaf, Fault> {
        match &self.stage2 {
            None => s1.walk(memory, va, recorder, |at, _: &mut R| Ok((at, None))),
            Some(s2) => s1.walk(memory, va, recorder, |at, r: &mut R| s2.place(memory, at, r)),
        }
    }

    /// Translates `va` through stage 1 alone (its tables still go through stage 2): what address translation
    /// operations for stage 1 answer. With stage 1 off the address is its own output.
    pub fn translate_stage1<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        va: u64,
        kind: AccessKind,
        recorder: &mut R,
    ) -> Result<Walked, Fault> {
        let Some(s1) = &self.stage1 else {
            self.flat_first_stage().check(va)?;
            return Ok(Walked::flat(va));
        };
        let leaf = self.stage1_leaf(s1, memory, va, recorder)?;
        check(leaf.perms, kind, 1, leaf.level, va)?;
        Ok(finish(va, leaf, leaf.leaf_log2, leaf.perms, leaf.attrs, leaf.global))
    }
}

impl Walked {
    /// Address in, address out.
    fn flat(va: u64) -> Self {
        let attrs = Attributes::DEVICE_DEFAULT;
        Self { pa: va, size_log2: 12, leaf_log2: 12, perms: Perms::ALL, attrs, global: true }
    }
}

impl Leaf {
    /// Where `input`, an address that this leaf covers, comes out.
    #[inline]
    fn at(&self, input: u64) -> u64 {
        self.output | input & low(self.size_log2)
    }

    /// The part around `input` of at most `1 << limit_log2` bytes.
    #[inline]
    fn within(self, input: u64, limit_log2: u8) -> Self {
        if self.size_log2 <= limit_log2 {
            return self;
        }
        Self { output: self.at(input) & !low(limit_log2), size_log2: limit_log2, ..self }
    }
}

#[inline]
fn check(perms: Perms, kind: AccessKind, stage: u8, level: i8, input: u64) -> Result<(), Fault> {
    if perms.allows(kind) {
        return Ok(());
    }
    let ipa = if stage == 2 { input } else { 0 };
    Err(Fault { kind: FaultKind::Permission, stage, level, ipa, on_stage1_walk: false })
}

#[inline]
fn finish(input: u64, leaf: Leaf, leaf_log2: u8, perms: Perms, attrs: Attributes, global: bool) -> Walked {
    let size_log2 = leaf.size_log2;
    Walked { pa: leaf.at(input), size_log2, leaf_log2: leaf_log2.max(size_log2), perms, attrs, global }
}

/// Combines stage 1 and stage 2 attributes: the stronger type and shareability, non-secure wins, stage 2's
/// allocation hints if it has any.
pub fn combine(stage1: Attributes, stage2: Attributes) -> Attributes {
    let hint = |one: Allocate, two: Allocate| if two == Allocate::Default { one } else { two };
    stage1
        .with_memory(stage1.memory().combine(stage2.memory()))
        .with_shareability(stage1.shareability().combine(stage2.shareability()))
        .with_read_allocate(hint(stage1.read_allocate(), stage2.read_allocate()))
        .with_write_allocate(hint(stage1.write_allocate(), stage2.write_allocate()))
        .with_non_secure(stage1.non_secure() || stage2.non_secure())
        .consistent()
}

impl Stage1 {
    /// Finds the leaf of `va`. `place` turns the address of a descriptor into where it is in memory (through stage
    /// 2 when nested, with stage 2's attributes).
    #[inline(always)]
    fn walk<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        va: u64,
        recorder: &mut R,
        place: impl FnMut(u64, &mut R) -> Result<(u64, Option<Attributes>), Fault>,
    ) -> Result<Leaf, Fault> {
        let range = Fault {
            kind: FaultKind::Translation,
            stage: 1,
            level: self.range_fault_level,
            ipa: 0,
            on_stage1_walk: false,
        };
        let (half, inside) = self.split.select(va).ok_or(range)?;
        let region = self.regions[half].as_ref().ok_or(range)?;
        let leaf = match self.format {
            TableFormat::Short => short::walk(memory, self, region, inside as u32, recorder, place),
            _ => long::stage1(memory, self, region, inside, recorder, place),
        }?;
        // A TLB must not answer from this leaf for addresses that another region or no region at all translates.
        let limit = self.split.block_limit(half).min(region.input_bits).min(self.output_bits);
        Ok(leaf.within(va, limit))
    }
}

impl Stage2 {
    #[inline]
    fn walk<M: Memory, R: Recorder>(&self, memory: &M, ipa: u64, recorder: &mut R) -> Result<Leaf, Fault> {
        let range = Fault {
            kind: FaultKind::Translation,
            stage: 2,
            level: self.range_fault_level,
            ipa,
            on_stage1_walk: false,
        };
        let region = self.region.as_ref().ok_or(range)?;
        let limit = self.input_limit_bits.min(region.input_bits);
        if exceeds(ipa, limit) {
            return Err(range);
        }
        Ok(long::stage2(memory, self, region, ipa, recorder)?.within(ipa, limit.min(self.output_bits)))
    }

    /// Where the stage 1 descriptor at `at` is in memory.
    #[inline]
    fn place<M: Memory, R: Recorder>(
        &self,
        memory: &M,
        at: u64,
        recorder: &mut R,
    ) -> Result<(u64, Option<Attributes>), Fault> {
        let on_walk = |f: Fault| Fault { on_stage1_walk: true, ..f };
        let leaf = self.walk(memory, at, recorder).map_err(on_walk)?;
        let read = AccessKind::new(Access::Read, Attributes::DEVICE_DEFAULT);
        check(leaf.perms, read, 2, leaf.level, at).map_err(on_walk)?;
        if self.protect_walks && leaf.attrs.memory().is_device() {
            let (kind, level) = (FaultKind::Permission, leaf.level);
            return Err(Fault { kind, stage: 2, level, ipa: at, on_stage1_walk: true });
        }
        Ok((leaf.at(at), Some(leaf.attrs)))
    }
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
