//! Devices in virtual machines: [`Passthrough::assign`] and the way back.
//!
//! A machine has one I/O address space (stage 2, its memory at its IPAs) that all its devices share, from the first device
//! on until the last one leaves.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::Iova;
use portcullis_drivers::ops::Paging;
use portcullis_iommu::Prot;
use spin::Mutex;

use crate::{AssignOptions, Assignment, Ioas, IoasOptions, IoasStage, Registry, VfioError, Vm};

/// The address space of a machine.
struct Space {
    vm: Arc<dyn Vm>,
    ioas: Arc<Ioas>,
    coherent: bool,
    users: usize,
}

#[derive(Default)]
struct State {
    spaces: Vec<Space>,
    assignments: Vec<Arc<Assignment>>,
}

/// All assignments of a host. Clones are handles to the same one.
#[derive(Clone)]
pub struct Passthrough {
    registry: Registry,
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for Passthrough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Passthrough").field("assignments", &self.state.lock().assignments.len()).finish()
    }
}

fn same(a: &Arc<dyn Vm>, b: &Arc<dyn Vm>) -> bool {
    core::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}

impl Passthrough {
    /// Nothing assigned yet.
    pub fn new(registry: Registry) -> Self {
        Self { registry, state: Arc::default() }
    }

    /// The devices.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Gives the whole group of a device, which is bound to [`VFIO_DRIVER`](crate::VFIO_DRIVER), to a machine: the group is taken
    /// and its devices are stopped; the machine's memory is pinned and mapped; the devices are opened (and reset); their
    /// interrupts are connected; their registers appear in the machine, last of all.
    ///
    /// # Errors
    /// Everything is undone, as [`Assignment::release`] does.
    pub fn assign(
        &self,
        device: &str,
        vm: Arc<dyn Vm>,
        options: AssignOptions,
    ) -> Result<Arc<Assignment>, VfioError> {
        if let Some(found) = self.find(device) {
            return Err(VfioError::Assigned { device: device.to_string(), vm: found.vm().name() });
        }
        if !vm.is_alive() {
            return Err(crate::VmError::Dead { vm: vm.name() }.into());
        }
        let group = self.registry.take_group(device)?;
        let ioas = self.space(&vm, &options)?;
        let assigned = Assignment::new(device, group, vm.clone(), ioas, &options);
        match assigned {
            Ok(assignment) => {
                self.state.lock().assignments.push(assignment.clone());
                Ok(assignment)
            }
            Err(error) => {
                let spare = self.leave(&vm);
                drop(spare);
                Err(error)
            }
        }
    }

    /// The address space of a machine, with one user more.
    fn space(&self, vm: &Arc<dyn Vm>, options: &AssignOptions) -> Result<Arc<Ioas>, VfioError> {
        {
            let mut state = self.state.lock();
            if let Some(space) = state.spaces.iter_mut().find(|space| same(&space.vm, vm)) {
                if space.coherent != options.coherent {
                    let problem = "its other devices access memory with another coherency".to_string();
                    return Err(crate::VmError::Other { vm: vm.name(), problem }.into());
                }
                space.users += 1;
                return Ok(space.ioas.clone());
            }
        }
        let ioas = Ioas::new(
            vm.pins(),
            IoasOptions {
                stage: IoasStage::Stage2,
                paging: Paging { input_bits: options.ipa_bits, ..Paging::default() },
                fault_model: options.fault_model,
                limits: options.limits,
            },
        );
        for range in vm.memory() {
            let prot = if range.writable { Prot::RW } else { Prot::READ }.noexec();
            let prot = if options.coherent { prot.cached() } else { prot };
            ioas.map(Iova(range.ipa.get()), &range.backing, prot)?;
        }
        let space = Space { vm: vm.clone(), ioas: ioas.clone(), coherent: options.coherent, users: 1 };
        let mut state = self.state.lock();
        if state.spaces.iter().any(|space| same(&space.vm, vm)) {
            drop(state);
            // Another device of the machine was faster; this one is for nothing.
            drop(space);
            drop(ioas);
            return self.space(vm, options);
        }
        state.spaces.push(space);
        Ok(ioas)
    }

    /// One user less; the address space if it was the last, for dropping without the lock.
    fn leave(&self, vm: &Arc<dyn Vm>) -> Option<(Arc<dyn Vm>, Arc<Ioas>)> {
        let mut state = self.state.lock();
        let index = state.spaces.iter().position(|space| same(&space.vm, vm))?;
        let space = state.spaces.get_mut(index)?;
        space.users = space.users.saturating_sub(1);
        if space.users > 0 {
            return None;
        }
        let space = state.spaces.swap_remove(index);
        Some((space.vm, space.ioas))
    }

    /// The assignment of a device.
    pub fn find(&self, device: &str) -> Option<Arc<Assignment>> {
        let state = self.state.lock();
        let has = |a: &&Arc<Assignment>| a.devices().iter().any(|d| d.device().name == device);
        state.assignments.iter().find(has).cloned()
    }

    /// All assignments.
    pub fn assignments(&self) -> Vec<Arc<Assignment>> {
        self.state.lock().assignments.clone()
    }

    /// The I/O address space of a machine that has devices.
    pub fn ioas(&self, vm: &Arc<dyn Vm>) -> Option<Arc<Ioas>> {
        let state = self.state.lock();
        state.spaces.iter().find(|space| same(&space.vm, vm)).map(|space| space.ioas.clone())
    }

    /// Takes the group back ([`Assignment::release`]). With its last device, the machine's memory is unpinned.
    ///
    /// # Errors
    /// The group has been taken back all the same.
    pub fn release(&self, assignment: &Arc<Assignment>) -> Result<(), VfioError> {
        let mine = {
            let mut state = self.state.lock();
            let index = state.assignments.iter().position(|other| Arc::ptr_eq(other, assignment));
            index.map(|index| state.assignments.swap_remove(index))
        };
        let result = assignment.release();
        if mine.is_some()
            && let Some((vm, ioas)) = self.leave(assignment.vm())
        {
            let closed = ioas.close();
            // The address space first: it is what holds the machine's memory.
            drop(ioas);
            drop(vm);
            return result.and(closed.map_err(VfioError::from));
        }
        result
    }

    /// Takes back the devices of machines that have died; gives what became of each, by device and machine.
    pub fn reap(&self) -> Vec<(String, String, Result<(), VfioError>)> {
        let dead: Vec<_> = self.assignments().into_iter().filter(|a| !a.vm().is_alive()).collect();
        dead.iter()
            .map(|assignment| {
                let result = self.release(assignment);
                (assignment.device().to_string(), assignment.vm().name(), result)
            })
            .collect()
    }

    /// For the host's interrupt handler: the line is high, or had an edge. Gives how many devices were told. A handler that knows
    /// whose line it is asks [`Assignment::interrupt`].
    pub fn interrupt(&self, line: u32) -> usize {
        self.assignments().iter().map(|assignment| assignment.interrupt(line)).sum()
    }
}
