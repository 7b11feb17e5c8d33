#![allow(clippy::unwrap_used)]

mod refused;

use std::collections::BTreeSet;

use proptest::prelude::{any, prop, prop_assert, proptest};

use super::*;

const SAMPLE: &str = include_str!("../../../assets/pgtide.yaml");
const MANUAL: &str = include_str!("../../../docs/configuration.md");

/// Every key that is accepted, with a value that is not the default where that shows.
const EVERY_KEY: &str = r#"
cdc:
  host: db.example.org
  port: 6432
  username: u
  password: pg-secret
  database: d
  sslMode: verify-full
  sslRootCert: /certs/ca.pem
  sslCert: /certs/client.pem
  sslKey: /certs/client.key
  debugMode: true
  metric: {port: 9090}
  logger: {level: WARN}
  publication:
    name: p
    createIfNotExists: true
    operations: [insert, UPDATE, Delete]
    tables:
      - {name: a, schema: s, replicaIdentity: FULL, partitioned: true, snapshotPartitionStrategy: integer_range, queryCondition: "x = ';'"}
      - {name: b, replicaIdentity: USING INDEX, replicaIdentityIndex: b_key, columns: [id, name], snapshotPartitionStrategy: offset}
      - {name: beat}
  slot: {name: s_1, createIfNotExists: true, slotActivityCheckerInterval: 3000, protoVersion: 2, failover: true, acceptTimeline: 3}
  snapshot:
    enabled: yes
    mode: initial
    chunkSize: 5
    claimTimeout: 1m
    releaseAfter: 2m
    heartbeatInterval: 1s
    instanceId: i
    id: job
    tables: [{name: a, schema: s}, {name: b}]
    queryCondition: active
    resnapshot: true
    workers: 3
    onSchemaChange: warn
  heartbeat: {table: {name: beat, schema: public}, interval: 2s}
  extensionSupport: {enableTimescaleDB: false, enableTimeScaleDB: false}
elasticsearch:
  urls: [https://one:9200/, "http://two:9200/prefix"]
  username: e
  password: es-secret
  ssl: {certificateAuthorities: /ca.pem, certificate: /c.pem, key: /k.pem, verificationMode: certificate}
  proxy: http://proxy:3128
  proxyUsername: p
  proxyPassword: proxy-secret
  connectTimeout: 2s
  requestTimeout: 5m
  tableIndexMapping: {s.a: index-a, b: index-b}
  batchSizeLimit: 7
  batchByteSizeLimit: 1.5mb
  batchTickerDuration: 250ms
  concurrentRequest: 3
  compressionEnabled: true
  maxConnsPerHost: 8
  maxIdleConnDuration: 1h
  deadLetterFile: /var/lib/pgtide/dead.ndjson
  numericAs: string
  tablesWithoutKey: hash
  manageIndices: false
  jsonAs: flattened
  discoverNodesInterval: 5m
  disableDiscoverNodesOnStart: true
  typeName: ""
  version: "7.17.10"
"#;

/// The smallest file that is accepted. Tests put a key in, take one out, or change one.
const SMALL: &str = "cdc:
  host: h
  username: u
  database: d
  publication:
    name: p
  slot:
    name: s
elasticsearch:
  urls: [http://localhost:9200]
  tableIndexMapping:
    public.users: users
";

fn env(name: &str) -> Option<String> {
    match name {
        "PGTIDE_PORT" => Some("7000".to_owned()),
        "PGTIDE_SECRET" => Some("from: {the, environment".to_owned()),
        _ => None,
    }
}

fn parse(text: &str) -> Result<Loaded, ConfigError> {
    Config::parse(text, "t.yaml", &env)
}

fn errors(text: &str) -> String {
    parse(text).map(|loaded| panic!("accepted: {loaded:#?}")).unwrap_err().to_string()
}

fn table(schema: &str, name: &str) -> Table {
    Table {
        id: TableId::new(schema, name),
        replica_identity: None,
        columns: vec![],
        partitioned: false,
        strategy: Strategy::Auto,
        query_condition: None,
    }
}

#[test]
fn the_sample_means_what_it_says() {
    let expected = Config {
        cdc: Cdc {
            host: "localhost".into(),
            port: 5432,
            username: "es_cdc_user".into(),
            password: Secret("es_cdc_pass".into()),
            database: "es_cdc_db".into(),
            metric_port: Some(8081),
            publication: Publication {
                name: "es_cdc_publication".into(),
                create_if_not_exists: true,
                operations: vec![Operation::Insert, Operation::Update, Operation::Delete, Operation::Truncate],
                tables: vec![table("public", "users"), table("public", "books")],
            },
            slot: Slot {
                name: "es_cdc_slot".into(),
                create_if_not_exists: true,
                activity_checker_interval: Duration::from_secs(3),
                ..Slot::default()
            },
            snapshot: Snapshot {
                enabled: true,
                mode: Mode::Initial,
                chunk_size: 1000,
                claim_timeout: Duration::from_secs(30),
                release_after: Duration::from_secs(600),
                heartbeat_interval: Duration::from_secs(5),
                ..Snapshot::default()
            },
            ..Cdc::default()
        },
        elasticsearch: Elasticsearch {
            urls: vec!["http://localhost:9200".into()],
            username: "elastic".into(),
            password: Secret("es_cdc_es_pass".into()),
            table_index_mapping: [("users", "users"), ("books", "books")]
                .map(|(name, index)| (TableId::new("public", name), index.to_owned()))
                .into(),
            batch_size_limit: 10_000,
            batch_ticker_duration: Duration::from_millis(100),
            ..Elasticsearch::default()
        },
    };
    assert_eq!(parse(SAMPLE).unwrap(), Loaded { config: expected, warnings: vec![] });
}

#[test]
fn every_key_is_read() {
    let Loaded { config, warnings } = parse(EVERY_KEY).unwrap();
    let expected = Config {
        cdc: Cdc {
            host: "db.example.org".into(),
            port: 6432,
            username: "u".into(),
            password: Secret("pg-secret".into()),
            database: "d".into(),
            ssl_mode: SslMode::VerifyFull,
            ssl_root_cert: Some("/certs/ca.pem".into()),
            ssl_cert: Some("/certs/client.pem".into()),
            ssl_key: Some("/certs/client.key".into()),
            debug_mode: true,
            metric_port: Some(9090),
            log_level: LogLevel::Warn,
            publication: Publication {
                name: "p".into(),
                create_if_not_exists: true,
                operations: vec![Operation::Insert, Operation::Update, Operation::Delete],
                tables: vec![
                    Table {
                        replica_identity: Some(ReplicaIdentity::Full),
                        partitioned: true,
                        strategy: Strategy::IntegerRange,
                        query_condition: Some("x = ';'".into()),
                        ..table("s", "a")
                    },
                    Table {
                        replica_identity: Some(ReplicaIdentity::UsingIndex("b_key".into())),
                        columns: vec!["id".into(), "name".into()],
                        strategy: Strategy::Offset,
                        ..table("public", "b")
                    },
                    table("public", "beat"),
                ],
            },
            slot: Slot {
                name: "s_1".into(),
                create_if_not_exists: true,
                activity_checker_interval: Duration::from_secs(3),
                proto_version: 2,
                failover: true,
                accept_timeline: Some(3),
            },
            snapshot: Snapshot {
                enabled: true,
                mode: Mode::Initial,
                chunk_size: 5,
                claim_timeout: Duration::from_secs(60),
                release_after: Duration::from_secs(120),
                heartbeat_interval: Duration::from_secs(1),
                instance_id: Some("i".into()),
                id: Some("job".into()),
                tables: vec![table("s", "a"), table("public", "b")],
                query_condition: Some("active".into()),
                resnapshot: true,
                workers: Some(3),
                on_schema_change: OnSchemaChange::Warn,
            },
            heartbeat: Some(Heartbeat { table: TableId::new("public", "beat"), interval: Duration::from_secs(2) }),
        },
        elasticsearch: Elasticsearch {
            urls: vec!["https://one:9200".into(), "http://two:9200/prefix".into()],
            username: "e".into(),
            password: Secret("es-secret".into()),
            api_key: Secret::default(),
            bearer_token: Secret::default(),
            ssl: Ssl {
                certificate_authorities: Some("/ca.pem".into()),
                certificate: Some("/c.pem".into()),
                key: Some("/k.pem".into()),
                verification_mode: VerificationMode::Certificate,
            },
            proxy: Some("http://proxy:3128".into()),
            proxy_username: "p".into(),
            proxy_password: Secret("proxy-secret".into()),
            connect_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(300),
            table_index_mapping: [
                (TableId::new("s", "a"), "index-a".into()),
                (TableId::new("public", "b"), "index-b".into()),
            ]
            .into(),
            batch_size_limit: 7,
            batch_byte_size_limit: 3 << 19,
            batch_ticker_duration: Duration::from_millis(250),
            concurrent_request: 3,
            compression_enabled: true,
            max_conns_per_host: 8,
            max_idle_conn_duration: Duration::from_secs(3600),
            dead_letter_file: Some("/var/lib/pgtide/dead.ndjson".into()),
            numeric_as: NumericAs::String,
            without_key: WithoutKey::Hash,
            manage_indices: false,
            json_as: JsonAs::Flattened,
        },
    };
    assert_eq!(config, expected);
    let warned: Vec<&str> = warnings.iter().filter_map(|warning| warning.split(':').next()).collect();
    assert_eq!(
        warned,
        [
            "cdc.publication.tables[1].snapshotPartitionStrategy",
            "cdc.slot.protoVersion",
            "elasticsearch.version",
            "elasticsearch.discoverNodesInterval",
            "cdc.publication.operations",
            "cdc.debugMode",
        ]
    );
}

/// The keys of a tree, list positions as `[]`.
fn keys(node: &yaml::Node, path: &str, out: &mut BTreeSet<String>) {
    match &node.kind {
        yaml::Kind::Scalar { .. } => {
            out.insert(path.to_owned());
        }
        yaml::Kind::List(items) if items.iter().all(|item| matches!(item.kind, yaml::Kind::Scalar { .. })) => {
            out.insert(path.to_owned());
        }
        yaml::Kind::List(items) => items.iter().for_each(|item| keys(item, &format!("{path}[]"), out)),
        yaml::Kind::Map(_) if path == "elasticsearch.tableIndexMapping" => {
            out.insert(path.to_owned());
        }
        yaml::Kind::Map(entries) => entries.iter().for_each(|entry| {
            let separator = if path.is_empty() { "" } else { "." };
            keys(&entry.value, &format!("{path}{separator}{}", entry.key), out);
        }),
    }
}

#[test]
fn the_manual_lists_every_key_and_no_other() {
    let mut accepted = BTreeSet::new();
    keys(&yaml::parse(EVERY_KEY).unwrap().unwrap(), "", &mut accepted);
    // An item of snapshot.tables has the keys of publication.tables.
    accepted.retain(|key| !key.starts_with("cdc.snapshot.tables[]"));
    accepted.insert("cdc.snapshot.tables".to_owned());
    // Alternatives to keys that the file above has: tested on their own.
    for key in [
        "cdc.passwordFile",
        "elasticsearch.passwordFile",
        "elasticsearch.apiKey",
        "elasticsearch.apiKeyFile",
        "elasticsearch.bearerToken",
        "elasticsearch.bearerTokenFile",
        "elasticsearch.proxyPasswordFile",
        "cdc.logger.logLevel",
    ] {
        accepted.insert(key.to_owned());
    }
    let documented: BTreeSet<String> = MANUAL
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(key, _)| key.to_owned())
        .collect();
    assert_eq!(documented, accepted);
}

#[test]
fn tables_must_be_published_to_be_copied_or_to_beat() {
    let text = SMALL.replace(
        "    name: p\n",
        "    name: p\n    tables: [{name: users}]\n  heartbeat: {table: {name: beat}}\n  snapshot: {enabled: true, mode: initial, tables: [{name: books}]}\n",
    );
    assert_eq!(
        errors(&text),
        "t.yaml:8:15: cdc.heartbeat.table: public.beat is not in publication.tables: add it, or its writes move no position\n\
         t.yaml:9:44: cdc.snapshot.tables: public.books is not in publication.tables: its changes would be missed"
    );
}

#[test]
fn json_is_read_as_well() {
    let json = "{\n\t\"cdc\": {\n\t\t\"host\": \"h\", \"username\": \"u\", \"database\": \"d\", \"port\": 5433,\n\
                \t\t\"publication\": {\"name\": \"p\"}, \"slot\": {\"name\": \"s\"}, \"heartbeat\": null\n\t},\n\
                \t\"elasticsearch\": {\"urls\": [\"http://localhost:9200\"], \"tableIndexMapping\": {\"public.users\": \"users\"}}\n}\n";
    assert_eq!(parse(json).unwrap().config.cdc.port, 5433);
}

#[test]
fn files_of_other_systems_are_read() {
    let expected = parse(SMALL).unwrap();
    assert_eq!(parse(&SMALL.replace('\n', "\r\n")).unwrap(), expected);
    assert_eq!(parse(&format!("\u{feff}{SMALL}")).unwrap(), expected);
}

#[test]
fn without_a_list_of_tables_the_publication_decides_unless_only_a_copy_is_asked_for() {
    let copy = |mode: &str| {
        let snapshot = format!("  host: h\n  snapshot: {{enabled: true, mode: {mode}, tables: [{{name: books}}]}}\n");
        parse(&SMALL.replace("  host: h\n", &snapshot))
    };
    assert!(copy("initial").is_ok());
    let error = copy("snapshot_only").unwrap_err().to_string();
    assert!(error.contains("public.users: the table is in neither"), "{error}");
    let only = "cdc: {host: h, username: u, database: d, snapshot: {enabled: true, mode: snapshot_only, tables: [{name: users}]}}\n\
                elasticsearch: {urls: [http://h:9200], tableIndexMapping: {users: users}}";
    let Loaded { config, warnings } = parse(only).unwrap();
    assert_eq!((config.mode(), config.cdc.slot.name.as_str()), (Mode::SnapshotOnly, ""));
    assert!(warnings.is_empty(), "{warnings:?}");
    let more = only.replace("{host: h,", "{host: h, publication: {name: p}, slot: {name: s},");
    let without_effect = "without effect in the mode snapshot_only, which streams nothing";
    assert_eq!(
        parse(&more).unwrap().warnings,
        [format!("cdc.publication: {without_effect}"), format!("cdc.slot: {without_effect}")]
    );
}

#[test]
fn references_reach_any_value_and_never_become_yaml() {
    let text = SMALL.replace(
        "  host: h\n",
        "  host: h\n  port: ${PGTIDE_PORT}\n  password: ${PGTIDE_SECRET}\n  metric: {port: \"${NONE:-0}\"}\n",
    );
    let config = parse(&text).unwrap().config;
    assert_eq!(config.cdc.port, 7000);
    assert_eq!(config.cdc.password.0, "from: {the, environment");
    assert_eq!(config.cdc.metric_port, None);
    let error = errors(&SMALL.replace("  host: h\n", "  host: h\n  port: ${PGTIDE_SECRET}\n"));
    assert_eq!(error, "t.yaml:3:9: cdc.port: expected a port from 1 to 65535, found `${PGTIDE_SECRET}`");
}

#[test]
fn anchors_and_merges_share_values() {
    let text = SMALL.replace(
        "    name: p\n",
        "    name: p\n    tables:\n      - &base {name: users, replicaIdentity: FULL}\n      - {<<: *base, name: books}\n      - <<: [{name: x}, *base]\n",
    );
    let tables = parse(&text).unwrap().config.cdc.publication.tables;
    let full = |name| Table { replica_identity: Some(ReplicaIdentity::Full), ..table("public", name) };
    assert_eq!(tables, [full("users"), full("books"), full("x")]);
    let bomb = format!(
        "a0: &a0 [x]\n{}",
        (1..40).map(|n| format!("a{n}: &a{n} [*a{p}, *a{p}]\n", p = n - 1)).collect::<String>()
    );
    assert!(errors(&bomb).contains("more than 100000 values"));
}

#[test]
fn both_spellings_of_the_log_level_are_read_but_not_together() {
    let with = |logger: &str| parse(&SMALL.replace("  host: h\n", &format!("  host: h\n  logger: {logger}\n")));
    assert_eq!(with("{logLevel: DEBUG}").unwrap().config.cdc.log_level, LogLevel::Debug);
    assert!(with("{level: info, logLevel: debug}").unwrap_err().to_string().contains("remove one of them"));
}

#[test]
fn secrets_come_from_files_and_are_never_printed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    std::fs::write(&file, "hunter2 \r\n").unwrap();
    let text = SMALL.replace("  host: h\n", &format!("  host: h\n  passwordFile: {}\n", file.display()));
    assert_eq!(parse(&text).unwrap().config.cdc.password.0, "hunter2 ");
    let both = text.replace("  host: h\n", "  host: h\n  password: x\n");
    assert!(errors(&both).contains("cdc.passwordFile: `password` is given too: remove one of them"));
    for (key, of) in [("apiKey", "api_key"), ("bearerToken", "bearer_token")] {
        let text = SMALL.replace("elasticsearch:\n", &format!("elasticsearch:\n  {key}File: {}\n", file.display()));
        let sink = parse(&text).unwrap().config.elasticsearch;
        assert_eq!(if key == "apiKey" { &sink.api_key } else { &sink.bearer_token }, &Secret("hunter2 ".into()));
        assert!(format!("{sink:?}").contains(&format!("{of}: ***")) && !format!("{sink:?}").contains("hunter2"));
        let both = text.replace("elasticsearch:\n", &format!("elasticsearch:\n  {key}: x\n"));
        assert!(errors(&both).contains(&format!("elasticsearch.{key}File: `{key}` is given too")), "{}", errors(&both));
    }
    let printed = format!("{:?}", parse(EVERY_KEY).unwrap());
    assert!(!printed.contains("-secret") && printed.contains("***"), "{printed}");
    assert!(!errors(&SMALL.replace("http://localhost", "http://u:hunter2@localhost")).contains("hunter2"));
}

#[test]
fn what_is_accepted_without_effect_is_told() {
    let warnings = |part: &str, replacement: &str| parse(&SMALL.replacen(part, replacement, 1)).unwrap().warnings;
    assert!(warnings("", "").is_empty());
    assert_eq!(
        warnings("    name: p\n", "    name: p\n    tables: [{name: users}, {name: books}]\n"),
        ["elasticsearch.tableIndexMapping: no index for public.books: its rows and changes are left out"]
    );
    assert_eq!(
        warnings("  host: h\n", "  host: h\n  snapshot: {enabled: true}\n"),
        ["cdc.snapshot.enabled: nothing is copied: `mode` is never; write initial or snapshot_only"]
    );
    assert_eq!(
        warnings("elasticsearch:\n", "elasticsearch:\n  disableDiscoverNodesOnStart: false\n"),
        [
            "elasticsearch.disableDiscoverNodesOnStart: without effect: nodes are not discovered, `urls` are the nodes in use"
        ]
    );
    assert_eq!(
        warnings("    name: p\n", "    name: p\n    operations: [INSERT, UPDATE, TRUNCATE]\n"),
        ["cdc.publication.operations: DELETE is left out: documents of deleted rows stay"]
    );
}

#[test]
fn a_schema_with_a_dot_finds_its_table() {
    let text = SMALL
        .replace("    name: p\n", "    name: p\n    tables: [{schema: my.schema, name: users}]\n")
        .replace("public.users", "my.schema.users");
    let mapping = parse(&text).unwrap().config.elasticsearch.table_index_mapping;
    assert_eq!(mapping, [(TableId::new("my.schema", "users"), "users".to_owned())].into());
}

#[test]
fn conditions_are_one_expression() {
    for good in [
        "a = ';'",
        "a = 'it''s; fine'",
        r"a = E'\';'",
        "\"odd;name\" = 1",
        "a = $$;$$",
        "a = $x$;$$;$x$",
        "a$b = 1",
        "a = 1 OR (b)",
        "x = '€;'",
    ] {
        assert_eq!(check::condition(good), Ok(()), "{good}");
    }
    for bad in ["a;", "a = 'x'; b", r"a = '\'; b", "a = 'x", "a = \"x", "a = $$;", "a = $x$;$$", "'a'';"] {
        assert!(check::condition(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load("/no/such/pgtide.yaml").unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot read the configuration file /no/such/pgtide.yaml: No such file or directory (os error 2)"
    );
    assert_eq!(crate::problem::Problem::from(error).exit_code(), 2);
}

proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..40, ".{0,6}|[\\[\\]{}&*:,\\-#'\"|>$\n\t <]{0,6}"), 1..6)) {
        let mut text = EVERY_KEY.to_owned();
        for (at, cut, insert) in edits {
            let start = text.floor_char_boundary(at.index(text.len() + 1));
            let end = text.floor_char_boundary((start + cut).min(text.len())).max(start);
            text.replace_range(start..end, &insert);
        }
        if let Err(ConfigError::Invalid { findings, .. }) = parse(&text) {
            prop_assert!(!findings.is_empty());
            let lines = text.lines().count() + 1;
            for finding in findings {
                prop_assert!(finding.line >= 1 && finding.line <= lines, "{finding}");
                prop_assert!(!finding.to_string().chars().any(char::is_control), "{finding:?}");
            }
        }
    }
}
