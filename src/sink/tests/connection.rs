use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::{Reply, Request, Server, config};
use crate::config::{Elasticsearch, Secret, Ssl, VerificationMode};
use crate::problem::{Problem, ProblemKind};
use crate::sink::{Client, SinkError};

fn pem(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/sink/tests/tls").join(name)
}

fn counted(_: usize, _: &Request) -> Reply {
    Reply::json(200, &json!({"count": 7}))
}

/// TLS before a server, by a certificate for 127.0.0.1. `asks`: for the client's certificate. Gives its port.
async fn tls_before(server: &Server, asks: bool) -> u16 {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let builder = if asks {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(pem("authority.pem")).unwrap()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let certificate = CertificateDer::from_pem_file(pem("server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(pem("server.key.pem")).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(builder.with_single_cert(vec![certificate], key).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, behind) = (listener.local_addr().unwrap().port(), server.url.replace("http://", ""));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, behind) = (acceptor.clone(), behind.clone());
            tokio::spawn(async move {
                let mut stream = acceptor.accept(stream).await.ok()?;
                let mut behind = TcpStream::connect(behind).await.ok()?;
                tokio::io::copy_bidirectional(&mut stream, &mut behind).await.ok()
            });
        }
    });
    port
}

async fn count(url: &str, ssl: Ssl) -> Result<Option<u64>, SinkError> {
    Client::new(&Elasticsearch { ssl, ..config(url) })?.count("i").await
}

fn trusting() -> Ssl {
    Ssl { certificate_authorities: Some(pem("authority.pem")), ..Ssl::default() }
}

#[tokio::test]
async fn a_certificate_is_checked_as_far_as_asked() {
    let server = Server::start(counted).await;
    let port = tls_before(&server, false).await;
    let (named, other) = (format!("https://127.0.0.1:{port}"), format!("https://localhost:{port}"));
    // Nobody but the test's own authority has signed it. The machine may have none at all.
    let unknown = count(&named, Ssl::default()).await.unwrap_err();
    assert!(
        unknown.hint().contains("ssl.certificateAuthorities")
            || unknown.to_string().contains("no certificate authorities"),
        "{unknown}"
    );
    assert_eq!(count(&named, trusting()).await, Ok(Some(7)));
    let wrong_name = count(&other, trusting()).await.unwrap_err();
    assert!(wrong_name.hint().contains("verificationMode: certificate"), "{wrong_name}: {}", wrong_name.hint());
    let by_authority = Ssl { verification_mode: VerificationMode::Certificate, ..trusting() };
    assert_eq!(count(&other, by_authority.clone()).await, Ok(Some(7)));
    // Not the one that has signed it.
    let stranger = Ssl { certificate_authorities: Some(pem("client.pem")), ..by_authority };
    assert!(count(&other, stranger).await.is_err());
    let unchecked = Ssl { verification_mode: VerificationMode::None, ..Ssl::default() };
    assert_eq!(count(&other, unchecked).await, Ok(Some(7)));
    assert_eq!(server.requests().len(), 3, "a request went to a server that was not trusted");
}

#[tokio::test]
async fn the_client_shows_its_certificate() {
    let server = Server::start(counted).await;
    let url = format!("https://127.0.0.1:{}", tls_before(&server, true).await);
    assert!(count(&url, trusting()).await.is_err());
    let known = Ssl { certificate: Some(pem("client.pem")), key: Some(pem("client.key.pem")), ..trusting() };
    assert_eq!(count(&url, known.clone()).await, Ok(Some(7)));
    for (ssl, key) in [
        (Ssl { certificate_authorities: Some("/nonexistent".into()), ..trusting() }, "ssl.certificateAuthorities"),
        (Ssl { certificate_authorities: Some(pem("client.key.pem")), ..trusting() }, "ssl.certificateAuthorities"),
        (Ssl { certificate: Some("/nonexistent".into()), ..known.clone() }, "ssl.certificate "),
        (Ssl { key: Some(pem("client.pem")), ..known.clone() }, "ssl.key"),
        (Ssl { key: None, ..known }, "ssl.certificate "),
    ] {
        let problem = Problem::from(count(&url, ssl).await.unwrap_err());
        assert!(problem.kind == ProblemKind::Config && problem.message.contains(key), "{key}: {problem:?}");
    }
}

#[tokio::test]
async fn keys_and_tokens_are_sent_and_shown_nowhere() {
    let server = Server::start(counted).await;
    let secret = |text: &str| Secret(text.to_owned());
    let plain = config(&server.url);
    for config in [
        Elasticsearch { api_key: secret("hush-id:hush-key"), ..plain.clone() },
        Elasticsearch { api_key: secret("aHVzaC1pZDpodXNoLWtleQ=="), ..plain.clone() },
        Elasticsearch { bearer_token: secret("hush-token"), ..plain.clone() },
    ] {
        let client = Client::new(&config).unwrap();
        assert_eq!(client.count("i").await, Ok(Some(7)));
        let shown = format!("{config:?} {client:?}");
        assert!(!shown.contains("hush") && !shown.contains("aHVz"), "{shown}");
    }
    let sent: Vec<_> = server.requests().iter().map(|request| request.headers["authorization"].clone()).collect();
    assert_eq!(sent, ["ApiKey aHVzaC1pZDpodXNoLWtleQ==", "ApiKey aHVzaC1pZDpodXNoLWtleQ==", "Bearer hush-token"]);
    for config in [
        Elasticsearch { api_key: secret("hush\n\u{1}"), ..plain.clone() },
        Elasticsearch { bearer_token: secret("hush\nsecond line"), ..plain },
    ] {
        let problem = Problem::from(Client::new(&config).unwrap_err());
        assert!(problem.kind == ProblemKind::Config && !format!("{problem:?}").contains("hush"), "{problem:?}");
    }
}

#[tokio::test]
async fn requests_go_through_the_proxy() {
    let proxy = Server::start(counted).await;
    let config = Elasticsearch {
        proxy: Some(proxy.url.clone()),
        proxy_username: "me".to_owned(),
        proxy_password: Secret("hush".to_owned()),
        ..config("http://elasticsearch.invalid:9200")
    };
    let client = Client::new(&config).unwrap();
    assert_eq!(client.count("i").await, Ok(Some(7)));
    let request = &proxy.requests()[0];
    assert_eq!(request.path, "http://elasticsearch.invalid:9200/i/_count");
    // `me:hush`
    assert_eq!(request.headers["proxy-authorization"], "Basic bWU6aHVzaA==");
    let shown = format!("{config:?} {client:?}");
    assert!(!shown.contains("hush") && !shown.contains("bWU6aHVzaA"), "{shown}");
}

#[tokio::test]
async fn an_answer_is_waited_for_as_long_as_asked_and_its_url_comes_last_then() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let silent = Server::start(move |_, request| Reply::Held(Arc::clone(&held), Box::new(counted(0, request)))).await;
    let good = Server::start(counted).await;
    let timeout = Duration::from_millis(300);
    let config =
        Elasticsearch { urls: vec![silent.url.clone(), good.url.clone()], request_timeout: timeout, ..config("") };
    let client = Client::new(&config).unwrap();
    let began = Instant::now();
    assert!(matches!(client.count("i").await, Err(SinkError::Timeout { .. })));
    assert!(began.elapsed() >= timeout && began.elapsed() < Duration::from_secs(20));
    for _ in 0..4 {
        assert_eq!(client.count("i").await, Ok(Some(7)));
    }
    assert_eq!((silent.requests().len(), good.requests().len()), (1, 4));
}

#[tokio::test]
async fn a_url_has_no_more_requests_at_once_than_allowed() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let server = Server::start(move |_, request| Reply::Held(Arc::clone(&held), Box::new(counted(0, request)))).await;
    let config = Elasticsearch { max_conns_per_host: 2, ..config(&server.url) };
    let client = Arc::new(Client::new(&config).unwrap());
    let tasks: Vec<_> = (0..5)
        .map(|_| {
            let client = Arc::clone(&client);
            tokio::spawn(async move { client.count("i").await })
        })
        .collect();
    super::eventually("two have arrived", || server.requests().len() == 2).await;
    gate.add_permits(1);
    super::eventually("a third has", || server.requests().len() == 3).await;
    gate.add_permits(4);
    for task in tasks {
        assert_eq!(task.await.unwrap(), Ok(Some(7)));
    }
}
