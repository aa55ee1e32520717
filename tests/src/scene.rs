//! A lab with a dropper, an agent that watches it, and a bystander: what nearly every test needs.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::agent::Agent;
use crate::bystander::{Bystander, Habit};
use crate::counters::Snapshot;
use crate::expect::{Row, expect};
use crate::lab::{Family, Host, Lab, Place};
use crate::objects;
use crate::traffic::{self, Burst, Connect};

/// The UDP port at the server where nobody listens unless a test does.
pub const UDP_PORT: u16 = 5000;
/// The TCP port at the server where nobody listens unless a test does.
pub const TCP_PORT: u16 = 80;

/// A lab by itself, for node-wide sums, whose router drops what is for the server over IPv4, and counts it as
/// `hits`.
///
/// # Errors
/// As [`Lab::alone`], and of nft.
pub fn alone_dropping_for_server() -> Result<Lab> {
    let lab = Lab::alone()?;
    let server = lab.address(Place::Of(Host::Server), Family::V4);
    lab.nft(
        Host::Router,
        &format!(
            "table ip lab {{
               counter hits {{ }}
               chain c {{ type filter hook forward priority 0;
                 ip daddr {server} counter name hits drop
               }}
             }}"
        ),
    )?;
    Ok(lab)
}

/// The scene. The order of the fields is the order of the clean-up.
pub struct Scene {
    bystander: Bystander,
    agent: Agent,
    /// What the kernel counted before the traffic.
    pub before: Snapshot,
    /// The lab.
    pub lab: Lab,
    /// The family of the test's traffic.
    pub family: Family,
}

impl Scene {
    /// Builds the lab, installs the dropper, starts the agent and the bystander.
    ///
    /// # Errors
    /// Any of these fails.
    pub fn new(family: Family, dropper: impl FnOnce(&Lab) -> Result<()>) -> Result<Self> {
        Self::with(Lab::new()?, family, Habit::Connects, dropper)
    }

    /// As [`Scene::new`], in a given lab, with a given habit of the bystander.
    ///
    /// # Errors
    /// As [`Scene::new`].
    pub fn with(
        lab: Lab,
        family: Family,
        habit: Habit,
        dropper: impl FnOnce(&Lab) -> Result<()>,
    ) -> Result<Self> {
        let objects = objects::list(&lab);
        Self::built(lab, family, habit, &objects, &[], None, dropper)
    }

    /// As [`Scene::new`], with arguments of the agent, and pods that have workloads.
    ///
    /// # Errors
    /// As [`Scene::new`].
    pub fn with_arguments(
        family: Family,
        arguments: &[&str],
        dropper: impl FnOnce(&Lab) -> Result<()>,
    ) -> Result<Self> {
        Self::with_service(family, arguments, &[], dropper)
    }

    /// As [`Scene::with_arguments`], with further ports of the Service: `(port, protocol, target)`.
    ///
    /// # Errors
    /// As [`Scene::new`].
    pub fn with_service(
        family: Family,
        arguments: &[&str],
        ports: &[(u16, &str, u16)],
        dropper: impl FnOnce(&Lab) -> Result<()>,
    ) -> Result<Self> {
        let lab = Lab::new()?;
        let objects = objects::with_service_ports(objects::list(&lab), ports);
        let objects = objects::with_workloads(objects);
        Self::built(
            lab,
            family,
            Habit::Connects,
            &objects,
            arguments,
            None,
            dropper,
        )
    }

    /// As [`Scene::with_service`], where the router is the node: the agent runs in its namespace.
    ///
    /// # Errors
    /// As [`Scene::new`].
    pub fn on_the_node(
        family: Family,
        arguments: &[&str],
        ports: &[(u16, &str, u16)],
        dropper: impl FnOnce(&Lab) -> Result<()>,
    ) -> Result<Self> {
        let lab = Lab::new()?;
        let objects = objects::with_service_ports(objects::list(&lab), ports);
        let objects = objects::with_workloads(objects);
        let at = Some(Host::Router);
        Self::built(
            lab,
            family,
            Habit::Connects,
            &objects,
            arguments,
            at,
            dropper,
        )
    }

    fn built(
        lab: Lab,
        family: Family,
        habit: Habit,
        objects: &Value,
        arguments: &[&str],
        at: Option<Host>,
        dropper: impl FnOnce(&Lab) -> Result<()>,
    ) -> Result<Self> {
        dropper(&lab).context("install the dropper")?;
        let agent = match at {
            None => Agent::start_with(&lab.node(), objects, arguments)?,
            Some(host) => Agent::start_in(&lab.netns(host), &lab.node(), objects, arguments)?,
        };
        let bystander = Bystander::start(&lab, family, habit)?;
        Ok(Self {
            bystander,
            agent,
            before: Snapshot::take(&lab)?,
            lab,
            family,
        })
    }

    /// An address of the lab in the test's family.
    pub fn address(&self, place: Place) -> std::net::IpAddr {
        self.lab.address(place, self.family)
    }

    /// The agent.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Sends datagrams from the client to the server, over three flows.
    ///
    /// # Errors
    /// As [`traffic::udp_burst`].
    pub fn udp(&self, packets: u64) -> Result<Burst> {
        self.udp_to(Place::Of(Host::Server), UDP_PORT, packets, b"datagram")
    }

    /// Sends datagrams from the client to any place and port, over three flows.
    ///
    /// # Errors
    /// As [`traffic::udp_burst`].
    pub fn udp_to(&self, to: Place, port: u16, packets: u64, payload: &[u8]) -> Result<Burst> {
        let to = self.lab.socket(to, self.family, port);
        self.lab
            .within(Host::Client, || traffic::udp_burst(to, packets, 3, payload))
    }

    /// Connects once from the client to the server: one SYN.
    pub fn connect(&self) -> Connect {
        self.connect_to(Place::Of(Host::Server))
    }

    /// Connects once from the client to the TCP port of any place: one SYN.
    pub fn connect_to(&self, to: Place) -> Connect {
        let to = self.lab.socket(to, self.family, TCP_PORT);
        self.lab.within(Host::Client, || traffic::connect(to))
    }

    /// Sends IP packets made by hand from the client.
    ///
    /// # Errors
    /// As [`traffic::raw_ip`].
    pub fn raw<P: AsRef<[u8]> + Send>(
        &self,
        packets: impl IntoIterator<Item = P> + Send,
    ) -> Result<u64> {
        let to = self.address(Place::Of(Host::Server));
        self.lab
            .within(Host::Client, || traffic::raw_ip(to, packets))
    }

    /// By how much a counter of the kernel grew since the start, in the test's family: its name in
    /// IPv4 and in IPv6.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn grown(&self, host: Host, v4: &str, v6: &str) -> Result<u64> {
        self.before.grown(&self.lab, host, self.family.pick(v4, v6))
    }

    /// Unreachable messages that a host sent since the start.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn unreachables(&self, host: Host) -> Result<u64> {
        self.before.unreachables(&self.lab, host, self.family)
    }

    /// Datagrams that the client's kernel sent and the server's never saw, since the start.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn lost_udp(&self) -> Result<u64> {
        self.before.lost_udp(&self.lab, self.family)
    }

    /// Checks what the agent shows while the scene goes on.
    ///
    /// # Errors
    /// It is not as the rows say.
    pub fn check(&self, rows: &[Row]) -> Result<()> {
        expect(&self.lab, &self.agent, rows)
    }

    /// Checks what the agent shows, that the bystander's traffic never failed, and that the agent
    /// ends as it should.
    ///
    /// # Errors
    /// Any of these is not so.
    pub fn expect(mut self, rows: &[Row]) -> Result<()> {
        self.bystander.end()?;
        expect(&self.lab, &self.agent, rows)?;
        self.finish()
    }

    /// Checks that the bystander's traffic never failed and that the agent ends as it should.
    ///
    /// # Errors
    /// Any of these is not so.
    pub fn finish(self) -> Result<()> {
        self.bystander.finish()?;
        let status = self.agent.stop()?;
        ensure!(status.success(), "the agent ended with {status}");
        Ok(())
    }
}
