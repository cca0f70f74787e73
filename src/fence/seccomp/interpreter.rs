//! Runs a filter as the kernel would, for the tests.

use seccompiler::sock_filter;

use super::assembler::code;

/// One system call as the filter sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub nr: u32,
    pub arch: u32,
    pub args: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        let mut data = [0_u8; 64];
        data[0..4].copy_from_slice(&self.nr.to_le_bytes());
        data[4..8].copy_from_slice(&self.arch.to_le_bytes());
        for (index, argument) in self.args.iter().enumerate() {
            let at = 16 + 8 * index;
            data[at..at + 8].copy_from_slice(&argument.to_le_bytes());
        }
        let at = usize::try_from(offset).unwrap();
        assert_eq!(at % 4, 0, "loads are aligned");
        u32::from_le_bytes(data[at..at + 4].try_into().unwrap())
    }
}

/// The filter's answer; panics where the kernel would not take the program. The second value is
/// the number of instructions that ran.
pub(super) fn run(program: &[sock_filter], call: &Call) -> (u32, usize) {
    let mut accumulator = 0_u32;
    let mut pc = 0_usize;
    let mut steps = 0;
    loop {
        let instruction = &program[pc];
        pc += 1;
        steps += 1;
        let skip = |hit: bool| usize::from(if hit { instruction.jt } else { instruction.jf });
        match instruction.code {
            code::LOAD => accumulator = call.word(instruction.k),
            code::AND => accumulator &= instruction.k,
            code::JUMP => pc += usize::try_from(instruction.k).unwrap(),
            code::IF_EQUAL => pc += skip(accumulator == instruction.k),
            code::IF_AT_LEAST => pc += skip(accumulator >= instruction.k),
            code::RETURN => return (instruction.k, steps),
            other => panic!("instruction {other:#x} is not one the assembler emits"),
        }
    }
}
