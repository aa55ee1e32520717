//! What policies say of one connection, for `whydrop explain` and for the agent's `/v1/explain`.
//!
//! | module | holds |
//! |---|---|
//! | [`question`] | what is asked, as `--flows` and a query write it |
//! | [`target`] | the ends that names, Services and addresses stand for |
//! | [`missing`] | objects that could not be read, and which answers hang on them |
//! | [`origin`] | where the objects are from |
//! | [`observed`] | what an agent has seen of the connection |
//! | [`json`], [`text`] | how the answer looks |

use std::sync::Arc;

use self::missing::Missing;
use self::observed::Observed;
use self::origin::Origin;
use self::question::Asked;
use self::target::Target;
use crate::policy::evaluate::{Because, Flow, Judgement, Verdict, Who};
use crate::policy::findings::{self, Context, Finding};
use crate::policy::model::Direction;
use crate::policy::world::World;

mod because;
pub mod json;
pub mod missing;
pub mod observed;
pub mod origin;
pub mod question;
pub mod target;
pub mod text;

/// The objects that an answer rests on.
#[derive(Clone, Debug)]
pub struct Ground {
    /// The objects.
    pub world: Arc<World>,
    /// Where they are from.
    pub origin: Origin,
    /// What of them could not be read.
    pub missing: Missing,
    /// Objects that could not be used, each as a sentence.
    pub skipped: Vec<String>,
}

/// What policies say of a connection.
pub struct Answer<'w> {
    /// The connection; of a Service's backends the first that is denied.
    pub flow: Flow,
    /// What the source's policies say.
    pub egress: Judgement<'w>,
    /// What the destination's policies say.
    pub ingress: Judgement<'w>,
    /// What is missing.
    pub findings: Vec<Finding>,
    /// The Service that was asked for.
    pub service: Option<String>,
    /// Its backends, and what policies say of each.
    pub backends: Vec<(Target, Verdict)>,
    /// What is worth knowing about the ends.
    pub notes: Vec<String>,
    /// What an agent has seen; `None` if none was asked.
    pub observed: Option<Observed>,
    /// What it rests on.
    pub ground: &'w Ground,
}

impl Answer<'_> {
    /// Whether it is allowed: for a Service, to every backend; `None` where that is undefined.
    pub fn allowed(&self) -> Option<bool> {
        match self.egress.verdict.and(self.ingress.verdict) {
            Verdict::Allow | Verdict::NotApplicable => Some(true),
            Verdict::Deny => Some(false),
            Verdict::Undefined => None,
        }
    }
}

/// Answers a question; `fixes` are made where it is one, not many.
///
/// # Errors
/// One sentence about an end that the objects do not have.
pub fn answer<'w>(ground: &'w Ground, asked: &Asked, fixes: bool) -> Result<Answer<'w>, String> {
    let world = &*ground.world;
    let mut notes = Vec::new();
    let source = target::source(world, &asked.src, &mut notes)?;
    let targets = target::destination(world, &asked.dst, asked.protocol, asked.port, &mut notes)?;
    let flow = |target: &Target| Flow {
        source,
        destination: target.end,
        protocol: asked.protocol,
        port: target.port,
    };
    let judged = targets.all.into_iter().map(|target| {
        let flow = flow(&target);
        let verdict = match ground.missing.is_open(world, &flow) {
            true => Verdict::Undefined,
            false => world.both(&flow),
        };
        (target, verdict)
    });
    let backends: Vec<(Target, Verdict)> = judged.collect();
    let worst = backends.iter().min_by_key(|(_, verdict)| match verdict {
        Verdict::Deny => 0,
        Verdict::Undefined => 1,
        Verdict::Allow | Verdict::NotApplicable => 2,
    });
    let Some((worst, _)) = worst else {
        return Err(format!("{}: leads nowhere", asked.dst));
    };
    let flow = flow(worst);
    let mut egress = world.judge(&flow, Direction::Egress);
    let mut ingress = world.judge(&flow, Direction::Ingress);
    for end in [flow.source, flow.destination] {
        if let Who::Pod(id) = end.who {
            let namespace = &world.pod(id).key.namespace;
            let note = format!(
                "namespace {namespace} is not among the objects: of its labels only its name is \
                 known"
            );
            if world.is_inferred(namespace) && !notes.contains(&note) {
                notes.push(note);
            }
        }
    }
    let context = Context {
        no_fixes: !fixes,
        ..Context::default()
    };
    let findings = match ground.missing.is_open(world, &flow) {
        // Whatever would be found could be otherwise with what was not read.
        true => {
            for side in [&mut egress, &mut ingress] {
                (side.verdict, side.because) = (Verdict::Undefined, Because::Missing);
            }
            Vec::new()
        }
        false => findings::findings(world, &flow, &egress, &ingress, &context),
    };
    Ok(Answer {
        flow,
        egress,
        ingress,
        findings,
        backends: match targets.service {
            Some(_) => backends,
            None => Vec::new(),
        },
        service: targets.service,
        notes,
        observed: None,
        ground,
    })
}
