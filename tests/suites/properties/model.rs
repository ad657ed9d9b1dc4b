//! A token bucket as one would explain it: no state, only the history of what was admitted.

use fusebox_core::{Moment, Time, TokenBucket};

/// What was admitted, and when.
pub struct History {
    bucket: TokenBucket,
    admitted: Vec<(Time, u64)>,
}

impl History {
    pub fn new(bucket: TokenBucket) -> Self {
        Self { bucket, admitted: Vec::new() }
    }

    /// Whether `cost` fits now: told from the definition, over the whole history.
    ///
    /// In every interval that ends now, what was admitted in it and `cost` must be at most the burst and
    /// what flowed in since the interval began.
    pub fn admits(&self, cost: u64, Moment { time: now, .. }: Moment) -> bool {
        if cost == 0 {
            return true;
        }
        let per = self.bucket.per().as_nanos();
        let mut admitted = u128::from(cost);
        // The interval of length zero, then those that begin at each admission, the latest first.
        let mut fits = admitted * per <= u128::from(self.bucket.burst()) * per;
        for (at, amount) in self.admitted.iter().rev() {
            admitted += u128::from(*amount);
            let flowed = u128::from(self.bucket.limit()) * u128::from(now.nanos_since(*at));
            fits &= admitted * per <= u128::from(self.bucket.burst()) * per + flowed;
        }
        fits
    }

    pub fn admit(&mut self, cost: u64, Moment { time: now, .. }: Moment) {
        self.admitted.push((now, cost));
    }
}
