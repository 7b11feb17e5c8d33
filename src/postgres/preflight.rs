//! What has to be so before anything is created or read, and what to do where it is not.

use tokio_postgres::Client;

use super::catalog::{self, TableInfo, Wanted};
use super::slot::SlotInfo;
use super::{locks, publication};
use crate::config::{Config, Mode, Strategy, WithoutKey};
use crate::problem::{Problem, ProblemKind};
use crate::table::{Column, TableId};

/// The server, as far as it matters here.
#[derive(Clone, Debug)]
pub struct Server {
    /// `server_version_num`, such as 170004.
    pub version: u32,
    /// `server_version`, such as `17.4`.
    pub version_text: String,
    /// `pg_control_system().system_identifier`: tells one cluster from another.
    pub system_id: String,
    /// Rises with every promotion of a standby.
    pub timeline: u32,
    /// `wal_segment_size` in bytes.
    pub wal_segment: u64,
    wal_level: String,
    in_recovery: bool,
    free_slots: i64,
    free_senders: i64,
    may_replicate: bool,
    keep_limit_mib: i64,
}

/// Reads the server's settings.
///
/// # Errors
/// The query fails.
pub async fn server(client: &Client) -> Result<Server, Problem> {
    let row = client
        .query_one(
            "SELECT current_setting('server_version_num')::int4, split_part(current_setting('server_version'), ' ', 1),
                    (SELECT system_identifier::text FROM pg_catalog.pg_control_system()),
                    current_setting('wal_level'), pg_catalog.pg_is_in_recovery(),
                    current_setting('max_replication_slots')::int8 - (SELECT count(*) FROM pg_catalog.pg_replication_slots),
                    current_setting('max_wal_senders')::int8 - (SELECT count(*) FROM pg_catalog.pg_stat_replication),
                    (SELECT rolreplication OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user),
                    (SELECT setting::int8 FROM pg_catalog.pg_settings WHERE name = 'max_slot_wal_keep_size'),
                    CASE WHEN pg_catalog.pg_is_in_recovery()
                         THEN (SELECT timeline_id::int8 FROM pg_catalog.pg_control_checkpoint())
                         ELSE ('x' || left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8))::bit(32)::int8 END,
                    pg_catalog.pg_size_bytes(current_setting('wal_segment_size'))",
            &[],
        )
        .await?;
    Ok(Server {
        version: u32::try_from(row.get::<_, i32>(0)).unwrap_or(0),
        version_text: row.get(1),
        system_id: row.get(2),
        timeline: u32::try_from(row.get::<_, i64>(9)).unwrap_or(0),
        wal_segment: u64::try_from(row.get::<_, i64>(10)).unwrap_or(16 << 20),
        wal_level: row.get(3),
        in_recovery: row.get(4),
        free_slots: row.get(5),
        free_senders: row.get(6),
        may_replicate: row.get::<_, Option<bool>>(7).unwrap_or(false),
        keep_limit_mib: row.get::<_, Option<i64>>(8).unwrap_or(-1),
    })
}

/// The SQLSTATE of a statement that waited for a lock for too long.
const LOCK_TIMEOUT: &str = "55P03";

fn setup(message: impl Into<String>, hint: impl Into<String>) -> Problem {
    Problem::new(ProblemKind::Setup, message, hint)
}

impl Server {
    /// `max_slot_wal_keep_size` in bytes; none when unlimited.
    #[must_use]
    pub fn keep_limit(&self) -> Option<u64> {
        u64::try_from(self.keep_limit_mib).ok().map(|mib| mib << 20)
    }

    /// Whether this server can do what `mode` needs. `slot` is ours, if it is there already.
    ///
    /// # Errors
    /// The first thing that is not so, with what to do.
    pub fn check(&self, config: &Config, slot: Option<&SlotInfo>) -> Result<(), Problem> {
        if self.version < 140_000 {
            return Err(setup(
                format!("PostgreSQL {} is too old", self.version_text),
                "pgtide needs PostgreSQL 14 or newer.",
            ));
        }
        if self.in_recovery {
            return Err(setup(
                "this server is a standby, on which neither the ledger nor a publication can be written",
                "Give the primary in `cdc.host`. A slot on a standby cannot be streamed from.",
            ));
        }
        if config.mode() == Mode::SnapshotOnly {
            return Ok(());
        }
        if self.wal_level != "logical" {
            return Err(setup(
                format!("wal_level is {}, changes can only be streamed with wal_level = logical", self.wal_level),
                "ALTER SYSTEM SET wal_level = 'logical'; then restart PostgreSQL. (On a managed server it is a parameter, \
                 such as rds.logical_replication.) Mode snapshot_only works without.",
            ));
        }
        if !self.may_replicate {
            return Err(setup(
                format!("user {} may not use replication", config.cdc.username),
                format!(
                    "ALTER ROLE {} REPLICATION; (On a managed server: GRANT rds_replication, or the like.)",
                    crate::table::quote_identifier(&config.cdc.username)
                ),
            ));
        }
        if config.cdc.slot.failover && self.version < 170_000 {
            return Err(setup(
                format!("PostgreSQL {} has no failover slots", self.version_text),
                "Leave `cdc.slot.failover` out; it needs PostgreSQL 17 or newer.",
            ));
        }
        if slot.is_none() && !config.cdc.slot.create_if_not_exists {
            return Err(setup(
                format!("there is no replication slot {}", config.cdc.slot.name),
                "Set `cdc.slot.createIfNotExists: true`, or correct `cdc.slot.name`.",
            ));
        }
        Ok(())
    }

    /// Whether there is room for what the process that leads needs beside `slot`, if that is there already.
    ///
    /// # Errors
    /// No slot or no WAL sender is free.
    pub fn room(&self, config: &Config, slot: Option<&SlotInfo>) -> Result<(), Problem> {
        if config.mode() == Mode::SnapshotOnly {
            return Ok(());
        }
        if slot.is_none() && self.free_slots < 1 {
            return Err(setup(
                "no replication slot is free",
                "Drop one that nobody needs (SELECT slot_name, active FROM pg_replication_slots), or raise \
                 max_replication_slots and restart PostgreSQL.",
            ));
        }
        if self.free_senders < 1 {
            return Err(setup(
                "no WAL sender is free",
                "Stop a replication client (SELECT * FROM pg_stat_replication), or raise max_wal_senders and restart \
                 PostgreSQL.",
            )
            .transient());
        }
        Ok(())
    }
}

/// A table of the configuration that can be copied and streamed.
#[derive(Clone, Debug)]
pub struct Ready {
    /// As the catalog has it.
    pub info: TableInfo,
    /// Only rows that meet this SQL condition are copied.
    pub condition: Option<String>,
    /// How it is to be cut into chunks.
    pub strategy: Strategy,
    /// Only rows that meet this one are published: the publication's row filter, a part of `condition` as well.
    pub row_filter: Option<String>,
}

/// Makes the publication and the replica identities as configured, and looks at each table in `wanted`.
///
/// # Errors
/// A table is missing, has no key, is not published, or may not be read; the publication is missing.
pub async fn tables(
    client: &Client,
    config: &Config,
    server: &Server,
    wanted: &[TableId],
    need_key: bool,
) -> Result<Vec<Ready>, Problem> {
    ready(client, config, server, wanted, need_key, true).await
}

/// The same for somebody who only looks: nothing is made and nothing is changed.
///
/// # Errors
/// A table is missing, has no key, is not published, or may not be read; the publication is missing.
pub async fn look(
    client: &Client,
    config: &Config,
    server: &Server,
    wanted: &[TableId],
    need_key: bool,
) -> Result<Vec<Ready>, Problem> {
    ready(client, config, server, wanted, need_key, false).await
}

async fn ready(
    client: &Client,
    config: &Config,
    server: &Server,
    wanted: &[TableId],
    need_key: bool,
    make: bool,
) -> Result<Vec<Ready>, Problem> {
    let cdc = &config.cdc;
    let streams = config.mode() != Mode::SnapshotOnly;
    let mut found = Vec::with_capacity(wanted.len());
    // Even the size of a table cannot be had while somebody has it locked.
    client.batch_execute("SET lock_timeout = '2s'").await?;
    for id in wanted {
        let configured = entry(config, id);
        let columns = configured.map(|table| table.columns.clone()).unwrap_or_default();
        let Some(mut info) = look_at(client, &Wanted { id: id.clone(), columns }).await? else {
            return Err(missing(client, id).await?);
        };
        if streams
            && make
            && let Some(table) = cdc.publication.tables.iter().find(|table| table.id == *id)
            && publication::set_replica_identity(client, table, info.replica_identity).await?
        {
            let columns = table.columns.clone();
            if let Some(changed) = catalog::table(client, &Wanted { id: id.clone(), columns }).await? {
                info = changed;
            }
        }
        readable(client, &info).await?;
        // Before the publication: once published, a table without a key refuses its application's UPDATE and DELETE.
        let named =
            !info.key().is_empty() || by_whole_rows(config) && (!streams || sends_whole_rows(client, &info).await?);
        if need_key && !named {
            return Err(crate::stream::no_key(id));
        }
        if need_key && streams && info.kind == 'p' {
            same_key(client, &info).await?;
        }
        let condition = configured
            .and_then(|table| table.query_condition.clone())
            .or_else(|| config.cdc.snapshot.query_condition.clone());
        let strategy = configured.map(|table| table.strategy).unwrap_or_default();
        found.push(Ready { info, condition, row_filter: None, strategy });
    }
    if streams {
        published(client, config, server, &mut found, make).await?;
    }
    for ready in &found {
        if need_key && ready.info.key().is_empty() && !by_whole_rows(config) {
            return Err(crate::stream::no_key(&ready.info.id));
        }
        reserved(&ready.info)?;
    }
    Ok(found)
}

/// The entry of a table in the configuration: that of the snapshot before that of the publication.
fn entry<'a>(config: &'a Config, id: &TableId) -> Option<&'a crate::config::Table> {
    let own = config.cdc.snapshot.tables.iter().find(|table| table.id == *id);
    own.or_else(|| config.cdc.publication.tables.iter().find(|table| table.id == *id))
}

/// The table. Where a lock keeps it from being looked at it says which table that is, and who has the lock.
async fn look_at(client: &Client, wanted: &Wanted) -> Result<Option<TableInfo>, Problem> {
    let looked_up = catalog::table(client, wanted).await;
    let Err(problem) = looked_up else { return looked_up };
    if !problem.message.contains(LOCK_TIMEOUT) {
        return Err(problem);
    }
    let (message, hint) = locks::locked(client, &wanted.id).await?;
    Err(Problem { message, hint, ..problem })
}

async fn missing(client: &Client, id: &TableId) -> Result<Problem, Problem> {
    let near = client
        .query(
            "SELECT n.nspname::text || '.' || c.relname::text FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')",
            &[],
        )
        .await?;
    let text = id.to_string();
    let near = near.iter().map(|row| row.get::<_, String>(0));
    let nearest = near.map(|name| (strsim::damerau_levenshtein(&name, &text), name)).min();
    let hint = match nearest {
        Some((distance, name)) if distance <= 3 => format!("Did you mean {name}? Names are case-sensitive."),
        _ => "Create it, or correct the name. Views and foreign tables cannot be streamed.".to_owned(),
    };
    Ok(setup(format!("there is no table {id} in database {}", database(client).await?), hint))
}

async fn database(client: &Client) -> Result<String, Problem> {
    Ok(client.query_one("SELECT pg_catalog.current_database()::text", &[]).await?.get(0))
}

async fn readable(client: &Client, info: &TableInfo) -> Result<(), Problem> {
    let id = &info.id;
    let oids: Vec<u32> = info.leaves.iter().map(|leaf| leaf.oid).chain([info.oid]).collect();
    let row = client
        .query_one(
            "SELECT pg_catalog.has_table_privilege($1::oid, 'SELECT'), current_user::text,
                    (SELECT min(oid::pg_catalog.regclass::text) FROM unnest($2::oid[]) AS o (oid)
                     WHERE pg_catalog.row_security_active(oid))",
            &[&info.oid, &oids],
        )
        .await?;
    let user: String = row.get(1);
    let role = crate::table::quote_identifier(&user);
    if !row.get::<_, bool>(0) {
        return Err(setup(
            format!("user {user} may not read table {id}"),
            format!("GRANT SELECT ON {} TO {role};", id.quoted()),
        ));
    }
    if let Some(hidden) = row.get::<_, Option<String>>(2) {
        return Err(setup(
            format!("user {user} may not see all rows of table {id}: {hidden} is under row security"),
            format!(
                "As a superuser: ALTER ROLE {role} BYPASSRLS; (policies would hide rows from the copy, and not from the stream)"
            ),
        ));
    }
    Ok(())
}

fn by_whole_rows(config: &Config) -> bool {
    config.elasticsearch.without_key == WithoutKey::Hash
}

/// UPDATE and DELETE bring the whole old row, of each partition.
async fn sends_whole_rows(client: &Client, info: &TableInfo) -> Result<bool, Problem> {
    let leaves: Vec<u32> = info.leaves.iter().map(|leaf| leaf.oid).collect();
    let sql = "SELECT NOT EXISTS (SELECT FROM pg_catalog.pg_class WHERE oid = ANY ($1) AND relreplident <> 'f')";
    Ok(info.replica_identity == 'f' && client.query_one(sql, &[&leaves]).await?.get::<_, bool>(0))
}

/// Each partition has to send the key of its table, by which documents are named, whatever its own one is.
async fn same_key(client: &Client, info: &TableInfo) -> Result<(), Problem> {
    let leaves: Vec<u32> = info.leaves.iter().map(|leaf| leaf.oid).collect();
    let other = client
        .query_opt(
            "SELECT c.oid::pg_catalog.regclass::text FROM pg_catalog.pg_class c
             WHERE c.oid = ANY ($1) AND c.relreplident IN ('d', 'i') AND NOT $2::text[] <@ ARRAY(
                 SELECT a.attname::text FROM pg_catalog.pg_index i
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
                 WHERE i.indrelid = c.oid AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END)
             ORDER BY 1 LIMIT 1",
            &[&leaves, &info.key()],
        )
        .await?;
    let Some(other) = other else { return Ok(()) };
    let leaf: String = other.get(0);
    Err(setup(
        format!(
            "partition {leaf} of {} does not send the key of its table ({}) with UPDATE and DELETE",
            info.id,
            info.key().join(", ")
        ),
        format!("ALTER TABLE {leaf} REPLICA IDENTITY FULL; or give it the replica identity of its table."),
    ))
}

/// What makes documents differ from rows and may be meant so: for a person, a sentence each.
///
/// # Errors
/// The queries fail.
pub async fn warnings(
    client: &Client,
    config: &Config,
    server: &Server,
    tables: &[TableId],
) -> Result<Vec<String>, Problem> {
    let mut warnings = Vec::new();
    if config.mode() != Mode::SnapshotOnly {
        let publication = publication::find(client, &config.cdc.publication.name, server.version).await?;
        let lacks = publication.and_then(|publication| publication::lacks(&config.cdc, &publication));
        warnings.extend(lacks.map(|problem| format!("{}. {}", problem.message, problem.hint)));
    }
    if config.cdc.slot.failover {
        let waits = "SELECT coalesce(pg_catalog.current_setting('synchronized_standby_slots', TRUE), '') <> ''";
        if !client.query_one(waits, &[]).await?.get::<_, bool>(0) {
            warnings.push(
                "synchronized_standby_slots is empty: documents may be ahead of every standby, and tables have to be copied \
                 again after a failover that loses what they hold. Set it to the standbys' physical slots"
                    .to_owned(),
            );
        }
    }
    for id in tables {
        let row = client
            .query_one(
                "SELECT string_agg(h.inhrelid::pg_catalog.regclass::text, ', ' ORDER BY h.inhrelid)
                 FROM pg_catalog.pg_inherits h JOIN pg_catalog.pg_class c ON c.oid = h.inhparent
                 JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind = 'r'",
                &[&id.schema, &id.name],
            )
            .await?;
        if let Some(children) = row.get::<_, Option<String>>(0) {
            warnings.push(format!(
                "{id}: rows of tables that inherit from it ({children}) are neither copied nor streamed, only its own. Give \
                 them an index by `tables` and `tableIndexMapping` as well"
            ));
        }
    }
    Ok(warnings)
}

/// Checks the tables against the publication, creating it where the configuration says so, and takes over its lists
/// of columns and its row filters: the copy must hold what the stream will hold.
async fn published(
    client: &Client,
    config: &Config,
    server: &Server,
    found: &mut [Ready],
    make: bool,
) -> Result<(), Problem> {
    let cdc = &config.cdc;
    let name = &cdc.publication.name;
    let mut publication = publication::find(client, name, server.version).await?;
    if publication.is_none() {
        if !make || !cdc.publication.create_if_not_exists {
            return Err(setup(
                format!("there is no publication {name}"),
                format!(
                    "Start `pgtide run` with `cdc.publication.createIfNotExists: true`, or create it: CREATE PUBLICATION {} FOR TABLE {};",
                    crate::table::quote_identifier(name),
                    found.iter().map(|ready| ready.info.id.quoted()).collect::<Vec<_>>().join(", ")
                ),
            ));
        }
        publication::create(client, cdc, server.version).await?;
        publication = publication::find(client, name, server.version).await?;
    }
    let Some(publication) = publication else {
        return Err(setup(format!("publication {name} is gone again"), "Start again."));
    };
    if !cdc.publication.operations.is_empty()
        && let Some(problem) = publication::lacks(cdc, &publication)
    {
        return Err(problem);
    }
    for ready in found {
        let id = &ready.info.id;
        let leaf = |published: &&publication::Published| {
            published.id == *id || ready.info.leaves.iter().any(|leaf| leaf.id == published.id)
        };
        let Some(entry) = publication.tables.iter().find(leaf) else {
            return Err(setup(
                format!("publication {name} does not publish table {id}"),
                format!("ALTER PUBLICATION {} ADD TABLE {};", crate::table::quote_identifier(name), id.quoted()),
            ));
        };
        // Before 18 generated columns may be listed there, and are not published.
        let generated = if server.version >= 180_000 { entry.columns.as_slice() } else { &[] };
        let mut columns = catalog::columns(client, ready.info.oid, ready.info.replica_identity, generated).await?;
        columns.retain(|column| entry.columns.is_empty() || entry.columns.contains(&column.name));
        let listed = self::entry(config, id).map(|table| table.columns.as_slice()).unwrap_or_default();
        if !listed.is_empty() {
            same_columns(name, id, listed, &columns)?;
        }
        let key = ready.info.key().len();
        ready.info.columns = columns;
        if ready.info.key().len() != key {
            return Err(setup(
                format!("publication {name} leaves out a column of the key of {id}"),
                "Publish the key as well: the documents are named by it, and PostgreSQL refuses UPDATE and DELETE without.",
            ));
        }
        if let Some(filter) = &entry.row_filter {
            ready.row_filter = Some(filter.clone());
            ready.condition = Some(match &ready.condition {
                Some(own) => format!("({own}\n) AND ({filter})"),
                None => filter.clone(),
            });
        }
    }
    Ok(())
}

/// The tables of the configuration that an existing publication leaves out although the configuration would have
/// created it with them: those that were added to the configuration since, or taken out of the publication. Their
/// replica identity is as configured when this returns. A table without a key is not among them: published, it would
/// refuse its application's UPDATE and DELETE.
///
/// # Errors
/// The queries fail.
pub async fn unpublished<'a>(
    client: &Client,
    config: &'a Config,
    server: &Server,
    wanted: &[TableId],
) -> Result<Vec<&'a crate::config::Table>, Problem> {
    let wanted_publication = &config.cdc.publication;
    if !wanted_publication.create_if_not_exists {
        return Ok(Vec::new());
    }
    let Some(publication) = publication::find(client, &wanted_publication.name, server.version).await? else {
        return Ok(Vec::new());
    };
    let publishes = |id: &TableId| publication.tables.iter().any(|published| published.id == *id);
    let mut missing = Vec::new();
    for table in wanted_publication.tables.iter().filter(|table| wanted.contains(&table.id) && !publishes(&table.id)) {
        let looked_up = Wanted { id: table.id.clone(), columns: table.columns.clone() };
        let Some(mut info) = look_at(client, &looked_up).await? else { continue };
        if publication::set_replica_identity(client, table, info.replica_identity).await?
            && let Some(changed) = look_at(client, &looked_up).await?
        {
            info = changed;
        }
        let named = !info.key().is_empty() || by_whole_rows(config) && sends_whole_rows(client, &info).await?;
        if named && !info.leaves.iter().any(|leaf| publishes(&leaf.id)) {
            missing.push(table);
        }
    }
    Ok(missing)
}

/// The copy would hold what `listed` names, and the stream what is published.
fn same_columns(publication: &str, id: &TableId, listed: &[String], published: &[Column]) -> Result<(), Problem> {
    let published: Vec<&str> = published.iter().map(|column| column.name.as_str()).collect();
    if listed.len() == published.len() && listed.iter().all(|column| published.contains(&column.as_str())) {
        return Ok(());
    }
    let what = published.join(", ");
    let columns: Vec<String> = listed.iter().map(|column| crate::table::quote_identifier(column)).collect();
    Err(setup(
        format!(
            "publication {publication} publishes other columns of {id} ({what}) than `columns` has ({})",
            listed.join(", ")
        ),
        format!(
            "Make them the same: `columns` in the configuration, or in PostgreSQL 15 and newer the publication's, with ALTER \
             PUBLICATION {} SET TABLE {} ({}); and its other tables, as SET replaces them all.",
            crate::table::quote_identifier(publication),
            id.quoted(),
            columns.join(", ")
        ),
    ))
}

/// Names that Elasticsearch keeps for itself, or cannot take: said at once rather than once per document.
fn reserved(info: &TableInfo) -> Result<(), Problem> {
    const RESERVED: &[&str] = &[
        "_id",
        "_index",
        "_source",
        "_type",
        "_routing",
        "_field_names",
        "_ignored",
        "_size",
        "_seq_no",
        "_version",
        "_tier",
        "_doc_count",
        "_nested_path",
    ];
    for column in &info.columns {
        let name = column.name.as_str();
        if RESERVED.contains(&name) || name.split('.').any(|part| part.trim().is_empty()) {
            return Err(setup(
                format!("table {} has a column {name:?}, which Elasticsearch does not take as a field", info.id),
                "Leave it out by a list of `columns`, or rename it.",
            ));
        }
        if info.columns.iter().any(|other| other.name.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'))) {
            return Err(setup(
                format!("table {} has a column {name:?} and another that begins with \"{name}.\"", info.id),
                "Elasticsearch reads the dot as an object. Leave one of them out by a list of `columns`.",
            ));
        }
    }
    Ok(())
}
