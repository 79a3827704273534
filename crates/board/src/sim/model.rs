//! Either kind of SMMU, as the board uses it.

use std::sync::Arc;

use portcullis_arch::{Access, Iova};
use portcullis_bus::{Initiator, Mmio, SystemMemory};
use portcullis_smmuv2::SmmuV2;
use portcullis_smmuv3::SmmuV3;

use crate::sim::explanation::Explanation;

/// The model of an SMMU.
#[derive(Clone)]
pub enum SmmuModel {
    /// Architecture version 2.
    V2(Arc<SmmuV2<SystemMemory>>),
    /// Architecture version 3.
    V3(Arc<SmmuV3<SystemMemory>>),
}

impl SmmuModel {
    /// The SMMUv2, if it is one.
    pub fn v2(&self) -> Option<&Arc<SmmuV2<SystemMemory>>> {
        match self {
            Self::V2(model) => Some(model),
            Self::V3(_) => None,
        }
    }

    /// The SMMUv3, if it is one.
    pub fn v3(&self) -> Option<&Arc<SmmuV3<SystemMemory>>> {
        match self {
            Self::V3(model) => Some(model),
            Self::V2(_) => None,
        }
    }

    /// Its registers as non-secure software sees them.
    pub fn window(&self) -> Arc<dyn Mmio> {
        match self {
            Self::V2(model) => Arc::new(model.window(false)),
            Self::V3(model) => Arc::new(model.window(false)),
        }
    }

    /// What a transaction would do now. Nothing is recorded.
    pub fn explain(&self, from: Initiator, va: Iova, access: Access) -> Explanation {
        match self {
            Self::V2(model) => model.explain(from, va, access).into(),
            Self::V3(model) => model.explain(from, va, access).into(),
        }
    }

    /// Puts every register back to its reset value.
    pub fn reset(&self) {
        match self {
            Self::V2(model) => model.reset(),
            Self::V3(model) => model.reset(),
        }
    }

    /// Goes on with what it could not finish at once: a CMD_SYNC that waits for a device.
    pub fn poll(&self) {
        if let Self::V3(model) = self {
            model.poll();
        }
    }
}
