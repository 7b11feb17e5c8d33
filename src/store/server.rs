//! HTTP: bodies in, answers out, and the faults between them.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, BodyDataStream};
use axum::extract::{ConnectInfo, Request as HttpRequest, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use base64::Engine;
use futures_util::StreamExt;
use tokio::net::TcpListener;

use super::connection::{Cuttable, Scissors};
use super::failure::Failure;
use super::faults::{Armed, Effect, failure};
use super::filter_path::Filter;
use super::null::Scanner;
use super::routes::{self, Request};
use super::{Reply, Shared};

/// Serves until [`Shared::closing`].
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let closing = shared.closing.clone();
    let app = Router::new().fallback(handle).with_state(shared);
    let service = app.into_make_service_with_connect_info::<Scissors>();
    // It never returns an error: accepting goes on through all of them.
    let _ = axum::serve(Cuttable(listener), service).with_graceful_shutdown(closing.cancelled_owned()).await;
}

async fn handle(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(scissors): ConnectInfo<Scissors>,
    request: HttpRequest,
) -> Response {
    shared.counters.requests.fetch_add(1, Ordering::Relaxed);
    let reply = match respond(&shared, &scissors, request).await {
        Answer::Reply(reply) => reply,
        Answer::Close => {
            scissors.cut_after(0);
            Reply::ok(Vec::new())
        }
    };
    into_response(reply)
}

enum Answer {
    Reply(Reply),
    /// The connection closes without one.
    Close,
}

async fn respond(shared: &Arc<Shared>, scissors: &Scissors, request: HttpRequest) -> Answer {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let mut stream = body.into_data_stream();
    if let Err(failure) = authorize(shared, &head.headers, &path) {
        drain(shared, &mut stream).await;
        return Answer::Reply(Reply::failure(&failure));
    }
    let own = path.starts_with("/_pgtide/");
    let fault = if own { None } else { shared.faults.take(&path) };
    if let Some(Effect::Reject { status, kind }) = fault.as_ref().map(|fault| &fault.effect) {
        drain(shared, &mut stream).await;
        return Answer::Reply(if *status == 413 {
            Reply::too_large()
        } else {
            Reply::failure(&failure(*status, kind.as_deref()))
        });
    }
    let query = head.uri.query().unwrap_or_default();
    let mut request = Request {
        uri: head.uri.path_and_query().map_or_else(|| path.clone(), ToString::to_string),
        segments: routes::segments(&path),
        params: url::form_urlencoded::parse(query.as_bytes()).into_owned().collect::<HashMap<_, _>>(),
        method: head.method,
        body: Vec::new(),
    };
    let gzip = match encoding(&head.headers) {
        Ok(gzip) => gzip,
        Err(failure) => {
            drain(shared, &mut stream).await;
            return Answer::Reply(Reply::failure(&failure));
        }
    };
    let length = head.headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let reply = if shared.options.null && is_bulk(&request) {
        let reply = null_bulk(shared, &request, &mut stream, gzip, length.unwrap_or(0)).await;
        before(shared, fault.as_deref()).await;
        reply
    } else {
        request.body = match collect(shared, &mut stream, length.unwrap_or(0)).await {
            Ok(body) => body,
            Err(answer) => return answer,
        };
        if let Some(failure) = content_type(&head.headers, &request.body).filter(|_| !own) {
            return Answer::Reply(Reply::failure(&failure));
        }
        // On a task of its own: a request that has arrived is applied even if its client goes away, as in Elasticsearch.
        let mut asker = Asker { shared, number: shared.under_way.begin(), waits: true };
        let work = tokio::spawn({
            let (shared, fault, number) = (Arc::clone(shared), fault.clone(), asker.number);
            async move {
                let _end = UnderWay { shared: Arc::clone(&shared), number };
                before(&shared, fault.as_deref()).await;
                tokio::task::spawn_blocking(move || execute(&shared, request, gzip, fault.as_deref())).await
            }
        });
        let done = work.await;
        asker.waits = false;
        match done {
            Ok(Ok(answer)) => answer,
            // The work panicked, or the runtime is going down.
            _ => Answer::Close,
        }
    };
    match (reply, fault.as_ref().map(|fault| &fault.effect)) {
        (reply, Some(Effect::Hold { applied: true })) => {
            hold(shared).await;
            reply
        }
        (_, Some(Effect::ApplyThenFail { status: None })) => Answer::Close,
        (_, Some(Effect::ApplyThenFail { status: Some(status) })) => {
            Answer::Reply(Reply::failure(&failure(*status, None)))
        }
        (reply, Some(Effect::Cut { bytes })) => {
            scissors.cut_after(*bytes);
            reply
        }
        (reply, _) => reply,
    }
}

/// A client that waits for an answer: dropped while it waits, it has gone.
struct Asker<'a> {
    shared: &'a Shared,
    number: u64,
    waits: bool,
}

impl Drop for Asker<'_> {
    fn drop(&mut self) {
        if self.waits {
            self.shared.under_way.abandon(self.number);
        }
    }
}

/// A request that is worked on until this is dropped.
struct UnderWay {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.shared.under_way.end(self.number);
    }
}

fn is_bulk(request: &Request) -> bool {
    let put = request.method == Method::POST || request.method == Method::PUT;
    put && matches!(request.segments.as_slice(), [bulk] | [_, bulk] if bulk == "_bulk")
}

/// What a fault does before the request is applied.
async fn before(shared: &Shared, fault: Option<&Armed>) {
    match fault.map(|fault| &fault.effect) {
        Some(Effect::Hold { applied: false }) => hold(shared).await,
        Some(Effect::Delay { milliseconds }) => {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(*milliseconds)) => {}
                () = shared.closing.cancelled() => {}
            }
        }
        _ => {}
    }
}

async fn hold(shared: &Shared) {
    tokio::select! {
        () = shared.faults.hold() => {}
        () = shared.closing.cancelled() => {}
    }
}

fn execute(shared: &Shared, mut request: Request, gzip: bool, fault: Option<&Armed>) -> Answer {
    if gzip {
        let limit = shared.options.max_content_length as u64;
        let mut inflated = Vec::with_capacity(request.body.len() * 4);
        let mut decoder = flate2::read::MultiGzDecoder::new(request.body.as_slice()).take(limit + 1);
        match decoder.read_to_end(&mut inflated) {
            // What Elasticsearch does with a body that is no gzip.
            Err(_) => return Answer::Close,
            Ok(_) if inflated.len() as u64 > limit => return Answer::Reply(Reply::too_large()),
            Ok(_) => request.body = inflated,
        }
    }
    Answer::Reply(routes::answer(shared, &request, fault))
}

fn authorize(shared: &Shared, headers: &HeaderMap, path: &str) -> Result<(), Failure> {
    let Some((name, password)) = &shared.options.user else { return Ok(()) };
    let refuse = |reason: String| Err(Failure::new(401, "security_exception", reason));
    let Some(given) = headers.get(header::AUTHORIZATION) else {
        return refuse(format!("missing authentication credentials for REST request [{path}]"));
    };
    let expected = base64::engine::general_purpose::STANDARD.encode(format!("{name}:{password}"));
    match given.to_str().ok().and_then(|given| given.strip_prefix("Basic ")) {
        Some(given) if given == expected => Ok(()),
        _ => refuse(format!("unable to authenticate user for REST request [{path}]")),
    }
}

/// Whether the body is gzip.
fn encoding(headers: &HeaderMap) -> Result<bool, Failure> {
    match headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity" | b"") => Ok(false),
        Some(b"gzip" | b"x-gzip") => Ok(true),
        Some(_) => Err(Failure::argument("only gzip is supported as a Content-Encoding")),
    }
}

/// What is wrong with the type of a body, if there is one.
fn content_type(headers: &HeaderMap, body: &[u8]) -> Option<Failure> {
    if body.is_empty() {
        return None;
    }
    let given = headers.get(header::CONTENT_TYPE).map(|given| String::from_utf8_lossy(given.as_bytes()));
    let given = given.as_deref().unwrap_or_default();
    let essence = given.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let known = [
        "application/json",
        "application/x-ndjson",
        "application/vnd.elasticsearch+json",
        "application/vnd.elasticsearch+x-ndjson",
    ];
    let reason = format!("Content-Type header [{given}] is not supported");
    (!known.contains(&essence.as_str())).then(|| Failure::new(406, "media_type_header_exception", reason))
}

/// Reads the rest of a body, so that the client can hear the answer.
async fn drain(shared: &Shared, stream: &mut BodyDataStream) {
    while let Some(Ok(frame)) = stream.next().await {
        shared.counters.bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
    }
}

async fn collect(shared: &Shared, stream: &mut BodyDataStream, length: usize) -> Result<Vec<u8>, Answer> {
    let limit = shared.options.max_content_length;
    let mut body = Vec::with_capacity(length.min(limit));
    while let Some(frame) = stream.next().await {
        let Ok(frame) = frame else { return Err(Answer::Close) };
        shared.counters.bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        if body.len() + frame.len() > limit {
            drop(body);
            drain(shared, stream).await;
            return Err(Answer::Reply(Reply::too_large()));
        }
        body.extend_from_slice(&frame);
    }
    Ok(body)
}

async fn null_bulk(
    shared: &Shared,
    request: &Request,
    stream: &mut BodyDataStream,
    gzip: bool,
    length: usize,
) -> Answer {
    let limit = shared.options.max_content_length;
    let index = if request.segments.len() == 2 { request.segments[0].as_str() } else { "" };
    let filter: Option<Filter> = request.filter();
    let mut scanner = Limited { scanner: Scanner::new(index, filter.as_ref(), length.min(limit)), left: limit };
    let mut inflater = None;
    if gzip {
        let scanner = std::mem::replace(&mut scanner, Limited { scanner: Scanner::new("", None, 0), left: 0 });
        inflater = Some(flate2::write::MultiGzDecoder::new(scanner));
    }
    let mut bytes = 0;
    while let Some(frame) = stream.next().await {
        let Ok(frame) = frame else { return Answer::Close };
        bytes += frame.len() as u64;
        let fed = match &mut inflater {
            Some(inflater) => inflater.write_all(&frame),
            None => scanner.write_all(&frame),
        };
        if fed.is_err() {
            let full = inflater.as_ref().map_or(scanner.left == 0, |inflater| inflater.get_ref().left == 0);
            drain(shared, stream).await;
            return if full { Answer::Reply(Reply::too_large()) } else { Answer::Close };
        }
    }
    shared.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
    if let Some(inflater) = inflater {
        match inflater.finish() {
            Ok(finished) => scanner = finished,
            Err(_) => return Answer::Close,
        }
    }
    let (body, counts) = match scanner.scanner.finish() {
        Ok(finished) => finished,
        Err(failure) => return Answer::Reply(Reply::failure(&failure)),
    };
    for count in counts {
        match shared.catalog.write_target(&count.index, true, false) {
            Ok(index) => index.count_only(count.writes),
            Err(failure) => return Answer::Reply(Reply::failure(&failure)),
        }
        shared.counters.items.fetch_add(count.writes + count.deletes, Ordering::Relaxed);
    }
    Answer::Reply(Reply { filtered: true, ..Reply::ok(body) })
}

/// A scanner that takes a number of bytes and no more. `left` is 0 once more came.
struct Limited {
    scanner: Scanner,
    left: usize,
}

impl Write for Limited {
    fn write(&mut self, frame: &[u8]) -> std::io::Result<usize> {
        if frame.len() > self.left {
            self.left = 0;
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.left -= frame.len();
        self.scanner.feed(frame);
        Ok(frame.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn into_response(reply: Reply) -> Response {
    let status = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let empty = reply.body.is_empty();
    let mut response = Response::new(Body::from(reply.body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    if !empty {
        let kind = if reply.text { "text/plain; charset=UTF-8" } else { "application/json" };
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    if reply.product {
        headers.insert("x-elastic-product", HeaderValue::from_static("Elasticsearch"));
    }
    if reply.challenge {
        let challenge = HeaderValue::from_static("Basic realm=\"security\", charset=\"UTF-8\"");
        headers.insert(header::WWW_AUTHENTICATE, challenge);
    }
    response
}
