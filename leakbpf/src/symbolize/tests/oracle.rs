//! The same questions to another reader of DWARF.

use addr2line::Context;
use gimli::{EndianSlice, LittleEndian};
use object::{Object, ObjectSection};

use super::fixture::Fixture;
use super::*;

/// Templates of the standard library, inlined into each other some levels deep.
pub(super) const SOURCE: &str = r#"#include <algorithm>
#include <map>
#include <string>
#include <vector>
struct Order { std::string name; std::vector<int> items; };
std::map<std::string, Order> orders;
void add(const std::string &name, int item) {
    auto &order = orders[name];
    order.name = name;
    order.items.push_back(item);
    std::sort(order.items.begin(), order.items.end());
}
int total() {
    int sum = 0;
    for (auto &[name, order] : orders)
        try { sum += order.items.at(0) + std::stoi(name); } catch (...) { sum--; }
    return sum;
}
"#;

type Row = (Option<String>, Option<String>, Option<u32>);

#[test]
fn addr2line_gives_the_same_functions_and_lines() {
    for version in ["-gdwarf-4", "-gdwarf-5"] {
        let fixture = Fixture::new();
        fixture.compile("/src/orders.cpp", SOURCE, "/lib/orders.so", &[version]);
        let bytes = fs::read(fixture.real("/lib/orders.so")).expect("file");
        let file = object::File::parse(&*bytes).expect("ELF");
        let dwarf = gimli::Dwarf::load(|id| {
            let section = file.section_by_name(id.name());
            let bytes = section.map_or(&[][..], |section| section.data().expect("contents"));
            Ok::<_, gimli::Error>(EndianSlice::new(bytes, LittleEndian))
        });
        let context = Context::from_dwarf(dwarf.expect("DWARF")).expect("context");
        let (mut symbolizer, module) = fixture.symbolizer("/lib/orders.so");

        let (mut compared, mut deepest) = (0, 0);
        for section in file
            .sections()
            .filter(|section| section.name().is_ok_and(|name| name.starts_with(".text")))
        {
            for svma in section.address()..section.address() + section.size() {
                let theirs = frames(&context, svma);
                // They do not read symbol tables, which name the start-up code.
                if theirs.is_empty() {
                    continue;
                }
                let ours: Vec<Row> = symbolizer
                    .name(module, svma, false)
                    .into_iter()
                    .map(|symbol| (Some(symbol.function), symbol.file, symbol.line))
                    .collect();
                assert_eq!(ours, theirs, "at {svma:#x} with {version}");
                compared += 1;
                deepest = deepest.max(ours.len());
            }
        }
        assert!(compared > 1000, "{compared}");
        assert!(deepest > 5, "{deepest}");
    }
}

fn frames(context: &Context<EndianSlice<LittleEndian>>, svma: u64) -> Vec<Row> {
    let mut found = context.find_frames(svma).skip_all_loads().expect("frames");
    let mut rows = Vec::new();
    while let Some(frame) = found.next().expect("frame") {
        let Some(name) = frame.function else { continue };
        let name = name.raw_name().expect("name");
        let location = frame.location.as_ref();
        rows.push((
            Some(demangle(&name)),
            location.and_then(|location| location.file).map(str::to_owned),
            location.and_then(|location| location.line),
        ));
    }
    rows
}
