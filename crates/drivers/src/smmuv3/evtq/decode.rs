//! Event records (IHI 0070 section 7.3) as fields that say whether they exist.

use core::fmt;

use portcullis_arch::smmuv3::event::{BadAtsTreqDw1, PageRequestDw1};
use portcullis_arch::smmuv3::{EventClass, EventCode, EventRecord};
use portcullis_arch::{Access, Iova, Ipa, Pa, StreamId, SubstreamId};

use crate::fault::FaultReason;

/// What the transaction wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wanted {
    /// Read or write.
    pub access: Access,
    /// Privileged.
    pub privileged: bool,
    /// Instruction fetch.
    pub instruction: bool,
}

/// Accesses that a translation request or a hint was about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rights {
    /// Read.
    pub read: bool,
    /// Write.
    pub write: bool,
    /// Execute.
    pub execute: bool,
}

/// The fields that belong to one code only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Extra {
    /// F_BAD_ATS_TREQ: the request.
    AtsRequest {
        /// Smallest translation units.
        span: u8,
        /// Privileged.
        privileged: bool,
        /// What was asked for.
        rights: Rights,
    },
    /// E_PAGE_REQUEST: a hint.
    Hint {
        /// Bytes.
        bytes: u64,
        /// For unprivileged accesses.
        unprivileged: Rights,
        /// For privileged ones.
        privileged: Rights,
    },
    /// F_PERMISSION of a stage 1 table access: what stage 2 forbade.
    TableAccess(Access),
}

/// An event record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The code; `None` for one that the architecture does not define. The number is in `raw`.
    pub code: Option<EventCode>,
    /// The stream.
    pub stream: StreamId,
    /// The substream, if the record says one.
    pub substream: Option<SubstreamId>,
    /// The tag of a transaction that waits for an answer.
    pub stall: Option<u16>,
    /// What the transaction wanted.
    pub wanted: Option<Wanted>,
    /// The stage that faulted, for faults of a stage.
    pub stage: Option<u8>,
    /// What was being translated.
    pub class: Option<EventClass>,
    /// The address as the device sent it.
    pub input: Option<Iova>,
    /// The address that stage 2 was asked for.
    pub ipa: Option<Ipa>,
    /// The address of a fetch that was aborted.
    pub fetch: Option<Pa>,
    /// Implementation defined reason.
    pub reason: Option<u32>,
    /// A fetch was aborted by a granule protection check.
    pub protection_fault: bool,
    /// Fields of one code only.
    pub extra: Option<Extra>,
    /// The four words.
    pub raw: EventRecord,
}

/// What the words of a code hold.
#[derive(Clone, Copy)]
struct Shape {
    code: EventCode,
    reason: FaultReason,
    fields: u16,
}

/// SSV and SubstreamID.
const SUBSTREAM: u16 = 1;
/// SubstreamID without SSV: always there.
const SUBSTREAM_ALWAYS: u16 = 1 << 1;
/// RnW.
const READ: u16 = 1 << 2;
/// PnU and InD.
const KIND: u16 = 1 << 3;
/// Input address.
const INPUT: u16 = 1 << 4;
/// Input address, of a page.
const PAGE: u16 = 1 << 5;
/// S2 and CLASS.
const STAGE: u16 = 1 << 6;
/// IPA, if stage 2.
const IPA: u16 = 1 << 7;
/// Fetch address and GPCF.
const FETCH: u16 = 1 << 8;
/// Reason, 16 bits.
const REASON: u16 = 1 << 9;
/// Reason, 32 bits.
const REASON32: u16 = 1 << 10;
/// Stall and STAG.
const STALL: u16 = 1 << 11;

const TRANSLATION: u16 = SUBSTREAM | READ | KIND | INPUT | STAGE | IPA | STALL;

const SHAPES: [Shape; 19] = [
    shape(EventCode::Uut, FaultReason::Unsupported, SUBSTREAM | READ | KIND | INPUT | REASON),
    shape(EventCode::BadStreamId, FaultReason::UnknownStream, SUBSTREAM),
    shape(EventCode::SteFetch, FaultReason::ExternalAbort, SUBSTREAM | FETCH | REASON),
    shape(EventCode::BadSte, FaultReason::InvalidContext, SUBSTREAM),
    shape(EventCode::BadAtsTreq, FaultReason::Unsupported, SUBSTREAM | PAGE),
    shape(EventCode::StreamDisabled, FaultReason::InvalidContext, 0),
    shape(EventCode::TranslForbidden, FaultReason::Permission, READ | INPUT),
    shape(EventCode::BadSubstreamId, FaultReason::InvalidContext, SUBSTREAM_ALWAYS),
    shape(EventCode::CdFetch, FaultReason::ExternalAbort, SUBSTREAM | FETCH | REASON),
    shape(EventCode::BadCd, FaultReason::InvalidContext, SUBSTREAM),
    shape(
        EventCode::WalkEabt,
        FaultReason::ExternalAbort,
        SUBSTREAM | READ | KIND | INPUT | STAGE | FETCH | REASON,
    ),
    shape(EventCode::Translation, FaultReason::Translation, TRANSLATION),
    shape(EventCode::AddrSize, FaultReason::AddressSize, TRANSLATION),
    shape(EventCode::Access, FaultReason::AccessFlag, TRANSLATION),
    shape(EventCode::Permission, FaultReason::Permission, TRANSLATION),
    shape(
        EventCode::TlbConflict,
        FaultReason::TlbConflict,
        SUBSTREAM | READ | KIND | INPUT | STAGE | IPA | REASON32,
    ),
    shape(EventCode::CfgConflict, FaultReason::StreamConflict, SUBSTREAM | REASON32),
    shape(EventCode::PageRequest, FaultReason::Other, SUBSTREAM | PAGE),
    shape(EventCode::VmsFetch, FaultReason::ExternalAbort, SUBSTREAM | FETCH | REASON),
];

const fn shape(code: EventCode, reason: FaultReason, fields: u16) -> Shape {
    Shape { code, reason, fields }
}

fn shape_of(code: Option<EventCode>) -> Option<&'static Shape> {
    SHAPES.iter().find(|shape| Some(shape.code) == code)
}

impl Record {
    /// From the four words.
    pub fn decode(raw: EventRecord) -> Self {
        let (dw0, dw1) = (raw.dw0(), raw.dw1());
        let code = raw.code();
        let fields = shape_of(code).map_or(0, |shape| shape.fields);
        let has = |field| fields & field != 0;
        let second_stage = dw1.s2();
        let write = has(READ) && !dw1.rnw();
        let class = has(STAGE).then(|| EventClass::from_code(dw1.class())).flatten();
        let page_address = raw.input_addr() & !0xfff;
        let substream = has(SUBSTREAM) && dw0.ssv() || has(SUBSTREAM_ALWAYS);
        Self {
            code,
            stream: StreamId(dw0.sid()),
            substream: substream.then_some(SubstreamId(dw0.ssid())),
            stall: (has(STALL) && dw1.stall()).then_some(dw1.stag()),
            wanted: has(READ).then_some(Wanted {
                access: if write { Access::Write } else { Access::Read },
                privileged: has(KIND) && dw1.pnu(),
                instruction: has(KIND) && dw1.ind(),
            }),
            stage: has(STAGE).then_some(1 + u8::from(second_stage)),
            class,
            input: match (has(INPUT), has(PAGE)) {
                (true, _) => Some(Iova(raw.input_addr())),
                (_, true) => Some(Iova(page_address)),
                _ => None,
            },
            ipa: (has(IPA) && second_stage).then_some(Ipa(raw.ipa())),
            fetch: has(FETCH).then_some(Pa(raw.fetch_addr())),
            reason: match (has(REASON), has(REASON32)) {
                (true, _) => Some(dw1.stag().into()),
                (_, true) => Some(dw1.into_bits() as u32),
                _ => None,
            },
            protection_fault: has(FETCH) && dw1.gpcf(),
            extra: extra(code, class, raw),
            raw,
        }
    }

    /// The code as a number.
    pub fn number(&self) -> u8 {
        self.raw.dw0().code()
    }

    /// Why the transaction was refused.
    pub fn fault_reason(&self) -> FaultReason {
        shape_of(self.code).map_or(FaultReason::Other, |shape| shape.reason)
    }

    /// A fault of a transaction, which a change of tables might cure. The others are errors of configuration.
    pub fn is_page_fault(&self) -> bool {
        matches!(
            self.code,
            Some(EventCode::Translation | EventCode::AddrSize | EventCode::Access | EventCode::Permission)
        )
    }
}

fn extra(code: Option<EventCode>, class: Option<EventClass>, raw: EventRecord) -> Option<Extra> {
    let dw1 = raw.0[1];
    match code? {
        EventCode::BadAtsTreq => {
            let request = BadAtsTreqDw1::from_bits(dw1);
            let rights = Rights { read: request.r(), write: request.w(), execute: request.x() };
            Some(Extra::AtsRequest { span: request.span(), privileged: request.privileged(), rights })
        }
        EventCode::PageRequest => {
            let hint = PageRequestDw1::from_bits(dw1);
            Some(Extra::Hint {
                bytes: u64::from(hint.span()) << 12,
                unprivileged: Rights { read: hint.ur(), write: hint.uw(), execute: hint.ux() },
                privileged: Rights { read: hint.pr(), write: hint.pw(), execute: hint.px() },
            })
        }
        EventCode::Permission if class == Some(EventClass::Tt) => {
            Some(Extra::TableAccess(if raw.dw1().ttrnw() { Access::Read } else { Access::Write }))
        }
        _ => None,
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(f, "{}", code.name())?,
            None => write!(f, "event {:#04x}", self.number())?,
        }
        write!(f, " stream {}", self.stream)?;
        if let Some(substream) = self.substream {
            write!(f, " substream {substream}")?;
        }
        if let Some(Wanted { access, privileged, instruction }) = self.wanted {
            let privilege = if privileged { "privileged" } else { "unprivileged" };
            let kind = if instruction { " instruction" } else { "" };
            write!(f, ", {privilege}{kind} {access}")?;
        }
        if let Some(input) = self.input {
            write!(f, " at {input:#x}")?;
        }
        if let Some(stage) = self.stage {
            write!(f, ", stage {stage}")?;
        }
        match self.class {
            Some(EventClass::Cd) => f.write_str(" of a context descriptor fetch")?,
            Some(EventClass::Tt) => f.write_str(" of a table walk")?,
            Some(EventClass::In) | None => {}
        }
        if let Some(ipa) = self.ipa {
            write!(f, ", ipa {ipa:#x}")?;
        }
        if let Some(fetch) = self.fetch {
            write!(f, ", fetch of {fetch:#x}")?;
        }
        if let Some(stag) = self.stall {
            write!(f, ", stalled with tag {stag:#x}")?;
        }
        if self.code.is_none() {
            let [a, b, c, d] = self.raw.0;
            write!(f, ": {a:#018x} {b:#018x} {c:#018x} {d:#018x}")?;
        }
        Ok(())
    }
}
