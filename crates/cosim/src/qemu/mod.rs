//! Finding, starting and steering QEMU.
