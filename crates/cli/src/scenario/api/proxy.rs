//! dma-proxies, on the host and in virtual machines, and their loop test.

use std::sync::Arc;

use portcullis_board::os::proxy::LoopClient;
use rhai::{Array, Dynamic, Engine, Map};

use super::board::Board;
use super::{Result, fail, length, number};

/// Rounds of work before a transfer is given up: a stuck engine, or a guest that nobody runs.
const PATIENCE: u32 = 100_000;
/// Simulated time that passes between two looks at the proxies.
const SLICE_NS: u64 = 10_000;

/// A dma-proxy.
#[derive(Clone)]
pub struct ProxyHandle {
    pub board: Board,
    pub client: Arc<dyn LoopClient>,
}

pub fn map(values: impl IntoIterator<Item = (&'static str, Dynamic)>) -> Map {
    values.into_iter().map(|(key, value)| (key.into(), value)).collect()
}

impl ProxyHandle {
    fn internal_test(&mut self) -> Map {
        let result = self.client.internal_test();
        self.board.drain();
        let (ok, text) = match result {
            Ok(text) => (true, text),
            Err(text) => (false, text),
        };
        map([("ok", ok.into()), ("text", text.into())])
    }

    fn buffer(&mut self, channel: &str) -> Result<Map> {
        match self.client.buffer(channel) {
            Some((iova, pa)) => Ok(map([
                ("iova", (iova.get() as i64).into()),
                ("pa", pa.map_or(Dynamic::UNIT, |pa| (pa.get() as i64).into())),
            ])),
            None => fail(format!("{} has no channel {channel:?}", self.client.name())),
        }
    }
}

/// A loop test that goes on step by step, so that several run at the same time.
pub struct Looping {
    client: Arc<dyn LoopClient>,
    bytes: usize,
    left: u32,
    started: bool,
    pub transfers: u32,
    pub error: Option<String>,
}

impl Looping {
    pub fn new(client: Arc<dyn LoopClient>, transfers: u32, bytes: usize) -> Self {
        let bytes = bytes.min(client.max_bytes());
        Self { client, bytes, left: transfers, started: false, transfers: 0, error: None }
    }
    pub fn is_over(&self) -> bool {
        self.error.is_some() || (self.left == 0 && !self.started)
    }
    /// Does what can be done without waiting. True if a transfer was verified.
    pub fn step(&mut self) -> bool {
        if self.is_over() {
            return false;
        }
        if !self.started {
            match self.client.begin(self.transfers, self.bytes) {
                Ok(()) => self.started = true,
                Err(error) => self.error = Some(error),
            }
            return false;
        }
        let Some(ended) = self.client.poll() else { return false };
        self.started = false;
        match ended {
            Ok(()) => {
                self.left -= 1;
                self.transfers += 1;
                true
            }
            Err(error) => {
                self.error = Some(error);
                false
            }
        }
    }
    fn result(&self) -> Map {
        let text = self.error.clone().unwrap_or_default();
        map([
            ("name", self.client.name().into()),
            ("ok", self.error.is_none().into()),
            ("transfers", i64::from(self.transfers).into()),
            ("bytes", (self.bytes as i64).into()),
            ("text", text.into()),
        ])
    }
}

impl Board {
    /// The test program on several proxies at the same time.
    fn loop_test(&mut self, proxies: Array, transfers: i64, bytes: i64) -> Result<Array> {
        let (transfers, bytes) = (number("transfers", transfers)?, length(bytes)?);
        let mut running = Vec::new();
        for proxy in proxies {
            let Some(proxy) = proxy.try_cast::<ProxyHandle>() else {
                return fail("loop_test: a list of proxies, transfers, bytes");
            };
            self.same(&proxy.board)?;
            running.push(Looping::new(proxy.client, transfers, bytes));
        }
        let mut idle = 0;
        while running.iter().any(|l| !l.is_over()) && idle < PATIENCE {
            let moved = running.iter_mut().filter(|l| !l.is_over()).map(Looping::step);
            // Each of them gets its turn.
            let moved = moved.fold(false, |any, moved| any | moved);
            idle = if moved { 0 } else { idle + 1 };
            self.world.system.run_for(SLICE_NS);
            self.drain();
        }
        for looping in running.iter_mut().filter(|l| !l.is_over()) {
            looping.error = Some("no end of the transfer is in sight".into());
        }
        self.drain();
        Ok(running.iter().map(|l| Dynamic::from(l.result())).collect())
    }

    fn proxy(&mut self, name: &str) -> Result<ProxyHandle> {
        match self.world.system.os().proxies().get(name) {
            Some(client) => Ok(ProxyHandle { board: self.clone(), client }),
            None => fail(format!("no driver of the host has a proxy {name:?}")),
        }
    }
}

pub fn register(engine: &mut Engine) {
    engine
        .register_type_with_name::<ProxyHandle>("Proxy")
        .register_fn("proxy", Board::proxy)
        .register_fn("loop_test", Board::loop_test)
        .register_fn("internal_test", ProxyHandle::internal_test)
        .register_fn("buffer", ProxyHandle::buffer)
        .register_get("name", |p: &mut ProxyHandle| p.client.name());
}
