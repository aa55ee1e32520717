//! TCP ports of the server, by what becomes of a connect, and the rules that make it so.

use anyhow::Result;

use crate::lab::{Host, Lab, TC_STOLEN};

/// Established, where somebody listens.
pub const OPEN: u16 = 1000;
/// Nobody listens.
pub const CLOSED: u16 = 1001;
/// The SYN is dropped by the client.
pub const OUTPUT: u16 = 1010;
/// The SYN is dropped by the router.
pub const FORWARD: u16 = 1011;
/// The SYN is dropped by the server.
pub const INPUT: u16 = 1012;
/// The SYN-ACK is dropped by the router.
pub const BACK_FORWARD: u16 = 1013;
/// The SYN-ACK is dropped by the client.
pub const BACK_INPUT: u16 = 1014;
/// For a listener whose accept queue is full.
pub const FULL: u16 = 1015;
/// The SYN is gone, and nobody called it a drop.
pub const GONE: u16 = 1016;
/// The router answers with a reset.
pub const FORWARD_RESET: u16 = 1020;
/// The server's firewall answers with a reset.
pub const INPUT_RESET: u16 = 1021;
/// The client's own answers with a reset.
pub const OUTPUT_RESET: u16 = 1022;
/// The router answers with an ICMP error.
pub const FORWARD_REJECT: u16 = 1023;
/// The server's firewall answers with an ICMP error.
pub const INPUT_REJECT: u16 = 1024;
/// The client's own answers with an ICMP error.
pub const OUTPUT_REJECT: u16 = 1025;

/// nft at the client, the router and the server, tc for [`GONE`].
///
/// # Errors
/// A tool is missing or fails.
pub fn rules(lab: &Lab) -> Result<()> {
    lab.nft(
        Host::Client,
        &format!(
            "table inet lab {{
               chain o {{ type filter hook output priority 0;
                 tcp dport {OUTPUT} drop
                 tcp dport {OUTPUT_RESET} reject with tcp reset
                 tcp dport {OUTPUT_REJECT} reject with icmpx admin-prohibited
               }}
               chain i {{ type filter hook input priority 0;
                 tcp sport {BACK_INPUT} drop
               }}
             }}"
        ),
    )?;
    lab.nft(
        Host::Router,
        &format!(
            "table inet lab {{
               chain f {{ type filter hook forward priority 0;
                 tcp dport {FORWARD} drop
                 tcp sport {BACK_FORWARD} drop
                 tcp dport {FORWARD_RESET} reject with tcp reset
                 tcp dport {FORWARD_REJECT} reject with icmpx admin-prohibited
               }}
             }}"
        ),
    )?;
    lab.nft(
        Host::Server,
        &format!(
            "table inet lab {{
               chain i {{ type filter hook input priority 0;
                 tcp dport {INPUT} drop
                 tcp dport {INPUT_RESET} reject with tcp reset
                 tcp dport {INPUT_REJECT} reject
               }}
             }}"
        ),
    )?;
    lab.tc_port(Host::Server, "eth0", "ingress", GONE, TC_STOLEN)?;
    for host in [Host::Client, Host::Router, Host::Server] {
        lab.unlimited_icmp(host)?;
    }
    Ok(())
}
