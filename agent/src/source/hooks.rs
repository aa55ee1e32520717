//! The hooks, what each costs to be without, and attaching one: the first way that the kernel takes.
//!
//! Whether a kernel takes a hook is found by loading and attaching it, never by its version.

use std::error::Error as _;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::programs::{BtfTracePoint, FEntry, KProbe, Program, ProgramError, RawTracePoint};
use aya::{Btf, Ebpf};

/// A hook, and what is lost without it.
pub struct Hook {
    /// Its name in `/v1/status` and `whydrop_source_up`.
    pub source: &'static str,
    /// The cheapest first.
    ways: &'static [Way],
    lost_without: &'static str,
}

/// A way to run a program.
enum Way {
    /// A tracepoint: its name, the program for `tp_btf`, the one for `raw_tp`.
    Tracepoint(&'static str, &'static str, &'static str),
    /// A kernel function by fentry: its name, the program.
    Fentry(&'static str, &'static str),
    /// A kernel function by a kprobe: its name, the program.
    Kprobe(&'static str, &'static str),
}

/// The source without which nothing is observed.
pub const DROPS: &str = "drops";
/// TCP connects.
pub const CONNECTS: &str = "connects";
/// Errors that end TCP connects.
pub const CONNECT_ERRORS: &str = "connect_errors";
/// DNS answers.
pub const DNS: &str = "dns";

/// Conntrack entries that die unreplied.
pub const CONNTRACK_DEATHS: &str = "conntrack_deaths";

const UDP_ENQUEUE: &str = "__udp_enqueue_schedule_skb";

/// In the order of attaching. What tells of answers comes before what counts drops, so that no drop
/// is counted as silent because its answer was not watched yet; and what sees the ends of attempts
/// before what sees their beginnings.
pub const HOOKS: [Hook; 7] = [
    Hook {
        source: DNS,
        ways: &[
            Way::Fentry(UDP_ENQUEUE, "udp_enqueue"),
            Way::Kprobe(UDP_ENQUEUE, "udp_enqueue_kprobe"),
            Way::Tracepoint(
                "netif_receive_skb",
                "netif_receive_skb",
                "netif_receive_skb_raw",
            ),
        ],
        lost_without: "unanswered DNS queries are not seen, unless this node drops them",
    },
    Hook {
        source: CONNECT_ERRORS,
        ways: &[Way::Tracepoint(
            "inet_sk_error_report",
            "inet_sk_error_report",
            "inet_sk_error_report_raw",
        )],
        lost_without: "a connect that was refused by ICMP can be counted as abandoned",
    },
    Hook {
        source: CONNECTS,
        ways: &[Way::Tracepoint(
            "inet_sock_set_state",
            "inet_sock_set_state",
            "inet_sock_set_state_raw",
        )],
        lost_without: "connects that hang are not seen, unless this node drops their packets",
    },
    Hook {
        source: "told",
        ways: &[Way::Tracepoint(
            "net_dev_queue",
            "net_dev_queue",
            "net_dev_queue_raw",
        )],
        lost_without: "packets refused by a RST or an ICMP error are counted as silent drops",
    },
    Hook {
        source: "neighbour",
        ways: &[Way::Tracepoint(
            "neigh_event_send_done",
            "neigh_wait",
            "neigh_wait_raw",
        )],
        lost_without: "counts of silent drops are published 3 s late, to wait for answers that leave late",
    },
    Hook {
        source: CONNTRACK_DEATHS,
        ways: &[Way::Kprobe("nf_conntrack_free", "conntrack_free")],
        lost_without: "forwarded connections that live for less than half a second unanswered are not seen",
    },
    Hook {
        source: DROPS,
        ways: &[Way::Tracepoint("kfree_skb", "kfree_skb", "kfree_skb_raw")],
        lost_without: "no drop is observed",
    },
];

/// Whether a source works, and what is lost if not.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SourceStatus {
    /// As in `whydrop_source_up{source}`.
    pub source: &'static str,
    /// Whether it works.
    pub up: bool,
    /// The hook that it uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hook: Option<String>,
    /// Why it does not work, or what it leaves out where it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What is lost without it; absent while it works.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<&'static str>,
}

impl Hook {
    /// Its status: the hook that works, or why none does.
    pub fn status(&self, result: Result<String, String>) -> SourceStatus {
        let lost = result.is_err().then_some(self.lost_without);
        let (hook, why) = match result {
            Ok(hook) => (Some(hook), None),
            Err(why) => (None, Some(why)),
        };
        SourceStatus {
            source: self.source,
            up: hook.is_some(),
            hook,
            why,
            lost,
        }
    }
}

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Attach {
    /// The cheapest that the kernel takes.
    Auto,
    /// `raw_tp` only: slower, and without the trampolines that some kernels build wrongly.
    #[value(name = "raw_tp")]
    RawTp,
}

/// What was attached.
pub struct Attached {
    /// For people: `tp_btf/kfree_skb`.
    pub hook: String,
    /// The program's name in the eBPF object.
    pub program: &'static str,
}

/// Attaches the first way of a hook that the kernel takes.
///
/// Without `btf` only the ways that need none are tried: kprobes and `raw_tp`.
///
/// Errors: why it took none, each way in turn.
pub fn attach(
    ebpf: &mut Ebpf,
    hook: &Hook,
    how: Attach,
    btf: Option<&Btf>,
) -> Result<Attached, String> {
    let mut refused = Vec::new();
    for way in hook.ways {
        for (kind, name, program) in way.programs() {
            let has_raw = matches!(way, Way::Tracepoint(..));
            if how == Attach::RawTp && kind != "raw_tp" && has_raw {
                continue;
            }
            let result = match (kind, btf) {
                ("tp_btf", Some(btf)) => attach_typed(ebpf, program, name, btf),
                ("fentry", Some(btf)) => attach_fentry(ebpf, program, name, btf),
                ("tp_btf" | "fentry", None) => continue,
                ("raw_tp", _) => attach_raw(ebpf, program, name),
                _ => attach_kprobe(ebpf, program, name),
            };
            match result {
                Ok(()) => {
                    return Ok(Attached {
                        hook: format!("{kind}/{name}"),
                        program,
                    });
                }
                Err(why) => refused.push(format!("{kind}: {why}")),
            }
        }
    }
    Err(refused.join("; "))
}

impl Way {
    fn programs(&self) -> Vec<(&'static str, &'static str, &'static str)> {
        match *self {
            Self::Tracepoint(name, typed, raw) => {
                vec![("tp_btf", name, typed), ("raw_tp", name, raw)]
            }
            Self::Fentry(name, program) => vec![("fentry", name, program)],
            Self::Kprobe(name, program) => vec![("kprobe", name, program)],
        }
    }
}

fn attach_typed(ebpf: &mut Ebpf, name: &str, tracepoint: &str, btf: &Btf) -> Result<(), String> {
    let program: &mut BtfTracePoint = program(ebpf, name)?;
    program.load(tracepoint, btf).map_err(|e| brief(&e))?;
    program.attach().map(|_| ()).map_err(|e| brief(&e))
}

fn attach_raw(ebpf: &mut Ebpf, name: &str, tracepoint: &str) -> Result<(), String> {
    let program: &mut RawTracePoint = program(ebpf, name)?;
    loaded(program.load())?;
    program
        .attach(tracepoint)
        .map(|_| ())
        .map_err(|e| brief(&e))
}

fn attach_fentry(ebpf: &mut Ebpf, name: &str, function: &str, btf: &Btf) -> Result<(), String> {
    let program: &mut FEntry = program(ebpf, name)?;
    program.load(function, btf).map_err(|e| brief(&e))?;
    program.attach().map(|_| ()).map_err(|e| brief(&e))
}

fn attach_kprobe(ebpf: &mut Ebpf, name: &str, function: &str) -> Result<(), String> {
    let program: &mut KProbe = program(ebpf, name)?;
    loaded(program.load())?;
    program
        .attach(function, 0)
        .map(|_| ())
        .map_err(|e| brief(&e))
}

/// A program that could be loaded but not attached before is still loaded.
fn loaded(result: Result<(), ProgramError>) -> Result<(), String> {
    match result {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(brief(&error)),
    }
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, String>
where
    &'a mut P: TryFrom<&'a mut Program>,
{
    ebpf.program_mut(name)
        .and_then(|p| p.try_into().ok())
        .ok_or_else(|| format!("the eBPF object has no program {name} of this type"))
}

/// An error with its causes, without the verifier's log (which goes to debug).
fn brief(error: &ProgramError) -> String {
    tracing::debug!(?error, "the kernel refused a program");
    if let ProgramError::LoadError { io_error, .. } = error {
        return format!("the kernel refused the program: {io_error}");
    }
    let causes = std::iter::successors(error.source(), |cause: &&dyn std::error::Error| {
        (*cause).source()
    });
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// A file descriptor of a loaded program.
pub fn program_fd(ebpf: &Ebpf, name: &str) -> Option<OwnedFd> {
    let fd = match ebpf.program(name)? {
        Program::BtfTracePoint(p) => p.fd().ok()?.as_fd().try_clone_to_owned(),
        Program::RawTracePoint(p) => p.fd().ok()?.as_fd().try_clone_to_owned(),
        Program::FEntry(p) => p.fd().ok()?.as_fd().try_clone_to_owned(),
        Program::KProbe(p) => p.fd().ok()?.as_fd().try_clone_to_owned(),
        _ => return None,
    };
    fd.ok()
}
