//! Which processes a session is about.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use regex::bytes::Regex;

use super::status::{Stat, Status, exe_name};
use super::{Pid, ProcessError, Tid};

/// Length at which the kernel cuts names (`TASK_COMM_LEN` - 1).
const COMM_LIMIT_BYTES: usize = 15;

/// Folders below one cgroup; a container host has hundreds.
const CGROUP_LIMIT: usize = 100_000;

/// What the user asked for.
#[derive(Debug, Clone)]
pub enum Selector {
    Pids(Vec<Pid>),
    /// Matched against the name as `pgrep` does, not against the command line; a name that the
    /// kernel cut at 15 bytes is completed from the executable's.
    Name(Regex),
    /// A folder below a cgroup mount, or a path as `/proc/PID/cgroup` shows it; with everything
    /// below it.
    Cgroup(PathBuf),
    /// Every process that has memory of its own.
    All,
}

#[derive(Debug, thiserror::Error)]
pub enum SelectError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("{tid} is a thread of process {pid}: use -p {pid}")]
    IsThread { tid: Tid, pid: Pid },
    #[error("process {0} is leakbpf itself")]
    Ourselves(Pid),
    #[error("process {pid} ({comm}) is {what}: it has no memory to trace")]
    NoMemory { pid: Pid, comm: String, what: &'static str },
    #[error(
        "no process name matches /{regex}/: `ps -eo pid,comm` lists the names (the command line is not searched; `pgrep -f` finds process ids for -p)"
    )]
    NoName { regex: String },
    #[error("cgroup {} does not exist: `systemd-cgls` or /proc/PID/cgroup show their paths", .0.display())]
    NoCgroup(PathBuf),
    #[error("cgroup {} holds no process", .0.display())]
    EmptyCgroup(PathBuf),
    #[error("more than {CGROUP_LIMIT} cgroups up to {}: name one further down", .0.display())]
    ManyCgroups(PathBuf),
    #[error("cannot read {}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("no process but leakbpf itself is visible: run it in the host's pid namespace")]
    Alone,
}

/// The processes that are meant, by rising id; never ourselves, never empty. Processes that end
/// while they are looked at are left out, except those that were asked for by id.
pub fn select(selector: &Selector) -> Result<Vec<Pid>, SelectError> {
    match selector {
        Selector::Pids(pids) => {
            let unique: BTreeSet<Pid> = pids.iter().copied().collect();
            unique.into_iter().map(|pid| require(pid).map(|()| pid)).collect()
        }
        Selector::Name(regex) => {
            let found = living(list_processes()?, |pid, stat| {
                is_named(regex, &stat.comm, || exe_name(pid))
            });
            or_error(found, || SelectError::NoName { regex: regex.to_string() })
        }
        Selector::Cgroup(path) => {
            let mounts = read("/proc/self/mountinfo").map(|bytes| cgroup_mounts(&bytes))?;
            let listed = cgroup_processes(path, &mounts)?;
            let found = living(listed, |_, _| true);
            or_error(found, || SelectError::EmptyCgroup(path.clone()))
        }
        Selector::All => or_error(living(list_processes()?, |_, _| true), || SelectError::Alone),
    }
}

fn or_error(found: Vec<Pid>, error: impl FnOnce() -> SelectError) -> Result<Vec<Pid>, SelectError> {
    if found.is_empty() { Err(error()) } else { Ok(found) }
}

fn require(pid: Pid) -> Result<(), SelectError> {
    if pid == Pid::current() {
        return Err(SelectError::Ourselves(pid));
    }
    let stat = Stat::of(pid)?;
    // /proc/TID exists for every thread, although no listing shows it.
    match Status::of(pid)?.tgid {
        Some(tgid) if tgid != pid.0 => {
            return Err(SelectError::IsThread { tid: Tid(pid.0), pid: Pid(tgid) });
        }
        _ => {}
    }
    match memoryless(&stat) {
        Some(what) => {
            let comm = String::from_utf8_lossy(&stat.comm).into_owned();
            Err(SelectError::NoMemory { pid, comm, what })
        }
        None => Ok(()),
    }
}

fn memoryless(stat: &Stat) -> Option<&'static str> {
    if stat.is_zombie() {
        Some("a zombie")
    } else if stat.kernel_thread {
        Some("a kernel thread")
    } else {
        None
    }
}

fn living(pids: Vec<Pid>, mut wanted: impl FnMut(Pid, &Stat) -> bool) -> Vec<Pid> {
    let others = pids.into_iter().filter(|&pid| pid != Pid::current());
    let unique: BTreeSet<Pid> = others
        .filter(|&pid| {
            Stat::of(pid).is_ok_and(|stat| memoryless(&stat).is_none() && wanted(pid, &stat))
        })
        .collect();
    unique.into_iter().collect()
}

fn is_named(regex: &Regex, comm: &[u8], exe_name: impl FnOnce() -> Option<Vec<u8>>) -> bool {
    if comm.len() == COMM_LIMIT_BYTES
        && let Some(full) = exe_name().filter(|name| name.starts_with(comm))
    {
        return regex.is_match(&full);
    }
    regex.is_match(comm)
}

fn list_processes() -> Result<Vec<Pid>, SelectError> {
    let unreadable = |source| SelectError::Unreadable { path: "/proc".into(), source };
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        pids.extend(name.to_str().and_then(|name| name.parse().ok()).map(Pid));
    }
    Ok(pids)
}

/// Where control groups are mounted, the unified hierarchy first, then (version 1) the memory
/// controller's. `bytes` is `/proc/self/mountinfo`, see proc_pid_mountinfo(5).
fn cgroup_mounts(bytes: &[u8]) -> Vec<PathBuf> {
    let mut mounts: Vec<(u8, PathBuf)> = bytes
        .split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
            let separator = fields.iter().position(|field| *field == b"-")?;
            let options = fields.get(separator + 3).copied().unwrap_or_default();
            let is_memory = options.split(|&byte| byte == b',').any(|option| option == b"memory");
            let rank = match *fields.get(separator + 1)? {
                b"cgroup2" => 0,
                b"cgroup" if is_memory => 1,
                b"cgroup" => 2,
                _ => return None,
            };
            let path = unescape_octal(fields.get(4)?);
            Some((rank, PathBuf::from(OsString::from_vec(path))))
        })
        .collect();
    mounts.sort();
    mounts.into_iter().map(|(_, path)| path).collect()
}

/// Mount points have blanks and backslashes as `\ooo`.
fn unescape_octal(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    plain
}

fn cgroup_processes(path: &Path, mounts: &[PathBuf]) -> Result<Vec<Pid>, SelectError> {
    if path.components().any(|component| component == Component::ParentDir) {
        return Err(SelectError::NoCgroup(path.to_path_buf()));
    }
    let relative = path.strip_prefix("/").unwrap_or(path);
    let as_typed = mounts.iter().any(|mount| path.starts_with(mount)).then(|| path.to_path_buf());
    let below_mounts = mounts.iter().map(|mount| mount.join(relative));
    let mut exists = false;
    for folder in as_typed.into_iter().chain(below_mounts) {
        if folder.join("cgroup.procs").exists() {
            exists = true;
            let pids = processes_below(&folder)?;
            if !pids.is_empty() {
                return Ok(pids);
            }
        }
    }
    let path = path.to_path_buf();
    Err(if exists { SelectError::EmptyCgroup(path) } else { SelectError::NoCgroup(path) })
}

fn processes_below(folder: &Path) -> Result<Vec<Pid>, SelectError> {
    let mut pids = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    let mut visited = 0;
    while let Some(folder) = folders.pop() {
        visited += 1;
        if visited > CGROUP_LIMIT {
            return Err(SelectError::ManyCgroups(folder));
        }
        let file = folder.join("cgroup.procs");
        match fs::read_to_string(&file) {
            // 0 stands for a process outside the reader's pid namespace.
            Ok(text) => pids.extend(
                text.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid != 0).map(Pid),
            ),
            // A threaded cgroup: its processes are listed in the domain above. A cgroup that was
            // removed meanwhile held none.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::ENODEV | libc::ENOENT)
                ) => {}
            Err(source) => return Err(SelectError::Unreadable { path: file, source }),
        }
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        // `file_type` does not follow links, so that no loop can be built.
        folders.extend(
            entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
    }
    Ok(pids)
}

fn read(path: &str) -> Result<Vec<u8>, SelectError> {
    fs::read(path).map_err(|source| SelectError::Unreadable { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process that waits until it is dropped.
    struct Waiting(Child);

    impl Waiting {
        fn start(program: &Path) -> Self {
            // `cat` on an open pipe: no time limit and no sleep. The echo says that it has started.
            let mut child = Command::new(program)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("cat");
            use std::io::{Read, Write};
            child.stdin.as_mut().expect("stdin").write_all(b".").expect("write");
            child.stdout.as_mut().expect("stdout").read_exact(&mut [0]).expect("echo");
            Self(child)
        }
        fn pid(&self) -> Pid {
            Pid(self.0.id())
        }
    }

    impl Drop for Waiting {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_name_longer_than_the_kernel_keeps_is_matched_whole() {
        let folder = tempfile::tempdir().expect("folder");
        let long = folder.path().join(format!("a-very-long-name-{}", std::process::id()));
        let cat = ["/bin/cat", "/usr/bin/cat"].map(Path::new).into_iter().find(|cat| cat.exists());
        // By another process: a descriptor of ours, open for writing, could leak into a child that
        // another test forks, and make the copy "busy".
        let copied = Command::new("cp").arg(cat.expect("cat")).arg(&long).status();
        assert!(copied.expect("cp").success());
        let child = Waiting::start(&long);
        let regex = format!("^a-very-long-name-{}$", std::process::id());
        let selector = Selector::Name(Regex::new(&regex).expect("regex"));
        assert_eq!(select(&selector).expect("found"), [child.pid()]);
    }

    #[test]
    fn a_cut_name_is_completed_only_from_an_executable_that_begins_like_it() {
        let regex = Regex::new("^worker-thread-number-1$").expect("regex");
        let comm = b"worker-thread-n";
        assert!(is_named(&regex, comm, || Some(b"worker-thread-number-1".to_vec())));
        assert!(!is_named(&regex, comm, || Some(b"other".to_vec())));
        assert!(!is_named(&regex, comm, || None));
        assert!(!is_named(&regex, b"worker", || Some(b"worker-thread-number-1".to_vec())));
    }

    #[test]
    fn a_regex_that_matches_nothing_is_named_with_what_to_try() {
        let regex = Regex::new("^no such process$").expect("regex");
        let error = select(&Selector::Name(regex)).expect_err("no match").to_string();
        assert!(error.contains("/^no such process$/") && error.contains("pgrep -f"), "{error}");
    }

    #[test]
    fn process_ids_are_sorted_and_taken_once() {
        let (first, second) = (Waiting::start("cat".as_ref()), Waiting::start("cat".as_ref()));
        let pids = vec![second.pid(), first.pid(), second.pid()];
        let mut expected = vec![first.pid(), second.pid()];
        expected.sort();
        assert_eq!(select(&Selector::Pids(pids)).expect("both"), expected);
    }

    #[test]
    fn ids_that_name_no_traceable_process_are_refused_each_in_its_words() {
        let fail = |pid: u32| select(&Selector::Pids(vec![Pid(pid)])).expect_err("refused");
        assert!(matches!(fail(std::process::id()), SelectError::Ourselves(_)));
        for absent in [0, i32::MAX as u32, u32::MAX] {
            assert!(matches!(fail(absent), SelectError::Process(ProcessError::Gone(_))));
        }
        // This test's thread is not the process's first.
        let tid = nix::unistd::gettid().as_raw() as u32;
        let error = fail(tid);
        assert!(matches!(error, SelectError::IsThread { .. }), "{error}");
        assert_eq!(
            error.to_string(),
            format!("{tid} is a thread of process {0}: use -p {0}", std::process::id())
        );
    }

    #[test]
    fn all_means_the_others_that_have_memory() {
        let child = Waiting::start("cat".as_ref());
        let all = select(&Selector::All).expect("some");
        assert!(all.contains(&child.pid()));
        assert!(!all.contains(&Pid::current()));
        assert!(!all.contains(&Pid(2)) || !Stat::of(Pid(2)).expect("2").kernel_thread);
    }

    #[test]
    fn cgroup_mounts_are_found_and_the_unified_one_comes_first() {
        let mounts = cgroup_mounts(
            b"25 30 0:23 / /sys rw shared:7 - sysfs sysfs rw\n\
              31 25 0:27 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n\
              32 25 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
              33 25 0:29 / /sys/fs/cgroup/uni\\040fied rw shared:9 master:1 - cgroup2 cgroup2 rw\nx\n",
        );
        let expected = ["/sys/fs/cgroup/uni fied", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids"];
        assert_eq!(mounts, expected.map(PathBuf::from));
    }

    #[test]
    fn a_cgroup_is_listed_with_everything_below_it_by_either_path() {
        let mount = tempfile::tempdir().expect("folder");
        let service = mount.path().join("system.slice/a.service");
        fs::create_dir_all(service.join("worker")).expect("folders");
        for (folder, pids) in
            [("", ""), ("system.slice", "11\n"), ("system.slice/a.service", "7\n0\n")]
        {
            fs::write(mount.path().join(folder).join("cgroup.procs"), pids).expect("file");
        }
        fs::write(service.join("worker/cgroup.procs"), "9\n8\n").expect("file");
        let mounts = [mount.path().to_path_buf()];
        let list = |path: &Path| {
            let mut pids = cgroup_processes(path, &mounts).expect("processes");
            pids.sort();
            pids
        };
        let expected = [7, 8, 9].map(Pid);
        assert_eq!(list(Path::new("/system.slice/a.service")), expected);
        assert_eq!(list(Path::new("system.slice/a.service/")), expected);
        assert_eq!(list(&service), expected);
        assert_eq!(list(Path::new("/")).len(), 4);
    }

    #[test]
    fn a_missing_and_an_empty_cgroup_are_told_apart() {
        let mount = tempfile::tempdir().expect("folder");
        fs::create_dir(mount.path().join("empty")).expect("folder");
        fs::write(mount.path().join("empty/cgroup.procs"), "").expect("file");
        let mounts = [mount.path().to_path_buf()];
        let fail = |path: &str| cgroup_processes(Path::new(path), &mounts).expect_err("no process");
        assert!(matches!(fail("/empty"), SelectError::EmptyCgroup(_)));
        assert!(matches!(fail("/missing"), SelectError::NoCgroup(_)));
        assert!(matches!(fail("/empty/../empty"), SelectError::NoCgroup(_)));
    }
}
