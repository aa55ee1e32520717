use proptest::prelude::*;

use super::*;
use crate::event::{DnsQuestion, DropSite, Kind, Protocol, ServiceRef, testing::event};

fn format(output: Output) -> Format {
    Format {
        output,
        color: false,
        time: TimeFormat::Short,
        zone: TimeZone::UTC,
        node: false,
    }
}

fn now() -> Timestamp {
    "2026-11-22T12:03:15Z".parse().unwrap()
}

fn show(format: &Format, line: Line) -> String {
    format
        .line(&serde_json::to_string(&line).unwrap(), now())
        .unwrap()
}

fn compact(event: Event) -> String {
    show(&format(Output::Compact), Line::Event(event))
}

#[test]
fn compact_is_one_line_and_the_explanation() {
    assert_eq!(
        compact(event()),
        "12:03:10.512  DROPPED     shop/web-7d9f → db/pg-0:5432 (svc db/pg)  TCP SYN  ×4  \
         NETFILTER_DROP at nft_do_chain on veth12ab\n    \
         ↳ ingress to db/pg-0 is isolated by db/default-deny; no rule admits namespace shop: it \
         lacks the label team=shop\n"
    );
}

#[test]
fn lines_of_many_nodes_name_theirs() {
    let format = Format {
        node: true,
        ..format(Output::Compact)
    };
    let text = show(&format, Line::Event(event()));
    assert!(text.starts_with("12:03:10.512  node-a  DROPPED "), "{text}");
}

#[test]
fn wide_has_all_that_is_known() {
    let text = show(&format(Output::Wide), Line::Event(event()));
    assert_eq!(
        text.lines().next().unwrap(),
        "12:03:10.512  node-a  DROPPED     shop/web-7d9f:41612 (10.244.1.7, Deployment web, on \
         node-a) → db/pg-0:5432 (10.244.2.9, StatefulSet pg, on node-b) (svc db/pg \
         10.96.0.12:5433)  TCP SYN  ×4  NETFILTER_DROP at nft_do_chain on veth12ab in netns \
         4026531840"
    );
    assert!(
        text.ends_with("    ↳ namespace shop lacks the label team=shop\n"),
        "{text}"
    );
}

#[test]
fn what_is_not_known_is_not_shown() {
    let bare = Event {
        protocol: None,
        ip_version: None,
        tcp_flags: None,
        source: Endpoint::default(),
        destination: Endpoint::default(),
        drop: Some(DropSite {
            location: Some("ip_error".into()),
            ..DropSite::default()
        }),
        explanation: None,
        ..event()
    };
    assert_eq!(
        compact(bare.clone()),
        "12:03:10.512  DROPPED     ? → ?  ×4  at ip_error\n"
    );
    let unanswered = Event {
        outcome: Outcome::Unanswered,
        ip_version: Some(6),
        drop: None,
        ..bare
    };
    assert_eq!(
        compact(unanswered),
        "12:03:10.512  UNANSWERED  ? → ?  IPv6  ×4  whether this node dropped it is not known\n"
    );
}

/// One line for the attempt and its drop.
#[test]
fn an_unanswered_attempt_says_how_long_it_waited_and_who_dropped_it() {
    let here = Event {
        outcome: Outcome::Unanswered,
        waited_seconds: Some(3.049),
        cause: Some(Cause::DroppedHere),
        explanation: None,
        ..event()
    };
    let line = compact(here.clone());
    let end = "×4  after 3.0s  dropped here: NETFILTER_DROP at nft_do_chain on veth12ab\n";
    assert!(line.ends_with(end), "{line}");
    let elsewhere = Event {
        cause: Some(Cause::Elsewhere),
        drop: None,
        ..here
    };
    let line = compact(elsewhere);
    assert!(
        line.ends_with("×4  after 3.0s  not dropped on this node\n"),
        "{line}"
    );
}

#[test]
fn an_end_is_its_name_or_its_address() {
    let ip = Some("fd00::7".parse().unwrap());
    let kind = |kind| Endpoint {
        kind: Some(kind),
        ip,
        port: Some(53),
        ..Endpoint::default()
    };
    let node = Endpoint {
        node: Some("node-a".into()),
        ..kind(EndpointKind::Node)
    };
    let host = Endpoint {
        namespace: Some("kube-system".into()),
        pod: Some("proxy".into()),
        host_network: true,
        ..node.clone()
    };
    let service = Endpoint {
        service: Some(ServiceRef {
            namespace: "db".into(),
            name: "pg".into(),
            ip: "fd00::7".parse().unwrap(),
            port: Some(53),
        }),
        ..kind(EndpointKind::Service)
    };
    for (endpoint, compact, wide) in [
        (
            kind(EndpointKind::External),
            "[fd00::7]:53 (external)",
            "[fd00::7]:53 (external)",
        ),
        (
            kind(EndpointKind::Unknown),
            "[fd00::7]:53 (no such pod)",
            "[fd00::7]:53 (no such pod)",
        ),
        (
            kind(EndpointKind::Node),
            "[fd00::7]:53 (node)",
            "[fd00::7]:53 (node)",
        ),
        (node, "node node-a:53", "node node-a:53 (fd00::7)"),
        (
            host,
            "kube-system/proxy:53 (host network)",
            "kube-system/proxy:53 (host network, fd00::7, on node-a)",
        ),
        (service, "svc db/pg:53", "svc db/pg:53 (fd00::7)"),
    ] {
        assert_eq!(end(&endpoint, true, false), compact);
        assert_eq!(end(&endpoint, true, true), wide);
    }
}

#[test]
fn a_dns_question_is_shown() {
    let event = Event {
        kind: Kind::Dns,
        protocol: Some(Protocol::UDP),
        tcp_flags: None,
        dns: Some(DnsQuestion {
            name: "db.shop.svc.cluster.local.".to_owned(),
            qtype: "AAAA".to_owned(),
            id: 4711,
        }),
        ..event()
    };
    assert!(compact(event).contains("  UDP  DNS AAAA db.shop.svc.cluster.local.  ×4  "));
}

#[test]
fn a_loss_is_seen() {
    let lost = Lost {
        lost: 17,
        stage: LostStage::Reader,
        node: "node-a".into(),
    };
    let text = "17 packets are not shown: this reader was too slow (node node-a)";
    assert_eq!(
        show(&format(Output::Wide), Line::Lost(lost.clone())),
        format!("{text}\n")
    );
    let colored = Format {
        color: true,
        ..format(Output::Compact)
    };
    let shown = show(&colored, Line::Lost(lost));
    assert!(
        shown.starts_with('\x1b') && shown.contains(text),
        "{shown:?}"
    );
}

#[test]
fn times_look_as_asked() {
    for (name, expected) in [
        ("short", "13:03:10.512"),
        ("local", "2026-11-22T13:03:10.512+01:00"),
        ("rfc3339", "2026-11-22T12:03:10.512345678Z"),
        ("relative", "4s 400ms"),
        ("%d.%m. %H:%M", "22.11. 13:03"),
    ] {
        let format = Format {
            time: name.parse().unwrap(),
            zone: TimeZone::fixed(jiff::tz::offset(1)),
            ..format(Output::Compact)
        };
        assert_eq!(format.time(event().time, now()), expected, "{name}");
    }
    for wrong in ["", "iso", "%", "%!"] {
        assert!(wrong.parse::<TimeFormat>().is_err(), "{wrong}");
    }
}

#[test]
fn json_keeps_what_this_version_does_not_know() {
    let json = r#"{"new":1,"a":"b"}"#;
    assert_eq!(
        format(Output::Json).line(json, now()).unwrap(),
        format!("{json}\n")
    );
    assert!(format(Output::Compact).line(json, now()).is_err());
}

#[test]
fn yaml_is_one_document_an_event() {
    let text = show(&format(Output::Yaml), Line::Event(event()));
    assert!(text.starts_with("---\n") && text.ends_with('\n'), "{text}");
    assert_eq!(serde_saphyr::from_str::<Event>(&text).unwrap(), event());
}

proptest! {
    /// Whatever stands in a name, a terminal is told nothing, and JSON and YAML keep the value.
    #[test]
    fn nothing_hostile_reaches_a_terminal(
        name in "[\\x00-\\x7f\u{80}-\u{9f}\u{202e}\u{200b}\u{feff}\u{1f600}'\":#-]{0,12}",
    ) {
        let mut event = event();
        event.source.pod = Some(name.as_str().into());
        event.dns = Some(DnsQuestion { name: name.clone(), qtype: name.clone(), id: 1 });
        event.explanation.as_mut().unwrap().summary = name.clone();
        for output in [Output::Compact, Output::Wide, Output::Json, Output::Yaml] {
            let text = show(&format(output), Line::Event(event.clone()));
            for line in text.lines() {
                prop_assert!(!line.contains(is_hostile), "{output:?} {line:?}");
            }
            match output {
                Output::Json => {
                    prop_assert_eq!(&serde_json::from_str::<Event>(&text).unwrap(), &event);
                    prop_assert_eq!(text.lines().count(), 1);
                }
                Output::Yaml => {
                    prop_assert_eq!(&serde_saphyr::from_str::<Event>(&text).unwrap(), &event);
                }
                _ => prop_assert!(text.lines().count() <= 3, "{text:?}"),
            }
        }
    }
}
