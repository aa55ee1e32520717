//! An XDP program that drops UDP and lets everything else pass, as an object file for
//! `ip link set dev X xdp object FILE section xdp`.
//!
//! A handful of instructions, assembled here, so that the lab needs no compiler for BPF.

use anyhow::{Context, Result};
use object::write::{Object, Symbol, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
};

/// One instruction (RFC 9669, section 3): opcode, destination, source, jump offset, immediate.
const fn insn(opcode: u8, dst: u8, src: u8, offset: i16, imm: i32) -> [u8; 8] {
    let (offset, imm) = (offset.to_le_bytes(), imm.to_le_bytes());
    [
        opcode,
        src << 4 | dst,
        offset[0],
        offset[1],
        imm[0],
        imm[1],
        imm[2],
        imm[3],
    ]
}

/// Loads a 32-bit, a 16-bit or an 8-bit word from memory; RFC 9669, section 5.1.
const LOAD_32: u8 = 0x61;
const LOAD_16: u8 = 0x69;
const LOAD_8: u8 = 0x71;
/// 64-bit moves and adds; section 4.1.
const MOVE_IMM: u8 = 0xb7;
const MOVE: u8 = 0xbf;
const ADD_IMM: u8 = 0x07;
/// Jumps; section 4.3.
const JUMP_GREATER: u8 = 0x2d;
const JUMP_EQUAL_IMM: u8 = 0x15;
const JUMP_NOT_EQUAL_IMM: u8 = 0x55;
const JUMP: u8 = 0x05;
const EXIT: u8 = 0x95;
/// Verdicts of `enum xdp_action` in linux/bpf.h.
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;

/// EtherTypes and the IP protocol sit at 12 and, by family, at 23 or 20 of the frame.
const PROGRAM: [[u8; 8]; 15] = [
    insn(LOAD_32, 2, 1, 0, 0), // r2 = ctx->data
    insn(LOAD_32, 3, 1, 4, 0), // r3 = ctx->data_end
    insn(MOVE, 4, 2, 0, 0),
    insn(ADD_IMM, 4, 0, 0, 42),
    insn(JUMP_GREATER, 4, 3, 8, 0), // shorter than a UDP datagram: pass
    insn(LOAD_16, 5, 2, 12, 0),
    insn(JUMP_EQUAL_IMM, 5, 0, 3, 0x0008), // IPv4, as loaded on a little-endian machine
    insn(JUMP_NOT_EQUAL_IMM, 5, 0, 5, 0xdd86), // nor IPv6: pass
    insn(LOAD_8, 5, 2, 20, 0),
    insn(JUMP, 0, 0, 1, 0),
    insn(LOAD_8, 5, 2, 23, 0),
    insn(JUMP_NOT_EQUAL_IMM, 5, 0, 1, 17), // not UDP: pass
    insn(JUMP, 0, 0, 2, 0),
    insn(MOVE_IMM, 0, 0, 0, XDP_PASS),
    insn(EXIT, 0, 0, 0, 0),
];
/// What follows a match.
const MATCH: [[u8; 8]; 2] = [insn(MOVE_IMM, 0, 0, 0, XDP_DROP), insn(EXIT, 0, 0, 0, 0)];

/// The bytes of the object file.
///
/// # Errors
/// The object writer refuses it.
pub fn object() -> Result<Vec<u8>> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let section = object.add_section(Vec::new(), b"xdp".to_vec(), SectionKind::Text);
    let code = [&PROGRAM[..], &MATCH[..]].concat().concat();
    object.append_section_data(section, &code, 8);
    object.add_symbol(Symbol {
        name: b"drop_udp".to_vec(),
        value: 0,
        size: code.len() as u64,
        kind: SymbolKind::Text,
        scope: SymbolScope::Linkage,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    });
    let license = object.add_section(Vec::new(), b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    object.write().context("write the XDP object file")
}
