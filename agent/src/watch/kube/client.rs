//! The connection to the API server.

use std::env;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};

use super::Error;

/// An idle connection, as a watch's usually is, is asked after this whether its other end is still there, and given up
/// after three answers have not come: a partition shows within a minute, though the watch would go on for five.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(20), Duration::from_secs(10), 3);
/// What was sent and is not acknowledged for so long has a dead connection (`TCP_USER_TIMEOUT`, tcp(7)).
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);
/// An answer that has not begun by then does not come.
const ANSWER: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(10);

/// A connection, and what to call its ends.
#[derive(Clone)]
pub(super) struct Connection {
    /// The client.
    pub(super) client: Client,
    /// The server's URL.
    pub(super) server: String,
    /// As whom.
    pub(super) user: String,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as {}", self.server, self.user)
    }
}

/// Prepares a connection; whether the server is there shows later. The configuration is that of the given file, of
/// `KUBECONFIG`, of the pod's ServiceAccount, or of the user's own file.
pub(super) async fn connect(kubeconfig: Option<&Path>) -> Result<Connection, Error> {
    let (config, user) = configuration(kubeconfig).await?;
    let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
    let client = client(config).map_err(|error| Error::Configuration { error: chain(&error) })?;
    Ok(Connection { client, server, user })
}

async fn configuration(kubeconfig: Option<&Path>) -> Result<(Config, String), Error> {
    let options = KubeConfigOptions::default();
    let of = |error: &(dyn std::error::Error + 'static)| Error::Configuration { error: chain(error) };
    let named = kubeconfig.is_some() || env::var_os("KUBECONFIG").is_some_and(|v| !v.is_empty());
    if !named && env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        let config = Config::incluster_env().map_err(|error| of(&error))?;
        return Ok((config, "its pod's ServiceAccount".to_owned()));
    }
    let file = match kubeconfig {
        Some(path) => Kubeconfig::read_from(path),
        None => Kubeconfig::read(),
    }
    .map_err(|error| of(&error))?;
    let user = file
        .current_context
        .as_ref()
        .and_then(|current| file.contexts.iter().find(|c| c.name == *current))
        .and_then(|c| c.context.as_ref())
        .and_then(|c| c.user.clone())
        .unwrap_or_else(|| "nobody in particular".to_owned());
    let config = Config::from_custom_kubeconfig(file, &options).await.map_err(|error| of(&error))?;
    Ok((config, format!("user {user}")))
}

/// The client's layers by hand: kube's own have no keepalive, and log every failure, which is here done once.
fn client(config: Config) -> Result<Client, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(CONNECT));
    tcp.set_keepalive(Some(KEEPALIVE.0));
    tcp.set_keepalive_interval(Some(KEEPALIVE.1));
    tcp.set_keepalive_retries(Some(KEEPALIVE.2));
    tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let tls = config.rustls_https_connector_with_connector(tcp)?;
    let http: HttpClient<_, Body> = HttpClient::builder(TokioExecutor::new()).build(tls);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .service(tower::service_fn(move |request| {
            let answer = http.request(request);
            async move {
                match tokio::time::timeout(ANSWER, answer).await {
                    Ok(answer) => answer.map_err(BoxError::from),
                    Err(_) => Err(BoxError::from(format!("no answer within {} s", ANSWER.as_secs()))),
                }
            }
        }));
    Ok(Client::new(service, config.default_namespace))
}

/// An error with its causes, on one line.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Some errors quote their cause.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
