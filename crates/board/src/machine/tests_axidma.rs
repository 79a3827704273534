//! AXI DMA cores, their clients and network devices in trees that are right, and in trees that are not.

use super::*;
use crate::testing::{Dt, board_file, cells, string};
use crate::tree::Tree;

const CORE: &str = "/amba-pl/dma@a0000000";

fn shipped() -> Dt {
    let blob = std::fs::read(board_file("zynqmp-hp0-2dma.dtb")).unwrap();
    Dt::of(&Tree::from_dtb(&blob).unwrap())
}
fn describe(tree: &Dt) -> Result<MachineDescription, String> {
    let tree = tree.tree().map_err(|e| e.to_string())?;
    MachineDescription::from_tree(&tree).map_err(|e| e.to_string())
}

#[test]
fn a_core_has_a_stream_for_each_of_its_three_masters() {
    let machine = describe(&shipped()).unwrap();
    let streams: Vec<[u32; 3]> = machine.axi_dmas.iter().map(|d| d.sends().map(StreamId::get)).collect();
    assert_eq!(streams, [[0xe80, 0xe81, 0xe82], [0xe83, 0xe84, 0xe85]]);
    assert!(machine.axi_dmas.iter().all(|d| d.scatter_gather && d.address_bits == 64 && d.length_bits == 26));
    let agreement = |path: &str| machine.master(path).unwrap().agreement;
    assert_eq!(agreement(CORE), Agreement::Agrees);
    let proxy = &machine.dma_proxies[0];
    let dmas: Vec<_> = proxy.dmas.iter().map(|d| (d.name.as_str(), d.provider.as_str(), d.channel)).collect();
    assert_eq!(dmas, [("dma_proxy_tx", CORE, 0), ("dma_proxy_rx", CORE, 1)]);
    let nic = &machine.nics[0];
    assert_eq!((nic.route_bit, nic.streams.actual.as_slice()), (Some(3), &[StreamId(0x877)][..]));
}

#[test]
fn without_a_port_a_core_sends_what_the_tree_declares() {
    let mut tree = shipped();
    for property in ["portcullis,pl-port", "portcullis,axi-id"] {
        tree.remove(CORE, property);
    }
    let machine = describe(&tree).unwrap();
    assert_eq!(machine.axi_dmas[0].sends(), [StreamId(0xe80), StreamId(0xe81), StreamId(0xe82)]);
    tree.remove(CORE, "iommus");
    assert_eq!(describe(&tree).unwrap().axi_dmas[0].sends(), [StreamId(0); 3]);
}

#[test]
fn iommus_of_other_streams_than_the_port_sends_are_noticed() {
    let mut tree = shipped();
    let smmu = describe(&tree).unwrap().smmus[0].node.phandle.unwrap();
    tree.prop(CORE, "iommus", cells([smmu, 0x280, smmu, 0x281, smmu, 0x282]));
    let machine = describe(&tree).unwrap();
    assert_eq!(machine.master(CORE).unwrap().agreement, Agreement::Differs);
}

#[test]
fn what_makes_no_sense_is_refused_with_node_and_property() {
    let proxy = "/dma-proxy-0";
    let channel = "/amba-pl/dma@a0000000/dma-channel@a0000000";
    let cases: [(&str, &str, Vec<u8>, &[&str]); 12] = [
        (CORE, "xlnx,addrwidth", cells([65]), &["xlnx,addrwidth", "65", "64"]),
        (CORE, "xlnx,addrwidth", cells([16]), &["xlnx,addrwidth", "16"]),
        (CORE, "xlnx,sg-length-width", cells([27]), &["xlnx,sg-length-width", "26"]),
        (CORE, "portcullis,fifo-bytes", cells([0]), &["portcullis,fifo-bytes", "1 MiB"]),
        (CORE, "portcullis,axi-id", cells([62]), &["portcullis,axi-id", "three AXI IDs"]),
        (CORE, "portcullis,ax-prot", cells([8]), &["portcullis,ax-prot", "3 bits"]),
        (CORE, "portcullis,pl-port", string("hp9"), &["portcullis,pl-port", "hp9", "hp0"]),
        (channel, "xlnx,datawidth", cells([33]), &["xlnx,datawidth", "33"]),
        (channel, "compatible", string("xlnx,axi-dma-s2mm-channel"), &["second", "s2mm"]),
        (proxy, "dmas", cells([0xdead, 0]), &["dmas", "0xdead"]),
        (proxy, "dma-names", string("dma_proxy_tx"), &["dma-names", "1 names"]),
        ("/axi/ethernet@ff0e0000", "reg", cells([0, 0xff0e_0000, 0, 0]), &["reg", "0"]),
    ];
    for (path, property, value, words) in cases {
        let mut tree = shipped();
        tree.prop(path, property, value);
        let error = describe(&tree).expect_err(property);
        assert!(error.contains(path) || error.contains("/amba-pl/"), "{property}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{property}: {error}");
    }
}

#[test]
fn a_list_of_channels_that_is_cut_off_is_refused() {
    let mut tree = shipped();
    let machine = describe(&tree).unwrap();
    let phandle = machine.axi_dmas[0].node.phandle.unwrap();
    tree.prop("/dma-proxy-0", "dmas", cells([phandle, 0, phandle]));
    let error = describe(&tree).unwrap_err();
    assert!(error.contains("/dma-proxy-0") && error.contains("cut off"), "{error}");
}

#[test]
fn cores_that_overlap_are_refused() {
    let mut tree = shipped();
    tree.prop(CORE, "reg", cells([0, 0xa001_0800, 0, 0x1000]));
    let error = describe(&tree).unwrap_err();
    assert!(error.contains("overlaps"), "{error}");
}
