//! Metrics, liveness and readiness over HTTP, as Prometheus and the kubelet ask for them.

use std::cell::RefCell;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use datapath::keys::DropCount;
use datapath::verdict::DropReason;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tracing::debug;

/// A client that has not sent its request by then is gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the agent tells about itself. The run loop writes it, the server reads it.
#[derive(Debug, Default)]
pub struct State {
    /// Why the node is not ready; `None`: it is.
    pub not_ready: Option<String>,
    /// Whether this agent leads.
    pub leading: bool,
    /// Egress IPs that this node holds.
    pub egress_ips_held: usize,
    /// This node's pods that are programmed.
    pub pods: usize,
    /// Those of them that an EgressIP selects.
    pub pods_selected: usize,
    /// Nodes with a tunnel.
    pub nodes: usize,
    /// Ports that this node may use, over all egress IPs.
    pub ports_leased: u64,
    /// Flows, as last counted.
    pub flows: usize,
    /// Flows that were removed after their time.
    pub flows_swept: u64,
    /// Map images applied.
    pub applies: u64,
    /// Map images that could not be applied.
    pub apply_failures: u64,
    /// Files and objects that are wrong at the moment.
    pub problems: usize,
    /// Times that somebody else was seen to claim an egress IP that this node holds.
    pub address_conflicts: u64,
}

/// Reads the drop counters.
pub type Drops = dyn Fn() -> Result<Vec<(DropReason, DropCount)>, String>;

/// Serves until the returned future is dropped.
pub async fn serve(listener: TcpListener, state: Rc<RefCell<State>>, drops: Rc<Drops>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, or a client that left at once.
                debug!("metrics: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (state, drops) = (Rc::clone(&state), Rc::clone(&drops));
        tokio::task::spawn_local(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let response = respond(request.method(), request.uri().path(), &state.borrow(), &*drops);
                std::future::ready(Ok::<_, Infallible>(response))
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                debug!("metrics: {error}");
            }
        });
    }
}

/// Listens; an error says where.
pub async fn listen(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|e| format!("cannot serve metrics on {address}: {e}"))
}

fn respond(method: &Method, path: &str, state: &State, drops: &Drops) -> Response<Full<Bytes>> {
    let (code, kind, text) = match (method, path) {
        (&Method::GET, "/metrics") => match drops() {
            Ok(drops) => (StatusCode::OK, "text/plain; version=0.0.4", text(state, &drops)),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", error + "\n"),
        },
        (&Method::GET, "/healthz") => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
        (&Method::GET, "/readyz") => match &state.not_ready {
            None => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
            Some(why) => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{why}\n")),
        },
        (&Method::GET, _) => {
            (StatusCode::NOT_FOUND, "text/plain", "there are /metrics, /healthz, /readyz\n".to_owned())
        }
        _ => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

/// The Prometheus text format.
fn text(state: &State, drops: &[(DropReason, DropCount)]) -> String {
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, series: &[(String, u64)]| {
        // Writing to a String does not fail.
        let _ = writeln!(out, "# HELP outgate_{name} {help}\n# TYPE outgate_{name} {kind}");
        for (labels, value) in series {
            let _ = writeln!(out, "outgate_{name}{labels} {value}");
        }
    };
    let reasons: Vec<_> =
        drops.iter().map(|(reason, c)| (format!("{{reason=\"{}\"}}", reason.name()), c.packets)).collect();
    family("drops_total", "counter", "Packets dropped.", &reasons);
    let one = |value: u64| [(String::new(), value)];
    let count = |value: usize| one(value as u64);
    family("ready", "gauge", "Whether the node is ready.", &one(u64::from(state.not_ready.is_none())));
    family("leader", "gauge", "Whether this agent leads.", &one(u64::from(state.leading)));
    family("egress_ips_held", "gauge", "Egress IPs that this node holds.", &count(state.egress_ips_held));
    family("pods", "gauge", "This node's pods that are programmed.", &count(state.pods));
    family(
        "pods_selected",
        "gauge",
        "This node's pods that an EgressIP selects.",
        &count(state.pods_selected),
    );
    family("nodes", "gauge", "Nodes with a tunnel, this one included.", &count(state.nodes));
    family(
        "ports_leased",
        "gauge",
        "Ports that this node may use, over all egress IPs.",
        &one(state.ports_leased),
    );
    family("flows", "gauge", "Flows in the table, as last counted.", &count(state.flows));
    family("flows_expired_total", "counter", "Flows removed after their time.", &one(state.flows_swept));
    family("applies_total", "counter", "Map images applied.", &one(state.applies));
    family("apply_failures_total", "counter", "Map images not applied.", &one(state.apply_failures));
    family("problems", "gauge", "Files and objects that are wrong.", &count(state.problems));
    family(
        "address_conflicts_total",
        "counter",
        "Claims of egress IPs that this node holds by others, at most one a second of each.",
        &one(state.address_conflicts),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_says_why_not() {
        let drops = || Ok(Vec::new());
        let code = |path: &str, s: &State| respond(&Method::GET, path, s, &drops).status().as_u16();
        let mut s = State::default();
        assert_eq!((code("/readyz", &s), code("/healthz", &s), code("/x", &s)), (200, 200, 404));
        s.not_ready = Some("no".into());
        assert_eq!((code("/readyz", &s), code("/healthz", &s)), (503, 200));
    }

    #[test]
    fn the_text_format() {
        let text = text(
            &State { flows: 3, ..State::default() },
            &[(DropReason::NoOwner, DropCount { packets: 12, bytes: 1 })],
        );
        assert!(
            text.contains("# TYPE outgate_drops_total counter\noutgate_drops_total{reason=\"NoOwner\"} 12\n")
        );
        assert!(text.contains("\noutgate_flows 3\n"));
    }
}
