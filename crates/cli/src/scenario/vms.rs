//! The virtual machines of a booted board and what they were given.

use std::cell::RefCell;
use std::sync::Arc;

use portcullis_board::guest::BoardVm;
use portcullis_vfio::Assignment;

/// Machines with their assignments, in the order in which these were made.
#[derive(Default)]
pub struct Vms(RefCell<Vec<(usize, Arc<Assignment>)>>);

fn identity(vm: &Arc<BoardVm>) -> usize {
    Arc::as_ptr(vm).addr()
}

impl Vms {
    /// A machine was given something.
    pub fn add(&self, vm: &Arc<BoardVm>, assignment: Arc<Assignment>) {
        self.0.borrow_mut().push((identity(vm), assignment));
    }
    /// What a machine has.
    pub fn of(&self, vm: &Arc<BoardVm>) -> Vec<Arc<Assignment>> {
        let all = self.0.borrow();
        all.iter().filter(|(of, _)| *of == identity(vm)).map(|(_, a)| a.clone()).collect()
    }
    /// An assignment is over.
    pub fn forget(&self, assignment: &Arc<Assignment>) {
        self.0.borrow_mut().retain(|(_, a)| !Arc::ptr_eq(a, assignment));
    }
    /// The assignment of a device is over.
    pub fn forget_device(&self, device: &str) {
        self.0.borrow_mut().retain(|(_, a)| a.device() != device);
    }
}
