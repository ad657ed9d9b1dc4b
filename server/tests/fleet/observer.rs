//! Who writes down what processes say that they do, and asks nobody else.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::{UnixListener, UnixStream},
};
use tokio_util::task::AbortOnDropHandle;

/// What a process says, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It makes its first call now.
    Began { at: u64 },
    /// It was allowed so many tokens: the decision was had between these times.
    Spent { tokens: u64, from: u64, to: u64 },
    /// It held a permit at that time, and the client had just said, or says right after, that it has not expired.
    Held { permit: u64, at: u64 },
    /// A call through a stack of layers was made, and took so long.
    Called { took: Duration },
    /// A call failed.
    Failed { error: String },
    /// What its client tells.
    Event { name: String },
    /// What its client has counted: decisions by memory, by the server, by the fallback.
    Counted { memory: u64, server: u64, fallback: u64 },
}

impl Said {
    /// As a line.
    pub fn line(&self) -> String {
        match self {
            Self::Began { at } => format!("began {at}\n"),
            Self::Spent { tokens, from, to } => format!("spent {tokens} {from} {to}\n"),
            Self::Held { permit, at } => format!("held {permit} {at}\n"),
            Self::Called { took } => format!("called {}\n", took.as_nanos()),
            Self::Failed { error } => format!("failed {}\n", error.replace('\n', " ")),
            Self::Event { name } => format!("event {name}\n"),
            Self::Counted { memory, server, fallback } => {
                format!("counted {memory} {server} {fallback}\n")
            }
        }
    }

    /// Of a line; `None` of one that was not written to its end, by a process that was killed.
    fn of(line: &str) -> Option<Self> {
        let (what, rest) = line.strip_suffix('\n')?.split_once(' ')?;
        let numbers: Vec<u64> = rest.split(' ').map_while(|number| number.parse().ok()).collect();
        Some(match (what, &*numbers) {
            ("began", &[at]) => Self::Began { at },
            ("spent", &[tokens, from, to]) => Self::Spent { tokens, from, to },
            ("held", &[permit, at]) => Self::Held { permit, at },
            ("called", &[nanos]) => Self::Called { took: Duration::from_nanos(nanos) },
            ("failed", _) => Self::Failed { error: rest.to_owned() },
            ("event", _) => Self::Event { name: rest.to_owned() },
            ("counted", &[memory, server, fallback]) => Self::Counted { memory, server, fallback },
            _ => panic!("nobody says `{line}`"),
        })
    }
}

/// All that was said, by the number of the process.
type Book = Arc<Mutex<Vec<(u64, Said)>>>;

/// An observer. Its processes end with it.
pub struct Observer {
    directory: TempDir,
    book: Book,
    _listening: AbortOnDropHandle<()>,
}

impl Observer {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("observer")).unwrap();
        let book = Book::default();
        let listening = tokio::spawn(listen(listener, Arc::clone(&book)));
        Self { directory, book, _listening: AbortOnDropHandle::new(listening) }
    }

    /// Where processes find it.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("observer")
    }

    /// What was said so far.
    pub fn book(&self) -> Vec<(u64, Said)> {
        self.book.lock().clone()
    }

    /// Whether something was said so far that is such.
    pub fn has(&self, is_such: impl Fn(u64, &Said) -> bool) -> bool {
        self.book.lock().iter().any(|(number, said)| is_such(*number, said))
    }
}

async fn listen(listener: UnixListener, book: Book) {
    let mut processes = tokio::task::JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.expect("the listener lives");
        processes.spawn(write_down(stream, Arc::clone(&book)));
    }
}

async fn write_down(stream: UnixStream, book: Book) {
    let (mut lines, mut line) = (BufReader::new(stream), String::new());
    let mut number = None;
    while lines.read_line(&mut line).await.is_ok_and(|length| length > 0) {
        match number {
            None => number = line.trim().parse().ok(),
            Some(number) => {
                if let Some(said) = Said::of(&line) {
                    book.lock().push((number, said));
                }
            }
        }
        line.clear();
    }
}

/// The other end, in a process.
#[derive(Clone)]
pub struct Pen(Arc<Mutex<std::os::unix::net::UnixStream>>);

impl Pen {
    /// Finds the observer, and has this process end when that does.
    pub fn of(path: &Path, number: u64) -> Self {
        use std::io::{Read, Write};

        let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
        stream.write_all(format!("{number}\n").as_bytes()).unwrap();
        let mut ends = stream.try_clone().unwrap();
        std::thread::spawn(move || {
            let _ = ends.read(&mut [0]);
            std::process::exit(0);
        });
        Self(Arc::new(Mutex::new(stream)))
    }

    /// Says something. When it returns the observer has it, also if this process is killed right then.
    pub fn says(&self, said: &Said) {
        use std::io::Write;

        // It fails when the observer has gone, and this process goes next.
        let _ = self.0.lock().write_all(said.line().as_bytes());
    }
}
