//! The DMA API as drivers of the board use it: what a device can reach, and when it no longer can, seen from engines that try.

mod axidma_rig;

use std::sync::Arc;

use axidma_rig::{Buffer, KIB, NONE, PAGE, Rig, description, options, pattern, segment};
use portcullis_arch::{Access, Iova, Pa};
use portcullis_board::os::host::DmaOptions;
use portcullis_board::sim::{EngineKind, Memory};
use portcullis_board::system::BootOptions;
use portcullis_drivers::dmaengine::{BusAccess, BusResponse, TransferError, WaitError};
use portcullis_drivers::fault::{FaultReason, FaultReport, FaultResponse};
use portcullis_drivers::gem::GemError;
use portcullis_hal::{DmaMemory as _, Mmio as _};
use portcullis_iommu::dma::{DeviceConfig, Direction as Way, DmaDevice, FaultStory, Misuse, Mode, SgEntry};

fn with_dma(dma: DmaOptions) -> Rig {
    Rig::booted(description(), false, &BootOptions { dma, ..options() })
}

/// A loop between two addresses of core 0.
fn copy(rig: &Rig, to: Iova, from: Iova, len: u64) -> Result<u64, WaitError> {
    let running = rig.core(0).begin(&[segment(to, len)], &[segment(from, len)]).unwrap();
    running.wait(&rig.clock(), 1_000_000)
}

fn refused(access: BusAccess, response: BusResponse, at: Iova) -> Result<u64, WaitError> {
    Err(WaitError::Failed { error: TransferError::Bus { access, response, at }, transferred: 0 })
}

#[test]
fn coherent_memory_is_shared_without_syncs() {
    let rig = Rig::cached();
    let dma = rig.core(0).dma().clone();
    let (from, to) = (dma.alloc_coherent(20 * KIB).unwrap(), dma.alloc_coherent(20 * KIB).unwrap());
    assert!(from.iova() != Iova(from.pa(0).unwrap().get()) && from.iova().is_aligned(PAGE));
    let mut seen = vec![0xff; 20 * KIB as usize];
    to.read(0, &mut seen).unwrap();
    assert!(seen.iter().all(|b| *b == 0), "zeroed at first");
    for round in 0..3 {
        let data = pattern(round, 20 * KIB);
        from.write(0, &data).unwrap();
        // Words of a descriptor in the middle of it, after the device may have read the line.
        from.write32(100, 0x1234_5678).unwrap();
        assert_eq!(copy(&rig, to.iova(), from.iova(), 20 * KIB), Ok(20 * KIB));
        to.read(0, &mut seen).unwrap();
        assert!(seen[..100] == data[..100] && seen[104..] == data[104..]);
        assert_eq!(to.read32(100), Ok(0x1234_5678));
    }
    let stale = rig.stale();
    assert!(stale.is_empty(), "{} stale reads, the first: {}", stale.len(), stale[0]);
    // What was freed is out of reach at once.
    let gone = from.iova();
    from.free().unwrap();
    assert_eq!(copy(&rig, to.iova(), gone, KIB), refused(BusAccess::Read, BusResponse::Slave, gone));
    assert_eq!(rig.fault().report.iova, gone);
}

#[test]
fn a_strict_unmap_is_over_when_it_returns() {
    let rig = Rig::new();
    let dma = rig.core(0).dma().clone();
    assert_eq!(dma.space().unwrap().mode(), Mode::Strict);
    for _ in 0..3 {
        let (_, source) = rig.map(&dma, 8 * KIB, Way::ToDevice);
        let (to, target) = rig.map(&dma, 8 * KIB, Way::FromDevice);
        // TLBs know both now.
        assert_eq!(copy(&rig, target, source, 8 * KIB), Ok(8 * KIB));
        dma.unmap_single(target, to.len, Way::FromDevice, NONE).unwrap();
        rig.put(to.pa, &[0x11; 8 * KIB as usize]);
        let ended = copy(&rig, target, source, 8 * KIB);
        assert_eq!(ended, refused(BusAccess::Write, BusResponse::Slave, target));
        let fault = rig.fault();
        assert_eq!((fault.name.as_deref(), fault.report.iova), (Some("axidma0"), target));
        assert_eq!((fault.report.reason, fault.report.access), (FaultReason::Translation, Access::Write));
        assert!(rig.get(to.pa, to.len).iter().all(|b| *b == 0x11), "nothing was written");
        dma.unmap_single(source, 8 * KIB, Way::ToDevice, NONE).unwrap();
        rig.loops(0, KIB);
    }
}

#[test]
fn a_lazy_unmap_is_over_after_the_flush_and_its_address_is_nobody_s_before() {
    let rig = with_dma(DmaOptions { lazy: true, debug: false });
    let dma = rig.core(0).dma().clone();
    let space = dma.space().unwrap().clone();
    assert_eq!(space.mode(), Mode::Lazy);
    let (from, source) = rig.map(&dma, 8 * KIB, Way::ToDevice);
    let (to, target) = rig.map(&dma, 8 * KIB, Way::FromDevice);
    assert_eq!(copy(&rig, target, source, 8 * KIB), Ok(8 * KIB));
    let flushes = space.statistics().flushes;
    rig.settle();
    dma.unmap_single(target, to.len, Way::FromDevice, NONE).unwrap();
    assert_eq!((space.statistics().flushes, space.statistics().waiting), (flushes, 1));
    assert_eq!(space.domain().iova_to_phys(target), None, "the table says no");
    // The TLB still says yes: that is the trade.
    let data = pattern(5, 8 * KIB);
    rig.put(from.pa, &data);
    assert_eq!(copy(&rig, target, source, 8 * KIB), Ok(8 * KIB));
    assert!(rig.get(to.pa, to.len) == data);
    let (_, other) = rig.map(&dma, 8 * KIB, Way::FromDevice);
    assert_ne!(other, target, "not before the flush");
    // The timer: ten milliseconds, looked at from time to time.
    for _ in 0..3 {
        rig.machine().tracer().advance(6_000_000);
        rig.system.take_interrupts();
    }
    assert_eq!((space.statistics().flushes, space.statistics().waiting), (flushes + 1, 0));
    rig.put(to.pa, &[0x11; 8 * KIB as usize]);
    let ended = copy(&rig, target, source, 8 * KIB);
    assert_eq!(ended, refused(BusAccess::Write, BusResponse::Slave, target));
    assert_eq!(rig.fault().report.iova, target);
    assert!(rig.get(to.pa, to.len).iter().all(|b| *b == 0x11));
    let (_, again) = rig.map(&dma, 8 * KIB, Way::FromDevice);
    assert_eq!(again, target, "now it is free");
    assert_eq!(copy(&rig, again, source, 8 * KIB), Ok(8 * KIB));
}

#[test]
fn many_lazy_unmaps_are_flushed_together() {
    let rig = with_dma(DmaOptions { lazy: true, debug: false });
    let space = rig.core(0).dma().space().unwrap().clone();
    let before = space.statistics().flushes;
    for _ in 0..200 {
        rig.loops(0, 64);
    }
    let flushes = space.statistics().flushes - before;
    // 400 unmaps, of which 200 were of buffers for writing.
    assert!((1..20).contains(&flushes), "{flushes} flushes");
    assert_eq!((space.statistics().failed_flushes, space.statistics().bad_frees), (0, 0));
    rig.no_faults();
}

/// A device of the DMA API on core 0's addresses.
fn device_of(rig: &Rig, untrusted: bool) -> DmaDevice<Memory> {
    let space = rig.core(0).dma().space().unwrap().clone();
    let config = DeviceConfig { untrusted, ..DeviceConfig::default().mask(64) };
    DmaDevice::translated("axidma0", space, rig.memory(), config)
}

#[test]
fn an_untrusted_device_sees_nothing_of_what_shares_a_page_with_its_buffer() {
    const SECRET: u8 = 0x5e;
    for untrusted in [false, true] {
        let rig = Rig::new();
        let dma = device_of(&rig, untrusted);
        let block = rig.memory().alloc(PAGE as usize, PAGE as usize).unwrap();
        rig.put(block.pa, &[SECRET; PAGE as usize]);
        let own = block.pa.wrapping_add(0x400);
        let data = pattern(3, 200);
        rig.put(own, &data);
        rig.memory().clean(block.pa, PAGE as usize);
        let source = dma.map_single(own, 200, Way::ToDevice, NONE).unwrap();
        let (to, target) = rig.map(&dma, PAGE, Way::FromDevice);
        // The engine takes the whole page of its buffer.
        let page = Iova(source.get() & !(PAGE - 1));
        assert_eq!(copy(&rig, target, page, PAGE), Ok(PAGE));
        dma.unmap_single(target, PAGE, Way::FromDevice, NONE).unwrap();
        let seen = rig.get(to.pa, PAGE);
        assert!(seen[0x400..0x400 + 200] == data, "its own buffer is there");
        assert_eq!(seen.contains(&SECRET) && seen[..64] == [SECRET; 64], !untrusted);
        dma.unmap_single(source, 200, Way::ToDevice, NONE).unwrap();
        assert_eq!(dma.bounced_bytes(), 0);
    }
}

#[test]
fn an_untrusted_device_cannot_change_what_shares_a_page_with_its_buffer() {
    for untrusted in [false, true] {
        let rig = Rig::new();
        let dma = device_of(&rig, untrusted);
        let block = rig.memory().alloc(PAGE as usize, PAGE as usize).unwrap();
        rig.put(block.pa, &[0x5e; PAGE as usize]);
        let own = block.pa.wrapping_add(0x400);
        let (from, source) = rig.map(&dma, PAGE, Way::ToDevice);
        let target = dma.map_single(own, 192, Way::FromDevice, NONE).unwrap();
        let page = Iova(target.get() & !(PAGE - 1));
        assert_eq!(copy(&rig, page, source, PAGE), Ok(PAGE));
        dma.unmap_single(target, 192, Way::FromDevice, NONE).unwrap();
        let (seen, data) = (rig.get(block.pa, PAGE), rig.get(from.pa, PAGE));
        assert!(seen[0x400..0x4c0] == data[0x400..0x4c0], "what was written into its buffer came back");
        let around = [&seen[..0x400], &seen[0x4c0..]].concat();
        assert_eq!(around.iter().all(|b| *b == 0x5e), untrusted);
    }
}

/// A rig in debug mode, in which faults of core 0 are told to its device.
fn debugged() -> (Rig, DmaDevice<Memory>) {
    let rig = with_dma(DmaOptions { lazy: false, debug: true });
    let dma = rig.core(0).dma().clone();
    let told = dma.clone();
    let handler = move |report: &FaultReport| {
        told.report_fault(report.iova, report.access == Access::Write);
        FaultResponse::Terminate
    };
    let device = rig.system.device("axidma0").unwrap();
    rig.system.core().set_fault_handler(device, Some(Arc::new(handler))).unwrap();
    assert_eq!(dma.take_reports(), []);
    (rig, dma)
}

#[test]
fn a_fault_is_told_with_the_story_of_its_address() {
    let (rig, dma) = debugged();
    let (_, source) = rig.map(&dma, 4 * KIB, Way::ToDevice);
    let (to, target) = rig.map(&dma, 4 * KIB, Way::FromDevice);
    let misuse = || {
        rig.system.take_interrupts();
        let reports = dma.take_reports();
        let [report] = reports.as_slice() else { panic!("{reports:?}") };
        assert_eq!(&*report.device, "axidma0");
        report.clone()
    };
    let go = |to, from, len| assert!(copy(&rig, to, from, len).is_err());
    // Over the end of the buffer.
    go(target, source, 8 * KIB);
    let report = misuse();
    assert_eq!(
        (report.misuse, report.mapping.unwrap().kind.to_string()),
        (Misuse::Overrun, "a single buffer".into())
    );
    // Against the direction.
    go(source, source.wrapping_add(64), 64);
    let report = misuse();
    assert_eq!((report.misuse, report.iova), (Misuse::WrongAccess { write: true }, source));
    // After the end.
    dma.unmap_single(target, to.len, Way::FromDevice, NONE).unwrap();
    let line = line!() - 1;
    go(target, source, 64);
    let report = misuse();
    assert_eq!((report.misuse, report.iova), (Misuse::UseAfterUnmap, target));
    let mapping = report.mapping.unwrap();
    assert!(mapping.mapped_at.file().ends_with("axidma_rig/mod.rs"), "{report}");
    assert_eq!(mapping.unmapped_at.unwrap().line(), line, "{report}");
    let text = report.to_string();
    assert!(
        text.contains("used by the device after it was unmapped") && text.contains("dma_api.rs"),
        "{text}"
    );
    // From nowhere.
    go(Iova(0x1234_5000), source, 64);
    let report = misuse();
    assert_eq!((report.misuse, report.mapping), (Misuse::WildAccess, None));
    assert_eq!(dma.explain_fault(Iova(0x1234_5000)), Some(FaultStory::Never));
    // A driver that goes leaves the other buffer and the memory of its two rings.
    assert_eq!((dma.mapping_count(), dma.teardown()), (3, 3));
    let left = dma.take_reports();
    assert!(left.iter().all(|r| matches!(r.misuse, Misuse::NotUnmapped { left: 3 })));
    assert!(left.iter().any(|r| r.iova == source));
}

#[test]
fn touching_a_buffer_that_the_device_owns_is_reported_with_both_places() {
    let (rig, dma) = debugged();
    let (to, target) = rig.map(&dma, 4 * KIB, Way::FromDevice);
    dma.read_buffer(to.pa, &mut [0; 16]);
    let line = line!() - 1;
    dma.sync_single_for_cpu(target, to.len, Way::FromDevice).unwrap();
    dma.read_buffer(to.pa, &mut [0; 16]);
    dma.sync_single_for_device(target, to.len, Way::FromDevice).unwrap();
    dma.write_buffer(to.pa.wrapping_add(64), &[1]);
    dma.unmap_single(target, 2 * KIB, Way::Bidirectional, NONE).unwrap();
    dma.unmap_single(target, to.len, Way::FromDevice, NONE).unwrap_err();
    let reports = dma.take_reports();
    let found: Vec<_> = reports.iter().map(|r| r.misuse).collect();
    assert_eq!(
        found,
        [
            Misuse::MissingSync { write: false },
            Misuse::MissingSync { write: true },
            Misuse::WrongSize { given: 2 * KIB },
            Misuse::WrongDirection { given: Way::Bidirectional },
            Misuse::DoubleUnmap,
        ]
    );
    assert_eq!(reports[0].at.unwrap().line(), line);
    assert!(reports[0].mapping.unwrap().mapped_at.file().ends_with("axidma_rig/mod.rs"));
    // All of it is gone, whatever the caller said.
    let (_, source) = rig.map(&dma, 4 * KIB, Way::ToDevice);
    assert!(copy(&rig, target.wrapping_add(3 * KIB), source, 64).is_err());
}

#[test]
fn registers_of_another_device_are_reachable_past_the_smmu_while_they_are_mapped() {
    // The board's bus has memory for engines and nothing else, so what passes the SMMU ends with a decode error.
    let rig = Rig::new();
    let dma = rig.core(0).dma().clone();
    let other = rig.machine().engine("axidma1").unwrap();
    let (_, source) = rig.map(&dma, 64, Way::ToDevice);
    let registers = dma.map_resource(other.base, other.size, Way::FromDevice).unwrap();
    assert_eq!(dma.space().unwrap().domain().iova_to_phys(registers), Some(other.base));
    let ended = copy(&rig, registers, source, 64);
    assert_eq!(ended, refused(BusAccess::Write, BusResponse::Decode, registers));
    rig.no_faults();
    dma.unmap_resource(registers, other.size, Way::FromDevice).unwrap();
    let ended = copy(&rig, registers, source, 64);
    assert_eq!(ended, refused(BusAccess::Write, BusResponse::Slave, registers));
    assert_eq!(rig.fault().report.iova, registers);
}

#[test]
fn a_client_in_the_group_of_a_core_maps_for_the_core() {
    let rig = Rig::new();
    let client = |n: u32| {
        let name = format!("dma-proxy{n}");
        rig.system.os().host().dma_device(&name, rig.system.device(&name), false, 64).unwrap()
    };
    // The proxy's node repeats the stream ids of core 0, so its addresses are the core's.
    let (own, foreign) = (client(0), client(1));
    let (from, source) = rig.map(&own, 4 * KIB, Way::ToDevice);
    let (to, target) = rig.map(&own, 4 * KIB, Way::FromDevice);
    assert_eq!(copy(&rig, target, source, 4 * KIB), Ok(4 * KIB));
    own.unmap_single(target, to.len, Way::FromDevice, NONE).unwrap();
    assert!(rig.get(to.pa, to.len) == rig.get(from.pa, from.len));
    // The other proxy's are core 1's. Below all that core 0 has ever used there is nothing.
    let mut address = Iova(u64::MAX);
    let space = rig.core(0).dma().space().unwrap().clone();
    while space.domain().iova_to_phys(address).is_some() || address.get() == u64::MAX {
        address = rig.map(&foreign, 4 * KIB, Way::FromDevice).1;
    }
    assert_eq!(copy(&rig, address, source, 64), refused(BusAccess::Write, BusResponse::Slave, address));
    assert_eq!(rig.fault().name.as_deref(), Some("axidma0"));
}

/// IOU_INTERCONNECT_ROUTE: which way GEM3 takes.
fn route(rig: &Rig, through_smmu: bool) {
    let (registers, offset) = rig.machine().window_at(Pa(0xff18_0408)).unwrap();
    registers.write32(offset as usize, if through_smmu { 0xff } else { 0 });
}

/// Sends a frame as a network driver does.
fn send_frame(rig: &Rig, frame: &[u8]) -> Result<(), GemError> {
    let nic = rig.system.nic("nic0").unwrap();
    let buffer: Buffer = rig.buffer(2, frame.len() as u64);
    rig.put(buffer.pa, frame);
    let iova = nic.dma.map_single(buffer.pa, buffer.len, Way::ToDevice, NONE).unwrap();
    nic.driver.send(&[(iova, frame.len() as u32)]).unwrap();
    let sent = nic.driver.wait(&rig.clock());
    nic.dma.unmap_single(iova, buffer.len, Way::ToDevice, NONE).unwrap();
    rig.free(buffer);
    sent
}

fn last_frame(rig: &Rig) -> Vec<u8> {
    let EngineKind::Nic(nic) = &rig.machine().engine("nic0").unwrap().engine else { panic!("no nic") };
    nic.lock().unwrap().last_frame().to_vec()
}

#[test]
fn a_network_device_sends_through_the_smmu_if_the_route_register_says_so() {
    for cpu_cache in [false, true] {
        let rig = Rig::booted(description(), cpu_cache, &options());
        // As after reset: I/O virtual addresses on a way where nobody translates.
        assert_eq!(rig.machine().route(), Some(0));
        assert!(matches!(send_frame(&rig, b"lost"), Err(GemError::Bus { .. })));
        rig.no_faults();
        route(&rig, true);
        for frame in [b"hello, network".as_slice(), &pattern(1, 1514)] {
            assert_eq!(send_frame(&rig, frame), Ok(()));
            assert_eq!(last_frame(&rig), frame);
        }
        rig.no_faults();
        assert!(rig.stale().is_empty());
        route(&rig, false);
        assert!(send_frame(&rig, b"lost again").is_err());
    }
}

#[test]
fn a_network_device_without_iommus_must_not_be_routed_through_the_smmu() {
    let mut boot = options();
    boot.streams.insert("nic0".into(), vec![]);
    let rig = Rig::booted(description(), false, &boot);
    assert!(rig.system.nic("nic0").unwrap().dma.space().is_none(), "addresses are physical");
    assert_eq!(send_frame(&rig, b"hello, network"), Ok(()));
    assert_eq!(last_frame(&rig), b"hello, network");
    route(&rig, true);
    assert!(matches!(send_frame(&rig, b"lost"), Err(GemError::Bus { .. })));
    let faults = rig.faults();
    let unknown = |r: &FaultReport| (r.reason, r.stream.map(|s| s.get()));
    assert!(
        faults.iter().all(|f| unknown(&f.report) == (FaultReason::UnknownStream, Some(0x877))),
        "{faults:?}"
    );
    assert!(!faults.is_empty() && faults[0].name.is_none());
}

#[test]
fn a_scatter_list_is_lent_to_the_cpu_and_given_back() {
    let rig = Rig::cached();
    let dma = rig.core(0).dma().clone();
    let pages = rig.memory().alloc(8 * PAGE as usize, PAGE as usize).unwrap();
    // Every other page; the last one in part.
    let entry =
        |n: u64| SgEntry { pa: pages.pa.wrapping_add(2 * n * PAGE), len: if n < 3 { PAGE } else { 1024 } };
    let entries: Vec<SgEntry> = (0..4).map(entry).collect();
    let len = 3 * PAGE + 1024;
    let target = dma.map_sg(&entries, Way::FromDevice, NONE).unwrap();
    assert_eq!((target.len(), target.segments().len()), (len, 1));
    let (from, source) = rig.map(&dma, len, Way::ToDevice);
    for round in 0..3 {
        dma.sync_single_for_cpu(source, len, Way::ToDevice).unwrap();
        let data = pattern(round, len);
        rig.put(from.pa, &data);
        dma.sync_single_for_device(source, len, Way::ToDevice).unwrap();
        assert_eq!(copy(&rig, target.start().unwrap(), source, len), Ok(len));
        dma.sync_sg_for_cpu(&target, Way::FromDevice).unwrap();
        let seen: Vec<u8> = entries.iter().flat_map(|e| rig.get(e.pa, e.len)).collect();
        assert!(seen == data);
        dma.sync_sg_for_device(&target, Way::FromDevice).unwrap();
    }
    assert!(rig.stale().is_empty());
    let start = target.start().unwrap();
    dma.unmap_sg(target, Way::FromDevice, NONE).unwrap();
    assert_eq!(copy(&rig, start, source, KIB), refused(BusAccess::Write, BusResponse::Slave, start));
    assert_eq!(rig.fault().report.iova, start);
}
