//! Every type of PostgreSQL: a document is what `to_jsonb` makes of its row, with the differences that `docs/types.md` names
//! and no others, to the last byte the same by copy, by stream and by reading again.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and says what it left out")]

#[path = "values.rs"]
mod generator;
#[path = "../support/mod.rs"]
mod support;
mod table;
mod wide;
mod without_key;

use std::collections::{BTreeMap, BTreeSet};

use generator::Values;
use pgtide::config::NumericAs;
use pgtide::table::quote_literal;
use pgtide::verify;
use serde_json::json;
use support::pipeline::{Rig, stop};
use table::Table;
use tokio_util::sync::CancellationToken;

/// What `docs/types.md` says of the types whose documents are not what `to_jsonb` makes of them.
const DIFFERENCES: &str = r#"
    CREATE FUNCTION documented(form text, v jsonb) RETURNS jsonb LANGUAGE plpgsql AS $$
    DECLARE word text := v #>> '{}';
    BEGIN
        IF jsonb_typeof(v) = 'array' AND form <> '' THEN
            RETURN (SELECT coalesce(jsonb_agg(documented(form, e) ORDER BY n), '[]')
                    FROM jsonb_array_elements(v) WITH ORDINALITY AS a (e, n));
        END IF;
        RETURN CASE
            WHEN form = 'number' AND word IN ('NaN', 'Infinity', '-Infinity') THEN 'null'
            WHEN form = 'number' AND length(word) > 1000 THEN to_jsonb(word)
            WHEN form = 'moment' AND (word IN ('infinity', '-infinity') OR word LIKE '% BC') THEN 'null'
            WHEN form = 'oid' THEN to_jsonb(word::int8)
            WHEN form = 'bytes' THEN to_jsonb(translate(encode(word::bytea, 'base64'), E'\n', ''))
            ELSE v END;
    END $$"#;

impl Rig {
    /// The documents of `index` as they were sent.
    fn sources(&self, index: &str) -> BTreeMap<String, String> {
        let text = |(id, (_, source)): (String, (i64, Vec<u8>))| (id, String::from_utf8(source).unwrap());
        self.store.documents(index).into_iter().map(text).collect()
    }

    /// The documents of `index` are the rows of its table by `expected`, an expression that gives `jsonb`.
    async fn are(&self, index: &str, expected: &str, seed: u64) {
        let documents = self.sources(index);
        let (ids, texts): (Vec<String>, Vec<String>) = documents.into_iter().unzip();
        self.sql("CREATE TEMP TABLE IF NOT EXISTS documents (id int PRIMARY KEY, document text); TRUNCATE documents")
            .await;
        let insert =
            "INSERT INTO documents SELECT id::int, document FROM unnest($1::text[], $2::text[]) AS d (id, document)";
        self.client.execute(insert, &[&ids, &texts]).await.unwrap();
        let rows = self.count(&format!("SELECT count(*) FROM {index} JOIN documents USING (id)")).await;
        assert_eq!(self.count(&format!("SELECT count(*) FROM {index}")).await, rows);
        assert_eq!(ids.len(), usize::try_from(rows).unwrap());
        let sql = format!(
            "SELECT t.id, d.* FROM {index} AS t JOIN documents USING (id) CROSS JOIN LATERAL (
                 SELECT coalesce(e.key, f.key), e.value::text, f.value::text
                 FROM jsonb_each({expected}) AS e FULL JOIN jsonb_each(document::jsonb) AS f ON e.key = f.key
                 WHERE e.value::text IS DISTINCT FROM f.value::text) AS d (name, expected, found) LIMIT 20"
        );
        let differing = self.client.query(&sql, &[]).await.unwrap();
        let say = |row: &tokio_postgres::Row| {
            let (id, name): (i32, String) = (row.get(0), row.get(1));
            let (expected, found): (Option<String>, Option<String>) = (row.get(2), row.get(3));
            format!(
                "row {id}, {name}: expected {}\n  found {}",
                expected.unwrap_or_default(),
                found.unwrap_or_default()
            )
        };
        let differing: Vec<String> = differing.iter().map(say).collect();
        assert!(differing.is_empty(), "seed {seed}, {index}:\n{}", differing.join("\n"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_of_every_type_is_its_document_by_every_path() {
    let seed = std::env::var("PGTIDE_TYPES_SEED").ok().map_or_else(|| fastrand::u64(..), |seed| seed.parse().unwrap());
    let rig = Rig::new().await;
    // As pgtide's own sessions; `to_jsonb` prints some types by them.
    rig.sql("SET intervalstyle = iso_8601; SET extra_float_digits = 3").await;
    rig.sql(DIFFERENCES).await;
    let table = Table::create(&rig, "copied").await;
    table.nothing_is_left_out(&rig).await;
    table.fill(&rig, "copied", &mut Values::seeded(seed), 40).await;
    rig.sql("CREATE TABLE streamed (LIKE copied INCLUDING ALL)").await;
    let engine = rig.run(rig.config(&["copied", "streamed"])).await;
    let expected = table.expected();
    rig.are("copied", &expected, seed).await;

    rig.sql("INSERT INTO streamed SELECT * FROM copied").await;
    rig.delivered().await;
    assert_eq!(rig.sources("streamed"), rig.sources("copied"), "seed {seed}");

    // What was not sent is read again, or taken from the old row.
    rig.sql("UPDATE streamed SET touched = 1 WHERE id % 2 = 0; ALTER TABLE streamed REPLICA IDENTITY FULL").await;
    rig.sql("UPDATE streamed SET touched = 1 WHERE id % 2 = 1; UPDATE copied SET touched = 1").await;
    rig.delivered().await;
    assert_eq!(rig.sources("streamed"), rig.sources("copied"), "seed {seed}");
    rig.are("streamed", &expected, seed).await;

    // JSON and numbers are the bytes that PostgreSQL prints.
    let exact = "(document::json -> 'json')::text
            <> coalesce(btrim(translate(json::text, E'\n\r', '  '), E' \t'), 'null')
        OR (document::json -> 'jsonb')::text <> coalesce(jsonb::text, 'null')
        OR (document::json -> 'int8')::text <> coalesce(int8::text, 'null')
        OR numeric::text NOT IN ('NaN', 'Infinity', '-Infinity') AND length(numeric::text) <= 1000 AND (document::json -> 'numeric')::text <> numeric::text";
    let other = format!("SELECT count(*) FROM streamed JOIN documents USING (id) WHERE {exact}");
    assert_eq!(rig.count(&other).await, 0, "seed {seed}");
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn numeric_as_a_string() {
    let rig = Rig::new().await;
    rig.sql(
        "CREATE DOMAIN amount AS numeric;
         CREATE TABLE sums (id int PRIMARY KEY, n numeric, d amount, a numeric[], f float8);
         INSERT INTO sums VALUES (1, 1.50, 'NaN', '{Infinity,NULL,2.0}', 1.5), (2, NULL, 1e30, '{}', 'NaN')",
    )
    .await;
    let mut config = rig.config(&["sums"]);
    config.elasticsearch.numeric_as = NumericAs::String;
    let engine = rig.run(config.clone()).await;
    rig.sql("INSERT INTO sums SELECT id + 2, n, d, a, f FROM sums").await;
    rig.delivered().await;
    for first in [1, 3] {
        let documents = rig.documents("sums");
        let one = json!({"id": first, "n": "1.50", "d": "NaN", "a": ["Infinity", null, "2.0"], "f": 1.5});
        assert_eq!(documents[&first.to_string()], one);
        let other = json!({"id": first + 1, "n": null, "d": format!("1{}", "0".repeat(30)), "a": [], "f": null});
        assert_eq!(documents[&(first + 1).to_string()], other);
    }
    let report = verify::run(&verify::Options::new(config.into()), &CancellationToken::new(), |_| {}).await.unwrap();
    assert_eq!(report.outcome(), verify::Outcome::Equal, "{report:?}");
    stop(engine).await;
}

/// `json` is kept as it was written, what `jsonb` cannot hold included. A line break would begin another item of the bulk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_is_embedded_as_it_is() {
    let rig = Rig::new().await;
    let deep = format!("{}1{}", "[".repeat(900), "]".repeat(900));
    let texts = [
        (r#""\u0000""#, r#""\u0000""#),
        (r#"{"a": 1e400,  "a":1E-400}"#, r#"{"a": 1e400,  "a":1E-400}"#),
        (r#""\ud800""#, r#""\ud800""#),
        ("-0.0", "-0.0"),
        (&deep, &deep),
        ("[\n1,\r\n\t2]\n{\"delete\":{}}", ""),
        ("[\n{\"delete\":\r\n\t{\"_id\":\"0\"}}\n]\n", "[ {\"delete\":  \t{\"_id\":\"0\"}} ] "),
    ];
    rig.sql("CREATE TABLE notes (id int PRIMARY KEY, j json)").await;
    let mut expected = BTreeMap::new();
    for (id, (text, written)) in texts.iter().enumerate() {
        let insert = format!("INSERT INTO notes VALUES ({id}, {})", quote_literal(text));
        // Two values are none.
        assert_eq!(rig.client.batch_execute(&insert).await.is_err(), written.is_empty(), "{text}");
        for id in [id, id + 10].into_iter().filter(|_| !written.is_empty()) {
            expected.insert(id.to_string(), format!(r#"{{"id":{id},"j":{written}}}"#));
        }
    }
    let engine = rig.run(rig.config(&["notes"])).await;
    rig.sql("INSERT INTO notes SELECT id + 10, j FROM notes").await;
    rig.delivered().await;
    assert_eq!(rig.sources("notes"), expected);
    stop(engine).await;
}

/// Base types with the names and texts of extensions that a server may lack. No PostGIS and no pgvector is at hand: that
/// they print what is taken for their texts here is theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn types_of_extensions_are_known_by_their_names() {
    let rig = Rig::new().await;
    for (name, delimiter) in [("hstore", ","), ("geometry", ":"), ("vector", ","), ("box2d", ":"), ("other", ",")] {
        rig.sql(&format!(
            "CREATE TYPE {name};
             CREATE FUNCTION {name}_in(cstring) RETURNS {name} LANGUAGE internal IMMUTABLE STRICT AS 'textin';
             CREATE FUNCTION {name}_out({name}) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
             CREATE TYPE {name} (INPUT = {name}_in, OUTPUT = {name}_out, LIKE = text, DELIMITER = '{delimiter}')"
        ))
        .await;
    }
    let point = "0101000020E61000000000000000002A400000000000404A40";
    rig.sql(&format!(
        r#"CREATE DOMAIN place AS geometry;
        CREATE TABLE things (id int PRIMARY KEY, h hstore, hh hstore[], g geometry, gg geometry[], p place, v vector,
            vv vector[], b box2d[], o other, oo other[]);
        INSERT INTO things VALUES (1, '"a"=>"1"', '{{"\"a\"=>NULL",NULL}}', '{point}', '{{{point}:NULL}}', '{point}', '[1,2.5]',
            '{{"[1,2]","[3]"}}', '{{a:b}}', '[1]', '{{[1]}}')"#
    ))
    .await;
    let engine = rig.run(rig.config(&["things"])).await;
    rig.sql("INSERT INTO things SELECT id + 1, h, hh, g, gg, p, v, vv, b, o, oo FROM things").await;
    rig.delivered().await;
    let place = json!({"type": "Point", "coordinates": [13.0, 52.5]});
    for id in [1, 2] {
        let expected = json!({"id": id, "h": {"a": "1"}, "hh": [{"a": null}, null], "g": place, "gg": [place, null], "p": place,
            "v": [1, 2.5], "vv": [[1, 2], [3]], "b": "{a:b}", "o": "[1]", "oo": ["[1]"]});
        assert_eq!(rig.documents("things")[&id.to_string()], expected);
    }
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_of_another_encoding() {
    let rig = Rig::encoded("LATIN1").await;
    rig.sql("CREATE TABLE words (id text PRIMARY KEY, \"schön\" text, j jsonb); INSERT INTO words VALUES ('é', 'ÿ¼', '{\"ü\": \"ß\"}')")
        .await;
    let engine = rig.run(rig.config(&["words"])).await;
    rig.sql("INSERT INTO words SELECT id || 'ö', \"schön\", j FROM words").await;
    rig.equal("words").await;
    assert_eq!(rig.documents("words")["éö"]["schön"], "ÿ¼");
    stop(engine).await;
}

/// A database in `SQL_ASCII` holds whatever it was given. Asked for UTF-8, PostgreSQL would send none of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_no_encoding() {
    let rig = Rig::encoded("SQL_ASCII").await;
    rig.sql(
        r"CREATE TABLE words (id text PRIMARY KEY, word text, large text, n int);
              ALTER TABLE words ALTER large SET STORAGE EXTERNAL;
              INSERT INTO words VALUES ('plain', 'é', '', 1), ('odd', E'a\xFF\n\xC3', '', 1)",
    )
    .await;
    let engine = rig.run(rig.config(&["words"])).await;
    // A key as well: its document has the digest of its bytes as id.
    rig.sql(r"INSERT INTO words SELECT id || E'\xE9', word, repeat('long ', 2000), n FROM words").await;
    rig.sql("UPDATE words SET n = 2; DELETE FROM words WHERE id = 'plain'").await;
    rig.delivered().await;
    let documents = rig.documents("words");
    let ids: Vec<String> = ["odd".to_owned()].into_iter().chain(["plain", "odd"].map(|id| sha256(id, 0xE9))).collect();
    assert_eq!(documents.keys().collect::<BTreeSet<_>>(), ids.iter().collect());
    let row = |id: &str, large: &str| json!({"id": id, "word": "a\u{FFFD}\n\u{FFFD}", "large": large, "n": 2});
    assert_eq!(documents["odd"], row("odd", ""));
    assert_eq!(documents[&ids[2]], row("odd\u{FFFD}", &"long ".repeat(2000)));
    stop(engine).await;
}

fn sha256(text: &str, end: u8) -> String {
    let bytes: Vec<u8> = text.bytes().chain([end]).collect();
    pgtide::sink::document_id(&bytes).into_owned()
}
