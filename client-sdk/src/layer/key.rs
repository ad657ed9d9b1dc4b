//! What a layer reads out of a request.

use std::borrow::Cow;

/// Which key a request is for: a tenant, a route, a host.
///
/// Implemented by functions of a request. Keys are at most 256 bytes, and each has a bucket or circuit of its own: take
/// them from what you know, not from what anybody may send.
pub trait KeyOf<Request> {
    /// The key; `None` is that of the handle.
    fn key_of<'a>(&self, request: &'a Request) -> Option<Cow<'a, str>>;
}

impl<Request, F: Fn(&Request) -> Cow<'_, str>> KeyOf<Request> for F {
    fn key_of<'a>(&self, request: &'a Request) -> Option<Cow<'a, str>> {
        Some(self(request))
    }
}

/// All requests are for the key of the handle.
#[derive(Clone, Copy, Debug, Default)]
pub struct OneKey;

impl<Request> KeyOf<Request> for OneKey {
    fn key_of<'a>(&self, _: &'a Request) -> Option<Cow<'a, str>> {
        None
    }
}

/// How many tokens a request costs. Implemented by functions of a request.
pub trait CostOf<Request> {
    /// Tokens.
    fn cost_of(&self, request: &Request) -> u64;
}

impl<Request, F: Fn(&Request) -> u64> CostOf<Request> for F {
    fn cost_of(&self, request: &Request) -> u64 {
        self(request)
    }
}

/// Each request costs one token.
#[derive(Clone, Copy, Debug, Default)]
pub struct OneToken;

impl<Request> CostOf<Request> for OneToken {
    fn cost_of(&self, _: &Request) -> u64 {
        1
    }
}
