//! Attributes: the overrides of STE and GBPA, and those of the SMMU's own table accesses (IHI 0070 section 13.1).

use portcullis_arch::Attributes;
use portcullis_arch::attrs::{Allocate, MemoryType, Shareability};
use portcullis_arch::smmuv3::regs::{Cr1, Gbpa};
use portcullis_arch::smmuv3::ste::SteDw1;

use crate::caps::Caps;

/// The override fields that STE and GBPA share, with those that this implementation lacks set to "use incoming".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Overrides {
    /// MemAttr, if MTCFG.
    memory: Option<u8>,
    /// 0 non-shareable, 1 incoming, 2 outer, 3 inner.
    shcfg: u8,
    /// 0xxx incoming, 1RWT.
    alloccfg: u8,
    /// 0 and 1 incoming, 2 secure, 3 non-secure.
    nscfg: u8,
    /// 0 and 1 incoming, 2 unprivileged, 3 privileged.
    privcfg: u8,
    /// 0 and 1 incoming, 2 data, 3 instruction.
    instcfg: u8,
}

impl Overrides {
    /// Everything as it comes in.
    pub const NONE: Self = Self { memory: None, shcfg: 1, alloccfg: 0, nscfg: 0, privcfg: 0, instcfg: 0 };

    /// Those of an STE.
    pub fn of_ste(caps: &Caps, secure: bool, d: SteDw1) -> Self {
        Self {
            memory: d.mtcfg().then_some(d.memattr()),
            shcfg: d.shcfg(),
            alloccfg: d.alloccfg(),
            nscfg: d.nscfg(),
            privcfg: d.privcfg(),
            instcfg: d.instcfg(),
        }
        .supported(caps, secure)
    }

    /// Those of GBPA.
    pub fn of_gbpa(caps: &Caps, secure: bool, g: Gbpa) -> Self {
        Self {
            memory: g.mtcfg().then_some(g.memattr()),
            shcfg: g.shcfg(),
            alloccfg: g.alloccfg(),
            nscfg: g.nscfg(),
            privcfg: g.privcfg(),
            instcfg: g.instcfg(),
        }
        .supported(caps, secure)
    }

    fn supported(self, caps: &Caps, secure: bool) -> Self {
        let (types, perms) = (caps.attr_types_override, caps.attr_perms_override);
        let none = Self::NONE;
        Self {
            memory: self.memory.filter(|_| types),
            shcfg: if types { self.shcfg } else { none.shcfg },
            alloccfg: if types { self.alloccfg } else { none.alloccfg },
            nscfg: if perms && secure { self.nscfg } else { none.nscfg },
            privcfg: if perms { self.privcfg } else { none.privcfg },
            instcfg: if perms { self.instcfg } else { none.instcfg },
        }
    }

    /// What INSTCFG makes of reads: `None` as they come in, or instruction (true) or data.
    pub fn instruction(&self) -> Option<bool> {
        match self.instcfg {
            2 => Some(false),
            3 => Some(true),
            _ => None,
        }
    }

    /// PRIVCFG and INSTCFG alone: what counts where stage 1 translates.
    pub fn permissions(&self, a: Attributes) -> Attributes {
        let a = match self.privcfg {
            2 => a.with_privileged(false),
            3 => a.with_privileged(true),
            _ => a,
        };
        match self.instcfg {
            2 => a.with_instruction(false),
            3 => a.with_instruction(true),
            _ => a,
        }
    }

    /// All of them, made consistent.
    pub fn apply(&self, a: Attributes) -> Attributes {
        let mut a = self.permissions(a);
        if let Some(code) = self.memory {
            let came_cacheable = a.memory().is_cacheable();
            a = a.with_memory(MemoryType::from_code(code));
            if !came_cacheable && a.memory().is_cacheable() {
                // No hints came with the type that came in: these are the ones to assume.
                a = hints(a, true, true, false);
            }
        }
        match self.shcfg {
            0 => a = a.with_shareability(Shareability::Non),
            2 => a = a.with_shareability(Shareability::Outer),
            3 => a = a.with_shareability(Shareability::Inner),
            _ => {}
        }
        if self.alloccfg & 8 != 0 {
            let bit = |n: u8| self.alloccfg >> n & 1 != 0;
            a = hints(a, bit(2), bit(1), bit(0));
        }
        match self.nscfg {
            2 => a = a.with_non_secure(false),
            3 => a = a.with_non_secure(true),
            _ => {}
        }
        if !a.memory().is_cacheable() {
            a = a.with_transient(0);
        }
        a.consistent()
    }
}

fn hints(a: Attributes, read: bool, write: bool, transient: bool) -> Attributes {
    let hint = |yes| if yes { Allocate::Yes } else { Allocate::No };
    a.with_read_allocate(hint(read)).with_write_allocate(hint(write)).with_transient(if transient {
        3
    } else {
        2
    })
}

/// The attributes of an access to a configuration table. Cacheabilities are 1 NC, 2 WT, 3 WB; shareability 1 acts as 0.
fn table(outer: u8, inner: u8, sh: u8, allocate: bool, secure: bool) -> Attributes {
    let sh = if sh == 1 { Shareability::Non } else { Shareability::from_code(sh) };
    Attributes::from_bits(0)
        .with_memory(MemoryType::normal(outer, inner))
        .with_shareability(sh)
        .with_read_allocate(if allocate { Allocate::Yes } else { Allocate::No })
        .with_non_secure(!secure)
        .consistent()
}

/// Of stream table accesses: CR1.TABLE_* and STRTAB_BASE.RA.
pub(crate) fn stream_table(cr1: Cr1, allocate: bool, secure: bool) -> Attributes {
    const TYPE: [u8; 4] = [1, 3, 2, 1];
    let code = |c: u8| TYPE[usize::from(c & 3)];
    table(code(cr1.table_oc()), code(cr1.table_ic()), cr1.table_sh(), allocate, secure)
}

/// Of CD and L1CD accesses: STE.S1CIR, S1COR and S1CSH.
pub(crate) fn cd_table(d: SteDw1, secure: bool) -> Attributes {
    const TYPE: [u8; 4] = [1, 3, 2, 3];
    let code = |c: u8| TYPE[usize::from(c & 3)];
    table(code(d.s1cor()), code(d.s1cir()), d.s1csh(), matches!(d.s1cir(), 1 | 2), secure)
}
