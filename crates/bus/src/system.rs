//! A board's memory: RAM regions in one physical address space, seen by CPU, walkers and devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use portcullis_arch::{Attributes, Pa};
use thiserror::Error;

use crate::CopySide;
use crate::coherency::{CpuCache, lines_of};
use crate::memory::{BusError, Memory};
use crate::ram::Ram;

/// One RAM region.
pub(crate) struct Region {
    pub(crate) base: u64,
    /// The bytes that answer: all of `ram`, or none while it is withdrawn.
    size: AtomicU64,
    pub(crate) ram: Ram,
}

impl Region {
    fn new(base: u64, ram: Ram) -> Self {
        Self { base, size: AtomicU64::new(ram.len() as u64), ram }
    }
}

/// How an observer relates to the CPU's caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum View {
    /// Reads and writes through the CPU's data cache.
    Cpu,
    /// A master whose cacheable accesses are snooped (behind a coherent interconnect).
    Coherent,
    /// A master that goes straight to memory.
    NonCoherent,
}

/// A memory map that cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MapError {
    /// Two regions share addresses.
    #[error("memory regions {0:#x}+{1:#x} and {2:#x}+{3:#x} overlap")]
    Overlap(u64, u64, u64, u64),
    /// A region is empty, misaligned or past the end of the address space.
    #[error("memory region {0:#x}+{1:#x} is empty, not page aligned, or too large")]
    Bad(u64, u64),
}

/// Physical memory as one observer sees it. Cloning is cheap and gives another handle to the same memory;
/// [`view`](SystemMemory::view) gives it other eyes.
#[derive(Clone)]
pub struct SystemMemory {
    regions: Arc<[Region]>,
    cache: Option<Arc<CpuCache>>,
    view: View,
    who: Arc<str>,
}

impl SystemMemory {
    /// Memory of the given `(base, size)` regions, without a model of caches. Adjacent regions become one.
    pub fn new(regions: &[(u64, u64)]) -> Result<Self, MapError> {
        Self::build(regions, None)
    }

    /// The same with a CPU cache of `lines` lines between the CPU and memory.
    pub fn with_cpu_cache(regions: &[(u64, u64)], lines: usize) -> Result<Self, MapError> {
        Self::build(regions, Some(CpuCache::new(lines)))
    }

    fn build(regions: &[(u64, u64)], cache: Option<CpuCache>) -> Result<Self, MapError> {
        let mut sorted: Vec<(u64, u64)> = Vec::new();
        let mut input = regions.to_vec();
        input.sort_unstable();
        for (base, size) in input {
            let bad = MapError::Bad(base, size);
            if size == 0 || !(base | size).is_multiple_of(4096) || base.checked_add(size).is_none() {
                return Err(bad);
            }
            match sorted.last_mut() {
                Some((b, s)) if *b + *s > base => return Err(MapError::Overlap(*b, *s, base, size)),
                Some((b, s)) if *b + *s == base => *s += size,
                _ => sorted.push((base, size)),
            }
        }
        let regions = sorted
            .into_iter()
            .map(|(base, size)| {
                let ram = usize::try_from(size).ok().and_then(Ram::new);
                ram.map(|ram| Region::new(base, ram)).ok_or(MapError::Bad(base, size))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { regions, cache: cache.map(Arc::new), view: View::Cpu, who: "cpu".into() })
    }

    /// Memory of blocks that exist already, each at its base. Blocks stay apart: no access crosses from one to the next.
    ///
    /// # Errors
    /// Blocks that overlap, are not page aligned or reach past the end of the address space.
    pub fn from_blocks(blocks: Vec<(u64, Ram)>) -> Result<Self, MapError> {
        let mut blocks = blocks;
        blocks.sort_unstable_by_key(|(base, _)| *base);
        let mut end = (0, 0);
        for (base, ram) in &blocks {
            let size = ram.len() as u64;
            if !(base | size).is_multiple_of(4096) || base.checked_add(size).is_none() {
                return Err(MapError::Bad(*base, size));
            }
            if *base < end.0 + end.1 {
                return Err(MapError::Overlap(end.0, end.1, *base, size));
            }
            end = (*base, size);
        }
        let regions = blocks.into_iter().map(|(base, ram)| Region::new(base, ram)).collect();
        Ok(Self { regions, cache: None, view: View::Cpu, who: "cpu".into() })
    }

    /// Withdraws the region that begins at `base`: accesses are refused from now on, though one that runs meanwhile may still
    /// end. `false` if no region begins there.
    pub fn withdraw(&self, base: u64) -> bool {
        self.set_present(base, false)
    }

    /// Gives back a region that was withdrawn, with what it holds.
    pub fn restore(&self, base: u64) -> bool {
        self.set_present(base, true)
    }

    fn set_present(&self, base: u64, present: bool) -> bool {
        let region = self.regions.iter().find(|r| r.base == base);
        if let Some(region) = region {
            let size = if present { region.ram.len() as u64 } else { 0 };
            region.size.store(size, Ordering::Release);
        }
        region.is_some()
    }

    /// The same memory as seen by `who`, which relates to the CPU's caches as `view` says.
    pub fn view(&self, view: View, who: &str) -> Self {
        Self { regions: self.regions.clone(), cache: self.cache.clone(), view, who: who.into() }
    }

    /// The model of the CPU's cache, if this board has one.
    pub fn cpu_cache(&self) -> Option<&CpuCache> {
        self.cache.as_deref()
    }

    /// The regions as `(base, size)`, ascending.
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.regions.iter().map(|r| (r.base, r.ram.len() as u64))
    }

    /// True if all `len` bytes at `pa` are RAM.
    pub fn contains(&self, pa: Pa, len: u64) -> bool {
        usize::try_from(len).is_ok_and(|n| self.find(pa, n).is_ok())
    }

    /// Cleans (writes back) the CPU's lines of a range. Returns how many lines the range has.
    pub fn clean(&self, pa: Pa, len: usize) -> u64 {
        self.maintain(pa, len, true, false)
    }

    /// Invalidates the CPU's lines of a range; what was dirty is lost.
    pub fn invalidate(&self, pa: Pa, len: usize) -> u64 {
        self.maintain(pa, len, false, true)
    }

    /// Cleans and invalidates the CPU's lines of a range.
    pub fn clean_invalidate(&self, pa: Pa, len: usize) -> u64 {
        self.maintain(pa, len, true, true)
    }

    fn maintain(&self, pa: Pa, len: usize, clean: bool, invalidate: bool) -> u64 {
        if let (Some(cache), Ok((region, offset))) = (&self.cache, self.find(pa, len)) {
            cache.maintain(region, offset, len, clean, invalidate);
        }
        lines_of(pa, len)
    }

    /// An aligned 64-bit store in one piece, as a CPU writes a descriptor.
    #[inline]
    pub fn store64(&self, pa: Pa, value: u64) -> Result<(), BusError> {
        let (region, offset) = self.find(pa, 8)?;
        if !pa.is_aligned(8) {
            return Err(BusError::Slave);
        }
        if self.cache.is_some() {
            return self.write(pa, Attributes::DEVICE_DEFAULT, &value.to_le_bytes());
        }
        if region.ram.store64(offset, value) { Ok(()) } else { Err(BusError::Decode) }
    }

    /// Consecutive [`load64`](Memory::load64)s; the run may not cross the end of a region.
    #[inline]
    pub fn load_run(&self, pa: Pa, words: &mut [u64]) -> Result<(), BusError> {
        if self.cache.is_some() {
            for (i, word) in words.iter_mut().enumerate() {
                *word = self.load64(pa.wrapping_add(8 * i as u64), Attributes::DEVICE_DEFAULT)?;
            }
            return Ok(());
        }
        let (region, offset) = self.find(pa, words.len().saturating_mul(8))?;
        mapped(region.ram.load_run(offset, words))
    }

    /// Consecutive [`store64`](SystemMemory::store64)s of `first`, `first + step` and so on; the run may not cross
    /// the end of a region.
    #[inline]
    pub fn store_run(&self, pa: Pa, count: usize, first: u64, step: u64) -> Result<(), BusError> {
        if self.cache.is_some() {
            let mut value = first;
            for i in 0..count as u64 {
                self.store64(pa.wrapping_add(8 * i), value)?;
                value = value.wrapping_add(step);
            }
            return Ok(());
        }
        let (region, offset) = self.find(pa, count.saturating_mul(8))?;
        mapped(region.ram.store_run(offset, count, first, step))
    }

    #[inline]
    fn find(&self, pa: Pa, len: usize) -> Result<(&Region, usize), BusError> {
        for region in self.regions.iter() {
            let offset = pa.get().wrapping_sub(region.base);
            let size = region.size.load(Ordering::Relaxed);
            if offset < size && len as u64 <= size - offset {
                return Ok((region, offset as usize));
            }
        }
        Err(BusError::Decode)
    }

    fn snoops(&self, attrs: Attributes) -> bool {
        self.view == View::Coherent && attrs.memory().is_cacheable()
    }

    #[cold]
    fn before_write(&self, region: &Region, offset: usize, len: usize, attrs: Attributes) {
        if let Some(cache) = &self.cache
            && self.snoops(attrs)
        {
            cache.snoop_write(region, offset, len);
        }
    }

    #[cold]
    fn cached_read(&self, region: &Region, offset: usize, attrs: Attributes, buf: &mut [u8]) -> bool {
        let Some(cache) = &self.cache else { return region.ram.read(offset, buf) };
        if self.view == View::Cpu {
            cache.cpu_read(&self.regions, region, offset, buf, &self.who);
            return true;
        }
        let ok = region.ram.read(offset, buf);
        if self.snoops(attrs) {
            cache.snoop_read(region, offset, buf);
        } else {
            cache.check_device_read(region, offset, buf, &self.who);
        }
        ok
    }

    #[cold]
    fn cached_write(&self, region: &Region, offset: usize, attrs: Attributes, buf: &[u8]) -> bool {
        match &self.cache {
            Some(cache) if self.view == View::Cpu => {
                cache.cpu_write(&self.regions, region, offset, buf);
                true
            }
            _ => {
                self.before_write(region, offset, buf.len(), attrs);
                region.ram.write(offset, buf)
            }
        }
    }
}

fn mapped(ok: bool) -> Result<(), BusError> {
    if ok { Ok(()) } else { Err(BusError::Decode) }
}

impl Memory for SystemMemory {
    #[inline]
    fn read(&self, pa: Pa, attrs: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        let (region, offset) = self.find(pa, buf.len())?;
        if self.cache.is_some() {
            return mapped(self.cached_read(region, offset, attrs, buf));
        }
        mapped(region.ram.read(offset, buf))
    }

    #[inline]
    fn write(&self, pa: Pa, attrs: Attributes, buf: &[u8]) -> Result<(), BusError> {
        let (region, offset) = self.find(pa, buf.len())?;
        if self.cache.is_some() {
            return mapped(self.cached_write(region, offset, attrs, buf));
        }
        mapped(region.ram.write(offset, buf))
    }

    #[inline]
    fn load64(&self, pa: Pa, attrs: Attributes) -> Result<u64, BusError> {
        let (region, offset) = self.find(pa, 8)?;
        if !pa.is_aligned(8) {
            return Err(BusError::Slave);
        }
        if self.cache.is_some() {
            let mut b = [0; 8];
            mapped(self.cached_read(region, offset, attrs, &mut b))?;
            return Ok(u64::from_le_bytes(b));
        }
        region.ram.load64(offset).ok_or(BusError::Slave)
    }

    #[inline]
    fn load64s(&self, pa: Pa, attrs: Attributes, words: &mut [u64]) -> Result<(), BusError> {
        if self.cache.is_none()
            && let Ok((region, offset)) = self.find(pa, words.len().saturating_mul(8))
        {
            return region.ram.load_run(offset, words).then_some(()).ok_or(BusError::Slave);
        }
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.load64(pa.wrapping_add(8 * i as u64), attrs)?;
        }
        Ok(())
    }
    fn load32(&self, pa: Pa, attrs: Attributes) -> Result<u32, BusError> {
        let (region, offset) = self.find(pa, 4)?;
        if !pa.is_aligned(4) {
            return Err(BusError::Slave);
        }
        if self.cache.is_some() {
            let mut b = [0; 4];
            mapped(self.cached_read(region, offset, attrs, &mut b))?;
            return Ok(u32::from_le_bytes(b));
        }
        region.ram.load32(offset).ok_or(BusError::Slave)
    }

    fn cas64(&self, pa: Pa, attrs: Attributes, expected: u64, new: u64) -> Result<u64, BusError> {
        let (region, offset) = self.find(pa, 8)?;
        if !pa.is_aligned(8) {
            return Err(BusError::Slave);
        }
        if let (Some(cache), View::Cpu) = (&self.cache, self.view) {
            return Ok(cache.cpu_cas64(&self.regions, region, offset, (expected, new), &self.who));
        }
        if self.cache.is_some() {
            self.before_write(region, offset, 8, attrs);
        }
        region.ram.cas64(offset, expected, new).ok_or(BusError::Slave)
    }

    fn copy(
        &self,
        src: (Pa, Attributes),
        dst: (Pa, Attributes),
        len: usize,
    ) -> Result<(), (CopySide, BusError)> {
        let (from, from_offset) = self.find(src.0, len).map_err(|e| (CopySide::Source, e))?;
        let (to, to_offset) = self.find(dst.0, len).map_err(|e| (CopySide::Destination, e))?;
        if self.cache.is_some() {
            let mut buf = vec![0; len];
            self.read(src.0, src.1, &mut buf).map_err(|e| (CopySide::Source, e))?;
            return self.write(dst.0, dst.1, &buf).map_err(|e| (CopySide::Destination, e));
        }
        if from.ram.copy_to(from_offset, &to.ram, to_offset, len) {
            Ok(())
        } else {
            Err((CopySide::Source, BusError::Decode))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coherency::Maintenance;

    const A: Attributes = Attributes::DEVICE_DEFAULT;

    #[test]
    fn adjacent_regions_are_one_and_overlaps_are_refused() {
        let m = SystemMemory::new(&[(0x2000, 0x1000), (0x1000, 0x1000)]).unwrap();
        assert_eq!(m.regions().collect::<Vec<_>>(), [(0x1000, 0x2000)]);
        m.write(Pa(0x1ffc), A, &[1; 8]).unwrap();
        assert_eq!(m.write(Pa(0x2ffc), A, &[1; 8]), Err(BusError::Decode));
        assert_eq!(m.read(Pa(0xfff), A, &mut [0; 2]), Err(BusError::Decode));
        assert_eq!(m.read(Pa(u64::MAX), A, &mut [0; 2]), Err(BusError::Decode));
        assert!(SystemMemory::new(&[(0, 0x2000), (0x1000, 0x1000)]).is_err());
        assert!(SystemMemory::new(&[(!0xfff, 0x1000)]).is_err());
    }

    #[test]
    fn a_withdrawn_block_refuses_and_comes_back_with_what_it_held() {
        let block = |base, len| (base, Ram::new(len).unwrap());
        let m = SystemMemory::from_blocks(vec![block(0x4000, 0x1000), block(0x1000, 0x1000)]).unwrap();
        let view = m.view(View::Coherent, "dma");
        m.store64(Pa(0x4000), 9).unwrap();
        assert!(m.withdraw(0x4000) && !m.withdraw(0x2000));
        assert_eq!(view.load64(Pa(0x4000), A), Err(BusError::Decode));
        assert_eq!(view.load64(Pa(0x1000), A), Ok(0));
        assert!(m.restore(0x4000));
        assert_eq!(view.load64(Pa(0x4000), A), Ok(9));
        assert!(SystemMemory::from_blocks(vec![block(0, 0x2000), block(0x1000, 0x1000)]).is_err());
        assert!(SystemMemory::from_blocks(vec![block(0x800, 0x1000)]).is_err());
    }

    #[test]
    fn a_device_misses_what_the_cpu_has_not_cleaned() {
        let cpu = SystemMemory::with_cpu_cache(&[(0, 0x10000)], 128).unwrap();
        let dev = cpu.view(View::NonCoherent, "dma");
        cpu.store64(Pa(0x100), 0xabcd).unwrap();
        assert_eq!(dev.load64(Pa(0x100), A), Ok(0));
        let (reports, _) = cpu.cpu_cache().unwrap().take_reports();
        assert_eq!(reports.len(), 1);
        assert_eq!((reports[0].seen, reports[0].current), (0, 0xabcd));
        assert_eq!(reports[0].missing, Maintenance::Clean);
        cpu.clean(Pa(0x100), 8);
        assert_eq!(dev.load64(Pa(0x100), A), Ok(0xabcd));
        assert!(cpu.cpu_cache().unwrap().take_reports().0.is_empty());
    }

    #[test]
    fn the_cpu_misses_what_a_device_wrote_until_it_invalidates() {
        let cpu = SystemMemory::with_cpu_cache(&[(0, 0x10000)], 128).unwrap();
        let dev = cpu.view(View::NonCoherent, "dma");
        assert_eq!(cpu.load64(Pa(0x200), A), Ok(0));
        dev.write(Pa(0x200), A, &7u64.to_le_bytes()).unwrap();
        assert_eq!(cpu.load64(Pa(0x200), A), Ok(0), "still the old line");
        let (reports, _) = cpu.cpu_cache().unwrap().take_reports();
        assert_eq!((reports[0].seen, reports[0].current), (0, 7));
        assert_eq!(reports[0].missing, Maintenance::Invalidate);
        cpu.invalidate(Pa(0x200), 8);
        assert_eq!(cpu.load64(Pa(0x200), A), Ok(7));
    }

    #[test]
    fn a_coherent_master_sees_and_updates_the_cache() {
        let cpu = SystemMemory::with_cpu_cache(&[(0, 0x10000)], 128).unwrap();
        let dev = cpu.view(View::Coherent, "hpc0");
        cpu.store64(Pa(0x300), 1).unwrap();
        assert_eq!(dev.load64(Pa(0x300), A), Ok(1));
        let other = cpu.view(View::NonCoherent, "dma");
        cpu.cpu_cache().unwrap().unreported(|| assert_eq!(other.load64(Pa(0x300), A), Ok(0)));
        dev.write(Pa(0x300), A, &2u64.to_le_bytes()).unwrap();
        assert_eq!(cpu.load64(Pa(0x300), A), Ok(2));
        assert!(cpu.cpu_cache().unwrap().take_reports().0.is_empty());
    }

    #[test]
    fn lines_of_every_region_make_room() {
        let cpu = SystemMemory::with_cpu_cache(&[(0, 0x1000), (0x10_0000, 0x1000)], 4).unwrap();
        for i in 0..8u64 {
            cpu.store64(Pa(i * 64), i + 1).unwrap();
        }
        for i in 0..8u64 {
            cpu.store64(Pa(0x10_0000 + i * 64), i + 101).unwrap();
            assert!(cpu.cpu_cache().unwrap().lines() <= 4);
        }
        let dev = cpu.view(View::NonCoherent, "dma");
        assert_eq!(dev.load64(Pa(0x1c0), A), Ok(8), "written back when the other region needed the room");
        for i in 0..8u64 {
            assert_eq!(cpu.load64(Pa(i * 64), A), Ok(i + 1));
            assert_eq!(cpu.load64(Pa(0x10_0000 + i * 64), A), Ok(i + 101));
        }
        assert!(cpu.cpu_cache().unwrap().take_reports().0.is_empty());
    }

    #[test]
    fn a_cpu_swaps_words_in_one_piece_through_its_cache() {
        let cpu = SystemMemory::with_cpu_cache(&[(0, 0x1000)], 4).unwrap();
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..1000 {
                        let mut held = cpu.load64(Pa(0), A).unwrap();
                        while let Ok(seen) = cpu.cas64(Pa(0), A, held, held + 1)
                            && seen != held
                        {
                            held = seen;
                        }
                    }
                });
            }
        });
        assert_eq!(cpu.load64(Pa(0), A), Ok(4000));
    }

    #[test]
    fn a_small_cache_evicts_and_loses_nothing() {
        let cpu = SystemMemory::with_cpu_cache(&[(0, 0x10000)], 2).unwrap();
        for i in 0..64u64 {
            cpu.store64(Pa(i * 64), i + 1).unwrap();
        }
        assert!(cpu.cpu_cache().unwrap().lines() <= 2);
        for i in 0..64u64 {
            assert_eq!(cpu.load64(Pa(i * 64), A), Ok(i + 1));
        }
    }
}
