//! The AXI DMA of AMD/Xilinx programmable logic (PG021, AXI DMA v7.1): registers of its two channels and the
//! buffer descriptors of its scatter-gather engine.
//!
//! Types, offsets and bits only. A core has a memory-to-stream channel ("MM2S") and a stream-to-memory channel
//! ("S2MM") with the same register block at [`MM2S`] and [`S2MM`]; [`reg`] has the offsets inside a block and
//! [`REGISTERS`] the block as data. [`Dmacr`] and [`Dmasr`] are control and status, [`irq`] the three bits that
//! both share, and [`Descriptor`] with [`BdControl`] and [`BdStatus`] what lies in memory.

use bitfield_struct::bitfield;

/// Size in bytes of the core's register window.
pub const WINDOW: u64 = 0x1000;
/// Offset of the memory-to-stream channel's register block.
pub const MM2S: u32 = 0x00;
/// Offset of the stream-to-memory channel's register block.
pub const S2MM: u32 = 0x30;

/// Offsets of a channel's registers from the start of its block.
pub mod reg {
    /// Control: [`Dmacr`](super::Dmacr).
    pub const DMACR: u32 = 0x00;
    /// Status: [`Dmasr`](super::Dmasr).
    pub const DMASR: u32 = 0x04;
    /// Scatter-gather: address of the current buffer descriptor, bits 31:6.
    pub const CURDESC: u32 = 0x08;
    /// Scatter-gather: the same, bits 63:32.
    pub const CURDESC_MSB: u32 = 0x0c;
    /// Scatter-gather: address of the last buffer descriptor to process, bits 31:6. A write starts a core of 32
    /// address bits.
    pub const TAILDESC: u32 = 0x10;
    /// Scatter-gather: the same, bits 63:32. A write starts a core of more than 32 address bits.
    pub const TAILDESC_MSB: u32 = 0x14;
    /// Direct mode: source (MM2S) or destination (S2MM) address, bits 31:0.
    pub const ADDRESS: u32 = 0x18;
    /// Direct mode: the same, bits 63:32.
    pub const ADDRESS_MSB: u32 = 0x1c;
    /// Direct mode: bytes to transfer. A write that is not zero starts the transfer.
    pub const LENGTH: u32 = 0x28;
}

/// The interrupt bits of DMACR (enables) and DMASR (status, write one to clear).
pub mod irq {
    /// Completed: the packet threshold was reached; in direct mode, the transfer is done.
    pub const IOC: u32 = 1 << 12;
    /// The delay timer expired.
    pub const DELAY: u32 = 1 << 13;
    /// An error halted the channel.
    pub const ERROR: u32 = 1 << 14;
    /// All three.
    pub const ALL: u32 = IOC | DELAY | ERROR;
}

/// DMASR's error bits.
pub mod error {
    /// DMAIntErr: a buffer of length 0, or in direct mode a packet longer than LENGTH.
    pub const DMA_INTERNAL: u32 = 1 << 4;
    /// DMASlvErr: SLVERR on payload.
    pub const DMA_SLAVE: u32 = 1 << 5;
    /// DMADecErr: DECERR on payload.
    pub const DMA_DECODE: u32 = 1 << 6;
    /// SGIntErr: a fetched descriptor is already complete.
    pub const SG_INTERNAL: u32 = 1 << 8;
    /// SGSlvErr: SLVERR on a descriptor fetch or status write.
    pub const SG_SLAVE: u32 = 1 << 9;
    /// SGDecErr: DECERR on a descriptor fetch or status write.
    pub const SG_DECODE: u32 = 1 << 10;
    /// All six. Only a reset clears them.
    pub const ALL: u32 = DMA_INTERNAL | DMA_SLAVE | DMA_DECODE | SG_INTERNAL | SG_SLAVE | SG_DECODE;

    /// PG021's names, with the bits.
    pub const NAMES: [(u32, &str); 6] = [
        (DMA_INTERNAL, "DMAIntErr"),
        (DMA_SLAVE, "DMASlvErr"),
        (DMA_DECODE, "DMADecErr"),
        (SG_INTERNAL, "SGIntErr"),
        (SG_SLAVE, "SGSlvErr"),
        (SG_DECODE, "SGDecErr"),
    ];
}

/// DMACR after reset.
pub const DMACR_RESET: u32 = 0x0001_0002;
/// DMASR after reset of a core without a scatter-gather engine.
pub const DMASR_RESET_DIRECT: u32 = 0x0001_0001;
/// DMASR after reset of a core with a scatter-gather engine.
pub const DMASR_RESET_SG: u32 = 0x0001_0009;
/// The bits of a descriptor's address that CURDESC, TAILDESC and NXTDESC hold.
pub const DESCRIPTOR_MASK: u64 = !0x3f;
/// Clocks of the scatter-gather engine in one unit of IRQDelay.
pub const DELAY_UNIT_CLOCKS: u64 = 125;

/// DMACR: control of a channel.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Dmacr {
    /// `[0]` RS: 1 run, 0 stop. Hardware clears it on an error.
    pub rs: bool,
    /// `[1]` Reserved, reads as 1.
    #[bits(default = true)]
    pub one: bool,
    /// `[2]` Resets the whole core, both channels; clears itself.
    pub reset: bool,
    /// `[3]` Keyhole: payload at a fixed address.
    pub keyhole: bool,
    /// `[4]` Cyclic: ignore the tail pointer and descriptors that are already complete.
    pub cyclic: bool,
    #[bits(7)]
    __: u8,
    /// `[12]` IOC_IrqEn.
    pub ioc_irq_en: bool,
    /// `[13]` Dly_IrqEn.
    pub dly_irq_en: bool,
    /// `[14]` Err_IrqEn.
    pub err_irq_en: bool,
    #[bits(1)]
    __: u8,
    /// `[23:16]` IRQThreshold: packets per IOC interrupt; 0 is not allowed.
    #[bits(8, default = 1)]
    pub irq_threshold: u8,
    /// `[31:24]` IRQDelay: timeout in [`DELAY_UNIT_CLOCKS`]; 0 disables the timer.
    #[bits(8)]
    pub irq_delay: u8,
}

/// DMASR: status of a channel.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Dmasr {
    /// `[0]` Halted.
    pub halted: bool,
    /// `[1]` Idle: the tail was reached; in direct mode, the transfer is done.
    pub idle: bool,
    #[bits(1)]
    __: u8,
    /// `[3]` SGIncld: the core has a scatter-gather engine.
    pub sg_included: bool,
    /// `[4]` DMAIntErr.
    pub dma_int_err: bool,
    /// `[5]` DMASlvErr.
    pub dma_slv_err: bool,
    /// `[6]` DMADecErr.
    pub dma_dec_err: bool,
    #[bits(1)]
    __: u8,
    /// `[8]` SGIntErr.
    pub sg_int_err: bool,
    /// `[9]` SGSlvErr.
    pub sg_slv_err: bool,
    /// `[10]` SGDecErr.
    pub sg_dec_err: bool,
    #[bits(1)]
    __: u8,
    /// `[12]` IOC_Irq, write one to clear.
    pub ioc_irq: bool,
    /// `[13]` Dly_Irq, write one to clear.
    pub dly_irq: bool,
    /// `[14]` Err_Irq, write one to clear.
    pub err_irq: bool,
    #[bits(1)]
    __: u8,
    /// `[23:16]` IRQThresholdSts: packets until the next IOC interrupt.
    #[bits(8)]
    pub irq_threshold: u8,
    /// `[31:24]` IRQDelaySts: the delay timer.
    #[bits(8)]
    pub irq_delay: u8,
}

/// One register of a channel's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Register {
    /// Its name in PG021, without the channel.
    pub name: &'static str,
    /// Offset in bytes from the start of the channel's block.
    pub offset: u32,
    /// Value after reset (of a core with scatter-gather).
    pub reset: u32,
    /// The bits that a write can change by value: neither status nor write-one-to-clear bits.
    pub writable: u32,
    /// The builds that have it.
    pub build: Build,
}

/// Which builds of the core have a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Build {
    /// Every build.
    Both,
    /// Those with a scatter-gather engine.
    ScatterGather,
    /// Those without.
    Direct,
}

const fn register(name: &'static str, offset: u32, reset: u32, writable: u32, build: Build) -> Register {
    Register { name, offset, reset, writable, build }
}

/// Every register of a channel's block, by ascending offset.
#[rustfmt::skip]
pub const REGISTERS: [Register; 9] = {
    use Build::*;
    [
        register("DMACR",        reg::DMACR,        DMACR_RESET,    0xffff_701d, Both),
        register("DMASR",        reg::DMASR,        DMASR_RESET_SG, 0,           Both),
        register("CURDESC",      reg::CURDESC,      0,              0xffff_ffc0, ScatterGather),
        register("CURDESC_MSB",  reg::CURDESC_MSB,  0,              0xffff_ffff, ScatterGather),
        register("TAILDESC",     reg::TAILDESC,     0,              0xffff_ffc0, ScatterGather),
        register("TAILDESC_MSB", reg::TAILDESC_MSB, 0,              0xffff_ffff, ScatterGather),
        register("ADDRESS",      reg::ADDRESS,      0,              0xffff_ffff, Direct),
        register("ADDRESS_MSB",  reg::ADDRESS_MSB,  0,              0xffff_ffff, Direct),
        register("LENGTH",       reg::LENGTH,       0,              0x03ff_ffff, Direct),
    ]
};

/// Splits an offset in the window into channel block ([`MM2S`] or [`S2MM`]) and register, or `None` where there
/// is neither.
pub fn register_at(offset: u32) -> Option<(u32, &'static Register)> {
    let block = if offset < S2MM { MM2S } else { S2MM };
    let inside = offset - block;
    let index = REGISTERS.binary_search_by_key(&inside, |r| r.offset).ok()?;
    Some((block, REGISTERS.get(index)?))
}

/// Offsets inside a buffer descriptor, and its size.
pub mod bd {
    /// Address of the next descriptor, bits 31:6.
    pub const NXTDESC: u64 = 0x00;
    /// The same, bits 63:32.
    pub const NXTDESC_MSB: u64 = 0x04;
    /// Address of the buffer, bits 31:0.
    pub const BUFFER_ADDRESS: u64 = 0x08;
    /// The same, bits 63:32.
    pub const BUFFER_ADDRESS_MSB: u64 = 0x0c;
    /// [`BdControl`](super::BdControl).
    pub const CONTROL: u64 = 0x18;
    /// [`BdStatus`](super::BdStatus): the one word that hardware writes.
    pub const STATUS: u64 = 0x1c;
    /// First of the five application words, which only exist with status and control streams.
    pub const APP0: u64 = 0x20;
    /// Bytes of the eight base words.
    pub const BYTES: usize = 32;
    /// Alignment of a descriptor.
    pub const ALIGN: u64 = 64;
}

/// CONTROL of a buffer descriptor.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct BdControl {
    /// `[25:0]` Bytes of the buffer; a core implements 8 to 26 of these bits.
    #[bits(26)]
    pub length: u32,
    /// `[26]` TXEOF: the packet ends with this buffer (MM2S only).
    pub eof: bool,
    /// `[27]` TXSOF: the packet starts with this buffer (MM2S only).
    pub sof: bool,
    #[bits(4)]
    __: u8,
}

/// STATUS of a buffer descriptor.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct BdStatus {
    /// `[25:0]` Bytes transferred.
    #[bits(26)]
    pub transferred: u32,
    /// `[26]` RXEOF: the packet ended in this buffer (S2MM only).
    pub eof: bool,
    /// `[27]` RXSOF: the packet started in this buffer (S2MM only).
    pub sof: bool,
    /// `[28]` DMAIntErr.
    pub int_err: bool,
    /// `[29]` DMASlvErr.
    pub slv_err: bool,
    /// `[30]` DMADecErr.
    pub dec_err: bool,
    /// `[31]` Cmplt: the descriptor is complete. Software clears it before it uses the descriptor again.
    pub complete: bool,
}

/// A buffer descriptor as it lies in memory: eight little-endian words, [`bd::ALIGN`]ed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// Address of the next descriptor, a multiple of [`bd::ALIGN`].
    pub next: u64,
    /// Address of the buffer.
    pub buffer: u64,
    /// Length and flags.
    pub control: BdControl,
    /// What became of it.
    pub status: BdStatus,
}

impl Descriptor {
    /// The eight words in memory order; the reserved ones are 0.
    pub const fn words(self) -> [u32; 8] {
        [
            self.next as u32,
            (self.next >> 32) as u32,
            self.buffer as u32,
            (self.buffer >> 32) as u32,
            0,
            0,
            self.control.into_bits(),
            self.status.into_bits(),
        ]
    }

    /// From the eight words; address bits 5:0 of `next` do not exist.
    pub const fn from_words(words: [u32; 8]) -> Self {
        Self {
            next: ((words[1] as u64) << 32 | words[0] as u64) & DESCRIPTOR_MASK,
            buffer: (words[3] as u64) << 32 | words[2] as u64,
            control: BdControl::from_bits(words[6]),
            status: BdStatus::from_bits(words[7]),
        }
    }

    /// The bytes in memory.
    pub fn bytes(self) -> [u8; bd::BYTES] {
        let mut bytes = [0; bd::BYTES];
        for (out, word) in bytes.chunks_exact_mut(4).zip(self.words()) {
            out.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// From the bytes in memory.
    pub fn from_bytes(bytes: &[u8; bd::BYTES]) -> Self {
        let mut words = [0; 8];
        for (word, chunk) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*chunk);
        }
        Self::from_words(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_values_are_those_of_the_manual() {
        assert_eq!(Dmacr::new().into_bits(), DMACR_RESET);
        let halted = Dmasr::new().with_halted(true).with_irq_threshold(1);
        assert_eq!(halted.into_bits(), DMASR_RESET_DIRECT);
        assert_eq!(halted.with_sg_included(true).into_bits(), DMASR_RESET_SG);
    }

    #[test]
    fn the_table_is_sorted_and_found_by_offset_in_both_blocks() {
        for pair in REGISTERS.windows(2) {
            assert!(pair[0].offset < pair[1].offset, "{} before {}", pair[0].name, pair[1].name);
        }
        for r in &REGISTERS {
            assert_eq!(register_at(r.offset), Some((MM2S, r)));
            assert_eq!(register_at(S2MM + r.offset), Some((S2MM, r)));
        }
        for hole in [0x20, 0x24, 0x2c, 0x50, 0x5c, 0x60, 0xffc, u32::MAX] {
            assert_eq!(register_at(hole), None, "{hole:#x}");
        }
    }

    #[test]
    fn fields_lie_where_the_manual_puts_them() {
        assert_eq!(Dmacr::from_bits(0).with_rs(true).with_reset(true).with_keyhole(true).into_bits(), 0xd);
        assert_eq!(Dmacr::from_bits(0).with_cyclic(true).into_bits(), 0x10);
        let enables = Dmacr::from_bits(0).with_ioc_irq_en(true).with_dly_irq_en(true).with_err_irq_en(true);
        assert_eq!((enables.into_bits(), irq::ALL), (0x7000, 0x7000));
        let coalescing = Dmacr::from_bits(0).with_irq_threshold(0x12).with_irq_delay(0x34);
        assert_eq!(coalescing.into_bits(), 0x3412_0000);
        let errors = Dmasr::from_bits(error::ALL);
        assert!(errors.dma_int_err() && errors.dma_slv_err() && errors.dma_dec_err());
        assert!(errors.sg_int_err() && errors.sg_slv_err() && errors.sg_dec_err());
        assert_eq!((error::ALL, error::NAMES.len()), (0x770, 6));
        assert_eq!(Dmasr::from_bits(0x7000).with_ioc_irq(false).with_dly_irq(false).into_bits(), irq::ERROR);
        let control = BdControl::new().with_length(0x3ff_ffff).with_sof(true).with_eof(true);
        assert_eq!(control.into_bits(), 0x0fff_ffff);
        let status = BdStatus::new().with_complete(true).with_dec_err(true).with_slv_err(true);
        assert_eq!(status.into_bits(), 0xe000_0000);
        assert_eq!(BdStatus::new().with_int_err(true).with_sof(true).with_eof(true).into_bits(), 0x1c00_0000);
    }

    #[test]
    fn descriptors_have_the_documented_layout() {
        let d = Descriptor {
            next: 0x1_2345_6780,
            buffer: 0x2_dead_beef,
            control: BdControl::from_bits(0x0c00_1000),
            status: BdStatus::from_bits(0x8000_1000),
        };
        let bytes = d.bytes();
        let word = |at: u64| u32::from_le_bytes(bytes[at as usize..at as usize + 4].try_into().unwrap());
        assert_eq!((word(bd::NXTDESC), word(bd::NXTDESC_MSB)), (0x2345_6780, 1));
        assert_eq!((word(bd::BUFFER_ADDRESS), word(bd::BUFFER_ADDRESS_MSB)), (0xdead_beef, 2));
        assert_eq!((word(bd::CONTROL), word(bd::STATUS)), (0x0c00_1000, 0x8000_1000));
        assert_eq!((word(0x10), word(0x14)), (0, 0));
        assert_eq!(Descriptor::from_bytes(&bytes), d);
        let mut odd = d.words();
        odd[0] |= 0x3f;
        assert_eq!(Descriptor::from_words(odd), d);
    }
}
