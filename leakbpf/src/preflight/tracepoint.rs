//! `events/…/format` files of tracefs: where the fields of a tracepoint's record are.
//!
//! Layouts change between kernels, also inside one stable series, so they are read and never guessed.

/// A field of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// As the kernel declares it, without the name: `pid_t`, `__data_loc char[]`, `char [16]`.
    pub kind: String,
    pub name: String,
    pub offset_bytes: u32,
    pub size_bytes: u32,
    pub signed: bool,
}

/// A tracepoint's record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TracepointFormat {
    pub name: String,
    /// What `perf_event_open` takes as `config`.
    pub id: u64,
    /// In the order of the record, the common ones first.
    pub fields: Vec<Field>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("no {0} line")]
    Missing(&'static str),
    #[error("field line {0:?} is not understood")]
    Field(String),
    #[error("tracepoint {tracepoint} has no field {field}")]
    NoField { tracepoint: String, field: String },
}

impl TracepointFormat {
    /// Parses a format file; the kernel's kernel/trace/trace_events.c (`f_show`) writes it.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let text = String::from_utf8_lossy(bytes);
        let (mut name, mut id, mut fields) = (None, None, Vec::new());
        for line in text.lines().map(str::trim) {
            if line.starts_with("print fmt:") {
                break;
            } else if let Some(rest) = line.strip_prefix("name:") {
                name = Some(rest.trim().to_owned());
            } else if let Some(rest) = line.strip_prefix("ID:") {
                id = rest.trim().parse().ok();
            } else if line.starts_with("field:") {
                let field = parse_field(line).ok_or_else(|| FormatError::Field(line.to_owned()))?;
                fields.push(field);
            }
        }
        Ok(Self {
            name: name.ok_or(FormatError::Missing("name"))?,
            id: id.ok_or(FormatError::Missing("ID"))?,
            fields,
        })
    }

    pub fn field(&self, name: &str) -> Result<&Field, FormatError> {
        self.fields.iter().find(|field| field.name == name).ok_or_else(|| FormatError::NoField {
            tracepoint: self.name.clone(),
            field: name.to_owned(),
        })
    }
}

fn parse_field(line: &str) -> Option<Field> {
    let mut parts = line.split(';').map(str::trim);
    let declaration = parts.next()?.strip_prefix("field:")?.trim();
    let (mut offset, mut size, mut signed) = (None, None, None);
    for part in parts {
        match part.split_once(':') {
            Some(("offset", value)) => offset = value.parse().ok(),
            Some(("size", value)) => size = value.parse().ok(),
            Some(("signed", value)) => signed = Some(value != "0"),
            _ => {}
        }
    }
    let (kind, name) = split_declaration(declaration)?;
    Some(Field {
        kind,
        name: name.to_owned(),
        offset_bytes: offset?,
        size_bytes: size?,
        signed: signed?,
    })
}

/// `char comm[16]` is the field `comm`; `__data_loc char[] filename` the field `filename`.
fn split_declaration(declaration: &str) -> Option<(String, &str)> {
    let (kind, name) = declaration.rsplit_once(char::is_whitespace)?;
    match name.split_once('[') {
        Some((name, length)) => Some((format!("{} [{length}", kind.trim()), name)),
        None => Some((kind.trim().to_owned(), name)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NEWTASK: &str = "name: task_newtask
ID: 205
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:pid_t pid;\toffset:8;\tsize:4;\tsigned:1;
\tfield:char comm[16];\toffset:12;\tsize:16;\tsigned:0;
\tfield:__data_loc char[] filename;\toffset:28;\tsize:4;\tsigned:0;
\tfield:u64 clone_flags;\toffset:32;\tsize:8;\tsigned:0;

print fmt: \"pid=%d field:x; offset:1;\", REC->pid
";

    #[test]
    fn fields_are_found_by_name_with_their_place() {
        let format = TracepointFormat::parse(NEWTASK.as_bytes()).expect("well-formed");
        assert_eq!((format.name.as_str(), format.id), ("task_newtask", 205));
        let place = |name: &str| {
            let field = format.field(name).expect(name);
            (field.kind.as_str(), field.offset_bytes, field.size_bytes, field.signed)
        };
        assert_eq!(place("pid"), ("pid_t", 8, 4, true));
        assert_eq!(place("comm"), ("char [16]", 12, 16, false));
        assert_eq!(place("filename"), ("__data_loc char[]", 28, 4, false));
        assert_eq!(place("clone_flags"), ("u64", 32, 8, false));
        assert_eq!(place("common_type"), ("unsigned short", 0, 2, false));
        assert_eq!(format.fields.len(), 6);
    }

    #[test]
    fn a_field_that_this_kernel_lacks_is_named() {
        let format = TracepointFormat::parse(NEWTASK.as_bytes()).expect("well-formed");
        let error = format.field("group_dead").expect_err("absent");
        assert_eq!(error.to_string(), "tracepoint task_newtask has no field group_dead");
    }

    #[test]
    fn what_is_no_format_file_is_refused() {
        assert_eq!(TracepointFormat::parse(b""), Err(FormatError::Missing("name")));
        assert_eq!(TracepointFormat::parse(b"name: x\nID: -1\n"), Err(FormatError::Missing("ID")));
        let cut = b"name: x\nID: 1\n\tfield:pid_t pid;\toffset:8;\tsi";
        assert!(matches!(TracepointFormat::parse(cut), Err(FormatError::Field(_))));
        let huge = b"name: x\nID: 1\nfield:int a; offset:99999999999; size:4; signed:1;";
        assert!(matches!(TracepointFormat::parse(huge), Err(FormatError::Field(_))));
    }

    proptest! {
        #[test]
        fn no_input_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = TracepointFormat::parse(&bytes);
        }

        #[test]
        fn no_field_line_makes_the_parser_panic(line in "field:[a-z\\[\\] ]{0,20};[a-z0-9:; ]{0,40}") {
            let _ = TracepointFormat::parse(format!("name: x\nID: 1\n{line}").as_bytes());
        }
    }
}
