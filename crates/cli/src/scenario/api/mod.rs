//! What scripts can call. `docs/scenarios.md` has the list with a line for each.
//!
//! | Module | Of what |
//! |---|---|
//! | here | words about the run: steps, remarks, expectations |
//! | [`boot`] | the options of `boot` |
//! | [`board`] | a booted board: domains, memory, registers, reports |
//! | [`engine`] | DMA channels, PL writers, transfers |
//! | [`space`] | domains and processes |
//! | [`dma`] | the DMA API, network devices |
//! | [`heap`] | dma-buf heaps, and programs that share buffers |
//! | [`proxy`] | dma-proxies and their loop test |
//! | [`vm`] | virtual machines and what they are given |

mod board;
mod boot;
mod dma;
mod engine;
mod heap;
mod proxy;
mod space;
mod vm;

use std::rc::Rc;

use portcullis_board::sim::EventKind;
use rhai::{Engine, EvalAltResult, NativeCallContext};

use super::Context;
use crate::output::Item;
pub use boot::BootRequest;

type Result<T> = std::result::Result<T, Box<EvalAltResult>>;

fn fail<T>(message: impl ToString) -> Result<T> {
    Err(message.to_string().into())
}

/// Scripts have signed 64-bit numbers; an address is their bits.
fn address(value: i64) -> u64 {
    value as u64
}

/// A length in bytes, of what is done in one piece.
fn length(value: i64) -> Result<usize> {
    match usize::try_from(value) {
        Ok(n) if n <= 1 << 30 => Ok(n),
        _ => fail(format!("{value} is no length of at most 1 GiB")),
    }
}

/// A number that has to fit, called `what` in the message.
fn number<T: TryFrom<i64>>(what: &str, value: i64) -> Result<T> {
    T::try_from(value).or_else(|_| fail(format!("{what}: {value} does not fit")))
}

/// The low 32 bits of a number that has 32: both 0xffffffff and -1 are all ones.
fn word(value: i64) -> Result<u32> {
    match u32::try_from(value) {
        Ok(word) => Ok(word),
        Err(_) if i32::try_from(value).is_ok() => Ok(value as u32),
        Err(_) => fail(format!("{value:#x} does not fit into 32 bits")),
    }
}

/// Gives `engine` everything that scripts can call.
pub fn register(engine: &mut Engine, context: &Rc<Context>) {
    words(engine, context);
    board::register(engine, context);
    engine::register(engine);
    space::register(engine);
    dma::register(engine);
    heap::register(engine);
    proxy::register(engine);
    vm::register(engine);
}

fn words(engine: &mut Engine, context: &Rc<Context>) {
    let c = context.clone();
    engine.register_fn("step", move |text: &str| {
        if let Some(world) = &*c.world.borrow() {
            world.system.machine().tracer().push(0, EventKind::Note(text.to_string()));
        }
        c.emit(Item::Step { text: text.into() });
    });
    let say = |c: &Rc<Context>| {
        let c = c.clone();
        move |text: &str| c.emit(Item::Say { text: text.into() })
    };
    engine.register_fn("say", say(context));
    engine.on_print(say(context));
    let say = say(context);
    engine.on_debug(move |text, _, _| say(text));
    let c = context.clone();
    engine.register_fn("expect", move |call: NativeCallContext<'_>, ok: bool, text: &str| {
        c.check(ok, text, call.call_position().line());
        ok
    });
    engine.register_fn("hex", |value: i64| format!("{value:#x}"));
}
