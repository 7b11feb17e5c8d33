//! The keys, one after the other: from the tree to [`Config`].

use std::path::PathBuf;

use super::section::{Field, Section};
use super::{
    Cdc, Config, Elasticsearch, Heartbeat, JsonAs, LogLevel, Mode, NumericAs, OnSchemaChange, Operation,
    ReplicaIdentity, Secret, Slot, Snapshot, SslMode, Strategy, Table, VerificationMode, WithoutKey,
};
use crate::table::TableId;

const OPERATIONS: [(&str, Operation); 4] = [
    ("INSERT", Operation::Insert),
    ("UPDATE", Operation::Update),
    ("DELETE", Operation::Delete),
    ("TRUNCATE", Operation::Truncate),
];

/// Puts what was read in its place; what was absent or refused leaves the default.
fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

/// Reads everything, gathering in the context what is wrong with single keys.
pub(super) fn config(root: &Field<'_>) -> Config {
    let mut config = Config::default();
    let Some(section) = root.section() else { return config };
    let (postgres, sink) = (section.get("cdc"), section.get("elasticsearch"));
    for (name, found) in [("cdc", &postgres), ("elasticsearch", &sink)] {
        if found.is_none() {
            root.context.refuse(name, "missing: the file needs the groups `cdc` and `elasticsearch`");
        }
    }
    if let Some(section) = postgres.and_then(|field| field.section()) {
        config.cdc = cdc(section);
    }
    if let Some(section) = sink.and_then(|field| field.section()) {
        config.elasticsearch = elasticsearch(section);
    }
    section.end();
    config
}

/// The value of `key`, or the content of the file that `file` names.
fn secret(section: &Section<'_>, key: &'static str, file: &'static str) -> Option<Secret> {
    let (written, file) = (section.get(key), section.get(file));
    match (written, file) {
        (Some(_), Some(file)) => {
            file.refuse(format!("`{key}` is given too: remove one of them"));
            None
        }
        (Some(written), None) => written.text().map(Secret),
        (None, Some(file)) => file.secret_file(),
        (None, None) => None,
    }
}

fn cdc(section: Section<'_>) -> Cdc {
    let mut cdc = Cdc::default();
    set(&mut cdc.host, section.get("host").and_then(|field| host(&field)));
    set(&mut cdc.port, section.get("port").and_then(|field| port(&field, 1)));
    set(&mut cdc.username, section.get("username").and_then(|field| field.identifier()));
    set(&mut cdc.password, secret(&section, "password", "passwordFile"));
    set(&mut cdc.database, section.get("database").and_then(|field| field.identifier()));
    let modes = [
        ("disable", SslMode::Disable),
        ("prefer", SslMode::Prefer),
        ("require", SslMode::Require),
        ("verify-ca", SslMode::VerifyCa),
        ("verify-full", SslMode::VerifyFull),
    ];
    set(&mut cdc.ssl_mode, section.get("sslMode").and_then(|field| field.choice(&modes)));
    cdc.ssl_root_cert = path(&section, "sslRootCert");
    cdc.ssl_cert = path(&section, "sslCert");
    cdc.ssl_key = path(&section, "sslKey");
    set(&mut cdc.debug_mode, section.get("debugMode").and_then(|field| field.switch()));
    if let Some(metric) = group(&section, "metric") {
        if let Some(port) = metric.get("port").and_then(|field| port(&field, 0)) {
            cdc.metric_port = (port != 0).then_some(port);
        }
        metric.end();
    }
    if let Some(logger) = group(&section, "logger") {
        set(&mut cdc.log_level, log_level(&logger));
        logger.refused("logger", "a Go value, which a file cannot hold: use `level`");
        logger.end();
    }
    if let Some(group) = group(&section, "publication") {
        publication(&group, &mut cdc.publication);
        group.end();
    }
    if let Some(group) = group(&section, "slot") {
        slot(&group, &mut cdc.slot);
        group.end();
    }
    if let Some(group) = group(&section, "snapshot") {
        snapshot(&group, &mut cdc.snapshot);
        group.end();
    }
    if let Some(group) = group(&section, "heartbeat") {
        cdc.heartbeat = heartbeat(&group);
        group.end();
    }
    if let Some(group) = group(&section, "extensionSupport") {
        for key in ["enableTimescaleDB", "enableTimeScaleDB"] {
            if let Some(field) = group.get(key).filter(|field| field.switch() == Some(true)) {
                field.refuse("TimescaleDB is not supported yet: remove the key, and name plain tables only");
            }
        }
        group.end();
    }
    section.end();
    cdc
}

fn group<'a>(section: &Section<'a>, key: &'static str) -> Option<Section<'a>> {
    section.get(key)?.section()
}

fn path(section: &Section<'_>, key: &'static str) -> Option<PathBuf> {
    section.get(key)?.path()
}

fn port(field: &Field<'_>, least: u64) -> Option<u16> {
    field.number("a port", least..=65535).and_then(|port| u16::try_from(port).ok())
}

fn host(field: &Field<'_>) -> Option<String> {
    let host = field.name()?;
    if host.contains("://")
        || !host.starts_with('/') && host.contains(|c: char| c.is_whitespace() || c == '/' || c == '@')
    {
        field.refuse(
            "expected a host name, an address or the folder of a Unix socket: no scheme, user, port or database",
        );
        return None;
    }
    Some(host)
}

fn log_level(logger: &Section<'_>) -> Option<LogLevel> {
    let levels =
        [("debug", LogLevel::Debug), ("info", LogLevel::Info), ("warn", LogLevel::Warn), ("error", LogLevel::Error)];
    let (level, other) = (logger.get("level"), logger.get("logLevel"));
    if let (Some(_), Some(other)) = (&level, &other) {
        other.refuse("`level` is given too, and means the same: remove one of them");
    }
    level.or(other)?.choice(&levels)
}

fn publication(section: &Section<'_>, publication: &mut super::Publication) {
    set(&mut publication.name, section.get("name").and_then(|field| field.identifier()));
    set(&mut publication.create_if_not_exists, section.get("createIfNotExists").and_then(|field| field.switch()));
    if let Some(field) = section.get("operations") {
        let items = field.list().unwrap_or_default();
        if items.is_empty() {
            field.refuse(
                "names no operation: remove the key for all four, or list some of INSERT, UPDATE, DELETE, TRUNCATE",
            );
        }
        for item in items {
            match item.choice(&OPERATIONS) {
                Some(operation) if publication.operations.contains(&operation) => item.refuse("named twice"),
                Some(operation) => publication.operations.push(operation),
                None => {}
            }
        }
    }
    publication.tables = tables(section);
}

fn tables(section: &Section<'_>) -> Vec<Table> {
    let Some(items) = section.get("tables").and_then(|field| field.list()) else { return Vec::new() };
    let mut tables: Vec<Table> = Vec::new();
    for item in items {
        let Some(table) = table(&item) else { continue };
        if tables.iter().any(|other| other.id == table.id) {
            item.refuse(format!("the table {} is listed twice", super::shown(&table.id.to_string(), 140)));
        } else {
            tables.push(table);
        }
    }
    tables
}

fn table(item: &Field<'_>) -> Option<Table> {
    let section = item.section()?;
    let id = table_id(&section);
    let mut columns: Vec<String> = Vec::new();
    for field in section.get("columns").and_then(|field| field.list()).unwrap_or_default() {
        match field.identifier() {
            Some(column) if columns.contains(&column) => field.refuse("the column is listed twice"),
            Some(column) => columns.push(column),
            None => {}
        }
    }
    let replica_identity = replica_identity(&section);
    if replica_identity == Some(ReplicaIdentity::Full) && !columns.is_empty() {
        item.context.refuse(
            &format!("{}.columns", item.path),
            "replicaIdentity FULL needs every column: remove `columns`, or choose another replicaIdentity",
        );
    }
    let partitioned = section.get("partitioned").and_then(|field| field.switch()).unwrap_or_default();
    let strategies = [
        ("auto", Strategy::Auto),
        ("ctid_block", Strategy::CtidBlock),
        ("integer_range", Strategy::IntegerRange),
        ("offset", Strategy::Offset),
    ];
    let strategy = section.get("snapshotPartitionStrategy").and_then(|field| {
        // The reference's word for `auto` is also no word at all.
        if field.node.is_empty_text() { Some(Strategy::Auto) } else { field.choice(&strategies) }
    });
    let strategy = strategy.unwrap_or_default();
    if strategy == Strategy::Offset {
        item.context.warn(
            &format!("{}.snapshotPartitionStrategy", item.path),
            "without effect: tables are always copied by ranges of ctid",
        );
    }
    let query_condition = query_condition(&section);
    section.end();
    Some(Table { id: id?, replica_identity, columns, partitioned, strategy, query_condition })
}

fn table_id(section: &Section<'_>) -> Option<TableId> {
    let schema = match section.get("schema") {
        Some(field) => field.identifier(),
        None => Some("public".to_owned()),
    };
    let Some(name) = section.get("name") else {
        section.context.refuse(&format!("{}.name", section.path), "missing: the table's name");
        return None;
    };
    let id = TableId::new(schema?, name.identifier()?);
    if section.get("schema").is_none() && id.name.contains('.') {
        name.refuse("holds a dot: write the schema under `schema`, and the name alone here");
        return None;
    }
    Some(id)
}

fn replica_identity(section: &Section<'_>) -> Option<ReplicaIdentity> {
    #[derive(Clone, Copy, PartialEq)]
    enum Word {
        Default,
        Full,
        Nothing,
        UsingIndex,
    }
    let words = [
        ("DEFAULT", Word::Default),
        ("FULL", Word::Full),
        ("NOTHING", Word::Nothing),
        ("USING INDEX", Word::UsingIndex),
    ];
    let identity = section.get("replicaIdentity");
    let word = identity.as_ref().and_then(|field| field.choice(&words));
    let index = section.get("replicaIdentityIndex");
    if let Some(index) = index.as_ref().filter(|_| word != Some(Word::UsingIndex)) {
        index.refuse("goes with `replicaIdentity: USING INDEX` only");
    }
    match word? {
        Word::Default => Some(ReplicaIdentity::Default),
        Word::Full => Some(ReplicaIdentity::Full),
        Word::Nothing => Some(ReplicaIdentity::Nothing),
        Word::UsingIndex => {
            if index.is_none() {
                identity?.refuse("USING INDEX needs the index's name under `replicaIdentityIndex`");
            }
            Some(ReplicaIdentity::UsingIndex(index?.identifier()?))
        }
    }
}

fn query_condition(section: &Section<'_>) -> Option<String> {
    let field = section.get("queryCondition")?;
    let text = field.text()?;
    if text.trim().is_empty() {
        return None;
    }
    match super::check::condition(&text) {
        Ok(()) => Some(text),
        Err(reason) => {
            field.refuse(reason);
            None
        }
    }
}

fn slot(section: &Section<'_>, slot: &mut Slot) {
    if let Some(field) = section.get("name") {
        let name = field.identifier().unwrap_or_default();
        if name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_') {
            slot.name = name;
        } else {
            field.refuse("PostgreSQL takes only lower-case letters, digits and `_` in a slot's name");
        }
    }
    set(&mut slot.create_if_not_exists, section.get("createIfNotExists").and_then(|field| field.switch()));
    if let Some(field) = section.get("slotActivityCheckerInterval")
        && let Some(interval) = field.duration(true)
    {
        if interval.as_millis() < 1000 {
            field.refuse("must be at least 1s (a bare number is milliseconds)");
        }
        slot.activity_checker_interval = interval;
    }
    if let Some(field) = section.get("protoVersion")
        && let Some(version) = field.number("a protocol version", 1..=2)
    {
        slot.proto_version = u8::try_from(version).unwrap_or(2);
        if version == 2 {
            let reason =
                "accepted; pgtide streams by protocol version 1, so that memory stays bounded in large transactions";
            section.context.warn(&field.path, reason);
        }
    }
    set(&mut slot.failover, section.get("failover").and_then(|field| field.switch()));
    if let Some(field) = section.get("acceptTimeline") {
        let timeline = field.number("a timeline", 2..=u64::from(u32::MAX));
        slot.accept_timeline = timeline.and_then(|timeline| u32::try_from(timeline).ok());
    }
}

fn snapshot(section: &Section<'_>, snapshot: &mut Snapshot) {
    set(&mut snapshot.enabled, section.get("enabled").and_then(|field| field.switch()));
    let modes = [("initial", Mode::Initial), ("never", Mode::Never), ("snapshot_only", Mode::SnapshotOnly)];
    set(&mut snapshot.mode, section.get("mode").and_then(|field| field.choice(&modes)));
    let rows = |field: Field<'_>| field.number("a number of rows", 1..=i32::MAX.unsigned_abs().into());
    set(&mut snapshot.chunk_size, section.get("chunkSize").and_then(rows));
    set(&mut snapshot.release_after, section.get("releaseAfter").and_then(|field| field.duration(false)));
    set(&mut snapshot.claim_timeout, section.get("claimTimeout").and_then(|field| field.duration(false)));
    set(&mut snapshot.heartbeat_interval, section.get("heartbeatInterval").and_then(|field| field.duration(false)));
    snapshot.instance_id = section.get("instanceId").and_then(|field| field.name());
    snapshot.id = section.get("id").and_then(|field| field.name());
    snapshot.tables = tables(section);
    snapshot.query_condition = query_condition(section);
    set(&mut snapshot.resnapshot, section.get("resnapshot").and_then(|field| field.switch()));
    section.refused("forceResnapshot", "the key is called `resnapshot`");
    let workers = section.get("workers").and_then(|field| field.number("a number of workers", 1..=64));
    snapshot.workers = workers.and_then(|workers| usize::try_from(workers).ok());
    let ways = [("copy", OnSchemaChange::Copy), ("warn", OnSchemaChange::Warn)];
    set(&mut snapshot.on_schema_change, section.get("onSchemaChange").and_then(|field| field.choice(&ways)));
}

fn heartbeat(section: &Section<'_>) -> Option<Heartbeat> {
    let table = match group(section, "table") {
        Some(group) => {
            let table = table_id(&group);
            group.end();
            table
        }
        None => {
            section.context.refuse(&format!("{}.table", section.path), "missing: the heartbeat's table");
            None
        }
    };
    let interval = match section.get("interval") {
        Some(field) => field.duration(false),
        None => Some(std::time::Duration::from_millis(100)),
    };
    Some(Heartbeat { table: table?, interval: interval? })
}

fn elasticsearch(section: Section<'_>) -> Elasticsearch {
    let mut sink = Elasticsearch::default();
    let urls = section.get("urls");
    let items = urls.as_ref().and_then(|field| field.list());
    if let (Some(field), Some([])) = (&urls, items.as_deref()) {
        field.refuse("names no URL: at least one is needed, such as http://localhost:9200");
    }
    for field in items.unwrap_or_default() {
        if let Some(text) = field.name() {
            match super::check::url(&text) {
                Ok(url) => sink.urls.push(url),
                Err(reason) => field.refuse(reason),
            }
        }
    }
    set(&mut sink.username, section.get("username").and_then(|field| field.text()));
    set(&mut sink.password, secret(&section, "password", "passwordFile"));
    connection(&section, &mut sink);
    let count = |key: &'static str, what: &str, most: u64| {
        section.get(key)?.number(what, 1..=most).and_then(|number| usize::try_from(number).ok())
    };
    set(&mut sink.batch_size_limit, count("batchSizeLimit", "a number of documents", 1_000_000));
    let bytes = section.get("batchByteSizeLimit").and_then(|field| field.size(1024..=2 << 30));
    set(&mut sink.batch_byte_size_limit, bytes.and_then(|bytes| usize::try_from(bytes).ok()));
    set(&mut sink.batch_ticker_duration, section.get("batchTickerDuration").and_then(|field| field.duration(false)));
    set(&mut sink.concurrent_request, count("concurrentRequest", "a number of requests", 1024));
    set(&mut sink.compression_enabled, section.get("compressionEnabled").and_then(|field| field.switch()));
    set(&mut sink.max_conns_per_host, count("maxConnsPerHost", "a number of connections", 65_535));
    set(&mut sink.max_idle_conn_duration, section.get("maxIdleConnDuration").and_then(|field| field.duration(false)));
    sink.dead_letter_file = path(&section, "deadLetterFile");
    let forms = [("number", NumericAs::Number), ("string", NumericAs::String)];
    set(&mut sink.numeric_as, section.get("numericAs").and_then(|field| field.choice(&forms)));
    set(&mut sink.manage_indices, section.get("manageIndices").and_then(|field| field.switch()));
    let forms = [("stored", JsonAs::Stored), ("flattened", JsonAs::Flattened)];
    set(&mut sink.json_as, section.get("jsonAs").and_then(|field| field.choice(&forms)));
    if let Some(mapping) = group(&section, "tableIndexMapping") {
        if mapping.all().next().is_none() {
            let message = "maps no table to an index: without an entry, nothing is written";
            section.context.refuse(&mapping.path, message);
        }
        for (table, field) in mapping.all() {
            let Some(index) = field.name() else { continue };
            if let Err(reason) = super::check::index_name(&index) {
                field.refuse(reason);
            } else if sink.table_index_mapping.insert(super::check::mapped_table(table), index).is_some() {
                field.refuse("the table has an index already: a name without a schema is one of `public`");
            }
        }
    }
    let ways = [("refuse", WithoutKey::Refuse), ("hash", WithoutKey::Hash)];
    set(&mut sink.without_key, section.get("tablesWithoutKey").and_then(|field| field.choice(&ways)));
    without_effect(&section);
    section.refused(
        "rejectionLog",
        "has no effect in the reference either: refused documents are kept in `deadLetterFile`",
    );
    section.end();
    sink
}

/// How the cluster is reached, beside URLs, user and password.
fn connection(section: &Section<'_>, sink: &mut Elasticsearch) {
    set(&mut sink.api_key, secret(section, "apiKey", "apiKeyFile"));
    set(&mut sink.bearer_token, secret(section, "bearerToken", "bearerTokenFile"));
    if let Some(field) = section.get("proxy")
        && let Some(text) = field.name()
    {
        match super::check::url(&text) {
            Ok(url) => sink.proxy = Some(url),
            Err(reason) => {
                field.refuse(reason.replace("`username` and `password`", "`proxyUsername` and `proxyPassword`"));
            }
        }
    }
    set(&mut sink.proxy_username, section.get("proxyUsername").and_then(|field| field.text()));
    set(&mut sink.proxy_password, secret(section, "proxyPassword", "proxyPasswordFile"));
    set(&mut sink.connect_timeout, section.get("connectTimeout").and_then(|field| field.duration(false)));
    if let Some(field) = section.get("requestTimeout")
        && let Some(timeout) = field.duration(false)
    {
        if timeout.as_millis() < 1000 {
            field.refuse("must be at least 1s");
        }
        sink.request_timeout = timeout;
    }
    if let Some(ssl) = group(section, "ssl") {
        sink.ssl.certificate_authorities = path(&ssl, "certificateAuthorities");
        sink.ssl.certificate = path(&ssl, "certificate");
        sink.ssl.key = path(&ssl, "key");
        let modes = [
            ("full", VerificationMode::Full),
            ("certificate", VerificationMode::Certificate),
            ("none", VerificationMode::None),
        ];
        set(&mut sink.ssl.verification_mode, ssl.get("verificationMode").and_then(|field| field.choice(&modes)));
        ssl.end();
    }
}

/// Keys of the reference that are taken so that its files keep working, and that change nothing here.
fn without_effect(section: &Section<'_>) {
    if let Some(field) = section.get("typeName").filter(|field| field.text().is_some_and(|text| !text.is_empty())) {
        field.refuse("mapping types are gone from Elasticsearch: remove the key");
    }
    if let Some(field) = section.get("version").filter(|field| field.text().is_some_and(|text| !text.is_empty())) {
        section.context.warn(&field.path, "without effect: the cluster is asked for its version");
    }
    if let Some(field) = section.get("discoverNodesInterval")
        && field.duration(false).is_some()
    {
        section.context.warn(&field.path, "without effect: nodes are not discovered, `urls` are the nodes in use");
    }
    if let Some(field) = section.get("disableDiscoverNodesOnStart")
        && field.switch() == Some(false)
    {
        section.context.warn(&field.path, "without effect: nodes are not discovered, `urls` are the nodes in use");
    }
}
