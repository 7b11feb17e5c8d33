use std::time::{Duration, Instant};

use serde_json::json;

use super::{Reply, Server, config};
use crate::config::Secret;
use crate::problem::{Problem, ProblemKind};
use crate::sink::{Client, ServerInfo, SinkError};

async fn info(reply: impl Fn() -> Reply + Send + Sync + 'static) -> Result<ServerInfo, SinkError> {
    let server = Server::start(move |_, _| reply()).await;
    Client::new(&config(&server.url)).unwrap().info().await
}

async fn told(reply: impl Fn() -> Reply + Send + Sync + 'static) -> Result<(String, Option<String>), SinkError> {
    info(reply).await.map(|info| (info.distribution, info.version))
}

fn product(status: u16, body: &serde_json::Value) -> Reply {
    let headers = vec![("X-Elastic-Product", "Elasticsearch".to_owned())];
    Reply::Answer { status, headers, body: body.to_string().into_bytes() }
}

#[tokio::test]
async fn servers_are_told_apart() {
    let named = |distribution: &str, version: Option<&str>| Ok((distribution.to_owned(), version.map(str::to_owned)));
    let elastic = json!({"version": {"number": "8.19.1"}, "tagline": "You Know, for Search"});
    assert_eq!(told(move || product(200, &elastic)).await, named("elasticsearch", Some("8.19.1")));
    let old = json!({"version": {"number": "7.10.2"}, "tagline": "You Know, for Search"});
    assert_eq!(told(move || Reply::json(200, &old)).await, named("elasticsearch", Some("7.10.2")));
    let open = json!({"version": {"number": "3.6.0", "distribution": "opensearch"}});
    assert_eq!(told(move || Reply::json(200, &open)).await, named("opensearch", Some("3.6.0")));
    assert_eq!(told(|| product(405, &json!({"error": "no"}))).await, named("elasticsearch", None));
    for (status, body) in
        [(200, json!({"hello": 1})), (200, json!([])), (405, json!({})), (404, json!({})), (302, json!({}))]
    {
        let told = info(move || Reply::json(status, &body)).await;
        assert!(matches!(told, Err(SinkError::NotElasticsearch { .. })), "{status}: {told:?}");
    }
}

#[tokio::test]
async fn a_cluster_is_known_by_its_uuid_or_by_the_urls() {
    let version = json!({"number": "9.0.0", "distribution": "opensearch"});
    let named = json!({"version": version, "cluster_uuid": "Kq1"});
    assert_eq!(info(move || Reply::json(200, &named)).await.unwrap().cluster, "Kq1");
    for hidden in [json!({"version": version}), json!({"version": version, "cluster_uuid": "_na_"})] {
        let server = Server::start(move |_, _| Reply::json(200, &hidden)).await;
        let secret = server.url.replace("http://", "http://me:hush@");
        let config = crate::config::Elasticsearch { urls: vec![secret, "http://a:1".to_owned()], ..config("") };
        assert_eq!(Client::new(&config).unwrap().info().await.unwrap().cluster, format!("{} http://a:1", server.url));
    }
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let error =
        info(|| Reply::error(401, "security_exception", "unable to authenticate user [elastic]")).await.unwrap_err();
    assert!(matches!(error, SinkError::Unauthorized { .. }));
    let problem = Problem::from(error);
    assert_eq!((problem.kind, problem.transient), (ProblemKind::Elasticsearch, false));
    assert!(problem.hint.contains("elasticsearch.password"), "{}", problem.hint);

    let error = info(|| Reply::error(403, "security_exception", "action is unauthorized")).await.unwrap_err();
    assert!(matches!(error, SinkError::Forbidden { .. }));
    let documented = include_str!("../../../docs/operations.md");
    for privilege in
        ["monitor", "create_index", "index", "delete", "read", "view_index_metadata", "maintenance", "manage"]
    {
        let privilege = format!("`{privilege}`");
        assert!(error.hint().contains(&privilege) && documented.contains(&privilege), "{privilege}: {}", error.hint());
    }

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://me:hush@{}", listener.local_addr().unwrap());
    drop(listener);
    let error = Client::new(&config(&url)).unwrap().info().await.unwrap_err();
    let problem = Problem::from(error);
    assert!(problem.message.contains("refused") && problem.hint.contains("running"), "{problem:?}");
    assert!(problem.transient);
    assert!(!format!("{problem:?}").contains("hush"), "{problem:?}");

    // Speaks no TLS.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let https = format!("https://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move { while listener.accept().await.is_ok() {} });
    let error = Client::new(&config(&https)).unwrap().info().await.unwrap_err();
    assert!(matches!(error, SinkError::Unreachable { .. }), "{error:?}");
    task.abort();

    for urls in [vec![], vec!["localhost:9200".to_owned()], vec!["ftp://x".to_owned()], vec!["http://".to_owned()]] {
        let config = crate::config::Elasticsearch { urls, ..config("") };
        assert_eq!(
            Client::new(&config).map(|_| ()).map_err(|error| Problem::from(error).kind),
            Err(ProblemKind::Config)
        );
    }
}

#[tokio::test]
async fn user_and_password_are_sent_and_the_url_is_shown_without_them() {
    let answer = |_: usize, _: &super::Request| Reply::json(200, &json!({"count": 7}));
    let server = Server::start(answer).await;
    let mut config = config(&server.url.replace("http://", "http://me:a%40b+c@"));
    let client = Client::new(&config).unwrap();
    assert_eq!(client.count("odd/../name").await, Ok(Some(7)));
    assert_eq!(client.url(), server.url);
    assert!(!format!("{client:?}").contains("a@b"));
    config.username = "you".to_owned();
    config.password = Secret("x".to_owned());
    assert_eq!(Client::new(&config).unwrap().count("i").await, Ok(Some(7)));
    let requests = server.requests();
    // `me:a@b+c` and `you:x`.
    assert_eq!(requests[0].headers["authorization"], "Basic bWU6YUBiK2M=");
    assert_eq!(requests[0].path, "/odd%2F..%2Fname/_count");
    assert_eq!(requests[1].headers["authorization"], "Basic eW91Ong=");
}

#[tokio::test]
async fn the_path_of_a_url_is_kept() {
    let server = Server::start(|_, _| Reply::json(200, &json!({"count": 7}))).await;
    for (path, root, below) in [("", "/", "/i/_count"), ("/", "/", "/i/_count"), ("/es/", "/es/", "/es/i/_count")] {
        let client = Client::new(&config(&format!("{}{path}", server.url))).unwrap();
        let _ = client.info().await;
        client.count("i").await.unwrap();
        let paths: Vec<_> = server.requests().into_iter().map(|request| request.path).collect();
        assert!(paths.ends_with(&[root.to_owned(), below.to_owned()]), "{path}: {paths:?}");
    }
}

#[tokio::test]
async fn a_url_that_takes_no_connection_is_passed_over() {
    let answer = |_: usize, _: &super::Request| Reply::json(200, &json!({"count": 1}));
    let (first, second) = (Server::start(answer).await, Server::start(answer).await);
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let urls = vec![format!("{}/", first.url), gone, second.url.clone()];
    let client = Client::new(&crate::config::Elasticsearch { urls, ..config("") }).unwrap();
    let began = Instant::now();
    for _ in 0..12 {
        assert_eq!(client.count("i").await, Ok(Some(1)));
    }
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(first.requests().len() >= 4 && second.requests().len() >= 4, "not in turn");
}

#[tokio::test]
async fn indices_are_made_once_and_counted() {
    let server = Server::start(|_, request| match (request.method.as_str(), request.path.as_str()) {
        ("PUT", "/there") => Reply::error(400, "resource_already_exists_exception", "index [there] already exists"),
        ("PUT", "/Bad") => Reply::error(400, "invalid_index_name_exception", "must be lowercase"),
        ("PUT", "/new") | ("POST", "/new/_refresh") | ("HEAD", "/new") => Reply::json(200, &json!({})),
        _ => Reply::error(404, "index_not_found_exception", "no such index"),
    })
    .await;
    let client = Client::new(&config(&server.url)).unwrap();
    assert_eq!(client.create_index("new", &json!({"settings": {}})).await, Ok(()));
    assert_eq!(client.create_index("there", &json!({})).await, Ok(()));
    assert!(client.create_index("Bad", &json!({})).await.is_err());
    assert_eq!((client.index_exists("new").await, client.index_exists("none").await), (Ok(true), Ok(false)));
    assert_eq!((client.refresh("new").await, client.refresh("none").await), (Ok(true), Ok(false)));
    assert_eq!(client.count("none").await, Ok(None));
}
