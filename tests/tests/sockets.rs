//! Drops at the receiving socket: nobody listens, or nobody reads.

use anyhow::{Result, ensure};
use whydrop_tests::expect::Row;
use whydrop_tests::lab::{Family, Host, Place};
use whydrop_tests::on_both_families;
use whydrop_tests::scene::{Scene, UDP_PORT};
use whydrop_tests::traffic::{self, Connect};

on_both_families!(closed_tcp_port, closed_udp_port, full_receive_buffer);

fn closed_tcp_port(family: Family) -> Result<()> {
    let scene = Scene::new(family, |_| Ok(()))?;
    for _ in 0..10 {
        ensure!(scene.connect() == Connect::Refused);
    }
    let resets = scene.grown(Host::Server, "TcpOutRsts", "TcpOutRsts")?;
    ensure!(resets == 10, "the server sent {resets} resets");
    scene.expect(&[Row::rejected("client", "server", resets)
        .syn()
        .reason(&["NO_SOCKET"])])
}

/// The kernel tells as many senders as its limit on ICMP allows.
fn closed_udp_port(family: Family) -> Result<()> {
    let scene = Scene::new(family, |_| Ok(()))?;
    scene.udp(30)?;
    let all = scene.grown(Host::Server, "UdpNoPorts", "Udp6NoPorts")?;
    let told = scene.unreachables(Host::Server)?;
    ensure!(
        all == 30 && told > 0,
        "{all} of 30 had no port, {told} were told"
    );
    scene.expect(&[
        Row::rejected("client", "server", told)
            .protocol("UDP")
            .reason(&["NO_SOCKET"]),
        Row::dropped("client", "server", all - told)
            .protocol("UDP")
            .reason(&["NO_SOCKET"]),
    ])
}

fn full_receive_buffer(family: Family) -> Result<()> {
    let scene = Scene::new(family, |_| Ok(()))?;
    let at = scene.lab.socket(Place::Of(Host::Server), family, UDP_PORT);
    let socket = scene
        .lab
        .within(Host::Server, || traffic::deaf_udp_socket(at))?;
    scene.udp(100)?;
    let all = scene.grown(Host::Server, "UdpRcvbufErrors", "Udp6RcvbufErrors")?;
    ensure!(all > 50 && all < 100, "{all} of 100 found the buffer full");
    let result = scene.expect(&[Row::dropped("client", "server", all)
        .protocol("UDP")
        .reason(&["SOCKET_RCVBUFF"])]);
    drop(socket);
    result
}
