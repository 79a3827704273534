//! What a run prints: for a person, as JSON, as a trace; and that it is the same each time.

mod common;

use common::{Ran, command, of_kind, path, run};
use serde_json::Value;

/// The widest a line may be, unless it is one of the kernel's.
const WIDTH: usize = 116;

#[test]
fn a_fault_is_explained_to_a_person() {
    let ran = run(&["run", "zynqmp-thesis", "unmapped-address"]);
    assert_eq!(ran.code, 0);
    for words in [
        "fpd-dma0 (stream 0x14e8) write 0x70002000 +64: terminated by the IOMMU with an abort, 0 of 64 bytes done",
        "SMR[0]     0x800014e8          ID 0x14e8: matches",
        "S1 L3      [0x820013010] = 0x0000000000000000  invalid",
        "fault      translation fault, stage 1 level 3; recorded in bank 0 as FSR.TF",
        "likely cause: nothing is mapped at 0x70002000",
        "check:",
        "reported to fpd-dma0: translation fault",
        "arm-smmu fd800000.smmu: Unhandled context fault: fsr=0x402, iova=0x70002000, fsynr=0x13, cbfrsynra=0x14e8, cb=0",
    ] {
        assert!(ran.stdout.contains(words), "{words:?} is not in\n{}", ran.stdout);
    }
}

#[test]
fn lines_fit_a_page() {
    for board in ["zynqmp-thesis", "smmuv3-tour", "smmuv3"] {
        for extra in [&[][..], &["--explain"]] {
            let ran = run(&[&["run", board], extra].concat());
            let long = |l: &&str| l.chars().count() > WIDTH && !l.trim_start().starts_with("arm-smmu");
            let long: Vec<_> = ran.stdout.lines().filter(long).collect();
            assert!(long.is_empty(), "{}", long.join("\n"));
            let trailing: Vec<_> = ran.stdout.lines().filter(|l| l.ends_with(' ')).collect();
            assert!(trailing.is_empty(), "{trailing:?}");
        }
    }
}

#[test]
fn an_smmuv3_fault_is_explained_to_a_person() {
    let ran = run(&["run", "smmuv3-tour", "stage1"]);
    assert_eq!(ran.code, 0);
    for words in [
        "dma3 (stream 0x13) read 0x10005000 +64: terminated by the IOMMU with an abort, 0 of 64 bytes done",
        "SMMUEN=1: the stream table decides",
        "two-level table at 0x",
        "Span=9: 256 streams, their entries at 0x",
        "V=1 Config=0b101: stage 1; CDs at 0x",
        "TTB0: first table at 0x",
        "F_TRANSLATION: translation fault, stage 1 level 3; the client gets an abort, recorded",
        "likely cause: nothing is mapped at 0x10005000",
        "reported to dma3: F_TRANSLATION: no valid translation for the address, on an unprivileged read of 0x10005000",
        "arm-smmu-v3 31000000.iommu: event 0x10 received:",
        "arm-smmu-v3 31000000.iommu: \t0x0000001300000010",
    ] {
        assert!(ran.stdout.contains(words), "{words:?} is not in\n{}", ran.stdout);
    }
    // Substreams, translations of a device, messages.
    let ran =
        run(&["run", "smmuv3-tour", "three-processes", "page-request", "command-error", "stale-config"]);
    for words in [
        "testdev0 (stream 0x408 substream 0x2) read 0x50000000 +64: ok",
        "testdev0: page request for 0x",
        "testdev0: page response for group 0 substream 0x1: success",
        "message: 0x1000 written to 0x2f030040, LPI 12288",
        "TTB0 is off (EPD0=1)",
        "reported to the SMMU's driver: global error CMDQ_ERR: CERROR_ILL at command 0x",
        "CMDQ error (cons 0x01",
        "likely cause: the SMMU still uses an older STE or CD of stream 0x13: missing CMD_CFGI",
    ] {
        assert!(ran.stdout.contains(words), "{words:?} is not in\n{}", ran.stdout);
    }
}

#[test]
fn json_of_an_smmuv3_has_events_fields_and_what_devices_did() {
    let args = ["run", "smmuv3-tour", "nested", "page-request", "command-error", "queue-overflow", "--json"];
    let ran = run(&args);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let lines = ran.lines();
    let reports = of_kind(&lines, "report");
    let fault = reports.iter().find(|r| r["event"] == "F_TRANSLATION").unwrap();
    assert_eq!(
        (&fault["about"], &fault["device"], &fault["stage"]),
        (&"fault".into(), &"dma0".into(), &2.into())
    );
    assert_eq!((&fault["fields"]["CLASS"], &fault["fields"]["IPA"]), (&"IN".into(), &"0x50000000".into()));
    assert_eq!(fault["kernel"].as_array().unwrap().len(), 5);
    let command = reports.iter().find(|r| r["event"] == "CERROR_ILL").unwrap();
    assert_eq!((&command["about"], &command["fields"]["opcode"]), (&"global error".into(), &"0xff".into()));
    let lost = reports.iter().find(|r| r["about"] == "records lost").unwrap();
    assert!(lost["kernel"][0].as_str().unwrap().ends_with("EVTQ overflow detected -- events lost"));
    let page = reports.iter().find(|r| r["about"] == "page request").unwrap();
    assert_eq!((&page["substream"], &page["stalled"]), (&1.into(), &true.into()));
    let told = of_kind(&lines, "fault").into_iter().find(|f| f["engine"] == "dma0").unwrap();
    assert_eq!(told["causes"][0]["kind"], "stage2-not-mapped");
    let last = told["story"]["lines"].as_array().unwrap().last().unwrap();
    assert_eq!((&last["kind"], &last["fields"]["event"]), (&"fault".into(), &"F_TRANSLATION".into()));
    let ats: Vec<_> = of_kind(&lines, "ats").into_iter().map(|a| a["what"].as_str().unwrap()).collect();
    for what in ["request", "translated", "page-request", "page-response", "invalidation"] {
        assert!(ats.contains(&what), "{what}");
    }
    let message = of_kind(&lines, "message")[0];
    assert_eq!((&message["address"], &message["lpi"]), (&"0x2f030040".into(), &12288.into()));
    let transfer = of_kind(&lines, "transfer").into_iter().find(|t| t["engine"] == "testdev0").unwrap();
    assert_eq!((&transfer["stream"], &transfer["substream"]), (&0x408.into(), &1.into()));
}

#[test]
fn a_fault_that_was_told_is_told_in_short_and_with_explain_in_full() {
    let count = |ran: &Ran, words: &str| ran.stdout.matches(words).count();
    let ran = run(&["run", "zynqmp-thesis", "ps-smmu-map"]);
    assert_eq!(count(&ran, "\n     reported to "), 16, "every fault is reported");
    assert_eq!(count(&ran, "fault      translation fault, stage 1 level 3"), 16, "and what it was is said");
    assert_eq!(count(&ran, "likely cause: 0x70002000 was mapped, and unmapped "), 1, "but explained once");
    assert_eq!(count(&ran, "as that of fpd-dma0 above, with other ids and addresses"), 15);
    let ran = run(&["run", "zynqmp-thesis", "ps-smmu-map", "--explain"]);
    assert_eq!(count(&ran, "= 0x0000000000000000  invalid"), 16);
    // Two copies per channel, each of one page, read and written: 64 walks of four levels.
    assert_eq!(count(&ran, "\n         S1 L0      ["), 64);
}

#[test]
fn a_row_of_transfers_is_counted_and_each_is_in_the_json() {
    let ran = run(&["run", "zynqmp-thesis", "pl-smmu-map"]);
    assert!(ran.stdout.contains("... and 253 more writes, to 0x70000ff0: ok"), "{}", ran.stdout);
    let ran = run(&["run", "zynqmp-thesis", "pl-smmu-map", "--json"]);
    assert!(of_kind(&ran.lines(), "transfer").len() > 256);
}

#[test]
fn explain_tells_stream_bank_and_every_descriptor() {
    let ran = run(&["run", "zynqmp-thesis", "ps-smmu-map", "--explain"]);
    let story: Vec<_> =
        ran.stdout.lines().skip_while(|l| !l.contains("read of 0x70000000")).take(20).collect();
    let story = story.join("\n");
    for words in [
        "read of 0x70000000 by stream 0x14e8",
        "CR0        0x00201c06",
        "SMR[0]     0x800014e8          ID 0x14e8: matches",
        "S2CR[0]    0x00000000          translate in context bank 0",
        "CBAR[0]    0x0001f300          stage 1",
        "CB0.SCTLR  0x00000067",
        "CB0.TCR    ",
        "CB0.TCR2   ",
        "CB0.TTBR0  ",
        "S1 L0      [0x",
        "S1 L1      [0x",
        "S1 L2      [0x",
        "S1 L3      [0x",
        "page -> 0x60000000, 4 KiB",
        "result     0x60000000",
    ] {
        assert!(story.contains(words), "{words:?} is not in\n{story}");
    }
}

#[test]
fn json_is_one_object_a_line_and_has_the_fault_with_its_causes() {
    let ran = run(&["run", "zynqmp-thesis", "unmapped-address", "wrong-stream-id", "--json"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let lines = ran.lines();
    assert!(lines.iter().all(|l| l["kind"].is_string()));
    let fault = of_kind(&lines, "fault")[0];
    assert_eq!(fault["engine"], "fpd-dma0");
    let last = fault["story"]["lines"].as_array().unwrap().last().unwrap();
    assert_eq!(last["kind"], "fault");
    assert_eq!(fault["causes"][0]["kind"], "not-mapped");
    for key in ["what", "fix"] {
        assert!(fault["causes"][0][key].as_str().is_some_and(|t| !t.is_empty()));
    }
    let report = of_kind(&lines, "report")[0];
    assert_eq!((&report["device"], &report["iova"]), (&Value::from("fpd-dma0"), &Value::from("0x70002000")));
    assert_eq!(
        (&report["level"], &report["bank"], &report["stream"]),
        (&3.into(), &0.into(), &0x14e8.into())
    );
    let unknown = of_kind(&lines, "report").into_iter().find(|r| r["reason"] == "unknown stream").unwrap();
    assert_eq!((&unknown["device"], &unknown["stream"]), (&Value::Null, &0x200.into()));
    let summary = of_kind(&lines, "summary")[0];
    assert_eq!((&summary["passed"], &summary["failed"]), (&2.into(), &Value::Array(vec![])));
    let stale = run(&["run", "zynqmp-thesis", "stale-buffer", "--json"]).lines();
    let stale = of_kind(&stale, "stale")[0];
    assert_eq!((&stale["missing"], &stale["pa"]), (&"clean".into(), &"0x60000000".into()));
}

#[test]
fn a_trace_file_has_registers_transactions_and_interrupts_in_order() {
    let file = path("trace.json");
    let ran = run(&["run", "zynqmp-thesis", "ps-smmu-map", "wrong-stream-id", "--trace", &file]);
    assert_eq!(ran.code, 0);
    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let named = |name: &str| -> Vec<(u64, u64)> {
        let tracks = events.iter().filter(|e| e["name"] == "thread_name" && e["args"]["name"] == name);
        tracks.map(|e| (e["pid"].as_u64().unwrap(), e["tid"].as_u64().unwrap())).collect()
    };
    let on = |(pid, tid): (u64, u64)| {
        let here = move |e: &&Value| e["pid"] == pid && e["tid"] == tid && e["ph"] != "M";
        events.iter().filter(here).collect::<Vec<_>>()
    };
    let processes: Vec<_> =
        events.iter().filter(|e| e["name"] == "process_name").map(|e| &e["args"]["name"]).collect();
    assert_eq!(processes, ["ps-smmu-map", "wrong-stream-id"]);
    let smmu = on(named("registers of smmu")[0]);
    let s2cr = smmu.iter().find(|e| e["name"] == "write 0xc00" && e["args"]["value"] == "0x0");
    assert!(s2cr.is_some(), "the attach of stream 0x14e8 writes S2CR[0]");
    let channel = on(named("fpd-dma0")[0]);
    let names: Vec<_> = channel.iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["read 0x70000000", "write 0x70002000", "read 0x70000000", "write 0x70002000"]);
    assert_eq!(channel[3]["args"]["stream"], "0x14e8");
    assert!(channel[3]["args"]["result"].as_str().unwrap().contains("abort"));
    assert!(on(named("interrupts")[0]).iter().any(|e| e["name"] == "SPI 155 high"));
    assert_eq!(on(named("steps")[0]).len(), 16 - 1 + 1);
    // Boards that are booted after each other do not lie over each other.
    for e in events.iter().filter(|e| e["ph"] != "M") {
        assert!(e["ts"].is_number() && e["pid"].is_number() && e["tid"].is_number(), "{e}");
        assert!(e["ph"] != "X" || e["dur"].is_number(), "{e}");
    }
    for pid in [1, 2] {
        let times =
            events.iter().filter(|e| e["pid"] == pid && e["ph"] != "M").map(|e| e["ts"].as_f64().unwrap());
        assert!(times.collect::<Vec<_>>().is_sorted());
    }
}

#[test]
fn a_trace_of_an_smmuv3_has_substreams_ats_and_messages() {
    let file = path("trace-v3.json");
    let ran = run(&["run", "smmuv3-tour", "page-request", "msi-events", "--trace", &file]);
    assert_eq!(ran.code, 0);
    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let count = |name: &str| events.iter().filter(|e| e["name"] == name).count();
    assert!(count("ATS page-request") >= 2 && count("ATS page-response") >= 2);
    let refused = events.iter().filter(|e| e["name"] == "ATS request" && e["args"]["refused"] == true);
    assert!(refused.count() >= 2);
    assert_eq!(count("LPI 8192"), 1, "the event queue's message");
    assert!(count("SPI 64 high") >= 1, "the event queue's wire");
    assert!(events.iter().any(|e| e["args"]["substream"] == "0x1"));
    // The command queue's doorbell: CMDQ_PROD.
    assert!(count("write 0x98") > 10);
}

#[test]
fn two_runs_are_the_same_to_the_byte() {
    let all = [
        ("zynqmp-thesis", &[][..]),
        ("zynqmp-thesis", &["--json"]),
        ("zynqmp-thesis", &["--explain"]),
        ("smmuv3-tour", &["--json", "--explain"]),
    ];
    for (board, format) in all {
        let once = |name: &str| {
            let file = path(name);
            let ran = run(&[&["run", board, "--trace", &file], format].concat());
            assert_eq!(ran.code, 0);
            (ran.stdout, std::fs::read(&file).unwrap())
        };
        let (a, b) = (once("same-a.json"), once("same-b.json"));
        assert!(a.0 == b.0, "output of {format:?}");
        assert!(a.1 == b.1, "trace of {format:?}");
    }
}

#[test]
fn colours_are_for_terminals() {
    let args = ["run", "zynqmp-thesis", "unmapped-address", "--explain"];
    let plain = run(&args);
    assert!(!plain.stdout.contains('\x1b'));
    let with =
        |set: &[(&str, &str)]| -> Ran { command(&args).envs(set.iter().copied()).output().unwrap().into() };
    let coloured = with(&[("CLICOLOR_FORCE", "1")]);
    assert!(coloured.stdout.contains("\x1b["));
    let none = with(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]);
    assert_eq!(none.stdout, plain.stdout);
    // Nothing but colours: without them it is the same text.
    let mut text = String::new();
    let mut rest = coloured.stdout.as_str();
    while let Some((before, after)) = rest.split_once("\x1b[") {
        text.push_str(before);
        rest = after.split_once('m').unwrap().1;
    }
    assert_eq!(text + rest, plain.stdout);
}

#[test]
fn an_escape_code_in_a_script_does_not_reach_a_pipe() {
    let ran = common::script("escape", "say(\"\\x1b[31mred\");\nexpect(true, \"\\x1b]0;title\\x07\");\n");
    assert_eq!(ran.code, 0);
    assert!(!ran.stdout.contains('\x1b'), "{:?}", ran.stdout);
}

#[test]
fn the_report_of_the_shipped_board_has_the_chip_in_it() {
    let ran = run(&["machine", "zynqmp-thesis"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    for words in [
        "SMMU /axi/smmu@fd800000 is ENABLED",
        "DMA channels: 16",
        "FPD DMA channel 0",
        "LPD DMA channel 7",
        "0x14e8",
        "0x86f",
        "0x200",
    ] {
        assert!(ran.stdout.contains(words), "{words:?} is not in\n{}", ran.stdout);
    }
    let json = run(&["machine", "zynqmp-thesis-hpc1", "--json"]).json();
    assert_eq!(json["dma_channels"].as_array().unwrap().len(), 16);
    assert_eq!(json["pl_writers"][0]["stream"], "0x240");
}

#[test]
fn the_overlay_of_a_master_names_it_and_compiles() {
    let ran = run(&["machine", "zynqmp-thesis", "--protect", "fpd_dma_chan3"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    for words in
        ["/plugin/;", "target-path = \"/axi/dma-controller@fd520000\"", "0x14ea", "status = \"okay\""]
    {
        assert!(ran.stdout.contains(words), "{words:?} is not in\n{}", ran.stdout);
    }
    let json = run(&["machine", "zynqmp-thesis", "--protect", "fpd_dma_chan3", "--json"]).json();
    assert_eq!(json["overlay"], ran.stdout.as_str());
    if common::have_dtc("the_overlay_of_a_master_names_it_and_compiles") {
        let source = common::file("overlay.dtso", &ran.stdout);
        let mut dtc = std::process::Command::new("dtc");
        let output = dtc
            .args(["-@", "-I", "dts", "-O", "dtb", "-o", &path("overlay.dtbo"), &source])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn boards_and_scenarios_are_listed_with_what_they_are() {
    let ran = run(&["scenarios", "zynqmp-thesis"]);
    assert!(ran.stdout.starts_with("ps-dma               Experiment 1: "), "{}", ran.stdout);
    let listed =
        format!("zynqmp-thesis        Portcullis thesis board ({} scenarios)", ran.stdout.lines().count());
    let ran = run(&["boards"]);
    assert!(ran.stdout.lines().any(|l| l == listed), "{}", ran.stdout);
    let boards = run(&["boards", "--json"]).json();
    let tour = boards.as_array().unwrap().iter().find(|b| b["name"] == "smmuv3-tour").unwrap();
    assert_eq!((&tour["tree"], &tour["scenarios"]), (&"smmuv3".into(), &18.into()));
}
