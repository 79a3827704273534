//! Guests on the driver on the model: a guest's own context descriptors and tables over a stage 2 of the host, with substreams
//! and with a device that keeps translations.

mod smmuv3_rig;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use portcullis_arch::smmuv3::cd::{CdDw0, CdDw1};
use portcullis_arch::smmuv3::cmd::{AtcInv, Cfgi, Tlbi};
use portcullis_arch::smmuv3::ste::{SteDw0, SteDw1};
use portcullis_arch::smmuv3::{Cd, Command, Opcode};
use portcullis_arch::{Iova, Pa, StreamId};
use portcullis_bus::{DmaPort, Initiator, Memory as _, SystemMemory};
use portcullis_drivers::ops::{DomainOptions, MasterOptions, Paging};
use portcullis_drivers::smmuv3::{DomainConfig, GuestSte};
use portcullis_engines::{AtcConfig, AtcPort, AtcShared};
use portcullis_hal::{Block, DmaMemory};
use portcullis_pgtable::{Config, Granule, PageTable, Stage1};
use smmuv3_rig::{Driver, RAM, Random, Rig, RigDomain, caps, exact, from, from_substream, map, rw};

/// Guest memory: at `IPA` for the guest, at `RAM` in reality.
const IPA: u64 = 0x4000_0000;
const SIZE: u64 = 0x40_0000;
/// Pages that devices are let at, from the start of guest memory; tables lie behind them.
const PAGES: u64 = 32;
const CDS: u64 = IPA + 0x10_0000;
const VIRTUAL_STREAM: u32 = 0;
const STREAM: u32 = 0x42;

/// The memory of the guest as the guest sees it.
#[derive(Clone)]
struct GuestMemory {
    ram: SystemMemory,
    next: Arc<AtomicU64>,
}

fn real(ipa: u64) -> Pa {
    Pa(ipa - IPA + RAM)
}

impl DmaMemory for GuestMemory {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        let step = (len.max(align) as u64).next_multiple_of(0x1000);
        let pa = self.next.fetch_add(step, Ordering::Relaxed);
        self.write(Pa(pa), &vec![0; len]);
        Some(Block { pa: Pa(pa), len })
    }
    fn free(&self, block: Block) {
        self.write(block.pa, &vec![0xdb; block.len]);
    }
    fn load64(&self, pa: Pa) -> u64 {
        self.ram.load64(real(pa.get()), Default::default()).unwrap()
    }
    fn store64(&self, pa: Pa, value: u64) {
        self.ram.store64(real(pa.get()), value).unwrap();
    }
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        let held = self.ram.cas64(real(pa.get()), Default::default(), expected, new).unwrap();
        if held == expected { Ok(()) } else { Err(held) }
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        self.ram.read(real(pa.get()), Default::default(), buf).unwrap();
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        self.ram.write(real(pa.get()), Default::default(), buf).unwrap();
    }
    fn clean(&self, _: Pa, _: usize) {}
    fn invalidate(&self, _: Pa, _: usize) {}
    fn wmb(&self) {}
}

/// Gathers what a guest invalidates.
#[derive(Default)]
struct Unmapped(Vec<(u64, u64)>);
impl portcullis_pgtable::Flush for Unmapped {
    fn leaf(&mut self, iova: u64, len: u64, _: u64) {
        self.0.push((iova, len));
    }
    fn table(&mut self, iova: u64, len: u64) {
        self.0.push((iova, len));
    }
}

/// One address space of the guest: its descriptor is at the number of its substream.
struct Space {
    asid: u16,
    table: PageTable<Stage1, GuestMemory>,
    /// What is mapped: page of the address to page of the guest.
    pages: BTreeMap<u64, u64>,
}

struct Guest {
    rig: Rig,
    driver: Driver,
    parent: Arc<RigDomain>,
    nested: Arc<RigDomain>,
    spaces: Vec<Space>,
    /// Guest pages that the host has taken away.
    taken: Vec<bool>,
    port: AtcPort<portcullis_smmuv3::Port<smmuv3_rig::Bus>>,
    plain: portcullis_smmuv3::Port<smmuv3_rig::Bus>,
    atc: Arc<AtcShared>,
    master: portcullis_drivers::ops::Master,
}

const AT: u64 = 0x10_0000;

impl Guest {
    fn new() -> Self {
        let rig = Rig::new(caps());
        let driver = rig.driver();
        let options = MasterOptions { substream_bits: 4, can_stall: false, ats: true };
        let master = driver.add_master(&exact(STREAM), options).unwrap();
        let parent =
            driver.new_domain(DomainConfig::Stage2(Paging::default()), DomainOptions::default()).unwrap();
        for page in 0..PAGES {
            map(&parent, IPA + page * 0x1000, real(IPA + page * 0x1000).get(), 0x1000);
            rig.put64(real(IPA + page * 0x1000).get(), page);
        }
        map(&parent, CDS, real(CDS).get(), SIZE - 0x10_0000);
        let memory = GuestMemory { ram: rig.ram.clone(), next: Arc::new(AtomicU64::new(CDS + 0x1000)) };
        memory.write(Pa(CDS), &[0; 0x1000]);
        let spaces: Vec<Space> = (0..4u16)
            .map(|n| {
                let config = Config::new(Granule::K4, 39, 44).coherent_walk(true);
                let table = PageTable::new(memory.clone(), config).unwrap();
                let space = Space { asid: 10 + n, table, pages: BTreeMap::new() };
                space.write_cd(&memory, n.into(), true);
                space
            })
            .collect();
        let ste = GuestSte {
            dw0: SteDw0::new()
                .with_v(true)
                .with_config(5)
                .with_s1contextptr_55_6(CDS >> 6)
                .with_s1cdmax(2)
                .into_bits(),
            dw1: SteDw1::new()
                .with_s1dss(2)
                .with_s1cir(1)
                .with_s1cor(1)
                .with_s1csh(3)
                .with_eats(1)
                .into_bits(),
        };
        let nested =
            driver.new_domain(DomainConfig::Guest(parent.clone(), ste), DomainOptions::default()).unwrap();
        driver.attach(&master, &nested).unwrap();
        let atc = AtcShared::new(AtcConfig { pri: false, ..AtcConfig::default() });
        rig.model().attach_ats(StreamId(STREAM), atc.clone());
        let port = AtcPort::new(atc.clone(), rig.port());
        let plain = rig.port();
        let taken = vec![false; PAGES as usize];
        Self { rig, driver, parent, nested, spaces, taken, port, plain, atc, master }
    }

    fn invalidate(&self, commands: &[Command]) {
        let physical = |stream| (stream == StreamId(VIRTUAL_STREAM)).then_some(StreamId(STREAM));
        self.nested.invalidate_for_guest(commands, physical).unwrap();
    }

    fn from(n: usize) -> Initiator {
        if n == 0 { from(STREAM) } else { from_substream(STREAM, n as u32) }
    }

    /// The page that an address of a space reaches.
    fn expected(&self, n: usize, page: u64) -> Option<u64> {
        let guest = *self.spaces[n].pages.get(&page)?;
        (!self.taken[guest as usize]).then_some(guest)
    }

    fn check(&mut self, what: &str) {
        for n in 0..self.spaces.len() {
            for page in 0..6 {
                let expected = self.expected(n, page);
                for ats in [true, false] {
                    let port: &mut dyn DmaPort = if ats { &mut self.port } else { &mut self.plain };
                    let mut bytes = [0; 8];
                    let got = port.read(Self::from(n), Iova(AT + page * 0x1000), &mut bytes);
                    let got = got.ok().map(|()| u64::from_le_bytes(bytes));
                    assert_eq!(got, expected, "{what}: space {n} page {page}, ATS {ats}");
                }
            }
        }
    }
}

impl Space {
    fn write_cd(&self, memory: &GuestMemory, n: u64, valid: bool) {
        let r = self.table.registers();
        let dw0 =
            CdDw0::new().with_t0sz(25).with_ir0(1).with_or0(1).with_sh0(3).with_epd1(true).with_v(valid);
        let dw0 =
            dw0.with_ips(4).with_aa64(true).with_r(true).with_a(true).with_aset(true).with_asid(self.asid);
        let root = portcullis_drivers::ops::TableRoot::from_registers(&r, Granule::K4).ttbr0.get();
        let cd = Cd::default().with_mair(r.mair).with_dw1(CdDw1::new().with_ttb0_51_4(root >> 4));
        for (i, word) in cd.with_dw0(dw0).0.into_iter().enumerate() {
            memory.store64(Pa(CDS + n * 64 + i as u64 * 8), word);
        }
    }
}

fn sync() -> Command {
    Command([Opcode::Sync as u64, 0])
}

fn atc_inv(n: usize, page: u64) -> Command {
    let command = AtcInv::new()
        .with_opcode(Opcode::AtcInv as u8)
        .with_sid(VIRTUAL_STREAM)
        .with_addr_63_12((AT >> 12) + page);
    if n == 0 { command.into() } else { command.with_ssv(true).with_ssid(n as u32).into() }
}

#[test]
fn a_guest_s_tables_and_invalidations_work_and_the_host_takes_pages_away() {
    let mut guest = Guest::new();
    let mut random = Random(12);
    guest.check("nothing is mapped");
    for round in 0..400 {
        let n = random.below(4) as usize;
        let page = random.below(6);
        let address = Iova(AT + page * 0x1000);
        match random.below(6) {
            0..3 => {
                let target = random.below(PAGES);
                if guest.spaces[n].pages.contains_key(&page) {
                    let mut gone = Unmapped::default();
                    guest.spaces[n].table.unmap(address, 0x1000, &mut gone).unwrap();
                    assert_eq!(gone.0.len(), 1);
                    let asid = guest.spaces[n].asid;
                    let va = Tlbi::new().with_addr_63_12(address.get() >> 12);
                    let tlbi = match random.below(4) {
                        0 => Tlbi::new().with_opcode(Opcode::TlbiNhAsid as u8).with_asid(asid),
                        1 => va.with_opcode(Opcode::TlbiNhVa as u8).with_asid(asid).with_leaf(true),
                        2 => va.with_opcode(Opcode::TlbiNhVaa as u8).with_tg(1).with_ttl(3),
                        _ => Tlbi::new().with_opcode(Opcode::TlbiNsnhAll as u8),
                    };
                    guest.invalidate(&[tlbi.into(), sync(), atc_inv(n, page), sync()]);
                    guest.spaces[n].pages.remove(&page);
                } else {
                    guest.spaces[n].table.map(address, Pa(IPA + target * 0x1000), 0x1000, rw()).unwrap();
                    guest.spaces[n].pages.insert(page, target);
                    // What the device has been told is nothing it may keep; yet be tidy.
                    guest.invalidate(&[atc_inv(n, page)]);
                }
            }
            3 | 4 => {
                let target = random.below(PAGES);
                let ipa = Iova(IPA + target * 0x1000);
                if guest.taken[target as usize] {
                    map(&guest.parent, ipa.get(), real(ipa.get()).get(), 0x1000);
                } else {
                    assert_eq!(guest.parent.unmap(ipa, 0x1000), Ok(0x1000));
                }
                guest.taken[target as usize] ^= true;
            }
            _ => {
                // A new descriptor: the guest moves the space to another ASID.
                let asid = 20 + round as u16 * 4 + n as u16;
                guest.spaces[n].asid = asid;
                let memory = GuestMemory { ram: guest.rig.ram.clone(), next: Arc::default() };
                guest.spaces[n].write_cd(&memory, n as u64, false);
                let cfgi = Cfgi::new().with_opcode(Opcode::CfgiCd as u8).with_sid(VIRTUAL_STREAM);
                let cfgi: Command = cfgi.with_ssid(n as u32).with_range(1).into();
                guest.invalidate(&[cfgi, sync()]);
                guest.spaces[n].write_cd(&memory, n as u64, true);
                guest.invalidate(&[cfgi, sync()]);
            }
        }
        guest.check(&format!("round {round}"));
    }
    assert!(guest.atc.stats().requests > 100);
    // Nothing of the guest survives a move to another domain.
    let other =
        guest.driver.new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default()).unwrap();
    guest.driver.attach(&guest.master, &other).unwrap();
    for n in 0..4 {
        for page in 0..6 {
            let mut bytes = [0; 8];
            let at = Iova(AT + page * 0x1000);
            assert!(guest.port.read(Guest::from(n), at, &mut bytes).is_err(), "space {n} page {page}");
            assert!(guest.plain.read(Guest::from(n), at, &mut bytes).is_err());
        }
    }
    assert_eq!(guest.atc.cached(), 0);
}

#[test]
fn a_stage_1_that_comes_while_its_parent_unmaps_does_not_keep_the_page() {
    // Between the start of the parent's unmap and the change of its table, a nested domain is made and attached, and the
    // device reads the page: a combined entry that only a VMID can name.
    let rig = Rig::new(caps());
    let driver = rig.driver();
    let master = driver.add_master(&exact(1), MasterOptions::default()).unwrap();
    let parent =
        driver.new_domain(DomainConfig::Stage2(Paging::default()), DomainOptions::default()).unwrap();
    map(&parent, IPA, RAM, 0x2000);
    let warm = Arc::new(std::sync::Mutex::new((rig.port(), None)));
    let (keep, below, smmu, device) = (warm.clone(), parent.clone(), driver.clone(), master);
    rig.before.set(move || {
        let (port, nested) = &mut *keep.lock().unwrap();
        if nested.is_none() {
            let config = DomainConfig::Nested(below.clone(), Paging::default());
            let domain = smmu.new_domain(config, DomainOptions::default()).unwrap();
            map(&domain, AT, IPA, 0x1000);
            smmu.attach(&device, &domain).unwrap();
            smmuv3_rig::read64(port, from(1), AT).unwrap();
            *nested = Some(domain);
        }
    });
    assert_eq!(parent.unmap(Iova(IPA), 0x1000), Ok(0x1000));
    rig.before.clear();
    let (port, nested) = &mut *warm.lock().unwrap();
    assert!(nested.is_some());
    assert!(smmuv3_rig::read64(port, from(1), AT).is_err());
}

#[test]
fn a_hostile_guest_cannot_stop_the_queue_or_reach_others() {
    let guest = Guest::new();
    let other = guest.driver.add_master(&exact(1), MasterOptions::default()).unwrap();
    let domain =
        guest.driver.new_domain(DomainConfig::Stage2(Paging::default()), DomainOptions::default()).unwrap();
    map(&domain, 0x1000, RAM, 0x1000);
    guest.driver.attach(&other, &domain).unwrap();
    let mut port = guest.rig.port();
    smmuv3_rig::read64(&mut port, from(1), 0x1000).unwrap();
    let physical = |stream| (stream == StreamId(VIRTUAL_STREAM)).then_some(StreamId(STREAM));
    let mut random = Random(4);
    let mut passed = 0;
    for _ in 0..4000 {
        let opcode = random.below(0x80);
        let words = [
            opcode | random.next() & [!0xff, 0, 0xffff_0000_0000_0000][random.below(3) as usize],
            random.next(),
        ];
        passed += u64::from(guest.nested.invalidate_for_guest(&[Command(words)], physical).is_ok());
    }
    assert!(passed > 50, "{passed}");
    assert_eq!(guest.rig.reg(0x60), guest.rig.reg(0x64), "the queue stopped");
    guest.driver.handle_irq();
    let faults = guest.driver.take_faults().faults;
    assert!(faults.is_empty(), "{:x?}", faults.first());
    assert!(smmuv3_rig::read64(&mut port, from(1), 0x1000).is_ok());
}
