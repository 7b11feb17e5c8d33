#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| pgtide::checks::text(input));
