//! The walk along the chain of frame pointers: where the kernel lacks `bpf_loop`, and for processes
//! whose mappings are not known.

use aya_ebpf::helpers::bpf_probe_read_user;
use leakbpf_common::{
    abi::{FrameWord, MAX_FRAMES, Outcome},
    unwind::{FRAME_POINTER_REACH_BYTES, Registers},
};

use super::mix;
use crate::maps::Scratch;

/// Leaves frames, their number, hash and outcome where [`super::rows::walk`] does.
#[inline(always)]
pub fn walk(registers: &Registers, hash: u64, scratch: &mut Scratch) {
    let record = &mut scratch.record;
    let mut outcome = Outcome::Truncated;
    let word = registers.ip & FrameWord::ADDRESS;
    record.frames[0] = FrameWord(word);
    let mut hash = mix(hash, word);
    let mut count = 1;
    let mut frame_pointer = registers.bp;
    let mut lowest = registers.sp;
    while count < MAX_FRAMES {
        if frame_pointer == 0 {
            // The first frame's caller sets it to 0; in code that has other uses for the register,
            // 0 is a value like any other.
            outcome = if count > 1 { Outcome::Complete } else { Outcome::NoFramePointer };
            break;
        }
        if frame_pointer & 7 != 0
            || frame_pointer < lowest
            || frame_pointer - lowest > FRAME_POINTER_REACH_BYTES
        {
            outcome = Outcome::NoFramePointer;
            break;
        }
        // SAFETY: the helper checks the address and fails on what it cannot read.
        let Ok(pair) = (unsafe { bpf_probe_read_user(frame_pointer as *const [u64; 2]) }) else {
            outcome = Outcome::Unreadable;
            break;
        };
        if pair[1] == 0 {
            outcome = Outcome::Complete;
            break;
        }
        let word = pair[1] & FrameWord::ADDRESS;
        record.frames[count] = FrameWord(word);
        hash = mix(hash, word);
        count += 1;
        lowest = frame_pointer + 16;
        frame_pointer = pair[0];
    }
    let walk = &mut scratch.walk;
    walk.hash = hash;
    walk.all_in_modules = 0;
    walk.count = count as u64;
    walk.outcome = outcome as u64;
}
