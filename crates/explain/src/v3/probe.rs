//! A copy of an SMMUv3's registers over the same memory, some words of which may be other ones: to try what would be if
//! an STE or a CD said something else.

use std::sync::{Arc, Mutex, PoisonError};

use portcullis_arch::{Access, Attributes, Iova, Pa};
use portcullis_bus::{BusError, Initiator, Memory};
use portcullis_smmuv3::{Caps, Explanation, Outcome, SmmuV3};
use portcullis_walk::{Fault, FaultKind, Rule, Tcu};

use crate::mappings::{Looked, Mappings, scan};
use crate::v3::shape;
use crate::v3::story::steps_of_fault;

type Words = Arc<Mutex<Vec<(u64, u64)>>>;

/// Memory that belongs to somebody else, with changed words. Nothing writes to it: explanations only read.
pub(crate) struct Patched<'a, M> {
    memory: &'a M,
    words: Words,
}

impl<M: Memory> Memory for Patched<'_, M> {
    fn read(&self, pa: Pa, attrs: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        self.memory.read(pa, attrs, buf)
    }
    fn write(&self, _: Pa, _: Attributes, _: &[u8]) -> Result<(), BusError> {
        Err(BusError::Slave)
    }
    fn load64(&self, pa: Pa, attrs: Attributes) -> Result<u64, BusError> {
        let words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        match words.iter().find(|(at, _)| *at == pa.get()) {
            Some((_, value)) => Ok(*value),
            None => self.memory.load64(pa, attrs),
        }
    }
    fn load32(&self, pa: Pa, attrs: Attributes) -> Result<u32, BusError> {
        self.memory.load32(pa, attrs)
    }
    fn cas64(&self, _: Pa, _: Attributes, _: u64, _: u64) -> Result<u64, BusError> {
        Err(BusError::Slave)
    }
}

/// The copy.
pub(crate) struct Probe<'a, M: Memory> {
    smmu: Arc<SmmuV3<Patched<'a, M>>>,
    words: Words,
}

impl<'a, M: Memory> Probe<'a, M> {
    /// `None` only if the model refuses its own capabilities and state.
    pub fn of(smmu: &'a SmmuV3<M>) -> Option<Self> {
        let words = Words::default();
        let memory = Patched { memory: smmu.walker(), words: words.clone() };
        let copy = SmmuV3::builder(smmu.caps().clone()).memory(memory).build().ok()?;
        copy.restore(smmu.save()).ok()?;
        Some(Self { smmu: copy, words })
    }

    pub fn caps(&self) -> &Caps {
        self.smmu.caps()
    }

    /// A word as the table walker sees it.
    pub fn load64(&self, pa: u64) -> Result<u64, BusError> {
        self.smmu.walker().load64(Pa(pa), Attributes::DEVICE_DEFAULT)
    }

    pub fn explain(&self, from: Initiator, va: u64, access: Access) -> Explanation {
        self.smmu.explain(from, Iova(va), access)
    }

    /// What would be if these words of memory were other ones.
    pub fn with(&self, words: &[(u64, u64)], from: Initiator, va: u64, access: Access) -> Explanation {
        let set = |new: Vec<(u64, u64)>| *self.words.lock().unwrap_or_else(PoisonError::into_inner) = new;
        set(words.to_vec());
        let result = self.explain(from, va, access);
        set(Vec::new());
        result
    }

    /// Everything that the tables behind a transaction map in the half of its address.
    pub fn mappings(&self, from: Initiator, near: u64, budget: usize) -> Mappings {
        let first = self.explain(from, near, Access::Read);
        let none = Mappings { complete: true, ..Mappings::default() };
        let stage = if first.cd.is_some() { 1 } else { 2 };
        let configured = first.ste.is_some_and(|(_, s)| s.config().stage1() || s.config().stage2());
        let Some(s) = shape::of_stage(&first, self.caps(), stage).filter(|s| configured && !s.off) else {
            return none;
        };
        let size = 1u128 << s.bits.min(64);
        let region = if s.half == 0 { (0, size) } else { ((1u128 << 64) - size, 1 << 64) };
        scan(region, budget, |at| {
            let e = self.explain(from, at, Access::Read);
            match (leaf(&e), self.hole(&e)) {
                (Some((pa, size_log2)), _) => Looked::Leaf { pa, size_log2 },
                (None, Some(log2)) => Looked::Hole(log2),
                (None, None) => Looked::Nothing,
            }
        })
    }

    /// log2 of the block around the address that faults for the same reason; `None` if the whole space does.
    fn hole(&self, e: &Explanation) -> Option<u8> {
        let Outcome::Event { fault: Some(fault), .. } = &e.outcome else { return None };
        if e.walk.is_empty() {
            return None;
        }
        if fault.stage == 2 && e.cd.is_some() {
            // Two sizes overlap; a page is always right.
            return Some(12);
        }
        Some(shape::of_stage(e, self.caps(), fault.stage)?.entry_log2(fault.level))
    }
}

/// Where the tables lead, whether or not they allow it: output address of the byte and log2 of the page.
pub(crate) fn leaf(e: &Explanation) -> Option<(u64, u8)> {
    match &e.outcome {
        Outcome::Translated { walked, .. } if !e.walk.is_empty() => Some((walked.pa, walked.size_log2)),
        Outcome::Event { fault: Some(fault), .. } if is_leaf_fault(e, fault) => {
            let input = if fault.stage == 2 { fault.ipa } else { e.va.get() };
            let stage1 = e.walk.iter().rev().find(|s| s.stage == 1).map(|s| s.rule);
            let leaf = steps_of_fault(e, fault).into_iter().rev().find_map(|s| match s.rule {
                Rule::Leaf { output, size_log2 } => Some((output, size_log2)),
                _ => None,
            });
            let (output, size_log2) = leaf?;
            let size_log2 = match stage1 {
                Some(Rule::Leaf { size_log2: first, .. }) if fault.stage == 2 => size_log2.min(first),
                _ => size_log2,
            };
            Some((output | input & ((1 << size_log2.min(63)) - 1), size_log2))
        }
        _ => None,
    }
}

fn is_leaf_fault(e: &Explanation, fault: &Fault) -> bool {
    matches!(fault.kind, FaultKind::Permission | FaultKind::AccessFlag)
        && !fault.on_stage1_walk
        && !e.walk.is_empty()
}
