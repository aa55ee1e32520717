//! All objects of one file's text: YAML of one or many documents, or JSON, with lists as
//! `kubectl get -o yaml` prints them.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::parse::{Malformed, Parsed, parse};

/// What a text holds.
#[derive(Debug, Default)]
pub struct Objects {
    /// The objects of kinds that are used.
    pub parsed: Vec<Parsed>,
    /// The objects that cannot be used.
    pub malformed: Vec<Malformed>,
    /// How many objects have other kinds.
    pub ignored: usize,
}

/// Reads a text. `is_json` where the file's name says so: then no other syntax is tried.
///
/// # Errors
/// A text that is neither, or holds no object at all: then nothing of it may count, for it may
/// have been cut off. The sentence names line and column.
pub fn read(text: &str, is_json: bool) -> Result<Objects, String> {
    let looks_like_json = text.trim_start().starts_with(['{', '[']);
    let documents = match () {
        () if is_json => json(text)?,
        // JSON is YAML, but its own parser is several times faster on a large dump.
        () if looks_like_json => json(text).or_else(|_| yaml(text))?,
        () => yaml(text)?,
    };
    if documents.is_empty() {
        return Err("it is empty".into());
    }
    let mut objects = Objects::default();
    for Document(items) in documents {
        for item in items {
            match item {
                Ok(Some(parsed)) => objects.parsed.push(parsed),
                Ok(None) => objects.ignored += 1,
                Err(malformed) => objects.malformed.push(malformed),
            }
        }
    }
    Ok(objects)
}

fn json(text: &str) -> Result<Vec<Document>, String> {
    let documents = serde_json::Deserializer::from_str(text).into_iter();
    documents
        .collect::<Result<_, _>>()
        .map_err(|e| format!("it is no JSON: {e}"))
}

fn yaml(text: &str) -> Result<Vec<Document>, String> {
    use serde_saphyr::options::DuplicateKeyPolicy;
    let options = serde_saphyr::options! {
        // The limits on size are for configuration files; a dump of a large cluster has hundreds
        // of millions of nodes. Those on depth and on aliases, which multiply, stay.
        budget: serde_saphyr::budget! {
            max_reader_input_bytes: None,
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_documents: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
            max_total_comment_bytes: usize::MAX,
        },
        // Nobody prints objects with aliases, and each one that is followed costs memory.
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
        // A key twice in one object is no reason to lose all others.
        duplicate_keys: DuplicateKeyPolicy::LastWins,
        // YAML 1.1 takes `n`, `on` and others for booleans; kubectl prints none of them bare.
        strict_booleans: true,
        emit_comments: false,
    };
    let mut bytes = text.as_bytes();
    serde_saphyr::read_with_options(&mut bytes, options)
        .collect::<Result<_, _>>()
        .map_err(|e| format!("it is no YAML: {}", e.without_snippet()))
}

type Item = Result<Option<Parsed>, Malformed>;

/// One document: an object, or a list of which each item is stripped before the next is read, so
/// that a dump of gigabytes needs no memory of that size.
#[derive(Debug)]
struct Document(Vec<Item>);

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(DocumentVisitor)
    }
}

struct DocumentVisitor;

impl<'de> Visitor<'de> for DocumentVisitor {
    type Value = Document;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a Kubernetes object or a list of them")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
        let mut fields = Map::new();
        let mut items = None;
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                let text = |name: &str| fields.get(name).and_then(Value::as_str);
                let list = text("apiVersion").zip(text("kind"));
                items = map.next_value_seed(ItemsSeed(list))?;
            } else {
                fields.insert(key, map.next_value()?);
            }
        }
        let text = |name: &str| fields.get(name).and_then(Value::as_str);
        let is_list = items.is_some() || text("kind").is_some_and(|kind| kind.ends_with("List"));
        if !is_list {
            return Ok(Document(vec![parse(&Value::Object(fields), None)]));
        }
        let list = text("apiVersion").zip(text("kind"));
        let items = items.map_or_else(Vec::new, |items| items.0).into_iter();
        Ok(Document(items.map(|item| item.finish(list)).collect()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Document, A::Error> {
        let items = ItemsVisitor(None).visit_seq(seq)?;
        let items = items.into_iter().flat_map(|items| items.0);
        Ok(Document(items.map(|item| item.finish(None)).collect()))
    }
}

struct Items(Vec<ListItem>);

enum ListItem {
    Done(Item),
    /// The item of a typed list whose kind, the list's, is told after the items: the API server tells
    /// it before them.
    Untyped(Value),
}

impl ListItem {
    fn finish(self, list: Option<(&str, &str)>) -> Item {
        match self {
            Self::Done(item) => item,
            Self::Untyped(value) => parse(&value, list),
        }
    }
}

/// The items of a list, which may be null; with what the list has said of itself before them.
struct ItemsSeed<'a>(Option<(&'a str, &'a str)>);

impl<'de> DeserializeSeed<'de> for ItemsSeed<'_> {
    type Value = Option<Items>;

    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Option<Items>, D::Error> {
        d.deserialize_any(ItemsVisitor(self.0))
    }
}

struct ItemsVisitor<'a>(Option<(&'a str, &'a str)>);

impl<'de> Visitor<'de> for ItemsVisitor<'_> {
    type Value = Option<Items>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of Kubernetes objects")
    }

    fn visit_unit<E>(self) -> Result<Option<Items>, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Option<Items>, A::Error> {
        let mut items = Vec::new();
        while let Some(value) = seq.next_element::<Value>()? {
            let has_kind = value.get("kind").is_some();
            items.push(match has_kind || self.0.is_some() {
                true => ListItem::Done(parse(&value, self.0)),
                false => ListItem::Untyped(value),
            });
        }
        Ok(Some(Items(items)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::objects::{Interner, Object};

    fn names(text: &str, is_json: bool) -> Vec<String> {
        let objects = read(text, is_json).unwrap();
        assert_eq!(objects.malformed, []);
        let mut strings = Interner::default();
        let objects = objects.parsed.into_iter().map(|p| p.strip(&mut strings));
        objects.map(|o: Object| o.key().name.to_string()).collect()
    }

    #[test]
    fn documents_lists_and_typed_lists_in_yaml() {
        let text = "
# comment
apiVersion: v1
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: a}}
- {apiVersion: v1, kind: ConfigMap, metadata: {name: ignored}}
kind: List
metadata: {resourceVersion: ''}
---
---
apiVersion: v1
kind: Namespace
metadata: {name: b}
---
apiVersion: v1
items:
- metadata: {name: c}
kind: NamespaceList
";
        assert_eq!(names(text, false), ["a", "b", "c"]);
        assert_eq!(read(text, false).unwrap().ignored, 1);
    }

    #[test]
    fn objects_arrays_and_streams_in_json() {
        let namespace = |n: &str| {
            format!(r#"{{"apiVersion":"v1","kind":"Namespace","metadata":{{"name":"{n}"}}}}"#)
        };
        let (a, b) = (namespace("a"), namespace("b"));
        let list = format!(r#"{{"kind":"List","apiVersion":"v1","items":[{a},{b}]}}"#);
        for text in [list, format!("[{a},{b}]"), format!("{a}\n{b}")] {
            assert_eq!(names(&text, true), ["a", "b"], "{text}");
            assert_eq!(names(&text, false), ["a", "b"], "{text}");
        }
    }

    #[test]
    fn a_list_without_items_is_not_empty() {
        assert_eq!(
            names("apiVersion: v1\nitems: []\nkind: List\n", false).len(),
            0
        );
        assert_eq!(names("apiVersion: v1\nkind: PodList\n", false).len(), 0);
    }

    #[test]
    fn what_cannot_be_read_says_where() {
        for (text, is_json, says) in [
            ("", false, "empty"),
            ("\n# nothing\n---\n", false, "empty"),
            ("a: [1\nb: 2\n", false, "no YAML"),
            ("apiVersion: v1\nkind: [", false, "no YAML"),
            ("just words", false, "no YAML"),
            ("{\"kind\": ", true, "line 1 column"),
            ("\u{0}\u{1}", false, "no YAML"),
        ] {
            let error = read(text, is_json).unwrap_err();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }

    #[test]
    fn any_part_of_a_text_is_read_or_refused() {
        let text = include_str!("fixtures/cluster.yaml");
        let json = include_str!("fixtures/pods.json");
        for (text, is_json) in [(text, false), (json, true), (json, false)] {
            for n in (0..text.len()).step_by(101) {
                _ = read(&text[..n], is_json);
                _ = read(&text[n..], is_json);
            }
        }
    }

    #[test]
    fn aliases_that_multiply_are_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..12 {
            let alias = format!("*a{}", i - 1);
            let ten = vec![alias; 10].join(", ");
            text.push_str(&format!("a{i}: &a{i} [{ten}]\n"));
        }
        assert!(read(&text, false).unwrap_err().contains("no YAML"));
    }
}
