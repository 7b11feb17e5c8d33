//! What has to hold: documents are rows, and nothing was acknowledged that the store does not have.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use pgtide::change::Field;
use pgtide::postgres::pgoutput::{Message, Tuple, decode};
use pgtide::store::Store;
use serde_json::Value;
use tokio_postgres::Client;

use super::schema::{Kind, document_id, expected};

/// Changes that the slot has still to send, by table.
#[derive(Debug, Default)]
pub struct Pending(BTreeMap<String, Keys>);

#[derive(Debug, Default)]
struct Keys {
    all: bool,
    ids: BTreeSet<String>,
}

impl Pending {
    /// What PostgreSQL would send from the position that is confirmed. The slot must not be in use.
    pub async fn of(client: &Client, slot: &str, tables: &[Kind]) -> Self {
        let sql = "SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1',
                   'publication_names', $2)";
        let mut pending = Self::default();
        let mut relations: HashMap<u32, (String, Vec<String>)> = HashMap::new();
        for row in client.query(sql, &[&slot, &slot]).await.unwrap() {
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
        pending
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

/// How the documents of a table differ from its rows, except for those that changes are still to come for.
pub async fn differences(client: &Client, store: &Store, table: Kind, pending: &Pending) -> Vec<String> {
    let rows = client.query(&expected(table), &[]).await.unwrap();
    let rows: BTreeMap<String, Value> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let documents = store.documents(table.name());
    let mut found = Vec::new();
    for (id, row) in &rows {
        if pending.touches(table, id) {
            continue;
        }
        match documents.get(id) {
            None => found.push(format!("{}: row without a document: {id:?}: {}", table.name(), short(row))),
            Some((version, source)) => {
                let document: Value = serde_json::from_slice(source).unwrap();
                if document != *row {
                    found.push(format!(
                        "{}: row {id:?} is {}\n      its document (version {}) differs: {}",
                        table.name(),
                        short(row),
                        lsn(*version),
                        short(&document)
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

fn lsn(version: i64) -> String {
    pgtide::version::position(version.unsigned_abs()).to_string()
}

/// Large values cut.
fn short(value: &Value) -> String {
    let Some(members) = value.as_object() else { return value.to_string() };
    let cut = |value: &Value| match value.to_string() {
        text if text.len() > 60 => format!("{}...({} bytes)", text.chars().take(24).collect::<String>(), text.len()),
        text => text,
    };
    let members: Vec<String> = members.iter().map(|(name, value)| format!("{name}: {}", cut(value))).collect();
    format!("{{{}}}", members.join(", "))
}
