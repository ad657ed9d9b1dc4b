//! Texts and numbers in, 128 bits out: how a cell is named, and how a repeated request is told from another.

use std::{fmt, hash::Hasher};

use siphasher::sip128::{Hash128, Hasher128, SipHasher24};

/// Stands for all that was put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest(pub [u64; 2]);

/// What has been put in so far.
#[derive(Clone, Copy)]
pub struct Content(SipHasher24);

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Content")
    }
}

impl Content {
    /// Nothing yet. Who does not know the secret cannot make two contents of one digest.
    pub fn new(secret: &[u8; 16]) -> Self {
        Self(SipHasher24::new_with_key(secret))
    }

    /// And this text; its length comes first, so `a_b` and `c` is not `a` and `b_c`.
    #[must_use]
    pub fn text(self, text: &str) -> Self {
        let Self(mut hasher) = self.number(text.len() as u64);
        hasher.write(text.as_bytes());
        Self(hasher)
    }

    /// And this number.
    #[must_use]
    pub fn number(self, number: u64) -> Self {
        let Self(mut hasher) = self;
        hasher.write(&number.to_le_bytes());
        Self(hasher)
    }

    /// All of it.
    pub fn digest(&self) -> Digest {
        let Hash128 { h1, h2 } = self.0.finish128();
        Digest([h1, h2])
    }
}
