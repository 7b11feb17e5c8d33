//! What is shown: nothing here changes anything.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::Rooms;
use crate::engine::{Event, Phase, Status};
use crate::telemetry::metrics as names;

pub(super) async fn metrics(State(rooms): State<Rooms>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, names::CONTENT_TYPE)], names::render(&(rooms.source)()))
}

/// 503 in phase `failed`, so that a probe needs no JSON. Retrying is not failing: the body says so.
pub(super) async fn status(State(rooms): State<Rooms>) -> (StatusCode, Json<Status>) {
    let status = (rooms.source)();
    let code = if status.phase == Phase::Failed { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (code, Json(status))
}

/// The keys of go-pq-cdc's `GET /slot`.
#[derive(Serialize)]
struct Slot<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(rename = "walStatus")]
    wal_status: Option<&'a str>,
    #[serde(rename = "restartLSN")]
    restart_lsn: Option<u64>,
    #[serde(rename = "confirmedFlushLSN")]
    confirmed_flush_lsn: Option<u64>,
    #[serde(rename = "currentLSN")]
    current_lsn: Option<u64>,
    #[serde(rename = "retainedWALSize")]
    retained_wal_size: Option<u64>,
    lag: Option<u64>,
    #[serde(rename = "activePID")]
    active_pid: Option<i32>,
    active: Option<bool>,
}

pub(super) async fn slot(State(rooms): State<Rooms>) -> Response {
    let status = (rooms.source)();
    let replication = &status.replication;
    let Some(name) = replication.slot.as_deref() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "there is no slot in mode snapshot_only\n").into_response();
    };
    Json(Slot {
        name,
        kind: "logical",
        wal_status: replication.wal_status.as_deref(),
        restart_lsn: replication.restart_lsn.map(|lsn| lsn.0),
        confirmed_flush_lsn: replication.confirmed_lsn.map(|lsn| lsn.0),
        current_lsn: replication.current_lsn.map(|lsn| lsn.0),
        retained_wal_size: replication.retained_bytes,
        lag: replication.lag_bytes,
        active_pid: replication.active_pid,
        active: replication.active,
    })
    .into_response()
}

#[derive(Serialize)]
struct Events {
    /// One event in so many is here.
    events_sampled: u64,
    /// `Event::table` is a position in this list.
    tables: Vec<String>,
    /// Newest last.
    events: Vec<Event>,
}

pub(super) async fn events(State(rooms): State<Rooms>) -> impl IntoResponse {
    let status = (rooms.source)();
    let tables = status.tables.iter().map(|table| table.table.0.to_string()).collect();
    Json(Events { events_sampled: status.events_sampled, tables, events: status.events })
}
