//! Address translation operations, where the configuration has them (IHI 0062D chapter 4).

use portcullis_arch::smmuv2::offset::{cb, gr0};
use portcullis_arch::smmuv2::{AtsOperand, CbType, Fsr, Fsynr0};
use portcullis_arch::{Access, Attributes, MemoryType, Shareability};
use portcullis_bus::Memory;
use portcullis_walk::{AccessKind, Context, Fault, NoRecord, Walked};

use crate::context::{format_code, translation};
use crate::fault::fsr_bit;
use crate::model::SmmuV2;
use crate::state::Regs;

const F: u64 = 1;
const UCBF: u64 = 1 << 30;
const ATOT: u64 = 1 << 31;

impl<M: Memory> SmmuV2<M> {
    /// A write to GATS*: never stalls, records nothing but GPAR.
    pub(crate) fn global_translation_operation(&self, at: usize, secure: bool, value: u64) {
        if !self.config.translation_ops {
            return;
        }
        let aliased = at >= gr0::NS_ALIAS;
        if aliased && !secure {
            return;
        }
        let reg = if aliased { at - gr0::NS_ALIAS } else { at };
        let op = (reg - gr0::GATS1UR) / 8;
        let side = usize::from(secure && !aliased);
        let operand = AtsOperand::from_bits(value);
        let mut live = self.lock();
        let n = operand.ndx();
        let par = match self.operation_context(&live.regs, n, side == 1, op & 2 != 0) {
            None => F | UCBF,
            Some((context, format)) => {
                let access = if op & 1 != 0 { Access::Write } else { Access::Read };
                let kind = AccessKind::new(access, context.incoming);
                let va = operand.page() << 12;
                let result = if op & 4 != 0 {
                    context.stages.translate(&self.walker, va, kind, &mut NoRecord)
                } else {
                    context.stages.translate_stage1(&self.walker, va, kind, &mut NoRecord)
                };
                par(result, format)
            }
        };
        live.regs.side[side].gpar = par;
    }

    /// A write to CBn_ATS1*: stage 1 of the bank. A stage 2 fault is recorded in the stage 2 bank and terminates the
    /// operation.
    pub(crate) fn bank_translation_operation(&self, n: usize, at: usize, secure: bool, value: u64) {
        if !self.config.translation_ops {
            return;
        }
        let mut live = self.lock();
        let bank_secure = live.regs.bank_is_secure(&self.config, n);
        let op = (at - cb::ATS1PR) / 8;
        let Ok(index) = u8::try_from(n) else { return };
        if bank_secure && !secure {
            return;
        }
        let Some((context, format)) = self.operation_context(&live.regs, index, bank_secure, op < 2) else {
            return;
        };
        let access = if op & 1 != 0 { Access::Write } else { Access::Read };
        let kind = AccessKind::new(access, context.incoming);
        let va = value & !0xfff;
        let result = context.stages.translate_stage1(&self.walker, va, kind, &mut NoRecord);
        let mut answer = par(result, format);
        if let Err(fault) = result
            && fault.stage == 2
        {
            answer = F | ATOT;
            let s2 = live.regs.banks.get(n).map(|b| usize::from(b.cbar().s2_cbndx()));
            if let Some(bank) = s2.and_then(|s| live.regs.banks.get_mut(s))
                && bank.fsr == 0
            {
                bank.fsr = fsr_bit(fault.kind).into_bits();
                bank.far = va;
                bank.ipafar = fault.ipa & !0xfff;
                bank.fsynr[0] = Fsynr0::new()
                    .with_plvl(fault.level.clamp(0, 3) as u8)
                    .with_nested(true)
                    .with_s1ptwf(fault.on_stage1_walk)
                    .with_wnr(access == Access::Write)
                    .with_pnu(context.incoming.privileged())
                    .with_atof(!self.config.mmu500)
                    .with_s1cbndx(index)
                    .into_bits();
            }
        }
        if let Some(bank) = live.regs.banks.get_mut(n) {
            bank.par = answer;
        }
        self.interrupts.update(&self.config, &live.regs);
    }

    /// The context of a stage 1 bank for an operation, and its format code. The address is not sign-extended.
    fn operation_context(&self, regs: &Regs, n: u8, secure: bool, privileged: bool) -> Option<(Context, u8)> {
        let bank = regs.banks.get(usize::from(n))?;
        if regs.bank_is_secure(&self.config, n.into()) != secure || bank.cbar().kind() == CbType::Stage2 {
            return None;
        }
        let stage2 = match bank.cbar().kind() {
            CbType::Nested => Some(regs.banks.get(usize::from(bank.cbar().s2_cbndx()))?),
            _ => None,
        };
        let attrs = Attributes::DEVICE_DEFAULT.with_privileged(privileged).with_non_secure(!secure);
        let context = translation(&self.config, regs, n, bank, stage2, attrs, secure);
        Some((context, format_code(&self.config, bank)))
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
