//! Why NetworkPolicies allow or deny a flow. No I/O.
//!
//! | module | holds |
//! |---|---|
//! | [`selector`] | label selectors, compiled |
//! | [`model`] | a NetworkPolicy with its defaults set |
//! | [`tier`] | policies of the Admin and Baseline tiers, and how they decide |
//! | [`world`] | all objects that decide, by what they are looked up by |
//! | [`evaluate`] | the verdict of each side of a flow |
//! | [`matching`] | whether a peer, an address or a port matches |
//! | [`compiled`] | the same laid out for many evaluations |
//! | [`failure`] | the predicates of a rule that can fail |
//! | [`findings`] | what is missing, in real names |
//! | [`beside`], [`aws`] | findings that no missing rule explains |
//! | [`near`] | the findings of rules that almost matched |
//! | [`fix`] | changes that mend it, proven, and what else they admit |
//! | [`proposal`] | policies that are not applied yet, and what they would change |
//! | [`manifest`] | a policy or namespace as YAML |
//! | [`dns`], [`cni`] | what is known of the cluster's DNS, and of who enforces |

mod aws;
mod beside;
pub mod cni;
mod compiled;
pub mod dns;
pub mod evaluate;
pub mod failure;
pub mod findings;
pub mod fix;
pub mod manifest;
mod matching;
pub mod model;
pub mod near;
pub mod proposal;
pub mod selector;
pub mod tier;
pub mod world;

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod bench_tests;
