//! See `pipeline::runtime::fuzzing::inbox`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pipeline::runtime::fuzzing::inbox(bytes));
