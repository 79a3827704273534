//! The vfio-user protocol, server side: one PCI function offered to a virtual machine monitor over a Unix socket.
//!
//! Covered: version 0.0, device, region and interrupt information, interrupts through eventfds, register access (posted
//! and answered, single and [batched](Command::RegionWriteMulti)), memory maps with and without a descriptor, reset, and
//! the requests that go the other way, DMA_READ and DMA_WRITE. Refused with `ENOTSUP`: mappable regions, region file
//! descriptors, dirty pages, device features and migration. Not offered: the twin socket.
//!
//! Start with [`Function`] (what a device must answer) and [`Connection`] (who asks it). [`Listener`] makes the socket,
//! [`peer::Peer`] is a small client for tests and tools, [`wire`] is the layout of every message.
//!
//! ```text
//! Listener ──accept──► Connection ──pump──► serve ──► Function (the caller's device, in the caller's thread)
//!                        │    ▲               │
//!                 input ─┘    └─ output ◄─────┘   replies, and DMA requests whose replies come back through pump
//! ```
//!
//! Rules that shape it:
//!
//! - Nothing here waits, except [`Connection::wait`] and [`Listener::accept`]. A DMA request is queued and its reply is
//!   matched whenever it comes: the client may be holding its big lock inside the very register access being served, and
//!   a server that waited there would never be answered.
//! - The stream ends only when its framing is lost ([`ConnectionError`]). Everything else a peer can get wrong is answered
//!   with an error reply, counted in [`Counters`] and described by [`Connection::last_problem`].
//! - Memory is bounded whatever the peer does: one message in, the output queue, the requests under way.
//!
//! Why own code: the server half of the `vfio_user` crate (0.1.7 is the newest) answers DMA_READ and DMA_WRITE with an error
//! and takes their replies for such requests. It also blocks inside `run`, so several connections and the board's time could
//! not share a thread.
//!
//! The rules are those of QEMU's `docs/interop/vfio-user.rst`; where QEMU's client is stricter than the text, the place that
//! obeys it says so.

mod capabilities;
mod connection;
mod counters;
mod error;
mod function;
mod input;
mod listener;
mod mappings;
mod output;
pub mod peer;
mod requests;
mod serve;
pub mod wire;

pub use capabilities::PeerVersion;
pub use connection::{Connection, Interest, Limits, Pumped, Ready};
pub use counters::Counters;
pub use error::{ConnectionError, Problem, Refusal, RequestError};
pub use function::{
    DeviceInfo, DmaMap, DmaUnmap, Function, IrqAction, IrqData, IrqInfo, RegionInfo, SetIrqs,
};
pub use listener::{ListenError, Listener};
pub use requests::{Completion, DmaFailure, Ticket};
pub use rustix::io::Errno;
pub use wire::Command;

/// Indexes of the regions and interrupts of a PCI function (`VFIO_PCI_*` in `linux/vfio.h`).
pub mod pci {
    /// Region index of BAR 0; the other BARs follow, up to 5.
    pub const BAR0: u32 = 0;
    /// Region index of the expansion ROM.
    pub const ROM: u32 = 6;
    /// Region index of the configuration space.
    pub const CONFIG: u32 = 7;
    /// Region index of the legacy VGA ranges.
    pub const VGA: u32 = 8;
    /// How many regions a PCI function has.
    pub const REGIONS: u32 = 9;

    /// Interrupt index of INTA.
    pub const INTX: u32 = 0;
    /// Interrupt index of MSI.
    pub const MSI: u32 = 1;
    /// Interrupt index of MSI-X.
    pub const MSIX: u32 = 2;
    /// Interrupt index of the error notifier.
    pub const ERR: u32 = 3;
    /// Interrupt index of the request notifier ("please give the device back").
    pub const REQ: u32 = 4;
    /// How many interrupt indexes a PCI function has.
    pub const IRQS: u32 = 5;
}
