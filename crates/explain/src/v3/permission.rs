//! Which bit of which descriptor or register forbids an access, by the rules of IHI 0070 and DDI 0487 D8.4 (compare
//! `portcullis-walk`, which says only that it is forbidden).

use portcullis_arch::smmuv3::SteConfig;
use portcullis_arch::vmsa::long;
use portcullis_arch::{Access, Attributes};
use portcullis_smmuv3::{Explanation, Outcome};
use portcullis_walk::{AccessKind, Fault, Rule, Step, TableFormat};

use crate::permission::{Forbidden, Why, place};
use crate::v3::shape;
use crate::v3::story::steps_of_fault;

/// The attributes that count: after the overrides of the STE, as the event record shows them.
pub(crate) fn incoming(e: &Explanation) -> Attributes {
    match &e.outcome {
        Outcome::Event { record, .. } => {
            let dw1 = record.dw1();
            e.from.attrs.with_privileged(dw1.pnu()).with_instruction(dw1.ind())
        }
        Outcome::Translated { incoming, .. } => *incoming,
        _ => e.from.attrs,
    }
}

/// EL2 without E2H, and EL3: one privilege.
fn single_privilege(e: &Explanation) -> bool {
    e.ste.is_some_and(|(_, s)| {
        s.config() == SteConfig::Stage1 && (if e.secure { s.dw1().strw() == 1 } else { s.dw1().strw() == 2 })
    })
}

/// The reasons of a permission fault, the most specific first; never empty.
pub(crate) fn forbidden(e: &Explanation, fault: &Fault) -> Vec<Forbidden> {
    let steps = steps_of_fault(e, fault);
    let attrs = incoming(e);
    let mut found = Vec::new();
    // A leaf may be followed by its update.
    let leaf = steps.iter().rev().find(|s| matches!(s.rule, Rule::Leaf { .. } | Rule::Update { .. }));
    if let Some(leaf) = leaf {
        let tables: Vec<&Step> =
            steps.iter().filter(|s| matches!(s.rule, Rule::Table { .. })).copied().collect();
        if fault.stage == 2 {
            let table = fault.on_stage1_walk;
            let access = if table && fault.write {
                AccessKind::new(Access::Write, Attributes::DEVICE_DEFAULT)
            } else if table || e.cd.is_none() {
                AccessKind::new(Access::Read, Attributes::DEVICE_DEFAULT)
            } else {
                AccessKind::new(e.access, attrs)
            };
            stage2(leaf, e, fault, (access, attrs.privileged()), &mut found);
        } else {
            stage1(leaf, &tables, e, attrs, &mut found);
        }
    }
    if found.is_empty() {
        let bit = "S_CR0.SIF = 1: a secure instruction fetch may not come from non-secure memory".into();
        found.push(Forbidden { why: Why::Secure, bit });
    }
    found
}

fn stage1(leaf: &Step, tables: &[&Step], e: &Explanation, attrs: Attributes, found: &mut Vec<Forbidden>) {
    let Some(cd) = e.cd.map(|(_, c)| c) else { return };
    let (kind, privileged) = (AccessKind::new(e.access, attrs), attrs.privileged());
    let single = single_privilege(e);
    let d = cd.dw0();
    let half = shape::selected(&cd, e.va.get());
    let flat = [cd.dw1().had0(), cd.dw2().had1()][half];
    let aa64 = shape::tables(e, leaf).format == TableFormat::Aarch64;
    let what = if leaf.level == 3 { "page" } else { "block" };
    let mut check = |why, mask: u64, want: bool, text: &str| {
        if (leaf.value & mask != 0) == want {
            found.push(Forbidden { why, bit: format!("{text} in {}", place(leaf, what)) });
        }
    };
    // A clean page that hardware may make writable is no obstacle by itself.
    let dirty = aa64 && d.ha() && d.hd() && leaf.value >> 51 & 1 != 0;
    let write = kind.is_write();
    if write && !dirty {
        check(Why::ReadOnly, long::AP_READ_ONLY, true, "AP[2] = 1 (read-only)");
    }
    if !privileged && !single && (!kind.is_fetch() || !aa64) {
        check(Why::PrivilegedOnly, long::AP_UNPRIVILEGED, false, "AP[1] = 0 (no unprivileged access)");
    }
    if kind.is_fetch() {
        if !privileged || single || !aa64 {
            check(Why::ExecuteNever, long::UXN, true, "UXN = 1 (execute never)");
        }
        if privileged && !single {
            check(Why::ExecuteNever, long::PXN, true, "PXN = 1 (privileged execute never)");
        }
    } else if d.pan() && privileged && !single {
        check(
            Why::PrivilegedAccessNever,
            long::AP_UNPRIVILEGED,
            true,
            "CD.PAN = 1, and AP[1] = 1 (open to unprivileged accesses)",
        );
    }
    let above = |mask: u64| !flat && tables.iter().any(|t| t.value & mask != 0);
    if kind.is_fetch() {
        let writable = leaf.value & long::AP_READ_ONLY == 0 && !above(long::AP_TABLE_READ_ONLY);
        let user = leaf.value & long::AP_UNPRIVILEGED != 0 && !above(long::AP_TABLE_PRIVILEGED);
        let by_user = writable && user && !single;
        let bit = if d.wxn() && writable {
            Some("CD.WXN = 1: writable memory is execute never")
        } else if by_user && privileged && aa64 {
            Some("AP[2:1] = 0b01: what unprivileged accesses can write is privileged execute never")
        } else if by_user && privileged && d.uwxn() {
            Some("CD.UWXN = 1: memory that unprivileged accesses can write is execute never")
        } else {
            None
        };
        found.extend(bit.map(|b| Forbidden { why: Why::WritableExecuteNever, bit: b.into() }));
    }
    if flat {
        return;
    }
    let mut above = |why, mask: u64, text: &str| {
        if let Some(t) = tables.iter().find(|t| t.value & mask != 0) {
            found.push(Forbidden { why, bit: format!("{text} in {}", place(t, "table")) });
        }
    };
    if write {
        above(Why::ReadOnly, long::AP_TABLE_READ_ONLY, "APTable[1] = 1 (read-only below)");
    }
    if !privileged && !single && (!kind.is_fetch() || !aa64) {
        above(
            Why::PrivilegedOnly,
            long::AP_TABLE_PRIVILEGED,
            "APTable[0] = 1 (no unprivileged access below)",
        );
    }
    if kind.is_fetch() {
        if !privileged || single || !aa64 {
            above(Why::ExecuteNever, long::UXN_TABLE, "UXNTable = 1 (execute never below)");
        }
        if privileged && !single {
            above(Why::ExecuteNever, long::PXN_TABLE, "PXNTable = 1 (privileged execute never below)");
        }
    }
}

fn stage2(
    leaf: &Step,
    e: &Explanation,
    fault: &Fault,
    (kind, privileged): (AccessKind, bool),
    found: &mut Vec<Forbidden>,
) {
    let at = place(leaf, if leaf.level == 3 { "page" } else { "block" });
    let (read, write) = (leaf.value & long::S2AP_READ != 0, leaf.value & long::S2AP_WRITE != 0);
    let mut push = |why, text: &str| found.push(Forbidden { why, bit: format!("{text} in stage 2's {at}") });
    if kind.is_write() && !write {
        push(Why::ReadOnly, "S2AP[1] = 0 (no writes)");
    }
    if !kind.is_write() && !kind.is_fetch() && !read {
        push(Why::WriteOnly, "S2AP[0] = 0 (no reads)");
    }
    if kind.is_fetch() {
        match leaf.value >> 53 & 3 {
            0 => {}
            1 if !privileged => {}
            3 if privileged => {}
            code => {
                push(Why::ExecuteNever, &format!("XN[1:0] = {code:#04b} (not executable at this privilege)"))
            }
        }
    }
    let protected = e.ste.is_some_and(|(_, s)| s.dw2().s2ptw());
    if found.is_empty() && protected && (fault.on_stage1_walk || e.cd.is_none()) {
        let bit = format!(
            "STE.S2PTW = 1 and a Device MemAttr in stage 2's {at}: no stage 1 tables or CDs in Device memory"
        );
        found.push(Forbidden { why: Why::TableInDevice, bit });
    }
}
