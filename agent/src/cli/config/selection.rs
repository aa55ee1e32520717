//! The flags that select events, and `--not`.

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches};

use crate::selection::{Flag, Selection};

/// The flags of [`Flag::ALL`] and `--not`, whose meaning hangs on their order.
#[derive(Debug, Default)]
pub struct SelectionArgs(pub Selection);

impl Args for SelectionArgs {
    fn augment_args(cmd: clap::Command) -> clap::Command {
        let heading = "Selection";
        let not = Arg::new("not")
            .long("not")
            .help("Negates the selection behind it")
            .action(ArgAction::Append)
            .num_args(0)
            .default_missing_value("true")
            .help_heading(heading);
        Flag::ALL
            .into_iter()
            .map(|flag| {
                let name = flag.name();
                let arg = Arg::new(name)
                    .long(name)
                    .value_name(flag.value_name())
                    .help(flag.help())
                    .action(ArgAction::Append)
                    .env(format!("WHYDROP_{}", name.replace('-', "_").to_uppercase()))
                    .help_heading(heading);
                if flag == Flag::Namespace {
                    arg.short('n')
                } else {
                    arg
                }
            })
            .fold(cmd, clap::Command::arg)
            .arg(not)
    }

    fn augment_args_for_update(cmd: clap::Command) -> clap::Command {
        Self::augment_args(cmd)
    }
}

impl FromArgMatches for SelectionArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let wrong = |what: String| clap::Error::raw(ErrorKind::ValueValidation, what + "\n");
        // clap counts a flag and its value as two indices.
        let mut nots: Vec<usize> = matches.indices_of("not").into_iter().flatten().collect();
        let mut flags = Vec::new();
        for flag in Flag::ALL {
            let values = matches
                .get_many::<String>(flag.name())
                .into_iter()
                .flatten();
            let typed =
                matches.value_source(flag.name()) == Some(clap::parser::ValueSource::CommandLine);
            let indices = matches.indices_of(flag.name()).into_iter().flatten();
            for (value, index) in values.zip(indices) {
                let not = nots.iter().position(|not| typed && not + 2 == index);
                flags.push((
                    index,
                    not.map(|i| nots.swap_remove(i)).is_some(),
                    flag,
                    value,
                ));
            }
        }
        if !nots.is_empty() {
            return Err(wrong(
                "--not negates the selection behind it, and there is none".into(),
            ));
        }
        flags.sort_by_key(|(index, ..)| *index);
        Selection::new(
            flags
                .into_iter()
                .map(|(_, not, flag, value)| (not, flag, value)),
        )
        .map(Self)
        .map_err(|e| wrong(format!("--{e}")))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
