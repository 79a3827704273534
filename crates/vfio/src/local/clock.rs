//! A guest's time: the host's, from the machine's start on.

use alloc::sync::Arc;
use core::fmt;

use portcullis_hal::Clock;

/// The clock of a virtual machine.
#[derive(Clone)]
pub struct GuestClock {
    host: Arc<dyn Clock>,
    start_ns: u64,
}

impl GuestClock {
    /// A clock that begins at 0 now.
    pub fn new(host: Arc<dyn Clock>) -> Self {
        let start_ns = host.now_ns();
        Self { host, start_ns }
    }
}

impl Clock for GuestClock {
    fn now_ns(&self) -> u64 {
        self.host.now_ns().saturating_sub(self.start_ns)
    }
    fn delay_us(&self, us: u64) {
        self.host.delay_us(us);
    }
}

impl fmt::Debug for GuestClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestClock").field("now_ns", &self.now_ns()).finish()
    }
}
