//! The replication connection: log in, make and start slots, read the stream, confirm positions.
//!
//! Its own socket and read loop, because the server runs about twice as fast when it need not wake its reader for
//! every message.

mod feedback;
mod reader;
mod socket;

use std::borrow::Cow;
use std::io;

use pgwire_replication::PgWireError;
use pgwire_replication::auth::ScramClient;
use pgwire_replication::protocol::framing::{
    BackendMessage, MessageReader, write_password_message, write_query, write_startup_message,
};
use pgwire_replication::protocol::messages::{ErrorFields, auth, parse_auth_request};

use crate::config::{Cdc, Slot, SslMode};
use crate::lsn::Lsn;
use crate::table::quote_identifier;

pub use feedback::Feedback;
pub use reader::{Frame, Reader};
use socket::Socket;

use super::connect::{OPTIONS, SETTLE, address, application_name, with_fallback};
use super::error::{PostgresError, ServerError, printable};

/// A logged-in replication connection that does not stream yet.
pub struct Session {
    socket: Socket,
    messages: MessageReader,
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

/// How long a slot lives, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// Until the session ends.
    Temporary,
    /// Until it is dropped.
    Permanent,
    /// Until it is dropped, and on standbys that synchronize slots as well (PostgreSQL 17).
    Failover,
}

impl Slot {
    /// What kind of slot is made where there is none.
    pub(crate) fn kind(&self) -> SlotKind {
        if self.failover { SlotKind::Failover } else { SlotKind::Permanent }
    }
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
        let messages = MessageReader::new().with_max_message_size(LONGEST_ANSWER);
        let mut session = Session { socket, messages, process_id: 0, server_version: String::new(), broken: false };
        let name = application_name(purpose);
        let parameters = [
            ("user", cdc.username.as_str()),
            ("database", cdc.database.as_str()),
            ("replication", "database"),
            ("application_name", name.as_str()),
            ("client_encoding", "UTF8"),
            ("options", OPTIONS),
        ];
        for (_, value) in parameters {
            without_zero(value)?;
        }
        write_startup_message(&mut session.socket.stream, PROTOCOL_VERSION, &parameters).await.map_err(wire)?;
        session.authenticate(cdc).await?;
        loop {
            let BackendMessage { tag, payload } = session.message().await?;
            match tag {
                b'S' => {
                    let mut texts = payload.split(|&byte| byte == 0);
                    if let (Some(b"server_version"), Some(version)) = (texts.next(), texts.next()) {
                        session.server_version = printable(&String::from_utf8_lossy(version));
                    }
                }
                b'K' => {
                    let (&id, _) = payload.split_first_chunk().ok_or_else(|| protocol("a process without a number"))?;
                    session.process_id = i32::from_be_bytes(id);
                }
                b'Z' => break,
                b'E' => return Err(PostgresError::Server(server_error(&payload))),
                // Notices.
                _ => {}
            }
        }
        session.query(SETTLE).await?;
        Ok(session)
    }

    async fn authenticate(&mut self, cdc: &Cdc) -> Result<(), PostgresError> {
        let login = |reason: &str| PostgresError::Login { address: address(cdc), reason: reason.to_owned() };
        let refused = |error: PgWireError| login(&printable(&error.to_string()));
        let password = || match cdc.password.0.as_str() {
            "" => Err(login("it asks for a password and cdc.password is empty")),
            password => Ok(password),
        };
        let (mut scram, mut proof) = (None, None);
        loop {
            let BackendMessage { tag, payload } = self.message().await?;
            match tag {
                b'R' => {}
                b'E' => return Err(PostgresError::Server(server_error(&payload))),
                b'N' => continue,
                _ => return Err(login(UNKNOWN_LOGIN)),
            }
            let (request, data) = parse_auth_request(&payload).map_err(wire)?;
            let answer = match request {
                // The exchange was begun, and its end is the server's proof that it knows the password as well.
                auth::OK if scram.is_some() || proof.is_some() => return Err(login("it broke its own proof off")),
                auth::OK => return Ok(()),
                auth::CLEARTEXT_PASSWORD => {
                    without_zero(password()?)?;
                    [password()?.as_bytes(), b"\0"].concat()
                }
                auth::MD5_PASSWORD => md5_answer(&cdc.username, password()?, data),
                auth::SASL if data.split(|&byte| byte == 0).any(|name| name == SCRAM_SHA_256) => {
                    password()?;
                    // The name is empty because the server takes that of the start-up message.
                    let first = scram.insert(ScramClient::new("")).client_first.as_bytes();
                    // A few dozen bytes.
                    let length = u32::try_from(first.len()).map_err(protocol)?.to_be_bytes();
                    [SCRAM_SHA_256, b"\0", &length, first].concat()
                }
                auth::SASL_CONTINUE => {
                    let exchange: ScramClient = scram.take().ok_or_else(|| login(UNASKED))?;
                    // As the server does: a password that cannot be prepared is taken as it is.
                    let password = stringprep::saslprep(password()?).or_else(|_| password().map(Cow::Borrowed))?;
                    let question = str::from_utf8(data).map_err(protocol)?;
                    let (answer, messages, salted) = exchange.client_final(&password, question).map_err(refused)?;
                    proof = Some((messages, salted));
                    answer.into_bytes()
                }
                auth::SASL_FINAL => {
                    let (messages, salted) = proof.take().ok_or_else(|| login(UNASKED))?;
                    let signature = str::from_utf8(data).map_err(protocol)?;
                    ScramClient::verify_server_final(signature, &salted, &messages).map_err(refused)?;
                    continue;
                }
                _ => return Err(login(UNKNOWN_LOGIN)),
            };
            write_password_message(&mut self.socket.stream, &answer).await.map_err(wire)?;
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
        self.send(sql).await?;
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            let BackendMessage { tag, payload } = self.message().await?;
            match tag {
                b'D' => rows.push(row(&payload).ok_or_else(|| protocol("a row that is shorter than it says"))?),
                b'E' => failed = Some(server_error(&payload)),
                b'Z' => break,
                b'G' | b'H' | b'W' => return Err(protocol("a COPY where rows were expected")),
                _ => {}
            }
        }
        self.broken = false;
        failed.map_or(Ok(rows), |error| Err(PostgresError::Server(error)))
    }

    /// `IDENTIFY_SYSTEM`.
    ///
    /// # Errors
    /// As [`Session::query`], and when the answer has another shape than expected.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, PostgresError> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let Some([Some(system_id), Some(timeline), Some(position), database]) = rows.first().map(Vec::as_slice) else {
            return Err(protocol("IDENTIFY_SYSTEM was not answered in four columns"));
        };
        Ok(SystemIdentity {
            system_id: system_id.clone(),
            timeline: timeline.parse().map_err(protocol)?,
            wal_position: position.parse().map_err(protocol)?,
            database: database.clone(),
        })
    }

    /// `TIMELINE_HISTORY`: the timelines before `timeline`, and where each of them was left, oldest first.
    ///
    /// # Errors
    /// As [`Session::query`]: the server has no history of it, as of the first one.
    pub async fn timeline_history(&mut self, timeline: u32) -> Result<Vec<(u32, Lsn)>, PostgresError> {
        let rows = self.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let Some([_, Some(content)]) = rows.first().map(Vec::as_slice) else {
            return Err(protocol("TIMELINE_HISTORY was not answered in two columns"));
        };
        let left = |line: &str| {
            let mut words = line.split_ascii_whitespace();
            Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
        };
        Ok(content.lines().filter_map(left).collect())
    }

    /// Makes a logical slot for `pgoutput` and exports its snapshot. Waits until every transaction that runs now has
    /// ended.
    ///
    /// # Errors
    /// As [`Session::query`]: the name is taken (42710), no slot is free (53400), `wal_level` is not `logical` (55000).
    pub async fn create_slot(&mut self, name: &str, kind: SlotKind) -> Result<CreatedSlot, PostgresError> {
        let temporary = if kind == SlotKind::Temporary { " TEMPORARY" } else { "" };
        let major: u32 =
            self.server_version.split(|c: char| !c.is_ascii_digit()).next().unwrap_or("").parse().unwrap_or(0);
        let export = match kind {
            SlotKind::Failover => "(SNAPSHOT 'export', FAILOVER)",
            _ if major < 15 => "EXPORT_SNAPSHOT",
            _ => "(SNAPSHOT 'export')",
        };
        let name = quote_identifier(name);
        let rows = self.query(&format!("CREATE_REPLICATION_SLOT {name}{temporary} LOGICAL pgoutput {export}")).await?;
        let Some([_, Some(consistent_point), Some(snapshot_name), _]) = rows.first().map(Vec::as_slice) else {
            return Err(protocol("CREATE_REPLICATION_SLOT was not answered in four columns"));
        };
        Ok(CreatedSlot {
            consistent_point: consistent_point.parse().map_err(protocol)?,
            snapshot_name: snapshot_name.clone(),
        })
    }

    /// Has a slot, which nobody uses, kept on standbys as well.
    ///
    /// # Errors
    /// As [`Session::query`]: a server before 17 does not know how.
    pub async fn keep_on_standbys(&mut self, name: &str) -> Result<(), PostgresError> {
        self.query(&format!("ALTER_REPLICATION_SLOT {} (FAILOVER true)", quote_identifier(name))).await.map(drop)
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
        let (slot, publication) = (quote_identifier(slot), quote_identifier(publication).replace('\'', "''"));
        self.send(&format!(
            "START_REPLICATION SLOT {slot} LOGICAL {from} (proto_version '1', publication_names '{publication}')"
        ))
        .await?;
        loop {
            let BackendMessage { tag, payload } = self.message().await?;
            match tag {
                b'W' => break,
                b'E' => return Err(PostgresError::Server(server_error(&payload).of_a_stream())),
                b'N' | b'S' => {}
                _ => return Err(protocol("START_REPLICATION was not answered by a stream")),
            }
        }
        let Socket { stream, only_try } = self.socket;
        let (read, write) = tokio::io::split(stream);
        let (feedback, link) = feedback::start(write);
        Ok((Reader::new(read, only_try, link), feedback))
    }

    /// Sends a command. The session is broken until its answer is read to the end.
    async fn send(&mut self, sql: &str) -> Result<(), PostgresError> {
        if std::mem::replace(&mut self.broken, true) {
            return Err(PostgresError::Closed("a command on it was given up half-way".to_owned()));
        }
        without_zero(sql)?;
        write_query(&mut self.socket.stream, sql).await.map_err(wire)
    }

    /// Takes exactly the bytes of one message from the socket: what follows is left to the [`Reader`].
    async fn message(&mut self) -> Result<BackendMessage, PostgresError> {
        self.messages.read(&mut self.socket.stream).await.map_err(wire)
    }
}

/// 3.0.
const PROTOCOL_VERSION: i32 = 3 << 16;
/// Before the stream. Whoever answers may not be PostgreSQL, and memory is taken for as much as is announced.
const LONGEST_ANSWER: usize = 16 << 20;
const SCRAM_SHA_256: &[u8] = b"SCRAM-SHA-256";
const UNKNOWN_LOGIN: &str = "it asks for a way of login that pgtide does not have";
const UNASKED: &str = "it answered a question that was not asked";

/// The format's end of a text: what follows it would be read as something else.
fn without_zero(text: &str) -> Result<(), PostgresError> {
    if text.contains('\0') { Err(protocol("a text with a zero byte is not sent")) } else { Ok(()) }
}

fn md5_answer(user: &str, password: &str, salt: &[u8]) -> Vec<u8> {
    let inner = format!("{:x}", md5::compute([password, user].concat()));
    format!("md5{:x}\0", md5::compute([inner.as_bytes(), salt].concat())).into_bytes()
}

/// The columns of a DataRow message as text; none if it ends early.
fn row(payload: &[u8]) -> Option<Vec<Option<String>>> {
    let (&columns, mut rest) = payload.split_first_chunk()?;
    let mut row = Vec::new();
    for _ in 0..u16::from_be_bytes(columns) {
        let (&length, after) = rest.split_first_chunk()?;
        rest = after;
        // A negative length is null.
        row.push(match usize::try_from(i32::from_be_bytes(length)) {
            Err(_) => None,
            Ok(length) => {
                let (value, after) = rest.split_at_checked(length)?;
                rest = after;
                Some(String::from_utf8_lossy(value).into_owned())
            }
        });
    }
    Some(row)
}

fn protocol(error: impl std::fmt::Display) -> PostgresError {
    PostgresError::Protocol(error.to_string())
}

fn closed(error: &io::Error) -> PostgresError {
    PostgresError::Closed(match error.kind() {
        io::ErrorKind::UnexpectedEof => "the server closed it".to_owned(),
        _ => error.to_string(),
    })
}

fn wire(error: PgWireError) -> PostgresError {
    match error {
        PgWireError::Io(error) => closed(&error),
        PgWireError::Protocol(reason) => PostgresError::Protocol(reason),
        other => protocol(other),
    }
}

fn server_error(payload: &[u8]) -> ServerError {
    let fields = ErrorFields::parse(payload);
    ServerError::new(&fields.code.unwrap_or_default(), &fields.message.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, DuplexStream};

    use super::*;

    #[test]
    fn rows_that_end_early_are_refused() {
        let payload = b"\0\x03\xff\xff\xff\xff\0\0\0\0\0\0\0\x02ab";
        assert_eq!(row(payload), Some(vec![None, Some(String::new()), Some("ab".to_owned())]));
        for end in 0..payload.len() {
            assert_eq!(row(&payload[..end]), None, "{end}");
        }
    }

    /// `SELECT 'md5' || md5(md5('md5_passmd5_user') || E'\\x01020304'::bytea)`, as PostgreSQL would compute it.
    #[test]
    fn md5_is_salted_twice() {
        assert_eq!(md5_answer("md5_user", "md5_pass", &[1, 2, 3, 4]), b"md5c6ee6bd10a7adf513019b25f24df0925\0");
    }

    async fn log_in(stream: DuplexStream) -> Result<(), PostgresError> {
        let socket = Socket { stream: Box::new(stream), only_try: std::sync::Arc::default() };
        let messages = MessageReader::new().with_max_message_size(LONGEST_ANSWER);
        let mut session = Session { socket, messages, process_id: 0, server_version: String::new(), broken: false };
        session.authenticate(&Cdc { password: crate::config::Secret("secret".into()), ..Cdc::default() }).await
    }

    /// A server that says `bytes` whatever it is told.
    async fn authenticate(bytes: &[u8]) -> Result<(), PostgresError> {
        let (stream, mut server) = tokio::io::duplex(4096);
        server.write_all(bytes).await.expect("room");
        log_in(stream).await
    }

    /// A server whose last word of the exchange is `last`.
    async fn exchange(last: &str) -> Result<(), PostgresError> {
        let (stream, mut server) = tokio::io::duplex(4096);
        let request = |kind: u8, text: &str| {
            let length = u8::try_from(8 + text.len()).expect("short");
            [b"R\0\0\0", [length].as_slice(), b"\0\0\0", &[kind], text.as_bytes()].concat()
        };
        let says = async {
            server.write_all(&request(10, "SCRAM-SHA-256\0\0")).await.expect("room");
            let mut messages = MessageReader::new();
            let first = messages.read(&mut server).await.expect("the first message").payload;
            let first = String::from_utf8_lossy(&first).into_owned();
            let (_, nonce) = first.split_once("r=").expect("a nonce");
            server.write_all(&request(11, &format!("r={nonce}x,s=c2FsdA==,i=1"))).await.expect("room");
            messages.read(&mut server).await.expect("the last message");
            server.write_all(&[request(12, last), request(0, "")].concat()).await.expect("room");
        };
        tokio::join!(log_in(stream), says).0
    }

    #[tokio::test]
    async fn a_proof_that_is_wrong_is_refused() {
        for last in ["v=AAAA", "e=\u{1b}[2J", ""] {
            let error = exchange(last).await.expect_err(last);
            assert!(matches!(error, PostgresError::Login { .. }), "{error}");
            assert!(!error.to_string().chars().any(char::is_control), "{error:?}");
        }
    }

    #[tokio::test]
    async fn a_server_that_does_not_prove_itself_is_refused() {
        let (sasl, ok) = (b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0", b"R\0\0\0\x08\0\0\0\0");
        assert!(authenticate(ok).await.is_ok());
        let error = authenticate(&[sasl.as_slice(), ok].concat()).await.expect_err("no proof");
        assert!(matches!(&error, PostgresError::Login { reason, .. } if reason.contains("proof")), "{error}");
        let unasked = authenticate(b"R\0\0\0\x0c\0\0\0\x0cv=xx").await.expect_err("not asked");
        assert!(matches!(&unasked, PostgresError::Login { reason, .. } if reason == UNASKED), "{unasked}");
        // What another kind of server might say.
        let error = authenticate(b"HTTP/1.1 400 Bad Request\r\n").await.expect_err("not PostgreSQL");
        assert!(matches!(&error, PostgresError::Protocol(reason) if reason.contains("too large")), "{error}");
    }

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
