//! Invalidation commands of a guest whose stage 1 lies over a stage 2 of ours (Linux `arm_vsmmu_convert_user_cmd`).

use portcullis_arch::smmuv3::cmd::{AtcInv, Cfgi, Tlbi};
use portcullis_arch::smmuv3::{Command, Opcode};
use portcullis_arch::{StreamId, Vmid};

use super::{Error, Features};

/// Commands that are issued in one go.
pub const AT_ONCE: usize = 63;

/// A guest's command as the hardware gets it: confined to the guest's VMID and streams, and without bits that would
/// stop the queue. `None` for a command that has nothing to be passed on (CMD_SYNC, prefetches). Refuses all others.
pub fn translate(
    command: Command,
    vmid: Vmid,
    features: &Features,
    stream: &impl Fn(StreamId) -> Option<StreamId>,
) -> Result<Option<Command>, Error> {
    let refused = Error::GuestCommand { opcode: command.code() };
    let physical = |sid: u32| {
        let virtual_stream = StreamId(sid);
        stream(virtual_stream).ok_or(Error::UnknownStream { stream: virtual_stream })
    };
    let opcode = command.opcode().ok_or(refused)?;
    Ok(Some(match opcode {
        Opcode::Sync | Opcode::PrefetchConfig | Opcode::PrefetchAddr => return Ok(None),
        // "Everything non-secure" of the guest is everything under its VMID.
        Opcode::TlbiNsnhAll | Opcode::TlbiNhAll => {
            Tlbi::new().with_opcode(Opcode::TlbiNhAll as u8).with_vmid(vmid.get()).into()
        }
        Opcode::TlbiNhAsid => {
            let asid = Tlbi::from(command).asid();
            Tlbi::new().with_opcode(opcode as u8).with_vmid(vmid.get()).with_asid(asid).into()
        }
        Opcode::TlbiNhVa | Opcode::TlbiNhVaa => {
            let asked = Tlbi::from(command);
            let mut passed = Tlbi::new()
                .with_opcode(opcode as u8)
                .with_vmid(vmid.get())
                .with_asid(if opcode == Opcode::TlbiNhVa { asked.asid() } else { 0 })
                .with_leaf(asked.leaf())
                .with_addr_63_12(asked.addr_63_12());
            // Without 52-bit addresses there is no 16K leaf at level 1, and the hint is none. One that then says nothing at all
            // would be illegal; without a granule it means the same address.
            let no_leaf = (asked.tg(), asked.ttl()) == (2, 1);
            let single = (asked.num(), asked.scale()) == (0, 0);
            if features.range_invalidation && asked.tg() != 0 && !(no_leaf && single) {
                if single && asked.ttl() == 0 {
                    return Err(refused);
                }
                passed = passed
                    .with_num(asked.num())
                    .with_scale(asked.scale() & 0x1f)
                    .with_ttl(if no_leaf { 0 } else { asked.ttl() })
                    .with_tg(asked.tg());
            }
            passed.into()
        }
        Opcode::CfgiCd => {
            let asked = Cfgi::from(command);
            let passed = Cfgi::new().with_opcode(opcode as u8).with_sid(physical(asked.sid())?.get());
            passed.with_ssid(asked.ssid()).with_range(asked.leaf().into()).into()
        }
        Opcode::CfgiCdAll => {
            let sid = physical(Cfgi::from(command).sid())?.get();
            Cfgi::new().with_opcode(opcode as u8).with_sid(sid).into()
        }
        Opcode::AtcInv if features.ats => {
            let asked = AtcInv::from(command);
            AtcInv::new()
                .with_opcode(opcode as u8)
                .with_sid(physical(asked.sid())?.get())
                .with_ssv(asked.ssv())
                .with_ssid(if asked.ssv() { asked.ssid() } else { 0 })
                .with_g(asked.g() && asked.ssv())
                .with_size(asked.size().min(52))
                .with_addr_63_12(asked.addr_63_12())
                .into()
        }
        _ => return Err(refused),
    }))
}
