//! The command queue's consumer (IHI 0070 chapter 4 and section 7.1): fetch, legality, effect, errors, CMD_SYNC.
//!
//! Commands run in the thread that writes a register or calls [`SmmuV3::poll`](crate::SmmuV3::poll), a bounded number at
//! a time, under the lock of the registers. What cannot be done at once (a CMD_SYNC while an access is running, or while
//! a device has not confirmed an ATC invalidation) is left where it is, at CONS, for the next turn.

use portcullis_arch::SubstreamId;
use portcullis_arch::smmuv3::cmd::{AtcInv, Cfgi, PriResp, Resume, Sync, Tlbi};
use portcullis_arch::smmuv3::regs::{CMDQ_ERR_SHIFT, Cr2, Gerror};
use portcullis_arch::smmuv3::{Command, Opcode};
use portcullis_bus::{AtcCompletion, AtcInvalidation, Memory, PageGroupResponse, PageResponse};
use portcullis_walk::Invalidation;

use crate::caps::{Caps, StallModel};
use crate::irq::{Message, Source};
use crate::model::{Live, SmmuV3};
use crate::queue;
use crate::stall::Fate;
use crate::state::{AtcWait, MOST_ATC, Shapes};
use crate::tlbi::{self, Setting};

/// Commands that one call executes at most on one queue.
pub(crate) const BUDGET: usize = 4096;

/// CMDQ_CONS.ERR codes.
const ILL: u32 = 1;
const ABT: u32 = 2;
const ATC_INV: u32 = 3;

/// How a queue's consumer stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stopped {
    /// Nothing is left, the queue is off, or it stands at an error.
    Idle,
    /// It waits for a device to confirm an ATC invalidation.
    Device,
    /// The budget is used up: there is more to do.
    Budget,
    /// It waits for accesses that are running.
    Access,
}

enum Done {
    Yes,
    NotYet(Stopped),
    Error(u32),
}

/// True if a queue may take this command. `stalls` is the stall model that the queue's interface shows.
pub(crate) fn legal(caps: &Caps, secure_queue: bool, stalls: StallModel, command: Command) -> bool {
    use Opcode::*;
    let Some(opcode) = command.opcode() else { return false };
    let tlbi = Tlbi::from(command);
    let secure_only = command.ssec();
    let takes_ssec = matches!(
        opcode,
        PrefetchConfig
            | PrefetchAddr
            | CfgiSte
            | CfgiSteRange
            | CfgiCd
            | CfgiCdAll
            | AtcInv
            | PriResp
            | Resume
            | StallTerm
    );
    if takes_ssec && secure_only && !secure_queue {
        return false;
    }
    let range = !tlbi::reserved_range(caps, tlbi);
    match opcode {
        PrefetchConfig | PrefetchAddr | CfgiSte | CfgiSteRange => true,
        CfgiCd | CfgiCdAll => caps.stage1,
        CfgiVmsPidm => false,
        TlbiNhAll | TlbiNhAsid => caps.stage1,
        TlbiNhVa | TlbiNhVaa => caps.stage1 && range,
        TlbiEl3All => caps.stage1 && secure_queue,
        TlbiEl3Va => caps.stage1 && secure_queue && range,
        TlbiEl2All | TlbiEl2Asid => caps.hyp,
        TlbiEl2Va | TlbiEl2Vaa => caps.hyp && range,
        TlbiS12Vmall => caps.stage2,
        TlbiS2Ipa => caps.stage2 && range,
        TlbiNsnhAll => true,
        TlbiSnhAll => secure_queue,
        // Secure queues take no ATS and PRI commands (S_IDR3.SAMS).
        AtcInv => caps.ats && !secure_queue && self::AtcInv::from(command).size() <= 52,
        PriResp => caps.pri && !secure_queue && self::PriResp::from(command).resp() != 3,
        Resume | StallTerm => stalls != StallModel::Terminate,
        Sync => self::Sync::from(command).cs() != 3,
        // Secure EL2 and device permission tables are not there.
        TlbiSEl2All | TlbiSEl2Asid | TlbiSEl2Va | TlbiSEl2Vaa | TlbiSS12Vmall | TlbiSS2Ipa | DptiAll
        | DptiPa => false,
    }
}

impl<M: Memory> SmmuV3<M> {
    /// Lets the consumer of one queue go on.
    pub(crate) fn consume(&self, live: &mut Live, side: usize) -> Stopped {
        let shape = Shapes::new(&self.caps).cmdq;
        for _ in 0..BUDGET {
            let i = &live.regs.side[side];
            if !i.cr0().cmdqen() || i.errors().cmdq_err() || i.cmdq.is_empty(shape) {
                live.tokens[side] = None;
                return Stopped::Idle;
            }
            let at = i.cmdq.entry(shape, i.cmdq.cons);
            let attrs = queue::attributes(i.cr1(), side == 1);
            let word = |n: u64| self.memory.load64(at.wrapping_add(8 * n), attrs);
            let command = match (word(0), word(1)) {
                (Ok(a), Ok(b)) => Command([a, b]),
                _ => {
                    self.command_error(live, side, ABT);
                    return Stopped::Idle;
                }
            };
            match self.execute(live, side, command) {
                Done::Yes => {
                    let done = &mut live.commands[usize::from(command.0[0] as u8)];
                    *done = done.wrapping_add(1);
                    live.regs.side[side].cmdq.advance_cons(shape);
                }
                Done::NotYet(why) => return why,
                Done::Error(code) => {
                    self.command_error(live, side, code);
                    return Stopped::Idle;
                }
            }
        }
        Stopped::Budget
    }

    /// The queue stops at this command.
    fn command_error(&self, live: &mut Live, side: usize, code: u32) {
        live.tokens[side] = None;
        let cons = &mut live.regs.side[side].cmdq.cons;
        *cons = *cons & !(0x7f << CMDQ_ERR_SHIFT) | code << CMDQ_ERR_SHIFT;
        self.global_error(live, side, Gerror::new().with_cmdq_err(true));
    }

    fn execute(&self, live: &mut Live, side: usize, command: Command) -> Done {
        let secure_queue = side == 1;
        let stalls = live.regs.table_regs(&self.caps, secure_queue).stall_model;
        let (true, Some(opcode)) = (legal(&self.caps, secure_queue, stalls, command), command.opcode())
        else {
            return Done::Error(ILL);
        };
        // A secure queue reaches both security states; SSec says which.
        let secure = secure_queue && command.ssec();
        let enabled = live.regs.side[usize::from(secure)].cr0().smmuen();
        match opcode {
            Opcode::CfgiSte | Opcode::CfgiCdAll => {
                let c = Cfgi::from(command);
                self.log.publish(Invalidation::Streams { first: c.sid(), last: c.sid() });
            }
            Opcode::CfgiSteRange => self.forget_streams(Cfgi::from(command)),
            Opcode::CfgiCd => {
                let c = Cfgi::from(command);
                self.log.publish(Invalidation::Substream { stream: c.sid(), substream: Some(c.ssid()) });
            }
            Opcode::AtcInv if enabled => return self.invalidate_atc(live, side, AtcInv::from(command)),
            Opcode::PriResp if enabled => self.page_response(PriResp::from(command)),
            Opcode::Resume => {
                let c = Resume::from(command);
                let fate = match (c.ac(), c.ab() || self.caps.abort_only) {
                    (true, _) => Fate::Retry,
                    (false, abort) => Fate::Terminated { abort },
                };
                live.regs.stalls.resume((secure, c.sid()), c.stag(), fate);
            }
            Opcode::StallTerm => {
                live.regs.stalls.terminate(secure, Some(Resume::from(command).sid()));
            }
            Opcode::Sync => return self.sync(live, side, Sync::from(command)),
            // Prefetches are hints, and nothing is fetched ahead here.
            Opcode::PrefetchConfig | Opcode::PrefetchAddr => {}
            _ => {
                let set = Setting {
                    secure_queue,
                    e2h: Cr2::from_bits(live.regs.side[0].cr2).e2h(),
                    vmw: live.regs.side[0].cr0().vmw(),
                };
                for what in tlbi::invalidations(&self.caps, set, opcode, Tlbi::from(command)) {
                    self.log.publish(what);
                }
            }
        }
        Done::Yes
    }

    /// CMD_CFGI_STE_RANGE and CMD_CFGI_ALL: 2^(Range + 1) streams, aligned. Ports tell streams by number only, so those
    /// of the other security state with the same numbers are looked up again as well.
    fn forget_streams(&self, c: Cfgi) {
        let (first, last) = if c.range() == Cfgi::ALL_RANGE {
            (0, u32::MAX)
        } else {
            let low = ((2u64 << c.range()) - 1) as u32;
            (c.sid() & !low, c.sid() | low)
        };
        self.log.publish(Invalidation::Streams { first, last });
    }

    fn invalidate_atc(&self, live: &mut Live, side: usize, c: AtcInv) -> Done {
        // A device that is not there has nothing cached.
        let Some(device) = self.ats_device(c.sid()) else { return Done::Yes };
        if live.regs.side[side].atc.len() >= MOST_ATC {
            self.sweep_atc(live, side);
            if live.regs.side[side].atc.len() >= MOST_ATC {
                return Done::NotYet(Stopped::Device);
            }
        }
        let size_log2 = if c.size() == 52 { 64 } else { 12 + c.size() };
        let span = 1u64.checked_shl(size_log2.into()).map_or(u64::MAX, |size| size - 1);
        let ticket = device.invalidate(AtcInvalidation {
            substream: c.ssv().then_some(SubstreamId(c.ssid())),
            global: c.ssv() && c.g(),
            addr: (c.addr_63_12() << 12) & !span,
            size_log2,
        });
        live.regs.side[side].atc.push(AtcWait { stream: c.sid(), ticket });
        Done::Yes
    }

    /// Looks which ATC invalidations have been confirmed, or never will be.
    fn sweep_atc(&self, live: &mut Live, side: usize) {
        let i = &mut live.regs.side[side];
        let failed = &mut i.atc_failed;
        i.atc.retain(|wait| {
            let Some(device) = self.ats_device(wait.stream) else { return false };
            match device.completion(wait.ticket) {
                AtcCompletion::Pending => true,
                AtcCompletion::Done => false,
                AtcCompletion::TimedOut => {
                    *failed = true;
                    false
                }
            }
        });
    }

    fn page_response(&self, c: PriResp) {
        let Some(device) = self.ats_device(c.sid()) else { return };
        let code = match c.resp() {
            2 => PageResponse::Success,
            1 => PageResponse::Invalid,
            _ => PageResponse::Failure,
        };
        let substream = c.ssv().then_some(SubstreamId(c.ssid()));
        device.page_response(PageGroupResponse { substream, group: c.prg_index(), code });
    }

    /// CMD_SYNC: everything before it is complete when every access that was running has ended and devices have
    /// confirmed. Then the signal, then CONS.
    fn sync(&self, live: &mut Live, side: usize, c: Sync) -> Done {
        let token = live.tokens[side].get_or_insert_with(|| self.log.begin_sync());
        if !token.poll() {
            return Done::NotYet(Stopped::Access);
        }
        if !live.regs.side[side].atc.is_empty() {
            self.sweep_atc(live, side);
        }
        let i = &mut live.regs.side[side];
        if i.atc_failed {
            // Said once: the same CMD_SYNC passes when software lets the queue go on.
            if i.atc.is_empty() {
                i.atc_failed = false;
                return Done::Error(ATC_INV);
            }
            return Done::NotYet(Stopped::Device);
        }
        if !i.atc.is_empty() {
            return Done::NotYet(Stopped::Device);
        }
        live.tokens[side] = None;
        if c.cs() == 1 {
            let secure = side == 1;
            let address = c.msiaddr_55_2() << 2;
            if self.caps.msis(secure) && address != 0 {
                let attributes = u32::from(c.msh()) << 4 | u32::from(c.msiattr());
                let message = Message { address, data: c.msidata(), attributes };
                if self.outputs.send(&self.memory, secure, message, self.caps.output_mask()).is_err() {
                    self.global_error(live, side, Gerror::new().with_msi_cmdq_abt_err(true));
                }
            }
            self.outputs.pulse(secure, Source::Sync);
        }
        Done::Yes
    }
}
