"""Benchmarks operators at shapes of your own against plain PyTorch.

    python -m d2v_kernels.bench average_layers --shape 8,4,500,768 --dtype bf16 --norm instance --against eager,compile

Of every case the errors against the reference in float64 come first, then the times of all contenders, which take turns
in one process. "copy" is a copy that reads and writes as many bytes as the operator has to, timed in the same turns.
On a GPU, contenders are captured in CUDA graphs over inputs that are not in the L2 cache.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from .case import FAMILIES, Case, Place
from .measure import BACKENDS, Row, describe_machine, measure, settle
from .recipe import recipe_calls

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
TORCH_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
OF_FAMILIES = {name: value for family in FAMILIES.values() for name, value in family.options.items()}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "shape": ("one or several, as in 8,4,500,768 or 8x4x500x768 (default: the operator's of the list)", {"nargs": "+"}),
    "dtype": (f"of {', '.join(DTYPES)}, or by PyTorch's names; several with commas between (default: fp32)",
              {"default": "fp32"}),
    "from": ("instead of operators and shapes: those that a training step of this recipe calls", {}),
    "samples": ("with --from: samples of its batch (default: 4)", {"type": int}),
    "length": ("with --from: seconds of audio (default: 5) or tokens of text (default: 512)", {"type": float}),
    "against": ("opponents with commas between: eager, compile and others that an operator has (an unknown one is "
                "answered with the list); none: no opponent (default: eager)", {"default": "eager"}),
    "threads": ("CPU threads, one or several numbers (default: 1)", {"nargs": "+", "type": int, "default": [1]}),
    "device": ("auto: a GPU if there is one (default: auto)", {"choices": ("auto", "cpu", "cuda"), "default": "auto"}),
    "budget": ("seconds of a case after which no turn begins; 20 turns on a CPU and 10 on a GPU are always run "
               "(default: 5)", {"type": float, "default": 5.0}),
    "peak": ("GB/s of the memory by its data sheet (default: on a GPU what the driver says, on a CPU not known)",
             {"type": float}),
    "json": ("a new file for the rows, as JSON lines; an existing or tracked one is refused", {"type": Path}),
    "compare": ("a file of an earlier --json: says what got slower since", {"type": Path}),
}  # fmt: skip
"""Name -> help, and the rest of what `add_argument` takes."""
ALIASES = {"EmaPlan": "update_ema_", "attend": "attention"}
"""Public name -> the operator behind it."""
WRONG, REFUSED, SLOWER = 1, 2, 3
CODES = f"""exit status: 0 all is well; {WRONG} an output differs from float64 beyond its tolerance;
{REFUSED} input that does not fit; {SLOWER} something got slower than in the file of --compare"""
HOST = Place(torch.device("cpu"))
NEEDED = {"op", "case", "dtype", "device", "threads", "seconds", "machine", "copy_bytes_per_second"}
"""Keys without which a row is not one of --json."""
SLACK = 0.05
"""Of a time: slower by less than this share is never reported."""


def refuse(text: object) -> NoReturn:
    """Ends with one sentence."""
    print(text, file=sys.stderr)
    raise SystemExit(REFUSED)


class Parser(argparse.ArgumentParser):
    """What does not fit is one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        refuse(message.removeprefix("argument "))


# ---- what is asked for


def make_parser() -> argparse.ArgumentParser:
    """Every option with its default, every operator with the meaning of its shape."""
    lines = ["operators, the numbers of their --shape, and the shape that is taken without one:"]
    for op, family in FAMILIES.items():
        more = f"; takes {', '.join(map(flag, family.options))}" if family.options else ""
        lines.append(f"  {op}\n      {explain(family.sizes)}: {','.join(map(str, family.usual))}{more}")
    parser = Parser(
        prog="python -m d2v_kernels.bench", description=__doc__, epilog="\n".join([*lines, "", CODES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("operators", nargs="*", help="operators of the list below, or all")
    for name, (words, settings) in OPTIONS.items():
        parser.add_argument(flag(name), help=words, **settings)
    for name, default in OF_FAMILIES.items():
        takers = ", ".join(op for op, family in FAMILIES.items() if name in family.options)
        kind: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            kind = {"action": "store_true", "default": None}
        elif isinstance(default, tuple):
            kind = {"choices": default}
        usual = default[0] if isinstance(default, tuple) else default
        parser.add_argument(flag(name), help=f"of {takers} (default: {usual})", **kind)
    return parser


def explain(sizes: dict[str, str]) -> str:
    """The meaning of the numbers of a shape."""
    return ", ".join(f"{letter} {words}" for letter, words in sizes.items())


def flag(name: str) -> str:
    """Of the command line."""
    return f"--{name.replace('_', '-')}"


def parse_shape(op: str, text: str) -> tuple[int, ...]:
    """The numbers of `--shape`, between commas, spaces or x."""
    sizes = FAMILIES[op].sizes
    numbers = text.replace(",", " ").replace("x", " ").split()
    if len(numbers) != len(sizes) or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        refuse(f"--shape: {op}: expected {len(sizes)} positive numbers ({explain(sizes)}), got {text!r}")
    return tuple(map(int, numbers))


def make_case(op: str, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> Case:
    """The case of a shape, without goals."""
    try:
        case = FAMILIES[op].make("", *shape, dtype=dtype, goals={}, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        refuse(error)
    return replace(case, name=" ".join(case.name.split()))


def list_cases(given: argparse.Namespace) -> Iterator[Case]:
    """Cases of the command line, in its order."""
    chosen = {name: value for name in OF_FAMILIES if (value := getattr(given, name)) is not None}
    recipe = vars(given)["from"]
    if recipe is not None:
        found_beside = [*given.operators, *["--shape"] * bool(given.shape), *map(flag, chosen), *given.dtype[1:]]
        if found_beside:
            words = "no operators, shapes, options of operators or second dtype beside it"
            refuse(f"--from: expected {words}, got {', '.join(found_beside)}")
        try:
            found = list(recipe_calls(recipe, given.samples or 4, given.length, DTYPES[given.dtype[0]]))
        except (ValueError, ModuleNotFoundError) as error:
            refuse(error)
        print(f"{recipe}, {given.samples or 4} samples: {len(found)} distinct calls", flush=True)
        yield from (make_case(*call) for call in found)
        return
    if given.samples or given.length:
        refuse("--samples and --length: expected --from beside them, got none")
    names = list(FAMILIES) if given.operators == ["all"] else [ALIASES.get(op, op) for op in given.operators]
    for op in names or [""]:
        if op not in FAMILIES:
            near = difflib.get_close_matches(op.lower(), FAMILIES, n=1)
            got = (repr(op) if op else "none") + (f"; did you mean {near[0]}?" if near else "")
            refuse(f"operator: expected all or some of {', '.join(FAMILIES)}, got {got}")
    for name in chosen:
        if not any(name in FAMILIES[op].options for op in names):
            takers = [op for op, family in FAMILIES.items() if name in family.options]
            refuse(f"{flag(name)}: expected one of {', '.join(takers)} beside it, got {', '.join(names)}")
    if given.shape and len(names) > 1:
        refuse(f"--shape: expected one operator beside it, got {len(names)}")
    for op in names:
        options = {name: value for name, value in chosen.items() if name in FAMILIES[op].options}
        for shape in [parse_shape(op, text) for text in given.shape or ()] or [FAMILIES[op].usual]:
            for dtype in given.dtype:
                yield make_case(op, shape, DTYPES[dtype], options)


def check_opponents(ops: Iterable[str], against: list[str], place: Place) -> None:
    """Each of the operators has all the opponents, or one of several has."""
    found: dict[str, None] = {}
    for op in dict.fromkeys(ops):
        contenders = FAMILIES[op].tiny_case().make(place, 0)
        found |= dict.fromkeys(name for name in contenders if not name.startswith("d2v"))
    for name in against:
        if name not in found:
            refuse(f"--against: expected some of {', '.join(found)}, got {name!r}")


def read_compared(path: Path | None) -> list[Row]:
    """Rows of a file of --compare: all its lines have to be such rows."""
    if path is None:
        return []
    wanted, rows = f"--compare: expected rows of an earlier --json, got {path}", []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"{wanted}, which cannot be read: {error}")
    for number, line in enumerate(lines, 1):
        row: Any = None
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
        if not isinstance(row, dict) or not row.keys() >= NEEDED or not isinstance(row["seconds"], dict):
            refuse(f"{wanted}, line {number} of which is not one")
        rows.append(row)
    return rows or refuse(f"{wanted}, which is empty")


def check_file(path: Path | None) -> None:
    """A file of rows is a new one, and git does not know it."""
    if path is None:
        return
    if path.exists():
        refuse(f"--json: expected a new file, got {path}, which exists; --compare reads it")
    with contextlib.suppress(OSError):
        command = ["git", "ls-files", "--error-unmatch", path.name]
        if subprocess.run(command, cwd=path.resolve().parent, capture_output=True, check=False).returncode == 0:
            refuse(f"--json: expected a file that git does not track, got {path}")
    if not path.resolve().parent.is_dir():
        refuse(f"--json: expected a file in a folder that exists, got {path}")


# ---- what is printed


def find_peak(given: float | None, place: Place) -> float | None:
    """Bytes a second by the data sheet: twice the memory's clock (kHz) times the width of its bus (bits)."""
    if given is not None or place.device.type == "cpu":
        return None if given is None else given * 1e9
    card = torch.cuda.get_device_properties(place.device)
    return 2.0 * card.memory_clock_rate * 1e3 * card.memory_bus_width / 8.0


def describe_errors(case: Case, settled: tuple[list[str], dict[str, str], dict[str, float]]) -> str:
    """What is printed before anything is timed."""
    _, reasons, errors = settled
    found = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
    allowed = f"{case.tolerance:g}"
    if case.exact is not None:
        allowed = f"{case.exact:g}; of opponents, which draw other numbers, statistics: {allowed}"
    lines = [f"  bytes   {case.bytes:,} = {case.bytes.formula}",
             f"  errors  against float64, of the largest value: {found} (allowed {allowed})"]  # fmt: skip
    return "\n".join(lines + [f"  left out: {name}: {why}" for name, why in reasons.items()])


def describe_times(row: Row) -> str:
    """A line for each contender."""
    lines, peak = [], row["peak_bytes_per_second"]
    for name, times in row["seconds"].items():
        least, middle, rate = times["minimum"], times["median"], row["bytes"] / times["minimum"]
        time = f"{least * 1e3:9.4f} ms, median {middle * 1e3:.4f}, spread {times['spread'] / middle:.1%}"
        shares = f"{rate / row['copy_bytes_per_second']:6.1%} of the copy rate, "
        shares += f"{rate / peak:.1%} of the peak" if peak else "peak not known"
        ratio = f"  {name} / {row['chosen']} {row['ratios'][name]:.2f}" if name in row["ratios"] else ""
        title = f"d2v ({row['backend']})" if name == "d2v" else name
        lines.append(f"  {title:<15}{time}, {times['rounds']} turns  {rate / 1e9:7.2f} GB/s  {shares}{ratio}")
    return "\n".join(lines)


def find_slower(new: list[Row], old: list[Row]) -> list[str]:
    """Lines on rows whose contender of ours takes longer than both runs' spreads (quartile distances) and `SLACK`
    explain. Every new row has a line on standard output."""
    before, slower = {identity(row): row for row in old}, []
    for name in ("cpu", "gpu", "torch"):
        here, there = ({str(row["machine"].get(name)) for row in rows} for rows in (new, before.values()))
        if there - here:
            print(f"another {name}: stored {', '.join(sorted(there))}, now {', '.join(sorted(here))}")
    for row in new:
        title = " ".join(map(str, identity(row)))
        stored = before.get(identity(row))
        if stored is None or row["chosen"] not in stored["seconds"]:
            print(f"new     {title}")
            continue
        pair = [r["seconds"][row["chosen"]] for r in (stored, row)]
        allowed = 1.0 + max(SLACK, sum(times["spread"] / times["median"] for times in pair))
        ratio, medians = (pair[1][key] / pair[0][key] for key in ("minimum", "median"))
        copy = stored["copy_bytes_per_second"] / row["copy_bytes_per_second"]
        bad = min(ratio, medians) > allowed
        found = f"{ratio:.2f} of the stored time, medians {medians:.2f}"
        line = f"{title}: {found} (allowed {allowed:.2f}; the copy {copy:.2f})"
        print(f"{'slower' if bad else 'ok':<8}{line}")
        slower += [line] if bad else []
    return slower


def identity(row: Row) -> tuple[Any, ...]:
    """What a row measured."""
    return tuple(row.get(key) for key in ("op", "case", "dtype", "device", "threads"))


# ---- the run


def run_case(case: Case, place: Place, given: argparse.Namespace, against: list[str]) -> Row | None:
    """Prints and returns a row; None where something is wrong."""
    print(f"{case.op}  {case.name}  {case.key[2]}, {place.device.type}, threads {torch.get_num_threads()}", flush=True)
    torch.manual_seed(0)  # what opponents draw
    try:
        settled = settle(case, place, against)
        print(describe_errors(case, settled), flush=True)
        if any("differs from float64" in reason for reason in settled[1].values()):
            return None
        row = measure(case, place, settled, given.budget)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:  # ours does not run
        refuse(f"{case.op}: {error}")
    row |= {"device": place.device.type, "goals": {}, "over_floor": None, "machine": describe_machine(),
            "peak_bytes_per_second": find_peak(given.peak, place)}  # fmt: skip
    print(describe_times(row), flush=True)
    return row


def main(arguments: list[str] | None = None) -> None:
    """See the module's text; ends with `SystemExit` where the status is not 0."""
    given = make_parser().parse_args(arguments)
    given.dtype = [TORCH_NAMES.get(name.strip(), name.strip()) for name in given.dtype.split(",")]
    for name in given.dtype:
        if name not in DTYPES:
            refuse(f"--dtype: expected some of {', '.join(DTYPES)}, got {name!r}")
    if min(given.threads) < 1:
        refuse(f"--threads: expected 1 or more, got {min(given.threads)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        refuse(f"--device: expected one that PyTorch sees, got cuda, which torch {torch.__version__} does not see")
    check_file(given.json)
    stored = read_compared(given.compare)
    on_gpu = given.device == "cuda" or (given.device == "auto" and torch.cuda.is_available())
    place = Place(torch.device("cuda"), BACKENDS) if on_gpu else HOST
    wanted, against = list(list_cases(given)), [] if given.against == "none" else given.against.split(",")
    check_opponents((case.op.split()[0] for case in wanted), against, place)
    runs = [(case, HOST if case.op == "MaskSampler" else place) for case in wanted]  # masks are drawn on the host
    asked = {(*case.key, here.device.type, threads) for case, here in runs for threads in given.threads}
    if stored and not asked.intersection(has := [identity(row) for row in stored]):
        few = "; ".join(" ".join(map(str, found)) for found in has[:3]) + "; and others" * (len(has) > 3)
        refuse(f"--compare: expected a row of what is asked for, got {given.compare} with {few}")
    before, rows, wrong = torch.get_num_threads(), [], 0
    try:
        for threads in given.threads:
            torch.set_num_threads(threads)
            for number, (case, here) in enumerate(runs, 1):
                if len(runs) > 1:
                    print(f"{number} of {len(runs)}: ", end="")
                row = run_case(case, here, given, against)
                wrong += row is None
                if row is not None:
                    rows.append(row)
                    if given.json is not None:
                        with given.json.open("a") as file:
                            file.write(json.dumps(row) + "\n")
    finally:
        torch.set_num_threads(before)
    if wrong:
        print(
            f"{wrong} of {len(runs) * len(given.threads)} cases differ from float64 and were not timed", file=sys.stderr
        )
        raise SystemExit(WRONG)
    if stored and find_slower(rows, stored):
        raise SystemExit(SLOWER)


def keep_pages() -> None:
    """Makes glibc keep freed pages: else every large result costs page faults, the same for all contenders, that take
    longer than the kernels. Training does the same."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    keep_pages()
    main()
