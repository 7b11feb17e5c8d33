//! What has to hold: documents are rows, and nothing was acknowledged that the store does not have.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use pgtide::change::Field;
use pgtide::postgres::pgoutput::{Message, Tuple, decode};
use pgtide::store::Store;
use serde_json::value::RawValue;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::schema::{Kind, document_id};

/// Changes that the slot has still to send, by table.
#[derive(Debug, Default)]
pub struct Pending(BTreeMap<String, Keys>);

#[derive(Debug, Default)]
struct Keys {
    all: bool,
    ids: BTreeSet<String>,
}

impl Pending {
    /// What PostgreSQL would send from the position that is confirmed; none where the slot is in use.
    pub async fn of(client: &Client, slot: &str, tables: &[Kind]) -> Option<Self> {
        let sql = "SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1',
                   'publication_names', $2)";
        let mut pending = Self::default();
        let mut relations: HashMap<u32, (String, Vec<String>)> = HashMap::new();
        let rows = match client.query(sql, &[&slot, &slot]).await {
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) => return None,
            rows => rows.unwrap(),
        };
        for row in rows {
            match decode(row.get(0)).unwrap() {
                Message::Relation(relation) => {
                    let columns = relation.columns.iter().map(|column| column.name.to_owned()).collect();
                    // A partition's documents are among its table's.
                    let table = relation.name.split('_').next().unwrap().to_owned();
                    relations.insert(relation.oid, (table, columns));
                }
                Message::Insert { oid, new } => pending.add(&relations[&oid], tables, new),
                Message::Update { oid, old, new } => {
                    pending.add(&relations[&oid], tables, new);
                    if let Some((_, old)) = old {
                        pending.add(&relations[&oid], tables, old);
                    }
                }
                Message::Delete { oid, old, .. } => pending.add(&relations[&oid], tables, old),
                Message::Truncate { oids, .. } => {
                    for oid in oids.iter() {
                        pending.0.entry(relations[&oid].0.clone()).or_default().all = true;
                    }
                }
                _ => {}
            }
        }
        Some(pending)
    }

    fn add(&mut self, (name, columns): &(String, Vec<String>), tables: &[Kind], tuple: Tuple<'_>) {
        let Some(table) = tables.iter().find(|table| table.name() == *name) else { return };
        let keys = self.0.entry(name.clone()).or_default();
        let fields: Vec<Field<'_>> = tuple.iter().collect();
        let text = |column: &&str| {
            let at = columns.iter().position(|name| name == column)?;
            match fields.get(at)? {
                Field::Text(text) => Some(String::from_utf8_lossy(text).into_owned()),
                _ => None,
            }
        };
        match table.key().iter().map(text).collect::<Option<Vec<String>>>() {
            Some(key) => drop(keys.ids.insert(document_id(&key))),
            None => keys.all = true,
        }
    }

    fn touches(&self, table: Kind, id: &str) -> bool {
        self.0.get(table.name()).is_some_and(|keys| keys.all || keys.ids.contains(id))
    }
}

/// The id of the document of each row of a table, and its content, as PostgreSQL makes them.
async fn expected(client: &Client, table: Kind) -> BTreeMap<String, String> {
    let name = table.name();
    let key = "SELECT quote_ident(a.attname) FROM pg_class c JOIN pg_index i ON i.indrelid = c.oid
               JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY (i.indkey)
               WHERE c.oid = $1::text::regclass
               AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END ORDER BY a.attnum";
    let key = client.query(key, &[&name]).await.unwrap();
    let key: Vec<String> = key.iter().map(|row| row.get(0)).collect();
    let id = match key.as_slice() {
        [one] => format!("{one}::text"),
        all => {
            let escaped = |column: &String| format!(r"replace(replace({column}::text, '\', '\\'), ':', '\:')");
            format!("concat_ws(':', {})", all.iter().map(escaped).collect::<Vec<_>>().join(", "))
        }
    };
    let rows = client.query(&format!("SELECT {id}, to_jsonb(t)::text FROM {name} AS t"), &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// How the documents of a table differ from its rows, except for those that changes are still to come for.
pub async fn differences(client: &Client, store: &Store, table: Kind, pending: &Pending) -> Vec<String> {
    let rows = expected(client, table).await;
    let documents = store.documents(table.name());
    let mut found = Vec::new();
    for (id, row) in &rows {
        if pending.touches(table, id) {
            continue;
        }
        match documents.get(id) {
            None => found.push(format!("{}: row without a document: {id:?}: {}", table.name(), short(row))),
            Some((version, source)) => {
                let document = std::str::from_utf8(source).unwrap();
                if !same(document, row) {
                    found.push(format!(
                        "{}: row {id:?} is {}\n      its document (version {}) differs: {}",
                        table.name(),
                        short(row),
                        lsn(*version),
                        short(document)
                    ));
                }
            }
        }
    }
    for (id, (version, _)) in &documents {
        if !rows.contains_key(id) && !pending.touches(table, id) {
            found.push(format!("{}: document without a row: {id:?} (version {})", table.name(), lsn(*version)));
        }
    }
    let count = found.len();
    if count > 8 {
        found.truncate(8);
        found.push(format!("{}: and {} more", table.name(), count - 8));
    }
    found
}

type Members<'a> = BTreeMap<String, &'a RawValue>;

/// Two JSON texts that mean the same: the same members in any order, the same texts however they are escaped, and
/// numbers by all of their digits.
fn same(one: &str, other: &str) -> bool {
    fn both<'a, T: serde::Deserialize<'a>>(one: &'a str, other: &'a str) -> (T, T) {
        (serde_json::from_str(one).unwrap(), serde_json::from_str(other).unwrap())
    }
    match (one.as_bytes()[0], other.as_bytes()[0]) {
        (b'{', b'{') => {
            let (one, other) = both::<Members<'_>>(one, other);
            let alike = |(name, value): (&String, &&RawValue)| {
                other.get(name).is_some_and(|other| same(value.get(), other.get()))
            };
            one.len() == other.len() && one.iter().all(alike)
        }
        (b'[', b'[') => {
            let (one, other) = both::<Vec<&RawValue>>(one, other);
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one.get(), other.get()))
        }
        (b'"', b'"') => {
            let (one, other) = both::<String>(one, other);
            one == other
        }
        // PostgreSQL's jsonb never has an exponent.
        _ if one.contains(['e', 'E']) && !one.starts_with(['t', 'f']) => number(one) == number(other),
        _ => one == other,
    }
}

/// A number's sign, its digits, and its power of ten.
fn number(text: &str) -> Option<(bool, String, i64)> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i64>().ok()?),
        None => (text, 0),
    };
    let (negative, mantissa) = mantissa.strip_prefix('-').map_or((false, mantissa), |rest| (true, rest));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let significant = digits.trim_start_matches('0').trim_end_matches('0');
    let zeros = digits.len() - digits.trim_end_matches('0').len();
    let power = exponent - i64::try_from(fraction.len()).unwrap() + i64::try_from(zeros).unwrap();
    Some((negative, significant.to_owned(), if significant.is_empty() { 0 } else { power }))
}

fn lsn(version: i64) -> String {
    pgtide::version::position(version.unsigned_abs()).to_string()
}

/// Large values cut.
fn short(json: &str) -> String {
    let members: Members<'_> = serde_json::from_str(json).unwrap();
    let cut = |text: &str| match text.len() {
        ..=60 => text.to_owned(),
        length => format!("{}...({length} bytes)", text.chars().take(24).collect::<String>()),
    };
    let members: Vec<String> = members.iter().map(|(name, value)| format!("{name}: {}", cut(value.get()))).collect();
    format!("{{{}}}", members.join(", "))
}
