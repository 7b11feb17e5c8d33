//! Connections: where to, by which TLS, with which session settings.

use std::future::Future;
use std::io;
use std::time::Duration;

use rustls::ClientConfig;
use tokio_postgres::Client;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::{Cdc, SslMode};
use crate::tls::{self, Check, Files, TlsError};

use super::PostgresError;
use super::error::{chain, io_error};

/// From the first packet to the end of the login.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence after which the peer is asked whether it is there.
pub(super) const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// Time between two such questions.
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How many of them go without an answer before the connection is given up.
pub(super) const KEEPALIVE_RETRIES: u32 = 3;
/// How long sent bytes may go unacknowledged.
pub(super) const UNACKNOWLEDGED: Duration = Duration::from_secs(60);

/// The settings that decide how values are printed, those that could end a session or a query of ours, that a policy
/// which hides rows is an error (`row_security`): a copy without them would pass for whole, and that warnings arrive: one
/// says that changes are left out of the stream. And how soon the server notices that our machine is gone without a word,
/// 25 s: until then locks, snapshot and slot stay taken. The encoder in [`text`](crate::text) relies on the first; every
/// session has the same, whatever the server, the database or the role prefers.
pub(super) const OPTIONS: &str = "-c datestyle=ISO,YMD -c intervalstyle=iso_8601 -c timezone=UTC -c extra_float_digits=3 \
                                  -c bytea_output=hex -c client_encoding=UTF8 -c standard_conforming_strings=on \
                                  -c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0 \
                                  -c idle_session_timeout=0 -c row_security=off -c client_min_messages=warning \
                                  -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3";

/// For the same reason as [`OPTIONS`], after the login: only servers from 17 on have `transaction_timeout`, and the others
/// refuse a start that names it. And a database in `SQL_ASCII` may hold bytes that are no UTF-8: asked for UTF-8,
/// PostgreSQL fails on the first of them; asked for nothing, it sends what it has.
pub(super) const SETTLE: &str = "SELECT set_config(name, CASE name WHEN 'client_encoding' THEN 'SQL_ASCII' ELSE '0' END, false) \
                                 FROM pg_catalog.pg_settings WHERE name = 'transaction_timeout' \
                                 OR name = 'client_encoding' AND current_setting('server_encoding') = 'SQL_ASCII'";

/// Connects for SQL. `purpose` is a word for `pg_stat_activity`: the application's name is `pgtide <purpose>`.
///
/// The connection ends when the client is dropped. When the server ends it, [`Client::is_closed`] tells.
///
/// # Errors
/// The server does not answer within 10 s, TLS or the login fail, a certificate's file cannot be read.
pub async fn connect(cdc: &Cdc, purpose: &str) -> Result<Client, PostgresError> {
    with_fallback(cdc, |ssl_mode| connect_by(cdc, purpose, ssl_mode)).await
}

/// Runs `attempt` by the mode that is in force. `prefer` goes without TLS where TLS does not come about, as libpq does.
pub(super) async fn with_fallback<T, F>(cdc: &Cdc, attempt: impl Fn(SslMode) -> F) -> Result<T, PostgresError>
where
    F: Future<Output = Result<T, PostgresError>>,
{
    // There is no TLS on Unix sockets.
    let ssl_mode = if is_socket(cdc) { SslMode::Disable } else { cdc.ssl_mode };
    let attempt = &attempt;
    let timed = |ssl_mode| async move {
        let late = || PostgresError::Connect { address: address(cdc), source: io::ErrorKind::TimedOut.into() };
        tokio::time::timeout(CONNECT_TIMEOUT, attempt(ssl_mode)).await.unwrap_or_else(|_| Err(late()))
    };
    let first = timed(ssl_mode).await;
    match &first {
        Err(PostgresError::Tls { .. }) if ssl_mode == SslMode::Prefer => timed(SslMode::Disable).await,
        // pg_hba.conf may let this user in without TLS only.
        Err(error) if ssl_mode == SslMode::Prefer && error.sqlstate() == Some("28000") => {
            timed(SslMode::Disable).await.or(first)
        }
        _ => first,
    }
}

async fn connect_by(cdc: &Cdc, purpose: &str, ssl_mode: SslMode) -> Result<Client, PostgresError> {
    let mut config = tokio_postgres::Config::new();
    config
        .host(&cdc.host)
        .port(cdc.port)
        .user(&cdc.username)
        .dbname(&cdc.database)
        .application_name(application_name(purpose))
        .options(OPTIONS)
        .ssl_mode(match ssl_mode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => tokio_postgres::config::SslMode::Require,
        })
        .tcp_user_timeout(UNACKNOWLEDGED)
        .keepalives_idle(KEEPALIVE_IDLE)
        .keepalives_interval(KEEPALIVE_INTERVAL)
        .keepalives_retries(KEEPALIVE_RETRIES);
    if !cdc.password.0.is_empty() {
        config.password(&cdc.password.0);
    }
    let client = if ssl_mode == SslMode::Disable {
        let (client, connection) =
            config.connect(tokio_postgres::NoTls).await.map_err(|error| connect_error(cdc, error))?;
        drive(connection, purpose);
        client
    } else {
        let tls = MakeRustlsConnect::new(tls_config(cdc, ssl_mode)?);
        let (client, connection) = config.connect(tls).await.map_err(|error| connect_error(cdc, error))?;
        drive(connection, purpose);
        client
    };
    client.batch_execute(SETTLE).await?;
    Ok(client)
}

fn drive(connection: impl Future<Output = Result<(), tokio_postgres::Error>> + Send + 'static, purpose: &str) {
    let purpose = purpose.to_owned();
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(purpose, error = %PostgresError::from(error), "a connection to PostgreSQL ended");
        }
    });
}

fn connect_error(cdc: &Cdc, error: tokio_postgres::Error) -> PostgresError {
    if error.as_db_error().is_some() {
        return error.into();
    }
    let reason = chain(&error);
    // Half-way: what is between, such as a pool or a proxy, has no server for us at the moment.
    if error.is_closed() {
        let source = io::Error::new(io::ErrorKind::ConnectionAborted, "it closed the connection");
        return PostgresError::Connect { address: address(cdc), source };
    }
    // The crate tells its kinds apart by their texts only.
    if reason.starts_with("error performing TLS handshake") {
        PostgresError::Tls { address: address(cdc), reason }
    } else if let Some(source) = io_error(&error)
        && !reason.starts_with("authentication error")
    {
        PostgresError::Connect { address: address(cdc), source: io::Error::new(source.kind(), source.to_string()) }
    } else {
        PostgresError::Login { address: address(cdc), reason }
    }
}

pub(super) fn application_name(purpose: &str) -> String {
    format!("pgtide {purpose}")
}

/// `cdc.host` is the folder of a Unix socket.
pub(super) fn is_socket(cdc: &Cdc) -> bool {
    cdc.host.starts_with('/')
}

/// Where the server is, for a person: `host:port`, or the socket's path.
#[must_use]
pub fn address(cdc: &Cdc) -> String {
    if is_socket(cdc) {
        format!("{}/.s.PGSQL.{}", cdc.host, cdc.port)
    } else if cdc.host.contains(':') {
        format!("[{}]:{}", cdc.host, cdc.port)
    } else {
        format!("{}:{}", cdc.host, cdc.port)
    }
}

/// The TLS settings of both kinds of connections.
///
/// # Errors
/// A file cannot be read or holds no certificate or key, or there are no authorities to check by.
pub(super) fn tls_config(cdc: &Cdc, ssl_mode: SslMode) -> Result<ClientConfig, PostgresError> {
    let check = match ssl_mode {
        SslMode::Disable | SslMode::Prefer | SslMode::Require => Check::Nothing,
        SslMode::VerifyCa => Check::Authority,
        SslMode::VerifyFull => Check::AuthorityAndName,
    };
    let files = Files {
        authorities: ("cdc.sslRootCert", cdc.ssl_root_cert.as_deref()),
        certificate: ("cdc.sslCert", cdc.ssl_cert.as_deref()),
        key: ("cdc.sslKey", cdc.ssl_key.as_deref()),
    };
    tls::client(check, &files).map_err(|error| match error {
        TlsError::File { key, reason } => PostgresError::Certificate { key, reason },
        TlsError::Other(reason) => PostgresError::Tls { address: address(cdc), reason },
    })
}
