//! The command `pgtide`.

fn main() {}
