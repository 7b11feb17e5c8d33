//! Everything that can be wrong around pgtide ends in one clear message and the documented exit code, and leaves
//! nothing behind that is in the way of the next start.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../support/mod.rs"]
mod support;

mod case;
mod dead_letters;
mod files;
mod postgres;
mod running;
mod servers;
mod sink;
mod slots;
mod unequal;
mod waiting;
