//! From a stream to its S2CR: matching, indexing, compressed indexing (IHI 0062D sections 2.3 and 3.4).

use portcullis_arch::StreamId;
use portcullis_arch::smmuv2::S2cr;

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

/// True if this security state uses the groups beyond the first 128 (CR2.EXSMRGENABLE). The secure side can forbid
/// the other to.
pub(crate) fn extension_on(config: &Config, regs: &Regs, secure: bool) -> bool {
    let forbidden = config.secure && !secure && regs.side[1].cr2().exnssmrgdisable();
    config.extended_groups() && !forbidden && regs.side[usize::from(secure)].cr2().exsmrgenable()
}

/// How many groups, counted from 0, are not the secure side's.
pub(crate) fn non_secure_groups(config: &Config, regs: &Regs) -> usize {
    let all = regs.smr.len();
    if !config.secure {
        return all;
    }
    let scr1 = usize::from(regs.scr1().nsnumsmrgo());
    if !config.extended_groups() {
        return scr1.min(all);
    }
    let scr2 = regs.side[1].cr2();
    if scr2.exsmrgenable() {
        return usize::from(scr2.exnsnumsmrgo()).min(all);
    }
    // Only the last 128 are in use, and of those the first NSNUMSMRGO are non-secure.
    all.saturating_sub(128usize.saturating_sub(scr1))
}

/// The groups that belong to a security state, as a range of indexes, with the extension taken into account: while it
/// is off, the last 128 are all there are.
pub(crate) fn groups_of(config: &Config, regs: &Regs, secure: bool) -> std::ops::Range<usize> {
    let all = regs.smr.len();
    let extended = config.extended_groups();
    let low = if extended && !extension_on(config, regs, secure) { all - 128 } else { 0 };
    let ns = non_secure_groups(config, regs);
    if secure { ns.max(low)..all } else { low.min(ns)..ns }
}

/// Finds the group of a stream.
pub(crate) fn find(config: &Config, regs: &Regs, stream: StreamId, secure: bool) -> Match {
    let side = &regs.side[usize::from(secure)];
    let groups = groups_of(config, regs, secure);
    let id = stream.get();
    let extended = config.extended_ids && side.cr0().exidenable();
    let bits = if extended { 16 } else { config.stream_bits() };
    if id >> bits != 0 {
        return Match::None;
    }
    if !config.stream_matching {
        return indexed(config, regs, id, secure, groups);
    }
    let first = groups.start;
    let (Some(smr), Some(s2cr)) = (regs.smr.get(groups.clone()), regs.s2cr.get(groups)) else {
        return Match::None;
    };
    if extended {
        let mut all = smr.iter().zip(s2cr).enumerate().filter(|(_, g)| extended_matches(*g.0, *g.1, id));
        let mut next = || all.next().map(|(at, _)| (first + at) as u16);
        return match (next(), next()) {
            (None, _) => Match::None,
            (Some(one), None) => Match::Group(one),
            (Some(one), Some(two)) => Match::Conflict(one, two),
        };
    }
    // Hardware compares all groups at once. So does this: no branch inside the loop. Where one matches, the sum of the
    // positions that match is its position.
    let (mut count, mut sum) = (0, 0);
    for (at, &smr) in smr.iter().enumerate() {
        let hit = u32::from(matches(smr, id));
        count += hit;
        sum += at as u32 & hit.wrapping_neg();
    }
    match count {
        0 => Match::None,
        1 => Match::Group((first + sum as usize) as u16),
        _ => {
            let mut all = (first..).zip(smr).filter(|(_, smr)| matches(**smr, id)).map(|(at, _)| at as u16);
            match (all.next(), all.next()) {
                (Some(one), Some(two)) => Match::Conflict(one, two),
                _ => Match::None,
            }
        }
    }
}

/// SMR with EXIDENABLE = 0: valid, and equal where MASK is 0.
#[inline(always)]
fn matches(smr: u32, id: u32) -> bool {
    // One comparison: bit 31 of what has to be 0 is the valid bit turned around.
    ((smr ^ id) & !(smr >> 16) & 0x7fff) | (!smr & 1 << 31) == 0
}

/// SMR with EXIDENABLE = 1: EXMASK, EXID, and the valid bit in S2CR.
#[inline]
fn extended_matches(smr: u32, s2cr: u32, id: u32) -> bool {
    S2cr::from_bits(s2cr).exidvalid() && (smr ^ id) & !(smr >> 16) & 0xffff == 0
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
