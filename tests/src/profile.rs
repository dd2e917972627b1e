//! What `leakbpf` reports, as its JSON states it (schema 1).

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

#[derive(Debug, Clone, Deserialize)]
pub struct Profile {
    pub schema: u32,
    pub mode: String,
    pub duration_ns: u64,
    pub processes: Vec<Process>,
    pub totals: Totals,
    pub estimate: Option<Estimate>,
    pub windows: Option<Windows>,
    pub cost: Cost,
    pub losses: BTreeMap<String, u64>,
    pub events: Vec<ReportedEvent>,
    pub sites: Vec<Site>,
    #[serde(default)]
    pub blocks: Vec<Block>,
}

/// How the numbers came to be, where they are no exact ones.
#[derive(Debug, Clone, Deserialize)]
pub struct Estimate {
    pub unit: String,
    pub one_in: Option<u64>,
    pub sample_interval_bytes: Option<u64>,
    pub confidence_percent: u64,
}

/// Windows in which every call of an allocator was counted.
#[derive(Debug, Clone, Deserialize)]
pub struct Windows {
    pub count: u32,
    pub open_ns: u64,
    pub survival_ns: u64,
    pub survivors: Totals,
}

/// What the session cost.
#[derive(Debug, Clone, Deserialize)]
pub struct Cost {
    pub max_overhead_percent: Option<f64>,
    pub overhead_percent: Option<f64>,
    pub target_cpu_ns: u64,
    pub spent_ns: u64,
    pub probe_hits: u64,
    pub agent_cpu_ns: u64,
    pub agent_peak_rss_bytes: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Process {
    pub pid: u32,
    pub start_time: u64,
    pub comm: String,
    pub exe: String,
    pub cgroup: String,
    /// How this life of the process ended, when it did.
    pub end: Option<String>,
}

/// Something that happened during the session.
#[derive(Debug, Clone, Deserialize)]
pub struct ReportedEvent {
    pub pid: Option<u32>,
    pub text: String,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Totals {
    pub live_bytes: u64,
    pub live_count: u64,
    /// Where modes estimate: what holds the truth in 95 of 100 cases.
    pub live_bytes_interval: Option<[u64; 2]>,
    pub live_count_interval: Option<[u64; 2]>,
    pub allocated_bytes: u64,
    pub allocated_count: u64,
    pub freed_bytes: u64,
    pub freed_count: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Site {
    pub pid: u32,
    /// `heap`, `mapping`, `thread_stack` or `allocator_mapping`.
    #[serde(default = "heap")]
    pub kind: String,
    #[serde(flatten)]
    pub counters: Totals,
    pub oldest_age_ns: Option<u64>,
    pub youngest_age_ns: Option<u64>,
    pub stack_outcome: String,
    pub frames: Vec<Frame>,
}

#[derive(Debug, Clone, Deserialize)]
pub struct Frame {
    pub function: Option<String>,
    pub module: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Block {
    pub pid: u32,
    /// Index into [`Profile::processes`].
    pub process: usize,
    #[serde(deserialize_with = "number_or_hexadecimal")]
    pub address: u64,
    pub size: u64,
    pub age_ns: u64,
    pub site: usize,
}

fn heap() -> String {
    "heap".to_owned()
}

fn number_or_hexadecimal<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Address {
        Number(u64),
        Text(String),
    }
    match Address::deserialize(deserializer)? {
        Address::Number(number) => Ok(number),
        Address::Text(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16)
            .map_err(|_| serde::de::Error::custom(format!("address {text:?}"))),
    }
}

impl Profile {
    /// Parses a report; fails the test when it is not schema 1.
    pub fn parse(json: &str) -> Self {
        let profile: Self = serde_json::from_str(json).unwrap_or_else(|error| {
            panic!("not a report of schema 1 ({error}):\n{}", &json[..json.len().min(2000)])
        });
        assert_eq!(profile.schema, 1);
        profile
    }

    pub fn site(&self, block: &Block) -> &Site {
        self.sites.get(block.site).expect("a block's site is in the report")
    }

    /// The blocks that an allocator handed out to the process since its last `execve`.
    pub fn heap_blocks(&self, pid: u32) -> BTreeMap<u64, Block> {
        let life = self.processes.iter().rposition(|process| process.pid == pid);
        let of_life = |block: &&Block| block.pid == pid && Some(block.process) == life;
        let mut blocks = BTreeMap::new();
        for block in self.blocks.iter().filter(of_life) {
            if self.site(block).kind == "heap" {
                let twice = blocks.insert(block.address, *block);
                assert!(twice.is_none(), "block {:#x} is reported twice", block.address);
            }
        }
        blocks
    }

    /// The process's ranges of one of the given kinds.
    pub fn ranges(&self, pid: u32, kinds: &[&str]) -> Vec<(u64, u64)> {
        let of_kind =
            |block: &&Block| block.pid == pid && kinds.contains(&self.site(block).kind.as_str());
        let blocks = self.blocks.iter().filter(of_kind);
        blocks.map(|block| (block.address, block.address + block.size)).collect()
    }

    /// Live heap bytes of a process, summed over its sites.
    pub fn live_heap_bytes(&self, pid: u32) -> u64 {
        let sites = self.sites.iter().filter(|site| site.pid == pid && site.kind == "heap");
        sites.map(|site| site.counters.live_bytes).sum()
    }

    /// Of the process that is compared: a child that allocates before its own probes are in place
    /// is counted as such (`children_seen_late`), and its parent's books are not touched.
    pub fn assert_no_losses(&self) {
        let is_loss =
            |(name, count): &(&String, &u64)| **count != 0 && *name != "children_seen_late";
        let losses: Vec<_> = self.losses.iter().filter(is_loss).collect();
        assert!(losses.is_empty(), "losses: {losses:?}");
        assert!(self.losses.len() > 3, "every known loss is named, zero too: {:?}", self.losses);
    }

    /// The report's own numbers must agree with each other, whatever they are.
    pub fn assert_consistent(&self) {
        let mut live = BTreeMap::<usize, (u64, u64)>::new();
        for block in &self.blocks {
            let (bytes, count) = live.entry(block.site).or_default();
            *bytes += block.size;
            *count += 1;
        }
        for (index, site) in self.sites.iter().enumerate() {
            let counters = site.counters;
            let (bytes, count) = live.get(&index).copied().unwrap_or_default();
            if !self.blocks.is_empty() && site.kind == "heap" {
                assert_eq!(
                    (counters.live_bytes, counters.live_count),
                    (bytes, count),
                    "site {index} against its blocks: {}",
                    site.describe()
                );
            }
            if site.kind == "heap" {
                assert_eq!(
                    counters.allocated_bytes - counters.freed_bytes,
                    counters.live_bytes,
                    "site {index}: allocated - freed = live: {}",
                    site.describe()
                );
            }
            assert!(
                counters.live_count == 0 || site.oldest_age_ns >= site.youngest_age_ns,
                "site {index}: ages"
            );
        }
    }

    /// The only site that holds blocks of this size.
    pub fn site_of_size(&self, pid: u32, size: u64) -> &Site {
        let mut sites: Vec<usize> = self
            .blocks
            .iter()
            .filter(|block| block.pid == pid && block.size == size)
            .map(|block| block.site)
            .collect();
        sites.dedup();
        assert_eq!(sites.len(), 1, "one site has blocks of {size} bytes");
        &self.sites[sites[0]]
    }

    /// Whether any live site has the function somewhere in its stack.
    pub fn names_function(&self, function: &str) -> bool {
        self.sites.iter().any(|site| site.has_function(function))
    }
}

impl Site {
    pub fn is_complete(&self) -> bool {
        self.stack_outcome == "complete"
    }

    pub fn has_function(&self, function: &str) -> bool {
        self.frames
            .iter()
            .any(|frame| frame.function.as_deref().is_some_and(|f| f.contains(function)))
    }

    /// Every function of the stack, innermost first; `?` for those without a name.
    pub fn functions(&self) -> Vec<&str> {
        self.frames.iter().map(|frame| frame.function.as_deref().unwrap_or("?")).collect()
    }

    /// Innermost frames first, in one line.
    pub fn describe(&self) -> String {
        let names = self.frames.iter().take(6).map(|frame| {
            let module = frame.module.as_deref().unwrap_or("?");
            let module = module.rsplit('/').next().unwrap_or(module);
            format!("{} ({module})", frame.function.as_deref().unwrap_or("?"))
        });
        names.collect::<Vec<_>>().join(" < ")
    }

    /// Whether the C library or its loader made the call for purposes of its own: neither of the
    /// innermost two frames (the allocator and its caller) is the program's.
    pub fn is_the_runtimes_own(&self) -> bool {
        let runtime = |frame: &Frame| {
            let module = frame.module.as_deref().unwrap_or("");
            let file = module.rsplit('/').next().unwrap_or(module);
            ["ld-", "libc.", "libc-", "libpthread", "ld.so", "libdl"]
                .iter()
                .any(|prefix| file.starts_with(prefix))
        };
        self.frames.len() >= 2 && self.frames.iter().take(2).all(runtime)
    }
}
