//! The AXI DMA of AMD/Xilinx programmable logic (PG021), its two channels looped back through a stream FIFO as
//! system S0 wires them: memory -> MM2S -> FIFO -> S2MM -> memory.
//!
//! Build an [`AxiDma`] from an [`AxiDmaConfig`], one port and two interrupt lines; write its registers
//! ([`Registers32`]) and [`step`](Engine::step) it. Descriptor fetches, payload reads and payload writes are three
//! AXI masters, so three streams. What a channel keeps and how its registers react is in `channel`, the descriptor
//! rules in `descriptors`, data movement in `transfer`, the stream in `fifo`, saving in `state`.
//!
//! | Feature | State |
//! |---|---|
//! | Register map, reset values, write-one-to-clear, both builds (scatter-gather, direct) | covered; absent registers read 0, writes to them do nothing |
//! | Addresses of 32 to 64 bits | covered; above 32 the TAILDESC_MSB write starts the engine and the TAILDESC write alone does nothing |
//! | CURDESC | writable while halted without error; shows the descriptor in work; an error freezes it |
//! | Tail pointer: start, pause after the descriptor at TAILDESC, resume at its NXTDESC | covered; the link is kept as fetched; the comparison is for equality with the descriptor just completed |
//! | TAILDESC written while halted | starts nothing |
//! | Starting again after a stop | our choice: at CURDESC, whether or not software wrote it |
//! | Packets: TXSOF, TXEOF, TLAST, RXSOF, RXEOF, short and long packets | covered; TXSOF has no effect (QEMU: the same) |
//! | Cyclic mode | covered |
//! | IRQThreshold | packets, in scatter-gather builds; a change reloads the count; 0 is stored as 1 (our choice) |
//! | IRQDelay | covered: from the end of a packet, stopped by the data of the next one and by the threshold interrupt (our choice), not running while RS = 0 or Dly_Irq is pending |
//! | Errors: internal, slave, decode, of payload and descriptors | covered; the channel halts, the other one goes on; RS cannot be set again until a reset (our choice) |
//! | Descriptor with a payload error | STATUS has the error bit, the bytes before it and Cmplt (the latter is our choice) |
//! | Err_Irq | set by the error's appearance, so that it can be acknowledged |
//! | Reset by DMACR | covered: whole core, done at once, wins over RS; a stalled transaction is forgotten |
//! | Data in the FIFO at a reset | [`AxiDmaConfig::fifo_reset_with_core`]: gone, or delivered to whoever receives next |
//! | RS 1 -> 0 | the descriptor in work is finished as far as data flows, then Halted |
//! | RS 1 -> 0 of a channel that waits for the stream | [`AxiDmaConfig::halt_when_starved`]: halts, the descriptor is left without status; or as real cores, not before data comes |
//! | Direct mode | covered; LENGTH is ignored while halted (PG021) or busy (our choice); S2MM LENGTH reads back what was written |
//! | Direct S2MM: packet longer than LENGTH | DMAIntErr when the buffer is full without TLAST; the rest stays in the FIFO |
//! | Stalled transactions | covered: the channel parks, the other one goes on; a stalled fetch or status write is repeated whole; a terminated one without abort covers one AXI burst ([`BURST_BYTES`]) |
//! | Descriptor prefetch | not covered: a descriptor is fetched when the one before is done |
//! | Keyhole | different: reads back, nothing else happens |
//! | Status and control streams (APP words), multichannel mode, micro mode, realignment engine | not covered: any buffer alignment works |
//! | Overlapping MM2S and S2MM buffers | undefined: data may go straight from source to destination, see `transfer` |

mod channel;
mod descriptors;
mod fifo;
mod state;
#[cfg(test)]
mod tests;
mod transfer;

use portcullis_arch::axidma::{Build, DESCRIPTOR_MASK, Dmacr, MM2S, reg, register_at};
use portcullis_arch::{Attributes, Shareability, StreamId};
use portcullis_bus::mmio::Registers32;
use portcullis_bus::{Activity, BusError, DmaPort, Engine, Initiator, IrqLine};

use channel::Channel;
use fifo::Fifo;
pub use state::AxiDmaState;

/// The most payload bytes one [`step`](Engine::step) moves.
pub const STEP_BYTES: usize = 256 * 1024;
/// The most actions (a descriptor fetch, a status write, a piece of data) one [`step`](Engine::step) takes.
pub const STEP_ACTIONS: u32 = 256;
/// Bytes of one AXI burst: 16 beats of 32 bits, as in S0.
pub const BURST_BYTES: u32 = 64;

/// The streams of a core's three AXI masters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AxiDmaStreams {
    /// Descriptor fetches and status writes.
    pub sg: StreamId,
    /// Payload reads.
    pub mm2s: StreamId,
    /// Payload writes.
    pub s2mm: StreamId,
}

/// What is fixed about a core when the logic is synthesised, and how the model decides what PG021 leaves open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AxiDmaConfig {
    /// True with a scatter-gather engine, false for direct mode.
    pub sg: bool,
    /// Bits of an address, 32 to 64: `xlnx,addrwidth`. Values outside are taken as the nearest.
    pub address_bits: u8,
    /// Bits of a length, 8 to 26: `xlnx,sg-length-width`. Values outside are taken as the nearest.
    pub length_bits: u8,
    /// The streams of its masters.
    pub streams: AxiDmaStreams,
    /// AxPROT of every transaction.
    pub axprot: u8,
    /// AxCACHE of every transaction.
    pub axcache: u8,
    /// True if its transactions are marked outer shareable.
    pub coherent: bool,
    /// Bytes of the loopback FIFO; at least one.
    pub fifo_bytes: usize,
    /// True if a reset by DMACR empties the loopback FIFO too.
    pub fifo_reset_with_core: bool,
    /// True: a channel that is stopped while it waits for the stream halts at once. False: only when data has come
    /// for the buffer in work, or on a reset.
    pub halt_when_starved: bool,
    /// Clock of the scatter-gather engine, which the delay timer counts, in hertz.
    pub sg_clock_hz: u64,
}

impl AxiDmaConfig {
    /// An engine of system S0: scatter-gather, 64-bit addresses, 26-bit lengths, AxPROT 0b010, AxCACHE 0b0011 (what
    /// the core drives by itself), not coherent, 100 MHz. Its streams are `first_stream` (descriptors) and the two
    /// after it (MM2S, S2MM).
    pub const fn s0(first_stream: StreamId) -> Self {
        let StreamId(first) = first_stream;
        Self {
            sg: true,
            address_bits: 64,
            length_bits: 26,
            streams: AxiDmaStreams {
                sg: first_stream,
                mm2s: StreamId(first.wrapping_add(1)),
                s2mm: StreamId(first.wrapping_add(2)),
            },
            axprot: 0b010,
            axcache: 0b0011,
            coherent: false,
            fifo_bytes: 4096,
            fifo_reset_with_core: true,
            halt_when_starved: true,
            sg_clock_hz: 100_000_000,
        }
    }

    fn wide(&self) -> bool {
        self.address_bits > 32
    }

    fn address_mask(&self) -> u64 {
        u64::MAX >> (64 - u32::from(self.address_bits.clamp(32, 64)))
    }

    fn descriptor_mask(&self) -> u64 {
        self.address_mask() & DESCRIPTOR_MASK
    }

    fn length_mask(&self) -> u32 {
        (1 << self.length_bits.clamp(8, 26)) - 1
    }

    fn initiator(&self, stream: StreamId) -> Initiator {
        let attrs = Attributes::from_axi(self.axcache, self.axprot);
        let attrs = if self.coherent { attrs.with_shareability(Shareability::Outer) } else { attrs };
        Initiator::new(stream).with_attrs(attrs)
    }

    /// True if the build has the register at `offset` of a block.
    fn has(&self, build: Build, offset: u32) -> bool {
        let high = matches!(offset, reg::CURDESC_MSB | reg::TAILDESC_MSB | reg::ADDRESS_MSB);
        let built = match build {
            Build::Both => true,
            Build::ScatterGather => self.sg,
            Build::Direct => !self.sg,
        };
        built && (self.wide() || !high)
    }
}

/// The two channels of a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    /// Memory to stream.
    Mm2s,
    /// Stream to memory.
    S2mm,
}

impl Direction {
    const BOTH: [Self; 2] = [Self::Mm2s, Self::S2mm];
}

/// One AXI DMA core with its loopback FIFO.
pub struct AxiDma {
    config: AxiDmaConfig,
    port: Box<dyn DmaPort>,
    mm2s_irq: IrqLine,
    s2mm_irq: IrqLine,
    mm2s: Channel,
    s2mm: Channel,
    fifo: Fifo,
    /// Room for payload on its way into the FIFO; never holds anything between actions.
    scratch: Vec<u8>,
    /// False in tests that want every byte to go through the FIFO.
    cut_through: bool,
}

impl AxiDma {
    /// A core after power-up, which reaches memory through `port` and drives the interrupt lines of its channels.
    pub fn new(config: AxiDmaConfig, port: Box<dyn DmaPort>, mm2s: IrqLine, s2mm: IrqLine) -> Self {
        Self {
            config,
            port,
            mm2s_irq: mm2s,
            s2mm_irq: s2mm,
            mm2s: Channel::default(),
            s2mm: Channel::default(),
            fifo: Fifo::default(),
            scratch: Vec::new(),
            cut_through: true,
        }
    }

    /// What the core was built with.
    pub fn config(&self) -> &AxiDmaConfig {
        &self.config
    }

    /// The levels of the interrupt outputs: MM2S, S2MM.
    pub fn irq_levels(&self) -> [bool; 2] {
        [self.mm2s.interrupt(), self.s2mm.interrupt()]
    }

    /// True while a transaction waits in the IOMMU for software.
    pub fn is_stalled(&self) -> bool {
        self.mm2s.parked.is_some() || self.s2mm.parked.is_some()
    }

    /// Payload bytes in the loopback FIFO.
    pub fn fifo_level(&self) -> usize {
        self.fifo.len()
    }

    fn peek(&self, which: Direction) -> &Channel {
        match which {
            Direction::Mm2s => &self.mm2s,
            Direction::S2mm => &self.s2mm,
        }
    }

    fn channel(&mut self, which: Direction) -> &mut Channel {
        match which {
            Direction::Mm2s => &mut self.mm2s,
            Direction::S2mm => &mut self.s2mm,
        }
    }

    fn drive_irqs(&self) {
        self.mm2s_irq.set(self.mm2s.interrupt());
        self.s2mm_irq.set(self.s2mm.interrupt());
    }

    /// DMACR.Reset of either channel.
    fn soft_reset(&mut self) {
        (self.mm2s, self.s2mm) = (Channel::default(), Channel::default());
        if self.config.fifo_reset_with_core {
            self.fifo = Fifo::default();
        }
    }
}

/// The channel that a register block belongs to.
fn owner(block: u32) -> Direction {
    if block == MM2S { Direction::Mm2s } else { Direction::S2mm }
}

impl Registers32 for AxiDma {
    fn read(&mut self, offset: u32) -> Result<u32, BusError> {
        let Some((block, register)) = register_at(offset) else { return Ok(0) };
        if !self.config.has(register.build, register.offset) {
            return Ok(0);
        }
        let channel = self.peek(owner(block));
        Ok(match register.offset {
            reg::DMACR => channel.control,
            reg::DMASR => channel.status_word(self.config.sg),
            reg::CURDESC => channel.current as u32,
            reg::CURDESC_MSB => (channel.current >> 32) as u32,
            reg::TAILDESC => channel.tail_register as u32,
            reg::TAILDESC_MSB => (channel.tail_register >> 32) as u32,
            reg::ADDRESS => channel.address as u32,
            reg::ADDRESS_MSB => (channel.address >> 32) as u32,
            reg::LENGTH => channel.length,
            _ => 0,
        })
    }

    fn write(&mut self, offset: u32, value: u32) -> Result<(), BusError> {
        let Some((block, register)) = register_at(offset) else { return Ok(()) };
        let config = self.config;
        if !config.has(register.build, register.offset) {
            return Ok(());
        }
        let channel = self.channel(owner(block));
        match register.offset {
            reg::DMACR if Dmacr::from_bits(value).reset() => self.soft_reset(),
            reg::DMACR => channel.write_control(value & register.writable),
            reg::DMASR => channel.acknowledge(value),
            reg::CURDESC | reg::CURDESC_MSB if channel.takes_current() => {
                let high = register.offset == reg::CURDESC_MSB;
                channel.current = replace(channel.current, high, value) & config.descriptor_mask();
            }
            reg::TAILDESC | reg::TAILDESC_MSB => {
                let high = register.offset == reg::TAILDESC_MSB;
                channel.tail_register =
                    replace(channel.tail_register, high, value) & config.descriptor_mask();
                if high == config.wide() {
                    channel.start_at_tail();
                }
            }
            reg::ADDRESS | reg::ADDRESS_MSB => {
                let high = register.offset == reg::ADDRESS_MSB;
                channel.address = replace(channel.address, high, value) & config.address_mask();
            }
            reg::LENGTH => channel.start_direct(value & config.length_mask(), block == MM2S),
            _ => {}
        }
        self.drive_irqs();
        Ok(())
    }
}

/// `old` with one half exchanged.
fn replace(old: u64, high: bool, value: u32) -> u64 {
    match high {
        true => old & 0xffff_ffff | u64::from(value) << 32,
        false => old & !0xffff_ffff | u64::from(value),
    }
}

impl Engine for AxiDma {
    fn step(&mut self, now: u64) -> Activity {
        for which in Direction::BOTH {
            self.ask_about_stall(which, now);
        }
        let mut bytes = STEP_BYTES;
        let mut actions = STEP_ACTIONS;
        let more = loop {
            if bytes == 0 || actions == 0 {
                break true;
            }
            let Some(used) = self.advance(bytes, now) else { break false };
            bytes = bytes.saturating_sub(used);
            actions -= 1;
        };
        if !more && self.config.halt_when_starved {
            self.mm2s.halt_if_starved();
            self.s2mm.halt_if_starved();
        }
        let clock = self.config.sg_clock_hz;
        let deadlines = [self.mm2s.run_timer(now, clock), self.s2mm.run_timer(now, clock)];
        self.drive_irqs();
        match deadlines.into_iter().flatten().min() {
            _ if more => Activity::Busy,
            Some(at) => Activity::Until(at),
            None if self.is_stalled() => Activity::Stalled,
            None => Activity::Idle,
        }
    }

    fn reset(&mut self) {
        (self.mm2s, self.s2mm) = (Channel::default(), Channel::default());
        self.fifo = Fifo::default();
        self.drive_irqs();
    }
}
