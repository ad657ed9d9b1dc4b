//! Every limit of the server, and why it is what it is.
//!
//! Queues, maps, messages and waits all end somewhere; this is the one table of where.

use std::time::Duration;

/// Asks in one Acquire: what one call can reasonably be subject to.
pub const ASKS: usize = 16;

/// Acquires in one batch: a millisecond or so of work, so that no batch holds up its neighbours.
pub const BATCH_REQUESTS: usize = 1_000;

/// Asks in one batch, over all its Acquires: as above.
pub const BATCH_ASKS: usize = 4_096;

/// Outcomes in one report: as a batch.
pub const REPORT_OUTCOMES: usize = 1_000;

/// Deltas in one report, of as many circuits or retry budgets: as its outcomes.
pub const REPORT_DELTAS: usize = 1_000;

/// Calls of each kind that a delta counts: more than any process makes between two reports, and two of them still
/// fit what a window counts with.
pub const DELTA_CALLS: u64 = 1_000_000_000;

/// Longest latency of a call that is told: longer ones are of calls that nobody waits for.
pub const LATENCY: Duration = Duration::from_secs(24 * 60 * 60);

/// Bytes of a kind of failure: the name of an exception or of a status.
pub const ERROR_KIND_BYTES: usize = 64;

/// Buckets of latencies, and kinds of failure of one delta: the core's.
pub use fusebox_core::circuit::{LATENCIES, MAX_KINDS as ERROR_KINDS};

/// Time that a circuit is believed to be as the answer to a report says: a client without a Watch reports many
/// times in it, and one that hears no more is soon left to its own breaker.
pub const STATUS_VALID: Duration = Duration::from_secs(5);

/// Bytes of one message from a client: four times the largest sensible batch. From a proxy it holds all headers that
/// one takes, 60 KiB, in each of 16 descriptors; a message that is refused may pass the proxy uncounted.
pub const MESSAGE_BYTES: usize = 1024 * 1024;

/// Bytes of all messages that are being received: what clients hold back in the middle of a message is
/// held in our memory. Past it a call is refused with `RESOURCE_EXHAUSTED`.
pub const RECEIVED_BYTES: usize = 256 * 1024 * 1024;

/// Bytes of a key: long enough for a URL path or a token's hash, short enough to copy without thought.
pub const KEY_BYTES: usize = 256;

/// Bytes of the name of a namespace or policy: a DNS label, so that it fits metric labels and file names.
pub const NAME_BYTES: usize = 63;

/// Bytes of the id of a request: a UUID three times over.
pub const REQUEST_ID_BYTES: usize = 128;

/// Bytes of each name that a client gives itself.
pub const CLIENT_BYTES: usize = 128;

/// Bytes of a caller's own text that an error repeats to it.
pub const ECHOED_BYTES: usize = 64;

/// Bytes of a grant id: three times what this server gives out.
pub const GRANT_ID_BYTES: usize = 128;

/// Field violations told for one request: enough to mend it, too few to make errors expensive.
pub const VIOLATIONS: usize = 16;

/// Earlier settings of a policy that are remembered, most tokens of a policy, its longest period: the
/// core's.
pub use fusebox_core::{
    MAX_FORMERS as FORMERS,
    token_bucket::{MAX_PER as PERIOD, MAX_TOKENS as TOKENS},
};

/// Policies of one server: each is a few metric series, and scrapes must stay small.
pub const POLICIES: usize = 10_000;

/// Bytes of a configuration file: ten thousand policies at a hundred bytes, four times over.
pub const CONFIG_BYTES: u64 = 4 * 1024 * 1024;

/// Shards of the cells, a power of two: many times the cores, so that two callers rarely want the same
/// lock, and enough that sweeping one never takes long.
pub const CELL_SHARDS: usize = 256;

/// Shards of the open grants, a power of two, as above.
pub const GRANT_SHARDS: usize = 16;

/// Live cells of all policies: at 88 bytes and some for finding them, about 1.2 GB. Past it new keys share the
/// overflow cells of their policies; those that live are served on.
pub const CELLS: usize = 10_000_000;

/// Open grants: about 150 MB. Past it estimated asks are refused with `RESOURCE_EXHAUSTED`.
pub const OPEN_GRANTS: usize = 1_000_000;

/// Settled grants remembered, to tell a repeated report from a wrong one; oldest out.
pub const SETTLED_GRANTS: usize = 65_536;

/// Life of an open estimate: longer than the slowest call that estimates are made for (a streamed answer
/// of a model), short enough that a lost caller's part of the bucket is back in minutes.
pub const ESTIMATE_LIFE: Duration = Duration::from_secs(600);

/// Connections of the gRPC port: past it a new one is closed at once, so that its client fails over.
pub const GRPC_CONNECTIONS: usize = 10_000;

/// Connections of the operations port: probes and scrapers are few.
pub const OPS_CONNECTIONS: usize = 64;

/// Calls at once on one connection: a client that wants more opens another.
pub const STREAMS_PER_CONNECTION: u32 = 1_024;

/// Bytes of the headers of one call.
pub const HEADER_BYTES: u32 = 16 * 1024;

/// Calls that a client may cancel before we looked at them: tight deadlines cancel in bursts, and past
/// this the whole connection is closed.
pub const PENDING_RESETS: usize = 512;

/// Wait for the first words of a connection: an HTTP/2 client speaks first, and at once.
pub const PREFACE_WAIT: Duration = Duration::from_secs(10);

/// Life of a connection of the operations port, of one request: a client that does not read its answer
/// must not keep probes out.
pub const OPS_CONNECTION_LIFE: Duration = Duration::from_secs(10);

/// Time until a call is answered, or the stream of its answers begins, for a client that sets no deadline or a later one: a decision
/// takes microseconds and a wait in line a minute at most, so this only ends calls whose message never arrives.
pub const CALL_TIME: Duration = Duration::from_secs(75);

/// Silence after which a connection is asked whether it is still there, and the wait for its answer.
pub const KEEPALIVE: Duration = Duration::from_secs(20);

/// Pause of the accept loop when the process is out of file descriptors or memory: without it the loop
/// would spin.
pub const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Wait for probes and scrapes that are under way when all else is done.
pub const OPS_DRAIN: Duration = Duration::from_secs(1);

/// Wait for threads that have nothing left to do when the program ends: a store that hangs must not keep
/// it alive.
pub const EXIT: Duration = Duration::from_secs(1);

/// Wait for one round of the writer: a disk that takes longer hangs, and that is a failure as any other.
pub const WRITE_STALL: Duration = Duration::from_secs(10);

/// Wait for the last round of the writer, after which the program ends without it, and says so.
pub const FLUSH: Duration = Duration::from_secs(10);

/// Longest drain: an orchestrator that waits longer than ten minutes is not one.
pub const DRAIN: Duration = Duration::from_secs(600);

/// With `durability: relaxed`, how far the disk may lag behind memory.
pub const RELAXED_INTERVAL: Duration = Duration::from_millis(200);

/// A policy whose limits all fill from empty within this time is never written while it lives: a crash empties
/// it, and it has filled again before anybody would restart the server.
pub const FAST_FILL: Duration = Duration::from_secs(10);

/// Time that a mark of a busy cell should last: one that lasts less is followed by one of twice the step. In
/// a second a disk syncs hundreds of times, so of a busy key's callers few ever wait for one.
pub const MARK_LASTS: Duration = Duration::from_secs(1);

/// Time that a cell stays in memory and on disk after it is full, as long as half of the room is free: a key
/// that comes back meanwhile costs one write, not a deletion and two.
pub const FULL_LINGERS: Duration = Duration::from_secs(60);

/// Marks that wait for the writer: two of the largest batches, and a tenth of a second of its work.
/// Past it what needs a mark is refused with `RESOURCE_EXHAUSTED`, and charges nothing.
pub const QUEUED_MARKS: usize = 2 * BATCH_ASKS;

/// Records that the writer copies or catches up with between two rounds: what a caller waits for at most,
/// besides the disk.
pub const WRITER_SLICE: usize = 512;

/// Records of one commit where nobody waits: at a start, and at a clean stop.
pub const COMMIT_RECORDS: usize = 1_024;

/// Bytes of a journal below which it is never rotated: below that a start reads it in no time.
pub const ROTATION_BYTES: u64 = 64 * 1024 * 1024;

/// Bytes of a live record, roughly: 17 of its key, up to 50 of its value, and what sled adds.
pub const RECORD_BYTES: u64 = 96;

/// Pause between two rounds of housekeeping. A round sweeps one shard of the cells, and takes some expired
/// grants; all shards are swept in 13 s, or in 26 if ten million cells are live.
pub const HOUSEKEEPING_INTERVAL: Duration = Duration::from_millis(50);

/// Cells that a round of housekeeping looks at, at most: a millisecond of work.
pub const SWEPT_PER_ROUND: u32 = 20_480;

/// Cells that housekeeping looks at under one lock: some tens of microseconds, which is what it may hold up a
/// call.
pub const SWEPT_AT_ONCE: u32 = 512;

/// How far the wall clock may step back without a fixed window being granted twice.
pub const WALL_STEP: Duration = Duration::from_secs(60 * 60);

/// Limits of one policy on one key: a second, a minute, a day and a month.
pub const LIMITS: usize = 4;

/// Overrides of one policy: each has settings of its own, and they are looked up by hash or by prefix.
pub const OVERRIDES: usize = 1_000;

/// Overrides by prefix of one policy: they are looked at one by one.
pub const PREFIXES: usize = 32;

/// Expired grants taken in one round of housekeeping from each shard.
pub const EXPIRED_PER_ROUND: usize = 1_024;

/// Memory that sled may use as a cache. It takes what it needs, 200 MB for a million records; where that is
/// more than it may, it writes half as fast.
pub const SLED_CACHE_BYTES: u64 = 512 * 1024 * 1024;

/// Cells of a policy that does not say: a million keys of one limit, a tenth of what a server holds.
pub const POLICY_CELLS: usize = 1_000_000;

/// Circuits of a breaker: about 1 GB where 32 reporters tell of each. Past it circuits are not shared.
pub const CIRCUITS: usize = 100_000;

/// Circuits of a breaker that does not say: a target is a service or a host, and fleets have thousands of those.
pub const POLICY_CIRCUITS: usize = 10_000;

/// Life of a lease of a policy that does not say, and what a policy may say: long enough that few calls ask,
/// short enough that what a dead client held is back soon.
pub const LEASE_TIME: Duration = Duration::from_secs(1);
/// See [`LEASE_TIME`].
pub const LEASE_TIMES: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(60);

/// Callers that stand in line at one key of a policy that does not say, and what a policy may say.
pub const WAITING_AT_KEY: usize = 1_000;
/// See [`WAITING_AT_KEY`].
pub const WAITING_AT_KEY_MOST: usize = 10_000;

/// Shortest window that is leased from: an hour. A lease ends with its window.
pub const LEASED_WINDOW: Duration = Duration::from_secs(60 * 60);

/// Shortest period of a limit of which clients that cannot reach the server deny calls, if nobody says what they do: an
/// hour. Each would spend its share again, and what is spent of it does not come back soon.
pub const UNREACHABLE_LONG: Duration = Duration::from_secs(60 * 60);

/// Clients that lease, by cell: about 10 MB. Past it nothing is leased to new ones.
pub const LESSEES: usize = 100_000;

/// Pause between two looks at which of them have not asked for a while.
pub const LESSEES_TENDED: Duration = Duration::from_secs(10);

/// Shards of the lines of those who wait, a power of two: fewer than of the cells, since few of them have a
/// line.
pub const LINE_SHARDS: usize = 64;

/// Acquires that wait in a line, at all cells: each holds a call open, of a few kilobytes, so this is some
/// hundred megabytes. Past it an Acquire that would wait is denied at once.
pub const WAITING: usize = 100_000;

/// Least pause between two attempts of the head of a line, if nothing happens meanwhile: the grain of the
/// runtime's timers. Without it a head that is told to try at once would spin.
pub const RETRY_PAUSE: Duration = Duration::from_millis(1);

/// Shards of the requests that are remembered, a power of two: many callers rarely want the same lock.
pub const REQUEST_SHARDS: usize = 64;

/// Requests whose answer is remembered, oldest out: about 210 MB and the answers themselves. In the time
/// that they are remembered, that is 16,000 new ones each second.
pub const REMEMBERED_REQUESTS: usize = 1_000_000;

/// Time that an answer is remembered at most: who repeats a request does so within a minute.
pub const REMEMBERED_FOR: Duration = Duration::from_secs(60);

/// Requests forgotten in one round of housekeeping from each shard, once their time is over.
pub const FORGOTTEN_PER_ROUND: usize = 1_024;

/// Keys of a policy that are counted to tell the top ones: one with more than 1/128 of all is surely among
/// them. With keys of 32 bytes 17 kB a policy, with the longest 45.
pub const TOP_KEYS: usize = 128;

/// Asks that are counted until only every second is: enough to know a key with a hundredth of them to within
/// a tenth, and counted in a few milliseconds.
pub const TOP_KEYS_SAMPLE: u32 = 16_384;

/// Most times that the asks counted are halved: one in 4,096 of a hundred million a minute is still enough.
pub const TOP_KEYS_SAMPLING: u32 = 12;

/// Time after which the counts of top keys are halved: who asks is asked about now, and a minute is how long
/// people look.
pub const TOP_KEYS_HALVED: Duration = Duration::from_secs(60);

/// Events of the audit trail: months of changes by hand, a day of them by a script, and 30 MB at most.
/// Oldest out.
pub const EVENTS: usize = 10_000;

/// Bytes of who did it: a name of a certificate, or an address.
pub const EVENT_ACTOR_BYTES: usize = 128;

/// Bytes of why somebody did something: a sentence, and the link to a ticket.
pub const REASON_BYTES: usize = 256;

/// Bytes of what was there before an event, or is there after it: a policy with some overrides. An event is
/// a note of what happened, not a backup of settings.
pub const EVENT_VALUE_BYTES: usize = 1_024;

/// Longest wait of an Acquire in a line: who waits longer for a limit should queue its work itself.
pub const MAX_WAIT: Duration = Duration::from_secs(60);

/// Longest pause between two attempts of the head of a line: what comes back is told at once, but where keys
/// share a cell it may be told to another line.
pub const LINE_LOOKS: Duration = Duration::from_secs(1);

/// Keys that are known as text, of all policies: about 150 MB. Buckets past it are counted, but not listed.
pub const NAMES: usize = 1_000_000;

/// Shards of the keys of one policy: many new keys at once rarely want the same lock.
pub const NAME_SHARDS: usize = 16;

/// Keys that housekeeping looks at under one lock, to forget those whose cell is gone.
pub const NAMES_PRUNED_AT_ONCE: usize = 256;

/// Keys that housekeeping looks at in one round, at most: a million in half a minute.
pub const NAMES_PRUNED_PER_ROUND: usize = 2_048;

/// Changes that wait to be written: they are made one at a time, so more than a few is a mistake.
pub const NOTES: usize = 64;

/// Clients that are remembered, and those of one shard: about 40 MB. New ones past it are not listed until
/// others have been silent for a while.
pub const CLIENTS: usize = 100_000;
/// See [`CLIENTS`].
pub const CLIENT_SHARDS: usize = 64;

/// Time that a client is remembered without a call.
pub const CLIENT_SILENCE: Duration = Duration::from_secs(600);

/// Pause between two looks at which of them were silent for that long.
pub const CLIENTS_TENDED: Duration = Duration::from_secs(10);

/// Clients whose reports are known to have come, and shards of them: about 10 MB. Past it the one that was silent for
/// longest is forgotten; a report of it that comes again would count again.
pub const SEQUENCES: usize = CLIENTS;
/// See [`SEQUENCES`].
pub const SEQUENCE_SHARDS: usize = 64;

/// Entries of one page of a list, at most, and where the request does not say.
pub const PAGE_MOST: usize = 1_000;
/// See [`PAGE_MOST`].
pub const PAGE: usize = 100;

/// Bytes of what says where a page begins: which list it is of, and the longest name that one has, which is that of
/// a rule of Envoy's.
pub const PAGE_TOKEN_BYTES: usize = 16 + NAME_BYTES + 1 + RULE_PATH_BYTES;

/// Top keys told where the request does not say.
pub const TOP_KEYS_TOLD: usize = 10;

/// Open grants of one client that are told one by one.
pub const GRANTS_TOLD: usize = 1_000;

/// Limiters that are known, of all policies and of those that were: about 100 MB. One that no policy has any
/// more is forgotten at the next start at which nothing is counted by it.
pub const LIMITERS: usize = 200_000;

/// Descriptors of one request to Envoy's rate limit service: as rules that are decided together.
pub const DESCRIPTORS: usize = 64;

/// Entries of one descriptor, and levels of rules.
pub const DESCRIPTOR_ENTRIES: usize = 32;

/// Bytes of a value in a rule: a path with its query. Those of descriptors are as long as they are, and count by what
/// they begin with and a hash.
pub const DESCRIPTOR_VALUE_BYTES: usize = 4 * 1024;

/// Rules of Envoy's rate limit service, of all domains: each is a policy, of some kilobytes.
pub const RULES: usize = 20_000;

/// Bytes of a rule's domain, of each of its keys, and of its name: as keys of our own policies.
pub const RULE_TEXT_BYTES: usize = KEY_BYTES;

/// Files and folders that rules are read from: a file is a domain, or a part of one.
pub const RULE_FILES: usize = 1_000;

/// Bytes of all files of rules: as many rules as there may be, at some hundreds of bytes, three times over.
pub const RULE_FILES_BYTES: u64 = 16 * 1024 * 1024;

/// Folders of rules in each other: links may make a few of one.
pub const RULE_FOLDERS: usize = 16;

/// Values in a file of rules, with what is repeated by its anchor: as many rules as there may be, at some tens.
pub const RULE_FILE_NODES: usize = 1_000_000;

/// Lists and maps in each other in a file of rules: two for each level, and some for the rule and its metadata. Each
/// is a call on the stack.
pub const RULE_FILE_DEPTH: usize = 2 * DESCRIPTOR_ENTRIES + 32;

/// Bytes of the stack that files of rules are parsed on: in a debug build a list or a map takes some 40 kB of it.
pub const RULE_FILE_STACK: usize = 16 * 1024 * 1024;

/// Mistakes in files of rules that are told at once: more than anybody mends before the next try.
pub const RULE_MISTAKES: usize = 100;

/// Letters of a line that a message shows: more than a terminal has.
pub const SHOWN_LETTERS: usize = 160;

/// Bytes of a rule's path: it is the name of a policy, and a label of metrics.
pub const RULE_PATH_BYTES: usize = 1024;

/// Series of metrics that `detailed_metric` and `value_to_metric` may make of what callers send: past it hits are
/// counted by their rule.
pub const DETAILED_METRICS: usize = 10_000;

/// Bytes of the key of a series of hits: a label of metrics, cut where it is longer.
pub const HITS_KEY_BYTES: usize = 256;

/// Shards of the series that one rule has for what callers send: many calls at once rarely want the same lock.
pub const HITS_SHARDS: usize = 16;

/// Time that files of rules have to settle once one of them changes.
pub const RULES_SETTLE: Duration = Duration::from_millis(250);

/// Pause between two looks at the files of rules, where nothing tells of a change.
pub const RULES_LOOKED_AT: Duration = Duration::from_secs(30);

/// Time that a snapshot of the policies may be in use once it is replaced: a decision takes microseconds, a page of a
/// list less than a second.
pub const SNAPSHOT_IN_USE: Duration = Duration::from_secs(10);

/// Pause between two looks at whether it still is.
pub const SNAPSHOT_LOOKS: Duration = Duration::from_millis(1);

/// Shards of the circuits: fewer than of the cells, as who asks through them holds the lock of one while it
/// charges. Housekeeping looks at one in each round, so at all of them in less than a second.
pub const CIRCUIT_SHARDS: usize = 16;

/// Breakers asked in one Acquire: that of what is called, and that of the host that it is called on.
pub const CIRCUIT_ASKS: usize = 2;

/// Time after which a circuit may be forgotten that nobody asks for or tells of: calls take less than that.
pub const CIRCUIT_LINGERS: Duration = Duration::from_secs(600);

/// Time for which it is remembered that a circuit was open: who comes in the morning may ask what happened.
pub const CIRCUIT_REMEMBERED: Duration = Duration::from_secs(24 * 60 * 60);

/// Latest changes of a namespace's circuits that are known by name: who watches and is further behind begins
/// anew.
pub const WATCH_LOG: usize = 1_024;

/// How long an operator's order holds: what nobody remembers to end should end, and a month is as long as a
/// migration takes.
pub const MODE_TTLS: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(30 * 24 * 60 * 60);

/// Streams that watch circuits: one for each process of a large fleet. Each is some kilobytes, and a message that it
/// may not take.
pub const WATCHERS: usize = 10_000;

/// Breakers that one of them may name: who wants more watches the namespace.
pub const WATCH_POLICIES: usize = 64;

/// Circuits of one message to those who watch: of the longest names and evidence each is some 2.5 kB, so together
/// they are below [`MESSAGE_BYTES`].
pub const WATCH_CIRCUITS: usize = 256;

/// Silence after which those who watch are told that nothing changed.
pub const WATCH_HEARTBEAT: Duration = Duration::from_secs(1);

/// How long those who watch may believe what they were told: a few heartbeats, so that a message that is late does
/// not leave each client to its own breaker, and short enough that a server that is gone is soon not believed.
pub const WATCH_VALID: Duration = Duration::from_secs(5);

/// Sessions: as those who watch, one for each process of a large fleet, and some that have several connections. Each
/// is some kilobytes, and what it is being answered.
pub const SESSIONS: usize = 10_000;

/// Requests of one session that are not answered yet: as calls on one connection. Past it nothing more of it is read.
pub const SESSION_UNANSWERED: usize = STREAMS_PER_CONNECTION as usize;

/// Silence after which a session is told that the server is there.
pub const SESSION_HEARTBEAT: Duration = Duration::from_secs(1);

/// Time that a session has to say who it is: a client says so first, and at once.
pub const SESSION_HELLO: Duration = Duration::from_secs(10);

/// Policies and keys that one session binds: a process that uses more of them asks by name.
pub const SESSION_BINDINGS: u32 = 4_096;

/// Policies and keys bound, by client: about 150 MB. Past it a Bind is refused.
pub const BINDINGS: usize = 1_000_000;

/// Shards of what is bound, a power of two: many clients that start at once rarely want the same lock.
pub const BINDING_SHARDS: usize = 64;

/// Pause between two looks at whether what a session has bound changed: each is told at most once in it.
pub const SESSION_LOOKS: Duration = Duration::from_secs(1);

/// Probes of one session that are given back when it ends by a Close, the latest: a client has a few at a time. Older
/// ones expire.
pub const SESSION_PROBES: usize = 1_024;
