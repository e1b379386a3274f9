"""Does a kernel keep up with memory? Warp instructions a KiB in its main loop against what an SM can issue meanwhile.

`make counts` compiles every kernel for sm_90, counts and writes the table of docs/gpu-first-run.md; the tests compare
each kernel with its row in `ROWS` and the table with what they count. Nothing is measured: a share of 85 % says that
scheduling leaves room for memory, not how fast a kernel is. Bytes in flight are loads that a warp has begun before it
needs the first, times the warps that fit on an SM: by latency and rate about 30 KiB have to be, of which stores take
no part.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from codegen.issue_rows import FLIGHT, PAIRS, ROWS, SHARE, Row
from codegen.sass import Flow, Instruction, disassemble
from codegen.toolchain import KERNELS, ROOT, build_machine_code, find_toolkit

DOCUMENT = ROOT / "docs" / "gpu-first-run.md"


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors with four schedulers each, clock in Hz, bytes a second of a copy (about 90 % of the quoted)."""

    name: str
    multiprocessors: int
    clock: float
    rate: float

    @property
    def budget(self) -> float:
        """Warp instructions that may be issued for each KiB that is moved."""
        return self.multiprocessors * 4 * self.clock / self.rate * 1024


GPUS = {
    80: Gpu("A100 80 GB", 108, 1.41e9, 1.83e12),
    90: Gpu("H200", 132, 1.98e9, 4.3e12),
    100: Gpu("B200", 148, 1.85e9, 7.2e12),
}
# Issue slots that an instruction takes of its pipe on sm_90: 4 a cycle and SM, of which a pipe of 16 lanes takes one in
# eight cycles' slots (throughput table of NVIDIA's programming guide). What is in no pipe here takes its one slot.
PIPES = {
    "special": (8, r"MUFU|F2I|I2F|F2F|POPC|FLO|FRND"),
    "integer": (2, r"IADD3|VIADD|LOP3|SHF|PRMT|SEL|FSEL|FSETP|ISETP|FMNMX|VIMNMX|LEA|IABS|I2FP|F2FP|PLOP3|BMSK|SGXT"),
    "memory": (4, r"SHFL|LDS|STS|LDSM|STSM|LDG|STG|LDGSTS|LD|ST"),
}


@dataclass(frozen=True)
class Count:
    """What the machine code of a row shows; bytes in flight and registers of an SM of sm_90."""

    instructions: int
    bytes: int
    reads: int
    registers: int
    warps: int
    flight: int
    pipe: str
    pipe_slots: int

    @property
    def per_kib(self) -> float:
        return self.instructions / self.bytes * 1024

    def share(self, architecture: int = 90) -> float:
        """Of the issue budget."""
        return self.per_kib / GPUS[architecture].budget

    @property
    def pipe_share(self) -> float:
        """Of what the busiest pipe can take."""
        return self.pipe_slots / self.bytes * 1024 / GPUS[90].budget

    @property
    def needed(self) -> float:
        """Bytes in flight: of loads only as far as loads are what is moved."""
        return self.reads / self.bytes


def main_loop(flow: Flow, turn: str, without: str = "") -> list[Instruction]:
    """One turn of the innermost loop that moves at least half of what any loop does; the whole kernel without one."""
    whole = flow.longest(0, set(range(len(flow.blocks))), without)
    ways = [(body, flow.longest(head, body, without)) for head, body in flow.loops()]
    most = max((weight(way) for _, way in ways), default=0)
    if turn == "whole" or most == 0:
        return whole
    if turn == "longest":
        return max((way for _, way in ways if weight(way)), key=len)
    large = [(body, way) for body, way in ways if 2 * weight(way) >= most]
    inner = [(body, way) for body, way in large if not any(other < body for other, _ in large)]
    return max(inner, key=lambda found: (weight(found[1]), len(found[1])))[1]


def weight(way: list[Instruction]) -> int:
    """Bytes of global memory; a read of shared memory counts where a copy engine fills it."""
    return sum(i.bytes or (i.name == "LDS") for i in way)


def bytes_under_way(way: list[Instruction], turns: int = 3) -> int:
    """Most bytes of a warp's loads that have begun and not been waited for, in some turns of a loop."""
    loads: list[tuple[set[int], int]] = []  # registers to come, bytes
    groups: list[int] = [0]  # of copies to shared memory, the last one open
    most = 0
    for instruction in way * turns:
        written, read = instruction.registers()
        waited = [n for n, (registers, _) in enumerate(loads) if registers & read]
        if waited:
            del loads[: waited[-1] + 1]  # they come in order
        if instruction.name == "LDGSTS":
            groups[-1] += instruction.bytes
        elif instruction.name == "LDGDEPBAR":
            groups.append(0)
        elif instruction.name == "DEPBAR" and (left := re.search(r"SB0, 0x(\w+)", instruction.operands)):
            groups = groups[len(groups) - 1 - int(left[1], 16) :] if len(groups) > int(left[1], 16) + 1 else groups
        elif written:
            loads.append((set(written), instruction.bytes))
        most = max(most, sum(size for _, size in loads) + sum(groups))
    return most


def resident_warps(threads: int, registers: int, shared: int) -> int:
    """Of a kernel on an SM of sm_90: 64 warps, 32 blocks, 4 times 16,384 registers, 228 KiB of shared memory."""
    warps = threads // 32
    by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps
    by_shared = 228 * 1024 // (shared + 1024)
    return warps * min(64 // warps, 32, by_registers, by_shared)


def resources(cuobjdump: str, cubin: Path) -> dict[str, tuple[int, int]]:
    """Per kernel: registers, bytes of static shared memory."""
    done = subprocess.run([cuobjdump, "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+)", done.stdout + done.stderr)
    return {name: (int(registers), int(shared)) for name, registers, shared in found}


def threads_of(ptx: str) -> dict[str, int]:
    """Per kernel its threads a block, as the source has bounded them."""
    parts = [part.partition("{")[0] for part in ptx.split(".entry ")[1:]]
    found = {part[: part.index("(")].strip(): re.search(r"\.(?:max|req)ntid\s+(\d+)", part) for part in parts}
    return {name: int(bound[1]) for name, bound in found.items() if bound}


def count(cuobjdump: str, cubin: Path, ptx: str, rows: list[Row], dynamic: int = 0) -> dict[Row, Count]:
    """`dynamic`: bytes of shared memory that a launch asks for."""
    codes, used, threads, found = disassemble(cuobjdump, cubin), resources(cuobjdump, cubin), threads_of(ptx), {}
    for row in rows:
        (name,) = [name for name in codes if re.search(row.pattern, name)]
        way = main_loop(Flow(codes[name]), row.turn, row.without)
        registers, static = used[name]
        warps = resident_warps(threads[name], registers, static + dynamic + row.shared)
        names = Counter(i.name for i in way)
        slots = {
            pipe: cost * sum(n for name, n in names.items() if re.fullmatch(which, name))
            for pipe, (cost, which) in PIPES.items()
        }
        pipe = max(slots, key=lambda pipe: slots[pipe])
        moved = sum(i.bytes for i in way) + row.moved - row.cached
        reads = sum(i.bytes for i in way if i.name != "STG") + row.moved - row.cached
        flight = row.flight or warps * bytes_under_way(way)
        found[row] = Count(len(way), moved, reads, registers, warps, flight, pipe, slots[pipe])
    return found


def count_cuda(cuobjdump: str, folder: Path, file: str) -> dict[Row, Count]:
    """The rows of a .cu file, from a folder of toolchain.build_machine_code."""
    (cubin,), (ptx,) = folder.glob("*.cubin"), folder.glob("*.ptx")
    return count(cuobjdump, cubin, ptx.read_text(), [row for row in ROWS if row.source == file])


def count_triton(cuobjdump: str, folder: Path, kernels: list[dict]) -> dict[Row, Count]:
    """The rows of Triton, from a folder of support.triton_compile."""
    found: dict[Row, Count] = {}
    for kernel in (k for k in kernels if k["architecture"] == 90):
        rows = [r for r in ROWS if r.source == kernel["case"] and re.search(r.pattern, f"_{kernel['name']}")]
        if rows:
            stem = str(folder / kernel["file"])
            ptx = Path(f"{stem}.ptx").read_text()
            found |= count(cuobjdump, Path(f"{stem}.cubin"), ptx, rows, kernel["shared"])
    return found


def problems(counts: dict[Row, Count]) -> list[str]:
    """What is beyond a row's bounds."""
    found = []
    for row, c in counts.items():
        share = max(c.share(), c.pipe_share)
        if share > row.share:
            found.append(f"{row.kernel}: {share:.0%} of the budget ({c.per_kib:.0f} a KiB), at most {row.share:.0%}")
        if c.flight < row.least * c.needed:
            found.append(f"{row.kernel}: {c.flight / 1024:.0f} KiB in flight, {row.least * c.needed / 1024:.0f} needed")
    return found


def loose(counts: dict[Row, Count]) -> list[str]:
    """Rows whose bounds allow a tenth more than is there, although they are beyond the general ones."""
    return [
        row.kernel
        for row, c in counts.items()
        if (row.share > SHARE and max(c.share(), c.pipe_share) < 0.9 * row.share)
        or (row.least < FLIGHT and c.flight > 1.1 * row.least * c.needed)
    ]


def table(counts: dict[Row, Count]) -> str:
    """Markdown, in the order of `ROWS`."""
    lines = [
        "| kernel | warp instructions a KiB | share of issue, H200 | busiest pipe | A100 | B200 | registers |"
        " KiB in flight | needed | why not better |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in ROWS if row in counts):
        c = counts[row]
        lines.append(
            f"| {row.kernel} | {c.per_kib:.0f} | {c.share():.0%} | {c.pipe} {c.pipe_share:.0%} | {c.share(80):.0%} |"
            f" {c.share(100):.0%} | {c.registers} | {c.flight / 1024:.0f} | {FLIGHT * c.needed / 1024:.0f} |"
            f" {row.why} |"
        )
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class PairCount:
    """Of a kernel that multiplies matrices: instructions of a thread for a number of the left operand, which is a pair
    of query and key or of row and column; registers, shared bytes."""

    per_pair: float
    registers: int
    shared: int


def count_products(cuobjdump: str, folder: Path, kernels: list[dict]) -> dict[tuple[str, str], PairCount]:
    """By case and kernel, from a folder of triton_kernels.products_compile; a kernel that runs forward and backward by
    its larger count."""
    found: dict[tuple[str, str], list[PairCount]] = {}
    for kernel in (k for k in kernels if k["architecture"] == 90):
        stem = f"{folder}/{kernel['file']}"
        ((name, code),) = disassemble(cuobjdump, Path(f"{stem}.cubin")).items()
        flow = Flow(code)
        turn = max((flow.longest(head, body) for head, body in flow.loops()), key=len)
        threads = threads_of(Path(f"{stem}.ptx").read_text())[name]
        registers = resources(cuobjdump, Path(f"{stem}.cubin"))[name][0]
        found.setdefault((kernel["case"], kernel["name"]), []).append(
            PairCount(len(turn) * threads / kernel["pairs"], registers, kernel["shared"])
        )
    return {key: max(counts, key=lambda c: c.per_pair) for key, counts in found.items()}


def pair_table(counts: dict[tuple[str, str], PairCount]) -> str:
    """Markdown, in the order of `PAIRS`."""
    lines = ["| kernel | instructions a pair | registers | KiB of shared memory |", "|---|---|---|---|"]
    for case, name in PAIRS:
        c = counts[case, name]
        lines.append(f"| {case}: {name} | {c.per_pair:.1f} | {c.registers} | {c.shared / 1024:.0f} |")
    return "\n".join(lines) + "\n"


COUNTS = ("<!-- counts: make counts -->\n", "<!-- /counts -->\n")
PAIR_COUNTS = ("<!-- pairs: make counts -->\n", "<!-- /pairs -->\n")


def documented(marks: tuple[str, str] = COUNTS) -> dict[str, float]:
    """First and second column of one of the document's tables."""
    text = DOCUMENT.read_text().partition(marks[0])[2].partition(marks[1])[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    return {cells[0]: float(cells[1]) for cells in rows}


def undocumented(counts: dict[Row, Count]) -> list[str]:
    """Rows whose number in the document is off by more than a tenth: other compilers differ by less."""
    stored = documented()
    return [row.kernel for row, c in counts.items() if abs(stored.get(row.kernel, 0.0) / c.per_kib - 1.0) > 0.1]


def compile_and_count() -> tuple[dict[Row, Count], dict[tuple[str, str], PairCount]]:
    """Everything, in a temporary folder."""
    tools = find_toolkit()
    if isinstance(tools, str) or tools.cuobjdump is None:
        raise SystemExit(tools if isinstance(tools, str) else "no cuobjdump")
    counts: dict[Row, Count] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for source in KERNELS:
            counts |= count_cuda(tools.cuobjdump, build_machine_code(tools, here, source, "90"), source.name)
        environment = {**os.environ, "TRITON_CACHE_DIR": f"{folder}/cache"}
        reports = []
        for module in ("support.triton_compile", "triton_kernels.products_compile"):
            target = here / module
            target.mkdir()
            subprocess.run([sys.executable, "-m", module, str(target), "90"], check=True, env=environment)
            reports.append((target, json.loads((target / "report.json").read_text())["kernels"]))
        counts |= count_triton(tools.cuobjdump, *reports[0])
        return counts, count_products(tools.cuobjdump, *reports[1])


if __name__ == "__main__":
    counts, pairs = compile_and_count()
    print(table(counts), pair_table(pairs), *problems(counts), sep="\n")
    if sys.argv[1:] == ["--write"]:
        for (begin, end), text in ((COUNTS, table(counts)), (PAIR_COUNTS, pair_table(pairs))):
            before, _, rest = DOCUMENT.read_text().partition(begin)
            DOCUMENT.write_text(before + begin + text + end + rest.partition(end)[2])
