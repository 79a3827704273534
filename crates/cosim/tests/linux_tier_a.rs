//! Tier A
mod common;
use common::{Guest};
use portcullis_cosim::qemu::Tier;

#[test]
fn try_v3() {
    let guest = Guest { board: "smmuv3", script: include_str!("../jobs/probe.sh"), parameters: "unbound=1\n", look: &|m, n| {
        for c in common::channels(m).iter().take(4) {
            let e = m.smmus()[0].model.explain(portcullis_bus::Initiator::new(c.stream), portcullis_arch::Iova(0x1000), portcullis_arch::Access::Read);
            common::say(&format!("{n} {} {:x?}", c.name, e));
        }
    }, ..Guest::default() };
    guest.on_every_kernel(Tier::A, "probe", |r| {
        common::say(&format!("{}", r.console));
        panic!("x");
    });
}
#[test]
fn try_v2() {
    let guest = Guest { board: "zynqmp-thesis", script: include_str!("../jobs/probe.sh"), parameters: "unbound=1\n", look: &|m, n| {
        for c in common::channels(m).iter().take(2) {
            let e = m.smmus()[0].model.explain(portcullis_bus::Initiator::new(c.stream), portcullis_arch::Iova(0x1000), portcullis_arch::Access::Read);
            common::say(&format!("{n} {} {:x?}", c.name, e));
        }
    }, ..Guest::default() };
    guest.on_every_kernel(Tier::A, "probe", |r| {
        common::say(&format!("{}", r.console));
        panic!("x");
    });
}
