//! What can go wrong with PostgreSQL, and what to do about it.

use std::error::Error;
use std::io;

use crate::problem::{Problem, ProblemKind};

use super::pgoutput::DecodeError;

/// Something went wrong with PostgreSQL. No text of it holds a password or a row.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    /// Nobody answers at the address: refused, unknown host, no answer in time.
    #[error("PostgreSQL at {address} does not answer: {source}")]
    Connect {
        /// `host:port`, or the socket's path.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The server has no TLS, or its certificate or the handshake is refused.
    #[error("no TLS connection to PostgreSQL at {address}: {reason}")]
    Tls {
        /// `host:port`.
        address: String,
        /// Why.
        reason: String,
    },
    /// A file of `cdc.sslRootCert`, `cdc.sslCert` or `cdc.sslKey` cannot be used.
    #[error("{key} cannot be used: {reason}")]
    Certificate {
        /// The configuration's key.
        key: &'static str,
        /// Why.
        reason: String,
    },
    /// The server and we cannot agree on who we are.
    #[error("PostgreSQL at {address} cannot be logged in to: {reason}")]
    Login {
        /// `host:port`, or the socket's path.
        address: String,
        /// Why.
        reason: String,
    },
    /// The server answered with an error.
    #[error("PostgreSQL says: {0}")]
    Server(ServerError),
    /// The connection ended.
    #[error("the connection to PostgreSQL ended: {0}")]
    Closed(String),
    /// The server sent what is not in the protocol.
    #[error("PostgreSQL sent what is not understood: {0}")]
    Protocol(String),
    /// The stream holds what `pgoutput` does not have.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// An error as the server reported it. The detail is left out on purpose: it often holds values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} (SQLSTATE {sqlstate})")]
pub struct ServerError {
    /// The five characters of the SQLSTATE.
    pub sqlstate: String,
    /// The primary message, control characters removed.
    pub message: String,
    /// It came in the stream of a slot or as the answer to its start.
    pub streaming: bool,
}

impl ServerError {
    pub(super) fn new(sqlstate: &str, message: &str) -> Self {
        Self { sqlstate: printable(sqlstate), message: printable(message), streaming: false }
    }

    pub(super) fn of_a_stream(self) -> Self {
        Self { streaming: true, ..self }
    }
}

/// Names in a message are the database's to choose: none may reach the terminal as an escape sequence.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

impl From<tokio_postgres::Error> for PostgresError {
    fn from(error: tokio_postgres::Error) -> Self {
        if let Some(server) = error.as_db_error() {
            return PostgresError::Server(ServerError::new(server.code().code(), server.message()));
        }
        let text = chain(&error);
        // Bytes that cannot be parsed come as invalid input.
        let broken = io_error(&error).is_some_and(|error| error.kind() != io::ErrorKind::InvalidInput);
        if error.is_closed() || broken { PostgresError::Closed(text) } else { PostgresError::Protocol(text) }
    }
}

/// The error's own text and those of its causes.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    printable(&text)
}

/// The input or output error that is the cause, if one is.
pub(super) fn io_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a io::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

impl From<PostgresError> for Problem {
    fn from(error: PostgresError) -> Self {
        error.problem()
    }
}

impl From<tokio_postgres::Error> for Problem {
    fn from(error: tokio_postgres::Error) -> Self {
        PostgresError::from(error).problem()
    }
}

impl PostgresError {
    /// The SQLSTATE, if the server sent one.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            PostgresError::Server(error) => Some(&error.sqlstate),
            _ => None,
        }
    }

    /// What to show to the reader.
    #[must_use]
    pub fn problem(&self) -> Problem {
        let says = |kind, hint: &str| Problem::new(kind, self.to_string(), hint);
        match self {
            PostgresError::Connect { .. } => says(
                ProblemKind::Postgres,
                "Check cdc.host and cdc.port, that the server runs, that its listen_addresses include this address, and \
                 that no firewall is between.",
            )
            .transient(),
            PostgresError::Tls { .. } => says(
                ProblemKind::Postgres,
                "Check cdc.sslMode, and for verify-ca and verify-full that cdc.sslRootCert is the authority that signed the \
                 server's certificate, and for verify-full that the certificate names cdc.host as a subject alternative name.",
            ),
            PostgresError::Certificate { .. } => {
                says(ProblemKind::Config, "Give a readable PEM file, or leave the key out.")
            }
            PostgresError::Login { .. } => {
                says(ProblemKind::Postgres, "Check cdc.username and cdc.password, and the server's pg_hba.conf.")
            }
            PostgresError::Server(error) => server_problem(error, says),
            PostgresError::Closed(_) => {
                says(ProblemKind::Postgres, "It is made again by itself. If it keeps ending, the server's log says why.")
                    .transient()
            }
            PostgresError::Protocol(_) => says(
                ProblemKind::Postgres,
                "Check that cdc.host and cdc.port are those of a PostgreSQL server of version 14 or later, not of a pooler.",
            ),
            PostgresError::Decode(_) => says(
                ProblemKind::Internal,
                "Please report it with the versions of PostgreSQL and pgtide. Nothing was acknowledged; the slot keeps the changes.",
            ),
        }
    }
}

fn server_problem(error: &ServerError, says: impl Fn(ProblemKind, &str) -> Problem) -> Problem {
    use ProblemKind::{Gap, Postgres, Setup};
    let mentions = |text: &str| error.message.contains(text);
    match error.sqlstate.as_str() {
        "28P01" => says(Postgres, "Check cdc.username and cdc.password."),
        "28000" => says(
            Postgres,
            "Check cdc.username and cdc.password, and that the server's pg_hba.conf lets this user, database, address and \
             cdc.sslMode in.",
        ),
        "3D000" => says(Postgres, "Check cdc.database."),
        "53300" => says(
            Postgres,
            "The server has no connection left, or no walsender: raise max_connections or max_wal_senders, or end other \
             sessions.",
        )
        .transient(),
        "53400" => says(Setup, "Drop replication slots that nobody needs, or raise max_replication_slots and restart the server."),
        "57P01" | "57P02" | "57P03" => says(Postgres, "The server restarts or stops. It is tried again by itself.").transient(),
        "42501" => says(Setup, grant(error)),
        "55006" => says(
            Setup,
            "Another process uses the slot: a second pgtide, or the former connection that the server has not given up yet. \
             One pipeline needs a slot of its own (cdc.slot.name).",
        )
        .transient(),
        "42704" if mentions("slot") => {
            says(Setup, "Check cdc.slot.name, or set cdc.slot.createIfNotExists: true to have it created.")
        }
        // Its existence was looked at before: there was none when the change was made that is read now.
        "42704" | "55000" if mentions("publication") => says(
            Gap,
            "Changes that were made while it was missing cannot be streamed, even if it is there again. Drop the slot (SELECT \
             pg_drop_replication_slot(...)) and start with `cdc.snapshot.resnapshot: true` to copy the tables again.",
        ),
        "55P03" => says(
            Setup,
            "Another session has it locked. See who: SELECT pid, query FROM pg_stat_activity WHERE pid IN (SELECT pid FROM \
             pg_locks WHERE mode = 'AccessExclusiveLock').",
        )
        .transient(),
        // Internal errors of PostgreSQL, never translated: what a catalog has just listed is dropped or altered by a
        // concurrent transaction before it is opened. `pg_publication_tables` and the functions that print definitions do so.
        "XX000" if RACES.iter().any(|text| mentions(text)) => says(
            Setup,
            "A table was dropped or altered while the catalog was read. It is tried again by itself. If it stays, the \
             catalog is damaged: the server's log says more.",
        )
        .transient(),
        "55000" if mentions("wal_level") => says(Setup, "Set wal_level = logical and restart the server."),
        // From version 16 on, and before. In other languages the slot's wal_status tells.
        "55000" if mentions("can no longer") || mentions("cannot read from logical replication slot") => says(Gap, LOST),
        // A missing file. Its message is in the server's language; of a stream it can only be what is to be read.
        "58P01" if error.streaming || mentions("WAL segment") || mentions("pg_wal") => says(Gap, LOST),
        // Looking at the catalog locks tables, too.
        code if code.starts_with("40") => says(
            Setup,
            "A transaction of another session was in the way. It is tried again by itself. If it stays, the server's log says \
             whose.",
        )
        .transient(),
        // Connection failures, out of memory or disk, cancelled by an operator.
        code if ["08", "53", "57"].iter().any(|class| code.starts_with(class)) => {
            says(Postgres, "It is tried again by itself. If it stays, the server's log says why.").transient()
        }
        _ => says(Postgres, "The server's log says more."),
    }
}

const RACES: [&str; 3] = ["could not open relation with OID", "cache lookup failed for", "tuple concurrently "];

const LOST: &str = "The server has removed WAL that was not read yet, so changes are missing. Drop the slot and copy the tables \
                    again; a larger max_slot_wal_keep_size keeps it from happening.";

fn grant(error: &ServerError) -> &'static str {
    let message = error.message.to_lowercase();
    let mentions = |text: &str| message.contains(text);
    if mentions("walsender") || mentions("wal sender") || mentions("replication") {
        "Grant it as a superuser: ALTER ROLE ... REPLICATION (on Amazon RDS: GRANT rds_replication TO ...), for the role cdc.username."
    } else if mentions("row-level security") {
        "A policy of row security hides rows from the role cdc.username: as a superuser, ALTER ROLE ... BYPASSRLS."
    } else if mentions("cdc_snapshot_") {
        "Grant it: GRANT SELECT, INSERT, UPDATE, DELETE ON public.cdc_snapshot_job, public.cdc_snapshot_chunks, \
         public.cdc_snapshot_tables and GRANT USAGE ON SEQUENCE public.cdc_snapshot_chunks_id_seq TO the role cdc.username."
    } else if mentions("for schema") {
        "Grant it: GRANT USAGE ON SCHEMA ... TO the role cdc.username; to create the ledger, CREATE as well."
    } else if mentions("for database") {
        "Grant it: GRANT CREATE, CONNECT ON DATABASE ... TO the role cdc.username."
    } else if mentions("owner of") {
        "Only the table's owner may do this: make the role cdc.username a member of the owning role, or do it once by hand."
    } else {
        "Grant it: GRANT SELECT ON the table TO the role cdc.username."
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(sqlstate: &str, message: &str) -> Problem {
        PostgresError::Server(ServerError::new(sqlstate, message)).problem()
    }

    #[test]
    fn the_sqlstate_decides_kind_and_patience() {
        use ProblemKind::{Gap, Postgres, Setup};
        for (sqlstate, message, kind, transient, hint) in [
            ("28P01", "password authentication failed for user \"u\"", Postgres, false, "cdc.password"),
            ("28000", "no pg_hba.conf entry for host", Postgres, false, "pg_hba.conf"),
            ("3D000", "database \"x\" does not exist", Postgres, false, "cdc.database"),
            ("53300", "sorry, too many clients already", Postgres, true, "max_connections"),
            ("53400", "all replication slots are in use", Setup, false, "max_replication_slots"),
            ("57P03", "the database system is starting up", Postgres, true, "again"),
            ("57P01", "terminating connection", Postgres, true, "again"),
            ("42501", "must be superuser or replication role to start walsender", Setup, false, "REPLICATION"),
            ("42501", "permission denied for table users", Setup, false, "GRANT SELECT"),
            ("42501", "permission denied for schema app", Setup, false, "GRANT USAGE"),
            ("42501", "query would be affected by row-level security policy for table", Setup, false, "BYPASSRLS"),
            ("42501", "must be owner of table users", Setup, false, "owner"),
            ("55006", "replication slot \"s\" is active for PID 7", Setup, true, "cdc.slot.name"),
            ("42704", "replication slot \"s\" does not exist", Setup, false, "cdc.slot.name"),
            ("42704", "publication \"p\" does not exist", Gap, false, "resnapshot"),
            ("55000", "skipped loading publication \"p\"", Gap, false, "resnapshot"),
            ("55P03", "canceling statement due to lock timeout", Setup, true, "pg_locks"),
            ("55000", "logical decoding requires wal_level >= logical", Setup, false, "wal_level"),
            ("55000", "can no longer get changes from replication slot \"s\"", Gap, false, "copy the tables"),
            ("58P01", "requested WAL segment 00 has already been removed", Gap, false, "copy the tables"),
            ("40P01", "deadlock detected", Setup, true, "again"),
            ("XX000", "could not open relation with OID 25085", Setup, true, "again"),
            ("XX000", "cache lookup failed for attribute 3 of relation 7", Setup, true, "again"),
            ("XX000", "invalid page in block 7", Postgres, false, "log"),
            ("42P01", "relation does not exist", Postgres, false, "log"),
        ] {
            let problem = server(sqlstate, message);
            assert_eq!((problem.kind, problem.transient), (kind, transient), "{sqlstate} {message}");
            assert!(problem.hint.contains(hint), "{sqlstate} {message}: {}", problem.hint);
            assert!(problem.message.contains(message) && problem.message.contains(sqlstate), "{}", problem.message);
        }
    }

    #[test]
    fn a_missing_file_is_a_gap_of_a_stream_only() {
        let error = ServerError::new("58P01", "das angeforderte WAL-Segment 00 wurde schon entfernt");
        assert_eq!(PostgresError::Server(error.clone()).problem().kind, ProblemKind::Postgres);
        assert_eq!(PostgresError::Server(error.of_a_stream()).problem().kind, ProblemKind::Gap);
    }

    #[test]
    fn names_cannot_move_the_cursor() {
        let problem = server("42P01", "relation \"\u{1b}[2J\u{9b}x\n\" does not exist");
        assert!(!problem.message.chars().any(char::is_control), "{:?}", problem.message);
    }

    #[test]
    fn a_silent_server_may_come_back() {
        let source = io::Error::new(io::ErrorKind::ConnectionRefused, "refused");
        let problem = PostgresError::Connect { address: "db:5432".into(), source }.problem();
        assert!(problem.transient);
        assert_eq!(problem.message, "PostgreSQL at db:5432 does not answer: refused");
        assert!(PostgresError::Closed("end".into()).problem().transient);
        assert!(!PostgresError::Decode(DecodeError::Empty).problem().transient);
    }
}
