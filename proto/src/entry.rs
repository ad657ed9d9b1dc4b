//! One level of a descriptor, as it comes from outside.

use prost::{
    DecodeError, Message,
    bytes::{Buf, BufMut},
    encoding::{DecodeContext, WireType, bytes, skip_field, string},
};

/// `envoy.extensions.common.ratelimit.v3.RateLimitDescriptor.Entry`.
///
/// Proxies copy headers into values as they are. A value that is not UTF-8 would make the message none, and an
/// error lets a request pass that nothing was counted for, if the proxy is told so: everybody could have that by a
/// header. So what is no letter becomes U+FFFD.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Not empty.
    pub key: String,
    /// What is counted by.
    pub value: String,
}

const KEY: u32 = 1;
const VALUE: u32 = 2;

impl Message for Entry {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        for (tag, text) in [(KEY, &self.key), (VALUE, &self.value)] {
            if !text.is_empty() {
                string::encode(tag, text, buf);
            }
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        let text = match tag {
            KEY => &mut self.key,
            VALUE => &mut self.value,
            _ => return skip_field(wire_type, tag, buf, ctx),
        };
        let mut read = std::mem::take(text).into_bytes();
        bytes::merge(wire_type, &mut read, buf, ctx)?;
        *text = String::from_utf8(read)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        let texts = [(KEY, &self.key), (VALUE, &self.value)];
        let texts = texts.into_iter().filter(|(_, text)| !text.is_empty());
        texts.map(|(tag, text)| string::encoded_len(tag, text)).sum()
    }

    fn clear(&mut self) {
        self.key.clear();
        self.value.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same message as prost would have it.
    #[derive(Clone, PartialEq, Message)]
    struct Plain {
        #[prost(string, tag = "1")]
        key: String,
        #[prost(string, tag = "2")]
        value: String,
    }

    #[test]
    fn it_is_on_the_wire_as_any_message_of_two_texts() {
        for (key, value) in [("", ""), ("path", ""), ("", "/"), ("path", "/login"), ("é", "🦀")]
        {
            let plain = Plain { key: key.into(), value: value.into() };
            let entry = Entry { key: key.into(), value: value.into() };
            assert_eq!(entry.encode_to_vec(), plain.encode_to_vec());
            assert_eq!(Entry::decode(&*plain.encode_to_vec()), Ok(entry));
        }
    }

    #[test]
    fn what_is_no_letter_is_told_as_such_and_the_last_of_two_counts() {
        let entry = |key: &str, value: &str| Entry { key: key.into(), value: value.into() };
        let read = |bytes: &[u8]| Entry::decode(bytes).unwrap();
        assert_eq!(read(b"\x0a\x01k\x12\x03a\xffb"), entry("k", "a\u{fffd}b"));
        assert_eq!(read(b"\x12\x01a\x12\x02bc\x18\x07"), entry("", "bc"));
        Entry::decode(&b"\x12\x05a"[..]).unwrap_err();
        Entry::decode(&b"\x10\x05"[..]).unwrap_err();
    }
}
