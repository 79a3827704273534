//! Records, commands, stories and causes against words made by hand from the layout tables of IHI 0070.

use portcullis_arch::smmuv3::regs::offset;
use portcullis_arch::{Access, Iova, StreamId};
use portcullis_bus::{DmaPort, Initiator, SystemMemory, View};
use portcullis_smmuv3::{Outcome, StallModel};
use proptest::prelude::*;

use crate::testing::{PAGE, RAM, ROOT};
use crate::v3::testing::{Board, CD0, CDS, ROOT2, STE, STE0, STE1, STE2, STREAM, STREAMS, caps};
use crate::{
    Cause, CauseContext, CauseKind, CommandError, CommandWords, EventWords, Field, GlobalErrors, LineKind,
    PageRequestWords, Seen, Unmapped, causes_v3, story_v3,
};

fn get(fields: &[Field], name: &str) -> String {
    fields.iter().find(|f| f.name == name).map_or_else(|| format!("no {name}"), |f| f.value.clone())
}

const SID: u64 = 0x1234_5678 << 32;
const SSID: u64 = 0xabcde << 12;
const SSV: u64 = 1 << 11;

/// Code, words, and (field, value) of what must be read from them.
type Example = (&'static str, [u64; 4], &'static [(&'static str, &'static str)]);

const EXAMPLES: &[Example] = &[
    (
        "F_UUT",
        [SID | SSV | SSID | 0x01, 1 << 33 | 1 << 35 | 0x77, 0xdead_b123, 0],
        &[
            ("Reason", "0x77"),
            ("PnU", "1"),
            ("InD", "0"),
            ("RnW", "1"),
            ("InputAddr", "0xdeadb123"),
            ("SSID", "0xabcde"),
        ],
    ),
    ("C_BAD_STREAMID", [SID | 0x02, 0, 0, 0], &[("SID", "0x12345678"), ("SSV", "0")]),
    (
        "F_STE_FETCH",
        [SID | 0x03, 0x55 | 1 << 16, 0, 0xff12_3456_789a_bcdf],
        &[("Reason", "0x55"), ("GPCF", "1"), ("FetchAddr", "0x123456789abcd8")],
    ),
    ("C_BAD_STE", [SID | SSV | SSID | 0x04, 0, 0, 0], &[("SSV", "1"), ("SSID", "0xabcde")]),
    (
        "F_BAD_ATS_TREQ",
        [SID | 0x05, 3 | 1 << 28 | 1 << 30 | 1 << 31, 0x1234_5678_9abc, 0],
        &[("Span", "3"), ("Priv", "1"), ("X", "0"), ("W", "1"), ("R", "1"), ("InputAddr", "0x123456789000")],
    ),
    ("F_STREAM_DISABLED", [SID | 0x06, 0, 0, 0], &[("SID", "0x12345678"), ("SSV", "no SSV")]),
    (
        "F_TRANSL_FORBIDDEN",
        [SID | 0x07, 1 << 35, 0x9000_0000, 0],
        &[("RnW", "1"), ("InputAddr", "0x90000000"), ("SSV", "no SSV")],
    ),
    // No SSV bit, and a SubstreamID all the same.
    ("C_BAD_SUBSTREAMID", [SID | SSID | 0x08, 0, 0, 0], &[("SSID", "0xabcde"), ("SSV", "no SSV")]),
    ("F_CD_FETCH", [SID | 0x09, 0, 0, 0x8000_0047], &[("FetchAddr", "0x80000040")]),
    ("C_BAD_CD", [SID | 0x0a, 0, 0, 0], &[("SID", "0x12345678")]),
    (
        "F_WALK_EABT",
        [SID | 0x0b, 1 << 35 | 1 << 39 | 2 << 40, 0x1000, 0x2008],
        &[("S2", "1"), ("CLASS", "IN"), ("FetchAddr", "0x2008"), ("InputAddr", "0x1000")],
    ),
    (
        "F_TRANSLATION",
        [SID | 0x10, 0xbeef | 1 << 31 | 1 << 34 | 1 << 35 | 2 << 40, 0xff00_0000_0000_1234, 0],
        &[("Stall", "1"), ("STAG", "0xbeef"), ("InD", "1"), ("S2", "0"), ("InputAddr", "0xff00000000001234")],
    ),
    (
        "F_ADDR_SIZE",
        [SID | 0x11, 1 << 38 | 1 << 39 | 1 << 40, 0x1000, 0xf_1234_5678_9abc],
        &[("NSIPA", "1"), ("S2", "1"), ("CLASS", "TT"), ("IPA", "0xf123456789000"), ("RnW", "0")],
    ),
    (
        "F_ACCESS",
        [SID | 0x12, 1 << 39, 0x1000, 0x3000],
        &[("CLASS", "CD"), ("IPA", "0x3000"), ("Stall", "0")],
    ),
    (
        "F_PERMISSION",
        [SID | 0x13, 1 << 39 | 1 << 40 | 1 << 44 | 1 << 33, 0x1000, 0x3000],
        &[("TTRnW", "1"), ("PnU", "1"), ("DirtyBit", "0"), ("Overlay", "0")],
    ),
    (
        "F_TLB_CONFLICT",
        [SID | 0x20, 0x1_2345 | 1 << 35 | 2 << 40, 0x1000, 0],
        &[("Reason", "0x12345"), ("RnW", "1")],
    ),
    ("F_CFG_CONFLICT", [SID | 0x21, 7, 0, 0], &[("Reason", "0x7")]),
    (
        "E_PAGE_REQUEST",
        [SID | 0x24, 1 << 34 | 1 << 39 | 5 << 44, 0x7fff, 0],
        &[("uW", "1"), ("uR", "0"), ("pR", "1"), ("pX", "0"), ("Span", "5"), ("InputAddr", "0x7000")],
    ),
    ("F_VMS_FETCH", [SID | 0x25, 0, 0, 0x1008], &[("FetchAddr", "0x1008")]),
];

#[test]
fn every_event_shows_its_fields_by_name() {
    for (name, words, expected) in EXAMPLES {
        let event = EventWords(*words);
        assert_eq!(event.name(), Some(*name));
        let fields = event.fields();
        for (field, value) in *expected {
            let found = get(&fields, field);
            assert_eq!(found, *value, "{name}.{field}");
        }
        let text = event.to_string();
        assert!(text.starts_with(&format!("{name}: ")) && text.contains("stream 0x12345678"), "{text}");
        let json = serde_json::to_value(event).unwrap();
        assert_eq!(json[0], format!("{:#018x}", words[0]));
    }
    let codes: Vec<u64> = EXAMPLES.iter().map(|(_, w, _)| w[0] & 0xff).collect();
    let expected = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0xa, 0xb, 0x10, 0x11, 0x12, 0x13, 0x20, 0x21, 0x24, 0x25];
    assert_eq!(codes, expected, "all of section 7.3 but the implementation defined ones");
    let unknown = EventWords([SID | 0xe3, 0, 0, 0]);
    assert_eq!((unknown.name(), unknown.address(), unknown.stage()), (None, None, None));
    assert!(unknown.to_string().starts_with("event 0xe3: implementation defined"), "{unknown}");
}

#[test]
fn sentences_say_what_where_and_who() {
    let text = |n: usize| EventWords(EXAMPLES[n].1).to_string();
    assert_eq!(
        text(11),
        "F_TRANSLATION: no valid translation for the address, on an unprivileged instruction fetch of 0xff00000000001234 by \
         stream 0x12345678; stage 1; it is stalled with STAG 0xbeef and waits for CMD_RESUME"
    );
    assert_eq!(
        text(12),
        "F_ADDR_SIZE: an address is wider than the output size, on an unprivileged write of 0x1000 by stream 0x12345678; \
         stage 2, while a stage 1 table was fetched, IPA 0xf123456789000"
    );
    assert!(text(13).contains("while a context descriptor was fetched"), "{}", text(13));
    assert!(
        text(2).ends_with("the fetch went to 0x123456789abcd8 (granule protection fault)"),
        "{}",
        text(2)
    );
    assert!(text(4).contains("for read and write of 0x123456789000"), "{}", text(4));
    let update = EventWords([SID | 0x13, 1 << 39 | 1 << 40, 0x1000, 0x3000]).to_string();
    assert!(update.contains("was fetched and was to be updated"), "{update}");
}

#[test]
fn page_requests_are_decoded() {
    let high = 1 << 63 | 1 << 62 | 1 << 61 | 1 << 60;
    let request = PageRequestWords([high | 0xabcde << 32 | 0x408, 0x7000_2000 | 0x1ff]);
    let fields = request.fields();
    for (name, value) in [
        ("SID", "0x408"),
        ("SSID", "0xabcde"),
        ("SSV", "1"),
        ("Last", "1"),
        ("W", "1"),
        ("R", "1"),
        ("X", "0"),
        ("Priv", "0"),
        ("PRGIndex", "0x1ff"),
        ("Addr", "0x70002000"),
    ] {
        assert_eq!(get(&fields, name), value, "{name}");
    }
    assert_eq!(
        request.to_string(),
        "page request: stream 0x408 substream 0xabcde wants to read and write (unprivileged) at 0x70002000, group 511, the \
         last of its group: it waits for CMD_PRI_RESP"
    );
    let stop = PageRequestWords([1 << 63 | 1 << 62 | 5 << 32 | 0x408, 0]);
    assert!(stop.is_stop_marker() && stop.to_string().starts_with("stop marker"), "{stop}");
    let exec = PageRequestWords([1 << 63 | 1 << 59 | 1 << 58 | 1, 0x1000]).to_string();
    assert!(exec.contains("execute (privileged)"), "{exec}");
}

#[test]
fn commands_show_their_fields_and_why_they_are_illegal() {
    let show = |a: u64, b: u64| CommandWords([a, b]).to_string();
    assert_eq!(show(0x03 | 0x13 << 32, 1), "CMD_CFGI_STE (SID=0x13, Leaf=1)");
    assert_eq!(show(0x04, 31), "CMD_CFGI_STE_RANGE (Range=31)");
    assert_eq!(show(0x05 | 7 << 12 | 0x13 << 32, 0), "CMD_CFGI_CD (SID=0x13, SSID=0x7)");
    assert_eq!(
        show(0x12 | 3 << 12 | 2 << 20 | 9 << 32 | 5 << 48, 0x7000_0000 | 1 << 10 | 3 << 8 | 1),
        "CMD_TLBI_NH_VA (VMID=9, ASID=5, Address=0x70000000, Leaf=1, TG=1, TTL=3, NUM=3, SCALE=2)"
    );
    assert_eq!(
        show(0x40 | 1 << 11 | 1 << 12 | 8 << 32, 0x1000 | 52),
        "CMD_ATC_INV (SID=0x8, SSV=1, SSID=0x1, Size=52, Addr=0x1000)"
    );
    assert_eq!(show(0x41 | 8 << 32, 2 << 12 | 3), "CMD_PRI_RESP (SID=0x8, PRGIndex=0x3, Resp=2)");
    assert_eq!(show(0x44 | 1 << 12 | 8 << 32, 0xbeef), "CMD_RESUME (SID=0x8, STAG=0xbeef, Ac=1)");
    assert_eq!(
        show(0x46 | 1 << 12 | 3 << 22 | 0xf << 24 | 0x55 << 32, 0x9000_0004),
        "CMD_SYNC (CS=1, MSH=3, MSIAttr=0xf, MSIData=0x55, MSIAddr=0x90000004)"
    );
    let why = |a: u64, b: u64| CommandWords([a, b]).illegal().unwrap_or_default();
    assert!(why(0xff, 0).contains("no such opcode"));
    assert!(why(0, 0).contains("CMDQ_PROD was moved before the command was visible"));
    assert!(why(0x18, 0).contains("Secure command queue"));
    assert!(why(0x03 | 1 << 10, 0).contains("SSec=1"));
    assert!(why(0x46 | 3 << 12, 0).contains("CS=3"));
    assert!(why(0x41, 3 << 12).contains("Resp=3"));
    assert!(why(0x12, 1 << 10).contains("NUM, SCALE and TTL are all 0"));
    assert!(why(0x44, 0).contains("STALL_MODEL"));
    assert!(why(0x2a, 0).contains("IDR0.S2P"));
    assert_eq!(why(0x46, 0), "");
    assert_eq!(why(0x30, 0), "", "always legal");
}

#[test]
fn command_errors_and_global_errors_read_like_linux_and_like_sentences() {
    let e = CommandError { cons: 0x0100_0007, command: Some(CommandWords([0xff, 0])) };
    assert_eq!(
        e.linux_lines("s"),
        [
            "arm-smmu-v3 s: CMDQ error (cons 0x01000007): Illegal command",
            "arm-smmu-v3 s: skipping command in error state:",
            "arm-smmu-v3 s: \t0x00000000000000ff",
            "arm-smmu-v3 s: \t0x0000000000000000",
        ]
    );
    assert!(e.to_string().starts_with("CERROR_ILL at command 0x7"), "{e}");
    assert_eq!(CommandError { cons: 0x0200_0000, command: None }.name(), Some("CERROR_ABT"));
    assert_eq!(CommandError { cons: 0x0300_0000, command: None }.name(), Some("CERROR_ATC_INV_SYNC"));
    assert_eq!(CommandError { cons: 0x7f00_0000, command: None }.name(), None);
    let g = GlobalErrors(1 | 1 << 2 | 1 << 8);
    assert_eq!(g.names(), ["CMDQ_ERR", "EVENTQ_ABT_ERR", "SFM_ERR"]);
    assert_eq!(get(&g.fields(), "MSI_GERROR_ABT_ERR"), "0");
    assert_eq!(
        g.linux_lines("s")[0],
        "arm-smmu-v3 s: unexpected global error reported (0x00000105), this could be serious"
    );
    assert!(g.to_string().contains("service failure mode"), "{g}");
    assert_eq!(GlobalErrors(0).to_string(), "no global error is active");
}

fn told(board: &Board, va: u64, access: Access) -> String {
    story_v3(&board.explain(va, access), board.smmu.caps(), &Seen::default()).to_string()
}

#[test]
fn a_stage_1_story_shows_every_word_on_the_way() {
    let board = Board::new();
    board.map(0x7000_0000, 0x6000_0000);
    let text = told(&board, 0x7000_0123, Access::Read);
    for words in [
        "read of 0x70000123 by stream 0x10: non-secure unprivileged data",
        "SMMUEN=1: the stream table decides",
        "linear table at 0x10080000, 2^5 streams",
        "Config=0b101: stage 1; CDs at 0x10090000, one, no substreams (S1CDMax=0)",
        "S1STALLD=1: stage 1 faults do not stall",
        "V=1 ASID 1; T0SZ=16: 48-bit addresses, 4 KiB granule, start level 0; TTB1 off (EPD1=1); 48-bit output; a fault \
         aborts and is recorded (A=1 R=1)",
        "TTB0: first table at 0x10000000",
        "S1 L0",
        "S1 L3",
        "AttrIndx=0(Normal-NC)",
        "0x60000123; page of 4 KiB",
    ] {
        assert!(text.contains(words), "{words:?} is not in\n{text}");
    }
    let json =
        serde_json::to_value(story_v3(&board.explain(0, Access::Read), board.smmu.caps(), &Seen::default()))
            .unwrap();
    let last = json["lines"].as_array().unwrap().last().unwrap();
    assert_eq!((&last["kind"], &last["fields"]["event"]), (&"fault".into(), &"F_TRANSLATION".into()));
}

#[test]
fn stories_of_bypass_abort_and_of_an_smmu_that_is_off() {
    let board = Board::new();
    board.put(STE, &[4 << 1 | 1, 1 << 44]);
    assert!(told(&board, 0x1234, Access::Read).contains("0x1234 untranslated: STE.Config says bypass"));
    board.put(STE, &[1]);
    let text = told(&board, 0x1234, Access::Read);
    assert!(text.ends_with("aborted without an event: STE.Config says abort"), "{text}");
    board.reg(offset::CR0, 0xc);
    let text = told(&board, 0x1234, Access::Read);
    assert!(text.contains("GBPA") && text.contains("ABORT=0: everything passes"), "{text}");
    let causes = board.read_causes(0x1234);
    assert_eq!(causes[0].kind, CauseKind::SmmuOff);
    board.reg(offset::GBPA, 1 << 31 | 1 << 20);
    let causes = board.read_causes(0x1234);
    assert!(causes[0].what.contains("GBPA.ABORT=1"), "{}", causes[0]);
}

#[test]
fn a_nested_story_shows_both_stages_and_names_the_class() {
    let board = Board::new();
    board.map(0x7000_0000, 0x4000_0000);
    board.stage2(true);
    board.map2(0x4000_0000, 0x6000_0000);
    let text = told(&board, 0x7000_0000, Access::Write);
    assert!(text.contains("Config=0b111: stage 1, then stage 2"), "{text}");
    assert!(
        text.contains("VMID 1, S2T0SZ=24: 40-bit addresses, 4 KiB granule, start level 1, 48-bit output"),
        "{text}"
    );
    assert!(text.contains("CD S2 L3"), "{text}");
    assert!(text.contains("result      0x60000000"), "{text}");
    // The CD is not mapped by stage 2.
    board.put(board.slot(ROOT2, 1, CDS), &[0]);
    let text = told(&board, 0x7000_0000, Access::Write);
    assert!(
        text.contains(
            "F_TRANSLATION: translation fault, stage 2 level 3 (IPA 0x10090000, of a context descriptor)"
        ),
        "{text}"
    );
    let found = board.write_causes(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::Stage2NotMapped);
    assert!(found[0].what.contains("where the guest's context descriptor is"), "{}", found[0]);
    // A stage 1 table is not.
    board.map2(CDS, CDS);
    let l3 = board.slot(ROOT, 0, 0x7000_0000) & !0xfff;
    board.put(board.slot(ROOT2, 1, l3), &[0]);
    let found = board.write_causes(0x7000_0000);
    assert!(found[0].what.contains("where a stage 1 table is"), "{}", found[0]);
    assert!(told(&board, 0x7000_0000, Access::Write).contains("of a stage 1 table"));
    // The data is not.
    board.map2(l3, l3);
    board.put(board.slot(ROOT2, 1, 0x4000_0000), &[0]);
    let found = board.write_causes(0x7000_0000);
    assert!(found[0].what.contains("IPA 0x40000000, to which stage 1 leads"), "{}", found[0]);
    // It is read only.
    board.put(board.slot(ROOT2, 1, 0x4000_0000), &[0x6000_0000 | 0x77f]);
    let found = board.write_causes(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::Stage2Forbids);
    assert!(
        found[0].to_string().contains("S2AP[1] = 0 (no writes) in stage 2's the level 3"),
        "{}",
        found[0]
    );
}

#[test]
fn stream_ids_out_of_the_table_are_told_apart() {
    let board = Board::new();
    let causes = |sid: u32| {
        let e = board.smmu.explain(Initiator::new(StreamId(sid)), Iova(0), Access::Read);
        let names = [(StreamId(0x408), "eth0".to_owned())];
        causes_v3(&board.smmu, &e, &CauseContext { names: &names, ..CauseContext::default() })
    };
    let found = causes(0x408);
    assert_eq!(found[0].kind, CauseKind::StreamIdTooWide);
    let text = found[0].to_string();
    assert!(
        text.contains("LOG2SIZE=5: streams below 0x20")
            && text.contains("eth0")
            && text.contains("iommu-map"),
        "{text}"
    );
    // Two levels: 2^16 streams, SPLIT = 8, the array of 0x400 has Span 0.
    board.reg_off(offset::STRTAB_BASE_CFG, 1 << 16 | 8 << 6 | 16);
    board.put(STREAMS, &[0; 8]);
    let found = causes(0x408);
    assert_eq!(found[0].kind, CauseKind::MissingStreamMapping);
    assert!(found[0].what.contains("no stream of 0x400..0x500"), "{}", found[0]);
    board.put(STREAMS + 4 * 8, &[STREAMS | 0x4000 | 3]);
    let found = causes(0x408);
    assert_eq!(found[0].kind, CauseKind::StreamIdTooWide);
    assert!(found[0].what.contains("beyond the 4 entries"), "{}", found[0]);
    board.put(STREAMS + 4 * 8, &[STREAMS | 0x4000 | 11]);
    assert_eq!(causes(0x408)[0].kind, CauseKind::IllegalStreamEntry);
    // Somebody has programmed 0x208, with the same device and function.
    board.put(STREAMS + 4 * 8, &[0]);
    board.put(STREAMS + 2 * 8, &[STREAMS | 0x4000 | 9]);
    board.put(STREAMS + 0x4000 + 8 * 64, &[STE0]);
    let found = causes(0x408);
    assert_eq!(kinds(&found), [CauseKind::WrongStreamId, CauseKind::MissingStreamMapping]);
    let text = found[0].to_string();
    assert!(text.contains("the STE of stream 0x208 was probably meant for stream 0x408"), "{text}");
    assert!(
        text.contains("put 0x400 as the base into iommu-map") && text.contains("a domain: 0x208"),
        "{text}"
    );
    // Where no memory is.
    board.put(STREAMS + 4 * 8, &[0x2000_0000 | 9]);
    let found = causes(0x408);
    assert_eq!(found[0].kind, CauseKind::ConfigOutsideMemory);
    assert!(found[0].to_string().contains("0x20000200"), "{}", found[0]);
}

#[test]
fn bad_entries_name_their_rule() {
    let board = Board::new();
    board.put(STE, &[0, 0]);
    let found = board.read_causes(0);
    assert_eq!(found[0].kind, CauseKind::InvalidStreamEntry);
    assert!(found[0].to_string().contains("the whole entry at 0x10080400 is zero"), "{}", found[0]);
    for (word0, word1, rule, fix) in [
        (STE0 | 31 << 59, STE1, "STE.S1CDMax is more than IDR1.SSIDSIZE", "at most IDR1.SSIDSIZE"),
        (STE0, STE1 | 1 << 30, "STE.STRW is reserved", "STE.STRW=0"),
    ] {
        board.put(STE, &[word0, word1]);
        let found = board.read_causes(0);
        assert_eq!(found[0].kind, CauseKind::IllegalStreamEntry);
        assert!(found[0].what.contains(rule) && found[0].fix.contains(fix), "{}", found[0]);
    }
    board.put(STE, &[1]);
    assert_eq!(board.read_causes(0)[0].kind, CauseKind::NoDomainAttached);
    // Context descriptors.
    board.put(STE, &[STE0, STE1]);
    board.put(CDS, &[CD0 & !(1 << 31)]);
    assert_eq!(board.read_causes(0)[0].kind, CauseKind::InvalidContextDescriptor);
    board.put(CDS, &[CD0 & !0x3f | 8]);
    let found = board.read_causes(0);
    assert_eq!(found[0].kind, CauseKind::IllegalContextDescriptor);
    assert!(found[0].what.contains("CD.T0SZ or T1SZ is out of range"), "{}", found[0]);
    board.put(CDS, &[CD0 | 1 << 44]);
    assert!(board.read_causes(0)[0].what.contains("CD.S = 1 with STE.S1STALLD = 1"));
    board.put(STE, &[0x2000_0000 | 5 << 1 | 1, STE1]);
    let found = board.read_causes(0);
    assert_eq!(found[0].kind, CauseKind::ConfigOutsideMemory);
    assert!(found[0].to_string().contains("STE.S1ContextPtr is 0x20000000"), "{}", found[0]);
}

#[test]
fn every_rule_of_the_models_has_advice_of_its_own_or_a_missing_feature() {
    // An SMMU with few features makes most rules speak.
    let mut few = portcullis_smmuv3::Caps::small();
    few.sid_bits = 8;
    few.stall_model = StallModel::Terminate;
    let board = Board::over(SystemMemory::new(&RAM).unwrap(), few);
    board.put(STE, &[STE0, STE1]);
    let found = board.read_causes(0);
    assert!(found[0].what.contains("S1STALLD") && found[0].fix.contains("S1STALLD=0"), "{}", found[0]);
    board.put(STE, &[STE0 | 2 << 1, STE1 & !(1 << 27)]);
    let found = board.read_causes(0);
    assert!(
        found[0].what.contains("IDR0.S2P lacks") && found[0].fix.contains("IDR0 to IDR5"),
        "{}",
        found[0]
    );
}

#[test]
fn substreams_are_told_apart() {
    let board = Board::new();
    let found = board.causes(&board.explain_with(1, 0));
    assert_eq!(found[0].kind, CauseKind::SubstreamsOff);
    assert!(found[0].what.contains("S1CDMax=0") && found[0].fix.contains("pasid-num-bits"), "{}", found[0]);
    // Eight CDs.
    board.put(STE, &[STE0 | 3 << 59, STE1]);
    let found = board.causes(&board.explain_with(9, 0));
    assert!(found[0].what.contains("beyond the 0x8 context descriptors"), "{}", found[0]);
    let found = board.causes(&board.explain_with(5, 0));
    assert_eq!(found[0].kind, CauseKind::SubstreamNotBound);
    assert!(found[0].what.contains("nobody is bound to substream 0x5"), "{}", found[0]);
    let found = board.causes(&board.explain_with(0, 0));
    assert_eq!(found[0].kind, CauseKind::StreamDisabled);
    board.put(STE, &[STE0 | 3 << 59, STE1 & !3]);
    let found = board.read_causes(0);
    assert_eq!(found[0].kind, CauseKind::StreamDisabled);
    assert!(found[0].what.contains("S1DSS=0 terminates"), "{}", found[0]);
    // Two levels, the second invalid.
    board.put(STE, &[STE0 | 10 << 59 | 1 << 4, STE1]);
    board.put(CDS, &[0; 16]);
    let found = board.causes(&board.explain_with(0x41, 0));
    assert_eq!(found[0].kind, CauseKind::SubstreamNotBound);
    assert!(found[0].what.contains("level 1 context descriptor"), "{}", found[0]);
    // An exited process.
    board.put(STE, &[STE0 | 3 << 59, STE1]);
    board.put(CDS + 64, &[CD0 | 1 << 14, ROOT]);
    let e = board.explain_with(1, 0x7000_0000);
    let found = board.causes(&e);
    assert_eq!(found[0].kind, CauseKind::WalksDisabled);
    assert!(
        found[0].to_string().contains("EPD0=1 keeps a CD valid after its process has exited"),
        "{}",
        found[0]
    );
}

fn kinds(found: &[Cause]) -> Vec<CauseKind> {
    found.iter().map(|c| c.kind).collect()
}

#[test]
fn translation_faults_are_told_apart() {
    let board = Board::new();
    board.map(0x7000_0000, 0x6000_0000);
    board.map(0x7000_1000, 0x6000_1000);
    let found = board.write_causes(0x7100_0000);
    assert_eq!(kinds(&found), [CauseKind::NotMapped]);
    assert!(
        found[0].to_string().contains("nearest mappings: 0x70000000..0x70002000 -> 0x60000000 (8 KiB)"),
        "{}",
        found[0]
    );
    assert_eq!(board.write_causes(0x7000_2003)[0].kind, CauseKind::PastTheEnd);
    assert_eq!(board.write_causes(0x6fff_f000)[0].kind, CauseKind::BeforeTheBegin);
    let found = board.write_causes(0x6000_1004);
    assert_eq!(found[0].kind, CauseKind::PhysicalAddress);
    assert!(found[0].what.contains("mapped at DMA address 0x70001004"), "{}", found[0]);
    let unmapped = [Unmapped { iova: 0x7000_2000, len: 0x1000, ago_ns: 20_000 }];
    let e = board.explain(0x7000_2003, Access::Write);
    let found = causes_v3(&board.smmu, &e, &CauseContext { unmapped: &unmapped, ..CauseContext::default() });
    assert_eq!(found[0].kind, CauseKind::UsedAfterUnmap);
    assert!(found[0].what.contains("unmapped 20 µs before this access"), "{}", found[0]);
    let found = board.write_causes(0xffff_8000_1234_5000);
    assert_eq!(kinds(&found), [CauseKind::CpuVirtualAddress, CauseKind::WalksDisabled]);
    assert!(found[1].what.contains("TTB1 is off (EPD1=1)"), "{}", found[1]);
    let found = board.write_causes(1 << 50);
    assert!(kinds(&found).contains(&CauseKind::AddressOutOfRange), "{found:?}");
}

#[test]
fn tables_of_another_shape_are_found_out_and_nothing_is_changed() {
    let board = Board::new();
    board.put(board.slot(ROOT, 1, 0x7f_b000_1000), &[0x6000_3000 | PAGE]);
    let before = board.load(CDS);
    let found = board.write_causes(0x7f_b000_1080);
    assert_eq!(kinds(&found), [CauseKind::LayoutMismatch]);
    let text = found[0].to_string();
    assert!(
        text.contains(
            "with CD.T0SZ = 25 (39-bit addresses, 4 KiB granule, start level 1) these tables translate 0x7fb0001080 to 0x60003080"
        ),
        "{text}"
    );
    assert_eq!(board.load(CDS), before);
    board.put(CDS, &[CD0 + 9]);
    assert_eq!(board.write_causes(0x7f_b000_1080), []);
    // Stage 2: built for 39 bits from level 1, described as 48 bits from level 0.
    board.stage2(false);
    board.map2(0x4000_0000, 0x6000_0000);
    assert_eq!(board.write_causes(0x4000_0000), []);
    board.put(STE + 16, &[STE2 & !(0x3f << 32) & !(3 << 38) | 16 << 32 | 2 << 38]);
    let found = board.write_causes(0x4000_0000);
    assert_eq!(found[0].kind, CauseKind::LayoutMismatch, "{found:?}");
    assert!(found[0].to_string().contains("S2SL0 = 1"), "{}", found[0]);
}

#[test]
fn wrong_bases_and_missing_memory_are_named() {
    let board = Board::new();
    board.map(0x7000_0000, 0x6000_0000);
    board.put(CDS + 8, &[0x6000_4000]);
    let found = board.write_causes(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::WrongTableBase);
    assert!(found[0].what.contains("CD.TTB0 points to 0x60004000, where everything is zero"), "{}", found[0]);
    board.put(CDS + 8, &[0x3000_0000]);
    let found = board.write_causes(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::WrongTableBase);
    assert!(found[0].to_string().contains("where no memory answers"), "{}", found[0]);
    board.put(CDS + 8, &[ROOT]);
    board.put(ROOT, &[0x2000_0003]);
    let found = board.write_causes(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::TableOutsideMemory);
    assert!(
        found[0].to_string().contains("the level 0 descriptor at 0x10000000 is 0x20000003"),
        "{}",
        found[0]
    );
}

#[test]
fn permission_faults_name_the_bit_and_what_would_help() {
    let board = Board::new();
    board.map_with(0x7000_0000, 0x6000_0000, PAGE | 1 << 7);
    let found = board.write_causes(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::ReadOnly);
    assert!(
        found[0].to_string().contains("AP[2] = 1 (read-only) in the level 3 page descriptor"),
        "{}",
        found[0]
    );
    board.map_with(0x7000_0000, 0x6000_0000, PAGE & !(1 << 6));
    let found = board.write_causes(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::PrivilegedOnly);
    let text = found[0].to_string();
    assert!(
        text.contains("with STE.PRIVCFG = 3 (privileged) the access is translated to 0x60000000"),
        "{text}"
    );
    // An override that does it.
    board.map_with(0x7000_0000, 0x6000_0000, PAGE | 3 << 53);
    board.put(STE + 8, &[STE1 | 3 << 50]);
    let found = board.read_causes(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::InstructionFetch);
    let text = found[0].to_string();
    assert!(text.contains("STE.INSTCFG=3 turns every read"), "{text}");
    assert!(text.contains("with STE.INSTCFG = 2 (data) the access is translated to 0x60000000"), "{text}");
    assert_eq!(board.write_causes(0x7000_0000), [], "writes are data");
    // PAN.
    board.put(STE + 8, &[STE1 | 3 << 48]);
    board.put(CDS, &[CD0 | 1 << 40]);
    let found = board.read_causes(0x7000_0000);
    assert!(found[0].what.contains("CD.PAN=1"), "{}", found[0]);
    // A read-only table above a writable page.
    board.put(STE + 8, &[STE1]);
    board.put(CDS, &[CD0]);
    board.put(ROOT, &[board.load(ROOT) | 1 << 62]);
    let found = board.write_causes(0x7000_0000);
    assert!(
        found[0].to_string().contains("APTable[1] = 1 (read-only below) in the level 0 table descriptor"),
        "{}",
        found[0]
    );
}

#[test]
fn access_flags_and_output_sizes_are_named() {
    let board = Board::new();
    board.map_with(0x7000_0000, 0x6000_0000, PAGE & !(1 << 10));
    let found = board.write_causes(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::AccessFlagClear);
    assert!(found[0].fix.contains("CD.HA=1 and let the SMMU set it"), "{}", found[0]);
    board.put(CDS, &[CD0 & !(7 << 32)]);
    board.map(0x7000_0000, 0x6000_0000);
    board.map_with(0x7000_1000, 0x8_6000_0000, PAGE);
    let found = board.write_causes(0x7000_1000);
    assert_eq!(found[0].kind, CauseKind::OutputSizeTooSmall);
    let text = found[0].to_string();
    assert!(
        text.contains("CD.IPS = 0 (32 bits) is too small for 0x860000000, which needs 36 bits"),
        "{text}"
    );
    assert!(text.contains("with CD.IPS = 1 these tables translate 0x70001000 to 0x860000000"), "{text}");
}

#[test]
fn tables_and_entries_that_the_cpu_did_not_clean_come_first() {
    let memory = SystemMemory::with_cpu_cache(&RAM, 1024).unwrap();
    let board = Board::over(memory, portcullis_smmuv3::Caps { coherent: false, ..caps() });
    let cache = board.memory.cpu_cache().unwrap();
    let look = |va| {
        let e = board.explain(va, Access::Write);
        let (stale, _) = cache.take_reports();
        let ctx = CauseContext { ram: &RAM, stale: &stale, ..CauseContext::default() };
        cache.unreported(|| causes_v3(&board.smmu, &e, &ctx))
    };
    let found = look(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::TablesNotCleaned);
    assert!(found[0].what.contains("stream table entry"), "{}", found[0]);
    board.memory.clean(portcullis_arch::Pa(ROOT), 0x10_0000);
    board.map(0x7000_0000, 0x6000_0000);
    let found = look(0x7000_0000);
    assert_eq!(found[0].kind, CauseKind::TablesNotCleaned);
    assert!(found[0].what.contains("level 0 descriptor at 0x10000000"), "{}", found[0]);
    board.memory.clean(portcullis_arch::Pa(ROOT), 0x10_0000);
    assert_eq!(look(0x7000_0000), []);
    let found = look(0x7100_0000);
    assert!(found[0].fix.contains("IDR0.COHACC=0"), "{}", found[0]);
}

#[test]
fn what_the_port_remembers_and_the_tables_do_not_say_is_told() {
    let board = Board::new();
    board.map(0x7000_0000, 0x6000_0000);
    let mut port = board.smmu.port(board.memory.view(View::NonCoherent, "dma"));
    let from = Initiator::new(StreamId(STREAM));
    port.write(from, Iova(0x7000_0000), &[1]).unwrap();
    let look = |cached, passed| {
        let e = board.explain(0x7000_0000, Access::Write);
        let ctx = CauseContext { ram: &RAM, cached, passed, ..CauseContext::default() };
        let seen = Seen { cached, passed, asked: false };
        (causes_v3(&board.smmu, &e, &ctx), story_v3(&e, board.smmu.caps(), &seen))
    };
    let (found, told) = look(port.cached(&from, Iova(0x7000_0000)), true);
    assert_eq!(found, []);
    assert!(told.to_string().contains("as the tables say"), "{told}");
    // The descriptor is gone.
    board.put(board.slot(ROOT, 0, 0x7000_0000), &[0]);
    port.write(from, Iova(0x7000_0000), &[1]).unwrap();
    let (found, told) = look(port.cached(&from, Iova(0x7000_0000)), true);
    assert_eq!(found[0].kind, CauseKind::MissingTlbInvalidation);
    assert!(found[0].to_string().contains("CMD_TLBI_NH_VA"), "{}", found[0]);
    assert_eq!(told.lines.last().unwrap().kind, LineKind::Stale);
    assert!(
        told.to_string().ends_with("0x60000000 from the stale TLB entry; the tables are not looked at"),
        "{told}"
    );
    // It leads elsewhere.
    board.map(0x7000_0000, 0x6000_8000);
    let (found, _) = look(port.cached(&from, Iova(0x7000_0000)), true);
    assert!(found[0].to_string().contains("the tables say 0x60008000"), "{}", found[0]);
    // The CD is gone.
    board.put(CDS, &[0]);
    port.write(from, Iova(0x7000_0000), &[1]).unwrap();
    let (found, told) = look(port.cached(&from, Iova(0x7000_0000)), true);
    assert_eq!(found[0].kind, CauseKind::MissingConfigInvalidation);
    assert!(told.to_string().contains("missing CMD_CFGI and TLB invalidation"), "{told}");
    let (found, told) = look(None, true);
    assert_eq!(found[0].kind, CauseKind::MissingConfigInvalidation);
    assert!(told.to_string().ends_with("it went through by the stale configuration"), "{told}");
    // Refused in truth: nothing is stale.
    let (found, told) = look(None, false);
    assert_eq!(found[0].kind, CauseKind::InvalidContextDescriptor);
    assert_eq!(told.lines.last().unwrap().kind, LineKind::Fault);
}

#[test]
fn a_request_of_a_device_with_ats_is_no_event() {
    let board = Board::new();
    let e = board.explain(0x7000_0000, Access::Read);
    let told = story_v3(&e, board.smmu.caps(), &Seen { asked: true, ..Seen::default() }).to_string();
    assert!(told.ends_with("the device's translation request gets no access, which is no event"), "{told}");
}

/// Words that point into tables or data often enough for walks to go on.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => any::<u64>(),
        1 => Just(0),
        4 => (0u64..16, 0u64..4, any::<u8>()).prop_map(|(page, kind, high)| (ROOT + page * 0x1000) | kind | u64::from(high) << 56),
        4 => (0u64..256, any::<u16>(), any::<u16>())
            .prop_map(|(page, low, high)| (0x6000_0000 + page * 0x1000) | u64::from(low & 0xfff) | u64::from(high & 0x7ff) << 52),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_state_is_explained(
        words in prop::collection::vec((0usize..0x2000, word()), 0..200),
        ste in (0u64..8, any::<[u64; 4]>(), any::<[bool; 4]>()),
        cd in (any::<[u64; 3]>(), any::<[bool; 3]>()),
        ssid in prop::option::of(0u32..16),
        va in prop_oneof![any::<u64>(), 0u64..1 << 40, 0x6000_0000u64..0x6010_0000],
        write: bool, passed: bool, attrs: u32,
    ) {
        let board = Board::new();
        for (at, word) in words {
            board.put(ROOT + at as u64 * 8, &[word]);
        }
        let flip = |plain: u64, noise: u64, on: bool| if on { plain ^ (noise & noise.rotate_left(13) & noise.rotate_left(29)) } else { plain };
        let (config, noise, on) = ste;
        let plain = [CDS | config << 1 | 1 | 4 << 59, STE1, STE2, ROOT2];
        let entry: Vec<u64> = (0..4).map(|i| flip(plain[i], noise[i], on[i])).collect();
        board.put(STE, &entry);
        let plain = [CD0, ROOT, 0];
        let words: Vec<u64> = (0..3).map(|i| flip(plain[i], cd.0[i], cd.1[i])).collect();
        board.put(CDS, &words);
        board.put(CDS + 64 * 3, &words);
        let attrs = portcullis_arch::Attributes::from_bits(attrs).with_non_secure(true);
        let from = Initiator {
            substream: ssid.map(portcullis_arch::SubstreamId),
            ..Initiator::new(StreamId(STREAM)).with_attrs(attrs)
        };
        let access = if write { Access::Write } else { Access::Read };
        let e = board.smmu.explain(from, Iova(va), access);
        let told = story_v3(&e, board.smmu.caps(), &Seen { passed, ..Seen::default() });
        prop_assert!(!told.to_string().is_empty());
        prop_assert!(serde_json::to_string(&told).is_ok());
        let found = causes_v3(&board.smmu, &e, &CauseContext { ram: &RAM, passed, ..CauseContext::default() });
        let fine = matches!(e.outcome, Outcome::Translated { .. } | Outcome::Bypass { .. });
        prop_assert!(fine || !found.is_empty(), "{told}");
        if let Outcome::Event { record, .. } = &e.outcome {
            let words = EventWords(record.0);
            prop_assert_eq!(words.stream(), from.stream);
            prop_assert!(words.name().is_some());
        }
        // Nothing has changed.
        prop_assert_eq!(board.smmu.explain(from, Iova(va), access), e);
    }

    #[test]
    fn any_words_are_decoded(words: [u64; 4], active: u32, cons: u32) {
        let event = EventWords(words);
        let request = PageRequestWords([words[0], words[1]]);
        let command = CommandWords([words[2], words[3]]);
        let error = CommandError { cons, command: Some(command) };
        let all = format!("{event}{request}{command}{error}{}", GlobalErrors(active));
        prop_assert!(!all.is_empty() && !event.fields().is_empty() && !request.fields().is_empty());
        prop_assert!(!command.fields().is_empty() && !error.fields().is_empty());
        let _ = (event.transaction(), command.illegal(), event.decoded_lines("s", "c"));
    }
}
