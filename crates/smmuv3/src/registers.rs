//! The register map: where each register is, which bits exist, who may write what and when (IHI 0070 sections 6.2 and 6.3).
//!
//! 32-bit accesses reach 32-bit registers and either half of 64-bit ones; aligned 64-bit accesses reach 64-bit registers.
//! Everything else in the window reads as zero and ignores writes.

use portcullis_arch::smmuv3::regs::{
    CMDQ_ERR_SHIFT, Cr0, Cr1, Cr2, GatosAddr, GatosSid, Gbpa, Gerror, INDEX_MASK, IrqCtrl, OVERFLOW, PAGE,
    SECURE, offset,
};

use crate::caps::Caps;
use crate::irq::Message;
use crate::queue::Queue;
use crate::state::{Interface, Regs, SETTLING, Shapes};

/// The registers of an interface, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reg {
    Idr0,
    Idr1,
    Idr2,
    Idr3,
    Idr4,
    Idr5,
    Iidr,
    Aidr,
    Cr0,
    Cr0Ack,
    Cr1,
    Cr2,
    SInit,
    Statusr,
    Gbpa,
    Agbpa,
    IrqCtrl,
    IrqCtrlAck,
    Gerror,
    Gerrorn,
    GerrorIrqCfg0,
    GerrorIrqCfg1,
    GerrorIrqCfg2,
    StrtabBase,
    StrtabBaseCfg,
    CmdqBase,
    CmdqProd,
    CmdqCons,
    EventqBase,
    EventqProd,
    EventqCons,
    EventqIrqCfg0,
    EventqIrqCfg1,
    EventqIrqCfg2,
    PriqBase,
    PriqProd,
    PriqCons,
    PriqIrqCfg0,
    PriqIrqCfg1,
    PriqIrqCfg2,
    GatosCtrl,
    GatosSid,
    GatosAddr,
    GatosPar,
    /// PIDR and CIDR, by number.
    Id(u8),
}

/// Offsets of page 0 (and, + 0x8000, of the secure registers) in ascending order, with the width in bytes.
const MAP: &[(u64, u8, Reg)] = &[
    (offset::IDR0, 4, Reg::Idr0),
    (offset::IDR1, 4, Reg::Idr1),
    (offset::IDR2, 4, Reg::Idr2),
    (offset::IDR3, 4, Reg::Idr3),
    (offset::IDR4, 4, Reg::Idr4),
    (offset::IDR5, 4, Reg::Idr5),
    (offset::IIDR, 4, Reg::Iidr),
    (offset::AIDR, 4, Reg::Aidr),
    (offset::CR0, 4, Reg::Cr0),
    (offset::CR0ACK, 4, Reg::Cr0Ack),
    (offset::CR1, 4, Reg::Cr1),
    (offset::CR2, 4, Reg::Cr2),
    (offset::S_INIT, 4, Reg::SInit),
    (offset::STATUSR, 4, Reg::Statusr),
    (offset::GBPA, 4, Reg::Gbpa),
    (offset::AGBPA, 4, Reg::Agbpa),
    (offset::IRQ_CTRL, 4, Reg::IrqCtrl),
    (offset::IRQ_CTRLACK, 4, Reg::IrqCtrlAck),
    (offset::GERROR, 4, Reg::Gerror),
    (offset::GERRORN, 4, Reg::Gerrorn),
    (offset::GERROR_IRQ_CFG0, 8, Reg::GerrorIrqCfg0),
    (offset::GERROR_IRQ_CFG1, 4, Reg::GerrorIrqCfg1),
    (offset::GERROR_IRQ_CFG2, 4, Reg::GerrorIrqCfg2),
    (offset::STRTAB_BASE, 8, Reg::StrtabBase),
    (offset::STRTAB_BASE_CFG, 4, Reg::StrtabBaseCfg),
    (offset::CMDQ_BASE, 8, Reg::CmdqBase),
    (offset::CMDQ_PROD, 4, Reg::CmdqProd),
    (offset::CMDQ_CONS, 4, Reg::CmdqCons),
    (offset::EVENTQ_BASE, 8, Reg::EventqBase),
    (offset::EVENTQ_PROD, 4, Reg::EventqProd),
    (offset::EVENTQ_CONS, 4, Reg::EventqCons),
    (offset::EVENTQ_IRQ_CFG0, 8, Reg::EventqIrqCfg0),
    (offset::EVENTQ_IRQ_CFG1, 4, Reg::EventqIrqCfg1),
    (offset::EVENTQ_IRQ_CFG2, 4, Reg::EventqIrqCfg2),
    (offset::PRIQ_BASE, 8, Reg::PriqBase),
    (offset::PRIQ_PROD, 4, Reg::PriqProd),
    (offset::PRIQ_CONS, 4, Reg::PriqCons),
    (offset::PRIQ_IRQ_CFG0, 8, Reg::PriqIrqCfg0),
    (offset::PRIQ_IRQ_CFG1, 4, Reg::PriqIrqCfg1),
    (offset::PRIQ_IRQ_CFG2, 4, Reg::PriqIrqCfg2),
    (offset::GATOS_CTRL, 4, Reg::GatosCtrl),
    (offset::GATOS_SID, 8, Reg::GatosSid),
    (offset::GATOS_ADDR, 8, Reg::GatosAddr),
    (offset::GATOS_PAR, 8, Reg::GatosPar),
];

/// Size of the register window: two pages.
pub(crate) const WINDOW: u64 = 2 * PAGE;

/// A register, or a half of one, that an access reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// 0 the non-secure interface, 1 the secure one.
    pub side: usize,
    pub reg: Reg,
    /// First bit of the register that the access reaches: 0, or 32 for the upper half.
    pub shift: u32,
    /// 64-bit register.
    pub wide: bool,
}

/// What an access of `size` bytes at `at` reaches for software of one security state.
pub(crate) fn place(caps: &Caps, at: u64, size: usize, secure: bool) -> Option<Place> {
    if !matches!(size, 4 | 8) || !at.is_multiple_of(size as u64) {
        return None;
    }
    let (page1, within) = (at >= PAGE, at % PAGE);
    let (side, within) = if within >= SECURE { (1, within - SECURE) } else { (0, within) };
    if side == 1 && (!secure || caps.secure.is_none() || page1) {
        return None;
    }
    if side == 0 && !page1 && (offset::PIDR4..=offset::CIDR3).contains(&within) {
        let n = ((within - offset::PIDR4) / 4) as u8;
        return (size == 4).then_some(Place { side, reg: Reg::Id(n), shift: 0, wide: false });
    }
    let next = MAP.partition_point(|(o, ..)| *o <= within);
    let (start, width, reg) = *MAP.get(next.checked_sub(1)?)?;
    let inside = within - start;
    if inside + size as u64 > width.into() {
        return None;
    }
    // The output queues' indices are in page 1, except those of the secure interface.
    let in_page1 =
        side == 0 && matches!(reg, Reg::EventqProd | Reg::EventqCons | Reg::PriqProd | Reg::PriqCons);
    let exists = match reg {
        Reg::SInit => side == 1,
        Reg::PriqBase
        | Reg::PriqProd
        | Reg::PriqCons
        | Reg::PriqIrqCfg0
        | Reg::PriqIrqCfg1
        | Reg::PriqIrqCfg2 => side == 0 && caps.pri,
        Reg::GatosCtrl | Reg::GatosSid | Reg::GatosAddr | Reg::GatosPar => caps.atos,
        Reg::Idr5 | Reg::Iidr | Reg::Aidr | Reg::Statusr => side == 0,
        _ => true,
    };
    (exists && page1 == in_page1).then_some(Place { side, reg, shift: 8 * inside as u32, wide: width == 8 })
}

/// The bits that exist of one message's registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MessageMask {
    pub address: u64,
    pub data: u32,
    pub attributes: u32,
}

/// The bits that exist of an interface's registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Masks {
    pub cr0: u32,
    pub cr1: u32,
    pub cr2: u32,
    pub gbpa: u32,
    pub irq_ctrl: u32,
    pub gerror: u32,
    pub gerror_irq: MessageMask,
    pub eventq_irq: MessageMask,
    pub priq_irq: MessageMask,
    pub strtab_base: u64,
    pub strtab_base_cfg: u32,
    pub priq_base: u64,
    pub priq_index: u32,
    pub gatos_ctrl: u32,
    pub gatos_sid: u64,
    pub gatos_addr: u64,
}

/// Which bits exist.
pub(crate) fn masks(c: &Caps, secure: bool) -> Masks {
    let (ns, pri, msi) = (!secure, c.pri && !secure, c.msis(secure));
    let message = if msi {
        MessageMask { address: Message::ADDRESS, data: u32::MAX, attributes: 0x3f }
    } else {
        MessageMask { address: 0, data: 0, attributes: 0 }
    };
    let none = MessageMask { address: 0, data: 0, attributes: 0 };
    let cr0 = Cr0::new()
        .with_smmuen(true)
        .with_priqen(pri)
        .with_eventqen(true)
        .with_cmdqen(true)
        .with_atschk(c.ats && ns)
        .with_sif(secure)
        .with_vmw(if c.vmw { 7 } else { 0 })
        .with_nsstalld(secure);
    let cr1 = Cr1::from_bits(0xfff);
    let cr2 =
        Cr2::new().with_e2h(c.hyp && ns).with_recinvsid(true).with_rec_cfg_ats(c.ats_record_errors && ns);
    let gbpa = Gbpa::new()
        .with_memattr(0xf)
        .with_mtcfg(true)
        .with_alloccfg(0xf)
        .with_shcfg(3)
        .with_nscfg(if secure { 3 } else { 0 })
        .with_privcfg(3)
        .with_instcfg(3)
        .with_abort(true)
        .with_update(true);
    let irq_ctrl = IrqCtrl::new().with_gerror_irqen(true).with_priq_irqen(pri).with_eventq_irqen(true);
    let gerror = Gerror::new()
        .with_cmdq_err(true)
        .with_eventq_abt_err(true)
        .with_priq_abt_err(pri)
        .with_msi_cmdq_abt_err(msi)
        .with_msi_eventq_abt_err(msi)
        .with_msi_priq_abt_err(msi && pri)
        .with_msi_gerror_abt_err(msi)
        .with_sfm_err(true);
    // FMT and SPLIT exist with two-level tables only.
    let strtab_base_cfg = 0x3f | if c.two_level_streams { 3 << 16 | 0x1f << 6 } else { 0 };
    let sid = GatosSid::new().with_streamid(u32::MAX);
    let sid = if c.ssid_bits > 0 { sid.with_substreamid(0xf_ffff).with_ssid_valid(true) } else { sid };
    let addr = GatosAddr::new().with_ns(if secure { 1 } else { 0 }).with_httui(c.httu != crate::Httu::None);
    let addr = addr.with_ind(true).with_rnw(true).with_pnu(true).with_kind(3).with_addr_63_12((1 << 52) - 1);
    let (gatos_sid, gatos_addr) = (sid.with_ssec(secure).into_bits(), addr.into_bits());
    let atos = |mask: u64| if c.atos { mask } else { 0 };
    Masks {
        cr0: cr0.into_bits(),
        cr1: cr1.into_bits(),
        cr2: cr2.into_bits(),
        gbpa: gbpa.into_bits(),
        irq_ctrl: irq_ctrl.into_bits(),
        gerror: gerror.into_bits(),
        gerror_irq: message,
        eventq_irq: message,
        // LO counts for the wire as well.
        priq_irq: if pri {
            MessageMask { attributes: message.attributes | 1 << 31, ..message }
        } else {
            none
        },
        strtab_base: 1 << 62 | 0x00ff_ffff_ffff_ffc0,
        strtab_base_cfg,
        priq_base: if pri { Queue::BASE } else { 0 },
        priq_index: if pri { INDEX_MASK | OVERFLOW } else { 0 },
        gatos_ctrl: atos(1) as u32,
        gatos_sid: atos(gatos_sid),
        gatos_addr: atos(gatos_addr),
    }
}

/// The value of a register.
pub(crate) fn value(caps: &Caps, regs: &Regs, p: Place) -> u64 {
    let secure = p.side == 1;
    let i = &regs.side[p.side];
    let word = match p.reg {
        Reg::Idr0 if secure => caps.s_idr0().into_bits(),
        Reg::Idr1 if secure => caps.s_idr1().into_bits(),
        Reg::Idr3 if secure => caps.s_idr3(),
        Reg::Idr0 => caps.idr0(regs.no_stalls()).into_bits(),
        Reg::Idr1 => caps.idr1().into_bits(),
        Reg::Idr3 => caps.idr3().into_bits(),
        Reg::Idr5 => caps.idr5().into_bits(),
        Reg::Iidr => caps.iidr,
        Reg::Aidr => caps.aidr(),
        Reg::Idr2 | Reg::Idr4 | Reg::Statusr | Reg::Agbpa | Reg::SInit => 0,
        Reg::Cr0 => i.cr0,
        Reg::Cr0Ack => i.cr0ack,
        Reg::Cr1 => i.cr1,
        Reg::Cr2 => i.cr2,
        Reg::Gbpa => i.gbpa,
        Reg::IrqCtrl | Reg::IrqCtrlAck => i.irq_ctrl,
        Reg::Gerror => i.gerror,
        Reg::Gerrorn => i.gerrorn,
        Reg::GerrorIrqCfg1 => i.gerror_irq.data,
        Reg::GerrorIrqCfg2 => i.gerror_irq.attributes,
        Reg::StrtabBaseCfg => i.strtab_base_cfg,
        Reg::CmdqProd => i.cmdq.prod,
        Reg::CmdqCons => i.cmdq.cons,
        Reg::EventqProd => i.eventq.prod,
        Reg::EventqCons => i.eventq.cons,
        Reg::EventqIrqCfg1 => i.eventq_irq.data,
        Reg::EventqIrqCfg2 => i.eventq_irq.attributes,
        Reg::PriqProd => i.priq.prod,
        Reg::PriqCons => i.priq.cons,
        Reg::PriqIrqCfg1 => i.priq_irq.data,
        Reg::PriqIrqCfg2 => i.priq_irq.attributes,
        Reg::GatosCtrl => i.gatos_ctrl,
        Reg::Id(n) => caps.id_block.get(usize::from(n)).copied().map_or(0, u32::from),
        Reg::GerrorIrqCfg0 => return i.gerror_irq.address,
        Reg::StrtabBase => return i.strtab_base,
        Reg::CmdqBase => return i.cmdq.base,
        Reg::EventqBase => return i.eventq.base,
        Reg::EventqIrqCfg0 => return i.eventq_irq.address,
        Reg::PriqBase => return i.priq.base,
        Reg::PriqIrqCfg0 => return i.priq_irq.address,
        Reg::GatosSid => return i.gatos_sid,
        Reg::GatosAddr => return i.gatos_addr,
        Reg::GatosPar => return i.gatos_par,
    };
    word.into()
}

/// What a write has set in motion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effects {
    /// Ports must look at the configuration again, and the write is acknowledged when nothing uses the old one.
    pub config: bool,
    /// SMMUEN went from 1 to 0.
    pub disabled: bool,
    /// CMDQEN went from 1 to 0.
    pub cmdq_off: bool,
    /// S_INIT: forget everything.
    pub forget: bool,
    /// GATOS_CTRL.RUN was set.
    pub operation: bool,
}

/// Writes a register (all 64 bits of `value` for wide ones) if its guard allows.
pub(crate) fn write(caps: &Caps, regs: &mut Regs, p: Place, value: u64) -> Effects {
    let secure = p.side == 1;
    let shapes = Shapes::new(caps);
    let m = masks(caps, secure);
    let i = &mut regs.side[p.side];
    let word = value as u32;
    let enabled = i.enabled();
    let (tables_open, irq) = (!enabled.smmuen(), i.irq_ctrl());
    let mut effects = Effects::default();
    match p.reg {
        Reg::Cr0 => effects = write_cr0(i, word & m.cr0),
        Reg::Cr1 => {
            // TABLE_* and QUEUE_* have guards of their own.
            let queues_open = !enabled.eventqen() && !enabled.priqen() && !enabled.cmdqen();
            let open = if queues_open { 0x3f } else { 0 } | if tables_open { 0xfc0 } else { 0 };
            i.cr1 = i.cr1 & !open | word & open & m.cr1;
        }
        Reg::Cr2 if tables_open => i.cr2 = word & m.cr2,
        Reg::SInit => effects.forget = word & 1 != 0,
        Reg::Gbpa => {
            let new = Gbpa::from_bits(word & m.gbpa);
            if new.update() && !i.gbpa().update() {
                i.gbpa = new.into_bits();
                effects.config = true;
            }
        }
        Reg::IrqCtrl => i.irq_ctrl = word & m.irq_ctrl,
        Reg::Gerrorn => i.gerrorn = word & m.gerror,
        Reg::GerrorIrqCfg0 | Reg::GerrorIrqCfg1 | Reg::GerrorIrqCfg2 if !irq.gerror_irqen() => {
            write_message(&mut i.gerror_irq, m.gerror_irq, p.reg, value);
        }
        Reg::EventqIrqCfg0 | Reg::EventqIrqCfg1 | Reg::EventqIrqCfg2 if !irq.eventq_irqen() => {
            write_message(&mut i.eventq_irq, m.eventq_irq, p.reg, value);
        }
        Reg::PriqIrqCfg0 | Reg::PriqIrqCfg1 | Reg::PriqIrqCfg2 if !irq.priq_irqen() => {
            write_message(&mut i.priq_irq, m.priq_irq, p.reg, value);
        }
        Reg::StrtabBase if tables_open => i.strtab_base = value & m.strtab_base,
        Reg::StrtabBaseCfg if tables_open => i.strtab_base_cfg = word & m.strtab_base_cfg,
        Reg::CmdqBase if !enabled.cmdqen() => {
            let q = &mut i.cmdq;
            q.base = value & Queue::BASE;
            let mask = q.mask(shapes.cmdq);
            (q.prod, q.cons) = (q.prod & mask, q.cons & (mask | 0x7f << CMDQ_ERR_SHIFT));
        }
        Reg::CmdqProd => i.cmdq.prod = word & i.cmdq.mask(shapes.cmdq),
        Reg::CmdqCons if !enabled.cmdqen() => {
            // ERR stays: it says something only while the error is active.
            let mask = i.cmdq.mask(shapes.cmdq);
            i.cmdq.cons = i.cmdq.cons & 0x7f << CMDQ_ERR_SHIFT | word & mask;
        }
        Reg::EventqBase if !enabled.eventqen() => {
            let q = &mut i.eventq;
            q.base = value & Queue::BASE;
            let mask = q.mask(shapes.eventq) | OVERFLOW;
            (q.prod, q.cons) = (q.prod & mask, q.cons & mask);
            i.last_event = None;
        }
        Reg::EventqProd if !enabled.eventqen() => {
            i.eventq.prod = word & (i.eventq.mask(shapes.eventq) | OVERFLOW);
            // What lies before that is not what was written last.
            i.last_event = None;
        }
        Reg::EventqCons => i.eventq.cons = word & (i.eventq.mask(shapes.eventq) | OVERFLOW),
        Reg::PriqBase if !enabled.priqen() => {
            let q = &mut i.priq;
            q.base = value & Queue::BASE;
            let mask = q.mask(shapes.priq) | OVERFLOW;
            (q.prod, q.cons) = (q.prod & mask, q.cons & mask);
        }
        Reg::PriqProd if !enabled.priqen() => {
            i.priq.prod = word & (i.priq.mask(shapes.priq) | OVERFLOW);
        }
        Reg::PriqCons => i.priq.cons = word & (i.priq.mask(shapes.priq) | OVERFLOW),
        // RUN needs SMMUEN.
        Reg::GatosCtrl if i.gatos_ctrl & 1 == 0 && word & m.gatos_ctrl & 1 != 0 && i.cr0().smmuen() => {
            i.gatos_ctrl = 1;
            effects.operation = true;
        }
        Reg::GatosSid if i.gatos_ctrl & 1 == 0 => i.gatos_sid = value & m.gatos_sid,
        Reg::GatosAddr if i.gatos_ctrl & 1 == 0 => i.gatos_addr = value & m.gatos_addr,
        // Read-only, reserved, or behind a closed guard.
        _ => {}
    }
    effects
}

/// A field whose last change is not acknowledged keeps its value.
fn write_cr0(i: &mut Interface, value: u32) -> Effects {
    const VMW: u32 = 7 << 6;
    let old = i.cr0;
    let moving = i.cr0 ^ i.cr0ack;
    let moving = if moving & VMW != 0 { moving | VMW } else { moving };
    i.cr0 = old & moving | value & !moving;
    let (was, is) = (Cr0::from_bits(old), i.cr0());
    Effects {
        config: (i.cr0 ^ old) & SETTLING != 0,
        disabled: was.smmuen() && !is.smmuen(),
        cmdq_off: was.cmdqen() && !is.cmdqen(),
        ..Effects::default()
    }
}

fn write_message(m: &mut Message, mask: MessageMask, reg: Reg, value: u64) {
    match reg {
        Reg::GerrorIrqCfg0 | Reg::EventqIrqCfg0 | Reg::PriqIrqCfg0 => m.address = value & mask.address,
        Reg::GerrorIrqCfg1 | Reg::EventqIrqCfg1 | Reg::PriqIrqCfg1 => m.data = value as u32 & mask.data,
        _ => m.attributes = value as u32 & mask.attributes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_ascends_and_registers_do_not_overlap() {
        assert!(MAP.windows(2).all(|w| w[0].0 + u64::from(w[0].1) <= w[1].0));
        assert!(MAP.iter().all(|(at, width, _)| at.is_multiple_of(u64::from(*width))));
    }

    #[test]
    fn vmw_is_one_field() {
        let mut i = Interface { cr0: 1 << 6, ..Interface::default() };
        write_cr0(&mut i, 2 << 6 | 1);
        assert_eq!(i.cr0, 1 << 6 | 1, "VMW is in transition as a whole, SMMUEN is not");
    }
}
