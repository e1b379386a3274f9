"""Reads machine code: instructions and bytes on the longest way through a kernel's main loop, and loads under way.

Text comes from `cuobjdump -sass`. Blocks and natural loops are found by dominators, so code that the compiler has put
out of line belongs to the loop that it is reached from. Of an `if` the longer side is taken, inner loops are passed
once: an upper bound of one turn in which every branch that has work is taken. What is called (rare cases of a
division or a root) is not followed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SIZES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
GLOBAL = ("LDG", "STG", "LDGSTS")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code, operands as text; `target` is an address of a branch."""

    address: int
    predicate: str
    opcode: str
    operands: str
    target: int | None

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """That a warp moves from or to global memory."""
        if self.name not in GLOBAL:
            return 0
        width = next((SIZES[part] for part in reversed(self.opcode.split(".")) if part in SIZES), 4)
        return 32 * width

    @property
    def ends(self) -> bool:
        """Nothing falls through."""
        return self.predicate == "" and (self.name in ("EXIT", "RET", "BRX") or (self.name == "BRA" and self.always))

    @property
    def always(self) -> bool:
        """A branch without a condition among its operands."""
        return re.match(r"(0x|`)", self.operands) is not None

    def registers(self) -> tuple[list[int], set[int]]:
        """Written by a load (by its width) and read by anything."""
        found = [int(n) for n in re.findall(r"\bR(\d+)\b", self.operands)]
        if self.name == "LDG" and found:
            width = max(1, self.bytes // 128)
            return list(range(found[0], found[0] + width)), set(found[1:])
        return [], set(found)


LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)


def disassemble(cuobjdump: str, cubin: Path) -> dict[str, list[Instruction]]:
    """Per kernel its instructions, without those that fill up the end."""
    text = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = list(instructions(body))
    return found


def instructions(text: str) -> Iterator[Instruction]:
    for address, predicate, opcode, operands in LINE.findall(text):
        if opcode == "NOP":
            continue
        branch = re.search(r"0x([0-9a-f]+)$", operands) if opcode.startswith("BRA") else None
        # The way of a warp whose lanes have parted, where the compiler expects them together.
        if opcode.startswith("BRA.DIV"):
            branch = None
        yield Instruction(int(address, 16), predicate, opcode, operands, int(branch[1], 16) if branch else None)


class Flow:
    """Blocks of a kernel, numbered; edges, dominators and natural loops."""

    def __init__(self, code: list[Instruction]) -> None:
        places = {i.address: n for n, i in enumerate(code)}
        # A target may be an instruction that was left out (a filler): the next one stands for it.
        addresses = sorted(places)
        heads = {0}
        for n, i in enumerate(code):
            if i.target is not None:
                heads.add(self._place(addresses, i.target))
            if i.target is not None or i.ends:
                heads.add(n + 1)
        starts = sorted(h for h in heads if h < len(code))
        self.blocks = [code[a:b] for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
        number = {start: n for n, start in enumerate(starts)}
        self.next: list[list[int]] = []
        for n, block in enumerate(self.blocks):
            last, follows = block[-1], []
            if not last.ends and n + 1 < len(self.blocks):
                follows.append(n + 1)
            if last.target is not None and (place := self._place(addresses, last.target)) in number:
                follows.append(number[place])
            self.next.append(follows)
        self._dominate()

    @staticmethod
    def _place(addresses: list[int], target: int) -> int:
        return next((n for n, a in enumerate(addresses) if a >= target), len(addresses))

    def _dominate(self) -> None:
        reached, left = {0}, [0]
        self.before: list[list[int]] = [[] for _ in self.blocks]
        while left:
            n = left.pop()
            for f in self.next[n]:
                self.before[f].append(n)
                if f not in reached:
                    reached.add(f)
                    left.append(f)
        self.dominators = [{0} if n == 0 else set(reached) for n in range(len(self.blocks))]
        changed = True
        while changed:
            changed = False
            for n in sorted(reached - {0}):
                new = {n} | set.intersection(*(self.dominators[b] for b in self.before[n]))
                if new != self.dominators[n]:
                    self.dominators[n], changed = new, True

    def loops(self) -> list[tuple[int, set[int]]]:
        """Head and blocks of every natural loop; loops with one head are one."""
        found: dict[int, set[int]] = {}
        for n, head in ((n, head) for head, many in enumerate(self.before) for n in many):
            if head in self.dominators[n]:
                body, left = found.setdefault(head, {head}), [n]
                while left:
                    if (block := left.pop()) not in body:
                        body.add(block)
                        left += self.before[block]
        return sorted(found.items())

    def longest(self, head: int, body: set[int], without: str = "") -> list[Instruction]:
        """The longest way from `head` through `body`, to where it leaves or comes back; of inner loops one turn.

        Code under the same condition as an instruction of a name that the expression `without` fits is gone around.
        """
        ends = [n for n in body if head in self.next[n]]
        for n in sorted(body) if without else ():
            if n in body and any(re.fullmatch(without, i.name) for i in self.blocks[n]):
                apart = [d for d in self.dominators[n] & body if not any(d in self.dominators[end] for end in ends)]
                outermost = min(apart, key=lambda d: len(self.dominators[d]), default=len(self.blocks))
                body = {m for m in body if outermost not in self.dominators[m]}
        best: dict[int, tuple[int, int | None]] = {}
        for n in self._backwards(head, body):
            ways = [(best[f][0], f) for f in self.next[n] if f in best and f not in self.dominators[n]]
            length, following = max(ways, default=(0, None))
            best[n] = (length + len(self.blocks[n]), following)
        path: list[Instruction] = []
        at: int | None = head
        while at is not None:
            path += self.blocks[at]
            at = best[at][1]
        return path

    def _backwards(self, head: int, body: set[int]) -> list[int]:
        """What is reached from `head` in `body`, each block behind those that follow it."""
        order: list[int] = []
        seen, stack = {head}, [(head, iter(self.next[head]))]
        while stack:
            n, following = stack[-1]
            f = next((f for f in following if f in body and f not in seen), None)
            if f is None:
                order.append(n)
                stack.pop()
            else:
                seen.add(f)
                stack.append((f, iter(self.next[f])))
        return order
