//! Uprobe programs as links to many places at once need them: loaded with that use declared
//! ([`Use`]), which aya does not do. They share the maps that it made.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
};

use aya::{Ebpf, maps::Map};
use aya_obj::{Function, Object, btf::BtfFeatures};

use super::attach::{Use, owned};

#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error(transparent)]
    Object(#[from] aya_obj::ParseError),
    #[error(transparent)]
    Types(#[from] aya_obj::btf::BtfError),
    #[error(transparent)]
    Link(#[from] aya_obj::relocation::EbpfRelocationError),
    #[error("the object has no program {0}")]
    Unknown(&'static str),
    #[error("the kernel refuses type information")]
    LoadTypes(#[source] io::Error),
    #[error("the kernel refuses {name}")]
    Load { name: &'static str, source: io::Error },
}

/// An object's programs, ready to be loaded.
pub struct Programs {
    object: Object,
    types: Option<OwnedFd>,
}

impl Programs {
    /// Those of an object, with the maps of `ebpf`, which was made from the same one.
    pub fn of(object: &[u8], ebpf: &Ebpf) -> Result<Self, ProgramError> {
        let mut object = Object::parse(object)?;
        // Kernels that know such programs (6.6) know every kind of type information.
        let features = BtfFeatures::new(true, true, true, true, true, true, true, true);
        let types = match object.fixup_and_sanitize_btf(&features)? {
            Some(types) => Some(load_types(&types.to_bytes()).map_err(ProgramError::LoadTypes)?),
            None => None,
        };
        let text = object.functions.keys().map(|(section, _)| *section).collect();
        let maps = std::mem::take(&mut object.maps);
        let known =
            ebpf.maps().filter_map(|(name, map)| Some((name, descriptor(map)?, maps.get(name)?)));
        object.relocate_maps(known, &text)?;
        object.relocate_calls(&text)?;
        Ok(Self { object, types })
    }

    pub fn load(&self, name: &'static str, purpose: Use) -> Result<OwnedFd, ProgramError> {
        let program = self.object.programs.get(name).ok_or(ProgramError::Unknown(name))?;
        let function = self.object.functions.get(&program.function_key());
        let function = function.ok_or(ProgramError::Unknown(name))?;
        let types = self.types.as_ref().map(|types| types.as_fd());
        load_program(name, function, &program.license, types, purpose)
            .map_err(|source| ProgramError::Load { name, source })
    }
}

/// Of the kinds of maps that the object has.
fn descriptor(map: &Map) -> Option<RawFd> {
    match map {
        Map::Array(data)
        | Map::ArrayOfMaps(data)
        | Map::HashMap(data)
        | Map::PerCpuArray(data)
        | Map::RingBuf(data) => Some(data.fd().as_fd().as_raw_fd()),
        _ => None,
    }
}

/// `union bpf_attr` for `BPF_PROG_LOAD`, as far as it is used here.
#[repr(C)]
#[derive(Default)]
struct ProgramArgs {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    pad: u32,
}

const _: () = assert!(size_of::<ProgramArgs>() == 96);

/// `union bpf_attr` for `BPF_BTF_LOAD`.
#[repr(C)]
#[derive(Default)]
struct TypesArgs {
    btf: u64,
    btf_log_buf: u64,
    btf_size: u32,
    btf_log_size: u32,
    btf_log_level: u32,
    pad: u32,
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_BTF_LOAD: libc::c_long = 18;
const BPF_PROG_TYPE_KPROBE: u32 = 2;

fn load_types(types: &[u8]) -> io::Result<OwnedFd> {
    let args = TypesArgs {
        btf: types.as_ptr() as u64,
        btf_size: types.len() as u32,
        ..TypesArgs::default()
    };
    // SAFETY: `args` is the command's part of `union bpf_attr`; `types` lives until it returns.
    owned(unsafe { bpf(BPF_BTF_LOAD, &args) })
}

fn load_program(
    name: &str,
    function: &Function,
    license: &CStr,
    types: Option<BorrowedFd<'_>>,
    purpose: Use,
) -> io::Result<OwnedFd> {
    let mut args = ProgramArgs {
        prog_type: BPF_PROG_TYPE_KPROBE,
        insn_cnt: function.instructions.len() as u32,
        insns: function.instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected_attach_type: purpose as u32,
        ..ProgramArgs::default()
    };
    // The last byte stays 0.
    let length = name.len().min(args.prog_name.len() - 1);
    args.prog_name[..length].copy_from_slice(&name.as_bytes()[..length]);
    // Tells the kernel which functions `bpf_loop` may call.
    let functions = function.func_info.func_info_bytes();
    if let Some(types) = types {
        args.prog_btf_fd = types.as_raw_fd() as u32;
        args.func_info_rec_size = function.func_info_rec_size as u32;
        args.func_info = functions.as_ptr() as u64;
        args.func_info_cnt = function.func_info.len() as u32;
    }
    // SAFETY: `args` is the command's part of `union bpf_attr`; what it points to lives until it
    // returns.
    owned(unsafe { bpf(BPF_PROG_LOAD, &args) })
}

/// # Safety
///
/// `args` is what the command reads, and pointers in it are valid until it returns.
unsafe fn bpf<T>(command: libc::c_long, args: &T) -> libc::c_long {
    // SAFETY: as above. These commands do not write to their arguments.
    unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(args), size_of::<T>()) }
}
