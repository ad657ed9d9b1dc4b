//! What the machine says about itself and about a process: `/proc`.

use std::{
    collections::HashMap,
    fs,
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::Result;

/// Length of a tick of `/proc/PID/stat`: `USER_HZ` is 100 on every Linux that Rust runs on.
const TICK: Duration = Duration::from_millis(10);

/// Pause between two looks at the threads of a process: what one did after the last look before its end is
/// lost, so this is short.
const LOOK: Duration = Duration::from_millis(50);

/// What a reader must know of the machine.
pub(crate) fn described() -> Result<String> {
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = field(&cpus, "model name").unwrap_or("unknown");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let load = fs::read_to_string("/proc/loadavg")?;
    Ok(format!(
        "{} cores of {model}, Linux {}; load before the run: {}\n",
        thread::available_parallelism()?,
        kernel.trim(),
        load.split(' ').next().unwrap_or("unknown"),
    ))
}

/// CPU time of all processes since the machine started, and what a hypervisor kept for others.
pub(crate) fn busy() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat")?;
    let all = stat.lines().next().and_then(|line| line.strip_prefix("cpu ")).ok_or("no CPUs")?;
    let ticks: Vec<u32> = all.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    // user nice system idle iowait irq softirq steal; what guests take is told as user, too.
    let [user, nice, system, _, _, irq, softirq, steal, ..] = ticks[..] else {
        return Err("an unreadable stat".into());
    };
    Ok(TICK * (user + nice + system + irq + softirq + steal))
}

/// Memory of a process, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    /// All that is resident.
    pub(crate) resident: u64,
    /// What of it is no file's.
    pub(crate) anonymous: u64,
    /// The most that was ever resident.
    pub(crate) peak: u64,
}

impl Memory {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let bytes = |name| -> Result<u64> {
            let value = field(&status, name).ok_or_else(|| format!("no {name} of {pid}"))?;
            Ok(value.trim_end_matches(" kB").parse::<u64>()? * 1024)
        };
        Ok(Self { resident: bytes("VmRSS")?, anonymous: bytes("RssAnon")?, peak: bytes("VmHWM")? })
    }
}

/// Measures the CPU time of all threads of a process.
///
/// The sum is over every thread that was ever seen, at its last value: one that ends keeps what it had at the
/// last look. What `/proc/PID/stat` says is coarse but misses no thread; where it says more than ticks explain,
/// it counts.
pub(crate) struct Meter {
    stop: Sender<()>,
    watching: JoinHandle<Result<Duration, String>>,
}

impl Meter {
    pub(crate) fn start(pid: u32) -> Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let before = (threads(pid)?, ticks(pid)?);
        let watching = thread::Builder::new().name("meter".into()).spawn(move || {
            let (first, ticks_before) = before;
            let mut last = first.clone();
            loop {
                let told = stopped.recv_timeout(LOOK);
                last.extend(threads(pid).map_err(|error| error.to_string())?);
                if told != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
            let nanos = |(tid, nanos): (&u32, &u64)| nanos - first.get(tid).unwrap_or(&0);
            let by_thread = Duration::from_nanos(last.iter().map(nanos).sum());
            let by_tick = ticks(pid).map_err(|error| error.to_string())? - ticks_before;
            Ok(if by_tick > by_thread + 2 * TICK + by_thread / 50 { by_tick } else { by_thread })
        })?;
        Ok(Self { stop, watching })
    }

    /// CPU time since the start.
    pub(crate) fn stop(self) -> Result<Duration> {
        // It can only be gone if it failed, and then says so.
        let _ = self.stop.send(());
        Ok(self.watching.join().map_err(|_| "the meter panicked")??)
    }
}

/// Nanoseconds on a CPU, by thread.
fn threads(pid: u32) -> Result<HashMap<u32, u64>> {
    let mut threads = HashMap::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?;
        // A thread may end between the list and the look.
        if let Ok(schedule) = fs::read_to_string(thread.path().join("schedstat")) {
            let nanos = schedule.split(' ').next().unwrap_or_default().parse()?;
            threads.insert(thread.file_name().to_string_lossy().parse()?, nanos);
        }
    }
    Ok(threads)
}

/// CPU time of a process, also of threads that have ended.
fn ticks(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name of the program comes second, in brackets, and may hold anything.
    let (_, fields) = stat.rsplit_once(") ").ok_or("an unreadable stat")?;
    let (user, system) = (fields.split(' ').nth(11), fields.split(' ').nth(12));
    let ticks = user.ok_or("no user time")?.parse::<u32>()?
        + system.ok_or("no system time")?.parse::<u32>()?;
    Ok(TICK * ticks)
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| Some(line.strip_prefix(name)?.trim_start().strip_prefix(':')?.trim()))
}
