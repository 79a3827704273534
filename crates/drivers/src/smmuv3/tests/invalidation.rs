//! What an unmapping makes the SMMU and the devices forget, and in which order.

use portcullis_arch::smmuv3::Command;

use super::*;

const NH_VA: u64 = 0x12;
const S2_IPA: u64 = 0x2a;
const NH_ALL: u64 = 0x10;
const SYNC: (u64, u64) = (0x46, 0);

fn map(domain: &TestDomain, iova: u64, len: u64) {
    domain.map(Iova(iova), Pa(0x9000_0000 + (iova & 0xff_ffff)), len, Prot::RW).unwrap();
}

#[test]
fn a_page_is_one_command_and_a_sync() {
    let rig = rig();
    let domain = rig.stage1();
    map(&domain, 0x7000_0000, 0x4000);
    rig.hardware.take();
    assert_eq!(domain.unmap(Iova(0x7000_1000), 0x1000), Ok(0x1000));
    // A single page as a range of one at level 3: TTL 3, TG 4K, Leaf.
    assert_eq!(rig.hardware.commands(), [(NH_VA | 1 << 48, 0x7000_1000 | 1 << 10 | 3 << 8 | 1), SYNC]);
    assert_eq!(domain.unmap(Iova(0x7000_0000), 0x4000), Ok(0x3000), "holes are not an error");
    assert_eq!(rig.hardware.commands().last(), Some(&SYNC));
}

#[test]
fn a_lazy_unmap_leaves_pages_to_a_flush_of_everything_but_not_tables() {
    let rig = rig();
    let domain = rig.stage1();
    map(&domain, 0x7000_0000, 0x4000);
    rig.hardware.take();
    assert_eq!(domain.unmap_lazy(Iova(0x7000_0000), 0x2000), Ok(0x2000));
    assert_eq!(domain.iova_to_phys(Iova(0x7000_0000)), None);
    assert_eq!(rig.hardware.commands(), []);
    domain.invalidate_all().unwrap();
    assert_eq!(rig.hardware.commands().last(), Some(&SYNC));
    map(&domain, 0x4000_0000, 0x20_0000 - 0x1000);
    map(&domain, 0x401f_f000, 0x1000);
    rig.hardware.take();
    let outstanding = rig.memory.outstanding();
    assert_eq!(domain.unmap_lazy(Iova(0x4000_0000), 0x20_0000), Ok(0x20_0000));
    assert_eq!(rig.memory.outstanding(), outstanding - 1, "the table is freed");
    assert_eq!(rig.hardware.commands().last(), Some(&SYNC), "so nothing may walk it any more");
}

#[test]
fn a_table_is_forgotten_before_it_is_freed() {
    let rig = rig();
    let domain = rig.stage1();
    map(&domain, 0x4000_0000, 0x20_0000 - 0x1000);
    map(&domain, 0x401f_f000, 0x1000);
    assert_eq!(domain.table_count(), 4);
    let memory = rig.memory.clone();
    let outstanding = memory.outstanding();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let watched = seen.clone();
    rig.hardware.inside.lock().watch = Some(alloc::boxed::Box::new(move |_, [first, second]| {
        watched.lock().push((first as u8, second & 1, memory.outstanding()));
    }));
    assert_eq!(domain.unmap(Iova(0x4000_0000), 0x20_0000), Ok(0x20_0000));
    // Not leaf only, and while the table was still there.
    assert_eq!(seen.lock()[0], (0x12, 0, outstanding));
    assert_eq!(rig.memory.outstanding(), outstanding - 1);
}

#[test]
fn without_ranges_pages_go_one_by_one_until_the_address_space_is_cheaper() {
    let ids = [FULL[0], FULL[1], FULL[2] & !(1 << 10), FULL[3]];
    let rig = rig_in(FakeMemory::plain(BASE, BYTES), ids, |_, _| ());
    let domain = rig.stage1();
    map(&domain, 0x7000_0000, 0x3000);
    rig.hardware.take();
    domain.unmap(Iova(0x7000_0000), 0x3000).unwrap();
    let page = |at: u64| (NH_VA | 1 << 48, at | 1);
    assert_eq!(rig.hardware.commands(), [page(0x7000_0000), page(0x7000_1000), page(0x7000_2000), SYNC]);
    // All but one page of a table, then of two.
    for table in 0..2 {
        map(&domain, 0x8000_1000 + table * 0x20_0000, 0x1f_e000);
    }
    rig.hardware.take();
    domain.unmap(Iova(0x8000_1000), 0x1f_e000).unwrap();
    assert_eq!(rig.hardware.commands().len(), 510 + 1);
    map(&domain, 0x8000_1000, 0x1f_f000);
    rig.hardware.take();
    domain.unmap(Iova(0x8000_1000), 0x3f_e000).unwrap();
    let commands = rig.hardware.commands();
    assert_eq!(commands[commands.len() - 2..], [(1 << 48 | 0x11, 0), SYNC]);
    assert_eq!(commands.iter().filter(|(first, _)| *first as u8 == 0x12).count(), 511);
}

#[test]
fn stage_2_below_a_stage_1_takes_the_combined_entries_with_it() {
    let rig = rig();
    let parent = rig.stage2();
    map(&parent, 0x7000_0000, 0x2000);
    rig.hardware.take();
    parent.unmap(Iova(0x7000_0000), 0x1000).unwrap();
    let by_address = (S2_IPA | 1 << 32, 0x7000_0000 | 1 << 10 | 3 << 8 | 1);
    assert_eq!(rig.hardware.commands(), [by_address, SYNC]);
    let nested = rig.domain(DomainConfig::Nested(parent.clone(), Paging::default()));
    rig.hardware.take();
    parent.unmap(Iova(0x7000_1000), 0x1000).unwrap();
    let commands = rig.hardware.commands();
    assert_eq!(commands[1..], [(NH_ALL | 1 << 32, 0), SYNC]);
    // A stage 1 over VMID 1 has both tags.
    nested.invalidate_all().unwrap();
    assert_eq!(rig.hardware.commands(), [(0x11 | 1 << 32 | 1 << 48, 0), SYNC]);
}

#[test]
fn devices_with_translations_are_told_after_the_tlb() {
    let rig = rig();
    let (master, other) = (rig.master(&[5], ATS), rig.master(&[6], MasterOptions::default()));
    let domain = rig.stage1();
    map(&domain, 0x7000_0000, 0x10_0000);
    rig.smmu.attach(&master, &domain).unwrap();
    rig.smmu.attach(&other, &domain).unwrap();
    assert_eq!(field(rig.hardware.look(5, None).0[1], 29, 28), 1, "EATS");
    assert_eq!(field(rig.hardware.look(6, None).0[1], 29, 28), 0, "EATS");
    rig.hardware.take();
    domain.unmap(Iova(0x7000_3000), 0x2000).unwrap();
    let commands = rig.hardware.commands();
    // 0x3000..0x5000 lies in an aligned span of 32 KiB.
    assert_eq!(commands[1..], [SYNC, (5 << 32 | 0x40, 0x7000_0000 | 3), SYNC]);
    domain.invalidate_all().unwrap();
    let all = [(0x11 | 1 << 48, 0), SYNC, (5 << 32 | 0x40, 52), SYNC];
    assert_eq!(rig.hardware.commands(), all);
    // On its way to another domain the device forgets everything, after the entry has changed.
    rig.smmu.attach(&master, &rig.domain(DomainConfig::Blocked)).unwrap();
    let commands = rig.hardware.commands();
    let forgets = commands.iter().position(|command| *command == (5 << 32 | 0x40, 52)).unwrap();
    assert!(
        commands[..forgets].iter().all(|(first, _)| matches!(*first as u8, 0x03 | 0x46)),
        "{commands:x?}"
    );
}

#[test]
fn a_device_behind_two_stages_forgets_everything_when_the_lower_one_changes() {
    let rig = rig();
    let master = rig.master(&[5], ATS);
    let parent = rig.stage2();
    let nested = rig.domain(DomainConfig::Nested(parent.clone(), Paging::default()));
    map(&parent, 0x7000_0000, 0x1000);
    rig.smmu.attach(&master, &nested).unwrap();
    rig.hardware.take();
    parent.unmap(Iova(0x7000_0000), 0x1000).unwrap();
    let commands = rig.hardware.commands();
    assert_eq!(commands[commands.len() - 2..], [(5 << 32 | 0x40, 52), SYNC]);
    rig.smmu.detach(&master).unwrap();
    map(&parent, 0x7000_0000, 0x1000);
    rig.hardware.take();
    parent.unmap(Iova(0x7000_0000), 0x1000).unwrap();
    assert!(rig.hardware.commands().iter().all(|(first, _)| *first as u8 != 0x40));
}

#[test]
fn substreams_are_told_apart_in_devices_too() {
    let rig = rig();
    let master = rig.master(&[5], MasterOptions { substream_bits: 8, ats: true, can_stall: false });
    let (_table, process) = rig.process();
    rig.smmu.attach_substream(&master, SubstreamId(3), &process).unwrap();
    rig.hardware.take();
    process.invalidate(Iova(0x1_2345), 0x10).unwrap();
    let commands = rig.hardware.commands();
    assert_eq!(commands[1..], [SYNC, (5 << 32 | 3 << 12 | 1 << 11 | 0x40, 0x1_2000), SYNC]);
}

#[test]
fn a_guests_invalidations_are_confined() {
    let rig = rig();
    let guest = rig.domain(DomainConfig::Guest(rig.stage2(), GuestSte { dw0: 1 | 5 << 1 | 0x4000, dw1: 2 }));
    let physical = |stream: StreamId| (stream == StreamId(0)).then_some(StreamId(0x42));
    rig.hardware.take();
    let commands = [
        Command([0x30, 0]),
        Command([7 << 48 | 9 << 32 | 0x12 | 1 << 10, 0x5000 | 1]),
        Command([7 << 48 | 0x11, 0]),
        Command([3 << 12 | 0x05, 1]),
        Command([0x06, 0]),
        Command([1 << 11 | 2 << 12 | 0x40, 0x8000 | 1]),
        Command([0x46, 0]),
    ];
    guest.invalidate_for_guest(&commands, physical).unwrap();
    let expected = [
        (1 << 32 | 0x10, 0),
        (7 << 48 | 1 << 32 | 0x12, 0x5000 | 1),
        (7 << 48 | 1 << 32 | 0x11, 0),
        (0x42 << 32 | 3 << 12 | 0x05, 1),
        (0x42 << 32 | 0x06, 0),
        (0x42 << 32 | 1 << 11 | 2 << 12 | 0x40, 0x8000 | 1),
        SYNC,
    ];
    assert_eq!(rig.hardware.commands(), expected);
    // Nothing of a batch with something else in it.
    for (bad, error) in [
        (Command([0x03, 0]), Error::GuestCommand { opcode: 0x03 }),
        (Command([0x28, 0]), Error::GuestCommand { opcode: 0x28 }),
        (Command([0x20, 0]), Error::GuestCommand { opcode: 0x20 }),
        (Command([0x44, 0]), Error::GuestCommand { opcode: 0x44 }),
        (Command([0xff, 0]), Error::GuestCommand { opcode: 0xff }),
        (Command([0x12, 0x5000 | 1 << 10]), Error::GuestCommand { opcode: 0x12 }),
        (Command([1 << 32 | 0x05, 0]), Error::UnknownStream { stream: StreamId(1) }),
    ] {
        assert_eq!(guest.invalidate_for_guest(&[Command([0x30, 0]), bad], physical), Err(error));
        assert!(rig.hardware.commands().is_empty());
    }
    let plain = rig.stage1().invalidate_for_guest(&[], physical);
    assert_eq!(plain, Err(Error::NoContext { kind: DomainKind::Stage1 }));
}
