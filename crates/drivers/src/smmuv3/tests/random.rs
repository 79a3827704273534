//! Random attaches, detaches, exits and ends, in every kind of memory: after each step the SMMU, with all it has cached,
//! must see what was asked for and nothing else.

use alloc::collections::BTreeMap;

use super::*;

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % n
    }
}

/// What a stream is expected to meet.
#[derive(Clone, Default)]
struct Expected {
    main: Option<Arc<TestDomain>>,
    substreams: BTreeMap<u32, Arc<TestDomain>>,
}

const STREAMS: [(u32, MasterOptions); 4] = [
    (0x0001, MasterOptions { substream_bits: 0, can_stall: false, ats: false }),
    (0x0100, MasterOptions { substream_bits: 4, can_stall: true, ats: false }),
    (0x2002, MasterOptions { substream_bits: 16, can_stall: false, ats: true }),
    (0xffff, MasterOptions { substream_bits: 0, can_stall: true, ats: false }),
];
const SUBSTREAM_IDS: [u32; 4] = [1, 2, 7, 0x400];

fn stage1_is(cd: &Words, domain: &TestDomain, stopped: bool) -> bool {
    let root = domain.table_root().unwrap();
    let ends = (cd[0] >> 14 & 1 != 0, ttb0(cd));
    let expected = if stopped { (true, 0) } else { (false, root.ttbr0.get()) };
    cd[0] >> 31 & 1 != 0 && ends == expected && asid(cd) == u64::from(domain.asid().unwrap().get())
}

fn run(rig: Rig, seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let masters: Vec<Master> = STREAMS.iter().map(|(id, options)| rig.master(&[*id], *options)).collect();
    let parent = rig.stage2();
    let mut domains: Vec<Arc<TestDomain>> = Vec::new();
    let mut tables = Vec::new();
    let mut stopped: Vec<*const TestDomain> = Vec::new();
    let mut expected = vec![Expected::default(); STREAMS.len()];
    for _ in 0..150 {
        let which = random.below(STREAMS.len());
        let (stream, options) = STREAMS[which];
        let master = &masters[which];
        match random.below(10) {
            0 | 1 => domains.push(match random.below(7) {
                0 => rig.domain(DomainConfig::Blocked),
                1 => rig.domain(DomainConfig::Identity),
                2 => rig.stage2(),
                3 => rig.domain(DomainConfig::Nested(parent.clone(), Paging::default())),
                4 => rig.stalling(),
                5 => {
                    let (table, domain) = rig.process();
                    tables.push(table);
                    domain
                }
                _ => rig.stage1(),
            }),
            2..=4 if !domains.is_empty() => {
                let domain = domains[random.below(domains.len())].clone();
                let translated = domain.kind() == DomainKind::Stage2 || domain.kind() == DomainKind::Nested;
                let result = rig.smmu.attach(master, &domain);
                if translated && !expected[which].substreams.is_empty() {
                    assert!(matches!(result, Err(Error::SubstreamsBelow { .. })));
                } else {
                    result.unwrap();
                    expected[which].main = Some(domain);
                }
            }
            5 => {
                rig.smmu.detach(master).unwrap();
                expected[which].main = None;
            }
            6 | 7 if !domains.is_empty() && options.substream_bits > 0 => {
                let substream = SUBSTREAM_IDS[random.below(SUBSTREAM_IDS.len())];
                let domain = domains[random.below(domains.len())].clone();
                let result = rig.smmu.attach_substream(master, SubstreamId(substream), &domain);
                let main = expected[which].main.as_ref().map(|main| main.kind());
                let possible = matches!(domain.kind(), DomainKind::Stage1 | DomainKind::Process)
                    && !matches!(main, Some(DomainKind::Stage2 | DomainKind::Nested))
                    && substream >> options.substream_bits == 0;
                assert_eq!(result.is_ok(), possible, "{result:?}");
                if possible {
                    expected[which].substreams.insert(substream, domain);
                }
            }
            8 => {
                let substream = SUBSTREAM_IDS[random.below(SUBSTREAM_IDS.len())];
                rig.smmu.detach_substream(master, SubstreamId(substream)).unwrap();
                expected[which].substreams.remove(&substream);
            }
            9 if !domains.is_empty() => {
                let index = random.below(domains.len());
                if random.below(2) == 0 && domains[index].kind() == DomainKind::Process {
                    domains[index].stop_walks().unwrap();
                    stopped.push(Arc::as_ptr(&domains[index]));
                } else {
                    // The last reference goes: everything that uses it is blocked.
                    let domain = domains.swap_remove(index);
                    for other in &mut expected {
                        other.main.take_if(|main| Arc::ptr_eq(main, &domain));
                        other.substreams.retain(|_, substream| !Arc::ptr_eq(substream, &domain));
                    }
                    stopped.retain(|other| *other != Arc::as_ptr(&domain));
                }
            }
            _ => {}
        }
        // Two of three streams are looked at, so that caches are of different ages.
        for (which, (stream, options)) in STREAMS.iter().enumerate() {
            if random.below(3) == 0 {
                continue;
            }
            let Expected { main, substreams } = &expected[which];
            let (ste, cd) = rig.hardware.look(*stream, None);
            assert_eq!(ste[0] & 1, 1, "an entry is never left invalid");
            let kind = main.as_ref().map_or(DomainKind::Blocked, |main| main.kind());
            let s1dss = ste[1] & 3;
            let found = match (config(&ste), kind) {
                (0, DomainKind::Blocked) => substreams.is_empty(),
                (5, DomainKind::Blocked) => s1dss == 0 && !substreams.is_empty(),
                (4, DomainKind::Identity) => substreams.is_empty(),
                (5, DomainKind::Identity) => s1dss == 1 && !substreams.is_empty(),
                (5, DomainKind::Stage1 | DomainKind::Process) | (7, DomainKind::Nested) => {
                    let main = main.as_ref().unwrap();
                    s1dss == 2 && stage1_is(&cd, main, stopped.contains(&Arc::as_ptr(main)))
                }
                (6, DomainKind::Stage2) => {
                    Some(Vmid(ste[2] as u16)) == main.as_ref().and_then(|main| main.vmid())
                }
                _ => false,
            };
            assert!(found, "stream {stream:#x} has a {kind} domain and {ste:x?} {cd:x?}");
            for substream in SUBSTREAM_IDS.iter().filter(|id| **id >> options.substream_bits == 0) {
                let (_, cd) = rig.hardware.look(*stream, Some(*substream));
                match substreams.get(substream) {
                    Some(domain) => {
                        let stopped = stopped.contains(&Arc::as_ptr(domain));
                        assert!(stage1_is(&cd, domain, stopped), "{stream:#x}/{substream}: {cd:x?}");
                    }
                    None => assert_eq!(cd, [0; 8], "{stream:#x}/{substream}"),
                }
            }
        }
        let _ = stream;
    }
    drop((domains, expected));
    for master in masters {
        rig.smmu.remove_master(master).unwrap();
    }
    drop((parent, tables));
    rig.end();
}

#[test]
fn whatever_the_order_the_smmu_sees_what_was_asked_for() {
    for seed in 0..8 {
        let memories = [
            (FakeMemory::plain(BASE, BYTES), COHACC),
            (FakeMemory::reordering(BASE, BYTES, seed), COHACC),
            (FakeMemory::non_coherent(BASE, BYTES), 0),
            (FakeMemory::non_coherent_reordering(BASE, BYTES, seed), 0),
        ];
        for (memory, cohacc) in memories {
            let ids = [FULL[0] & !COHACC | cohacc, FULL[1], FULL[2], FULL[3]];
            run(rig_in(memory, ids, |_, _| ()), seed);
        }
    }
}
