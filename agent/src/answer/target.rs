//! What `ns/pod`, `svc/ns/name` and addresses stand for among the objects.

use std::net::IpAddr;

use crate::cluster::objects::{Port, Service, ServicePort, selects};
use crate::event::Protocol;
use crate::policy::evaluate::{End, Who};
use crate::policy::findings::name;
use crate::policy::world::World;

/// One end as it was asked for.
#[derive(Clone, Debug)]
pub struct Target {
    /// The end.
    pub end: End,
    /// The port there, after DNAT.
    pub port: Option<u16>,
}

/// Everything that a destination may lead to.
#[derive(Clone, Debug, Default)]
pub struct Targets {
    /// One, or the backends of a Service.
    pub all: Vec<Target>,
    /// The Service that was asked for, as `namespace/name`.
    pub service: Option<String>,
}

/// A source: `ns/pod` or an address.
pub fn source(world: &World, text: &str, notes: &mut Vec<String>) -> Result<End, String> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        if let Some(service) = world.service_at(ip) {
            let key = &service.key;
            return Err(format!(
                "{ip} is the address of Service {}/{}: nothing connects from there",
                key.namespace, key.name
            ));
        }
        return Ok(at(world, ip, notes));
    }
    match text.split('/').collect::<Vec<_>>()[..] {
        ["svc", ..] => Err(format!(
            "{text}: a Service is no source; name one of its pods"
        )),
        [namespace, name] => pod(world, namespace, name, notes),
        _ => Err(format!("{text:?}: expected namespace/pod or an IP address")),
    }
}

/// A destination: as a source, or `svc/ns/name`.
pub fn destination(
    world: &World,
    text: &str,
    protocol: Protocol,
    port: Option<u16>,
    notes: &mut Vec<String>,
) -> Result<Targets, String> {
    let port = port.filter(|_| protocol.has_ports());
    if let Ok(ip) = text.parse::<IpAddr>() {
        return match world.service_at(ip) {
            Some(service) => backends(world, service, protocol, port, notes),
            None => Ok(single(world, at(world, ip, notes), protocol, port, notes)),
        };
    }
    match text.split('/').collect::<Vec<_>>()[..] {
        ["svc", namespace, name] => {
            let service = world.service(namespace, name);
            let service = service
                .ok_or_else(|| format!("no Service {namespace}/{name} among the objects"))?;
            backends(world, service, protocol, port, notes)
        }
        [namespace, name] => {
            let end = pod(world, namespace, name, notes)?;
            Ok(single(world, end, protocol, port, notes))
        }
        _ => Err(format!(
            "{text:?}: expected namespace/pod, svc/namespace/name or an IP address"
        )),
    }
}

fn single(
    world: &World,
    end: End,
    protocol: Protocol,
    mut port: Option<u16>,
    notes: &mut Vec<String>,
) -> Targets {
    if port.is_none()
        && protocol.has_ports()
        && let Who::Pod(id) = end.who
    {
        let declared = world.pod(id).ports.iter();
        let mut declared = declared.filter(|p| p.protocol == protocol);
        if let (Some(only), None) = (declared.next(), declared.next()) {
            port = Some(only.port);
            notes.push(format!(
                "no port was given; {} is the only {protocol} port that the pod declares",
                only.port
            ));
        }
    }
    if port.is_none() && protocol.has_ports() {
        notes.push(format!(
            "no port was given: the question is whether every {protocol} port is allowed"
        ));
    }
    Targets {
        all: vec![Target { end, port }],
        service: None,
    }
}

fn pod(world: &World, namespace: &str, pod: &str, notes: &mut Vec<String>) -> Result<End, String> {
    let id = world
        .pod_named(namespace, pod)
        .ok_or_else(|| format!("no pod {namespace}/{pod} among the objects"))?;
    let object = world.pod(id);
    if object.ended {
        return Err(format!(
            "pod {namespace}/{pod} has ended (Succeeded or Failed): it holds no address any more"
        ));
    }
    if object.ips.is_empty() {
        notes.push(format!(
            "pod {namespace}/{pod} has no address yet: this is what holds once it has one"
        ));
    }
    for ip in object.ips.iter().filter(|_| !object.host_network) {
        shared(world, *ip, notes);
    }
    Ok(End::pod(id))
}

fn at(world: &World, ip: IpAddr, notes: &mut Vec<String>) -> End {
    let ip = ip.to_canonical();
    let who = match (world.pods_at(ip).first(), world.node_at(ip)) {
        (Some(pod), _) => {
            shared(world, ip, notes);
            Who::Pod(*pod)
        }
        (None, Some(node)) => Who::Node(node),
        (None, None) => {
            notes.push(match world.pod_ranges().any(|range| range.contains(&ip)) {
                true => format!(
                    "{ip} is inside the nodes' pod ranges, and no object holds it: a pod that is \
                     gone or missing from the objects; only ipBlocks are matched"
                ),
                false => format!(
                    "{ip} is no pod, node or Service of these objects: it is taken for external"
                ),
            });
            Who::Outside
        }
    };
    End { who, ip: Some(ip) }
}

fn shared(world: &World, ip: IpAddr, notes: &mut Vec<String>) {
    let holders = world.pods_at(ip);
    if holders.len() > 1 {
        let names: Vec<String> = holders
            .iter()
            .map(|id| name(world, End::pod(*id)))
            .collect();
        let note = format!(
            "{} say that they have {ip}: objects of several moments?",
            names.join(" and ")
        );
        if !notes.contains(&note) {
            notes.push(note);
        }
    }
}

fn backends(
    world: &World,
    service: &Service,
    protocol: Protocol,
    port: Option<u16>,
    notes: &mut Vec<String>,
) -> Result<Targets, String> {
    let full = format!("{}/{}", service.key.namespace, service.key.name);
    let asked = service_port(service, &full, protocol, port)?;
    let mut all = listed(world, service, asked, notes);
    if all.is_empty() && !service.selector.is_empty() {
        all = selected(world, service, asked);
    }
    if all.is_empty() {
        return Err(match service.selector.is_empty() {
            true => format!(
                "Service {full} has no selector, and the objects hold no endpoints of it: where it \
                 leads is not known"
            ),
            false => format!(
                "Service {full} selects no running pod with such a port, and has no endpoints: \
                 connections to it fail without any NetworkPolicy"
            ),
        });
    }
    Ok(Targets {
        all,
        service: Some(full),
    })
}

fn service_port<'a>(
    service: &'a Service,
    full: &str,
    protocol: Protocol,
    port: Option<u16>,
) -> Result<Option<&'a ServicePort>, String> {
    if !protocol.has_ports() {
        return Ok(None);
    }
    let of_protocol: Vec<&ServicePort> = service
        .ports
        .iter()
        .filter(|p| p.port.protocol == protocol)
        .collect();
    let numbers: Vec<String> = of_protocol
        .iter()
        .map(|p| p.port.port.to_string())
        .collect();
    match (port, &of_protocol[..]) {
        (_, []) => Err(format!("Service {full} has no {protocol} port")),
        (None, [only]) => Ok(Some(only)),
        (None, _) => Err(format!(
            "Service {full} has the {protocol} ports {}: say which with --port",
            numbers.join(", ")
        )),
        (Some(port), ports) => {
            let found = ports.iter().find(|p| p.port.port == port);
            let found = found.ok_or_else(|| {
                let numbers = numbers.join(", ");
                format!("Service {full} has no {protocol} port {port}, but {numbers}")
            })?;
            Ok(Some(found))
        }
    }
}

/// What endpoints list, ready or not.
fn listed(
    world: &World,
    service: &Service,
    asked: Option<&ServicePort>,
    notes: &mut Vec<String>,
) -> Vec<Target> {
    let mut all: Vec<Target> = Vec::new();
    for endpoints in world.endpoints(service) {
        let fits = |port: &Port| match asked {
            None => true,
            Some(asked) => endpoints.port_names.iter().any(|(name, p)| {
                p == port && *name == asked.name && p.protocol == asked.port.protocol
            }),
        };
        for (ip, port) in endpoints.targets.iter().filter(|(_, port)| fits(port)) {
            let target = Target {
                end: at(world, *ip, notes),
                port: asked.map(|_| port.port),
            };
            if !all
                .iter()
                .any(|t| t.end == target.end && t.port == target.port)
            {
                all.push(target);
            }
        }
    }
    all
}

/// The pods that its selector finds.
fn selected(world: &World, service: &Service, asked: Option<&ServicePort>) -> Vec<Target> {
    let pods = world.pods().filter(|(_, pod)| {
        !pod.ended
            && pod.key.namespace == service.key.namespace
            && selects(&service.selector, &pod.labels)
    });
    let targets = pods.filter_map(|(id, pod)| {
        let port = match asked {
            None => None,
            Some(asked) => Some(asked.target_port.or_else(|| {
                let wanted = asked.target_name.as_ref()?;
                let mut named = pod.port_names.iter();
                let found = named.find(|(n, p)| n == wanted && p.protocol == asked.port.protocol);
                found.map(|(_, port)| port.port)
            })?),
        };
        Some(Target {
            end: End::pod(id),
            port,
        })
    });
    targets.collect()
}
