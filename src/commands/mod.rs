//! The command line: one file per command.

mod check;
mod docs;
mod doctor;
mod fields;
mod graph;
mod query;
mod run;
mod schema;
mod state;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use pipeline::config::{Pipelines, Problems, did_you_mean, pipelines};
use pipeline::error::{Blame, Error};
use pipeline::graph::{self as graphs, Graph};

use crate::plugins::PLUGINS;

/// The file that is used if none is named.
const DEFAULT_FILE: &str = "pipelines.yaml";

/// Live metrics from a YAML file: sources, windows, WebSocket, SSE and Parquet history.
#[derive(Debug, Parser)]
#[command(name = "pipeline", version, args_conflicts_with_subcommands = true, after_help = EXIT_CODES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: run::Run,
    /// How log lines on stderr look.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done (Ctrl-C and SIGTERM too); 1 wrong arguments, YAML or SQL; 2 anything met while running; 130 a stop that a
second Ctrl-C or SIGTERM has cut short.";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the graph (the default command)
    Run(run::Run),
    /// Report every problem of the file as file:line:column with a hint; opens nothing
    Check(check::Check),
    /// Print the graph
    Graph(graph::GraphCommand),
    /// Query the history with SQL
    Query(query::Query),
    /// Print what is in the state folder: checkpoints, inboxes, outboxes
    State(state::StateCommand),
    /// Read everything durable and say what is damaged and what to do
    Doctor(doctor::Doctor),
    /// Connect to a source and print its `fields:` block
    Fields(fields::FieldsCommand),
    /// Print the JSON Schema of the file, for editors
    Schema,
    /// Print the page of a plugin or of what all sources or sinks share, or the list of pages
    Docs(docs::Docs),
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// For the user; empty if everything is said already.
    pub(crate) message: String,
    /// Exit code.
    pub(crate) code: u8,
}

impl Failure {
    /// Wrong arguments, YAML, SQL text.
    pub(crate) const USER: u8 = 1;
    /// Anything met while running.
    pub(crate) const RUNNING: u8 = 2;
    /// A second signal has ended a stop: 128 and the number of the interrupt, as shells have it.
    pub(crate) const CUT_SHORT: u8 = 130;

    fn user(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: Self::USER }
    }

    fn running(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: Self::RUNNING }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::running(error.to_string())
    }
}

/// Runs the command that was asked for.
pub(crate) fn run(arguments: Arguments) -> Result<(), Failure> {
    log_to_stderr(arguments.log_format);
    match arguments.command.unwrap_or(Command::Run(arguments.run)) {
        Command::Run(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Graph(command) => command.run(),
        Command::Query(command) => command.run(),
        Command::State(command) => command.run(),
        Command::Doctor(command) => command.run(),
        Command::Fields(command) => command.run(),
        Command::Schema => schema::run(),
        Command::Docs(command) => command.run(),
    }
}

/// `RUST_LOG` chooses what is logged; libraries only warn unless it says otherwise.
fn log_to_stderr(format: LogFormat) {
    use tracing_subscriber::EnvFilter;
    let default = "warn,tailwater=info,pipeline=info,sources=info,operators=info,sinks=info,rumqttd=off";
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Text => {
            let colours = io::IsTerminal::is_terminal(&io::stderr());
            builder.with_target(false).with_ansi(colours).init();
        }
        LogFormat::Json => builder.json().init(),
    }
}

/// Prints a result. A reader that has gone away (`| head`) is no error.
fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::running(error.to_string())),
        _ => Ok(()),
    }
}

/// `1 sources` reads badly.
fn counted(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// A file as read and parsed.
struct Loaded {
    path: PathBuf,
    file: Pipelines,
    problems: Problems,
}

fn load(path: Option<&Path>) -> Result<Loaded, Failure> {
    let path = path.unwrap_or(Path::new(DEFAULT_FILE)).to_owned();
    let text = std::fs::read_to_string(&path).map_err(|error| {
        let hint = if error.kind() == io::ErrorKind::NotFound { hint_for_missing(&path) } else { String::new() };
        Failure::user(format!("cannot read `{}`: {error}{hint}", path.display()))
    })?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
    let mut problems = Problems::default();
    let file = pipelines::parse(&text, &folder, &|name| std::env::var(name).ok(), &mut problems);
    Ok(Loaded { path, file, problems })
}

/// A mistyped command is taken for the name of a file.
fn hint_for_missing(path: &Path) -> String {
    let commands = Arguments::command();
    let word = path.to_str().unwrap_or_default();
    let nearest = did_you_mean(word, commands.get_subcommands().map(|command| command.get_name()));
    match nearest.as_deref().and_then(|hint| hint.strip_prefix("did you mean ")) {
        Some(command) => format!("; did you mean the command {command}"),
        None => "; name the file: `pipeline run FILE`".to_owned(),
    }
}

impl Loaded {
    /// Checks the graph. Errors go to stderr and end the command; notes are for `pipeline check`, and not for every start.
    fn graph(mut self) -> Result<Graph, Failure> {
        let graph = graphs::check(&self.file, &PLUGINS, &mut self.problems);
        eprint!("{}", self.problems.render_errors(&self.path.display().to_string()));
        graph.ok_or_else(|| Failure { message: self.summary(), code: Failure::USER })
    }

    fn summary(&self) -> String {
        match self.problems.errors_told() {
            1 => format!("`{}` has one error", self.path.display()),
            count => format!("`{}` has {count} errors", self.path.display()),
        }
    }
}

/// An error of the user's text is 1, anything else 2.
fn by_blame(error: &Error) -> Failure {
    let code = if error.blame == Blame::User { Failure::USER } else { Failure::RUNNING };
    Failure { message: error.to_string(), code }
}
