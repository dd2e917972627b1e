//! Where members of the kernel's structures are, as its type information (BTF) says.
//!
//! The format is described in the kernel's Documentation/bpf/btf.rst.

/// `/sys/kernel/btf/vmlinux`, or any other BTF blob.
pub struct KernelTypes<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;

impl<'a> KernelTypes<'a> {
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let magic = u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?);
        let header = word(bytes, 4)?;
        let section = |at: usize| {
            let start = header.checked_add(word(bytes, at)?)?;
            let end = start.checked_add(word(bytes, at + 4)?)?;
            bytes.get(start as usize..end as usize)
        };
        (magic == MAGIC).then_some(())?;
        Some(Self { types: section(8)?, strings: section(16)? })
    }

    /// Byte offset of `member` in `struct name`; not of members of members.
    pub fn offset_of(&self, name: &str, member: &str) -> Option<u32> {
        let mut at = 0;
        loop {
            let (type_name, info) = (word(self.types, at)?, word(self.types, at + 4)?);
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let members = at + 12;
            if kind == STRUCT && self.is(type_name, name) {
                return (0..count).map(|index| members + 12 * index).find_map(|at| {
                    let offset = word(self.types, at + 8)?;
                    // With bit fields about, the upper byte is a width.
                    let bits = if info >> 31 != 0 { offset & 0xff_ffff } else { offset };
                    self.is(word(self.types, at)?, member).then_some(bits / 8)
                });
            }
            at = members + extra_bytes(kind, count)?;
        }
    }

    fn is(&self, offset: u32, name: &str) -> bool {
        let text = self.strings.get(offset as usize..);
        text.and_then(|text| text.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }
}

/// Bytes that follow the head of a type.
fn extra_bytes(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        // Integers, variables, declaration tags.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        // Structures, unions, sections, 64-bit enumerations.
        4 | 5 | 15 | 19 => 12 * count,
        // Enumerations, function prototypes.
        6 | 13 => 8 * count,
        2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pointer, and `struct pair { int first; int *second; }`.
    fn sample() -> Vec<u8> {
        let strings = b"\0pair\0first\0second\0";
        let types: Vec<u32> = vec![
            0,
            2 << 24,
            1, // a pointer
            1,
            4 << 24 | 2,
            16, // the structure
            6,
            0,
            0, // its first member
            12,
            1,
            64, // its second one
        ];
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, 4 * types.len() as u32, 4 * types.len() as u32, strings.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        types.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn members_are_found_by_name() {
        let bytes = sample();
        let types = KernelTypes::parse(&bytes).expect("well-formed");
        assert_eq!(types.offset_of("pair", "first"), Some(0));
        assert_eq!(types.offset_of("pair", "second"), Some(8));
        assert_eq!(types.offset_of("pair", "sec"), None);
        assert_eq!(types.offset_of("pai", "first"), None);
    }

    #[test]
    fn what_is_cut_short_has_no_answer() {
        let bytes = sample();
        for length in 0..bytes.len() {
            if let Some(types) = KernelTypes::parse(&bytes[..length]) {
                assert_eq!(types.offset_of("pair", "second"), None, "{length}");
            }
        }
    }
}
