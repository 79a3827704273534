//! A record of what passes between a device with address translation services and the SMMU.

use std::sync::Arc;

use portcullis_arch::{Access, Iova};
use portcullis_bus::{
    AtcCompletion, AtcInvalidation, AtcTicket, AtsDevice, AtsPort, AtsReply, CopyError, DmaError, DmaPort,
    Initiator, PageGroupResponse, PageRequest, StallState, StallTag,
};

use crate::sim::port::cost;
use crate::sim::trace::{AtsEvent, EventKind, Tracer};

/// A port of a device with a translation cache of its own, with a record of what it asks and sends translated. Untranslated
/// accesses are recorded where the engine issues them.
pub(crate) struct AtsRecorder<P> {
    port: P,
    tracer: Arc<Tracer>,
    engine: Arc<str>,
}

impl<P: AtsPort> AtsRecorder<P> {
    pub fn new(port: P, tracer: Arc<Tracer>, engine: &str) -> Self {
        Self { port, tracer, engine: engine.into() }
    }

    pub fn inner(&self) -> &P {
        &self.port
    }

    fn note(&self, lasted: u64, what: AtsEvent) {
        self.tracer.push(lasted, EventKind::Ats { engine: self.engine.clone(), what });
    }

    fn translated(
        &self,
        from: Initiator,
        address: u64,
        len: usize,
        access: Access,
        result: Result<(), DmaError>,
    ) {
        let error = result.err().map(|e| (e.done, e.fault));
        let what = AtsEvent::Translated { stream: from.stream, address, len, access, error };
        self.note(0, what);
    }
}

impl<P: AtsPort> DmaPort for AtsRecorder<P> {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        self.port.read(from, addr, buf)
    }
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        self.port.write(from, addr, buf)
    }
    fn copy(&mut self, src: (Initiator, Iova), dst: (Initiator, Iova), len: usize) -> Result<(), CopyError> {
        self.port.copy(src, dst, len)
    }
    fn stall_state(&mut self, tag: StallTag) -> StallState {
        self.port.stall_state(tag)
    }
}

impl<P: AtsPort> AtsPort for AtsRecorder<P> {
    fn translation_request(&mut self, from: Initiator, addr: Iova, no_write: bool) -> AtsReply {
        let reply = self.port.translation_request(from, addr, no_write);
        let (stream, substream) = (from.stream, from.substream);
        self.note(cost(0), AtsEvent::Request { stream, substream, iova: addr, no_write, reply });
        reply
    }
    fn read_translated(&mut self, from: Initiator, addr: u64, buf: &mut [u8]) -> Result<(), DmaError> {
        let result = self.port.read_translated(from, addr, buf);
        self.translated(from, addr, buf.len(), Access::Read, result);
        result
    }
    fn write_translated(&mut self, from: Initiator, addr: u64, buf: &[u8]) -> Result<(), DmaError> {
        let result = self.port.write_translated(from, addr, buf);
        self.translated(from, addr, buf.len(), Access::Write, result);
        result
    }
    fn page_request(&mut self, request: PageRequest) {
        self.note(cost(0), AtsEvent::PageRequest(request));
        self.port.page_request(request);
    }
}

/// A device's translation cache with a record of what the SMMU tells it.
pub(crate) struct AtcRecorder<D> {
    pub device: Arc<D>,
    pub tracer: Arc<Tracer>,
    pub engine: Arc<str>,
}

impl<D: AtsDevice> AtsDevice for AtcRecorder<D> {
    fn invalidate(&self, what: AtcInvalidation) -> AtcTicket {
        let event = EventKind::Ats { engine: self.engine.clone(), what: AtsEvent::Invalidation(what) };
        self.tracer.push(0, event);
        self.device.invalidate(what)
    }
    fn completion(&self, ticket: AtcTicket) -> AtcCompletion {
        self.device.completion(ticket)
    }
    fn page_response(&self, response: PageGroupResponse) {
        let event = EventKind::Ats { engine: self.engine.clone(), what: AtsEvent::Response(response) };
        self.tracer.push(0, event);
        self.device.page_response(response);
    }
}
