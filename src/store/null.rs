//! Null mode's `_bulk`: counts lines and answers, keeps nothing.
//!
//! Works on the frames of the body as they arrive; only an action line cut by the end of a frame is copied.

use memchr::{memchr, memmem};
use serde_json::{Value, json};

use super::action::Kind;
use super::failure::Failure;
use super::filter_path::Filter;

/// What one request wrote to an index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) index: String,
    /// Index, create and update actions.
    pub(super) writes: u64,
    pub(super) deletes: u64,
}

/// Reads a bulk body frame by frame.
pub(super) struct Scanner {
    /// The beginning of an action line whose end is yet to come.
    carry: Vec<u8>,
    in_source: bool,
    line: u64,
    counts: Vec<Counts>,
    /// Into `counts`.
    current: usize,
    /// An item of the answer for each kind with a comma behind; empty if the filter takes it away.
    fragments: [Vec<u8>; 4],
    out: Vec<u8>,
    failure: Option<Failure>,
    keeps_errors: bool,
    keeps_took: bool,
}

impl Scanner {
    /// For a request whose path names `index` (or nothing: empty), with a body of about `length` bytes.
    pub(super) fn new(index: &str, filter: Option<&Filter>, length: usize) -> Self {
        let keeps = |name: &str| filter.is_none_or(|filter| filter.keeps(&[name]));
        Self {
            carry: Vec::new(),
            in_source: false,
            line: 0,
            counts: vec![Counts { index: index.to_owned(), ..Counts::default() }],
            current: 0,
            fragments: Kind::ALL.map(|kind| fragment(kind, filter)),
            out: Vec::with_capacity(64 + length / 8),
            failure: None,
            keeps_errors: keeps("errors"),
            keeps_took: keeps("took"),
        }
    }

    /// Takes the next piece of the body.
    pub(super) fn feed(&mut self, frame: &[u8]) {
        let mut rest = frame;
        while !rest.is_empty() && self.failure.is_none() {
            let Some(length) = memchr(b'\n', rest) else {
                if !self.in_source {
                    self.carry.extend_from_slice(rest);
                }
                return;
            };
            let (line, behind) = (&rest[..length], &rest[length + 1..]);
            rest = behind;
            self.line += 1;
            if self.in_source {
                self.in_source = false;
            } else if self.carry.is_empty() {
                self.action(line);
            } else {
                let mut whole = std::mem::take(&mut self.carry);
                whole.extend_from_slice(line);
                self.action(&whole);
                whole.clear();
                self.carry = whole;
            }
        }
    }

    fn action(&mut self, line: &[u8]) {
        let Some((kind, behind)) = kind_of(line) else {
            if !line.trim_ascii().is_empty() {
                let line = self.line;
                self.failure = Some(Failure::argument(format!(
                    "Malformed action/metadata line [{line}], expected field [create], [delete], [index] or [update]"
                )));
            }
            return;
        };
        self.choose(behind);
        self.out.extend_from_slice(&self.fragments[kind as usize]);
        if kind == Kind::Delete {
            self.counts[self.current].deletes += 1;
        } else {
            self.counts[self.current].writes += 1;
            self.in_source = true;
        }
    }

    /// Makes the index that the rest of an action line names the current one.
    fn choose(&mut self, meta: &[u8]) {
        const USUAL: &[u8] = b":{\"_index\":\"";
        let name = match meta.strip_prefix(USUAL) {
            Some(name) => name,
            None => match memmem::find(meta, b"\"_index\"").and_then(|at| {
                let value = &meta[at + 8..];
                Some(&value[memchr(b'"', value)? + 1..])
            }) {
                Some(name) => name,
                None => {
                    self.current = 0;
                    return;
                }
            },
        };
        let is =
            |counts: &Counts| name.get(counts.index.len()) == Some(&b'"') && name.starts_with(counts.index.as_bytes());
        if is(&self.counts[self.current]) {
            return;
        }
        self.current = self.counts.iter().position(is).unwrap_or_else(|| {
            let end = memchr(b'"', name).unwrap_or(name.len());
            self.counts.push(Counts { index: String::from_utf8_lossy(&name[..end]).into_owned(), ..Counts::default() });
            self.counts.len() - 1
        });
    }

    /// The answer and what was counted.
    pub(super) fn finish(mut self) -> Result<(Vec<u8>, Vec<Counts>), Failure> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        if self.line == 0 && self.carry.is_empty() && !self.in_source {
            return Err(Failure::new(400, "parse_exception", "request body is required"));
        }
        if self.in_source || !self.carry.is_empty() {
            return Err(Failure::argument("The bulk request must be terminated by a newline [\\n]"));
        }
        self.counts.retain(|counts| counts.writes + counts.deletes > 0);
        if self.counts.is_empty() {
            return Err(Failure::validation("no requests added"));
        }
        if self.counts.iter().any(|counts| counts.index.is_empty()) {
            return Err(Failure::validation("index is missing"));
        }
        let mut answer = Vec::with_capacity(self.out.len() + 64);
        answer.push(b'{');
        if self.keeps_errors {
            answer.extend_from_slice(b"\"errors\":false,");
        }
        if self.keeps_took {
            answer.extend_from_slice(b"\"took\":0,");
        }
        if self.out.is_empty() {
            if answer.len() > 1 {
                answer.pop();
            }
            answer.push(b'}');
        } else {
            self.out.pop();
            answer.extend_from_slice(b"\"items\":[");
            answer.append(&mut self.out);
            answer.extend_from_slice(b"]}");
        }
        Ok((answer, self.counts))
    }
}

/// The kind and what stands behind its name and quote.
fn kind_of(line: &[u8]) -> Option<(Kind, &[u8])> {
    let inside = match line.strip_prefix(b"{\"") {
        Some(inside) => inside,
        None => line.trim_ascii_start().strip_prefix(b"{")?.trim_ascii_start().strip_prefix(b"\"")?,
    };
    let (name, rest) = inside.split_at_checked(6)?;
    match name {
        b"index\"" => Some((Kind::Index, rest)),
        b"create" => Some((Kind::Create, rest.strip_prefix(b"\"")?)),
        b"delete" => Some((Kind::Delete, rest.strip_prefix(b"\"")?)),
        b"update" => Some((Kind::Update, rest.strip_prefix(b"\"")?)),
        _ => None,
    }
}

fn fragment(kind: Kind, filter: Option<&Filter>) -> Vec<u8> {
    let (status, result) = match kind {
        Kind::Index | Kind::Create => (201, "created"),
        Kind::Delete => (200, "deleted"),
        Kind::Update => (200, "updated"),
    };
    let whole = json!({ "items": [{ kind.name(): { "result": result, "status": status } }] }).to_string();
    let kept = filter.map_or_else(|| whole.clone(), |filter| filter.apply(&whole));
    let item = serde_json::from_str::<Value>(&kept).ok().and_then(|kept| Some(kept.get("items")?.get(0)?.to_string()));
    item.map_or_else(Vec::new, |item| (item + ",").into_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const BODY: &str = "{\"index\":{\"_index\":\"a\",\"_id\":\"1\"}}\n{\"index\":1}\n{ \"delete\": {\"_id\":\"1\",\"_index\": \"b\"}}\n\n{\"create\":{}}\n{}\n{\"update\":{\"_index\":\"a\"}}\n{}\n";
    const USUAL: &str = "errors,items.*.status,items.*.error.type,items.*.error.reason";

    fn scan(body: &str, filter: Option<&str>, step: usize) -> Result<(Value, Vec<Counts>), Failure> {
        let filter = filter.and_then(Filter::parse);
        let mut scanner = Scanner::new("", filter.as_ref(), body.len());
        if body.contains("create") {
            scanner = Scanner::new("p", filter.as_ref(), body.len());
        }
        body.as_bytes().chunks(step).for_each(|frame| scanner.feed(frame));
        scanner.finish().map(|(answer, counts)| (serde_json::from_slice(&answer).unwrap(), counts))
    }

    #[test]
    fn counts_however_the_body_is_cut() {
        let count = |index: &str, writes, deletes| Counts { index: index.to_owned(), writes, deletes };
        for step in 1..=BODY.len() {
            let (answer, counts) = scan(BODY, Some(USUAL), step).unwrap();
            assert_eq!(
                answer,
                json!({"errors": false, "items": [{"index": {"status": 201}}, {"delete": {"status": 200}},
                    {"create": {"status": 201}}, {"update": {"status": 200}}]}),
                "{step}"
            );
            assert_eq!(counts, [count("p", 1, 0), count("a", 2, 0), count("b", 0, 1)], "{step}");
        }
    }

    #[test]
    fn honours_other_filters() {
        assert_eq!(scan(BODY, Some("took"), 7).unwrap().0, json!({"took": 0}));
        assert_eq!(scan(BODY, Some("none"), 7).unwrap().0, json!({}));
        assert_eq!(scan(BODY, None, 7).unwrap().0["items"][1]["delete"]["result"], "deleted");
    }

    #[test]
    fn refuses_what_is_no_bulk_body() {
        for bad in [
            "",
            "\n",
            "{\"foo\":{}}\n{}\n",
            "{\"index\":{\"_index\":\"a\"}}\n{}",
            "{\"index\":{\"_index\":\"a\"}}\n",
            "{\"delete\":{\"_id\":\"1\"}}\n",
        ] {
            assert_eq!(scan(bad, None, 5).unwrap_err().status, 400, "{bad}");
        }
    }
}
