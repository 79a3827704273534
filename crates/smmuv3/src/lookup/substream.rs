//! From an STE and a SubstreamID to a context descriptor (IHI 0070 sections 3.3.2 and 5.3).

use portcullis_arch::smmuv3::cd::{CD_BYTES, L1CD_BYTES};
use portcullis_arch::smmuv3::{Cd, EventCode, L1Cd, Ste};
use portcullis_arch::{Attributes, MemoryType, Pa};
use portcullis_bus::Memory;
use portcullis_walk::stage::combine;
use portcullis_walk::{Fault, FaultKind, Recorder, Stage2};

use super::attrs::cd_table;
use super::size::{align, exceeds};
use crate::decision::{Trail, View};

/// The context that a transaction uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The CD of this index.
    Cd(u32),
    /// None: stage 1 is off, or S1DSS bypasses it.
    NoStage1,
    /// C_BAD_SUBSTREAMID.
    Bad(&'static str),
    /// F_STREAM_DISABLED.
    Disabled(&'static str),
}

/// S1CDMax as far as it counts.
fn log2_cds(ssid_bits: u8, ste: &Ste) -> u8 {
    if ssid_bits == 0 { 0 } else { ste.dw0().s1cdmax() }
}

/// Picks the CD for a transaction with or without a SubstreamID. For a legal STE that does not abort.
pub(crate) fn choose(ssid_bits: u8, ste: &Ste, ssid: Option<u32>) -> Choice {
    const BYPASS: u8 = 1;
    const CD_0: u8 = 2;
    let log2 = log2_cds(ssid_bits, ste);
    let s1dss = ste.dw1().s1dss();
    match ssid {
        Some(_) if !ste.config().stage1() => Choice::Bad("a SubstreamID, but STE.Config has stage 1 off"),
        None if !ste.config().stage1() => Choice::NoStage1,
        Some(_) if ssid_bits == 0 => Choice::Bad("a SubstreamID, but IDR1.SSIDSIZE = 0"),
        Some(_) if log2 == 0 => Choice::Bad("a SubstreamID, but STE.S1CDMax = 0"),
        Some(n) if u64::from(n) >> log2 != 0 => Choice::Bad("the SubstreamID is not below 2^STE.S1CDMax"),
        Some(0) if s1dss == CD_0 => {
            Choice::Disabled("SubstreamID 0, but STE.S1DSS = 2 gives CD 0 to those without")
        }
        Some(n) => Choice::Cd(n),
        None if log2 == 0 || s1dss == CD_0 => Choice::Cd(0),
        None if s1dss == BYPASS => Choice::NoStage1,
        None => Choice::Disabled("no SubstreamID, and STE.S1DSS terminates such"),
    }
}

/// Why there is no CD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoCd {
    /// C_BAD_SUBSTREAMID.
    BadSubstream(&'static str),
    /// F_CD_FETCH, and the address.
    Abort(u64),
    /// Stage 2 refused the address.
    Stage2(Fault),
}

impl NoCd {
    /// The event of a stage 2 fault of this kind.
    pub fn code_of(kind: FaultKind) -> EventCode {
        match kind {
            FaultKind::Translation => EventCode::Translation,
            FaultKind::AddressSize => EventCode::AddrSize,
            FaultKind::AccessFlag => EventCode::Access,
            FaultKind::Permission => EventCode::Permission,
            FaultKind::External => EventCode::WalkEabt,
        }
    }
}

/// Reads CD number `index`, through stage 2 if there is one, and tells its address in memory.
#[inline]
pub(crate) fn fetch<M: Memory, R: Recorder>(
    view: &View<'_, M>,
    ste: &Ste,
    (stage2, index): (Option<&Stage2>, u32),
    cd: &mut Cd,
    recorder: &mut R,
    trail: &mut Trail,
) -> Result<u64, NoCd> {
    let d = ste.dw0();
    let attrs = cd_table(ste.dw1(), view.regs.secure);
    let mut place = |at: u64| -> Result<(u64, Attributes), NoCd> {
        let Some(stage2) = stage2 else { return Ok((at, attrs)) };
        let (pa, by_stage2, _) =
            stage2.translate_ipa(view.memory, at, false, view.updates, recorder).map_err(NoCd::Stage2)?;
        let combined = combine(attrs, by_stage2);
        let walk = if combined.memory().is_device() && view.caps.ptwnnc {
            combined.with_memory(MemoryType::NORMAL_NC).consistent()
        } else {
            combined
        };
        Ok((pa.get(), walk))
    };
    let load = |(at, attrs): (u64, Attributes)| {
        if exceeds(at, view.caps.oas_bits) {
            return None;
        }
        view.memory.load64(Pa(at), attrs).ok()
    };
    let log2 = log2_cds(view.caps.ssid_bits, ste);
    let leaf_log2 = match d.s1fmt() {
        1 if log2 != 0 => Some(6u8),
        2 if log2 != 0 => Some(10),
        _ => None,
    };
    let base = ste.s1_context_ptr();
    let at = match leaf_log2 {
        None => align(base, 6 + u32::from(log2)).wrapping_add(u64::from(index) * CD_BYTES),
        Some(leaf_log2) => {
            let descriptors_log2 = log2.saturating_sub(leaf_log2);
            let at = align(base, u32::from(descriptors_log2 + 3).max(6))
                .wrapping_add(u64::from(index >> leaf_log2) * L1CD_BYTES);
            let placed = place(at)?;
            let l1 = load(placed).ok_or(NoCd::Abort(placed.0))?;
            trail.l1cd = Some((placed.0, l1));
            let l1 = L1Cd::from_bits(l1);
            if !l1.v() {
                return Err(NoCd::BadSubstream("L1CD.V = 0"));
            }
            let leaf = align(l1.l2ptr_55_12() << 12, 6 + u32::from(leaf_log2));
            if stage2.is_none() && exceeds(leaf, view.caps.oas_bits) {
                return Err(NoCd::BadSubstream("L1CD.L2Ptr is above OAS"));
            }
            leaf.wrapping_add(u64::from(index & ((1 << leaf_log2) - 1)) * CD_BYTES)
        }
    };
    // 64 aligned bytes never cross a page.
    let (pa, attrs) = place(at)?;
    if exceeds(pa, view.caps.oas_bits) || view.memory.load64s(Pa(pa), attrs, &mut cd.0).is_err() {
        return Err(NoCd::Abort(pa));
    }
    Ok(pa)
}
