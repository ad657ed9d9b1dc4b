//! Figures for people, in Markdown.

use std::{fmt::Write, mem};

/// A table; its text is taken as it grows.
pub(crate) struct Table {
    text: String,
}

impl Table {
    /// A table under a title; all columns but the first hold figures.
    pub(crate) fn new(title: &str, columns: &[&str]) -> Self {
        let mut table = Self { text: format!("\n### {title}\n\n") };
        table.row(columns.iter().map(ToString::to_string));
        let rule = (0..columns.len()).map(|column| if column == 0 { "---" } else { "---:" }.into());
        table.row(rule);
        table
    }

    pub(crate) fn row(&mut self, fields: impl IntoIterator<Item = String>) {
        for field in fields {
            // Text of a server may hold anything; a bar or a line break would end the field.
            let field = field.replace('|', "\\|").replace('\n', " ");
            // Writing to a string does not fail.
            let _ = write!(self.text, "| {field} ");
        }
        self.text += "|\n";
    }

    pub(crate) fn note(&mut self, note: &str) {
        self.text += &format!("\n{note}\n");
    }

    /// What was added since this was last asked.
    pub(crate) fn take_text(&mut self) -> String {
        mem::take(&mut self.text)
    }
}

/// Three figures, as many as the machine is worth: `41,200`, `38.1`, `0.52`.
pub(crate) fn figure(value: f64) -> String {
    if !value.is_finite() || value <= 0.0 {
        return if value == 0.0 { "0".into() } else { "–".into() };
    }
    let above = value.log10().floor() as i32;
    let unit = 10_f64.powi(above - 2);
    let rounded = (value / unit).round() * unit;
    let decimals = (2 - above).clamp(0, 3) as usize;
    let text = format!("{rounded:.decimals$}");
    let (whole, fraction) = text.split_at(text.find('.').unwrap_or(text.len()));
    grouped(whole) + fraction
}

/// A whole number: `1,000`.
pub(crate) fn count(value: u32) -> String {
    grouped(&value.to_string())
}

fn grouped(whole: &str) -> String {
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A figure and its ratio to another: `41,200 (0.93)`.
pub(crate) fn beside(value: f64, other: Option<f64>) -> String {
    match other {
        Some(other) if value < 10.0 * other => format!("{} ({:.2})", figure(value), value / other),
        Some(other) => format!("{} ({})", figure(value), figure(value / other)),
        None => figure(value),
    }
}
