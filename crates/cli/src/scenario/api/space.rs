//! Address spaces: domains and processes.

use std::sync::Arc;

use portcullis_arch::{Iova, Pa};
use portcullis_board::sim::Memory;
use portcullis_iommu::{AddressSpace, Domain, Process, Prot};
use rhai::{Dynamic, Engine};

use super::board::Board;
use super::{Result, address, fail, length, word};

/// A domain.
#[derive(Clone)]
pub struct DomainHandle {
    pub board: Board,
    pub domain: Arc<Domain>,
}

/// A process.
#[derive(Clone)]
pub struct ProcessHandle {
    pub board: Board,
    pub process: Arc<Process<Memory>>,
}

fn physical(pa: Option<Pa>) -> Dynamic {
    pa.map_or(Dynamic::UNIT, |p| (p.get() as i64).into())
}

/// "r", "w", "rw", with "x" for executable and "+cached", "+device", "+privileged" behind.
fn parse_prot(text: &str) -> Result<Prot> {
    let mut parts = text.split('+');
    let access = parts.next().unwrap_or_default();
    if access.is_empty() || !access.chars().all(|c| "rwx".contains(c)) {
        return fail(format!(
            "{text:?} is no permission: r, w, x letters, then +cached, +device, +privileged"
        ));
    }
    let mut prot = Prot::new(access.contains('r'), access.contains('w'));
    if !access.contains('x') {
        prot = prot.noexec();
    }
    for part in parts {
        prot = match part {
            "cached" => prot.cached(),
            "device" => prot.device(),
            "privileged" => prot.privileged(),
            other => return fail(format!("{other:?} is not cached, device or privileged")),
        };
    }
    Ok(prot)
}

impl DomainHandle {
    fn map(&mut self, iova: i64, pa: i64, len: i64, prot: &str) -> Result<()> {
        let prot = parse_prot(prot)?;
        self.domain.map(Iova(address(iova)), Pa(address(pa)), address(len), prot).or_else(fail)
    }
    fn unmap(&mut self, iova: i64, len: i64) -> Result<i64> {
        let bytes = self.domain.unmap(Iova(address(iova)), address(len)).map(|n| n as i64).or_else(fail)?;
        self.board.world.note_unmapped(&self.domain, address(iova), address(len));
        // Devices with translations of their own had to forget them.
        self.board.drain();
        Ok(bytes)
    }
    fn protect(&mut self, iova: i64, len: i64, prot: &str) -> Result<()> {
        self.domain.protect(Iova(address(iova)), address(len), parse_prot(prot)?).or_else(fail)?;
        self.board.drain();
        Ok(())
    }
    fn phys(&mut self, iova: i64) -> Dynamic {
        physical(self.domain.iova_to_phys(Iova(address(iova))))
    }
    fn bank(&mut self) -> i64 {
        self.domain.bank().map_or(-1, i64::from)
    }
}

/// What a process may do with its memory.
fn user() -> Prot {
    Prot::RW.noexec().cached()
}

impl ProcessHandle {
    /// Its page tables, as a context bank wants them; nothing once it has exited.
    pub fn root(&self) -> Option<portcullis_iommu::TableRoot> {
        self.process.table_root()
    }
    fn mmap(&mut self, len: i64) -> Result<i64> {
        self.process.mmap(length(len)? as u64, user()).map(|va| va.get() as i64).or_else(fail)
    }
    fn mmap_at(&mut self, va: i64, len: i64) -> Result<()> {
        self.process.mmap_at(Iova(address(va)), length(len)? as u64, user()).or_else(fail)
    }
    fn reserve(&mut self, len: i64) -> Result<i64> {
        self.process.reserve(length(len)? as u64, user()).map(|va| va.get() as i64).or_else(fail)
    }
    fn fault_in(&mut self, va: i64) -> Result<bool> {
        self.process.fault_in(Iova(address(va))).or_else(fail)
    }
    fn munmap(&mut self, va: i64) -> Result<i64> {
        let bytes = self.process.munmap(Iova(address(va))).map(|n| n as i64).or_else(fail)?;
        self.board.drain();
        Ok(bytes)
    }
    fn read32(&mut self, va: i64) -> Result<i64> {
        let mut b = [0; 4];
        self.process.read(Iova(address(va)), &mut b).or_else(fail)?;
        // A read through a stale line is noticed by the machine.
        self.board
            .world
            .system
            .machine()
            .tracer()
            .note_stale_reads(self.board.world.system.machine().memory());
        self.board.drain();
        Ok(i64::from(u32::from_le_bytes(b)))
    }
    fn write32(&mut self, va: i64, value: i64) -> Result<()> {
        self.process.write(Iova(address(va)), &word(value)?.to_le_bytes()).or_else(fail)
    }
    fn clean(&mut self, va: i64, len: i64) -> Result<()> {
        self.process.clean(Iova(address(va)), length(len)?).or_else(fail)
    }
    fn invalidate(&mut self, va: i64, len: i64) -> Result<()> {
        self.process.invalidate(Iova(address(va)), length(len)?).or_else(fail)
    }
    fn phys(&mut self, va: i64) -> Dynamic {
        physical(self.process.lookup(Iova(address(va))))
    }
    fn exit(&mut self) -> Result<()> {
        self.process.exit().or_else(fail)?;
        self.board.drain();
        Ok(())
    }
}

/// Gives `engine` the functions of domains and processes.
pub fn register(engine: &mut Engine) {
    engine.register_type_with_name::<DomainHandle>("Domain");
    engine
        .register_fn("map", |d: &mut DomainHandle, iova: i64, pa: i64, len: i64| d.map(iova, pa, len, "rw"));
    engine.register_fn("map", DomainHandle::map);
    engine.register_fn("unmap", DomainHandle::unmap);
    engine.register_fn("protect", DomainHandle::protect);
    engine.register_fn("phys", DomainHandle::phys);
    engine.register_get("bank", DomainHandle::bank);

    engine.register_type_with_name::<ProcessHandle>("Process");
    engine.register_fn("mmap", ProcessHandle::mmap);
    engine.register_fn("mmap", ProcessHandle::mmap_at);
    engine.register_fn("reserve", ProcessHandle::reserve);
    engine.register_fn("fault_in", ProcessHandle::fault_in);
    engine.register_fn("munmap", ProcessHandle::munmap);
    engine.register_fn("read32", ProcessHandle::read32);
    engine.register_fn("write32", ProcessHandle::write32);
    engine.register_fn("clean", ProcessHandle::clean);
    engine.register_fn("invalidate", ProcessHandle::invalidate);
    engine.register_fn("clean_tables", |p: &mut ProcessHandle| p.process.clean_tables());
    engine.register_fn("phys", ProcessHandle::phys);
    engine.register_fn("exit", ProcessHandle::exit);
}
