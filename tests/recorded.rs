//! The decoder of `pgoutput` and the reader of COPY beside another implementation, on a stream that holds every kind of
//! message that protocol version 1 has.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::pin::pin;

use futures_util::TryStreamExt;
use pg_walstream::{ColumnData, LogicalReplicationMessage as Theirs, LogicalReplicationParser, TupleData};
use pgtide::change::Field;
use pgtide::postgres::pgoutput::{Message, Old, Tuple, decode};
use pgtide::text::copy::Splitter;
use support::fresh_database;
use tokio_postgres::Client;

/// From 1970 to 2000 in microseconds: ours count from the former.
const EPOCH: i64 = 946_684_800_000_000;

/// A published table with every kind of value, and values that COPY has to escape.
const VALUES: &str = r#"
    CREATE TYPE mood AS ENUM ('sad', 'it''s "fine"');
    CREATE TYPE pair AS (a int, "B" text);
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE TABLE "Values.Ünder" (id int PRIMARY KEY, t text, n numeric, f float8, b bytea, j jsonb, d timestamptz, a text[],
        m mood, p pair, pos positive, r int4range, ms mood[], bits bit(3), o oid);
    INSERT INTO "Values.Ünder" (id, t) SELECT n, 'before ' || chr(n) || ' after' FROM generate_series(1, 300) n;
    INSERT INTO "Values.Ünder" (id, t) VALUES (1001, ''), (1002, NULL), (1003, '\N'), (1004, '\'), (1005, E'a\\\tb\n\\n\r\\x41\\101\b\f\v'),
        (1006, repeat(E'\\\t', 2000)), (1007, '\.');
    INSERT INTO "Values.Ünder" VALUES (2001, 'all', 12345678901234567890.10, 'NaN', '\x00ff5c09', '{"k": ["\\", null]}',
        '2024-02-29 12:00:00.5+02', '{"a\\b",NULL,"NULL","{}",""}', 'it''s "fine"', '(1,"x\\""y")', 7, '[1,5)', '{sad,"it''s \"fine\""}',
        B'101', 4294967295);
"#;

/// What else there is: identities, large values, keys that change, TRUNCATE, altered tables, origins, messages.
const CHANGES: &str = r#"
    CREATE TABLE plain (id int PRIMARY KEY, note text, amount int);
    ALTER TABLE plain ALTER note SET STORAGE EXTERNAL;
    CREATE TABLE whole (id serial, note text, amount int);
    ALTER TABLE whole REPLICA IDENTITY FULL, ALTER note SET STORAGE EXTERNAL;
    CREATE TABLE by_index (id int NOT NULL, code text NOT NULL, note text);
    CREATE UNIQUE INDEX codes ON by_index (code);
    ALTER TABLE by_index REPLICA IDENTITY USING INDEX codes;
    CREATE TABLE no_columns ();
    CREATE TABLE parent (id int PRIMARY KEY);
    CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent);
    CREATE TABLE parts (id int, part int, PRIMARY KEY (id, part)) PARTITION BY LIST (part);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
    CREATE TABLE parts_2 (part int NOT NULL, id int NOT NULL);
    ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES IN (2);

    INSERT INTO plain VALUES (1, repeat('x', 3000), 1), (2, NULL, NULL);
    UPDATE plain SET amount = 2 WHERE id = 1;
    UPDATE plain SET id = 10 WHERE id = 1;
    UPDATE plain SET note = '' WHERE id = 2;
    DELETE FROM plain WHERE id = 2;
    BEGIN; SAVEPOINT a; INSERT INTO plain VALUES (3); ROLLBACK TO a; INSERT INTO plain VALUES (4); COMMIT;
    INSERT INTO whole (note, amount) VALUES (repeat('y', 3000), 1), (NULL, 2);
    UPDATE whole SET amount = 5;
    DELETE FROM whole WHERE note IS NULL;
    INSERT INTO by_index VALUES (1, 'a', 'n');
    UPDATE by_index SET note = 'm';
    UPDATE by_index SET code = 'b';
    DELETE FROM by_index;
    INSERT INTO no_columns DEFAULT VALUES;
    INSERT INTO parts VALUES (1, 1), (2, 2);
    UPDATE parts SET part = 2 WHERE id = 1;
    INSERT INTO parent VALUES (1);
    INSERT INTO child VALUES (1, 1);
    TRUNCATE plain, by_index;
    TRUNCATE whole RESTART IDENTITY;
    TRUNCATE parent CASCADE;
    TRUNCATE parts RESTART IDENTITY CASCADE;
    ALTER TABLE plain ADD extra mood DEFAULT 'sad', DROP amount;
    INSERT INTO plain VALUES (5, 'altered');
    ALTER TABLE plain RENAME note TO "remärk";
    ALTER TABLE plain RENAME TO "plain too";
    INSERT INTO "plain too" VALUES (6, 'renamed');
    SELECT pg_logical_emit_message(true, 'in it', 'content'), pg_logical_emit_message(false, 'beside', '\x00ff'::bytea);
"#;

/// A transaction that came from another server.
const ORIGIN: [&str; 5] = [
    "SELECT pg_replication_origin_create($name$), pg_replication_origin_session_setup($name$)",
    "BEGIN; SELECT pg_replication_origin_xact_setup('1/ABCD', now())",
    "INSERT INTO parent VALUES (7)",
    "COMMIT",
    "SELECT pg_replication_origin_session_reset(), pg_replication_origin_drop($name$)",
];

/// Every message of what the statements do.
async fn record(client: &Client, name: &str) -> Vec<Vec<u8>> {
    // Origins and slots have names that a server has once.
    let slot = format!("recorded_{name}");
    let run = async |sql: &str| {
        let sql = sql.replace("$name$", &format!("'{slot}'"));
        client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    };
    run("CREATE PUBLICATION everything FOR ALL TABLES WITH (publish_via_partition_root)").await;
    run("SELECT pg_create_logical_replication_slot($name$, 'pgoutput')").await;
    // One by one, so that each is a transaction of its own.
    for script in [VALUES, CHANGES] {
        for statement in script.split(";\n") {
            run(statement).await;
        }
    }
    for statement in ORIGIN {
        run(statement).await;
    }
    let sql = "SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, NULL, 'proto_version', '1',
               'publication_names', 'everything', 'messages', 'true')";
    let rows = client.query(sql, &[&slot]).await.unwrap();
    run("SELECT pg_drop_replication_slot($name$)").await;
    rows.iter().map(|row| row.get(0)).collect()
}

/// What a message is, as far as it must have occurred.
fn kind(message: &Message<'_>) -> &'static str {
    match message {
        Message::Begin { .. } => "begin",
        Message::Commit { .. } => "commit",
        Message::Relation(_) => "relation",
        Message::Insert { new, .. } if new.is_empty() => "insert of no columns",
        Message::Insert { .. } => "insert",
        Message::Update { old: Some((Old::Key, _)), new, .. } if new.has_unchanged() => {
            "update of a key with a value left out"
        }
        Message::Update { old: None, new, .. } if new.has_unchanged() => "update with a value left out",
        Message::Update { old: Some((Old::Full, _)), new, .. } if new.has_unchanged() => {
            "update of all with a value left out"
        }
        Message::Update { old: None, .. } => "update",
        Message::Update { old: Some((Old::Key, _)), .. } => "update of a key",
        Message::Update { old: Some((Old::Full, _)), .. } => "update of all",
        Message::Delete { kind: Old::Key, .. } => "delete by key",
        Message::Delete { kind: Old::Full, .. } => "delete of all",
        Message::Truncate { oids, cascade: false, restart_identity: false } if oids.iter().len() > 1 => {
            "truncate of several"
        }
        Message::Truncate { cascade: true, restart_identity: true, .. } => "truncate with both options",
        Message::Truncate { cascade: true, oids, .. } if oids.iter().len() > 1 => "truncate that reached another",
        Message::Truncate { restart_identity: true, .. } => "truncate of a sequence",
        Message::Truncate { .. } => "truncate",
        Message::Type { .. } => "type",
        Message::Origin { .. } => "origin",
        Message::Logical { transactional: true, .. } => "message",
        Message::Logical { .. } => "message beside",
    }
}

const KINDS: [&str; 21] = [
    "begin",
    "commit",
    "delete by key",
    "delete of all",
    "insert",
    "insert of no columns",
    "message",
    "message beside",
    "origin",
    "relation",
    "truncate of a sequence",
    "truncate of several",
    "truncate that reached another",
    "truncate with both options",
    "type",
    "update",
    "update of a key",
    "update of a key with a value left out",
    "update of all",
    "update of all with a value left out",
    "update with a value left out",
];

fn same_field(ours: Field<'_>, theirs: &ColumnData) -> bool {
    match ours {
        Field::Null => theirs.data_type == b'n',
        Field::Unchanged => theirs.data_type == b'u',
        Field::Text(text) => theirs.data_type == b't' && theirs.as_bytes() == text,
    }
}

fn same_tuple(ours: &Tuple<'_>, theirs: &TupleData) -> bool {
    ours.len() == theirs.column_count()
        && ours.iter().zip(&theirs.columns).all(|(ours, theirs)| same_field(ours, theirs))
}

fn mark(old: Old) -> char {
    match old {
        Old::Key => 'K',
        Old::Full => 'O',
    }
}

fn schema(theirs: &str) -> &str {
    if theirs.is_empty() { "pg_catalog" } else { theirs }
}

fn same(ours: &Message<'_>, theirs: &Theirs) -> bool {
    match (ours, theirs) {
        (Message::Begin { final_lsn, commit_time, xid }, Theirs::Begin { final_lsn: lsn, timestamp, xid: theirs }) => {
            (final_lsn.0, *commit_time, *xid) == (*lsn, *timestamp + EPOCH, *theirs)
        }
        (
            Message::Commit { commit_lsn, end_lsn, commit_time },
            Theirs::Commit { commit_lsn: commit, end_lsn: end, timestamp, .. },
        ) => (commit_lsn.0, end_lsn.0, *commit_time) == (*commit, *end, *timestamp + EPOCH),
        (
            Message::Relation(ours),
            Theirs::Relation { relation_id, namespace, relation_name, replica_identity, columns },
        ) => {
            let columns_same = ours.columns.iter().zip(columns).all(|(ours, theirs)| {
                (ours.key, ours.name, ours.type_oid, ours.type_modifier)
                    == (theirs.is_key(), &*theirs.name, theirs.type_id, theirs.type_modifier)
            });
            (ours.oid, ours.schema, ours.name, ours.replica_identity, ours.columns.len())
                == (*relation_id, schema(namespace), &**relation_name, *replica_identity, columns.len())
                && columns_same
        }
        (Message::Insert { oid, new }, Theirs::Insert { relation_id, tuple }) => {
            oid == relation_id && same_tuple(new, tuple)
        }
        (Message::Update { oid, old, new }, Theirs::Update { relation_id, old_tuple, new_tuple, key_type }) => {
            let old_same = match (old, old_tuple) {
                (None, None) => key_type.is_none(),
                (Some((kind, ours)), Some(theirs)) => *key_type == Some(mark(*kind)) && same_tuple(ours, theirs),
                _ => false,
            };
            oid == relation_id && old_same && same_tuple(new, new_tuple)
        }
        (Message::Delete { oid, kind, old }, Theirs::Delete { relation_id, old_tuple, key_type }) => {
            oid == relation_id && mark(*kind) == *key_type && same_tuple(old, old_tuple)
        }
        (Message::Truncate { oids, cascade, restart_identity }, Theirs::Truncate { relation_ids, flags }) => {
            oids.iter().eq(relation_ids.iter().copied())
                && (u8::from(*cascade) | u8::from(*restart_identity) << 1) == *flags
        }
        (Message::Type { oid, schema: ours, name }, Theirs::Type { type_id, namespace, type_name }) => {
            (oid, *ours, *name) == (type_id, schema(namespace), type_name)
        }
        (Message::Origin { commit_lsn, name }, Theirs::Origin { origin_lsn, origin_name }) => {
            (commit_lsn.0, *name) == (*origin_lsn, origin_name)
        }
        (
            Message::Logical { transactional, lsn, prefix, content },
            Theirs::Message { flags, lsn: at, prefix: theirs, content: bytes },
        ) => (u8::from(*transactional), lsn.0, *prefix, *content) == (*flags, *at, theirs.as_str(), &bytes[..]),
        _ => false,
    }
}

/// With `PGTIDE_RECORD` set the messages are kept for the fuzzer (fuzz/corpus/pgoutput), but the long ones.
fn keep(messages: &[Vec<u8>]) {
    if std::env::var_os("PGTIDE_RECORD").is_some() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/pgoutput");
        let mut kinds = BTreeSet::new();
        for message in messages.iter().filter(|message| message.len() < 1000) {
            if kinds.insert((kind(&decode(message).unwrap()), message.len() / 32)) {
                std::fs::write(folder.join(format!("recorded-{:03}", kinds.len())), message).unwrap();
            }
        }
    }
}

#[tokio::test]
async fn every_message_is_read_as_another_implementation_reads_it() {
    let database = fresh_database().await;
    let messages = record(&database.client, &database.name).await;
    let mut parser = LogicalReplicationParser::with_protocol_version(1);
    let mut kinds = BTreeSet::new();
    let mut shapes = BTreeSet::new();
    for bytes in &messages {
        let ours = decode(bytes).unwrap();
        let theirs = parser.parse_wal_message(bytes).unwrap().message;
        assert!(same(&ours, &theirs), "ours: {ours:?}\ntheirs: {theirs:?}");
        kinds.insert(kind(&ours));
        if let Message::Relation(relation) = &ours {
            shapes.insert((relation.oid, relation.name, format!("{:?}", relation.columns)));
        }
    }
    assert_eq!(kinds, BTreeSet::from(KINDS), "another set of messages was recorded");
    let mut tables: Vec<u32> = shapes.iter().map(|(oid, ..)| *oid).collect();
    tables.dedup();
    assert_eq!(shapes.len(), tables.len() + 2, "a table that was altered twice is not announced anew: {shapes:?}");
    keep(&messages);
}

/// The fields of a line of COPY are those that the stream has for the same row.
#[tokio::test]
async fn every_line_of_copy_is_read_as_the_stream_has_it() {
    let database = fresh_database().await;
    let messages = record(&database.client, &database.name).await;
    let mut parser = LogicalReplicationParser::with_protocol_version(1);
    let mut values = None;
    let mut inserts = Vec::new();
    for bytes in &messages {
        match parser.parse_wal_message(bytes).unwrap().message {
            Theirs::Relation { relation_id, relation_name, .. } if &*relation_name == "Values.Ünder" => {
                values = Some(relation_id);
            }
            Theirs::Insert { relation_id, tuple } if values == Some(relation_id) => inserts.push(tuple),
            _ => {}
        }
    }
    assert_eq!(inserts.len(), 308);
    let copy = database.client.copy_out(r#"COPY (SELECT * FROM "Values.Ünder" ORDER BY id) TO STDOUT"#).await.unwrap();
    let mut lines = pin!(copy);
    let (mut splitter, mut count) = (Splitter::default(), 0);
    while let Some(line) = lines.try_next().await.unwrap() {
        let theirs = &inserts[count];
        let ours = splitter.split(&line);
        assert_eq!(ours.len(), theirs.column_count());
        for (ours, theirs) in ours.iter().zip(&theirs.columns) {
            assert!(same_field(ours, theirs), "{ours:?} in COPY, {theirs:?} in the stream");
        }
        count += 1;
    }
    assert_eq!(count, inserts.len());
}
