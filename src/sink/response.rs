//! What an answer means, for the whole request and for each of its items.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};

use super::body::{Item, Kind};

/// The longest reason that is kept.
const LONGEST_REASON: usize = 240;

/// An error as Elasticsearch words it. The reason may quote row contents: see [`redact`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct ErrorText<'a> {
    #[serde(rename = "type", default, borrow, deserialize_with = "nullable")]
    pub(super) kind: Cow<'a, str>,
    #[serde(default, borrow, deserialize_with = "nullable")]
    pub(super) reason: Cow<'a, str>,
}

/// An exception without a message has the reason `null`.
fn nullable<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Cow<'a, str>, D::Error> {
    Ok(Cow::Owned(Option::<String>::deserialize(deserializer)?.unwrap_or_default()))
}

/// What becomes of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Done.
    Ok,
    /// A newer version was there. Success.
    Superseded,
    /// Try again soon; true: because the server has too much to do.
    Retry { throttled: bool },
    /// Too large for the node, alone or as part of its request: only a smaller request can pass.
    TooLarge,
    /// Try again now and then: a person has to mend it.
    Wait,
    /// Refused for good.
    Reject,
}

/// Judges an item: the type of the error comes before the status, for a closed index is a 400 and a blocked one a 429.
pub(super) fn judge(kind: Kind, status: u16, error: Option<&ErrorText<'_>>) -> Verdict {
    if (200..300).contains(&status) {
        return Verdict::Ok;
    }
    let name = error.map_or("", |error| error.kind.as_ref());
    match name {
        "index_not_found_exception" | "index_closed_exception" | "cluster_block_exception" | "security_exception" => {
            return Verdict::Wait;
        }
        "version_conflict_engine_exception" => return conflict(kind),
        "es_rejected_execution_exception" | "rejected_execution_exception" | "circuit_breaking_exception" => {
            return Verdict::Retry { throttled: true };
        }
        "unavailable_shards_exception"
        | "process_cluster_event_timeout_exception"
        | "no_shard_available_action_exception"
        | "node_closed_exception" => return Verdict::Retry { throttled: false },
        _ => {}
    }
    match status {
        409 => conflict(kind),
        404 if kind == Kind::Delete && name.is_empty() => Verdict::Ok,
        429 => Verdict::Retry { throttled: true },
        408 | 500.. => Verdict::Retry { throttled: false },
        401 | 403 => Verdict::Wait,
        _ if error.is_some_and(|error| blames_the_index(error)) => Verdict::Wait,
        _ => Verdict::Reject,
    }
}

/// An `update` carries no version of ours: its conflict is with another writer, and it was not carried out.
fn conflict(kind: Kind) -> Verdict {
    if kind == Kind::Update { Verdict::Retry { throttled: false } } else { Verdict::Superseded }
}

/// Errors 400 that every document would meet alike, because of the index, its alias or the cluster.
fn blames_the_index(error: &ErrorText<'_>) -> bool {
    matches!(
        error.kind.as_ref(),
        "invalid_index_name_exception" | "validation_exception" | "invalid_alias_name_exception"
    ) || error.reason.starts_with("no write index is defined")
        || error.reason.starts_with("pipeline with id [")
        || error.reason.contains("has more than one ind")
        || error.reason.contains("maximum normal shards open")
        || error.reason.contains("maximum shards open")
}

/// The status and error of each item.
#[derive(Debug)]
pub(super) enum Items<'a> {
    /// Everything went well; nothing was parsed.
    AllOk,
    /// One for each item sent.
    Each(Vec<ItemAnswer<'a>>),
}

#[derive(Debug, Deserialize)]
pub(super) struct ItemAnswer<'a> {
    pub(super) status: u16,
    #[serde(borrow)]
    pub(super) error: Option<ErrorText<'a>>,
}

/// Reads the answer to a bulk request with these items.
///
/// # Errors
/// Why it cannot be the answer: cut short, no JSON, another number of items (7.17 drops an action that it does not
/// know without a word), or other actions than those sent.
pub(super) fn read<'a>(answer: &'a [u8], sent: &[Item]) -> Result<Items<'a>, String> {
    #[derive(Deserialize)]
    struct Answer<'a> {
        #[serde(borrow)]
        items: Vec<Entry<'a>>,
    }
    #[derive(Deserialize)]
    struct Entry<'a> {
        #[serde(borrow)]
        index: Option<ItemAnswer<'a>>,
        #[serde(borrow)]
        delete: Option<ItemAnswer<'a>>,
        #[serde(borrow)]
        update: Option<ItemAnswer<'a>>,
    }
    let count = |found: usize| format!("{found} items answered for {} sent", sent.len());
    let text = answer.trim_ascii();
    // With our filter an answer without errors holds nothing but one status for each item.
    if text.starts_with(b"{\"errors\":false,")
        && text.ends_with(b"]}")
        && memchr::memmem::find(text, b"\"error\"").is_none()
    {
        let found = memchr::memmem::find_iter(text, b"\"status\":").count();
        return if found == sent.len() { Ok(Items::AllOk) } else { Err(count(found)) };
    }
    let answer: Answer<'a> = serde_json::from_slice(text)
        .map_err(|error| format!("its JSON ends or breaks at column {} of {} bytes", error.column(), text.len()))?;
    if answer.items.len() != sent.len() {
        return Err(count(answer.items.len()));
    }
    let items = answer.items.into_iter().zip(sent).map(|(entry, item)| {
        let found = match item.kind {
            Kind::Index => entry.index,
            Kind::Delete => entry.delete,
            Kind::Update => entry.update,
        };
        found.ok_or_else(|| "an item is of another kind than the one sent".to_owned())
    });
    Ok(Items::Each(items.collect::<Result<_, _>>()?))
}

/// The error of a whole request: `{"error":{"type":...,"reason":...},"status":400}`.
pub(super) fn error_of(answer: &[u8]) -> Option<ErrorText<'_>> {
    #[derive(Deserialize)]
    struct Answer<'a> {
        #[serde(borrow)]
        error: ErrorText<'a>,
    }
    serde_json::from_slice::<Answer<'_>>(answer).ok().map(|answer| answer.error)
}

/// `429 es_rejected_execution_exception: ...`, without row contents.
pub(super) fn describe(status: u16, error: Option<&ErrorText<'_>>) -> String {
    match error {
        Some(error) if error.reason.is_empty() => format!("{status} {}", printable(&error.kind)),
        Some(error) => format!("{status} {}: {}", printable(&error.kind), redact(&error.reason)),
        None => status.to_string(),
    }
}

/// What comes before a bracket that holds a name of the mapping, the index or the cluster, not a value.
const NAMED: [&str; 18] = [
    "field ",
    "fields ",
    "type ",
    "of ",
    "within ",
    "for ",
    "to ",
    "mapper ",
    "alias ",
    "index ",
    "pipeline ",
    "mapping ",
    "setting ",
    "object ",
    "action ",
    "user ",
    "node ",
    "blocked by: ",
];

/// A reason without the values that it may quote. Kept: plain words, and brackets that hold a name. Cut: everything in
/// quotes and round or other square brackets, and numbers (positions would make every reason one of its own).
pub(super) fn redact(reason: &str) -> String {
    let end = [". Preview of", " in document with id", ". The prefix of", "For input string", ", original message"]
        .iter()
        .filter_map(|marker| reason.find(marker))
        .min()
        .unwrap_or(reason.len());
    let reason = &reason[..end];
    // "[1:26] failed to parse": where in the document.
    let reason = match reason.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((place, rest)) if place.bytes().all(|byte| byte.is_ascii_digit() || byte == b':') => rest,
        _ => reason,
    };
    let mut out = String::with_capacity(reason.len().min(LONGEST_REASON));
    let mut rest = reason;
    while let Some(first) = rest.chars().next() {
        if out.len() >= LONGEST_REASON {
            out.push_str("...");
            break;
        }
        let close = match first {
            '[' => Some(']'),
            '(' => Some(')'),
            '\'' | '"' | '`' => Some(first),
            _ => None,
        };
        if let Some(close) = close {
            let inner = &rest[1..];
            // A value may hold the closing mark itself: what is cut ends at the last one, what is kept at the first.
            let names = first == '['
                && NAMED.iter().any(|word| out.ends_with(word))
                && !out.ends_with("date field ")
                && !out.ends_with("value of ");
            let at = if names { inner.find(close) } else { last_close(inner, close) };
            let cut = at.unwrap_or(inner.len());
            out.push(first);
            out.push_str(if names { &inner[..cut] } else { ".." });
            out.push(close);
            rest = inner.get(cut + 1..).unwrap_or_default();
        } else if first.is_ascii_digit() {
            out.push('N');
            rest = rest.trim_start_matches(|digit: char| digit.is_ascii_digit() || digit == '.');
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    printable(&out)
}

/// Where a value ends: at the last closing mark before an opening bracket that holds a name, or at the last of all.
fn last_close(text: &str, close: char) -> Option<usize> {
    let named = NAMED.iter().filter_map(|word| text.find(&format!(" {word}["))).min().unwrap_or(text.len());
    text[..named].rfind(close).or_else(|| text.rfind(close))
}

/// `text` without control characters: it may end up on a terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}
