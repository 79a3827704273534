//! Interrupts: draining the queues, and finding out whom a fault is to be told.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use portcullis_arch::smmuv3::Command;
use portcullis_arch::{Access, Iova, StreamId, SubstreamId};

use super::evtq::Lost;
use super::fault::{Answers, Routes, Source};
use super::{Error, Platform, Shared, SmmuV3, gerror};
use crate::fault::{FaultDetail, FaultHandler, FaultReason, FaultReport, FaultResponse};

/// Somebody who is told about faults of streams that nobody uses, but has no say in them.
struct Observer(Arc<dyn FaultHandler>);

impl FaultHandler for Observer {
    fn fault(&self, report: &FaultReport) -> FaultResponse {
        let _it_is_refused_whatever_the_answer = self.0.fault(report);
        FaultResponse::Terminate
    }
}

impl<P: Platform> Shared<P> {
    /// Something that is no fault of a transaction.
    fn tell(&self, detail: FaultDetail) {
        let report = FaultReport {
            reason: FaultReason::Other,
            stream: None,
            substream: None,
            iova: Iova(0),
            ipa: None,
            access: Access::Read,
            privileged: false,
            instruction: false,
            stage: None,
            level: None,
            bank: None,
            stalled: false,
            detail,
        };
        self.faults.lock().push(report);
        let handler = self.handler.lock().clone();
        if let Some(handler) = handler {
            let _there_is_nothing_to_answer = handler.fault(&report);
        }
    }
}

impl<P: Platform> Answers for Shared<P> {
    /// While the queue is off nothing waits: what was stalled ended with translation.
    fn queue(&self, commands: &[Command]) -> Result<(), Error> {
        if self.is_enabled() { self.queue.issue(commands) } else { Ok(()) }
    }
}

impl<P: Platform> Routes for Shared<P> {
    fn handler(&self, stream: StreamId, substream: Option<SubstreamId>) -> Option<Arc<dyn FaultHandler>> {
        let link = self.routes.lock().get(&(stream.get(), substream.map(SubstreamId::get))).cloned();
        let default = || self.handler.lock().clone();
        match link {
            Some(link) => link.handler.clone().or_else(default),
            None => default().map(|handler| Arc::new(Observer(handler)) as Arc<dyn FaultHandler>),
        }
    }

    fn report(&self, report: &FaultReport) {
        self.faults.lock().push(*report);
    }

    fn lost(&self, queue: Source, lost: Lost) {
        self.tell(FaultDetail::SmmuV3Lost(queue, lost));
    }
}

impl<P: Platform> SmmuV3<P> {
    /// For any interrupt of the SMMU, of whatever source: repairs the command queue, takes everything out of the event
    /// and page request queues, asks the owners, and answers the hardware. Gives how many records and errors it found;
    /// 0 means that the interrupt was somebody else's.
    pub fn handle_irq(&self) -> usize {
        let shared = &*self.shared;
        let mut found = gerror::handle(&shared.queue, |error| {
            shared.tell(FaultDetail::SmmuV3Global(error));
        });
        let answered = |result: Result<(), Error>| {
            if result.is_err() {
                shared.unanswered.fetch_add(1, Ordering::Relaxed);
            }
        };
        found += shared.events.drain(|event| answered(shared.router.event(shared, shared, &event)));
        if let Some(requests) = &shared.requests {
            found += requests.drain(|page| answered(shared.router.page(shared, shared, &page)));
        }
        found
    }

    /// The answer to a fault that a handler deferred: [`FaultResponse::Resolved`] retries the transaction, or tells the
    /// device that its pages are there; [`FaultResponse::Terminate`] refuses.
    pub fn answer(&self, report: &FaultReport, response: FaultResponse) -> Result<(), Error> {
        self.shared.router.answer(&*self.shared, report, response)
    }

    /// Faults that still wait because their answer could not be queued; [`answer`](Self::answer) tries again.
    pub fn unanswered(&self) -> u32 {
        self.shared.unanswered.load(Ordering::Relaxed)
    }

    /// Stalled transactions and page request groups that wait for an answer.
    pub fn waiting(&self) -> (usize, usize) {
        (self.shared.router.stalled(), self.shared.router.groups())
    }
}
