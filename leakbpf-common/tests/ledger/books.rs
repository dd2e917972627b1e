//! The books of a test: a `HashMap` with a limit.

use std::collections::{BTreeMap, HashMap};

use leakbpf_common::{
    abi::{Block, BlockKey, Loss, Owner, SiteKey, StackId, Tally},
    ledger::{self, Books, Call, NotPut, Put, Return, ThreadState},
    sampling::{self, Sampling, Weight},
};

/// What went through a site.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Site {
    pub allocated: (u64, u64),
    pub freed: (u64, u64),
}

#[derive(Debug, Default)]
pub struct HostBooks {
    pub blocks: HashMap<BlockKey, Block>,
    pub capacity: usize,
    pub sites: BTreeMap<SiteKey, Site>,
    pub losses: BTreeMap<Loss, u64>,
    pub tallies: BTreeMap<Tally, u64>,
    /// Words of the program's memory; others cannot be read.
    pub memory: HashMap<u64, u64>,
    pub sampling: Sampling,
    /// Allocations that were not released, by address: as the kernel side's filter counts them.
    pub recorded: BTreeMap<u64, i64>,
    /// Sites count blocks in units of 2^-`COUNT_SHIFT`.
    pub in_fractions: bool,
    pub seed: u64,
    pub until_sample: u64,
}

/// A call begins, as the kernel side does it where mappings are told of.
pub fn begin(thread: &mut ThreadState, books: &mut HostBooks, call: &Call) -> Return {
    let chosen = ledger::choose(books, call);
    ledger::enter(thread, books, call, chosen)
}

impl HostBooks {
    pub fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    pub fn loss(&self, loss: Loss) -> u64 {
        self.losses.get(&loss).copied().unwrap_or_default()
    }

    pub fn count(&self, tally: Tally) -> u64 {
        self.tallies.get(&tally).copied().unwrap_or_default()
    }

    /// Bytes and count that the counters of the sites call live.
    pub fn live(&self) -> BTreeMap<SiteKey, (u64, u64)> {
        let live = |site: &Site| {
            let [bytes, count] =
                [(site.allocated.0, site.freed.0), (site.allocated.1, site.freed.1)].map(
                    |(allocated, freed)| {
                        assert!(freed <= allocated, "more was freed than allocated: {site:?}");
                        allocated - freed
                    },
                );
            (bytes, count)
        };
        let sites = self.sites.iter().map(|(&key, site)| (key, live(site)));
        sites.filter(|&(_, live)| live != (0, 0)).collect()
    }

    /// What is in the books, or held aside, is what was allocated and not released, address by
    /// address. Nothing may be in flight.
    pub fn assert_filter_is_exact(&self) {
        let mut blocks = BTreeMap::<u64, i64>::new();
        for key in self.blocks.keys() {
            *blocks.entry(key.address).or_default() += 1;
        }
        let recorded: BTreeMap<u64, i64> =
            self.recorded.iter().map(|(&at, &count)| (at, count)).filter(|it| it.1 != 0).collect();
        assert_eq!(recorded, blocks);
    }

    pub fn any_number(&mut self) -> u32 {
        // SplitMix64 (Steele, Lea, Flood 2014).
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.seed;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ word >> 31) as u32
    }

    /// What a block adds to its site.
    pub fn weight(&self, block: &Block) -> Weight {
        if self.in_fractions {
            self.sampling.weight(block.size_bytes, block.born_ns)
        } else {
            Weight { bytes: block.size_bytes, count: 1 }
        }
    }

    fn site(&mut self, owner: Owner, stack: StackId) -> &mut Site {
        self.sites.entry(SiteKey { owner, stack }).or_default()
    }
}

impl Books for HostBooks {
    fn put(&mut self, key: &BlockKey, block: &Block) -> Put {
        if !self.blocks.contains_key(key) && self.blocks.len() >= self.capacity {
            return Put::Full;
        }
        match self.blocks.insert(*key, *block) {
            Some(replaced) => Put::Replaced(replaced),
            None => Put::New,
        }
    }

    fn put_new(&mut self, key: &BlockKey, block: &Block) -> Result<(), NotPut> {
        if self.blocks.contains_key(key) {
            return Err(NotPut::Occupied);
        }
        match self.put(key, block) {
            Put::Full => Err(NotPut::Full),
            Put::New | Put::Replaced(_) => Ok(()),
        }
    }

    fn take(&mut self, key: &BlockKey) -> Option<Block> {
        self.blocks.remove(key)
    }

    fn allocated(&mut self, key: &BlockKey, block: &Block) {
        *self.recorded.entry(key.address).or_default() += 1;
        let weight = self.weight(block);
        let (bytes, count) = &mut self.site(key.owner, block.stack).allocated;
        *bytes += weight.bytes;
        *count += weight.count;
    }

    fn freed(&mut self, key: &BlockKey, block: &Block) {
        *self.recorded.entry(key.address).or_default() -= 1;
        let weight = self.weight(block);
        let (bytes, count) = &mut self.site(key.owner, block.stack).freed;
        *bytes += weight.bytes;
        *count += weight.count;
    }

    fn lost(&mut self, loss: Loss) {
        *self.losses.entry(loss).or_default() += 1;
    }

    fn tally(&mut self, tally: Tally) {
        *self.tallies.entry(tally).or_default() += 1;
    }

    fn sampling(&self) -> Sampling {
        self.sampling
    }

    fn choose(&mut self, size_bytes: u64, interval_bytes: u64) -> bool {
        let mut until = self.until_sample;
        let random = || self.any_number();
        let chosen = sampling::choose(&mut until, size_bytes, interval_bytes, random);
        self.until_sample = until;
        chosen
    }

    fn read_word(&mut self, address: u64) -> Option<u64> {
        self.memory.get(&address).copied()
    }
}
