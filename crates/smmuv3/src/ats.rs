//! Address Translation Services: translation requests, translated transactions and page requests of a device (IHI 0070
//! sections 3.9, 13.6 and 13.7).
//!
//! [`Port`] is what a device holds. Translated transactions go through the same TLB and the same guard as others, so that
//! invalidations and CMD_SYNC need no rules of their own for them: the port marks them with a substream that no
//! transaction can have.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use portcullis_arch::{Access, Attributes, Iova, StreamId, SubstreamId};
use portcullis_bus::{
    AtsPort, AtsReply, AtsTranslation, CopyError, DmaError, DmaPort, Initiator, Memory, PageRequest,
    StallState, StallTag,
};
use portcullis_walk::{
    AccessKind, CachedEntry, Context, Fault, FaultKind, FaultOutcome, NoRecord, Resolution, Stats, Tbu,
    Translated, Updates, Walked,
};

use crate::caps::Caps;
use crate::decision::{ConfigFault, Decision, Trail, View};
use crate::event::{self, Client};
use crate::lookup::{attrs::Overrides, look_up_translated, memo::Memo, stages, ste, stream_entry};
use crate::model::SmmuV3;
use portcullis_arch::smmuv3::{EventCode, EventRecord, Ste, SteConfig};

/// SubstreamIDs have 20 bits; what has this bit is the port's own.
const OWN: u32 = 1 << 31;
/// The access is translated already.
const TRANSLATED: SubstreamId = SubstreamId(OWN | 1);
/// Not an access at all: the port's guard while a translation request is worked on.
const REQUEST: Initiator =
    Initiator { stream: StreamId(0), substream: Some(SubstreamId(OWN)), attrs: Attributes::DEVICE_DEFAULT };

/// A device has sent what only the port itself may say.
#[inline(always)]
pub(crate) fn is_own(from: &Initiator) -> bool {
    from.substream.is_some_and(|s| s.get() & OWN != 0)
}

/// A transaction as its device means it: a SubstreamID that is none stays out of range, and never becomes the port's own.
#[inline(always)]
fn plain(from: Initiator) -> Initiator {
    match from.substream {
        Some(s) if s.get() & OWN != 0 => Initiator { substream: Some(SubstreamId(OWN - 1)), ..from },
        _ => from,
    }
}

fn translated(from: Initiator) -> Initiator {
    Initiator { substream: Some(TRANSLATED), ..from }
}

/// The transaction that an event shows for one of a port's accesses.
pub(crate) fn shown(from: &Initiator) -> Initiator {
    match from.substream {
        Some(s) if s.get() & OWN != 0 => Initiator { substream: None, ..*from },
        _ => *from,
    }
}

/// What a device holds instead of an [`SmmuV3`]: its private TLB, and ATS.
pub struct Port<M: Memory> {
    tbu: Tbu<SmmuV3<M>, M>,
}

impl<M: Memory> Port<M> {
    pub(crate) fn new(tbu: Tbu<SmmuV3<M>, M>) -> Self {
        Self { tbu }
    }

    /// The SMMU behind this port.
    pub fn smmu(&self) -> &Arc<SmmuV3<M>> {
        self.tbu.tcu()
    }

    /// The memory this port accesses.
    pub fn memory(&self) -> &M {
        self.tbu.memory()
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.tbu.stats()
    }

    /// Translates `va` and calls `f` with the result and the memory, inside the port's guard: see
    /// [`Tbu::with_translation`].
    ///
    /// # Errors
    /// The transaction was terminated or is stalled; the SMMU has recorded why.
    #[inline]
    pub fn with_translation<R>(
        &mut self,
        from: &Initiator,
        va: Iova,
        access: Access,
        f: impl FnOnce(Translated, &M) -> R,
    ) -> Result<R, FaultOutcome> {
        // The usual case goes on with what it was given: a copy on the way costs as much as a hit.
        match is_own(from) {
            false => self.tbu.with_translation(from, va, access, f),
            true => self.tbu.with_translation(&plain(*from), va, access, f),
        }
    }

    /// Translates `va` without making an access; the answer may be out of date at once.
    ///
    /// # Errors
    /// As for [`with_translation`](Port::with_translation).
    #[inline]
    pub fn translate(
        &mut self,
        from: &Initiator,
        va: Iova,
        access: Access,
    ) -> Result<Translated, FaultOutcome> {
        match is_own(from) {
            false => self.tbu.translate(from, va, access),
            true => self.tbu.translate(&plain(*from), va, access),
        }
    }

    /// The TLB entry that a transaction would hit, if any.
    pub fn cached(&mut self, from: &Initiator, va: Iova) -> Option<CachedEntry> {
        self.tbu.cached(&plain(*from), va)
    }
}

impl<M: Memory> DmaPort for Port<M> {
    #[inline]
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        self.tbu.read(plain(from), addr, buf)
    }
    #[inline]
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        self.tbu.write(plain(from), addr, buf)
    }
    #[inline]
    fn copy(&mut self, src: (Initiator, Iova), dst: (Initiator, Iova), len: usize) -> Result<(), CopyError> {
        self.tbu.copy((plain(src.0), src.1), (plain(dst.0), dst.1), len)
    }
    fn stall_state(&mut self, tag: StallTag) -> StallState {
        self.tbu.stall_state(tag)
    }
}

impl<M: Memory> AtsPort for Port<M> {
    fn translation_request(&mut self, from: Initiator, addr: Iova, no_write: bool) -> AtsReply {
        let smmu = self.tbu.tcu().clone();
        let from = plain(from);
        let ask = |_: Translated, _: &M| smmu.translation_request(&from, addr.get(), no_write);
        // The guard: tables that are invalidated now are not given back before this walk of them has ended.
        self.tbu.with_translation(&REQUEST, Iova(0), Access::Read, ask).unwrap_or(AtsReply::Aborted)
    }
    fn read_translated(&mut self, from: Initiator, addr: u64, buf: &mut [u8]) -> Result<(), DmaError> {
        self.tbu.read(translated(from), Iova(addr), buf)
    }
    fn write_translated(&mut self, from: Initiator, addr: u64, buf: &[u8]) -> Result<(), DmaError> {
        self.tbu.write(translated(from), Iova(addr), buf)
    }
    fn page_request(&mut self, request: PageRequest) {
        self.tbu.tcu().page_request(&PageRequest { from: plain(request.from), ..request });
    }
}

/// How often a look-up that ends in an event is made again because something was invalidated meanwhile.
const LOOKS: usize = 16;

/// log2 of the smallest translation unit: the smallest granule.
fn smallest_unit_log2(caps: &Caps) -> u8 {
    match (caps.gran4k || caps.aarch32, caps.gran16k) {
        (true, _) => 12,
        (false, true) => 14,
        _ => 16,
    }
}

/// log2 of the block that a translation request gets whose stream passes untranslated (S1DSS): any size up to that of
/// the output is right.
const IDENTITY_LOG2: u8 = 30;

/// What a translation request asks for besides reading.
#[derive(Clone, Copy)]
struct Wanted {
    write: bool,
    execute: bool,
    privileged: bool,
}

/// The answer to one translation request, and the event to record, if any.
type Answer = (AtsReply, Option<EventRecord>);

impl<M: Memory> SmmuV3<M> {
    /// The configuration of one of the ports' own accesses.
    pub(crate) fn resolve_ats<'m>(
        &self,
        memo: &'m mut Memo,
        from: &Initiator,
        va: u64,
        access: Access,
    ) -> Resolution<'m> {
        match from.substream {
            Some(TRANSLATED) => self.resolve_translated(memo, from, va, access),
            _ => Resolution::Bypass { attrs: from.attrs, mask: u64::MAX, strict: false },
        }
    }

    fn resolve_translated<'m>(
        &self,
        memo: &'m mut Memo,
        from: &Initiator,
        address: u64,
        access: Access,
    ) -> Resolution<'m> {
        let over = Resolution::Refused(FaultOutcome::Terminate { abort: true });
        if !self.caps.ats {
            return over;
        }
        let secure = self.is_secure(from);
        let from = shown(from);
        for attempt in 1..=LOOKS {
            let (regs, seen) = self.table_regs(secure);
            let view = View::new(&self.caps, regs, &self.memory);
            let record = match look_up_translated(&view, &from).0 {
                Decision::Translate(context) => return Resolution::Translate(memo.once(*context)),
                Decision::Bypass { attrs, .. } => {
                    let mask = self.caps.output_mask();
                    // An address above OAS aborts without an event.
                    return if address & !mask != 0 {
                        over
                    } else {
                        Resolution::Bypass { attrs, mask, strict: true }
                    };
                }
                Decision::Silent(_) => return over,
                Decision::Fault(f) if f.code == EventCode::TranslForbidden => {
                    event::translated_forbidden(&from, address, access)
                }
                Decision::Fault(_) if !regs.cr2.rec_cfg_ats() => return over,
                Decision::Fault(f) => event::config_fault(&from, address, access, &f, true).record,
            };
            let mut live = self.lock();
            if attempt == LOOKS || self.log.generation() == seen {
                self.record(&mut live, usize::from(secure), record, false);
                break;
            }
        }
        over
    }

    /// Answers a translation request. Never stalls; the port's guard is up.
    fn translation_request(&self, from: &Initiator, addr: u64, no_write: bool) -> AtsReply {
        if !self.caps.ats {
            return AtsReply::Unsupported;
        }
        let secure = self.is_secure(from);
        let pasid = from.substream.is_some();
        let wanted = Wanted {
            write: !no_write,
            // Both travel with a PASID only.
            execute: pasid && from.attrs.instruction(),
            privileged: pasid && from.attrs.privileged(),
        };
        let attrs = from.attrs.with_privileged(wanted.privileged).with_instruction(wanted.execute);
        let from = from.with_attrs(attrs);
        for attempt in 1..=LOOKS {
            let (regs, seen) = self.table_regs(secure);
            let view = View::new(&self.caps, regs, &self.memory);
            let (reply, event) = answer(&view, &from, addr, wanted);
            let Some(event) = event else { return reply };
            let mut live = self.lock();
            if attempt == LOOKS || self.log.generation() == seen {
                self.record(&mut live, usize::from(secure), event, false);
                return reply;
            }
        }
        AtsReply::Aborted
    }
}

fn answer<M: Memory>(view: &View<'_, M>, from: &Initiator, addr: u64, wanted: Wanted) -> Answer {
    let (caps, regs) = (view.caps, &view.regs);
    let refused = || (AtsReply::Unsupported, Some(event::bad_ats_request(from, addr, wanted.write)));
    if !regs.cr0.smmuen() || regs.secure {
        return refused();
    }
    let mut trail = Trail::default();
    let ste = match stream_entry(view, from, &mut trail) {
        Ok(ste) => ste,
        Err(fault) => return (AtsReply::Aborted, config_event(view, from, addr, &fault)),
    };
    if ste.config() == SteConfig::Abort {
        return (AtsReply::Unsupported, None);
    }
    let eats = ste::eats(caps, regs, &ste);
    if eats == 0 {
        return refused();
    }
    match stages(view, from, &ste, Access::Read, &mut NoRecord, &mut trail) {
        Decision::Silent(_) => (AtsReply::Unsupported, None),
        Decision::Fault(ConfigFault { stage2: Some(why), .. }) if why.kind != FaultKind::External => {
            (no_access(caps, addr, wanted), None)
        }
        Decision::Fault(fault) => (AtsReply::Aborted, config_event(view, from, addr, &fault)),
        Decision::Bypass { limit_bits, .. } => {
            let limit = limit_bits.min(caps.oas_bits);
            if crate::lookup::size::exceeds(addr, limit) {
                return (no_access(caps, addr, wanted), None);
            }
            let size_log2 = IDENTITY_LOG2.max(smallest_unit_log2(caps));
            let translation = AtsTranslation {
                addr: addr & !((1 << size_log2) - 1),
                size_log2,
                read: true,
                write: true,
                execute: false,
                privileged: false,
                global: false,
            };
            (AtsReply::Granted(translation), None)
        }
        Decision::Translate(context) => granted(view, from, addr, wanted, &ste, &context, eats == 2),
    }
}

/// The event of a configuration error, if CR2 has such of ATS requests recorded.
fn config_event<M>(
    view: &View<'_, M>,
    from: &Initiator,
    addr: u64,
    fault: &ConfigFault,
) -> Option<EventRecord> {
    let cr2 = view.regs.cr2;
    let wanted = cr2.rec_cfg_ats() && (fault.code != EventCode::BadStreamId || cr2.recinvsid());
    wanted.then(|| event::config_fault(from, addr, Access::Read, fault, true).record)
}

/// Success with no access: the device may ask for the page.
fn no_access(caps: &Caps, addr: u64, wanted: Wanted) -> AtsReply {
    let size_log2 = smallest_unit_log2(caps);
    AtsReply::Granted(AtsTranslation {
        addr: addr & !((1 << size_log2) - 1),
        size_log2,
        read: false,
        write: false,
        execute: false,
        privileged: wanted.privileged,
        global: false,
    })
}

/// Walks the tables and says what of the wanted access they allow (section 13.7.1).
fn granted<M: Memory>(
    view: &View<'_, M>,
    from: &Initiator,
    addr: u64,
    wanted: Wanted,
    ste: &Ste,
    context: &Context,
    split: bool,
) -> Answer {
    let caps = view.caps;
    let walk = |kind| {
        context.stages.translate(view.memory, addr & context.va_mask, kind, Updates::Apply, &mut NoRecord)
    };
    let a = context.incoming;
    let [read, write, fetch] = [
        AccessKind::new(Access::Read, a.with_instruction(false)),
        AccessKind::new(Access::Write, a),
        AccessKind::new(Access::Read, a.with_instruction(true)),
    ];
    // A walk that may write marks the page dirty; any walk that is allowed tells what else is.
    let mut found: Result<Walked, Option<Fault>> = Err(None);
    let mut kind = read;
    for (wants, k) in [(wanted.write, write), (true, read), (true, fetch)] {
        if !wants || !matches!(found, Err(None)) {
            continue;
        }
        kind = k;
        found = match walk(k) {
            Ok(walked) => Ok(walked),
            // Another kind of access may be allowed, but not on the way to the tables.
            Err(f) if f.kind == FaultKind::Permission && !f.on_stage1_walk => Err(None),
            Err(f) => Err(Some(f)),
        };
    }
    let walked = match found {
        Ok(walked) => walked,
        Err(Some(fault)) if fault.kind == FaultKind::External => {
            let client = Client::new(from, addr, Access::Read, a);
            let record = event::walk_record(&client, &fault, false);
            return (AtsReply::Aborted, view.regs.cr2.rec_cfg_ats().then_some(record));
        }
        Err(_) => return (no_access(caps, addr, wanted), None),
    };
    let (r, x) = (walked.perms.allows(read), walked.perms.allows(fetch));
    let (read, execute) = match Overrides::of_ste(caps, false, ste.dw1()).instruction() {
        None => (r, r && x),
        Some(true) => (x, x),
        Some(false) => (r, r),
    };
    let write = walked.perms.allows(write);
    let execute = execute && wanted.execute;
    if !read && !write {
        return (no_access(caps, addr, wanted), None);
    }
    let (mut output, mut size_log2) = (walked.pa, walked.size_log2);
    if split {
        // Stage 2 of this address is for the translated transactions.
        let input = addr & context.va_mask;
        let stage1 =
            context.stages.translate_stage1(view.memory, input, kind, Updates::Pretend, &mut NoRecord);
        match stage1 {
            Ok(first) if context.stages.stage1.is_some() => {
                (output, size_log2) = (first.pa, size_log2.min(first.size_log2));
            }
            Ok(_) => output = input,
            // The tables have just changed.
            Err(_) => return (no_access(caps, addr, wanted), None),
        }
    }
    let size_log2 = size_log2.min(62);
    let translation = AtsTranslation {
        addr: output & !((1 << size_log2) - 1),
        size_log2,
        read,
        write,
        execute,
        privileged: wanted.privileged,
        global: false,
    };
    (AtsReply::Granted(translation), None)
}
