//! What a machine is told to do, one command after the other, and what became of each.

use std::time::{Duration, Instant};

/// A command, and the name under which it is shown.
#[derive(Clone, Debug)]
pub struct Step {
    /// Its name; no blanks.
    pub name: String,
    /// Words for a shell.
    pub command: String,
}

/// What a step wrote, and how it ended.
#[derive(Clone, Debug, Default)]
pub struct Ran {
    /// The step's name.
    pub name: String,
    /// All it wrote.
    pub lines: Vec<String>,
    /// Its exit code; none if the machine ended first.
    pub code: Option<i32>,
    /// How long it took, of our time.
    pub took: Duration,
}

/// Stands before what says where a step begins and ends.
const MARK: &str = "@@whydrop ";

/// The shell script that runs the steps.
pub fn script(steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        text += &format!(
            "echo '{MARK}begin {}'\n( {} )\necho \"{MARK}end $?\"\n",
            step.name, step.command
        );
    }
    text
}

/// Puts the lines of a machine together again.
#[derive(Debug, Default)]
pub struct Reader {
    ran: Vec<Ran>,
    started: Option<Instant>,
}

/// What a line was.
#[derive(Debug)]
pub enum Heard<'a> {
    /// Of the machine itself.
    Noise,
    /// A step begins.
    Begun,
    /// What the step wrote.
    Output(&'a str),
    /// The step is done, and wrote this since the last line's end.
    Ended(&'a str, &'a Ran),
}

impl Reader {
    /// Takes a line.
    pub fn line<'a>(&'a mut self, line: &'a str) -> Heard<'a> {
        let (output, mark) = match line.split_once(MARK) {
            None => (line, None),
            Some((before, mark)) => (before, Some(mark)),
        };
        if let Some(name) = mark.and_then(|mark| mark.strip_prefix("begin ")) {
            self.started = Some(Instant::now());
            self.ran.push(Ran {
                name: name.to_owned(),
                ..Ran::default()
            });
            return Heard::Begun;
        }
        let (Some(started), Some(last)) = (self.started, self.ran.last_mut()) else {
            return Heard::Noise;
        };
        // A step need not end its last line.
        if mark.is_none() || !output.is_empty() {
            last.lines.push(output.to_owned());
        }
        let Some(code) = mark.and_then(|mark| mark.strip_prefix("end ")) else {
            return Heard::Output(output);
        };
        self.started = None;
        last.code = code.trim().parse().ok();
        last.took = started.elapsed();
        Heard::Ended(output, last)
    }

    /// The steps that began.
    pub fn ran(self) -> Vec<Ran> {
        self.ran
    }
}

/// What libtest says of one test executable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tests {
    /// How many passed, without those left out.
    pub passed: usize,
    /// Names of those that failed, or that did not end.
    pub failed: Vec<String>,
    /// Names of those that this kernel leaves out, and why.
    pub left_out: Vec<(String, String)>,
}

/// Reads what a test executable wrote; see `left_out` in `tests/src/kernel.rs`.
pub fn tests(lines: &[String]) -> Tests {
    let mut tests = Tests::default();
    let mut passed = 0;
    for line in lines {
        if let Some((name, why)) = line
            .strip_prefix("left out: ")
            .and_then(|rest| rest.split_once(": "))
        {
            tests.left_out.push((name.to_owned(), why.to_owned()));
        } else if let Some((name, result)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "))
        {
            match result {
                "ok" => passed += 1,
                _ if result.starts_with("ignored") => {
                    tests.left_out.push((name.to_owned(), result.to_owned()));
                }
                _ => tests.failed.push(name.to_owned()),
            }
        }
    }
    let counted = tests
        .left_out
        .iter()
        .filter(|(_, why)| !why.starts_with("ignored"))
        .count();
    tests.passed = passed - counted.min(passed);
    tests
}

#[cfg(test)]
mod tests_of_this {
    use super::*;

    fn read(text: &str) -> Vec<Ran> {
        let mut reader = Reader::default();
        for line in text.lines() {
            reader.line(line);
        }
        reader.ran()
    }

    #[test]
    fn steps_are_told_apart() {
        let ran = read(
            "noise\n@@whydrop begin check\nall good\n@@whydrop end 0\n\
             noise\n@@whydrop begin lab\nhalf",
        );
        assert_eq!(ran.len(), 2);
        assert_eq!((ran[0].name.as_str(), ran[0].code), ("check", Some(0)));
        assert_eq!(ran[0].lines, ["all good"]);
        assert_eq!((ran[1].name.as_str(), ran[1].code), ("lab", None));
        assert_eq!(ran[1].lines, ["half"]);
    }

    #[test]
    fn the_script_marks_what_the_reader_reads() {
        let steps = ["true", "exit 3", "echo -n unended"].map(|command| Step {
            name: command.replace(' ', "-"),
            command: command.to_owned(),
        });
        let text = std::process::Command::new("sh")
            .args(["-c", &script(&steps)])
            .output()
            .unwrap();
        let ran = read(&String::from_utf8(text.stdout).unwrap());
        let codes: Vec<_> = ran.iter().map(|ran| (&*ran.name, ran.code)).collect();
        assert_eq!(
            codes,
            [
                ("true", Some(0)),
                ("exit-3", Some(3)),
                ("echo--n-unended", Some(0))
            ]
        );
        assert_eq!(ran[2].lines, ["unended"]);
    }

    #[test]
    fn reads_libtest() {
        let text = "running 4 tests\n\
            left out: path::nft::ipv4: no egress hook\n\
            test path::nft::ipv4 ... ok\n\
            test a::ipv4 ... ok\n\
            test b::ipv6 ... FAILED\n\
            test c ... ignored, by hand\n\
            test result: FAILED. 2 passed; 1 failed; 1 ignored\n";
        let lines: Vec<_> = text.lines().map(str::to_owned).collect();
        assert_eq!(
            tests(&lines),
            Tests {
                passed: 1,
                failed: vec!["b::ipv6".to_owned()],
                left_out: vec![
                    ("path::nft::ipv4".to_owned(), "no egress hook".to_owned()),
                    ("c".to_owned(), "ignored, by hand".to_owned())
                ],
            }
        );
    }
}
