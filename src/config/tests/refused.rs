//! Files that are refused, and the exact words.

use super::*;

#[test]
fn bad_files_are_refused_with_the_place_and_the_reason() {
    // What is replaced in SMALL, by what, and the whole error.
    let cases: &[(&str, &str, &str)] = &[
        (
            "  host: h\n",
            "  hots: h\n",
            "t.yaml:1:1: cdc.host: missing: PostgreSQL's host\nt.yaml:2:3: cdc.hots: unknown key; did you mean `host`?",
        ),
        ("  host: h\n", "  host: h\n  prot: 1\n", "t.yaml:3:3: cdc.prot: unknown key; did you mean `port`?"),
        (
            "  host: h\n",
            "  host: h\n  metric: {prt: 1, banana: 2}\n",
            "t.yaml:3:12: cdc.metric.prt: unknown key; did you mean `port`?\nt.yaml:3:20: cdc.metric.banana: unknown key; the keys here are port",
        ),
        ("  host: h\n", "  host: h\n  host: i\n", "t.yaml:3:3: host: given twice; the first is on line 2"),
        ("  host: h\n", "  host: h\n  port: 0\n", "t.yaml:3:9: cdc.port: expected a port from 1 to 65535, found `0`"),
        (
            "  host: h\n",
            "  host: h\n  port: many\n",
            "t.yaml:3:9: cdc.port: expected a port from 1 to 65535, found `many`",
        ),
        (
            "  host: h\n",
            "  host: h\n  port: \"5432\"\n",
            "t.yaml:3:9: cdc.port: expected a port from 1 to 65535, found text in quotes: remove the quotes",
        ),
        (
            "  host: h\n",
            "  host: h\n  port: [1]\n",
            "t.yaml:3:9: cdc.port: expected a port from 1 to 65535, found a list",
        ),
        (
            "  host: h\n",
            "  host: h\n  debugMode: maybe\n",
            "t.yaml:3:14: cdc.debugMode: expected true or false, found `maybe`",
        ),
        (
            "  host: h\n",
            "  host: h\n  sslMode: tls\n",
            "t.yaml:3:12: cdc.sslMode: expected one of disable, prefer, require, verify-ca, verify-full, found `tls`",
        ),
        (
            "  host: h\n",
            "  host: h\n  sslCert: c.pem\n",
            "t.yaml:1:1: cdc.sslKey: missing: `sslCert` is given, and needs its key",
        ),
        (
            "  host: h\n",
            "  host: postgres://h:5432\n",
            "t.yaml:2:9: cdc.host: expected a host name, an address or the folder of a Unix socket: no scheme, user, port or database",
        ),
        (
            "  host: h\n",
            "  host: h\n  logger: {level: loud}\n",
            "t.yaml:3:19: cdc.logger.level: expected one of debug, info, warn, error, found `loud`",
        ),
        (
            "  host: h\n",
            "  host: h\n  extensionSupport: {enableTimeScaleDB: true}\n",
            "t.yaml:3:41: cdc.extensionSupport.enableTimeScaleDB: TimescaleDB is not supported yet: remove the key, and name plain tables only",
        ),
        ("  username: u\n", "", "t.yaml:1:1: cdc.username: missing: PostgreSQL's user"),
        ("  username: u\n", "  username: ''\n", "t.yaml:3:13: cdc.username: must not be empty"),
        ("    name: s\n", "    name: ''\n", "t.yaml:8:11: cdc.slot.name: must not be empty"),
        (
            "    name: s\n",
            "    name: My-Slot\n",
            "t.yaml:8:11: cdc.slot.name: PostgreSQL takes only lower-case letters, digits and `_` in a slot's name",
        ),
        (
            "    name: s\n",
            "    name: s234567890123456789012345678901234567890123456789012345678901234\n",
            "t.yaml:8:11: cdc.slot.name: PostgreSQL's names have at most 63 bytes, this one has 64",
        ),
        (
            "    name: s\n",
            "    name: s\n    protoVersion: 3\n",
            "t.yaml:9:19: cdc.slot.protoVersion: expected a protocol version from 1 to 2, found `3`",
        ),
        (
            "    name: s\n",
            "    name: s\n    slotActivityCheckerInterval: 999\n",
            "t.yaml:9:34: cdc.slot.slotActivityCheckerInterval: must be at least 1s (a bare number is milliseconds)",
        ),
        (
            "  host: h\n",
            "  host: h\n  snapshot: {chunkSize: 0}\n",
            "t.yaml:3:25: cdc.snapshot.chunkSize: expected a number of rows from 1 to 2147483647, found `0`",
        ),
        (
            "  host: h\n",
            "  host: h\n  snapshot: {claimTimeout: 5s}\n",
            "t.yaml:3:14: cdc.snapshot.claimTimeout: must be at least twice heartbeatInterval, or a process that lives loses its chunks",
        ),
        (
            "  host: h\n",
            "  host: h\n  snapshot: {claimTimeout: 30}\n",
            "t.yaml:3:28: cdc.snapshot.claimTimeout: expected a duration such as 30s, 100ms or 1h30m, found a number without a unit",
        ),
        (
            "  host: h\n",
            "  host: h\n  snapshot: {heartbeatInterval: 0s}\n",
            "t.yaml:3:33: cdc.snapshot.heartbeatInterval: must be longer than 0",
        ),
        (
            "  host: h\n",
            "  host: h\n  snapshot: {forceResnapshot: true}\n",
            "t.yaml:3:31: cdc.snapshot.forceResnapshot: the key is called `resnapshot`",
        ),
        (
            "  host: h\n",
            "  host: h\n  snapshot: {queryCondition: 'a; DROP TABLE b'}\n",
            "t.yaml:3:30: cdc.snapshot.queryCondition: holds `;`: write one condition, as it would stand after WHERE",
        ),
        (
            "  host: h\n",
            "  host: h\n  snapshot: {enabled: true, mode: snapshot_only}\n",
            "t.yaml:3:3: cdc.snapshot.tables: missing: mode snapshot_only needs the tables to copy",
        ),
        (
            "  host: h\n",
            "  host: h\n  heartbeat: {interval: 1s}\n",
            "t.yaml:3:3: cdc.heartbeat.table: missing: the heartbeat's table",
        ),
        ("    name: p\n", "", "t.yaml:1:1: cdc.publication.name: missing: the publication's name"),
        (
            "    name: p\n",
            "    name: p\n    createIfNotExists: true\n",
            "t.yaml:5:3: cdc.publication.tables: missing: createIfNotExists needs the tables to publish",
        ),
        (
            "    name: p\n",
            "    name: p\n    operations: []\n",
            "t.yaml:7:17: cdc.publication.operations: names no operation: remove the key for all four, or list some of INSERT, UPDATE, DELETE, TRUNCATE",
        ),
        (
            "    name: p\n",
            "    name: p\n    operations: [INSERT, UPSERT]\n",
            "t.yaml:7:26: cdc.publication.operations[1]: expected one of INSERT, UPDATE, DELETE, TRUNCATE, found `UPSERT`",
        ),
        (
            "    name: p\n",
            "    name: p\n    tables: [{name: books}]\n",
            "t.yaml:13:5: elasticsearch.tableIndexMapping.public.users: the table is in neither publication.tables nor snapshot.tables: list it, or remove the entry",
        ),
        (
            "    name: p\n",
            "    name: p\n    tables: [{name: users}, {schema: public, name: users}]\n",
            "t.yaml:7:29: cdc.publication.tables[1]: the table public.users is listed twice",
        ),
        (
            "    name: p\n",
            "    name: p\n    tables: [{name: public.users}]\n",
            "t.yaml:7:21: cdc.publication.tables[0].name: holds a dot: write the schema under `schema`, and the name alone here",
        ),
        (
            "    name: p\n",
            "    name: p\n    tables: [{name: users, replicaIdentity: FULL, columns: [id]}]\n",
            "t.yaml:7:51: cdc.publication.tables[0].columns: replicaIdentity FULL needs every column: remove `columns`, or choose another replicaIdentity",
        ),
        (
            "    name: p\n",
            "    name: p\n    tables: [{name: users, replicaIdentity: USING INDEX}]\n",
            "t.yaml:7:45: cdc.publication.tables[0].replicaIdentity: USING INDEX needs the index's name under `replicaIdentityIndex`",
        ),
        (
            "    name: p\n",
            "    name: p\n    tables: [{name: users, replicaIdentityIndex: i}]\n",
            "t.yaml:7:50: cdc.publication.tables[0].replicaIdentityIndex: goes with `replicaIdentity: USING INDEX` only",
        ),
        (
            "    name: p\n",
            "    name: p\n    tables: [{name: users, snapshotPartitionStrategy: hash}]\n",
            "t.yaml:7:55: cdc.publication.tables[0].snapshotPartitionStrategy: expected one of auto, ctid_block, integer_range, offset, found `hash`",
        ),
        (
            "  host: h\n",
            "  host: h\n  heartbeat: {table: {name: beat}}\n  publication: {name: p, tables: [{name: users}]}\n  snapshot: {enabled: true, mode: initial, tables: [{name: books}]}\n",
            "t.yaml:8:3: publication: given twice; the first is on line 4",
        ),
        (
            "[http://localhost:9200]",
            "[]",
            "t.yaml:10:9: elasticsearch.urls: names no URL: at least one is needed, such as http://localhost:9200",
        ),
        (
            "  urls: [http://localhost:9200]\n",
            "",
            "t.yaml:9:1: elasticsearch.urls: missing: at least one URL, such as http://localhost:9200",
        ),
        (
            "[http://localhost:9200]",
            "[localhost:9200]",
            "t.yaml:10:10: elasticsearch.urls[0]: expected a URL that begins with http:// or https://, such as http://localhost:9200",
        ),
        (
            "[http://localhost:9200]",
            "['http:/localhost:9200']",
            "t.yaml:10:10: elasticsearch.urls[0]: expected a URL that begins with http:// or https://, such as http://localhost:9200",
        ),
        (
            "[http://localhost:9200]",
            "['http:///localhost:9200']",
            "t.yaml:10:10: elasticsearch.urls[0]: expected a host after the scheme, such as http://localhost:9200",
        ),
        (
            "[http://localhost:9200]",
            "['http://localhost:9200/users/_bulk']",
            "t.yaml:10:10: elasticsearch.urls[0]: expected the address of the cluster, such as http://localhost:9200: index and API names do not belong here",
        ),
        (
            "[http://localhost:9200]",
            "['http://elastic:hunter2@localhost:9200']",
            "t.yaml:10:10: elasticsearch.urls[0]: holds a user or password: write them under `username` and `password`",
        ),
        (
            "    public.users: users\n",
            "    {}\n",
            "t.yaml:11:3: elasticsearch.tableIndexMapping: maps no table to an index: without an entry, nothing is written",
        ),
        (
            "  tableIndexMapping:\n    public.users: users\n",
            "",
            "t.yaml:9:1: elasticsearch.tableIndexMapping: missing: which index each table goes to, such as `public.users: users`",
        ),
        (
            "    public.users: users\n",
            "    public.users: Users\n",
            "t.yaml:12:19: elasticsearch.tableIndexMapping.public.users: Elasticsearch takes no upper-case letters in an index name",
        ),
        (
            "    public.users: users\n",
            "    public.users: _users\n",
            "t.yaml:12:19: elasticsearch.tableIndexMapping.public.users: Elasticsearch takes no index name that begins with `_`, `-` or `+`",
        ),
        (
            "    public.users: users\n",
            "    public.users: a/b\n",
            "t.yaml:12:19: elasticsearch.tableIndexMapping.public.users: Elasticsearch takes no `/` in an index name",
        ),
        (
            "    public.users: users\n",
            "    public.users: \"a\\eb\"\n",
            "t.yaml:12:19: elasticsearch.tableIndexMapping.public.users: Elasticsearch takes no `\\u{1b}` in an index name",
        ),
        (
            "    public.users: users\n",
            "    public.users: users\n    users: people\n",
            "t.yaml:13:12: elasticsearch.tableIndexMapping.users: the table has an index already: a name without a schema is one of `public`",
        ),
        (
            "    public.users: users\n",
            "    public.users: users\n    public.zebras: users\n",
            "t.yaml:13:5: elasticsearch.tableIndexMapping.public.zebras: public.users goes to this index too, and rows with the same key would overwrite each other: give each table its own index (for partitions, list the root with `partitioned: true`)",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  typeName: _doc\n",
            "t.yaml:10:13: elasticsearch.typeName: mapping types are gone from Elasticsearch: remove the key",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  batchByteSizeLimit: 10 potatoes\n",
            "t.yaml:10:23: elasticsearch.batchByteSizeLimit: expected a size such as 10mb, 1.5mb or a number of bytes, found `10 potatoes`",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  batchByteSizeLimit: 10\n",
            "t.yaml:10:23: elasticsearch.batchByteSizeLimit: must be 1024 to 2147483648 bytes, is 10",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  password: hunter2\n",
            "t.yaml:9:1: elasticsearch.username: missing: a password is given, but no user",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  rejectionLog: {index: x}\n",
            "t.yaml:10:17: elasticsearch.rejectionLog: has no effect in the reference either: refused documents are kept in `deadLetterFile`",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  concurrentRequest: 0\n",
            "t.yaml:10:22: elasticsearch.concurrentRequest: expected a number of requests from 1 to 1024, found `0`",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  username: ${NOT_SET}\n",
            "t.yaml:10:13: elasticsearch.username: the environment variable NOT_SET is not set: set it, or write `${NOT_SET:-default}`",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  apiKey: k\n  bearerToken: b\n",
            "t.yaml:11:3: elasticsearch.bearerToken: `apiKey` is given too: one of them says who pgtide is, remove the other",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  proxyUsername: u\n",
            "t.yaml:9:1: elasticsearch.proxy: missing: a user or password for it is given",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  proxy: http://u:p@proxy:1\n",
            "t.yaml:10:10: elasticsearch.proxy: holds a user or password: write them under `proxyUsername` and `proxyPassword`",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  requestTimeout: 10ms\n",
            "t.yaml:10:19: elasticsearch.requestTimeout: must be at least 1s",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  ssl: {certificate: /c.pem}\n",
            "t.yaml:10:3: elasticsearch.ssl.key: missing: `certificate` is given, and needs its key",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  ssl: {verificationMode: off}\n",
            "t.yaml:10:27: elasticsearch.ssl.verificationMode: expected one of full, certificate, none, found `off`",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch:\n  passwordFile: /no/such/file\n",
            "t.yaml:10:17: elasticsearch.passwordFile: cannot read the file: No such file or directory (os error 2)",
        ),
        (
            "elasticsearch:\n",
            "elasticsearch: !!map\n",
            "t.yaml:10:3: tags such as `!name` are not supported: remove it",
        ),
        ("cdc:\n", "\"c\\ec\": 1\ncdc:\n", "t.yaml:1:1: c\\u{1b}c: unknown key; did you mean `cdc`?"),
        ("cdc:\n", "---\na: 1\n---\ncdc:\n", "t.yaml:4:1: expected one document, found a second one"),
        (SMALL, "# nothing\n", "t.yaml:1:1: the file is empty: it needs the groups `cdc` and `elasticsearch`"),
        (SMALL, "- a\n", "t.yaml:1:1: expected a group of keys, found a list"),
        (
            SMALL,
            "cdc: {}\n",
            "t.yaml:1:1: elasticsearch: missing: the file needs the groups `cdc` and `elasticsearch`\nt.yaml:1:1: cdc.host: missing: PostgreSQL's host\nt.yaml:1:1: cdc.username: missing: PostgreSQL's user\nt.yaml:1:1: cdc.database: missing: the database\nt.yaml:1:1: cdc.slot.name: missing: the replication slot's name\nt.yaml:1:1: cdc.publication.name: missing: the publication's name",
        ),
    ];
    assert!(parse(SMALL).is_ok());
    let mut wrong = String::new();
    for (part, replacement, expected) in cases {
        assert!(SMALL.contains(part), "{part}");
        let found = errors(&SMALL.replacen(part, replacement, 1));
        if found != *expected {
            wrong.push_str(&format!("{replacement:?}\n  expected {expected}\n  found    {found}\n"));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn several_errors_are_told_at_once_in_the_order_of_the_file() {
    let text = SMALL.replace("host: h\n", "host: h\n  port: x\n").replace("[http://localhost:9200]", "[x]");
    let ConfigError::Invalid { file, findings } = parse(&text).unwrap_err() else { panic!("readable") };
    assert_eq!(file, "t.yaml");
    let told: Vec<_> = findings.iter().map(|found| (found.line, found.column, found.path.as_str())).collect();
    assert_eq!(told, [(3, 9, "cdc.port"), (11, 10, "elasticsearch.urls[0]")]);
}
