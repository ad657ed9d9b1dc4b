//! Numbers of at most two digits after the point: shares and factors.

use fusebox_core::circuit::Share;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A share, in basis points: 10,000 is all. Written as `20%` or `12.5%`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Percent(pub(super) u16);

/// How many times as much, in hundredths. Written as `2` or `1.5`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factor(pub(crate) u16);

impl From<Share> for Percent {
    fn from(share: Share) -> Self {
        Self(share.basis_points())
    }
}

impl From<Percent> for Share {
    fn from(Percent(basis_points): Percent) -> Self {
        Self::of(basis_points.into(), Self::ALL.basis_points().into())
    }
}

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match (self.0 / 100, self.0 % 100) {
            (whole, 0) => s.collect_str(&format_args!("{whole}%")),
            (whole, part) => s.collect_str(&format_args!("{whole}.{part:02}%")),
        }
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let number = text.strip_suffix('%').map(str::trim);
        let share = number.and_then(hundredths).filter(|&basis_points| basis_points <= 10_000);
        share.map(Self).ok_or_else(|| {
            D::Error::custom(format!("`{text}` is not a share of 0% to 100%, such as 20% or 12.5%"))
        })
    }
}

impl Serialize for Factor {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match (self.0 / 100, self.0 % 100) {
            (whole, 0) => s.serialize_u16(whole),
            _ => s.serialize_f64(f64::from(self.0) / 100.0),
        }
    }
}

impl<'de> Deserialize<'de> for Factor {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        hundredths(&text).map(Self).ok_or_else(|| {
            D::Error::custom(format!("`{text}` is not a factor such as 2, 1.5 or 1.25"))
        })
    }
}

/// The hundredths of a number; `None` if it is none, or too large.
fn hundredths(number: &str) -> Option<u16> {
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(part) || part.len() > 2 {
        return None;
    }
    let part = format!("{part:0<2}").parse::<u16>().ok()?;
    whole.parse::<u16>().ok()?.checked_mul(100)?.checked_add(part)
}
