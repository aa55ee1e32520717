//! Why a side says so, in a few words.

use crate::policy::evaluate::{Because, Judgement};
use crate::policy::tier::Tier;

/// Why a side says so.
pub fn because(judgement: &Judgement) -> &'static str {
    match judgement.because {
        Because::NotAPod => "this end is no pod",
        Because::HostNetwork => "this end is a host-network pod",
        Because::ToItself => "a pod may always talk to itself",
        Because::OwnNode => "the pod's own node is always allowed in",
        Because::NotIsolated => "no policy isolates the pod",
        Because::Rule => "a rule matches",
        Because::NoRule => "no rule matches",
        Because::BlockOnPod => {
            "only an ipBlock matches, and the peer is a pod: Cilium never matches those, others do"
        }
        Because::Protocol => "NetworkPolicy does not define this protocol",
        Because::Tier(Tier::Admin) => "a rule of the Admin tier decides, before NetworkPolicies",
        Because::Tier(Tier::Baseline) => {
            "no NetworkPolicy isolates the pod, and the Baseline tier decides"
        }
        Because::TierConflict => "policies of one tier and priority disagree, and either may count",
        Because::Missing => "objects that may decide could not be read",
        Because::TierUnknown => {
            "whether a rule of a tier matches depends on the address, or on what DNS answers"
        }
    }
}
