//! See `pipeline::runtime::fuzzing::checkpoint`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pipeline::runtime::fuzzing::checkpoint(bytes));
