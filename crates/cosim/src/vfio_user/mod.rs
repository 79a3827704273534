//! The vfio-user protocol, server side.
