//! What is steered: from this machine only.
//!
//! A web page that the operator looks at runs on this machine too, and may send a POST to a loopback port without
//! asking anybody. Browsers put `Origin` on it, no script of an operator does: a request that has one is refused.

use std::net::SocketAddr;

use axum::extract::{ConnectInfo, Path, State};
use axum::http::{HeaderMap, StatusCode, header};

use super::Rooms;
use crate::engine::Command;
use crate::table::TableId;

type Answer = (StatusCode, String);

pub(super) async fn pause(rooms: State<Rooms>, peer: ConnectInfo<SocketAddr>, headers: HeaderMap) -> Answer {
    send(&rooms, peer.0, &headers, Command::Pause).await
}

pub(super) async fn resume(rooms: State<Rooms>, peer: ConnectInfo<SocketAddr>, headers: HeaderMap) -> Answer {
    send(&rooms, peer.0, &headers, Command::Resume).await
}

pub(super) async fn table(
    rooms: State<Rooms>,
    peer: ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    Path((table, action)): Path<(String, String)>,
) -> Answer {
    let command: fn(TableId) -> Command = match action.as_str() {
        "pause" => Command::PauseTable,
        "resume" => Command::ResumeTable,
        "resnapshot" => Command::Resnapshot,
        "cancel" => Command::CancelResnapshot,
        _ => return (StatusCode::NOT_FOUND, "the actions are pause, resume, resnapshot and cancel\n".to_owned()),
    };
    // By the name as a whole: where the schema ends, a dot does not tell.
    let tables = (rooms.source)().tables;
    let Some(found) = tables.into_iter().map(|status| status.table.0).find(|id| id.to_string() == table) else {
        return (
            StatusCode::NOT_FOUND,
            "no such table here: name it as schema.table, as GET /status does\n".to_owned(),
        );
    };
    send(&rooms, peer.0, &headers, command(found)).await
}

async fn send(rooms: &Rooms, peer: SocketAddr, headers: &HeaderMap, command: Command) -> Answer {
    let refused = |why: &str| (StatusCode::FORBIDDEN, format!("{why}\n"));
    if !peer.ip().to_canonical().is_loopback() {
        return refused("commands are taken from this machine only");
    }
    if headers.contains_key(header::ORIGIN) {
        return refused("commands are not taken from web pages");
    }
    if rooms.read_only {
        return refused("this process is read-only");
    }
    match rooms.control.send(command).await {
        Ok(()) => (StatusCode::ACCEPTED, "taken\n".to_owned()),
        Err(reason) => (StatusCode::CONFLICT, format!("{reason}\n")),
    }
}
