//! Taking groups, mapping memory, giving devices to machines and taking them back.

mod assign;
mod group;
mod ioas;
