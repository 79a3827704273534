//! Random configurations that are legal by construction, for every format, granule and size that a part has: a stream
//! table entry, a context descriptor, and tables of both stages around a few addresses. What is not legal about them is
//! put in on purpose.

use portcullis_arch::Pa;
use portcullis_bus::{Memory, SystemMemory};
use portcullis_smmuv3::{Caps, Httu, StallModel, TableEndian};

use crate::random::Rng;

/// Where tables are taken from.
pub const FIRST: u64 = 0x8010_0000;
pub const LAST: u64 = 0x8080_0000;

/// A format of tables.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub aa64: bool,
    pub granule: u32,
    pub start: i32,
    pub bits: u32,
    /// 52-bit addresses: the kind with DS, the kind of 64 KiB.
    pub ds: bool,
    pub lpa: bool,
    pub big: bool,
}

impl Shape {
    fn shift(&self, level: i32) -> u32 {
        self.granule + (3 - level) as u32 * (self.granule - 3)
    }
    fn first_bytes(&self) -> u64 {
        8 << (self.bits - self.shift(self.start))
    }
    /// The levels that may hold leaves.
    pub fn leaf_levels(&self) -> Vec<i32> {
        let first = match (self.granule, self.ds || self.lpa) {
            (12, true) => 0,
            (12, false) => 1,
            (_, true) => 1,
            (_, false) => 2,
        };
        (first.max(self.start)..=3).collect()
    }
    fn encode(&self, address: u64) -> u64 {
        if self.ds {
            address & 0x3_ffff_ffff_f000 | (address >> 50 & 3) << 8
        } else if self.lpa {
            address & 0xffff_ffff_0000 | (address >> 48 & 15) << 12
        } else {
            address & 0xffff_ffff_f000
        }
    }
    fn decode(&self, v: u64) -> u64 {
        let low = (1u64 << self.granule) - 1;
        if self.ds {
            (v & 0x3_ffff_ffff_f000 | (v >> 8 & 3) << 50) & !low
        } else if self.lpa {
            v & 0xffff_ffff_0000 | (v >> 12 & 15) << 48
        } else {
            v & 0xffff_ffff_f000 & !low
        }
    }
}

pub struct Builder<'a> {
    pub caps: &'a Caps,
    pub mem: SystemMemory,
    pub rng: &'a mut Rng,
    pub next: u64,
    /// Addresses of structures that stage 2 has to map: first byte and size.
    pub used: Vec<(u64, u64)>,
    /// What IPAs are above PAs.
    pub delta: u64,
}

impl Builder<'_> {
    pub fn store(&self, at: u64, value: u64) {
        self.mem.store64(Pa(at), value).unwrap();
    }
    pub fn load(&self, at: u64) -> u64 {
        self.mem.load64(Pa(at), Default::default()).unwrap()
    }
    pub fn alloc(&mut self, size: u64) -> u64 {
        let size = size.max(0x40);
        let at = self.next.next_multiple_of(size);
        self.next = at + size;
        assert!(self.next <= LAST, "out of memory for tables");
        self.mem.write(Pa(at), Default::default(), &vec![0; size as usize]).unwrap();
        at
    }

    fn endian(&mut self) -> bool {
        match self.caps.endian {
            TableEndian::Mixed => self.rng.one_in(4),
            TableEndian::Little => false,
            TableEndian::Big => true,
        }
    }

    fn granules(&self) -> Vec<u32> {
        let c = self.caps;
        [(12, c.gran4k), (14, c.gran16k), (16, c.gran64k)].iter().filter(|g| g.1).map(|g| g.0).collect()
    }

    /// A legal shape of one half of stage 1; everything but `aa64` of the first half that is shared is `like`.
    pub fn stage1_shape(&mut self, aa64: bool, ds: bool, big: bool, tsz32: u32) -> Shape {
        let c = self.caps;
        if !aa64 {
            let bits = 32 - tsz32;
            let start = if tsz32 < 2 { 1 } else { 2 };
            return Shape { aa64, granule: 12, start, bits, ds: false, lpa: false, big };
        }
        let choices = self.granules();
        let granule = self.rng.pick(&choices);
        let ds = ds && granule != 16;
        let least = if c.va52 && (granule == 16 || ds) { 12 } else { 16 };
        let most = match (c.stt, granule) {
            (false, _) => 39,
            (true, 16) => 47,
            _ => 48,
        };
        let bits = 64 - (least + self.rng.below(most - least + 1)) as u32;
        let start = 4 - (bits - granule).div_ceil(granule - 3) as i32;
        Shape { aa64, granule, start, bits, ds, lpa: granule == 16 && c.oas_bits > 48, big }
    }

    /// A legal shape of stage 2 with its S2T0SZ and S2SL0 (with S2SL0_2 as bit 2).
    pub fn stage2_shape(&mut self, aa64: bool) -> (Shape, u64, u64) {
        let c = self.caps;
        let big = self.endian();
        if !aa64 {
            // From -8 to 7, with the level that suits.
            let (sl0, t0sz) = if self.rng.one_in(2) {
                (1, self.rng.below(10) as i64 - 8)
            } else {
                (0, self.rng.below(3) as i64 - 2)
            };
            let bits = (32 - t0sz) as u32;
            let start = if sl0 == 1 { 1 } else { 2 };
            let shape = Shape { aa64, granule: 12, start, bits, ds: false, lpa: false, big };
            return (shape, t0sz as u64 & 15, sl0);
        }
        let choices = self.granules();
        let granule = self.rng.pick(&choices);
        let ds = c.ds && granule != 16 && self.rng.one_in(2);
        let oas = u64::from(c.oas_bits.max(if c.aarch32 { 40 } else { 0 }));
        let least = (64 - oas).max(if ds || granule == 16 { 12 } else { 16 });
        // (SL0, start level, T0SZ from, to) that leave at least 33 bits.
        let table: &[(u64, i32, u64, u64)] = match (granule, ds) {
            (12, false) => &[(2, 0, 16, 24), (1, 1, 21, 31), (0, 2, 30, 31)],
            (12, true) => &[(4, -1, 12, 15), (2, 0, 12, 24), (1, 1, 21, 31), (0, 2, 30, 31)],
            (14, false) => &[(2, 1, 16, 27), (1, 2, 24, 31)],
            (14, true) => &[(3, 0, 12, 16), (2, 1, 13, 27), (1, 2, 24, 31)],
            _ => &[(2, 1, 12, 21), (1, 2, 18, 31), (0, 3, 31, 31)],
        };
        let usable: Vec<_> = table.iter().filter(|(.., to)| *to >= least).copied().collect();
        let (sl0, start, from, to) = self.rng.pick(&usable);
        let from = from.max(least);
        let t0sz = from + self.rng.below(to - from + 1);
        let lpa = granule == 16 && c.oas_bits > 48;
        let shape = Shape { aa64, granule, start, bits: (64 - t0sz) as u32, ds, lpa, big };
        (shape, t0sz, sl0)
    }

    /// The first table.
    pub fn root(&mut self, s: &Shape) -> u64 {
        let at = self.alloc(s.first_bytes());
        self.used.push((at, s.first_bytes()));
        at
    }

    /// Puts a leaf of `level` for `input`; tables get `upper` bits now and then. Addresses in descriptors are above those
    /// in memory by `delta`. Returns where the leaf is, unless a larger one is in the way.
    pub fn map(
        &mut self,
        s: &Shape,
        root: u64,
        input: u64,
        level: i32,
        leaf: u64,
        delta: u64,
    ) -> Option<u64> {
        let mut table = root;
        for l in s.start..=3 {
            let mask = if l == s.start { u64::MAX } else { (1 << (s.granule - 3)) - 1 };
            let at = table + 8 * (input >> s.shift(l) & mask);
            let swap = |v: u64| if s.big { v.swap_bytes() } else { v };
            let v = swap(self.load(at));
            if l == level {
                if v & 3 == 3 && l < 3 {
                    return None;
                }
                self.store(at, swap(leaf));
                return Some(at);
            }
            if v & 3 == 3 {
                table = s.decode(v) - delta;
                continue;
            }
            if v & 3 == 1 {
                return None;
            }
            let bytes = 1 << s.granule;
            table = self.alloc(bytes);
            self.used.push((table, bytes));
            let upper = if self.rng.one_in(6) { self.rng.next() & 0xf800_0000_0000_0000 } else { 0 };
            self.store(at, swap(s.encode(table + delta) | 3 | upper));
        }
        None
    }

    /// The bits of a leaf besides type and address; mostly something that may be used.
    pub fn leaf_bits(&mut self, s: &Shape, stage2: bool) -> u64 {
        let r = &mut *self.rng;
        let random = r.next();
        let sh = if s.ds { 0 } else { r.pick(&[0, 2, 3, 3, 1]) << 8 };
        let af = u64::from(!r.one_in(5)) << 10;
        let high = if r.one_in(3) { random & 0x0068_0000_0000_0000 } else { random & 0x0008_0000_0000_0000 };
        let perms = if stage2 {
            r.pick(&[3, 3, 3, 1, 2, 0]) << 6 | r.pick(&[15, 15, 15, 5, 1, 6, 7, 0, 13]) << 2
        } else {
            r.pick(&[1, 1, 1, 3, 0, 2]) << 6 | (random & 7) << 2
        };
        sh | af | high | perms | if stage2 { 0 } else { random & 1 << 11 }
    }

    /// A leaf for `out`, which is cut to the level's size.
    pub fn leaf(&mut self, s: &Shape, level: i32, out: u64, stage2: bool) -> u64 {
        let kind = if level == 3 { 3 } else { 1 };
        let out = out >> s.shift(level) << s.shift(level);
        s.encode(out) | kind | self.leaf_bits(s, stage2)
    }

    /// An output address: mostly in memory, now and then as high as it can be.
    fn output(&mut self, bits: u32) -> u64 {
        let r = &mut *self.rng;
        match r.below(6) {
            0 => r.next() & ((1u64 << bits) - 1),
            1 => 1 << r.below(u64::from(bits) + 1),
            _ => FIRST + r.below(LAST - FIRST),
        }
    }

    /// A stream with one CD: the STE, and addresses that its tables know.
    pub fn stream(&mut self) -> ([u64; 8], Vec<u64>) {
        let c = self.caps;
        let oas = u32::from(c.oas_bits);
        let configs: &[u64] = match (c.stage1, c.stage2) {
            (true, true) => &[5, 6, 7, 7, 7],
            (true, false) => &[5],
            _ => &[6],
        };
        let config = self.rng.pick(configs);
        let (s1, s2) = (config & 1 != 0, config & 2 != 0);
        let s2aa64 = c.aarch64 && !(c.aarch32 && self.rng.one_in(6));
        let (shape2, t0sz2, sl0) = self.stage2_shape(s2aa64);
        self.used.clear();
        // IPAs are above PAs where there is room for that.
        let room = shape2.bits.min(oas).min(if s2aa64 { 48 } else { 40 });
        self.delta = if s2 && room >= 36 { self.rng.below(7) << 33 } else { 0 };
        if !s2 {
            self.delta = 0;
        }
        let delta = self.delta;
        let mut ste = [0u64; 8];
        let mut inputs = Vec::new();
        ste[0] = 1 | config << 1;
        let r = &mut *self.rng;
        ste[1] = r.below(4)
            | r.below(64) << 2
            | r.below(2) << 19
            | u64::from(r.one_in(3)) << 25
            | r.below(16) << 32
            | r.below(2) << 36
            | r.below(16) << 37
            | r.below(4) << 44
            | r.below(4) << 48
            | r.below(4) << 50;
        if r.one_in(3) {
            ste[1] &= !(15 << 48);
        }
        if !s2aa64 {
            ste[1] &= !(1 << 25);
        }
        if config == 5 && c.hyp && r.one_in(3) {
            ste[1] |= 2 << 30;
        }
        let stall = |r: &mut Rng| match c.stall_model {
            StallModel::Both => r.below(2),
            StallModel::Terminate => 0,
            StallModel::Forced => 1,
        };
        let mut outputs: Vec<(u64, bool)> = Vec::new();
        if s1 {
            let aa64 = c.aarch64 && (s2aa64 || !s2) && !(c.aarch32 && self.rng.one_in(5));
            let el2_host = ste[1] >> 30 & 3 == 2;
            let aa64 = aa64 || el2_host && c.aarch64;
            let (ds, big) = (c.ds && self.rng.one_in(2), self.endian());
            let tsz32 = [self.rng.pick(&[0, 0, 1, 2, 3, 7]), self.rng.pick(&[0, 0, 1, 2, 3, 7])];
            let at = self.alloc(64);
            self.used.push((at, 64));
            ste[0] |= at + delta;
            if self.rng.one_in(3) && c.ssid_bits > 0 {
                // Four CDs, of which this is number 0 and the others are copies, or not there.
                ste[0] = ste[0] & !0x00ff_ffff_ffff_ffc0 | 2 << 59;
                let at = self.alloc(256);
                self.used.push((at, 256));
                ste[0] |= at + delta;
            }
            let ips = self.rng.below(7);
            let ips_bits = if aa64 {
                [32, 36, 40, 42, 44, 48, 52][if c.revision == 0 { ips.min(5) } else { ips } as usize].min(oas)
            } else {
                40
            };
            let (ha, hd) = match c.httu {
                _ if !aa64 => (self.rng.below(2), self.rng.below(2)),
                Httu::None => (0, 0),
                Httu::Access => (self.rng.below(2), 0),
                Httu::Dirty => (self.rng.below(2), self.rng.below(2)),
            };
            let mut cd = [0u64; 8];
            for half in 0..2u32 {
                let shape = self.stage1_shape(aa64, ds, big, tsz32[half as usize]);
                let root = self.root(&shape);
                let tsz = if aa64 { u64::from(64 - shape.bits) } else { tsz32[half as usize].into() };
                let tg = match (half, shape.granule) {
                    (0, 12) => 0,
                    (0, 16) => 1,
                    (0, _) => 2,
                    (_, 12) => 2,
                    (_, 16) => 3,
                    (..) => 1,
                };
                let walk = self.rng.below(64);
                cd[0] |= (tsz | tg << 6 | walk << 8) << (16 * half);
                cd[1 + half as usize] =
                    (root + delta) | u64::from(self.rng.one_in(3)) << 1 | u64::from(self.rng.one_in(6)) << 2;
                // Leaves for a few addresses.
                let high = if aa64 { u64::MAX << shape.bits } else { (1u64 << 32) - (1u64 << shape.bits) };
                for _ in 0..6 {
                    let input = self.rng.next() & ((1 << shape.bits) - 1);
                    let levels = shape.leaf_levels();
                    let level = self.rng.pick(&levels);
                    let limit = if s2 { shape2.bits.min(ips_bits) } else { ips_bits };
                    let out = self.output(limit);
                    let leaf = self.leaf(&shape, level, out, false);
                    if self.map(&shape, root, input, level, leaf, delta).is_some() {
                        inputs.push(if half == 1 { input | high } else { input });
                        let inside = (1u64 << shape.shift(level)) - 1;
                        outputs.push((out & !inside | input & inside, true));
                    }
                }
            }
            if ds {
                cd[2] |= 1 << 58;
            }
            let r = &mut *self.rng;
            let a = u64::from(c.abort_only) | r.below(2);
            cd[0] |= u64::from(r.one_in(8)) << 14
                | u64::from(big) << 15
                | u64::from(r.one_in(4)) << 30
                | 1 << 31
                | ips << 32
                | r.below(2) << 35
                | u64::from(r.one_in(5)) << 36
                | u64::from(r.one_in(5)) << 37
                | u64::from(r.one_in(4)) << 38
                | u64::from(r.one_in(4)) << 39
                | u64::from(r.one_in(4)) << 40
                | u64::from(aa64) << 41
                | hd << 42
                | ha << 43
                | stall(r) << 44
                | r.below(2) << 45
                | a << 46
                | (1 + r.below(200)) << 48;
            cd[3] = r.next();
            if r.one_in(2) {
                cd[3] = 0x0400_44f4_bbff_ff44;
            }
            let ptr = (ste[0] & 0x00ff_ffff_ffff_ffc0) - delta;
            for n in 0..if ste[0] >> 59 == 0 { 1 } else { 3 } {
                for (w, word) in cd.iter().enumerate() {
                    self.store(ptr + 64 * n + 8 * w as u64, *word);
                }
            }
        } else {
            for _ in 0..8 {
                let out = FIRST + self.rng.below(LAST - FIRST) + delta;
                outputs.push((out, true));
                inputs.push(out);
            }
        }
        if s2 {
            self.stage2(&shape2, &mut ste, t0sz2, sl0, &outputs);
        }
        let r = &mut *self.rng;
        ste[2] |= (1 + r.below(200)) | stall(r) << 57 | r.below(2) << 58;
        (ste, inputs)
    }

    /// Stage 2 for what has been used, and for `outputs`.
    fn stage2(&mut self, shape: &Shape, ste: &mut [u64; 8], t0sz: u64, sl0: u64, outputs: &[(u64, bool)]) {
        let c = self.caps;
        let delta = self.delta;
        let structures = std::mem::take(&mut self.used);
        let root = self.root(shape);
        let good = 1 << 10 | 3 << 6 | 15 << 2;
        let page = 1u64 << shape.granule;
        // Structures lie where they are, for the most part.
        for (at, bytes) in structures {
            for pa in (at & !(page - 1)..at + bytes).step_by(page as usize) {
                let bits = if self.rng.one_in(12) { self.leaf_bits(shape, true) } else { good };
                let bits = if shape.ds { bits & !(3 << 8) } else { bits };
                let mut leaf = shape.encode(pa) | 3 | bits;
                if self.rng.one_in(8) {
                    // Writable only for hardware.
                    leaf = leaf & !(1 << 7) | 1 << 51;
                }
                if self.rng.one_in(40) {
                    leaf = 0;
                }
                self.map(shape, root, pa + delta, 3, leaf, 0);
            }
        }
        let out_bits = u32::from(c.oas_bits);
        for (ipa, _) in outputs {
            if *ipa >> shape.bits != 0 {
                continue;
            }
            let levels = shape.leaf_levels();
            let level = if self.rng.one_in(2) { 3 } else { self.rng.pick(&levels) };
            let out = self.output(out_bits);
            let leaf = self.leaf(shape, level, out, true);
            self.map(shape, root, *ipa, level, leaf, 0);
        }
        let (ha, hd) = match c.httu {
            _ if !shape.aa64 => (0, 0),
            Httu::None => (0, 0),
            Httu::Access => (self.rng.below(2), 0),
            Httu::Dirty => (self.rng.below(2), self.rng.below(2)),
        };
        let tg = match shape.granule {
            12 => 0,
            16 => 1,
            _ => 2,
        };
        let r = &mut *self.rng;
        ste[2] |= t0sz << 32
            | (sl0 & 3) << 38
            | r.below(64) << 40
            | tg << 46
            | r.pick(&[5u64, 6, 6, 7, 4, 3]) << 48
            | u64::from(shape.aa64) << 51
            | u64::from(shape.big) << 52
            | r.below(2) << 53
            | u64::from(r.one_in(3)) << 54
            | hd << 55
            | ha << 56;
        ste[3] = root | (sl0 >> 2) << 2 | u64::from(shape.ds) << 3;
    }
}
