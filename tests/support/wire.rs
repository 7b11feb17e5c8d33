//! A way to a document store or a node on which answers come slowly, or connections break.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// How it passes things on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    /// At once.
    Open,
    /// Not at all: connections end, and new ones as soon as they are made.
    Cut,
    /// Answers byte by byte.
    Drip,
}

/// Listens on a port of its own and passes HTTP on, in plain text.
pub struct Wire {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    server: u16,
    way: watch::Sender<Way>,
    sent: AtomicU64,
    bulks: AtomicU64,
    packed: AtomicU64,
}

impl Wire {
    /// To the server at this URL on 127.0.0.1.
    pub async fn to(url: &str) -> Self {
        let server = url.rsplit_once(':').unwrap().1.parse().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sent, bulks, packed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let shared = Arc::new(Shared { server, way: watch::Sender::new(Way::Open), sent, bulks, packed });
        let accepting = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let shared = Arc::clone(&accepting);
                // Either side may go away at any time.
                tokio::spawn(async move { drop(shared.pass(client).await) });
            }
        });
        Self { port, shared }
    }

    /// Without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on, on all connections.
    pub fn turn(&self, way: Way) {
        self.shared.way.send_replace(way);
    }

    /// Bulk requests, those of them that say they are gzip, and all bytes towards the server.
    pub fn counts(&self) -> (u64, u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (count(&self.shared.bulks), count(&self.shared.packed), count(&self.shared.sent))
    }
}

impl Shared {
    async fn pass(&self, client: TcpStream) -> std::io::Result<()> {
        let mut way = self.way.subscribe();
        if *way.borrow() == Way::Cut {
            return Ok(());
        }
        let server = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, self.server))).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        tokio::select! {
            done = self.requests(from_client, to_server) => done,
            done = self.answers(from_server, to_client) => done,
            _ = way.wait_for(|way| *way == Way::Cut) => Ok(()),
        }
    }

    async fn requests(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> std::io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let length = from.read(&mut buffer).await?;
            let bytes = &buffer[..length];
            if bytes.is_empty() {
                return Ok(());
            }
            self.sent.fetch_add(length as u64, Ordering::Relaxed);
            // A request begins a read: it is sent once the one before is answered.
            if bytes.starts_with(b"POST /_bulk") {
                self.bulks.fetch_add(1, Ordering::Relaxed);
                let packed = bytes.windows(22).any(|text| text == b"content-encoding: gzip");
                self.packed.fetch_add(u64::from(packed), Ordering::Relaxed);
            }
            to.write_all(bytes).await?;
        }
    }

    async fn answers(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> std::io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let length = from.read(&mut buffer).await?;
            if length == 0 {
                return Ok(());
            }
            for part in buffer[..length].chunks(64) {
                if *self.way.borrow() != Way::Drip {
                    to.write_all(part).await?;
                    continue;
                }
                for byte in part {
                    to.write_all(&[*byte]).await?;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }
}
