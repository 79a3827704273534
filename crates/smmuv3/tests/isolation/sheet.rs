//! A second reading of the architecture: what becomes of one non-secure transaction, straight from the tables in memory.
//! Slow, without caches, sharing nothing with the model: bit positions and rules are literal. The event record of a fault,
//! how the transaction ends, the output address with memory type and shareability, and which descriptors hardware
//! updates.

use std::collections::BTreeMap;

use portcullis_arch::Pa;
use portcullis_bus::{Memory, SystemMemory};
use portcullis_smmuv3::{Caps, Httu, StallModel, TableEndian};

/// How a faulting transaction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Abort,
    Zero,
    Stall,
}

/// Memory type: Device kinds 0 to 3, or Normal with outer and inner cacheability (1 NC, 2 WT, 3 WB).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    Device(u8),
    Normal(u8, u8),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Pass {
        pa: u64,
        memory: Type,
        /// 0 non, 2 outer, 3 inner.
        sh: u8,
    },
    Silent,
    Fault {
        record: [u64; 4],
        recorded: bool,
        how: How,
    },
}

#[derive(Clone, Copy, Debug)]
pub struct Transaction {
    pub sid: u32,
    pub ssid: Option<u32>,
    pub va: u64,
    pub write: bool,
    pub privileged: bool,
    pub instruction: bool,
    pub memory: Type,
    pub sh: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Cd = 0,
    Tt = 1,
    In = 2,
}

/// A fault before it is judged.
#[derive(Clone, Copy, Debug)]
struct Fault {
    code: u64,
    s2: bool,
    class: Class,
    ipa: u64,
    fetch: u64,
    table_read: bool,
}

/// What ends a look-up early.
#[derive(Debug)]
enum End {
    Silent,
    /// Code, SubstreamID field and its valid bit, fetch address.
    Config(u64, Option<(u64, bool)>, u64),
    Walk(Fault),
}

impl From<Fault> for End {
    fn from(f: Fault) -> Self {
        Self::Walk(f)
    }
}

const TRANSLATION: u64 = 0x10;
const ADDR_SIZE: u64 = 0x11;
const ACCESS: u64 = 0x12;
const PERMISSION: u64 = 0x13;
const EABT: u64 = 0x0b;

fn bit(word: u64, n: u32) -> bool {
    word >> n & 1 != 0
}
fn field(word: u64, hi: u32, lo: u32) -> u64 {
    word >> lo & ((2u64 << (hi - lo)) - 1)
}
fn above(address: u64, bits: u32) -> bool {
    bits < 64 && address >> bits != 0
}

/// The registers and the part.
#[derive(Clone)]
pub struct Sheet {
    pub caps: Caps,
    pub mem: SystemMemory,
    pub strtab_base: u64,
    pub strtab_cfg: u64,
    pub recinvsid: bool,
    pub e2h: bool,
}

/// One transaction under way.
struct Walker<'a> {
    s: &'a Sheet,
    t: Transaction,
    ste: [u64; 8],
    /// Words that hardware has changed.
    updates: BTreeMap<u64, u64>,
    attrs: (Type, u8),
}

/// Parameters of a 64-bit descriptor table walk.
struct Tables {
    aa64: bool,
    granule: u32,
    start: i32,
    bits: u32,
    base: u64,
    output: u32,
    ds: bool,
    big: bool,
}

struct Leaf {
    desc: u64,
    at: u64,
    out: u64,
    /// APTable, XNTable and PXNTable of the levels above: bits 59 to 62.
    above: u64,
}

impl Sheet {
    pub fn run(&self, t: Transaction) -> (Outcome, BTreeMap<u64, u64>) {
        let mut w =
            Walker { s: self, t, ste: [0; 8], updates: BTreeMap::new(), attrs: (Type::Normal(3, 3), 0) };
        let mut cd = None;
        let outcome = match w.go(&mut cd) {
            Ok(pa) => {
                let (memory, sh) = w.attrs;
                let strong = matches!(memory, Type::Device(_) | Type::Normal(1, 1));
                Outcome::Pass { pa, memory, sh: if strong { 2 } else { sh } }
            }
            Err(End::Silent) => Outcome::Silent,
            Err(End::Config(code, ssid, fetch)) => {
                let (ssid, ssv) = ssid.unwrap_or((0, false));
                let zero = code | u64::from(ssv) << 11 | ssid << 12 | u64::from(t.sid) << 32;
                let recorded = code != 0x02 || self.recinvsid;
                let record = [zero, 0, 0, fetch & 0x00ff_ffff_ffff_fff8];
                Outcome::Fault { record, recorded, how: How::Abort }
            }
            Err(End::Walk(f)) => w.judge(f, cd),
        };
        (outcome, w.updates)
    }

    fn load(&self, at: u64) -> Option<u64> {
        if above(at, self.caps.oas_bits.into()) {
            return None;
        }
        self.mem.load64(Pa(at), Default::default()).ok()
    }

    fn ias(&self) -> u32 {
        let oas = u32::from(self.caps.oas_bits);
        match (self.caps.aarch32, self.caps.aarch64) {
            (false, _) => oas,
            (true, true) => oas.max(40),
            (true, false) => 40,
        }
    }

    /// IPS or S2PS.
    fn size_code(&self, code: u64) -> u32 {
        let code = if self.caps.revision == 0 { code.min(5) } else { code.min(6) };
        [32, 36, 40, 42, 44, 48, 52][code as usize].min(u32::from(self.caps.oas_bits))
    }

    fn granule(&self, code: u64) -> Option<u32> {
        match code {
            0 if self.caps.gran4k => Some(12),
            1 if self.caps.gran64k => Some(16),
            2 if self.caps.gran16k => Some(14),
            _ => None,
        }
    }

    fn most_tsz(&self, granule: u32) -> u64 {
        match (self.caps.stt, granule) {
            (false, _) => 39,
            (true, 16) => 47,
            _ => 48,
        }
    }

    fn bad_endian(&self, big: bool) -> bool {
        match self.caps.endian {
            TableEndian::Mixed => false,
            TableEndian::Little => big,
            TableEndian::Big => !big,
        }
    }

    /// The address of an STE, or C_BAD_STREAMID or F_STE_FETCH.
    fn ste_at(&self, t: &Transaction) -> Result<u64, End> {
        let ssid = t.ssid.map(|s| (s.into(), true));
        let bad = || End::Config(0x02, ssid, 0);
        let log2 = field(self.strtab_cfg, 5, 0) as u32;
        let usable = log2.min(u32::from(self.caps.sid_bits));
        let sid = u64::from(t.sid);
        if sid >= 1 << usable {
            return Err(bad());
        }
        let align = |a: u64, bytes_log2: u32| a & !((1u64 << bytes_log2.min(56)) - 1);
        let base = self.strtab_base & 0x00ff_ffff_ffff_ffc0;
        if field(self.strtab_cfg, 17, 16) != 1 || !self.caps.two_level_streams {
            return Ok(align(base, 6 + log2) + sid * 64);
        }
        let split = match field(self.strtab_cfg, 10, 6) {
            s @ (8 | 10) => s as u32,
            _ => 6,
        };
        let at = align(base, 6.max(3 + log2.saturating_sub(split))) + (sid >> split) * 8;
        let l1 = self.load(at).ok_or(End::Config(0x03, ssid, at))?;
        let span = field(l1, 4, 0) as u32;
        let index = sid & ((1 << split) - 1);
        if span == 0 || span > 11 || span > split + 1 || index >= 1 << (span - 1) {
            return Err(bad());
        }
        Ok(align(l1 & 0x00ff_ffff_ffff_ffc0, 5 + span) + index * 64)
    }
}

impl Walker<'_> {
    fn load(&self, at: u64) -> Option<u64> {
        if above(at, self.s.caps.oas_bits.into()) {
            return None;
        }
        self.updates.get(&at).copied().or_else(|| self.s.load(at))
    }

    fn with_ssid(&self, code: u64) -> End {
        End::Config(code, self.t.ssid.map(|s| (s.into(), true)), 0)
    }

    /// The record and the ending of a walk's fault (sections 6 and 6.1).
    fn judge(&self, f: Fault, cd: Option<[u64; 8]>) -> Outcome {
        let t = &self.t;
        let (s, r, a);
        let flat = !f.s2 && cd.is_none();
        if f.code == EABT || flat {
            (s, r, a) = (false, true, true);
        } else if f.s2 {
            (s, r, a) = (bit(self.ste[2], 57), bit(self.ste[2], 58), true);
        } else {
            let cd = cd.unwrap()[0];
            (s, r, a) = (bit(cd, 44), bit(cd, 45), bit(cd, 46));
        }
        let ssid = t.ssid.map_or(0, |x| 1 << 11 | u64::from(x) << 12);
        let one = u64::from(t.privileged) << 33
            | u64::from(t.instruction && !t.write) << 34
            | u64::from(!t.write) << 35
            | u64::from(f.s2) << 39
            | (f.class as u64) << 40
            | u64::from(f.code == PERMISSION && f.class == Class::Tt && f.table_read) << 44
            | u64::from(s) << 31;
        let three = match (f.code, f.s2) {
            (EABT, _) => f.fetch & 0x00ff_ffff_ffff_fff8,
            (_, true) => f.ipa & 0x00ff_ffff_ffff_f000,
            _ => 0,
        };
        let how = if s {
            How::Stall
        } else if a {
            How::Abort
        } else {
            How::Zero
        };
        Outcome::Fault {
            record: [f.code | ssid | u64::from(t.sid) << 32, one, t.va, three],
            recorded: r || s,
            how,
        }
    }

    fn go(&mut self, cd_out: &mut Option<[u64; 8]>) -> Result<u64, End> {
        let s = self.s;
        let at = s.ste_at(&self.t)?;
        for n in 0..8 {
            let ssid = self.t.ssid.map(|x| (x.into(), true));
            self.ste[n] = self.load(at + 8 * n as u64).ok_or(End::Config(0x03, ssid, at))?;
        }
        let ste = self.ste;
        if !bit(ste[0], 0) {
            return Err(self.with_ssid(0x04));
        }
        let config = field(ste[0], 3, 1);
        if config < 4 {
            return Err(End::Silent);
        }
        if self.bad_ste() {
            return Err(self.with_ssid(0x04));
        }
        let (s1, s2) = (config & 1 != 0, config & 2 != 0);
        // Overrides of privilege and instruction.
        if s.caps.attr_perms_override {
            match field(ste[1], 49, 48) {
                2 => self.t.privileged = false,
                3 => self.t.privileged = true,
                _ => {}
            }
            match field(ste[1], 51, 50) {
                2 => self.t.instruction = false,
                3 => self.t.instruction = true,
                _ => {}
            }
        }
        // Which CD.
        let max = if s.caps.ssid_bits == 0 { 0 } else { field(ste[0], 63, 59) };
        let bad_ssid = |n: u32| End::Config(0x08, Some((u64::from(n), false)), 0);
        let s1dss = field(ste[1], 1, 0);
        let index = match self.t.ssid {
            Some(n) if !s1 || max == 0 || u64::from(n) >= 1 << max => return Err(bad_ssid(n)),
            Some(0) if s1dss == 2 => return Err(End::Config(0x06, None, 0)),
            Some(n) => Some(n),
            None if !s1 => None,
            None if max == 0 || s1dss == 2 => Some(0),
            None if s1dss == 1 => None,
            None => return Err(End::Config(0x06, None, 0)),
        };
        let Some(index) = index else {
            return self.without_stage1(s1, s2);
        };
        let cd = self.fetch_cd(index, max, s2)?;
        if self.bad_cd(&cd, s2) {
            return Err(self.with_ssid(0x0a));
        }
        *cd_out = Some(cd);
        self.stage1(&cd, s2)
    }

    /// Bypass, or stage 2 alone.
    fn without_stage1(&mut self, s1: bool, s2: bool) -> Result<u64, End> {
        let s = self.s;
        let va = self.t.va;
        let limit = if s1 || s2 { s.ias() } else { s.caps.oas_bits.into() };
        if above(va, limit) {
            return Err(self.fault(ADDR_SIZE, false, Class::In).into());
        }
        // Overrides of the memory type.
        let mut attrs = (self.t.memory, self.t.sh);
        if s.caps.attr_types_override {
            if bit(self.ste[1], 36) {
                attrs.0 = type_of(field(self.ste[1], 35, 32) as u8);
            }
            match field(self.ste[1], 45, 44) {
                1 => {}
                sh => attrs.1 = sh as u8,
            }
        }
        if matches!(attrs.0, Type::Device(_) | Type::Normal(1, 1)) {
            attrs.1 = 2;
        }
        self.attrs = attrs;
        if !s2 {
            return Ok(va);
        }
        let (pa, by) = self.stage2(va, Class::In, false)?;
        self.attrs = combine(attrs, by);
        Ok(pa)
    }

    /// Section 3.1: ILLEGAL.
    fn bad_ste(&self) -> bool {
        let (c, w) = (&self.s.caps, &self.ste);
        let config = field(w[0], 3, 1);
        let (s1, s2) = (config & 1 != 0, config & 2 != 0);
        let strw = if config == 5 && c.hyp { field(w[1], 31, 30) } else { 0 };
        let eats = field(w[1], 29, 28);
        let max = field(w[0], 63, 59);
        if s1 && !c.stage1 || s2 && !c.stage2 || strw & 1 != 0 {
            return true;
        }
        if c.ats && (s1 || s2) {
            let stalls = s2 && bit(w[2], 57);
            if eats == 1 && stalls || eats == 2 && (config != 7 || stalls || !c.split_stage_ats) {
                return true;
            }
        }
        if s1 {
            if bit(w[1], 27) && c.stall_model != StallModel::Both {
                return true;
            }
            if c.ssid_bits > 0 {
                if max > c.ssid_bits.into() {
                    return true;
                }
                if max != 0 && matches!(field(w[0], 5, 4), 1 | 2) && !c.cd2l {
                    return true;
                }
            }
            if !s2 && above(w[0] & 0x00ff_ffff_ffff_ffc0, c.oas_bits.into()) {
                return true;
            }
        }
        let tagged = c.stage2 && (s1 || s2) && strw == 0;
        if tagged && !c.vmid16 && field(w[2], 15, 8) != 0 {
            return true;
        }
        s2 && self.bad_stage2()
    }

    fn bad_stage2(&self) -> bool {
        let (s, w) = (self.s, &self.ste);
        let c = &s.caps;
        let aa64 = bit(w[2], 51);
        let (hd, ha) = (bit(w[2], 55), bit(w[2], 56));
        let stall = bit(w[2], 57);
        if stall && c.stall_model == StallModel::Terminate || !stall && c.stall_model == StallModel::Forced {
            return true;
        }
        if if aa64 { !c.aarch64 } else { !c.aarch32 } {
            return true;
        }
        if s.bad_endian(bit(w[2], 52)) {
            return true;
        }
        if c.httu == Httu::None && (ha || hd) || c.httu == Httu::Access && hd {
            return true;
        }
        let ttb = w[3] & 0x000f_ffff_ffff_fff0;
        let sl0 = field(w[2], 39, 38);
        if !aa64 {
            let t0sz = sign4(field(w[2], 35, 32));
            let fits = match sl0 {
                1 => (-8..=1).contains(&t0sz),
                0 => (-2..=7).contains(&t0sz),
                _ => false,
            };
            return c.fwb && bit(w[1], 25) || ha || hd || above(ttb, 40) || !fits;
        }
        let Some(granule) = s.granule(field(w[2], 47, 46)) else { return true };
        let ds = c.ds && bit(w[3], 3) && granule != 16;
        let t0sz = field(w[2], 37, 32);
        let ps = s.size_code(field(w[2], 50, 48));
        let ttb_limit = if ds || granule == 16 { ps } else { ps.min(48) };
        let least = (if ds || granule == 16 { 12 } else { 16 }).max(64 - s.ias().min(64));
        if above(ttb, ttb_limit) || t0sz < u64::from(least) || t0sz > s.most_tsz(granule) {
            return true;
        }
        // The table of 8.1.
        let code = sl0 | if ds && granule == 12 && bit(w[3], 2) { 4 } else { 0 };
        let stt = c.stt;
        let ranges: &[(u64, u64, u64)] = match (granule, ds) {
            (12, false) => &[(2, 16, 24), (1, 21, 33), (0, 30, 42), (3, 39, 48)],
            (12, true) => &[(4, 12, 15), (2, 12, 24), (1, 21, 33), (0, 30, 42), (3, 39, 48)],
            (14, false) => &[(2, 16, 27), (1, 24, 38), (0, 35, 48)],
            (14, true) => &[(3, 12, 16), (2, 13, 27), (1, 24, 38), (0, 35, 48)],
            _ => &[(2, 12, 21), (1, 18, 34), (0, 31, 47)],
        };
        let Some((_, low, high)) = ranges.iter().find(|(c, ..)| *c == code) else { return true };
        if granule == 12 && code == 3 && !stt {
            return true;
        }
        !(*low..=*high).contains(&t0sz)
    }

    fn tables2(&self) -> Tables {
        let (s, w) = (self.s, &self.ste);
        let ttb = w[3] & 0x000f_ffff_ffff_fff0;
        let sl0 = field(w[2], 39, 38) as i32;
        let big = bit(w[2], 52);
        if !bit(w[2], 51) {
            let bits = (32 - sign4(field(w[2], 35, 32))) as u32;
            return Tables {
                aa64: false,
                granule: 12,
                start: 2 - sl0,
                bits,
                base: ttb,
                output: 40,
                ds: false,
                big,
            };
        }
        let granule = s.granule(field(w[2], 47, 46)).unwrap();
        let ds = s.caps.ds && bit(w[3], 3) && granule != 16;
        let start = match (granule, sl0) {
            (12, _) if ds && bit(w[3], 2) => -1,
            (12, 3) => 3,
            (12, n) => 2 - n,
            (_, n) => 3 - n,
        };
        let bits = 64 - field(w[2], 37, 32) as u32;
        let output = s.size_code(field(w[2], 50, 48));
        Tables { aa64: true, granule, start, bits, base: ttb, output, ds, big }
    }

    fn fault(&self, code: u64, s2: bool, class: Class) -> Fault {
        Fault { code, s2, class, ipa: 0, fetch: 0, table_read: true }
    }

    /// The CD, through stage 2 if there is one.
    fn fetch_cd(&mut self, index: u32, max: u64, s2: bool) -> Result<[u64; 8], End> {
        let oas = u32::from(self.s.caps.oas_bits);
        let ptr = self.ste[0] & 0x00ff_ffff_ffff_ffc0;
        let fmt = if max == 0 { 0 } else { field(self.ste[0], 5, 4) };
        let align = |a: u64, log2: u32| a & !((1u64 << log2) - 1);
        let abort = |w: &Self, at: u64| End::Config(0x09, w.t.ssid.map(|x| (x.into(), true)), at);
        let at = match fmt {
            1 | 2 => {
                let leaf = if fmt == 1 { 6 } else { 10 };
                let entries = (max as u32).saturating_sub(leaf);
                let at = align(ptr, 6.max(3 + entries)) + u64::from(index >> leaf) * 8;
                let at = if s2 { self.stage2(at, Class::Cd, false)?.0 } else { at };
                let l1 = self.load(at).ok_or_else(|| abort(self, at))?;
                let next = align(l1 & 0x00ff_ffff_ffff_f000, 6 + leaf);
                if l1 & 1 == 0 || !s2 && above(next, oas) {
                    return Err(End::Config(0x08, Some((self.t.ssid.unwrap_or(0).into(), false)), 0));
                }
                next + u64::from(index & ((1 << leaf) - 1)) * 64
            }
            _ => align(ptr, 6 + max as u32) + u64::from(index) * 64,
        };
        let at = if s2 { self.stage2(at, Class::Cd, false)?.0 } else { at };
        let mut cd = [0; 8];
        for (n, word) in cd.iter_mut().enumerate() {
            *word = self.load(at + 8 * n as u64).ok_or_else(|| abort(self, at))?;
        }
        Ok(cd)
    }

    /// The stream's world: true for EL2 without E2H, true for EL2-E2H.
    fn world(&self) -> (bool, bool) {
        let el2 = field(self.ste[0], 3, 1) == 5 && self.s.caps.hyp && field(self.ste[1], 31, 30) == 2;
        (el2 && !self.s.e2h, el2 && self.s.e2h)
    }

    /// Section 4: ILLEGAL.
    fn bad_cd(&self, cd: &[u64; 8], s2: bool) -> bool {
        let s = self.s;
        let c = &s.caps;
        let d = cd[0];
        let (el2, host) = self.world();
        let aa64 = bit(d, 41);
        let (hd, ha) = (bit(d, 42), bit(d, 43));
        let (stall, abort) = (bit(d, 44), bit(d, 46));
        let off = [bit(d, 14) && !el2, bit(d, 30) || el2];
        if !bit(d, 31)
            || stall && (bit(self.ste[1], 27) || c.stall_model == StallModel::Terminate)
            || !stall && c.stall_model == StallModel::Forced
            || !abort && c.abort_only
            || s.bad_endian(bit(d, 15)) && off != [true, true]
        {
            return true;
        }
        if !aa64 && (!c.aarch32 || host) || aa64 && (!c.aarch64 || s2 && !bit(self.ste[2], 51)) {
            return true;
        }
        if aa64 && (c.httu == Httu::None && (ha || hd) || c.httu == Httu::Access && hd) {
            return true;
        }
        if !el2 && !c.asid16 && field(d, 63, 56) != 0 {
            return true;
        }
        let ips = s.size_code(field(d, 34, 32));
        for half in 0..2 {
            if off[half] {
                continue;
            }
            let ttb = cd[1 + half] & 0x000f_ffff_ffff_fff0;
            if !aa64 {
                if above(ttb, 40) {
                    return true;
                }
                continue;
            }
            let Some(granule) = self.granule1(d, half) else { return true };
            let ds = c.ds && bit(cd[2], 58) && granule != 16;
            let tsz = field(d, 5 + 16 * half as u32, 16 * half as u32);
            let least = if c.va52 && (granule == 16 || ds) { 12 } else { 16 };
            let limit = if ds || granule == 16 { ips } else { ips.min(48) };
            if tsz < least || tsz > s.most_tsz(granule) || above(ttb, limit) {
                return true;
            }
        }
        false
    }

    fn granule1(&self, d: u64, half: usize) -> Option<u32> {
        match half {
            0 => self.s.granule(field(d, 7, 6)),
            // 1 16K, 2 4K, 3 64K.
            _ => self.s.granule([3, 2, 0, 1][field(d, 23, 22) as usize]),
        }
    }

    fn stage1(&mut self, cd: &[u64; 8], s2: bool) -> Result<u64, End> {
        let s = self.s;
        let d = cd[0];
        let va = self.t.va;
        let (el2, _) = self.world();
        let aa64 = bit(d, 41);
        let range = self.fault(TRANSLATION, false, Class::In);
        let off = [bit(d, 14) && !el2, bit(d, 30) || el2];
        let half;
        let mut t;
        if aa64 {
            half = usize::from(bit(va, 55));
            if el2 && half == 1 || off[half] {
                return Err(range.into());
            }
            let tbi = bit(d, 38 + half as u32);
            let granule = self.granule1(d, half).unwrap();
            let bits = 64 - field(d, 5 + 16 * half as u32, 16 * half as u32) as u32;
            let top = if tbi { 55 } else { 63 };
            if (bits..=top).any(|n| bit(va, n) != (half == 1)) {
                return Err(range.into());
            }
            if s.caps.e0pd && bit(cd[1 + half], 2) && !self.t.privileged && !el2 {
                return Err(range.into());
            }
            let stride = granule - 3;
            let levels = (bits - granule).div_ceil(stride) as i32;
            let ds = s.caps.ds && bit(cd[2], 58) && granule != 16;
            let output = s.size_code(field(d, 34, 32));
            t = Tables { aa64, granule, start: 4 - levels, bits, base: 0, output, ds, big: bit(d, 15) };
        } else {
            let (t0, t1) = (field(d, 2, 0) as u32, if el2 { 0 } else { field(d, 18, 16) as u32 });
            if va >> 32 != 0 {
                return Err(range.into());
            }
            let in0 = va >> (32 - t0) == 0;
            let in1 = va >= (1 << 32) - (1 << (32 - t1));
            half = match (t0, t1) {
                (0, 0) => 0,
                (_, 0) => usize::from(!in0),
                (0, _) => usize::from(in1),
                _ if in0 => 0,
                _ if in1 => 1,
                _ => return Err(range.into()),
            };
            if off[half] {
                return Err(range.into());
            }
            let tsz = [t0, t1][half];
            let start = if tsz < 2 { 1 } else { 2 };
            let (bits, ds, big) = (32 - tsz, false, bit(d, 15));
            t = Tables { aa64, granule: 12, start, bits, base: 0, output: 40, ds, big };
        }
        t.base = cd[1 + half] & 0x000f_ffff_ffff_fff0;
        let input = va & ((1 << t.bits) - 1);
        let (ha, hd) = (aa64 && bit(d, 43), aa64 && bit(d, 43) && bit(d, 42));
        let mut leaf = self.walk(&t, input, None, s2)?;
        if !bit(leaf.desc, 10) {
            if ha {
                leaf = self.update(leaf, 1 << 10, 0, t.big, s2)?;
            } else if !bit(d, 35) {
                return Err(self.fault(ACCESS, false, Class::In).into());
            }
        }
        // Permissions.
        let v = leaf.desc;
        let up = if s.caps.hierarchy_disable && bit(cd[1 + half], 1) { 0 } else { leaf.above };
        let user = !el2 && bit(v, 6) && !bit(up, 61);
        let dirtiable = hd && bit(v, 51) && bit(v, 7) && !bit(up, 62);
        let writable = (!bit(v, 7) || dirtiable) && !bit(up, 62);
        let wxn = bit(d, 36);
        let uwxn = !aa64 && bit(d, 37);
        let xn = bit(v, 54) || bit(up, 60);
        let pxn = bit(v, 53) || bit(up, 59);
        let p = self.t.privileged || el2;
        let ok = if self.t.write {
            writable && if p { el2 || !(bit(d, 40) && user) } else { user }
        } else if !self.t.instruction {
            if p { el2 || !(bit(d, 40) && user) } else { user }
        } else if el2 {
            !xn && !(wxn && writable)
        } else if p {
            // XN is for both in VMSAv8-32.
            let user_writes = user && writable;
            let never = if aa64 { pxn || user_writes } else { xn || pxn || uwxn && user_writes };
            !never && !(wxn && writable)
        } else {
            let user_writes = user && writable;
            !xn && !(wxn && user_writes) && (aa64 || user)
        };
        if !ok {
            return Err(self.fault(PERMISSION, false, Class::In).into());
        }
        let mair = (cd[3] >> (8 * field(v, 4, 2))) as u8;
        let sh = if t.ds { field(d, 13 + 16 * half as u32, 12 + 16 * half as u32) } else { field(v, 9, 8) };
        let mut attrs = (mair_type(mair), if sh == 1 { 2 } else { sh as u8 });
        if matches!(attrs.0, Type::Device(_) | Type::Normal(1, 1)) {
            attrs.1 = 2;
        }
        let ipa = leaf.out;
        let marks = self.t.write && dirtiable;
        if !s2 {
            if marks {
                self.update(leaf, 1 << 10, 1 << 7, t.big, false)?;
            }
            self.attrs = attrs;
            return Ok(ipa);
        }
        if marks {
            // Whether the descriptor may be written comes before stage 2 of the address; writing comes after.
            self.may_write(leaf.at)?;
        }
        let before = self.updates.clone();
        let (pa, by) = self.stage2(ipa, Class::In, true)?;
        if marks {
            self.updates = before;
            self.update(leaf, 1 << 10, 1 << 7, t.big, true)?;
            self.stage2(ipa, Class::In, true)?;
        }
        self.attrs = combine(attrs, by);
        Ok(pa)
    }

    /// Stage 2 says whether a stage 1 descriptor at this IPA may be written. Its flags are not changed.
    fn may_write(&mut self, ipa: u64) -> Result<(), Fault> {
        let before = self.updates.clone();
        let result = self.stage2_for(ipa, Class::Tt, false, true).map(|_| ());
        self.updates = before;
        result
    }

    /// Sets and clears bits of a descriptor; `ipa`: its address goes through stage 2, as a write.
    fn update(&mut self, leaf: Leaf, set: u64, clear: u64, big: bool, s2: bool) -> Result<Leaf, Fault> {
        let at = if s2 { self.stage2_for(leaf.at, Class::Tt, false, true)?.0 } else { leaf.at };
        let desc = leaf.desc & !clear | set;
        self.updates.insert(at, if big { desc.swap_bytes() } else { desc });
        Ok(Leaf { desc, ..leaf })
    }

    /// To the leaf of `input`; `s2_class` is given for stage 2 walks, `nested` for stage 1 tables in IPAs.
    fn walk(
        &mut self,
        t: &Tables,
        input: u64,
        s2_class: Option<(Class, u64)>,
        nested: bool,
    ) -> Result<Leaf, Fault> {
        let s2 = s2_class.is_some();
        let (class, ipa) = s2_class.unwrap_or((Class::In, 0));
        let f = |code| Fault { code, s2, class, ipa, fetch: 0, table_read: true };
        let stride = t.granule - 3;
        let shift_of = |level: i32| t.granule + (3 - level) as u32 * stride;
        // The first table: its own size is its alignment.
        let first_log2 = (t.bits - shift_of(t.start).min(t.bits)) + 3;
        let first_log2 = if t.output >= 52 { first_log2.max(6) } else { first_log2 };
        let mut table = t.base & !((1u64 << first_log2) - 1);
        let mut index = input >> shift_of(t.start);
        let mut level = t.start;
        let mut up = 0;
        loop {
            let at = table + 8 * index;
            let pa = if nested { self.stage2_for(at, Class::Tt, false, false)?.0 } else { at };
            let Some(raw) = self.load(pa) else {
                let class = if s2 { class } else { Class::Tt };
                return Err(Fault { fetch: pa, class, ..f(EABT) });
            };
            let v = if t.big { raw.swap_bytes() } else { raw };
            let table_type = v & 3 == 3 && level < 3;
            // 52-bit addresses give blocks one level more.
            let wide = t.aa64 && (t.ds || t.granule == 16 && self.s.caps.oas_bits > 48);
            let first_block = match t.granule {
                12 => 1 - i32::from(wide),
                14 => 2 - i32::from(wide),
                _ => 2 - i32::from(wide),
            };
            let leaf_type = if level == 3 { v & 3 == 3 } else { v & 3 == 1 && level >= first_block };
            if !table_type && !leaf_type {
                return Err(f(TRANSLATION));
            }
            let mut out = v & 0xffff_ffff_f000;
            if t.aa64 && t.ds {
                out |= (v & 3 << 48) | field(v, 9, 8) << 50;
            } else if wide {
                out = v & 0xffff_ffff_0000 | field(v, 15, 12) << 48;
            }
            if above(out, t.output) {
                return Err(f(ADDR_SIZE));
            }
            if leaf_type {
                let inside = (1u64 << shift_of(level)) - 1;
                return Ok(Leaf { desc: v, at, out: out & !inside | input & inside, above: up });
            }
            up |= v & 0xf << 59;
            table = out & !((1u64 << t.granule) - 1);
            level += 1;
            index = input >> shift_of(level) & ((1 << stride) - 1);
        }
    }

    /// Stage 2 of an IPA for the SMMU's own read of a structure, or (`client`) for the transaction.
    fn stage2(&mut self, ipa: u64, class: Class, client: bool) -> Result<(u64, (Forced, u8)), Fault> {
        self.stage2_for(ipa, class, client || class == Class::In, false)
    }

    fn stage2_for(
        &mut self,
        ipa: u64,
        class: Class,
        client: bool,
        table_write: bool,
    ) -> Result<(u64, (Forced, u8)), Fault> {
        let (s, w) = (self.s, self.ste);
        let f = move |code| Fault { code, s2: true, class, ipa, fetch: 0, table_read: !table_write };
        let t = self.tables2();
        if above(ipa, t.bits) {
            return Err(f(TRANSLATION));
        }
        let leaf = self.walk(&t, ipa, Some((class, ipa)), false).map_err(|e| Fault { ipa, ..e })?;
        let (ha, hd) = (t.aa64 && bit(w[2], 56), t.aa64 && bit(w[2], 56) && bit(w[2], 55));
        let leaf = match (bit(leaf.desc, 10), ha) {
            (true, _) => leaf,
            (false, true) => self.update(leaf, 1 << 10, 0, t.big, false)?,
            (false, false) if bit(w[2], 53) => leaf,
            _ => return Err(f(ACCESS)),
        };
        let v = leaf.desc;
        let dirtiable = hd && bit(v, 51) && !bit(v, 7);
        let (read, write) = (bit(v, 6), bit(v, 7) || dirtiable);
        let wants_write = if client { self.t.write } else { table_write };
        let ok = if wants_write {
            write
        } else if client && self.t.instruction {
            let xn = if s.caps.xnx { field(v, 54, 53) } else { u64::from(bit(v, 54)) * 2 };
            let x = match xn {
                0 => true,
                1 => !self.t.privileged,
                2 => false,
                _ => self.t.privileged,
            };
            x && (t.aa64 || read)
        } else {
            read
        };
        if !ok {
            return Err(f(PERMISSION));
        }
        let memory = match (s.caps.fwb && bit(w[1], 25), field(v, 5, 2)) {
            (true, code) if code & 4 == 0 => Forced::Strongest(Type::Device(code as u8 & 3)),
            (true, code) => match code & 3 {
                1 => Forced::Strongest(Type::Normal(1, 1)),
                2 => Forced::Is(Type::Normal(3, 3)),
                3 => Forced::Strongest(Type::Normal(3, 3)),
                _ => Forced::Strongest(Type::Device(0)),
            },
            (false, code) => Forced::Strongest(type_of(code as u8)),
        };
        // S2PTW.
        let nested = field(w[0], 3, 1) == 7;
        let device = matches!(memory, Forced::Strongest(Type::Device(_)));
        if !client && nested && bit(w[2], 54) && device {
            return Err(f(PERMISSION));
        }
        if wants_write && dirtiable {
            self.update(Leaf { ..leaf }, 1 << 10 | 1 << 7, 0, t.big, false)?;
        }
        let sh = if t.ds { field(w[2], 45, 44) } else { field(v, 9, 8) };
        Ok((leaf.out, (memory, if sh == 1 { 2 } else { sh as u8 })))
    }
}

/// What a stage 2 leaf says about the memory type.
#[derive(Clone, Copy, Debug)]
enum Forced {
    Strongest(Type),
    Is(Type),
}

fn combine((one, sh1): (Type, u8), (two, sh2): (Forced, u8)) -> (Type, u8) {
    let memory = match two {
        Forced::Is(t) => t,
        Forced::Strongest(two) => match (one, two) {
            (Type::Device(a), Type::Device(b)) => Type::Device(a.min(b)),
            (d @ Type::Device(_), _) | (_, d @ Type::Device(_)) => d,
            (Type::Normal(a, b), Type::Normal(c, d)) => Type::Normal(a.min(c), b.min(d)),
        },
    };
    let sh = match (sh1, sh2) {
        (2, _) | (_, 2) => 2,
        (a, b) => a.max(b),
    };
    (memory, sh)
}

/// A stage 2 MemAttr, or that of an STE.
pub fn type_of(code: u8) -> Type {
    match (code >> 2, code & 3) {
        (0, kind) => Type::Device(kind),
        (_, 0) => Type::Device(0),
        (outer, inner) => Type::Normal(outer, inner),
    }
}

fn mair_type(byte: u8) -> Type {
    if byte >> 4 == 0 {
        return Type::Device(byte >> 2 & 3);
    }
    let cache = |n: u8| match n {
        4 => 1,
        0..=3 | 8..=11 => 2,
        _ => 3,
    };
    Type::Normal(cache(byte >> 4), cache(byte & 15))
}

fn sign4(n: u64) -> i64 {
    if n & 8 != 0 { n as i64 - 16 } else { n as i64 }
}
