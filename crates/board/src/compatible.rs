//! Which `compatible` strings Portcullis models.
//!
//! A node that carries one of these is read strictly: what is malformed in it is an error. Everything else is
//! listed as not modelled.

/// What a modelled node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Arm MMU-500.
    Mmu500,
    /// Another Arm SMMU of architecture version 2.
    SmmuV2,
    /// One channel of the ZynqMP's general-purpose DMA.
    Zdma,
    /// The writer IP in the programmable logic, see [`PL_WRITER`].
    PlWriter,
}

/// The compatible string of the PL writer: an AXI master in the programmable logic that writes one word per trigger,
/// after the IP of a master's thesis that has no published device-tree binding. The binding is ours:
///
/// | Property | Meaning |
/// |---|---|
/// | `reg` | its register window (0x1000 bytes) |
/// | `portcullis,pl-port` | string, required: the port it is connected to: `hpc0`, `hpc1`, `hp0` .. `hp3`, `lpd`, `ace`, `acp` |
/// | `portcullis,axi-id` | cell, 0 to 63, default 0: the AXI ID it drives after reset, the low bits of its stream id |
/// | `portcullis,ax-prot` | cell, 0 to 7, default 2: AxPROT as wired: bit 0 privileged, bit 1 non-secure, bit 2 instruction |
/// | `iommus`, `dma-coherent` | as for any master |
pub const PL_WRITER: &str = "portcullis,pl-writer";
/// The compatible string of a ZDMA channel.
pub const ZDMA: &str = "xlnx,zynqmp-dma-1.0";
/// The compatible string of the whole chip, in the root node.
pub const ZYNQMP: &str = "xlnx,zynqmp";

const TABLE: &[(&str, Kind)] = &[
    ("arm,mmu-500", Kind::Mmu500),
    ("arm,smmu-v2", Kind::SmmuV2),
    (ZDMA, Kind::Zdma),
    (PL_WRITER, Kind::PlWriter),
];

impl Kind {
    /// What a node with these compatible strings, most specific first, is.
    pub fn of<S: AsRef<str>>(compatible: &[S]) -> Option<Self> {
        compatible.iter().find_map(|c| TABLE.iter().find(|(s, _)| *s == c.as_ref()).map(|(_, kind)| *kind))
    }
    /// True for SMMUs.
    pub fn is_smmu(self) -> bool {
        matches!(self, Self::Mmu500 | Self::SmmuV2)
    }
}
