//! The `whydrop` binary: parse, start telemetry, run the command.

use std::process::ExitCode;

use whydrop::cli::config::Command;
use whydrop::cli::{
    agent, check, config, connections, explain, say, sentence, status, tail, telemetry,
};

fn main() -> ExitCode {
    let cli = match config::parse(std::env::args_os()) {
        Ok(cli) => cli,
        // Also --help and --version; a closed pipe behind them is no error.
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    telemetry::start(cli.verbose, cli.log_format, &cli.command);
    let result = match cli.command {
        Command::Agent(args) => agent::run(args),
        Command::Tail(args) => tail::run(args),
        Command::Explain(args) => explain::run(args),
        Command::Connections(args) => connections::run(args),
        Command::Status(args) => status::run(args),
        Command::Check(args) => check::run(args),
    };
    result.unwrap_or_else(|error| {
        say(sentence(&error));
        ExitCode::FAILURE
    })
}
