//! Real QEMU and a real kernel.
#![cfg(feature = "linux")]
