//! What the policies of a tier do with a flow.
//!
//! The answer is a set. A rule that may match, and policies of one priority of which the enforcer may
//! apply either, leave several ways; if all of them come to one verdict, it is the verdict.

use std::sync::Arc;

use super::{Action, Tier, TierPolicy, TierPort, TierRule};
use crate::policy::evaluate::{Flow, Match, Verdict};
use crate::policy::failure::Failure;
use crate::policy::model::{Direction, PortItem, PortMatch};
use crate::policy::world::{PodId, World};

/// What may come out of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcomes(u8);

/// Each of `Action`'s bits says that it may be what is done.
const fn bit(action: Action) -> u8 {
    match action {
        Action::Accept => 1,
        Action::Deny => 2,
        Action::Pass => 4,
    }
}

/// No rule may match.
const NOTHING: u8 = 8;

/// Of two policies whose order is not defined: what either does, where it does something.
const fn either(a: u8, b: u8) -> u8 {
    ((a | b) & !NOTHING) | (a & b & NOTHING)
}

impl Outcomes {
    /// Whether the tier may leave it to the next one.
    pub const fn goes_on(self) -> bool {
        self.0 & (NOTHING | bit(Action::Pass)) != 0
    }

    /// Whether nothing else is possible.
    pub const fn only_goes_on(self) -> bool {
        self.0 & (bit(Action::Accept) | bit(Action::Deny)) == 0
    }

    /// The verdict, with what the next tier says if this one may leave it to it.
    pub fn then(self, next: impl FnOnce() -> Verdict) -> Verdict {
        let mut allow = self.0 & bit(Action::Accept) != 0;
        let mut deny = self.0 & bit(Action::Deny) != 0;
        if self.goes_on() {
            let next = next();
            allow |= next != Verdict::Deny;
            deny |= matches!(next, Verdict::Deny | Verdict::Undefined);
        }
        match (allow, deny) {
            (true, false) => Verdict::Allow,
            (false, true) => Verdict::Deny,
            _ => Verdict::Undefined,
        }
    }
}

/// How one rule of a tier fared.
#[derive(Clone, Debug)]
pub struct TierResult<'w> {
    /// The policy.
    pub policy: &'w Arc<TierPolicy>,
    /// The rule's index.
    pub rule: usize,
    /// What it would do.
    pub action: Action,
    /// Whether it matches.
    pub matched: Match,
    /// The predicates that failed, for the peer that came closest.
    pub failures: Vec<Failure<'w>>,
}

impl TierResult<'_> {
    /// Its name for people.
    pub fn name(&self, direction: Direction) -> String {
        self.policy.rule_name(direction, self.rule)
    }
}

impl World {
    /// What a tier does with a flow. `tell` hears of each rule that was asked, in order.
    pub(in crate::policy) fn tier<'w>(
        &'w self,
        tier: Tier,
        subject: PodId,
        flow: &Flow,
        direction: Direction,
        mut tell: impl FnMut(&'w Arc<TierPolicy>, usize, Match),
    ) -> Outcomes {
        let mut policies = self.governing(subject, direction, tier).peekable();
        let (mut ordered, mut unordered) = (NOTHING, NOTHING);
        while let Some(first) = policies.next() {
            let mut group = self.of_policy(first, flow, direction, &mut tell);
            while let Some(next) = policies.next_if(|next| next.priority == first.priority) {
                group = either(group, self.of_policy(next, flow, direction, &mut tell));
            }
            // A BaselineAdminNetworkPolicy beside ClusterNetworkPolicies of the same tier.
            if first.priority.is_none() {
                unordered = group;
                continue;
            }
            ordered = (ordered & !NOTHING) | group;
            if group & NOTHING == 0 {
                break;
            }
        }
        Outcomes(either(ordered, unordered))
    }

    fn of_policy<'w>(
        &'w self,
        policy: &'w Arc<TierPolicy>,
        flow: &Flow,
        direction: Direction,
        tell: &mut impl FnMut(&'w Arc<TierPolicy>, usize, Match),
    ) -> u8 {
        let mut seen = 0;
        for (i, rule) in policy.rules(direction).iter().enumerate() {
            let matched = self.tier_rule_matches(rule, flow, direction);
            tell(policy, i, matched);
            match matched {
                Match::No => {}
                Match::Maybe => seen |= bit(rule.action),
                Match::Yes => return seen | bit(rule.action),
            }
        }
        seen | NOTHING
    }

    fn tier_rule_matches(&self, rule: &TierRule, flow: &Flow, direction: Direction) -> Match {
        if self.tier_port_failure(rule, flow).is_some() {
            return Match::No;
        }
        let peers = rule.peers.iter();
        let matches = peers.map(|peer| self.tier_peer_matches(peer, flow, direction, |_| {}));
        matches.max().unwrap_or(Match::No)
    }

    /// Why a rule does not match, for the peer that comes closest.
    pub(in crate::policy) fn tier_failures<'w>(
        &'w self,
        rule: &'w TierRule,
        flow: &Flow,
        direction: Direction,
    ) -> Vec<Failure<'w>> {
        let of_peer = |peer| {
            let mut failures = Vec::new();
            self.tier_peer_matches(peer, flow, direction, |f| failures.push(f));
            failures
        };
        let closest = rule.peers.iter().map(of_peer).min_by_key(Vec::len);
        let mut failures = closest.unwrap_or_default();
        failures.extend(self.tier_port_failure(rule, flow));
        failures
    }

    /// Ports that stand for all others: where a tier counts, some may be denied and others not, and
    /// a flow without a port asks for every one. `None` where the flow is judged as it is.
    pub(in crate::policy) fn ports_to_ask(
        &self,
        subject: PodId,
        flow: &Flow,
        direction: Direction,
    ) -> Option<Vec<u16>> {
        if flow.port.is_some() || !flow.protocol.has_ports() {
            return None;
        }
        let tiers = [Tier::Admin, Tier::Baseline];
        let tiers = tiers.map(|tier| self.governing(subject, direction, tier));
        let mut tiers = tiers.into_iter().flatten().peekable();
        tiers.peek()?;
        // Verdicts change where a range begins and behind its end only.
        let mut ports = vec![1];
        let mut range = |from: u16, to: u16| {
            ports.push(from);
            ports.extend(to.checked_add(1));
        };
        let mut item = |item: &PortItem| match &item.port {
            _ if item.protocol != flow.protocol => {}
            PortMatch::Any => {}
            PortMatch::Range(from, to) => range(*from, *to),
            PortMatch::Named(name) => self.numbers(name, flow).for_each(|n| range(n, n)),
        };
        for port in tiers
            .flat_map(|p| p.rules(direction))
            .flat_map(|r| &r.ports)
        {
            match port {
                TierPort::Number(number) => item(number),
                TierPort::Named(name) => item(&PortItem {
                    protocol: flow.protocol,
                    port: PortMatch::Named(name.clone()),
                }),
            }
        }
        let rules = self.isolating(subject, direction);
        let rules = rules.flat_map(|policy| &policy.side(direction).rules);
        rules.flat_map(|rule| &rule.ports).for_each(item);
        ports.sort_unstable();
        ports.dedup();
        Some(ports)
    }
}

/// Two rules of which it is not defined which one counts.
pub fn conflict<'r, 'w>(
    results: &'r [TierResult<'w>],
) -> Option<(&'r TierResult<'w>, &'r TierResult<'w>)> {
    let matched = || results.iter().filter(|r| r.matched != Match::No);
    let disagree = |a: &TierResult, b: &TierResult| {
        let (p, q) = (a.policy, b.policy);
        p.tier == q.tier
            && !Arc::ptr_eq(p, q)
            && (p.priority == q.priority || p.priority.is_none() || q.priority.is_none())
            && a.action != b.action
    };
    matched().find_map(|a| matched().find(|b| disagree(a, b)).map(|b| (a, b)))
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
