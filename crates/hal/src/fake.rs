//! A platform for tests.
