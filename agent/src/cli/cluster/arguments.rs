//! What `whydrop tail` in an agent's pod is asked, so that every selection is made on its node.

use crate::cli::config::DEFAULT_SOCKET;
use crate::output::query::Since;
use crate::selection::Selection;

/// The part of an agent's lines that is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Go on with events as they happen, with a sign of life this often.
    pub heartbeat: Option<std::time::Duration>,
    /// Begin with the last this many.
    pub last: Option<usize>,
    /// Begin with those from then on.
    pub since: Option<Since>,
}

/// The arguments of `whydrop tail`.
pub fn tail(selection: &Selection, part: Part) -> Vec<String> {
    let mut arguments = command("tail");
    if let Some(heartbeat) = part.heartbeat {
        arguments.push("--follow".to_owned());
        arguments.push(format!("--heartbeat={}ms", heartbeat.as_millis()));
    }
    if let Some(last) = part.last {
        arguments.push(format!("--last={last}"));
    }
    if let Some(since) = part.since {
        arguments.push(format!("--since={since}"));
    }
    for (name, value) in selection.to_query() {
        let plain = name.strip_prefix("not.");
        if plain.is_some() {
            arguments.push("--not".to_owned());
        }
        arguments.push(format!("--{}={value}", plain.unwrap_or(&name)));
    }
    arguments
}

/// The arguments of `whydrop status`.
pub fn status() -> Vec<String> {
    command("status")
}

/// The arguments of `whydrop connections`.
pub fn connections() -> Vec<String> {
    let socket = format!("--socket={DEFAULT_SOCKET}");
    vec!["connections".to_owned(), socket]
}

/// A command for the agent in the same pod: of the variables of its container, none has a say in who is
/// asked and how it looks.
fn command(name: &str) -> Vec<String> {
    let socket = format!("--socket={DEFAULT_SOCKET}");
    [name, &socket, "--output=json"].map(str::to_owned).into()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::cli::config::{Command, Output, ReportOutput, TailArgs, parse};
    use crate::selection::Flag;

    fn parsed(arguments: Vec<String>) -> Command {
        let line = std::iter::once("whydrop".to_owned()).chain(arguments);
        parse(line.map(Into::into)).unwrap().command
    }

    fn tail_args(arguments: Vec<String>) -> TailArgs {
        match parsed(arguments) {
            Command::Tail(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn value(flag: Flag) -> BoxedStrategy<String> {
        match flag {
            Flag::Ip | Flag::FromIp | Flag::ToIp => {
                prop_oneof!["10\\.0\\.[0-9]\\.0/24", Just("fd00::1".to_owned())].boxed()
            }
            Flag::Port => (1u16..).prop_map(|port| port.to_string()).boxed(),
            Flag::Protocol => "TCP|ICMPv6|132|47".prop_map(String::from).boxed(),
            Flag::Kind => "syn|dns|packet".prop_map(String::from).boxed(),
            Flag::Outcome => "dropped|rejected|unanswered".prop_map(String::from).boxed(),
            Flag::Namespace | Flag::FromNamespace | Flag::ToNamespace => "[a-z-]{1,8}".boxed(),
            Flag::NodeName => "[a-z*-][ a-z*=-]{0,8}".boxed(),
            Flag::Reason => "[A-Z_]{1,8}".boxed(),
            Flag::Pod | Flag::FromPod | Flag::ToPod | Flag::Service | Flag::Policy => {
                "([a-z-]{1,4}/)?[a-z-]{0,4}"
                    .prop_filter("a name", |name| !name.is_empty())
                    .boxed()
            }
        }
    }

    prop_compose! {
        fn flag()(flag in proptest::sample::select(Flag::ALL.to_vec()))
            (value in value(flag), flag in Just(flag), not in any::<bool>())
            -> (bool, Flag, String) {
            (not, flag, value)
        }
    }

    proptest! {
        /// The agent's whydrop understands what this one asks, whatever it is.
        #[test]
        fn what_is_asked_is_what_is_understood(
            flags in proptest::collection::vec(flag(), 0..6),
            last in proptest::option::of(0usize..1000),
            since in proptest::option::of(0i64..2_000_000_000),
            follow in any::<bool>(),
        ) {
            let selection = Selection::new(flags).unwrap();
            let part = Part {
                heartbeat: follow.then_some(std::time::Duration::from_secs(10)),
                last,
                since: since.map(|at| Since::At(jiff::Timestamp::from_second(at).unwrap())),
            };
            let args = tail_args(tail(&selection, part));
            let sorted = |selection: &Selection| {
                let mut query: Vec<_> = selection.to_query().collect();
                query.sort();
                query
            };
            // Across flags the order has no meaning.
            prop_assert_eq!(sorted(&args.selection.0), sorted(&selection));
            prop_assert_eq!((args.last, args.since, args.follow), (part.last, part.since, follow));
            prop_assert_eq!(args.heartbeat, part.heartbeat);
            prop_assert_eq!(args.output, Output::Json);
            prop_assert_eq!(args.agents.socket.as_deref(), Some(Path::new(DEFAULT_SOCKET)));
        }
    }

    #[test]
    fn an_age_is_understood() {
        for age in ["90s", "1h30m", "2d", "0s"] {
            let since: Since = age.parse().unwrap();
            let part = Part {
                since: Some(since),
                ..Part::default()
            };
            let args = tail_args(tail(&Selection::default(), part));
            assert_eq!(args.since, Some(since), "{age}");
        }
    }

    #[test]
    fn status_is_asked_of_the_agent_in_the_same_pod() {
        let Command::Status(args) = parsed(status()) else {
            panic!("no status");
        };
        assert_eq!(args.output, ReportOutput::Json);
        assert_eq!(
            args.agents.socket.as_deref(),
            Some(Path::new(DEFAULT_SOCKET))
        );
    }
}
