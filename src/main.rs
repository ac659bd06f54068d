//! `pipeline`: live metrics from a YAML file.

mod commands;
mod plugins;

use std::process::ExitCode;

use clap::Parser;

use commands::{Arguments, Failure};

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            // `--help` and `--version` are answers, not mistakes.
            return if error.use_stderr() { ExitCode::from(Failure::USER) } else { ExitCode::SUCCESS };
        }
    };
    match commands::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("error: {}", failure.message);
            }
            ExitCode::from(failure.code)
        }
    }
}
