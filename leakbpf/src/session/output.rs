//! Where the result of a session goes besides the terminal.

use super::{
    SessionError,
    clock::unix_ns,
    config::{Config, Output},
};
use crate::{
    preflight::host::HostFacts,
    process::host,
    recording::{self, SessionFacts},
    report::{self, ReportFile},
};

/// Where the result goes; made before anything is attached, so that a full disk or a wrong path is
/// known at once.
pub struct OutputFile {
    pub kind: OutputKind,
}

pub enum OutputKind {
    None,
    Recording(Box<recording::Writer>),
    Report(report::Format, ReportFile),
}

impl OutputFile {
    pub fn create(config: &Config, host: &HostFacts) -> Result<Self, SessionError> {
        let kind = match &config.output {
            None => OutputKind::None,
            Some(Output::Recording(path)) => {
                let facts = SessionFacts {
                    started_unix_ns: unix_ns(),
                    kernel: host.kernel_release.clone(),
                    hostname: host::name(),
                };
                OutputKind::Recording(Box::new(recording::Writer::create(path, &facts)?))
            }
            Some(Output::Report(format, path)) => {
                OutputKind::Report(*format, ReportFile::create(path)?)
            }
        };
        Ok(Self { kind })
    }
}
