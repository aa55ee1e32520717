//! A conntrack table with entries in it.

use anyhow::{Result, ensure};

use crate::lab::{Family, Host, Lab, Place, TC_STOLEN};
use crate::packet::{self, flags};
use crate::traffic;

/// Has the router take any segment for one of a connection, and the ends see none of them, or they would
/// answer with resets: TC_ACT_STOLEN frees packets without calling it a drop.
///
/// # Errors
/// The lab refuses.
pub fn prepare(lab: &Lab) -> Result<()> {
    lab.sysctl(
        Host::Router,
        "net/netfilter/nf_conntrack_tcp_be_liberal",
        "1",
    )?;
    for host in [Host::Client, Host::Server] {
        lab.tc(host, "eth0", "ingress", TC_STOLEN)?;
    }
    Ok(())
}

/// Makes connections through the router until it tracks so many, which it must be made to do by a
/// rule. Both sides have used them, so the kernel does not evict them early.
///
/// Where `nf_conntrack_tcp_be_liberal` is 0 the kernel takes their segments for invalid, and the ends
/// answer them with resets unless something keeps them from seeing them.
///
/// # Errors
/// The kernel refuses a packet, or the table does not fill.
pub fn fill(lab: &Lab, family: Family, tracked: u64) -> Result<()> {
    let client = lab.address(Place::Of(Host::Client), family);
    let server = lab.address(Place::Of(Host::Server), family);
    let entries = || -> Result<u64> {
        let path = "/proc/sys/net/netfilter/nf_conntrack_count";
        Ok(lab.read(Host::Router, path)?.trim().parse()?)
    };
    let from_client =
        |packets: &[Vec<u8>]| lab.within(Host::Client, || traffic::raw_ip(server, packets));
    let mut made = entries()?;
    loop {
        let missing = tracked.saturating_sub(entries()?).min(20_000);
        if missing == 0 {
            return Ok(());
        }
        ensure!(
            made < 2 * tracked,
            "the table does not fill: {} of {tracked}",
            entries()?
        );
        let ports: Vec<(u16, u16)> = (made..made + missing)
            .map(|n| (2000 + (n % 60_000) as u16, 1000 + (n / 60_000) as u16))
            .collect();
        let segment = |from, to| packet::segment(from, to, flags::ACK);
        let there: Vec<_> = ports
            .iter()
            .map(|(low, high)| segment((client, *low), (server, *high)))
            .collect();
        let back: Vec<_> = ports
            .iter()
            .map(|(low, high)| segment((server, *high), (client, *low)))
            .collect();
        // The third makes the entry "assured": used both ways, and answered before.
        from_client(&there)?;
        lab.within(Host::Server, || traffic::raw_ip(client, &back))?;
        from_client(&there)?;
        made += missing;
    }
}
