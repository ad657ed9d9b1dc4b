//! Policies as scripts write them: as a configuration has them.

use std::{collections::BTreeMap, fmt::Write};

use fusebox_server::config::{Config, ConfigError};

/// The text of each policy, by namespace and name.
#[derive(Clone, Default)]
pub struct Policies(BTreeMap<String, BTreeMap<String, String>>);

impl Policies {
    /// Adds policies, or replaces those of the same name. Each begins with its name and a colon, at the start
    /// of a line.
    pub fn write(&mut self, namespace: &str, text: &str) {
        let policies = self.0.entry(namespace.to_owned()).or_default();
        let mut name = "";
        for line in text.lines() {
            if !line.starts_with([' ', '#']) {
                name = line.split(':').next().unwrap_or_default();
                policies.remove(name);
            }
            let policy = policies.entry(name.to_owned()).or_default();
            writeln!(policy, "      {line}").expect("a string grows");
        }
    }

    /// The configuration has it no more.
    pub fn drop(&mut self, namespace: &str, name: &str) {
        let policies = self.0.get_mut(namespace).expect("a known namespace");
        policies.remove(name).expect("a known policy");
    }

    /// All of them; what is wrong, if they are none.
    pub fn config(&self) -> Result<Config, String> {
        let mut text = "namespaces:\n".to_owned();
        for (namespace, policies) in &self.0 {
            let policies = policies.values().map(String::as_str).collect::<String>();
            let policies =
                if policies.is_empty() { " {}\n".into() } else { format!("\n{policies}") };
            write!(text, "  {namespace}:\n    policies:{policies}").expect("a string grows");
        }
        Config::parse("script.yaml", &text).map_err(|error| match error {
            ConfigError::Invalid { message, .. } => {
                format!("{}\n", message.lines().next().unwrap_or_default())
            }
            other => panic!("{other}"),
        })
    }
}
