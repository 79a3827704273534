//! What a context descriptor or the stage 2 fields of an STE say about their tables.

use portcullis_arch::smmuv3::{Cd, Ste};
use portcullis_arch::vmsa::Granule;
use portcullis_smmuv3::{Caps, Explanation};
use portcullis_walk::{Step, TableFormat};

use crate::bank::{entry_log2, start_level};
use crate::descriptor::Tables;
use crate::words;

/// Bits of a code in CD.IPS or STE.S2PS.
pub(crate) fn address_bits(code: u8) -> u8 {
    portcullis_arch::smmuv3::regs::ADDRESS_BITS.get(usize::from(code)).copied().unwrap_or(48).min(52)
}

/// One set of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// 1 or 2.
    pub stage: u8,
    /// 0, or 1 for TTB1.
    pub half: usize,
    pub format: TableFormat,
    /// `None`: reserved.
    pub granule: Option<Granule>,
    /// T0SZ, T1SZ or S2T0SZ as written.
    pub tsz: u8,
    /// Input bits.
    pub bits: u8,
    pub start: i8,
    /// The table's address as written.
    pub base: u64,
    /// No walks (EPD).
    pub off: bool,
    /// Effective output size.
    pub output_bits: u8,
    /// IPS or S2PS as written.
    pub size_code: u8,
}

impl Shape {
    /// `T0SZ`, `T1SZ` or `S2T0SZ`.
    pub fn size_field(&self) -> &'static str {
        match (self.stage, self.half) {
            (2, _) => "STE.S2T0SZ",
            (_, 0) => "CD.T0SZ",
            _ => "CD.T1SZ",
        }
    }

    /// The field that holds the table's address.
    pub fn base_field(&self) -> &'static str {
        match (self.stage, self.half) {
            (2, _) => "STE.S2TTB",
            (_, 0) => "CD.TTB0",
            _ => "CD.TTB1",
        }
    }

    /// The field that holds the output size.
    pub fn output_field(&self) -> &'static str {
        if self.stage == 2 { "STE.S2PS" } else { "CD.IPS" }
    }

    /// The granule, 4 KiB where it is reserved.
    pub fn pages(&self) -> Granule {
        self.granule.unwrap_or(Granule::K4)
    }

    /// log2 of what an entry at `level` covers.
    pub fn entry_log2(&self, level: i8) -> u8 {
        entry_log2(self.format, self.pages(), level)
    }

    /// `T0SZ=16: 48-bit addresses, 4 KiB granule, start level 0`.
    pub fn text(&self) -> String {
        let field = self.size_field().trim_start_matches("CD.").trim_start_matches("STE.");
        let Some(g) = self.granule else { return format!("{field}={}, reserved granule code", self.tsz) };
        let (bits, granule, start) = (self.bits, words::granule(g), self.start);
        format!("{field}={}: {bits}-bit addresses, {granule} granule, start level {start}", self.tsz)
    }
}

/// Stage 1 of a CD: the half that `va` selects.
pub(crate) fn of_cd(cd: &Cd, caps: &Caps, va: u64) -> Shape {
    half_of_cd(cd, caps, selected(cd, va))
}

/// The half that an address selects.
pub(crate) fn selected(cd: &Cd, va: u64) -> usize {
    let d = cd.dw0();
    if d.aa64() {
        return (va >> 55 & 1) as usize;
    }
    let (low, high) = (d.t0sz() & 7, d.t1sz() & 7);
    let above_low = low != 0 && va >> (32 - low) != 0;
    let in_high = high != 0 && (va & 0xffff_ffff) >> (32 - high) == (1 << high) - 1;
    usize::from(if low != 0 && high == 0 { above_low } else { in_high })
}

/// One half of a CD.
pub(crate) fn half_of_cd(cd: &Cd, caps: &Caps, half: usize) -> Shape {
    let d = cd.dw0();
    let (tsz, code, base, off) = if half == 0 {
        (d.t0sz(), Granule::from_tg0(d.tg0()), cd.ttb0(), d.epd0())
    } else {
        (d.t1sz(), Granule::from_tg1(d.tg1()), cd.ttb1(), d.epd1())
    };
    let aa64 = d.aa64();
    let granule = if aa64 { code } else { Some(Granule::K4) };
    let bits = if aa64 { 64 - tsz.min(63) } else { 32 - (tsz & 7) };
    let start = match (aa64, tsz & 7) {
        (true, _) => start_level(granule.unwrap_or(Granule::K4), bits),
        (false, 0 | 1) => 1,
        (false, _) => 2,
    };
    Shape {
        stage: 1,
        half,
        format: if aa64 { TableFormat::Aarch64 } else { TableFormat::Long },
        granule,
        tsz,
        bits,
        start,
        base,
        off,
        output_bits: if aa64 { address_bits(d.ips()).min(caps.oas_bits) } else { 40 },
        size_code: d.ips(),
    }
}

/// Stage 2 of an STE.
pub(crate) fn of_ste(ste: &Ste, caps: &Caps) -> Shape {
    let d = ste.dw2();
    let aa64 = d.s2aa64();
    let granule = if aa64 { Granule::from_tg0(d.s2tg()) } else { Some(Granule::K4) };
    let ds = caps.ds && ste.dw3().s2ds();
    let code = d.s2sl0() as i8 + if ds && ste.dw3().s2sl0_2() { 4 } else { 0 };
    let (bits, start) = if aa64 {
        let start = match granule {
            Some(Granule::K4) | None => match code {
                3 => 3,
                4 => -1,
                c => 2 - c,
            },
            Some(_) => 3 - code,
        };
        (64 - d.s2t0sz().min(63), start)
    } else {
        let t0sz = (d.s2t0sz() << 4) as i8 >> 4;
        ((32 - t0sz) as u8, if code == 1 { 1 } else { 2 })
    };
    Shape {
        stage: 2,
        half: 0,
        format: if aa64 { TableFormat::Aarch64 } else { TableFormat::Long },
        granule,
        tsz: d.s2t0sz(),
        bits,
        start,
        base: ste.s2ttb(),
        off: false,
        output_bits: if aa64 { address_bits(d.s2ps()).min(caps.oas_bits) } else { 40 },
        size_code: d.s2ps(),
    }
}

/// The tables whose walk a fault of `stage` ended.
pub(crate) fn of_stage(e: &Explanation, caps: &Caps, stage: u8) -> Option<Shape> {
    match stage {
        2 => e.ste.map(|(_, ste)| of_ste(&ste, caps)),
        _ => e.cd.map(|(_, cd)| of_cd(&cd, caps, e.va.get())),
    }
}

/// How to read the descriptors of a step.
pub(crate) fn tables(e: &Explanation, step: &Step) -> Tables {
    let aa64 = match step.stage {
        2 => e.ste.is_none_or(|(_, s)| s.dw2().s2aa64()),
        _ => e.cd.is_none_or(|(_, c)| c.dw0().aa64()),
    };
    Tables {
        format: if aa64 { TableFormat::Aarch64 } else { TableFormat::Long },
        mair: e.cd.map_or(0, |(_, c)| c.mair()),
        access_flag_enable: false,
    }
}
