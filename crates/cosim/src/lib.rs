//! Co-simulation: an unmodified Linux kernel in stock QEMU drives the models of a board.
//!
//! QEMU (10.1 or newer) has a client for the vfio-user protocol. This crate is the server: it offers one PCI function
//! whose BAR 0 is a window onto the board's registers. Nodes of the guest's device tree point into that window, the
//! guest's RAM is memory that both processes map, and interrupts travel as writes to the guest's interrupt controller.
//!
//! | What | Module |
//! |---|---|
//! | the protocol: messages, one connection, what a function must answer | [`vfio_user`] |
//! | finding, starting and steering QEMU; the kit of guest images | [`qemu`] |
//! | the guest's device tree, from QEMU's own and the board's | [`guest_tree`] |
//! | all of it: a kernel on a board | [`linux`] |
//! | a board behind the window: memory, interrupts, time, the record | [`session`] |
#![deny(unsafe_code)]

pub mod guest_tree;
pub mod linux;
pub mod qemu;
pub mod session;
pub mod vfio_user;
