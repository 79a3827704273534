//! How the board lets engines work: bounded steps in the caller's thread.

/// What an engine did in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activity {
    /// Nothing to do until a register is written.
    Idle,
    /// Worked, and has more to do.
    Busy,
    /// A transaction is stalled in the IOMMU; nothing to do until software resumes it.
    Stalled,
    /// Nothing to do until the board's time (nanoseconds) is this.
    Until(u64),
}

/// An engine that moves data by itself.
pub trait Engine: Send {
    /// Does a bounded amount of work. `now` is the board's time in nanoseconds.
    fn step(&mut self, now: u64) -> Activity;
    /// Puts every register and all internal state back to what power-up gives.
    fn reset(&mut self);
}
