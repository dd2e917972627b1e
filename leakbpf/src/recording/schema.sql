CREATE TABLE meta (
  -- One fact of the session a row: started_unix_ns, kernel, hostname, leakbpf (version); and, as of
  -- the last snapshot: mode, one_in (mode pages), sample_interval_bytes and sampled_since_ns
  -- (mode sample; rows of a mode that has ended stay);
  -- max_overhead_ppm (the limit), target_cpu_ns, probe_hits, spent_ns (what they cost of it),
  -- agent_cpu_ns, agent_peak_rss_bytes; page_interval (one page in so many was looked at, in
  -- any mode); windows (how many), windows_open_ns, windows_early_ns (their
  -- first halves), survived_bytes_variance, survived_count_variance (of all survivors).
  key TEXT PRIMARY KEY NOT NULL,
  value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE process (
  -- One life of a process between two execve calls.
  id INTEGER PRIMARY KEY,
  pid INTEGER NOT NULL,
  parent_pid INTEGER,
  start_time INTEGER NOT NULL, -- clock ticks after boot, field 22 of /proc/PID/stat
  comm TEXT NOT NULL,
  exe TEXT NOT NULL,
  cmdline TEXT NOT NULL,
  cgroup TEXT NOT NULL,
  ended TEXT -- how, when it ended while it was watched
);
CREATE TABLE module (
  -- A file that code was loaded from, as the target's mount namespace names it.
  id INTEGER PRIMARY KEY,
  path TEXT NOT NULL,
  build_id TEXT, -- GNU build id, hexadecimal
  -- Lowest executable mapping seen; addresses are 64-bit patterns, as everywhere in this file.
  start_address INTEGER,
  end_address INTEGER,
  file_offset INTEGER
);
CREATE TABLE symbol (
  -- The names of a program counter: position 0 is the most inlined function, the last one is the
  -- function that the machine code belongs to.
  list_id INTEGER NOT NULL,
  position INTEGER NOT NULL,
  function TEXT NOT NULL, -- demangled
  file TEXT,
  line INTEGER,
  inlined INTEGER NOT NULL, -- 1: into the next position
  PRIMARY KEY (list_id, position)
) WITHOUT ROWID;
CREATE TABLE frame (
  id INTEGER PRIMARY KEY,
  address INTEGER NOT NULL, -- in the process
  module_id INTEGER REFERENCES module (id),
  offset INTEGER NOT NULL, -- in the module: the address that the file itself states
  symbol_list_id INTEGER -- symbol.list_id; NULL when nothing names the address
);
CREATE TABLE stack (
  id INTEGER PRIMARY KEY,
  outcome TEXT NOT NULL -- complete, or why callers are missing
);
CREATE TABLE stack_frame (
  stack_id INTEGER NOT NULL REFERENCES stack (id),
  position INTEGER NOT NULL, -- 0 is the innermost
  frame_id INTEGER NOT NULL REFERENCES frame (id),
  PRIMARY KEY (stack_id, position)
) WITHOUT ROWID;
CREATE TABLE site (
  -- A stack of a process that obtained memory.
  id INTEGER PRIMARY KEY,
  process_id INTEGER NOT NULL REFERENCES process (id),
  stack_id INTEGER NOT NULL REFERENCES stack (id),
  kind TEXT NOT NULL -- heap, mapping, thread_stack, allocator_mapping, resident, survivor
);
CREATE TABLE snapshot (
  id INTEGER PRIMARY KEY,
  at_ns INTEGER NOT NULL, -- after the session began, as are all times in this file
  final INTEGER NOT NULL -- 1: the session ended in an orderly way, and the table block is its end
);
CREATE TABLE site_counters (
  -- Only what changed since the snapshot before: the state of a site at snapshot N is its row with
  -- the highest snapshot_id <= N. All counters NULL: the site is no longer listed.
  site_id INTEGER NOT NULL REFERENCES site (id),
  snapshot_id INTEGER NOT NULL REFERENCES snapshot (id),
  live_bytes INTEGER,
  live_count INTEGER,
  allocated_bytes INTEGER, -- since the session began
  allocated_count INTEGER,
  freed_bytes INTEGER,
  freed_count INTEGER,
  oldest_born_ns INTEGER, -- of the live blocks; NULL when none is live
  youngest_born_ns INTEGER,
  -- Of what is live, the part that is estimated from samples; NULL when there is none.
  estimated_bytes INTEGER,
  estimated_count INTEGER, -- in units of 2^-16
  bytes_variance REAL,
  count_variance REAL,
  PRIMARY KEY (site_id, snapshot_id)
) WITHOUT ROWID;
CREATE TABLE loss (
  -- What could not be seen; only what changed, as in site_counters.
  name TEXT NOT NULL,
  snapshot_id INTEGER NOT NULL REFERENCES snapshot (id),
  count INTEGER NOT NULL,
  PRIMARY KEY (name, snapshot_id)
) WITHOUT ROWID;
CREATE TABLE event (
  id INTEGER PRIMARY KEY,
  at_ns INTEGER NOT NULL,
  pid INTEGER,
  text TEXT NOT NULL
);
CREATE TABLE block (
  -- Every outstanding block and mapping of the final snapshot.
  site_id INTEGER NOT NULL REFERENCES site (id),
  address INTEGER NOT NULL,
  size_bytes INTEGER NOT NULL,
  born_ns INTEGER NOT NULL
);
