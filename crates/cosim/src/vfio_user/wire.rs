//! The layout of every message. Types only: no behaviour, no sockets.
//!
//! Numbers are in the byte order of the host, as the specification says. Offsets in the field comments count from the
//! start of the structure; every payload follows the 16-byte [`Header`].

use zerocopy::native_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of [`Header`] in bytes: the smallest message.
pub const HEADER_SIZE: usize = size_of::<Header>();

/// Bits 0..4 of [`Header::flags`]: the type of the message.
pub const TYPE_MASK: u32 = 0xf;
/// Type of a request.
pub const TYPE_COMMAND: u32 = 0;
/// Type of a reply.
pub const TYPE_REPLY: u32 = 1;
/// Bit 4: the sender of the request wants no reply (a posted write, for example).
pub const NO_REPLY: u32 = 1 << 4;
/// Bit 5, in replies: the request failed and [`Header::error`] is an errno value.
pub const ERROR: u32 = 1 << 5;

/// DMA_MAP flags: the device may read, may write; then two of libvfio-user: map the descriptor, or read and write it.
pub mod map_flags {
    /// The device may read.
    pub const READ: u32 = 1 << 0;
    /// The device may write.
    pub const WRITE: u32 = 1 << 1;
    /// The descriptor may be mapped (libvfio-user's extension; implied when neither this nor [`FILE_IO`] is set).
    pub const MMAP: u32 = 1 << 2;
    /// The descriptor may be read and written (libvfio-user's extension).
    pub const FILE_IO: u32 = 1 << 3;
    /// All of them.
    pub const ALL: u32 = READ | WRITE | MMAP | FILE_IO;
}

/// DMA_UNMAP flags.
pub mod unmap_flags {
    /// Return the dirty bitmap too (never supported here).
    pub const GET_DIRTY_BITMAP: u32 = 1 << 0;
    /// Unmap everything; address and size are ignored.
    pub const ALL: u32 = 1 << 1;
}

/// Flags of the DEVICE_GET_INFO reply.
pub mod device_flags {
    /// DEVICE_RESET is supported.
    pub const RESET: u32 = 1 << 0;
    /// It is a PCI device.
    pub const PCI: u32 = 1 << 1;
}

/// Flags of the DEVICE_GET_REGION_INFO reply.
pub mod region_flags {
    /// The region can be read.
    pub const READ: u32 = 1 << 0;
    /// The region can be written.
    pub const WRITE: u32 = 1 << 1;
}

/// Flags of the DEVICE_GET_IRQ_INFO reply.
pub mod irq_flags {
    /// Eventfds can be signalled.
    pub const EVENTFD: u32 = 1 << 0;
    /// Mask and unmask are supported.
    pub const MASKABLE: u32 = 1 << 1;
    /// Masks itself when it fires; the client unmasks.
    pub const AUTOMASKED: u32 = 1 << 2;
    /// The set cannot grow without disabling the index first.
    pub const NORESIZE: u32 = 1 << 3;
}

/// Flags of DEVICE_SET_IRQS: one of DATA, one of ACTION.
pub mod set_irqs_flags {
    /// No data: the action applies to the whole range.
    pub const DATA_NONE: u32 = 1 << 0;
    /// One byte per interrupt: act where it is not zero.
    pub const DATA_BOOL: u32 = 1 << 1;
    /// Descriptors come with the message, one per interrupt.
    pub const DATA_EVENTFD: u32 = 1 << 2;
    /// Mask.
    pub const ACTION_MASK: u32 = 1 << 3;
    /// Unmask.
    pub const ACTION_UNMASK: u32 = 1 << 4;
    /// Trigger.
    pub const ACTION_TRIGGER: u32 = 1 << 5;
}

macro_rules! commands {
    ($($(#[$doc:meta])* $variant:ident = $number:literal $name:literal,)*) => {
        /// What a message asks for. The numbers are the protocol's; 14 is a command of older peers.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        #[allow(missing_docs, reason = "the names are the specification's")]
        pub enum Command { $($(#[$doc])* $variant = $number,)* }

        impl Command {
            /// Every command, by number.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The specification's name, without `VFIO_USER_`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The command of a number, if the specification knows it.
            pub const fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

commands! {
    Version = 1 "VERSION",
    DmaMap = 2 "DMA_MAP",
    DmaUnmap = 3 "DMA_UNMAP",
    DeviceGetInfo = 4 "DEVICE_GET_INFO",
    DeviceGetRegionInfo = 5 "DEVICE_GET_REGION_INFO",
    DeviceGetRegionIoFds = 6 "DEVICE_GET_REGION_IO_FDS",
    DeviceGetIrqInfo = 7 "DEVICE_GET_IRQ_INFO",
    DeviceSetIrqs = 8 "DEVICE_SET_IRQS",
    RegionRead = 9 "REGION_READ",
    RegionWrite = 10 "REGION_WRITE",
    DmaRead = 11 "DMA_READ",
    DmaWrite = 12 "DMA_WRITE",
    DeviceReset = 13 "DEVICE_RESET",
    DirtyPages = 14 "DIRTY_PAGES",
    RegionWriteMulti = 15 "REGION_WRITE_MULTI",
    DeviceFeature = 16 "DEVICE_FEATURE",
    MigDataRead = 17 "MIG_DATA_READ",
    MigDataWrite = 18 "MIG_DATA_WRITE",
}

impl Command {
    /// The number on the wire.
    pub const fn number(self) -> u16 {
        self as u16
    }
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

macro_rules! layout {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {
        $($(#[$doc])*
        #[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy, Debug, Default)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* })*
    };
}

layout! {
    /// The 16 bytes before every payload.
    Header {
        /// Offset 0. Chosen by the sender of a request, echoed in its reply.
        id: U16,
        /// Offset 2. A [`Command`].
        command: U16,
        /// Offset 4. Size of the whole message in bytes, this header included.
        size: U32,
        /// Offset 8. Type in bits 0..4, [`NO_REPLY`], [`ERROR`].
        flags: U32,
        /// Offset 12. An errno value, in replies with [`ERROR`].
        error: U32,
    }

    /// VERSION, request and reply; JSON with a terminating NUL may follow.
    Version {
        /// Offset 0.
        major: U16,
        /// Offset 2.
        minor: U16,
    }

    /// DMA_MAP request; the reply has no payload.
    DmaMap {
        /// Offset 0. Size of this structure.
        argsz: U32,
        /// Offset 4. See [`map_flags`].
        flags: U32,
        /// Offset 8. Where the range starts in the descriptor that came with the message.
        offset: U64,
        /// Offset 16. First DMA address.
        address: U64,
        /// Offset 24. Bytes.
        size: U64,
    }

    /// DMA_UNMAP request, and its reply.
    DmaUnmap {
        /// Offset 0. Largest reply payload expected.
        argsz: U32,
        /// Offset 4. See [`unmap_flags`].
        flags: U32,
        /// Offset 8. First DMA address.
        address: U64,
        /// Offset 16. Bytes.
        size: U64,
    }

    /// DEVICE_GET_INFO, request and reply.
    DeviceInfo {
        /// Offset 0. Largest reply payload expected; in the reply, the size needed.
        argsz: U32,
        /// Offset 4. See [`device_flags`].
        flags: U32,
        /// Offset 8.
        num_regions: U32,
        /// Offset 12.
        num_irqs: U32,
    }

    /// DEVICE_GET_REGION_INFO, request and reply.
    RegionInfo {
        /// Offset 0. Largest reply payload expected; in the reply, the size needed.
        argsz: U32,
        /// Offset 4. See [`region_flags`].
        flags: U32,
        /// Offset 8. The region asked for.
        index: U32,
        /// Offset 12. Where capabilities start; 0 when there are none.
        cap_offset: U32,
        /// Offset 16. Bytes.
        size: U64,
        /// Offset 24. For `mmap`; 0 when the region cannot be mapped.
        offset: U64,
    }

    /// DEVICE_GET_IRQ_INFO, request and reply.
    IrqInfo {
        /// Offset 0. Largest reply payload expected; in the reply, the size needed.
        argsz: U32,
        /// Offset 4. See [`irq_flags`].
        flags: U32,
        /// Offset 8. The interrupt index asked for.
        index: U32,
        /// Offset 12. How many interrupts it has.
        count: U32,
    }

    /// DEVICE_SET_IRQS request; boolean bytes may follow. The reply has no payload.
    SetIrqs {
        /// Offset 0. Size of this structure and its data.
        argsz: U32,
        /// Offset 4. See [`set_irqs_flags`].
        flags: U32,
        /// Offset 8. The interrupt index.
        index: U32,
        /// Offset 12. First interrupt of the range.
        start: U32,
        /// Offset 16. Interrupts in the range.
        count: U32,
    }

    /// REGION_READ and REGION_WRITE, requests and replies; data follow in a read's reply and a write's request.
    RegionAccess {
        /// Offset 0. Byte offset in the region.
        offset: U64,
        /// Offset 8.
        region: U32,
        /// Offset 12. Bytes.
        count: U32,
    }

    /// REGION_WRITE_MULTI: one number before the writes; also its whole reply.
    WriteCount {
        /// Offset 0. Writes that follow; in the reply, writes done.
        count: U64,
    }

    /// REGION_WRITE_MULTI: one write of at most 8 bytes.
    WriteOne {
        /// Offset 0. Byte offset in the region.
        offset: U64,
        /// Offset 8.
        region: U32,
        /// Offset 12. Bytes of `data` that count.
        count: U32,
        /// Offset 16.
        data: [u8; 8],
    }

    /// DMA_READ and DMA_WRITE, requests and replies; data follow in a read's reply and a write's request.
    DmaAccess {
        /// Offset 0. First DMA address.
        address: U64,
        /// Offset 8. Bytes.
        count: U64,
    }
}

impl Header {
    /// Whether the type bits say request.
    pub fn is_command(&self) -> bool {
        self.flags.get() & TYPE_MASK == TYPE_COMMAND
    }

    /// Whether the type bits say reply.
    pub fn is_reply(&self) -> bool {
        self.flags.get() & TYPE_MASK == TYPE_REPLY
    }

    /// Whether the sender wants no reply.
    pub fn no_reply(&self) -> bool {
        self.flags.get() & NO_REPLY != 0
    }

    /// A request of `body` payload bytes.
    pub fn request(id: u16, command: Command, flags: u32, body: usize) -> Self {
        Self::new(id, command.number(), flags | TYPE_COMMAND, 0, body)
    }

    /// The reply to `self`, of `body` payload bytes.
    pub fn reply(&self, body: usize) -> Self {
        Self::new(self.id.get(), self.command.get(), TYPE_REPLY, 0, body)
    }

    /// The reply to `self` that carries an errno value and nothing else.
    pub fn error_reply(&self, errno: u32) -> Self {
        Self::new(self.id.get(), self.command.get(), TYPE_REPLY | ERROR, errno, 0)
    }

    fn new(id: u16, command: u16, flags: u32, error: u32, body: usize) -> Self {
        // Callers bound the body by the largest message, which fits 32 bits.
        let size = u32::try_from(HEADER_SIZE.saturating_add(body)).unwrap_or(u32::MAX);
        Self {
            id: id.into(),
            command: command.into(),
            size: size.into(),
            flags: flags.into(),
            error: error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_have_the_sizes_of_the_specification() {
        let sizes = [
            (size_of::<Header>(), 16),
            (size_of::<Version>(), 4),
            (size_of::<DmaMap>(), 32),
            (size_of::<DmaUnmap>(), 24),
            (size_of::<DeviceInfo>(), 16),
            (size_of::<RegionInfo>(), 32),
            (size_of::<IrqInfo>(), 16),
            (size_of::<SetIrqs>(), 20),
            (size_of::<RegionAccess>(), 16),
            (size_of::<WriteCount>(), 8),
            (size_of::<WriteOne>(), 24),
            (size_of::<DmaAccess>(), 16),
        ];
        for (ours, theirs) in sizes {
            assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn commands_round_trip_by_number() {
        for &command in Command::ALL {
            assert_eq!(Command::from_number(command.number()), Some(command));
        }
        assert_eq!(Command::from_number(0), None);
        assert_eq!(Command::from_number(19), None);
    }
}
