#![allow(clippy::unwrap_used)]

use std::sync::Mutex;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;
use crate::engine::{Command, Commands, Event, EventKind, Phase, Replication, TableName, TableStatus};
use crate::lsn::Lsn;
use crate::table::TableId;

fn fixture() -> Status {
    let table = |name| TableStatus { table: TableName(TableId::new("public", name)), ..TableStatus::default() };
    Status {
        phase: Phase::Streaming,
        tables: vec![table("users"), table("dotted.name")],
        replication: Replication {
            slot: Some("tide".into()),
            active: Some(true),
            active_pid: Some(4242),
            wal_status: Some("reserved".into()),
            current_lsn: Some(Lsn(300)),
            confirmed_lsn: Some(Lsn(200)),
            restart_lsn: Some(Lsn(100)),
            lag_bytes: Some(100),
            retained_bytes: Some(200),
            ..Replication::default()
        },
        events: vec![Event { seq: 7, kind: EventKind::Insert, key: "1".into(), ..Event::default() }],
        events_sampled: 3,
        ..Status::default()
    }
}

struct Fixture {
    server: Server,
    commands: Commands,
    status: Arc<Mutex<Status>>,
}

async fn start(read_only: bool) -> Fixture {
    let status = Arc::new(Mutex::new(fixture()));
    let shared = status.clone();
    let source: Source = Arc::new(move || shared.lock().unwrap().clone());
    let (control, commands) = Control::channel();
    let server = serve("127.0.0.1:0".parse().unwrap(), source, control, read_only).await.unwrap();
    Fixture { server, commands, status }
}

struct Reply {
    code: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        assert!(self.head.contains("content-type: application/json"), "{}", self.head);
        serde_json::from_str(&self.body).unwrap()
    }
}

async fn ask(address: SocketAddr, method: &str, path: &str, headers: &str) -> Reply {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: 0\r\n{headers}\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { code, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

impl Fixture {
    async fn get(&self, path: &str) -> Reply {
        ask(self.server.local_addr(), "GET", path, "").await
    }

    /// Posts, and lets the engine give `answer` to whatever reaches it.
    async fn post(&mut self, path: &str, headers: &str, answer: Result<(), String>) -> (Reply, Option<Command>) {
        let address = self.server.local_addr();
        let request = ask(address, "POST", path, headers);
        tokio::pin!(request);
        tokio::select! {
            biased;
            Some((command, reply)) = self.commands.recv() => {
                reply.send(answer).unwrap();
                (request.await, Some(command))
            }
            reply = &mut request => (reply, None),
        }
    }
}

#[tokio::test]
async fn status_is_the_status_and_says_failed_by_its_code() {
    let fixture = start(false).await;
    let reply = fixture.get("/status").await;
    assert_eq!(reply.code, 200);
    assert_eq!(serde_json::from_value::<Status>(reply.json()).unwrap(), *fixture.status.lock().unwrap());
    fixture.status.lock().unwrap().phase = Phase::Failed;
    let reply = fixture.get("/status").await;
    assert_eq!((reply.code, &reply.json()["phase"]), (503, &json!("failed")));
    assert_eq!(fixture.get("/healthz").await.code, 200);
}

#[tokio::test]
async fn slot_has_the_keys_of_the_reference() {
    let fixture = start(false).await;
    let reply = fixture.get("/slot").await;
    assert_eq!(reply.code, 200);
    assert_eq!(
        reply.json(),
        json!({
            "name": "tide", "type": "logical", "walStatus": "reserved", "restartLSN": 100, "confirmedFlushLSN": 200,
            "currentLSN": 300, "retainedWALSize": 200, "lag": 100, "activePID": 4242, "active": true,
        })
    );
    fixture.status.lock().unwrap().replication.slot = None;
    assert_eq!(fixture.get("/slot").await.code, 503);
}

#[tokio::test]
async fn events_and_metrics_come_from_the_same_status() {
    let fixture = start(false).await;
    let events = fixture.get("/events").await.json();
    assert_eq!(events["events_sampled"], 3);
    assert_eq!(events["tables"], json!(["public.users", "public.dotted.name"]));
    assert_eq!(events["events"][0]["seq"], 7);
    assert_eq!(events["events"][0]["kind"], "INSERT");
    let metrics = fixture.get("/metrics").await;
    assert!(metrics.head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{}", metrics.head);
    assert!(metrics.body.contains("go_pq_cdc_replication_slot_slot_lag{"), "{}", metrics.body);
    assert_eq!(fixture.get("/nothing").await.code, 404);
    assert_eq!(fixture.get("/pause").await.code, 405);
}

#[tokio::test]
async fn commands_reach_the_engine_and_its_answer_comes_back() {
    let mut fixture = start(false).await;
    let users = TableId::new("public", "users");
    let dotted = TableId::new("public", "dotted.name");
    for (path, expected) in [
        ("/pause", Command::Pause),
        ("/resume", Command::Resume),
        ("/tables/public.users/pause", Command::PauseTable(users.clone())),
        ("/tables/public.users/resume", Command::ResumeTable(users.clone())),
        ("/tables/public.users/cancel", Command::CancelResnapshot(users.clone())),
        ("/tables/public.dotted%2Ename/resnapshot", Command::Resnapshot(dotted)),
    ] {
        let (reply, command) = fixture.post(path, "", Ok(())).await;
        assert_eq!((reply.code, command), (202, Some(expected)), "{path}");
    }
    let (reply, command) = fixture.post("/pause", "", Err("a copy is ending".to_owned())).await;
    assert_eq!((reply.code, reply.body.as_str(), command), (409, "a copy is ending\n", Some(Command::Pause)));
    for path in ["/tables/public.ghosts/pause", "/tables/public.users/drop"] {
        let (reply, command) = fixture.post(path, "", Ok(())).await;
        assert_eq!((reply.code, command), (404, None), "{path}");
    }
}

#[tokio::test]
async fn an_engine_that_has_ended_refuses() {
    let mut fixture = start(false).await;
    fixture.commands.close();
    let reply = ask(fixture.server.local_addr(), "POST", "/pause", "").await;
    assert_eq!((reply.code, reply.body.as_str()), (409, "the engine has ended\n"));
}

#[tokio::test]
async fn commands_are_refused_when_read_only_and_from_web_pages() {
    let mut fixture = start(true).await;
    let (reply, command) = fixture.post("/pause", "", Ok(())).await;
    assert_eq!((reply.code, reply.body.as_str(), command), (403, "this process is read-only\n", None));
    let mut fixture = start(false).await;
    let (reply, command) = fixture.post("/pause", "Origin: http://evil.example\r\n", Ok(())).await;
    assert_eq!((reply.code, reply.body.as_str(), command), (403, "commands are not taken from web pages\n", None));
}

#[tokio::test]
async fn commands_from_other_machines_are_refused() {
    use axum::extract::{ConnectInfo, State};

    // Traffic of tests stays on the loopback device, so the peer's address is put in by hand.
    let (control, mut commands) = Control::channel();
    let engine = tokio::spawn(async move {
        let mut taken = 0;
        while let Some((_, reply)) = commands.recv().await {
            reply.send(Ok(())).unwrap();
            taken += 1;
        }
        taken
    });
    for (peer, expected) in [
        ("192.0.2.1:5", 403),
        ("[2001:db8::1]:5", 403),
        ("[::ffff:192.0.2.1]:5", 403),
        ("127.0.0.9:5", 202),
        ("[::1]:5", 202),
        ("[::ffff:127.0.0.1]:5", 202),
    ] {
        let rooms = Rooms { source: Arc::new(fixture), control: control.clone(), read_only: false };
        let peer = ConnectInfo(peer.parse().unwrap());
        let (code, _) = control::pause(State(rooms), peer, Default::default()).await;
        assert_eq!(code, expected, "{peer:?}");
    }
    drop(control);
    assert_eq!(engine.await.unwrap(), 3);
}

#[tokio::test]
async fn a_port_in_use_names_the_key_and_a_dropped_server_frees_it() {
    let fixture = start(false).await;
    let address = fixture.server.local_addr();
    let again = || {
        let (control, _) = Control::channel();
        serve(address, Arc::new(Status::default), control, true)
    };
    let error = again().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    let mut idle = TcpStream::connect(address).await.unwrap();
    idle.write_all(format!("GET /healthz HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes()).await.unwrap();
    let mut first = [0; 15];
    idle.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    drop(fixture);
    // Ends only when the server closes the connection.
    idle.read_to_end(&mut Vec::new()).await.unwrap();
    // The task ends at its next turn of the runtime.
    let mut second = again().await;
    while second.is_err() {
        tokio::task::yield_now().await;
        second = again().await;
    }
}
