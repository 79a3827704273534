//! The `portcullis` command line.
#![forbid(unsafe_code)]

mod bench;

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    print!("{}", bench::table(&bench::run(&filter)));
    let _ = bench::names().count();
}
