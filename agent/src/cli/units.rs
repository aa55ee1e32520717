//! Sizes and durations as flags take them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A size in bytes, more than none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// The longest first, so that `KiB` is not read as `B`.
const UNITS: [(&str, u64); 13] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("kB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("k", 1000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("B", 1),
];

impl FromStr for Size {
    type Err = String;

    /// `32MiB`, `64Mi`, `50M`, or bytes.
    fn from_str(s: &str) -> Result<Self, String> {
        let (digits, unit) = UNITS
            .iter()
            .find_map(|(unit, factor)| Some((s.strip_suffix(unit)?.trim_end(), *factor)))
            .unwrap_or((s, 1));
        // `parse` alone would take a sign.
        let number = (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
            .then(|| digits.parse::<u64>().ok()?.checked_mul(unit))
            .flatten();
        match number {
            Some(0) => Err("a size must be more than 0".to_owned()),
            Some(bytes) => Ok(Self(bytes)),
            None => Err("expected a size as 32MiB, 64Mi, or a number of bytes".to_owned()),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = [UNITS[2], UNITS[1], UNITS[0]]
            .into_iter()
            .find(|(_, factor)| self.0.is_multiple_of(*factor))
            .unwrap_or(("", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

/// A duration as `15m`, `1h30m` or `500ms`, more than none.
///
/// # Errors
/// One sentence about what was expected.
pub fn duration(s: &str) -> Result<Duration, String> {
    let expected = || "expected a duration with its unit, as 15m, 1h30m or 500ms".to_owned();
    let duration: jiff::SignedDuration = s.parse().map_err(|_| expected())?;
    match Duration::try_from(duration) {
        Ok(Duration::ZERO) => Err("a duration must be more than 0".to_owned()),
        Ok(duration) => Ok(duration),
        Err(_) => Err("a duration must not be negative".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (s, bytes) in [
            ("32MiB", 32 << 20),
            ("64Mi", 64 << 20),
            ("1 GiB", 1 << 30),
            ("50M", 50_000_000),
            ("7B", 7),
            ("4096", 4096),
        ] {
            assert_eq!(s.parse(), Ok(Size(bytes)), "{s}");
        }
        for s in [
            "",
            "MiB",
            "0",
            "0MiB",
            "-1",
            "+1",
            "1.5GiB",
            "32mib",
            "1TiB",
            "99999999999GiB",
            "1e6",
        ] {
            assert!(s.parse::<Size>().is_err(), "{s}");
        }
        for s in ["32MiB", "3GiB", "1KiB", "1023"] {
            assert_eq!(s.parse::<Size>().unwrap().to_string(), s);
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        for s in ["", "0s", "-1s", "15", "soon", "1y"] {
            assert!(duration(s).is_err(), "{s}");
        }
    }
}
