//! The Zynq UltraScale+ (ZynqMP) as tables: where its SMMU and DMA engines sit, which interrupt and stream id
//! each has, and how a stream id is put together.
//!
//! A stream id is `{ TBU number [14:10], master id [9:0] }`; for PL ports the low six bits of the master id are
//! the AXI ID that arrives from the PL. So HP0, whose master id is 0x280, sends **0xE80** (it enters through
//! TBU 3), and only HPC0 and HPC1 (TBU 0) look as if the TBU number did not exist.
//!
//! Start with [`MASTERS`], [`ZDMA_CHANNELS`] and [`PlPort`]; [`stream_id`] composes a stream id, [`decode`]
//! takes one apart, [`likely_meant`] finds the id that a wrong one was probably meant to be. What Xilinx's
//! documents leave open is marked [`SmmuPath::Unverified`] or [`SmmuPath::Unknown`].
//!
//! Sources: UG1085 Table 16-13 (master ids), Arm DDI 0517 2.3.1 (composition), Xilinx wiki "Xen and PL Masters" and
//! Xilinx's QEMU device trees (TBU of each port), UG1087 (register bases).

use core::fmt;

use crate::addr::{Pa, StreamId};

/// The SMMU (MMU-500) as wired into this chip.
pub mod smmu {
    use crate::addr::Pa;

    /// Start of its registers.
    pub const BASE: Pa = Pa(0xFD80_0000);
    /// Bytes of registers: 16 global pages and 16 context bank pages of 4 KiB.
    pub const SIZE: u64 = 0x2_0000;
    /// The one SPI that all its interrupts share, level high.
    pub const SPI: u32 = 155;
    /// Context banks.
    pub const CONTEXT_BANKS: usize = 16;
    /// Stream match groups.
    pub const STREAM_MATCH_GROUPS: usize = 48;
    /// Global interrupts (`#global-interrupts`).
    pub const GLOBAL_INTERRUPTS: usize = 1;
    /// Entries that `interrupts` needs: the global one, then one per context bank.
    pub const INTERRUPT_ENTRIES: usize = GLOBAL_INTERRUPTS + CONTEXT_BANKS;
    /// Bits of a stream id.
    pub const STREAM_ID_BITS: u32 = 15;
    /// TBUs.
    pub const TBUS: u8 = 6;
}

/// SMMU_REG: the block between the SMMU's interrupt outputs and [`smmu::SPI`].
///
/// Its mask register resets to all masked, and Linux never touches the block: boot code must write
/// [`INTERRUPTS`](smmu_reg::INTERRUPTS) to [`IER_0`](smmu_reg::IER_0), or no SMMU interrupt reaches the GIC.
pub mod smmu_reg {
    use crate::addr::Pa;

    /// Start of the block.
    pub const BASE: Pa = Pa(0xFD5F_0000);
    /// Its size in bytes.
    pub const SIZE: u64 = 0x1_0000;
    /// Interrupt status, write 1 to clear.
    pub const ISR_0: u64 = 0x10;
    /// Interrupt mask, read only, 1 = masked.
    pub const IMR_0: u64 = 0x14;
    /// Interrupt enable: writing 1 unmasks.
    pub const IER_0: u64 = 0x18;
    /// Interrupt disable: writing 1 masks.
    pub const IDR_0: u64 = 0x1C;
    /// All interrupt bits that exist: address decode error (31), global fault non-secure (4) and secure (3),
    /// TBU performance (2), combined secure (1) and non-secure (0).
    pub const INTERRUPTS: u32 = 0x8000_001F;
}

/// IOU_SLCR.IOU_INTERCONNECT_ROUTE: bit n = 1 sends master n through the CCI and the SMMU, 0 straight to memory.
///
/// Masters with a [`Master::route_bit`] that are given `iommus` while their bit is 0 issue IOVAs on a path that
/// does not translate.
pub const IOU_INTERCONNECT_ROUTE: Pa = Pa(0xFF18_0408);

/// How a master reaches memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SmmuPath {
    /// Through this TBU of the SMMU.
    Tbu(u8),
    /// Probably through this TBU; no public document says so.
    Unverified(u8),
    /// No public document tells.
    Unknown,
    /// Around the SMMU: its transactions are never translated.
    NotBehind,
}

impl SmmuPath {
    /// The TBU, verified or not.
    pub const fn tbu(self) -> Option<u8> {
        match self {
            Self::Tbu(n) | Self::Unverified(n) => Some(n),
            Self::Unknown | Self::NotBehind => None,
        }
    }
    /// True if the path leaves the SMMU through the CCI, so that it can be I/O coherent: TBU 0 to 2.
    /// TBU 3 to 5 go straight to the memory controller. Table walks always go to the CCI.
    pub const fn through_cci(self) -> bool {
        matches!(self, Self::Tbu(0..=2) | Self::Unverified(0..=2))
    }
}

/// The device-tree node of a master, by the name and first register address that Linux's trees give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MasterNode {
    /// Node name without unit address, as in Linux 6.12 (`zynqmp.dtsi`); boards may use another.
    pub name: &'static str,
    /// First `reg` address of the (first) node.
    pub address: Pa,
    /// Distance to the node of the next id, or 0 where one node issues all ids.
    pub stride: u64,
}

/// One bus master, or a row of like ones with consecutive ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Master {
    /// Name after UG1085.
    pub name: &'static str,
    /// First 10-bit master id.
    pub id: u16,
    /// How many consecutive ids.
    pub count: u16,
    /// Its way to memory.
    pub path: SmmuPath,
    /// Its node in a device tree, where there is one.
    pub node: Option<MasterNode>,
    /// Its bit in [`IOU_INTERCONNECT_ROUTE`], for the masters that have one.
    pub route_bit: Option<u8>,
}

impl Master {
    /// The stream id of the `n`-th of its ids, or `None` past its count or where no TBU is known.
    pub const fn stream(&self, n: u16) -> Option<StreamId> {
        match self.path.tbu() {
            Some(tbu) if n < self.count => Some(StreamId(((tbu as u32) << 10) | (self.id + n) as u32)),
            _ => None,
        }
    }
    /// True if the row holds this 10-bit master id.
    pub const fn has_id(&self, id: u16) -> bool {
        id >= self.id && id - self.id < self.count
    }
}

const fn node(name: &'static str, address: u64, stride: u64) -> Option<MasterNode> {
    Some(MasterNode { name, address: Pa(address), stride })
}

const fn master(
    name: &'static str,
    id: u16,
    count: u16,
    path: SmmuPath,
    node: Option<MasterNode>,
    route_bit: Option<u8>,
) -> Master {
    Master { name, id, count, path, node, route_bit }
}

use SmmuPath::{NotBehind, Tbu, Unknown, Unverified};

/// Every master of the chip (UG1085 Table 16-13). PL ports are here too, with their 64 AXI IDs.
///
/// SATA has two ids in UG1085; Linux's trees list four (0x4c0..0x4c3). USB nodes are the dwc3 cores, not the
/// wrappers around them.
pub const MASTERS: &[Master] = &[
    master("RPU0", 0x000, 16, Unverified(2), None, None),
    master("RPU1", 0x010, 16, Unverified(2), None, None),
    master("PMU processor", 0x040, 1, Unverified(2), None, None),
    master("CSU processor", 0x050, 1, Unverified(2), None, None),
    master("CSU DMA", 0x051, 1, Unverified(2), None, None),
    master("USB0", 0x060, 1, Tbu(2), node("usb", 0xFE20_0000, 0), None),
    master("USB1", 0x061, 1, Tbu(2), node("usb", 0xFE30_0000, 0), None),
    master("DAP APB", 0x062, 1, Unknown, None, None),
    master("LPD DMA channel", 0x068, 8, Tbu(2), node("dma-controller", 0xFFA8_0000, 0x1_0000), None),
    master("SD0", 0x070, 1, Tbu(2), node("mmc", 0xFF16_0000, 0), Some(4)),
    master("SD1", 0x071, 1, Tbu(2), node("mmc", 0xFF17_0000, 0), Some(5)),
    master("NAND", 0x072, 1, Tbu(2), node("nand-controller", 0xFF10_0000, 0), Some(7)),
    master("QSPI", 0x073, 1, Tbu(2), node("spi", 0xFF0F_0000, 0), Some(6)),
    master("GEM0", 0x074, 1, Tbu(2), node("ethernet", 0xFF0B_0000, 0), Some(0)),
    master("GEM1", 0x075, 1, Tbu(2), node("ethernet", 0xFF0C_0000, 0), Some(1)),
    master("GEM2", 0x076, 1, Tbu(2), node("ethernet", 0xFF0D_0000, 0), Some(2)),
    master("GEM3", 0x077, 1, Tbu(2), node("ethernet", 0xFF0E_0000, 0), Some(3)),
    master("APU", 0x080, 64, NotBehind, None, None),
    master("SATA", 0x0C0, 2, Tbu(1), node("ahci", 0xFD0C_0000, 0), None),
    master("GPU", 0x0C4, 1, Tbu(1), node("gpu", 0xFD4B_0000, 0), None),
    master("DAP AXI", 0x0C5, 1, Unverified(1), None, None),
    master("PCIe", 0x0D0, 1, Tbu(1), node("pcie", 0xFD0E_0000, 0), None),
    master("DisplayPort DMA", 0x0E0, 6, Tbu(3), node("dma-controller", 0xFD4C_0000, 0), None),
    master("FPD DMA channel", 0x0E8, 8, Tbu(5), node("dma-controller", 0xFD50_0000, 0x1_0000), None),
    master("S_AXI_HPC0_FPD", 0x200, 64, Tbu(0), None, None),
    master("S_AXI_HPC1_FPD", 0x240, 64, Tbu(0), None, None),
    master("S_AXI_HP0_FPD", 0x280, 64, Tbu(3), None, None),
    master("S_AXI_HP1_FPD", 0x2C0, 64, Tbu(4), None, None),
    master("S_AXI_HP2_FPD", 0x300, 64, Tbu(4), None, None),
    master("S_AXI_HP3_FPD", 0x340, 64, Tbu(5), None, None),
    master("S_AXI_LPD", 0x380, 64, Unverified(2), None, None),
    master("S_AXI_ACE_FPD / S_AXI_ACP_FPD", 0x3C0, 64, NotBehind, None, None),
];

/// Which of the two general-purpose DMA units a channel belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZdmaUnit {
    /// The full-power domain's (GDMA): 128 bits wide, never I/O coherent.
    Fpd,
    /// The low-power domain's (ADMA): 64 bits wide, can be I/O coherent through the CCI.
    Lpd,
}

impl ZdmaUnit {
    /// Width of its data bus in bits (`xlnx,bus-width`).
    pub const fn bus_width(self) -> u32 {
        match self {
            Self::Fpd => 128,
            Self::Lpd => 64,
        }
    }
    /// True if its accesses can be I/O coherent.
    pub const fn can_be_coherent(self) -> bool {
        matches!(self, Self::Lpd)
    }
    /// Bytes of the common buffer that its eight channels share.
    pub const fn common_buffer(self) -> usize {
        match self {
            Self::Fpd => 4096,
            Self::Lpd => 2048,
        }
    }
    /// "FPD" or "LPD".
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fpd => "FPD",
            Self::Lpd => "LPD",
        }
    }
}

/// Bytes of registers of one DMA channel.
pub const ZDMA_WINDOW: u64 = 0x1000;

/// One channel of a general-purpose DMA unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ZdmaChannel {
    /// Its unit.
    pub unit: ZdmaUnit,
    /// 0 to 7. (Labels in Linux's trees count from 1.)
    pub index: u8,
    /// Start of its registers, [`ZDMA_WINDOW`] bytes.
    pub base: Pa,
    /// Its shared peripheral interrupt, level high.
    pub spi: u32,
    /// The stream id of everything it issues.
    pub stream: StreamId,
}

const fn channel(unit: ZdmaUnit, index: u8, base: u64, spi: u32, stream: u32) -> ZdmaChannel {
    ZdmaChannel { unit, index, base: Pa(base), spi, stream: StreamId(stream) }
}

use ZdmaUnit::{Fpd, Lpd};

/// The 16 channels, FPD first: the order in which Linux's trees list and thus number them.
pub const ZDMA_CHANNELS: [ZdmaChannel; 16] = [
    channel(Fpd, 0, 0xFD50_0000, 124, 0x14E8),
    channel(Fpd, 1, 0xFD51_0000, 125, 0x14E9),
    channel(Fpd, 2, 0xFD52_0000, 126, 0x14EA),
    channel(Fpd, 3, 0xFD53_0000, 127, 0x14EB),
    channel(Fpd, 4, 0xFD54_0000, 128, 0x14EC),
    channel(Fpd, 5, 0xFD55_0000, 129, 0x14ED),
    channel(Fpd, 6, 0xFD56_0000, 130, 0x14EE),
    channel(Fpd, 7, 0xFD57_0000, 131, 0x14EF),
    channel(Lpd, 0, 0xFFA8_0000, 77, 0x868),
    channel(Lpd, 1, 0xFFA9_0000, 78, 0x869),
    channel(Lpd, 2, 0xFFAA_0000, 79, 0x86A),
    channel(Lpd, 3, 0xFFAB_0000, 80, 0x86B),
    channel(Lpd, 4, 0xFFAC_0000, 81, 0x86C),
    channel(Lpd, 5, 0xFFAD_0000, 82, 0x86D),
    channel(Lpd, 6, 0xFFAE_0000, 83, 0x86E),
    channel(Lpd, 7, 0xFFAF_0000, 84, 0x86F),
];

/// The channel whose registers start at `base`.
pub fn zdma_channel_at(base: Pa) -> Option<&'static ZdmaChannel> {
    ZDMA_CHANNELS.iter().find(|c| c.base == base)
}

/// A port through which the programmable logic reaches the processing system as a master.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PlPort {
    /// S_AXI_HPC0_FPD, through the CCI.
    Hpc0,
    /// S_AXI_HPC1_FPD, through the CCI.
    Hpc1,
    /// S_AXI_HP0_FPD.
    Hp0,
    /// S_AXI_HP1_FPD.
    Hp1,
    /// S_AXI_HP2_FPD.
    Hp2,
    /// S_AXI_HP3_FPD.
    Hp3,
    /// S_AXI_LPD.
    Lpd,
    /// S_AXI_ACE_FPD, attached to the CCI behind the SMMU.
    Ace,
    /// S_AXI_ACP_FPD, attached to the APU behind the SMMU.
    Acp,
}

/// What the chip says of a [`PlPort`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlPortInfo {
    /// The port.
    pub port: PlPort,
    /// Its short name, as in `portcullis,pl-port`.
    pub name: &'static str,
    /// Its name in UG1085.
    pub signal: &'static str,
    /// Bits 9:6 of its stream ids.
    pub master: u8,
    /// Its way to memory.
    pub path: SmmuPath,
    /// True if accesses through it can be coherent with the APU's caches.
    pub coherent: bool,
}

const fn port(
    port: PlPort,
    name: &'static str,
    signal: &'static str,
    master: u8,
    path: SmmuPath,
    coherent: bool,
) -> PlPortInfo {
    PlPortInfo { port, name, signal, master, path, coherent }
}

/// The PL ports, in the order of [`PlPort`].
///
/// S_AXI_LPD is marked unverified: by its master id it would enter through TBU 2, but Xilinx's QEMU wires it to
/// memory without an SMMU.
pub const PL_PORTS: [PlPortInfo; 9] = [
    port(PlPort::Hpc0, "hpc0", "S_AXI_HPC0_FPD", 0b1000, Tbu(0), true),
    port(PlPort::Hpc1, "hpc1", "S_AXI_HPC1_FPD", 0b1001, Tbu(0), true),
    port(PlPort::Hp0, "hp0", "S_AXI_HP0_FPD", 0b1010, Tbu(3), false),
    port(PlPort::Hp1, "hp1", "S_AXI_HP1_FPD", 0b1011, Tbu(4), false),
    port(PlPort::Hp2, "hp2", "S_AXI_HP2_FPD", 0b1100, Tbu(4), false),
    port(PlPort::Hp3, "hp3", "S_AXI_HP3_FPD", 0b1101, Tbu(5), false),
    port(PlPort::Lpd, "lpd", "S_AXI_LPD", 0b1110, Unverified(2), false),
    port(PlPort::Ace, "ace", "S_AXI_ACE_FPD", 0b1111, NotBehind, true),
    port(PlPort::Acp, "acp", "S_AXI_ACP_FPD", 0b1111, NotBehind, true),
];

impl PlPort {
    /// The chip's data of this port.
    pub const fn info(self) -> &'static PlPortInfo {
        &PL_PORTS[self as usize]
    }
    /// The port of this short name (`hpc0`, `hp0`, ...).
    pub fn from_name(name: &str) -> Option<Self> {
        PL_PORTS.iter().find(|p| p.name == name).map(|p| p.port)
    }
    /// The stream id of AXI ID 0, or `None` for ports that are not behind the SMMU.
    pub const fn stream_base(self) -> Option<StreamId> {
        self.stream(0)
    }
    /// The stream id of a transaction with this AXI ID, or `None` for ports that are not behind the SMMU and for
    /// AXI IDs wider than six bits.
    pub const fn stream(self, axi_id: u8) -> Option<StreamId> {
        match self.info().path.tbu() {
            Some(tbu) => stream_id(tbu, self.info().master, axi_id),
            None => None,
        }
    }
}

impl fmt::Display for PlPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.info().name)
    }
}

/// Composes a stream id: TBU number (0 to 5) in bits 14:10, master in 9:6, AXI ID in 5:0.
/// `None` if a part does not fit.
pub const fn stream_id(tbu: u8, master: u8, axi_id: u8) -> Option<StreamId> {
    if tbu < smmu::TBUS && master < 16 && axi_id < 64 {
        Some(StreamId(((tbu as u32) << 10) | ((master as u32) << 6) | axi_id as u32))
    } else {
        None
    }
}

/// A stream id taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Decoded {
    /// Bits 14:10.
    pub tbu: u8,
    /// Bits 9:6.
    pub master: u8,
    /// Bits 5:0: the AXI ID for PL ports, further master bits for the others.
    pub axi_id: u8,
    /// The master that issues this id, or `None` if none does.
    pub source: Option<&'static Master>,
    /// Which of the source's ids it is (0 where it has one): the channel, or the AXI ID on a PL port.
    pub index: u16,
}

impl Decoded {
    /// The name of the master that issues this id.
    pub fn name(&self) -> Option<&'static str> {
        self.source.map(|m| m.name)
    }
}

/// `FPD DMA channel 0 (TBU 5, master 0x3, AXI ID 0x28)`.
impl fmt::Display for Decoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source {
            Some(m) if m.count == 1 => write!(f, "{}", m.name)?,
            Some(m) if m.count == 64 => write!(f, "{} id {}", m.name, self.index)?,
            Some(m) => write!(f, "{} {}", m.name, self.index)?,
            None => write!(f, "no master of this chip")?,
        }
        write!(f, " (TBU {}, master {:#x}, AXI ID {:#x})", self.tbu, self.master, self.axi_id)
    }
}

/// Takes a stream id apart and finds the master that issues it. `None` if it is wider than 15 bits.
pub fn decode(stream: StreamId) -> Option<Decoded> {
    let raw = stream.get();
    if raw >> smmu::STREAM_ID_BITS != 0 {
        return None;
    }
    let tbu = (raw >> 10) as u8;
    let id = (raw & 0x3FF) as u16;
    let source = MASTERS.iter().find(|m| m.path.tbu() == Some(tbu) && m.has_id(id));
    Some(Decoded {
        tbu,
        master: (id >> 6) as u8,
        axi_id: (id & 0x3F) as u8,
        source,
        index: source.map_or(0, |m| id - m.id),
    })
}

/// The stream id that `stream` was probably meant to be: the master with the same low ten bits, with the TBU that
/// it really enters through. `None` if `stream` is right as it is, or no master has these bits.
///
/// The frequent mistake is a PL port's id without its TBU number: 0x280 for HP0 instead of 0xE80.
pub fn likely_meant(stream: StreamId) -> Option<StreamId> {
    let decoded = decode(stream)?;
    if decoded.source.is_some() {
        return None;
    }
    let id = (stream.get() & 0x3FF) as u16;
    let m = MASTERS.iter().find(|m| m.has_id(id) && m.path.tbu().is_some())?;
    m.stream(id - m.id)
}

/// A master found by the address of its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// The master.
    pub master: &'static Master,
    /// First of its ids that the node at this address issues.
    pub first: u16,
    /// How many ids that node issues.
    pub count: u16,
}

impl Located {
    /// The stream ids that the node issues; empty where no TBU is known.
    pub fn streams(self) -> impl Iterator<Item = StreamId> {
        (self.first..self.first + self.count).filter_map(move |n| self.master.stream(n))
    }
}

/// The master whose device-tree node has its first register at `address`.
pub fn master_at(address: Pa) -> Option<Located> {
    MASTERS.iter().find_map(|master| {
        let node = master.node?;
        if node.stride == 0 {
            return (node.address == address).then_some(Located { master, first: 0, count: master.count });
        }
        let offset = address.get().checked_sub(node.address.get())?;
        let index = offset / node.stride;
        (offset % node.stride == 0 && index < u64::from(master.count)).then_some(Located {
            master,
            first: index as u16,
            count: 1,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_name(name: &str) -> &'static Master {
        MASTERS.iter().find(|m| m.name == name).unwrap()
    }

    #[test]
    fn stream_ids_of_processing_system_masters_are_those_of_the_manuals() {
        let expected = [
            ("USB0", 0, 0x860),
            ("USB1", 0, 0x861),
            ("LPD DMA channel", 0, 0x868),
            ("LPD DMA channel", 7, 0x86F),
            ("SD0", 0, 0x870),
            ("SD1", 0, 0x871),
            ("NAND", 0, 0x872),
            ("QSPI", 0, 0x873),
            ("GEM0", 0, 0x874),
            ("GEM3", 0, 0x877),
            ("SATA", 0, 0x4C0),
            ("SATA", 1, 0x4C1),
            ("GPU", 0, 0x4C4),
            ("PCIe", 0, 0x4D0),
            ("DisplayPort DMA", 3, 0xCE3),
            ("DisplayPort DMA", 4, 0xCE4),
            ("FPD DMA channel", 0, 0x14E8),
            ("FPD DMA channel", 7, 0x14EF),
        ];
        for (name, index, stream) in expected {
            assert_eq!(by_name(name).stream(index), Some(StreamId(stream)), "{name} {index}");
            let decoded = decode(StreamId(stream)).unwrap();
            assert_eq!((decoded.name(), decoded.index), (Some(name), index), "{stream:#x}");
        }
    }

    #[test]
    fn hp0_is_0xe80_and_not_0x280() {
        assert_eq!(PlPort::Hp0.stream_base(), Some(StreamId(0xE80)));
        let wrong = decode(StreamId(0x280)).unwrap();
        assert_eq!((wrong.tbu, wrong.master, wrong.axi_id, wrong.name()), (0, 0b1010, 0, None));
        assert_eq!(likely_meant(StreamId(0x280)), Some(StreamId(0xE80)));
        assert_eq!(likely_meant(StreamId(0x285)), Some(StreamId(0xE85)));
        assert_eq!(likely_meant(StreamId(0xE80)), None);
    }

    #[test]
    fn each_pl_port_has_its_tbu_in_its_stream_ids() {
        let expected = [
            ("hpc0", Some(0x0200), true),
            ("hpc1", Some(0x0240), true),
            ("hp0", Some(0x0E80), false),
            ("hp1", Some(0x12C0), false),
            ("hp2", Some(0x1300), false),
            ("hp3", Some(0x1740), false),
            ("lpd", Some(0x0B80), false),
            ("ace", None, true),
            ("acp", None, true),
        ];
        for (name, base, coherent) in expected {
            let port = PlPort::from_name(name).unwrap();
            assert_eq!(port.info().port, port, "table order of {name}");
            assert_eq!(port.stream_base().map(|s| s.get()), base, "{name}");
            assert_eq!(port.info().coherent, coherent, "{name}");
            if let Some(base) = base {
                assert_eq!(port.stream(0x3F), Some(StreamId(base + 0x3F)));
                assert_eq!(port.stream(0x40), None);
                let decoded = decode(StreamId(base + 5)).unwrap();
                assert_eq!((decoded.name(), decoded.axi_id), (Some(port.info().signal), 5));
            }
        }
    }

    #[test]
    fn values_of_published_fault_logs_decode() {
        // Six crossbar inputs into HP0; a second PL master on HPC0; the thesis's first DMA channel.
        for n in 0..6 {
            let decoded = decode(StreamId(0xE80 + n)).unwrap();
            assert_eq!((decoded.tbu, decoded.name(), decoded.index), (3, Some("S_AXI_HP0_FPD"), n as u16));
        }
        let second = decode(StreamId(0x201)).unwrap();
        assert_eq!((second.name(), second.axi_id), (Some("S_AXI_HPC0_FPD"), 1));
        let fpd = decode(StreamId(0x14E8)).unwrap();
        assert_eq!((fpd.tbu, fpd.master, fpd.axi_id), (5, 0b0011, 0b101000));
    }

    #[test]
    fn the_thesis_bit_pattern_of_0x200_is_0x080_and_belongs_to_nobody() {
        assert_eq!(decode(StreamId(0b000_0000_1000_0000)).unwrap().source, None);
        assert_eq!(decode(StreamId(0x200)).unwrap().name(), Some("S_AXI_HPC0_FPD"));
    }

    #[test]
    fn ids_wider_than_15_bits_do_not_decode() {
        assert!(decode(StreamId(0x7FFF)).is_some());
        assert!(decode(StreamId(0x8000)).is_none());
        assert_eq!(stream_id(6, 0, 0), None);
        assert_eq!(stream_id(0, 16, 0), None);
        assert_eq!(stream_id(3, 0b1010, 2), Some(StreamId(0xE82)));
    }

    #[test]
    fn no_stream_id_belongs_to_two_masters() {
        for (i, a) in MASTERS.iter().enumerate() {
            for b in &MASTERS[i + 1..] {
                assert!(a.id + a.count <= b.id, "{} and {}", a.name, b.name);
            }
        }
    }

    #[test]
    fn channel_table_agrees_with_the_master_table() {
        for c in &ZDMA_CHANNELS {
            let located = master_at(c.base).unwrap();
            assert!(located.streams().eq([c.stream]));
            assert_eq!(u16::from(c.index), located.first);
            assert_eq!(zdma_channel_at(c.base), Some(c));
            assert_eq!(located.master.path.through_cci(), c.unit.can_be_coherent());
        }
        assert_eq!(master_at(Pa(0xFD58_0000)), None);
        assert_eq!(master_at(Pa(0xFD50_0004)), None);
    }

    #[test]
    fn channels_have_the_interrupts_and_widths_of_the_manuals() {
        for (n, c) in ZDMA_CHANNELS.iter().enumerate() {
            let (first, base, width) = if n < 8 { (124, 0xFD50_0000, 128) } else { (77, 0xFFA8_0000, 64) };
            let i = n as u64 % 8;
            assert_eq!((u64::from(c.spi), c.base.get()), (first + i, base + i * 0x1_0000));
            assert_eq!(c.unit.bus_width(), width);
        }
    }

    #[test]
    fn masters_are_found_by_the_address_of_their_node() {
        let gem3 = master_at(Pa(0xFF0E_0000)).unwrap();
        assert_eq!((gem3.master.name, gem3.master.route_bit), ("GEM3", Some(3)));
        let dp = master_at(Pa(0xFD4C_0000)).unwrap();
        assert_eq!((dp.first, dp.count, dp.streams().count()), (0, 6, 6));
        let lpd5 = master_at(Pa(0xFFAD_0000)).unwrap();
        assert_eq!(lpd5.streams().next(), Some(StreamId(0x86D)));
    }
}
