//! A table with a column of every type, of arrays of each, and of what one can make of them.

use pgtide::table::{quote_identifier, quote_literal};

use super::generator::Values;
use super::support::pipeline::Rig;

/// A type: its name in SQL, the difference that its documents have from `to_jsonb`, and values worth a look.
type Known = (&'static str, &'static str, &'static [&'static str]);

/// `form`: `number`, `moment`, `oid`, `bytes` as in `DIFFERENCES`; `text`: the text that PostgreSQL prints; ``: none.
const BUILT_IN: &[Known] = &[
    ("bool", "", &["t", "f"]),
    ("int2", "", &["-32768", "32767"]),
    ("int4", "", &["-2147483648", "2147483647"]),
    ("int8", "", &["-9223372036854775808", "9223372036854775807", "9007199254740993"]),
    (
        "numeric",
        "number",
        &[
            "0",
            "-0.00",
            "12345678901234567890.1234567890",
            "1e-30",
            "NaN",
            "Infinity",
            "-Infinity",
            "1e400",
            "1e999",
            "-1e999",
            "1e5000",
        ],
    ),
    ("float4", "number", &["0.1", "3.4028235e38", "1e-45", "NaN", "Infinity", "-Infinity", "-0", "16777216"]),
    ("float8", "number", &["0.1", "1.7976931348623157e308", "5e-324", "NaN", "Infinity", "-Infinity", "-0", "1e22"]),
    ("text", "", &["", "\\N", "NULL", "a\tb\n\\\"\u{e9}\u{2028}\u{1F600}", "\u{1}\u{8}\u{c}\u{1f}\u{7f}"]),
    ("varchar", "", &["", " a "]),
    ("bpchar", "", &["", "a  "]),
    ("\"char\"", "", &["", "a", "\\"]),
    ("name", "", &["", "a name"]),
    ("bytea", "bytes", &["\\x", "\\x00ff", "\\x5c5c"]),
    (
        "json",
        "",
        &["{\"b\" :  1, \"a\": [1.50, \"\\u0041\", null], \"b\":2}", " 12345678901234567890.10 ", "[\n1,\r\n2\n]"],
    ),
    ("jsonb", "", &["{\"b\": 1e3, \"a\": {}}", "17.50", "null", "12345678901234567890.10", "\"\\n\""]),
    (
        "date",
        "moment",
        &["2024-02-29", "infinity", "-infinity", "0044-03-15 BC", "12024-01-01", "5874897-12-31", "0001-01-01"],
    ),
    (
        "timestamp",
        "moment",
        &["2024-01-01 10:00:00.5", "infinity", "294276-12-31 23:59:59.999999", "4713-01-01 00:00 BC"],
    ),
    (
        "timestamptz",
        "moment",
        &["2024-01-01 10:00:00+02", "-infinity", "0001-01-01 00:00+15", "10000-01-01 00:00:00.000001+00"],
    ),
    ("time", "", &["00:00", "24:00", "12:34:56.789"]),
    ("timetz", "", &["10:00:00+02", "23:59:59.999999-15:59", "00:00+05:30"]),
    ("interval", "", &["0", "1 day", "-1 year 2 mons -3 days 04:05:06.7", "178000000 years"]),
    ("uuid", "", &["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"]),
    ("inet", "", &["10.0.0.1/8", "::1", "192.168.0.1", "2001:db8::1/64"]),
    ("cidr", "", &["10.0.0.0/8", "2001:db8::/32"]),
    ("macaddr", "", &["08:00:2b:01:02:03"]),
    ("macaddr8", "", &["08:00:2b:01:02:03:04:05"]),
    ("money", "", &["12.50", "-92233720368547758.08"]),
    ("xml", "", &["<a b=\"1\">\u{e9}</a>", "<?xml version=\"1.0\" encoding=\"LATIN1\"?><a/>", "", "plain"]),
    ("bit(3)", "", &["101"]),
    ("varbit", "", &["", "1010101"]),
    ("point", "", &["(1,2)", "(NaN,Infinity)", "(1e300,-0)"]),
    ("lseg", "", &["[(0,0),(1,1)]"]),
    ("path", "", &["[(0,0),(1,1)]", "((0,0),(1,1))"]),
    ("box", "", &["(1,1),(0,0)"]),
    ("polygon", "", &["((0,0),(1,1),(1,0))"]),
    ("line", "", &["{1,2,3}"]),
    ("circle", "", &["<(1,2),3>"]),
    ("tsvector", "", &["'a':1A 'fat':2B,4C", "'it''s' 'b\\\\c'", ""]),
    ("tsquery", "", &["'a' & !'b'", "'a' <-> 'b':*"]),
    ("jsonpath", "", &["$.\"a\"[*]?(@ > 1)"]),
    ("int4range", "", &["[1,10)", "empty", "(,5]", "(,)"]),
    ("int8range", "", &["[1,10)"]),
    ("numrange", "", &["[1.10,2.20]", "[NaN,)"]),
    ("tsrange", "", &["[\"2024-01-01 00:00\",infinity]"]),
    ("tstzrange", "", &["[\"2024-01-01 00:00+02\",\"2024-01-02 00:00+02\")"]),
    ("daterange", "", &["[2024-01-01,2024-02-01]", "[,infinity]"]),
    ("int4multirange", "", &["{}", "{[1,3),[5,7)}"]),
    ("int8multirange", "", &["{[1,3),[5,7)}"]),
    ("nummultirange", "", &["{[1.5,3.5),(5,)}"]),
    ("tsmultirange", "", &["{[\"2024-01-01 00:00\",\"2024-01-02 00:00\")}"]),
    ("tstzmultirange", "", &["{[\"2024-01-01 00:00+00\",)}"]),
    ("datemultirange", "", &["{[2024-01-01,2024-02-01),[2025-01-01,)}"]),
    ("oid", "oid", &["0", "4294967295"]),
    ("xid", "", &["5"]),
    ("xid8", "", &["18446744073709551615"]),
    ("cid", "", &["5"]),
    ("tid", "", &["(0,1)"]),
    ("regclass", "", &["pg_class", "0", "copied"]),
    ("regproc", "", &["pg_catalog.now"]),
    ("regprocedure", "", &["abs(int4)"]),
    ("regoper", "", &["||/"]),
    ("regoperator", "", &["+(int4,int4)"]),
    ("regtype", "", &["timestamptz[]", "int4"]),
    ("regrole", "", &["pg_monitor"]),
    ("regnamespace", "", &["pg_catalog"]),
    ("regcollation", "", &["\"C\""]),
    ("regconfig", "", &["english"]),
    ("regdictionary", "", &["simple"]),
    ("int2vector", "text", &["", "1 -2"]),
    ("oidvector", "text", &["", "1 2"]),
    ("refcursor", "", &["a cursor"]),
    ("aclitem", "", &["pg_monitor=r/pg_monitor"]),
    ("pg_lsn", "", &["16/B374D848"]),
    ("pg_snapshot", "", &["10:20:10,14,15"]),
    ("txid_snapshot", "", &["10:20:10,14,15"]),
];

/// Of these no table holds a value that somebody wrote.
const NOT_WRITTEN: [&str; 7] = [
    "gtsvector",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_ndistinct",
    "pg_node_tree",
];

const USER_TYPES: &str = r#"
    CREATE TYPE mood AS ENUM ('glad', 'so "so"', E'sad,\né');
    CREATE DOMAIN small AS int;
    CREATE DOMAIN amount AS numeric;
    CREATE DOMAIN instant AS timestamptz;
    CREATE DOMAIN nested AS instant;
    CREATE DOMAIN whole AS int[];
    CREATE DOMAIN moods AS mood[];
    CREATE TYPE pair AS (a int, b text, at timestamptz, n numeric[]);
    CREATE DOMAIN bound AS pair;
    CREATE TYPE pairs AS (one pair, more pair[]);
    CREATE TYPE floats AS RANGE (subtype = float8, multirange_type_name = many_floats)"#;

const USER: &[Known] = &[
    ("mood", "", &["glad", "so \"so\"", "sad,\n\u{e9}"]),
    ("small", "", &["7"]),
    ("amount", "number", &["1.50", "NaN"]),
    ("instant", "moment", &["2024-01-01 10:00+02", "infinity"]),
    ("nested", "moment", &["2024-01-01 10:00+02", "0044-03-15 00:00+00 BC"]),
    ("whole", "", &["{}", "{1,NULL,3}", "{{1,2},{3,4}}"]),
    ("moods", "", &["{glad,\"so \\\"so\\\"\",NULL}"]),
    (
        "pair",
        "text",
        &["(1,\"a \"\"b\"\",c\\\\\",\"2024-01-01 10:00:00+02\",\"{1.0,NULL}\")", "(,,,)", "(,\"\",infinity,{})"],
    ),
    ("bound", "text", &["(1,b,,)"]),
    ("pairs", "text", &["(\"(1,\"\"x y\"\",,)\",\"{\"\"(2,,,)\"\"}\")"]),
    ("floats", "", &["[1.5,2.5)", "[NaN,]"]),
    ("many_floats", "", &["{[1.5,2.5),[3,)}"]),
];

/// Extension, and its types. What the server does not have is told, and left to a server that has it.
const EXTENSIONS: &[(&str, &[Known])] = &[
    ("hstore", &[("hstore", "", &["", "a=>1, b=>NULL", "\"a \\\"b\\\\\"=>\"NULL\", \"\"=>\"\""])]),
    ("citext", &[("citext", "", &["", "Case"])]),
    (
        "ltree",
        &[
            ("ltree", "", &["", "top.science"]),
            ("lquery", "", &["top.*{1,2}.a|b"]),
            ("ltxtquery", "", &["europe & !russia"]),
        ],
    ),
    ("cube", &[("cube", "", &["(1, 2),(3, 4)", "(0.5)"])]),
    ("seg", &[("seg", "", &["1.50 .. 2.50", "~5"])]),
    ("isn", &[("isbn13", "", &["978-0-393-04002-9"])]),
    ("lo", &[("lo", "oid", &["42"])]),
];

struct Column {
    name: String,
    /// The type of its values, or of their elements, without a length.
    of: String,
    sql: String,
    form: &'static str,
    /// What it holds, or what its elements are.
    values: Vec<String>,
    /// Of an array: what parts its elements.
    delimiter: Option<char>,
}

/// The table, as created.
pub(crate) struct Table {
    columns: Vec<Column>,
    built_in: Vec<String>,
}

impl Table {
    pub(crate) async fn create(rig: &Rig, name: &str) -> Self {
        rig.sql(USER_TYPES).await;
        let mut known: Vec<Known> = BUILT_IN.iter().chain(USER).copied().collect();
        for (extension, types) in EXTENSIONS {
            let there = "SELECT count(*) FROM pg_available_extensions WHERE name = '";
            if rig.count(&format!("{there}{extension}'")).await == 0 {
                println!("LEFT OUT: this server does not have the extension {extension}");
                continue;
            }
            rig.sql(&format!("CREATE EXTENSION {extension}")).await;
            known.extend_from_slice(types);
        }
        let mut columns = Vec::new();
        for &(sql, form, values) in &known {
            let bare = sql.split('(').next().unwrap().trim_matches('"').to_owned();
            let values: Vec<String> = values.iter().map(|value| (*value).to_owned()).collect();
            // Elements that are arrays themselves are written as PostgreSQL prints them.
            let elements = if matches!(bare.as_str(), "whole" | "moods") { "text" } else { form };
            let delimiter = if bare == "box" { ';' } else { ',' };
            for array in [None, Some(delimiter)] {
                columns.push(Column {
                    name: format!("{bare}{}", if array.is_some() { "_array" } else { "" }),
                    of: bare.clone(),
                    sql: format!("{sql}{}", if array.is_some() { "[]" } else { "" }),
                    form: if array.is_some() { elements } else { form },
                    values: values.clone(),
                    delimiter: array,
                });
            }
        }
        let mut sql = format!("CREATE TABLE {name} (id int PRIMARY KEY, touched int, large text");
        for column in &columns {
            sql.push_str(&format!(", {} {}", quote_identifier(&column.name), column.sql));
        }
        rig.sql(&format!("{sql}); ALTER TABLE {name} ALTER large SET STORAGE EXTERNAL")).await;
        let built_in = BUILT_IN.iter().map(|known| known.0.split('(').next().unwrap().trim_matches('"').to_owned());
        Self { columns, built_in: built_in.collect() }
    }

    /// Each of the server's own types is in the table.
    pub(crate) async fn nothing_is_left_out(&self, rig: &Rig) {
        let names = "SELECT string_agg(typname, ' ' ORDER BY typname) FROM pg_type
                     WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype IN ('b', 'r', 'm') AND typname NOT LIKE '\\_%'";
        let all = rig.text(names).await;
        let known = |name: &&str| self.built_in.iter().any(|known| known == name) || NOT_WRITTEN.contains(name);
        let missing: Vec<&str> = all.split(' ').filter(|name| !known(name)).collect();
        assert!(missing.is_empty(), "types without a column: {missing:?}");
    }

    /// What a row's document has to be, of the row `t`.
    pub(crate) fn expected(&self) -> String {
        let texts = self.columns.iter().filter(|column| column.form == "text").map(|column| {
            let (name, array) = (quote_identifier(&column.name), if column.delimiter.is_some() { "[]" } else { "" });
            format!("|| jsonb_build_object({}, t.{name}::text{array})", quote_literal(&column.name))
        });
        let forms = self.columns.iter().filter(|column| !matches!(column.form, "" | "text"));
        let forms = forms.map(|column| format!("WHEN {} THEN '{}'", quote_literal(&column.name), column.form));
        format!(
            "(SELECT jsonb_object_agg(key, documented(CASE key {} ELSE '' END, value))
              FROM jsonb_each(to_jsonb(t) {}))",
            forms.collect::<Vec<_>>().join(" "),
            texts.collect::<Vec<_>>().join(" ")
        )
    }

    /// Rows with every value of every list, and `more` with others.
    pub(crate) async fn fill(&self, rig: &Rig, table: &str, values: &mut Values, more: usize) {
        let listed = self.columns.iter().map(|column| column.values.len() + 1).max().unwrap();
        for row in 0..listed + more {
            let large = format!("repeat(md5('{row}'), 300)");
            let mut fields = vec![row.to_string(), "0".to_owned(), large];
            for column in &self.columns {
                let text = match (column.delimiter, column.values.get(row)) {
                    _ if row == column.values.len() => None,
                    (None, Some(value)) => Some(value.clone()),
                    (None, None) => (!values.one_in(8)).then(|| values.of(&column.of, &column.values)),
                    (Some(delimiter), _) => Some(array(column, delimiter, values)),
                };
                fields.push(text.map_or_else(|| "NULL".to_owned(), |text| quote_literal(&text)));
            }
            rig.sql(&format!("INSERT INTO {table} VALUES ({})", fields.join(", "))).await;
        }
    }
}

/// Empty, or of one or two dimensions, with bounds or without.
fn array(column: &Column, delimiter: char, values: &mut Values) -> String {
    let element = |values: &mut Values| {
        if values.one_in(5) {
            return "NULL".to_owned();
        }
        let value = match values.below(2) {
            0 => column.values[values.below(column.values.len())].clone(),
            _ => values.of(&column.of, &column.values),
        };
        format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
    };
    let (rows, width) = (values.below(3), 1 + values.below(3));
    let list = |values: &mut Values| {
        let elements: Vec<String> = (0..width).map(|_| element(values)).collect();
        format!("{{{}}}", elements.join(&delimiter.to_string()))
    };
    match rows {
        0 => "{}".to_owned(),
        1 if values.one_in(2) => format!("[0:{}]={}", width - 1, list(values)),
        1 => list(values),
        _ => format!("{{{}{delimiter}{}}}", list(values), list(values)),
    }
}
