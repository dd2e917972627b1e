//! nginx (a master and two workers, glibc) under wrk: 20 connections, a file of 4 KiB.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Kind, Load, Place, Shape, Work, Workload, loader, text, whole_seconds};
use crate::shell;

pub const NGINX: Workload = Workload {
    name: "nginx",
    title: "nginx, a file of 4 KiB",
    unit: "request",
    kind: Kind::Server,
    shape: Shape::SeveralProcesses,
    begin,
};

struct Nginx {
    port: u16,
}

fn begin(place: &Place) -> Result<Box<dyn Load>> {
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let folder = text(&place.folder);
    // Workers drop what is not named from the environment.
    let kept: String =
        place.dress.environment.iter().map(|(name, _)| format!("env {name};\n")).collect();
    let configuration = format!(
        "daemon off; worker_processes 2; pid {folder}/pid; error_log {folder}/error.log; {kept}\n\
         events {{ worker_connections 256; }}\n\
         http {{ access_log off; client_body_temp_path {folder}/body;\n\
         proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;\n\
         uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n\
         server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    );
    let file = place.folder.join("nginx.conf");
    fs::write(&file, configuration).with_context(|| format!("write {}", file.display()))?;
    fs::write(place.folder.join("page"), vec![b'x'; 4096])?;
    let words = place.dressed(&["nginx", "-p", &folder, "-c", &text(&file)]);
    place.serve(&words, || TcpStream::connect(("127.0.0.1", port)).is_ok())?;
    Ok(Box::new(Nginx { port }))
}

impl Load for Nginx {
    fn run(&mut self, span: Duration) -> Result<Work> {
        let url = format!("http://127.0.0.1:{}/page", self.port);
        let output = shell::output(
            loader("wrk")
                .args(["-t", "1", "-c", "20", "--latency", "-d"])
                .arg(whole_seconds(span))
                .arg(url),
        )?;
        parse(&output).with_context(|| format!("wrk's output: {output}"))
    }
}

fn parse(output: &str) -> Option<Work> {
    if output.contains("Non-2xx") {
        return None;
    }
    let mut lines = output.lines().map(str::trim);
    let p99_us = lines.find_map(|line| line.strip_prefix("99%")).and_then(microseconds);
    let units = lines.find_map(|line| line.split_once(" requests in "))?.0.parse().ok()?;
    Some(Work { units, p99_us })
}

/// Of `980.00us`, `1.23ms` or `1.23s`.
fn microseconds(time: &str) -> Option<f64> {
    let time = time.trim();
    let (number, scale) = [("us", 1.0), ("ms", 1e3), ("s", 1e6)]
        .into_iter()
        .find_map(|(unit, scale)| Some((time.strip_suffix(unit)?, scale)))?;
    Some(number.parse::<f64>().ok()? * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_p99_are_read_from_wrk() {
        let work = parse("  90%  1.00ms\n  99%  1.23ms\n  400 requests in 1.00s, 2MB read\n");
        let work = work.expect("both are there");
        assert_eq!((work.units, work.p99_us), (400.0, Some(1230.0)));
        assert!(parse("  Non-2xx or 3xx responses: 4\n").is_none());
    }
}
