//! Status, metrics and control over HTTP.
//!
//! | request | answer |
//! |---|---|
//! | `GET /metrics` | Prometheus's text format, as [`render`](crate::telemetry::metrics::render) gives it |
//! | `GET /status` | [`Status`] as JSON; 200, or 503 in phase `failed` |
//! | `GET /slot` | the slot as go-pq-cdc shows it: positions are integers, what is unknown is `null`; 503 where there is no slot (`snapshot_only`) |
//! | `GET /events` | the sample of the newest events as JSON |
//! | `GET /healthz` | `ok`, as long as the process answers |
//! | `POST /pause`, `/resume` | the whole pipeline |
//! | `POST /tables/{schema.table}/pause`, `/resume`, `/resnapshot`, `/cancel` | the copy of one table |
//!
//! A command that was taken is answered with 202: `GET /status` says when it has become true. One that was refused, with
//! 409 and the reason. Commands are taken from this machine only, not from web pages, and not in a read-only process:
//! 403. Errors are one line of plain text.

mod control;
mod view;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::engine::{Control, Status};

/// Where the answers come from.
pub type Source = Arc<dyn Fn() -> Status + Send + Sync>;

#[derive(Clone)]
struct Rooms {
    source: Source,
    control: Control,
    read_only: bool,
}

/// A running server. Dropping it ends it: the port is free again soon after, and idle connections are closed.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    /// Never sent: its end is the signal.
    _running: oneshot::Sender<()>,
}

impl Server {
    /// The address it listens on; its port is the real one where 0 was asked for.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }
}

/// Listens on `address` and answers until the [`Server`] is dropped. `source` is called for every request that shows
/// something, and must not block.
///
/// # Errors
/// Nobody may listen there, or somebody else does: the error names the address.
pub async fn serve(address: SocketAddr, source: Source, control: Control, read_only: bool) -> io::Result<Server> {
    let listen = || async {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    };
    let (listener, address) = listen()
        .await
        .map_err(|error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))?;
    let service = router(Rooms { source, control, read_only }).into_make_service_with_connect_info::<SocketAddr>();
    let (running, dropped) = oneshot::channel::<()>();
    let server = axum::serve(listener, service).with_graceful_shutdown(async {
        let _ = dropped.await;
    });
    tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the HTTP server has ended");
        }
    });
    Ok(Server { address, _running: running })
}

fn router(rooms: Rooms) -> Router {
    Router::new()
        .route("/metrics", get(view::metrics))
        .route("/status", get(view::status))
        .route("/slot", get(view::slot))
        .route("/events", get(view::events))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/pause", post(control::pause))
        .route("/resume", post(control::resume))
        .route("/tables/{table}/{action}", post(control::table))
        .with_state(rooms)
}

#[cfg(test)]
mod tests;
