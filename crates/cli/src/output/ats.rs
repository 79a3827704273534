//! What passes between a device with address translation services and the SMMU, in words.

use portcullis_arch::SubstreamId;
use portcullis_board::sim::AtsEvent;
use portcullis_bus::{AtsReply, PageResponse};

/// What passes between a device with ATS and the SMMU, in a sentence: kind, words, whether it is a refusal.
pub fn text(what: &AtsEvent) -> (&'static str, String, bool) {
    let who = |s: Option<SubstreamId>| s.map_or(String::new(), |s| format!(" substream {s:#x}"));
    match what {
        AtsEvent::Request { substream, iova, no_write, reply, .. } => {
            let wish = if *no_write { " (no write)" } else { "" };
            let (answer, bad) = match reply {
                AtsReply::Granted(t) if t.has_access() => {
                    let rights: String = [(t.read, 'r'), (t.write, 'w'), (t.execute, 'x')]
                        .iter()
                        .filter(|r| r.0)
                        .map(|r| r.1)
                        .collect();
                    (format!("{:#x}, 2^{} bytes, {rights}", t.addr, t.size_log2), false)
                }
                AtsReply::Granted(_) => ("no access: nothing is mapped there".into(), true),
                AtsReply::Unsupported => ("unsupported request: no ATS for this stream".into(), true),
                AtsReply::Aborted => ("completer abort: the SMMU cannot translate".into(), true),
            };
            ("request", format!("translation request for {iova:#x}{}{wish}: {answer}", who(*substream)), bad)
        }
        AtsEvent::Translated { address, len, access, error, .. } => {
            let end = match error {
                None => "ok".to_string(),
                Some((done, fault)) => format!("{fault} after {done} bytes"),
            };
            ("translated", format!("translated {access} of {address:#x} +{len}: {end}"), error.is_some())
        }
        AtsEvent::PageRequest(r) => {
            let last = if r.last { ", the last of its group" } else { "" };
            let wanted = match (r.read, r.write) {
                (_, true) => "write",
                (true, false) => "read",
                (false, false) if r.is_stop_marker() => "stop marker",
                (false, false) => "nothing",
            };
            let text = format!(
                "page request for {:#x}{}, {wanted}, group {}{last}",
                r.addr,
                who(r.from.substream),
                r.group
            );
            ("page-request", text, false)
        }
        AtsEvent::Response(r) => {
            let code = match r.code {
                PageResponse::Success => "success",
                PageResponse::Invalid => "invalid request",
                PageResponse::Failure => "failure",
            };
            let text = format!("page response for group {}{}: {code}", r.group, who(r.substream));
            ("page-response", text, r.code != PageResponse::Success)
        }
        AtsEvent::Invalidation(i) => {
            let text = match i.size_log2 {
                64 => format!("has to forget all translations{}", who(i.substream)),
                n => format!("has to forget {:#x}, 2^{n} bytes{}", i.addr, who(i.substream)),
            };
            ("invalidation", text, false)
        }
    }
}
