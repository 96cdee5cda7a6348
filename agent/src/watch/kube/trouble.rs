//! What goes wrong between here and the API server, in words that say what to do.

use kube::core::Status;

use super::client::{Connection, chain};
use super::kinds::Kind;
use crate::watch::Problem;

/// How the name of what is wrong begins, where that is the server itself.
pub(super) const SERVER: &str = "API server";

/// Why a request has failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Trouble {
    /// No answer from the server, or none that makes sense.
    Unreachable(String),
    /// The server does not know who this is.
    Unauthorized,
    /// A right is missing: the verb, and the server's words.
    Forbidden(&'static str, String),
    /// There is no such kind of object, or object.
    Missing,
    /// The object has changed since it was read, or is another.
    Conflict,
    /// The version asked for is too old.
    Expired,
    /// Anything else that the server says.
    Refused(String),
}

impl Trouble {
    /// The trouble behind an error of a request with a verb.
    pub(super) fn of(error: &kube::Error, verb: &'static str) -> Self {
        if let kube::Error::Api(status) = error {
            Self::said(status, verb)
        } else {
            Self::Unreachable(chain(error))
        }
    }

    fn said(status: &Status, verb: &'static str) -> Self {
        match status.code {
            401 => Self::Unauthorized,
            // The server goes on with every role that it has not found, which is many while it starts.
            403 => {
                Self::Forbidden(verb, status.message.split(": RBAC: [").next().unwrap_or_default().to_owned())
            }
            404 => Self::Missing,
            409 => Self::Conflict,
            410 => Self::Expired,
            // Proxies in front of a server that is away, and servers that start or end.
            500.. if status.reason != "InternalError" => Self::Unreachable(words(status)),
            _ => Self::Refused(words(status)),
        }
    }

    /// Whether there is no server to ask.
    pub(super) fn is_away(&self) -> bool {
        matches!(self, Self::Unreachable(_))
    }

    /// Whether a list must come before the next watch.
    pub(super) fn is_expired(&self) -> bool {
        *self == Self::Expired
    }

    /// What to tell people about a kind of object that cannot be had since a time.
    pub(super) fn problem(&self, kind: Kind, since: &str, connection: &Connection) -> Problem {
        let plural = kind.plural();
        let server = &connection.server;
        match self {
            Self::Unreachable(cause) => Problem::new(
                format_args!("{SERVER} {server}"),
                format_args!("cannot be reached since {since}: {cause}; what was known stays in force"),
            ),
            Self::Unauthorized => Problem::new(
                format_args!("{SERVER} {server}"),
                format_args!(
                    "does not accept the credentials of {} since {since}; are they of this cluster and still valid? What was known stays in force",
                    connection.user
                ),
            ),
            Self::Forbidden(verb, said) => Problem::new(
                &plural,
                format_args!(
                    "may not {verb} {plural}: give {} the verbs get, list and watch on {plural} in a ClusterRole or Role ({said})",
                    connection.user
                ),
            ),
            Self::Missing => Problem::new(
                &plural,
                format_args!(
                    "the API server has no {plural}: apply Outgate's CustomResourceDefinitions (deploy/crds)"
                ),
            ),
            Self::Conflict | Self::Expired => Problem::new(
                &plural,
                format_args!("the API server keeps no versions of {plural} for long enough"),
            ),
            Self::Refused(said) => {
                Problem::new(&plural, format_args!("the API server {server} refuses since {since}: {said}"))
            }
        }
    }
}

fn words(status: &Status) -> String {
    match (status.message.as_str(), status.code) {
        ("", code) => format!("HTTP status {code}"),
        (message, _) => message.to_owned(),
    }
}

/// What there is to tell of a write that is tried again: not that somebody else wrote the object first, unless that
/// happens twice in a row.
pub(super) fn lasting<'t>(now: Option<&'t Trouble>, before: Option<&Trouble>) -> Option<&'t Trouble> {
    now.filter(|trouble| **trouble != Trouble::Conflict || before == now)
}

/// A request that did not work, in words: what was to be done to what.
pub(super) fn request(
    trouble: &Trouble,
    what: &str,
    verb: &str,
    kind: Kind,
    connection: &Connection,
) -> String {
    let plural = kind.plural();
    let (server, user) = (&connection.server, &connection.user);
    match trouble {
        Trouble::Unreachable(cause) => format!("cannot {verb} {what} at {server}: {cause}"),
        Trouble::Unauthorized => {
            format!("cannot {verb} {what}: {server} does not accept the credentials of {user}")
        }
        Trouble::Forbidden(_, said) => {
            format!("may not {verb} {plural}: give {user} the verb {verb} on them ({said})")
        }
        Trouble::Missing => format!("cannot {verb} {what}: it is gone, or the server has no {plural}"),
        Trouble::Conflict => format!("{what} has changed meanwhile"),
        Trouble::Expired => format!("cannot {verb} {what}: its version has expired"),
        Trouble::Refused(said) => format!("cannot {verb} {what}: {said}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(code: u16, reason: &str, message: &str) -> kube::Error {
        let status = Status { code, reason: reason.into(), message: message.into(), ..Status::default() };
        kube::Error::Api(status.boxed())
    }

    #[test]
    fn a_conflict_is_told_of_when_it_lasts_and_all_else_at_once() {
        let (conflict, other) = (Some(&Trouble::Conflict), Some(&Trouble::Unauthorized));
        assert_eq!(lasting(conflict, None), None);
        assert_eq!(lasting(conflict, other), None);
        assert_eq!(lasting(conflict, conflict), conflict);
        assert_eq!(lasting(other, None), other);
        assert_eq!(lasting(None, conflict), None);
    }

    #[test]
    fn each_answer_is_the_trouble_that_it_is() {
        for (code, reason, trouble) in [
            (401, "Unauthorized", Trouble::Unauthorized),
            (403, "Forbidden", Trouble::Forbidden("list", "m".into())),
            (409, "AlreadyExists", Trouble::Conflict),
            (404, "NotFound", Trouble::Missing),
            (409, "Conflict", Trouble::Conflict),
            (410, "Expired", Trouble::Expired),
            (422, "Invalid", Trouble::Refused("m".into())),
            (429, "TooManyRequests", Trouble::Refused("m".into())),
            (500, "InternalError", Trouble::Refused("m".into())),
            (503, "ServiceUnavailable", Trouble::Unreachable("m".into())),
        ] {
            assert_eq!(Trouble::of(&api(code, reason, "m"), "list"), trouble, "{code}");
        }
        let long = api(403, "Forbidden", "no: RBAC: [clusterrole.rbac.authorization.k8s.io \"x\" not found]");
        assert_eq!(Trouble::of(&long, "list"), Trouble::Forbidden("list", "no".into()));
        assert_eq!(Trouble::of(&api(502, "", ""), "list"), Trouble::Unreachable("HTTP status 502".into()));
    }
}
