//! `portcullis decode` on lines as kernels print them.

mod common;

use common::{path, run};

fn decoded(log: &str, extra: &[&str]) -> common::Ran {
    let file = path(&format!("decode-{}.log", log.len()));
    std::fs::write(&file, log).unwrap();
    run(&[&["decode", file.as_str()], extra].concat())
}

#[test]
fn lines_of_both_drivers_are_decoded() {
    let log = "[   12.3] arm-smmu fd800000.iommu: Unhandled context fault: fsr=0x402, iova=0x70002000, fsynr=0x13, \
               cbfrsynra=0x14e8, cb=0\n\
               unrelated\n\
               [   13.0] arm-smmu-v3 31000000.iommu: event 0x10 received:\n\
               [   13.0] arm-smmu-v3 31000000.iommu: \t0x0000040800000010\n\
               [   13.0] arm-smmu-v3 31000000.iommu: \t0x0000020800000000\n\
               [   13.0] arm-smmu-v3 31000000.iommu: \t0x0000000050002000\n\
               [   13.0] arm-smmu-v3 31000000.iommu: \t0x0000000000000000\n";
    let ran = decoded(log, &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for words in ["0x70002000", "0x14e8", "F_TRANSLATION", "0x408", "0x50002000", "read"] {
        assert!(ran.stdout.contains(words), "{words} is not in\n{}", ran.stdout);
    }
    let json: serde_json::Value = serde_json::from_str(&decoded(log, &["--json"]).stdout).unwrap();
    assert_eq!(json[0]["message"]["message"], "context-fault");
    assert!(json.as_array().is_some_and(|a| a.len() >= 2));
}

#[test]
fn a_log_without_smmus_and_a_file_that_is_none_are_told_apart() {
    assert_eq!(decoded("nothing here\n", &[]).stdout, "no line of this log is about a fault of an SMMU\n");
    let ran = run(&["decode", "/no/such/file"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("cannot read /no/such/file"), "{}", ran.stderr);
}
