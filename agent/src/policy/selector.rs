//! Label selectors, compiled: every label that is asked for is one requirement.

use std::fmt;
use std::sync::Arc;

use crate::cluster::objects::Labels;

/// What a requirement asks of one label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operator {
    /// It is there, with one of the values. `matchLabels` is this with one value.
    In,
    /// It has none of the values, or is not there.
    NotIn,
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

impl Operator {
    /// The name in manifests.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::In => "In",
            Self::NotIn => "NotIn",
            Self::Exists => "Exists",
            Self::DoesNotExist => "DoesNotExist",
        }
    }
}

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Requirement {
    /// The label's key.
    pub key: Arc<str>,
    /// What is asked of it.
    pub operator: Operator,
    /// Sorted; empty for `Exists` and `DoesNotExist`.
    pub values: Box<[Arc<str>]>,
}

impl Requirement {
    /// Whether labels meet it. An absent key meets `NotIn` and `DoesNotExist`.
    pub fn matches(&self, labels: &Labels) -> bool {
        let value = value(labels, &self.key);
        let listed = |value: &Arc<str>| self.values.binary_search(value).is_ok();
        match self.operator {
            Operator::In => value.is_some_and(listed),
            Operator::NotIn => !value.is_some_and(listed),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }

    /// A value with which a label of this key meets it; `None` where only its absence does.
    pub fn wanted_value(&self) -> Option<&str> {
        match self.operator {
            Operator::In => self.values.first().map(|v| &**v),
            Operator::Exists => Some("true"),
            Operator::NotIn | Operator::DoesNotExist => None,
        }
    }
}

impl fmt::Display for Requirement {
    /// As `kubectl get -l` takes it: `team=shop`, `tier in (a, b)`, `!old`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.operator, &*self.values) {
            (Operator::In, [value]) => write!(f, "{}={value}", self.key),
            (Operator::In, values) => write!(f, "{} in ({})", self.key, values.join(", ")),
            (Operator::NotIn, [value]) => write!(f, "{}!={value}", self.key),
            (Operator::NotIn, values) => write!(f, "{} notin ({})", self.key, values.join(", ")),
            (Operator::Exists, _) => f.write_str(&self.key),
            (Operator::DoesNotExist, _) => write!(f, "!{}", self.key),
        }
    }
}

/// The value of a label.
pub fn value<'a>(labels: &'a Labels, key: &str) -> Option<&'a Arc<str>> {
    let found = labels.binary_search_by(|(k, _)| (**k).cmp(key));
    found.ok().map(|i| &labels[i].1)
}

/// A selector. Without requirements it matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Selector(Box<[Requirement]>);

impl Selector {
    /// Compiles requirements.
    pub fn new(requirements: impl IntoIterator<Item = Requirement>) -> Self {
        let sorted = requirements.into_iter().map(|mut requirement| {
            requirement.values.sort();
            requirement
        });
        Self(sorted.collect())
    }

    /// The selector of `matchLabels`.
    pub fn of_labels<'a>(labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self::new(labels.into_iter().map(|(key, value)| Requirement {
            key: key.into(),
            operator: Operator::In,
            values: [value.into()].into(),
        }))
    }

    /// Its requirements; all must be met.
    pub fn requirements(&self) -> &[Requirement] {
        &self.0
    }

    /// Whether it matches everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether labels meet every requirement.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|r| r.matches(labels))
    }

    /// The requirements that labels do not meet.
    pub fn unmet<'a>(&'a self, labels: &'a Labels) -> impl Iterator<Item = &'a Requirement> {
        self.0.iter().filter(|r| !r.matches(labels))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("everything");
        }
        for (i, requirement) in self.0.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma}{requirement}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        let pairs = pairs.iter();
        pairs.map(|(k, v)| ((*k).into(), (*v).into())).collect()
    }

    fn requirement(operator: Operator, values: &[&str]) -> Requirement {
        Requirement {
            key: "tier".into(),
            operator,
            values: values.iter().map(|v| (*v).into()).collect(),
        }
    }

    #[test]
    fn all_four_operators_on_a_value_another_value_and_an_absent_key() {
        let (yes, other, absent) = (
            labels(&[("a", "b"), ("tier", "front")]),
            labels(&[("tier", "back")]),
            labels(&[("a", "b")]),
        );
        for (operator, values, expected) in [
            (Operator::In, &["front", "edge"][..], [true, false, false]),
            (Operator::NotIn, &["front", "edge"], [false, true, true]),
            (Operator::Exists, &[], [true, true, false]),
            (Operator::DoesNotExist, &[], [false, false, true]),
        ] {
            let selector = Selector::new([requirement(operator, values)]);
            let got = [&yes, &other, &absent].map(|labels| selector.matches(labels));
            assert_eq!(got, expected, "{}", operator.as_str());
        }
    }

    #[test]
    fn an_empty_selector_matches_everything() {
        assert!(Selector::default().matches(&labels(&[])));
        assert!(Selector::default().matches(&labels(&[("a", "b")])));
    }

    #[test]
    fn it_reads_as_kubectl_writes_selectors() {
        let all = Selector::new([
            requirement(Operator::In, &["b", "a"]),
            requirement(Operator::NotIn, &["a"]),
            requirement(Operator::DoesNotExist, &[]),
        ]);
        assert_eq!(all.to_string(), "tier in (a, b),tier!=a,!tier");
        assert_eq!(all.unmet(&labels(&[("tier", "a")])).count(), 2);
    }
}
