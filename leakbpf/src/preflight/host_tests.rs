use super::*;
use crate::preflight::Report;

const ALL_CAPABILITIES: u64 = 0x1ff_ffff_ffff;

fn format_file(fields: &[&str]) -> Vec<u8> {
    let mut text = String::from("name: x\nID: 1\n");
    for (index, field) in fields.iter().enumerate() {
        text += &format!("\tfield:int {field};\toffset:{};\tsize:4;\tsigned:1;\n", 8 + 4 * index);
    }
    text.into_bytes()
}

pub fn good_host() -> HostFacts {
    HostFacts {
        kernel_release: "6.18.4".into(),
        architecture: "x86_64".into(),
        effective_uid: 0,
        effective_capabilities: ALL_CAPABILITIES,
        pid_namespace: Some(INITIAL_PID_NAMESPACE.into()),
        user_namespace: Some(INITIAL_USER_NAMESPACE.into()),
        has_bpf: true,
        has_btf: true,
        btf_has_attach_cookie: false,
        uprobe_event_type: Some(8),
        perf_event_paranoid: Some(2),
        lockdown: Some("[none] integrity confidentiality".into()),
        tracepoints: TRACEPOINTS
            .iter()
            .map(|(name, fields)| (*name, Ok(format_file(fields))))
            .collect(),
        seccomp_and_return_probes: SeccompAndReturnProbes::Safe,
    }
}

/// The checks that are not ok after one change to a good host.
fn complaints(change: impl FnOnce(&mut HostFacts)) -> Vec<Check> {
    let mut host = good_host();
    change(&mut host);
    // Another way to count has a test of its own.
    let of_exact = |check: &Check| check.name != "page faults";
    let complaint = |check: &Check| check.verdict != Verdict::Ok && of_exact(check);
    judge(&host).into_iter().filter(complaint).collect()
}

fn complaint(change: impl FnOnce(&mut HostFacts)) -> Check {
    let mut checks = complaints(change);
    assert_eq!(checks.len(), 1, "{checks:?}");
    let check = checks.remove(0);
    assert!(check.remedy.is_some(), "{check:?}");
    check
}

#[test]
fn a_good_host_has_no_complaint() {
    assert_eq!(complaints(|_| {}), []);
}

#[test]
fn a_kernel_without_attach_cookies_is_refused_in_one_line() {
    let check = complaint(|host| host.kernel_release = "5.10.262".into());
    assert_eq!((check.name, check.verdict), ("kernel", Verdict::Fail));
    let refusal = Report { checks: vec![check] }.refuse_failures().expect_err("refused");
    assert_eq!(
        refusal.to_string(),
        "kernel: 5.10.262 is older than 5.15.0: probes cannot carry attach cookies: use a kernel from 5.15.0 on"
    );
}

#[test]
fn an_old_number_with_the_feature_carried_back_is_taken() {
    let change = |host: &mut HostFacts| {
        host.kernel_release = "5.14.0-427.el9.x86_64".into();
        host.btf_has_attach_cookie = true;
    };
    assert_eq!(complaints(change), []);
}

#[test]
fn each_missing_capability_is_named() {
    let check = complaint(|host| {
        host.effective_uid = 1000;
        host.effective_capabilities = 0;
    });
    assert_eq!(check.verdict, Verdict::Fail);
    assert_eq!(check.found, "uid 1000 without CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE");
    assert_eq!(check.remedy.as_deref(), Some("run `sudo leakbpf …`"));

    let check = complaint(|host| host.effective_capabilities &= !(1 << CAP_SYS_PTRACE));
    assert_eq!(check.found, "uid 0 without CAP_SYS_PTRACE");
    assert!(check.remedy.expect("a remedy").contains("container"));
}

#[test]
fn the_capabilities_split_from_sys_admin_are_enough_with_a_warning() {
    let check = complaint(|host| {
        host.effective_capabilities = 1 << CAP_BPF | 1 << CAP_PERFMON | 1 << CAP_SYS_PTRACE;
    });
    assert_eq!(check.verdict, Verdict::Warn);
    let change = |host: &mut HostFacts| {
        host.effective_capabilities = 1 << CAP_SYS_ADMIN | 1 << CAP_SYS_PTRACE;
    };
    assert_eq!(complaints(change), []);
}

#[test]
fn root_of_a_user_namespace_is_not_root() {
    let check = complaint(|host| host.user_namespace = Some("user:[4026532000]".into()));
    assert_eq!((check.name, check.verdict), ("rights", Verdict::Fail));
}

#[test]
fn what_makes_counting_impossible_fails() {
    type Change = fn(&mut HostFacts);
    let changes: [(&str, Change); 6] = [
        ("architecture", |host| host.architecture = "aarch64".into()),
        ("pid namespace", |host| host.pid_namespace = Some("pid:[4026532001]".into())),
        ("bpf", |host| host.has_bpf = false),
        ("uprobes", |host| host.uprobe_event_type = None),
        ("uprobes", |host| host.perf_event_paranoid = None),
        ("lockdown", |host| host.lockdown = Some("none integrity [confidentiality]".into())),
    ];
    for (name, change) in changes {
        let check = complaint(change);
        assert_eq!((check.name, check.verdict), (name, Verdict::Fail));
    }
}

#[test]
fn integrity_lockdown_and_a_missing_one_are_no_obstacle() {
    assert_eq!(complaints(|host| host.lockdown = None), []);
    let change =
        |host: &mut HostFacts| host.lockdown = Some("none [integrity] confidentiality".into());
    assert_eq!(complaints(change), []);
}

#[test]
fn without_btf_only_mappings_are_lost() {
    let check = complaint(|host| host.has_btf = false);
    assert_eq!((check.name, check.verdict), ("btf", Verdict::Warn));
}

fn unread(reason: io::ErrorKind) -> Result<Vec<u8>, UnreadFile> {
    Err(UnreadFile { path: "/sys/kernel/tracing/events/x/format".into(), reason })
}

#[test]
fn tracepoints_are_judged_by_their_fields() {
    let check = complaint(|host| host.tracepoints[0].1 = Ok(format_file(&["pid"])));
    assert_eq!((check.name, check.verdict), ("task/task_newtask", Verdict::Fail));
    assert_eq!(check.found, "tracepoint x has no field clone_flags");
    let check = complaint(|host| host.tracepoints[2].1 = unread(io::ErrorKind::NotFound));
    assert_eq!((check.name, check.verdict), ("sched/sched_process_exit", Verdict::Fail));
    assert!(check.found.contains("/format"), "{}", check.found);
    assert!(check.remedy.expect("a remedy").contains("mount -t tracefs"));
    let check = complaint(|host| host.tracepoints[2].1 = unread(io::ErrorKind::PermissionDenied));
    assert!(check.remedy.expect("a remedy").contains("sudo"));
}

#[test]
fn the_kernels_own_answer_outweighs_its_number() {
    let crashes = |release: &str, answer| {
        let mut host = good_host();
        host.kernel_release = release.into();
        host.seccomp_and_return_probes = answer;
        host.seccomp_crashes_return_probes()
    };
    use SeccompAndReturnProbes::{Crash, Safe, Untried};
    assert!(!crashes("6.11.0-29-generic", Safe), "repaired by the distribution");
    assert!(crashes("5.14.0", Crash), "the system call carried back without the repair");
    assert!(crashes("6.12.13", Untried));
    assert!(!crashes("6.12.14", Untried));
    let check = complaint(|host| host.seccomp_and_return_probes = Crash);
    assert_eq!(check.verdict, Verdict::Warn);
}

#[test]
fn looking_at_pages_needs_perf_events_types_and_a_kernel_from_6_1_on() {
    let check = |change: fn(&mut HostFacts)| {
        let mut host = good_host();
        change(&mut host);
        let verdict = |checks: Vec<Check>| {
            checks.into_iter().find(|check| check.name == "page faults").map(|check| check.verdict)
        };
        // It is no obstacle to counting every block.
        (verdict(judge(&host)), verdict(judge_for_pages(&host)))
    };
    assert_eq!(check(|_| {}), (Some(Verdict::Ok), Some(Verdict::Ok)));
    let refused = (Some(Verdict::Warn), Some(Verdict::Fail));
    assert_eq!(check(|host| host.perf_event_paranoid = None), refused);
    assert_eq!(check(|host| host.kernel_release = "6.0.19".into()), refused);
    assert_eq!(check(|host| host.has_btf = false), refused);
    let without_uprobes = judge_for_pages(&HostFacts { uprobe_event_type: None, ..good_host() });
    assert!(without_uprobes.iter().all(|check| check.verdict == Verdict::Ok));
}

#[test]
fn probes_for_all_processes_are_refused_where_they_may_kill_one() {
    let failed = |host: &HostFacts| {
        let checks = judge_for_shared_probes(host);
        checks.into_iter().any(|check| check.name == "seccomp" && check.verdict == Verdict::Fail)
    };
    let mut host = good_host();
    assert!(!failed(&host));
    host.seccomp_and_return_probes = SeccompAndReturnProbes::Crash;
    assert!(failed(&host));
    let single = judge(&host).into_iter().all(|check| check.verdict != Verdict::Fail);
    assert!(single, "a process without a filter can be watched");
}
