//! An HTTP server that answers as a test says, down to broken answers, and the tests that need one.

#![allow(clippy::unwrap_used)]

mod bodies;
mod client;
mod connection;
mod deliver;
mod lanes;
mod letters;
mod memory;
mod responses;
mod sweep;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::{Client, Sink, SinkOptions};
use crate::config;

#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) headers: HashMap<String, String>,
    pub(super) body: Vec<u8>,
}

pub(super) enum Reply {
    Answer {
        status: u16,
        headers: Vec<(&'static str, String)>,
        body: Vec<u8>,
    },
    /// An answer that ends before its length.
    Cut {
        body: Vec<u8>,
        at: usize,
    },
    /// The connection closes without an answer.
    Hangup,
    /// The answer comes once the gate has a permit.
    Held(Arc<Semaphore>, Box<Reply>),
}

impl Reply {
    pub(super) fn json(status: u16, body: &Value) -> Reply {
        Reply::Answer { status, headers: Vec::new(), body: body.to_string().into_bytes() }
    }

    pub(super) fn error(status: u16, kind: &str, reason: &str) -> Reply {
        Reply::json(status, &json!({"error": {"type": kind, "reason": reason}, "status": status}))
    }
}

/// One operation of a bulk request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Operation {
    pub(super) kind: String,
    pub(super) index: String,
    pub(super) id: String,
    pub(super) version: Option<u64>,
    pub(super) routing: Option<String>,
    pub(super) document: Option<Value>,
}

impl Request {
    pub(super) fn operations(&self) -> Vec<Operation> {
        operations(&self.body)
    }

    pub(super) fn ids(&self) -> Vec<String> {
        self.operations().into_iter().map(|operation| operation.id).collect()
    }
}

pub(super) fn operations(body: &[u8]) -> Vec<Operation> {
    assert!(body.ends_with(b"\n"), "a bulk body ends in a line break");
    let mut lines = body[..body.len() - 1].split(|&byte| byte == b'\n');
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        let action: HashMap<String, Value> = serde_json::from_slice(line).expect("an action line");
        let (kind, meta) = action.into_iter().next().unwrap();
        let document = (kind != "delete").then(|| serde_json::from_slice(lines.next().unwrap()).expect("a document"));
        found.push(Operation {
            kind,
            index: meta["_index"].as_str().unwrap().to_owned(),
            id: meta["_id"].as_str().unwrap().to_owned(),
            version: meta["version"].as_u64(),
            routing: meta["routing"].as_str().map(str::to_owned),
            document,
        });
    }
    found
}

/// The answer to a bulk of these operations, each with a status and the error that goes with it.
pub(super) fn bulk_answer(operations: &[Operation], answer: impl Fn(usize, &Operation) -> (u16, Value)) -> Value {
    let mut errors = false;
    let items: Vec<Value> = operations
        .iter()
        .enumerate()
        .map(|(at, operation)| {
            let (status, error) = answer(at, operation);
            errors |= !error.is_null();
            let body =
                if error.is_null() { json!({"status": status}) } else { json!({"status": status, "error": error}) };
            json!({ &operation.kind: body })
        })
        .collect();
    json!({"errors": errors, "items": items})
}

/// Every item is a success.
pub(super) fn all_ok(request: &Request) -> Value {
    bulk_answer(&request.operations(), |_, _| (200, Value::Null))
}

pub(super) struct Server {
    pub(super) url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Server {
    /// `handler` is given the number of the request, from 0, in order of arrival.
    pub(super) async fn start(handler: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Server {
        Self::at(TcpListener::bind("127.0.0.1:0").await.unwrap(), handler)
    }

    pub(super) fn at(
        listener: TcpListener,
        handler: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static,
    ) -> Server {
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (handler, seen) = (Arc::new(handler), Arc::clone(&requests));
        let task = tokio::spawn(async move {
            // Dropped with the server, and all connections with it.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (handler, seen) = (Arc::clone(&handler), Arc::clone(&seen));
                connections.spawn(async move { serve(stream, &*handler, &seen).await });
            }
        });
        Server { url, requests, task }
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    mut stream: TcpStream,
    handler: &(dyn Fn(usize, &Request) -> Reply + Send + Sync),
    seen: &Mutex<Vec<Request>>,
) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = memchr::memmem::find(&buffer, b"\r\n\r\n") {
                break at;
            }
            if stream.read_buf(&mut buffer).await.ok()? == 0 {
                return None;
            }
        };
        let head = String::from_utf8(buffer[..end].to_vec()).unwrap();
        buffer.drain(..end + 4);
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap().split(' ');
        let (method, path) = (first.next().unwrap().to_owned(), first.next().unwrap().to_owned());
        let headers: HashMap<_, _> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect();
        let length: usize = headers.get("content-length").map_or(0, |text| text.parse().unwrap());
        while buffer.len() < length {
            if stream.read_buf(&mut buffer).await.ok()? == 0 {
                return None;
            }
        }
        let request = Request { method, path, headers, body: buffer.drain(..length).collect() };
        let mut reply = {
            let mut seen = seen.lock().unwrap();
            seen.push(request.clone());
            handler(seen.len() - 1, &request)
        };
        while let Reply::Held(gate, inner) = reply {
            gate.acquire().await.ok()?.forget();
            reply = *inner;
        }
        match reply {
            Reply::Answer { status, headers, body } => {
                let mut head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n", body.len());
                for (name, value) in headers {
                    head.push_str(&format!("{name}: {value}\r\n"));
                }
                head.push_str("\r\n");
                stream.write_all(head.as_bytes()).await.ok()?;
                if request.method != "HEAD" {
                    stream.write_all(&body).await.ok()?;
                }
            }
            Reply::Cut { body, at } => {
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                stream.write_all(head.as_bytes()).await.ok()?;
                stream.write_all(&body[..at]).await.ok()?;
                return None;
            }
            Reply::Hangup | Reply::Held(..) => return None,
        }
    }
}

pub(super) fn config(url: &str) -> config::Elasticsearch {
    config::Elasticsearch { urls: vec![url.to_owned()], ..config::Elasticsearch::default() }
}

/// A sink that hardly waits, with its dead letters in a folder that lives as long as the guard.
pub(super) fn sink(url: &str) -> (Sink, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let options = SinkOptions {
        backoff_base: Duration::from_millis(1),
        backoff_cap: Duration::from_millis(12),
        tables: (0..10).map(|number| if number == 9 { "public.orders".to_owned() } else { String::new() }).collect(),
        ..SinkOptions::new(4, folder.path().join("dead.ndjson"))
    };
    (Sink::new(Client::new(&config(url)).unwrap(), options), folder)
}

/// Waits until `condition` holds, at most 10 s.
pub(super) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(std::time::Instant::now() < end, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
