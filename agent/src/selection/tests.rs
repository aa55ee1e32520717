use proptest::prelude::*;

use super::*;
use crate::event::{Lost, LostStage, testing::event};

/// `--not` before a flag is `!` before its name.
fn select(flags: &str) -> Selection {
    try_select(flags).unwrap()
}

fn try_select(flags: &str) -> Result<Selection, SelectionError> {
    Selection::new(flags.split_whitespace().map(|f| {
        let (flag, value) = f.split_once('=').unwrap();
        let name = flag.trim_start_matches('!');
        (name != flag, Flag::by_name(name).unwrap(), value)
    }))
}

fn matches(flags: &str) -> bool {
    select(flags).matches(&Line::Event(event()))
}

/// The example is shop/web-7d9f (10.244.1.7:41612) to db/pg-0 (10.244.2.9:5432), which stands
/// behind the service db/pg (10.96.0.12:5433).
#[test]
fn every_flag_selects_what_it_says() {
    for (flags, expected) in [
        ("namespace=shop", true),
        ("namespace=db", true),
        ("namespace=sho", false),
        ("from-namespace=shop", true),
        ("from-namespace=db", false),
        ("to-namespace=db", true),
        ("to-namespace=shop", false),
        ("pod=shop/web-7d9f", true),
        ("pod=shop/web", true),
        ("pod=db/pg-0", true),
        ("pod=db/", true),
        ("pod=db/web", false),
        ("pod=d/pg-0", false),
        ("from-pod=shop/web", true),
        ("from-pod=db/pg", false),
        ("to-pod=db/pg", true),
        ("to-pod=shop/web", false),
        ("service=db/pg", true),
        ("service=db/p", true),
        ("service=shop/pg", false),
        ("ip=10.244.1.7", true),
        ("ip=10.244.2.0/24", true),
        ("ip=10.96.0.12", true),
        ("ip=10.244.3.0/24", false),
        ("ip=::/0", false),
        ("from-ip=10.244.1.0/24", true),
        ("from-ip=10.244.2.9", false),
        ("to-ip=10.244.2.9", true),
        ("to-ip=10.244.1.7", false),
        ("port=5432", true),
        ("port=41612", true),
        ("port=5433", true),
        ("port=80", false),
        ("protocol=tcp", true),
        ("protocol=6", true),
        ("protocol=UDP", false),
        ("kind=syn", true),
        ("kind=dns", false),
        ("outcome=dropped", true),
        ("outcome=rejected", false),
        ("reason=NETFILTER_DROP", true),
        ("reason=skb_drop_reason_netfilter_drop", true),
        ("reason=NETFILTER", false),
        ("policy=db/default-deny", true),
        ("policy=default-deny", true),
        ("policy=db/", true),
        ("policy=shop/default-deny", false),
        ("policy=db/default", false),
        ("node-name=node-a", true),
        ("node-name=node", false),
        ("node-name=node*", true),
        ("node-name=*-a", true),
        ("node-name=*-b", false),
    ] {
        assert_eq!(matches(flags), expected, "{flags}");
        let negated = format!("!{flags}");
        assert_eq!(matches(&negated), !expected, "{negated}");
    }
}

#[test]
fn a_repeated_flag_is_or_different_flags_are_and() {
    assert!(matches(""));
    assert!(matches("port=80 port=5432"));
    assert!(!matches("port=80 port=81"));
    assert!(matches("port=5432 namespace=shop kind=syn"));
    assert!(!matches("port=5432 namespace=shop kind=dns"));
    assert!(!matches("port=80 port=5432 protocol=UDP"));
}

#[test]
fn an_event_is_out_if_any_negated_flag_matches() {
    assert!(matches("!port=80 !kind=dns"));
    assert!(!matches("!port=5432 !kind=dns"));
    assert!(!matches("!port=80 !port=5432"));
    assert!(!matches("namespace=shop !to-pod=db/pg"));
    assert!(matches("namespace=shop !to-pod=db/other"));
}

#[test]
fn a_bare_pod_is_in_the_given_namespace_else_in_default() {
    assert!(!matches("pod=web"));
    assert!(matches("namespace=shop pod=web"));
    assert!(matches("namespace=a namespace=shop pod=web"));
    assert!(matches("namespace=db service=pg"));
    assert!(matches("from-namespace=shop from-pod=web"));
    assert!(matches(
        "to-namespace=db to-pod=pg from-namespace=shop from-pod=web"
    ));
    assert!(matches("to-namespace=db namespace=shop to-pod=pg"));
    assert!(!matches("namespace=shop to-pod=pg"));
    assert!(matches("namespace=shop !pod=pg"));
    assert_eq!(select("pod=web"), select("pod=default/web"));
}

#[test]
fn what_an_event_does_not_know_matches_nothing() {
    let mut event = event();
    event.source = Endpoint::default();
    event.destination = Endpoint::default();
    event.protocol = None;
    event.drop = None;
    event.explanation = None;
    let line = Line::Event(event);
    for flags in [
        "namespace=shop",
        "pod=shop/",
        "service=db/",
        "ip=0.0.0.0/0",
        "port=1",
        "protocol=0",
        "reason=NOT_SPECIFIED",
        "policy=db/",
    ] {
        assert!(!select(flags).matches(&line), "{flags}");
    }
}

#[test]
fn a_loss_passes_every_selection() {
    let line = Line::Lost(Lost {
        lost: 1,
        stage: LostStage::Ring,
        node: "n".into(),
    });
    assert!(select("pod=a/b !namespace=c node-name=x").matches(&line));
}

#[test]
fn a_bad_value_is_told_in_one_sentence() {
    for (flags, sentence) in [
        (
            "port=http",
            "port \"http\": expected a port from 1 to 65535",
        ),
        ("port=0", "port \"0\": expected a port from 1 to 65535"),
        ("pod=", "pod \"\": it needs a value"),
        ("pod=/web", "pod \"/web\": expected NAMESPACE/NAME"),
        ("pod=a/b/c", "pod \"a/b/c\": expected NAMESPACE/NAME"),
        (
            "namespace=a/b",
            "namespace \"a/b\": expected the name of a namespace",
        ),
        (
            "ip=10.0.0.0/33",
            "ip \"10.0.0.0/33\": expected an IP address or a CIDR, as 10.0.0.0/8",
        ),
        ("kind=icmp", "kind \"icmp\": expected syn, dns or packet"),
    ] {
        assert_eq!(try_select(flags).unwrap_err().to_string(), sentence);
    }
    assert_eq!(
        Selection::from_query([("pods", "a/b")])
            .unwrap_err()
            .to_string(),
        "there is no selection \"pods\""
    );
}

#[test]
fn every_flag_is_its_index_and_has_a_name_of_its_own() {
    for (i, flag) in Flag::ALL.into_iter().enumerate() {
        assert_eq!(flag as usize, i);
        assert_eq!(Flag::by_name(flag.name()), Some(flag));
    }
}

fn a_term() -> impl Strategy<Value = (bool, Flag, String)> {
    let value = |flag: Flag| match flag {
        Flag::Namespace | Flag::FromNamespace | Flag::ToNamespace => "[a-z%&= +é]{1,8}".boxed(),
        Flag::Pod | Flag::FromPod | Flag::ToPod | Flag::Service | Flag::Policy => {
            "([a-z]{1,5}/)?[a-z&=%.-]{1,9}".boxed()
        }
        Flag::Ip | Flag::FromIp | Flag::ToIp => prop_oneof![
            any::<IpAddr>().prop_map(|ip| ip.to_string()),
            (any::<IpAddr>(), 0..=32u8).prop_map(|(ip, len)| format!("{ip}/{len}")),
        ]
        .boxed(),
        Flag::Port => (1..=u16::MAX).prop_map(|p| p.to_string()).boxed(),
        Flag::Protocol => any::<u8>().prop_map(|p| Protocol(p).to_string()).boxed(),
        Flag::Kind => "syn|dns|packet".boxed(),
        Flag::Outcome => "dropped|rejected|unanswered".boxed(),
        Flag::Reason | Flag::NodeName => "[A-Za-z_#0-9*]{1,12}".boxed(),
    };
    (any::<bool>(), prop::sample::select(&Flag::ALL[..]))
        .prop_flat_map(move |(not, flag)| (Just(not), Just(flag), value(flag)))
}

proptest! {
    #[test]
    fn a_query_makes_the_same_selection(terms in prop::collection::vec(a_term(), 0..6)) {
        let selection = Selection::new(terms).unwrap();
        let query = form_urlencoded::Serializer::new(String::new())
            .extend_pairs(selection.to_query())
            .finish();
        let parsed = Selection::from_query(form_urlencoded::parse(query.as_bytes())).unwrap();
        prop_assert_eq!(parsed, selection);
    }

    #[test]
    fn no_value_makes_it_panic(flag in prop::sample::select(&Flag::ALL[..]), value in ".{0,20}") {
        if let Ok(selection) = Selection::new([(false, flag, value)]) {
            selection.matches(&Line::Event(event()));
        }
    }

    #[test]
    fn a_glob_is_as_a_plain_search(text in "[ab]{0,6}", part in "[ab]{0,3}") {
        prop_assert_eq!(glob(&format!("*{part}*"), &text), text.contains(&part));
        prop_assert_eq!(glob(&format!("{part}*"), &text), text.starts_with(&part));
    }
}

#[test]
fn a_node_is_told_by_its_name_alone() {
    for (query, expected) in [
        (&[("port", "80")] as &[_], [true, true]),
        (&[("node-name", "node-a")], [true, false]),
        (
            &[("node-name", "node-a"), ("node-name", "*-b")],
            [true, true],
        ),
        (&[("not.node-name", "node-a")], [false, true]),
        (
            &[("node-name", "node-*"), ("not.node-name", "*-b")],
            [true, false],
        ),
    ] {
        let selection = Selection::from_query(query.iter().copied()).unwrap();
        let found = ["node-a", "node-b"].map(|node| selection.may_be_on(node));
        assert_eq!(found, expected, "{query:?}");
    }
}
