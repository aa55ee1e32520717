//! What the running kernel's BTF says: where its fields are, and what it calls its drop reasons.
//!
//! Nothing here is decided by a kernel version: distributions backport both fields and reasons.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use btf_rs::{Backend, Btf, BtfType, Type};
use whydrop_ebpf::{MISSING, Offsets, TupleHash};

/// Where kernels keep the BTF of the kernel itself; modules are files beside it.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Why BTF could not be used.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The kernel has none, or it cannot be read.
    #[error(
        "cannot read the kernel's type information {path}: {source}; \
         whydrop needs a kernel built with CONFIG_DEBUG_INFO_BTF=y (all current distributions have it)"
    )]
    Read {
        /// The file.
        path: String,
        /// What the parser said.
        source: btf_rs::Error,
    },
    /// A field without which no packet can be read.
    #[error(
        "the kernel's type information has no {0}; this kernel's sk_buff is not known to whydrop"
    )]
    Field(&'static str),
}

/// The fields without which TCP connects are not followed.
pub fn knows_connects(offsets: &Offsets) -> bool {
    ![
        offsets.sock_state,
        offsets.sock_family,
        offsets.sock_num,
        offsets.inet_sport,
        offsets.sock_dport,
        offsets.sock_rcv_saddr,
        offsets.sock_daddr,
        offsets.sock_v6_rcv_saddr,
        offsets.sock_v6_daddr,
        offsets.sock_err,
        offsets.sock_err_soft,
    ]
    .contains(&MISSING)
}

/// The fields without which DNS is not followed.
pub fn knows_dns(offsets: &Offsets) -> bool {
    ![offsets.sock_dport, offsets.skb_transport_header].contains(&MISSING)
}

/// What was found.
#[derive(Debug)]
pub struct KernelTypes {
    /// For the programs.
    pub offsets: Offsets,
    /// Drop reasons by number.
    pub reasons: HashMap<u32, Arc<str>>,
    /// Optional fields that are missing, by name.
    pub missing: Vec<&'static str>,
}

/// Reads [`VMLINUX`] and, for reasons only, the modules that have some of their own.
pub fn read() -> Result<KernelTypes, BtfError> {
    let btf = open(Path::new(VMLINUX))?;
    let mut types = from_btf(&btf)?;
    for module in ["openvswitch", "mac80211"] {
        let path = Path::new(VMLINUX).with_file_name(module);
        // The module need not be loaded; its reasons then cannot occur.
        if let Ok(module) = Btf::from_split_file(path, &btf) {
            add_reasons(&module, &mut types.reasons);
        }
    }
    Ok(types)
}

fn open(path: &Path) -> Result<Btf, BtfError> {
    // Mapping the file needs Linux 6.16; it spares some 20 MB of parsed types.
    Btf::from_file_with_backend(path, Backend::Mmap)
        .or_else(|_| Btf::from_file_with_backend(path, Backend::Cache))
        .map_err(|source| BtfError::Read {
            path: path.display().to_string(),
            source,
        })
}

fn from_btf(btf: &Btf) -> Result<KernelTypes, BtfError> {
    let mut missing = Vec::new();
    let needed = |path: &'static str| offset(btf, path).ok_or(BtfError::Field(path));
    let mut optional = |path: &'static str| {
        offset(btf, path).unwrap_or_else(|| {
            missing.push(path);
            MISSING
        })
    };
    let mut offsets = Offsets {
        skb_head: needed("sk_buff.head")?,
        skb_data: needed("sk_buff.data")?,
        skb_tail: needed("sk_buff.tail")?,
        skb_network_header: needed("sk_buff.network_header")?,
        skb_mac_header: needed("sk_buff.mac_header")?,
        skb_protocol: needed("sk_buff.protocol")?,
        skb_iif: needed("sk_buff.skb_iif")?,
        skb_dev: needed("sk_buff.dev")?,
        skb_sk: needed("sk_buff.sk")?,
        dev_ifindex: needed("net_device.ifindex")?,
        dev_net: needed("net_device.nd_net.net")?,
        net_inum: needed("net.ns.inum")?,
        sock_net: needed("sock.__sk_common.skc_net.net")?,
        sock_type: needed("sock.sk_type")?,
        sock_protocol: needed("sock.sk_protocol")?,
        dev_name: optional("net_device.name"),
        skb_nfct: optional("sk_buff._nfct"),
        sock_state: optional("sock.__sk_common.skc_state"),
        sock_family: optional("sock.__sk_common.skc_family"),
        sock_num: optional("sock.__sk_common.skc_num"),
        inet_sport: optional("inet_sock.inet_sport"),
        sock_dport: optional("sock.__sk_common.skc_dport"),
        sock_rcv_saddr: optional("sock.__sk_common.skc_rcv_saddr"),
        sock_daddr: optional("sock.__sk_common.skc_daddr"),
        sock_v6_rcv_saddr: optional("sock.__sk_common.skc_v6_rcv_saddr"),
        sock_v6_daddr: optional("sock.__sk_common.skc_v6_daddr"),
        sock_err: optional("sock.sk_err"),
        sock_err_soft: optional("sock.sk_err_soft"),
        sock_cgroup: optional("sock.sk_cgrp_data"),
        cgroup_kn: optional("cgroup.kn"),
        kn_id: optional("kernfs_node.id"),
        skb_transport_header: optional("sk_buff.transport_header"),
        ct_status: optional("nf_conn.status"),
        ct_tuplehash: optional("nf_conn.tuplehash"),
        ct_net: optional("nf_conn.ct_net"),
        ct_tcp_state: optional("nf_conn.proto.tcp.state"),
        has_reason: u32::from(has_reason(btf)),
        reason_no_socket: MISSING,
    };
    if offsets.ct_tuplehash != MISSING && !tuple_is_as_expected(btf) {
        offsets.ct_tuplehash = MISSING;
        missing.push("nf_conntrack_tuple_hash as it is from 5.10 to 7.2");
    }
    if offsets.ct_tuplehash == MISSING {
        offsets.ct_status = MISSING;
    }
    let mut reasons = HashMap::new();
    add_reasons(btf, &mut reasons);
    if let Some((number, _)) = reasons.iter().find(|(_, name)| &***name == "NO_SOCKET") {
        offsets.reason_no_socket = *number;
    }
    Ok(KernelTypes {
        offsets,
        reasons,
        missing,
    })
}

/// Whether the tracepoint passes a reason: `void *`, `skb`, `location`, then `reason`.
fn has_reason(btf: &Btf) -> bool {
    let Ok(types) = btf.resolve_types_by_name("btf_trace_kfree_skb") else {
        return false;
    };
    types.iter().filter_map(Type::as_btf_type).any(|typedef| {
        btf.chained_type_iter(typedef)
            .any(|t| matches!(t, Type::FuncProto(f) if f.parameters.len() >= 4))
    })
}

/// Compares [`TupleHash`] with the kernel's layout.
fn tuple_is_as_expected(btf: &Btf) -> bool {
    let at = |path, field: usize| offset(btf, path) == u32::try_from(field).ok();
    at(
        "nf_conntrack_tuple_hash.tuple.src.u3",
        std::mem::offset_of!(TupleHash, source.address),
    ) && at(
        "nf_conntrack_tuple_hash.tuple.src.u",
        std::mem::offset_of!(TupleHash, source.port_be),
    ) && at(
        "nf_conntrack_tuple_hash.tuple.dst.u3",
        std::mem::offset_of!(TupleHash, destination.address),
    ) && at(
        "nf_conntrack_tuple_hash.tuple.dst.u",
        std::mem::offset_of!(TupleHash, destination.port_be),
    ) && size_of_struct(btf, "nf_conntrack_tuple_hash") == Some(size_of::<TupleHash>())
}

fn size_of_struct(btf: &Btf, name: &str) -> Option<usize> {
    btf.resolve_types_by_name(name)
        .ok()?
        .into_iter()
        .find_map(|t| match t {
            Type::Struct(s) => Some(s.size()),
            _ => None,
        })
}

/// The byte offset of `struct.field[.field]`, also through anonymous structs and unions.
fn offset(btf: &Btf, path: &str) -> Option<u32> {
    let mut fields = path.split('.');
    let name = fields.next()?;
    let mut t = btf
        .resolve_types_by_name(name)
        .ok()?
        .into_iter()
        .find(|t| matches!(t, Type::Struct(_)))?;
    let mut bits = 0;
    for field in fields {
        let (found, at) = member(btf, &t, field)?;
        bits += at;
        t = found;
    }
    Some(bits / 8)
}

/// A member's type (typedefs and qualifiers taken off) and its offset in bits.
fn member(btf: &Btf, t: &Type, name: &str) -> Option<(Type, u32)> {
    let (Type::Struct(s) | Type::Union(s)) = t else {
        return None;
    };
    for m in &s.members {
        let found = bare(btf, m)?;
        match btf.resolve_name(m) {
            Ok(n) if n == name => return Some((found, m.bit_offset())),
            Ok(n) if !n.is_empty() => {}
            // Anonymous: its members are the outer struct's.
            _ => {
                if let Some((inner, at)) = member(btf, &found, name) {
                    return Some((inner, m.bit_offset() + at));
                }
            }
        }
    }
    None
}

fn bare(btf: &Btf, m: &dyn BtfType) -> Option<Type> {
    btf.chained_type_iter(m).find(|t| {
        !matches!(
            t,
            Type::Typedef(_)
                | Type::Const(_)
                | Type::Volatile(_)
                | Type::Restrict(_)
                | Type::TypeTag(_)
        )
    })
}

/// The enums that hold drop reasons. Each subsystem's values carry its number in the high 16 bits
/// (include/net/dropreason.h, `SKB_DROP_REASON_SUBSYS_SHIFT`).
const REASON_ENUMS: [&str; 4] = [
    "skb_drop_reason",
    "qdisc_drop_reason",
    "ovs_drop_reason",
    "mac80211_drop_reason",
];

fn add_reasons(btf: &Btf, reasons: &mut HashMap<u32, Arc<str>>) {
    for name in REASON_ENUMS {
        for t in btf.resolve_types_by_name(name).unwrap_or_default() {
            let Type::Enum(e) = t else { continue };
            for m in &e.members {
                let Ok(name) = btf.resolve_name(m) else {
                    continue;
                };
                let bare = name.strip_prefix("SKB_DROP_REASON_").unwrap_or(&name);
                // Bounds of the enum, not reasons.
                if matches!(bare, "MAX" | "SUBSYS_MASK") || bare.starts_with("__") {
                    continue;
                }
                reasons
                    .entry(m.val())
                    .or_insert_with(|| Arc::from(bare.to_ascii_uppercase()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a kernel with BTF, which every machine that runs whydrop has.
    #[test]
    fn running_kernel_has_what_the_programs_need() {
        let types = read().expect("this kernel has BTF");
        assert!(types.offsets.skb_head < 512 && types.offsets.skb_head != 0);
        assert_ne!(types.offsets.net_inum, MISSING);
        if types.offsets.has_reason == 1 {
            let names: Vec<_> = types.reasons.values().map(|n| &**n).collect();
            assert!(names.contains(&"NETFILTER_DROP"), "{names:?}");
            assert!(!names.iter().any(|n| n.starts_with("SKB_DROP_REASON_")));
        }
    }

    #[test]
    fn a_missing_file_is_one_sentence_that_says_what_to_do() {
        let Err(e) = open(Path::new("/nonexistent/vmlinux")) else {
            panic!("opened")
        };
        assert!(e.to_string().contains("CONFIG_DEBUG_INFO_BTF"), "{e}");
    }
}
