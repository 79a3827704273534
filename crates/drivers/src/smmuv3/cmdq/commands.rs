//! The commands of the driver, built field by field. TLB invalidations are in [`tlbi`](crate::smmuv3::tlbi).

use portcullis_arch::smmuv3::cmd::{AtcInv, Cfgi, Command, Opcode, Prefetch, PriResp, Resume, Sync};
use portcullis_arch::{Iova, Pa, StreamId, SubstreamId};

/// CFGI_STE: a stream table entry has changed. `leaf`: its level 1 descriptor has not.
pub fn cfgi_ste(stream: StreamId, leaf: bool) -> Command {
    let cfgi = Cfgi::new().with_opcode(Opcode::CfgiSte as u8).with_sid(stream.get());
    cfgi.with_range(leaf.into()).into()
}

/// CFGI_ALL: every cached configuration goes.
pub fn cfgi_all() -> Command {
    Cfgi::new().with_opcode(Opcode::CfgiSteRange as u8).with_range(Cfgi::ALL_RANGE).into()
}

/// CFGI_CD: a context descriptor has changed. Without substreams it is that of substream 0.
pub fn cfgi_cd(stream: StreamId, substream: SubstreamId, leaf: bool) -> Command {
    let cfgi = Cfgi::new().with_opcode(Opcode::CfgiCd as u8).with_sid(stream.get());
    cfgi.with_ssid(substream.get() & 0xf_ffff).with_range(leaf.into()).into()
}

/// CFGI_CD_ALL: all context descriptors of a stream.
pub fn cfgi_cd_all(stream: StreamId) -> Command {
    Cfgi::new().with_opcode(Opcode::CfgiCdAll as u8).with_sid(stream.get()).into()
}

/// PREFETCH_CONFIG: a hint.
pub fn prefetch_config(stream: StreamId) -> Command {
    Prefetch::new().with_opcode(Opcode::PrefetchConfig as u8).with_sid(stream.get()).into()
}

/// Which of a device's cached translations an ATC_INV is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AtcScope {
    /// Those without a substream, and by Linux's reading of the rules also those with one.
    Stream,
    /// Those of one substream.
    Substream(SubstreamId),
    /// Those of every substream.
    AllSubstreams,
}

/// ATC_INV for everything.
pub fn atc_inv_all(stream: StreamId, scope: AtcScope) -> Command {
    atc(stream, scope).with_size(52).into()
}

/// ATC_INV for the smallest power-of-two span, at a multiple of its size, that covers `[start, start + len)`.
pub fn atc_inv(stream: StreamId, scope: AtcScope, start: Iova, len: u64) -> Command {
    let first = start.get() >> 12;
    let last = start.get().saturating_add(len.saturating_sub(1)) >> 12;
    let size = 64 - (first ^ last).leading_zeros() as u8;
    if size >= 52 {
        return atc_inv_all(stream, scope);
    }
    atc(stream, scope).with_size(size).with_addr_63_12(first >> size << size).into()
}

fn atc(stream: StreamId, scope: AtcScope) -> AtcInv {
    let command = AtcInv::new().with_opcode(Opcode::AtcInv as u8).with_sid(stream.get());
    match scope {
        AtcScope::Stream => command,
        AtcScope::Substream(substream) => command.with_ssv(true).with_ssid(substream.get() & 0xf_ffff),
        AtcScope::AllSubstreams => command.with_ssv(true).with_g(true),
    }
}

/// The answer to a page request group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageResponse {
    /// The device's page request interface must be reset.
    Failure = 0,
    /// At least one page cannot be had.
    Invalid = 1,
    /// Ask for the translations again.
    Success = 2,
}

/// PRI_RESP. `group` has nine bits.
pub fn pri_resp(
    stream: StreamId,
    substream: Option<SubstreamId>,
    group: u16,
    response: PageResponse,
) -> Command {
    let command = PriResp::new().with_opcode(Opcode::PriResp as u8).with_sid(stream.get());
    let command = command.with_prg_index(group & 0x1ff).with_resp(response as u8);
    match substream {
        Some(substream) => command.with_ssv(true).with_ssid(substream.get() & 0xf_ffff).into(),
        None => command.into(),
    }
}

/// What becomes of a stalled transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StallAnswer {
    /// It is translated again.
    Retry,
    /// It is aborted.
    Abort,
    /// It reads zeroes, or writes nothing (only without IDR0.TERM_MODEL).
    Ignore,
}

/// RESUME: the answer to one stalled transaction.
pub fn resume(stream: StreamId, stag: u16, answer: StallAnswer) -> Command {
    let command = Resume::new().with_opcode(Opcode::Resume as u8).with_sid(stream.get()).with_stag(stag);
    command.with_ac(answer == StallAnswer::Retry).with_ab(answer == StallAnswer::Abort).into()
}

/// STALL_TERM: aborts all stalled transactions of a stream, whose entry must block it already.
pub fn stall_term(stream: StreamId) -> Command {
    Resume::new().with_opcode(Opcode::StallTerm as u8).with_sid(stream.get()).into()
}

/// SYNC with a wake-up event; on an SMMU without those it is a plain one.
pub fn sync() -> Command {
    Sync::new().with_opcode(Opcode::Sync as u8).with_cs(2).into()
}

/// SYNC without any signal.
pub fn sync_silent() -> Command {
    Sync::new().with_opcode(Opcode::Sync as u8).into()
}

/// SYNC that writes 32 zero bits to `target`: Normal write-back memory, inner shareable.
pub fn sync_msi(target: Pa) -> Command {
    let command = Sync::new().with_opcode(Opcode::Sync as u8).with_cs(1).with_msh(3).with_msiattr(0xf);
    command.with_msiaddr_55_2((target.get() & 0x00ff_ffff_ffff_fffc) >> 2).into()
}
