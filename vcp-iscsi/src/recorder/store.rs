//! Where captures go: a directory with a bounded number of bounded files for each device.
//!
//! The data thread takes a copy of the ring (some ten microseconds) and hands it on; files are written by a thread of the
//! store, or by the thread that asked for one. Anomalies in quick succession make one file, not hundreds.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Entry;
use super::pcapng::{About, write};

/// Files kept of a device; the oldest one goes.
pub const MAX_FILES: usize = 16;
/// At most one file for anomalies in this time.
pub const ANOMALY_EVERY: Duration = Duration::from_secs(5);
/// Ending of the names.
const ENDING: &str = ".pcapng";

/// Where a device's captures go.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StoreOptions {
    /// The directory; [`prepare`](StoreOptions::prepare) makes it if need be.
    pub dir: PathBuf,
    /// The device's name, for the names of files and comments.
    pub device: String,
    /// Files kept.
    pub max_files: usize,
    /// Shortest time between two files for anomalies.
    pub anomaly_every: Duration,
    /// The first bytes of data are kept, not only headers.
    pub with_data: bool,
}

impl StoreOptions {
    /// With the defaults.
    #[must_use]
    pub fn new(dir: PathBuf, device: String) -> Self {
        Self { dir, device, max_files: MAX_FILES, anomaly_every: ANOMALY_EVERY, with_data: true }
    }
}

impl StoreOptions {
    /// Makes the directory for its owner alone, if only it is missing and not the one that it is to be in, and then looks as
    /// [`check`](Self::check) does. Not for a confined process.
    ///
    /// # Errors
    /// What the system says of the directory.
    pub fn prepare(&self) -> io::Result<()> {
        match fs::DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists && !self.dir.exists() => {
                return Err(error);
            }
            // One that is there may be in one that is not to be written to.
            _ => {}
        }
        self.check()
    }

    /// Whether files can be written there.
    ///
    /// # Errors
    /// What the system says of the directory.
    pub fn check(&self) -> io::Result<()> {
        if !fs::metadata(&self.dir)?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        rustix::fs::access(&self.dir, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)?;
        Ok(())
    }
}

/// A copy of a recorder and what it was taken for.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The PDUs, oldest first.
    pub entries: Vec<Entry>,
    /// For people: session and reason.
    pub about: About,
    /// One word for the file's name.
    pub word: &'static str,
}

/// What a store did.
#[derive(Debug, Default)]
pub struct StoreStats {
    /// Files written.
    pub written: AtomicU64,
    /// Anomalies without a file of their own: too soon after another one, or the writer was busy.
    pub left_out: AtomicU64,
    /// Files that could not be written.
    pub failed: AtomicU64,
}

/// The files of a device.
#[derive(Debug)]
pub struct Store {
    shared: Arc<Shared>,
    queue: SyncSender<Snapshot>,
    last_anomaly: Option<Instant>,
}

#[derive(Debug)]
struct Shared {
    options: StoreOptions,
    /// Number of the next file; locked while one is written.
    next: Mutex<u64>,
    stats: StoreStats,
}

impl Store {
    /// A store in an existing directory that can be written to; starts its thread.
    ///
    /// # Errors
    /// What the system says of the directory or thread.
    pub fn open(options: StoreOptions) -> io::Result<Self> {
        options.check()?;
        let shared = Arc::new(Shared { options, next: Mutex::new(0), stats: StoreStats::default() });
        let (queue, snapshots) = sync_channel::<Snapshot>(1);
        let writer = Arc::clone(&shared);
        std::thread::Builder::new().name("recorder".into()).spawn(move || {
            while let Ok(snapshot) = snapshots.recv() {
                let word = snapshot.word;
                match writer.write(&snapshot) {
                    Ok(file) => {
                        tracing::warn!(file = %file.display(), reason = word, "the last PDUs were written");
                    }
                    Err(error) => {
                        tracing::warn!(dir = %writer.options.dir.display(), %error, "cannot write the last PDUs");
                    }
                }
            }
        })?;
        Ok(Self { shared, queue, last_anomaly: None })
    }

    /// Something went wrong: writes what `snapshot` copies, soon and on another thread, unless another file was written
    /// just before.
    pub fn anomaly(&mut self, now: Instant, snapshot: impl FnOnce() -> Snapshot) {
        let every = self.shared.options.anomaly_every;
        if self.last_anomaly.is_some_and(|last| now.saturating_duration_since(last) < every) {
            self.shared.stats.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        match self.queue.try_send(snapshot()) {
            Ok(()) => self.last_anomaly = Some(now),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.shared.stats.left_out.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Writes a file on the thread that calls what this returns; gives its name.
    pub fn on_request(&self, snapshot: Snapshot) -> impl FnOnce() -> io::Result<PathBuf> + Send + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.write(&snapshot)
    }

    /// What it did.
    #[must_use]
    pub fn stats(&self) -> &StoreStats {
        &self.shared.stats
    }

    /// The device's name.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.shared.options.device
    }
}

impl Shared {
    fn write(&self, snapshot: &Snapshot) -> io::Result<PathBuf> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.write_one(&mut next, snapshot);
        let counter = if result.is_ok() { &self.stats.written } else { &self.stats.failed };
        counter.fetch_add(1, Ordering::Relaxed);
        result
    }

    fn write_one(&self, next: &mut u64, snapshot: &Snapshot) -> io::Result<PathBuf> {
        let (dir, prefix) = (&self.options.dir, self.prefix());
        self.make_room(&prefix)?;
        let stamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        *next += 1;
        // Sorted by name is sorted by time.
        let name = format!(
            "{prefix}{:010}-{:06}-{:04}-{}{ENDING}",
            stamp.as_secs(),
            stamp.subsec_micros(),
            *next,
            snapshot.word
        );
        let (part, file) = (dir.join(format!("{name}.part")), dir.join(name));
        let bytes = write(&snapshot.entries, &snapshot.about);
        let written = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)
            .and_then(|mut out| out.write_all(&bytes))
            // Whoever waits for a file never finds half of one.
            .and_then(|()| fs::rename(&part, &file));
        if let Err(error) = written {
            let _ = fs::remove_file(&part);
            return Err(error);
        }
        Ok(file)
    }

    fn prefix(&self) -> String {
        // A device's name comes from us, but is part of a path.
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        format!("vcp-iscsi-{}-", self.options.device.chars().map(plain).collect::<String>())
    }

    /// Removes the oldest files of the device until there is room for one more; those of earlier processes as well.
    fn make_room(&self, prefix: &str) -> io::Result<()> {
        let mut files: Vec<PathBuf> = fs::read_dir(&self.options.dir)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| is_ours(path, prefix))
            .collect();
        files.sort();
        let most = self.options.max_files.max(1) - 1;
        for old in &files[..files.len().saturating_sub(most)] {
            fs::remove_file(old)?;
        }
        Ok(())
    }
}

/// Whether a file was written by a store of this device: nothing else is ever removed.
fn is_ours(path: &Path, prefix: &str) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
    let stamp = |rest: &str| {
        let mut parts = rest.splitn(4, '-').map(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
        (parts.next(), parts.next(), parts.next()) == (Some(true), Some(true), Some(true))
    };
    let rest = name.strip_prefix(prefix);
    rest.is_some_and(|rest| stamp(rest) && (rest.ends_with(ENDING) || rest.ends_with(".part")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn snapshot(word: &'static str) -> Snapshot {
        let clock = (Instant::now(), SystemTime::now());
        let about = About { comment: "c".into(), at_the_end: None, clock };
        Snapshot { entries: Vec::new(), about, word }
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_missing_directory_is_made_for_its_owner_but_no_path_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let options = |name: &str| StoreOptions::new(dir.path().join(name), "disk0".into());
        options("new").prepare().unwrap();
        options("new").prepare().unwrap();
        assert_eq!(fs::metadata(dir.path().join("new")).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(options("no/such").prepare().unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(dir.path().join("file"), b"x").unwrap();
        assert_eq!(options("file").prepare().unwrap_err().kind(), io::ErrorKind::NotADirectory);
    }

    #[test]
    fn the_number_of_files_is_bounded_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        for other in ["precious", "vcp-iscsi-disk0-notes.pcapng", "vcp-iscsi-disk00-1-1-1-x.pcapng"] {
            fs::write(dir.path().join(other), b"x").unwrap();
        }
        let options = StoreOptions { max_files: 3, ..StoreOptions::new(dir.path().into(), "disk0".into()) };
        let store = Store::open(options).unwrap();
        let files: Vec<_> = (0..7).map(|_| store.on_request(snapshot("request"))().unwrap()).collect();
        let there = names(dir.path());
        assert_eq!(there.len(), 6, "{there:?}");
        for file in &files[4..] {
            assert!(file.exists(), "the newest stay");
            assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(store.stats().written.load(Ordering::Relaxed), 7);
    }

    #[test]
    fn anomalies_in_quick_succession_make_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(StoreOptions::new(dir.path().into(), "a/b".into())).unwrap();
        let start = Instant::now();
        for ms in 0..1000 {
            store.anomaly(start + Duration::from_millis(ms), || snapshot("violation"));
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while store.stats().written.load(Ordering::Relaxed) == 0 {
            assert!(Instant::now() < deadline, "no file");
            std::thread::yield_now();
        }
        assert_eq!(store.stats().left_out.load(Ordering::Relaxed), 999);
        let there = names(dir.path());
        assert!(there.len() == 1 && there[0].starts_with("vcp-iscsi-a_b-"), "{there:?}");
        assert!(there[0].ends_with("-violation.pcapng"), "{there:?}");
    }

    #[test]
    fn a_directory_that_is_none_is_refused_at_start() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for wrong in [file.path(), Path::new("/no/such/directory")] {
            assert!(Store::open(StoreOptions::new(wrong.into(), "d".into())).is_err());
        }
    }
}
