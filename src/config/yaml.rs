//! YAML as a tree in which every node knows its place, so that an error can name line, column and key.
//!
//! The scalars keep their text: whether `0123` is a number or a password, only the key can tell.

use std::collections::HashMap;

use serde_saphyr::granit_parser::{Event, Parser, ScalarStyle, Span};

use super::error::Finding;

/// Deeper nesting is no configuration.
const MAX_DEPTH: usize = 32;
/// More nodes, aliases resolved, are no configuration either: ends an alias bomb.
const MAX_NODES: usize = 100_000;

/// Line and column, both from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl Place {
    fn of(span: &Span) -> Self {
        Self { line: span.start.line().max(1), column: span.start.col() + 1 }
    }

    pub(super) fn finding(self, path: &str, message: impl Into<String>) -> Finding {
        Finding { line: self.line, column: self.column, path: path.to_owned(), message: message.into() }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Text, and whether it was written without quotes.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) place: Place,
    pub(super) key: String,
    pub(super) value: Node,
}

impl Node {
    /// Written as `null`, `~` or nothing: the same as a key that is absent.
    pub(super) fn is_null(&self) -> bool {
        matches!(&self.kind, Kind::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// Written as `""` or the like.
    pub(super) fn is_empty_text(&self) -> bool {
        matches!(&self.kind, Kind::Scalar { text, .. } if text.is_empty())
    }

    fn size(&self) -> usize {
        1 + match &self.kind {
            Kind::Scalar { .. } => 0,
            Kind::List(items) => items.iter().map(Node::size).sum(),
            Kind::Map(entries) => entries.iter().map(|entry| entry.value.size()).sum(),
        }
    }
}

/// The one document of `text`; none when there is nothing but comments.
pub(super) fn parse(text: &str) -> Result<Option<Node>, Finding> {
    let mut events = Events { parser: Parser::new_from_str(text), anchors: HashMap::new(), nodes: 0 };
    let mut root = None;
    loop {
        let (event, place) = events.next()?;
        match event {
            Event::StreamEnd => return Ok(root),
            Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
            _ if root.is_some() => return Err(place.finding("", "expected one document, found a second one")),
            event => root = Some(events.node(event, place, 0)?),
        }
    }
}

struct Events<'a> {
    parser: Parser<'a, serde_saphyr::granit_parser::StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

impl<'a> Events<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Place), Finding> {
        loop {
            match self.parser.next_event() {
                None => return Ok((Event::StreamEnd, Place::default())),
                Some(Ok((Event::Comment(..) | Event::Anchor(..), _))) => {}
                Some(Ok((event, span))) => return Ok((event, Place::of(&span))),
                Some(Err(error)) => {
                    let marker = error.marker();
                    let place = Place { line: marker.line().max(1), column: marker.col() + 1 };
                    return Err(place.finding("", format!("this is no YAML: {}", super::shown(&error.info(), 200))));
                }
            }
        }
    }

    fn node(&mut self, event: Event<'a>, place: Place, depth: usize) -> Result<Node, Finding> {
        if depth > MAX_DEPTH {
            return Err(place.finding("", format!("nested deeper than {MAX_DEPTH} levels")));
        }
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(place.finding("", format!("more than {MAX_NODES} values")));
        }
        if event.tag().is_some() {
            return Err(place.finding("", "tags such as `!name` are not supported: remove it"));
        }
        let (anchor, kind) = match event {
            Event::Scalar(text, style, anchor, _) => {
                (anchor, Kind::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain })
            }
            Event::SequenceStart(_, anchor, _) => {
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => break,
                        (event, place) => items.push(self.node(event, place, depth + 1)?),
                    }
                }
                (anchor, Kind::List(items))
            }
            Event::MappingStart(_, anchor, _) => (anchor, Kind::Map(self.entries(depth)?)),
            Event::Alias(id) => {
                let node =
                    self.anchors.get(&id).ok_or_else(|| place.finding("", "an alias to a value that holds it"))?;
                self.nodes += node.size();
                return Ok(Node { place, kind: node.kind.clone() });
            }
            _ => return Err(place.finding("", "the document ends here, a value was expected")),
        };
        let node = Node { place, kind };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn entries(&mut self, depth: usize) -> Result<Vec<Entry>, Finding> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut merged: Vec<Entry> = Vec::new();
        loop {
            let (event, place) = self.next()?;
            if event == Event::MappingEnd {
                break;
            }
            let Kind::Scalar { text: key, plain } = self.node(event, place, depth + 1)?.kind else {
                return Err(place.finding("", "expected a key, found a list or a group of keys"));
            };
            let (event, value_place) = self.next()?;
            let value = self.node(event, value_place, depth + 1)?;
            if plain && key == "<<" {
                merged.extend(merge(value)?);
            } else if let Some(first) = entries.iter().find(|entry| entry.key == key) {
                let message = format!("given twice; the first is on line {}", first.place.line);
                return Err(place.finding(&super::shown(&key, 80), message));
            } else {
                entries.push(Entry { place, key, value });
            }
        }
        // What is written out wins over what is merged in, and an earlier merge over a later one.
        for entry in merged {
            if !entries.iter().any(|own| own.key == entry.key) {
                entries.push(entry);
            }
        }
        Ok(entries)
    }
}

fn merge(value: Node) -> Result<Vec<Entry>, Finding> {
    match value.kind {
        Kind::Map(entries) => Ok(entries),
        Kind::List(items) => Ok(items.into_iter().map(merge).collect::<Result<Vec<_>, _>>()?.concat()),
        Kind::Scalar { .. } => Err(value.place.finding("<<", "expected a group of keys to merge, such as `*name`")),
    }
}
