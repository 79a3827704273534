//! Address translation operations, where the configuration has them (IHI 0062D chapter 4).

use portcullis_arch::smmuv2::offset::{cb, gr0};
use portcullis_arch::smmuv2::{AtsOperand, CbType, Fsr, Tcr2};
use portcullis_arch::{Access, Attributes, MemoryType, Shareability, StreamId};
use portcullis_bus::{Initiator, Memory};
use portcullis_walk::stage::combine;
use portcullis_walk::{AccessKind, Context, Fault, Invalidation, NoRecord, Split, Updates, Walked};

use crate::context::{format_code, translation};
use crate::decide::{GlobalFault, Unusable, banks_of};
use crate::fault::{self, Origin, fsr_bit};
use crate::model::SmmuV2;
use crate::state::Regs;

const F: u64 = 1;
const ICF: u64 = 1 << 29;
const UCBF: u64 = 1 << 30;
const ATOT: u64 = 1 << 31;

/// A translation that an operation asks for.
struct Operation {
    context: Context,
    va: u64,
    kind: AccessKind,
    /// FSR.FORMAT of the bank.
    format: u8,
}

impl<M: Memory> SmmuV2<M> {
    /// A write to GATS*: never stalls, records nothing but GPAR.
    pub(crate) fn global_translation_operation(&self, regs: &mut Regs, at: usize, secure: bool, value: u64) {
        let aliased = at >= gr0::NS_ALIAS;
        if !self.config.translation_ops || (aliased && !secure) {
            return;
        }
        let reg = if aliased { at - gr0::NS_ALIAS } else { at };
        let op = (reg - gr0::GATS1UR) / 8;
        let side = usize::from(secure && !aliased);
        let operand = AtsOperand::from_bits(value);
        let access = if op & 1 != 0 { Access::Write } else { Access::Read };
        let both = op & 4 != 0;
        let asked =
            self.operation(regs, operand.ndx(), side == 1, (access, op & 2 != 0), operand.page() << 12);
        let par = match asked {
            Err(why) => F | why,
            Ok((o, _)) if both => {
                let result =
                    o.context.stages.translate(&self.walker, o.va, o.kind, Updates::Pretend, &mut NoRecord);
                let attrs = |w: Walked| o.context.after.map_or(w.attrs, |after| combine(w.attrs, after));
                par(result.map(|w| Walked { attrs: attrs(w), ..w }), o.format)
            }
            Ok((o, _)) => par(
                o.context.stages.translate_stage1(
                    &self.walker,
                    o.va,
                    o.kind,
                    Updates::Pretend,
                    &mut NoRecord,
                ),
                o.format,
            ),
        };
        regs.side[side].gpar = par;
    }

    /// A write to CBn_ATS1*: stage 1 of the bank. A stage 2 fault is recorded in the stage 2 bank and terminates the
    /// operation.
    pub(crate) fn bank_translation_operation(
        &self,
        regs: &mut Regs,
        n: usize,
        at: usize,
        secure: bool,
        value: u64,
    ) {
        let bank_secure = regs.bank_is_secure(&self.config, n);
        let Some(bank) = regs.banks.get(n) else { return };
        let is_stage2 = bank.cbar().kind() == CbType::Stage2;
        if !self.config.translation_ops || is_stage2 || (bank_secure && !secure) {
            return;
        }
        let op = (at - cb::ATS1PR) / 8;
        let Ok(index) = u8::try_from(n) else { return };
        let access = if op & 1 != 0 { Access::Write } else { Access::Read };
        let answer = match self.operation(regs, index, bank_secure, (access, op < 2), value & !0xfff) {
            Err(_) => F,
            Ok((o, from)) => {
                let result = o.context.stages.translate_stage1(
                    &self.walker,
                    o.va,
                    o.kind,
                    Updates::Pretend,
                    &mut NoRecord,
                );
                match result {
                    Err(fault) if fault.stage == 2 => {
                        let origin = Origin { from: &from, va: o.va, access, operation: true };
                        fault::context(&self.config, regs, &o.context, origin, fault);
                        // The fault set of the stage 2 bank counts for every port from now on.
                        self.log.publish(Invalidation::Config);
                        F | ATOT
                    }
                    result => par(result, o.format),
                }
            }
        };
        if let Some(bank) = regs.banks.get_mut(n) {
            bank.par = answer;
        }
    }

    /// The context of a stage 1 bank for an operation, and whom a fault of it names. The error is UCBF or ICF of GPAR.
    fn operation(
        &self,
        regs: &Regs,
        n: u8,
        secure: bool,
        (access, privileged): (Access, bool),
        va: u64,
    ) -> Result<(Operation, Initiator), u64> {
        let c = &self.config;
        let (bank, stage2) = match banks_of(c, regs, n, secure) {
            Ok((bank, _)) if bank.cbar().kind() == CbType::Stage2 => return Err(UCBF),
            Ok(banks) => banks,
            Err(Unusable { fault: GlobalFault::UnimplementedBank, .. }) => return Err(UCBF),
            Err(_) => return Err(ICF),
        };
        let attrs = Attributes::DEVICE_DEFAULT.with_privileged(privileged).with_non_secure(!secure);
        let mut context = translation(c, regs, n, bank, stage2.map(|s| s.1), attrs, secure);
        let mut va = va;
        if let Some(stage1) = &mut context.stages.stage1
            && let Split::Aarch64 { va_bits, signed, .. } = &mut stage1.split
        {
            // The address is taken as it is, not extended from SEP, but for a top byte that TBI has ignored.
            (*va_bits, *signed) = (64, true);
            let tcr2 = Tcr2::from_bits(bank.tcr2);
            let upper = va >> 55 & 1 != 0;
            if if upper { tcr2.tbi1() } else { tcr2.tbi0() } {
                va = ((va << 8) as i64 >> 8) as u64;
            }
        }
        let kind = AccessKind::new(access, context.incoming);
        let from = Initiator::new(StreamId(0)).with_attrs(attrs);
        Ok((Operation { context, va, kind, format: format_code(c, bank) }, from))
    }
}

/// PAR / GPAR for a result.
fn par(result: Result<Walked, Fault>, format: u8) -> u64 {
    match result {
        Ok(w) if format == 0 => short_par(&w),
        Ok(w) => {
            u64::from(sh_code(w.attrs)) << 7
                | u64::from(w.attrs.non_secure()) << 9
                | 1 << 11
                | w.pa & 0x0000_ffff_ffff_f000
                | u64::from(mair_byte(w.attrs)) << 56
        }
        Err(f) => {
            // The fault bits stand where FSR has them.
            let fsr = fsr_bit(f.kind);
            let bits = u64::from(fsr.tf()) << 1
                | u64::from(fsr.aff()) << 2
                | u64::from(fsr.pf()) << 3
                | u64::from(fsr.ef()) << 4
                | u64::from(fsr.asf()) << 7;
            let level = f.level.clamp(0, 3) as u64;
            F | bits | u64::from(format) << 8 | level << 32 | u64::from(f.stage == 2) << 35
        }
    }
}

fn sh_code(a: Attributes) -> u8 {
    a.shareability() as u8
}

fn mair_nibble(cache: u8, a: Attributes) -> u8 {
    use portcullis_arch::attrs::Allocate;
    let no = |h: Allocate| h != Allocate::No;
    let hints = u8::from(no(a.read_allocate())) << 1 | u8::from(no(a.write_allocate()));
    match cache {
        1 => 0b0100,
        2 => 0b1000 | hints,
        _ => 0b1100 | hints,
    }
}

/// The attributes as a byte of MAIR.
fn mair_byte(a: Attributes) -> u8 {
    let m = a.memory();
    if m.is_device() {
        return m.code() << 2;
    }
    mair_nibble(m.code() >> 2, a) << 4 | mair_nibble(m.code() & 3, a)
}

/// PAR in the short format.
fn short_par(w: &Walked) -> u64 {
    const OUTER: [u64; 4] = [0, 0, 2, 1];
    const INNER: [u64; 4] = [0, 0, 6, 5];
    let m = w.attrs.memory();
    let (outer, inner) = match m {
        MemoryType::DEVICE_NGNRNE => (0, 1),
        m if m.is_device() => (0, 3),
        m => (OUTER[usize::from(m.code() >> 2)], INNER[usize::from(m.code() & 3)]),
    };
    let shared = w.attrs.shareability() != Shareability::Non;
    let not_outer = w.attrs.shareability() == Shareability::Inner;
    let supersection = w.size_log2 == 24;
    let address =
        if supersection { w.pa & 0xff00_0000 | (w.pa >> 32 & 0xff) << 16 } else { w.pa & 0xffff_f000 };
    u64::from(supersection) << 1
        | outer << 2
        | inner << 4
        | u64::from(shared) << 7
        | u64::from(w.attrs.non_secure()) << 9
        | u64::from(not_outer) << 10
        | address
}

/// Fault bits of PAR that are also fault bits of FSR keep their place (checked against the register description).
const _: () = assert!(
    Fsr::new().with_tf(true).into_bits() == 1 << 1 && Fsr::new().with_asf(true).into_bits() == 1 << 7
);
