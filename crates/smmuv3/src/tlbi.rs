//! TLB invalidation commands (IHI 0070 section 4.4): from a command to what ports forget.

use portcullis_arch::smmuv3::Opcode;
use portcullis_arch::smmuv3::cmd::Tlbi;
use portcullis_walk::{Invalidation, Regime, Scope, StageScope};

use crate::caps::Caps;

/// The registers on which invalidations depend.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    /// The command came through the secure queue.
    pub secure_queue: bool,
    /// CR2.E2H of the non-secure interface (also for commands of the secure queue).
    pub e2h: bool,
    /// CR0.VMW of the queue's interface.
    pub vmw: u8,
}

/// What a command with an address removes: (first, last, granule), or an address alone.
enum Target {
    Address(u64),
    Range { start: u64, last: u64, granule_log2: u8 },
}

/// True if the range fields are a reserved combination: a granule, but neither a range nor a level.
pub(crate) fn reserved_range(caps: &Caps, c: Tlbi) -> bool {
    caps.ril && c.tg() != 0 && c.num() == 0 && scale(caps, c) == 0 && level(caps, c) == 0
}

/// SCALE has five bits, six with IDR5.DS.
fn scale(caps: &Caps, c: Tlbi) -> u8 {
    if caps.ds { c.scale().min(39) } else { c.scale() & 0x1f }
}

/// TTL. Level 1 with 16 KiB granules exists with IDR5.DS only and acts as any level otherwise.
fn level(caps: &Caps, c: Tlbi) -> u8 {
    if c.tg() == 2 && c.ttl() == 1 && !caps.ds { 0 } else { c.ttl() }
}

fn target(caps: &Caps, c: Tlbi, address: u64) -> Target {
    let granule_log2 = match c.tg() {
        _ if !caps.ril => 0,
        1 => 12,
        2 => 14,
        3 => 16,
        _ => 0,
    };
    if granule_log2 == 0 {
        return Target::Address(address);
    }
    // The range does not wrap at the top of the address space.
    let bytes = (u128::from(c.num()) + 1) << (scale(caps, c) + granule_log2);
    let last = u128::from(address) + bytes - 1;
    Target::Range { start: address, last: u64::try_from(last).unwrap_or(u64::MAX), granule_log2 }
}

/// What a command removes; nothing for opcodes that are not TLB invalidations. The command is legal.
pub(crate) fn invalidations(caps: &Caps, set: Setting, opcode: Opcode, c: Tlbi) -> Vec<Invalidation> {
    use Opcode::*;
    let vmid_mask = if caps.vmid16 { 0xffff } else { 0xff };
    let asid = c.asid() & if caps.asid16 { 0xffff } else { 0xff };
    let secure = set.secure_queue;
    let all = StageScope::All;
    let scope = |secure, regime, vmid, asid, stages| Scope { secure, regime, vmid, asid, stages };
    // Without secure stage 2, secure entries have no VMID.
    let has_vmid = caps.stage2 && !secure;
    let first = StageScope::Stage1AndCombined;
    let guest = |asid| scope(secure, Some(Regime::Guest), has_vmid.then_some(c.vmid()), asid, first);
    let non_secure = |stages| scope(false, Some(Regime::Guest), Some(c.vmid()), None, stages);
    let host = if set.e2h { Regime::HypHost } else { Regime::Hyp };
    let hyp = |regime, asid| scope(false, Some(regime), None, asid, all);
    let (one, address) = match opcode {
        TlbiNhAll => (guest(None), None),
        TlbiNhAsid => (guest(Some(asid)), None),
        TlbiNhVa => (guest(Some(asid)), Some(c.addr_63_12() << 12)),
        TlbiNhVaa => (guest(None), Some(c.addr_63_12() << 12)),
        TlbiEl3All => (scope(true, Some(Regime::Monitor), None, None, all), None),
        TlbiEl3Va => (scope(true, Some(Regime::Monitor), None, None, all), Some(c.addr_63_12() << 12)),
        TlbiEl2All => {
            let both = [Regime::Hyp, Regime::HypHost];
            return both.map(|r| Invalidation::Contexts(hyp(r, None))).to_vec();
        }
        TlbiEl2Asid => (hyp(Regime::HypHost, Some(asid)), None),
        TlbiEl2Va => (hyp(host, set.e2h.then_some(asid)), Some(c.addr_63_12() << 12)),
        TlbiEl2Vaa => (hyp(host, None), Some(c.addr_63_12() << 12)),
        TlbiS12Vmall => (non_secure(all), None),
        TlbiS2Ipa => (non_secure(StageScope::Stage2), Some((c.addr_63_12() & 0xff_ffff_ffff) << 12)),
        TlbiNsnhAll => (scope(false, Some(Regime::Guest), None, None, all), None),
        TlbiSnhAll => (scope(true, Some(Regime::Guest), None, None, all), None),
        _ => return Vec::new(),
    };
    let vmids: Vec<Option<u16>> = match one.vmid {
        None => vec![None],
        Some(vmid) => {
            // VMID wildcards: so many low bits count as equal.
            let vmid = vmid & vmid_mask;
            let low = if caps.vmw && set.vmw <= 4 { (1u16 << set.vmw) - 1 } else { 0 };
            (0..=low).map(|n| Some(vmid & !low | n)).collect()
        }
    };
    let target = address.map(|a| target(caps, c, a));
    let what = |vmid| {
        let scope = Scope { vmid, ..one };
        match target {
            None => Invalidation::Contexts(scope),
            Some(Target::Address(address)) => Invalidation::Address(scope, address),
            Some(Target::Range { start, last, granule_log2 }) => {
                Invalidation::Range { scope, start, last, granule_log2 }
            }
        }
    };
    vmids.into_iter().map(what).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NS: Setting = Setting { secure_queue: false, e2h: false, vmw: 0 };

    fn command() -> Tlbi {
        Tlbi::new().with_vmid(0x1234).with_asid(0x5678).with_addr_63_12(0xffff_ffff_0001)
    }

    fn one(caps: &Caps, set: Setting, opcode: Opcode, c: Tlbi) -> Invalidation {
        let all = invalidations(caps, set, opcode, c);
        assert_eq!(all.len(), 1);
        all[0]
    }

    #[test]
    fn scopes_are_those_of_the_manual() {
        let full = Caps::full();
        let s =
            |secure, regime, vmid, asid, stages| Scope { secure, regime: Some(regime), vmid, asid, stages };
        let va = 0xffff_ffff_0001u64 << 12;
        use Opcode::*;
        use Regime::*;
        use StageScope::{All, Stage1AndCombined as First, Stage2 as Second};
        let (v, a) = (Some(0x1234), Some(0x5678));
        let secure = Setting { secure_queue: true, ..NS };
        let e2h = Setting { e2h: true, ..NS };
        let contexts = [
            (NS, TlbiNhAll, s(false, Guest, v, None, First)),
            (NS, TlbiNhAsid, s(false, Guest, v, a, First)),
            (NS, TlbiEl2Asid, s(false, HypHost, None, a, All)),
            (NS, TlbiS12Vmall, s(false, Guest, v, None, All)),
            (NS, TlbiNsnhAll, s(false, Guest, None, None, All)),
            (secure, TlbiNhAll, s(true, Guest, None, None, First)),
            (secure, TlbiNhAsid, s(true, Guest, None, a, First)),
            (secure, TlbiS12Vmall, s(false, Guest, v, None, All)),
            (secure, TlbiNsnhAll, s(false, Guest, None, None, All)),
            (secure, TlbiSnhAll, s(true, Guest, None, None, All)),
            (secure, TlbiEl3All, s(true, Monitor, None, None, All)),
        ];
        for (set, opcode, scope) in contexts {
            assert_eq!(one(&full, set, opcode, command()), Invalidation::Contexts(scope), "{opcode:?}");
        }
        let addresses = [
            (NS, TlbiNhVa, s(false, Guest, v, a, First)),
            (NS, TlbiNhVaa, s(false, Guest, v, None, First)),
            (NS, TlbiEl2Va, s(false, Hyp, None, None, All)),
            (e2h, TlbiEl2Va, s(false, HypHost, None, a, All)),
            (NS, TlbiEl2Vaa, s(false, Hyp, None, None, All)),
            (e2h, TlbiEl2Vaa, s(false, HypHost, None, None, All)),
            (secure, TlbiEl3Va, s(true, Monitor, None, None, All)),
            (secure, TlbiNhVa, s(true, Guest, None, a, First)),
        ];
        for (set, opcode, scope) in addresses {
            assert_eq!(one(&full, set, opcode, command()), Invalidation::Address(scope, va), "{opcode:?}");
        }
        let ipa = Invalidation::Address(s(false, Guest, v, None, Second), va & 0xf_ffff_ffff_f000);
        assert_eq!(one(&full, NS, TlbiS2Ipa, command()), ipa);
        assert_eq!(invalidations(&full, NS, TlbiEl2All, command()).len(), 2);
    }

    #[test]
    fn tags_that_do_not_exist_are_not_compared() {
        let qemu = Caps::qemu_virt();
        let Invalidation::Contexts(s) = one(&qemu, NS, Opcode::TlbiNhAll, command()) else { panic!() };
        assert_eq!(s.vmid, None, "no stage 2, no VMID");
        let small = Caps::small();
        let Invalidation::Contexts(s) = one(&small, NS, Opcode::TlbiNhAsid, command()) else { panic!() };
        assert_eq!(s.asid, Some(0x78), "8-bit ASIDs");
    }

    #[test]
    fn wildcards_cover_the_low_bits_of_the_vmid() {
        let full = Caps::full();
        for (vmw, count, first) in [(1, 2, 0x1234), (2, 4, 0x1234), (4, 16, 0x1230), (5, 1, 0x1234)] {
            let set = Setting { vmw, ..NS };
            let all = invalidations(&full, set, Opcode::TlbiNhVaa, command());
            assert_eq!(all.len(), count);
            let vmids: Vec<_> = all
                .iter()
                .map(|i| match i {
                    Invalidation::Address(s, _) => s.vmid.unwrap(),
                    _ => panic!(),
                })
                .collect();
            assert_eq!(vmids, (first..first + count as u16).collect::<Vec<_>>());
        }
    }

    /// (tg, num, scale, ttl) to (bytes, granule); 0 bytes: reserved.
    #[test]
    fn ranges_are_num_plus_one_times_two_to_scale_granules() {
        let full = Caps::full();
        let no_ds = Caps { ds: false, oas_bits: 48, va52: false, ..Caps::full() };
        let base = 0x4000_0000u64;
        let cases: [(&Caps, u8, u8, u8, u8, u128, u8); 8] = [
            (&full, 1, 0, 0, 3, 0x1000, 12),
            (&full, 1, 31, 5, 0, 32 << 17, 12),
            (&full, 2, 3, 1, 0, 4 << 15, 14),
            (&full, 3, 0, 2, 0, 1 << 18, 16),
            (&full, 1, 0, 39, 0, 1 << 51, 12),
            (&full, 1, 0, 63, 0, 1 << 51, 12),
            (&no_ds, 1, 0, 32 | 1, 0, 1 << 13, 12),
            (&full, 2, 0, 0, 1, 1 << 14, 14),
        ];
        for (caps, tg, num, scale, ttl, bytes, granule) in cases {
            let c = command()
                .with_addr_63_12(base >> 12)
                .with_tg(tg)
                .with_num(num)
                .with_scale(scale)
                .with_ttl(ttl);
            assert!(!reserved_range(caps, c));
            let Invalidation::Range { start, last, granule_log2, .. } = one(caps, NS, Opcode::TlbiNhVaa, c)
            else {
                panic!()
            };
            let expected = (u128::from(base) + bytes - 1) as u64;
            assert_eq!((start, last, granule_log2), (base, expected, granule), "tg {tg} scale {scale}");
        }
        let reserved = |caps: &Caps, tg, ttl| reserved_range(caps, command().with_tg(tg).with_ttl(ttl));
        assert!(reserved(&full, 1, 0) && reserved(&full, 2, 0) && reserved(&full, 3, 0));
        assert!(!reserved(&full, 0, 0) && !reserved(&full, 2, 1));
        assert!(reserved(&no_ds, 2, 1), "TTL 1 with 16K acts as 0 without DS");
        assert!(!reserved(&Caps::small(), 1, 0), "without RIL the fields say nothing");
    }

    #[test]
    fn a_range_ends_at_the_top_of_the_address_space() {
        let c = command().with_addr_63_12((1 << 52) - 1).with_tg(3).with_num(31).with_scale(39);
        let Invalidation::Range { last, .. } = one(&Caps::full(), NS, Opcode::TlbiNhVa, c) else { panic!() };
        assert_eq!(last, u64::MAX);
    }
}
