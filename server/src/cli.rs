//! The command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, builder::BoolishValueParser};

use crate::config::{Config, ConfigError};

/// One breaker panel for a whole fleet: rate limits shared by many instances of many services.
///
/// Without a command, `fusebox` serves. Without a configuration it serves the namespace `demo`, with the policies
/// `api` (100 a second, bursts of 200), `signup` (3 a minute), `jobs` and `connections` (1 and 10 at the same time),
/// `retries` (a fifth of the calls) and the breaker `payments`.
#[derive(Debug, Parser)]
#[command(name = "fusebox", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve, until SIGTERM, SIGINT or SIGHUP
    Serve(Serve),
    /// Check a configuration and print it with its defaults filled in
    ///
    /// Also reads the files of `envoy_ratelimit.config_dir`. Exits with 0, or with 2 if a file is wrong; the messages
    /// name file, line and field.
    Check {
        /// The configuration, a YAML file
        file: PathBuf,
    },
}

/// How to serve. A flag counts more than the environment, and that more than the file.
#[derive(Clone, Debug, Default, Args)]
pub struct Serve {
    /// The configuration, a YAML file [default: the namespace `demo`]
    #[arg(long, value_name = "FILE", env = "FUSEBOX_CONFIG")]
    config: Option<PathBuf>,
    /// Where to serve gRPC [default: 127.0.0.1:3873]
    #[arg(long, value_name = "ADDRESS", env = "FUSEBOX_LISTEN")]
    listen: Option<SocketAddr>,
    /// Where to serve /metrics, /livez and /readyz [default: 127.0.0.1:3874]
    #[arg(long, value_name = "ADDRESS", env = "FUSEBOX_OPS_LISTEN")]
    ops_listen: Option<SocketAddr>,
    /// The data directory [default: ./fusebox-data]
    #[arg(long, value_name = "DIRECTORY", env = "FUSEBOX_DATA")]
    data: Option<PathBuf>,
    /// Start although the data directory has lost some of what was written: what was spent in the part that
    /// is lost may be spent again
    #[arg(long)]
    accept_loss: bool,
    /// Allow addresses that others can reach, although there is no TLS or authentication yet
    #[arg(long, env = "FUSEBOX_INSECURE", value_parser = BoolishValueParser::new())]
    insecure: bool,
    /// What to log, as `level` or `target=level,…`
    #[arg(long, value_name = "FILTER", env = "FUSEBOX_LOG", default_value = "info")]
    log: String,
}

impl Cli {
    /// What to do; serving if nothing was said.
    pub fn command(self) -> Command {
        self.command.unwrap_or(Command::Serve(self.serve))
    }
}

impl Serve {
    /// The configuration in effect: flags and environment over the file.
    ///
    /// # Errors
    /// If the file is not a configuration, or an address is one that others can reach.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let mut config = match &self.config {
            Some(file) => Config::read(file)?,
            None => Config::demo()?,
        };
        if let Some(listen) = self.listen {
            config.listen = listen;
        }
        if let Some(ops_listen) = self.ops_listen {
            config.ops_listen = ops_listen;
        }
        if let Some(data) = &self.data {
            config.storage.path.clone_from(data);
        }
        config.check_exposure(self.insecure)?;
        Ok(config)
    }

    /// Whether the built-in configuration is served.
    pub fn is_demo(&self) -> bool {
        self.config.is_none()
    }

    /// Whether addresses that others can reach are meant.
    pub fn insecure(&self) -> bool {
        self.insecure
    }

    /// Whether to start although the data directory has lost something.
    pub fn accept_loss(&self) -> bool {
        self.accept_loss
    }

    /// What to log.
    pub fn log(&self) -> &str {
        &self.log
    }
}
