//! Random workloads from a fixed seed.
#![allow(dead_code)]

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
}

/// Registers of global space 0 that do something.
pub const SPACE0: &[u64] = &[
    0x000, 0x004, 0x008, 0x010, 0x020, 0x024, 0x028, 0x03c, 0x040, 0x044, 0x048, 0x04c, 0x050, 0x054, 0x058,
    0x060, 0x064, 0x068, 0x06c, 0x070, 0x074, 0x078, 0x0a0, 0x0a8, 0x0b0, 0x0b8, 0x0bc, 0x0c0, 0x100, 0x108,
    0x110, 0x118, 0x120, 0x128, 0x130, 0x138, 0x180, 0x188, 0xfe0,
];

/// Registers of a context bank that do something.
pub const BANK: &[u64] = &[
    0x000, 0x000, 0x004, 0x008, 0x008, 0x010, 0x020, 0x024, 0x028, 0x02c, 0x030, 0x030, 0x034, 0x038, 0x03c,
    0x040, 0x050, 0x054, 0x058, 0x058, 0x05c, 0x060, 0x068, 0x06c, 0x070, 0x600, 0x608, 0x610, 0x618, 0x620,
    0x628, 0x630, 0x638, 0x7f0, 0x7f4, 0x800, 0x808, 0x810, 0x818, 0x8f0,
];

/// The window of an SMMU, as much as random accesses need to know.
pub struct Shape {
    pub page: u64,
    pub size: u64,
    pub groups: u64,
    pub banks: u64,
}

impl Shape {
    pub fn of(c: &portcullis_smmuv2::Config) -> Self {
        let page = if c.page_64k { 0x1_0000 } else { 0x1000 };
        Self { page, size: c.window_size(), groups: c.stream_groups.into(), banks: c.context_banks.into() }
    }

    /// A random offset, most of the time of a real register. Few groups and banks are used much.
    pub fn offset(&self, rng: &mut Rng) -> u64 {
        let few = |rng: &mut Rng, n: u64| if rng.one_in(8) { rng.below(n + 2) } else { rng.below(n.min(4)) };
        match rng.below(32) {
            0..6 => rng.pick(SPACE0) + if rng.one_in(4) { 0x400 } else { 0 },
            6..10 => 0x800 + 4 * few(rng, self.groups.min(128)),
            10..14 => 0xc00 + 4 * few(rng, self.groups.min(128)),
            14..17 => self.page + rng.pick(&[0, 0, 0x400, 0x800]) + 4 * few(rng, self.banks),
            17..29 => self.size / 2 + self.page * few(rng, self.banks) + rng.pick(BANK),
            29 => self.page * rng.pick(&[2, 3, 4, 6, 7, 8, 23]) + rng.below(self.page) / 4 * 4,
            30 => rng.below(self.size),
            _ => self.size - 8 + rng.below(16),
        }
    }
}

impl Shape {
    /// Writes (by secure software) that make the first four groups and banks work in some random way: the accesses that
    /// follow get somewhere. Values above 32 bits are 64-bit writes.
    pub fn working(&self, rng: &mut Rng, tables: u64) -> Vec<(u64, u64)> {
        let mut out =
            vec![(0x000, 0x0020_0406), (0x400, 0x0020_0406), (0x004, self.groups.min(255) << 8 | self.banks)];
        // Other groups would conflict.
        if self.groups > 4 {
            out.extend([0; 3].map(|_| (0x800 + 4 * (4 + rng.below(self.groups.min(128) - 4)), 0)));
        }
        let last = self.banks.min(4) - 1;
        for n in 0..self.banks.min(4) {
            let cb = self.size / 2 + self.page * n;
            let stage2 = n == last && rng.one_in(2);
            let va64 = !rng.one_in(4);
            let cbar = match (stage2, rng.below(4)) {
                (true, _) => rng.below(2),
                (_, 0) => 0x0003_0000 | last << 8 | rng.below(2),
                (_, 1) => 0x0001_f300 | rng.below(2) | rng.below(2) << 10,
                _ => 0x0001_f300 | rng.below(2),
            };
            let tcr = match (stage2, va64) {
                (true, true) => {
                    rng.pick(&[0x8005_3558, 0x8005_3540 | 25, 0x8002_0040 | 32, 0x0005_4040 | 22])
                }
                (true, false) => rng.pick(&[0x58, 0x40, 0x41, 0x02]),
                (_, true) => {
                    rng.pick(&[0x0080_2010, 0x0080_2019, 0x8014_2010, 0x0080_2022, 0x0080_4016, 0x0080_8011])
                }
                (_, false) => rng.pick(&[0x8000_0000, 0x8002_0002, 0, 1, 7, 0x8000_0001]),
            };
            let table = tables + 0x1000 * rng.below(16);
            let sctlr = rng.pick(&[0x67, 0x167, 0x167, 0x167, 0x167, 0x1e7, 0xe7, 0x16f])
                | if rng.one_in(16) { rng.next() & 0x0fff_ffff } else { 0 };
            out.extend([
                (self.page + 0x800 + 4 * n, u64::from(va64)),
                (self.page + 4 * n, cbar),
                (cb + 0x010, rng.pick(&[0x0003_8015, 0x0003_8015, 0x0003_8012, 0x0001_0005])),
                (cb + 0x030, tcr),
                (cb + 0x020, table | (1 + rng.below(2)) << 48),
                (cb + 0x028, table | (1 + rng.below(2)) << 48),
                (cb + 0x038, 0xf404_ff44),
                (cb + 0x058, 0xffff_ffff),
                (cb + 0x008, rng.below(2)),
                (cb, sctlr),
                (0xc00 + 4 * n, n | if rng.one_in(8) { rng.next() & 0x3ffc_fb00 } else { 0 }),
                (0x800 + 4 * n, 0x8000_0000 | n),
            ]);
        }
        out
    }
}

/// Address of a random descriptor among those that random addresses use.
pub fn slot(rng: &mut Rng, tables: u64) -> u64 {
    let n = if rng.one_in(8) { 512 } else { 8 };
    tables + 0x1000 * rng.below(16) + 8 * rng.below(n)
}

/// A value that is likely to mean something somewhere.
pub fn value(rng: &mut Rng, tables: u64) -> u64 {
    match rng.below(12) {
        0 => 0,
        1 => u64::MAX,
        2 => rng.next(),
        3 => 1 << rng.below(64),
        4 => tables + 0x1000 * rng.below(16),
        5 => (tables + 0x1000 * rng.below(16)) | rng.below(4) << 48,
        6 => 0x8000_0000 | rng.below(4),        // SMR
        7 => rng.below(4) << 16 | rng.below(4), // S2CR, CBAR
        8 => 0x0001_f300 | rng.below(4),        // CBAR
        9 => 0x0003_0000 | rng.below(4) << 8,   // CBAR, nested
        10 => 0x67 | rng.below(4) << 7,         // SCTLR
        _ => rng.pick(&[
            0x0080_2010,
            0x0080_2019,
            0x8005_3558,
            0x8000_0000,
            0x58,
            0x0003_8015,
            0xf404_ff44,
            0x0020_0406,
            0x402,
            1,
        ]),
    }
}

/// A descriptor that is likely to lead somewhere.
pub fn descriptor(rng: &mut Rng, tables: u64, data: u64) -> u64 {
    let table = tables + 0x1000 * rng.below(16);
    let page = data + 0x1000 * rng.below(16);
    match rng.below(12) {
        0 => 0,
        1 => rng.next(),
        2..6 => table | 3,
        6 => table | 3 | rng.next() & 0xf800_0000_0000_0000,
        7 => page | 0xf47,
        8 => page | 3 | rng.next() & 0x0070_0000_0000_0ffc,
        9 => 0x6000_0000 | 0xf45 | rng.next() & 0xffc,
        10 => page << 32 | 0xc02 << 32 | table | 1, // two short descriptors
        _ => page | 0x403 | rng.next() & 0xfff0_0000_0000_0bfc,
    }
}

/// An address that random tables may map.
pub fn address(rng: &mut Rng, tables: u64, data: u64) -> u64 {
    match rng.below(8) {
        0 => match rng.below(4) {
            0 => rng.next(),
            1 => rng.below(1 << 32),
            2 => 1 << rng.below(64),
            _ => (1u64 << rng.below(49)).wrapping_sub(1 + rng.below(16)),
        },
        1 => data + rng.below(0x1_0000),
        2 => tables + rng.below(0x1_0000),
        _ => rng.below(2) << 30 | rng.below(2) << 21 | rng.below(4) << 12 | rng.below(0x1000),
    }
}
