"""What machine code computes with vectors, and what its making took apart of the vectors in LLVM's code.

LLVM may give code with vectors to a processor that has no instruction for them: it then takes single values out of a vector,
computes with each, and puts them together again. So machine code is compared with the code that it was made of: it may have
hardly more arithmetic on single floats, parts of vectors, conversions and counts of bits.
"""

import re
from typing import NamedTuple

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
WIDE, LANES = r"\s.*%[yz]mm", r"\s.*\b(?:v\d+\.4s|z\d+\.s)"
INTO_MEMORY = r"\s.*%[yz]mm\d+, [^%]*\("
BITS = r"\s.*\b(?:v\d+\.(?:8b|16b|4s)|z\d+\.[bsd])"
ADDS, MULTIPLIES = r"v(?:add|sub|fn?m(?:add|sub)\w+)", r"v(?:mul|fn?m(?:add|sub)\w+)"
STORES_OF_ARM = r"st(?:[pur]+|np|[1-4][wbh]?|nt1[wbh])\s.*\b[vqdz]\d+"
PACKED = {
    X86: {
        "fadd": ADDS + "ps" + WIDE,
        "fsub": ADDS + "ps" + WIDE,
        "fmul": MULTIPLIES + "ps" + WIDE,
        "fsub double": ADDS + "pd" + WIDE,
        "fmul double": MULTIPLIES + "pd" + WIDE,
        "mul": r"vpmul(?:ld|lq|udq)" + WIDE,
        "add": r"vpadd[dq]" + WIDE,
        "xor": r"v(?:pxor[dq]?|xorps|pternlog[dq])" + WIDE,
        "or": r"v(?:por[dq]?|orps|pternlog[dq])" + WIDE,
        "shl": r"vp(?:slld|unpck\w+|shuf\w+)" + WIDE,
        "umax|smax": r"vpmax[su]d" + WIDE,
        "icmp": r"vp(?:cmp\w+|testn?m\w|min\w+)\s.*%[xyz]mm",
        "store float|i32": r"vp?(?:mov[au]p[sd]|movdq[au]\d*|movnt\w+|maskmov\w+)" + INTO_MEMORY,
        "store i8": r"v(?:p?mov\w+|pextrq|extract\w+)\s.*%[xyz]mm\d+, [^%]*\(",
        "store i16": r"v(?:p?mov\w+|cvtps2ph|extract\w+)\s.*%[xyz]mm\d+, [^%]*\(",
    },
    ARM: {
        "fadd": r"f(?:add|sub|n?ml[as]|n?mad|n?msb)" + LANES,
        "fsub": r"f(?:add|subr?|abd|n?ml[as]|n?msb)" + LANES,
        "fmul": r"f(?:mul|n?ml[as]|n?mad|n?msb)" + LANES,
        "fsub double": r"f(?:subr?|n?mls|n?msb)\s.*\b(?:v\d+\.2d|z\d+\.d)",
        "fmul double": r"f(?:mul|n?ml[as]|n?msb)\s.*\b(?:v\d+\.2d|z\d+\.d)",
        "mul": r"(?:mul|mla|mad)" + LANES,
        "add": r"add" + LANES,
        "xor": r"(?:eor3?|bcax)" + BITS,
        "or": r"(?:orr|orn|bsl|bif|bit|sli)" + BITS,
        "shl": r"(?:shl|u?shll2?|lsl|sli)" + LANES,
        "umax|smax": r"[su]max[vp]?" + LANES,
        "icmp": r"f?cm\w+\s.*\b(?:v\d+\.(?:2d|4s|8h|16b)|z\d+\.[bhsd])",
        "store float|i32": STORES_OF_ARM,
        "store i8": STORES_OF_ARM,
        "store i16": STORES_OF_ARM,
    },
}
"""By triple what an instruction on vectors in LLVM's code becomes: of 8 and of 4 floats at least."""


class Code(NamedTuple):
    """A piece for one processor: LLVM's code, optimised, and the machine code that is made of it."""

    llvm: str
    machine: str


class Single(NamedTuple):
    """What computes with single values, in LLVM's code and in machine code."""

    llvm: str
    machine: dict[str, str]


SINGLES = {
    "arithmetic": Single(
        r"= f(?:add|sub|mul)(?: [a-z]+)* (?:float|double) |llvm\.vector\.reduce\.f|llvm\.fmuladd\.f",
        {X86: r"^\tv(?:add|sub|mul|fn?m(?:add|sub)\w+)s[sd]\b", ARM: r"^\tf(?:add|sub|n?mul|n?madd|n?msub)\t[sd]\d"},
    ),
    "parts of vectors": Single(
        r"= (?:extract|insert)element",
        {
            X86: r"^\tv(?:pextr[bwdq]|extractps|pinsr[bwdq]\s+\$[1-9]|insertps)",  # `vpinsrw $0` reads a single half
            ARM: r"^\t(?:[us]mov|ins|mov|dup)\t.*\bv\d+\.[bhsd]\[\d+\]",
        },
    ),
    "conversions": Single(
        r"= (?:fptrunc|fpext) (?:half|float|double)",
        {X86: r"^\tv(?:cvts[sd]2s[sd]|cvtph2ps\s+.*%xmm\d+$|cvtps2ph\s+\$\d+, %xmm)", ARM: r"^\tfcvt\t[hsd]\d"},
    ),
    "counts of bits": Single(r"llvm\.ctpop\.i\d+\(", {X86: r"^\tpopcnt", ARM: r"^\tcnt\t[wx]\d"}),
}
NARROW_MASKED = r"call .*@llvm\.masked\.(?:load|store)\.v(\d+)i(?:8|16)\."
"""Vectors of bytes and of halves that are read or written where a mask says so. AVX2 has an instruction for words alone."""
HELPERS = r"\b__(?:trunc|extend|popcount|fix|float)\w+|\bfmodf?\b"
"""Functions of the compiler that compute one value."""


def not_packed(code: Code, wanted: list[str], triple: str) -> list[str]:
    """Return what is wanted of vectors, and for which machine code has no instruction on vectors."""
    return [one for one in wanted if not re.search(rf"^\t(?:{PACKED[triple][one]})", code.machine, re.MULTILINE)]


def taken_apart(code: Code, triple: str, spare: int, may_mask: bool = False) -> list[str]:
    """Return what machine code does with single values more often than LLVM's code, by more than `spare`; and calls.

    `may_mask`: reads and writes of bytes and halves under a mask may be taken apart.
    """
    found = [f"calls {name}" for name in sorted(set(re.findall(HELPERS, code.machine)))]
    for what, single in SINGLES.items():
        before = len(re.findall(single.llvm, code.llvm))
        if may_mask and what == "parts of vectors":
            before += sum(map(int, re.findall(NARROW_MASKED, code.llvm)))
        after = len(re.findall(single.machine[triple], code.machine, re.MULTILINE))
        if after > before + spare:
            found.append(f"{what}: {after} in machine code, {before} in LLVM's")
    return found
