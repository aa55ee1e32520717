//! From an address to its names, in an index of a large cluster.

use std::hint::black_box;
use std::time::Instant;

use jiff::Timestamp;
use whydrop::cluster::Index;
use whydrop::cluster::objects::Interner;
use whydrop::cluster::parse::parse;
use whydrop::event::{Endpoint, Protocol};
use whydrop_tests::bench::report::{Must, Report, median};

use super::objects;

/// A cluster of which what a look-up reads stays in a cache, and one of which nothing does.
const PODS: [usize; 2] = [10_000, 150_000];
const LOOKUPS: usize = 200_000;
const ROUNDS: usize = 5;

/// Addresses of pods in an order that no cache likes.
pub fn measure(report: &mut Report) {
    for pods in PODS {
        of_size(report, pods);
    }
}

fn of_size(report: &mut Report, pods: usize) {
    let mut strings = Interner::default();
    let mut index = Index::default();
    let services = (0..pods / 10).map(objects::service);
    let parsed = (0..pods)
        .map(objects::pod)
        .chain(services)
        .filter_map(|value| parse(&value, None).ok()?);
    let objects: Vec<_> = parsed.map(|parsed| parsed.strip(&mut strings)).collect();
    index.load(objects, Timestamp::now());
    let at = Timestamp::now();
    let round = || {
        let started = Instant::now();
        for n in 0..LOOKUPS {
            // A prime apart: every look-up is of another pod.
            let n = n * 7_919 % pods;
            let mut end = Endpoint {
                ip: Some([10, 128 + (n >> 16) as u8, (n >> 8) as u8, n as u8].into()),
                port: Some(8080),
                ..Endpoint::default()
            };
            index.name(&mut end, Some(Protocol::TCP), at);
            assert!(black_box(&end).pod.is_some(), "{end:?}");
        }
        started.elapsed().as_nanos() as f64 / LOOKUPS as f64
    };
    let rounds: Vec<f64> = (0..ROUNDS).map(|_| round()).collect();
    report.figure(
        format!("naming an end, {},000 pods", pods / 1_000),
        median(&rounds),
        "ns",
        Must::Below(1_000.0),
    );
}
