//! The guest's device tree, from QEMU's own and the board's.
