//! From a StreamID to its stream table entry (IHI 0070 sections 3.3.1 and 5.1).

use portcullis_arch::Pa;
use portcullis_arch::smmuv3::regs::{StrtabBase, StrtabBaseCfg};
use portcullis_arch::smmuv3::ste::{L1STD_BYTES, STE_BYTES};
use portcullis_arch::smmuv3::{L1Std, Ste};
use portcullis_bus::Memory;

use super::attrs::stream_table;
use super::size::{align, exceeds};
use crate::decision::{Trail, View};

/// Why there is no stream table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoSte {
    /// C_BAD_STREAMID.
    BadStream(&'static str),
    /// F_STE_FETCH, and the address.
    Abort(u64),
}

/// The geometry of a stream table as STRTAB_BASE and STRTAB_BASE_CFG give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Address of the table, or of its first level.
    pub base: u64,
    /// log2 of the number of streams.
    pub log2size: u8,
    /// StreamID bits that the second level resolves; `None` for a linear table.
    pub split: Option<u8>,
}

impl Geometry {
    /// From the registers. The range is capped to what StreamIDs can have, the alignment takes LOG2SIZE as written.
    pub fn new(sid_bits: u8, two_level: bool, base: u64, cfg: u32) -> Self {
        let cfg = StrtabBaseCfg::from_bits(cfg);
        let written = u32::from(cfg.log2size());
        let address = StrtabBase::from_bits(base).addr_55_6() << 6;
        let split = (two_level && cfg.fmt() == 1).then(|| match cfg.split() {
            s @ (8 | 10) => s,
            _ => 6,
        });
        let align_log2 = match split {
            None => written + 6,
            Some(s) => written.saturating_sub(u32::from(s)) + 3,
        };
        Self { base: align(address, align_log2.max(6)), log2size: cfg.log2size().min(sid_bits), split }
    }
}

/// Reads the STE of a stream, and tells its address. A level 1 descriptor is read anew each time, so that one that has just
/// become valid counts.
#[inline]
pub(crate) fn fetch<M: Memory>(
    view: &View<'_, M>,
    sid: u32,
    ste: &mut Ste,
    trail: &mut Trail,
) -> Result<u64, NoSte> {
    let (caps, regs) = (view.caps, &view.regs);
    let sid_bits = caps.stream_bits(regs.secure);
    let table = Geometry::new(sid_bits, caps.two_level_streams, regs.strtab_base, regs.strtab_base_cfg);
    if u64::from(sid) >> table.log2size != 0 {
        return Err(NoSte::BadStream("the StreamID is not below 2^STRTAB_BASE_CFG.LOG2SIZE"));
    }
    let attrs = stream_table(regs.cr1, StrtabBase::from_bits(regs.strtab_base).ra(), regs.secure);
    let load = |at: u64| {
        if exceeds(at, caps.oas_bits) {
            return None;
        }
        view.memory.load64(Pa(at), attrs).ok()
    };
    let at = match table.split {
        None => table.base.wrapping_add(u64::from(sid) * STE_BYTES),
        Some(split) => {
            let at = table.base.wrapping_add(u64::from(sid >> split) * L1STD_BYTES);
            let l1 = load(at).ok_or(NoSte::Abort(at))?;
            trail.l1std = Some((at, l1));
            let l1 = L1Std::from_bits(l1);
            let index = u64::from(sid) & ((1 << split) - 1);
            let rule = match l1.span() {
                0 => Some("L1STD.Span is 0: no streams here"),
                12.. => Some("L1STD.Span is reserved and acts as 0"),
                span if span > split + 1 => Some("L1STD.Span is more than SPLIT + 1"),
                span if index >> (span - 1) != 0 => Some("the StreamID is outside of what L1STD.Span covers"),
                _ => None,
            };
            if let Some(rule) = rule {
                return Err(NoSte::BadStream(rule));
            }
            align(l1.l2ptr_55_6() << 6, 5 + u32::from(l1.span())).wrapping_add(index * STE_BYTES)
        }
    };
    if exceeds(at, caps.oas_bits) || view.memory.load64s(Pa(at), attrs, &mut ste.0).is_err() {
        return Err(NoSte::Abort(at));
    }
    Ok(at)
}
