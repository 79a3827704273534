//! A board behind the window: memory, interrupts, time, the record.
