use std::{
    io::{Read as _, Write as _},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use proptest::prelude::*;

use super::*;

const AFTER_COMM: &str = " S 7 8 9 0 -1 4194304 10 11 12 13 140 150 16 17 20 0 1 0 220022 1000 2 3";

#[test]
fn a_name_with_parentheses_does_not_shift_the_fields() {
    for comm in ["bash", "a b", ") (", "x) S 1 2 (y", "(((", ")))", "two\nlines", ""] {
        let stat = Stat::parse(format!("4321 ({comm}){AFTER_COMM}").as_bytes()).expect(comm);
        assert_eq!(stat.comm, comm.as_bytes());
        assert_eq!((stat.state, stat.parent), ('S', Pid(7)));
        assert_eq!((stat.user_time_ticks, stat.system_time_ticks), (140, 150));
        assert_eq!(stat.start_time, 220_022);
        assert!(!stat.kernel_thread);
    }
}

#[test]
fn a_stat_that_ends_early_is_refused() {
    for text in ["", "1", "1 (a", "1 a) S", "1 (a) S 1 2", ")(", "1 (a)"] {
        assert_eq!(Stat::parse(text.as_bytes()), None, "{text}");
    }
}

#[test]
fn a_kernel_thread_is_told_by_its_flag() {
    let text = "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 5 0";
    assert!(Stat::parse(text.as_bytes()).expect("well-formed").kernel_thread);
}

#[test]
fn a_real_zombie_is_told_from_a_living_process() {
    let mut child = Command::new("true").stdout(Stdio::piped()).spawn().expect("true");
    let pid = Pid(child.id());
    // waitid with WNOWAIT returns when it is dead and leaves it a zombie.
    let raw = nix::sys::wait::Id::Pid(nix::unistd::Pid::from_raw(child.id() as i32));
    let flags = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
    nix::sys::wait::waitid(raw, flags).expect("waitid");
    assert!(Stat::of(pid).expect("still listed").is_zombie());
    child.wait().expect("wait");
    assert!(matches!(Stat::of(pid), Err(ProcessError::Gone(_))));
    assert!(!Stat::of(Pid::current()).expect("ourselves").is_zombie());
}

#[test]
fn the_lines_of_status_are_read_whatever_stands_between() {
    let status = Status::parse(
        b"Name:\tSeccomp:\\n2\nUmask:\t0022\nTgid:\t77\nUid:\t1000\t0\t0\t0\nNSpid:\t77\t5\t1\n\
          VmHWM:\t    1624 kB\nRssAnon:\t     112 kB\nCapEff:\t000001fffeffffff\nSeccomp:\t2\n\
          x86_Thread_features:\tshstk wrss \n\xff\xfe: 3\nnonsense\n",
    );
    assert_eq!(status.tgid, Some(77));
    assert_eq!(status.effective_uid, Some(0));
    assert_eq!(status.namespace_pids, [77, 5, 1]);
    assert_eq!(status.peak_resident_bytes, Some(1624 * 1024));
    assert_eq!(status.anonymous_resident_bytes, Some(112 * 1024));
    assert_eq!(status.effective_capabilities, 0x01ff_feff_ffff);
    assert_eq!(status.seccomp, SeccompMode::Filter);
    assert!(status.shadow_stack);
}

#[test]
fn a_process_rests_until_it_has_run() {
    let rests = |state: char, threads: u32| {
        let text = format!("7 (a) {state} 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 {threads} 0 100");
        Stat::parse(text.as_bytes()).expect("complete").rests()
    };
    assert!(rests('S', 1) && rests('T', 1) && rests('t', 1));
    assert!(!rests('R', 1) && !rests('Z', 1) && !rests('D', 1));
    assert!(!rests('S', 2), "another one may run");
    assert_eq!(runs(b"21337000 118000 42\n"), Some(42));
    assert_eq!(runs(b"0 0 0\n"), None, "nobody counts");
    assert_eq!(runs(b"21337000"), None);
    // A child that waits for its input.
    let mut cat = Command::new("cat");
    cat.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut cat = cat.spawn().expect("cat starts");
    let pid = Pid(cat.id());
    let until_it_rests = |other_than: Option<u64>| {
        for _ in 0..10_000 {
            let now = rests_since(pid);
            if now.is_some() && now != other_than {
                return now;
            }
            thread::sleep(Duration::from_millis(1));
        }
        panic!("it does not come to rest");
    };
    let (mut input, mut output) =
        (cat.stdin.take().expect("piped"), cat.stdout.take().expect("piped"));
    // Once it has copied something it does nothing but wait.
    let mut byte = [0];
    input.write_all(b"x").expect("it reads");
    output.read_exact(&mut byte).expect("it copies");
    let before = until_it_rests(None);
    assert_eq!(until_it_rests(None), before);
    input.write_all(b"y").expect("it reads");
    output.read_exact(&mut byte).expect("it copies");
    until_it_rests(before);
    drop(input);
    cat.wait().expect("it ends");
}

#[test]
fn a_locked_but_unused_shadow_stack_is_none() {
    let status = Status::parse(b"x86_Thread_features:\t\nx86_Thread_features_locked:\tshstk\n");
    assert!(!status.shadow_stack);
}

#[test]
fn the_own_identity_is_complete() {
    let identity = Identity::of(Pid::current()).expect("ourselves");
    assert_eq!(identity.exe, std::env::current_exe().expect("exe").to_string_lossy());
    assert!(identity.start_time > 0);
    assert!(identity.cgroup.starts_with('/'));
    assert!(!identity.cmdline.is_empty() && !identity.cmdline.contains('\0'));
    let kind = ElfKind::of(Pid::current()).expect("readable").expect("ELF");
    assert_eq!(usize::from(kind.bits), usize::BITS as usize);
}

#[test]
fn arguments_are_separated_by_spaces_and_trailing_zeros_dropped() {
    assert_eq!(join_arguments(b"a\0b c\0\0d\0\0\0"), "a b c  d");
    assert_eq!(join_arguments(b"nginx: worker process"), "nginx: worker process");
    assert_eq!(join_arguments(b""), "");
    assert_eq!(join_arguments(b"\0\0"), "");
}

#[test]
fn the_cgroup_that_says_most_is_taken() {
    assert_eq!(cgroup_path("0::/system.slice/a.service\n"), "/system.slice/a.service");
    assert_eq!(cgroup_path("9:name=systemd:/s\n4:cpu,memory:/m\n0::/\n"), "/m");
    assert_eq!(cgroup_path("9:name=systemd:/s\n4:memory:/\n0::/\n"), "/s");
    assert_eq!(cgroup_path("0::/a:b\n"), "/a:b");
    assert_eq!(cgroup_path(""), "/");
}

#[test]
fn the_elf_header_tells_word_size_and_machine() {
    let mut header = [0; 20];
    header[..6].copy_from_slice(b"\x7fELF\x01\x01");
    header[18] = 3;
    assert_eq!(ElfKind::parse(&header), Some(ElfKind { bits: 32, machine: 3 }));
    assert_eq!(ElfKind::parse(&header[..19]), None);
    assert_eq!(ElfKind::parse(b"#!/bin/sh\n# some more"), None);
}

proptest! {
    #[test]
    fn no_input_makes_the_parsers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Stat::parse(&bytes);
        let _ = Status::parse(&bytes);
        let _ = join_arguments(&bytes);
        let _ = cgroup_path(&String::from_utf8_lossy(&bytes));
        let _ = ElfKind::parse(&bytes);
    }
}
