//! Scripts that fail or are wrong: exit code 1 and one message that names the line.

mod common;

use common::{of_kind, run, script, script_on};

/// The line that says why a scenario failed, and nothing else went wrong.
#[track_caller]
fn fails(name: &str, source: &str, words: &[&str]) {
    let ran = script(name, source);
    assert_eq!(ran.code, 1, "{}{}", ran.stdout, ran.stderr);
    assert_eq!(ran.stderr, "");
    ran.is_calm();
    assert!(ran.stdout.ends_with(&format!("zynqmp-thesis: 0 passed, 1 failed ({name})\n")), "{}", ran.stdout);
    // One message, which may be wrapped.
    let found = ran.stdout.matches(&format!("failed {name}: ")).count();
    assert_eq!(found, 1, "{}", ran.stdout);
    let text = ran.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

#[test]
fn a_failing_expectation_is_shown_with_its_line_and_the_others_still_run() {
    let source = "expect(true, \"first\");\n\nexpect(1 == 2, \"second\");\nexpect(true, \"third\");\n";
    fails(
        "failing",
        source,
        &["✓ first", "✗ second (line 3)", "✓ third", "1 of 3 expectations did not hold"],
    );
}

#[test]
fn a_script_that_expects_nothing_does_not_pass() {
    fails("nothing", "boot();\n", &["the script expects nothing"]);
}

#[test]
fn an_error_names_its_line() {
    for (name, source, line, words) in [
        ("syntax", "let a = 1;\nlet x = ;\n", "line 2, column 9", "Unexpected ';'"),
        ("unknown-function", "boot();\n\nfoo(1);\n", "line 3", "Function not found: foo"),
        ("unknown-variable", "\nlet a = b;\n", "line 2", "Variable not found: b"),
        ("no-channel", "let b = boot();\nb.channel(\"nope\");\n", "line 2", "there are: fpd-dma0, fpd-dma1"),
        ("no-writer", "let b = boot();\nb.writer(\"fpd-dma0\");\n", "line 2", "fpd-dma0 is no PL writer"),
        ("no-memory", "let b = boot();\nb.read32(-1);\n", "line 2", "0xffffffffffffffff: no memory"),
        (
            "in-function",
            "fn f(b) {\n  b.read32(0xf000000000)\n}\nlet b = boot();\nf(b);\n",
            "line 2",
            "0xf000000000",
        ),
        (
            "boot-option",
            "boot(#{ cpu: 1 });\n",
            "line 1",
            "boot: there is no option \"cpu\"; there are cpu_cache",
        ),
        ("boot-value", "boot(#{ cpu_cache: 1 });\n", "line 1", "boot: cpu_cache must be true or false"),
        (
            "boot-node",
            "boot(#{ coherent: #{ x: true } });\n",
            "line 1",
            "\"x\", which is no node of this board",
        ),
        ("boot-device", "boot(#{ streams: #{ x: [1] } });\n", "line 1", "\"x\""),
        ("boot-memory", "boot(#{ memory: [[0, 4096]] });\n", "line 1", "overlap"),
        (
            "permission",
            "let d = boot().domain();\nd.map(0, 0, 4096, \"q\");\n",
            "line 2",
            "\"q\" is no permission",
        ),
        ("length", "let b = boot();\nb.fill32(0, 0, -4);\n", "line 2", "-4 is no length"),
        ("thrown", "throw \"my words\";\n", "line 1", "my words"),
        ("import", "import \"/etc/passwd\" as p;\n", "line 1", "'import' is a reserved"),
        (
            "old-board",
            "let a = boot();\nlet d = a.domain();\nlet b = boot();\nb.attach(b.channels()[0], d);\n",
            "line 4",
            "booted again",
        ),
    ] {
        fails(name, source, &[line, words]);
    }
}

#[test]
fn a_runaway_script_is_stopped() {
    for (name, source, words) in [
        ("loop", "let x = 1;\nloop {}\n", "line 2, column 6: the script makes more than"),
        ("busy-loop", "let x = 1;\nloop { x += 1; }\n", "line 2"),
        ("recursion", "fn f(x) { f(x + 1) }\nf(1);\n", "a recursion without an end?"),
        ("string", "let s = \"x\";\nloop { s += s; }\n", "line 2, column 10: Length of string too large"),
        ("array", "let a = [];\nloop { a.push(a); }\n", "line 2"),
    ] {
        fails(name, source, &[words]);
    }
}

#[test]
fn nesting_does_not_overflow_the_stack() {
    let nested =
        |open: &str, close: &str| format!("let x = {}1{};", open.repeat(20_000), close.repeat(20_000));
    for (name, source) in [
        ("parentheses", nested("(", ")")),
        ("arrays", nested("[", "]")),
        ("maps", nested("#{a:", "}")),
        ("minus", nested("- ", "")),
        ("sum", nested("1 + ", "")),
        ("blocks", "{".repeat(20_000)),
        ("ifs", "if true {".repeat(20_000)),
        ("elses", "if true {} else ".repeat(20_000)),
        ("closures", nested("|| ", "")),
    ] {
        fails(name, &source, &[]);
    }
}

#[test]
fn output_of_a_script_stays_in_the_format() {
    let source = "print(\"a\");\ndebug(\"b\");\nsay(\"c\\nd\");\nexpect(true, \"e\");\n";
    let file = common::file("printing.rhai", source);
    let ran = run(&["run", "zynqmp-thesis", &file, "--json"]);
    assert_eq!(ran.code, 0);
    assert_eq!(of_kind(&ran.lines(), "say").len(), 3);
}

/// Every function with numbers at and past the edges, on everything there is.
#[test]
fn no_number_makes_a_call_panic() {
    let calls = [
        "b.read32(x)",
        "b.read64(x)",
        "b.write32(x, y)",
        "b.write64(x, y)",
        "b.fill32(x, 1, small(y))",
        "b.count32(x, 1, small(y))",
        "b.clean(x, small(y))",
        "b.invalidate(x, small(y))",
        "b.smmu_read(x)",
        "b.smmu_write(0x20000 + small(x), y)",
        "b.mmio_read32(x)",
        "b.mmio_read32(0xfd500000 + small(x))",
        "b.mmio_write32(0xb0000000 + small(x), y)",
        "b.explain(c, x, \"read\")",
        "b.explain(w, x, \"write\")",
        "b.owner(x)",
        "c.copy(x, y, 64)",
        "c.copy(0x70000000, x, small(y))",
        "c.memcpy(x, y, 64)",
        "c.memcpy(0x70000000, x, y)",
        "c.register(x)",
        "c.set_register(0x204, x)",
        "w.write(x, y)",
        "w.write(0x70000000, 1, x, y)",
        "d.map(x, y, 4096)",
        "d.map(x, 0, y)",
        "d.unmap(x, y)",
        "d.protect(x, y, \"r\")",
        "d.phys(x)",
        "p.mmap(x)",
        "p.mmap(x, y)",
        "p.reserve(x)",
        "p.fault_in(x)",
        "p.munmap(x)",
        "p.read32(x)",
        "p.write32(x, y)",
        "p.clean(x, small(y))",
        "p.invalidate(x, small(y))",
        "p.phys(x)",
        "b.bind(w, p, #{ t0sz: x, ips: y })",
        "b.bind(w, p, #{ ttbr0: x })",
        "b.unbind(w)",
        "b.process(#{ va_bits: x, pa_bits: y })",
        "boot(#{ memory: [[x, y]] })",
        "boot(#{ streams: #{ \"pl-writer0\": [x, y] } })",
    ];
    let tries: String =
        calls.iter().map(|c| format!("    try {{ {c}; done += 1; }} catch {{ refused += 1; }}\n")).collect();
    let source = format!(
        "fn small(n) {{ if n < -8192 || n > 8192 {{ n % 8192 }} else {{ n }} }}\n\
         let b = boot(#{{ cpu_cache: true }});\n\
         let c = b.channel(\"lpd-dma3\");\n\
         let w = b.writer(\"pl-writer0\");\n\
         let d = b.domain();\n\
         d.map(0x70000000, 0x60000000, 8192);\n\
         b.attach(c, d);\n\
         let p = b.process();\n\
         let done = 0;\n\
         let refused = 0;\n\
         let edges = [0, 1, -1, 4, 64, 4095, 4096, 0x6ffffffc, 0x70001ffe, 0xffffffff, 1 << 32, 1 << 39, (1 << 48) - 4,\n\
             1 << 48, 0x7fffffffffffffff, 0 - 0x7fffffffffffffff - 1, -4096];\n\
         for x in edges {{\n  for y in edges {{\n{tries}    b.faults();\n    b.stale_reads();\n  }}\n}}\n\
         expect(done > 0 && refused > 0, `${{done}} done, ${{refused}} refused`);\n"
    );
    let file = common::file("edges.rhai", source);
    let ran = run(&["run", "zynqmp-thesis", &file, "--json"]);
    ran.is_calm();
    assert_eq!(
        ran.code,
        0,
        "{}\n{}",
        ran.stdout.lines().rev().take(3).collect::<Vec<_>>().join("\n"),
        ran.stderr
    );
}

#[test]
fn an_error_on_an_smmuv3_board_names_its_line() {
    let device = "let b = boot();\nlet t = b.tester(\"testdev0\");\n";
    for (name, source, words) in [
        ("v3-no-tester", "let b = boot();\nb.tester(\"dma0\");\n".to_string(), "dma0 is no test device"),
        ("v3-no-channel", "let b = boot();\nb.channel(\"testdev0\");\n".into(), "testdev0 is no DMA channel"),
        ("v3-pasid", format!("{device}t.set_pasid(1 << 20);\n"), "substream"),
        (
            "v3-pasid-option",
            format!("{device}t.set_pasid(1, #{{ x: true }});\n"),
            "x is not privileged or execute",
        ),
        (
            "v3-no-ats",
            "let b = boot();\nb.ats(b.channel(\"dma0\"), true);\n".into(),
            "dma0 has no address translation",
        ),
        (
            "v3-no-atc",
            "let b = boot();\nb.channel(\"dma0\").atc;\n".into(),
            "dma0 has no address translation",
        ),
        (
            "v3-no-pasids",
            "let b = boot();\nb.bind_substream(b.channel(\"dma0\"), b.process());\n".into(),
            "line 2",
        ),
        ("v3-unbound", format!("{device}b.unbind_substream(t, 5);\n"), "line 3"),
        ("v3-resume", "let b = boot();\nb.resume(#{ id: 7 }, true);\n".into(), "nobody waits for an answer"),
        ("v3-resume-bank", "let b = boot();\nb.resume(b.domain(), true);\n".into(), "no context bank"),
        (
            "v3-preset",
            "boot(#{ smmu: \"big\" });\n".into(),
            "smmu must be \"full\", \"small\" or \"qemu-virt\"",
        ),
        ("v3-bits", "boot(#{ stream_bits: 33 });\n".into(), "stream_bits must be a number of bits up to 32"),
        ("v3-queues", "boot(#{ queue_log2: [8, 3] });\n".into(), "queue_log2 must be a list of three"),
        ("v3-linear", "boot(#{ stream_bits: 8 });\n".into(), "testdev0: "),
        ("v3-who", "boot(#{ unbound: [\"x\"] });\n".into(), "\"x\""),
        (
            "v3-cd",
            "let b = boot();\nb.cd(b.channel(\"dma0\"));\n".into(),
            "dma0 has none: STE.Config = 0b0xx",
        ),
    ] {
        let ran = script_on("smmuv3", name, &source);
        ran.is_calm();
        assert_eq!(ran.code, 1, "{name}: {}{}", ran.stdout, ran.stderr);
        let text = ran.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(text.contains(words), "{words:?} is not in: {text}");
    }
    // What needs an SMMUv3 is refused elsewhere.
    fails("v2-command", "let b = boot();\nb.command(0, 0);\n", &["line 2", "no SMMUv3"]);
    fails("v2-ste", "let b = boot();\nb.ste(b.channels()[0]);\n", &["line 2", "no SMMUv3"]);
    fails("v2-preset", "boot(#{ smmu: \"small\" });\n", &["smmu is for boards with an SMMUv3"]);
    fails("v2-pasid", "let b = boot();\nb.bind_substream(b.channels()[0], b.process());\n", &["line 2"]);
}

/// As above, for what an SMMUv3 adds; the driver is left behind by whatever this does.
#[test]
fn no_number_makes_a_call_of_an_smmuv3_board_panic() {
    let calls = [
        "b.smmu_read(x)",
        "b.smmu_read64(x)",
        "b.smmu_read64(small(x))",
        "b.command(x, y)",
        "b.command(y % 256, x)",
        "b.explain(t, x, y, \"read\")",
        "b.explain(t, small(x), y, \"write\")",
        "b.cd(t, x)",
        "b.ste(t)",
        "b.resume(#{ id: x }, true)",
        "b.unbind_substream(t, x)",
        "t.set_pasid(x)",
        "t.copy(x, y, 64)",
        "t.copy(0x10000000, x, small(y))",
        "c.copy(x, y, 64)",
        "b.write64(b.ste(t), x); t.copy(y, 0x10000000, 64)",
        "b.write64(b.ste(t) + 8, x); b.explain(t, y, \"read\")",
        "b.write64(b.cd(t), x); b.explain(t, y, \"read\")",
        "b.write64(b.cd(t) + 8, x); c.copy(y, 0x10000000, 64)",
        "b.smmu_write64(0x80, x); b.smmu_write(0x88, y)",
        "boot(#{ stream_bits: x })",
        "boot(#{ queue_log2: [x, y, 3] })",
    ];
    let tries: String =
        calls.iter().map(|c| format!("    try {{ {c}; done += 1; }} catch {{ refused += 1; }}\n")).collect();
    let source = format!(
        "fn small(n) {{ if n < -8192 || n > 8192 {{ n % 8192 }} else {{ n }} }}\n\
         let done = 0;\n\
         let refused = 0;\n\
         let edges = [0, 1, -1, 4, 4095, 0x10001ffe, 0xffffffff, 1 << 39, (1 << 48) - 4, 0x7fffffffffffffff,\n\
             0 - 0x7fffffffffffffff - 1];\n\
         for x in edges {{\n\
           let b = boot();\n\
           let c = b.channel(\"dma3\");\n\
           let t = b.tester(\"testdev0\");\n\
           let d = b.domain();\n\
           d.map(0x10000000, 0x90000000, 8192);\n\
           b.attach(c, d);\n\
           b.attach(t, d);\n\
           for y in edges {{\n{tries}    b.faults();\n    b.ats_events();\n    b.messages();\n  }}\n}}\n\
         expect(done > 0 && refused > 0, `${{done}} done, ${{refused}} refused`);\n"
    );
    let file = common::file("edges-v3.rhai", source);
    let ran = run(&["run", "smmuv3", &file, "--json"]);
    ran.is_calm();
    let end: Vec<_> = ran.stdout.lines().rev().take(3).collect();
    assert_eq!(ran.code, 0, "{}\n{}", end.join("\n"), ran.stderr);
}
