//! Bytes of any shape must decode or be refused, and never panic: as a packet, as a DNS message, and
//! as a whole event of the ring buffer.
//!
//! First inputs are the recorded events in `agent/src/decode/fixtures/events` (`fuzz/seeds/decode`).
#![no_main]

use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use whydrop::decode::{Decoder, Names, dns, packet};
use whydrop::source::events::WallClock;
use whydrop::source::sys;
use whydrop_ebpf::{DropEvent, SNAP_LEN};

fuzz_target!(|bytes: &[u8]| {
    let _ = packet::parse(bytes);
    let _ = dns::question(bytes);

    let mut whole = bytes.to_vec();
    whole.resize(size_of::<DropEvent>(), 0);
    let Some(event) = sys::read::<DropEvent>(&whole) else {
        return;
    };
    let snap = &whole[offset_of!(DropEvent, snap)..][..SNAP_LEN];
    let read = packet::parse(snap);
    let reasons = HashMap::from([
        (12, Arc::from("NETFILTER_DROP")),
        (3, Arc::from("NO_SOCKET")),
    ]);
    let mut decoder = Decoder::new(
        Names {
            reasons,
            has_reasons: event.boot_ns % 2 == 0,
        },
        Box::new(|address| (address % 3 != 0).then(|| Arc::from("tcp_v4_rcv"))),
    );
    let clock = WallClock::now();
    // Twice: the second time names of places and devices are known.
    for _ in 0..2 {
        let Some(drop) = decoder.event(&event, |boot_ns| clock.at(boot_ns)) else {
            return;
        };
        let flow = drop.flow;
        assert_eq!(flow.is_some(), event.key.ip_version != 0);
        assert_eq!(drop.packets, 1);
        // A question is one of the packet that the programs saw, or none.
        if let Some(question) = drop.dns {
            let ends = read
                .as_ref()
                .map(|packet| (packet.source, packet.destination));
            assert!(question.name.is_ascii() && question.name.ends_with('.'));
            assert!(usize::from(event.snap_len) < SNAP_LEN || read.is_some());
            assert!(
                usize::from(event.snap_len) < SNAP_LEN
                    || ends == flow.map(|f| (f.source, f.destination))
            );
        }
    }
});
