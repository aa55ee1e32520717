//! An object without what is not used of it.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{Deserializer, IntoDeserializer, Visitor};
use serde_json::Value;

/// What was read. A [`Value`] of the same would be some 10 maps of 600 bytes each: to make and drop them was a
/// third of what it takes to follow a cluster.
#[derive(Clone, Debug)]
pub enum Pruned {
    /// Read whole.
    Whole(Value),
    /// Items of which some fields are used.
    List(Vec<Pruned>),
    /// The used fields that are there.
    Map(Vec<(&'static str, Pruned)>),
}

impl Pruned {
    /// A field of a map.
    pub fn get(&self, name: &str) -> Option<&Self> {
        match self {
            Self::Map(fields) => {
                let mut fields = fields.iter();
                fields.find_map(|(known, field)| (*known == name).then_some(field))
            }
            _ => None,
        }
    }

    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Whole(value) => value.as_str(),
            _ => None,
        }
    }

    /// The same as any JSON.
    pub fn into_value(self) -> Value {
        match self {
            Self::Whole(value) => value,
            Self::List(items) => items.into_iter().map(Self::into_value).collect(),
            Self::Map(fields) => {
                let fields = fields.into_iter();
                let fields = fields.map(|(name, field)| (name.to_owned(), field.into_value()));
                Value::Object(fields.collect())
            }
        }
    }
}

impl<'de> Deserializer<'de> for &'de Pruned {
    type Error = serde_json::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self {
            Pruned::Whole(value) => value.deserialize_any(visitor),
            Pruned::List(items) => SeqDeserializer::new(items.iter()).deserialize_any(visitor),
            Pruned::Map(fields) => {
                let fields = fields.iter().map(|(name, field)| (*name, field));
                MapDeserializer::new(fields).deserialize_any(visitor)
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self {
            Pruned::Whole(Value::Null) => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, serde_json::Error> for &'de Pruned {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}
