//! Function symbols of an ELF file, from each table that may name them.

use object::Endianness;
use object::elf;
use object::elf::{FileHeader32, FileHeader64};
use object::pod::Pod;
use object::read::ReadRef;
use object::read::elf::SectionTable;
use object::read::elf::{
    Dyn, FileHeader, GnuHashTable, HashTable, Rela, SectionHeader, Sym, SymbolTable,
};

use super::file::{Class, ElfFile, MAX_SECTIONS, section_name, section_names};
use super::mini_debug;

/// Most symbols that are read of one table: a bound on time, far above Chromium's 1.5 million.
const MAX_SYMBOLS: usize = 4 << 20;

/// Longest name that is read. A name has no length but ends at a zero, so without a bound each
/// symbol of a hostile table could cost the whole file.
const MAX_NAME_BYTES: usize = 1024;

/// The table that a symbol was found in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// `.dynsym`.
    Dynamic,
    /// `.symtab`.
    Static,
    /// `.gnu_debugdata`.
    MiniDebug,
}

/// A function that a symbol table defines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FunctionSymbol<'a> {
    pub name: &'a [u8],
    pub svma: u64,
    /// 0 when the table does not say (hand-written assembly).
    pub size_bytes: u64,
    pub table: Table,
    /// `STT_GNU_IFUNC`: the address is of a resolver that returns the function's address. It must
    /// not be probed as if it were the function.
    pub indirect: bool,
    /// Not visible outside of its file; the name may be anyone's.
    pub local: bool,
}

impl ElfFile<'_> {
    /// Calls `visit` with each defined function. The same function comes once per table that names
    /// it. Damaged tables are left out, and so are names of more than a kilobyte.
    pub fn visit_functions(&self, visit: &mut dyn FnMut(FunctionSymbol<'_>)) {
        let kinds = [elf::STT_FUNC, elf::STT_GNU_IFUNC];
        self.visit_kinds(&kinds, visit);
    }

    /// As [`ElfFile::visit_functions`], with variables.
    pub fn visit_variables(&self, visit: &mut dyn FnMut(FunctionSymbol<'_>)) {
        self.visit_kinds(&[elf::STT_OBJECT], visit);
    }

    fn visit_kinds(&self, kinds: &[elf::SymbolType], visit: &mut dyn FnMut(FunctionSymbol<'_>)) {
        match self.class() {
            Class::Bits64 => self.visit_as::<FileHeader64<Endianness>>(kinds, visit, true),
            Class::Bits32 => self.visit_as::<FileHeader32<Endianness>>(kinds, visit, true),
        }
    }

    fn visit_as<Elf: FileHeader<Endian = Endianness>>(
        &self,
        kinds: &[elf::SymbolType],
        visit: &mut dyn FnMut(FunctionSymbol<'_>),
        look_inside: bool,
    ) {
        let data = self.data();
        let Ok((header, endian)) = header::<Elf>(data) else {
            return;
        };
        let mut dynamic_seen = false;
        if let Ok(sections) = header.sections(endian, data) {
            for (kind, table) in
                [(elf::SHT_DYNSYM, Table::Dynamic), (elf::SHT_SYMTAB, Table::Static)]
            {
                let Ok(symbols) = sections.symbols(endian, data, kind) else {
                    continue;
                };
                let Some(strings) = strings_of::<Elf>(endian, data, &sections, &symbols) else {
                    continue;
                };
                dynamic_seen |= table == Table::Dynamic && !symbols.is_empty();
                for symbol in symbols.iter().take(MAX_SYMBOLS) {
                    visit_symbol::<Elf>(endian, symbol, strings, table, kinds, visit);
                }
            }
            let names = section_names(header, endian, data, &sections);
            let packed = sections
                .iter()
                .take(MAX_SECTIONS)
                .find(|section| section_name(names, section.sh_name(endian)) == b".gnu_debugdata");
            if let Some(section) = packed.filter(|_| look_inside)
                && let Ok(packed) = section.data(endian, data)
                && let Ok(unpacked) = mini_debug::unpack(packed)
                && let Ok(inner) = ElfFile::parse(&unpacked)
                && inner.class() == self.class()
            {
                let mut relabel = |symbol: FunctionSymbol<'_>| {
                    visit(FunctionSymbol { table: Table::MiniDebug, ..symbol });
                };
                inner.visit_as::<Elf>(kinds, &mut relabel, false);
            }
        }
        // Without a section table, what the loader uses still names what is exported.
        if !dynamic_seen && let Some((symbols, strings)) = self.loader_symbols::<Elf>() {
            for symbol in symbols {
                visit_symbol::<Elf>(endian, symbol, strings, Table::Dynamic, kinds, visit);
            }
        }
    }

    /// Calls `visit` with the address of each slot of the global offset table that the loader
    /// fills with the address of a named function, and that name.
    pub fn visit_import_slots(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        // Other machines have no planner yet; 32-bit ones use `Rel`.
        if self.class() == Class::Bits64 {
            self.visit_slots_as::<FileHeader64<Endianness>>(visit);
        }
    }

    fn visit_slots_as<Elf: FileHeader<Endian = Endianness>>(
        &self,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) -> Option<()> {
        let data = self.data();
        let (_, endian) = header::<Elf>(data).ok()?;
        let (symbols, strings) = self.loader_symbols::<Elf>()?;
        for (table, size) in [(elf::DT_JMPREL, elf::DT_PLTRELSZ), (elf::DT_RELA, elf::DT_RELASZ)] {
            let Some(bytes) = self.loader_table::<Elf>(table, size) else {
                continue;
            };
            let count = bytes.len() / size_of::<Elf::Rela>();
            let Ok(entries) = bytes.read_slice_at::<Elf::Rela>(0, count) else {
                continue;
            };
            for entry in entries {
                let index = entry.r_sym(endian, false) as usize;
                if index == 0 {
                    continue;
                }
                if let Some(name) =
                    symbols.get(index).and_then(|symbol| name::<Elf>(endian, symbol, strings))
                {
                    visit(entry.r_offset(endian).into(), name);
                }
            }
        }
        Some(())
    }

    /// The dynamic symbol table by way of `PT_DYNAMIC`, as the loader finds it.
    fn loader_symbols<Elf: FileHeader<Endian = Endianness>>(&self) -> Option<(&[Elf::Sym], &[u8])> {
        let data = self.data();
        let (_, endian) = header::<Elf>(data).ok()?;
        let strings = self.loader_table::<Elf>(elf::DT_STRTAB, elf::DT_STRSZ)?;
        let symbols_at = self.file_offset(self.dynamic_entry::<Elf>(elf::DT_SYMTAB)?)?;
        let count = self.loader_symbol_count::<Elf>(endian)?.min(MAX_SYMBOLS);
        let symbols = data.read_slice_at::<Elf::Sym>(symbols_at, count).ok()?;
        Some((symbols, strings))
    }

    /// Only the hash tables say how many dynamic symbols there are.
    fn loader_symbol_count<Elf: FileHeader<Endian = Endianness>>(
        &self,
        endian: Endianness,
    ) -> Option<usize> {
        let tail = |tag| {
            let offset = self.file_offset(self.dynamic_entry::<Elf>(tag)?)?;
            self.data().get(usize::try_from(offset).ok()?..)
        };
        if let Some(table) = tail(elf::DT_HASH)
            && let Ok(table) = HashTable::<Elf>::parse(endian, table)
        {
            return usize::try_from(table.symbol_table_length()).ok();
        }
        let table = GnuHashTable::<Elf>::parse(endian, tail(elf::DT_GNU_HASH)?).ok()?;
        usize::try_from(table.symbol_table_length(endian)?).ok()
    }

    fn loader_table<Elf: FileHeader<Endian = Endianness>>(
        &self,
        table: elf::DynamicTag,
        size: elf::DynamicTag,
    ) -> Option<&[u8]> {
        let offset = self.file_offset(self.dynamic_entry::<Elf>(table)?)?;
        self.bytes_at(offset, self.dynamic_entry::<Elf>(size)?)
    }

    fn dynamic_entry<Elf: FileHeader<Endian = Endianness>>(
        &self,
        tag: elf::DynamicTag,
    ) -> Option<u64> {
        let (_, endian) = header::<Elf>(self.data()).ok()?;
        let range = self.dynamic()?;
        let bytes = self.bytes_at(range.start, range.end - range.start)?;
        let count = bytes.len() / size_of::<Elf::Dyn>();
        let entries = bytes.read_slice_at::<Elf::Dyn>(0, count).ok()?;
        entries
            .iter()
            .take_while(|entry| entry.d_tag(endian) != elf::DT_NULL)
            .find(|entry| entry.d_tag(endian) == tag)
            .map(|entry| entry.d_val(endian).into())
    }
}

fn header<Elf: FileHeader<Endian = Endianness> + Pod>(
    data: &[u8],
) -> Result<(&Elf, Endianness), object::read::Error> {
    let header = Elf::parse(data)?;
    Ok((header, header.endian()?))
}

/// The bytes of a symbol table's string table.
fn strings_of<'data, Elf: FileHeader<Endian = Endianness>>(
    endian: Endianness,
    data: &'data [u8],
    sections: &SectionTable<'data, Elf>,
    symbols: &SymbolTable<'data, Elf>,
) -> Option<&'data [u8]> {
    let section = sections.section(symbols.string_section()).ok()?;
    section.data(endian, data).ok()
}

fn name<'data, Elf: FileHeader<Endian = Endianness>>(
    endian: Endianness,
    symbol: &Elf::Sym,
    strings: &'data [u8],
) -> Option<&'data [u8]> {
    let rest = strings.get(usize::try_from(symbol.st_name(endian)).ok()?..)?;
    let within = rest.get(..MAX_NAME_BYTES).unwrap_or(rest);
    within.iter().position(|&byte| byte == 0).and_then(|length| rest.get(..length))
}

fn visit_symbol<Elf: FileHeader<Endian = Endianness>>(
    endian: Endianness,
    symbol: &Elf::Sym,
    strings: &[u8],
    table: Table,
    kinds: &[elf::SymbolType],
    visit: &mut dyn FnMut(FunctionSymbol<'_>),
) {
    let indirect = symbol.st_type() == elf::STT_GNU_IFUNC;
    if !kinds.contains(&symbol.st_type()) || symbol.is_undefined(endian) {
        return;
    }
    if let Some(name) = name::<Elf>(endian, symbol, strings) {
        visit(FunctionSymbol {
            name,
            svma: symbol.st_value(endian).into(),
            size_bytes: symbol.st_size(endian).into(),
            table,
            indirect,
            local: symbol.st_bind() == elf::STB_LOCAL,
        });
    }
}
