//! A port for tests: memory with chosen addresses that fault or stall, and a record of what came through.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use portcullis_arch::{Access, Attributes, Iova, Pa};
use portcullis_bus::{
    CopyError, CopySide, DmaError, DmaFault, DmaPort, Initiator, Memory, StallState, StallTag, SystemMemory,
};

/// What happens at the addresses of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The IOMMU terminates the access with an abort.
    Terminate,
    /// The IOMMU stalls the access; the rule goes away when it is retried.
    Stall,
}

/// One access as the engine issued it.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub from: Initiator,
    pub access: Access,
    pub addr: u64,
    pub len: usize,
}

#[derive(Default)]
struct State {
    rules: Vec<(Range<u64>, Access, Rule)>,
    stalls: BTreeMap<u64, (usize, StallState)>,
    tags: u64,
    log: Vec<Seen>,
    writes: BTreeMap<u64, u32>,
    count_writes: bool,
}

/// Clones share everything.
#[derive(Clone)]
pub struct TestPort {
    memory: SystemMemory,
    state: Arc<Mutex<State>>,
}

const A: Attributes = Attributes::DEVICE_DEFAULT;

impl TestPort {
    pub fn new(base: u64, size: u64) -> Self {
        Self { memory: SystemMemory::new(&[(base, size)]).unwrap(), state: Arc::default() }
    }
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
    pub fn add(&self, range: Range<u64>, access: Access, rule: Rule) {
        self.lock().rules.push((range, access, rule));
    }
    pub fn clear_rules(&self) {
        self.lock().rules.clear();
    }
    /// Counts from now on how often each byte is written.
    pub fn count_writes(&self) {
        self.lock().count_writes = true;
    }
    pub fn writes(&self, addr: u64) -> u32 {
        self.lock().writes.get(&addr).copied().unwrap_or(0)
    }
    pub fn take_log(&self) -> Vec<Seen> {
        std::mem::take(&mut self.lock().log)
    }
    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0; len];
        self.memory.read(Pa(addr), A, &mut buf).unwrap();
        buf
    }
    pub fn put(&self, addr: u64, bytes: &[u8]) {
        self.memory.write(Pa(addr), A, bytes).unwrap();
    }
    /// Stalls that wait for a decision.
    pub fn waiting(&self) -> usize {
        self.lock().stalls.values().filter(|s| s.1 == StallState::Waiting).count()
    }
    /// Decides every waiting stall. A retry takes its rule away.
    pub fn resume_all(&self, decision: StallState) {
        let mut s = self.lock();
        let State { stalls, rules, .. } = &mut *s;
        for (rule, state) in stalls.values_mut().filter(|s| s.1 == StallState::Waiting) {
            *state = decision;
            if decision == StallState::Retry {
                rules[*rule].0 = 0..0;
            }
        }
    }

    /// How many bytes come through before a rule strikes, without striking.
    fn clear_run(&self, access: Access, addr: u64, len: usize) -> usize {
        let s = self.lock();
        let end = addr.saturating_add(len as u64);
        let hits = s.rules.iter().filter(|r| r.1 == access && r.0.start < end && addr < r.0.end);
        let hits = hits.filter(|r| !r.0.is_empty()).map(|r| r.0.start.max(addr));
        hits.min().map_or(len, |at| (at - addr) as usize)
    }

    /// How many bytes come through before a rule strikes, and what it does.
    fn judge(&self, from: Initiator, access: Access, addr: u64, len: usize) -> (usize, Option<DmaFault>) {
        let mut s = self.lock();
        s.log.push(Seen { from, access, addr, len });
        let end = addr.saturating_add(len as u64);
        let hit = s.rules.iter().enumerate().filter(|(_, r)| r.1 == access);
        let hit = hit.filter(|(_, r)| r.0.start < end && addr < r.0.end && !r.0.is_empty());
        let hit = hit.map(|(i, r)| (r.0.start.max(addr), i, r.2)).min_by_key(|h| h.0);
        let Some((at, index, rule)) = hit else { return (len, None) };
        let fault = match rule {
            Rule::Terminate => DmaFault::Terminated,
            Rule::Stall => {
                s.tags += 1;
                let tag = s.tags;
                s.stalls.insert(tag, (index, StallState::Waiting));
                DmaFault::Stalled(StallTag(tag))
            }
        };
        ((at - addr) as usize, Some(fault))
    }
}

fn refused(done: usize, fault: Option<DmaFault>) -> Result<(), DmaError> {
    fault.map_or(Ok(()), |fault| Err(DmaError { done, fault }))
}

impl DmaPort for TestPort {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        let (n, fault) = self.judge(from, Access::Read, addr.get(), buf.len());
        self.memory
            .read(Pa(addr.get()), from.attrs, &mut buf[..n])
            .map_err(|e| DmaError { done: 0, fault: e.into() })?;
        refused(n, fault)
    }
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        let (n, fault) = self.judge(from, Access::Write, addr.get(), buf.len());
        self.memory
            .write(Pa(addr.get()), from.attrs, &buf[..n])
            .map_err(|e| DmaError { done: 0, fault: e.into() })?;
        let mut s = self.lock();
        if s.count_writes {
            for byte in addr.get()..addr.get() + n as u64 {
                *s.writes.entry(byte).or_default() += 1;
            }
        }
        refused(n, fault)
    }
    fn copy(&mut self, src: (Initiator, Iova), dst: (Initiator, Iova), len: usize) -> Result<(), CopyError> {
        // As a real port: a source that faults is met only after what lies before it has been written.
        let mut at = 0;
        while at < len {
            let (from, to) = (src.1.wrapping_add(at as u64), dst.1.wrapping_add(at as u64));
            let n = self.clear_run(Access::Read, from.get(), len - at).clamp(1, 65536);
            let mut buf = vec![0; n];
            let failed = |side, at, e: DmaError| CopyError {
                side,
                error: DmaError { done: at + e.done, fault: e.fault },
            };
            self.read(src.0, from, &mut buf).map_err(|e| failed(CopySide::Source, at, e))?;
            self.write(dst.0, to, &buf).map_err(|e| failed(CopySide::Destination, at, e))?;
            at += n;
        }
        Ok(())
    }
    fn stall_state(&mut self, tag: StallTag) -> StallState {
        let mut s = self.lock();
        match s.stalls.get(&tag.0).map(|s| s.1) {
            None => StallState::Terminated { abort: true },
            Some(StallState::Waiting) => StallState::Waiting,
            Some(decided) => {
                s.stalls.remove(&tag.0);
                decided
            }
        }
    }
}
