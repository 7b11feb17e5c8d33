//! The replication connection: log in, make and start slots, read the stream, confirm positions.
//!
//! Its own socket and read loop, because the server runs about twice as fast when it need not wake its reader for
//! every message.

mod feedback;
mod reader;
mod socket;

use bytes::{Buf, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::backend::{ErrorResponseBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::config::{Cdc, SslMode};
use crate::lsn::Lsn;
use crate::table::quote_identifier;

pub use feedback::Feedback;
pub use reader::{Frame, Reader};
use socket::Socket;

use super::connect::{OPTIONS, address, application_name, with_fallback};
use super::error::{PostgresError, ServerError};

/// A logged-in replication connection that does not stream yet.
pub struct Session {
    socket: Socket,
    received: BytesMut,
    process_id: i32,
    server_version: String,
    /// A query was dropped half-way: what comes next cannot be told apart any more.
    broken: bool,
}

/// What `IDENTIFY_SYSTEM` answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    /// Names the cluster, its standbys included.
    pub system_id: String,
    /// Rises with every promotion of a standby.
    pub timeline: u32,
    /// What is flushed to disk.
    pub wal_position: Lsn,
    /// The database.
    pub database: Option<String>,
}

/// A slot that was just made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreatedSlot {
    /// The stream holds exactly what was committed from here on.
    pub consistent_point: Lsn,
    /// Names the snapshot that holds exactly what was committed before. `SET TRANSACTION SNAPSHOT` takes it until the
    /// session's next command or end.
    pub snapshot_name: String,
}

impl Session {
    /// Logs in. `purpose` is a word for `pg_stat_activity`: the application's name is `pgtide <purpose>`.
    ///
    /// # Errors
    /// The server does not answer within 10 s, TLS or the login fail, a certificate's file cannot be read, the role
    /// may not replicate.
    pub async fn connect(cdc: &Cdc, purpose: &str) -> Result<Session, PostgresError> {
        with_fallback(cdc, |ssl_mode| Session::connect_by(cdc, purpose, ssl_mode)).await
    }

    async fn connect_by(cdc: &Cdc, purpose: &str, ssl_mode: SslMode) -> Result<Session, PostgresError> {
        let socket = socket::open(cdc, ssl_mode).await?;
        let received = BytesMut::with_capacity(4096);
        let mut session = Session { socket, received, process_id: 0, server_version: String::new(), broken: false };
        let name = application_name(purpose);
        let parameters = [
            ("user", cdc.username.as_str()),
            ("database", cdc.database.as_str()),
            ("replication", "database"),
            ("application_name", name.as_str()),
            ("client_encoding", "UTF8"),
            ("options", OPTIONS),
        ];
        session.send(|buffer| frontend::startup_message(parameters, buffer)).await?;
        session.authenticate(cdc).await?;
        loop {
            match session.message().await? {
                Message::ParameterStatus(body) if matches!(body.name(), Ok("server_version")) => {
                    body.value().map_err(protocol)?.clone_into(&mut session.server_version);
                }
                Message::BackendKeyData(body) => session.process_id = body.process_id(),
                Message::ReadyForQuery(_) => return Ok(session),
                Message::ErrorResponse(body) => return Err(server_error(&body)?),
                // Settings and notices.
                _ => {}
            }
        }
    }

    async fn authenticate(&mut self, cdc: &Cdc) -> Result<(), PostgresError> {
        let login = |reason: &str| PostgresError::Login { address: address(cdc), reason: reason.to_owned() };
        let password = || match cdc.password.0.as_bytes() {
            b"" => Err(login("it asks for a password and cdc.password is empty")),
            password => Ok(password),
        };
        let mut scram = None;
        loop {
            match self.message().await? {
                Message::AuthenticationOk => return Ok(()),
                Message::AuthenticationCleartextPassword => {
                    let password = password()?;
                    self.send(|buffer| frontend::password_message(password, buffer)).await?;
                }
                Message::AuthenticationMd5Password(body) => {
                    let hash = md5_hash(cdc.username.as_bytes(), password()?, body.salt());
                    self.send(|buffer| frontend::password_message(hash.as_bytes(), buffer)).await?;
                }
                Message::AuthenticationSasl(body) => {
                    if !body.mechanisms().any(|name| Ok(name == SCRAM_SHA_256)).map_err(protocol)? {
                        return Err(login("it asks for a way of login that pgtide does not have"));
                    }
                    let exchange = ScramSha256::new(password()?, ChannelBinding::unsupported());
                    self.send(|buffer| frontend::sasl_initial_response(SCRAM_SHA_256, exchange.message(), buffer))
                        .await?;
                    scram = Some(exchange);
                }
                Message::AuthenticationSaslContinue(body) => {
                    let exchange = scram.as_mut().ok_or_else(|| login("it answered a question that was not asked"))?;
                    exchange.update(body.data()).map_err(|error| login(&error.to_string()))?;
                    let answer = exchange.message().to_vec();
                    self.send(|buffer| frontend::sasl_response(&answer, buffer)).await?;
                }
                Message::AuthenticationSaslFinal(body) => {
                    // The server proves that it knows the password as well.
                    let exchange = scram.as_mut().ok_or_else(|| login("it answered a question that was not asked"))?;
                    exchange.finish(body.data()).map_err(|error| login(&error.to_string()))?;
                }
                Message::ErrorResponse(body) => return Err(server_error(&body)?),
                Message::NoticeResponse(_) => {}
                _ => return Err(login("it asks for a way of login that pgtide does not have")),
            }
        }
    }

    /// The server's process, as `pg_terminate_backend` takes it.
    #[must_use]
    pub fn process_id(&self) -> i32 {
        self.process_id
    }

    /// The server's version as it names it, such as `15.18 (Debian 15.18-1)`.
    #[must_use]
    pub fn server_version(&self) -> &str {
        &self.server_version
    }

    /// Runs one command of the replication protocol, or one SQL statement, and gives its rows as text.
    ///
    /// # Errors
    /// The server's error leaves the session usable. After any other error, and after this future was dropped before
    /// its end, it is not usable any more.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, PostgresError> {
        self.begin()?;
        self.send(|buffer| frontend::query(sql, buffer)).await?;
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            match self.message().await? {
                Message::DataRow(body) => {
                    let text = |range: Option<std::ops::Range<usize>>| {
                        Ok(range.map(|range| String::from_utf8_lossy(&body.buffer()[range]).into_owned()))
                    };
                    rows.push(body.ranges().map(text).collect().map_err(protocol)?);
                }
                Message::ErrorResponse(body) => failed = Some(server_error(&body)?),
                Message::ReadyForQuery(_) => break,
                Message::CopyInResponse(_) | Message::CopyOutResponse(_) => {
                    return Err(PostgresError::Protocol("a COPY where rows were expected".to_owned()));
                }
                _ => {}
            }
        }
        self.broken = false;
        failed.map_or(Ok(rows), Err)
    }

    /// `IDENTIFY_SYSTEM`.
    ///
    /// # Errors
    /// As [`Session::query`], and when the answer has another shape than expected.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, PostgresError> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let Some([Some(system_id), Some(timeline), Some(position), database]) = rows.first().map(Vec::as_slice) else {
            return Err(PostgresError::Protocol("IDENTIFY_SYSTEM was not answered in four columns".to_owned()));
        };
        Ok(SystemIdentity {
            system_id: system_id.clone(),
            timeline: timeline.parse().map_err(protocol)?,
            wal_position: position.parse().map_err(protocol)?,
            database: database.clone(),
        })
    }

    /// Makes a logical slot for `pgoutput` and exports its snapshot. Waits until every transaction that runs now has
    /// ended. A temporary slot goes away with the session.
    ///
    /// # Errors
    /// As [`Session::query`]: the name is taken (42710), no slot is free (53400), `wal_level` is not `logical` (55000).
    pub async fn create_slot(&mut self, name: &str, temporary: bool) -> Result<CreatedSlot, PostgresError> {
        let temporary = if temporary { " TEMPORARY" } else { "" };
        let major: u32 =
            self.server_version.split(|c: char| !c.is_ascii_digit()).next().unwrap_or("").parse().unwrap_or(0);
        let export = if major < 15 { "EXPORT_SNAPSHOT" } else { "(SNAPSHOT 'export')" };
        let name = quote_identifier(name);
        let rows = self.query(&format!("CREATE_REPLICATION_SLOT {name}{temporary} LOGICAL pgoutput {export}")).await?;
        let Some([_, Some(consistent_point), Some(snapshot_name), _]) = rows.first().map(Vec::as_slice) else {
            return Err(PostgresError::Protocol("CREATE_REPLICATION_SLOT was not answered in four columns".to_owned()));
        };
        Ok(CreatedSlot {
            consistent_point: consistent_point.parse().map_err(protocol)?,
            snapshot_name: snapshot_name.clone(),
        })
    }

    /// Starts streaming the slot's changes of the publication's tables.
    ///
    /// **The server does not check `from`.** Ahead of what the slot has confirmed, it silently leaves out what lies
    /// between: give a position ahead only if everything before it is durable. Behind, it silently starts at what is
    /// confirmed: compare before, for the changes between are gone.
    ///
    /// # Errors
    /// The slot does not exist (42704), is in use (55006) or has lost its WAL (55000, 58P01). That the publication does
    /// not exist is reported later, by [`Reader::next_frame`].
    pub async fn start(
        mut self,
        slot: &str,
        from: Lsn,
        publication: &str,
    ) -> Result<(Reader, Feedback), PostgresError> {
        self.begin()?;
        let (slot, publication) = (quote_identifier(slot), quote_identifier(publication).replace('\'', "''"));
        let command = format!(
            "START_REPLICATION SLOT {slot} LOGICAL {from} (proto_version '1', publication_names '{publication}')"
        );
        self.send(|buffer| frontend::query(&command, buffer)).await?;
        while self.tag().await? != COPY_BOTH_RESPONSE {
            match self.message().await? {
                Message::ErrorResponse(body) => return Err(server_error(&body)?),
                Message::NoticeResponse(_) | Message::ParameterStatus(_) => {}
                _ => return Err(PostgresError::Protocol("START_REPLICATION was not answered by a stream".to_owned())),
            }
        }
        self.whole_message().await?;
        let length = self.length();
        self.received.advance(length);
        let Socket { stream, only_try } = self.socket;
        let (read, write) = tokio::io::split(stream);
        let (feedback, link) = feedback::start(write);
        Ok((Reader::new(read, only_try, link, &self.received), feedback))
    }

    fn begin(&mut self) -> Result<(), PostgresError> {
        if std::mem::replace(&mut self.broken, true) {
            return Err(PostgresError::Closed("a command on it was given up half-way".to_owned()));
        }
        Ok(())
    }

    async fn send<E: std::fmt::Display>(
        &mut self,
        write: impl FnOnce(&mut BytesMut) -> Result<(), E>,
    ) -> Result<(), PostgresError> {
        let mut buffer = BytesMut::new();
        // Fails for texts with a zero byte.
        write(&mut buffer).map_err(protocol)?;
        self.socket.stream.write_all(&buffer).await.map_err(closed)?;
        self.socket.stream.flush().await.map_err(closed)
    }

    async fn fill(&mut self) -> Result<(), PostgresError> {
        match self.socket.stream.read_buf(&mut self.received).await.map_err(closed)? {
            0 => Err(PostgresError::Closed("the server closed it".to_owned())),
            _ => Ok(()),
        }
    }

    async fn tag(&mut self) -> Result<u8, PostgresError> {
        loop {
            if let Some(&tag) = self.received.first() {
                return Ok(tag);
            }
            self.fill().await?;
        }
    }

    /// Bytes of the first message, its tag included; 0 while its length is not known.
    fn length(&self) -> usize {
        match self.received.get(1..5) {
            Some(&[a, b, c, d]) => u32::from_be_bytes([a, b, c, d]) as usize + 1,
            _ => 0,
        }
    }

    async fn whole_message(&mut self) -> Result<(), PostgresError> {
        while self.length() == 0 || self.received.len() < self.length() {
            self.fill().await?;
        }
        Ok(())
    }

    async fn message(&mut self) -> Result<Message, PostgresError> {
        loop {
            // `Message` takes a version that is negotiated down for a fault; we ask for the first one anyway.
            if let Some(message) = Message::parse(&mut self.received).map_err(protocol)? {
                return Ok(message);
            }
            self.fill().await?;
        }
    }
}

const COPY_BOTH_RESPONSE: u8 = b'W';

fn protocol(error: impl std::fmt::Display) -> PostgresError {
    PostgresError::Protocol(error.to_string())
}

fn closed(error: std::io::Error) -> PostgresError {
    PostgresError::Closed(error.to_string())
}

fn server_error(body: &ErrorResponseBody) -> Result<PostgresError, PostgresError> {
    let (mut sqlstate, mut message) = (String::new(), String::new());
    let mut fields = body.fields();
    while let Some(field) = fields.next().map_err(protocol)? {
        match field.type_() {
            b'C' => sqlstate = String::from_utf8_lossy(field.value_bytes()).into_owned(),
            b'M' => message = String::from_utf8_lossy(field.value_bytes()).into_owned(),
            _ => {}
        }
    }
    Ok(PostgresError::Server(ServerError::new(&sqlstate, &message)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_send(_: &impl Send) {}

    /// The engine spawns them; the compiler decides.
    #[test]
    fn connecting_can_be_spawned() {
        let cdc = Cdc::default();
        is_send(&Session::connect(&cdc, "test"));
        is_send(&super::super::connect::connect(&cdc, "test"));
        let stream = |session: Session| async move {
            let (mut reader, feedback) = session.start("slot", Lsn::ZERO, "publication").await?;
            reader.fill().await?;
            feedback.finish().await
        };
        let check = |session: Session| is_send(&stream(session));
        let _ = check;
    }
}
