//! The general purpose DMA of the Zynq UltraScale+ ("ZDMA": ADMA in the low power domain, GDMA in the full
//! power domain): registers of one channel and its descriptors in memory.
//!
//! Types, offsets and bits only (UG1087 module ZDMA, UG1085 chapter 19). [`REGISTERS`] is the map as data with
//! reset values and access rights, [`reg`] the offsets by name, [`interrupt`] the bits that ISR, IMR, IEN and IDS
//! share, and [`Descriptor`] what a scatter-gather list consists of.

use bitfield_struct::bitfield;

/// Size in bytes of one channel's register window.
pub const WINDOW: u64 = 0x1000;
/// Bits of an address that the registers hold: 32 in the LSB and 17 in the MSB register (UG1087). UG1085 gives
/// the addresses inside descriptors 12 MSB bits only; Linux stays below 44 bits for that reason.
pub const ADDRESS_BITS: u32 = 49;
/// Mask of an address of [`ADDRESS_BITS`].
pub const ADDRESS_MASK: u64 = (1 << ADDRESS_BITS) - 1;
/// Mask of a descriptor's size in bytes (30 bits).
pub const SIZE_MASK: u32 = 0x3fff_ffff;
/// Bytes of a linear descriptor; also its alignment.
pub const LINEAR_BYTES: u64 = 16;
/// Bytes of a linked descriptor; also its alignment.
pub const LINKED_BYTES: u64 = 32;

/// Offsets of a channel's registers from the start of its window.
pub mod reg {
    /// Error response to undecoded accesses: [`ErrCtrl`](super::ErrCtrl).
    pub const ERR_CTRL: u32 = 0x000;
    /// Spare.
    pub const ECO: u32 = 0x004;
    /// Interrupt status, write one to clear.
    pub const ISR: u32 = 0x100;
    /// Interrupt mask (1 = masked), read only.
    pub const IMR: u32 = 0x104;
    /// Interrupt enable: ones clear IMR bits.
    pub const IEN: u32 = 0x108;
    /// Interrupt disable: ones set IMR bits.
    pub const IDS: u32 = 0x10c;
    /// Control: [`Ctrl0`](super::Ctrl0).
    pub const CTRL0: u32 = 0x110;
    /// Outstanding transactions: [`Ctrl1`](super::Ctrl1).
    pub const CTRL1: u32 = 0x114;
    /// Peripheral flow control.
    pub const FCI: u32 = 0x118;
    /// Channel state, [`State`](super::State) in bits 1:0.
    pub const STATUS: u32 = 0x11c;
    /// AXI signals of payload: [`DataAttr`](super::DataAttr).
    pub const DATA_ATTR: u32 = 0x120;
    /// AXI signals of descriptor fetches: [`DscrAttr`](super::DscrAttr).
    pub const DSCR_ATTR: u32 = 0x124;
    /// Simple mode: source address, low.
    pub const SRC_DSCR_WORD0: u32 = 0x128;
    /// Simple mode: source address, high.
    pub const SRC_DSCR_WORD1: u32 = 0x12c;
    /// Simple mode: source size in bytes.
    pub const SRC_DSCR_WORD2: u32 = 0x130;
    /// Simple mode: source [`Control`](super::Control).
    pub const SRC_DSCR_WORD3: u32 = 0x134;
    /// Simple mode: destination address, low.
    pub const DST_DSCR_WORD0: u32 = 0x138;
    /// Simple mode: destination address, high.
    pub const DST_DSCR_WORD1: u32 = 0x13c;
    /// Simple mode: destination size in bytes (governs in write-only mode).
    pub const DST_DSCR_WORD2: u32 = 0x140;
    /// Simple mode: destination [`Control`](super::Control).
    pub const DST_DSCR_WORD3: u32 = 0x144;
    /// Write-only mode: fill data, bits 31:0.
    pub const WR_ONLY_WORD0: u32 = 0x148;
    /// Write-only mode: fill data, bits 63:32.
    pub const WR_ONLY_WORD1: u32 = 0x14c;
    /// Write-only mode: fill data, bits 95:64 (128-bit channels).
    pub const WR_ONLY_WORD2: u32 = 0x150;
    /// Write-only mode: fill data, bits 127:96 (128-bit channels).
    pub const WR_ONLY_WORD3: u32 = 0x154;
    /// First source descriptor, low.
    pub const SRC_START_LSB: u32 = 0x158;
    /// First source descriptor, high.
    pub const SRC_START_MSB: u32 = 0x15c;
    /// First destination descriptor, low.
    pub const DST_START_LSB: u32 = 0x160;
    /// First destination descriptor, high.
    pub const DST_START_MSB: u32 = 0x164;
    /// Source payload position, low.
    pub const SRC_CUR_PYLD_LSB: u32 = 0x168;
    /// Source payload position, high.
    pub const SRC_CUR_PYLD_MSB: u32 = 0x16c;
    /// Destination payload position, low.
    pub const DST_CUR_PYLD_LSB: u32 = 0x170;
    /// Destination payload position, high.
    pub const DST_CUR_PYLD_MSB: u32 = 0x174;
    /// Current source descriptor, low.
    pub const SRC_CUR_DSCR_LSB: u32 = 0x178;
    /// Current source descriptor, high.
    pub const SRC_CUR_DSCR_MSB: u32 = 0x17c;
    /// Current destination descriptor, low.
    pub const DST_CUR_DSCR_LSB: u32 = 0x180;
    /// Current destination descriptor, high.
    pub const DST_CUR_DSCR_MSB: u32 = 0x184;
    /// Bytes written to the destination; any write clears it.
    pub const TOTAL_BYTE: u32 = 0x188;
    /// Rate control count.
    pub const RATE_CNTL: u32 = 0x18c;
    /// Source descriptors completed with INTR; cleared by reading.
    pub const IRQ_SRC_ACCT: u32 = 0x190;
    /// Destination descriptors completed with INTR; cleared by reading.
    pub const IRQ_DST_ACCT: u32 = 0x194;
    /// Free entries of the common buffer.
    pub const DBG0: u32 = 0x198;
    /// Occupied entries of the common buffer.
    pub const DBG1: u32 = 0x19c;
    /// Enable: [`Ctrl2`](super::Ctrl2).
    pub const CTRL2: u32 = 0x200;
}

/// Bits of ISR, IMR, IEN and IDS.
pub mod interrupt {
    /// The channel entered the pause state.
    pub const DMA_PAUSE: u32 = 1 << 11;
    /// The run is over, with or without error.
    pub const DMA_DONE: u32 = 1 << 10;
    /// Error response to a destination write.
    pub const AXI_WR_DATA: u32 = 1 << 9;
    /// Error response to a source read.
    pub const AXI_RD_DATA: u32 = 1 << 8;
    /// Error response to a destination descriptor fetch, or a misaligned descriptor.
    pub const AXI_RD_DST_DSCR: u32 = 1 << 7;
    /// Error response to a source descriptor fetch, or a misaligned descriptor.
    pub const AXI_RD_SRC_DSCR: u32 = 1 << 6;
    /// IRQ_DST_ACCT wrapped.
    pub const IRQ_DST_ACCT_ERR: u32 = 1 << 5;
    /// IRQ_SRC_ACCT wrapped.
    pub const IRQ_SRC_ACCT_ERR: u32 = 1 << 4;
    /// TOTAL_BYTE wrapped.
    pub const BYTE_CNT_OVRFL: u32 = 1 << 3;
    /// A destination descriptor with INTR is written and acknowledged.
    pub const DST_DSCR_DONE: u32 = 1 << 2;
    /// A source descriptor with INTR is read.
    pub const SRC_DSCR_DONE: u32 = 1 << 1;
    /// An access to an undecoded offset.
    pub const INV_APB: u32 = 1;
    /// All twelve.
    pub const ALL: u32 = 0xfff;
    /// The four AXI errors: each of them ends a run.
    pub const AXI_ERRORS: u32 = AXI_WR_DATA | AXI_RD_DATA | AXI_RD_DST_DSCR | AXI_RD_SRC_DSCR;
    /// The three counters that wrapped: none of them ends a run.
    pub const OVERFLOWS: u32 = IRQ_DST_ACCT_ERR | IRQ_SRC_ACCT_ERR | BYTE_CNT_OVRFL;

    /// Names, by bit number.
    pub const NAMES: [&str; 12] = [
        "INV_APB",
        "SRC_DSCR_DONE",
        "DST_DSCR_DONE",
        "BYTE_CNT_OVRFL",
        "IRQ_SRC_ACCT_ERR",
        "IRQ_DST_ACCT_ERR",
        "AXI_RD_SRC_DSCR",
        "AXI_RD_DST_DSCR",
        "AXI_RD_DATA",
        "AXI_WR_DATA",
        "DMA_DONE",
        "DMA_PAUSE",
    ];
}

/// What an access to a register does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rights {
    /// Reads back what was written.
    ReadWrite,
    /// Writes have no effect.
    ReadOnly,
    /// Written ones clear bits.
    WriteOneToClear,
    /// Written ones act elsewhere; reads as 0.
    WriteOnly,
    /// Reading clears it; writes have no effect.
    ClearOnRead,
    /// Any write clears it.
    ClearOnWrite,
}

/// One register of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Register {
    /// Its name in UG1087, without the `ZDMA_CH_` prefix.
    pub name: &'static str,
    /// Offset in bytes.
    pub offset: u32,
    /// Value after reset.
    pub reset: u32,
    /// The bits that exist.
    pub mask: u32,
    /// What accesses do.
    pub rights: Rights,
}

const fn register(name: &'static str, offset: u32, reset: u32, mask: u32, rights: Rights) -> Register {
    Register { name, offset, reset, mask, rights }
}

const WORD: u32 = u32::MAX;
const MSB: u32 = 0x1_ffff;

/// Every register of a channel, by ascending offset.
#[rustfmt::skip]
pub const REGISTERS: [Register; 43] = {
    use Rights::*;
    [
        register("ERR_CTRL",         reg::ERR_CTRL,         1,           1,           ReadWrite),
        register("ECO",              reg::ECO,              0,           WORD,        ReadWrite),
        register("ISR",              reg::ISR,              0,           0xfff,       WriteOneToClear),
        register("IMR",              reg::IMR,              0xfff,       0xfff,       ReadOnly),
        register("IEN",              reg::IEN,              0,           0xfff,       WriteOnly),
        register("IDS",              reg::IDS,              0,           0xfff,       WriteOnly),
        register("CTRL0",            reg::CTRL0,            0x80,        0xfe,        ReadWrite),
        register("CTRL1",            reg::CTRL1,            0x3ff,       0x3ff,       ReadWrite),
        register("FCI",              reg::FCI,              0,           0x3f,        ReadWrite),
        register("STATUS",           reg::STATUS,           0,           3,           ReadOnly),
        register("DATA_ATTR",        reg::DATA_ATTR,        0x0483_d20f, 0x0fff_ffff, ReadWrite),
        register("DSCR_ATTR",        reg::DSCR_ATTR,        0,           0x1ff,       ReadWrite),
        register("SRC_DSCR_WORD0",   reg::SRC_DSCR_WORD0,   0,           WORD,        ReadWrite),
        register("SRC_DSCR_WORD1",   reg::SRC_DSCR_WORD1,   0,           MSB,         ReadWrite),
        register("SRC_DSCR_WORD2",   reg::SRC_DSCR_WORD2,   0,           SIZE_MASK,   ReadWrite),
        register("SRC_DSCR_WORD3",   reg::SRC_DSCR_WORD3,   0,           0x1f,        ReadWrite),
        register("DST_DSCR_WORD0",   reg::DST_DSCR_WORD0,   0,           WORD,        ReadWrite),
        register("DST_DSCR_WORD1",   reg::DST_DSCR_WORD1,   0,           MSB,         ReadWrite),
        register("DST_DSCR_WORD2",   reg::DST_DSCR_WORD2,   0,           SIZE_MASK,   ReadWrite),
        register("DST_DSCR_WORD3",   reg::DST_DSCR_WORD3,   0,           0x1f,        ReadWrite),
        register("WR_ONLY_WORD0",    reg::WR_ONLY_WORD0,    0,           WORD,        ReadWrite),
        register("WR_ONLY_WORD1",    reg::WR_ONLY_WORD1,    0,           WORD,        ReadWrite),
        register("WR_ONLY_WORD2",    reg::WR_ONLY_WORD2,    0,           WORD,        ReadWrite),
        register("WR_ONLY_WORD3",    reg::WR_ONLY_WORD3,    0,           WORD,        ReadWrite),
        register("SRC_START_LSB",    reg::SRC_START_LSB,    0,           WORD,        ReadWrite),
        register("SRC_START_MSB",    reg::SRC_START_MSB,    0,           MSB,         ReadWrite),
        register("DST_START_LSB",    reg::DST_START_LSB,    0,           WORD,        ReadWrite),
        register("DST_START_MSB",    reg::DST_START_MSB,    0,           MSB,         ReadWrite),
        register("SRC_CUR_PYLD_LSB", reg::SRC_CUR_PYLD_LSB, 0,           WORD,        ReadOnly),
        register("SRC_CUR_PYLD_MSB", reg::SRC_CUR_PYLD_MSB, 0,           MSB,         ReadOnly),
        register("DST_CUR_PYLD_LSB", reg::DST_CUR_PYLD_LSB, 0,           WORD,        ReadOnly),
        register("DST_CUR_PYLD_MSB", reg::DST_CUR_PYLD_MSB, 0,           MSB,         ReadOnly),
        register("SRC_CUR_DSCR_LSB", reg::SRC_CUR_DSCR_LSB, 0,           WORD,        ReadOnly),
        register("SRC_CUR_DSCR_MSB", reg::SRC_CUR_DSCR_MSB, 0,           MSB,         ReadOnly),
        register("DST_CUR_DSCR_LSB", reg::DST_CUR_DSCR_LSB, 0,           WORD,        ReadOnly),
        register("DST_CUR_DSCR_MSB", reg::DST_CUR_DSCR_MSB, 0,           MSB,         ReadOnly),
        register("TOTAL_BYTE",       reg::TOTAL_BYTE,       0,           WORD,        ClearOnWrite),
        register("RATE_CNTL",        reg::RATE_CNTL,        0,           0xfff,       ReadWrite),
        register("IRQ_SRC_ACCT",     reg::IRQ_SRC_ACCT,     0,           0xff,        ClearOnRead),
        register("IRQ_DST_ACCT",     reg::IRQ_DST_ACCT,     0,           0xff,        ClearOnRead),
        register("DBG0",             reg::DBG0,             0x100,       0x1ff,       ReadOnly),
        register("DBG1",             reg::DBG1,             0,           0x1ff,       ReadOnly),
        register("CTRL2",            reg::CTRL2,            0,           1,           ReadWrite),
    ]
};

/// The register at `offset`, or `None` where nothing is decoded.
pub fn register_at(offset: u32) -> Option<&'static Register> {
    REGISTERS.binary_search_by_key(&offset, |r| r.offset).ok().and_then(|i| REGISTERS.get(i))
}

/// ERR_CTRL: the answer to an access that decodes to no register.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct ErrCtrl {
    /// `[0]` 1: a bus error; 0: reads as 0, writes are ignored. ISR.INV_APB is set either way.
    pub apb_error: bool,
    #[bits(31)]
    __: u32,
}

/// CTRL0.MODE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Mode {
    /// Read the source, write the destination.
    ReadWrite = 0,
    /// Fill the destination from WR_ONLY_WORDn.
    WriteOnly = 1,
    /// Read the source and drop the data.
    ReadOnly = 2,
    /// Reserved.
    Reserved = 3,
}

impl Mode {
    const fn into_bits(self) -> u8 {
        self as u8
    }
    const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::ReadWrite,
            1 => Self::WriteOnly,
            2 => Self::ReadOnly,
            _ => Self::Reserved,
        }
    }
}

/// CTRL0: how a run works.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Ctrl0 {
    __: bool,
    /// `[1]` leave the pause state; the hardware clears it.
    pub cont: bool,
    /// `[2]` where CONT goes on: 0 the next descriptor, 1 at SRC_START / DST_START.
    pub cont_addr: bool,
    /// `[3]` rate control by RATE_CNTL.
    pub rate_ctrl: bool,
    /// `[5:4]` what is transferred (simple mode only).
    #[bits(2, default = Mode::ReadWrite)]
    pub mode: Mode,
    /// `[6]` POINT_TYPE: 0 simple (descriptor in registers), 1 scatter-gather (descriptors in memory).
    pub scatter_gather: bool,
    /// `[7]` OVR_FETCH: fetch ahead into the common buffer.
    pub ovr_fetch: bool,
    #[bits(24)]
    __: u32,
}

/// CTRL1: how many AXI transactions may be outstanding.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Ctrl1 {
    /// `[4:0]` reads.
    #[bits(5)]
    pub src_issue: u8,
    /// `[9:5]` writes.
    #[bits(5)]
    pub dst_issue: u8,
    #[bits(22)]
    __: u32,
}

/// CTRL2: the enable bit.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Ctrl2 {
    /// `[0]` starts a run; the hardware clears it when the run is over.
    pub en: bool,
    #[bits(31)]
    __: u32,
}

/// STATUS.STATE, in the encoding of Xilinx' own driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// Disabled: never started, or done without error.
    #[default]
    Done = 0,
    /// Waits for CTRL0.CONT after a descriptor with [`Command::Pause`].
    Paused = 1,
    /// Running.
    Busy = 2,
    /// Disabled by an error.
    Error = 3,
}

/// AxBURST value for a fixed address (AMBA AXI4 A3.4.1).
pub const BURST_FIXED: u8 = 0;
/// AxBURST value for incrementing addresses.
pub const BURST_INCR: u8 = 1;

/// DATA_ATTR: AXI signals of payload transactions.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct DataAttr {
    /// `[3:0]` log2 of the beats of a write burst; 4 and more mean 16.
    #[bits(4)]
    pub awlen: u8,
    /// `[7:4]`
    #[bits(4)]
    pub awqos: u8,
    /// `[11:8]`
    #[bits(4)]
    pub awcache: u8,
    /// `[13:12]` [`BURST_FIXED`] (simple mode only) or [`BURST_INCR`].
    #[bits(2)]
    pub awburst: u8,
    /// `[17:14]` log2 of the beats of a read burst; 4 and more mean 16.
    #[bits(4)]
    pub arlen: u8,
    /// `[21:18]`
    #[bits(4)]
    pub arqos: u8,
    /// `[25:22]`
    #[bits(4)]
    pub arcache: u8,
    /// `[27:26]` [`BURST_FIXED`] (simple mode only) or [`BURST_INCR`].
    #[bits(2)]
    pub arburst: u8,
    #[bits(4)]
    __: u8,
}

/// DSCR_ATTR: AXI signals of descriptor fetches.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct DscrAttr {
    /// `[3:0]`
    #[bits(4)]
    pub axqos: u8,
    /// `[7:4]`
    #[bits(4)]
    pub axcache: u8,
    /// `[8]` AXCOHRNT: the fetch is coherent (low power domain only).
    pub coherent: bool,
    #[bits(23)]
    __: u32,
}

/// What a source descriptor says about the one after it (word 3 bits 4:3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Command {
    /// The next descriptor is valid.
    Next = 0,
    /// Pause after this one.
    Pause = 1,
    /// The list ends here.
    Stop = 2,
    /// Reserved.
    Reserved = 3,
}

impl Command {
    const fn into_bits(self) -> u8 {
        self as u8
    }
    const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::Next,
            1 => Self::Pause,
            2 => Self::Stop,
            _ => Self::Reserved,
        }
    }
}

/// Word 3 of a descriptor.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Control {
    /// `[0]` COHRNT: payload transactions are coherent (no effect in the full power domain).
    pub coherent: bool,
    /// `[1]` TYPE: 0 linear (16 bytes), 1 linked (32 bytes).
    pub linked: bool,
    /// `[2]` INTR: report and count the completion of this descriptor.
    pub intr: bool,
    /// `[4:3]` CMD; reserved in destination descriptors.
    #[bits(2, default = Command::Next)]
    pub command: Command,
    #[bits(27)]
    __: u32,
}

/// A descriptor as it lies in memory, little-endian: u64 address, u32 size, u32 control, and for a linked one
/// u64 next descriptor and u64 reserved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// Payload address; any alignment.
    pub address: u64,
    /// Payload bytes, [`SIZE_MASK`].
    pub size: u32,
    /// Word 3.
    pub control: Control,
    /// Address of the next descriptor; meaningful if `control.linked()`.
    pub next: u64,
}

impl Descriptor {
    /// The four 64-bit words of a linked descriptor; a linear one consists of the first two.
    pub const fn words(self) -> [u64; 4] {
        [self.address, (self.control.into_bits() as u64) << 32 | self.size as u64, self.next, 0]
    }

    /// From the four words (the last two do not matter for a linear descriptor). Bits that do not exist are
    /// dropped: addresses keep [`ADDRESS_BITS`], the size 30 bits.
    pub const fn from_words(words: [u64; 4]) -> Self {
        Self {
            address: words[0] & ADDRESS_MASK,
            size: words[1] as u32 & SIZE_MASK,
            control: Control::from_bits((words[1] >> 32) as u32),
            next: words[2] & ADDRESS_MASK,
        }
    }

    /// The bytes of a linear descriptor.
    pub fn linear_bytes(self) -> [u8; 16] {
        let [a, b, ..] = self.words();
        (u128::from(b) << 64 | u128::from(a)).to_le_bytes()
    }

    /// The bytes of a linked descriptor.
    pub fn linked_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (out, word) in bytes.chunks_exact_mut(8).zip(self.words()) {
            out.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_resets_lie_inside_the_masks() {
        for pair in REGISTERS.windows(2) {
            assert!(pair[0].offset < pair[1].offset, "{} before {}", pair[0].name, pair[1].name);
        }
        for r in &REGISTERS {
            assert_eq!(r.reset & !r.mask, 0, "{}", r.name);
            assert!(u64::from(r.offset) < WINDOW && r.offset % 4 == 0);
            assert_eq!(register_at(r.offset), Some(r));
        }
        assert_eq!(register_at(0x8), None);
        assert_eq!(register_at(0x1a0), None);
    }

    #[test]
    fn the_reset_value_of_data_attr_decodes() {
        let a = DataAttr::from_bits(0x0483_d20f);
        assert_eq!((a.arburst(), a.arcache(), a.arqos(), a.arlen()), (1, 2, 0, 15));
        assert_eq!((a.awburst(), a.awcache(), a.awqos(), a.awlen()), (1, 2, 0, 15));
    }

    #[test]
    fn fields_lie_where_the_manual_puts_them() {
        assert_eq!(Ctrl0::new().with_scatter_gather(true).into_bits(), 0x40);
        assert_eq!(Ctrl0::new().with_cont(true).with_cont_addr(true).into_bits(), 0x6);
        assert_eq!(Ctrl0::new().with_mode(Mode::ReadOnly).with_ovr_fetch(true).into_bits(), 0xa0);
        assert_eq!(Ctrl0::new().with_rate_ctrl(true).into_bits(), 0x8);
        assert_eq!(Ctrl1::new().with_dst_issue(0x1f).into_bits(), 0x3e0);
        assert_eq!(DscrAttr::from_bits(0x1f0).axcache(), 0xf, "what Linux writes for a coherent channel");
        assert!(DscrAttr::from_bits(0x1f0).coherent());
        assert_eq!(Control::new().with_command(Command::Stop).with_intr(true).into_bits(), 0x14);
        assert_eq!(Control::new().with_linked(true).with_coherent(true).into_bits(), 0x3);
        assert_eq!(interrupt::ALL & !(interrupt::SRC_DSCR_DONE | interrupt::DMA_PAUSE), 0x7fd);
        assert_eq!(interrupt::AXI_ERRORS | interrupt::INV_APB, 0x3c1);
        assert_eq!(interrupt::OVERFLOWS, 0x38);
        assert_eq!(interrupt::NAMES.len(), 12);
    }

    #[test]
    fn descriptors_have_the_documented_layout() {
        let d = Descriptor {
            address: 0x1_2345_6789,
            size: 0x1000,
            control: Control::from_bits(0x16),
            next: 0xabcd_0020,
        };
        let bytes = d.linked_bytes();
        assert_eq!(bytes[..8], 0x1_2345_6789u64.to_le_bytes());
        assert_eq!(bytes[8..12], 0x1000u32.to_le_bytes());
        assert_eq!(bytes[12..16], 0x16u32.to_le_bytes());
        assert_eq!(bytes[16..24], 0xabcd_0020u64.to_le_bytes());
        assert_eq!(bytes[24..], [0; 8]);
        assert_eq!(d.linear_bytes(), bytes[..16]);
        assert_eq!(Descriptor::from_words(d.words()), d);
    }
}
