//! From a stream to its S2CR: matching, indexing, compressed indexing (IHI 0062D sections 2.3 and 3.4).

use portcullis_arch::StreamId;
use portcullis_arch::smmuv2::{S2cr, Smr};

use crate::config::Config;
use crate::state::Regs;

/// What the stream mapping registers say about a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// This group matches (or is selected by index).
    Group(u16),
    /// Nothing matches.
    None,
    /// Several groups match, these two and perhaps more.
    Conflict(u16, u16),
}

/// The groups that belong to a security state, as a range of indexes, with the extension taken into account.
pub(crate) fn groups_of(config: &Config, regs: &Regs, secure: bool) -> std::ops::Range<usize> {
    let all = regs.smr.len();
    let side = &regs.side[usize::from(secure)];
    if !config.secure {
        let extended = config.extended_groups() && side.cr2().exsmrgenable();
        return if config.extended_groups() && !extended { all - 128..all } else { 0..all };
    }
    let extended = config.extended_groups() && side.cr2().exsmrgenable();
    let scr1 = usize::from(regs.scr1().nsnumsmrgo());
    let scr2 = regs.side[1].cr2();
    let ns = if !config.extended_groups() {
        scr1.min(all)
    } else if scr2.exsmrgenable() {
        usize::from(scr2.exnsnumsmrgo()).min(all)
    } else {
        all.saturating_sub(128usize.saturating_sub(scr1))
    };
    let low = if config.extended_groups() && !extended { all - 128 } else { 0 };
    if secure { ns.max(low)..all } else { low.min(ns)..ns }
}

/// Finds the group of a stream.
pub(crate) fn find(config: &Config, regs: &Regs, stream: StreamId, secure: bool) -> Match {
    let side = &regs.side[usize::from(secure)];
    let groups = groups_of(config, regs, secure);
    let id = stream.get();
    let extended = config.extended_ids && side.cr0().exidenable();
    let bits = if extended { 16 } else { config.stream_id_bits };
    if id >> bits != 0 {
        return Match::None;
    }
    if !config.stream_matching {
        return indexed(config, regs, id, secure, groups);
    }
    let mut found = None;
    for n in groups {
        if group_matches(regs, n, id, extended) {
            match found {
                None => found = Some(n as u16),
                Some(first) => return Match::Conflict(first, n as u16),
            }
        }
    }
    found.map_or(Match::None, Match::Group)
}

fn indexed(config: &Config, regs: &Regs, id: u32, secure: bool, groups: std::ops::Range<usize>) -> Match {
    let off = !secure && regs.scr1().nscompindexdisable();
    let index = if config.compressed_index && regs.side[usize::from(secure)].cr2().compindexenable() && !off {
        match regs.compindex.get(id as usize) {
            Some(&i) => usize::from(i),
            None => return Match::None,
        }
    } else {
        id as usize
    };
    if groups.contains(&index) { Match::Group(index as u16) } else { Match::None }
}

fn group_matches(regs: &Regs, n: usize, id: u32, extended: bool) -> bool {
    let (Some(&smr), Some(&s2cr)) = (regs.smr.get(n), regs.s2cr.get(n)) else { return false };
    if extended {
        let (want, mask) = (smr & 0xffff, smr >> 16);
        return S2cr::from_bits(s2cr).exidvalid() && (want ^ id) & !mask & 0xffff == 0;
    }
    let smr = Smr::from_bits(smr);
    smr.valid() && (u32::from(smr.id()) ^ id) & !u32::from(smr.mask()) & 0x7fff == 0
}
