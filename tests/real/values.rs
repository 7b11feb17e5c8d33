//! Values of every type, the odd ones among them, in an index of pgtide's own making: no mapping refuses any of them.

use super::generator::Values;
use super::scene::Scene;
use super::support::pipeline::stop;
use super::table::Table;

/// Types of extensions that a server may lack, by their names; `vector(n)` has its dimensions as PostgreSQL's `bit(n)`.
const STAND_INS: [(&str, &str); 2] = [("geometry", ""), ("vector", ", TYPMOD_IN = dimensions")];

/// Beyond what the field of the column takes, one by one: column, and its value in SQL.
const BEYOND: &[(&str, &str)] = &[
    ("numeric", "repeat('9', 1001)::numeric"),
    ("numeric", "-repeat('9', 999)::numeric"),
    ("numeric", "(repeat('9', 100000) || '.5')::numeric"),
    ("numeric", "('0.' || repeat('0', 16000) || '1')::numeric"),
    ("numeric_array", "ARRAY[repeat('9', 2000)::numeric, NULL, 'NaN', 1e400]"),
    ("eighteen", "999999999999999999"),
    ("price", "-9999999999.99"),
    ("price", "'NaN'"),
    ("precise", "(repeat('9', 300) || '.' || repeat('9', 300))::numeric"),
    ("inet", "'10.0.0.1/8'"),
    ("inet", "'::ffff:10.0.0.1/100'"),
    ("inet_array", "'{10.0.0.1/8,::1,2001:db8::1/64}'"),
    ("cidr", "'::ffff:1.2.3.0/120'"),
    ("cidr", "'::ffff:1.2.3.4/128'"),
    ("cidr", "'0.0.0.0/0'"),
    ("cidr", "'::/0'"),
    ("cidr_array", "'{::ffff:0:0/96,10.0.0.0/8}'"),
    ("date", "'5874897-12-31'"),
    ("timestamp", "'294276-12-31 23:59:59.999999'"),
    ("timestamptz_array", "'{infinity,-infinity,10000-01-01,0001-01-01 BC}'"),
    ("float8", "'1.7976931348623157e308'"),
    ("float4", "'3.4028235e38'"),
    ("text", "repeat('x', 40000)"),
    ("text", "repeat('\u{20ac}', 8191)"),
    ("text", "repeat('\u{1f600}', 8192)"),
    ("text_array", "ARRAY[repeat('\u{20ac}', 20000), '']"),
    ("varchar", "repeat('\u{20ac}', 10923)"),
    ("bpchar", "repeat(' ', 40000) || 'x'"),
    ("citext", "repeat('\u{130}', 8191)"),
    ("citext", "repeat('\u{23a}', 16000)"),
    ("xml", "('<a>' || repeat('word ', 20000) || repeat('x', 40000) || '</a>')::xml"),
    ("tsvector", "to_tsvector('simple', (SELECT string_agg('word' || n, ' ') FROM generate_series(1, 20000) n))"),
    ("tsquery", "(SELECT string_agg('word' || n, ' | ') FROM generate_series(1, 100) n)::tsquery"),
    ("bytea", "decode(repeat('00ff', 500000), 'hex')"),
    ("varbit", "repeat('10', 40000)::varbit"),
    ("path", "('[' || repeat('(1,2),', 20000) || '(3,4)]')::path"),
    ("int4multirange", "(SELECT range_agg(int4range(2 * n, 2 * n + 1)) FROM generate_series(1, 9000) n)"),
    ("int4_array", "array_fill(7, ARRAY[200, 200])"),
    ("jsonb", "jsonb_build_object('', 1, ' ', 2, '.', 3, 'a.b', 4, 'a', repeat('x', 40000))"),
    ("jsonb", "'17'"),
    ("jsonb", "'[\"text\", {\"a\": 1}, {\"a\": \"no number\"}, 1e400]'"),
    ("json", "'{\"a\": {\"b\": 1}}'"),
    ("hstore", "hstore('key', repeat('x', 40000))"),
    ("hstore", "hstore(repeat('k', 40000), 'value')"),
    ("hstore", "hstore(repeat('\u{20ac}', 8000), repeat('\u{20ac}', 8191))"),
    ("hstore", "hstore('a.b', '1') || hstore('a', '2') || hstore('', '3') || hstore(' ', NULL)"),
    ("ltree", "(SELECT string_agg('label' || n, '.') FROM generate_series(1, 6000) n)::ltree"),
    ("mood_array", "array_fill('glad'::mood, ARRAY[9000])"),
    ("pair", "ROW(1, repeat('x', 40000), NULL, NULL)::pair"),
    ("place", "'0101000020E61000000000000000588F400000000000C05840'"),
    ("place", "'0101000020110F00000000000000588F400000000000C05840'"),
    ("place", "'no geometry'"),
    ("v", "'[0,0,0]'"),
    ("v", "'[3e38,-3e38,1e-45]'"),
];

pub async fn of_every_type(scene: Scene) {
    let rig = &scene.rig;
    // The values know a table of that name.
    rig.sql("DROP TABLE items; CREATE TABLE copied ()").await;
    let table = Table::create(rig, "items").await;
    rig.sql("CREATE FUNCTION dimensions(cstring[]) RETURNS int LANGUAGE internal IMMUTABLE STRICT AS 'bittypmodin'")
        .await;
    for (name, more) in STAND_INS {
        rig.sql(&format!(
            "CREATE TYPE {name};
             CREATE FUNCTION {name}_in(cstring) RETURNS {name} LANGUAGE internal IMMUTABLE STRICT AS 'textin';
             CREATE FUNCTION {name}_out({name}) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
             CREATE TYPE {name} (INPUT = {name}_in, OUTPUT = {name}_out, LIKE = text {more})"
        ))
        .await;
    }
    rig.sql(
        "ALTER TABLE items ADD eighteen numeric(18,0), ADD price numeric(12,2), ADD precise numeric(600,300),
                           ADD place geometry, ADD v vector(3)",
    )
    .await;
    table.fill(rig, "items", &mut Values::seeded(fastrand::u64(..)), 10).await;
    // What the parser refuses, not a mapping (docs/types.md): keys that occur twice.
    rig.sql("UPDATE items SET json = json::jsonb::json, json_array = json_array::jsonb[]::json[]").await;
    // OpenSearch 3.6.0 refuses that one, wherever it is.
    let deep =
        (!scene.installation().is_opensearch()).then_some(("jsonb", "(repeat('[', 500) || repeat(']', 500))::jsonb"));
    for (at, (column, value)) in BEYOND.iter().copied().chain(deep).enumerate() {
        let column = pgtide::table::quote_identifier(column);
        rig.sql(&format!("INSERT INTO items (id, {column}) VALUES ({}, {value})", 10_000 + at)).await;
    }

    let config = scene.config();
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    scene.nothing_is_refused();
    scene.equal(&config).await;
    rig.sql("UPDATE items SET touched = 1").await;
    scene.equal(&config).await;
    scene.nothing_is_refused();
    stop(engine).await;
}
