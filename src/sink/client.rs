//! HTTP requests to Elasticsearch, over all its URLs in turn.

use std::error::Error as _;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use reqwest::{Method, Url};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::Semaphore;

use super::error::SinkError;
use super::response;
use crate::config::{self, VerificationMode};
use crate::tls::{self, Check, Files, TlsError};

/// How long Elasticsearch waits for a shard that is not there before it says so, at most; its default is as long as our
/// patience, so that we would never hear the reason.
const SHARD_TIMEOUT: Duration = Duration::from_secs(30);
/// A URL that gave no answer is asked last for so long.
const AVOIDED: Duration = Duration::from_secs(10);
/// More than any answer of ours may have: 10,000 items that all failed take a few megabytes.
const LONGEST_ANSWER: usize = 256 << 20;

/// What keeps statuses and errors of a bulk answer and leaves out the rest. Without `items.*.status` the items that
/// went well would be missing and positions lost.
const BULK_FILTER: &str = "errors,items.*.status,items.*.error.type,items.*.error.reason";

/// Talks to Elasticsearch. Takes the URLs in turn, and the next one when one takes no connection; one that gave no answer
/// comes last for a while.
///
/// Proxies named in the environment are not used: `elasticsearch.proxy` is.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    urls: Vec<Node>,
    next: AtomicUsize,
    authorization: Option<HeaderValue>,
    gzip: bool,
    request_timeout: Duration,
}

#[derive(Debug)]
struct Node {
    url: Url,
    /// When it last gave no answer.
    failed: Mutex<Option<Instant>>,
    /// One for each connection that it may have.
    connections: Semaphore,
}

/// An answer, whatever its status.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// `Retry-After`, when it is a number of seconds.
    pub retry_after: Option<Duration>,
    /// `X-Elastic-Product`.
    pub product: Option<String>,
    /// The body, complete.
    pub body: Bytes,
    /// Who answered, without user and password.
    pub url: String,
}

/// The body of a request.
#[derive(Clone, Debug)]
pub enum Content {
    /// None.
    Empty,
    /// One JSON value.
    Json(Bytes),
    /// A bulk body.
    Bulk(Bytes),
    /// A bulk body after gzip.
    PackedBulk(Bytes),
}

/// What `GET /` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerInfo {
    /// `elasticsearch`, `opensearch`, or what else the server calls itself.
    pub distribution: String,
    /// Its version; none where it does not tell.
    pub version: Option<String>,
    /// What names its cluster: the uuid, whatever URL was asked; where it does not tell, all our URLs.
    pub cluster: String,
}

impl Client {
    /// A client for these URLs. Connects to nothing yet.
    ///
    /// # Errors
    /// [`SinkError::Configuration`]: no URL, or one that is none.
    pub fn new(config: &config::Elasticsearch) -> Result<Client, SinkError> {
        let mut userinfo = None;
        let mut urls = Vec::with_capacity(config.urls.len());
        for text in &config.urls {
            let mut url = parse_url(text)?;
            if !url.username().is_empty() {
                let decode = |part: &str| url_decode(part);
                userinfo = Some((decode(url.username()), decode(url.password().unwrap_or_default())));
            }
            // Neither fails on a URL that has a host.
            let _ = url.set_username("");
            let _ = url.set_password(None);
            urls.push(Node {
                url,
                failed: Mutex::new(None),
                connections: Semaphore::new(config.max_conns_per_host.max(1)),
            });
        }
        if urls.is_empty() {
            return Err(SinkError::Configuration {
                message: "elasticsearch.urls is empty".to_owned(),
                hint: "Write at least one, such as http://localhost:9200.".to_owned(),
            });
        }
        let authorization = authorization(config, userinfo)?;
        let secure = urls.iter().any(|node| node.url.scheme() == "https");
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls(config, secure)?)
            .no_proxy()
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(config.connect_timeout)
            .timeout(config.request_timeout)
            .tcp_nodelay(true)
            .pool_max_idle_per_host(config.max_conns_per_host)
            .pool_idle_timeout(config.max_idle_conn_duration)
            .user_agent(concat!("pgtide/", env!("CARGO_PKG_VERSION")));
        let http = match proxy(config)? {
            // After `no_proxy`, which takes them all away: those of the environment are not used.
            Some(proxy) => http.proxy(proxy),
            None => http,
        };
        let http = http.build().map_err(|error| SinkError::Configuration {
            message: format!("the HTTP client does not start: {}", innermost(&error)),
            hint: "Check the keys of elasticsearch.".to_owned(),
        })?;
        let (gzip, request_timeout) = (config.compression_enabled, config.request_timeout);
        Ok(Client { http, urls, next: AtomicUsize::new(0), authorization, gzip, request_timeout })
    }

    /// The first URL, without user and password.
    #[must_use]
    pub fn url(&self) -> String {
        self.urls.first().map(|node| shown(&node.url)).unwrap_or_default()
    }

    fn all_urls(&self) -> String {
        let mut urls: Vec<String> = self.urls.iter().map(|node| shown(&node.url)).collect();
        urls.sort_unstable();
        urls.join(" ")
    }

    /// `compressionEnabled`.
    #[must_use]
    pub(super) fn gzip(&self) -> bool {
        self.gzip
    }

    /// Sends one request and reads the answer, whatever its status. `path` is joined by slashes, each part escaped.
    ///
    /// # Errors
    /// No complete answer: [`SinkError::Unreachable`] (no URL took the connection), [`SinkError::Timeout`],
    /// [`SinkError::Broken`].
    pub async fn send(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        content: Content,
    ) -> Result<Answer, SinkError> {
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..self.urls.len()).map(|step| &self.urls[(first + step) % self.urls.len()]);
        let (good, avoided): (Vec<_>, Vec<_>) = in_turn.partition(|node| !node.is_avoided());
        let mut refusal = None;
        for node in good.into_iter().chain(avoided) {
            match self.send_to(node, method.clone(), path, query, content.clone()).await {
                // Nothing was sent: another URL may take it.
                Err(error @ SinkError::Unreachable { .. }) => {
                    node.set_failed(Some(Instant::now()));
                    refusal.get_or_insert(error);
                }
                other => {
                    let silent = matches!(&other, Err(SinkError::Timeout { .. } | SinkError::Broken { .. }));
                    node.set_failed(silent.then(Instant::now));
                    return other;
                }
            }
        }
        Err(refusal.unwrap_or(SinkError::Stopped))
    }

    async fn send_to(
        &self,
        node: &Node,
        method: Method,
        path: &[&str],
        query: &[(&str, &str)],
        content: Content,
    ) -> Result<Answer, SinkError> {
        let Ok(_connection) = node.connections.acquire().await else { return Err(SinkError::Stopped) };
        let mut url = node.url.clone();
        // Without a path it is the URL as it was written: a proxy may tell /es/ from /es.
        if !path.is_empty()
            && let Ok(mut segments) = url.path_segments_mut()
        {
            segments.pop_if_empty().extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request = self.http.request(method, url);
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization.clone());
        }
        request = match content {
            Content::Empty => request,
            Content::Json(bytes) => request.header(CONTENT_TYPE, "application/json").body(bytes),
            Content::Bulk(bytes) => request.header(CONTENT_TYPE, "application/x-ndjson").body(bytes),
            Content::PackedBulk(bytes) => {
                request.header(CONTENT_TYPE, "application/x-ndjson").header(CONTENT_ENCODING, "gzip").body(bytes)
            }
        };
        let failed = |error: reqwest::Error| transport_error(&node.url, &error, self.request_timeout);
        let mut response = request.send().await.map_err(failed)?;
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let retry_after =
            header(RETRY_AFTER.as_str()).and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
        let product = header("x-elastic-product");
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if body.len() + chunk.len() > LONGEST_ANSWER {
                return Err(SinkError::TooLong { url: shown(&node.url) });
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Answer { status, retry_after, product, body: body.into(), url: shown(&node.url) })
    }

    /// Sends a bulk body ([`Content::Bulk`] or [`Content::PackedBulk`]).
    ///
    /// # Errors
    /// As [`Client::send`]. Every status is an answer.
    pub async fn bulk(&self, content: Content) -> Result<Answer, SinkError> {
        let timeout = format!("{}s", SHARD_TIMEOUT.min(self.request_timeout / 2).as_secs().max(1));
        let query = [("filter_path", BULK_FILTER), ("timeout", timeout.as_str())];
        self.send(Method::POST, &["_bulk"], &query, content).await
    }

    /// Who answers there.
    ///
    /// # Errors
    /// As [`Client::send`], and [`SinkError::Unauthorized`], [`SinkError::Forbidden`], [`SinkError::NotElasticsearch`],
    /// [`SinkError::Refused`] (429 and 5xx).
    pub async fn info(&self) -> Result<ServerInfo, SinkError> {
        #[derive(Deserialize)]
        struct Root {
            version: Version,
            #[serde(default)]
            tagline: String,
            cluster_uuid: Option<String>,
        }
        #[derive(Deserialize)]
        struct Version {
            number: String,
            distribution: Option<String>,
        }
        let answer = self.send(Method::GET, &[], &[], Content::Empty).await?;
        let elastic = answer.product.as_deref() == Some("Elasticsearch");
        match answer.status {
            200 => {
                let root = serde_json::from_slice::<Root>(&answer.body).ok();
                // `_na_` until the cluster has a master.
                let uuid = root.as_ref().and_then(|root| root.cluster_uuid.clone()).filter(|uuid| uuid != "_na_");
                let cluster = uuid.unwrap_or_else(|| self.all_urls());
                let known = root.and_then(|root| match root.version.distribution {
                    Some(distribution) => Some((distribution, root.version.number)),
                    None if elastic || root.tagline == "You Know, for Search" => {
                        Some(("elasticsearch".to_owned(), root.version.number))
                    }
                    None => None,
                });
                match known {
                    Some((distribution, version)) => Ok(ServerInfo { distribution, version: Some(version), cluster }),
                    None => Err(SinkError::NotElasticsearch {
                        url: answer.url,
                        reason: "its root page does not name version and distribution".to_owned(),
                    }),
                }
            }
            401 | 403 | 429 | 500.. => Err(answer.into_error()),
            // Some builds do not allow GET / and are Elasticsearch all the same.
            _ if elastic => {
                Ok(ServerInfo { distribution: "elasticsearch".to_owned(), version: None, cluster: self.all_urls() })
            }
            status => Err(SinkError::NotElasticsearch { url: answer.url, reason: format!("GET / gives {status}") }),
        }
    }

    /// Whether the index or alias exists.
    ///
    /// # Errors
    /// As [`Client::send`], and any status but 200 and 404.
    pub async fn index_exists(&self, index: &str) -> Result<bool, SinkError> {
        let answer = self.send(Method::HEAD, &[index], &[], Content::Empty).await?;
        match answer.status {
            200 => Ok(true),
            404 => Ok(false),
            _ => Err(answer.into_error()),
        }
    }

    /// The `index.uuid` of an index, which another one of its name does not have; of an alias those of all its indices.
    /// None where there is no such index.
    ///
    /// # Errors
    /// As [`Client::send`], and any refusal but 404.
    pub async fn index_uuid(&self, index: &str) -> Result<Option<String>, SinkError> {
        // Not with `flat_settings`: no filter matches a name with dots.
        let query = [("filter_path", "*.settings.index.uuid")];
        let answer = self.send(Method::GET, &[index, "_settings"], &query, Content::Empty).await?;
        match answer.status {
            200 => {
                let settings: Value = answer.json()?;
                let of_each = settings.as_object().into_iter().flat_map(serde_json::Map::values);
                let mut uuids: Vec<&str> =
                    of_each.filter_map(|index| index["settings"]["index"]["uuid"].as_str()).collect();
                uuids.sort_unstable();
                Ok(Some(uuids.join(",")))
            }
            404 => Ok(None),
            _ => Err(answer.into_error()),
        }
    }

    /// Creates an index with these settings and mappings. One that exists already is left as it is.
    ///
    /// # Errors
    /// As [`Client::send`], and any refusal but `resource_already_exists_exception`.
    pub async fn create_index(&self, index: &str, settings: &Value) -> Result<(), SinkError> {
        let answer = self.send(Method::PUT, &[index], &[], json(settings)).await?;
        match answer.status {
            200..=299 => Ok(()),
            400 if response::error_of(&answer.body).is_some_and(|error| error.kind.contains("already_exists")) => {
                Ok(())
            }
            _ => Err(answer.into_error()),
        }
    }

    /// Removes an index, or those behind an alias, and the alias with them. One that does not exist is no error.
    ///
    /// # Errors
    /// As [`Client::send`], and any status but 2xx and 404.
    pub async fn delete_index(&self, index: &str) -> Result<(), SinkError> {
        let answer = self.send(Method::GET, &[index, "_alias"], &[], Content::Empty).await?;
        let behind: serde_json::Map<String, Value> = match answer.status {
            200 => answer.json()?,
            404 => return Ok(()),
            _ => return Err(answer.into_error()),
        };
        for index in behind.keys() {
            let answer = self.send(Method::DELETE, &[index], &[], Content::Empty).await?;
            if !matches!(answer.status, 200..=299 | 404) {
                return Err(answer.into_error());
            }
        }
        Ok(())
    }

    /// Documents of the index that a search sees (refresh first); none when there is no such index.
    ///
    /// # Errors
    /// As [`Client::send`], and any status but 200 and 404.
    pub async fn count(&self, index: &str) -> Result<Option<u64>, SinkError> {
        #[derive(Deserialize)]
        struct Count {
            count: u64,
        }
        let answer = self.send(Method::GET, &[index, "_count"], &[], Content::Empty).await?;
        match answer.status {
            200 => Ok(Some(answer.json::<Count>()?.count)),
            404 => Ok(None),
            _ => Err(answer.into_error()),
        }
    }

    /// Makes everything written so far visible to searches. False when there is no such index.
    ///
    /// # Errors
    /// As [`Client::send`], and any status but 2xx and 404.
    pub async fn refresh(&self, index: &str) -> Result<bool, SinkError> {
        let answer = self.send(Method::POST, &[index, "_refresh"], &[], Content::Empty).await?;
        match answer.status {
            200..=299 => Ok(true),
            404 => Ok(false),
            _ => Err(answer.into_error()),
        }
    }
}

impl Answer {
    /// The body as JSON of this shape.
    ///
    /// # Errors
    /// [`SinkError::Malformed`]
    pub fn json<'a, T: Deserialize<'a>>(&'a self) -> Result<T, SinkError> {
        serde_json::from_slice(&self.body).map_err(|error| SinkError::Malformed {
            url: self.url.clone(),
            reason: format!("{:?} error", error.classify()),
        })
    }

    /// The error that this answer is.
    pub(crate) fn into_error(self) -> SinkError {
        let error = response::error_of(&self.body);
        let reason = response::describe(self.status, error.as_ref());
        let url = self.url;
        match self.status {
            401 => SinkError::Unauthorized { url, reason },
            // A block of the index or the cluster has this status, too.
            403 if error.is_none_or(|error| error.kind == "security_exception") => SinkError::Forbidden { url, reason },
            status => SinkError::Refused { url, status, reason },
        }
    }
}

impl Node {
    fn is_avoided(&self) -> bool {
        let failed = *self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.is_some_and(|at| at.elapsed() < AVOIDED)
    }

    fn set_failed(&self, at: Option<Instant>) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }
}

/// A request's body out of a JSON value.
pub(super) fn json(value: &Value) -> Content {
    Content::Json(value.to_string().into())
}

fn parse_url(text: &str) -> Result<Url, SinkError> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    url.ok_or_else(|| SinkError::Configuration {
        // The text may hold a password.
        message: "an entry of elasticsearch.urls is no URL".to_owned(),
        hint: "Write scheme, host and port, such as http://localhost:9200.".to_owned(),
    })
}

fn url_decode(part: &str) -> String {
    // Form decoding takes `+` for a space, which userinfo does not mean.
    let text = format!("v={}", part.replace('+', "%2B"));
    url::form_urlencoded::parse(text.as_bytes()).next().map(|(_, value)| value.into_owned()).unwrap_or_default()
}

fn shown(url: &Url) -> String {
    url.as_str().trim_end_matches('/').to_owned()
}

/// Who pgtide is.
fn authorization(
    config: &config::Elasticsearch,
    userinfo: Option<(String, String)>,
) -> Result<Option<HeaderValue>, SinkError> {
    let base64 = |text: String| base64::engine::general_purpose::STANDARD.encode(text);
    let (key, text) = if !config.api_key.is_empty() {
        let written = config.api_key.0.trim();
        // What Elasticsearch calls `encoded` holds no colon.
        let encoded = if written.contains(':') { base64(written.to_owned()) } else { written.to_owned() };
        ("apiKey", format!("ApiKey {encoded}"))
    } else if !config.bearer_token.is_empty() {
        ("bearerToken", format!("Bearer {}", config.bearer_token.0.trim()))
    } else if !config.username.is_empty() {
        ("username", format!("Basic {}", base64(format!("{}:{}", config.username, config.password.0))))
    } else if let Some((user, password)) = userinfo {
        ("urls", format!("Basic {}", base64(format!("{user}:{password}"))))
    } else {
        return Ok(None);
    };
    let mut value = HeaderValue::from_str(&text).map_err(|_| SinkError::Configuration {
        // Never what it holds.
        message: format!("elasticsearch.{key} holds characters that no HTTP header can hold"),
        hint: "Was the file cut, or made by another program? Write it in one line.".to_owned(),
    })?;
    value.set_sensitive(true);
    Ok(Some(value))
}

fn proxy(config: &config::Elasticsearch) -> Result<Option<reqwest::Proxy>, SinkError> {
    let Some(url) = &config.proxy else { return Ok(None) };
    let proxy = reqwest::Proxy::all(url).map_err(|_| SinkError::Configuration {
        message: "elasticsearch.proxy is no URL".to_owned(),
        hint: "Write scheme, host and port, such as http://proxy:3128.".to_owned(),
    })?;
    if config.proxy_username.is_empty() {
        return Ok(Some(proxy));
    }
    Ok(Some(proxy.basic_auth(&config.proxy_username, &config.proxy_password.0)))
}

fn tls(config: &config::Elasticsearch, secure: bool) -> Result<rustls::ClientConfig, SinkError> {
    let ssl = &config.ssl;
    let check = match ssl.verification_mode {
        // Nothing is read where no URL needs it.
        _ if !secure => Check::Nothing,
        VerificationMode::None => Check::Nothing,
        VerificationMode::Certificate => Check::Authority,
        VerificationMode::Full => Check::AuthorityAndName,
    };
    let files = Files {
        authorities: ("elasticsearch.ssl.certificateAuthorities", ssl.certificate_authorities.as_deref()),
        certificate: ("elasticsearch.ssl.certificate", ssl.certificate.as_deref()),
        key: ("elasticsearch.ssl.key", ssl.key.as_deref()),
    };
    tls::client(check, &files).map_err(|error| match error {
        TlsError::File { key, reason } => SinkError::Configuration {
            message: format!("{key} cannot be used: {reason}"),
            hint: "Name a PEM file that this user may read.".to_owned(),
        },
        TlsError::Other(reason) => SinkError::Configuration {
            message: format!("TLS does not start: {reason}"),
            hint: "Check the keys of elasticsearch.ssl.".to_owned(),
        },
    })
}

fn transport_error(url: &Url, error: &reqwest::Error, timeout: Duration) -> SinkError {
    let url = shown(url);
    if error.is_connect() {
        let reason =
            if error.is_timeout() { "no connection within connectTimeout".to_owned() } else { innermost(error) };
        SinkError::Unreachable { url, reason }
    } else if error.is_timeout() {
        SinkError::Timeout { url, seconds: timeout.as_secs() }
    } else {
        SinkError::Broken { url, reason: innermost(error) }
    }
}

/// The cause at the end of the chain: the outer ones only say that something failed.
fn innermost(error: &reqwest::Error) -> String {
    let mut inner: &dyn std::error::Error = match error.source() {
        Some(source) => source,
        None => return "the request could not be sent".to_owned(),
    };
    while let Some(source) = inner.source() {
        inner = source;
    }
    response::printable(&inner.to_string())
}
