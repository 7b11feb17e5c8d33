//! The socket of a replication connection.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use pgwire_replication::protocol::framing::write_ssl_request;
use rustls_pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpSocket, TcpStream, UnixStream, lookup_host};
use tokio_rustls::TlsConnector;

use crate::config::{Cdc, SslMode};

use super::super::connect::{
    KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_RETRIES, UNACKNOWLEDGED, address, is_socket, tls_config,
};
use super::super::error::{PostgresError, chain};
use super::wire;

/// How much the kernel may keep for us; it may grant less. Room for what arrives while the reader lets it gather.
const RECEIVE_BUFFER: u32 = 4 << 20;
/// The same for a server on this machine. The server sends each message by itself, and here it pays for each packet's
/// arrival too. Once this little is full, the messages gather on its side, where another costs next to nothing, until
/// the reader comes back: a backlog of a million small changes took the server 2.3 to 2.9 s so, and often twice that
/// with a larger one. With a smaller one the kernel drops packets when the reader stays away for long.
const RECEIVE_BUFFER_HERE: u32 = 256 << 10;

pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection, with or without TLS.
pub(super) struct Socket {
    pub(super) stream: Box<dyn Stream>,
    /// While it is set, a read that finds nothing is pending and wakes nobody later.
    pub(super) only_try: Arc<AtomicBool>,
}

pub(super) async fn open(cdc: &Cdc, ssl_mode: SslMode) -> Result<Socket, PostgresError> {
    let only_try = Arc::new(AtomicBool::new(false));
    let stream = open_stream(cdc, ssl_mode, &only_try).await?;
    Ok(Socket { stream, only_try })
}

async fn open_stream(
    cdc: &Cdc,
    ssl_mode: SslMode,
    only_try: &Arc<AtomicBool>,
) -> Result<Box<dyn Stream>, PostgresError> {
    let refused = |source| PostgresError::Connect { address: address(cdc), source };
    if is_socket(cdc) {
        let stream = UnixStream::connect(address(cdc)).await.and_then(UnixStream::into_std).map_err(refused)?;
        return Ok(Box::new(Quiet::new(stream, only_try)));
    }
    let stream = tcp(cdc).await.and_then(TcpStream::into_std).map_err(refused)?;
    let mut stream = Quiet::new(stream, only_try);
    if ssl_mode == SslMode::Disable {
        return Ok(Box::new(stream));
    }
    write_ssl_request(&mut stream).await.map_err(wire)?;
    // Exactly one byte: whatever else came before the handshake would not be the server's.
    if stream.read_u8().await.map_err(refused)? != b'S' {
        if ssl_mode == SslMode::Prefer {
            return Ok(Box::new(stream));
        }
        return Err(PostgresError::Tls { address: address(cdc), reason: "the server does not offer it".to_owned() });
    }
    let failed = |reason: String| PostgresError::Tls { address: address(cdc), reason };
    let name = ServerName::try_from(cdc.host.clone()).map_err(|error| failed(error.to_string()))?;
    let connector = TlsConnector::from(Arc::new(tls_config(cdc, ssl_mode)?));
    Ok(Box::new(connector.connect(name, stream).await.map_err(|error| failed(chain(&error)))?))
}

async fn tcp(cdc: &Cdc) -> io::Result<TcpStream> {
    let mut last = None;
    for target in lookup_host((cdc.host.as_str(), cdc.port)).await? {
        let socket = if target.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // Before the connection is made, so that the window can be scaled for it.
        socket.set_recv_buffer_size(if target.ip().is_loopback() { RECEIVE_BUFFER_HERE } else { RECEIVE_BUFFER })?;
        match socket.connect(target).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                let options = SockRef::from(&stream);
                options.set_tcp_keepalive(
                    &TcpKeepalive::new()
                        .with_time(KEEPALIVE_IDLE)
                        .with_interval(KEEPALIVE_INTERVAL)
                        .with_retries(KEEPALIVE_RETRIES),
                )?;
                #[cfg(target_os = "linux")]
                options.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
                return Ok(stream);
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address")))
}

/// A socket that the runtime watches only while somebody waits for it. Tokio's own sockets are watched all the time:
/// then every message of the server wakes a thread of the runtime, even one whose reader sleeps on purpose.
struct Quiet<S: Raw> {
    socket: S,
    readable: Option<S::Watched>,
    writable: Option<S::Watched>,
    only_try: Arc<AtomicBool>,
}

/// A socket of the standard library that does not block.
trait Raw: Send + Sized + Unpin + 'static {
    /// The runtime's hold on a second descriptor of it; gone when dropped.
    type Watched: Send + Unpin;

    fn watch(&self) -> io::Result<Self::Watched>;
    /// Pending until `act` may succeed; what it then gives unless that is "would block".
    fn poll<T>(
        watched: &Self::Watched,
        context: &mut Context<'_>,
        interest: Interest,
        act: impl FnMut() -> io::Result<T>,
    ) -> Poll<io::Result<T>>;
    fn shut(&self) -> io::Result<()>;
}

macro_rules! raw {
    ($blocking:ty, $watched:ty) => {
        impl Raw for $blocking {
            type Watched = $watched;

            fn watch(&self) -> io::Result<$watched> {
                <$watched>::from_std(self.try_clone()?)
            }

            fn poll<T>(
                watched: &$watched,
                context: &mut Context<'_>,
                interest: Interest,
                mut act: impl FnMut() -> io::Result<T>,
            ) -> Poll<io::Result<T>> {
                loop {
                    if interest.is_readable() {
                        ready!(watched.poll_read_ready(context))?;
                    } else {
                        ready!(watched.poll_write_ready(context))?;
                    }
                    match watched.try_io(interest, &mut act) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        done => return Poll::Ready(done),
                    }
                }
            }

            fn shut(&self) -> io::Result<()> {
                self.shutdown(Shutdown::Write)
            }
        }
    };
}

raw!(std::net::TcpStream, TcpStream);
raw!(std::os::unix::net::UnixStream, UnixStream);

impl<S: Raw> Quiet<S> {
    fn new(socket: S, only_try: &Arc<AtomicBool>) -> Self {
        Self { socket, readable: None, writable: None, only_try: only_try.clone() }
    }
}

impl<S: Raw> AsyncRead for Quiet<S>
where
    for<'a> &'a S: Read,
{
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let mut read = || (&this.socket).read(buffer.initialize_unfilled());
        let result = match &this.readable {
            Some(watched) => ready!(S::poll(watched, context, Interest::READABLE, read)),
            None => match read() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if this.only_try.load(Ordering::Relaxed) {
                        return Poll::Pending;
                    }
                    let watched = this.readable.insert(this.socket.watch()?);
                    ready!(S::poll(watched, context, Interest::READABLE, read))
                }
                done => done,
            },
        };
        this.readable = None;
        buffer.advance(result?);
        Poll::Ready(Ok(()))
    }
}

impl<S: Raw> AsyncWrite for Quiet<S>
where
    for<'a> &'a S: Write,
{
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let write = || (&this.socket).write(bytes);
        let result = match &this.writable {
            Some(watched) => ready!(S::poll(watched, context, Interest::WRITABLE, write)),
            None => match write() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let watched = this.writable.insert(this.socket.watch()?);
                    ready!(S::poll(watched, context, Interest::WRITABLE, write))
                }
                done => done,
            },
        };
        this.writable = None;
        Poll::Ready(result)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.socket.shut())
    }
}
