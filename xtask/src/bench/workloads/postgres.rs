//! PostgreSQL (a process for each connection, glibc) under pgbench: 4 connections, scale 5.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Kind, Load, Place, Shape, Work, Workload, loader, text, whole_seconds};
use crate::shell;

pub const SELECT: Workload = Workload {
    name: "postgres-select",
    title: "PostgreSQL, `pgbench -S`",
    unit: "transaction",
    kind: Kind::Server,
    shape: Shape::Forks,
    begin: |place| begin(place, &["-S"]),
};

pub const DEFAULT: Workload = Workload {
    name: "postgres",
    title: "PostgreSQL, `pgbench`",
    unit: "transaction",
    kind: Kind::Server,
    shape: Shape::Forks,
    begin: |place| begin(place, &[]),
};

struct Postgres {
    programs: PathBuf,
    /// Of the socket and of pgbench's log.
    folder: PathBuf,
    script: &'static [&'static str],
}

/// PostgreSQL refuses to run as root.
const USER: [&str; 5] = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"];

fn begin(place: &Place, script: &'static [&'static str]) -> Result<Box<dyn Load>> {
    let programs = programs()?;
    let program = |name: &str| text(&programs.join(name));
    let (folder, data) = (text(&place.folder), text(&place.folder.join("data")));
    let user = USER.map(str::to_owned);
    let [setpriv, rest @ ..] = &user;
    shell::output(Command::new(setpriv).args(rest).arg(program("initdb")).args([
        "-D",
        &data,
        "-A",
        "trust",
        "--no-sync",
        "-E",
        "UTF8",
        "--locale=C",
    ]))?;
    let mut words = user.to_vec();
    words.extend(place.dressed(&[
        &program("postgres"),
        "-D",
        &data,
        "-k",
        &folder,
        "-c",
        "listen_addresses=",
        // The disk and what happens in the background are not what is measured.
        "-c",
        "fsync=off",
        "-c",
        "synchronous_commit=off",
        "-c",
        "autovacuum=off",
        "-c",
        "checkpoint_timeout=1h",
        "-c",
        "max_wal_size=8GB",
    ]));
    let ready = || {
        let mut command = Command::new(program("pg_isready"));
        shell::output(command.args(["-q", "-h", &folder])).is_ok()
    };
    place.serve(&words, ready)?;
    let postgres = Postgres { folder: place.folder.clone(), script, programs };
    shell::output(postgres.pgbench().args(["-i", "-q", "-s", "5"]))?;
    Ok(Box::new(postgres))
}

/// Of the newest version that is installed.
fn programs() -> Result<PathBuf> {
    let folder = Path::new("/usr/lib/postgresql");
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let versions = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let newest: u32 = versions.max().with_context(|| format!("{} is empty", folder.display()))?;
    Ok(folder.join(newest.to_string()).join("bin"))
}

impl Postgres {
    fn pgbench(&self) -> Command {
        let mut command = loader(&text(&self.programs.join("pgbench")));
        command.args(["-h", &text(&self.folder), "-U", "postgres"]).current_dir(&self.folder);
        // The database's name.
        command.env("PGDATABASE", "postgres");
        command
    }
}

impl Load for Postgres {
    fn run(&mut self, span: Duration) -> Result<Work> {
        let output = shell::output(
            self.pgbench()
                .args(self.script)
                .args(["-n", "-c", "4", "-j", "1", "-l", "--log-prefix=transactions", "-T"])
                .arg(whole_seconds(span)),
        )?;
        let units = processed(&output).with_context(|| format!("pgbench's output: {output}"))?;
        let mut times_us = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !name.starts_with("transactions.") {
                continue;
            }
            let log = fs::read_to_string(&path)?;
            // client, number, microseconds, …
            times_us
                .extend(log.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<u32>().ok()));
            fs::remove_file(&path)?;
        }
        if times_us.is_empty() {
            bail!("pgbench wrote no log");
        }
        let place = (times_us.len() - 1) * 99 / 100;
        let (_, &mut p99_us, _) = times_us.select_nth_unstable(place);
        Ok(Work { units, p99_us: Some(f64::from(p99_us)) })
    }
}

fn processed(output: &str) -> Option<f64> {
    let line = output
        .lines()
        .find_map(|line| line.strip_prefix("number of transactions actually processed: "))?;
    line.split('/').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_transactions_are_read_from_pgbench() {
        let line = "scale: 5\nnumber of transactions actually processed: 120\n";
        assert_eq!(processed(line), Some(120.0));
        assert_eq!(processed("number of transactions actually processed: 120/200\n"), Some(120.0));
        assert_eq!(processed(""), None);
    }
}
