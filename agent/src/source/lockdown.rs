//! The kernel's lockdown: what it forbids even to root.

use std::fs;

/// Where the mode is shown: here, or in the node's own mounts, for a container that has none of it.
const PATHS: [&str; 2] = [
    "/sys/kernel/security/lockdown",
    "/proc/1/root/sys/kernel/security/lockdown",
];

/// Why no program works under `lockdown=confidentiality` (`LOCKDOWN_BPF_READ_KERNEL`,
/// include/linux/security.h, 5.10 to 7.2).
pub const CONFIDENTIALITY: &str =
    "lockdown=confidentiality forbids programs to read the kernel's memory, and so packets";

/// The mode, if the kernel has lockdown: `none`, `integrity` or `confidentiality`.
pub fn mode() -> Option<String> {
    PATHS
        .iter()
        .find_map(|path| chosen(&fs::read_to_string(path).ok()?))
}

/// Whether programs may not read kernel memory.
pub fn is_confidentiality() -> bool {
    mode().as_deref() == Some("confidentiality")
}

/// The one of the listed modes that stands in brackets.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::chosen;

    #[test]
    fn the_mode_in_brackets_is_the_one() {
        assert_eq!(
            chosen("none integrity [confidentiality]\n").as_deref(),
            Some("confidentiality")
        );
        assert_eq!(
            chosen("[none] integrity confidentiality\n").as_deref(),
            Some("none")
        );
        assert_eq!(chosen(""), None);
    }
}
