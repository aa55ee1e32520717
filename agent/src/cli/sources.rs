//! The agent's sources that are threads of their own: what they are started with, and where what they
//! find goes.

use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context as _, Result};
use aya::maps::{MapData, RingBuf};
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use whydrop_ebpf::attempt::Died;

use crate::cli::config::{Cluster, OnOff};
use crate::cluster::watch::{self as kube_watch, Reach};
use crate::decode::Flow;
use crate::decode::attempt::Attempt;
use crate::enrich;
use crate::event::EndpointKind;
use crate::kube_events;
use crate::pipeline::{Conntrack, RealDestination};
use crate::record::listen::Lost;
use crate::source::accept_queues::{Counts, Settled};
use crate::source::conntrack::{self, LocalTuples, Lookup, Source, Tuple};
use crate::source::hooks::SourceStatus;
use crate::source::load::Options;
use crate::source::namespaces::Namespace;
use crate::source::sys;
use crate::state::State;
use crate::sync::lock;

/// Messages of attempts that conntrack found; while it is full nothing is decided.
const ATTEMPTS_QUEUE: usize = 4;

/// Counts connections lost to full accept queues on a thread that ends when the sender is dropped.
pub fn watch_accept_queues(state: Arc<State>) -> Result<std::sync::mpsc::Sender<()>> {
    let (running, stop) = std::sync::mpsc::channel();
    let settle = {
        let state = state.clone();
        move |namespace: &Namespace, counts: Counts, is_last: bool| {
            let pod = match namespace.host {
                true => None,
                false => enrich::pod_of_namespace(
                    namespace.pod.as_ref(),
                    &namespace.addresses,
                    &state.index(),
                    Timestamp::now(),
                ),
            };
            let is_named = namespace.host || pod.is_some();
            if !is_named && !is_last {
                return Settled::Later;
            }
            // One that is in no pod's cgroup and has no pod's address is no pod's.
            if is_named || namespace.pod.is_some() {
                let Counts { overflows, drops } = counts;
                let lost = Lost { overflows, drops };
                lock(&state.listen_drops).add(pod.as_ref(), lost, Instant::now());
            }
            Settled::Done
        }
    };
    std::thread::Builder::new()
        .name("accept-queues".to_owned())
        .spawn(move || {
            let status = |now| state.set_source(now);
            state.accept_queues.run(&stop, settle, status);
        })
        .context("cannot start reading the accept queues")?;
    Ok(running)
}

/// Follows the cluster on a thread of its own, so that neither a long list nor TLS holds up the
/// pipeline. It ends when the agent stops.
///
/// With `kube_events` it also writes silent drops on their pods.
pub fn watch_cluster(
    state: &Arc<State>,
    (cluster, reach, kube_events): (Cluster, Reach, OnOff),
    has_objects: bool,
    stopped: &watch::Receiver<bool>,
) -> Result<()> {
    match cluster {
        Cluster::None => return Ok(()),
        Cluster::Auto if has_objects => {
            tracing::debug!("--objects stand for a cluster");
            return Ok(());
        }
        Cluster::Auto | Cluster::Kube => {}
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the cluster's runtime")?;
    let (state, stopped) = (state.clone(), stopped.clone());
    let state_there = state.clone();
    let follow = async move {
        if cluster == Cluster::Auto && !kube_watch::is_configured().await {
            tracing::info!("no kubeconfig and no ServiceAccount: without a cluster");
            return;
        }
        let stopped = || {
            let mut stopped = stopped.clone();
            async move { drop(stopped.wait_for(|stop| *stop).await) }
        };
        let tell = async {
            if kube_events == OnOff::On {
                let times = kube_events::Times::default();
                kube_events::run(state.clone(), times, kube_watch::infer, stopped()).await;
            }
        };
        let times = kube_watch::Times::default();
        let follow = kube_watch::run(state.clone(), times, reach, kube_watch::infer, stopped());
        tokio::join!(follow, tell);
    };
    std::thread::Builder::new()
        .name("cluster".to_owned())
        // A task and not the runtime's own future: before each turn of that one it asks the kernel for news.
        .spawn(move || {
            if let Err(error) = runtime.block_on(runtime.spawn(follow)) {
                tracing::error!(%error, "the cluster is not followed any more");
                state_there.set_source(SourceStatus {
                    source: kube_watch::SOURCE,
                    up: false,
                    hook: None,
                    why: Some(format!(
                        "following it ended by a fault of whydrop ({error}); restart the agent"
                    )),
                    lost: Some(kube_watch::LOST),
                });
            }
        })
        .context("cannot start following the cluster")?;
    Ok(())
}

/// Conntrack's attempts, and the handle that ends the source.
pub struct Forwarded {
    /// The handle; `None` where conntrack is switched off.
    pub source: Option<Source>,
    /// What it finds.
    pub attempts: mpsc::Receiver<Vec<Attempt>>,
}

/// Starts looking for connections that nobody answered and whose sender is no socket of this kernel.
pub fn watch_conntrack(
    state: &Arc<State>,
    options: &Options,
    died: RingBuf<MapData>,
) -> Result<(Forwarded, Conntrack)> {
    let local = Arc::new(Mutex::new(LocalTuples::new()));
    let (sender, attempts) = mpsc::channel(ATTEMPTS_QUEUE);
    let mut source = None;
    if options.conntrack {
        let is_foreign = {
            let state = state.clone();
            move |ip: &std::net::IpAddr| is_foreign(&state, *ip)
        };
        let mut setup = conntrack::Setup::new(
            options.syn_timeout,
            options.dns_timeout,
            local.clone(),
            Box::new(is_foreign),
        );
        setup.died = own_netns().map(|netns| next_died(died, netns));
        let started = Source::start(setup, sender).context("cannot start looking at conntrack")?;
        source = Some(started);
    }
    let destination: RealDestination = if options.conntrack {
        let mut lookup = Lookup::new("/proc");
        Box::new(move |flow| real_destination(&mut lookup, flow))
    } else {
        Box::new(|_| None)
    };
    let forwarded = Forwarded { source, attempts };
    Ok((forwarded, Conntrack { local, destination }))
}

/// Entries that died in this process' network namespace: those of others have a second one here.
fn next_died(mut ring: RingBuf<MapData>, netns: u32) -> conntrack::NextDied {
    Box::new(move || {
        while let Some(item) = ring.next() {
            if let Some(died) = sys::read::<Died>(&item)
                && died.netns == netns
            {
                return Some(died);
            }
        }
        None
    })
}

/// Inode number of this process' network namespace.
fn own_netns() -> Option<u32> {
    let inode = std::fs::metadata("/proc/self/ns/net").ok()?.ino();
    u32::try_from(inode).ok()
}

/// Whether attempts from an address are counted by nobody else: neither on another node, by the
/// socket there, nor on this one. Not while that is not known: before the first look at this node's
/// namespaces, and of an address inside a pod range that no object holds yet.
fn is_foreign(state: &State, ip: std::net::IpAddr) -> bool {
    let mut sender = crate::event::Endpoint {
        ip: Some(ip),
        ..Default::default()
    };
    state.index().name(&mut sender, None, Timestamp::now());
    let is_elsewhere = match sender.kind {
        Some(EndpointKind::Pod | EndpointKind::Node) => {
            sender.node.as_deref() != Some(&*state.node)
        }
        Some(EndpointKind::Unknown) => true,
        _ => false,
    };
    let namespaces = state.accept_queues.namespaces();
    !is_elsewhere && !namespaces.all().is_empty() && namespaces.with_address(ip).is_empty()
}

fn real_destination(lookup: &mut Lookup, flow: &Flow) -> Option<(std::net::IpAddr, u16)> {
    let asked = Tuple::asked(flow)?;
    match lookup.destination(&asked) {
        Ok(real) => real.map(|real| (real.ip(), real.port())),
        Err(error) => {
            tracing::debug!(%error, "conntrack does not say where a connection went");
            None
        }
    }
}
