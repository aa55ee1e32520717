//! Bytes to lines, bounded.

/// No line is longer, DNS name, policies and fixes included; what sends more is no agent.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// Puts lines together from what comes in pieces. Of a line that is too long only the beginning stays,
/// which nobody can read: so it is missed like any other that is broken.
#[derive(Debug, Default)]
pub struct Lines {
    pending: Vec<u8>,
    /// The rest of a line that was too long is not kept.
    is_cut: bool,
}

impl Lines {
    /// The lines that a piece completes.
    pub fn push(&mut self, piece: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        let mut parts = piece.split(|byte| *byte == b'\n').peekable();
        while let Some(part) = parts.next() {
            if !self.is_cut {
                let room = MAX_LINE_BYTES - self.pending.len();
                self.is_cut = part.len() > room;
                self.pending
                    .extend_from_slice(&part[..part.len().min(room)]);
            }
            // Behind the last newline a line has only begun.
            if parts.peek().is_some() {
                lines.push(String::from_utf8_lossy(&self.pending).into_owned());
                self.pending = Vec::new();
                self.is_cut = false;
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let text = "one\n\ntwo → three\n";
        for size in 1..=text.len() {
            let mut lines = Lines::default();
            let pieces = text.as_bytes().chunks(size);
            let all: Vec<String> = pieces.flat_map(|piece| lines.push(piece)).collect();
            assert_eq!(all, ["one", "", "two → three"], "{size}");
        }
    }

    #[test]
    fn a_line_that_never_ends_takes_no_memory() {
        let mut lines = Lines::default();
        for _ in 0..40 {
            assert!(lines.push(&[b'x'; 1 << 16]).is_empty());
        }
        assert!(lines.pending.capacity() <= 2 * MAX_LINE_BYTES);
        let all = lines.push(b"y\nnext\n");
        assert_eq!(all[0].len(), MAX_LINE_BYTES);
        assert_eq!(all[1..], ["next"]);
    }
}
