//! Goal 15: from a board's device tree to the first DMA through the SMMU.

use std::time::Instant;

use portcullis_arch::{Iova, Pa};
use portcullis_board::sim::{Machine, Options};
use portcullis_board::system::{BootOptions, System};
use portcullis_board::{MachineDescription, Tree};
use portcullis_iommu::Prot;

use super::{Figure, Goal};
use crate::shipped::BOARDS;

const RUNS: usize = 15;

/// Parses the shipped board's tree, builds the machine, probes the SMMU and the engines, attaches a channel to a domain
/// and makes one transfer.
fn once(dtb: &[u8]) -> Option<f64> {
    let start = Instant::now();
    let tree = Tree::from_dtb(dtb).ok()?;
    let description = MachineDescription::from_tree(&tree).ok()?;
    let options = Options { plain_ports: true, ..Options::default() };
    let machine = Machine::build(description, options).ok()?;
    let system = System::boot(machine, &BootOptions::default()).ok()?;
    let instance = system.iommu()?;
    let channel = system.channels().first()?;
    let domain = system.core().paging_domain(instance).ok()?;
    domain.map(Iova(0x7000_0000), Pa(0x6000_0000), 8192, Prot::RW).ok()?;
    system.core().attach_device(channel.device?, &domain).ok()?;
    let cookie = channel.driver.start_simple(Iova(0x7000_1000), Iova(0x7000_0000), 4096).ok()?;
    system.settle().ok()?;
    let done = channel.driver.take_completion(cookie)?.result.is_ok();
    done.then(|| start.elapsed().as_secs_f64() * 1e3)
}

/// The median of several starts.
pub fn start() -> Vec<Figure> {
    let board = BOARDS.iter().find(|b| b.name == "zynqmp-thesis");
    let mut times: Vec<f64> =
        board.map(|b| (0..RUNS).filter_map(|_| once(b.dtb)).collect()).unwrap_or_default();
    times.sort_by(f64::total_cmp);
    let Some(&ms) = times.get(times.len() / 2) else { return Vec::new() };
    vec![Figure {
        goal_number: 15,
        what: "start: tree to first DMA, zynqmp-thesis".into(),
        figure: ms,
        figure_unit: "ms",
        ratio: ms,
        ratio_unit: "ms",
        goal: Goal::AtMost(20.0),
    }]
}
