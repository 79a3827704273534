//! The kernel's account of faults against ours: the same faults, in the same order, field by field.

use portcullis_arch::Access;
use portcullis_arch::smmuv2::{Fsr, Fsynr0, Gfsr, Gfsynr0};
use portcullis_arch::smmuv3::EventCode;
use portcullis_board::sim::{Explanation, Machine, SmmuModel, TransactionEvent};
use portcullis_explain::{
    Cause, CauseContext, KernelMessage, Seen, causes, causes_v3, parse_log, story, story_v3,
};
use portcullis_smmuv2::{GlobalFault, Outcome as V2};
use portcullis_smmuv3::{Outcome as V3, Recorded};
use portcullis_walk::FaultKind;

use super::log::{self, Record};

/// A refused transaction, and what we say about it.
#[derive(Clone, Debug)]
pub struct Fault {
    pub transaction: TransactionEvent,
    pub story: String,
    pub causes: Vec<Cause>,
}

impl Fault {
    /// Explains it while the machine is as it was; `None` for a transaction that nobody refused.
    pub fn of(machine: &Machine, t: &TransactionEvent) -> Option<Self> {
        let fault = t.fault.as_ref()?;
        let slot = machine.engine(&t.engine)?;
        let model = &machine.smmu_at(slot.smmu?)?.model;
        let ram: Vec<(u64, u64)> =
            machine.description().memory.iter().map(|m| (m.region.base.get(), m.region.size)).collect();
        let evidence = CauseContext { ram: &ram, cached: fault.cached, ..CauseContext::default() };
        let (story, causes) = match (model, &fault.explanation) {
            (SmmuModel::V2(model), Explanation::V2(e)) => {
                (story(e, fault.cached), causes(model, e, &evidence))
            }
            (SmmuModel::V3(model), Explanation::V3(e)) => {
                (story_v3(e, model.caps(), &Seen::default()), causes_v3(model, e, &evidence))
            }
            _ => return None,
        };
        Some(Self { transaction: t.clone(), story: story.to_string(), causes })
    }

    pub fn explanation(&self) -> &Explanation {
        &self.transaction.fault.as_ref().unwrap().explanation
    }
}

/// One fault as either side tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// An event record of an SMMUv3: its words, without the STAG.
    Event([u64; 4]),
    /// A context fault of an SMMUv2.
    Context {
        bank: u32,
        stream: u32,
        iova: u64,
        access: Access,
        level: u8,
        fsr: u32,
        privileged: bool,
        instruction: bool,
    },
    /// A global fault of an SMMUv2.
    Global { gfsr: u32, stream: u32, access: Access },
}

const STAG: u64 = 0xffff;

/// The faults that the kernel tells of. What it says in several lines has to agree with itself.
pub fn by_kernel(records: &[Record]) -> Vec<Told> {
    let lines = parse_log(&log::text(records));
    let mut told = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let next = |n: usize| lines.get(i + n).map(|l| &l.message);
        match &line.message {
            KernelMessage::EventHead { code } => {
                let Some(KernelMessage::EventRecord { record }) = next(1) else { panic!("{lines:#?}") };
                assert_eq!(record.code(), *code);
            }
            KernelMessage::EventRecord { record } => {
                let [a, b, c, d] = record.0;
                told.push(Told::Event([a, b & !STAG, c, d]));
                // Newer kernels decode it besides.
                if let Some(KernelMessage::Event(decoded)) = next(1) {
                    assert_eq!(decoded.code, Some(record.code()));
                    assert_eq!(decoded.stream, record.stream().get());
                    assert_eq!(decoded.iova, record.address().map(|a| a.get()));
                    assert!(decoded.client.is_some(), "{decoded:?}");
                    let Some(KernelMessage::EventDetail(detail)) = next(2) else { panic!("{lines:#?}") };
                    assert_eq!(Some(detail.read), record.access().map(|a| a == Access::Read));
                    assert_eq!(Some(detail.stage), record.stage());
                    assert_eq!(detail.stall, record.stall().is_some());
                }
            }
            KernelMessage::ContextFault(context) => {
                let record = context.record().unwrap();
                let (fsr, syn) = (Fsr::from_bits(record.fsr), Fsynr0::from_bits(record.fsynr0));
                if let Some(KernelMessage::ContextFsr { fsr, stream }) = next(1) {
                    assert_eq!((*fsr, *stream), (record.fsr, Some(record.stream().get())));
                    assert_eq!(next(2), Some(&KernelMessage::ContextFsynr0 { fsynr0: record.fsynr0 }));
                }
                let access = if syn.wnr() { Access::Write } else { Access::Read };
                told.push(Told::Context {
                    bank: record.bank,
                    stream: record.stream().get(),
                    iova: record.far,
                    access,
                    level: syn.plvl(),
                    fsr: fsr.into_bits(),
                    privileged: syn.pnu(),
                    instruction: syn.ind(),
                });
            }
            KernelMessage::GlobalRegisters(record) => {
                let syn = Gfsynr0::from_bits(record.gfsynr0);
                let access = if syn.wnr() { Access::Write } else { Access::Read };
                if Gfsr::from_bits(record.gfsr).usf() {
                    let before = i.checked_sub(1).and_then(|i| lines.get(i)).map(|l| &l.message);
                    assert_eq!(
                        before,
                        Some(&KernelMessage::UnknownStream { stream: record.gfsynr1 & 0xffff })
                    );
                }
                told.push(Told::Global { gfsr: record.gfsr, stream: record.stream().get(), access });
            }
            _ => {}
        }
    }
    told
}

/// The same faults as our explanations tell them: those that software is told of.
pub fn by_us(faults: &[Fault]) -> Vec<Told> {
    faults.iter().filter_map(|f| told(f.explanation())).collect()
}

fn told(explanation: &Explanation) -> Option<Told> {
    match explanation {
        Explanation::V3(e) => match &e.outcome {
            V3::Event { record, recorded: Recorded::Now | Recorded::Later, .. } => {
                let [a, b, c, d] = record.0;
                Some(Told::Event([a, b & !STAG, c, d]))
            }
            _ => None,
        },
        Explanation::V2(e) => match &e.outcome {
            V2::Fault { fault, incoming } => {
                let kind = match fault.kind {
                    FaultKind::Translation => Fsr::new().with_tf(true),
                    FaultKind::Permission => Fsr::new().with_pf(true),
                    kind => panic!("no test makes {kind:?}"),
                };
                // Format 2: AArch64.
                Some(Told::Context {
                    bank: e.bank.unwrap().index.into(),
                    stream: e.from.stream.get(),
                    iova: e.va.get(),
                    access: e.access,
                    level: u8::try_from(fault.level).unwrap(),
                    fsr: kind.with_format(2).into_bits(),
                    privileged: incoming.privileged(),
                    instruction: incoming.instruction(),
                })
            }
            V2::Global { fault: GlobalFault::UnidentifiedStream, .. } => Some(Told::Global {
                gfsr: Gfsr::new().with_usf(true).into_bits(),
                stream: e.from.stream.get(),
                access: e.access,
            }),
            // The one before is not cleared yet, and only that one is told of (HUPCF=0).
            V2::Blocked { .. } => None,
            other => panic!("no test makes {other:?}"),
        },
    }
}

/// Fails unless both sides tell the same.
pub fn assert_same(records: &[Record], faults: &[Fault]) {
    let (kernel, ours) = (by_kernel(records), by_us(faults));
    assert_eq!(kernel, ours, "the kernel's account (left) and ours");
    for fault in faults {
        let (from, iova) = (fault.explanation().from().stream, fault.explanation().va());
        assert!(fault.story.contains(&format!("{:#x}", iova.get())), "{}", fault.story);
        assert!(fault.story.contains(&format!("stream {:#x}", from.get())), "{}", fault.story);
        assert!(!fault.causes.is_empty(), "nothing to say about {}", fault.story);
    }
}

/// The code of a record that we told of.
pub fn code(told: &Told) -> Option<EventCode> {
    match told {
        Told::Event(words) => EventCode::from_code(words[0] as u8),
        _ => None,
    }
}
