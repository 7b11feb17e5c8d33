//! The socket of a replication connection.

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use rustls_pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream, lookup_host};
use tokio_rustls::TlsConnector;

use crate::config::{Cdc, SslMode};

use super::super::connect::{
    KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_RETRIES, UNACKNOWLEDGED, address, is_socket, tls_config,
};
use super::super::error::{PostgresError, chain};

/// How much the kernel may keep for us; it may grant less. Room for what arrives while the reader lets it gather.
const RECEIVE_BUFFER: u32 = 4 << 20;

pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

pub(super) type Socket = Box<dyn Stream>;

pub(super) async fn open(cdc: &Cdc, ssl_mode: SslMode) -> Result<Socket, PostgresError> {
    let refused = |source| PostgresError::Connect { address: address(cdc), source };
    if is_socket(cdc) {
        return Ok(Box::new(UnixStream::connect(address(cdc)).await.map_err(refused)?));
    }
    let mut stream = tcp(cdc).await.map_err(refused)?;
    if ssl_mode == SslMode::Disable {
        return Ok(Box::new(stream));
    }
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(refused)?;
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
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
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
