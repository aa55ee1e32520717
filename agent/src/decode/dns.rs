//! The question of a DNS query, from bytes that anyone on the network may have made.

use crate::event::DnsQuestion;

/// RFC 1035, section 4.1.1.
const HEADER_BYTES: usize = 12;
/// RFC 1035, section 2.3.4: a name's labels and their lengths, with the root's.
const NAME_BYTES: usize = 255;

/// Reads id and first question of a DNS query; `None` where it is cut short or is none.
///
/// A compressed name (RFC 1035, 4.1.4) is refused: in the first question of a query there is
/// nothing before it that could be pointed to, so no loop can occur either. Bytes that are not
/// printable ASCII are written `\DDD` as in zone files (RFC 1035, 5.1), so that a name can be shown
/// on a terminal.
pub fn question(payload: &[u8]) -> Option<DnsQuestion> {
    let word = |at: usize| {
        Some(u16::from_be_bytes([
            *payload.get(at)?,
            *payload.get(at + 1)?,
        ]))
    };
    let (id, flags, questions) = (word(0)?, word(2)?, word(4)?);
    // QR set: an answer.
    if flags & 0x8000 != 0 || questions == 0 {
        return None;
    }
    let mut name = String::new();
    let mut at = HEADER_BYTES;
    loop {
        let len = usize::from(*payload.get(at)?);
        at += 1;
        if len == 0 {
            break;
        }
        if len > 63 || at + len - HEADER_BYTES >= NAME_BYTES {
            return None;
        }
        for byte in payload.get(at..at + len)? {
            match byte {
                b'.' | b'\\' => name.extend(['\\', char::from(*byte)]),
                b'!'..=b'~' => name.push(char::from(*byte)),
                other => name.push_str(&format!("\\{other:03}")),
            }
        }
        name.push('.');
        at += len;
    }
    if name.is_empty() {
        name.push('.');
    }
    Some(DnsQuestion {
        name,
        qtype: type_name(word(at)?),
        id,
    })
}

/// IANA's registry of resource record types, those that clients ask for; others as RFC 3597 has it.
fn type_name(number: u16) -> String {
    let name = match number {
        1 => "A",
        2 => "NS",
        5 => "CNAME",
        6 => "SOA",
        12 => "PTR",
        15 => "MX",
        16 => "TXT",
        28 => "AAAA",
        33 => "SRV",
        35 => "NAPTR",
        43 => "DS",
        46 => "RRSIG",
        48 => "DNSKEY",
        64 => "SVCB",
        65 => "HTTPS",
        255 => "ANY",
        257 => "CAA",
        other => return format!("TYPE{other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &[&[u8]], qtype: u16) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x67, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name {
            bytes.push(u8::try_from(label.len()).expect("short"));
            bytes.extend_from_slice(label);
        }
        bytes.push(0);
        bytes.extend_from_slice(&qtype.to_be_bytes());
        bytes.extend_from_slice(&[0, 1]);
        bytes
    }

    #[test]
    fn reads_a_query() {
        let q =
            question(&query(&[b"db", b"shop", b"svc", b"cluster", b"local"], 28)).expect("a query");
        assert_eq!(
            (q.name.as_str(), q.qtype.as_str(), q.id),
            ("db.shop.svc.cluster.local.", "AAAA", 0x1267)
        );
        assert_eq!(question(&query(&[], 2)).expect("the root").name, ".");
        assert_eq!(
            question(&query(&[b"x"], 65280)).expect("private").qtype,
            "TYPE65280"
        );
    }

    #[test]
    fn a_name_of_255_bytes_is_the_longest() {
        let label: &[u8] = &[b'a'; 63];
        assert!(question(&query(&[label, label, label, &[b'a'; 61]], 1)).is_some());
        assert!(question(&query(&[label, label, label, &[b'a'; 62]], 1)).is_none());
    }

    #[test]
    fn escapes_what_a_terminal_would_obey() {
        let q = question(&query(&[b"\x1b[31m", b"a.b"], 1)).expect("a query");
        assert_eq!(q.name, "\\027[31m.a\\.b.");
    }

    #[test]
    fn refuses_answers_compression_and_every_prefix() {
        let whole = query(&[b"db", b"shop"], 1);
        for len in 0..whole.len() - 2 {
            assert_eq!(question(&whole[..len]), None, "{len} bytes");
        }
        let mut answer = whole.clone();
        answer[2] |= 0x80;
        assert_eq!(question(&answer), None);
        let mut looped = whole;
        looped[12] = 0xc0;
        looped[13] = 12;
        assert_eq!(question(&looped), None);
    }
}
