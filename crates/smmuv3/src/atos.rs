//! Address translation operations: GATOS_CTRL, SID, ADDR and PAR (IHI 0070 chapter 9 and sections 6.3.37 to 6.3.40).
//!
//! An operation runs when GATOS_CTRL.RUN is written and is over before the write returns. It records no events, never
//! stalls, and takes its privilege and instruction/data from GATOS_ADDR, whatever the STE overrides.

#[cfg(test)]
mod tests;

use portcullis_arch::attrs::Allocate;
use portcullis_arch::smmuv3::EventCode;
use portcullis_arch::smmuv3::regs::{GatosAddr, GatosSid};
use portcullis_arch::{Access, Attributes, StreamId, SubstreamId};
use portcullis_bus::{Initiator, Memory};
use portcullis_walk::{AccessKind, Context, Fault, FaultKind, NoRecord, Updates};

use crate::caps::Caps;
use crate::decision::{ConfigFault, Decision, Trail, View};
use crate::event::code_of;
use crate::lookup::{size, stages, ste, stream_entry, without_stage1};
use crate::model::SmmuV3;
use crate::state::Regs;

/// GATOS_ADDR.TYPE.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Stage1,
    Stage2,
    Both,
}

/// FAULTCODEs that are no events.
const INV_REQ: u8 = 0xff;
const INV_STAGE: u8 = 0xfe;
const INTERNAL_ERR: u8 = 0xfd;

/// PAR.REASON.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reason {
    /// Stage 1, or no stage at all.
    Other = 0,
    /// Stage 2 of a CD fetch.
    Cd = 1,
    /// Stage 2 of a stage 1 table.
    Table = 2,
    /// Stage 2 of the address.
    Input = 3,
}

/// Why an operation failed.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Failure {
    code: u8,
    reason: Reason,
    /// The IPA that stage 2 refused, where PAR shows it.
    ipa: u64,
}

impl Failure {
    const fn of(code: u8) -> Self {
        Self { code, reason: Reason::Other, ipa: 0 }
    }

    /// PAR with FAULT = 1.
    fn par(self) -> u64 {
        1 | (self.reason as u64) << 1 | u64::from(self.code) << 4 | self.ipa & 0x00ff_ffff_ffff_f000
    }
}

impl From<EventCode> for Failure {
    fn from(code: EventCode) -> Self {
        Self::of(code as u8)
    }
}

impl<M: Memory> SmmuV3<M> {
    /// The result of the operation that the registers of interface `side` describe, as PAR.
    pub(crate) fn operation(&self, regs: &Regs, side: usize) -> u64 {
        let Some(i) = regs.side.get(side) else { return Failure::of(INTERNAL_ERR).par() };
        let (sid, addr) = (GatosSid::from_bits(i.gatos_sid), GatosAddr::from_bits(i.gatos_addr));
        // The secure interface may ask about streams of either security state.
        let secure = side == 1 && sid.ssec();
        let table_regs = regs.table_regs(&self.caps, secure);
        let updates = if addr.httui() { Updates::Pretend } else { Updates::Apply };
        let view = View { updates, overrides: false, ..View::new(&self.caps, table_regs, &self.memory) };
        match operate(&view, sid, addr) {
            Ok(found) => found.par(side == 1),
            Err(failure) => failure.par(),
        }
    }
}

/// A translation that succeeded.
struct Found {
    address: u64,
    size_log2: u8,
    attrs: Attributes,
}

impl Found {
    /// PAR with FAULT = 0. The lowest set bit N of a large block's address says that it has 2^(N + 1) bytes.
    fn par(&self, shows_ns: bool) -> u64 {
        let a = self.attrs;
        let large = self.size_log2 > 12;
        let log2 = self.size_log2.clamp(12, 55);
        let block = self.address & !((1 << log2) - 1);
        let size = if large { 1 << (log2 - 1) | 1 << 11 } else { 0 };
        (block | size) & 0x00ff_ffff_ffff_f800
            | u64::from(mair_byte(a)) << 56
            | (a.shareability() as u64) << 8
            | u64::from(shows_ns && a.non_secure()) << 10
    }
}

fn operate<M: Memory>(view: &View<'_, M>, sid: GatosSid, addr: GatosAddr) -> Result<Found, Failure> {
    let (caps, regs) = (view.caps, &view.regs);
    let kind = asked(caps, sid, addr).ok_or(Failure::of(INV_REQ))?;
    if !regs.cr0.smmuen() {
        // Only a secure operation on a non-secure stream gets here.
        return Err(Failure::of(INTERNAL_ERR));
    }
    let access = if addr.rnw() { Access::Read } else { Access::Write };
    let attrs = Attributes::DEVICE_DEFAULT
        .with_privileged(addr.pnu())
        .with_instruction(addr.ind() && addr.rnw())
        .with_non_secure(!regs.secure || addr.ns() & 1 != 0);
    let from = Initiator {
        stream: StreamId(sid.streamid()),
        substream: sid.ssid_valid().then_some(SubstreamId(sid.substreamid())),
        attrs,
    };
    let va = addr.addr_63_12() << 12;
    let trail = &mut Trail::default();
    let ste = stream_entry(view, &from, trail).map_err(|f| Failure::from(f.code))?;
    let (s1, s2) = (ste.config().stage1(), ste.config().stage2());
    let suits = match kind {
        Kind::Stage1 => s1,
        Kind::Stage2 => s2,
        Kind::Both => s1 && s2,
    };
    if !suits {
        return Err(Failure::of(INV_STAGE));
    }
    let decision = if kind == Kind::Stage2 {
        without_stage1(view, &ste, Some(ste::stage2(caps, &ste)), attrs, trail)
    } else {
        stages(view, &from, &ste, access, &mut NoRecord, trail)
    };
    match decision {
        Decision::Translate(context) => walk(view, &context, kind, va, access),
        // S1DSS skips the only stage.
        Decision::Bypass { limit_bits, .. } if size::exceeds(va, limit_bits) => {
            Err(EventCode::AddrSize.into())
        }
        Decision::Bypass { attrs, .. } => Ok(Found { address: va, size_log2: 12, attrs }),
        Decision::Fault(fault) => Err(of_config(&fault, kind)),
        Decision::Silent(_) => Err(Failure::of(INV_STAGE)),
    }
}

/// The operation, if this SMMU has the stages for it.
fn asked(caps: &Caps, sid: GatosSid, addr: GatosAddr) -> Option<Kind> {
    match addr.kind() {
        1 if caps.stage1 => Some(Kind::Stage1),
        2 if caps.stage2 && !sid.ssid_valid() => Some(Kind::Stage2),
        3 if caps.stage1 && caps.stage2 => Some(Kind::Both),
        _ => None,
    }
}

/// A stage 2 fault of a CD fetch shows itself only to operations that ask about stage 2.
fn of_config(fault: &ConfigFault, kind: Kind) -> Failure {
    match &fault.stage2 {
        None => fault.code.into(),
        Some(_) if kind == Kind::Stage1 => EventCode::CdFetch.into(),
        Some(why) => Failure { code: code_of(why.kind) as u8, reason: Reason::Cd, ipa: shown_ipa(why) },
    }
}

/// The IPA of a stage 2 fault that is not an abort.
fn shown_ipa(fault: &Fault) -> u64 {
    if fault.kind == FaultKind::External { 0 } else { fault.ipa }
}

fn of_walk(fault: &Fault, kind: Kind) -> Failure {
    let code = code_of(fault.kind) as u8;
    match (fault.stage, kind) {
        (1, _) => Failure::of(code),
        (_, Kind::Stage1) => EventCode::WalkEabt.into(),
        (_, Kind::Stage2) => Failure { code, reason: Reason::Input, ipa: 0 },
        (_, Kind::Both) => {
            let reason = if fault.on_stage1_walk { Reason::Table } else { Reason::Input };
            Failure { code, reason, ipa: shown_ipa(fault) }
        }
    }
}

fn walk<M: Memory>(
    view: &View<'_, M>,
    context: &Context,
    kind: Kind,
    va: u64,
    access: Access,
) -> Result<Found, Failure> {
    let (memory, updates) = (view.memory, view.updates);
    let input = va & context.va_mask;
    let wanted = AccessKind::new(access, context.incoming);
    let stages = &context.stages;
    let walked = if kind == Kind::Stage1 {
        stages.translate_stage1(memory, input, wanted, updates, &mut NoRecord)
    } else {
        stages.translate(memory, input, wanted, updates, &mut NoRecord)
    };
    let walked = walked.map_err(|f| of_walk(&f, kind))?;
    Ok(Found { address: walked.pa, size_log2: walked.size_log2, attrs: walked.attrs.consistent() })
}

/// Half of a MAIR byte for one cacheability (1 NC, 2 WT, 3 WB) with its hints.
fn mair_nibble(cache: u8, a: Attributes) -> u8 {
    let hint = |h: Allocate| u8::from(h != Allocate::No);
    let hints = hint(a.read_allocate()) << 1 | hint(a.write_allocate());
    match cache {
        1 => 0b0100,
        2 => 0b1000 | hints,
        _ => 0b1100 | hints,
    }
}

/// Attributes as a byte of MAIR.
fn mair_byte(a: Attributes) -> u8 {
    let code = a.memory().code();
    if a.memory().is_device() {
        return code << 2;
    }
    mair_nibble(code >> 2, a) << 4 | mair_nibble(code & 3, a)
}
