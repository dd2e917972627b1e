//! Debian packages: which are missing, and installing them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell;

/// Installs those of the packages that are missing; quick when none is.
pub fn install(packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    let listed = missing.join(" ");
    if !shell::is_root() {
        bail!("missing Debian packages; run as root: apt-get install -y {listed}");
    }
    let _quiet = StartsNoServices::begin()?;
    if apt_install(&missing).is_err() {
        // The lists may be absent (a fresh container) or older than the archive.
        shell::run(Command::new("apt-get").args(["-q", "update"]))?;
        apt_install(&missing).with_context(|| format!("cannot install {listed}"))?;
    }
    Ok(())
}

fn apt_install(packages: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command.args(["install", "-y", "-q", "--no-install-recommends"]).args(packages);
    shell::run(&mut command)
}

fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    if shell::find_program("dpkg-query").is_none() {
        bail!("dpkg-query not found: this needs Debian 12 or later");
    }
    // dpkg-query fails when any of the packages is unknown, but still prints the others.
    let output = Command::new("dpkg-query")
        .args(["-W", "-f=${Package} ${db:Status-Status}\n"])
        .args(packages)
        .output()
        .context("cannot start dpkg-query")?;
    let listed = String::from_utf8_lossy(&output.stdout);
    let installed: Vec<&str> =
        listed.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    Ok(packages.iter().copied().filter(|package| !installed.contains(package)).collect())
}

/// Keeps the packages' services (redis, nginx, memcached) from being started while it lives.
struct StartsNoServices {
    made: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl StartsNoServices {
    fn begin() -> Result<Self> {
        if Path::new(POLICY).exists() {
            return Ok(Self { made: false });
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(POLICY)
            .with_context(|| format!("cannot create {POLICY}"))?;
        // 101: "action forbidden by policy", see invoke-rc.d(8).
        file.write_all(b"#!/bin/sh\nexit 101\n").with_context(|| format!("write {POLICY}"))?;
        Ok(Self { made: true })
    }
}

impl Drop for StartsNoServices {
    fn drop(&mut self) {
        if self.made && fs::remove_file(POLICY).is_err() {
            eprintln!("could not remove {POLICY}: services will not start until you do");
        }
    }
}
