//! Objects by their keys. Each object has its key in itself, so the table has no second one: in a map
//! with keys these would be two thirds of it.

use std::hash::BuildHasher as _;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::cluster::objects::{Key, Object};

/// The objects.
#[derive(Debug, Default)]
pub struct Table {
    objects: HashTable<Object>,
    hasher: RandomState,
}

impl Table {
    /// The object of a key.
    pub fn get(&self, key: &Key) -> Option<&Object> {
        let hash = self.hasher.hash_one(key);
        self.objects.find(hash, |object| object.key() == key)
    }

    /// Puts an object in, and returns the one that had its key.
    pub fn insert(&mut self, object: Object) -> Option<Object> {
        let hasher = &self.hasher;
        let hash = |object: &Object| hasher.hash_one(object.key());
        let is_same = |known: &Object| known.key() == object.key();
        match self.objects.entry(hash(&object), is_same, hash) {
            Entry::Occupied(mut known) => Some(std::mem::replace(known.get_mut(), object)),
            Entry::Vacant(place) => {
                place.insert(object);
                None
            }
        }
    }

    /// Takes the object of a key out.
    pub fn remove(&mut self, key: &Key) -> Option<Object> {
        let hash = self.hasher.hash_one(key);
        let known = self.objects.find_entry(hash, |object| object.key() == key);
        known.ok().map(|known| known.remove().0)
    }

    /// All objects.
    pub fn values(&self) -> impl Iterator<Item = &Object> {
        self.objects.iter()
    }

    /// The keys of all objects.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.objects.iter().map(Object::key)
    }

    /// Whether there is none.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::cluster::objects::ObjectKind;
    use crate::event::Workload;

    fn object(name: u8, owner: u8) -> Object {
        let key = Key {
            kind: ObjectKind::Job,
            namespace: "shop".into(),
            name: name.to_string().into(),
        };
        let owner = Workload {
            kind: "CronJob".into(),
            name: owner.to_string().into(),
        };
        Object::Owner(Box::new((key, Some(owner.into()))))
    }

    proptest! {
        /// It does what a map does.
        #[test]
        fn a_table_is_a_map(steps in prop::collection::vec((0..40_u8, prop::option::of(0..4_u8)), 0..200)) {
            let (mut table, mut map) = (Table::default(), HashMap::new());
            for (name, owner) in steps {
                let key = object(name, 0).key().clone();
                let (had, expected) = match owner {
                    Some(owner) => {
                        let object = object(name, owner);
                        (table.insert(object.clone()), map.insert(key.clone(), object))
                    }
                    None => (table.remove(&key), map.remove(&key)),
                };
                prop_assert_eq!(had, expected);
                prop_assert_eq!(table.get(&key), map.get(&key));
            }
            prop_assert_eq!(table.values().count(), map.len());
            prop_assert!(table.keys().all(|key| table.get(key) == map.get(key)));
        }
    }
}
