//! Faults find the device that caused them: by stream id, checked against the context bank.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use portcullis_drivers::fault::{FaultHandler, FaultReason, FaultReport, FaultResponse};

use crate::AddressSpace;
use crate::manager::{DeviceId, Inner, InstanceId};

/// A fault with its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutedFault {
    /// The IOMMU that reported it.
    pub instance: InstanceId,
    /// The device, if a known one has the stream, or is alone in the bank.
    pub device: Option<DeviceId>,
    /// Its name.
    pub name: Option<String>,
    /// The fault.
    pub report: FaultReport,
    /// What its owner answered.
    pub response: FaultResponse,
}

/// What [`IommuCore::take_faults`](crate::IommuCore::take_faults) gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutedBatch {
    /// Oldest first.
    pub faults: Vec<RoutedFault>,
    /// Faults that did not fit; the oldest are kept.
    pub lost: u64,
}

/// Faults that are kept.
const CAPACITY: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct RoutedLog {
    queue: VecDeque<RoutedFault>,
    lost: u64,
}

impl RoutedLog {
    fn push(&mut self, fault: RoutedFault) {
        if self.queue.len() < CAPACITY {
            self.queue.push_back(fault);
        } else {
            self.lost = self.lost.saturating_add(1);
        }
    }

    pub fn take(&mut self) -> RoutedBatch {
        RoutedBatch { faults: self.queue.drain(..).collect(), lost: core::mem::take(&mut self.lost) }
    }
}

/// Whether a page can be what is missing.
fn may_pass(report: &FaultReport) -> bool {
    use FaultReason::{AccessFlag, Permission, Translation};
    matches!(report.reason, Translation | AccessFlag | Permission) && report.stage != Some(2)
}

/// The fault handler that the core gives to each IOMMU.
pub(crate) struct Router {
    pub core: Weak<Inner>,
    pub instance: InstanceId,
}

impl FaultHandler for Router {
    fn fault(&self, report: &FaultReport) -> FaultResponse {
        let Some(core) = self.core.upgrade() else { return FaultResponse::Terminate };
        let Owner { device, name, handler, space } = core.owner_of(self.instance, report);
        // Without a lock: the owner may map, attach or unbind.
        let response = match (handler, space) {
            (Some(handler), _) => handler.fault(report),
            // Only what waits can be helped.
            (None, Some(space)) if report.stalled && may_pass(report) && space.resolve(report) => {
                FaultResponse::Resolved
            }
            _ => FaultResponse::Terminate,
        };
        let fault = RoutedFault { instance: self.instance, device, name, report: *report, response };
        core.log.lock().push(fault);
        response
    }
}

/// Whose fault it is, and who is to be asked: a handler first, else the process that the device is bound to.
#[derive(Default)]
struct Owner {
    device: Option<DeviceId>,
    name: Option<String>,
    handler: Option<Arc<dyn FaultHandler>>,
    space: Option<Arc<dyn AddressSpace>>,
}

impl Inner {
    /// The device that a fault belongs to and who is to be asked: the device's handler, else its domain's.
    fn owner_of(&self, instance: InstanceId, report: &FaultReport) -> Owner {
        let state = self.state.lock();
        let has_stream = |streams: &[crate::StreamMatch]| {
            report.stream.is_some_and(|stream| streams.iter().any(|own| own.matches(stream)))
        };
        let in_bank = |device: &crate::manager::Device| {
            let domain = state.groups.get(&device.group).map(|group| &group.domain);
            report.bank.is_none() || domain.is_some_and(|domain| domain.bank() == report.bank)
        };
        let here = || state.devices.iter().filter(|(_, device)| device.instance == instance);
        let by_stream = || here().filter(|(_, device)| has_stream(device.master.streams()));
        // A fault may be older than an attach, so the bank decides only between devices that share a stream. A fault
        // of stage 2 under a nested domain names the parent's bank.
        let found =
            by_stream().find(|(_, device)| in_bank(device)).or_else(|| by_stream().next()).or_else(|| {
                report.bank?;
                let mut alone = here().filter(|(_, device)| in_bank(device));
                let first = alone.next()?;
                alone.next().is_none().then_some(first)
            });
        match found {
            Some((id, device)) => {
                let group = state.groups.get(&device.group);
                let (domain, space) = match report.substream {
                    Some(substream) => {
                        let bond = device.substreams.get(&substream);
                        (bond.map(|bond| bond.domain()), bond.map(|bond| bond.space.clone()))
                    }
                    None => {
                        let bond = group.and_then(|group| group.bond.as_ref());
                        (group.map(|group| &group.domain), bond.map(|bond| bond.space().clone()))
                    }
                };
                let of_domain = || domain.and_then(|domain| domain.handler.lock().clone());
                Owner {
                    device: Some(*id),
                    name: Some(device.name.clone()),
                    handler: device.handler.clone().or_else(of_domain),
                    space,
                }
            }
            None => {
                let of_bank = state.groups.values().find(|group| {
                    group.instance == instance && report.bank.is_some() && group.domain.bank() == report.bank
                });
                let handler = of_bank.and_then(|group| group.domain.handler.lock().clone());
                Owner { handler, ..Owner::default() }
            }
        }
    }
}
