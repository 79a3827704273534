//! For virtual machine monitors on rust-vmm's `vm-memory`: guest memory as the SMMU's, and a port as its [`Iommu`].
//!
//! [`GuestRam`] makes any guest memory what this crate's models read and write. [`PortIommu`] makes the port of one
//! device what `vm_memory::IommuMemory` asks, so that a device model written against `vm_memory::GuestMemory` (virtio, for
//! example) sits behind the SMMU unchanged.
//!
//! What `vm-memory`'s trait cannot say is left out: a translation is handed over before the access, so a CMD_SYNC does
//! not wait for accesses through an [`IommuMemory`](vm_memory::IommuMemory) (it does for those through
//! [`Port`]); a fault that reads zeros is an error; a stalled transaction is an error whose tag
//! [`PortIommu::take_stall`] has.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_arch::{Access, Attributes, Iova, Pa};
use portcullis_bus::{BusError, DmaPort, Initiator, Memory, StallState, StallTag};
use portcullis_walk::FaultOutcome;
use vm_memory::bitmap::Bitmap;
use vm_memory::iommu::{Error as IommuError, Iommu, IotlbIterator, IovaRange};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, Iotlb, Permissions, VolatileMemory,
};

use crate::ats::Port;
use crate::model::SmmuV3;

/// Guest memory as an SMMU sees it. Clones share it.
pub struct GuestRam<B>(Arc<B>);

impl<B> GuestRam<B> {
    /// This memory.
    pub fn new(memory: Arc<B>) -> Self {
        Self(memory)
    }
    /// The memory inside.
    pub fn inner(&self) -> &Arc<B> {
        &self.0
    }
}

impl<B> Clone for GuestRam<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

fn refused(e: GuestMemoryError) -> BusError {
    match e {
        GuestMemoryError::InvalidGuestAddress(_) | GuestMemoryError::GuestAddressOverflow => BusError::Decode,
        _ => BusError::Slave,
    }
}

fn aligned(pa: Pa, bytes: u64) -> Result<GuestAddress, BusError> {
    if pa.is_aligned(bytes) { Ok(GuestAddress(pa.get())) } else { Err(BusError::Slave) }
}

impl<B: GuestMemoryBackend + Send + Sync> GuestRam<B> {
    /// All or nothing, also where the range ends in a hole.
    fn range(&self, pa: Pa, len: usize) -> Result<GuestAddress, BusError> {
        let at = GuestAddress(pa.get());
        let fits = pa.checked_add(len as u64).is_some() && GuestMemoryBackend::check_range(&*self.0, at, len);
        if fits { Ok(at) } else { Err(BusError::Decode) }
    }
}

impl<B: GuestMemoryBackend + Send + Sync> Memory for GuestRam<B> {
    fn read(&self, pa: Pa, _: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        let at = self.range(pa, buf.len())?;
        self.0.read_slice(buf, at).map_err(refused)
    }
    fn write(&self, pa: Pa, _: Attributes, buf: &[u8]) -> Result<(), BusError> {
        let at = self.range(pa, buf.len())?;
        self.0.write_slice(buf, at).map_err(refused)
    }
    fn load64(&self, pa: Pa, _: Attributes) -> Result<u64, BusError> {
        self.0.load::<u64>(aligned(pa, 8)?, Ordering::Acquire).map(u64::from_le).map_err(refused)
    }
    fn load32(&self, pa: Pa, _: Attributes) -> Result<u32, BusError> {
        self.0.load::<u32>(aligned(pa, 4)?, Ordering::Acquire).map(u32::from_le).map_err(refused)
    }
    fn cas64(&self, pa: Pa, _: Attributes, expected: u64, new: u64) -> Result<u64, BusError> {
        let slice = GuestMemoryBackend::get_slice(&*self.0, aligned(pa, 8)?, 8).map_err(refused)?;
        let word = slice.get_atomic_ref::<AtomicU64>(0).map_err(|_| BusError::Slave)?;
        let swap = word.compare_exchange(expected.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Acquire);
        if swap.is_ok() {
            slice.bitmap().mark_dirty(0, 8);
        }
        Ok(u64::from_le(swap.unwrap_or_else(|held| held)))
    }
}

/// The port of one device as `vm-memory`'s [`Iommu`]. Nothing is cached but in the port, which forgets what the guest
/// invalidates.
pub struct PortIommu<M: Memory> {
    port: Mutex<(Port<M>, Option<StallTag>)>,
    from: Initiator,
}

impl<M: Memory> PortIommu<M> {
    /// The IOMMU of a device that issues its transactions as `from` through `port`.
    pub fn new(port: Port<M>, from: Initiator) -> Self {
        Self { port: Mutex::new((port, None)), from }
    }

    /// The SMMU behind it.
    pub fn smmu(&self) -> Arc<SmmuV3<M>> {
        self.lock().0.smmu().clone()
    }

    /// The tag of the transaction that has stalled since this was last called, if one has.
    pub fn take_stall(&self) -> Option<StallTag> {
        self.lock().1.take()
    }

    /// What became of a stalled transaction.
    pub fn stall_state(&self, tag: StallTag) -> StallState {
        self.lock().0.stall_state(tag)
    }

    fn lock(&self) -> MutexGuard<'_, (Port<M>, Option<StallTag>)> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: Memory> std::fmt::Debug for PortIommu<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PortIommu").field("from", &self.from).finish_non_exhaustive()
    }
}

impl<M: Memory> Iommu for PortIommu<M> {
    type IotlbGuard<'a>
        = Arc<Iotlb>
    where
        Self: 'a;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Arc<Iotlb>>, IommuError> {
        let refused = |base: u64, length: u64, reason: String| IommuError::CannotResolve {
            iova_range: IovaRange {
                base: GuestAddress(base),
                length: usize::try_from(length).unwrap_or(usize::MAX),
            },
            reason,
        };
        let Some(end) = iova.0.checked_add(length as u64) else {
            return Err(refused(iova.0, length as u64, "the range wraps around".into()));
        };
        let accesses: &[Access] = match access {
            Permissions::Write => &[Access::Write],
            Permissions::ReadWrite => &[Access::Read, Access::Write],
            Permissions::Read | Permissions::No => &[Access::Read],
        };
        let mut iotlb = Iotlb::new();
        let mut held = self.lock();
        let (port, stall) = &mut *held;
        let mut at = iova.0;
        while at < end {
            let mut run = None;
            for access in accesses {
                match port.translate(&self.from, Iova(at), *access) {
                    Ok(t) => run = Some((t.pa, t.left.min(end - at))),
                    Err(outcome) => {
                        let reason = match outcome {
                            FaultOutcome::Stall(tag) => {
                                *stall = Some(tag);
                                "stalled by the SMMU"
                            }
                            _ => "terminated by the SMMU",
                        };
                        return Err(refused(at, end - at, format!("{access} {reason}")));
                    }
                }
            }
            let Some((pa, left)) = run.filter(|(_, left)| *left > 0) else { break };
            let len = usize::try_from(left).unwrap_or(usize::MAX);
            iotlb.set_mapping(GuestAddress(at), GuestAddress(pa.get()), len, access)?;
            at += len as u64;
        }
        Iotlb::lookup(Arc::new(iotlb), iova, length, access)
            .map_err(|_| refused(iova.0, length as u64, "the range is not mapped as a whole".into()))
    }
}
