//! Probes: a program linked to many instructions of a file at once, or to one perf event: on an
//! instruction of a file, on a tracepoint or on the page faults of a CPU.
//!
//! aya can do the latter too, but it loads a test program before each attach, takes kernels whose
//! release it cannot parse for old ones, and needs tracefs mounted.

use std::{
    ffi::{CStr, CString},
    io,
    num::NonZeroU32,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    sync::OnceLock,
};

/// `struct perf_event_attr` as far as uprobes use it (`PERF_ATTR_SIZE_VER1`, 72 bytes).
#[repr(C)]
#[derive(Default)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    uprobe_path: u64,
    probe_offset: u64,
}

const _: () = assert!(size_of::<PerfEventAttr>() == 72);

impl PerfEventAttr {
    fn every_hit() -> Self {
        Self {
            size: size_of::<Self>() as u32,
            sample_period: 1,
            wakeup_events: 1,
            ..Self::default()
        }
    }
}

/// `union bpf_attr` for `BPF_LINK_CREATE` on a perf event.
#[repr(C)]
#[derive(Default)]
struct LinkCreateArgs {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    bpf_cookie: u64,
}

const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PERF_EVENT: u32 = 41;
const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_long = 8;

/// Placed probes. The kernel takes their breakpoints away when the last descriptor of the link is
/// closed, also when the agent is killed.
#[derive(Debug)]
pub struct Link {
    _link: OwnedFd,
    many: bool,
}

impl Link {
    /// Whether it holds many instructions, not a perf event on one.
    pub fn is_to_many(&self) -> bool {
        self.many
    }

    /// Whether others can be closed at the same time, so that one grace period of the kernel does
    /// for all. Those of perf events wait for each other (`event_mutex`).
    pub fn closes_with_others(&self) -> bool {
        self.many
    }
}

/// An instruction to be probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    pub file_offset: u64,
    /// What the program is told there.
    pub cookie: u64,
}

/// `union bpf_attr` for `BPF_LINK_CREATE` on many instructions of a file.
#[repr(C)]
#[derive(Default)]
struct MultiLinkArgs {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    path: u64,
    offsets: u64,
    ref_ctr_offsets: u64,
    cookies: u64,
    cnt: u32,
    multi_flags: u32,
    pid: u32,
    pad: u32,
}

const _: () = assert!(size_of::<MultiLinkArgs>() == 64);

/// What a program at many places is for; has to be declared when it is loaded, too. Values of
/// `enum bpf_attach_type`.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// To run at a place, or where a function returns (`BPF_TRACE_UPROBE_MULTI`).
    Place = 48,
    /// To run at a function's entry and, if it says so there, where it returns
    /// (`BPF_TRACE_UPROBE_SESSION`, Linux 6.13).
    Call = 57,
}

const BPF_F_UPROBE_MULTI_RETURN: u32 = 1;

/// As [`attach`], at many instructions at once, of a program that is loaded for that. `pid` is the id of a process, not of a thread, and
/// of one whose first thread lives: the kernel looks for its memory there.
pub fn attach_multi(
    program: BorrowedFd<'_>,
    (purpose, at_return): (Use, bool),
    file: &Path,
    sites: &[Site],
    pid: Option<NonZeroU32>,
) -> io::Result<Link> {
    let path = CString::new(file.as_os_str().as_bytes())?;
    let pid = pid.map_or(0, NonZeroU32::get);
    Ok(Link { _link: link_multi(program, (purpose, at_return), &path, sites, pid)?, many: true })
}

fn link_multi(
    program: BorrowedFd<'_>,
    (purpose, at_return): (Use, bool),
    path: &CStr,
    sites: &[Site],
    pid: u32,
) -> io::Result<OwnedFd> {
    let offsets: Vec<u64> = sites.iter().map(|site| site.file_offset).collect();
    let cookies: Vec<u64> = sites.iter().map(|site| site.cookie).collect();
    let args = MultiLinkArgs {
        prog_fd: program.as_raw_fd() as u32,
        attach_type: purpose as u32,
        path: path.as_ptr() as u64,
        offsets: offsets.as_ptr() as u64,
        cookies: cookies.as_ptr() as u64,
        cnt: sites.len() as u32,
        multi_flags: if at_return { BPF_F_UPROBE_MULTI_RETURN } else { 0 },
        pid,
        ..MultiLinkArgs::default()
    };
    // SAFETY: `args` is the command's part of `union bpf_attr`, which it does not write to; what it
    // points to lives until the call returns.
    owned(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_CREATE,
            std::ptr::from_ref(&args),
            size_of::<MultiLinkArgs>(),
        )
    })
}

/// Whether links to many instructions can be limited to a process. Kernels before 6.10 meant one
/// thread (46ba0e49b642, "bpf: fix multi-uprobe PID filtering logic", also in 6.6.33 and 6.9.4);
/// since then they refuse a negative id before they look at the file.
pub fn multi_is_by_process(program: BorrowedFd<'_>) -> bool {
    let site = [Site { file_offset: 1, cookie: 0 }];
    let error = link_multi(program, (Use::Place, false), c"/", &site, u32::MAX);
    error.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
}

/// Whether a program of [`Use::Call`] can be linked. Kernels before 6.13 load it all the same; those that
/// know the link find that `/` is no file to probe (kernel/trace/bpf_trace.c, `bpf_uprobe_multi_link_attach`).
pub fn multi_has_calls(program: BorrowedFd<'_>) -> bool {
    let site = [Site { file_offset: 1, cookie: 0 }];
    let error = link_multi(program, (Use::Call, false), c"/", &site, 0);
    error.is_err_and(|error| error.raw_os_error() == Some(libc::EBADF))
}

/// Number of the uprobe PMU.
fn uprobe_type() -> io::Result<u32> {
    static TYPE: OnceLock<u32> = OnceLock::new();
    if let Some(known) = TYPE.get() {
        return Ok(*known);
    }
    let text = std::fs::read_to_string("/sys/bus/event_source/devices/uprobe/type")?;
    let number = text.trim().parse().map_err(io::Error::other)?;
    Ok(*TYPE.get_or_init(|| number))
}

/// Places a probe in `file`. With `at_return`, the program runs when the function returns, and the
/// site is where its return address lies on top of the stack. Without `pid`, every process that
/// maps the file gets the probe.
pub fn attach(
    program: BorrowedFd<'_>,
    at_return: bool,
    file: &Path,
    site: Site,
    pid: Option<NonZeroU32>,
) -> io::Result<Link> {
    let path = CString::new(file.as_os_str().as_bytes())?;
    let attr = PerfEventAttr {
        kind: uprobe_type()?,
        // Bit 0 is `retprobe` (/sys/bus/event_source/devices/uprobe/format/retprobe).
        config: u64::from(at_return),
        uprobe_path: path.as_ptr() as u64,
        probe_offset: site.file_offset,
        ..PerfEventAttr::every_hit()
    };
    // SAFETY: the path that `attr` points to lives until the call returns.
    link(program, unsafe { open(&attr, pid, FIRST_CPU) }?, site.cookie)
}

/// Runs `program` at every event of a tracepoint, on all CPUs. `id` stands in its format file.
pub fn attach_tracepoint(program: BorrowedFd<'_>, id: u64) -> io::Result<Link> {
    let attr =
        PerfEventAttr { kind: PERF_TYPE_TRACEPOINT, config: id, ..PerfEventAttr::every_hit() };
    // SAFETY: `attr` holds no pointers.
    link(program, unsafe { open(&attr, None, FIRST_CPU) }?, 0)
}

/// A system-wide probe or tracepoint belongs to one CPU, but its program runs on all.
const FIRST_CPU: i64 = 0;

/// # Safety
///
/// Pointers in `attr` are valid until the call returns.
unsafe fn open(attr: &PerfEventAttr, pid: Option<NonZeroU32>, cpu: i64) -> io::Result<OwnedFd> {
    // Without a process, the event is of all of them; then it needs a CPU.
    let (pid, cpu) = match pid {
        Some(pid) => (i64::from(pid.get()), -1),
        None => (-1, cpu),
    };
    // SAFETY: `attr` lives until the call returns, and so does what it points to.
    owned(unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            std::ptr::from_ref(attr),
            pid,
            cpu,
            -1,
            PERF_FLAG_FD_CLOEXEC,
        )
    })
}

fn link(program: BorrowedFd<'_>, event: OwnedFd, cookie: u64) -> io::Result<Link> {
    let mut args = LinkCreateArgs {
        prog_fd: program.as_raw_fd() as u32,
        target_fd: event.as_raw_fd() as u32,
        attach_type: BPF_PERF_EVENT,
        flags: 0,
        bpf_cookie: cookie,
    };
    // SAFETY: `args` is the command's part of `union bpf_attr` and holds no pointers.
    let link = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_CREATE,
            std::ptr::from_mut(&mut args),
            size_of::<LinkCreateArgs>(),
        )
    };
    // The link keeps the event; its own descriptor is closed here, or the breakpoint would outlive
    // the link.
    Ok(Link { _link: owned(link)?, many: false })
}

pub fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}
