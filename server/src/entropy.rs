//! Where randomness comes from.

/// A source of bytes that nobody can guess.
pub trait Entropy: Send + Sync + 'static {
    /// Fills `bytes`.
    fn fill(&self, bytes: &mut [u8]);

    /// Sixteen bytes.
    fn bytes16(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        self.fill(&mut bytes);
        bytes
    }
}

/// The operating system's source.
#[derive(Debug, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    #[allow(clippy::expect_used)]
    fn fill(&self, bytes: &mut [u8]) {
        // It fails only where the kernel has no such source; a server that can be guessed must not start.
        getrandom::fill(bytes).expect("the operating system gives random bytes");
    }
}
