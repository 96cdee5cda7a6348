//! Metrics, liveness and readiness over HTTP, as Prometheus and the kubelet ask for them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use datapath::keys::{DropCount, RuleCount, RulesetId};
use datapath::verdict::DropReason;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tracing::debug;

use crate::bpf::firewall_counts::Counts;
use crate::firewall::{Rule, show};

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
    /// The rules of firewalls that are in force as their objects are now, for their text in the audit log.
    pub rules: BTreeMap<RulesetId, Arc<Vec<Rule>>>,
}

impl State {
    /// That of a process which has done nothing yet, and is not ready.
    #[must_use]
    pub fn starting() -> Self {
        Self { not_ready: Some("it has just started".to_owned()), ..Self::default() }
    }
}

/// What the kernel has counted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Packets dropped.
    pub drops: Vec<(DropReason, DropCount)>,
    /// What firewalls have decided.
    pub firewalls: Vec<Counts>,
    /// What has happened to names.
    pub names: Vec<(&'static str, u64)>,
}

/// Reads what the kernel has counted.
pub type Read = dyn Fn() -> Result<Counters, String>;

/// Serves until the returned future is dropped.
pub async fn serve(listener: TcpListener, state: Rc<RefCell<State>>, read: Rc<Read>) {
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
        let (state, read) = (Rc::clone(&state), Rc::clone(&read));
        tokio::task::spawn_local(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let response = respond(request.method(), request.uri().path(), &state.borrow(), &*read);
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

fn respond(method: &Method, path: &str, state: &State, read: &Read) -> Response<Full<Bytes>> {
    let (code, kind, text) = match (method, path) {
        (&Method::GET, "/metrics") => match read() {
            Ok(counters) => (StatusCode::OK, "text/plain; version=0.0.4", text(state, &counters)),
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
fn text(state: &State, counters: &Counters) -> String {
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, series: &[(String, u64)]| {
        // Writing to a String does not fail.
        let _ = writeln!(out, "# HELP outgate_{name} {help}\n# TYPE outgate_{name} {kind}");
        for (labels, value) in series {
            let _ = writeln!(out, "outgate_{name}{labels} {value}");
        }
    };
    let reasons: Vec<_> = counters
        .drops
        .iter()
        .map(|(reason, c)| (format!("{{reason=\"{}\"}}", reason.name()), c.packets))
        .collect();
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
    firewalls(&counters.firewalls, &mut family);
    let events: Vec<_> =
        counters.names.iter().map(|(event, count)| (format!("{{event=\"{event}\"}}"), *count)).collect();
    family("names_events_total", "counter", "What has happened to addresses of firewalls' names.", &events);
    out
}

/// Firewalls' families. Namespaces' names need no escaping (RFC 1123).
fn firewalls(firewalls: &[Counts], family: &mut impl FnMut(&str, &str, &str, &[(String, u64)])) {
    let rules: Vec<_> = firewalls
        .iter()
        .map(|f| (format!("{{namespace=\"{}\"}}", f.namespace), u64::from(f.rules)))
        .collect();
    family("firewall_rules", "gauge", "Rules of each firewall in force on this node.", &rules);
    let decided = |of: fn(&RuleCount) -> u64| -> Vec<(String, u64)> {
        let each = |f: &Counts| -> Vec<_> {
            let series = |(order, count): (&u32, &RuleCount)| {
                let rule = show::place(*order)?;
                Some((format!("{{namespace=\"{}\",rule=\"{rule}\"}}", f.namespace), of(count)))
            };
            f.decided.iter().filter_map(series).collect()
        };
        firewalls.iter().flat_map(each).collect()
    };
    family(
        "firewall_rule_hits_total",
        "counter",
        "Connections that a rule has let go, or packets that it has denied.",
        &decided(|count| count.hits),
    );
    family(
        "firewall_rule_bytes_total",
        "counter",
        "Bytes of those connections, sent by pods, or of those packets.",
        &decided(|count| count.bytes),
    );
    let denied: Vec<_> = firewalls
        .iter()
        .map(|f| {
            let packets = f
                .decided
                .iter()
                .filter(|(order, _)| show::action(**order) == "Deny")
                .map(|(_, c)| c.hits)
                .sum();
            (format!("{{namespace=\"{}\"}}", f.namespace), packets)
        })
        .collect();
    family("firewall_denied_total", "counter", "Packets that a firewall's rules have denied.", &denied);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_says_why_not() {
        let read = || Ok(Counters::default());
        let code = |path: &str, s: &State| respond(&Method::GET, path, s, &read).status().as_u16();
        let mut s = State::default();
        assert_eq!((code("/readyz", &s), code("/healthz", &s), code("/x", &s)), (200, 200, 404));
        s.not_ready = Some("no".into());
        assert_eq!((code("/readyz", &s), code("/healthz", &s)), (503, 200));
    }

    #[test]
    fn the_text_format() {
        let text = text(
            &State { flows: 3, ..State::default() },
            &Counters {
                drops: vec![(DropReason::NoOwner, DropCount { packets: 12, bytes: 1 })],
                firewalls: vec![Counts {
                    namespace: "shop".into(),
                    rules: 3,
                    decided: [
                        (1, RuleCount { hits: 4, bytes: 400 }),
                        (2, RuleCount { hits: 5, bytes: 300 }),
                        (4, RuleCount { hits: 6, bytes: 200 }),
                    ]
                    .into(),
                }],
                names: vec![("learnt", 8)],
            },
        );
        assert!(
            text.contains("# TYPE outgate_drops_total counter\noutgate_drops_total{reason=\"NoOwner\"} 12\n")
        );
        for line in [
            "outgate_flows 3",
            "outgate_firewall_rules{namespace=\"shop\"} 3",
            "# TYPE outgate_firewall_rule_hits_total counter",
            "outgate_firewall_rule_hits_total{namespace=\"shop\",rule=\"spec.egress[0]\"} 4",
            "outgate_firewall_rule_bytes_total{namespace=\"shop\",rule=\"spec.egress[1]\"} 300",
            "outgate_firewall_denied_total{namespace=\"shop\"} 11",
            "outgate_names_events_total{event=\"learnt\"} 8",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn the_alerts_name_metrics_and_reasons_that_there_are() {
        let rules = include_str!("../../deploy/components/monitoring/rules.yaml");
        let text = text(&State::default(), &Counters::default());
        let expressions: Vec<_> = rules.lines().filter_map(|l| l.trim().strip_prefix("expr: ")).collect();
        let mut named = 0;
        for expression in &expressions {
            let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
            for name in expression.split(word).filter(|name| name.starts_with("outgate_")) {
                assert!(text.contains(&format!("# TYPE {name} ")), "{name}");
                named += 1;
            }
            let reasons = expression.split_once("{reason").and_then(|(_, rest)| rest.split('"').nth(1));
            for reason in reasons.into_iter().flat_map(|reasons| reasons.split('|')) {
                assert!(DropReason::ALL.iter().any(|r| r.name() == reason), "{reason}");
            }
        }
        assert!(expressions.len() >= 9 && named >= 8, "{named} in {expressions:?}");
    }
}
