//! The story of a translation by either kind of SMMU.

use portcullis_arch::{Access, Attributes, Iova};
use portcullis_bus::Initiator;
use portcullis_walk::Walked;

/// What a transaction would do, as the SMMU in front of it explains it.
#[derive(Clone, Debug, PartialEq)]
pub enum Explanation {
    /// By an SMMUv2.
    V2(Box<portcullis_smmuv2::Explanation>),
    /// By an SMMUv3.
    V3(Box<portcullis_smmuv3::Explanation>),
}

impl Explanation {
    /// Who asks.
    pub fn from(&self) -> Initiator {
        match self {
            Self::V2(e) => e.from,
            Self::V3(e) => e.from,
        }
    }

    /// For which address.
    pub fn va(&self) -> Iova {
        match self {
            Self::V2(e) => e.va,
            Self::V3(e) => e.va,
        }
    }

    /// Read or write.
    pub fn access(&self) -> Access {
        match self {
            Self::V2(e) => e.access,
            Self::V3(e) => e.access,
        }
    }

    /// The SMMUv2's story.
    pub fn v2(&self) -> Option<&portcullis_smmuv2::Explanation> {
        match self {
            Self::V2(e) => Some(e),
            Self::V3(_) => None,
        }
    }

    /// The SMMUv3's story.
    pub fn v3(&self) -> Option<&portcullis_smmuv3::Explanation> {
        match self {
            Self::V3(e) => Some(e),
            Self::V2(_) => None,
        }
    }

    /// The result of the tables, if there is one.
    pub fn walked(&self) -> Option<&Walked> {
        match self {
            Self::V2(e) => match &e.outcome {
                portcullis_smmuv2::Outcome::Translated { walked, .. } => Some(walked),
                _ => None,
            },
            Self::V3(e) => match &e.outcome {
                portcullis_smmuv3::Outcome::Translated { walked, .. } => Some(walked),
                _ => None,
            },
        }
    }

    /// Where it goes, if it goes through: translated or not.
    pub fn output(&self) -> Option<u64> {
        match self {
            Self::V2(e) => match &e.outcome {
                portcullis_smmuv2::Outcome::Translated { walked, .. } => Some(walked.pa),
                portcullis_smmuv2::Outcome::Bypass { pa, .. } => Some(pa.get()),
                _ => None,
            },
            Self::V3(e) => match &e.outcome {
                portcullis_smmuv3::Outcome::Translated { walked, .. } => Some(walked.pa),
                portcullis_smmuv3::Outcome::Bypass { pa, .. } => Some(pa.get()),
                _ => None,
            },
        }
    }

    /// The attributes with which tables, or a TLB that still holds something, are asked.
    pub fn incoming(&self) -> Option<Attributes> {
        match self {
            Self::V2(e) => match &e.outcome {
                portcullis_smmuv2::Outcome::Translated { incoming, .. }
                | portcullis_smmuv2::Outcome::Fault { incoming, .. } => Some(*incoming),
                _ => None,
            },
            Self::V3(e) => Some(match &e.outcome {
                portcullis_smmuv3::Outcome::Translated { incoming, .. } => *incoming,
                // The record shows privilege and instruction as the overrides left them.
                portcullis_smmuv3::Outcome::Event { record, fault: Some(_), .. } => {
                    let dw1 = record.dw1();
                    e.from.attrs.with_privileged(dw1.pnu()).with_instruction(dw1.ind())
                }
                // The stream table says that no table is asked. A port that was not told of it asks nevertheless.
                _ => e.from.attrs,
            }),
        }
    }

    /// True for a refusal, or a passage that nobody asked for.
    pub fn is_fault(&self) -> bool {
        match self {
            Self::V2(e) => {
                use portcullis_smmuv2::{BypassReason, Outcome};
                match &e.outcome {
                    Outcome::Translated { .. } => false,
                    Outcome::Bypass { reason, .. } => {
                        matches!(reason, BypassReason::Unmatched | BypassReason::Conflict)
                    }
                    _ => true,
                }
            }
            Self::V3(e) => {
                use portcullis_smmuv3::Outcome;
                !matches!(e.outcome, Outcome::Translated { .. } | Outcome::Bypass { .. })
            }
        }
    }
}

impl From<portcullis_smmuv2::Explanation> for Explanation {
    fn from(e: portcullis_smmuv2::Explanation) -> Self {
        Self::V2(Box::new(e))
    }
}

impl From<portcullis_smmuv3::Explanation> for Explanation {
    fn from(e: portcullis_smmuv3::Explanation) -> Self {
        Self::V3(Box::new(e))
    }
}
