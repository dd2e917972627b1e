//! `leakbpf bench-floor`: probes with empty programs, so that a benchmark knows what the probes
//! cost by themselves.

use anyhow::Context as _;
use leakbpf::session::{SessionError, floor};

use super::Failure;
use crate::cli::BenchFloorArgs;

pub fn run(args: &BenchFloorArgs) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let placed = floor::place(args.pid, args.sites.into(), args.links.into())?;
    eprintln!("leakbpf: attached to PID {}: {} probes with empty programs", args.pid, placed.len());
    runtime.block_on(tokio::signal::ctrl_c()).map_err(SessionError::Events)?;
    drop(placed);
    Ok(0)
}
