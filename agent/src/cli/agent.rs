//! `whydrop agent`: the node agent. It wires the edges to the pipeline and owns their lifetimes.
//!
//! ```text
//! drain thread ──counts (bounded)──┐
//! attempts thread ──unanswered──────┤
//! ring buffer ──────events─────────┴─► pipeline task ─► State ◄── HTTP servers (one task each)
//! objects thread ──changes (bounded)──────────────────► index
//! cluster thread ──one change after another───────────► index
//! conntrack thread ──forwarded attempts (bounded)──────► pipeline task
//! accept-queues thread ──counters of namespaces───────► State
//! ```

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::cli::config::{AgentArgs, AutoOff, Cluster, Labels, OnOff};
use crate::cli::sources::{self, Forwarded};
use crate::cluster::files::{self, Files};
use crate::decode::classify::is_always_benign;
use crate::decode::{Decoder, Names};
use crate::output::http;
use crate::output::socket::LocalSocket;
use crate::pipeline::{Pipeline, missed_drops};
use crate::record::{Detail, Record};
use crate::senders::Senders;
use crate::source::attempts::{self, Found};
use crate::source::budget::Budget;
use crate::source::cgroups::Cgroups;
use crate::source::drain::{Drained, Drainer, Setup, Totals};
use crate::source::events::{Events, WallClock, pollable};
use crate::source::hooks;
use crate::source::load::{self, Loaded};
use crate::source::retry::{self, Attached};
use crate::source::symbols::Locator;
use crate::source::sys;
use crate::state::{MapStatus, ProgramStatus, State};
use crate::sync::lock;

/// Changes of `--objects` that are applied at once, so that nobody who names drops waits for all of a large file.
const APPLIED: usize = 1_000;
/// Generations that wait for the pipeline. The drain thread blocks at the third, and the kernel map
/// keeps counting meanwhile: nothing is lost by a slow pipeline.
const DRAINED_QUEUE: usize = 2;
/// Messages of up to 1,024 unanswered attempts that wait for the pipeline: half a second of a flood.
/// Past it the thread that looks for them waits, and the kernel maps keep them meanwhile.
const FOUND_QUEUE: usize = 4;
/// What is due without a drop: held counts, lines of a second, series that expire.
const TICK: Duration = Duration::from_millis(250);
/// Events read before counts get their turn, so that a flood of one does not starve the other.
const EVENTS_AT_ONCE: usize = 4096;
/// A process that is told to end has done so within 2 s.
const END_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps the agent from starting, and what to do.
pub fn run(args: AgentArgs) -> Result<ExitCode> {
    sys::keep_heap_small();
    // Two: a scrape that encodes 10,000 series must not hold up the reading of events.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(serve(args));
    // A client that does not read must not keep the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    result.map(|()| ExitCode::SUCCESS)
}

async fn serve(args: AgentArgs) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let detail = match args.labels {
        Labels::Pod => Detail::Pod,
        Labels::Workload => Detail::Workload,
        Labels::Namespace => Detail::Namespace,
    };
    let max_series = usize::try_from(args.max_series).unwrap_or(usize::MAX);
    let record = Record::new(detail, max_series, args.series_ttl);
    let senders = Senders::new(detail, max_series, args.series_ttl);
    let state = Arc::new(State::new(args.node_name()?.into(), record, senders));
    anyhow::ensure!(
        args.cluster != Cluster::Kube || args.objects.is_empty(),
        "--objects stands for a cluster: give it with --cluster none or auto, or not with --cluster kube"
    );
    anyhow::ensure!(
        args.cluster != Cluster::None || args.kube_events == OnOff::Off,
        "--kube-events on needs a cluster: give it without --cluster none"
    );
    let (stop, stopped) = watch::channel(false);

    // What another agent may hold comes first, so that a second one is refused whole.
    let socket = LocalSocket::bind(&args.socket)?;
    let listener = http::listen(args.listen).await?;
    let (objects, _) = Files::open(&args.objects, state.errors.objects.clone())?;
    state
        .index_mut()
        .load(objects.objects().cloned(), Timestamp::now());

    let log = tracing::enabled!(target: "whydrop_programs", tracing::Level::DEBUG);
    let options = load::Options {
        map_memory_bytes: args.map_memory.0,
        attach: args.attach,
        log,
        syn_timeout: args.syn_timeout,
        dns_timeout: args.dns_timeout,
        dns: args.dns == OnOff::On,
        conntrack: args.conntrack == AutoOff::Auto,
    };
    let loaded = tokio::task::spawn_blocking(move || load::load(options))
        .await
        .context("loading the programs failed")??;
    let (observer, hooks) = Observer::start(&state, loaded, &options)?;
    let stop_looking = observer.stop_looking.clone();
    // Dropping it ends the thread.
    let _accept_queues = sources::watch_accept_queues(state.clone())?;
    sys::release_free_memory();
    let servers = [
        tokio::spawn(http::serve_metrics(
            listener,
            state.clone(),
            stopped.clone(),
        )),
        tokio::spawn(http::serve_local(socket, state.clone(), stopped.clone())),
    ];
    let reload = tokio::spawn({
        let (state, mut stopped) = (state.clone(), stopped.clone());
        async move {
            let apply = |changes: Vec<_>| {
                let now = Timestamp::now();
                let mut changes = changes.into_iter();
                // Of an address that changes hands nobody sees the moment between. Not all at once: who names
                // drops waits meanwhile.
                while changes.len() > 0 {
                    let mut index = state.index_mut();
                    for change in changes.by_ref().take(APPLIED) {
                        index.apply(change, now);
                    }
                }
            };
            let stopped = async move { drop(stopped.wait_for(|stop| *stop).await) };
            if let Err(error) = files::run(objects, apply, stopped).await {
                tracing::error!(%error, "changes of --objects are no longer seen");
            }
        }
    });
    // Last: what is observed meanwhile waits for no API server.
    sources::watch_cluster(
        &state,
        (args.cluster, args.watch, args.kube_events),
        !args.objects.is_empty(),
        &stopped,
    )?;
    let mut observing = tokio::spawn(observer.run());
    let (node, listen, socket) = (&state.node, args.listen, args.socket.display());
    match state.ready() {
        Ok(()) => tracing::info!(%node, %listen, %socket, "observing drops"),
        Err(why) => tracing::warn!(%node, %listen, %socket, why, "observing without drops"),
    }

    let mut ended = None;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        result = &mut observing => ended = Some(result),
    }
    tracing::info!("ending");
    if let Some(result) = ended {
        // Without the pipeline there is nothing left to be an agent for.
        result.context("the pipeline died")??;
        anyhow::bail!("the drain thread ended by itself");
    }
    stop_looking.store(true, Ordering::Relaxed);
    if let Some(drainer) = state.drainer.get() {
        drainer.stop();
    }
    if tokio::time::timeout(END_TIMEOUT, observing).await.is_err() {
        tracing::warn!("the last counts could not be fetched in time");
    }
    state.observing.store(false, Ordering::Relaxed);
    stop.send_replace(true);
    let all_ended = async {
        for task in servers.into_iter().chain([reload]) {
            drop(task.await);
        }
    };
    drop(tokio::time::timeout(Duration::from_millis(300), all_ended).await);
    // It looks five times a second whether it is to end; what it owns is then dropped, so detached.
    drop(hooks.join());
    Ok(())
}

/// The pipeline with its two inputs.
struct Observer {
    state: Arc<State>,
    pipeline: Pipeline,
    events: Events,
    drained: mpsc::Receiver<Drained>,
    found: mpsc::Receiver<Found>,
    forwarded: Forwarded,
    stop_looking: Arc<AtomicBool>,
    budget: Budget,
}

impl Observer {
    /// Starts observing. The thread that is returned owns the programs.
    fn start(
        state: &Arc<State>,
        loaded: Loaded,
        options: &load::Options,
    ) -> Result<(Self, JoinHandle<aya::Ebpf>)> {
        let Loaded {
            mut ebpf,
            maps,
            attempts,
            events,
            died,
            mut sources,
            reasons,
            has_reasons,
            budget,
            programs,
            missing,
        } = loaded;
        if options.log {
            forward_messages(&mut ebpf)?;
        }
        let mut locator = Locator::new();
        sources.push(locator.status());
        let mut cgroups = Cgroups::open();
        sources.push(cgroups.status());
        let sees_drops = sources.iter().any(|s| s.source == hooks::DROPS && s.up);
        let is_dns_watched = sources.iter().any(|s| s.source == hooks::DNS && s.up);
        let is_dns_watched = Arc::new(AtomicBool::new(is_dns_watched));
        let knows_neighbours = sources.iter().any(|s| s.source == "neighbour" && s.up);
        let benign = reasons
            .iter()
            .filter(|(_, name)| is_always_benign(name))
            .map(|(n, _)| *n);
        let benign = benign
            .filter(|n| (*n as usize) < whydrop_ebpf::REASONS)
            .collect();
        for source in sources {
            state.set_source(source);
        }

        let (sender, found) = mpsc::channel(FOUND_QUEUE);
        let stop_looking = Arc::new(AtomicBool::new(false));
        let state_program = programs
            .iter()
            .find(|(name, _)| name.starts_with("inet_sock_set_state"))
            .and_then(|(_, fd)| fd.try_clone().ok());
        let looking = attempts::Setup {
            maps: attempts,
            state_program,
            syn_timeout: options.syn_timeout,
            dns_timeout: options.dns_timeout,
            queries: budget.queries,
            is_dns_watched: is_dns_watched.clone(),
        };
        attempts::start(looking, stop_looking.clone(), sender)
            .context("cannot start looking for unanswered attempts")?;

        let programs = Arc::new(Mutex::new(programs));
        let attached = {
            let (state, programs) = (state.clone(), programs.clone());
            move |attached: Attached| {
                tracing::info!(source = attached.status.source, "a source works now");
                if attached.status.source == hooks::DNS {
                    is_dns_watched.store(true, Ordering::Relaxed);
                }
                state.set_source(attached.status);
                let program = attached.program.to_owned();
                lock(&programs).extend(attached.fd.map(|fd| (program, fd)));
            }
        };
        let hooks = retry::start(
            ebpf,
            missing,
            options.attach,
            stop_looking.clone(),
            attached,
        )
        .context("cannot start the thread that owns the programs")?;

        let (sender, drained) = mpsc::channel(DRAINED_QUEUE);
        let setup = Setup {
            maps,
            programs,
            benign_reasons: benign,
            budget,
        };
        let drainer = Drainer::start(setup, sender).context("cannot start fetching counts")?;
        // The state is new, so nobody has set it.
        let _ = state.drainer.set(drainer);
        state.observing.store(sees_drops, Ordering::Relaxed);
        if sees_drops {
            // The state is new, so nobody has set it.
            let _ = state.observing_since.set(Timestamp::now());
        }
        let (forwarded, conntrack) = sources::watch_conntrack(state, options, died)?;
        let decoder = Decoder::new(
            Names {
                reasons,
                has_reasons,
            },
            Box::new(move |address| locator.name(address)),
        );
        Ok((
            Self {
                state: state.clone(),
                pipeline: Pipeline::new(
                    state.clone(),
                    decoder,
                    Box::new(move |id| cgroups.pod_uid(id)),
                    conntrack,
                    knows_neighbours,
                ),
                events: Events::new(events)?,
                drained,
                found,
                forwarded,
                stop_looking,
                budget,
            },
            hooks,
        ))
    }

    /// Until the drain thread ends.
    async fn run(mut self) -> Result<()> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ready = self.events.ready() => {
                    ready?;
                    self.read_events(EVENTS_AT_ONCE);
                }
                drained = self.drained.recv() => {
                    let Some(drained) = drained else { break };
                    // No event of this generation can come any more.
                    self.read_events(usize::MAX);
                    self.pipeline.counts(&drained, Instant::now());
                    self.note(&drained);
                    for asked in drained.asked_by {
                        // Who asked may have given up.
                        let _ = asked.send(());
                    }
                }
                Some(found) = self.found.recv() => {
                    let clock = WallClock::now();
                    let wall = |boot_ns| clock.at(boot_ns);
                    self.pipeline.unanswered(&found, wall, Instant::now());
                }
                Some(attempts) = self.forwarded.attempts.recv() => {
                    self.pipeline.forwarded(attempts, Timestamp::now(), Instant::now());
                }
                _ = tick.tick() => {
                    self.pipeline.tick(Instant::now());
                    if let Some(conntrack) = &self.forwarded.source {
                        self.state.set_source(conntrack.status());
                        lock(&self.state.status).conntrack = conntrack.totals();
                    }
                }
            }
        }
        if let Some(conntrack) = &self.forwarded.source {
            conntrack.stop();
        }
        self.pipeline.finish();
        Ok(())
    }

    fn read_events(&mut self, at_most: usize) {
        let clock = WallClock::now();
        for _ in 0..at_most {
            let Some(event) = self.events.take() else {
                break;
            };
            self.pipeline.event(&event, |boot_ns| clock.at(boot_ns));
        }
        self.state
            .errors
            .decode
            .store(self.events.malformed, Ordering::Relaxed);
    }

    fn note(&self, drained: &Drained) {
        let Totals {
            cpu,
            overflow,
            programs,
            ..
        } = &drained.totals;
        let mut status = lock(&self.state.status);
        status.ring_full = cpu.ring_full;
        status.overflow_packets = cpu.overflow;
        status.answers_lost = cpu.answers_lost + self.pipeline.answers_ignored();
        status.limited_flow = cpu.limited_flow;
        status.limited_cpu = cpu.limited_cpu;
        status.missed = missed_drops(&drained.totals);
        status.programs = programs
            .iter()
            .map(|p| ProgramStatus {
                name: p.name.clone(),
                runs: p.runs,
                seconds: Duration::from_nanos(p.run_ns).as_secs_f64(),
            })
            .collect();
        status.maps = vec![
            MapStatus {
                map: "flows",
                entries: drained.flows.len() as u64,
                capacity: self.budget.flows.into(),
            },
            MapStatus {
                map: "overflow",
                entries: overflow.len() as u64,
                capacity: crate::source::budget::OVERFLOW_ENTRIES.into(),
            },
            MapStatus {
                map: "connects",
                entries: cpu
                    .attempts
                    .connects
                    .saturating_sub(cpu.attempts.connects_ended),
                capacity: self.budget.connects.into(),
            },
            MapStatus {
                map: "tallies",
                entries: drained.tallies.len() as u64,
                capacity: self.budget.tallies.into(),
            },
        ];
        status.attempts = cpu.attempts;
    }
}

/// Carries the programs' own messages into the log.
fn forward_messages(ebpf: &mut aya::Ebpf) -> Result<()> {
    let logger = aya_log::EbpfLogger::init(ebpf).context("cannot read the programs' messages")?;
    let mut logger = pollable(logger).context("cannot wait for the programs' messages")?;
    tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    });
    Ok(())
}
