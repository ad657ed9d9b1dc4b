//! Lists in pages: where one begins, and what asks for the next.

use prost::Message;

use crate::{
    digest::{Content, Digest},
    grpc::status::Refusal,
    limits,
};

/// One page of a list.
pub(super) struct Page {
    /// Entries of it, at most.
    pub(super) count: usize,
    /// The last entry of the page before; `None` of the first page.
    pub(super) after: Option<String>,
    /// Of what it is a list.
    scope: u64,
}

impl Page {
    /// The page that a request asks for, of a list of what `scope` says.
    pub(super) fn of(refusal: &mut Refusal, size: u32, token: &str, scope: &[&str]) -> Self {
        let count = usize::try_from(size).unwrap_or(usize::MAX);
        if count > limits::PAGE_MOST {
            let most = limits::PAGE_MOST;
            refusal.violation("page_size", format!("{count} entries; at most {most}"));
        }
        let count = if count == 0 { limits::PAGE } else { count.min(limits::PAGE_MOST) };
        // No secret: who makes a token up only chooses where its own page begins.
        let content = scope.iter().fold(Content::new(&[0; 16]), |content, part| content.text(part));
        let Digest([scope, _]) = content.digest();
        let after = token.strip_prefix(&format!("{scope:016x}")).map(str::to_owned);
        if !token.is_empty() && (after.is_none() || token.len() > limits::PAGE_TOKEN_BYTES) {
            let message =
                "not the `next_page_token` of a page of this list: leave it empty for the first";
            refusal.violation("page_token", message);
        }
        Self { count, after, scope }
    }

    /// One more than the page has, to know whether there is another.
    pub(super) fn more(&self) -> usize {
        self.count + 1
    }

    /// The messages of the page, and what asks for the next: empty if there is none. A page ends early where
    /// its messages are long: an answer is no larger than a request may be, but for its first entry.
    pub(super) fn fill<T, M: Message>(
        &self,
        entries: impl IntoIterator<Item = T>,
        name: impl Fn(&T) -> String,
        message: impl Fn(T) -> M,
    ) -> (Vec<M>, String) {
        let (mut messages, mut bytes, mut last) = (Vec::new(), 0, String::new());
        for entry in entries {
            let token = name(&entry);
            let message = message(entry);
            bytes += message.encoded_len();
            let is_long = !messages.is_empty() && bytes > limits::MESSAGE_BYTES;
            if messages.len() == self.count || is_long {
                return (messages, self.token(&last));
            }
            messages.push(message);
            last = token;
        }
        (messages, String::new())
    }

    /// What asks for the page after that entry.
    pub(super) fn token(&self, last: &str) -> String {
        format!("{:016x}{last}", self.scope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(size: u32, token: &str, scope: &[&str]) -> Result<Page, Refusal> {
        let mut refusal = Refusal::default();
        let page = Page::of(&mut refusal, size, token, scope);
        refusal.or_else(|| page)
    }

    #[test]
    fn the_next_page_goes_on_after_the_last_entry_of_the_same_list() {
        let first = page(2, "", &["list", "a"]).unwrap();
        assert_eq!(first.after, None);
        let fill = |page: &Page, entries: &[&str]| {
            page.fill(entries.iter(), ToString::to_string, ToString::to_string)
        };
        let (entries, token) = fill(&first, &["", "é", "z"]);
        assert_eq!(entries, ["", "é"]);
        let second = page(2, &token, &["list", "a"]).unwrap();
        assert_eq!(second.after.as_deref(), Some("é"));
        let (entries, token) = fill(&second, &["z"]);
        assert_eq!((entries, token.as_str()), (vec!["z".to_owned()], ""));
        // Also where the entry is the empty one.
        assert_eq!(page(2, &first.token(""), &["list", "a"]).unwrap().after.as_deref(), Some(""));
    }

    #[test]
    fn a_page_of_long_entries_ends_early() {
        let page = page(10, "", &[]).unwrap();
        let long = "x".repeat(limits::MESSAGE_BYTES / 2 - 10);
        let entries = [(1, &long), (2, &long), (3, &long)];
        let fill = |entries: &[(u32, &String)]| {
            let entries = entries.iter().copied();
            let (page, token) =
                page.fill(entries, |(number, _)| number.to_string(), |(_, text)| text.clone());
            (page.len(), token)
        };
        assert_eq!(fill(&entries), (2, page.token("2")));
        let longest = "x".repeat(2 * limits::MESSAGE_BYTES);
        assert_eq!(fill(&[(1, &longest), (2, &longest)]), (1, page.token("1")));
    }

    #[test]
    fn what_is_not_of_this_list_is_refused() {
        let token = page(2, "", &["list", "a"]).unwrap().token("x");
        for scope in [&["list", "b"][..], &["lista"], &["list"], &["lis", "ta"]] {
            assert!(page(2, &token, scope).is_err(), "{scope:?}");
        }
        let long = page(2, "", &[]).unwrap().token(&"x".repeat(limits::PAGE_TOKEN_BYTES));
        assert!(page(2, &long, &[]).is_err());
        assert!(page(2, "nonsense", &[]).is_err());
        assert!(page(1_001, "", &[]).is_err());
        assert_eq!(page(0, "", &[]).unwrap().count, limits::PAGE);
    }
}
