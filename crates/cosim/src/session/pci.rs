//! A PCIe test device of the board as a function of QEMU's host bridge: one that the guest's kernel finds, sizes and
//! enables like any other, with address translation services, page requests and PASIDs as extended capabilities.
//!
//! Offsets and fields are those of the PCI Express base specification (7.5.3, 10.5.1, 10.5.2, 7.8.9). Its DMA goes through
//! the board's SMMU here; QEMU knows nothing of it. It has no interrupt of its own.

use std::sync::{Arc, Mutex, PoisonError};

use portcullis_arch::testdev;
use portcullis_board::sim::{EngineKind, Machine};
use portcullis_bus::{Engine as _, Mmio};
use portcullis_engines::{AtcShared, TestDev};

use crate::guest_tree::PciFunction;
use crate::session::config::{CONFIG_BYTES, Config};
use crate::vfio_user::{DmaMap, DmaUnmap, Function, IrqInfo, Refusal, RegionInfo, SetIrqs, pci};

/// Where the capabilities are.
const EXPRESS: usize = 0x40;
const ATS: usize = 0x100;
const PRI: usize = 0x110;
const PASID: usize = 0x120;
/// ATS control: the enable bit. Page request control: the enable bit.
const ATS_ENABLE: u16 = 1 << 15;
const PRI_ENABLE: u16 = 1;
/// Page requests that may be outstanding.
const PRI_CAPACITY: u32 = 32;

/// A test device behind configuration space.
pub struct TestFunction {
    name: String,
    config: Config,
    what: PciFunction,
    device: Option<Device>,
    /// Page requests were on when configuration space was looked at last.
    pages: bool,
    /// Resets by the peer.
    pub resets: u64,
}

struct Device {
    registers: Arc<dyn Mmio>,
    engine: Arc<Mutex<TestDev>>,
    atc: Option<Arc<AtcShared>>,
}

/// Header of an extended capability.
fn header(id: u32, version: u32, next: usize) -> [u8; 4] {
    (id | version << 16 | (next as u32) << 20).to_le_bytes()
}

fn config(f: &PciFunction) -> Config {
    let id = testdev::PciIdentity::DEVICE;
    let identity = [id.vendor.to_le_bytes(), id.device.to_le_bytes()].concat();
    let subsystem = [id.subsystem_vendor.to_le_bytes(), id.subsystem.to_le_bytes()].concat();
    // Version 2, endpoint; role-based error reporting and function level reset, which every new function has.
    let express = [0x10, 0, 0x02, 0];
    let abilities = (1u32 << 15 | 1 << 28).to_le_bytes();
    // One end-to-end TLP prefix: a PASID is one.
    let prefixes = (1u32 << 21 | 1 << 22).to_le_bytes();
    let pasid = f.pasid_bits.min(20);
    let next_ats = if f.pri {
        PRI
    } else if pasid > 0 {
        PASID
    } else {
        0
    };
    let next_pri = if pasid > 0 { PASID } else { 0 };
    let mut set: Vec<(usize, Vec<u8>)> = vec![
        (0, identity),
        (6, vec![0x10, 0]),
        (8, vec![0, 0, 0, 0xff]),
        // 64 bits wide, prefetchable.
        (0x10, vec![0x0c]),
        (0x2c, subsystem),
        (0x34, vec![EXPRESS as u8]),
        (EXPRESS, express.to_vec()),
        (EXPRESS + 4, abilities.to_vec()),
        (EXPRESS + 0x24, prefixes.to_vec()),
    ];
    let mut writable: Vec<(usize, Vec<u8>)> = vec![
        (4, vec![0x06, 0x04]),
        (0x0c, vec![0xff]),
        (0x10, vec![0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        (0x3c, vec![0xff]),
        (EXPRESS + 8, vec![0xff, 0x7f]),
    ];
    if f.ats {
        // Page aligned requests; 32 invalidations (0 means that) may wait.
        set.extend([(ATS, header(0x0f, 1, next_ats).to_vec()), (ATS + 4, vec![1 << 5, 0])]);
        writable.push((ATS + 6, vec![0x1f, 0x80]));
        if f.pri {
            // Stopped; responses carry the PASID of their request.
            set.extend([
                (PRI, header(0x13, 1, next_pri).to_vec()),
                (PRI + 6, vec![0, 0x81]),
                (PRI + 8, PRI_CAPACITY.to_le_bytes().to_vec()),
            ]);
            writable.extend([(PRI + 4, vec![1, 0]), (PRI + 12, vec![0xff; 4])]);
        }
    }
    if pasid > 0 {
        if !f.ats {
            // Extended capabilities begin at 0x100, with one that says nothing.
            set.push((ATS, header(0, 0, PASID).to_vec()));
        }
        set.extend([(PASID, header(0x1b, 1, 0).to_vec()), (PASID + 4, vec![0, pasid])]);
        writable.push((PASID + 6, vec![1, 0]));
    }
    let set: Vec<(usize, &[u8])> = set.iter().map(|(at, b)| (*at, b.as_slice())).collect();
    let writable: Vec<(usize, &[u8])> = writable.iter().map(|(at, b)| (*at, b.as_slice())).collect();
    Config::new(&set, &writable)
}

impl TestFunction {
    /// The function that `what` describes; its registers are all ones until the machine is there.
    pub fn new(what: PciFunction) -> Self {
        Self { name: what.name.clone(), config: config(&what), what, device: None, pages: false, resets: 0 }
    }

    /// Its name on the board.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Connects it to its engine.
    pub fn connect(&mut self, machine: &Machine) {
        self.device = machine.engine(&self.name).and_then(|slot| match &slot.engine {
            EngineKind::TestDevice(engine) => {
                let (engine, atc) = (engine.clone(), slot.atc.clone());
                Some(Device { registers: slot.mmio(), engine, atc })
            }
            _ => None,
        });
        if let Some(atc) = self.device.as_ref().and_then(|d| d.atc.as_ref()) {
            atc.enable_pri(false);
        }
        self.pages = false;
        self.follow();
    }

    /// The device does what configuration space says.
    fn follow(&mut self) {
        let Some(device) = &self.device else { return };
        device.engine.lock().unwrap_or_else(PoisonError::into_inner).set_bus_master(self.config.master_on());
        if let Some(atc) = &device.atc {
            let ats = self.what.ats && self.config.word(ATS + 6) & ATS_ENABLE != 0;
            let pri = self.what.pri && self.config.word(PRI + 4) & PRI_ENABLE != 0;
            // Only a change: after a failure it is the enabling that makes requests possible again.
            if std::mem::replace(&mut self.pages, ats && pri) != (ats && pri) {
                atc.enable_pri(ats && pri);
            }
            atc.enable_ats(ats);
        }
    }
}

impl Function for TestFunction {
    fn region(&self, index: u32) -> RegionInfo {
        match index {
            pci::BAR0 => RegionInfo::read_write(testdev::BAR0_BYTES),
            pci::CONFIG => RegionInfo::read_write(CONFIG_BYTES as u64),
            _ => RegionInfo::ABSENT,
        }
    }

    fn irq(&self, _: u32) -> IrqInfo {
        IrqInfo::ABSENT
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) {
        match (region, &self.device) {
            (pci::CONFIG, _) => self.config.read(offset, data),
            (pci::BAR0, Some(device)) if device.registers.mmio_read(offset, data).is_ok() => {}
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        match (region, &self.device) {
            (pci::CONFIG, _) => {
                self.config.write(offset, data);
                self.follow();
            }
            // What a device refuses is dropped, as on PCI.
            (pci::BAR0, Some(device)) => drop(device.registers.mmio_write(offset, data)),
            _ => {}
        }
    }

    fn set_irqs(&mut self, _: SetIrqs) -> Result<(), Refusal> {
        Ok(())
    }

    // The guest's memory is known from the window's function.
    fn dma_map(&mut self, _: DmaMap) -> Result<(), Refusal> {
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmap) -> Result<(), Refusal> {
        Ok(())
    }

    fn reset(&mut self) {
        self.resets += 1;
        self.config = config(&self.what);
        if let Some(device) = &self.device {
            device.engine.lock().unwrap_or_else(PoisonError::into_inner).reset();
        }
        self.follow();
    }
}

#[cfg(test)]
mod tests {
    use portcullis_arch::{Iova, Pa, StreamId};
    use portcullis_board::tree::{Region, Rid};
    use portcullis_bus::{
        AtsDevice, AtsPort, AtsReply, AtsTranslation, DmaError, DmaFault, DmaPort, Initiator, IrqLine,
        PageGroupResponse, PageRequest, PageResponse, StallState, StallTag,
    };
    use portcullis_engines::testdev::{TestDevBar, TestDevConfig};
    use portcullis_engines::{AtcConfig, AtcPort};

    use super::*;

    /// An IOMMU that has no page, and somebody behind it who calls every page request a failure.
    struct Denies(Arc<Mutex<Option<Arc<AtcShared>>>>);

    const REFUSED: Result<(), DmaError> = Err(DmaError { done: 0, fault: DmaFault::Terminated });

    impl DmaPort for Denies {
        fn read(&mut self, _: Initiator, _: Iova, _: &mut [u8]) -> Result<(), DmaError> {
            REFUSED
        }
        fn write(&mut self, _: Initiator, _: Iova, _: &[u8]) -> Result<(), DmaError> {
            REFUSED
        }
        fn stall_state(&mut self, _: StallTag) -> StallState {
            StallState::Terminated { abort: true }
        }
    }

    impl AtsPort for Denies {
        fn translation_request(&mut self, _: Initiator, _: Iova, _: bool) -> AtsReply {
            AtsReply::Granted(AtsTranslation {
                addr: 0,
                size_log2: 12,
                read: false,
                write: false,
                execute: false,
                privileged: false,
                global: false,
            })
        }
        fn read_translated(&mut self, _: Initiator, _: u64, _: &mut [u8]) -> Result<(), DmaError> {
            REFUSED
        }
        fn write_translated(&mut self, _: Initiator, _: u64, _: &[u8]) -> Result<(), DmaError> {
            REFUSED
        }
        fn page_request(&mut self, request: PageRequest) {
            let response =
                PageGroupResponse { substream: None, group: request.group, code: PageResponse::Failure };
            self.0.lock().unwrap().as_ref().unwrap().page_response(response);
        }
    }

    #[test]
    fn after_a_failure_only_enabling_page_requests_makes_them_possible_again() {
        let atc = AtcShared::new(AtcConfig { ats: false, pri: false, ..AtcConfig::default() });
        let mut port = AtcPort::new(atc.clone(), Denies(Arc::new(Mutex::new(Some(atc.clone())))));
        let idle = TestDev::new(
            TestDevConfig::new(StreamId(8)),
            Box::new(Denies(Arc::default())),
            IrqLine::unconnected(),
        );
        let engine = Arc::new(Mutex::new(idle));
        let mut function = TestFunction::new(PciFunction {
            board_path: String::new(),
            guest_path: String::new(),
            name: "testdev0".into(),
            board_rid: Rid(8),
            rid: Rid(16),
            slot: 2,
            streams: vec![StreamId(8)],
            pasid_bits: 16,
            ats: true,
            pri: true,
            bar: Region { base: Pa(0), size: testdev::BAR0_BYTES },
        });
        let registers = Arc::new(TestDevBar(engine.clone()));
        function.device = Some(Device { registers, engine, atc: Some(atc.clone()) });
        let mut set = |at: usize, value: u16| function.write(pci::CONFIG, at as u64, &value.to_le_bytes());

        set(ATS + 6, ATS_ENABLE);
        set(PRI + 4, PRI_ENABLE);
        let _ = port.read(Initiator::new(StreamId(8)), Iova(0x1000), &mut [0; 4]);
        assert!(atc.pri_failed());
        // The command register, or the same word once more.
        set(4, 6);
        set(PRI + 4, PRI_ENABLE);
        assert!(atc.pri_failed());
        set(PRI + 4, 0);
        set(PRI + 4, PRI_ENABLE);
        assert!(!atc.pri_failed());
    }
}
