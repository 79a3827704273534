//! A network device, as far as an IOMMU can tell: the transmit DMA of a Cadence GEM (GEM0 to GEM3 of a ZynqMP).
//!
//! It is here for one reason: on a Zynq UltraScale+ the way of a GEM to memory passes the SMMU or not as a bit of
//! IOU_INTERCONNECT_ROUTE says, and a board whose device tree believes the other one has a dead network (system S0).
//!
//! | Feature | State |
//! |---|---|
//! | Transmit queue 0: NCR.TE/TSTART/THALT, TBQP, TBQPH, descriptors of 8 and 16 bytes, frames of several buffers, wrap | covered |
//! | TSR, ISR (write one to clear), IER, IDR, IMR, counters of frames and octets | covered |
//! | A bus error or an IOMMU's abort: BEX, TXERR, the descriptor marked, transmission stops | covered |
//! | Stalled transactions | covered: the frame goes on where it stopped |
//! | What leaves on the wire | the last frame is kept ([`Gem::last_frame`]) |
//! | Receiving, other queues, PTP, checksum offload, MDIO | not covered: their registers read as 0 and ignore writes |
//! | ISR that clears on reading | different: some GEMs do, this one is of the other kind |
//! | Save and restore | not covered |

use portcullis_arch::gem::{DMACFG_ADDR64, TxControl, interrupt, ncr, reg, tsr};
use portcullis_arch::{Attributes, Iova, StreamId};
use portcullis_bus::mmio::Registers32;
use portcullis_bus::{
    Activity, BusError, DmaError, DmaFault, DmaPort, Engine, Initiator, IrqLine, StallState, StallTag,
};

/// Descriptors per step.
const STEP_DESCRIPTORS: usize = 64;
/// Bytes of a frame that are gathered at most; the MAC has no larger ones.
const MAX_FRAME: usize = 16 * 1024;

/// What is fixed about a GEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemConfig {
    /// Its stream.
    pub stream: StreamId,
    /// Its accesses snoop.
    pub coherent: bool,
}

/// Where a frame stands.
#[derive(Clone, Debug, Default)]
struct Sending {
    /// Transmission was started and has not ended.
    going: bool,
    /// Descriptor in work.
    at: u64,
    /// The descriptor that the frame began with.
    first: u64,
    /// The control word of that descriptor.
    first_control: u32,
    /// What is gathered of the frame.
    frame: Vec<u8>,
    /// Bytes of the descriptor in work that are gathered already.
    gathered: usize,
    parked: Option<StallTag>,
}

/// The model.
pub struct Gem {
    config: GemConfig,
    port: Box<dyn DmaPort>,
    irq: IrqLine,
    ncr: u32,
    ncfgr: u32,
    dmacfg: u32,
    tsr: u32,
    isr: u32,
    imr: u32,
    tbqp: u64,
    frames: u32,
    octets: u64,
    sending: Sending,
    last: Vec<u8>,
}

/// What a step of the queue came to.
enum Next {
    /// One descriptor further.
    Further,
    /// Nothing more to do, or it waits.
    Stop,
}

impl Gem {
    /// A GEM after reset.
    pub fn new(config: GemConfig, port: impl DmaPort + 'static, irq: IrqLine) -> Self {
        Self {
            config,
            port: Box::new(port),
            irq,
            ncr: 0,
            ncfgr: 0,
            dmacfg: 0,
            tsr: 0,
            isr: 0,
            imr: interrupt::ALL,
            tbqp: 0,
            frames: 0,
            octets: 0,
            sending: Sending::default(),
            last: Vec::new(),
        }
    }
    /// The frame that left last.
    pub fn last_frame(&self) -> &[u8] {
        &self.last
    }
    /// True while a transaction waits in the IOMMU for software.
    pub fn is_stalled(&self) -> bool {
        self.sending.parked.is_some()
    }

    fn initiator(&self) -> Initiator {
        let attrs = Attributes::from_axi(if self.config.coherent { 0xf } else { 0x3 }, 0b010);
        Initiator::new(self.config.stream).with_attrs(attrs)
    }
    fn raise(&mut self, status: u32, cause: u32) {
        self.tsr |= status;
        self.isr |= cause;
        self.drive();
    }
    fn drive(&self) {
        self.irq.set(self.isr & !self.imr != 0);
    }
    fn descriptor_bytes(&self) -> usize {
        if self.dmacfg & DMACFG_ADDR64 != 0 { 16 } else { 8 }
    }

    /// A transaction did not complete.
    fn fault(&mut self, error: DmaError) -> Next {
        match error.fault {
            DmaFault::Stalled(tag) => self.sending.parked = Some(tag),
            DmaFault::Terminated | DmaFault::Bus(_) => self.break_off(),
        }
        Next::Stop
    }
    /// The frame is lost: its first descriptor says so, and transmission ends.
    fn break_off(&mut self) {
        let control = TxControl::from_bits(self.sending.first_control).with_used(true).with_bus_error(true);
        let at = Iova(self.sending.first.wrapping_add(4));
        let from = self.initiator();
        // If that cannot be written either, the registers tell.
        let _lost = self.port.write(from, at, &control.into_bits().to_le_bytes());
        self.sending = Sending { at: self.tbqp, ..Sending::default() };
        self.raise(tsr::BEX, interrupt::TXERR);
    }

    /// One descriptor.
    fn advance(&mut self) -> Next {
        let from = self.initiator();
        let size = self.descriptor_bytes();
        let mut words = [0; 16];
        let Some(words) = words.get_mut(..size) else { return Next::Stop };
        if let Err(error) = self.port.read(from, Iova(self.sending.at), words) {
            if self.sending.frame.is_empty() {
                (self.sending.first, self.sending.first_control) = (self.sending.at, 0);
            }
            return self.fault(error);
        }
        let word = |i: usize| {
            let bytes = words.get(i * 4..i * 4 + 4).and_then(|b| b.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        let (low, control, high) = (word(0), TxControl::from_bits(word(1)), word(2));
        let begins = self.sending.frame.is_empty() && self.sending.gathered == 0;
        if begins {
            if control.used() {
                self.sending.going = false;
                self.raise(tsr::UBR, interrupt::TXUBR);
                return Next::Stop;
            }
            (self.sending.first, self.sending.first_control) = (self.sending.at, control.into_bits());
        }
        let len = control.length() as usize;
        if self.sending.frame.len().saturating_add(len - self.sending.gathered.min(len)) > MAX_FRAME {
            self.break_off();
            return Next::Stop;
        }
        let already = self.sending.gathered.min(len);
        let mut buffer = vec![0; len - already];
        let address = (u64::from(high) << 32 | u64::from(low)).wrapping_add(already as u64);
        let read = self.port.read(from, Iova(address), &mut buffer);
        let have = read.err().map_or(buffer.len(), |e| e.done.min(buffer.len()));
        self.sending.frame.extend_from_slice(&buffer[..have]);
        self.sending.gathered = already + have;
        if let Err(error) = read {
            return self.fault(error);
        }
        if control.last() {
            let done = TxControl::from_bits(self.sending.first_control).with_used(true);
            let at = Iova(self.sending.first.wrapping_add(4));
            if let Err(error) = self.port.write(from, at, &done.into_bits().to_le_bytes()) {
                return self.fault(error);
            }
            self.frames = self.frames.wrapping_add(1);
            self.octets = self.octets.wrapping_add(self.sending.frame.len() as u64);
            self.last = std::mem::take(&mut self.sending.frame);
            self.raise(tsr::COMP, interrupt::TCOMP);
        }
        self.sending.gathered = 0;
        self.sending.at = if control.wrap() { self.tbqp } else { self.sending.at.wrapping_add(size as u64) };
        Next::Further
    }
}

impl Registers32 for Gem {
    fn read(&mut self, offset: u32) -> Result<u32, BusError> {
        Ok(match offset {
            reg::NCR => self.ncr,
            reg::NCFGR => self.ncfgr,
            reg::DMACFG => self.dmacfg,
            reg::TSR => self.tsr | if self.sending.going { tsr::TGO } else { 0 },
            reg::TBQP => self.sending.at as u32,
            reg::TBQPH => (self.sending.at >> 32) as u32,
            reg::ISR => self.isr,
            reg::IMR => self.imr,
            reg::OCTTXL => self.octets as u32,
            reg::OCTTXH => (self.octets >> 32) as u32,
            reg::TXCNT => self.frames,
            _ => 0,
        })
    }
    fn write(&mut self, offset: u32, value: u32) -> Result<(), BusError> {
        match offset {
            reg::NCR => {
                self.ncr = value & !(ncr::TSTART | ncr::THALT);
                if value & ncr::TE == 0 || value & ncr::THALT != 0 {
                    self.sending = Sending { at: self.tbqp, ..Sending::default() };
                } else if value & ncr::TSTART != 0 {
                    self.sending.going = true;
                }
            }
            reg::NCFGR => self.ncfgr = value,
            reg::DMACFG => self.dmacfg = value,
            reg::TSR => self.tsr &= !value,
            reg::TBQP | reg::TBQPH if !self.sending.going => {
                self.tbqp = match offset {
                    reg::TBQP => self.tbqp & !0xffff_ffff | u64::from(value & !3),
                    _ => self.tbqp & 0xffff_ffff | u64::from(value) << 32,
                };
                self.sending.at = self.tbqp;
            }
            reg::ISR => self.isr &= !value,
            reg::IER => self.imr &= !value,
            reg::IDR => self.imr |= value & interrupt::ALL,
            _ => {}
        }
        self.drive();
        Ok(())
    }
}

impl Engine for Gem {
    fn step(&mut self, _now: u64) -> Activity {
        if !self.sending.going {
            return Activity::Idle;
        }
        if let Some(tag) = self.sending.parked {
            match self.port.stall_state(tag) {
                StallState::Waiting => return Activity::Stalled,
                StallState::Retry => self.sending.parked = None,
                StallState::Terminated { .. } => self.break_off(),
            }
        }
        for _ in 0..STEP_DESCRIPTORS {
            if !self.sending.going {
                return Activity::Idle;
            }
            match self.advance() {
                Next::Further => {}
                Next::Stop if self.sending.parked.is_some() => return Activity::Stalled,
                Next::Stop => return Activity::Idle,
            }
        }
        Activity::Busy
    }
    fn reset(&mut self) {
        (self.ncr, self.ncfgr, self.dmacfg, self.tsr, self.isr, self.imr) = (0, 0, 0, 0, 0, interrupt::ALL);
        (self.tbqp, self.frames, self.octets) = (0, 0, 0);
        self.sending = Sending::default();
        self.last.clear();
        self.drive();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use portcullis_bus::dma::DirectPort;
    use portcullis_bus::{IrqLevels, Memory, SystemMemory};

    use super::*;

    const RING: u64 = 0x1000;

    struct Rig {
        memory: SystemMemory,
        gem: Gem,
        lines: Arc<IrqLevels>,
    }
    fn rig() -> Rig {
        let memory = SystemMemory::new(&[(0x1000, 0x10000)]).unwrap();
        let lines = Arc::new(IrqLevels::default());
        let config = GemConfig { stream: StreamId(0x877), coherent: false };
        let mut gem = Gem::new(config, DirectPort::new(memory.clone()), IrqLine::new(lines.clone(), 63));
        gem.write(reg::TBQP, RING as u32).unwrap();
        gem.write(reg::IER, interrupt::ALL).unwrap();
        Rig { memory, gem, lines }
    }
    impl Rig {
        fn descriptor(&self, i: u64, address: u32, control: TxControl) {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(control.into_bits().to_le_bytes());
            self.memory.write(portcullis_arch::Pa(RING + i * 8), Attributes::default(), &bytes).unwrap();
        }
        fn control(&self, i: u64) -> TxControl {
            let mut word = [0; 4];
            self.memory
                .read(portcullis_arch::Pa(RING + i * 8 + 4), Attributes::default(), &mut word)
                .unwrap();
            TxControl::from_bits(u32::from_le_bytes(word))
        }
        fn go(&mut self) {
            self.gem.write(reg::NCR, ncr::TE | ncr::TSTART).unwrap();
            while self.gem.step(0) == Activity::Busy {}
        }
    }

    #[test]
    fn a_frame_of_two_buffers_leaves_as_one() {
        let mut rig = rig();
        rig.memory.write(portcullis_arch::Pa(0x3000), Attributes::default(), b"head").unwrap();
        rig.memory.write(portcullis_arch::Pa(0x4000), Attributes::default(), b"tail!").unwrap();
        rig.descriptor(0, 0x3000, TxControl::new().with_length(4));
        rig.descriptor(1, 0x4000, TxControl::new().with_length(5).with_last(true));
        rig.descriptor(2, 0, TxControl::new().with_used(true).with_wrap(true));
        rig.go();
        assert_eq!(rig.gem.last_frame(), b"headtail!");
        assert!(rig.control(0).used() && !rig.control(1).used(), "the first descriptor tells");
        assert_eq!(rig.gem.read(reg::TXCNT), Ok(1));
        assert_eq!(rig.gem.read(reg::TSR), Ok(tsr::COMP | tsr::UBR));
        assert!(rig.lines.level(63));
        rig.gem.write(reg::ISR, interrupt::ALL).unwrap();
        assert!(!rig.lines.level(63));
    }

    #[test]
    fn a_buffer_that_is_not_there_breaks_the_frame_off() {
        let mut rig = rig();
        rig.descriptor(0, 0xffff_f000, TxControl::new().with_length(64).with_last(true));
        rig.go();
        assert_eq!(rig.gem.read(reg::TSR), Ok(tsr::BEX));
        assert!(rig.control(0).bus_error() && rig.control(0).used());
        assert_eq!((rig.gem.read(reg::TXCNT), rig.gem.last_frame().len()), (Ok(0), 0));
    }

    #[test]
    fn a_ring_without_an_end_stays_bounded() {
        let mut rig = rig();
        // Never last, always back to the start.
        rig.descriptor(0, 0x3000, TxControl::new().with_length(1000).with_wrap(true));
        rig.go();
        assert_eq!(rig.gem.read(reg::TSR), Ok(tsr::BEX), "no frame is longer than the MAC's");
        // Of no length: it goes on and on, a bounded number of descriptors at a time.
        rig.descriptor(0, 0x3000, TxControl::new().with_wrap(true));
        rig.gem.write(reg::NCR, ncr::TE | ncr::TSTART).unwrap();
        assert_eq!((rig.gem.step(0), rig.gem.step(0)), (Activity::Busy, Activity::Busy));
        rig.gem.write(reg::NCR, 0).unwrap();
        assert_eq!(rig.gem.step(0), Activity::Idle);
    }
}
