//! What Linux does with an instruction under a uprobe on x86-64.
//!
//! Source: `arch/x86/kernel/uprobes.c`. `uprobe_init_insn` refuses by opcode and prefix
//! (`is_prefix_bad`, `good_insns_64`, `good_2byte_insns`), `branch_setup_xol_ops` and
//! `push_setup_xol_ops` choose what is emulated, everything else is single-stepped out of line.
//! `endbr64`, `ret`, `pop`, indirect jumps and calls, and `loop` are not emulated.
//!
//! An emulated `call` pushes no entry onto a user shadow stack (`branch_emulate_op`), so with
//! shadow stacks on no `call` may be a site: the planner offers one only as the last instruction
//! of a straight line.

/// What happens after the trap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// The kernel does its work: relative `jmp`, `jcc`, `call`; `push` of a register; `nop`.
    Emulated,
    /// `nopl 0x0(%rax,%rax,1)`: since 6.18 the kernel makes a call of it (`arch_uprobe_optimize`), to a page
    /// that it maps with `VM_DONTCOPY` (`create_uprobe_trampoline`). A forked child has the call, not the
    /// page: it crashes there. No probe may be on it.
    Rewritten,
    SingleStepped,
    /// The probe cannot be set: `ENOTSUPP`.
    Refused,
}

/// The parts of an instruction that the kernel looks at.
struct Encoding<'a> {
    legacy_prefixes: &'a [u8],
    rex: Option<u8>,
    opcode: u8,
    /// The byte after a `0f` escape.
    second: Option<u8>,
}

impl<'a> Encoding<'a> {
    fn of(instruction: &'a [u8]) -> Option<Self> {
        let prefixes = instruction
            .iter()
            .take_while(|byte| {
                matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
            })
            .count();
        let (legacy_prefixes, rest) = instruction.split_at_checked(prefixes)?;
        let (rex, rest) = match rest {
            [rex @ 0x40..=0x4f, rest @ ..] => (Some(*rex), rest),
            rest => (None, rest),
        };
        let (&opcode, rest) = rest.split_first()?;
        let second = if opcode == 0x0f { Some(*rest.first()?) } else { None };
        Some(Self { legacy_prefixes, rex, opcode, second })
    }

    fn is_refused(&self) -> bool {
        let bad_prefix = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0xf0);
        if self.legacy_prefixes.iter().any(bad_prefix) {
            return true;
        }
        match (self.opcode, self.second) {
            (0x0f, Some(second)) => matches!(
                second,
                0x00 | 0x01 | 0x05..=0x09 | 0x0b | 0x30 | 0x34 | 0x35 | 0x37 | 0x78 | 0x79 | 0xae
            ),
            (opcode, _) => {
                matches!(
                    opcode,
                    0x06 | 0x07 | 0x0e | 0x16 | 0x17 | 0x1e | 0x1f | 0x27 | 0x2f | 0x37 | 0x3f
                        | 0x60..=0x62 | 0x6c..=0x6f | 0x82 | 0x8e | 0x9a | 0xcc..=0xcf
                        | 0xd4..=0xd6 | 0xe4..=0xe7 | 0xea | 0xec..=0xef | 0xf1 | 0xf4 | 0xfa | 0xfb
                )
            }
        }
    }
}

/// What the kernel does with the instruction that these bytes are, no more and no fewer.
pub fn treatment(instruction: &[u8]) -> Treatment {
    let Some(encoding) = Encoding::of(instruction) else {
        return Treatment::Refused;
    };
    if encoding.is_refused() {
        return Treatment::Refused;
    }
    // `bnd` (f2) is the only prefix that compilers put before these branches.
    let plain_branch = encoding.rex.is_none() && matches!(encoding.legacy_prefixes, [] | [0xf2]);
    match (encoding.opcode, encoding.second) {
        (0xe8 | 0xe9 | 0xeb | 0x70..=0x7f, _) | (0x0f, Some(0x80..=0x8f)) if plain_branch => {
            Treatment::Emulated
        }
        // Not `xchg %rax,%r8`, which the kernel takes for a nop before it reads the REX prefix.
        (0x90, _) if encoding.rex.is_none() && matches!(encoding.legacy_prefixes, [] | [0x66]) => {
            Treatment::Emulated
        }
        (0x50..=0x57, _) => match (instruction.len(), encoding.rex) {
            (1, None) | (2, Some(0x41)) => Treatment::Emulated,
            _ => Treatment::SingleStepped,
        },
        _ if instruction == [0x0f, 0x1f, 0x44, 0x00, 0x00] => Treatment::Rewritten,
        _ => Treatment::SingleStepped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_emulates_relative_branches_register_pushes_and_nops() {
        let emulated: &[&[u8]] = &[
            &[0x55],                   // push %rbp
            &[0x54],                   // push %rsp
            &[0x41, 0x57],             // push %r15
            &[0x74, 0x05],             // je
            &[0x0f, 0x87, 1, 0, 0, 0], // ja
            &[0xeb, 0x10],             // jmp
            &[0xe9, 1, 2, 3, 4],       // jmp
            &[0xf2, 0xe9, 1, 2, 3, 4], // bnd jmp
            &[0xe8, 1, 2, 3, 4],       // call
            &[0x90],                   // nop
            &[0x66, 0x90],             // xchg %ax,%ax
        ];
        for bytes in emulated {
            assert_eq!(treatment(bytes), Treatment::Emulated, "{bytes:x?}");
        }
        assert_eq!(treatment(&[0x0f, 0x1f, 0x44, 0, 0]), Treatment::Rewritten);
    }

    #[test]
    fn everything_else_is_single_stepped() {
        let stepped: &[&[u8]] = &[
            &[0xf3, 0x0f, 0x1e, 0xfa], // endbr64
            &[0x48, 0x85, 0xff],       // test %rdi,%rdi
            &[0x48, 0x83, 0xec, 0x18], // sub $0x18,%rsp
            &[0xff, 0x25, 1, 2, 3, 4], // jmp *(%rip)
            &[0xff, 0xd0],             // call *%rax
            &[0x49, 0x90],             // xchg %rax,%r8
            &[0x40, 0x55],             // rex push %rbp
            &[0x68, 1, 2, 3, 4],       // push $imm
            &[0xff, 0x75, 0x08],       // push 8(%rbp)
            &[0xe3, 0x05],             // jrcxz
            &[0xc3],                   // ret
            &[0x64, 0x48, 0x8b, 0x38], // mov %fs:(%rax),%rdi
            &[0x0f, 0x1f, 0x00],       // nopl (%rax)
        ];
        for bytes in stepped {
            assert_eq!(treatment(bytes), Treatment::SingleStepped, "{bytes:x?}");
        }
    }

    #[test]
    fn locked_privileged_and_trapping_instructions_are_refused() {
        let refused: &[&[u8]] = &[
            &[0xf0, 0x48, 0x0f, 0xb1, 0x0e],                // lock cmpxchg
            &[0x2e, 0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0], // cs nopw
            &[0x3e, 0xff, 0xe0],                            // notrack jmp *%rax
            &[0xcc],                                        // int3
            &[0xf4],                                        // hlt
            &[0x0f, 0x05],                                  // syscall
            &[0x0f, 0x0b],                                  // ud2
            &[0x62, 0xf1, 0x7c, 0x48, 0x10, 0x06],          // vmovups, EVEX
            &[],
        ];
        for bytes in refused {
            assert_eq!(treatment(bytes), Treatment::Refused, "{bytes:x?}");
        }
    }
}
