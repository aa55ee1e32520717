//! Flags that stand before the command. clap knows them behind it; kubectl's users expect both, as in an
//! alias for `kubectl whydrop --context prod`.

use std::ffi::{OsStr, OsString};

use clap::Command;

/// What an argument before the command is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// A flag of a command, by itself or with its value in it.
    Flag,
    /// One whose value is the next argument.
    FlagAndValue,
    /// A command, `--help`, or what clap refuses.
    Other,
}

/// Puts the commands' flags that stand before the command, as they are, directly behind it. Where no command
/// follows they are left out, and clap says what it says without them.
pub fn put_behind(command: &Command, args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut args = args.into_iter();
    let mut all: Vec<OsString> = args.next().into_iter().collect();
    let mut flags = Vec::new();
    while let Some(arg) = args.next() {
        match shape(command, &arg) {
            Shape::Flag => flags.push(arg),
            Shape::FlagAndValue => flags.extend(std::iter::once(arg).chain(args.next())),
            Shape::Other => {
                let is_command = arg.to_str().is_some_and(|a| names(command, a));
                let is_flag = arg.as_encoded_bytes().starts_with(b"-");
                all.push(arg);
                if is_command {
                    all.append(&mut flags);
                }
                if !is_flag {
                    break;
                }
            }
        }
    }
    all.extend(args);
    all
}

fn names(command: &Command, name: &str) -> bool {
    command.find_subcommand(name).is_some()
}

fn shape(command: &Command, arg: &OsStr) -> Shape {
    let Some(text) = arg.to_str() else {
        return Shape::Other;
    };
    if let Some(long) = text.strip_prefix("--") {
        let (name, value) = match long.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (long, None),
        };
        return match takes_value(command, |arg| arg.get_long() == Some(name)) {
            None => Shape::Other,
            Some(true) if value.is_none() => Shape::FlagAndValue,
            Some(_) => Shape::Flag,
        };
    }
    let Some(letters) = text.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
        return Shape::Other;
    };
    // Several in one: -fn shop, -fnshop.
    let mut letters = letters.chars();
    while let Some(letter) = letters.next() {
        match takes_value(command, |arg| arg.get_short() == Some(letter)) {
            None => return Shape::Other,
            Some(true) if letters.as_str().is_empty() => return Shape::FlagAndValue,
            Some(true) => return Shape::Flag,
            Some(false) => {}
        }
    }
    Shape::Flag
}

/// Whether a flag of any command takes a value, which is the same in all of them; `None` if there is none.
fn takes_value(command: &Command, is_meant: impl Fn(&clap::Arg) -> bool) -> Option<bool> {
    std::iter::once(command)
        .chain(command.get_subcommands())
        .flat_map(Command::get_arguments)
        .find(|arg| is_meant(arg))
        .map(has_value)
}

fn has_value(arg: &clap::Arg) -> bool {
    let is_alone = arg
        .get_num_args()
        .is_some_and(|values| !values.takes_values());
    arg.get_action().takes_values() && !is_alone
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::config::Cli;

    fn put(line: &str) -> String {
        let args = line.split_whitespace().map(OsString::from);
        let args = put_behind(&Cli::command(), args);
        let args: Vec<_> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        args.join(" ")
    }

    #[test]
    fn flags_before_the_command_come_behind_it_in_their_order() {
        for (line, expected) in [
            ("w tail -f --context x", "w tail -f --context x"),
            (
                "w --context x tail -f --last 1",
                "w tail --context x -f --last 1",
            ),
            (
                "w --context=x -v -s u tail -o json",
                "w tail --context=x -v -s u -o json",
            ),
            // A value is no command, and behind the command nothing is touched.
            ("w --context tail tail", "w tail --context tail"),
            (
                "w -n shop explain a/b c/d -n",
                "w explain -n shop a/b c/d -n",
            ),
            (
                "w -fn shop -fnshop --not --pod a/b tail",
                "w tail -fn shop -fnshop --not --pod a/b",
            ),
            (
                "w --insecure-skip-tls-verify status",
                "w status --insecure-skip-tls-verify",
            ),
            // For clap: its own, and what it refuses.
            ("w --help tail", "w --help tail"),
            ("w --context x --help tail", "w --help tail --context x"),
            ("w --nothing tail", "w --nothing tail"),
            ("w --context x tial -f", "w tial -f"),
            ("w --context", "w"),
            ("w --context x", "w"),
            ("w - tail", "w - tail"),
            ("w -- tail", "w -- tail"),
            ("w", "w"),
            ("", ""),
        ] {
            assert_eq!(put(line), expected, "{line}");
        }
    }

    #[test]
    fn a_flag_takes_a_value_in_every_command_or_in_none() {
        let mut known = HashMap::new();
        let command = Cli::command();
        for command in std::iter::once(&command).chain(command.get_subcommands()) {
            for arg in command.get_arguments() {
                let long = arg.get_long().map(str::to_owned);
                let short = arg.get_short().map(String::from);
                for name in long.into_iter().chain(short) {
                    let takes = has_value(arg);
                    let before = *known.entry(name.clone()).or_insert(takes);
                    assert_eq!(before, takes, "{name} of {}", command.get_name());
                }
            }
        }
    }
}
