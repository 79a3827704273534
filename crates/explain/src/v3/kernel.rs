//! Lines that arm-smmu-v3 prints: Linux up to 6.12 dumps raw words, newer kernels decode them besides; both are read.
//! [`parse_log`] puts words of several lines together.

use portcullis_arch::smmuv3::EventCode;
use serde::Serialize;

use crate::kernel_log::{KernelLine, KernelMessage, after, number, number32, parse_line};
use crate::v3::command::{CommandError, CommandWords, GlobalErrors};
use crate::v3::record::EventWords;

/// The values of `event: F_TRANSLATION client: ... sid: ...`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EventLine {
    /// The architecture's name of the event.
    pub event: String,
    /// The event's code, if the name is one of the architecture's.
    pub code: Option<u8>,
    /// The device; `None` for `(unassigned sid)`.
    pub client: Option<String>,
    /// StreamID.
    pub stream: u32,
    /// SubstreamID; 0 also if there is none.
    pub substream: u32,
    /// Input address.
    pub iova: Option<u64>,
    /// IPA; 0 also if there is none.
    pub ipa: Option<u64>,
    /// Address of a fetch that aborted.
    pub fetch: Option<u64>,
}

/// The values of the line after it: `unpriv data write s1 "Input address caused fault" stag: 0x0`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EventDetailLine {
    /// Privileged.
    pub privileged: bool,
    /// Instruction fetch.
    pub instruction: bool,
    /// Read.
    pub read: bool,
    /// 1 or 2.
    pub stage: u8,
    /// What was being translated, as the kernel says it.
    pub class: String,
    /// A table was to be updated (true) or read (false) for a translation.
    pub table_update: Option<bool>,
    /// The transaction waits.
    pub stall: bool,
    /// Its tag.
    pub stag: u16,
}

/// The values of a page request line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PageRequestLine {
    /// StreamID.
    pub stream: u32,
    /// SubstreamID; 0 also if there is none.
    pub substream: u32,
    /// Page request group.
    pub group: u16,
    /// The last of its group.
    pub last: bool,
    /// Privileged.
    pub privileged: bool,
    /// Read.
    pub read: bool,
    /// Write.
    pub write: bool,
    /// Execute.
    pub execute: bool,
    /// The page.
    pub iova: u64,
}

/// What a line says behind time stamp, driver and device.
fn payload(line: &str) -> &str {
    if let Some((_, text)) = after(line, "arm-smmu").and_then(|rest| rest.split_once(": ")) {
        return text;
    }
    let mut text = line.trim_start();
    for (open, close) in [('<', '>'), ('[', ']')] {
        if text.starts_with(open) {
            text = text.split_once(close).map_or(text, |(_, rest)| rest).trim_start();
        }
    }
    text
}

/// The 64-bit words that make up a line, if nothing else is in it.
fn raw_words(text: &str) -> Option<Vec<u64>> {
    let pieces = text.split([' ', '\t', ',']).filter(|p| !p.is_empty());
    let word = |p: &str| {
        let digits = p.strip_prefix("0x").or_else(|| p.strip_prefix("0X"));
        let digits = digits.or_else(|| Some(p).filter(|p| p.len() == 16))?;
        let fits = (1..=16).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
        if fits { u64::from_str_radix(digits, 16).ok() } else { None }
    };
    let words: Option<Vec<u64>> = pieces.map(word).collect();
    words.filter(|w| !w.is_empty())
}

/// Reads what a line says, if it is about an SMMUv3.
pub(crate) fn message(line: &str) -> Option<KernelMessage> {
    let text = payload(line).trim();
    if let Some(words) = raw_words(text) {
        return match words[..] {
            [word] if text.len() == 18 => Some(KernelMessage::Word { value: word }),
            [a, b, c, d] => Some(KernelMessage::EventRecord { record: EventWords([a, b, c, d]) }),
            _ => None,
        };
    }
    if text.contains("EVTQ overflow detected") {
        return Some(KernelMessage::EventsLost);
    }
    if text.contains("PRIQ overflow detected") {
        return Some(KernelMessage::PageRequestsLost);
    }
    if text.contains("unexpected PRI request received") {
        return Some(KernelMessage::UnexpectedPageRequest);
    }
    if text.contains("skipping command in error state") {
        return Some(KernelMessage::SkippedCommand);
    }
    if let Some(rest) = after(text, "unexpected global error reported (") {
        return Some(KernelMessage::GlobalErrors { active: GlobalErrors(number32(rest, 16)?) });
    }
    if let Some(rest) = after(text, "CMDQ error (cons ") {
        return Some(KernelMessage::CommandError(CommandError { cons: number32(rest, 16)?, command: None }));
    }
    if let Some(rest) = after(text, "CMD_SYNC timeout at ") {
        let get = |name| after(rest, name).and_then(|r| number32(r, 16));
        let (prod, cons) = (get("hwprod ")?, get("hwcons ")?);
        return Some(KernelMessage::SyncTimeout { at: number32(rest, 16)?, prod, cons });
    }
    if let Some(rest) = text.strip_prefix("event: ") {
        return event_line(rest).map(KernelMessage::Event);
    }
    if let Some(rest) = text.strip_prefix("event ") {
        let code = number32(rest, 16)?;
        return (code <= 0xff && rest.contains("received"))
            .then_some(KernelMessage::EventHead { code: code as u8 });
    }
    if let Some(rest) = text.strip_prefix("sid ") {
        return page_request(rest).map(KernelMessage::PageRequest);
    }
    detail_line(text).map(KernelMessage::EventDetail)
}

fn event_line(text: &str) -> Option<EventLine> {
    let (event, rest) = text.split_once(" client: ")?;
    let (client, rest) = rest.split_once(" sid: ")?;
    let get = |name: &str| after(rest, name).and_then(|r| number(r, 16));
    let code = EventCode::ALL.iter().find(|c| c.name() == event.trim());
    Some(EventLine {
        event: event.trim().to_owned(),
        code: code.map(|c| *c as u8),
        client: Some(client.trim()).filter(|c| !c.is_empty() && !c.contains("unassigned")).map(str::to_owned),
        stream: number32(rest, 16)?,
        substream: get("ssid: ").and_then(|s| s.try_into().ok()).unwrap_or(0),
        iova: get("iova: "),
        ipa: get("ipa: "),
        fetch: get("fetch_addr: "),
    })
}

fn detail_line(text: &str) -> Option<EventDetailLine> {
    let (head, rest) = text.split_once('"')?;
    let (class, tail) = rest.split_once('"')?;
    let mut words = head.split_whitespace();
    let mut choice = |yes: &str, no: &str| match words.next() {
        Some(w) if w == yes => Some(true),
        Some(w) if w == no => Some(false),
        _ => None,
    };
    let (privileged, instruction) = (choice("priv", "unpriv")?, choice("inst", "data")?);
    let (read, second) = (choice("read", "write")?, choice("s2", "s1")?);
    let tail_has = |what: &str| tail.split_whitespace().any(|w| w == what);
    let table_update = match (tail_has("ttd_write"), tail_has("ttd_read")) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    };
    Some(EventDetailLine {
        privileged,
        instruction,
        read,
        stage: if second { 2 } else { 1 },
        class: class.to_owned(),
        table_update,
        stall: tail_has("stall"),
        stag: after(tail, "stag: ").and_then(|r| number(r, 16))?.try_into().ok()?,
    })
}

/// `0x00000408.0x00001: [3L] unprivileged RW access at iova 0x...`
fn page_request(text: &str) -> Option<PageRequestLine> {
    let (ids, rest) = text.split_once(": [")?;
    let (stream, substream) = ids.split_once('.')?;
    let (group, rest) = rest.split_once("] ")?;
    let (privilege, rest) = rest.split_once(' ')?;
    let (wanted, rest) = rest.split_once("access at iova ")?;
    let last = group.ends_with('L');
    Some(PageRequestLine {
        stream: number32(stream, 16)?,
        substream: number32(substream, 16)?,
        group: group.trim_end_matches('L').parse().ok()?,
        last,
        privileged: match privilege {
            "privileged" => true,
            "unprivileged" => false,
            _ => return None,
        },
        read: wanted.contains('R'),
        write: wanted.contains('W'),
        execute: wanted.contains('X'),
        iova: number(rest, 16)?,
    })
}

/// What stands before words that have yet to come.
enum Pending {
    Nothing,
    Event(Vec<u64>),
    /// The index of the command error that they belong to.
    Command(Option<usize>, Vec<u64>),
}

/// Reads a whole log. Raw words of an event record, one a line, become one [`KernelMessage::EventRecord`], also without
/// the line that announces them; the words of a skipped command become part of the [`CommandError`] before them. What is
/// not understood is left out.
pub fn parse_log(log: &str) -> Vec<KernelLine> {
    let mut found: Vec<KernelLine> = Vec::new();
    let mut pending = Pending::Nothing;
    for line in log.lines() {
        let Some(parsed) = parse_line(line) else {
            pending = Pending::Nothing;
            continue;
        };
        let KernelMessage::Word { value } = parsed.message else {
            pending = match parsed.message {
                KernelMessage::EventHead { .. } => Pending::Event(Vec::new()),
                KernelMessage::SkippedCommand => {
                    let is_error = |l: &KernelLine| matches!(l.message, KernelMessage::CommandError(_));
                    Pending::Command(found.iter().rposition(is_error), Vec::new())
                }
                _ => Pending::Nothing,
            };
            found.push(parsed);
            continue;
        };
        if matches!(pending, Pending::Nothing) {
            pending = Pending::Event(Vec::new());
        }
        match &mut pending {
            Pending::Event(words) => {
                words.push(value);
                if let [a, b, c, d] = words[..] {
                    let message = KernelMessage::EventRecord { record: EventWords([a, b, c, d]) };
                    found.push(KernelLine { device: parsed.device, message });
                    pending = Pending::Nothing;
                }
            }
            Pending::Command(error, words) => {
                words.push(value);
                if let [a, b] = words[..] {
                    let error = error.and_then(|at| found.get_mut(at));
                    if let Some(KernelLine { message: KernelMessage::CommandError(e), .. }) = error {
                        e.command = Some(CommandWords([a, b]));
                    }
                    pending = Pending::Nothing;
                }
            }
            Pending::Nothing => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::PageRequestWords;

    fn read(line: &str) -> KernelMessage {
        parse_line(line).unwrap_or_else(|| panic!("{line}")).message
    }

    #[test]
    fn a_dump_of_612_becomes_one_record() {
        let log = "[   12.345678] arm-smmu-v3 9050000.smmuv3: event 0x10 received:\n\
                   [   12.345680] arm-smmu-v3 9050000.smmuv3: \t0x0000040800000010\n\
                   [   12.345681] arm-smmu-v3 9050000.smmuv3: \t0x0000020000000000\n\
                   [   12.345682] arm-smmu-v3 9050000.smmuv3: \t0x0000000070002000\n\
                   [   12.345683] arm-smmu-v3 9050000.smmuv3: \t0x0000000000000000\n\
                   [   13.0] usb 1-1: new device";
        let found = parse_log(log);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].message, KernelMessage::EventHead { code: 0x10 });
        let KernelMessage::EventRecord { record: e } = &found[1].message else { panic!("{found:?}") };
        assert_eq!(e.0, [0x408_0000_0010, 0x200_0000_0000, 0x7000_2000, 0]);
        assert_eq!(found[1].device.as_deref(), Some("9050000.smmuv3"));
        assert_eq!(
            e.to_string(),
            "F_TRANSLATION: no valid translation for the address, on an unprivileged write of 0x70002000 by stream 0x408; \
             stage 1"
        );
    }

    #[test]
    fn four_words_alone_are_enough() {
        let bare = "0x0000001200000013 0x0000020800000000 0x0000000070000000 0x0000000000000000";
        let KernelMessage::EventRecord { record: e } = read(bare) else { panic!() };
        assert_eq!(e.name(), Some("F_PERMISSION"));
        let lines = bare.replace(' ', "\n");
        let found = parse_log(&lines);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].message, KernelMessage::EventRecord { record: e });
        let plain = "<6>[1.0] 0000001200000013, 0000020800000000, 0000000070000000, 0000000000000000";
        assert_eq!(read(plain), KernelMessage::EventRecord { record: e });
        // Three are not.
        assert_eq!(parse_log(&lines[..lines.rfind('\n').unwrap()]), []);
    }

    #[test]
    fn decoded_lines_are_read() {
        let line = "arm-smmu-v3 arm-smmu-v3.0.auto: event: F_TRANSLATION client: 0000:00:01.0 sid: 0x8 ssid: 0x1 \
                    iova: 0x70002000 ipa: 0x0";
        let KernelMessage::Event(e) = read(line) else { panic!() };
        assert_eq!((e.event.as_str(), e.code, e.stream, e.substream), ("F_TRANSLATION", Some(0x10), 8, 1));
        assert_eq!(
            (e.client.as_deref(), e.iova, e.ipa, e.fetch),
            (Some("0000:00:01.0"), Some(0x7000_2000), Some(0), None)
        );
        let line = "arm-smmu-v3 x: unpriv data write s1 \"Input address caused fault\" stag: 0x0";
        let KernelMessage::EventDetail(d) = read(line) else { panic!() };
        assert!(!d.privileged && !d.instruction && !d.read && !d.stall);
        assert_eq!((d.stage, d.class.as_str(), d.table_update), (1, "Input address caused fault", None));
        let line =
            "arm-smmu-v3 x: priv inst read s2 \"Stage 1 translation table fetch\" ttd_write stall stag: 0x2a";
        let KernelMessage::EventDetail(d) = read(line) else { panic!() };
        assert!(d.privileged && d.instruction && d.read && d.stall);
        assert_eq!((d.stage, d.table_update, d.stag), (2, Some(true), 0x2a));
        let line = "arm-smmu-v3 x: event: F_CD_FETCH client: (unassigned sid) sid: 0x11 ssid: 0 fetch_addr: 0x80000040";
        let KernelMessage::Event(e) = read(line) else { panic!() };
        assert_eq!((e.client, e.fetch, e.iova), (None, Some(0x8000_0040), None));
        let KernelMessage::Event(e) = read("arm-smmu-v3 x: event: C_BAD_STE client: a sid: 0x11 ssid: 0")
        else {
            panic!()
        };
        assert_eq!((e.code, e.stream), (Some(4), 0x11));
    }

    #[test]
    fn errors_and_overflows_are_read() {
        assert_eq!(read("arm-smmu-v3 x: EVTQ overflow detected -- events lost"), KernelMessage::EventsLost);
        assert_eq!(
            read("arm-smmu-v3 x: PRIQ overflow detected -- requests lost"),
            KernelMessage::PageRequestsLost
        );
        assert_eq!(
            read("arm-smmu-v3 x: unexpected global error reported (0x00000005), this could be serious"),
            KernelMessage::GlobalErrors { active: GlobalErrors(5) }
        );
        assert_eq!(
            read("arm-smmu-v3 x: CMD_SYNC timeout at 0x00000012 [hwprod 0x00000013, hwcons 0x00000010]"),
            KernelMessage::SyncTimeout { at: 0x12, prod: 0x13, cons: 0x10 }
        );
        let log = "arm-smmu-v3 x: CMDQ error (cons 0x01000007): Illegal command\n\
                   arm-smmu-v3 x: skipping command in error state:\n\
                   arm-smmu-v3 x: \t0x00000000000000ff\n\
                   arm-smmu-v3 x: \t0x0000000000000000";
        let found = parse_log(log);
        let KernelMessage::CommandError(e) = &found[0].message else { panic!("{found:?}") };
        assert_eq!((e.code(), e.name(), e.command), (1, Some("CERROR_ILL"), Some(CommandWords([0xff, 0]))));
        assert_eq!(found.len(), 2, "the words are no event");
    }

    #[test]
    fn a_page_request_line_is_read() {
        assert_eq!(
            read("arm-smmu-v3 x: unexpected PRI request received:"),
            KernelMessage::UnexpectedPageRequest
        );
        let line =
            "arm-smmu-v3 x: \tsid 0x00000408.0x00001: [3L] unprivileged RW access at iova 0x0000000070002000";
        let KernelMessage::PageRequest(p) = read(line) else { panic!() };
        assert_eq!((p.stream, p.substream, p.group, p.last, p.iova), (0x408, 1, 3, true, 0x7000_2000));
        assert!(p.read && p.write && !p.execute && !p.privileged);
    }

    #[test]
    fn other_lines_are_not_mistaken() {
        for line in [
            "",
            "arm-smmu-v3 9050000.smmuv3: ias 44-bit, oas 44-bit (features 0x00008305)",
            "arm-smmu-v3 9050000.smmuv3: allocated 65536 entries for cmdq",
            "event 0x10",
            "arm-smmu-v3 x: event: F_TRANSLATION",
            "arm-smmu-v3 x: CMD_SYNC timeout at 0x00000012",
            "a quote \"from somewhere\" stag: 0x1",
            "0x12",
            "deadbeef",
            "arm-smmu-v3 x: \t0x0000000000000000 0x0000000000000000",
        ] {
            assert_eq!(parse_line(line), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(words: [u64; 4]) {
            let event = EventWords(words);
            let found = parse_log(&event.linux_lines("9050000.smmuv3").join("\n"));
            prop_assert_eq!(&found[0].message, &KernelMessage::EventHead { code: words[0] as u8 });
            prop_assert_eq!(&found[1].message, &KernelMessage::EventRecord { record: event });
            for line in event.decoded_lines("9050000.smmuv3", "0000:00:01.0") {
                let parsed = parse_line(&line).unwrap();
                if let KernelMessage::Event(e) = parsed.message {
                    prop_assert_eq!(e.stream, event.stream().get());
                    prop_assert_eq!(e.code, Some(words[0] as u8));
                }
            }
        }

        #[test]
        fn page_requests_are_read_back(words: [u64; 2]) {
            let request = PageRequestWords(words);
            let [_, line] = request.linux_lines("x");
            let KernelMessage::PageRequest(p) = read(&line) else { panic!("{line}") };
            prop_assert_eq!(p.stream, request.stream().get());
            prop_assert_eq!(p.iova, request.address().get());
            prop_assert_eq!(u64::from(p.group), words[1] & 0x1ff);
        }

        #[test]
        fn hostile_logs_do_not_panic(
            pieces in prop::collection::vec(prop_oneof![
                prop::sample::select(vec![
                    "arm-smmu-v3 x: ", "event: ", "event 0x", " received:", "\n", "\t0x", "0000000000000000", " client: ",
                    " sid: ", "sid ", ": [", "] ", "privileged ", "access at iova ", "\"", "priv data read s1 ", "stag: ",
                    "CMDQ error (cons ", "skipping command in error state:", "unexpected global error reported (", "0x",
                ]).prop_map(str::to_owned),
                ".{0,6}",
            ], 0..40)
        ) {
            let _ = parse_log(&pieces.concat());
        }
    }
}
