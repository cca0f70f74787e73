//! Turns a table of system calls into classic BPF.
//!
//! seccompiler's own compiler knows one action per filter, compares each system call in turn and
//! does not see the x32 bit. This one takes an action per call, tests 32-bit halves of arguments,
//! and finds the call by a binary search over ranges of numbers, so that a long table costs the
//! kernel little (it runs the filter once for each call number when the filter is installed).

use std::collections::BTreeMap;

use seccompiler::sock_filter;

/// Instruction codes, `linux/bpf_common.h`.
pub(super) mod code {
    /// A = word of `seccomp_data` at k.
    pub const LOAD: u16 = 0x20;
    /// A &= k.
    pub const AND: u16 = 0x54;
    /// pc += k.
    pub const JUMP: u16 = 0x05;
    /// pc += A == k ? jt : jf.
    pub const IF_EQUAL: u16 = 0x15;
    /// pc += A >= k ? jt : jf.
    pub const IF_AT_LEAST: u16 = 0x35;
    /// Ends with k.
    pub const RETURN: u16 = 0x06;
}

/// Offsets in `struct seccomp_data`.
pub(super) const OFFSET_NR: u32 = 0;
/// The audit architecture of the call.
pub(super) const OFFSET_ARCH: u32 = 4;
/// The first of six 64-bit arguments.
pub(super) const OFFSET_ARGS: u32 = 16;

/// The only architecture this program was built for: its call numbers are in the table.
#[cfg(target_arch = "x86_64")]
pub(super) const NATIVE_ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
pub(super) const NATIVE_ARCH: u32 = 0xC000_00B7;

/// The bit that marks a call of the x32 ABI. Those use the same audit architecture as `x86_64`, so
/// a filter that compares numbers alone lets each of them pass.
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Allow,
    Errno(i32),
    Notify,
}

impl Verdict {
    pub(super) fn value(self) -> u32 {
        match self {
            Self::Allow => libc::SECCOMP_RET_ALLOW,
            Self::Notify => libc::SECCOMP_RET_USER_NOTIF,
            Self::Errno(errno) => {
                libc::SECCOMP_RET_ERRNO | (errno.unsigned_abs() & libc::SECCOMP_RET_DATA)
            }
        }
    }
}

/// Half of an argument. The kernel reads an `int` from the low half and ignores the rest, so a
/// test of the whole would be passed by with a bit set above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Low(u8),
    High(u8),
}

impl Word {
    fn offset(self) -> u32 {
        // Both architectures are little-endian.
        match self {
            Self::Low(argument) => OFFSET_ARGS + 8 * u32::from(argument),
            Self::High(argument) => OFFSET_ARGS + 8 * u32::from(argument) + 4,
        }
    }
}

/// Holds when `word & mask` is one of the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Test {
    pub word: Word,
    pub mask: u32,
    pub one_of: &'static [u32],
}

/// Applies when all tests hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clause {
    pub tests: &'static [Test],
    pub verdict: Verdict,
}

/// What is done with one system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    Always(Verdict),
    /// The first clause that applies decides, otherwise the last verdict.
    ByArgument(&'static [Clause], Verdict),
}

/// A filter before it is compiled.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// For another architecture or the x32 ABI.
    pub foreign: Verdict,
    /// For a known number without a rule.
    pub default: Verdict,
    /// Numbers above `last_known` get `unknown`.
    pub last_known: u32,
    /// A kernel newer than this program has calls nobody here has judged. ENOSYS makes the C
    /// library fall back to an older call; EPERM would break it.
    pub unknown: Verdict,
    pub rules: BTreeMap<u32, Rule>,
}

impl Table {
    pub(super) fn set(&mut self, calls: &[libc::c_long], rule: Rule) {
        for call in calls {
            let number = u32::try_from(*call).expect("system call numbers are small");
            let earlier = self.rules.insert(number, rule);
            assert!(earlier.is_none(), "system call {number} has two rules");
        }
    }

    /// Compiles the table.
    pub(super) fn compile(&self) -> Vec<sock_filter> {
        let mut out = vec![
            statement(code::LOAD, OFFSET_ARCH),
            branch(code::IF_EQUAL, NATIVE_ARCH, 1, 0),
            statement(code::RETURN, self.foreign.value()),
            statement(code::LOAD, OFFSET_NR),
            branch(code::IF_AT_LEAST, X32_BIT, 0, 1),
            statement(code::RETURN, self.foreign.value()),
        ];
        search(&self.ranges(), &mut out);
        debug_assert!(out.len() <= 4096, "the kernel takes 4096 instructions");
        out
    }

    /// (first number, rule), ascending, each valid up to the next one's first number.
    fn ranges(&self) -> Vec<(u32, Rule)> {
        let mut ranges: Vec<(u32, Rule)> = Vec::new();
        for number in 0..=self.last_known + 1 {
            let fallback = if number > self.last_known { self.unknown } else { self.default };
            let rule = match self.rules.get(&number) {
                Some(rule) => *rule,
                None => Rule::Always(fallback),
            };
            if ranges.last().is_none_or(|(_, last)| *last != rule) {
                ranges.push((number, rule));
            }
        }
        ranges
    }
}

/// Emits a binary search for the call number in A.
fn search(ranges: &[(u32, Rule)], out: &mut Vec<sock_filter>) {
    match ranges {
        [] => {}
        [(_, rule)] => leaf(*rule, out),
        _ => {
            let (left, right) = ranges.split_at(ranges.len() / 2);
            let mut below = Vec::new();
            search(left, &mut below);
            // A conditional jump reaches 255 instructions, an unconditional one any distance.
            let distance = u32::try_from(below.len()).expect("programs are short");
            if let Ok(short) = u8::try_from(distance) {
                out.push(branch(code::IF_AT_LEAST, right[0].0, short, 0));
            } else {
                out.push(branch(code::IF_AT_LEAST, right[0].0, 0, 1));
                out.push(statement(code::JUMP, distance));
            }
            out.append(&mut below);
            search(right, out);
        }
    }
}

fn leaf(rule: Rule, out: &mut Vec<sock_filter>) {
    match rule {
        Rule::Always(verdict) => out.push(statement(code::RETURN, verdict.value())),
        Rule::ByArgument(clauses, otherwise) => {
            for clause in clauses {
                // Built from the end, so that each test knows how far it is to the next clause.
                let mut body = vec![statement(code::RETURN, clause.verdict.value())];
                for test in clause.tests.iter().rev() {
                    let mut head = check(*test, body.len());
                    head.append(&mut body);
                    body = head;
                }
                out.append(&mut body);
            }
            out.push(statement(code::RETURN, otherwise.value()));
        }
    }
}

/// Goes on when the test holds, jumps over `rest` instructions when not.
fn check(test: Test, rest: usize) -> Vec<sock_filter> {
    let mut out = vec![statement(code::LOAD, test.word.offset())];
    if test.mask != u32::MAX {
        out.push(statement(code::AND, test.mask));
    }
    let values = test.one_of.len();
    for (index, value) in test.one_of.iter().enumerate() {
        // Past the values that are left and the jump after them.
        let hit = u8::try_from(values - index).expect("few values");
        out.push(branch(code::IF_EQUAL, *value, hit, 0));
    }
    let distance = u32::try_from(rest).expect("programs are short");
    out.push(statement(code::JUMP, distance));
    out
}

const fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

const fn branch(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
