//! `portcullis dma-proxy-test`: arguments as the original program reads them, every byte compared.

mod common;

use common::run;

const USAGE: &str =
    "Usage: dma-proxy-test <# of DMA transfers to perform> <# of bytes in each transfer (< 3MB)>\n";

#[test]
fn other_than_two_arguments_print_the_usage_line() {
    for arguments in [&[][..], &["5"], &["1", "2", "3"], &["--vms", "2", "1"]] {
        let ran = run(&[&["dma-proxy-test"], arguments].concat());
        assert_eq!((ran.code, ran.stdout.as_str()), (1, USAGE), "{arguments:?}");
    }
}

#[test]
fn every_transfer_is_verified_and_the_rate_is_told() {
    let ran = run(&["dma-proxy-test", "3", "65536"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(&lines[..2], ["DMA proxy test", "DMA proxy test complete"]);
    assert!(lines[2].starts_with("3 transfers of 65536 bytes, all verified: "), "{}", lines[2]);
    assert!(lines[2].contains("MB/s"));
}

#[test]
fn a_length_of_3_mb_or_more_is_cut_and_what_is_no_number_is_none() {
    let ran = run(&["dma-proxy-test", "1", "4000000"]);
    assert!(ran.code == 0 && ran.stdout.contains("1 transfers of 3145728 bytes, all verified"));
    let ran = run(&["dma-proxy-test", "several", "10"]);
    assert!(ran.code == 0 && ran.stdout.contains("0 transfers of 10 bytes"));
}

#[test]
fn a_length_that_is_not_positive_fails_every_transfer() {
    for bytes in ["0", "-5", "bytes"] {
        let ran = run(&["dma-proxy-test", "2", bytes]);
        assert_eq!(ran.code, 1, "{bytes}");
        assert_eq!(ran.stdout.matches("Proxy tx transfer error").count(), 2, "{bytes}");
        assert_eq!(ran.stdout.matches("Proxy rx transfer error").count(), 2, "{bytes}");
    }
}

#[test]
fn two_machines_run_it_at_the_same_time() {
    let ran = run(&["dma-proxy-test", "--vms", "2", "25", "100000"]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    for machine in ["A", "B"] {
        let line = format!("machine {machine}: 25 transfers of 100000 bytes, all verified");
        assert!(ran.stdout.contains(&line), "{}", ran.stdout);
    }
    assert!(ran.stdout.contains("together: "));
}

#[test]
fn a_board_without_a_proxy_is_refused() {
    run(&["dma-proxy-test", "--board", "zynqmp-thesis", "1", "1"])
        .is_refused(&["zynqmp-thesis: no dma-proxy"]);
    run(&["dma-proxy-test", "--proxy", "7", "1", "1"]).is_refused(&["dma-proxy7", "dma-proxy0, dma-proxy1"]);
    run(&["dma-proxy-test", "--vms", "3", "1", "1"]).is_refused(&["0, 1 or 2"]);
    run(&["dma-proxy-test", "--board", "zynqmp-thesis", "--vms", "1", "1", "1"])
        .is_refused(&["no dma-proxy"]);
}
