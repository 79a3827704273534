//! A descriptor that a walk read, taken apart into the fields its format and level give it.

use portcullis_arch::attrs::{MemoryType, Shareability};
use portcullis_arch::smmuv2::Sctlr;
use portcullis_arch::vmsa::{long, short};
use portcullis_smmuv2::BankView;
use portcullis_walk::{Rule, Step, TableFormat};

use crate::bank;
use crate::line::Field;
use crate::words;

/// A descriptor in words.
pub(crate) struct Decoded {
    /// What followed from it.
    pub text: String,
    /// Its fields by name; the first is `kind`: `table`, `block`, `page`, `section`, `invalid`, ...
    pub fields: Vec<Field>,
}

/// What has to be known about tables to read their descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tables {
    pub format: TableFormat,
    /// MAIR1 and MAIR0.
    pub mair: u64,
    /// SCTLR.AFE (short descriptors).
    pub access_flag_enable: bool,
}

impl Tables {
    /// Those of an SMMUv2's bank.
    pub fn of_bank(bank: Option<&BankView>) -> Self {
        Self {
            format: bank.map_or(TableFormat::Aarch64, bank::format),
            mair: bank.map_or(0, |b| b.mair),
            access_flag_enable: bank.is_some_and(|b| Sctlr::from_bits(b.sctlr).afe()),
        }
    }
}

/// Takes a step's descriptor apart.
pub(crate) fn decode(step: &Step, tables: &Tables) -> Decoded {
    let format = tables.format;
    let kind = kind(step, format);
    let bit = |mask: u64| u8::from(step.value & mask != 0);
    let mut fields = vec![Field::new("kind", kind)];
    let text = match step.rule {
        Rule::External(e) => format!("could not be read: {e}"),
        Rule::Invalid if kind == "invalid" => "invalid: bits 1:0 say that nothing is mapped here".into(),
        Rule::Invalid => {
            format!("reserved: type {:#04b} does not exist at level {}", step.value & 3, step.level)
        }
        Rule::AddressSize { address, bits } => {
            fields.push(Field::hex("address", address));
            format!("{kind} address {address:#x} needs {} bits, {bits} are allowed", words::width(address))
        }
        Rule::AccessFlag => format!("{kind} with AF=0"),
        Rule::Update { new } => {
            fields.push(Field::hex("new", new));
            format!("{kind}, changed by hardware to {new:#x}")
        }
        Rule::Table { next } => {
            fields.push(Field::hex("next", next));
            let limits = table_limits(step, format);
            format!("table -> {next:#x}{limits}")
        }
        Rule::Leaf { output, size_log2 } => {
            let leaf = match (format, step.stage) {
                (TableFormat::Short, _) => short_leaf(step, tables),
                (_, 2) => stage2_leaf(step.value),
                _ => stage1_leaf(step.value, tables),
            };
            fields.push(Field::hex("output", output));
            fields.push(Field::new("size", 1u64.checked_shl(size_log2.into()).unwrap_or(0)));
            let words: Vec<String> = leaf.iter().map(|(name, value)| format!("{name}={value}")).collect();
            fields.extend(leaf.iter().map(|(name, value)| Field::new(name, value)));
            let mut run = "";
            if format != TableFormat::Short && bit(long::CONTIGUOUS) == 1 {
                fields.push(Field::new("contiguous", 1));
                run = " of a contiguous run";
            }
            format!("{kind}{run} -> {output:#x}, {}; {}", words::size(size_log2), words.join(" "))
        }
    };
    Decoded { text, fields }
}

fn kind(step: &Step, format: TableFormat) -> &'static str {
    let code = step.value & 3;
    if matches!(step.rule, Rule::External(_)) {
        return "unreadable";
    }
    if format == TableFormat::Short {
        return match (step.level, code) {
            (_, 0) => "invalid",
            (1, 1) => "table",
            (1, _) if step.value & u64::from(short::SUPERSECTION) != 0 => "supersection",
            (1, _) => "section",
            (_, 1) => "large page",
            _ => "small page",
        };
    }
    match (step.level, code) {
        (_, 0 | 2) => "invalid",
        (3, 3) => "page",
        (_, 3) => "table",
        (3, _) => "reserved",
        _ if step.rule == Rule::Invalid => "reserved",
        _ => "block",
    }
}

/// What a table descriptor forbids for all below it.
fn table_limits(step: &Step, format: TableFormat) -> String {
    let long_names = [
        (long::NS_TABLE, "NSTable"),
        (long::AP_TABLE_READ_ONLY, "APTable[1] read-only"),
        (long::AP_TABLE_PRIVILEGED, "APTable[0] privileged only"),
        (long::UXN_TABLE, if format == TableFormat::Long { "XNTable" } else { "UXNTable" }),
        (long::PXN_TABLE, "PXNTable"),
    ];
    let short_names = [(u64::from(short::TABLE_NS), "NS"), (u64::from(short::TABLE_PXN), "PXN")];
    let names = match (format, step.stage) {
        (TableFormat::Short, _) => &short_names[..],
        (_, 2) => &[],
        _ => &long_names[..],
    };
    let set: Vec<&str> = names.iter().filter(|(bit, _)| step.value & bit != 0).map(|(_, n)| *n).collect();
    if set.is_empty() { String::new() } else { format!("; below it: {}", set.join(", ")) }
}

type Named = (&'static str, String);

fn stage1_leaf(value: u64, tables: &Tables) -> Vec<Named> {
    const AP: [&str; 4] =
        ["0b00(rw, privileged only)", "0b01(rw)", "0b10(read-only, privileged only)", "0b11(read-only)"];
    let bit = |mask: u64| u8::from(value & mask != 0).to_string();
    let index = value >> long::ATTR_INDEX_SHIFT & 7;
    let memory = MemoryType::from_mair((tables.mair >> (8 * index)) as u8);
    let long_format = tables.format == TableFormat::Long;
    vec![
        ("AP[2:1]", AP[(value >> 6 & 3) as usize].into()),
        (if long_format { "XN" } else { "UXN" }, bit(long::UXN)),
        ("PXN", bit(long::PXN)),
        ("AF", bit(long::AF)),
        ("nG", bit(long::NG)),
        ("AttrIndx", format!("{index}({memory})")),
        ("SH", Shareability::from_code((value >> long::SH_SHIFT) as u8).to_string()),
    ]
}

fn stage2_leaf(value: u64) -> Vec<Named> {
    const S2AP: [&str; 4] = ["0b00(none)", "0b01(read-only)", "0b10(write-only)", "0b11(rw)"];
    let code = (value >> long::S2_MEMATTR_SHIFT & 0xf) as u8;
    vec![
        ("S2AP", S2AP[(value >> 6 & 3) as usize].into()),
        ("XN", u8::from(value & long::UXN != 0).to_string()),
        ("AF", u8::from(value & long::AF != 0).to_string()),
        ("MemAttr", format!("{code:#x}({})", MemoryType::from_code(code))),
        ("SH", Shareability::from_code((value >> long::SH_SHIFT) as u8).to_string()),
    ]
}

/// The fields of a short-format leaf that decide about permissions.
pub(crate) struct ShortLeaf {
    /// AP[2:0].
    pub ap: u8,
    /// XN.
    pub xn: bool,
    /// PXN of a section; a page takes it from its table.
    pub pxn: bool,
    tex_cb: u8,
    shareable: bool,
    not_global: bool,
}

/// Where each kind of short-format leaf keeps its fields (IHI 0062D, DDI 0487 G5.4).
pub(crate) fn short_fields(step: &Step) -> ShortLeaf {
    let v = step.value as u32;
    let has = |mask: u32| v & mask != 0;
    let cb = (v >> 2 & 3) as u8;
    if step.level <= 1 {
        return ShortLeaf {
            ap: (v >> 13 & 4 | v >> 10 & 3) as u8,
            xn: has(short::SECTION_XN),
            pxn: has(short::SECTION_PXN),
            tex_cb: (v >> 12 & 7) as u8 * 4 + cb,
            shareable: has(short::SECTION_S),
            not_global: has(short::SECTION_NG),
        };
    }
    let small = has(short::TYPE_SECTION_OR_SMALL);
    ShortLeaf {
        ap: (v >> 7 & 4 | v >> 4 & 3) as u8,
        xn: has(if small { short::SMALL_XN } else { short::LARGE_XN }),
        pxn: false,
        tex_cb: (v >> if small { 6 } else { 12 } & 7) as u8 * 4 + cb,
        shareable: has(short::PAGE_S),
        not_global: has(short::PAGE_NG),
    }
}

fn short_leaf(step: &Step, tables: &Tables) -> Vec<Named> {
    let f = short_fields(step);
    let afe = tables.access_flag_enable;
    let number = |b: bool| u8::from(b).to_string();
    let mut fields = if afe {
        vec![("AP[2:1]", format!("{:#04b}", f.ap >> 1)), ("AF", number(f.ap & 1 != 0))]
    } else {
        vec![("AP[2:0]", format!("{:#05b}", f.ap))]
    };
    fields.push(("XN", number(f.xn)));
    if step.level <= 1 {
        fields.push(("PXN", number(f.pxn)));
    }
    fields.push(("nG", number(f.not_global)));
    fields.push(("S", number(f.shareable)));
    fields.push(("TEX", (f.tex_cb >> 2).to_string()));
    fields.push(("C", (f.tex_cb >> 1 & 1).to_string()));
    fields.push(("B", (f.tex_cb & 1).to_string()));
    fields
}
