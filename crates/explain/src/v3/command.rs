//! Commands by name with their fields, command errors with the likely mistake, and global errors (IHI 0070 chapter 4,
//! sections 6.3.19 and 7.1).

use std::fmt;

use portcullis_arch::smmuv3::cmd::{AtcInv, Cfgi, Prefetch, PriResp, Resume, Sync, Tlbi};
use portcullis_arch::smmuv3::{Command, Opcode};
use serde::Serialize;

use crate::line::Field;
use crate::v3::record::hex_words;
use crate::words;

/// A command of an SMMUv3's queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CommandWords(#[serde(serialize_with = "hex_words")] pub [u64; 2]);

/// Who may use an opcode, and the feature that it needs.
const OPCODES: &[(Opcode, &str, &str)] = &[
    (Opcode::PrefetchConfig, "CMD_PREFETCH_CONFIG", ""),
    (Opcode::PrefetchAddr, "CMD_PREFETCH_ADDR", ""),
    (Opcode::CfgiSte, "CMD_CFGI_STE", ""),
    (Opcode::CfgiSteRange, "CMD_CFGI_STE_RANGE", ""),
    (Opcode::CfgiCd, "CMD_CFGI_CD", "stage 1 (IDR0.S1P)"),
    (Opcode::CfgiCdAll, "CMD_CFGI_CD_ALL", "stage 1 (IDR0.S1P)"),
    (Opcode::CfgiVmsPidm, "CMD_CFGI_VMS_PIDM", "MPAM (IDR3.MPAM)"),
    (Opcode::TlbiNhAll, "CMD_TLBI_NH_ALL", "stage 1 (IDR0.S1P)"),
    (Opcode::TlbiNhAsid, "CMD_TLBI_NH_ASID", "stage 1 (IDR0.S1P)"),
    (Opcode::TlbiNhVa, "CMD_TLBI_NH_VA", "stage 1 (IDR0.S1P)"),
    (Opcode::TlbiNhVaa, "CMD_TLBI_NH_VAA", "stage 1 (IDR0.S1P)"),
    (Opcode::TlbiEl3All, "CMD_TLBI_EL3_ALL", SECURE),
    (Opcode::TlbiEl3Va, "CMD_TLBI_EL3_VA", SECURE),
    (Opcode::TlbiEl2All, "CMD_TLBI_EL2_ALL", "EL2 streams (IDR0.HYP)"),
    (Opcode::TlbiEl2Asid, "CMD_TLBI_EL2_ASID", "EL2 streams (IDR0.HYP)"),
    (Opcode::TlbiEl2Va, "CMD_TLBI_EL2_VA", "EL2 streams (IDR0.HYP)"),
    (Opcode::TlbiEl2Vaa, "CMD_TLBI_EL2_VAA", "EL2 streams (IDR0.HYP)"),
    (Opcode::TlbiS12Vmall, "CMD_TLBI_S12_VMALL", "stage 2 (IDR0.S2P)"),
    (Opcode::TlbiS2Ipa, "CMD_TLBI_S2_IPA", "stage 2 (IDR0.S2P)"),
    (Opcode::TlbiNsnhAll, "CMD_TLBI_NSNH_ALL", ""),
    (Opcode::AtcInv, "CMD_ATC_INV", "ATS (IDR0.ATS)"),
    (Opcode::PriResp, "CMD_PRI_RESP", "page requests (IDR0.PRI)"),
    (Opcode::Resume, "CMD_RESUME", "stalls (IDR0.STALL_MODEL other than 1)"),
    (Opcode::StallTerm, "CMD_STALL_TERM", "stalls (IDR0.STALL_MODEL other than 1)"),
    (Opcode::Sync, "CMD_SYNC", ""),
    (Opcode::TlbiSEl2All, "CMD_TLBI_S_EL2_ALL", SECURE),
    (Opcode::TlbiSEl2Asid, "CMD_TLBI_S_EL2_ASID", SECURE),
    (Opcode::TlbiSEl2Va, "CMD_TLBI_S_EL2_VA", SECURE),
    (Opcode::TlbiSEl2Vaa, "CMD_TLBI_S_EL2_VAA", SECURE),
    (Opcode::TlbiSS12Vmall, "CMD_TLBI_S_S12_VMALL", SECURE),
    (Opcode::TlbiSS2Ipa, "CMD_TLBI_S_S2_IPA", SECURE),
    (Opcode::TlbiSnhAll, "CMD_TLBI_SNH_ALL", SECURE),
    (Opcode::DptiAll, "CMD_DPTI_ALL", "the device permission table (IDR3.DPT)"),
    (Opcode::DptiPa, "CMD_DPTI_PA", "the device permission table (IDR3.DPT)"),
];

/// What Secure-only opcodes need.
const SECURE: &str = "the Secure command queue";

/// The arguments that an opcode has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Prefetch { address: bool },
    Config { range: bool, substream: bool, leaf: bool },
    Tlbi { vmid: bool, asid: bool, address: bool },
    AtcInv,
    PriResp,
    Resume { tag: bool },
    Sync,
    Other,
}

fn shape(opcode: Opcode) -> Shape {
    use Opcode::*;
    let tlbi = |vmid, asid, address| Shape::Tlbi { vmid, asid, address };
    match opcode {
        PrefetchConfig => Shape::Prefetch { address: false },
        PrefetchAddr => Shape::Prefetch { address: true },
        CfgiSte => Shape::Config { range: false, substream: false, leaf: true },
        CfgiSteRange => Shape::Config { range: true, substream: false, leaf: false },
        CfgiCd => Shape::Config { range: false, substream: true, leaf: true },
        CfgiCdAll => Shape::Config { range: false, substream: false, leaf: false },
        TlbiNhAll | TlbiS12Vmall | TlbiSS12Vmall => tlbi(true, false, false),
        TlbiNhAsid => tlbi(true, true, false),
        TlbiNhVa => tlbi(true, true, true),
        TlbiNhVaa | TlbiS2Ipa | TlbiSS2Ipa => tlbi(true, false, true),
        TlbiEl2Asid | TlbiSEl2Asid => tlbi(false, true, false),
        TlbiEl2Va | TlbiSEl2Va => tlbi(false, true, true),
        TlbiEl2Vaa | TlbiSEl2Vaa | TlbiEl3Va => tlbi(false, false, true),
        TlbiEl3All | TlbiEl2All | TlbiNsnhAll | TlbiSEl2All | TlbiSnhAll => tlbi(false, false, false),
        AtcInv => Shape::AtcInv,
        PriResp => Shape::PriResp,
        Resume => Shape::Resume { tag: true },
        StallTerm => Shape::Resume { tag: false },
        Sync => Shape::Sync,
        CfgiVmsPidm | DptiAll | DptiPa => Shape::Other,
    }
}

impl CommandWords {
    fn command(&self) -> Command {
        Command(self.0)
    }

    /// The architecture's name, such as `CMD_SYNC`; `None` for opcodes that it does not define.
    pub fn name(&self) -> Option<&'static str> {
        let opcode = self.command().opcode()?;
        OPCODES.iter().find(|(of, ..)| *of == opcode).map(|(_, name, _)| *name)
    }

    /// Every field that the command has, by name.
    pub fn fields(&self) -> Vec<Field> {
        let c = self.command();
        let bit = |name, set: bool| Field::new(name, u8::from(set));
        let mut f =
            vec![Field::new("command", self.name().unwrap_or("unknown")), Field::hex("opcode", c.code())];
        let Some(opcode) = c.opcode() else { return f };
        f.push(bit("SSec", c.ssec()));
        match shape(opcode) {
            Shape::Prefetch { address } => {
                let v = Prefetch::from(c);
                f.extend([Field::hex("SID", v.sid()), bit("SSV", v.ssv()), Field::hex("SSID", v.ssid())]);
                if address {
                    f.extend([Field::new("Size", v.size()), Field::new("Stride", v.stride())]);
                    f.push(Field::hex("Addr", v.addr_63_12() << 12));
                }
            }
            Shape::Config { range, substream, leaf } => {
                let v = Cfgi::from(c);
                f.push(Field::hex("SID", v.sid()));
                if substream {
                    f.push(Field::hex("SSID", v.ssid()));
                }
                if range {
                    f.push(Field::new("Range", v.range()));
                }
                if leaf {
                    f.push(bit("Leaf", v.leaf()));
                }
            }
            Shape::Tlbi { vmid, asid, address } => {
                let v = Tlbi::from(c);
                if vmid {
                    f.push(Field::new("VMID", v.vmid()));
                }
                if asid {
                    f.push(Field::new("ASID", v.asid()));
                }
                if address {
                    f.push(Field::hex("Address", v.addr_63_12() << 12));
                    f.extend([bit("Leaf", v.leaf()), Field::new("TG", v.tg()), Field::new("TTL", v.ttl())]);
                    f.extend([Field::new("NUM", v.num()), Field::new("SCALE", v.scale())]);
                }
            }
            Shape::AtcInv => {
                let v = AtcInv::from(c);
                f.extend([Field::hex("SID", v.sid()), bit("SSV", v.ssv()), Field::hex("SSID", v.ssid())]);
                f.extend([bit("G", v.g()), Field::new("Size", v.size())]);
                f.push(Field::hex("Addr", v.addr_63_12() << 12));
            }
            Shape::PriResp => {
                let v = PriResp::from(c);
                f.extend([Field::hex("SID", v.sid()), bit("SSV", v.ssv()), Field::hex("SSID", v.ssid())]);
                f.extend([Field::hex("PRGIndex", v.prg_index()), Field::new("Resp", v.resp())]);
            }
            Shape::Resume { tag } => {
                let v = Resume::from(c);
                f.push(Field::hex("SID", v.sid()));
                if tag {
                    f.extend([Field::hex("STAG", v.stag()), bit("Ac", v.ac()), bit("Ab", v.ab())]);
                }
            }
            Shape::Sync => {
                let v = Sync::from(c);
                f.extend([
                    Field::new("CS", v.cs()),
                    Field::new("MSH", v.msh()),
                    Field::hex("MSIAttr", v.msiattr()),
                ]);
                f.extend([Field::hex("MSIData", v.msidata()), Field::hex("MSIAddr", v.msiaddr_55_2() << 2)]);
            }
            Shape::Other => {}
        }
        f
    }

    /// Why an SMMU would call the command illegal (CERROR_ILL) on the Non-secure queue: reserved values first, then the
    /// feature that the opcode needs. `None` if every SMMU has to take it.
    pub fn illegal(&self) -> Option<String> {
        let c = self.command();
        let Some(opcode) = c.opcode() else {
            let why = if c.0 == [0, 0] {
                "an empty entry: CMDQ_PROD was moved before the command was visible"
            } else {
                "no such opcode"
            };
            return Some(format!("opcode {:#04x}: {why}", c.code()));
        };
        if c.ssec() {
            return Some("SSec=1 on the Non-secure queue".into());
        }
        let (sync, response, tlbi) = (Sync::from(c), PriResp::from(c), Tlbi::from(c));
        match shape(opcode) {
            Shape::Sync if sync.cs() == 3 => return Some("CMD_SYNC with CS=3, which is reserved".into()),
            Shape::PriResp if response.resp() == 3 => {
                return Some("CMD_PRI_RESP with Resp=3, which is reserved".into());
            }
            Shape::Tlbi { address: true, .. }
                if tlbi.tg() != 0 && tlbi.num() == 0 && tlbi.scale() == 0 && tlbi.ttl() == 0 =>
            {
                return Some("TG is given, but NUM, SCALE and TTL are all 0, which is reserved".into());
            }
            _ => {}
        }
        let (_, name, needs) = OPCODES.iter().find(|(of, ..)| *of == opcode)?;
        (!needs.is_empty()).then(|| format!("{name} needs {needs}"))
    }
}

/// The name and the fields that are not zero.
impl fmt::Display for CommandWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(name) = self.name() else {
            return write!(f, "unknown command {:#04x}", self.command().code());
        };
        f.write_str(name)?;
        let shown = self.fields().into_iter().skip(2).filter(|x| x.value != "0" && x.value != "0x0");
        let shown: Vec<String> = shown.map(|x| format!("{}={}", x.name, x.value)).collect();
        if shown.is_empty() { Ok(()) } else { write!(f, " ({})", shown.join(", ")) }
    }
}

/// CMDQ_CONS while GERROR.CMDQ_ERR is active, and the command that it points to where that is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CommandError {
    /// CMDQ_CONS.
    pub cons: u32,
    /// The command.
    pub command: Option<CommandWords>,
}

/// Code, name, Linux's words, what it means and what becomes of the command.
const COMMAND_ERRORS: [(&str, &str, &str); 4] = [
    ("CERROR_NONE", "No error", "no command error"),
    (
        "CERROR_ILL",
        "Illegal command",
        "an illegal command; the queue stands until the entry is replaced (Linux: by CMD_SYNC) and GERRORN acknowledges the \
         error",
    ),
    (
        "CERROR_ABT",
        "Abort on command fetch",
        "memory refused the read of a command; after the acknowledgement it is read again. Check CMDQ_BASE",
    ),
    (
        "CERROR_ATC_INV_SYNC",
        "ATC invalidate timeout",
        "a device did not answer an earlier CMD_ATC_INV; the device may still use old translations",
    ),
];

impl CommandError {
    /// CMDQ_CONS.ERR.
    pub fn code(&self) -> u8 {
        (self.cons >> 24 & 0x7f) as u8
    }

    fn known(&self) -> Option<&'static (&'static str, &'static str, &'static str)> {
        COMMAND_ERRORS.get(usize::from(self.code()))
    }

    /// The architecture's name; `None` for codes that it does not define.
    pub fn name(&self) -> Option<&'static str> {
        self.known().map(|k| k.0)
    }

    /// The fields by name.
    pub fn fields(&self) -> Vec<Field> {
        let mut f = vec![
            Field::new("error", self.name().unwrap_or("unknown")),
            Field::new("ERR", self.code()),
            Field::hex("RD", self.cons & 0xf_ffff),
        ];
        f.extend(self.command.iter().flat_map(CommandWords::fields));
        f
    }

    /// Linux's lines (`__arm_smmu_cmdq_skip_err`).
    pub fn linux_lines(&self, device: &str) -> Vec<String> {
        let words = self.known().map_or("Unknown", |k| k.1);
        let mut lines = vec![format!("arm-smmu-v3 {device}: CMDQ error (cons 0x{:08x}): {words}", self.cons)];
        if let (1, Some(c)) = (self.code(), self.command) {
            lines.push(format!("arm-smmu-v3 {device}: skipping command in error state:"));
            lines.extend(c.0.map(|w| format!("arm-smmu-v3 {device}: \t{w:#018x}")));
        }
        lines
    }
}

/// One sentence.
impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some((name, _, meaning)) => {
                write!(f, "{name} at command {:#x}: {meaning}", self.cons & 0xf_ffff)?
            }
            None => {
                write!(f, "command error {} (unknown) at command {:#x}", self.code(), self.cons & 0xf_ffff)?
            }
        }
        let Some(c) = self.command else { return Ok(()) };
        write!(f, "; the command is {c}")?;
        match c.illegal() {
            Some(why) if self.code() == 1 => write!(f, ": {why}"),
            _ => Ok(()),
        }
    }
}

/// The global errors that are active: GERROR ^ GERRORN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GlobalErrors(pub u32);

/// Bit, name, what it means and what to check, and Linux's words.
const GLOBAL_ERRORS: &[(u32, &str, &str, &str)] = &[
    (0, "CMDQ_ERR", "the command queue stands at an error: CMDQ_CONS.ERR says which", ""),
    (
        2,
        "EVENTQ_ABT_ERR",
        "memory refused an event record, and records are lost: check EVENTQ_BASE",
        "EVTQ write aborted -- events may have been lost",
    ),
    (
        3,
        "PRIQ_ABT_ERR",
        "memory refused a page request, and requests are lost: check PRIQ_BASE",
        "PRIQ write aborted -- events may have been lost",
    ),
    (
        4,
        "MSI_CMDQ_ABT_ERR",
        "memory refused the message of a CMD_SYNC: check its MSIAddr",
        "CMDQ MSI write aborted",
    ),
    (
        5,
        "MSI_EVENTQ_ABT_ERR",
        "memory refused the event queue's message: check EVENTQ_IRQ_CFG0",
        "EVTQ MSI write aborted",
    ),
    (
        6,
        "MSI_PRIQ_ABT_ERR",
        "memory refused the page request queue's message: check PRIQ_IRQ_CFG0",
        "PRIQ MSI write aborted",
    ),
    (
        7,
        "MSI_GERROR_ABT_ERR",
        "memory refused the global error's own message: check GERROR_IRQ_CFG0",
        "GERROR MSI write aborted",
    ),
    (
        8,
        "SFM_ERR",
        "the SMMU is in service failure mode and translates nothing",
        "device has entered Service Failure Mode!",
    ),
    (9, "CMDQP_ERR", "an enhanced command queue stands at an error", ""),
    (10, "DPT_ERR", "a look-up in the device permission table failed", ""),
];

impl GlobalErrors {
    fn active(&self) -> impl Iterator<Item = &'static (u32, &'static str, &'static str, &'static str)> {
        let bits = self.0;
        GLOBAL_ERRORS.iter().filter(move |(bit, ..)| bits >> bit & 1 != 0)
    }

    /// Names of the active errors.
    pub fn names(&self) -> Vec<&'static str> {
        self.active().map(|(_, name, ..)| *name).collect()
    }

    /// Every error by name, with 1 where it is active.
    pub fn fields(&self) -> Vec<Field> {
        GLOBAL_ERRORS.iter().map(|(bit, name, ..)| Field::new(name, self.0 >> bit & 1)).collect()
    }

    /// Linux's lines (`arm_smmu_gerror_handler`), without those for the command.
    pub fn linux_lines(&self, device: &str) -> Vec<String> {
        let head = format!(
            "arm-smmu-v3 {device}: unexpected global error reported (0x{:08x}), this could be serious",
            self.0
        );
        let more = self.active().filter(|(.., linux)| !linux.is_empty());
        let more = more.map(|(.., linux)| format!("arm-smmu-v3 {device}: {linux}"));
        std::iter::once(head).chain(more).collect()
    }
}

/// One sentence.
impl fmt::Display for GlobalErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let active: Vec<String> =
            self.active().map(|(_, name, meaning, _)| format!("{name} ({meaning})")).collect();
        if active.is_empty() {
            return f.write_str("no global error is active");
        }
        write!(f, "global error: {}", words::list(&active))
    }
}
