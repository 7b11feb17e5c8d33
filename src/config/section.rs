//! Reading a tree key by key: each read is remembered, so that what was never asked for is an unknown key.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Read as _;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::Finding;
use super::yaml::{Entry, Kind, Node, Place};
use super::{Secret, shown, value};

/// A secret file longer than this is the wrong file.
const MAX_SECRET: u64 = 64 << 10;

/// What a reading of the file gathers.
pub(super) struct Context<'a> {
    pub(super) env: &'a dyn Fn(&str) -> Option<String>,
    findings: RefCell<Vec<Finding>>,
    warnings: RefCell<Vec<String>>,
    places: RefCell<HashMap<String, Place>>,
}

impl<'a> Context<'a> {
    pub(super) fn new(env: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { env, findings: RefCell::default(), warnings: RefCell::default(), places: RefCell::default() }
    }

    /// Refuses the file because of the key `path`, or of the group it would stand in where it is absent.
    pub(super) fn refuse(&self, path: &str, message: impl Into<String>) {
        let places = self.places.borrow();
        let mut known = path;
        let place = loop {
            match (places.get(known), known.rfind(['.', '['])) {
                (Some(place), _) => break *place,
                (None, Some(end)) => known = &known[..end],
                (None, None) => break Place { line: 1, column: 1 },
            }
        };
        self.findings.borrow_mut().push(place.finding(path, message));
    }

    /// Takes the key, and tells the operator what it does not do.
    pub(super) fn warn(&self, path: &str, message: &str) {
        self.warnings.borrow_mut().push(format!("{path}: {message}"));
    }

    /// The key is in the file.
    pub(super) fn given(&self, path: &str) -> bool {
        self.places.borrow().contains_key(path)
    }

    /// Findings in the order of the file, and warnings.
    pub(super) fn end(self) -> (Vec<Finding>, Vec<String>) {
        let mut findings = self.findings.into_inner();
        findings.sort_by_key(|finding| (finding.line, finding.column));
        (findings, self.warnings.into_inner())
    }
}

/// A group of keys.
pub(super) struct Section<'a> {
    pub(super) path: String,
    pub(super) context: &'a Context<'a>,
    entries: &'a [Entry],
    known: RefCell<Vec<&'static str>>,
}

/// A value and its key.
pub(super) struct Field<'a> {
    pub(super) path: String,
    pub(super) node: &'a Node,
    pub(super) context: &'a Context<'a>,
}

impl<'a> Section<'a> {
    /// The value of `key`; none where it is absent or `null`.
    pub(super) fn get(&self, key: &'static str) -> Option<Field<'a>> {
        self.known.borrow_mut().push(key);
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        if entry.value.is_null() {
            return None;
        }
        Some(self.field(entry))
    }

    /// Every key and value, for a group whose keys are the user's.
    pub(super) fn all(&self) -> impl Iterator<Item = (&'a str, Field<'a>)> + '_ {
        self.entries.iter().map(|entry| (entry.key.as_str(), self.field(entry)))
    }

    fn field(&self, entry: &'a Entry) -> Field<'a> {
        let path = join(&self.path, &shown(&entry.key, 140));
        self.context.places.borrow_mut().insert(path.clone(), entry.place);
        Field { path, node: &entry.value, context: self.context }
    }

    /// The key is known here, and refused with the reason.
    pub(super) fn refused(&self, key: &'static str, reason: &str) {
        if let Some(field) = self.get(key) {
            field.refuse(reason);
        }
    }

    /// Refuses the keys that nobody asked for.
    pub(super) fn end(self) {
        let known = self.known.into_inner();
        for entry in self.entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            let path = join(&self.path, &shown(&entry.key, 140));
            let message = match nearest(&entry.key, &known) {
                Some(key) => format!("unknown key; did you mean `{key}`?"),
                None => format!("unknown key; the keys here are {}", known.join(", ")),
            };
            self.context.findings.borrow_mut().push(entry.place.finding(&path, message));
        }
    }
}

impl<'a> Field<'a> {
    /// The file as a whole.
    pub(super) fn root(node: &'a Node, context: &'a Context<'a>) -> Self {
        Field { path: String::new(), node, context }
    }

    /// Refuses the file because of this value.
    pub(super) fn refuse(&self, message: impl Into<String>) {
        self.context.findings.borrow_mut().push(self.node.place.finding(&self.path, message));
    }

    fn expected(&self, what: &str) {
        let found = match &self.node.kind {
            Kind::Scalar { text, .. } if text.is_empty() => "nothing".to_owned(),
            Kind::Scalar { text, .. } => format!("`{}`", shown(text, 60)),
            Kind::List(_) => "a list".to_owned(),
            Kind::Map(_) => "a group of keys".to_owned(),
        };
        self.refuse(format!("expected {what}, found {found}"));
    }

    pub(super) fn section(&self) -> Option<Section<'a>> {
        let Kind::Map(entries) = &self.node.kind else {
            self.expected("a group of keys");
            return None;
        };
        Some(Section { path: self.path.clone(), context: self.context, entries, known: RefCell::default() })
    }

    /// The items of a list, each with its number in the path.
    pub(super) fn list(&self) -> Option<Vec<Field<'a>>> {
        let Kind::List(items) = &self.node.kind else {
            self.expected("a list");
            return None;
        };
        let items = items.iter().enumerate().map(|(at, node)| {
            let path = format!("{}[{at}]", self.path);
            self.context.places.borrow_mut().insert(path.clone(), node.place);
            Field { path, node, context: self.context }
        });
        Some(items.collect())
    }

    /// Text with its references replaced. `bare` refuses a quoted value that holds no reference: numbers and switches have no quotes.
    fn scalar(&self, what: &str, bare: bool) -> Option<String> {
        let Kind::Scalar { text, plain } = &self.node.kind else {
            self.expected(what);
            return None;
        };
        if bare && !plain && !text.contains('$') {
            self.refuse(format!("expected {what}, found text in quotes: remove the quotes"));
            return None;
        }
        value::expand(text, self.context.env).map_err(|message| self.refuse(message)).ok()
    }

    /// Text; may be empty.
    pub(super) fn text(&self) -> Option<String> {
        let text = self.scalar("text", false)?;
        if text.contains('\0') {
            self.refuse("holds a zero byte");
            return None;
        }
        Some(text)
    }

    /// Text with something in it.
    pub(super) fn name(&self) -> Option<String> {
        let text = self.text()?;
        if text.trim().is_empty() {
            self.refuse("must not be empty");
            return None;
        }
        Some(text)
    }

    /// A name that PostgreSQL takes whole: it would cut a longer one, and then not find it.
    pub(super) fn identifier(&self) -> Option<String> {
        let name = self.name()?;
        if name.len() > 63 {
            self.refuse(format!("PostgreSQL's names have at most 63 bytes, this one has {}", name.len()));
            return None;
        }
        Some(name)
    }

    pub(super) fn path(&self) -> Option<PathBuf> {
        self.name().map(PathBuf::from)
    }

    /// What the file that this names holds; line breaks at its end do not count.
    pub(super) fn secret_file(&self) -> Option<Secret> {
        let path = self.path()?;
        match read_secret(&path) {
            Ok(text) => Some(Secret(text)),
            Err(error) => {
                self.refuse(format!("cannot read the file: {error}"));
                None
            }
        }
    }

    pub(super) fn switch(&self) -> Option<bool> {
        const WHAT: &str = "true or false";
        // Go's YAML reader takes these words for a switch, and files made for it hold them.
        match self.scalar(WHAT, true)?.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" => Some(true),
            "false" | "no" | "off" => Some(false),
            _ => {
                self.expected(WHAT);
                None
            }
        }
    }

    pub(super) fn number(&self, what: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let what = format!("{what} from {} to {}", range.start(), range.end());
        let number = self.scalar(&what, true)?.parse::<u64>().ok().filter(|number| range.contains(number));
        if number.is_none() {
            self.expected(&what);
        }
        number
    }

    /// A duration longer than none. A bare number is milliseconds where `milliseconds`, and refused elsewhere.
    pub(super) fn duration(&self, milliseconds: bool) -> Option<Duration> {
        const WHAT: &str = "a duration such as 30s, 100ms or 1h30m";
        let text = self.scalar(WHAT, false)?;
        let bare = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let duration = match text.parse::<u64>() {
            Ok(number) if bare && milliseconds => Some(Duration::from_millis(number)),
            _ if bare && text.bytes().any(|byte| byte != b'0') => {
                self.refuse(format!("expected {WHAT}, found a number without a unit"));
                return None;
            }
            _ => value::duration(&text),
        };
        match duration {
            Some(Duration::ZERO) => self.refuse("must be longer than 0"),
            Some(duration) => return Some(duration),
            None => self.expected(WHAT),
        }
        None
    }

    pub(super) fn size(&self, range: RangeInclusive<u64>) -> Option<u64> {
        const WHAT: &str = "a size such as 10mb, 1.5mb or a number of bytes";
        let Some(size) = value::size(&self.scalar(WHAT, false)?) else {
            self.expected(WHAT);
            return None;
        };
        if !range.contains(&size) {
            self.refuse(format!("must be {} to {} bytes, is {size}", range.start(), range.end()));
            return None;
        }
        Some(size)
    }

    /// One of `words`, in whatever case.
    pub(super) fn choice<T: Copy>(&self, words: &[(&'static str, T)]) -> Option<T> {
        let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let what = format!("one of {}", names.join(", "));
        let text = self.scalar(&what, false)?;
        let found = words.iter().find(|(word, _)| word.eq_ignore_ascii_case(&text));
        if found.is_none() {
            self.expected(&what);
        }
        found.map(|(_, value)| *value)
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// The known key that `key` is most likely a slip of.
fn nearest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    let key = key.to_lowercase();
    known
        .iter()
        .map(|known| (strsim::osa_distance(&key, &known.to_lowercase()), *known))
        .filter(|(distance, known)| *distance <= (known.len() / 3).max(1))
        .min()
        .map(|(_, known)| known)
}

fn read_secret(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_SECRET + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_SECRET {
        return Err(std::io::Error::other("it is longer than 64 KiB, which is no password"));
    }
    while text.ends_with(['\n', '\r']) {
        text.pop();
    }
    Ok(text)
}
