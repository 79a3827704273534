//! What Linux 6.12's arm-smmu-v3 driver does, in its order and with its values: probe, reset, attach, map, unmap, faults,
//! detach, process address spaces, errors and shutdown. The kernel's side is re-told from its behaviour at the level of
//! registers and table words, with literal numbers; nothing of the model is used but its window and its ports.

#[path = "linux/kernel.rs"]
mod kernel;

use kernel::*;
use portcullis_arch::{Attributes, Iova};
use portcullis_bus::{AtcCompletion, AtsPort, DmaFault, PageRequest, PageResponse, StallState};
use portcullis_smmuv3::{Caps, Httu, StallModel};

/// The machines on which everything is replayed: a linear stream table and no ranges, QEMU's part, everything, and
/// everything with a VHE host.
fn machines() -> Vec<Linux> {
    let mut all: Vec<Linux> = [Caps::small(), Caps::qemu_virt(), Caps::full()].map(Linux::boot).into();
    all.push(Linux::boot_vhe(Caps::full()));
    all
}

const SID: u32 = 0x42;

#[test]
fn the_probe_sees_what_it_needs() {
    let m = Linux::new(Caps::qemu_virt());
    let f = m.probe();
    assert!(f.two_level && f.coherent && !f.msi && !f.stalls && !f.ats && !f.pri && !f.hyp && f.range_inv);
    assert_eq!((f.sid_bits, f.ssid_bits, f.oas, f.ias, f.asid_bits), (16, 0, 44, 44, 16));
    assert_eq!(f.pgsizes, 0x1000 | 0x4000 | 0x1_0000 | 1 << 21 | 1 << 25 | 1 << 29 | 1 << 30);
    let m = Linux::new(Caps::full());
    let f = m.probe();
    assert!(f.msi && f.stalls && f.ats && f.pri && f.hyp && f.two_level_cd && f.range_inv && f.attr_types);
    assert_eq!((f.sid_bits, f.ssid_bits, f.oas, f.ias, f.asid_bits), (32, 20, 52, 52, 16));
}

#[test]
fn the_reset_sequence_is_acknowledged_at_every_step() {
    for m in machines() {
        // CR0 as it was left: queues, tables, and ATSCHK and the PRI queue where they are.
        let want = 0xd | if m.f.ats { 1 << 4 } else { 0 } | if m.f.pri { 2 } else { 0 };
        assert_eq!((m.r(CR0), m.r(CR0ACK)), (want, want));
        assert_eq!(m.r(CR1), 0xd75);
        assert_eq!(m.r(CR2), if m.vhe { 3 } else { 2 }, "PTM is RES0 without BTM");
        assert_eq!(m.r(IRQ_CTRLACK), if m.f.pri { 7 } else { 5 });
        assert_eq!(m.r(GERROR), m.r(GERRORN));
        // Three or four commands with a CMD_SYNC each have gone.
        let n = if m.f.hyp { 6 } else { 4 };
        assert_eq!((m.r(CMDQ_PROD), m.r(CMDQ_CONS)), (n, n));
        assert_eq!(m.r64(STRTAB_BASE) & 1 << 62, 1 << 62);
    }
}

#[test]
fn a_firmware_that_left_the_smmu_on_is_blocked_first() {
    let mut m = Linux::new(Caps::qemu_virt());
    m.w32(CR0, 1);
    assert_eq!(m.r(CR0ACK), 1);
    assert!(m.update_gbpa(1 << 20, 0));
    m.reset(false);
    assert_eq!(m.r(GBPA), 0x1000 | 1 << 20);
    // The kernel goes away again: GBPA blocks what the SMMU no longer translates.
    m.disable();
    let mut p = m.port();
    assert!(aborted(read4(&mut p, from(SID), RAM)));
    assert_eq!(m.take_events().0.len(), 0);
}

#[test]
fn streams_are_blocked_until_they_are_attached() {
    for mut m in machines() {
        let mut p = m.port();
        if m.f.two_level {
            // No L2 table yet: C_BAD_STREAMID.
            assert!(aborted(read4(&mut p, from(SID), 0)));
            assert_eq!(m.events(), [[u64::from(SID) << 32 | 0x02, 0, 0, 0]]);
        }
        m.add_master(SID);
        assert!(aborted(read4(&mut p, from(SID), 0)));
        assert_eq!(m.events().len(), 0, "abort STEs are silent");
    }
}

#[test]
fn a_dma_domain_maps_and_unmaps() {
    for mut m in machines() {
        m.add_master(SID);
        let mut d = m.dma_domain();
        m.attach_stage1(SID, &d, |_| {});
        let mut p = m.port();
        let buffer = m.alloc(0x4000, 0x1000);
        m.store(buffer + 8, &[0xfeed_f00d]);
        for n in 0..4 {
            m.map(&mut d, 0xffff_e000 + 0x1000 * n, buffer + 0x1000 * n, 0x1000, true);
        }
        assert_eq!(read4(&mut p, from(SID), 0xffff_e008).unwrap(), 0xfeed_f00d);
        write4(&mut p, from(SID), 0x1_0000_1004, 0x1234).unwrap();
        assert_eq!(m.load(buffer + 0x3000) >> 32, 0x1234);
        // Unmapped, but not told yet: the TLB may answer; told: a fault, and its lines.
        m.unmap(&mut d, SID, 0xffff_e000, 0x4000, 0x1000);
        for n in 0..4 {
            let at = 0xffff_e010 + 0x1000 * n;
            assert!(aborted(read4(&mut p, from(SID), at)));
            assert_eq!(m.events(), [[u64::from(SID) << 32 | 0x10, 1 << 35 | 2 << 40, at, 0]]);
        }
        // A block of 2 MiB, which takes the table that was there away first.
        let block = m.alloc(2 << 20, 2 << 20);
        m.store(block + 0x12_3450, &[77]);
        m.map(&mut d, 0x4000_0000, block, 2 << 20, false);
        assert_eq!(read4(&mut p, from(SID), 0x4012_3450).unwrap(), 77);
        assert!(aborted(write4(&mut p, from(SID), 0x4012_3450, 1)), "read-only");
        assert_eq!(m.events(), [[u64::from(SID) << 32 | 0x13, 2 << 40, 0x4012_3450, 0]]);
        m.unmap(&mut d, SID, 0x4000_0000, 2 << 20, 2 << 20);
        assert!(aborted(read4(&mut p, from(SID), 0x4012_3450)));
        m.events();
        // The upper half: EPD1.
        assert!(aborted(read4(&mut p, from(SID), u64::MAX - 3)));
        assert_eq!(m.events(), [[u64::from(SID) << 32 | 0x10, 1 << 35 | 2 << 40, u64::MAX - 3, 0]]);
        m.assert_quiet();
    }
}

#[test]
fn a_large_unmap_goes_in_batches_with_one_sync() {
    for mut m in machines() {
        m.add_master(SID);
        let mut d = m.dma_domain();
        m.attach_stage1(SID, &d, |_| {});
        let mut p = m.port();
        let buffer = m.alloc(0x1000, 0x1000);
        let pages = 200;
        for n in 0..pages {
            m.map(&mut d, 0x10_0000 + 0x1000 * n, buffer, 0x1000, true);
            assert!(read4(&mut p, from(SID), 0x10_0000 + 0x1000 * n).is_ok());
        }
        let before = m.issued;
        m.unmap(&mut d, SID, 0x10_0000, 0x1000 * pages, 0x1000);
        let sent = m.issued - before;
        assert_eq!(sent, if m.f.range_inv { 1 + 1 } else { pages + 1 }, "commands and one CMD_SYNC");
        for n in 0..pages {
            assert!(aborted(read4(&mut p, from(SID), 0x10_0000 + 0x1000 * n)), "page {n}");
            m.events();
        }
        // The same through a flush of the whole ASID.
        for n in 0..pages {
            m.map(&mut d, 0x10_0000 + 0x1000 * n, buffer, 0x1000, true);
            assert!(read4(&mut p, from(SID), 0x10_0000 + 0x1000 * n).is_ok());
        }
        m.clear_leaves(&mut d, 0x10_0000, 0x1000 * pages, 0x1000);
        m.tlb_flush_asid(&d);
        for n in 0..pages {
            assert!(aborted(read4(&mut p, from(SID), 0x10_0000 + 0x1000 * n)), "page {n}");
            m.events();
        }
        m.assert_quiet();
    }
}

#[test]
fn freeing_a_table_invalidates_what_was_below_it() {
    for mut m in machines() {
        m.add_master(SID);
        let mut d = m.dma_domain();
        m.attach_stage1(SID, &d, |_| {});
        let mut p = m.port();
        let (old, new) = (m.alloc(0x1000, 0x1000), m.alloc(2 << 20, 2 << 20));
        for n in [0u64, 1, 77, 511] {
            m.map(&mut d, 0x20_0000 + 0x1000 * n, old, 0x1000, true);
            assert!(read4(&mut p, from(SID), 0x20_0000 + 0x1000 * n).is_ok());
        }
        // The table goes as a whole: TLBI with Leaf = 0 for 2 MiB, then a block in its place.
        m.unmap_table(&mut d, 0x20_0000);
        for n in [0u64, 1, 77, 511] {
            assert!(aborted(read4(&mut p, from(SID), 0x20_0000 + 0x1000 * n)));
        }
        m.map(&mut d, 0x20_0000, new, 2 << 20, true);
        write4(&mut p, from(SID), 0x20_0000 + 77 * 0x1000, 5).unwrap();
        assert_eq!(m.load(new + 77 * 0x1000) as u32, 5);
        assert_eq!(m.load(old) as u32, 0);
        m.events();
    }
}

/// Every store of an STE update is seen by a DMA: it is as before or as after.
#[test]
fn ste_updates_are_hitless() {
    for mut m in machines() {
        m.add_master(SID);
        let mut d = m.dma_domain();
        let buffer = m.alloc(0x1000, 0x1000);
        m.store(buffer, &[0x600d]);
        m.map(&mut d, buffer, buffer, 0x1000, true);
        let works = |m: &Linux| read4(&mut m.port(), from(SID), buffer);
        // Blocked, then translated: each step is one or the other.
        let mut seen = Vec::new();
        m.attach_stage1(SID, &d, |m| seen.push(works(m).is_ok()));
        assert_eq!(seen.last(), Some(&true));
        assert!(seen.windows(2).all(|w| w[0] <= w[1]), "{seen:?}");
        assert_eq!(m.events().len(), 0, "no step was an error");
        // Translated, then identity, then blocked: DMA to this address works until it is blocked.
        let identity = m.identity_ste();
        seen.clear();
        m.write_ste(SID, identity, |m| seen.push(works(m).is_ok()));
        assert!(seen.iter().all(|works| *works), "{seen:?}");
        seen.clear();
        m.write_ste(SID, [1, 0, 0, 0, 0, 0, 0, 0], |m| seen.push(works(m).is_ok()));
        assert_eq!(seen.last(), Some(&false));
        assert_eq!(m.events().len(), 0);
        m.clear_cd(SID, 0, |_| {});
        m.assert_quiet();
    }
}

#[test]
fn identity_keeps_attributes_and_blocked_is_silent() {
    for mut m in machines() {
        m.add_master(SID);
        let identity = m.identity_ste();
        m.write_ste(SID, identity, |_| {});
        let mut p = m.port();
        let at = m.alloc(0x1000, 0x1000);
        write4(&mut p, from(SID), at, 9).unwrap();
        assert_eq!(m.load(at) as u32, 9);
        let t = p.translate(&from(SID), Iova(at), portcullis_arch::Access::Read).unwrap();
        // SHCFG = incoming where there are overrides, and always without them.
        assert_eq!((t.pa.get(), t.attrs), (at, Attributes::DEVICE_DEFAULT));
        m.write_ste(SID, [1, 0, 0, 0, 0, 0, 0, 0], |_| {});
        assert!(aborted(read4(&mut p, from(SID), at)));
        assert_eq!(m.events().len(), 0);
    }
}

#[test]
fn a_stage_2_domain_has_its_own_tags() {
    let mut m = Linux::boot(Caps::full());
    let (a, b) = (SID, SID + 1);
    m.add_master(a);
    m.add_master(b);
    let mut one = m.stage2_domain(1);
    let mut two = m.stage2_domain(2);
    let (pa, pb) = (m.alloc(0x1000, 0x1000), m.alloc(0x1000, 0x1000));
    m.store(pa, &[0xa]);
    m.store(pb, &[0xb]);
    m.map(&mut one, 0x4000_0000, pa, 0x1000, true);
    m.map(&mut two, 0x4000_0000, pb, 0x1000, false);
    for (sid, d) in [(a, &one), (b, &two)] {
        let ste = m.stage2_ste(d, false);
        m.write_ste(sid, ste, |_| {});
    }
    let mut p = m.port();
    assert_eq!(read4(&mut p, from(a), 0x4000_0000).unwrap(), 0xa);
    assert_eq!(read4(&mut p, from(b), 0x4000_0000).unwrap(), 0xb);
    assert!(aborted(write4(&mut p, from(b), 0x4000_0004, 1)));
    assert_eq!(
        m.events(),
        [[u64::from(b) << 32 | 0x13, 1 << 39 | 2 << 40, 0x4000_0004, 0x4000_0000]],
        "S2 = 1, CLASS = IN, IPA"
    );
    // Unmapped in one VM: S2_IPA for its VMID only.
    m.unmap(&mut one, a, 0x4000_0000, 0x1000, 0x1000);
    assert!(aborted(read4(&mut p, from(a), 0x4000_0ff0)));
    assert_eq!(
        m.events(),
        [[u64::from(a) << 32 | 0x10, 1 << 35 | 1 << 39 | 2 << 40, 0x4000_0ff0, 0x4000_0000]]
    );
    assert_eq!(read4(&mut p, from(b), 0x4000_0000).unwrap(), 0xb);
    let walks = p.stats().walks;
    assert_eq!(read4(&mut p, from(b), 0x4000_0000).unwrap(), 0xb);
    assert_eq!(p.stats().walks, walks, "the other VM's entries are still there");
    m.command([0x28 | 2 << 32, 0]);
    m.sync();
    assert_eq!(read4(&mut p, from(b), 0x4000_0000).unwrap(), 0xb);
    assert!(p.stats().walks > walks, "S12_VMALL took them");
    m.assert_quiet();
}

/// What iommufd gives a guest: its CDs and tables in guest memory, under the host's stage 2.
#[test]
fn a_guest_has_stage_1_under_the_hosts_stage_2() {
    let mut m = Linux::boot(Caps::full());
    m.add_master(SID);
    let mut parent = m.stage2_domain(7);
    // 2 MiB of guest memory at IPA 0x4000_0000.
    let guest = m.alloc(2 << 20, 2 << 20);
    m.map(&mut parent, 0x4000_0000, guest, 2 << 20, true);
    let ipa = |pa: u64| pa - guest + 0x4000_0000;
    let mut d = m.dma_domain_at(guest + 0x10_0000);
    m.store(guest + 0x8000, &[0x90de]);
    m.map(&mut d, 0x1000, guest + 0x8000, 0x1000, true);
    m.rebase(&mut d, ipa);
    let mut words = m.cd_of(&d, false);
    words[1] = ipa(words[1]);
    m.store(guest + 0x4000, &words);
    let mut ste = m.stage2_ste(&parent, true);
    ste[0] = 1 | 7 << 1 | ipa(guest + 0x4000);
    ste[1] |= 1 << 2 | 1 << 4 | 3 << 6 | 1 << 27;
    m.write_ste(SID, ste, |_| {});
    let mut p = m.port();
    assert_eq!(read4(&mut p, from(SID), 0x1000).unwrap(), 0x90de);
    // The guest unmaps: NH_VA with the host's VMID.
    m.clear_leaves(&mut d, 0x1000, 0x1000, 0x1000);
    m.command([0x12 | 7 << 32 | d.asid << 48, 0x1000 | 1]);
    m.sync();
    assert!(aborted(read4(&mut p, from(SID), 0x1000)));
    assert_eq!(m.events(), [[u64::from(SID) << 32 | 0x10, 1 << 35 | 2 << 40, 0x1000, 0]], "a stage 1 fault");
    // The host takes the memory away: S2_IPA and NH_ALL.
    m.map(&mut d, 0x1000, guest + 0x8000, 0x1000, true);
    assert!(aborted(read4(&mut p, from(SID), 0x1000)), "a leaf that names no guest memory");
    let e = m.events();
    assert_eq!((e[0][0] & 0xff, e[0][1] >> 39 & 7), (0x10, 0b101), "S2 = 1, CLASS = IN");
    assert_eq!(e[0][3], guest + 0x8000);
    m.clear_leaves(&mut parent, 0x4000_0000, 2 << 20, 2 << 20);
    m.command([0x2a | 7 << 32, 0x4000_0000]);
    m.command([0x10 | 7 << 32, 0]);
    m.cfgi_cd(SID, 0);
    assert!(aborted(read4(&mut p, from(SID), 0x1000)));
    let e = m.events();
    assert_eq!((e[0][0] & 0xff, e[0][1] >> 39 & 7, e[0][3]), (0x10, 1, ipa(guest + 0x4000)), "CLASS = CD");
}

#[test]
fn processes_share_a_device_by_substream() {
    for ssid_bits in [4u64, 12] {
        for vhe in [false, true] {
            let mut m = if vhe { Linux::boot_vhe(Caps::full()) } else { Linux::boot(Caps::full()) };
            m.add_master_with_ssids(SID, ssid_bits);
            let mut kernel = m.dma_domain();
            m.attach_stage1(SID, &kernel, |_| {});
            let page = m.alloc(0x1000, 0x1000);
            m.store(page, &[0x111]);
            m.map(&mut kernel, 0x7000, page, 0x1000, true);
            let mut p = m.port();
            // Three processes.
            let mut processes = Vec::new();
            for n in 1..=3u32 {
                let ssid = n * 5;
                let mut mm = m.dma_domain();
                let data = m.alloc(0x1000, 0x1000);
                m.store(data, &[0x1000 + u64::from(n)]);
                m.map(&mut mm, 0x7000, data, 0x1000, true);
                let words = m.cd_of(&mm, false);
                m.write_cd(SID, ssid, words, |_| {});
                processes.push((ssid, mm));
            }
            for (n, (ssid, _)) in processes.iter().enumerate() {
                let got = read4(&mut p, with_ssid(SID, *ssid), 0x7000).unwrap();
                assert_eq!(got, 0x1001 + n as u32);
            }
            assert_eq!(read4(&mut p, from(SID), 0x7000).unwrap(), 0x111, "S1DSS = 2: CD 0");
            assert!(aborted(read4(&mut p, with_ssid(SID, 0), 0x7000)));
            assert_eq!(m.events(), [[u64::from(SID) << 32 | 0x06, 0, 0, 0]], "substream 0 is the kernel's");
            assert!(aborted(read4(&mut p, with_ssid(SID, 6), 0x7000)));
            assert_eq!(m.events(), [[u64::from(SID) << 32 | 6 << 12 | 1 << 11 | 0x0a, 0, 0, 0]]);
            assert!(aborted(read4(&mut p, with_ssid(SID, 1 << ssid_bits), 0x7000)));
            assert_eq!(m.events(), [[u64::from(SID) << 32 | 1 << ssid_bits << 12 | 0x08, 0, 0, 0]]);
            // The second exits: EPD0, ASID flushed. Then its CD goes.
            let (ssid, mm) = &processes[1];
            let words = m.released_cd(mm);
            m.write_cd(SID, *ssid, words, |_| {});
            m.tlb_flush_asid(mm);
            assert!(aborted(read4(&mut p, with_ssid(SID, *ssid), 0x7000)));
            assert_eq!(m.events().len(), 0, "R = 0: silent while a process goes away");
            m.clear_cd(SID, *ssid, |_| {});
            assert!(aborted(read4(&mut p, with_ssid(SID, *ssid), 0x7000)));
            assert_eq!(m.events()[0][0] & 0xff, 0x0a);
            for n in [0, 2] {
                assert_eq!(
                    read4(&mut p, with_ssid(SID, processes[n].0), 0x7000).unwrap(),
                    0x1001 + n as u32,
                    "the others go on"
                );
            }
            m.assert_quiet();
        }
    }
}

#[test]
fn a_sync_is_complete_by_cons_and_by_message() {
    for mut m in machines() {
        for by_message in [false, true] {
            if by_message && !m.f.msi {
                continue;
            }
            m.msi_polling = by_message;
            for n in 0..700 {
                m.command([0x30, 0]);
                let slot = m.sync();
                if by_message {
                    assert_eq!(m.load(slot) as u32, 0, "the CMD_SYNC's own first word, round {n}");
                    assert_eq!(m.load(slot) >> 32, 0, "MSIData of the command stays what it was");
                }
            }
        }
        m.assert_quiet();
    }
}

#[test]
fn an_illegal_command_is_replaced_by_a_sync() {
    for mut m in machines() {
        let slot = m.command([0xab, 0x1234]);
        m.command([0x30, 0]);
        let lines = m.gerror_handler();
        let cons = ((slot - m.cmdq) / 16) as u32 | 1 << 24;
        assert_eq!(
            lines,
            [
                "unexpected global error reported (0x00000001), this could be serious".to_string(),
                format!("CMDQ error (cons 0x{cons:08x}): Illegal command"),
                "skipping command in error state:".to_string(),
                "\t0x00000000000000ab".to_string(),
                "\t0x0000000000001234".to_string(),
            ]
        );
        assert_eq!(m.r(CMDQ_CONS) & 0xf_ffff, m.r(CMDQ_PROD), "the queue went on");
        m.sync();
        m.assert_quiet();
    }
}

#[test]
fn a_full_command_queue_frees_itself() {
    let mut m = Linux::boot(Caps::small());
    for _ in 0..4 {
        let batch: Vec<[u64; 2]> = (0..200u64).map(|n| [0x13, n << 12]).collect();
        m.commands(&batch);
        m.sync();
    }
    m.assert_quiet();
}

#[test]
fn event_records_print_as_the_kernel_prints_them() {
    for mut m in machines() {
        m.add_master(SID);
        let d = m.dma_domain();
        m.attach_stage1(SID, &d, |_| {});
        assert!(aborted(write4(&mut m.port(), from(SID), 0xdead_b000, 1)));
        let rises = m.event_interrupts();
        assert_eq!(rises, 1);
        let (lines, overflow) = m.take_events();
        assert_eq!(
            lines,
            [
                "event 0x10 received:",
                "\t0x0000004200000010",
                "\t0x0000020000000000",
                "\t0x00000000deadb000",
                "\t0x0000000000000000",
            ]
        );
        assert!(!overflow);
    }
}

#[test]
fn an_event_queue_overflow_is_seen_once_and_recovers() {
    let mut m = Linux::boot(Caps::small());
    m.add_master(SID);
    let d = m.dma_domain();
    m.attach_stage1(SID, &d, |_| {});
    let mut p = m.port();
    for n in 0..130u64 {
        assert!(aborted(read4(&mut p, from(SID), n << 12)));
    }
    assert_eq!(m.r(EVENTQ_PROD) >> 31, 1);
    assert_eq!(m.event_interrupts(), 1, "empty to non-empty, once");
    let (lines, overflow) = m.take_events();
    assert_eq!((lines.len(), overflow), (5 * 128, true));
    assert_eq!(m.r(EVENTQ_CONS) >> 31, 1, "acknowledged");
    assert!(aborted(read4(&mut p, from(SID), 0x5000)));
    let (lines, overflow) = m.take_events();
    assert_eq!((lines.len(), overflow), (5, false));
    for n in 0..130u64 {
        assert!(aborted(read4(&mut p, from(SID), n << 12)));
    }
    assert_eq!(m.take_events(), (m.last_lines.clone(), true), "the flag turns again");
    m.assert_quiet();
}

#[test]
fn stalled_faults_are_resolved_or_aborted() {
    let mut m = Linux::boot(Caps::full());
    m.add_master(SID);
    m.stall_enabled = true;
    let mut d = m.dma_domain();
    m.attach_stage1(SID, &d, |_| {});
    let mut p = m.port();
    let stalled = |r: Result<u32, portcullis_bus::DmaError>| match r.unwrap_err().fault {
        DmaFault::Stalled(tag) => tag,
        other => panic!("{other:?}"),
    };
    let tag = stalled(read4(&mut p, from(SID), 0x9000));
    let e = m.events();
    assert_eq!(e.len(), 1);
    let stag = e[0][1] & 0xffff;
    assert_eq!(e[0], [u64::from(SID) << 32 | 0x10, 1 << 31 | 1 << 35 | 2 << 40 | stag, 0x9000, 0]);
    use portcullis_bus::DmaPort;
    assert_eq!(p.stall_state(tag), StallState::Waiting);
    let page = m.alloc(0x1000, 0x1000);
    m.store(page, &[0x5151]);
    m.map(&mut d, 0x9000, page, 0x1000, true);
    // IOMMU_PAGE_RESP_SUCCESS: retry, without a CMD_SYNC.
    m.command([0x44 | 1 << 12 | u64::from(SID) << 32, stag]);
    assert_eq!(p.stall_state(tag), StallState::Retry);
    assert_eq!(read4(&mut p, from(SID), 0x9000).unwrap(), 0x5151);
    // Failure: abort.
    let tag = stalled(read4(&mut p, from(SID), 0xa000));
    let stag = m.events()[0][1] & 0xffff;
    m.command([0x44 | 2 << 12 | u64::from(SID) << 32, stag]);
    assert_eq!(p.stall_state(tag), StallState::Terminated { abort: true });
    // A stream that may not stall (S1STALLD, CD.S = 0).
    m.add_master(SID + 1);
    m.stall_enabled = false;
    let other = m.dma_domain();
    m.attach_stage1(SID + 1, &other, |_| {});
    assert!(aborted(read4(&mut p, from(SID + 1), 0x9000)));
    assert_eq!(m.events()[0][1] >> 31 & 1, 0);
    // The kernel goes away with one stalled: aborted.
    let tag = stalled(read4(&mut p, from(SID), 0xb000));
    m.disable();
    assert_eq!(p.stall_state(tag), StallState::Terminated { abort: true });
}

#[test]
fn page_requests_without_a_handler_are_denied() {
    let mut m = Linux::boot(Caps::full());
    m.add_master(SID);
    let device = m.ats_device(SID);
    let d = m.dma_domain();
    m.attach_stage1(SID, &d, |_| {});
    let mut p = m.port();
    let request = |last| PageRequest {
        from: with_ssid(SID, 5),
        addr: Iova(0x1234_5000),
        read: true,
        write: true,
        execute: false,
        privileged: false,
        group: 0x42,
        last,
    };
    p.page_request(request(false));
    p.page_request(request(true));
    let lines = m.priq_thread();
    assert_eq!(
        lines,
        [
            "unexpected PRI request received:",
            "\tsid 0x00000042.0x00005: [66] unprivileged RW access at iova 0x0000000012345000",
            "unexpected PRI request received:",
            "\tsid 0x00000042.0x00005: [66L] unprivileged RW access at iova 0x0000000012345000",
        ]
    );
    let answers = device.answers();
    assert_eq!(answers.len(), 1, "the last of the group is answered");
    assert_eq!((answers[0].group, answers[0].code), (0x42, PageResponse::Failure));
    assert_eq!(answers[0].substream.map(|s| s.get()), Some(5));
    m.assert_quiet();
}

#[test]
fn an_ats_device_is_invalidated_after_the_tlb() {
    let mut m = Linux::boot(Caps::full());
    m.add_master(SID);
    let device = m.ats_device(SID);
    m.ats_enabled = true;
    let mut d = m.dma_domain();
    m.attach_stage1(SID, &d, |_| {});
    let page = m.alloc(0x1000, 0x1000);
    m.map(&mut d, 0x3000, page, 0x1000, true);
    let mut p = m.port();
    let portcullis_bus::AtsReply::Granted(t) = p.translation_request(from(SID), Iova(0x3000), false) else {
        panic!()
    };
    assert_eq!((t.addr, t.size_log2, t.read, t.write), (page, 12, true, true));
    let mut b = [0; 4];
    p.read_translated(from(SID), page, &mut b).unwrap();
    m.unmap(&mut d, SID, 0x3000, 0x1000, 0x1000);
    let what = device.invalidations();
    assert_eq!(what.len(), 1);
    assert_eq!((what[0].addr, what[0].size_log2, what[0].substream), (0x3000, 12, None));
    // Everything of the stream: size 52.
    m.atc_inv(SID, 0, 52);
    assert_eq!(device.invalidations()[0].size_log2, 64);
    // A device that does not answer: the CMD_SYNC waits, then the error, then the queue goes on.
    device.answer(AtcCompletion::Pending);
    m.command([0x40 | u64::from(SID) << 32, 52]);
    let slot = m.command(if m.msi_polling { m.sync_command() } else { [0x46 | 2 << 12, 0] });
    assert_ne!(m.r(CMDQ_CONS) & 0xf_ffff, m.r(CMDQ_PROD), "it waits");
    device.answer(AtcCompletion::TimedOut);
    let lines = m.gerror_handler();
    let cons = ((slot - m.cmdq) / 16) as u32 | 3 << 24;
    assert_eq!(
        lines,
        [
            "unexpected global error reported (0x00000001), this could be serious".to_string(),
            format!("CMDQ error (cons 0x{cons:08x}): ATC invalidate timeout"),
        ]
    );
    assert_eq!(m.r(CMDQ_CONS) & 0xf_ffff, m.r(CMDQ_PROD));
    device.answer(AtcCompletion::Done);
    m.sync();
    m.assert_quiet();
}

#[test]
fn shutdown_leaves_streams_to_gbpa() {
    for mut m in machines() {
        m.add_master(SID);
        let d = m.dma_domain();
        m.attach_stage1(SID, &d, |_| {});
        let mut p = m.port();
        let at = m.alloc(0x1000, 0x1000);
        assert!(aborted(read4(&mut p, from(SID), at)));
        m.disable();
        assert_eq!((m.r(CR0), m.r(CR0ACK)), (0, 0));
        assert!(read4(&mut p, from(SID), at).is_ok(), "GBPA was never told to abort");
        // A kexec'd kernel starts again.
        m.reset(false);
        assert!(aborted(read4(&mut p, from(SID), at)));
    }
}

#[test]
fn parts_that_linux_refuses_are_recognisable() {
    let aarch32 = Caps {
        aarch64: false,
        aarch32: true,
        stt: false,
        httu: Httu::None,
        ds: false,
        va52: false,
        oas_bits: 40,
        ..Caps::full()
    };
    assert_eq!(Linux::new(aarch32).r(IDR0) >> 2 & 3, 1, "no AArch64 table format");
    let forced = Caps { stall_model: StallModel::Forced, ..Caps::full() };
    let m = Linux::boot(forced);
    assert!(m.f.stall_force);
}
