//! What the tests share: a memory of single words that logs its reads, plain parameters to start from, and an SMMU
//! with settable configuration for ports.
#![allow(dead_code, unused_imports)]

pub mod unit;

pub use portcullis_walk::Updates;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Access, Attributes, Pa};
use portcullis_bus::{BusError, Memory};
use portcullis_walk::{
    AccessKind, AddressFormat, FlagUpdate, Flat, Nested, Region, Split, Stage1, Stage2, TableFormat,
};

pub const A: Attributes = Attributes::DEVICE_DEFAULT;

/// Descriptor bits, written down here once more so that tests do not use the constants they check.
pub mod d {
    pub const BLOCK: u64 = 1;
    pub const TABLE: u64 = 3;
    pub const PAGE: u64 = 3;
    pub const AF: u64 = 1 << 10;
    pub const NG: u64 = 1 << 11;
    pub const NS: u64 = 1 << 5;
    pub const USER: u64 = 1 << 6;
    pub const RO: u64 = 1 << 7;
    pub const S2R: u64 = 1 << 6;
    pub const S2W: u64 = 1 << 7;
    pub const CONT: u64 = 1 << 52;
    pub const PXN: u64 = 1 << 53;
    pub const UXN: u64 = 1 << 54;
    pub const T_PXN: u64 = 1 << 59;
    pub const T_UXN: u64 = 1 << 60;
    pub const T_AP0: u64 = 1 << 61;
    pub const T_AP1: u64 = 1 << 62;
    pub const T_NS: u64 = 1 << 63;
}

/// Lowest index bit of each level, by granule: 4K, 16K, 64K (sheet, section 8).
pub const SHIFT: [(Granule, [Option<u32>; 4]); 3] = [
    (Granule::K4, [Some(39), Some(30), Some(21), Some(12)]),
    (Granule::K16, [Some(47), Some(36), Some(25), Some(14)]),
    (Granule::K64, [None, Some(42), Some(29), Some(16)]),
];

pub fn shift(granule: Granule, level: i8) -> u32 {
    let row = SHIFT.iter().find(|(g, _)| *g == granule).unwrap();
    row.1[level as usize].unwrap()
}

/// Index bits of a whole table.
pub fn stride(granule: Granule) -> u32 {
    match granule {
        Granule::K4 => 9,
        Granule::K16 => 11,
        Granule::K64 => 13,
    }
}

/// Memory of 64-bit words; what was never set reads as 0. Logs every word read.
#[derive(Default)]
pub struct Words {
    words: Mutex<BTreeMap<u64, u64>>,
    refused: Mutex<BTreeSet<u64>>,
    log: Mutex<Vec<(u64, u64, Attributes)>>,
    updates: Mutex<Vec<(u64, u64, u64)>>,
    races: Mutex<BTreeMap<u64, Vec<u64>>>,
    fixed: Mutex<BTreeSet<u64>>,
}

impl Words {
    pub fn set(&self, at: u64, value: u64) {
        assert_eq!(at % 8, 0);
        self.words.lock().unwrap().insert(at, value);
    }
    pub fn set32(&self, at: u64, value: u32) {
        let mut words = self.words.lock().unwrap();
        let word = words.entry(at & !7).or_default();
        let shift = 8 * (at & 4);
        *word = *word & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }
    pub fn get(&self, at: u64) -> u64 {
        self.words.lock().unwrap().get(&at).copied().unwrap_or_default()
    }
    /// Reads of this word abort.
    pub fn refuse(&self, at: u64) {
        self.refused.lock().unwrap().insert(at);
    }
    /// Updates of this word abort.
    pub fn refuse_update(&self, at: u64) {
        self.fixed.lock().unwrap().insert(at);
    }
    /// Somebody else stores these values, one before each of the next updates of this word is tried.
    pub fn race(&self, at: u64, values: &[u64]) {
        self.races.lock().unwrap().insert(at, values.iter().rev().copied().collect());
    }
    /// The updates that were made since the last call: address, old and new value.
    pub fn take_updates(&self) -> Vec<(u64, u64, u64)> {
        std::mem::take(&mut self.updates.lock().unwrap())
    }
    /// What was read since the last call: address, value, attributes of the access.
    pub fn take_log(&self) -> Vec<(u64, u64, Attributes)> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
    /// The addresses of the same.
    pub fn take_addresses(&self) -> Vec<u64> {
        self.take_log().into_iter().map(|l| l.0).collect()
    }
}

impl Memory for Words {
    fn read(&self, _: Pa, _: Attributes, _: &mut [u8]) -> Result<(), BusError> {
        Err(BusError::Decode)
    }
    fn write(&self, _: Pa, _: Attributes, _: &[u8]) -> Result<(), BusError> {
        Err(BusError::Decode)
    }
    fn load64(&self, pa: Pa, attrs: Attributes) -> Result<u64, BusError> {
        let at = pa.get();
        if !at.is_multiple_of(8) {
            return Err(BusError::Slave);
        }
        if self.refused.lock().unwrap().contains(&at) {
            return Err(BusError::Decode);
        }
        let value = self.get(at);
        self.log.lock().unwrap().push((at, value, attrs));
        Ok(value)
    }
    fn load32(&self, pa: Pa, attrs: Attributes) -> Result<u32, BusError> {
        let at = pa.get();
        if !at.is_multiple_of(4) {
            return Err(BusError::Slave);
        }
        if self.refused.lock().unwrap().contains(&(at & !3)) {
            return Err(BusError::Decode);
        }
        let value = (self.get(at & !7) >> (8 * (at & 4))) as u32;
        self.log.lock().unwrap().push((at, value.into(), attrs));
        Ok(value)
    }
    fn cas64(&self, pa: Pa, _: Attributes, expected: u64, new: u64) -> Result<u64, BusError> {
        let at = pa.get();
        if !at.is_multiple_of(8) || self.fixed.lock().unwrap().contains(&at) {
            return Err(BusError::Slave);
        }
        if let Some(value) = self.races.lock().unwrap().get_mut(&at).and_then(Vec::pop) {
            self.set(at, value);
        }
        let held = self.get(at);
        if held == expected {
            self.set(at, new);
            self.updates.lock().unwrap().push((at, held, new));
        }
        Ok(held)
    }
}

pub fn region(base: u64, granule: Granule, start_level: i8, input_bits: u8) -> Region {
    Region {
        base,
        granule,
        start_level,
        input_bits,
        walk_attrs: A,
        flat_attributes: false,
        address: AddressFormat::Bits48,
    }
}

pub const LINUX_MAIR: u64 = 0xf404_ff44;

/// Stage 1, AArch64, with `bits` of input and everything optional off.
pub fn stage1(region0: Option<Region>, region1: Option<Region>) -> Stage1 {
    let bits = |r: &Option<Region>| r.map_or(48, |r| r.input_bits);
    Stage1 {
        format: TableFormat::Aarch64,
        split: Split::Aarch64 { va_bits: 49, signed: true, region_bits: [bits(&region0), bits(&region1)] },
        regions: [region0, region1],
        output_bits: 48,
        mair: LINUX_MAIR,
        range_fault_level: 0,
        affd: false,
        wxn: false,
        uwxn: false,
        uwxn_for_all: true,
        big_endian: false,
        single_privilege: false,
        tex_remap: false,
        access_flag_enable: false,
        secure: false,
        secure_fetch_only: false,
        flags: FlagUpdate::OFF,
        e0pd: [false; 2],
        pan: false,
        sh_override: [None; 2],
    }
}

pub fn stage2(region: Region) -> Stage2 {
    Stage2 {
        format: TableFormat::Aarch64,
        region: Some(Region { flat_attributes: true, ..region }),
        input_limit_bits: 48,
        output_bits: 48,
        affd: false,
        big_endian: false,
        protect_walks: false,
        device_walks_as_nc: false,
        range_fault_level: 0,
        flags: FlagUpdate::OFF,
        xnx: false,
        fwb: false,
        leaf_hints: true,
        sh_override: None,
    }
}

pub fn only1(stage1: Stage1) -> Nested {
    Nested { stage1: Some(stage1), stage2: None, flat: Flat::UNCHECKED }
}

pub fn only2(stage2: Stage2) -> Nested {
    Nested { stage1: None, stage2: Some(stage2), flat: Flat::UNCHECKED }
}

pub fn both(stage1: Stage1, stage2: Stage2) -> Nested {
    Nested { stage1: Some(stage1), stage2: Some(stage2), flat: Flat::UNCHECKED }
}

/// The six kinds of access as (write, fetch, privileged).
pub const KINDS: [(bool, bool, bool); 6] = [
    (false, false, false),
    (true, false, false),
    (false, true, false),
    (false, false, true),
    (true, false, true),
    (false, true, true),
];

pub fn kind((write, fetch, privileged): (bool, bool, bool)) -> AccessKind {
    let access = if write { Access::Write } else { Access::Read };
    AccessKind::new(access, A.with_instruction(fetch).with_privileged(privileged))
}

pub fn read() -> AccessKind {
    kind((false, false, false))
}

/// A small generator of test inputs (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn flip(&mut self) -> bool {
        self.next() & 1 != 0
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
