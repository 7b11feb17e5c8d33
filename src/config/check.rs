//! What single values must look like, and what the keys must be together.

use super::section::Context;
use super::{Config, Mode, Operation, Table, VerificationMode, shown};
use crate::table::TableId;

/// An index name that Elasticsearch takes, or why it does not.
pub(super) fn index_name(name: &str) -> Result<(), String> {
    let bad = |c: char| {
        matches!(c, '\\' | '/' | '*' | '?' | '"' | '<' | '>' | '|' | ',' | '#' | ':')
            || c.is_whitespace()
            || c.is_control()
    };
    if name.chars().any(char::is_uppercase) {
        Err("Elasticsearch takes no upper-case letters in an index name".to_owned())
    } else if name.starts_with(['_', '-', '+']) {
        Err("Elasticsearch takes no index name that begins with `_`, `-` or `+`".to_owned())
    } else if let Some(c) = name.chars().find(|&c| bad(c)) {
        Err(format!("Elasticsearch takes no `{}` in an index name", shown(&c.to_string(), 10)))
    } else if name == "." || name == ".." {
        Err("Elasticsearch takes no index name `.` or `..`".to_owned())
    } else if name.len() > 255 {
        Err(format!("Elasticsearch takes index names of at most 255 bytes, this one has {}", name.len()))
    } else {
        Ok(())
    }
}

/// `text` without a slash at its end, or what is wrong with it. Never repeats it: it may hold a password.
pub(super) fn url(text: &str) -> Result<String, &'static str> {
    let lower = text.to_ascii_lowercase();
    let Some(rest) = lower.strip_prefix("http://").or_else(|| lower.strip_prefix("https://")) else {
        return Err("expected a URL that begins with http:// or https://, such as http://localhost:9200");
    };
    if rest.starts_with(['/', ':']) || rest.is_empty() {
        return Err("expected a host after the scheme, such as http://localhost:9200");
    }
    let url = url::Url::parse(text).map_err(|_| "expected a URL such as http://localhost:9200")?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("holds a user or password: write them under `username` and `password`");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("expected a URL without `?` and `#`");
    }
    if url.port() == Some(0) {
        return Err("expected a port from 1 to 65535");
    }
    let path = url.path().trim_end_matches('/');
    if path.split('/').skip(1).any(|part| part.is_empty() || part.starts_with('_') || part.contains('%')) {
        return Err(
            "expected the address of the cluster, such as http://localhost:9200: index and API names do not belong here",
        );
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

/// A condition that stays one expression: no `;` outside quotes, every quote closed. It is the operator's SQL otherwise.
pub(super) fn condition(text: &str) -> Result<(), &'static str> {
    const OPEN: &str = "a quote is not closed";
    let mut rest = text;
    let mut word_before = false;
    while let Some(c) = rest.chars().next() {
        let after = &rest[c.len_utf8()..];
        let word = c.is_alphanumeric() || c == '_';
        rest = match c {
            ';' => return Err("holds `;`: write one condition, as it would stand after WHERE"),
            '\'' => {
                // In E'...' a backslash takes the next character with it.
                let escapes = text[..text.len() - rest.len()].ends_with(['e', 'E']);
                after_quote(after, '\'', escapes).ok_or(OPEN)?
            }
            '"' => after_quote(after, '"', false).ok_or(OPEN)?,
            '$' if !word_before => match after.split_once('$') {
                Some((tag, body)) if is_tag(tag) => {
                    let end = format!("${tag}$");
                    &body[body.find(&end).ok_or(OPEN)? + end.len()..]
                }
                _ => after,
            },
            _ => after,
        };
        word_before = word;
    }
    Ok(())
}

/// The text of `$tag$` quotes between the dollars.
fn is_tag(tag: &str) -> bool {
    !tag.starts_with(|c: char| c.is_ascii_digit()) && tag.chars().all(|c| c.is_alphanumeric() || c == '_')
}

fn after_quote(text: &str, quote: char, escapes: bool) -> Option<&str> {
    let mut characters = text.char_indices().peekable();
    while let Some((at, c)) = characters.next() {
        if escapes && c == '\\' {
            characters.next();
        } else if c == quote && characters.next_if(|(_, next)| *next == quote).is_none() {
            return Some(&text[at + quote.len_utf8()..]);
        }
    }
    None
}

/// The table that a key of `tableIndexMapping` names: split at the first dot, of `public` without one.
pub(super) fn mapped_table(key: &str) -> TableId {
    let (schema, name) = key.split_once('.').unwrap_or(("public", key));
    TableId::new(schema, name)
}

/// Gathers what is wrong between keys.
pub(super) fn whole(config: &mut Config, context: &Context<'_>) {
    required(config, context);
    tls(config, context);
    snapshot(config, context);
    publication(config, context);
    mapping(config, context);
    if config.mode() == Mode::SnapshotOnly {
        for key in ["cdc.publication", "cdc.slot", "cdc.heartbeat"] {
            if context.given(key) {
                context.warn(key, "without effect in the mode snapshot_only, which streams nothing");
            }
        }
    }
    if config.cdc.debug_mode {
        context.warn("cdc.debugMode", "without effect: there is no pprof endpoint");
    }
    connection(config, context);
}

fn connection(config: &Config, context: &Context<'_>) {
    let sink = &config.elasticsearch;
    if !sink.password.is_empty() && sink.username.is_empty() {
        context.refuse("elasticsearch.username", "missing: a password is given, but no user");
    }
    let ways = [
        ("username", !sink.username.is_empty()),
        ("apiKey", !sink.api_key.is_empty()),
        ("bearerToken", !sink.bearer_token.is_empty()),
    ];
    let given: Vec<&str> = ways.iter().filter(|(_, given)| *given).map(|(key, _)| *key).collect();
    if let [first, second, ..] = given.as_slice() {
        let message = format!("`{first}` is given too: one of them says who pgtide is, remove the other");
        context.refuse(&format!("elasticsearch.{second}"), message);
    }
    match (&sink.ssl.certificate, &sink.ssl.key) {
        (Some(_), None) => {
            context.refuse("elasticsearch.ssl.key", "missing: `certificate` is given, and needs its key")
        }
        (None, Some(_)) => {
            context.refuse("elasticsearch.ssl.certificate", "missing: `key` is given, and needs its certificate");
        }
        _ => {}
    }
    if sink.proxy.is_none() && (!sink.proxy_username.is_empty() || !sink.proxy_password.is_empty()) {
        context.refuse("elasticsearch.proxy", "missing: a user or password for it is given");
    }
    if sink.ssl.verification_mode == VerificationMode::None {
        context.warn(
            "elasticsearch.ssl.verificationMode",
            "whoever answers is taken for the cluster, and gets the password and the rows",
        );
    }
}

fn required(config: &Config, context: &Context<'_>) {
    let cdc = &config.cdc;
    let stream = config.mode() != Mode::SnapshotOnly;
    // A key that is there and was refused has its own finding.
    let missing = |path: &str, empty: bool, message: &str| {
        if empty && !context.given(path) && context.given(path.split('.').next().unwrap_or_default()) {
            context.refuse(path, format!("missing: {message}"));
        }
    };
    missing("cdc.host", cdc.host.is_empty(), "PostgreSQL's host");
    missing("cdc.username", cdc.username.is_empty(), "PostgreSQL's user");
    missing("cdc.database", cdc.database.is_empty(), "the database");
    missing("cdc.slot.name", stream && cdc.slot.name.is_empty(), "the replication slot's name");
    missing("cdc.publication.name", stream && cdc.publication.name.is_empty(), "the publication's name");
    missing(
        "elasticsearch.urls",
        config.elasticsearch.urls.is_empty(),
        "at least one URL, such as http://localhost:9200",
    );
    const MAPPING: &str = "which index each table goes to, such as `public.users: users`";
    missing("elasticsearch.tableIndexMapping", config.elasticsearch.table_index_mapping.is_empty(), MAPPING);
}

fn tls(config: &Config, context: &Context<'_>) {
    let cdc = &config.cdc;
    match (&cdc.ssl_cert, &cdc.ssl_key) {
        (Some(_), None) => context.refuse("cdc.sslKey", "missing: `sslCert` is given, and needs its key"),
        (None, Some(_)) => context.refuse("cdc.sslCert", "missing: `sslKey` is given, and needs its certificate"),
        _ => {}
    }
}

fn snapshot(config: &Config, context: &Context<'_>) {
    let snapshot = &config.cdc.snapshot;
    if snapshot.claim_timeout < snapshot.heartbeat_interval.saturating_mul(2) {
        context.refuse(
            "cdc.snapshot.claimTimeout",
            "must be at least twice heartbeatInterval, or a process that lives loses its chunks",
        );
    }
    if snapshot.enabled && snapshot.mode == Mode::Never {
        context.warn("cdc.snapshot.enabled", "nothing is copied: `mode` is never; write initial or snapshot_only");
    }
    if !snapshot.enabled && snapshot.mode != Mode::Never {
        context.warn("cdc.snapshot.mode", "nothing is copied: `enabled` is not true");
    }
    let published = &config.cdc.publication.tables;
    match config.mode() {
        Mode::SnapshotOnly if snapshot.tables.is_empty() && !context.given("cdc.snapshot.tables") => {
            context.refuse("cdc.snapshot.tables", "missing: mode snapshot_only needs the tables to copy");
        }
        Mode::Initial if !published.is_empty() => {
            for table in snapshot.tables.iter().filter(|table| !names(published, &table.id)) {
                let message = format!("{} is not in publication.tables: its changes would be missed", text(&table.id));
                context.refuse("cdc.snapshot.tables", message);
            }
        }
        _ => {}
    }
}

fn publication(config: &Config, context: &Context<'_>) {
    let publication = &config.cdc.publication;
    if config.mode() == Mode::SnapshotOnly {
        return;
    }
    if publication.create_if_not_exists && publication.tables.is_empty() {
        context.refuse("cdc.publication.tables", "missing: createIfNotExists needs the tables to publish");
    }
    for operation in Operation::ALL {
        if context.given("cdc.publication.operations") && !publication.operations.contains(&operation) {
            let message = format!("{} is left out: {}", operation.word(), operation.left_out());
            context.warn("cdc.publication.operations", &message);
        }
    }
    if let Some(heartbeat) = &config.cdc.heartbeat
        && !publication.tables.is_empty()
        && !names(&publication.tables, &heartbeat.table)
    {
        let message =
            format!("{} is not in publication.tables: add it, or its writes move no position", text(&heartbeat.table));
        context.refuse("cdc.heartbeat.table", message);
    }
}

fn mapping(config: &mut Config, context: &Context<'_>) {
    const PATH: &str = "elasticsearch.tableIndexMapping";
    let copy_only = config.mode() == Mode::SnapshotOnly;
    let (published, copied) = (&config.cdc.publication.tables, &config.cdc.snapshot.tables);
    let declared = || published.iter().chain(copied).map(|table| &table.id);
    let mapping = &mut config.elasticsearch.table_index_mapping;
    // A schema whose own name holds a dot: only the list of tables knows where the name begins.
    for id in declared().filter(|id| id.schema.contains('.')) {
        if let Some(index) = mapping.remove(&mapped_table(&id.to_string())) {
            mapping.insert(id.clone(), index);
        }
    }
    // Without a list of tables the publication, made by somebody else, decides.
    if declared().next().is_some() && (copy_only || !published.is_empty()) {
        for table in mapping.keys().filter(|table| !declared().any(|id| id == *table)) {
            let message =
                "the table is in neither publication.tables nor snapshot.tables: list it, or remove the entry";
            context.refuse(&place(PATH, table, context), message);
        }
    }
    let mut indices = std::collections::BTreeMap::new();
    for (table, index) in mapping.iter() {
        if let Some(other) = indices.insert(index, table) {
            let message = format!(
                "{} goes to this index too, and rows with the same key would overwrite each other: \
                 give each table its own index (for partitions, list the root with `partitioned: true`)",
                text(other)
            );
            context.refuse(&place(PATH, table, context), message);
        }
    }
    let heartbeat = config.cdc.heartbeat.as_ref().map(|heartbeat| &heartbeat.table);
    let mut unmapped: Vec<_> =
        declared().filter(|id| !mapping.contains_key(*id) && Some(*id) != heartbeat).map(text).collect();
    unmapped.sort();
    unmapped.dedup();
    for table in unmapped {
        context.warn(PATH, &format!("no index for {table}: its rows and changes are left out"));
    }
}

/// The path of a table's entry, as the file spells it.
fn place(mapping: &str, table: &TableId, context: &Context<'_>) -> String {
    let full = format!("{mapping}.{}", text(table));
    let short = format!("{mapping}.{}", shown(&table.name, 140));
    if !context.given(&full) && context.given(&short) { short } else { full }
}

fn names(tables: &[Table], id: &TableId) -> bool {
    tables.iter().any(|table| &table.id == id)
}

fn text(id: &TableId) -> String {
    shown(&id.to_string(), 140)
}
