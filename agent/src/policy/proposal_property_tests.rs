//! Proposals over random clusters.

use super::*;
use crate::cluster::objects::Object;
use crate::policy::proposal::{Effect, Proposal, effect};

fn is_policy(object: &Object) -> bool {
    matches!(object, Object::NetworkPolicy(..) | Object::TierPolicy(..))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_there_already_denies_nothing_new(
        choices in prop::collection::vec(any::<u16>(), 60..500),
        extra in prop::collection::vec(any::<u16>(), 20..60),
    ) {
        let objects = cluster(&mut Tape(choices.iter()));
        let parsed = testing::objects(&Value::Array(objects).to_string());
        let world = World::new(&parsed);
        let mut same = Proposal::default();
        for object in parsed.iter().filter(|object| is_policy(object)) {
            prop_assert!(same.add(object.clone()));
        }
        let after = same.applied_to(&world);
        // Applying one more policy is as if it had been there from the start.
        let more = testing::objects(&Tape(extra.iter()).policy(99).to_string());
        let mut proposed = Proposal::default();
        proposed.add(more[0].clone());
        let then = proposed.applied_to(&world);
        let from_start = World::new(parsed.iter().chain(&more));
        let pods: Vec<End> = world.pods().map(|(id, _)| End::pod(id)).collect();
        for source in &pods {
            for destination in &pods {
                for port in [Some(80), Some(8080), None] {
                    let flow = Flow {
                        source: *source,
                        destination: *destination,
                        protocol: Protocol::TCP,
                        port,
                    };
                    let unchanged = effect(&world, &after, &flow);
                    prop_assert!(matches!(unchanged, Effect::None | Effect::DeniedAlready));
                    prop_assert_eq!(then.both(&flow), from_start.both(&flow));
                }
            }
        }
    }
}
