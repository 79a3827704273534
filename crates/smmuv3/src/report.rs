//! What leaves the SMMU towards software: event records, page requests, global errors, and the interrupts for them
//! (IHI 0070 sections 7.2, 7.4, 7.5 and chapter 8).

use portcullis_arch::smmuv3::EventRecord;
use portcullis_arch::smmuv3::event::{PriDw0, PriDw1};
use portcullis_arch::smmuv3::regs::{Gerror, INDEX_MASK, IrqCfg2};
use portcullis_bus::{Memory, PageGroupResponse, PageRequest, PageResponse};

use crate::event;
use crate::irq::{Message, Source};
use crate::model::{Live, SmmuV3};
use crate::queue;
use crate::state::Shapes;

/// What happened to a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    Yes,
    /// The queue is full.
    Full,
    /// The queue is off, stands at an error, or memory has refused the write.
    No,
}

impl<M: Memory> SmmuV3<M> {
    /// Activates a global error that is not active yet, with its interrupt.
    pub(crate) fn global_error(&self, live: &mut Live, side: usize, error: Gerror) {
        let i = &mut live.regs.side[side];
        let bit = error.into_bits();
        if (i.gerror ^ i.gerrorn) & bit != 0 {
            return;
        }
        i.gerror ^= bit;
        if error.msi_gerror_abt_err() || !i.irq_ctrl().gerror_irqen() {
            return;
        }
        let message = i.gerror_irq;
        self.interrupt(live, side, Source::Gerror, message);
    }

    /// An enabled source: its wire, and its message if it has one.
    fn interrupt(&self, live: &mut Live, side: usize, source: Source, message: Message) {
        let secure = side == 1;
        if self.caps.msis(secure)
            && message.address != 0
            && self.outputs.send(&self.memory, secure, message, self.caps.output_mask()).is_err()
        {
            let none = Gerror::new();
            let error = match source {
                Source::EventQueue => none.with_msi_eventq_abt_err(true),
                Source::PriQueue => none.with_msi_priq_abt_err(true),
                Source::Sync => none.with_msi_cmdq_abt_err(true),
                Source::Gerror => none.with_msi_gerror_abt_err(true),
            };
            self.global_error(live, side, error);
        }
        self.outputs.pulse(secure, source);
    }

    /// Records an event that is lost if the queue cannot take it: an overflow only if the queue is full. With `merge` (STE.MEV)
    /// it is one with the record before it, if that says the same and software has not consumed it.
    pub(crate) fn record(&self, live: &mut Live, side: usize, record: EventRecord, merge: bool) {
        if merge && self.is_merged(live, side, &record) {
            return;
        }
        if self.write_event(live, side, record) == Written::Full {
            live.regs.side[side].eventq.overflow();
        }
    }

    fn is_merged(&self, live: &Live, side: usize, record: &EventRecord) -> bool {
        let i = &live.regs.side[side];
        let waits = !i.eventq.is_empty(Shapes::new(&self.caps).eventq);
        let open = i.cr0().eventqen() && !i.errors().eventq_abt_err();
        waits
            && open
            && i.last_event.is_some_and(|(prod, last)| {
                prod == i.eventq.prod & INDEX_MASK && event::same(record, &EventRecord(last))
            })
    }

    fn write_event(&self, live: &mut Live, side: usize, record: EventRecord) -> Written {
        let shape = Shapes::new(&self.caps).eventq;
        let i = &mut live.regs.side[side];
        if !i.cr0().eventqen() || i.errors().eventq_abt_err() {
            return Written::No;
        }
        if i.eventq.is_full(shape) {
            return Written::Full;
        }
        let at = i.eventq.entry(shape, i.eventq.prod);
        let attrs = queue::attributes(i.cr1(), side == 1);
        let mut bytes = [0u8; 32];
        for (to, word) in bytes.chunks_exact_mut(8).zip(record.0) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        if self.memory.write(at, attrs, &bytes).is_err() {
            self.global_error(live, side, Gerror::new().with_eventq_abt_err(true));
            return Written::No;
        }
        let was_empty = i.eventq.is_empty(shape);
        i.eventq.advance_prod(shape);
        i.last_event = Some((i.eventq.prod & INDEX_MASK, record.0));
        if was_empty && i.irq_ctrl().eventq_irqen() {
            let message = i.eventq_irq;
            self.interrupt(live, side, Source::EventQueue, message);
        }
        Written::Yes
    }

    /// Writes the records of stalled transactions that wait for the event queue, as far as it takes them.
    pub(crate) fn flush(&self, live: &mut Live, side: usize) {
        let shape = Shapes::new(&self.caps).eventq;
        let secure = side == 1;
        if !live.regs.stalls.has_unwritten(secure) {
            return;
        }
        let now = self.log.generation();
        loop {
            let i = &live.regs.side[side];
            if !i.cr0().eventqen() || i.errors().eventq_abt_err() || i.eventq.is_full(shape) {
                return;
            }
            let Some((tag, record)) = live.regs.stalls.next_unwritten(secure, now) else { return };
            if self.write_event(live, side, EventRecord(record)) != Written::Yes {
                return;
            }
            live.regs.stalls.written(tag);
        }
    }

    /// A page request of a device (non-secure; `secure` streams have none). The answer is what the SMMU says by itself,
    /// if it does: to be delivered when the lock has been let go.
    ///
    /// `echo` reads the stream's STE for an automatic answer: whether it can be used, and PPAR.
    pub(crate) fn take_page_request(
        &self,
        live: &mut Live,
        secure: bool,
        request: &PageRequest,
    ) -> PageAnswer {
        let shape = Shapes::new(&self.caps).priq;
        let i = &mut live.regs.side[0];
        let cr0 = i.cr0();
        let stop = request.is_stop_marker();
        let failure = PageAnswer::Say(PageGroupResponse {
            substream: None,
            group: request.group & PageRequest::MAX_GROUP,
            code: PageResponse::Failure,
        });
        if secure || !self.caps.pri || !cr0.smmuen() || !cr0.priqen() || i.errors().priq_abt_err() {
            return if stop { PageAnswer::Nothing } else { failure };
        }
        let by_group = IrqCfg2::from_bits(i.priq_irq.attributes).lo();
        if !i.priq.overflowed() && i.priq.is_full(shape) {
            i.priq.overflow();
        }
        if i.priq.overflowed() {
            if request.last && by_group {
                self.priq_interrupt(live);
            }
            // A page that was not asked for cannot be answered: the device asks again after the group's success.
            return if request.last && !stop { PageAnswer::Overflow } else { PageAnswer::Nothing };
        }
        let at = i.priq.entry(shape, i.priq.prod);
        let attrs = queue::attributes(i.cr1(), false);
        let record = pri_record(request);
        let mut bytes = [0u8; 16];
        for (to, word) in bytes.chunks_exact_mut(8).zip(record) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        if self.memory.write(at, attrs, &bytes).is_err() {
            self.global_error(live, 0, Gerror::new().with_priq_abt_err(true));
            return if stop { PageAnswer::Nothing } else { failure };
        }
        let was_empty = i.priq.is_empty(shape);
        i.priq.advance_prod(shape);
        if if by_group { request.last } else { was_empty } {
            self.priq_interrupt(live);
        }
        PageAnswer::Nothing
    }

    fn priq_interrupt(&self, live: &mut Live) {
        let i = &live.regs.side[0];
        if i.irq_ctrl().priq_irqen() {
            let message = i.priq_irq;
            self.interrupt(live, 0, Source::PriQueue, message);
        }
    }
}

/// What the SMMU itself answers to a page request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageAnswer {
    /// Nothing: software does, or nobody.
    Nothing,
    /// This.
    Say(PageGroupResponse),
    /// The queue has overflowed: success, so that the device tries again. Whether the answer names the PASID depends on
    /// IDR3.PPS and the STE.
    Overflow,
}

/// A page request as it lies in the queue.
fn pri_record(r: &PageRequest) -> [u64; 2] {
    let substream = r.from.substream.map(|s| s.get());
    let dw0 = PriDw0::new()
        .with_sid(r.from.stream.get())
        .with_ssid(substream.unwrap_or(0) & 0xf_ffff)
        .with_ssv(substream.is_some())
        // Privilege and execution exist with a PASID only.
        .with_privileged(substream.is_some() && r.privileged)
        .with_x(substream.is_some() && r.execute)
        .with_r(r.read)
        .with_w(r.write)
        .with_last(r.last);
    let dw1 =
        PriDw1::new().with_prg_index(r.group & PageRequest::MAX_GROUP).with_addr_63_12(r.addr.get() >> 12);
    [dw0.into_bits(), dw1.into_bits()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_arch::{Iova, StreamId, SubstreamId};
    use portcullis_bus::Initiator;

    #[test]
    fn page_request_records_are_bit_exact() {
        let from =
            Initiator { substream: Some(SubstreamId(0xabcde)), ..Initiator::new(StreamId(0x8765_4321)) };
        let r = PageRequest {
            from,
            addr: Iova(0xffff_1234_5678_9abc),
            read: true,
            write: false,
            execute: true,
            privileged: true,
            group: 0x1ff,
            last: true,
        };
        let high = 1 << 63 | 1 << 62 | 1 << 60 | 1 << 59 | 1 << 58;
        assert_eq!(pri_record(&r), [high | 0xabcde << 32 | 0x8765_4321, 0xffff_1234_5678_9000 | 0x1ff]);
        let plain =
            PageRequest { from: Initiator { substream: None, ..from }, write: true, last: false, ..r };
        assert_eq!(pri_record(&plain)[0], 3 << 60 | 0x8765_4321, "no PASID: neither privilege nor execution");
        let stop = PageRequest::stop_marker(from);
        assert_eq!(pri_record(&stop)[0], 1 << 63 | 1 << 62 | 0xabcde << 32 | 0x8765_4321);
    }
}
