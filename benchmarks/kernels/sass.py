"""What is to be seen in NVIDIA's machine code, as `cuobjdump -sass` prints it: loops and waits.

On sm_90 products are asynchronous (HGMMA, which is wgmma), as are copies to shared memory (LDGSTS,
which is cp.async, and UTMALDG, TMA's). What waits for them is WARPGROUP.DEPBAR for the former and
DEPBAR.LE SB0 for the groups of the latter, with how many may still be on their way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

MOST_WAITS = 2
"""For products in a loop: for those of the scores, which may be in two parts (72 is 64 + 8).

Where registers are few, or a tile is too much for its warps, ptxas has each product waited for.
"""

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)
WRITES = "STS", "STSM", "LDGSTS", "UTMALDG"  # to shared memory


class Instruction(NamedTuple):
    """One instruction: its address, its name with all modifiers, and its operands."""

    address: int
    name: str
    operands: str

    @property
    def op(self) -> str:
        return self.name.partition(".")[0]


def instructions(code: str) -> list[Instruction]:
    """All instructions of a kernel, in their order."""
    return [Instruction(int(m[1], 16), m[2], m[3].strip()) for m in LINE.finditer(code)]


def product_loops(code: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """The bodies of the innermost loops with products of warp groups, from target to branch."""
    places = {one.address: at for at, one in enumerate(code)}
    spans = []
    for end, one in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", one.operands) if one.op == "BRA" else None
        start = places.get(int(target[1], 16)) if target else None
        if start is not None and start < end:
            spans.append((start, end))
    inner = [(a, b) for a, b in spans if not any(a <= c and d < b for c, d in spans)]
    bodies = [code[start : end + 1] for start, end in inner]
    return [body for body in bodies if any(one.op == "HGMMA" for one in body)]


def hazards(code: Sequence[Instruction]) -> list[str]:
    """What makes products and copies wait for each other, or overtake each other."""
    found, loops = [], product_loops(code)
    if not loops and any(one.op == "HGMMA" for one in code):
        found.append("no loop is found around the products")
    for body in loops:
        waits = sum(one.name.startswith("WARPGROUP.DEPBAR") for one in body)
        if waits > MOST_WAITS:
            found.append(f"{waits} waits for products in a loop")
        if any(
            one.name.startswith("DEPBAR.LE") and re.fullmatch(r"SB0,\s*0x0", one.operands)
            for one in body
        ):
            found.append("a loop waits for the copies that it has just asked for")
    if written_before_barrier(code):
        found.append("shared memory is written between a wait for products and the next barrier")
    return found


def written_before_barrier(code: Sequence[Instruction]) -> bool:
    """Whether a warp that has waited for its products writes where others' may still be reading.

    All warps' are done at the barrier (BAR.SYNC) that follows a wait.
    """
    waited = False
    for one in code:
        if one.op == "HGMMA" or one.name.startswith("BAR.SYNC"):
            waited = False
        elif one.name.startswith("WARPGROUP.DEPBAR"):
            waited = True
        elif waited and one.op in WRITES:
            return True
    return False
