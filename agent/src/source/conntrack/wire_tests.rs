use proptest::prelude::*;

use super::*;

const DUMP: &[u8] = include_bytes!("fixtures/dump.bin");
const FILTERED: &[u8] = include_bytes!("fixtures/dump-filtered.bin");
const DUMP_END: &[u8] = include_bytes!("fixtures/dump-end.bin");
const NOT_THERE: &[u8] = include_bytes!("fixtures/get-not-there.bin");
const REFUSED: &[u8] = include_bytes!("fixtures/destroy-refused.bin");
const UNREPLIED_DNAT: &[u8] = include_bytes!("fixtures/destroy-unreplied-dnat.bin");

fn answers(bytes: &[u8], wants_replied: bool) -> Vec<Answer> {
    let mut found = Vec::new();
    read(bytes, wants_replied, |received| found.push(received.answer)).expect("messages");
    found
}

fn entries(bytes: &[u8], wants_replied: bool) -> Vec<Entry> {
    let answers = answers(bytes, wants_replied).into_iter();
    answers
        .filter_map(|answer| match answer {
            Answer::Entry(entry) => Some(entry),
            _ => None,
        })
        .collect()
}

fn to_port(entries: &[Entry], port: u16) -> &Entry {
    let is_it = |entry: &&Entry| entry.key.tuple.destination().port() == port;
    entries.iter().find(is_it).expect("an entry of that port")
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

#[test]
fn a_dump_entry_by_entry() {
    let entries = entries(DUMP, true);
    assert_eq!(entries.len(), 5, "ICMP has no ports");

    let answered = to_port(&entries, 80);
    assert!(!answered.unreplied && !answered.syn_sent);
    assert_eq!(answered.packets, None);

    let dnat = to_port(&entries, 8888);
    assert!(dnat.unreplied && dnat.syn_sent);
    assert_eq!(dnat.key.tuple.protocol(), Protocol::TCP);
    assert_eq!(dnat.key.tuple.source(), address("10.1.0.2:41048"));
    assert_eq!(dnat.key.tuple.destination(), address("10.2.0.2:8888"));
    assert_eq!(dnat.real_destination, address("10.2.0.2:5432"));
    assert_eq!(dnat.expires_in_s, Some(118));
    assert_eq!((dnat.packets, dnat.start_ns), (None, None));
    assert_eq!(dnat.key.zone, Zone::default());

    let dns = to_port(&entries, 53);
    assert!(dns.unreplied && !dns.syn_sent);
    assert_eq!(dns.key.tuple.protocol(), Protocol::UDP);
    assert_eq!(dns.key.tuple.source(), address("[fd00:1::2]:53089"));
    assert_eq!(dns.real_destination, address("[fd00:2::2]:53"));
    assert_eq!(dns.packets, Some(3));
    let start_s = dns.start_ns.map(|ns| ns / 1_000_000_000);
    assert!(start_s.is_some_and(|s| s > 1_600_000_000), "{start_s:?}");

    let (id, of_tuple) = (7, false);
    assert_eq!(to_port(&entries, 5353).key.zone, Zone { id, of_tuple });
    let (id, of_tuple) = (9, true);
    assert_eq!(to_port(&entries, 6000).key.zone, Zone { id, of_tuple });

    let mut ids: Vec<u32> = entries.iter().map(|entry| entry.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert!(ids.len() == 5 && ids[0] != 0, "{ids:?}");
}

#[test]
fn what_is_answered_is_not_read_where_nobody_wants_it() {
    let all = answers(DUMP, false);
    let count = |wanted: fn(&Answer) -> bool| all.iter().filter(|answer| wanted(answer)).count();
    assert_eq!(count(|answer| matches!(answer, Answer::Replied)), 1);
    assert_eq!(count(|answer| matches!(answer, Answer::Other)), 1, "ICMP");
    assert_eq!(count(|answer| matches!(answer, Answer::Entry(_))), 4);
    // The kernel's own choice is the same.
    assert_eq!(entries(DUMP, false), entries(FILTERED, true));
    assert!(
        !answers(FILTERED, false)
            .iter()
            .any(|answer| matches!(answer, Answer::Replied))
    );
}

#[test]
fn the_end_of_a_dump_and_a_refusal() {
    assert!(matches!(answers(DUMP_END, false)[..], [Answer::Done(0)]));
    let mut found = Vec::new();
    read(NOT_THERE, true, |received| found.push(received)).expect("a message");
    let [received] = &found[..] else {
        panic!("{found:?}");
    };
    assert_eq!(received.sequence, 7);
    assert!(matches!(received.answer, Answer::Error(code) if code == -libc::ENOENT));
}

#[test]
fn a_reset_shows_in_the_state_alone() {
    let refused = entries(REFUSED, true);
    let refused = to_port(&refused, 81);
    assert!(
        refused.unreplied,
        "the kernel destroys it before it notes the reply"
    );
    assert!(!refused.syn_sent);

    let unreplied = entries(UNREPLIED_DNAT, true);
    let unreplied = to_port(&unreplied, 8888);
    assert!(unreplied.unreplied && unreplied.syn_sent);
    assert_eq!(unreplied.real_destination, address("10.2.0.2:5432"));
    assert_eq!(unreplied.expires_in_s, None);
}

#[test]
fn one_entry_that_makes_no_sense_does_not_spoil_a_dump() {
    // The timeout of the first entry that is read: a length that is none of a number's.
    const TIMEOUT: [u8; 4] = [8, 0, 7, 0];
    let mut bytes = FILTERED.to_vec();
    let at = bytes
        .windows(4)
        .position(|bytes| bytes == TIMEOUT)
        .expect("a timeout");
    bytes[at] = 6;
    let answers = answers(&bytes, false);
    assert!(matches!(answers[0], Answer::Unreadable), "{answers:?}");
    assert_eq!(answers.len(), self::answers(FILTERED, false).len());
    assert_eq!(entries(&bytes, false)[..], entries(FILTERED, false)[1..]);
}

/// What is asked for, read by the same library.
fn request_attributes(
    bytes: &[u8],
) -> (NetlinkHeader, NetfilterProtoFamily, Vec<ConntrackAttribute>) {
    let (header, payload) = NetlinkMessage::<NetfilterMessage>::deserialize(bytes)
        .expect("a message")
        .into_parts();
    let NetlinkPayload::InnerMessage(message) = payload else {
        panic!("{payload:?}");
    };
    let NetfilterMessageInner::Conntrack(ConntrackMessage::Get(attributes)) = message.inner else {
        panic!("{message:?}");
    };
    (header, message.header.family, attributes)
}

#[test]
fn a_zone_is_where_the_kernel_looks_for_it() {
    let tuple = Tuple::new(Protocol::TCP, address("10.1.0.2:1"), address("10.2.0.2:2"));
    let ask = |id, of_tuple| request_attributes(&get(&tuple, Zone { id, of_tuple }, 5));
    let (header, family, plain) = ask(0, true);
    assert_eq!((header.flags, header.sequence_number), (NLM_F_REQUEST, 5));
    assert_eq!(family, NetfilterProtoFamily::IPv4);
    let [ConntrackAttribute::CtaTupleOrig(parts)] = &plain[..] else {
        panic!("{plain:?}");
    };
    assert_eq!(ends(parts), Some(tuple));
    assert_eq!(tuple_zone(parts), None);

    let (_, _, of_entry) = ask(7, false);
    let [
        ConntrackAttribute::Other(zone),
        ConntrackAttribute::CtaTupleOrig(_),
    ] = &of_entry[..]
    else {
        panic!("{of_entry:?}");
    };
    assert_eq!((zone.kind(), value(zone).ok()), (CTA_ZONE, Some([0, 7])));

    let (_, _, of_tuple) = ask(9, true);
    let [ConntrackAttribute::CtaTupleOrig(parts)] = &of_tuple[..] else {
        panic!("{of_tuple:?}");
    };
    assert_eq!((ends(parts), tuple_zone(parts)), (Some(tuple), Some(9)));
}

#[test]
fn a_dump_is_filtered_by_status_and_mask() {
    let (header, family, attributes) = request_attributes(&dump(Choice::Unreplied, 1));
    assert_eq!(header.flags, NLM_F_REQUEST | NLM_F_DUMP);
    assert_eq!(family, NetfilterProtoFamily::Unspec);
    let [
        ConntrackAttribute::CtaStatus(status),
        ConntrackAttribute::Other(mask),
    ] = &attributes[..]
    else {
        panic!("{attributes:?}");
    };
    assert_eq!(status.bits(), 8);
    assert_eq!(
        (mask.kind(), value(mask).ok()),
        (CTA_STATUS_MASK, Some([0, 0, 0, 10]))
    );
    assert!(request_attributes(&dump(Choice::All, 1)).2.is_empty());
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), wants in any::<bool>()) {
        let _ = read(&bytes, wants, |_| {});
    }

    #[test]
    fn no_changed_message_makes_it_panic(
        at in 0..DUMP.len(),
        to in any::<u8>(),
        cut in 0..DUMP.len(),
        wants in any::<bool>(),
    ) {
        let mut bytes = DUMP.to_vec();
        bytes[at] = to;
        let mut seen = 0;
        let _ = read(&bytes, wants, |_| seen += 1);
        let _ = read(&bytes[..cut], wants, |_| seen += 1);
        // As many as there are room for, whatever the lengths say.
        prop_assert!(seen <= 2 * DUMP.len() / 16);
    }
}
