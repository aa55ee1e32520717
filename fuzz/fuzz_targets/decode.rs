//! Packet bytes of any shape must decode or be refused, and never panic.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = whydrop::decode::packet::parse(bytes);
});
