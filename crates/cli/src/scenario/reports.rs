//! What the operating system has to say about a fault: for the output, and as maps for scripts.

use std::collections::BTreeMap;

use portcullis_arch::Access;
use portcullis_arch::smmuv3::event::{PriDw0, PriDw1};
use portcullis_board::sim::AtsEvent;
use portcullis_bus::StaleRead;
use portcullis_bus::coherency::Maintenance;
use portcullis_drivers::fault::{FaultDetail, FaultReport};
use portcullis_drivers::smmuv3::evtq::Lost;
use portcullis_drivers::smmuv3::fault::Source;
use portcullis_drivers::smmuv3::gerror::{GlobalError, Message};
use portcullis_drivers::smmuv3::priq::PageRequest;
use portcullis_explain::{CommandError, CommandWords, EventWords, GlobalErrors, PageRequestWords};
use portcullis_iommu::RoutedFault;
use rhai::{Dynamic, Map};

use crate::output::{Item, Report, ats};

/// What a report is about, beyond what all IOMMUs have.
struct Detail {
    /// `fault`, `page request`, `global error` or `records lost`.
    kind: &'static str,
    /// The event's name, such as `F_TRANSLATION`.
    event: Option<&'static str>,
    /// The words of the record.
    words: Vec<u64>,
    /// All of it in a sentence.
    text: String,
    /// The lines Linux would print.
    kernel: Vec<String>,
    /// The fields of the record by name.
    fields: BTreeMap<&'static str, String>,
}

fn by_name(fields: Vec<portcullis_explain::Field>) -> BTreeMap<&'static str, String> {
    fields.into_iter().map(|f| (f.name, f.value)).collect()
}

/// A page request as it lay in the queue.
fn request_words(r: &PageRequest) -> PageRequestWords {
    let dw0 = PriDw0::new()
        .with_sid(r.stream.get())
        .with_ssid(r.substream.map_or(0, |s| s.get()) & 0xf_ffff)
        .with_ssv(r.substream.is_some())
        .with_privileged(r.privileged)
        .with_x(r.execute)
        .with_r(r.read)
        .with_w(r.write)
        .with_last(r.last);
    let dw1 = PriDw1::new().with_prg_index(r.group & 0x1ff).with_addr_63_12(r.address.get() >> 12);
    PageRequestWords([dw0.into_bits(), dw1.into_bits()])
}

/// The bits of GERROR that an error was, and the command error, if it is one. `indices` are the bits of an index of the
/// command queue.
fn global_words(error: &GlobalError, indices: u32) -> (GlobalErrors, Option<CommandError>) {
    let bit = |n: u32| (GlobalErrors(1 << n), None);
    match error {
        GlobalError::Command(failure) => {
            let code = failure.code.map_or(0x7f, |c| c as u32);
            // CMDQ_CONS is not kept; its index is the position, as far as it has bits.
            let cons = code << 24 | failure.position as u32 & indices & 0xf_ffff;
            let command = Some(CommandWords(failure.command.0));
            (GlobalErrors(1), Some(CommandError { cons, command }))
        }
        GlobalError::CommandsLost(_) | GlobalError::CommandQueueStuck => bit(0),
        GlobalError::EventQueueAbort => bit(2),
        GlobalError::PageRequestQueueAbort => bit(3),
        GlobalError::MessageAbort(Message::CommandSync) => bit(4),
        GlobalError::MessageAbort(Message::EventQueue) => bit(5),
        GlobalError::MessageAbort(Message::PageRequestQueue) => bit(6),
        GlobalError::MessageAbort(Message::GlobalError) => bit(7),
        GlobalError::ServiceFailure => bit(8),
        GlobalError::EnhancedCommandQueue => bit(9),
        GlobalError::DevicePermissionTable => bit(10),
        GlobalError::Unknown(bits) => (GlobalErrors(*bits), None),
    }
}

fn detail(report: &FaultReport, device: &str, indices: u32) -> Detail {
    let plain = |kernel: String| Detail {
        kind: "fault",
        event: None,
        words: Vec::new(),
        text: report.to_string(),
        kernel: kernel.lines().map(str::to_string).collect(),
        fields: BTreeMap::new(),
    };
    match &report.detail {
        FaultDetail::SmmuV2Context(c) => plain(c.linux_lines(device).to_string()),
        FaultDetail::SmmuV2Global(g) => plain(g.linux_lines(device).to_string()),
        FaultDetail::SmmuV3Event(record) => {
            let event = EventWords(record.raw.0);
            Detail {
                kind: "fault",
                event: event.name(),
                words: event.0.to_vec(),
                text: event.to_string(),
                kernel: event.linux_lines(device).to_vec(),
                fields: by_name(event.fields()),
            }
        }
        FaultDetail::SmmuV3Page(request) => {
            let words = request_words(request);
            Detail {
                kind: "page request",
                event: None,
                words: words.0.to_vec(),
                text: words.to_string(),
                // Linux prints requests that nobody handles only.
                kernel: Vec::new(),
                fields: by_name(words.fields()),
            }
        }
        FaultDetail::SmmuV3Global(error) => {
            let (global, command) = global_words(error, indices);
            let mut kernel = global.linux_lines(device);
            kernel.extend(command.iter().flat_map(|c| c.linux_lines(device)));
            let text = command
                .map_or_else(|| format!("global error: {error}"), |c| format!("global error CMDQ_ERR: {c}"));
            let fields = by_name(command.map_or_else(|| global.fields(), |c| c.fields()));
            let words = command.and_then(|c| c.command).map_or(Vec::new(), |c| c.0.to_vec());
            let event = command.and_then(|c| c.name()).or_else(|| global.names().first().copied());
            Detail { kind: "global error", event, words, text, kernel, fields }
        }
        FaultDetail::SmmuV3Lost(queue, lost) => {
            let (name, line) = match queue {
                Source::Events => ("event queue", "EVTQ overflow detected -- events lost"),
                Source::PageRequests => ("page request queue", "PRIQ overflow detected -- requests lost"),
            };
            let (text, kernel) = match lost {
                Lost::Overflow => {
                    let text = format!(
                        "the {name} was full and records were lost: PROD.OVFLG differed from CONS.OVACKFLG; acknowledged"
                    );
                    (text, vec![format!("arm-smmu-v3 {device}: {line}")])
                }
                Lost::Indices { prod, cons } => (
                    format!("the {name}'s indices make no sense: PROD {prod:#x}, CONS {cons:#x}"),
                    Vec::new(),
                ),
            };
            let fields = BTreeMap::from([("queue", name.to_string())]);
            Detail { kind: "records lost", event: None, words: Vec::new(), text, kernel, fields }
        }
        _ => plain(String::new()),
    }
}

/// A fault for the output; `device` is the SMMU's name, `indices` the bits of an index of its command queue.
pub fn report(fault: &RoutedFault, device: &str, indices: u32) -> Report {
    let r = &fault.report;
    let d = detail(r, device, indices);
    Report {
        device: fault.name.clone(),
        about: d.kind,
        reason: r.reason.to_string(),
        event: d.event,
        stream: r.stream.map(|s| s.get()),
        substream: r.substream.map(|s| s.get()),
        iova: format!("{:#x}", r.iova),
        access: r.access.to_string(),
        stage: r.stage,
        level: r.level,
        bank: r.bank,
        stalled: r.stalled,
        fields: d.fields,
        text: d.text,
        kernel: d.kernel,
    }
}

/// A fault as a map. `id` finds it again for an answer, where one is waited for.
pub fn fault_map(fault: &RoutedFault, id: Option<usize>, indices: u32) -> Map {
    let r = &fault.report;
    let d = detail(r, "smmu", indices);
    let number = |n: Option<u8>| n.map_or(Dynamic::UNIT, |n| i64::from(n).into());
    let words: rhai::Array = d.words.iter().map(|w| Dynamic::from(*w as i64)).collect();
    let fields: Map = d.fields.iter().map(|(name, value)| ((*name).into(), value.clone().into())).collect();
    let values: [(&str, Dynamic); 18] = [
        ("about", d.kind.into()),
        ("reason", r.reason.to_string().into()),
        ("event", d.event.map_or(Dynamic::UNIT, Into::into)),
        ("device", fault.name.clone().map_or(Dynamic::UNIT, Into::into)),
        ("stream", r.stream.map_or(Dynamic::UNIT, |s| i64::from(s.get()).into())),
        ("substream", r.substream.map_or(Dynamic::UNIT, |s| i64::from(s.get()).into())),
        ("iova", (r.iova.get() as i64).into()),
        ("ipa", r.ipa.map_or(Dynamic::UNIT, |a| (a.get() as i64).into())),
        ("access", r.access.to_string().into()),
        ("instruction", r.instruction.into()),
        ("privileged", r.privileged.into()),
        ("stage", number(r.stage)),
        ("level", number(r.level)),
        ("bank", number(r.bank)),
        ("stalled", r.stalled.into()),
        ("words", words.into()),
        ("fields", fields.into()),
        ("text", d.text.into()),
    ];
    let mut map: Map = values.into_iter().map(|(key, value)| (key.into(), value)).collect();
    if let Some(id) = id {
        map.insert("id".into(), (id as i64).into());
    }
    map
}

/// What passes between a device with ATS and the SMMU, as a map.
pub fn ats_map(engine: &str, what: &AtsEvent) -> Map {
    let (kind, text, refused) = ats::text(what);
    let address = match what {
        AtsEvent::Request { iova, .. } => iova.get(),
        AtsEvent::Translated { address, .. } => *address,
        AtsEvent::PageRequest(r) => r.addr.get(),
        AtsEvent::Response(_) => 0,
        AtsEvent::Invalidation(i) => i.addr,
    };
    let access = match what {
        AtsEvent::Translated { access: Access::Write, .. } => "write",
        _ => "read",
    };
    let values: [(&str, Dynamic); 6] = [
        ("engine", engine.to_string().into()),
        ("what", kind.into()),
        ("address", (address as i64).into()),
        ("access", access.into()),
        ("refused", refused.into()),
        ("text", text.into()),
    ];
    values.into_iter().map(|(key, value)| (key.into(), value)).collect()
}

fn missing(s: &StaleRead) -> &'static str {
    match s.missing {
        Maintenance::Clean => "clean",
        Maintenance::Invalidate => "invalidate",
    }
}

/// A stale read for the output.
pub fn stale_item(s: &StaleRead) -> Item {
    Item::Stale {
        reader: s.reader.to_string(),
        pa: format!("{:#x}", s.pa),
        seen: format!("{:#x}", s.seen),
        current: format!("{:#x}", s.current),
        missing: missing(s).into(),
        text: s.to_string(),
    }
}

/// A stale read as a map.
pub fn stale_map(s: &StaleRead) -> Map {
    let values: [(&str, Dynamic); 6] = [
        ("reader", s.reader.to_string().into()),
        ("pa", (s.pa as i64).into()),
        ("seen", (s.seen as i64).into()),
        ("current", (s.current as i64).into()),
        ("missing", missing(s).into()),
        ("text", s.to_string().into()),
    ];
    values.into_iter().map(|(key, value)| (key.into(), value)).collect()
}
