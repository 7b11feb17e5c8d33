//! A way to PostgreSQL on which connections can be kept waiting.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::pipeline::LIMIT;

/// Listens on a port of its own and passes everything on, in plain text. Sessions whose application name ends with the
/// text that is held wait before their first byte arrives; those of the text that is muted get no answer.
pub struct Proxy {
    /// Where it listens, on 127.0.0.1.
    pub port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    server: watch::Sender<SocketAddr>,
    hold: watch::Sender<Option<&'static str>>,
    mute: watch::Sender<Option<&'static str>>,
    waiting: watch::Sender<usize>,
}

impl Proxy {
    /// To the server on this port of 127.0.0.1.
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port_here = listener.local_addr().unwrap().port();
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let server = watch::Sender::new(server);
        let (hold, mute, waiting) = (watch::Sender::new(None), watch::Sender::new(None), watch::Sender::new(0));
        let shared = Arc::new(Shared { server, hold, mute, waiting });
        let accepting = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let shared = Arc::clone(&accepting);
                // Either side may go away at any time.
                tokio::spawn(async move { drop(shared.pass(client).await) });
            }
        });
        Self { port: port_here, shared }
    }

    /// Holds sessions of this name from now on.
    pub fn hold(&self, name: &'static str) {
        self.shared.hold.send_replace(Some(name));
    }

    /// Waits until one is held.
    pub async fn until_held(&self) {
        let mut waiting = self.shared.waiting.subscribe();
        let held = tokio::time::timeout(LIMIT, waiting.wait_for(|waiting| *waiting > 0)).await;
        held.expect("no such session came").unwrap();
    }

    /// Sends new sessions to another server.
    pub fn turn_to(&self, port: u16) {
        self.shared.server.send_replace(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    }

    /// Keeps what the server answers to sessions of this name from now on.
    pub fn mute(&self, name: &'static str) {
        self.shared.mute.send_replace(Some(name));
    }

    /// Lets all go on.
    pub fn release(&self) {
        self.shared.hold.send_replace(None);
        self.shared.mute.send_replace(None);
    }
}

impl Shared {
    async fn pass(&self, mut client: TcpStream) -> std::io::Result<()> {
        // The first message: its length, itself included, then names and values, each with a zero at its end.
        let length = client.read_u32().await?;
        let mut rest = vec![0; length as usize - 4];
        client.read_exact(&mut rest).await?;
        let is = |name: &str| {
            let text = format!("{name}\0");
            rest.windows(text.len()).any(|window| window == text.as_bytes())
        };
        let mut hold = self.hold.subscribe();
        if hold.borrow().is_some_and(is) {
            self.waiting.send_modify(|waiting| *waiting += 1);
            let _ = hold.wait_for(|name| !name.is_some_and(is)).await;
            self.waiting.send_modify(|waiting| *waiting -= 1);
        }
        let address = *self.server.borrow();
        let mut server = TcpStream::connect(address).await?;
        server.write_u32(length).await?;
        server.write_all(&rest).await?;
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) = (client.split(), server.split());
        let questions = async {
            tokio::io::copy(&mut from_client, &mut to_server).await?;
            to_server.shutdown().await
        };
        let answers = async {
            let (mut mute, mut buffer) = (self.mute.subscribe(), vec![0; 1 << 16]);
            loop {
                let length = from_server.read(&mut buffer).await?;
                let _ = mute.wait_for(|name| !name.is_some_and(is)).await;
                if length == 0 {
                    return to_client.shutdown().await;
                }
                to_client.write_all(&buffer[..length]).await?;
            }
        };
        tokio::try_join!(questions, answers)?;
        Ok(())
    }
}
