//! Debian's servers as the tests start them: in the foreground, on a port of their own, with files
//! in a directory of the test's.

use std::path::Path;
use std::process::Command;

use crate::{free_port, require_program};

pub fn redis(directory: &Path) -> (Command, u16) {
    let port = free_port();
    let mut command = Command::new(require_program("redis-server", "redis-server"));
    command
        .current_dir(directory)
        .args(["--port", &port.to_string(), "--save", "", "--appendonly", "no"])
        .args(["--bind", "127.0.0.1", "--hz", "10"]);
    (command, port)
}

pub fn memcached() -> (Command, u16) {
    let port = free_port();
    let mut command = Command::new(require_program("memcached", "memcached"));
    command.args(["-u", "root", "-l", "127.0.0.1", "-p", &port.to_string(), "-U", "0"]);
    (command, port)
}

/// One process, which answers "hello".
pub fn nginx(directory: &Path) -> (Command, u16) {
    let port = free_port();
    let path = directory.display().to_string();
    let configuration = format!(
        "daemon off; master_process off; pid {path}/pid; error_log {path}/error.log;\n\
         env ORACLE_FILE; events {{ worker_connections 256; }}\n\
         http {{ access_log off; client_body_temp_path {path}/body; proxy_temp_path {path}/proxy;\n\
         fastcgi_temp_path {path}/fastcgi; uwsgi_temp_path {path}/uwsgi; scgi_temp_path {path}/scgi;\n\
         server {{ listen 127.0.0.1:{port}; location / {{ return 200 hello; }} }} }}\n"
    );
    std::fs::write(directory.join("nginx.conf"), configuration).expect("a written file");
    let mut command = Command::new(require_program("nginx", "nginx-light"));
    command.args(["-p", &path, "-c", &format!("{path}/nginx.conf")]);
    (command, port)
}
