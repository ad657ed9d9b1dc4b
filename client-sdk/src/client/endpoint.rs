//! Where servers are, as users write it.

use http::{Uri, uri::Scheme};

/// One endpoint or several: `"http://127.0.0.1:3873"`, or a vector, array or slice of such.
pub trait Endpoints {
    /// Each of them.
    fn into_endpoints(self) -> Vec<String>;
}

impl Endpoints for &str {
    fn into_endpoints(self) -> Vec<String> {
        vec![self.to_owned()]
    }
}

impl Endpoints for &String {
    fn into_endpoints(self) -> Vec<String> {
        vec![self.clone()]
    }
}

impl Endpoints for String {
    fn into_endpoints(self) -> Vec<String> {
        vec![self]
    }
}

impl<S: Into<String>> Endpoints for Vec<S> {
    fn into_endpoints(self) -> Vec<String> {
        self.into_iter().map(Into::into).collect()
    }
}

impl<S: Into<String>, const N: usize> Endpoints for [S; N] {
    fn into_endpoints(self) -> Vec<String> {
        self.into_iter().map(Into::into).collect()
    }
}

impl<S: Clone + Into<String>> Endpoints for &[S] {
    fn into_endpoints(self) -> Vec<String> {
        self.iter().cloned().map(Into::into).collect()
    }
}

/// The address of a server: where, and whether in plain text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) uri: Uri,
    pub(super) is_plain: bool,
    pub(super) is_loopback: bool,
}

impl Address {
    /// Parses an endpoint. Tells what is wrong with one that is none.
    pub(super) fn parse(endpoint: &str) -> Result<Self, &'static str> {
        let uri: Uri = endpoint.parse().map_err(|_| "is no URL")?;
        let scheme = uri.scheme().ok_or("has no `http://` or `https://`")?;
        let is_plain = *scheme == Scheme::HTTP;
        if !is_plain && *scheme != Scheme::HTTPS {
            return Err("begins with neither `http://` nor `https://`");
        }
        let host = uri.host().filter(|host| !host.is_empty()).ok_or("has no host")?;
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err("has a user in it; say who calls by `token`");
        }
        if uri.path_and_query().is_some_and(|path| path != "/") {
            return Err("has a path; only host and port are used");
        }
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let is_loopback = host == "localhost"
            || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        Ok(Self { is_plain, is_loopback, uri })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_knows_who_may_listen_in() {
        let parsed = |endpoint| Address::parse(endpoint).map(|one| (one.is_plain, one.is_loopback));
        assert_eq!(parsed("http://127.0.0.1:3873"), Ok((true, true)));
        assert_eq!(parsed("http://[::1]:3873/"), Ok((true, true)));
        assert_eq!(parsed("http://localhost:3873"), Ok((true, true)));
        assert_eq!(parsed("http://fusebox.internal:3873"), Ok((true, false)));
        assert_eq!(parsed("https://10.0.0.1"), Ok((false, false)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (endpoint, wrong) in [
            ("", "is no URL"),
            ("127.0.0.1:3873", "has no `http://` or `https://`"),
            ("tcp://127.0.0.1:3873", "begins with neither `http://` nor `https://`"),
            ("http://me@127.0.0.1:3873", "has a user in it; say who calls by `token`"),
            ("http://127.0.0.1:3873/v1", "has a path; only host and port are used"),
        ] {
            assert_eq!(Address::parse(endpoint), Err(wrong), "{endpoint}");
        }
    }
}
