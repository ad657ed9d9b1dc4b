//! How urgent an Acquire is.

/// How urgent an Acquire is; the more urgent is the lesser.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Before all others.
    Critical,
    /// What a caller that says nothing has.
    #[default]
    Normal,
    /// After all others.
    Bulk,
}

impl Priority {
    /// How many there are.
    pub const COUNT: usize = 3;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_urgent_comes_first() {
        let mut all = [Priority::Bulk, Priority::default(), Priority::Critical];
        all.sort();
        assert_eq!(all, [Priority::Critical, Priority::Normal, Priority::Bulk]);
        assert_eq!(all.len(), Priority::COUNT);
    }
}
