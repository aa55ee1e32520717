//! The machines of the group `vm`: which kernels, and what runs on each.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{machine::Clock, steps::Ran};
use crate::architecture::Architecture;

/// All labs that run in machines: files of `tests/tests/`. A lab more is a word more, here and in a row
/// of [`MATRIX`].
pub const LABS: [&str; 3] = ["netfilter", "connects", "dns"];
/// Which tests of a lab run. A machine without KVM takes five to ten seconds for each, for the agent's
/// start; what differs between kernels differs in the hooks, which both families share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tests {
    /// Of IPv4.
    Ipv4,
    /// Of IPv4, one for each way in which a rule can drop or refuse.
    Few,
    /// Of IPv4, what is lost and how it is told, also behind a Service.
    Lost,
}

impl Tests {
    /// Words for libtest.
    pub fn filter(self) -> &'static str {
        match self {
            Self::Ipv4 => " --skip ::ipv6",
            Self::Lost => " lost::ipv4 told::ipv4 behind_a_service::ipv4",
            Self::Few => {
                " --skip ::ipv6 nft_forward nft_output nft_reject_told_to_all legacy_reset ipset_nft"
            }
        }
    }

    pub fn suffix(self) -> &'static str {
        match self {
            Self::Ipv4 => " v4",
            Self::Lost => " v4 (lost)",
            Self::Few => " v4 (few)",
        }
    }
}

/// Labs, and which of their tests run.
pub type Labs = &'static [(&'static str, Tests)];

/// The oldest and the newest kernel: what the others have lies between.
const ENDS: Labs = &[
    ("netfilter", Tests::Ipv4),
    ("connects", Tests::Ipv4),
    ("dns", Tests::Ipv4),
];
const BETWEEN: Labs = &[
    ("netfilter", Tests::Few),
    ("connects", Tests::Lost),
    ("dns", Tests::Ipv4),
];
/// What runs where a kernel of the others is locked down.
const LOCKED: Labs = &[("connects", Tests::Lost)];
/// What runs on the other architecture: drops with their exact counts, the sender told, and DNS queries.
/// Connects take another three minutes there, and their hooks are by the same means.
const ARM64: Labs = &[("netfilter", Tests::Few), ("dns", Tests::Lost)];
/// A machine that takes longer hangs; on a host with other work the slowest takes half of it.
pub const LIMIT: Duration = Duration::from_secs(3600);
/// So does one that writes nothing for so long: a test takes five seconds.
pub const SILENCE: Duration = Duration::from_secs(180);

/// One machine.
pub struct Plan {
    /// What its programs are built for.
    pub architecture: Architecture,
    /// Debian's suite, whose kernel it boots.
    pub suite: &'static str,
    /// Further words of the kernel's command line.
    pub parameters: &'static str,
    /// How its time passes.
    pub clock: Clock,
    /// What `whydrop check` must say there.
    pub check: Check,
    /// What runs there.
    pub labs: Labs,
    /// Further commands, each a name and a line for a shell; to fail is to exit with another code than 0.
    pub commands: &'static [(&'static str, &'static str)],
    /// Whether a test may say that this kernel leaves it out.
    pub may_leave_out: bool,
}

/// What `whydrop check` must say.
pub struct Check {
    observable: bool,
    /// The sources that are down, and none else.
    down: &'static [&'static str],
    /// Words of the reason.
    says: &'static str,
}

const ALL_UP: Check = Check {
    observable: true,
    down: &[],
    says: "",
};

/// Every machine, in the order of the table. Those that take longest are started first.
pub const MATRIX: &[Plan] = &[
    // Before drop reasons.
    Plan {
        architecture: Architecture::Amd64,
        suite: "bullseye",
        parameters: "",
        clock: Clock::Counted,
        check: Check {
            observable: true,
            down: &["connect_errors", "reasons"],
            says: "",
        },
        labs: ENDS,
        commands: &[],
        may_leave_out: true,
    },
    Plan {
        architecture: Architecture::Amd64,
        suite: "forky",
        parameters: "",
        clock: Clock::Counted,
        check: ALL_UP,
        labs: ENDS,
        commands: &[],
        may_leave_out: false,
    },
    Plan {
        architecture: Architecture::Amd64,
        suite: "bookworm",
        parameters: "",
        clock: Clock::Counted,
        check: ALL_UP,
        labs: BETWEEN,
        commands: &[],
        may_leave_out: false,
    },
    Plan {
        architecture: Architecture::Amd64,
        suite: "trixie",
        parameters: "",
        clock: Clock::Counted,
        check: ALL_UP,
        labs: BETWEEN,
        commands: &[],
        may_leave_out: false,
    },
    Plan {
        architecture: Architecture::Amd64,
        suite: "trixie",
        parameters: "lockdown=integrity",
        clock: Clock::Counted,
        check: ALL_UP,
        labs: LOCKED,
        commands: &[],
        may_leave_out: false,
    },
    Plan {
        architecture: Architecture::Amd64,
        suite: "trixie",
        parameters: "lockdown=confidentiality",
        clock: Clock::Counted,
        check: Check {
            observable: false,
            down: &[
                "dns",
                "connect_errors",
                "connects",
                "told",
                "neighbour",
                "conntrack_deaths",
                "drops",
            ],
            says: "CANNOT be observed on this node: lockdown=confidentiality",
        },
        labs: &[],
        commands: &[("agent", AGENT_WITHOUT_PROGRAMS)],
        may_leave_out: false,
    },
    Plan {
        architecture: Architecture::Arm64,
        suite: "trixie",
        parameters: "",
        clock: Clock::Counted,
        check: ALL_UP,
        labs: ARM64,
        commands: &[],
        may_leave_out: false,
    },
];

/// What needs no program goes on, and the agent says that it is not ready and why.
const AGENT_WITHOUT_PROGRAMS: &str = r#"set -e
whydrop agent --cluster none --log-format text --listen 127.0.0.1:9464 --socket /tmp/agent.sock &
agent=$!
get() { wget -q -O - "http://127.0.0.1:9464/$1"; }
for i in 1 2 3 4 5 6 7 8 9 10; do
  sleep 1
  get metrics > /tmp/metrics && grep -q 'source_up{source="conntrack"} 1' /tmp/metrics && break
done
grep -q '^whydrop_source_up{source="conntrack"} 1' /tmp/metrics
grep -q '^whydrop_source_up{source="accept_queues"} 1' /tmp/metrics
grep -q '^whydrop_source_up{source="drops"} 0' /tmp/metrics
get healthz
if get readyz; then exit 1; fi
kill $agent
wait $agent"#;

impl Check {
    /// Compares what it printed, text and JSON, and how it ended, with what must be.
    pub fn judge(&self, ran: &Ran) -> Result<()> {
        let json = ran.lines.iter().position(|line| line == "{");
        let json = json.context("no JSON in it")?;
        let report: Value =
            serde_json::from_str(&ran.lines[json..].join("\n")).context("bad JSON")?;
        ensure!(
            report["observable"] == self.observable
                && ran.code == Some(if self.observable { 0 } else { 1 }),
            "it says observable {}, with exit code {:?}",
            report["observable"],
            ran.code
        );
        let sources = report["sources"].as_array().context("no sources")?;
        let down: Vec<&str> = sources
            .iter()
            .filter(|source| source["up"] == false)
            .filter_map(|source| source["source"].as_str())
            .collect();
        ensure!(
            down == self.down,
            "down are {down:?}, and must be {:?}",
            self.down
        );
        let text = ran.lines[..json].join("\n");
        ensure!(text.contains(self.says), "it does not say {:?}", self.says);
        Ok(())
    }
}
