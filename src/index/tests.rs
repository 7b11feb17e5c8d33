#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::{Value, json};

use super::compare::compare;
use super::*;
use crate::config::JsonAs;
use crate::postgres::column_types::ColumnType;
use crate::sink::ServerInfo;
use crate::table::TableId;

fn product(distribution: &str, version: &str) -> Product {
    let version = Some(version.to_owned()).filter(|version| !version.is_empty());
    Product::of(&ServerInfo { distribution: distribution.to_owned(), version, cluster: String::new() })
}

fn column(name: &str, base: &str, modifier: i32) -> ColumnType {
    let extensions = ["citext", "hstore", "vector", "halfvec", "geometry", "ltree"];
    ColumnType {
        name: name.to_owned(),
        sql: base.to_owned(),
        base: base.to_owned(),
        built_in: !extensions.contains(&base),
        kind: 'b',
        modifier,
        arrays: 0,
    }
}

/// `numeric(p,s)`.
fn packed(precision: i32, scale: i32) -> i32 {
    (precision << 16 | scale & 0x7ff) + 4
}

fn all() -> Vec<ColumnType> {
    let simple = [
        "int2",
        "int4",
        "int8",
        "oid",
        "float4",
        "float8",
        "bool",
        "text",
        "varchar",
        "bpchar",
        "name",
        "uuid",
        "date",
        "timestamp",
        "timestamptz",
        "time",
        "interval",
        "json",
        "jsonb",
        "bytea",
        "bit",
        "inet",
        "cidr",
        "macaddr",
        "money",
        "xml",
        "int4range",
        "point",
        "tsvector",
        "tsquery",
        "pg_lsn",
        "int2vector",
        "citext",
        "hstore",
        "geometry",
        "ltree",
    ];
    let mut columns: Vec<_> = simple.iter().map(|base| column(base, base, -1)).collect();
    columns.push(column("numeric", "numeric", -1));
    columns.push(column("numeric(12,2)", "numeric", packed(12, 2)));
    columns.push(column("numeric(18,0)", "numeric", packed(18, 0)));
    columns.push(column("numeric(10,-5)", "numeric", packed(10, -5)));
    columns.push(column("numeric(20,2)", "numeric", packed(20, 2)));
    columns.push(column("numeric(2,4)", "numeric", packed(2, 4)));
    columns.push(column("vector(3)", "vector", 3));
    columns.push(column("vector", "vector", -1));
    let enumeration = ColumnType { kind: 'e', built_in: false, ..column("mood", "mood", -1) };
    columns.push(ColumnType { arrays: 1, ..enumeration.clone() });
    columns.push(ColumnType { name: "composite".to_owned(), kind: 'c', ..enumeration });
    columns.push(ColumnType { name: "int4[]".to_owned(), arrays: 1, ..column("", "int4", -1) });
    columns.push(ColumnType { name: "domain[]".to_owned(), arrays: 2, ..column("", "int4", -1) });
    // Somebody's own type with a name of PostgreSQL's.
    columns.push(ColumnType { built_in: false, ..column("own int4", "int4", -1) });
    columns
}

fn lines(product: &Product, json_as: JsonAs) -> String {
    let plan = Plan::new(TableId::new("public", "t"), "t", product, json_as, &all());
    plan.fields.iter().map(|(name, _, field)| format!("{name:<16}{field}\n")).collect()
}

#[test]
fn every_type_has_its_field() {
    insta::assert_snapshot!(lines(&product("elasticsearch", "9.5.3"), JsonAs::Stored));
}

#[test]
fn products_differ_in_what_is_said_of_them() {
    let newest = lines(&product("elasticsearch", "9.5.3"), JsonAs::Stored);
    let differs = |product: &Product, json_as| -> String {
        let other = lines(product, json_as);
        newest.lines().zip(other.lines()).filter(|(one, two)| one != two).map(|(_, two)| format!("{two}\n")).collect()
    };
    let mut without = product("elasticsearch", "9.5.3");
    assert!(without.learn("The mapper type [scaled_float] declared on field [x] does not exist."));
    assert!(without.learn("No handler for type [geo_shape] declared on field [x]"));
    assert!(!without.learn("No handler for type [geo_shape] declared on field [x]"), "again: nothing is left to try");
    assert!(!without.learn("mapper [scaled_float] cannot be changed"));
    let cases: [(&str, Product, JsonAs); 7] = [
        ("7.17.29", product("elasticsearch", "7.17.29"), JsonAs::Stored),
        ("8.19.21", product("elasticsearch", "8.19.21"), JsonAs::Stored),
        ("unknown", product("elasticsearch", ""), JsonAs::Stored),
        ("9.5.3, flattened", product("elasticsearch", "9.5.3"), JsonAs::Flattened),
        ("OpenSearch 3.6.0", product("opensearch", "3.6.0"), JsonAs::Stored),
        ("OpenSearch 2.6.0, flattened", product("opensearch", "2.6.0"), JsonAs::Flattened),
        ("without two types", without, JsonAs::Stored),
    ];
    let mut shown: String =
        cases.iter().map(|(name, product, json_as)| format!("{name}\n{}\n", differs(product, *json_as))).collect();
    shown.push_str("OpenSearch 3.6.0, flattened\n");
    shown.push_str(&differs(&product("opensearch", "3.6.0"), JsonAs::Flattened));
    insta::assert_snapshot!(shown);
}

fn plan(columns: &[ColumnType]) -> Plan {
    Plan::new(TableId::new("public", "t"), "t", &product("elasticsearch", "9.5.3"), JsonAs::Stored, columns)
}

#[test]
fn an_index_is_made_with_what_tells_whose_it_is() {
    let body = plan(&[column("id", "int4", -1), column("a.b", "text", -1), column("a.c.d", "bool", -1)]).body("slot");
    insta::assert_snapshot!(serde_json::to_string_pretty(&body).unwrap());
    let mark = Mark::of(&body["mappings"]).unwrap();
    assert_eq!(mark, Mark::new("slot", &TableId::new("public", "t")));
    assert_eq!(Mark::of(&json!({"_meta": {"other": 1}})), None);
}

#[test]
fn a_wide_table_raises_the_limit_of_fields_and_others_do_not() {
    let wide = |base: &str, count: usize| {
        let columns: Vec<_> = (0..count).map(|n| column(&format!("c{n}"), base, -1)).collect();
        plan(&columns).body("slot")["settings"]["index.mapping.total_fields.limit"].clone()
    };
    assert_eq!(wide("int4", 1000), Value::Null);
    assert_eq!(wide("int4", 1001), 3000);
    // Each has a field within it.
    assert_eq!(wide("text", 500), Value::Null);
    assert_eq!(wide("text", 1600), 5000);
}

#[test]
fn what_an_index_lacks_and_what_it_has_otherwise() {
    let columns = [
        column("id", "int4", -1),
        column("a.b", "text", -1),
        column("new", "date", -1),
        column("j", "jsonb", -1),
        column("v", "numeric", packed(12, 2)),
    ];
    let mut mappings = json!({"dynamic": "false", "properties": {
        "id": {"type": "integer"}, "a": {"properties": {"b": {"type": "text", "fields": {"keyword": {"type": "keyword"}}}}},
        "j": {"properties": {"x": {"type": "long"}}}, "v": {"type": "scaled_float", "scaling_factor": 100.0}}});
    let found = compare(&plan(&columns), &mappings);
    let short: Vec<_> = found
        .iter()
        .map(|found| (found.column.as_str(), found.wanted.as_str(), found.found.as_deref(), found.refused))
        .collect();
    assert_eq!(
        short,
        [
            ("a.b", "keyword", Some("text"), false),
            ("new", "date", None, false),
            ("j", "stored only", Some("object"), false)
        ]
    );
    mappings["dynamic"] = json!("strict");
    let refused: Vec<_> = compare(&plan(&columns), &mappings).into_iter().filter(|found| found.refused).collect();
    assert_eq!(refused.iter().map(|found| found.column.as_str()).collect::<Vec<_>>(), ["new"]);
}

#[test]
fn a_field_that_stands_in_for_a_type_that_is_not_there_is_no_difference() {
    let client = crate::sink::Client::new(&crate::config::Elasticsearch {
        urls: vec!["http://127.0.0.1:1".to_owned()],
        ..Default::default()
    })
    .unwrap();
    let indices = Indices::new(&client, product("elasticsearch", "9.5.3"), "slot", JsonAs::Stored);
    let columns = [column("v", "numeric", packed(12, 2)), column("w", "numeric", packed(12, 2))];
    let found = Found::new("t-000001", json!({"properties": {"v": {"type": "keyword"}, "w": {"type": "float"}}}));
    let differences = indices.compare(&found, &plan(&columns), &columns);
    assert_eq!(differences.iter().map(|found| found.column.as_str()).collect::<Vec<_>>(), ["w"]);
}
