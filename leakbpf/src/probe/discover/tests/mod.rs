use super::*;

/// Plans of the allocators that Debian ships.
mod debian;
/// Plans of small executables that are made here.
mod made;

fn read(path: &str) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| {
        panic!(
            "cannot read {path}: {error}; run: apt-get install libjemalloc2 \
             libtcmalloc-minimal4 libmimalloc2.0 musl libstdc++6"
        )
    })
}

fn plan_of(data: &[u8]) -> FilePlan {
    let file = ElfFile::parse(data).expect("a real library");
    discover(&file, None)
}

fn probe<'a>(plan: &'a FilePlan, name: &str) -> &'a PlannedProbe {
    plan.probes
        .iter()
        .find(|probe| probe.function == name || probe.aliases.iter().any(|alias| alias == name))
        .unwrap_or_else(|| panic!("{name} is not probed: {:?}", reason(plan, name)))
}

fn reason<'a>(plan: &'a FilePlan, name: &str) -> Option<&'a SkipReason> {
    plan.skipped.iter().find(|skipped| skipped.function == name).map(|skipped| &skipped.reason)
}
