//! What a stack costs, by depth: unwind rows against frame pointers.

use anyhow::Result;

use super::agent::{Agent, Tracer};
use super::pair::pair_ns;
use super::program::{self, Program};
use super::table::{Samples, Table, figure, ratio};

/// Callers above the loop. The loop itself, `main` and what starts it are five frames more.
const CALLERS: [u64; 4] = [0, 5, 30, 60];
const OTHERS: u64 = 5;

/// How a stack is walked, and the argument that asks for it.
const WALKS: [(&str, &str); 3] = [
    ("frame pointers", "fp"),
    ("unwind rows", "dwarf"),
    ("unwind rows, as before Linux 5.17", "dwarf64"),
];

/// Measures everything `rounds` times, in turn.
pub fn run(rounds: usize) -> Result<String> {
    let path = program::build("pair")?;
    let mut costs: Vec<[Samples; WALKS.len()]> =
        CALLERS.iter().map(|_| Default::default()).collect();
    let mut floors: Vec<Samples> = CALLERS.iter().map(|_| Samples::default()).collect();
    let mut program = Program::start(&path, &[], None)?;
    for round in 0..rounds {
        eprintln!("stacks: round {} of {rounds}", round + 1);
        let agent = Agent::attach(Tracer::Floor, program.pid(), &[])?;
        for (&callers, floor) in CALLERS.iter().zip(&mut floors) {
            floor.push(pair_ns(&mut program, callers)?);
        }
        agent.stop()?;
        for (walk, (_, argument)) in WALKS.iter().enumerate() {
            let agent = Agent::attach(Tracer::Exact, program.pid(), &["--stack", argument])?;
            for (&callers, samples) in CALLERS.iter().zip(&mut costs) {
                samples[walk].push(pair_ns(&mut program, callers)?);
            }
            agent.stop()?;
        }
    }

    let mut text = String::from(
        "Nanoseconds that a pair costs above the floor, on glibc, by frames of its stack (minimum):\n\n",
    );
    let names = WALKS.map(|(name, _)| name);
    let [first, second, third] = names;
    let mut table =
        Table::new(&["frames", first, second, "of frame pointers", third, "of frame pointers"]);
    for ((callers, floor), samples) in CALLERS.iter().zip(&floors).zip(&costs) {
        let [pointers, rows, older] =
            samples.each_ref().map(|samples| Some(samples.min()? - floor.min()?));
        table.row(
            &(callers + OTHERS).to_string(),
            &[
                figure(pointers),
                figure(rows),
                ratio(rows, pointers),
                figure(older),
                ratio(older, pointers),
            ],
        );
    }
    text.push_str(table.text());
    Ok(text)
}
