//! Random workloads from a fixed seed: registers, tables and commands that are likely to mean something.
#![allow(dead_code)]

use portcullis_smmuv3::{Caps, Httu, StallModel};

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
    /// A bit at `at`, set once in `n`.
    fn rare(&mut self, n: u64, at: u32) -> u64 {
        u64::from(self.one_in(n)) << at
    }
}

pub const RAM: u64 = 0x8000_0000;
pub const RAM_SIZE: u64 = 0x10_0000;
/// Eight streams; the level 1 table for two-level streams is behind it.
pub const STRTAB: u64 = RAM;
pub const L1: u64 = RAM + 0x800;
pub const CMDQ: u64 = RAM + 0x1000;
pub const EVENTQ: u64 = RAM + 0x2000;
pub const PRIQ: u64 = RAM + 0x3000;
pub const CDS: u64 = RAM + 0x4000;
pub const L1CDS: u64 = RAM + 0x5000;
pub const MSI: u64 = RAM + 0x6000;
/// Sixteen pages of tables, 64 KiB aligned.
pub const TABLES: u64 = RAM + 0x1_0000;
pub const DATA: u64 = RAM + 0x4_0000;

/// Registers that do something.
pub const REGISTERS: &[u64] = &[
    0x020, 0x020, 0x024, 0x028, 0x02c, 0x03c, 0x044, 0x044, 0x050, 0x060, 0x064, 0x064, 0x068, 0x06c, 0x070,
    0x074, 0x080, 0x084, 0x088, 0x090, 0x094, 0x098, 0x098, 0x09c, 0x0a0, 0x0a4, 0x0a8, 0x0ac, 0x0b0, 0x0b4,
    0x0b8, 0x0bc, 0x0c0, 0x0c4, 0x0c8, 0x0cc, 0x0d0, 0x0d8, 0x0dc, 0x100, 0x100, 0x108, 0x10c, 0x110, 0x114,
    0x118, 0x000, 0x004, 0x00c, 0x014,
];

pub fn offset(rng: &mut Rng) -> u64 {
    match rng.below(16) {
        0 => rng.below(0x2_0010),
        1..4 => 0x1_0000 + rng.pick(&[0xa8, 0xac, 0xc8, 0xcc]),
        4 => 0x8000 + rng.pick(REGISTERS),
        _ => rng.pick(REGISTERS),
    }
}

pub fn value(rng: &mut Rng) -> u64 {
    match rng.below(10) {
        0 => 0,
        1 => u64::MAX,
        2 => rng.next(),
        3 => 1 << rng.below(64),
        4 => rng.below(32),
        5 => CMDQ | rng.below(8),
        6 => EVENTQ | rng.below(5),
        7 => MSI + 4 * rng.below(8),
        8 => 0x8000_0000 | rng.below(16),
        _ => rng.pick(&[0xd75, 0x2, 0x3, 0x1f, 0xd, 0x8000_1000, STRTAB, L1, 3, 0x1_0206]),
    }
}

/// Register writes that bring an interface to work: offset from the interface, value, bytes.
pub fn working(rng: &mut Rng, caps: &Caps, secure: bool) -> Vec<(u64, u64, usize)> {
    let two_level = caps.two_level_streams && rng.one_in(3);
    let (base, cfg) = if two_level {
        (L1, 1 << 16 | rng.pick(&[6u64, 8, 10]) << 6 | (6 + rng.below(5)))
    } else {
        (STRTAB, 3)
    };
    let mut out = vec![
        (0x050, 0, 4),
        (0x020, 0, 4),
        (0x028, 0xd75, 4),
        (0x02c, rng.below(16), 4),
        (0x080, base, 8),
        (0x088, cfg, 4),
        (0x090, CMDQ | rng.pick(&[3u64, 5, 6]), 8),
        (0x098, 0, 4),
        (0x09c, 0, 4),
        (0x0a0, EVENTQ | rng.pick(&[0u64, 2, 4]), 8),
        (0x068, rng.pick(&[0, MSI, MSI + 0x10_0000_0000]), 8),
        (0x0b0, rng.pick(&[0, MSI + 8, MSI + 0x10_0000_0000]), 8),
        (0x050, rng.below(8), 4),
        (0x020, 0x1d | rng.below(2) << 1 | rng.below(8) << 6, 4),
    ];
    if !secure {
        out.insert(3, (0x0c0, PRIQ | rng.below(3), 8));
    }
    out
}

fn damaged<const N: usize>(rng: &mut Rng, mut words: [u64; N]) -> [u64; N] {
    if rng.one_in(12) {
        let at = rng.below(N as u64) as usize;
        words[at] ^= 1 << rng.below(64);
    }
    if rng.one_in(64) {
        words = words.map(|_| rng.next());
    }
    words
}

fn table(rng: &mut Rng) -> u64 {
    TABLES + 0x1000 * rng.below(16)
}

/// A root table: aligned for any granule now and then.
fn root(rng: &mut Rng) -> u64 {
    rng.pick(&[TABLES, TABLES, TABLES + 0x4000, TABLES + 0x1000, TABLES + 0x2000])
}

/// CD.S and STE.S2S, mostly as the stall model has them.
fn stall(rng: &mut Rng, caps: &Caps) -> u64 {
    match caps.stall_model {
        StallModel::Both => u64::from(rng.one_in(3)),
        StallModel::Terminate => u64::from(rng.one_in(16)),
        StallModel::Forced => u64::from(!rng.one_in(16)),
    }
}

pub fn ste(rng: &mut Rng, caps: &Caps) -> [u64; 8] {
    let config = rng.pick(&[0u64, 4, 5, 5, 5, 5, 6, 6, 7, 7, 7]);
    let config = if caps.stage2 || rng.one_in(8) { config } else { config & 5 };
    let max = if caps.ssid_bits > 0 && rng.one_in(3) { 1 + rng.below(3) } else { 0 };
    let (fmt, ptr) = if max > 0 && caps.cd2l && rng.one_in(3) { (1 + rng.below(2), L1CDS) } else { (0, CDS) };
    let pointer = if config == 7 { rng.pick(&[ptr, ptr, ptr, 0x4000]) } else { ptr };
    let one = 1 | config << 1 | fmt << 4 | pointer | max << 59;
    let two = rng.below(4)
        | 0xd4
        | rng.rare(4, 19)
        | rng.rare(4, 25)
        | rng.rare(if caps.stall_model == StallModel::Both { 8 } else { 32 }, 27)
        | if config == 7 { rng.pick(&[0u64, 1, 2]) } else { rng.pick(&[0u64, 0, 0, 1]) } << 28
        | rng.pick(&[0u64, 0, 0, 2]) << 30
        | rng.rare(8, 36)
        | rng.below(16) << 32
        | rng.below(16) << 37
        | 1 << 44
        | rng.below(4) << 48
        | rng.below(4) << 50;
    // (T0SZ, SL0, TG) that fit together.
    let (t0sz, sl0, tg) = if !caps.aarch64 {
        rng.pick(&[(0u64, 1u64, 0u64), (8, 1, 0), (4, 0, 0)])
    } else {
        rng.pick(&[
            (25u64, 1u64, 0u64),
            (32, 1, 0),
            (34, 0, 0),
            (24, 2, 0),
            (30, 1, 2),
            (28, 1, 1),
            (34, 1, 1),
        ])
    };
    let three = rng.below(3)
        | t0sz << 32
        | sl0 << 38
        | 1 << 40
        | 1 << 42
        | 3 << 44
        | tg << 46
        | rng.below(7) << 48
        | u64::from(caps.aarch64) << 51
        | rng.rare(4, 53)
        | rng.rare(4, 54)
        | rng.rare(if caps.httu == Httu::Dirty { 4 } else { 64 }, 55)
        | rng.rare(if caps.httu == Httu::None { 64 } else { 3 }, 56)
        | stall(rng, caps) << 57
        | rng.rare(2, 58);
    let four = root(rng) | rng.rare(16, 3);
    damaged(rng, [one, two, three, four, 0, 0, 0, 0])
}

pub fn cd(rng: &mut Rng, caps: &Caps) -> [u64; 8] {
    let (t0sz, tg) =
        rng.pick(&[(16u64, 0u64), (25, 0), (30, 0), (34, 0), (28, 2), (17, 2), (25, 1), (22, 1)]);
    let (t1sz, tg1) = rng.pick(&[(16u64, 2u64), (25, 2), (34, 2), (28, 1), (25, 3)]);
    let httu = caps.httu as u64;
    let (ha, hd) = (httu >= 1 && rng.one_in(3), httu >= 2 && rng.one_in(2));
    let dw0 = t0sz
        | tg << 6
        | 1 << 8
        | 1 << 10
        | 3 << 12
        | rng.rare(8, 14)
        | rng.rare(16, 15)
        | t1sz << 16
        | tg1 << 22
        | rng.below(2) << 30
        | 1 << 31
        | rng.below(7) << 32
        | rng.rare(4, 35)
        | rng.rare(8, 36)
        | rng.rare(4, 38)
        | rng.rare(4, 39)
        | rng.rare(8, 40)
        | u64::from(caps.aarch64 && !rng.one_in(8)) << 41
        | u64::from(hd) << 42
        | u64::from(ha) << 43
        | stall(rng, caps) << 44
        | rng.below(2) << 45
        | u64::from(caps.abort_only || rng.one_in(2)) << 46
        | rng.below(4) << 48;
    let ttb0 = root(rng) | rng.rare(4, 1) | rng.rare(8, 2);
    let ttb1 = root(rng) | rng.rare(4, 1) | rng.rare(8, 2) | rng.rare(16, 58);
    damaged(rng, [dw0, ttb0, ttb1, 0x0000_44ff_f404_ff44, 0, 0, 0, 0])
}

pub fn l1std(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => 0,
        1 => rng.next(),
        _ => STRTAB | rng.pick(&[1u64, 3, 4, 4, 4, 9, 11, 12]),
    }
}

pub fn l1cd(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => 0,
        1 => rng.next(),
        _ => CDS | 1,
    }
}

/// A descriptor that is likely to lead somewhere, and its place among those that random addresses use: tables of the
/// first half mostly lead to tables, those of the second half to pages.
pub fn descriptor(rng: &mut Rng) -> (u64, u64) {
    let n = if rng.one_in(8) { 512 } else { 8 };
    let in_table = rng.below(16);
    let at = TABLES + 0x1000 * in_table + 8 * rng.below(n);
    let next = TABLES + 0x1000 * (8 + rng.below(8));
    let page = DATA + 0x1000 * rng.below(16);
    let value = match rng.below(16) {
        0 => 0,
        1 => rng.next(),
        2 => table(rng) | 3 | rng.next() & 0xf800_0000_0000_0000,
        3 => RAM | 0x7fd | rng.next() & 0xc02,
        4 => page | 3 | rng.next() & 0xfff8_0000_0000_0ffc,
        5 => page | 0x3ff | 1 << 51,
        6 => table(rng) | 3,
        _ if in_table < 8 => (if rng.one_in(4) { table(rng) } else { next }) | 3,
        _ => page | 0x77f & !(rng.below(2) << 11),
    };
    (at, value)
}

/// An address that random tables may map.
pub fn address(rng: &mut Rng) -> u64 {
    match rng.below(10) {
        0 => match rng.below(4) {
            0 => rng.next(),
            1 => rng.below(1 << 32),
            2 => 1 << rng.below(64),
            _ => (1u64 << rng.below(64)).wrapping_sub(1 + rng.below(16)),
        },
        1 => DATA + rng.below(0x1_0000),
        2 => RAM + rng.below(RAM_SIZE),
        3 => !0 << 40 | rng.below(4) << 12 | rng.below(0x1000),
        4 => rng.below(256) << 56 | rng.below(4) << 12 | rng.below(0x1000),
        _ => rng.below(2) << 30 | rng.below(2) << 21 | rng.below(4) << 12 | rng.below(0x1000),
    }
}

pub fn command(rng: &mut Rng, stags: &[u16]) -> [u64; 2] {
    let sid = rng.below(8) << 32;
    let va = address(rng) & !0xfff;
    let stag = if stags.is_empty() { rng.below(0x1_0000) } else { u64::from(rng.pick(stags)) };
    match rng.below(32) {
        0 => [rng.next(), rng.next()],
        1 => [rng.below(256), 0],
        2 => [0x01 | sid, 0],
        3 => [0x03 | sid, 1],
        4 => [0x04 | sid, rng.pick(&[0u64, 2, 5, 31])],
        5 => [0x05 | sid | rng.below(8) << 12, 1],
        6 => [0x06 | sid, 0],
        7 => [0x10 | rng.below(3) << 32, 0],
        8 => [0x11 | rng.below(3) << 32 | rng.below(4) << 48, 0],
        9 => [0x12 | rng.below(3) << 32 | rng.below(4) << 48, va | rng.below(2)],
        10 => [0x13 | rng.below(3) << 32 | rng.below(32) << 12 | rng.below(12) << 20, va | 1 << 10 | 3 << 8],
        11 => [0x20, 0],
        12 => [0x22 | rng.below(4) << 48, va],
        13 => [0x28 | rng.below(3) << 32, 0],
        14 => [0x2a | rng.below(3) << 32, va & 0xf_ffff_ffff_f000],
        15 => [0x30, 0],
        16 => [0x40 | sid, va | rng.below(53)],
        17 => [0x41 | sid, rng.below(8) | rng.below(3) << 12],
        18..22 => [0x44 | sid | rng.below(4) << 12, stag],
        22 => [0x45 | sid, 0],
        23 => [0x46 | 1 << 12 | 0xff << 32, rng.pick(&[0, MSI, CMDQ, MSI + 0x10_0000_0000])],
        _ => [0x46, 0],
    }
}
