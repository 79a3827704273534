//! Which bit of which descriptor or register forbids an access. The walker says only that it is forbidden; this finds the
//! words that say so in the steps it recorded, by the rules of IHI 0062D and DDI 0487 D8.4 (see `portcullis-walk`).

use portcullis_arch::smmuv2::{CbType, Cba2r, Cbar, Sctlr, Tcr2};
use portcullis_arch::vmsa::{long, short};
use portcullis_arch::{Access, Attributes};
use portcullis_smmuv2::{BankView, Explanation};
use portcullis_walk::{AccessKind, Fault, Rule, Step, TableFormat};

use crate::bank;
use crate::descriptor::short_fields;
use crate::outcome;

/// The kind of rule that forbids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// No writes.
    ReadOnly,
    /// Stage 2: no reads.
    WriteOnly,
    /// Not for unprivileged accesses.
    PrivilegedOnly,
    /// No instruction fetches.
    ExecuteNever,
    /// No instruction fetches because the memory can be written.
    WritableExecuteNever,
    /// A stage 1 table walk may not be made through this leaf.
    TableInDevice,
    /// Not for privileged accesses, because unprivileged ones may (PAN).
    PrivilegedAccessNever,
    /// Not found in the descriptors: a rule of a secure bank.
    Secure,
}

/// One reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Forbidden {
    pub why: Why,
    /// The bit and where it is.
    pub bit: String,
}

pub(crate) fn place(step: &Step, what: &str) -> String {
    format!("the level {} {what} descriptor at {:#x}", step.level, step.address)
}

/// The reasons of a permission fault, the most specific first; never empty.
pub(crate) fn forbidden(e: &Explanation, fault: &Fault, incoming: Attributes) -> Vec<Forbidden> {
    let steps = outcome::steps_of_stage(e, fault);
    let bank = outcome::bank_of_stage(e, fault.stage);
    let mut found = Vec::new();
    if let (Some(leaf), Some(bank)) = (steps.last().filter(|s| matches!(s.rule, Rule::Leaf { .. })), bank) {
        let tables: Vec<&Step> =
            steps.iter().filter(|s| matches!(s.rule, Rule::Table { .. })).copied().collect();
        let access = if fault.on_stage1_walk {
            (AccessKind::new(Access::Read, Attributes::DEVICE_DEFAULT), false)
        } else {
            (AccessKind::new(e.access, incoming), incoming.privileged())
        };
        match (fault.stage, bank::format(bank)) {
            (2, _) => stage2(leaf, fault, access.0, bank, &mut found),
            (_, TableFormat::Short) => stage1_short(leaf, &tables, access, bank, &mut found),
            (_, format) => stage1_long(leaf, &tables, access, bank, format, &mut found),
        }
    }
    if found.is_empty() {
        let bit = "SCR1.SIF = 1: a secure instruction fetch may not come from non-secure memory".into();
        found.push(Forbidden { why: Why::Secure, bit });
    }
    found
}

/// True for hyp and monitor contexts, which know one privilege level.
fn single_privilege(bank: &BankView) -> bool {
    let cbar = Cbar::from_bits(bank.cbar);
    let monitor = Cba2r::from_bits(bank.cba2r).monc();
    cbar.kind() == CbType::Stage1Bypass && (cbar.hypc() || monitor)
}

fn stage1_long(
    leaf: &Step,
    tables: &[&Step],
    (kind, privileged): (AccessKind, bool),
    bank: &BankView,
    format: TableFormat,
    found: &mut Vec<Forbidden>,
) {
    let single = single_privilege(bank);
    let sctlr = Sctlr::from_bits(bank.sctlr);
    let mut check = |why, mask: u64, want: bool, text: &str| {
        let hit = (leaf.value & mask != 0) == want;
        if hit {
            let bit = format!("{text} in {}", place(leaf, if leaf.level == 3 { "page" } else { "block" }));
            found.push(Forbidden { why, bit });
        }
        hit
    };
    let mut writable = true;
    if kind.is_write() {
        writable = !check(Why::ReadOnly, long::AP_READ_ONLY, true, "AP[2] = 1 (read-only)");
    }
    if !privileged && !single && (!kind.is_fetch() || format == TableFormat::Long) {
        check(Why::PrivilegedOnly, long::AP_UNPRIVILEGED, false, "AP[1] = 0 (no unprivileged access)");
    }
    if kind.is_fetch() {
        if !privileged || single || format == TableFormat::Long {
            let name = if format == TableFormat::Aarch64 && !single { "UXN = 1" } else { "XN = 1" };
            check(Why::ExecuteNever, long::UXN, true, &format!("{name} (execute never)"));
        }
        if privileged && !single {
            check(Why::ExecuteNever, long::PXN, true, "PXN = 1 (privileged execute never)");
        }
        let above = |mask: u64| tables.iter().any(|t| t.value & mask != 0);
        writable = leaf.value & long::AP_READ_ONLY == 0 && !above(long::AP_TABLE_READ_ONLY);
        let user = leaf.value & long::AP_UNPRIVILEGED != 0 && !above(long::AP_TABLE_PRIVILEGED);
        let by_user = writable && user && !single;
        let implied = privileged && by_user && format == TableFormat::Aarch64;
        let uwxn = by_user && sctlr.uwxn();
        if (sctlr.wxn() && writable) || uwxn || implied {
            let bit = if sctlr.wxn() {
                "SCTLR.WXN = 1: writable memory is execute never".into()
            } else if uwxn {
                "SCTLR.UWXN = 1: memory that unprivileged accesses can write is execute never".into()
            } else {
                "AP[2:1] = 0b01: what unprivileged accesses can write is privileged execute never".into()
            };
            found.push(Forbidden { why: Why::WritableExecuteNever, bit });
        }
    }
    let tcr2 = Tcr2::from_bits(bank.tcr2);
    if !found.is_empty() && (tcr2.had0() || tcr2.had1()) {
        // What tables say may not count (HADn), and the leaf is reason enough.
        return;
    }
    let mut above = |why, mask: u64, text: &str| {
        if let Some(t) = tables.iter().find(|t| t.value & mask != 0) {
            found.push(Forbidden { why, bit: format!("{text} in {}", place(t, "table")) });
        }
    };
    if kind.is_write() && writable {
        above(Why::ReadOnly, long::AP_TABLE_READ_ONLY, "APTable[1] = 1 (read-only below)");
    }
    if !privileged && !single && (!kind.is_fetch() || format == TableFormat::Long) {
        above(
            Why::PrivilegedOnly,
            long::AP_TABLE_PRIVILEGED,
            "APTable[0] = 1 (no unprivileged access below)",
        );
    }
    if kind.is_fetch() {
        if !privileged || single || format == TableFormat::Long {
            above(Why::ExecuteNever, long::UXN_TABLE, "UXNTable = 1 (execute never below)");
        }
        if privileged && !single {
            above(Why::ExecuteNever, long::PXN_TABLE, "PXNTable = 1 (privileged execute never below)");
        }
    }
}

fn stage1_short(
    leaf: &Step,
    tables: &[&Step],
    (kind, privileged): (AccessKind, bool),
    bank: &BankView,
    found: &mut Vec<Forbidden>,
) {
    let sctlr = Sctlr::from_bits(bank.sctlr);
    let f = short_fields(leaf);
    let what = if leaf.level == 1 { "section" } else { "page" };
    let mut push = |why, text: String| {
        let bit = format!("{text} in {}", place(leaf, what));
        found.push(Forbidden { why, bit });
    };
    if sctlr.afe() {
        if kind.is_write() && f.ap & 4 != 0 {
            push(Why::ReadOnly, "AP[2] = 1 (read-only)".into());
        }
        if !privileged && f.ap & 2 == 0 {
            push(Why::PrivilegedOnly, "AP[1] = 0 (no unprivileged access)".into());
        }
    } else {
        let code = f.ap;
        let unreadable = matches!(code, 0 | 4) || (!privileged && matches!(code, 1 | 5));
        let unwritable = code >= 5 || (!privileged && code == 2);
        if unreadable {
            push(Why::PrivilegedOnly, format!("AP[2:0] = {code:#05b} (no access at this privilege)"));
        } else if kind.is_write() && unwritable {
            push(Why::ReadOnly, format!("AP[2:0] = {code:#05b} (read-only at this privilege)"));
        }
    }
    if kind.is_fetch() {
        if f.xn {
            push(Why::ExecuteNever, "XN = 1 (execute never)".into());
        }
        if privileged && f.pxn {
            push(Why::ExecuteNever, "PXN = 1 (privileged execute never)".into());
        }
        if let Some(t) = tables.iter().find(|t| privileged && t.value & u64::from(short::TABLE_PXN) != 0) {
            let bit = format!("PXN = 1 in {}", place(t, "table"));
            found.push(Forbidden { why: Why::ExecuteNever, bit });
        }
        if found.is_empty() && (sctlr.wxn() || sctlr.uwxn()) {
            let bit = "SCTLR.WXN or UWXN = 1: writable memory is execute never".into();
            found.push(Forbidden { why: Why::WritableExecuteNever, bit });
        }
    }
}

fn stage2(leaf: &Step, fault: &Fault, kind: AccessKind, bank: &BankView, found: &mut Vec<Forbidden>) {
    let at = place(leaf, if leaf.level == 3 { "page" } else { "block" });
    let (read, write) = (leaf.value & long::S2AP_READ != 0, leaf.value & long::S2AP_WRITE != 0);
    let mut push = |why, text: &str| found.push(Forbidden { why, bit: format!("{text} in stage 2's {at}") });
    if kind.is_write() && !write {
        push(Why::ReadOnly, "S2AP[1] = 0 (no writes)");
    }
    let needs_read = !kind.is_write() && (!kind.is_fetch() || bank::format(bank) == TableFormat::Long);
    if needs_read && !read {
        push(Why::WriteOnly, "S2AP[0] = 0 (no reads)");
    }
    if kind.is_fetch() && leaf.value & long::UXN != 0 {
        push(Why::ExecuteNever, "XN = 1 (execute never)");
    }
    if found.is_empty() && fault.on_stage1_walk && Sctlr::from_bits(bank.sctlr).ptw() {
        let bit = format!(
            "SCTLR.PTW = 1 and a Device MemAttr in stage 2's {at}: no stage 1 tables in Device memory"
        );
        found.push(Forbidden { why: Why::TableInDevice, bit });
    }
}
