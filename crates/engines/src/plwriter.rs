//! The PL writer of the thesis (system S2): an IP in the programmable logic that writes one 32-bit word.
//!
//! Software sets destination, data, AxCACHE and AXI ID and writes the trigger; the IP then issues one write
//! through the PL port it is wired to. Its stream is the port's base plus the AXI ID: 0x200 + ID behind HPC0,
//! 0x240 + ID behind HPC1. Build a [`PlWriter`] from a [`PlWriterConfig`] and a port.
//!
//! | Feature | State |
//! |---|---|
//! | Registers 0x30 to 0x44, one 32-bit write per trigger, AxCACHE, AXI ID of 6 bits | covered, as the thesis names them |
//! | Error response | our choice: TRIGGER reads back as [`Status`] with BUSY, DONE, ERROR and the AXI response |
//! | Stalled write | covered: BUSY stays set until it is retried or terminated |
//! | AxPROT | [`PlWriterConfig::axprot`], 0b010 unless the board says otherwise |
//! | Trigger | our choice: a write with bit 0 set; ignored while BUSY, and with bit 0 clear |
//! | Registers written while BUSY | our choice: the write under way keeps what it started with |
//! | Destination bits 1:0 | our choice: read as 0, the IP writes whole words |
//! | Every other offset | our choice: reads as 0, writes are ignored, no bus error |
//! | Interrupt, reads by the IP, bursts | not covered: the IP has none |

use portcullis_arch::plwriter::{AXI_ID_MASK, REGISTERS, Response, Status, reg};
use portcullis_arch::{Attributes, Iova, StreamId};
use portcullis_bus::mmio::Registers32;
use portcullis_bus::{Activity, BusError, DmaFault, DmaPort, Engine, Initiator, StallState, StallTag};
use serde::{Deserialize, Serialize};

use crate::RestoreError;

const VERSION: u32 = 1;
const WORD_BYTES: u8 = 4;

/// What is fixed about a PL writer when the bitstream is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlWriterConfig {
    /// Stream of AXI ID 0 at the PL port it is wired to: 0x200 for HPC0, 0x240 for HPC1.
    pub port_base: StreamId,
    /// AxPROT as the design ties it: bit 0 privileged, bit 1 non-secure, bit 2 instruction.
    pub axprot: u8,
    /// AXI ID after reset (6 bits).
    pub axi_id: u8,
}

impl PlWriterConfig {
    /// A writer at the port whose AXI ID 0 is `port_base`, with AxPROT = 0b010 (unprivileged, non-secure, data) and AXI
    /// ID 0 after reset.
    pub const fn new(port_base: StreamId) -> Self {
        Self { port_base, axprot: 0b010, axi_id: 0 }
    }
}

/// The register values that software sets, in the order of their offsets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Settings {
    destination_low: u32,
    destination_high: u32,
    data: u32,
    cache: u32,
    axi_id: u32,
}

impl Settings {
    fn reset(config: &PlWriterConfig) -> Self {
        Self { axi_id: u32::from(config.axi_id) & AXI_ID_MASK, ..Self::default() }
    }

    fn field(&mut self, offset: u32) -> Option<&mut u32> {
        Some(match offset {
            reg::DESTINATION_LOW => &mut self.destination_low,
            reg::DESTINATION_HIGH => &mut self.destination_high,
            reg::DATA => &mut self.data,
            reg::CACHE => &mut self.cache,
            reg::AXI_ID => &mut self.axi_id,
            _ => return None,
        })
    }

    fn masked(mut self) -> Self {
        for r in &REGISTERS {
            if let Some(value) = self.field(r.offset) {
                *value &= r.mask;
            }
        }
        self
    }
}

/// A write under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Write {
    /// The settings when it was triggered.
    settings: Settings,
    /// Bytes that have been written.
    done: u8,
    /// The stall it waits for.
    parked: Option<StallTag>,
}

/// The PL writer.
pub struct PlWriter {
    config: PlWriterConfig,
    port: Box<dyn DmaPort>,
    settings: Settings,
    status: Status,
    write: Option<Write>,
}

impl PlWriter {
    /// A writer after reset, which reaches memory through `port`.
    pub fn new(config: PlWriterConfig, port: Box<dyn DmaPort>) -> Self {
        Self { config, port, settings: Settings::reset(&config), status: Status::new(), write: None }
    }

    /// What the writer was built with.
    pub fn config(&self) -> &PlWriterConfig {
        &self.config
    }

    /// The stream that a write triggered now would belong to.
    pub fn stream(&self) -> StreamId {
        self.stream_of(&self.settings)
    }

    fn stream_of(&self, settings: &Settings) -> StreamId {
        StreamId(self.config.port_base.get().wrapping_add(settings.axi_id & AXI_ID_MASK))
    }

    /// True while the write waits in the IOMMU for software.
    pub fn is_stalled(&self) -> bool {
        self.write.is_some_and(|w| w.parked.is_some())
    }

    fn trigger(&mut self) {
        if self.write.is_none() {
            self.write = Some(Write { settings: self.settings, done: 0, parked: None });
            self.status = Status::new().with_busy(true);
        }
    }

    fn finish(&mut self, response: Response) {
        self.write = None;
        self.status =
            Status::new().with_done(true).with_error(response != Response::Okay).with_response(response);
    }

    fn issue(&mut self, write: Write) {
        let Write { settings, done, parked: _ } = write;
        let attrs = Attributes::from_axi(settings.cache as u8, self.config.axprot);
        let from = Initiator::new(self.stream_of(&settings)).with_attrs(attrs);
        let at = Iova(u64::from(settings.destination_high) << 32 | u64::from(settings.destination_low));
        let data = settings.data.to_le_bytes();
        let rest = data.get(usize::from(done)..).unwrap_or(&[]);
        let Err(e) = self.port.write(from, at.wrapping_add(u64::from(done)), rest) else {
            return self.finish(Response::Okay);
        };
        match e.fault {
            DmaFault::Stalled(tag) => {
                let done = done + e.done.min(rest.len()) as u8;
                self.write = Some(Write { settings, done, parked: Some(tag) });
            }
            DmaFault::Bus(BusError::Decode) => self.finish(Response::DecErr),
            DmaFault::Terminated | DmaFault::Bus(BusError::Slave) => self.finish(Response::SlvErr),
        }
    }

    /// The state now.
    pub fn save(&self) -> PlWriterState {
        let Self { config: _, port: _, settings, status, write } = self;
        PlWriterState { version: VERSION, settings: *settings, status: status.into_bits(), write: *write }
    }

    /// Continues from a saved state. On an error nothing changes.
    pub fn restore(&mut self, state: PlWriterState) -> Result<(), RestoreError> {
        let PlWriterState { version, settings, status, write } = state;
        if version != VERSION {
            return Err(RestoreError::Version { found: version, expected: VERSION });
        }
        let status = Status::from_bits(status);
        if status.busy() != write.is_some() {
            return Err(RestoreError::Impossible("BUSY and the write under way disagree"));
        }
        if write.is_some_and(|w| w.done >= WORD_BYTES) {
            return Err(RestoreError::Impossible("a write under way that is complete"));
        }
        self.settings = settings.masked();
        self.status = status;
        self.write = write.map(|w| Write { settings: w.settings.masked(), ..w });
        Ok(())
    }
}

/// Everything about a [`PlWriter`] that changes at run time, a parked write included. What it was built with is
/// not part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlWriterState {
    version: u32,
    settings: Settings,
    status: u32,
    write: Option<Write>,
}

impl Registers32 for PlWriter {
    fn read(&mut self, offset: u32) -> Result<u32, BusError> {
        Ok(match offset {
            reg::TRIGGER => self.status.into_bits(),
            _ => self.settings.field(offset).map_or(0, |value| *value),
        })
    }

    fn write(&mut self, offset: u32, value: u32) -> Result<(), BusError> {
        if offset == reg::TRIGGER {
            if value & 1 != 0 {
                self.trigger();
            }
        } else if let Some(field) = self.settings.field(offset) {
            *field = value;
            self.settings = self.settings.masked();
        }
        Ok(())
    }
}

impl Engine for PlWriter {
    fn step(&mut self, _now: u64) -> Activity {
        let Some(write) = self.write else { return Activity::Idle };
        let state = match write.parked {
            Some(tag) => self.port.stall_state(tag),
            None => StallState::Retry,
        };
        match state {
            StallState::Waiting => {}
            StallState::Retry => self.issue(write),
            StallState::Terminated { abort: true } => self.finish(Response::SlvErr),
            StallState::Terminated { abort: false } => self.finish(Response::Okay),
        }
        if self.write.is_some() { Activity::Stalled } else { Activity::Idle }
    }

    fn reset(&mut self) {
        self.settings = Settings::reset(&self.config);
        self.status = Status::new();
        self.write = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testport::{Rule, TestPort};
    use portcullis_arch::{Access, MemoryType};

    const BASE: u64 = 0x6000_0000;

    fn writer(port: &TestPort) -> PlWriter {
        PlWriter::new(PlWriterConfig::new(StreamId(0x200)), Box::new(port.clone()))
    }

    fn program(w: &mut PlWriter, destination: u64, data: u32, cache: u32, id: u32) {
        let values = [
            (0x30, destination as u32),
            (0x34, (destination >> 32) as u32),
            (0x38, data),
            (0x3c, cache),
            (0x40, id),
        ];
        for (offset, value) in values {
            w.write(offset, value).unwrap();
        }
    }

    #[test]
    fn the_trigger_writes_the_word_with_the_programmed_signals() {
        let port = TestPort::new(BASE, 0x4000);
        let mut w = writer(&port);
        program(&mut w, BASE + 0x2000, 0xcafe_beef, 0xf, 5);
        assert_eq!(w.step(0), Activity::Idle);
        assert_eq!(port.bytes(BASE + 0x2000, 4), [0; 4], "nothing before the trigger");
        w.write(0x44, 1).unwrap();
        assert_eq!(w.read(0x44), Ok(1), "busy");
        assert_eq!(w.step(0), Activity::Idle);
        assert_eq!(port.bytes(BASE + 0x2000, 4), 0xcafe_beefu32.to_le_bytes());
        assert_eq!(w.read(0x44), Ok(2), "done, OKAY");
        let seen = port.take_log();
        assert_eq!(seen.len(), 1);
        assert_eq!((seen[0].access, seen[0].addr, seen[0].len), (Access::Write, BASE + 0x2000, 4));
        assert_eq!(seen[0].from.stream, StreamId(0x205));
        let attrs = seen[0].from.attrs;
        assert_eq!(attrs.memory(), MemoryType::NORMAL_WB);
        assert!(attrs.non_secure() && !attrs.privileged() && !attrs.instruction());
    }

    #[test]
    fn registers_keep_the_bits_they_have_and_the_rest_reads_zero() {
        let mut w = writer(&TestPort::new(BASE, 0x1000));
        let expected = [
            (0x00, 0),
            (0x2c, 0),
            (0x30, 0xffff_fffc),
            (0x34, 0xffff_ffff),
            (0x38, 0xffff_ffff),
            (0x3c, 0xf),
            (0x40, 0x3f),
            (0x48, 0),
            (0xfffc, 0),
        ];
        for (offset, _) in expected {
            w.write(offset, u32::MAX).unwrap();
        }
        for (offset, value) in expected {
            assert_eq!(w.read(offset), Ok(value), "{offset:#x}");
        }
        assert_eq!(w.stream(), StreamId(0x23f));
        w.reset();
        for (offset, _) in expected {
            assert_eq!(w.read(offset), Ok(0), "{offset:#x} after reset");
        }
    }

    #[test]
    fn a_refused_write_is_recorded_until_the_next_trigger() {
        let port = TestPort::new(BASE, 0x1000);
        port.add(BASE..BASE + 0x10, Access::Write, Rule::Terminate);
        let mut w = writer(&port);
        program(&mut w, BASE, 1, 0, 0);
        w.write(0x44, 1).unwrap();
        w.step(0);
        assert_eq!(w.read(0x44), Ok(0x26), "done, error, SLVERR");
        program(&mut w, 0x1000, 1, 0, 0);
        w.write(0x44, 1).unwrap();
        assert_eq!(w.read(0x44), Ok(1));
        w.step(0);
        assert_eq!(w.read(0x44), Ok(0x36), "done, error, DECERR");
        program(&mut w, BASE + 0x10, 1, 0, 0);
        w.write(0x44, 0).unwrap();
        assert_eq!(w.step(0), Activity::Idle);
        assert_eq!(w.read(0x44), Ok(0x36), "bit 0 clear starts nothing");
        w.write(0x44, 1).unwrap();
        w.step(0);
        assert_eq!(w.read(0x44), Ok(2));
    }

    #[test]
    fn a_stalled_write_parks_and_survives_save_and_restore() {
        let port = TestPort::new(BASE, 0x1000);
        port.add(BASE..BASE + 4, Access::Write, Rule::Stall);
        let mut w = writer(&port);
        program(&mut w, BASE, 0x1234_5678, 0, 7);
        w.write(0x44, 1).unwrap();
        assert_eq!(w.step(0), Activity::Stalled);
        assert_eq!(w.step(0), Activity::Stalled);
        // What software does meanwhile does not change the write under way.
        program(&mut w, BASE + 0x100, 0xffff_ffff, 0, 1);
        w.write(0x44, 1).unwrap();
        let json = serde_json::to_string(&w.save()).unwrap();
        let mut w = writer(&port);
        w.restore(serde_json::from_str(&json).unwrap()).unwrap();
        assert!(w.is_stalled());
        port.resume_all(StallState::Retry);
        assert_eq!(w.step(0), Activity::Idle);
        assert_eq!(port.bytes(BASE, 4), 0x1234_5678u32.to_le_bytes());
        assert_eq!(port.bytes(BASE + 0x100, 4), [0; 4]);
        assert_eq!(port.take_log().last().unwrap().from.stream, StreamId(0x207));
        assert_eq!(w.read(0x44), Ok(2));
    }

    #[test]
    fn a_terminated_stall_is_an_error_or_an_ignored_write() {
        for (abort, status) in [(true, 0x26), (false, 2)] {
            let port = TestPort::new(BASE, 0x1000);
            port.add(BASE..BASE + 4, Access::Write, Rule::Stall);
            let mut w = writer(&port);
            program(&mut w, BASE, 0xff, 0, 0);
            w.write(0x44, 1).unwrap();
            assert_eq!(w.step(0), Activity::Stalled);
            port.resume_all(StallState::Terminated { abort });
            assert_eq!(w.step(0), Activity::Idle);
            assert_eq!(w.read(0x44), Ok(status));
            assert_eq!(port.bytes(BASE, 4), [0; 4]);
        }
    }

    #[test]
    fn an_impossible_state_is_refused() {
        let port = TestPort::new(BASE, 0x1000);
        let mut w = writer(&port);
        let good = w.save();
        let bad = PlWriterState { version: 9, ..good.clone() };
        assert_eq!(w.restore(bad), Err(RestoreError::Version { found: 9, expected: 1 }));
        assert!(w.restore(PlWriterState { status: 1, ..good.clone() }).is_err());
        assert_eq!(w.restore(good), Ok(()));
    }
}
