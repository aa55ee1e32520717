//! From an address in the kernel to the function that it is in.

use std::sync::Arc;

use super::load::SourceStatus;

/// How far modules are from the kernel at most: their calls into it are by 32-bit distances on x86-64, and
/// `arch/arm64/kernel/module.c` (6.12) keeps to the same.
const REACH: u64 = 1 << 31;

/// The kernel's functions, sorted by address.
///
/// Some 60,000 functions: names are kept in one string (1.5 MB), with their offsets beside.
#[derive(Debug, Default)]
pub struct Symbols {
    /// Where the kernel's own code begins.
    base: u64,
    starts: Vec<(u64, u32)>,
    names: String,
}

impl Symbols {
    /// Reads `/proc/kallsyms`; empty where the kernel shows no addresses (`kptr_restrict`, or
    /// neither CAP_SYSLOG nor `perf_event_paranoid` allow it): locations are then absent.
    pub fn read() -> Self {
        match std::fs::read_to_string("/proc/kallsyms") {
            Ok(text) => Self::parse(&text),
            Err(error) => {
                tracing::warn!(%error, "cannot read /proc/kallsyms: drops will have no location");
                Self::default()
            }
        }
    }

    /// Parses lines of `address type name [module]`; keeps functions, skips what it cannot read.
    pub fn parse(text: &str) -> Self {
        let mut starts = Vec::new();
        let mut names = String::new();
        let mut base = None;
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(address), Some(kind), Some(name)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let Ok(address) = u64::from_str_radix(address, 16) else {
                continue;
            };
            if address == 0 || !matches!(kind, "t" | "T" | "w" | "W") {
                continue;
            }
            if name == "_stext" {
                base.get_or_insert(address);
            }
            let Ok(at) = u32::try_from(names.len()) else {
                break;
            };
            starts.push((address, at));
            // Compilers split functions into `name.part.0`, `name.cold`; a person looks for `name`.
            names.push_str(name.split('.').next().unwrap_or(name));
            names.push('\n');
        }
        starts.sort_by_key(|(address, _)| *address);
        let base = base.or_else(|| Some(starts.first()?.0)).unwrap_or(0);
        // arm64 lists eBPF programs and the slots of kprobes too, terabytes away from all else.
        starts.retain(|(start, _)| start.abs_diff(base) <= REACH);
        starts.shrink_to_fit();
        names.shrink_to_fit();
        Self {
            base,
            starts,
            names,
        }
    }

    /// The function that holds the call which returns to `address`.
    pub fn name(&self, address: u64) -> Option<Arc<str>> {
        // A return address may already be the next function's first.
        let after = self.starts.partition_point(|(start, _)| *start < address);
        let (_, at) = self.starts.get(after.checked_sub(1)?)?;
        let name = self.names.get(*at as usize..)?.split('\n').next()?;
        Some(Arc::from(name))
    }

    /// The function that holds the call which returns to an address of which the low half is known:
    /// the kernel and its modules lie within 2 GiB of one another.
    pub fn name_by_low_half(&self, low: u32) -> Option<Arc<str>> {
        let distance = low.wrapping_sub(self.base as u32).cast_signed();
        self.name(self.base.wrapping_add_signed(distance.into()))
    }

    /// Whether any address is known.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }
}

/// Names addresses, and reads the kernel's symbols again when modules have come or gone.
#[derive(Debug)]
pub struct Locator {
    symbols: Symbols,
    modules: String,
}

impl Locator {
    /// Reads the symbols.
    pub fn new() -> Self {
        Self {
            symbols: Symbols::read(),
            modules: modules(),
        }
    }

    /// Whether drops will have a location.
    pub fn status(&self) -> SourceStatus {
        let up = !self.symbols.is_empty();
        SourceStatus {
            source: "locations",
            up,
            hook: up.then(|| "/proc/kallsyms".to_owned()),
            why: (!up).then(|| {
                "/proc/kallsyms shows no addresses: needed is CAP_SYSLOG, or kernel.kptr_restrict=0"
                    .to_owned()
            }),
            lost: (!up).then_some(
                "drops have no location, and some that are no loss cannot be told from real ones",
            ),
        }
    }

    /// The function that holds the call which returns to the address with this low half.
    pub fn name(&mut self, address_low: u32) -> Option<Arc<str>> {
        // An address of a module that came later would be taken for the function before it.
        let modules = modules();
        if modules != self.modules {
            *self = Self {
                symbols: Symbols::read(),
                modules,
            };
        }
        self.symbols.name_by_low_half(address_low)
    }
}

impl Default for Locator {
    fn default() -> Self {
        Self::new()
    }
}

fn modules() -> String {
    // Name and address; without modules there is no such file.
    let text = std::fs::read_to_string("/proc/modules").unwrap_or_default();
    let parts = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        Some(format!("{} {};", words.next()?, words.nth(4)?))
    };
    text.lines().filter_map(parts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "ffffffff81000000 T _stext\nffffffff81000100 t nft_do_chain.cold\n\
                        ffffffff81000200 d data\nffffffff81000300 T ip_error\nbroken\n\
                        ffffffffc0000000 t in_module\t[mod]\n";

    #[test]
    fn names_the_function_that_called() {
        let symbols = Symbols::parse(TEXT);
        let name = |address| symbols.name(address).map(|n| n.to_string());
        assert_eq!(name(0xffff_ffff_8100_0150).as_deref(), Some("nft_do_chain"));
        // The return address of a call at the very end of nft_do_chain.
        assert_eq!(name(0xffff_ffff_8100_0300).as_deref(), Some("nft_do_chain"));
        assert_eq!(name(0xffff_ffff_8100_0301).as_deref(), Some("ip_error"));
        assert_eq!(name(0xffff_ffff_c000_0010).as_deref(), Some("in_module"));
        assert_eq!(name(0x1000), None);
        // Above and below the first symbol.
        let low = |address| symbols.name_by_low_half(address).map(|n| n.to_string());
        assert_eq!(low(0x8100_0150).as_deref(), Some("nft_do_chain"));
        assert_eq!(low(0xc000_0010).as_deref(), Some("in_module"));
        assert_eq!(low(0x7000_0000), None);
    }

    /// As on arm64: modules below the kernel, and far below them what is no place of a drop.
    #[test]
    fn what_lies_far_away_names_nothing() {
        let symbols = Symbols::parse(
            "ffff8000814a0000 t kprobe_insn_page\t[__builtin__kprobes]\n\
             ffffa1c5f0000000 t nft_do_chain\t[nf_tables]\nffffa1c620010000 T _text\n\
             ffffa1c620020000 T _stext\nffffa1c620030000 T ip_error\n\
             ffffc00000000000 t bpf_prog_1_drop\t[bpf]\n",
        );
        let low = |address| symbols.name_by_low_half(address).map(|n| n.to_string());
        assert_eq!(low(0xf000_0010).as_deref(), Some("nft_do_chain"));
        assert_eq!(low(0x2003_0010).as_deref(), Some("ip_error"));
        assert_eq!(low(0xe000_0000), None);
    }

    #[test]
    fn hidden_addresses_give_no_names() {
        let symbols = Symbols::parse("0000000000000000 T _stext\n0000000000000000 t a\n");
        assert!(symbols.is_empty());
        assert_eq!(symbols.name(0xffff_ffff_8100_0000), None);
    }
}
