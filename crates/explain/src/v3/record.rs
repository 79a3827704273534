//! Event records and page requests: every field by name, one sentence, and as Linux prints them (IHI 0070 sections 7.3
//! and 8.1). Four words, or two, are all that is needed.

use std::fmt;

use portcullis_arch::smmuv3::event::{BadAtsTreqDw1, PageRequestDw1};
use portcullis_arch::smmuv3::{EventClass, EventCode, EventRecord, PriRecord};
use portcullis_arch::{Access, Attributes, Iova, StreamId, SubstreamId};
use portcullis_bus::Initiator;
use serde::{Serialize, Serializer};

use crate::line::Field;
use crate::record::access_words;
use crate::words;

/// An event record of an SMMUv3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EventWords(#[serde(serialize_with = "hex_words")] pub [u64; 4]);

/// A page request record of an SMMUv3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PageRequestWords(#[serde(serialize_with = "hex_words")] pub [u64; 2]);

pub(crate) fn hex_words<S: Serializer, const N: usize>(words: &[u64; N], s: S) -> Result<S::Ok, S::Error> {
    s.collect_seq(words.iter().map(|w| format!("{w:#018x}")))
}

/// The parts that a record has besides its code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// StreamID, and a SubstreamID if SSV.
    Ids,
    /// StreamID only.
    Stream,
    /// StreamID and a SubstreamID that is always valid.
    Substream,
    /// F_UUT.
    Upstream,
    /// Reason, GPCF and the address of the fetch.
    Fetch,
    /// F_BAD_ATS_TREQ.
    AtsRequest,
    /// F_TRANSL_FORBIDDEN.
    Translated,
    /// F_WALK_EABT.
    Walk,
    /// Codes 0x10 to 0x13.
    Fault,
    /// F_TLB_CONFLICT.
    TlbConflict,
    /// F_CFG_CONFLICT.
    ConfigConflict,
    /// E_PAGE_REQUEST.
    Hint,
    /// Implementation defined or reserved.
    Unknown,
}

/// What a code means, and what its record holds.
const CODES: &[(EventCode, Layout, &str)] = &[
    (EventCode::Uut, Layout::Upstream, "unsupported upstream transaction"),
    (
        EventCode::BadStreamId,
        Layout::Ids,
        "no stream table entry for the stream (out of range, or its level 1 descriptor does not cover it)",
    ),
    (
        EventCode::SteFetch,
        Layout::Fetch,
        "memory refused the read of the stream table entry or its level 1 descriptor",
    ),
    (EventCode::BadSte, Layout::Ids, "the stream table entry is invalid (V=0) or illegal"),
    (EventCode::BadAtsTreq, Layout::AtsRequest, "ATS translation request refused"),
    (
        EventCode::StreamDisabled,
        Layout::Stream,
        "STE.S1DSS does not allow transactions of this kind (without a substream, or with substream 0)",
    ),
    (EventCode::TranslForbidden, Layout::Translated, "translated (ATS) transaction refused"),
    (
        EventCode::BadSubstreamId,
        Layout::Substream,
        "no context descriptor for the substream (out of range, substreams off, or its level 1 descriptor invalid)",
    ),
    (
        EventCode::CdFetch,
        Layout::Fetch,
        "memory refused the read of the context descriptor or its level 1 descriptor",
    ),
    (EventCode::BadCd, Layout::Ids, "the context descriptor is invalid (V=0) or illegal"),
    (EventCode::WalkEabt, Layout::Walk, "memory refused the read or update of a translation table"),
    (EventCode::Translation, Layout::Fault, "no valid translation for the address"),
    (EventCode::AddrSize, Layout::Fault, "an address is wider than the output size"),
    (EventCode::Access, Layout::Fault, "the access flag is clear"),
    (EventCode::Permission, Layout::Fault, "the translation forbids this access"),
    (EventCode::TlbConflict, Layout::TlbConflict, "the TLB holds two answers"),
    (EventCode::CfgConflict, Layout::ConfigConflict, "the configuration cache holds two answers (STE.CONT)"),
    (EventCode::PageRequest, Layout::Hint, "a page will be wanted soon"),
    (EventCode::VmsFetch, Layout::Fetch, "memory refused the read of the virtual machine structure"),
];

impl EventWords {
    fn record(&self) -> EventRecord {
        EventRecord(self.0)
    }

    /// The code: bits 7:0 of word 0.
    pub fn code(&self) -> u8 {
        self.record().dw0().code()
    }

    /// The architecture's name, such as `F_TRANSLATION`; `None` for codes that it does not define.
    pub fn name(&self) -> Option<&'static str> {
        self.record().code().map(EventCode::name)
    }

    fn known(&self) -> (Layout, &'static str) {
        let code = self.record().code();
        let known = code.and_then(|c| CODES.iter().find(|(of, ..)| *of == c));
        known.map_or((Layout::Unknown, "implementation defined or reserved event"), |(_, l, text)| (*l, text))
    }

    /// The stream.
    pub fn stream(&self) -> StreamId {
        StreamId(self.record().dw0().sid())
    }

    /// The substream, where the record has one.
    pub fn substream(&self) -> Option<SubstreamId> {
        let dw0 = self.record().dw0();
        let valid = match self.known().0 {
            Layout::Substream => true,
            Layout::Stream | Layout::Translated => false,
            _ => dw0.ssv(),
        };
        valid.then(|| SubstreamId(dw0.ssid()))
    }

    /// The input address, where the record has one.
    pub fn address(&self) -> Option<Iova> {
        use Layout::*;
        match self.known().0 {
            Upstream | Translated | Walk | Fault | TlbConflict => Some(Iova(self.0[2])),
            AtsRequest | Hint => Some(Iova(self.0[2] & !0xfff)),
            _ => None,
        }
    }

    fn has_access(&self) -> bool {
        use Layout::*;
        matches!(self.known().0, Upstream | Translated | Walk | Fault | TlbConflict)
    }

    /// Read or write, where the record says it.
    pub fn access(&self) -> Option<Access> {
        let rnw = self.record().dw1().rnw();
        self.has_access().then_some(if rnw { Access::Read } else { Access::Write })
    }

    /// 1 or 2, where the record says it.
    pub fn stage(&self) -> Option<u8> {
        use Layout::*;
        let stage = if self.record().dw1().s2() { 2 } else { 1 };
        matches!(self.known().0, Walk | Fault | TlbConflict).then_some(stage)
    }

    /// The IPA of a stage 2 fault, 4 KiB aligned.
    pub fn ipa(&self) -> Option<u64> {
        let has = matches!(self.known().0, Layout::Fault | Layout::TlbConflict) && self.stage() == Some(2);
        has.then(|| self.record().ipa())
    }

    /// Where the fetch went that memory refused.
    pub fn fetch(&self) -> Option<u64> {
        matches!(self.known().0, Layout::Fetch | Layout::Walk).then(|| self.record().fetch_addr())
    }

    /// The tag of a transaction that waits for RESUME.
    pub fn stall(&self) -> Option<u16> {
        let dw1 = self.record().dw1();
        (self.known().0 == Layout::Fault && dw1.stall()).then(|| dw1.stag())
    }

    /// The transaction, to explain it again; `None` for records without an address. Privilege and instruction bit are
    /// those after the overrides of the STE.
    pub fn transaction(&self) -> Option<(Initiator, Iova, Access)> {
        let dw1 = self.record().dw1();
        let attrs = Attributes::DEVICE_DEFAULT.with_privileged(dw1.pnu()).with_instruction(dw1.ind());
        let from =
            Initiator { substream: self.substream(), ..Initiator::new(self.stream()).with_attrs(attrs) };
        Some((from, self.address()?, self.access()?))
    }

    /// Every field that a record of this code has, by name.
    pub fn fields(&self) -> Vec<Field> {
        let dw1 = self.record().dw1();
        let (layout, _) = self.known();
        let bit = |name, set: bool| Field::new(name, u8::from(set));
        let mut f = vec![
            Field::new("event", self.name().unwrap_or("unknown")),
            Field::hex("code", self.code()),
            Field::hex("SID", self.stream()),
        ];
        if !matches!(layout, Layout::Stream | Layout::Translated | Layout::Substream) {
            f.push(bit("SSV", self.record().dw0().ssv()));
        }
        f.extend(self.substream().map(|s| Field::hex("SSID", s)));
        let access = [bit("PnU", dw1.pnu()), bit("InD", dw1.ind()), bit("RnW", dw1.rnw())];
        let class = || {
            let name = match EventClass::from_code(dw1.class()) {
                Some(EventClass::Cd) => "CD",
                Some(EventClass::Tt) => "TT",
                Some(EventClass::In) => "IN",
                None => "reserved",
            };
            [bit("NSIPA", dw1.nsipa()), bit("S2", dw1.s2()), Field::new("CLASS", name)]
        };
        let reason = Field::hex("Reason", self.0[1] as u16);
        match layout {
            Layout::Upstream => {
                f.push(reason);
                f.extend(access);
            }
            Layout::Fetch => f.extend([reason, bit("GPCF", dw1.gpcf())]),
            Layout::AtsRequest => {
                let d = BadAtsTreqDw1::from_bits(self.0[1]);
                f.push(Field::new("Span", d.span()));
                f.extend([bit("Priv", d.privileged()), bit("X", d.x()), bit("W", d.w()), bit("R", d.r())]);
            }
            Layout::Translated => f.push(bit("RnW", dw1.rnw())),
            Layout::Walk => {
                f.extend([reason, bit("GPCF", dw1.gpcf())]);
                f.extend(access);
                f.extend(class());
            }
            Layout::Fault => {
                f.push(bit("Stall", dw1.stall()));
                f.push(Field::hex("STAG", dw1.stag()));
                f.extend(access);
                f.extend(class());
                if self.record().code() == Some(EventCode::Permission) {
                    f.push(bit("TTRnW", dw1.ttrnw()));
                    let newer = [bit("DirtyBit", dw1.dirty_bit()), bit("AssuredOnly", dw1.assured_only())];
                    f.extend(newer);
                    f.push(bit("Overlay", dw1.overlay()));
                }
            }
            Layout::TlbConflict => {
                f.push(Field::hex("Reason", self.0[1] as u32));
                f.extend(access);
                f.extend(class());
            }
            Layout::ConfigConflict => f.push(Field::hex("Reason", self.0[1] as u32)),
            Layout::Hint => {
                let d = PageRequestDw1::from_bits(self.0[1]);
                f.extend([bit("uX", d.ux()), bit("uW", d.uw()), bit("uR", d.ur())]);
                f.extend([bit("pX", d.px()), bit("pW", d.pw()), bit("pR", d.pr())]);
                f.push(Field::new("Span", d.span()));
            }
            Layout::Ids | Layout::Stream | Layout::Substream | Layout::Unknown => {}
        }
        f.extend(self.address().map(|a| Field::hex("InputAddr", a)));
        f.extend(self.ipa().map(|a| Field::hex("IPA", a)));
        f.extend(self.fetch().map(|a| Field::hex("FetchAddr", a)));
        f
    }

    /// What is printed by Linux up to 6.12 (`arm_smmu_evtq_thread`) for an SMMU named like `9050000.smmuv3`.
    pub fn linux_lines(&self, device: &str) -> [String; 5] {
        let [a, b, c, d] = self.0.map(|w| format!("arm-smmu-v3 {device}: \t{w:#018x}"));
        [format!("arm-smmu-v3 {device}: event 0x{:02x} received:", self.code()), a, b, c, d]
    }

    /// What newer kernels print besides (`arm_smmu_dump_event`); `client` is the device's name.
    pub fn decoded_lines(&self, device: &str, client: &str) -> Vec<String> {
        let dw1 = self.record().dw1();
        let Some(name) = self.name() else { return Vec::new() };
        let ssid = self.substream().map_or(0, |s| s.get());
        let head = format!(
            "arm-smmu-v3 {device}: event: {name} client: {client} sid: {} ssid: {}",
            alternate(u64::from(self.stream().get())),
            alternate(u64::from(ssid))
        );
        match self.known().0 {
            Layout::Fault => {
                let class = match EventClass::from_code(dw1.class()) {
                    Some(EventClass::Cd) => "CD fetch",
                    Some(EventClass::Tt) => "Stage 1 translation table fetch",
                    Some(EventClass::In) => "Input address caused fault",
                    None => "Reserved",
                };
                let table = self.record().code() == Some(EventCode::Permission) && dw1.class() == 1;
                let table = match (table, dw1.ttrnw()) {
                    (false, _) => "",
                    (true, true) => " ttd_read",
                    (true, false) => " ttd_write",
                };
                vec![
                    format!(
                        "{head} iova: {} ipa: {}",
                        alternate(self.0[2]),
                        alternate(self.ipa().unwrap_or(0))
                    ),
                    format!(
                        "arm-smmu-v3 {device}: {} {} {} {} \"{class}\"{table}{} stag: {}",
                        if dw1.pnu() { "priv" } else { "unpriv" },
                        if dw1.ind() { "inst" } else { "data" },
                        if dw1.rnw() { "read" } else { "write" },
                        if dw1.s2() { "s2" } else { "s1" },
                        if dw1.stall() { " stall" } else { "" },
                        alternate(u64::from(dw1.stag()))
                    ),
                ]
            }
            Layout::Fetch => vec![format!("{head} fetch_addr: {}", alternate(self.record().fetch_addr()))],
            _ => vec![head],
        }
    }
}

/// C's `%#x`: zero has no prefix.
fn alternate(value: u64) -> String {
    if value == 0 { "0".into() } else { format!("{value:#x}") }
}

/// One sentence.
impl fmt::Display for EventWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dw1 = self.record().dw1();
        let (layout, meaning) = self.known();
        match self.name() {
            Some(name) => write!(f, "{name}: {meaning}")?,
            None => write!(f, "event {:#04x}: {meaning}", self.code())?,
        }
        match (layout, self.address()) {
            (Layout::AtsRequest, Some(address)) => {
                let d = BadAtsTreqDw1::from_bits(self.0[1]);
                let wanted = [(d.r(), "read"), (d.w(), "write"), (d.x(), "execute")];
                let wanted: Vec<&str> =
                    wanted.into_iter().filter_map(|(set, name)| set.then_some(name)).collect();
                write!(f, ", for {} of {address:#x}", words::list(&wanted))?;
            }
            (Layout::Hint, Some(address)) => {
                write!(f, ": {} pages at {address:#x}", PageRequestDw1::from_bits(self.0[1]).span())?
            }
            (Layout::Translated, Some(address)) => {
                let access = if dw1.rnw() { "read" } else { "write" };
                write!(f, ", a {access} of {address:#x}")?;
            }
            (_, Some(address)) => {
                write!(f, ", on {} of {address:#x}", access_words(!dw1.rnw(), dw1.pnu(), dw1.ind()))?;
            }
            _ => {}
        }
        let by = if self.address().is_some() { " by" } else { ";" };
        write!(f, "{by} stream {:#x}", self.stream())?;
        if let Some(s) = self.substream() {
            write!(f, " substream {s:#x}")?;
        }
        if let Some(stage) = self.stage() {
            write!(f, "; stage {stage}")?;
            if stage == 2 {
                f.write_str(match EventClass::from_code(dw1.class()) {
                    Some(EventClass::Cd) => ", while a context descriptor was fetched",
                    Some(EventClass::Tt) => ", while a stage 1 table was fetched",
                    _ => "",
                })?;
            }
            if layout == Layout::Fault
                && dw1.class() == EventClass::Tt as u8
                && self.code() == EventCode::Permission as u8
                && !dw1.ttrnw()
            {
                f.write_str(" and was to be updated")?;
            }
        }
        if let Some(ipa) = self.ipa() {
            write!(f, ", IPA {ipa:#x}")?;
        }
        if let Some(fetch) = self.fetch() {
            write!(f, "; the fetch went to {fetch:#x}")?;
            if dw1.gpcf() {
                f.write_str(" (granule protection fault)")?;
            }
        }
        match self.stall() {
            Some(stag) => write!(f, "; it is stalled with STAG {stag:#x} and waits for CMD_RESUME"),
            None => Ok(()),
        }
    }
}

impl PageRequestWords {
    fn record(&self) -> PriRecord {
        PriRecord(self.0)
    }

    /// The stream.
    pub fn stream(&self) -> StreamId {
        StreamId(self.record().dw0().sid())
    }

    /// The substream (PASID).
    pub fn substream(&self) -> Option<SubstreamId> {
        let dw0 = self.record().dw0();
        dw0.ssv().then(|| SubstreamId(dw0.ssid()))
    }

    /// The page.
    pub fn address(&self) -> Iova {
        Iova(self.record().dw1().addr_63_12() << 12)
    }

    /// True for a stop marker: the device no longer uses the PASID, and wants no page.
    pub fn is_stop_marker(&self) -> bool {
        let d = self.record().dw0();
        d.ssv() && d.last() && !d.r() && !d.w()
    }

    /// The fields by name.
    pub fn fields(&self) -> Vec<Field> {
        let d = self.record().dw0();
        let bit = |name, set: bool| Field::new(name, u8::from(set));
        let mut f = vec![Field::hex("SID", self.stream()), bit("SSV", d.ssv())];
        f.extend(self.substream().map(|s| Field::hex("SSID", s)));
        f.extend([
            bit("Priv", d.privileged()),
            bit("X", d.x()),
            bit("R", d.r()),
            bit("W", d.w()),
            bit("Last", d.last()),
        ]);
        f.push(Field::hex("PRGIndex", self.record().dw1().prg_index()));
        f.push(Field::hex("Addr", self.address()));
        f
    }

    /// Linux's two lines (`arm_smmu_handle_ppr`).
    pub fn linux_lines(&self, device: &str) -> [String; 2] {
        let (d, e) = (self.record().dw0(), self.record().dw1());
        let set = |set: bool, name: &'static str| if set { name } else { "" };
        [
            format!("arm-smmu-v3 {device}: unexpected PRI request received:"),
            format!(
                "arm-smmu-v3 {device}: \tsid 0x{:08x}.0x{:05x}: [{}{}] {}privileged {}{}{} access at iova {:#018x}",
                d.sid(),
                if d.ssv() { d.ssid() } else { 0 },
                e.prg_index(),
                set(d.last(), "L"),
                set(!d.privileged(), "un"),
                set(d.r(), "R"),
                set(d.w(), "W"),
                set(d.x(), "X"),
                self.address()
            ),
        ]
    }
}

/// One sentence.
impl fmt::Display for PageRequestWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = self.record().dw0();
        let who = match self.substream() {
            Some(s) => format!("stream {:#x} substream {s:#x}", self.stream()),
            None => format!("stream {:#x}", self.stream()),
        };
        if self.is_stop_marker() {
            return write!(f, "stop marker: {who} no longer uses this PASID");
        }
        let wanted = [(d.r(), "read"), (d.w(), "write"), (d.x(), "execute")];
        let wanted: Vec<&str> = wanted.into_iter().filter_map(|(set, name)| set.then_some(name)).collect();
        let privilege = if d.privileged() { "privileged" } else { "unprivileged" };
        let wanted = if wanted.is_empty() { "nothing".into() } else { words::list(&wanted) };
        write!(
            f,
            "page request: {who} wants to {wanted} ({privilege}) at {:#x}, group {}",
            self.address(),
            self.record().dw1().prg_index()
        )?;
        if d.last() { f.write_str(", the last of its group: it waits for CMD_PRI_RESP") } else { Ok(()) }
    }
}
