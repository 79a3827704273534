//! The host's side: checks what a guest asks for and attaches its tables.

use alloc::collections::VecDeque;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use portcullis_arch::Iova;
use portcullis_drivers::fault::{FaultHandler, FaultReport, FaultResponse};
use portcullis_drivers::ops::{DomainKind, DomainSpec, TableRoot};
use portcullis_iommu::Domain;
use spin::Mutex;

use super::{ViommuError, ViommuFault, ViommuHost, ViommuInfo, ViommuTable};
use crate::group::GroupCore;
use crate::{Group, Ioas, VfioError, Vm};

/// The only endpoint.
const ENDPOINT: u32 = 0;
/// Faults that are kept for a guest that does not fetch them.
const CAPACITY: usize = 64;
/// Widest addresses of a stage 1 table.
const VA_BITS: u8 = 48;
/// Address sizes that have a code.
const IPA_BITS: [u8; 6] = [48, 44, 42, 40, 36, 32];

/// Faults on their way to the guest.
struct Faults {
    vm: Weak<dyn Vm>,
    queue: Mutex<(VecDeque<ViommuFault>, u64)>,
    line: Mutex<Option<u32>>,
}

impl Faults {
    fn raise(&self, high: bool) {
        let line = *self.line.lock();
        if let (Some(line), Some(vm)) = (line, self.vm.upgrade()) {
            vm.set_line(line, high);
        }
    }
}

impl FaultHandler for Faults {
    /// A guest hears of its own stage only; stage 2 is the host's.
    fn fault(&self, report: &FaultReport) -> FaultResponse {
        if report.stage != Some(1) {
            return FaultResponse::Terminate;
        }
        let fault = ViommuFault {
            endpoint: ENDPOINT,
            reason: report.reason,
            iova: report.iova,
            access: report.access,
            privileged: report.privileged,
            instruction: report.instruction,
            level: report.level,
        };
        {
            let mut queue = self.queue.lock();
            if queue.0.len() < CAPACITY {
                queue.0.push_back(fault);
            } else {
                queue.1 = queue.1.saturating_add(1);
            }
        }
        self.raise(true);
        FaultResponse::Terminate
    }
}

/// What the group meets now.
enum Now {
    Bypass,
    Table(Arc<Domain>),
    Blocked(Arc<Domain>),
    Closed,
}

/// The virtual IOMMU of a group in a machine.
pub(crate) struct HostViommu {
    group: Arc<GroupCore>,
    parent: Arc<Domain>,
    info: ViommuInfo,
    faults: Arc<Faults>,
    vm: Weak<dyn Vm>,
    /// Held while the group changes its domain, so that nothing is attached after [`close`](Self::close).
    now: Mutex<Now>,
}

impl HostViommu {
    /// For a group that is in the machine's address space.
    pub fn new(group: &Group, ioas: &Ioas, vm: &Arc<dyn Vm>, coherent: bool) -> Result<Arc<Self>, VfioError> {
        let core = group.registry().core();
        let instance = group.instance();
        let capabilities = core.ops(instance)?.capabilities();
        let parent = ioas.domain(instance).filter(|domain| domain.kind() == DomainKind::Stage2);
        let parent = parent.filter(|_| capabilities.nested).ok_or(ViommuError::NotNested)?;
        let last = parent.input_range().map_or(0, |(_, last)| last.get());
        let width = 64 - last.leading_zeros();
        let ipa_bits = IPA_BITS.into_iter().find(|bits| u32::from(*bits) <= width);
        let walks = |bit: u32| capabilities.page_sizes & 1 << bit != 0;
        let faults =
            Arc::new(Faults { vm: Arc::downgrade(vm), queue: Mutex::default(), line: Mutex::new(None) });
        let ended = Arc::downgrade(&faults);
        let line = vm.connect_line(
            None,
            Arc::new(move |_| {
                if let Some(faults) = ended.upgrade() {
                    faults.raise(false);
                    // Looked at afterwards: a fault that came before is not forgotten.
                    if !faults.queue.lock().0.is_empty() {
                        faults.raise(true);
                    }
                }
            }),
        )?;
        *faults.line.lock() = Some(line);
        let info = ViommuInfo {
            granule_4k: walks(12),
            granule_16k: walks(14),
            granule_64k: walks(16),
            va_bits: VA_BITS,
            ipa_bits: ipa_bits.unwrap_or(32),
            // Memory that is mapped non-cacheable is not snooped, by whoever walks it.
            coherent_walk: capabilities.coherent_walk && coherent,
            line: Some(line),
        };
        Ok(Arc::new(Self {
            group: group.shared().clone(),
            parent,
            info,
            faults,
            vm: Arc::downgrade(vm),
            now: Mutex::new(Now::Bypass),
        }))
    }

    /// The guest's wishes are not heard any more; whatever is attached stays until the group is blocked.
    pub fn close(&self) {
        let old = core::mem::replace(&mut *self.now.lock(), Now::Closed);
        if let Now::Table(domain) | Now::Blocked(domain) = &old {
            domain.set_fault_handler(None);
        }
        let line = self.faults.line.lock().take();
        if let (Some(line), Some(vm)) = (line, self.vm.upgrade()) {
            vm.disconnect_line(line);
        }
    }

    /// What can be told without the hardware.
    fn check(&self, root: &TableRoot) -> Result<TableRoot, ViommuError> {
        let info = &self.info;
        if !info.supports(root.granule) {
            return Err(ViommuError::BadTable("tables of that granule cannot be walked"));
        }
        let bits = 64u8.saturating_sub(root.t0sz);
        if !(25..=info.va_bits).contains(&bits) {
            return Err(ViommuError::BadTable("the table is for more or fewer address bits than there are"));
        }
        if root.ttbr0.get() >> info.ipa_bits != 0 || !root.ttbr0.is_aligned(64) {
            return Err(ViommuError::BadTable("the table is misaligned or no guest physical address"));
        }
        let widest = IPA_BITS.iter().rev().position(|bits| *bits == info.ipa_bits).unwrap_or(0);
        if usize::from(root.ips) > widest {
            return Err(ViommuError::BadTable("the table's addresses are wider than guest physical ones"));
        }
        if root.sh == 1 || root.sh > 3 || root.irgn > 3 || root.orgn > 3 {
            return Err(ViommuError::BadTable("the attributes of table walks have no meaning"));
        }
        // TLB entries are told apart by a tag of the host's choice.
        Ok(TableRoot { asid: None, ..*root })
    }

    fn endpoint(&self, endpoint: u32) -> Result<(), ViommuError> {
        if endpoint == ENDPOINT { Ok(()) } else { Err(ViommuError::UnknownEndpoint(endpoint)) }
    }
}

impl ViommuHost for HostViommu {
    fn info(&self) -> ViommuInfo {
        self.info
    }

    fn endpoints(&self) -> Vec<u32> {
        Vec::from([ENDPOINT])
    }

    fn set_table(&self, endpoint: u32, table: ViommuTable) -> Result<(), ViommuError> {
        self.endpoint(endpoint)?;
        let spec = match table {
            ViommuTable::Bypass => None,
            ViommuTable::Blocked => Some(DomainSpec::Blocked),
            ViommuTable::Stage1(root) => {
                Some(DomainSpec::NestedGuest(self.parent.ops().clone(), self.check(&root)?))
            }
        };
        let old = {
            let mut now = self.now.lock();
            if matches!(*now, Now::Closed) {
                return Err(ViommuError::Gone);
            }
            let next = match spec {
                None => Now::Bypass,
                Some(spec) => {
                    let blocked = matches!(spec, DomainSpec::Blocked);
                    let domain = self.group.registry.core().alloc_domain(self.group.instance, spec);
                    let domain = domain.map_err(|_| ViommuError::Refused)?;
                    domain.set_fault_handler(Some(self.faults.clone()));
                    if blocked { Now::Blocked(domain) } else { Now::Table(domain) }
                }
            };
            let domain = match &next {
                Now::Table(domain) | Now::Blocked(domain) => domain,
                Now::Bypass | Now::Closed => &self.parent,
            };
            self.group.attach(domain).map_err(|_| ViommuError::Refused)?;
            let old = core::mem::replace(&mut *now, next);
            // Looked at last: whoever quarantines the group marks it first and blocks it then.
            if self.group.is_quarantined() {
                self.group.block().map_err(|_| ViommuError::Refused)?;
                return Err(ViommuError::Gone);
            }
            old
        };
        match &old {
            // The guest will free it.
            Now::Table(domain) => domain.ops().invalidate_all().map_err(|_| ViommuError::Unconfirmed),
            _ => Ok(()),
        }
    }

    fn invalidate(&self, endpoint: u32, range: Option<(Iova, u64)>) -> Result<(), ViommuError> {
        self.endpoint(endpoint)?;
        let domain = match &*self.now.lock() {
            Now::Table(domain) => domain.clone(),
            Now::Closed => return Err(ViommuError::Gone),
            Now::Bypass | Now::Blocked(_) => return Ok(()),
        };
        let done = match range {
            // A range that no table of the guest can have is everything.
            Some((iova, len))
                if len > 0 && iova.checked_add(len).is_some_and(|end| end.get() >> VA_BITS == 0) =>
            {
                domain.ops().invalidate(iova, len)
            }
            _ => domain.ops().invalidate_all(),
        };
        done.map_err(|_| ViommuError::Unconfirmed)
    }

    fn take_faults(&self) -> (Vec<ViommuFault>, u64) {
        let mut queue = self.faults.queue.lock();
        (queue.0.drain(..).collect(), core::mem::take(&mut queue.1))
    }
}
