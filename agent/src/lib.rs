//! Whydrop: why does this connection hang?
//!
//! The modules in the order in which a dropped packet passes them:
//!
//! | module | turns | into |
//! |---|---|---|
//! | [`source`] | what the kernel counted and reported | owned [`decode::Drop`]s |
//! | [`decode`] | bytes | packet, reason, location, verdict |
//! | [`cluster`] | Kubernetes objects | an index: who held this address at that time |
//! | [`mod@enrich`] | a drop and the index | a named [`event::Event`] |
//! | [`awaited`], [`held`] | an end without a name yet | the same a moment later, with it |
//! | [`explain`] | an event and the policies of the moment | its explanation |
//! | [`answer`] | a question about a connection | what policies say of it, and what was seen |
//! | [`connections`] | conntrack's table and the counters | the connections of this node, named |
//! | [`recent`] | drops of first packets | which attempts they were of |
//! | [`policy`] | objects and a flow | which NetworkPolicy denies it, and what is missing |
//! | [`record`] | events | counters of pairs |
//! | [`senders`] | counts of attempts | counters of workloads |
//! | [`kube_events`] | events | Kubernetes Events on the pods that suffer |
//! | [`output`] | counters and events | `/metrics`, the local API, the stream |
//! | [`pipeline`] | all of the above | one function that reads as this table |
//!
//! [`cli`] holds one file a command, [`selection`] is what `tail` and the local API select by.

pub mod answer;
pub mod awaited;
pub mod cli;
pub mod cluster;
pub mod connections;
pub mod cpu_time;
pub mod decode;
pub mod enrich;
pub mod event;
pub mod explain;
pub mod held;
pub mod kube_events;
pub mod output;
pub mod pipeline;
pub mod policy;
pub mod recent;
pub mod record;
pub mod selection;
pub mod senders;
pub mod source;
pub mod state;
pub mod sync;
