//! The publication: what PostgreSQL publishes, created as configured or used as it is.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::config::{Cdc, Operation, ReplicaIdentity, Table};
use crate::problem::{Problem, ProblemKind};
use crate::table::{TableId, quote_identifier, quote_literal};

/// A table as a publication publishes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The table.
    pub id: TableId,
    /// Its published columns; empty before PostgreSQL 15, which publishes all.
    pub columns: Vec<String>,
    /// Its row filter: an SQL condition; PostgreSQL 15 and newer.
    pub row_filter: Option<String>,
}

/// A publication as the catalog describes it.
#[derive(Clone, Debug)]
pub struct Publication {
    /// What it publishes of INSERT, UPDATE, DELETE and TRUNCATE, in that order.
    pub operations: [bool; 4],
    /// Its tables: partitions or roots, as `publish_via_partition_root` says.
    pub tables: Vec<Published>,
}

/// Looks a publication up; `None` when there is none of that name.
///
/// # Errors
/// The queries fail.
pub async fn find(client: &Client, name: &str, server: u32) -> Result<Option<Publication>, Problem> {
    let Some(row) = client
        .query_opt(
            "SELECT pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_catalog.pg_publication WHERE pubname = $1",
            &[&name],
        )
        .await?
    else {
        return Ok(None);
    };
    let operations = [row.get(0), row.get(1), row.get(2), row.get(3)];
    let details = if server >= 150_000 { "attnames::text[], rowfilter" } else { "'{}'::text[], NULL::text" };
    let rows = client
        .query(
            &format!(
                "SELECT schemaname::text, tablename::text, {details} FROM pg_catalog.pg_publication_tables
                 WHERE pubname = $1"
            ),
            &[&name],
        )
        .await?;
    let tables = rows
        .iter()
        .map(|row| Published {
            id: TableId::new(row.get::<_, String>(0), row.get::<_, String>(1)),
            columns: row.get::<_, Option<Vec<String>>>(2).unwrap_or_default(),
            row_filter: row.get(3),
        })
        .collect();
    Ok(Some(Publication { operations, tables }))
}

/// Creates the publication that the configuration describes, unless somebody else has made one of that name meanwhile.
///
/// # Errors
/// PostgreSQL refuses.
pub async fn create(client: &Client, cdc: &Cdc, server: u32) -> Result<(), Problem> {
    let publication = &cdc.publication;
    let tables: Vec<String> =
        publication.tables.iter().map(|table| clause(table, server)).collect::<Result<_, Problem>>()?;
    let operations = list(Operation::ALL.into_iter().filter(|operation| asked_for(cdc, *operation)));
    let via_root = publication.tables.iter().any(|table| table.partitioned);
    let sql = format!(
        "CREATE PUBLICATION {} FOR TABLE {} WITH (publish = '{operations}', publish_via_partition_root = {via_root})",
        quote_identifier(&publication.name),
        tables.join(", "),
    );
    // In one transaction: `pgtide drop` removes what has the mark.
    let mark = quote_literal(&mark(&cdc.slot.name));
    let comment = format!("; COMMENT ON PUBLICATION {} IS {mark}", quote_identifier(&publication.name));
    as_owner(client, cdc, "create", &sql, &comment).await.map(drop)
}

/// Publishes one more table of the configuration. False: somebody else has done so meanwhile.
///
/// # Errors
/// PostgreSQL refuses.
pub async fn add(client: &Client, cdc: &Cdc, table: &Table, server: u32) -> Result<bool, Problem> {
    let name = quote_identifier(&cdc.publication.name);
    let sql = format!("ALTER PUBLICATION {name} ADD TABLE {}", clause(table, server)?);
    as_owner(client, cdc, "alter", &sql, "").await
}

/// A table as `FOR TABLE` and `ADD TABLE` take it.
fn clause(table: &Table, server: u32) -> Result<String, Problem> {
    // Tables that inherit from it are not copied, and without a key of their own their UPDATEs would be refused.
    let text = format!("ONLY {}", table.id.quoted());
    if table.columns.is_empty() {
        return Ok(text);
    }
    if server < 150_000 {
        return Err(Problem::new(
            ProblemKind::Setup,
            format!("table {} has `columns`, but this PostgreSQL cannot publish a list of columns", table.id),
            "Remove `columns`, or use PostgreSQL 15 or newer.",
        ));
    }
    let columns: Vec<_> = table.columns.iter().map(|column| quote_identifier(column)).collect();
    Ok(format!("{text} ({})", columns.join(", ")))
}

/// Runs what only the owner of the tables may do, and `then` in the same transaction; to another role `sql` is told whole.
/// False: it was so already. An index of the catalog says that of what another session has just committed.
async fn as_owner(client: &Client, cdc: &Cdc, verb: &str, sql: &str, then: &str) -> Result<bool, Problem> {
    let already = [&SqlState::DUPLICATE_OBJECT, &SqlState::UNIQUE_VIOLATION];
    match client.batch_execute(&format!("{sql}{then}")).await {
        Err(error) if error.code().is_some_and(|code| already.contains(&code)) => Ok(false),
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Err(Problem::new(
            ProblemKind::Setup,
            format!(
                "user {} may not {verb} publication {}: {}",
                cdc.username,
                cdc.publication.name,
                super::PostgresError::from(error)
            ),
            format!(
                "It takes the owner of the tables, with CREATE on the database. As that one, or as a superuser: {sql};"
            ),
        )),
        // Its detail names kinds of tables only.
        Err(error) if error.code() == Some(&SqlState::INVALID_PARAMETER_VALUE) => {
            let detail =
                error.as_db_error().and_then(tokio_postgres::error::DbError::detail).unwrap_or_default().to_owned();
            Err(Problem::new(
                ProblemKind::Setup,
                format!(
                    "PostgreSQL does not {verb} publication {} so: {}. {detail}",
                    cdc.publication.name,
                    super::PostgresError::from(error)
                ),
                "Of an unlogged table nothing is streamed: ALTER TABLE ... SET LOGGED. Otherwise take it out of the \
                 configuration.",
            ))
        }
        outcome => Ok(outcome.map(|()| true)?),
    }
}

/// What the comment of a publication says that pgtide made.
const MARK: &str = "made by pgtide for slot ";

fn mark(slot: &str) -> String {
    format!("{MARK}{slot}")
}

/// Who made a publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// pgtide, for the slot in question.
    Pgtide,
    /// pgtide, for the slot in question, and others stream from it as well.
    Shared,
    /// pgtide, for another slot.
    OtherSlot,
    /// Somebody else, or a pgtide that left no mark.
    Other,
}

/// Who made a publication, by its comment; `None` when there is none of that name.
///
/// # Errors
/// The query fails.
pub async fn maker(client: &Client, name: &str, slot: &str) -> Result<Option<Maker>, Problem> {
    let row = client
        .query_opt(
            "SELECT pg_catalog.obj_description(oid, 'pg_publication') FROM pg_catalog.pg_publication WHERE pubname = $1",
            &[&name],
        )
        .await?;
    Ok(row.map(|row| match row.get::<_, Option<String>>(0) {
        Some(comment) if comment == mark(slot) => Maker::Pgtide,
        Some(comment) if comment.starts_with(MARK) => Maker::OtherSlot,
        _ => Maker::Other,
    }))
}

/// The configuration wants this operation; an empty list wants all.
fn asked_for(cdc: &Cdc, operation: Operation) -> bool {
    cdc.publication.operations.is_empty() || cdc.publication.operations.contains(&operation)
}

/// Operations as `publish` takes them.
fn list(operations: impl Iterator<Item = Operation>) -> String {
    operations.map(|operation| operation.word().to_lowercase()).collect::<Vec<_>>().join(", ")
}

/// The operations that the configuration does not leave out and the publication does, as a problem that says what comes
/// of it; `None` when there is none.
#[must_use]
pub fn lacks(cdc: &Cdc, published: &Publication) -> Option<Problem> {
    let all = || Operation::ALL.into_iter().zip(published.operations);
    let missing: Vec<Operation> =
        all().filter(|(operation, is)| !is && asked_for(cdc, *operation)).map(|(operation, _)| operation).collect();
    if missing.is_empty() {
        return None;
    }
    let words: Vec<_> = missing.iter().map(|operation| operation.word()).collect();
    let effects: Vec<_> = missing.iter().map(|operation| operation.left_out()).collect();
    let mended =
        list(all().filter(|(operation, is)| *is || missing.contains(operation)).map(|(operation, _)| operation));
    Some(Problem::new(
        ProblemKind::Setup,
        format!("publication {} does not publish {}: {}", cdc.publication.name, words.join(", "), effects.join(", ")),
        format!(
            "ALTER PUBLICATION {} SET (publish = '{mended}'); what was changed before then comes by copying the tables again. \
             If it is meant to be so, name in `cdc.publication.operations` only what is published.",
            quote_identifier(&cdc.publication.name),
        ),
    ))
}

/// Sets the replica identity of a table where the configuration asks for another than it has.
///
/// Waits at most two seconds for the lock: an `ALTER TABLE` that queues behind a long transaction makes every writer
/// queue behind itself. Returns whether anything was changed.
///
/// # Errors
/// PostgreSQL refuses, or somebody holds the table.
pub async fn set_replica_identity(client: &Client, table: &Table, present: char) -> Result<bool, Problem> {
    let Some(wanted) = &table.replica_identity else { return Ok(false) };
    let (letter, clause) = match wanted {
        ReplicaIdentity::Default => ('d', "DEFAULT".to_owned()),
        ReplicaIdentity::Full => ('f', "FULL".to_owned()),
        ReplicaIdentity::Nothing => ('n', "NOTHING".to_owned()),
        ReplicaIdentity::UsingIndex(index) => ('i', format!("USING INDEX {}", quote_identifier(index))),
    };
    let same = letter == present
        && match wanted {
            ReplicaIdentity::UsingIndex(index) => {
                let row = client
                    .query_opt(
                        "SELECT FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
                         WHERE i.indrelid = $1::text::regclass AND i.indisreplident AND c.relname = $2",
                        &[&table.id.quoted(), index],
                    )
                    .await?;
                row.is_some()
            }
            _ => true,
        };
    if same {
        return Ok(false);
    }
    let sql = format!(
        "BEGIN; SET LOCAL lock_timeout = '2s'; ALTER TABLE {} REPLICA IDENTITY {clause}; COMMIT",
        table.id.quoted()
    );
    if let Err(error) = client.batch_execute(&sql).await {
        client.batch_execute("ROLLBACK").await?;
        return Err(Problem::new(
            ProblemKind::Setup,
            format!(
                "cannot set the replica identity of {} to {clause}: {}",
                table.id,
                super::PostgresError::from(error)
            ),
            "Set it yourself with ALTER TABLE, or remove `replicaIdentity` from the configuration to leave it as it is.",
        ));
    }
    Ok(true)
}
