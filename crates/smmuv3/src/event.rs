//! From a fault to its event record and to what becomes of the transaction (IHI 0070 sections 5.5 and 7.3).

use portcullis_arch::smmuv3::event::{BadAtsTreqDw1, EventDw0, EventDw1};
use portcullis_arch::smmuv3::{EventClass, EventCode, EventRecord};
use portcullis_arch::{Access, Attributes};
use portcullis_bus::Initiator;
use portcullis_walk::{Fault, FaultKind};

use crate::decision::{ConfigFault, FaultFlags};

/// The transaction that a record describes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Client<'a> {
    pub from: &'a Initiator,
    pub va: u64,
    pub access: Access,
    /// Privileged, after the STE's overrides.
    pub privileged: bool,
    /// Instruction fetch, after the STE's overrides.
    pub instruction: bool,
}

impl<'a> Client<'a> {
    /// A transaction whose attributes after overrides are known.
    pub fn new(from: &'a Initiator, va: u64, access: Access, attrs: Attributes) -> Self {
        Self { from, va, access, privileged: attrs.privileged(), instruction: attrs.instruction() }
    }

    fn ssid(&self) -> Option<u32> {
        self.from.substream.map(|s| s.get())
    }

    fn dw1(&self) -> EventDw1 {
        EventDw1::new()
            .with_pnu(self.privileged)
            .with_ind(self.instruction && self.access == Access::Read)
            .with_rnw(self.access == Access::Read)
    }
}

/// How a faulting transaction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// Error response.
    Abort,
    /// Reads give zero, writes are ignored.
    ZeroIgnore,
    /// It waits for software.
    Stall,
}

/// A fault judged: its record, whether that is written, and how the transaction ends. The record of a stall has yet to
/// get its STAG ([`stalled`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judged {
    pub record: EventRecord,
    pub recorded: bool,
    pub ending: Ending,
    /// STE.MEV: the record may be merged with one that says the same.
    pub merge: bool,
}

/// Bits of the input address that merging does not look at, for events of a page.
const IN_PAGE: u64 = 0xfff;

/// True if two records of streams that allow it may be one (section 7.3.1): stalls never, others if they say the same,
/// where an event of an input address is of its page.
pub(crate) fn same(a: &EventRecord, b: &EventRecord) -> bool {
    use EventCode::{Access, AddrSize, Permission, TlbConflict, TranslForbidden, Translation, WalkEabt};
    let paged = matches!(
        a.code(),
        Some(Access | AddrSize | Permission | TlbConflict | TranslForbidden | Translation | WalkEabt)
    );
    // Of other records this bit is part of what they say, and no other record has it set.
    let stalled = paged && a.dw1().stall();
    let (EventRecord([a0, a1, a2, a3]), EventRecord([b0, b1, b2, b3])) = (a, b);
    let ignored = if paged { IN_PAGE } else { 0 };
    !stalled && (a0, a1, a3) == (b0, b1, b3) && (a2 ^ b2) & !ignored == 0
}

fn dw0(code: EventCode, sid: u32, ssid: Option<u32>) -> u64 {
    let d = EventDw0::new().with_code(code as u8).with_sid(sid);
    match ssid {
        Some(ssid) => d.with_ssv(true).with_ssid(ssid & 0xf_ffff).into_bits(),
        None => d.into_bits(),
    }
}

const IPA: u64 = 0x00ff_ffff_ffff_f000;
const FETCH: u64 = 0x00ff_ffff_ffff_fff8;

/// The code of a walk's fault.
pub(crate) const fn code_of(kind: FaultKind) -> EventCode {
    match kind {
        FaultKind::Translation => EventCode::Translation,
        FaultKind::AddressSize => EventCode::AddrSize,
        FaultKind::AccessFlag => EventCode::Access,
        FaultKind::Permission => EventCode::Permission,
        FaultKind::External => EventCode::WalkEabt,
    }
}

/// The record of a fault in translation tables; `cd` if a CD fetch was being translated.
pub(crate) fn walk_record(client: &Client<'_>, fault: &Fault, cd: bool) -> EventRecord {
    let code = code_of(fault.kind);
    let (stage2, external) = (fault.stage == 2, fault.kind == FaultKind::External);
    let class = match (stage2, external) {
        (true, _) if cd => EventClass::Cd,
        (true, _) if fault.on_stage1_walk => EventClass::Tt,
        (false, true) => EventClass::Tt,
        _ => EventClass::In,
    };
    let dw1 = client.dw1().with_s2(stage2).with_class(class as u8);
    // TTRnW says something where the access to a table was refused: 1 for a read.
    let table = code == EventCode::Permission && class == EventClass::Tt;
    let dw1 = dw1.with_ttrnw(table && !fault.write);
    let dw3 = match (external, stage2) {
        (true, _) => fault.fetch & FETCH,
        (false, true) => fault.ipa & IPA,
        (false, false) => 0,
    };
    let dw0 = dw0(code, client.from.stream.get(), client.ssid());
    EventRecord([dw0, dw1.into_bits(), client.va, dw3])
}

/// Judges a fault of a walk. `flags` come from the CD and STE.
pub(crate) fn walk_fault(client: &Client<'_>, fault: &Fault, flags: FaultFlags, cd: bool) -> Judged {
    let record = walk_record(client, fault, cd);
    let merge = flags.merge();
    let always = Judged { record, recorded: true, ending: Ending::Abort, merge };
    if fault.kind == FaultKind::External || (fault.stage == 1 && flags.flat()) {
        return always;
    }
    let (abort, recorded, stall) = if fault.stage == 2 {
        (true, flags.s2_record(), flags.s2_stall())
    } else {
        (flags.s1_abort(), flags.s1_record(), flags.s1_stall())
    };
    let ending = match (stall, abort) {
        (true, _) => Ending::Stall,
        (false, true) => Ending::Abort,
        (false, false) => Ending::ZeroIgnore,
    };
    Judged { record, recorded: recorded || stall, ending, merge }
}

/// An address of a transaction that is not translated and does not fit.
pub(crate) fn out_of_range(client: &Client<'_>) -> EventRecord {
    walk_record(client, &Fault::new(FaultKind::AddressSize, 1, 0), false)
}

/// The record of a configuration error that has no stage 2 fault in it.
pub(crate) fn config_record(client: &Client<'_>, fault: &ConfigFault) -> EventRecord {
    let sid = client.from.stream.get();
    match fault.code {
        EventCode::BadSubstreamId => {
            // The SubstreamID is always valid here, so there is no SSV.
            let d = EventDw0::new().with_code(fault.code as u8).with_sid(sid);
            EventRecord([d.with_ssid(fault.ssid.unwrap_or(0) & 0xf_ffff).into_bits(), 0, 0, 0])
        }
        EventCode::SteFetch | EventCode::CdFetch | EventCode::VmsFetch => {
            EventRecord([dw0(fault.code, sid, fault.ssid), 0, 0, fault.fetch & FETCH])
        }
        EventCode::Permission => walk_record(client, &Fault::new(FaultKind::Permission, 1, 0), false),
        code => EventRecord([dw0(code, sid, fault.ssid), 0, 0, 0]),
    }
}

/// Judges a fault found before translation. `record_bad_streams` is CR2.RECINVSID.
pub(crate) fn config_fault(
    from: &Initiator,
    va: u64,
    access: Access,
    fault: &ConfigFault,
    record_bad_streams: bool,
) -> Judged {
    let (privileged, instruction) = (fault.flags.privileged(), fault.flags.instruction());
    let client = Client { from, va, access, privileged, instruction };
    match &fault.stage2 {
        Some(stage2) => walk_fault(&client, stage2, fault.flags, true),
        None => Judged {
            record: config_record(&client, fault),
            recorded: fault.code != EventCode::BadStreamId || record_bad_streams,
            ending: Ending::Abort,
            merge: fault.flags.merge(),
        },
    }
}

/// The record of a stalled transaction.
pub(crate) fn stalled(record: EventRecord, stag: u16) -> EventRecord {
    let EventRecord([a, b, c, d]) = record;
    let dw1 = EventDw1::from_bits(b).with_stag(stag).with_stall(true);
    EventRecord([a, dw1.into_bits(), c, d])
}

/// F_TRANSL_FORBIDDEN: a translated transaction is refused.
pub(crate) fn translated_forbidden(from: &Initiator, address: u64, access: Access) -> EventRecord {
    let dw1 = EventDw1::new().with_rnw(access == Access::Read);
    EventRecord([dw0(EventCode::TranslForbidden, from.stream.get(), None), dw1.into_bits(), address, 0])
}

/// F_BAD_ATS_TREQ: an ATS translation request is refused. The permissions are the request's own; reading is always
/// asked for on PCIe.
pub(crate) fn bad_ats_request(from: &Initiator, address: u64, write: bool) -> EventRecord {
    let substream = from.substream.map(|s| s.get());
    let dw1 = BadAtsTreqDw1::new()
        .with_span(1)
        .with_privileged(substream.is_some() && from.attrs.privileged())
        .with_x(substream.is_some() && from.attrs.instruction())
        .with_w(write)
        .with_r(true);
    let dw0 = dw0(EventCode::BadAtsTreq, from.stream.get(), substream);
    EventRecord([dw0, dw1.into_bits(), address & !0xfff, 0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_arch::{StreamId, SubstreamId};

    fn initiator(ssid: Option<u32>) -> Initiator {
        Initiator { substream: ssid.map(SubstreamId), ..Initiator::new(StreamId(0x1234_5678)) }
    }

    fn client(from: &Initiator, access: Access, privileged: bool, instruction: bool) -> Client<'_> {
        Client { from, va: 0xff00_0000_dead_b123, access, privileged, instruction }
    }

    const SID: u64 = 0x1234_5678 << 32;

    /// (kind, stage, stage 1 walk, CD, update, expected words 0, 1 and 3): bits from the fact sheet, by hand.
    #[test]
    fn every_walk_record_is_bit_exact() {
        use FaultKind::*;
        const RNW: u64 = 1 << 35;
        const S2: u64 = 1 << 39;
        const TT: u64 = 1 << 40;
        const IN: u64 = 2 << 40;
        const TTRNW: u64 = 1 << 44;
        let from = initiator(Some(0xabcde));
        let cases = [
            (Translation, 1, false, false, false, 0x10, RNW | IN, 0),
            (AddressSize, 1, false, false, false, 0x11, RNW | IN, 0),
            (AccessFlag, 1, false, false, false, 0x12, RNW | IN, 0),
            (Permission, 1, false, false, false, 0x13, RNW | IN, 0),
            (External, 1, false, false, false, 0x0b, RNW | TT, 0x00de_adbe_eff8_8888),
            (Translation, 2, false, false, false, 0x10, RNW | S2 | IN, 0x000f_1234_5678_9000),
            (Translation, 2, true, false, false, 0x10, RNW | S2 | TT, 0x000f_1234_5678_9000),
            (Translation, 2, false, true, false, 0x10, RNW | S2, 0x000f_1234_5678_9000),
            (AddressSize, 2, true, false, false, 0x11, RNW | S2 | TT, 0x000f_1234_5678_9000),
            (AccessFlag, 2, false, true, false, 0x12, RNW | S2, 0x000f_1234_5678_9000),
            (Permission, 2, true, false, false, 0x13, RNW | S2 | TT | TTRNW, 0x000f_1234_5678_9000),
            (Permission, 2, true, false, true, 0x13, RNW | S2 | TT, 0x000f_1234_5678_9000),
            (Permission, 2, false, false, false, 0x13, RNW | S2 | IN, 0x000f_1234_5678_9000),
            (Permission, 2, false, true, false, 0x13, RNW | S2, 0x000f_1234_5678_9000),
            (External, 2, true, false, false, 0x0b, RNW | S2 | TT, 0x00de_adbe_eff8_8888),
            (External, 2, false, true, false, 0x0b, RNW | S2, 0x00de_adbe_eff8_8888),
            (External, 2, false, false, false, 0x0b, RNW | S2 | IN, 0x00de_adbe_eff8_8888),
        ];
        for (kind, stage, on_stage1_walk, cd, write, code, dw1, dw3) in cases {
            let fault = Fault {
                ipa: 0x000f_1234_5678_9abc,
                on_stage1_walk,
                fetch: 0x00de_adbe_eff8_8888,
                write,
                ..Fault::new(kind, stage, 3)
            };
            let record = walk_record(&client(&from, Access::Read, false, false), &fault, cd);
            let expected = [SID | 0xabcde << 12 | 1 << 11 | code, dw1, 0xff00_0000_dead_b123, dw3];
            assert_eq!(record.0, expected, "{kind:?} stage {stage}");
        }
    }

    #[test]
    fn a_write_is_never_a_fetch() {
        let from = initiator(None);
        let fault = Fault::new(FaultKind::Translation, 1, 0);
        let dw1 = |access, p, i| walk_record(&client(&from, access, p, i), &fault, false).0[1];
        assert_eq!(dw1(Access::Write, true, true), 1 << 33 | 2 << 40);
        assert_eq!(dw1(Access::Read, true, true), 7 << 33 | 2 << 40);
        assert_eq!(dw1(Access::Read, false, true), 6 << 33 | 2 << 40);
        assert_eq!(walk_record(&client(&from, Access::Read, false, false), &fault, false).0[0], SID | 0x10);
    }

    #[test]
    fn every_configuration_record_is_bit_exact() {
        let from = initiator(Some(5));
        let with = |code, ssid, fetch| {
            let f = ConfigFault { code, ssid, fetch, stage2: None, flags: FaultFlags::new() };
            config_fault(&from, 0x1000, portcullis_arch::Access::Write, &f, true).record.0
        };
        use EventCode::*;
        assert_eq!(with(BadStreamId, Some(5), 0), [SID | 5 << 12 | 1 << 11 | 0x02, 0, 0, 0]);
        assert_eq!(with(BadStreamId, None, 0), [SID | 0x02, 0, 0, 0]);
        assert_eq!(
            with(SteFetch, Some(5), 0xff12_3456_789a_bcdf),
            [SID | 5 << 12 | 1 << 11 | 0x03, 0, 0, 0x0012_3456_789a_bcd8]
        );
        assert_eq!(with(BadSte, Some(5), 0), [SID | 5 << 12 | 1 << 11 | 0x04, 0, 0, 0]);
        assert_eq!(with(StreamDisabled, None, 0), [SID | 0x06, 0, 0, 0]);
        assert_eq!(with(BadSubstreamId, Some(0xfffff), 0), [SID | 0xfffff << 12 | 0x08, 0, 0, 0]);
        assert_eq!(with(CdFetch, Some(5), 0x8000_0040), [SID | 5 << 12 | 1 << 11 | 0x09, 0, 0, 0x8000_0040]);
        assert_eq!(with(BadCd, None, 0), [SID | 0x0a, 0, 0, 0]);
    }

    #[test]
    fn ats_records_are_bit_exact() {
        let from = initiator(Some(5));
        let record = translated_forbidden(&from, 0x1234_5678_9abc, Access::Read).0;
        assert_eq!(record, [SID | 0x07, 1 << 35, 0x1234_5678_9abc, 0]);
        let privileged = from.with_attrs(Attributes::DEVICE_DEFAULT.with_privileged(true));
        assert_eq!(
            bad_ats_request(&privileged, 0x1234_5678_9abc, true).0,
            [SID | 5 << 12 | 1 << 11 | 0x05, 1 << 31 | 1 << 30 | 1 << 28 | 1, 0x1234_5678_9000, 0]
        );
        assert_eq!(bad_ats_request(&initiator(None), 0x1000, false).0, [SID | 0x05, 1 << 31 | 1, 0x1000, 0]);
    }

    /// The table of section 5.5.
    #[test]
    fn a_r_s_decide() {
        let from = initiator(None);
        let c = client(&from, Access::Read, false, false);
        let judge = |stage, flags| {
            let fault = Fault::new(FaultKind::Permission, stage, 3);
            let j = walk_fault(&c, &fault, flags, false);
            (j.recorded, j.ending)
        };
        let f = FaultFlags::new;
        let cases = [
            (f(), (false, Ending::ZeroIgnore)),
            (f().with_s1_record(true), (true, Ending::ZeroIgnore)),
            (f().with_s1_abort(true), (false, Ending::Abort)),
            (f().with_s1_abort(true).with_s1_record(true), (true, Ending::Abort)),
            (f().with_s1_stall(true), (true, Ending::Stall)),
            (f().with_s1_stall(true).with_s1_abort(true).with_s1_record(true), (true, Ending::Stall)),
        ];
        for (flags, expected) in cases {
            assert_eq!(judge(1, flags), expected, "{flags:?}");
            // Stage 2 has flags of its own, and no A.
            assert_eq!(judge(2, flags), (false, Ending::Abort));
        }
        assert_eq!(judge(2, f().with_s2_record(true)), (true, Ending::Abort));
        assert_eq!(judge(2, f().with_s2_stall(true)), (true, Ending::Stall));
        assert_eq!(judge(1, f().with_flat(true).with_s1_stall(true)), (true, Ending::Abort));
        let external = walk_fault(&c, &Fault::new(FaultKind::External, 1, 3), f().with_s1_stall(true), false);
        assert_eq!((external.recorded, external.ending), (true, Ending::Abort));
    }

    #[test]
    fn bad_stream_ids_are_recorded_on_demand() {
        let from = initiator(None);
        let f = ConfigFault {
            code: EventCode::BadStreamId,
            ssid: None,
            fetch: 0,
            stage2: None,
            flags: FaultFlags::new(),
        };
        assert!(config_fault(&from, 0, Access::Read, &f, true).recorded);
        assert!(!config_fault(&from, 0, Access::Read, &f, false).recorded);
    }

    #[test]
    fn a_stalled_record_has_its_tag() {
        let from = initiator(None);
        let c = client(&from, Access::Write, false, false);
        let r = walk_record(&c, &Fault::new(FaultKind::Translation, 1, 3), false);
        assert_eq!(stalled(r, 0xbeef).0[1], 2 << 40 | 1 << 31 | 0xbeef);
    }
}
