"""A model of the cycles that one step of a Triton kernel takes, from its machine code; no measurement, about +-30%.

One warp issues a loop's instructions in order. Each waits for the stall count of the one before and for the scoreboards
that it names; both stand in the upper word of an instruction's 128 bits (Jia et al., 2018, section 2.1,
https://arxiv.org/abs/1804.06826). Latencies are of the order of published measurements. The model serves to compare
versions of a kernel where there is no GPU. It knows nothing of other warps, of caches, or of the clock.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Cycles until an operation that signals a scoreboard has its result. LDG: from the second-level cache.
LATENCY = {"LDG": 270, "LD": 270, "LDL": 40, "LDS": 30, "SHFL": 24, "MUFU": 20, "REDUX": 24, "CREDUX": 24, "S2R": 30}
OTHER_LATENCY, READ_LATENCY, BARRIER = 20, 12, 30  # others; operands that are read late (stores); BAR.SYNC
INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>[^;]+);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x(?P<upper>[0-9a-f]{16}) \*/"
)


class Instruction(NamedTuple):
    """An instruction, and what it waits for and signals."""

    address: int
    name: str
    target: int | None  # of a branch
    conditional: bool
    stall: int
    signals: tuple[int, int]  # scoreboards for its result and its operands; 7: none
    waits: int  # mask of scoreboards


def parse(code: str) -> list[Instruction]:
    """Return the instructions of `nvdisasm -hex -c` of one kernel, labels resolved."""
    labels, found = {}, []
    pending: list[str] = []
    for part in re.split(r"^(\.L_\S+):", code, flags=re.M):
        if part.startswith(".L_"):
            pending.append(part)
            continue
        matches = [*INSTRUCTION.finditer(part)]
        if matches:
            labels |= dict.fromkeys(pending, int(matches[0]["address"], 16))
            pending = []
            found += matches
    instructions = []
    for match in found:
        text, upper = match["text"].strip(), int(match["upper"], 16)
        predicate, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        name = rest.split()[0].split(".")[0]
        label = re.search(r"`\((\.L_[^)]+)\)", rest) if name == "BRA" else None
        instructions.append(
            Instruction(
                int(match["address"], 16),
                name,
                labels[label[1]] if label else None,
                bool(predicate),
                max(1, upper >> 41 & 15),
                (upper >> 46 & 7, upper >> 49 & 7),
                upper >> 52 & 63,
            )
        )
    return instructions


def loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Return the innermost loops' bodies, the largest first.

    A branch over a part of the body counts as taken (parts such as storing a checkpoint), one out of it as not taken.
    """
    spans = [(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address]
    inner = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    bodies = []
    for first, last in inner:
        body, skipped_to = [], first
        for instruction in instructions:
            if not skipped_to <= instruction.address <= last:
                continue
            body.append(instruction)
            if instruction.target is not None and instruction.address < instruction.target <= last:
                skipped_to = instruction.target
        bodies.append(body)
    return sorted(bodies, key=len, reverse=True)


def cycles_of(body: list[Instruction], rounds: int = 4) -> int:
    """Return the cycles of one pass through a loop's body, once the first passes are over."""
    now, start, done = 0, 0, [0] * 8
    for _ in range(rounds):
        start = now
        for instruction in body:
            now = max([now, *(done[n] for n in range(6) if instruction.waits >> n & 1)])
            result, operands = instruction.signals
            done[result] = max(done[result], now + LATENCY.get(instruction.name, OTHER_LATENCY))
            done[operands] = max(done[operands], now + READ_LATENCY)
            now += BARRIER if instruction.name == "BAR" else instruction.stall
    return now - start


def cycles_per_step(code: str, n_loops: int) -> int:
    """Return the cycles of one step: one pass through each of the `n_loops` smallest loops.

    Backward's largest loop is the outer one, over spans of a chunk; its code does not enclose the others'.
    """
    return sum(map(cycles_of, loops(parse(code))[-n_loops:]))
