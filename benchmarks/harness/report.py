"""Goals, tables and terminal lines of every kind of row; emulated rows are never shown as measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
SHORT_FLOOR = 20e-6  # below this floor, launch and tail count: the goal is the floor plus SHORT_EXTRA
SHORT_EXTRA = 4e-6
HOST_GOAL, HOST_GOAL_WITH_GRADIENT = 10e-6, 30e-6
STEP_GOALS = {"removed": 0.8, "compiled": 1.0, "memory speech": 0.6, "memory vision": 0.8}
"""Share of the time outside products that is removed; all options against the compiled plain form; peak memory."""
FORMS = ("plain", "plain compiled", "d2v", "d2v all")


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(map(str, line))} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def origin(machine: Row) -> str:
    """Processor or GPU, versions, commit and day of a record."""
    words = {
        "gpu": "{}",
        "cpu": "{}",
        "isa": "ISA {}",
        "python": "python {}",
        "torch": "torch {}",
        "commit": "commit {}",
    }
    parts = {name: text.format(machine[name]) for name, text in words.items() if machine.get(name)}
    if "cpu" in parts:
        parts["cpu"] += f" ({machine['cores']} cores)"
    return ", ".join([*parts.values(), machine["date"][:10]])


def origins(rows: Iterable[Row]) -> list[str]:
    """Every origin of records, once."""
    return list(dict.fromkeys(origin(row["machine"]) for row in rows))


def kind_of(row: Row) -> str:
    """What a row measured; operators on a CPU have no kind of their own."""
    return str(row.get("kind", "operator"))


def measurements(rows: list[Row], emulated: bool = False) -> list[Row]:
    """Measured cases of a GPU; of the emulated ones only where they are asked for."""
    return [r for r in rows if r.get("kind") == "measurement" and bool(r.get("emulated")) == emulated]


# ---- goals


def missed_goals(row: Row) -> list[str]:
    """Goals of a row that were not reached, as text; a rival that did not run counts as not measured."""
    kind = kind_of(row)
    if kind == "step":
        return _missed_by_step(row)
    missed = []
    if kind == "measurement":
        if row["chosen"] is None:
            return ["none of ours ran"]
        ours = row["seconds"][row["chosen"]]["median"]
    for name, goal in row["goals"].items():
        if name == "host":
            continue
        if name == "floor":
            # Two threads share what one cannot hide: the published goal is tighter there.
            limit = min(goal, 2.0) if row["threads"] > 1 else goal
            if row["over_floor"] > limit:
                missed.append(f"{row['over_floor']:.2f} of floor > {limit:g}")
        elif name == "ceiling":
            floor = row["bytes"] / row["ceiling_bytes_per_second"]
            if floor < SHORT_FLOOR:
                if ours > floor + SHORT_EXTRA:
                    missed.append(f"{ours * 1e6:.1f} us > floor {floor * 1e6:.1f} + {SHORT_EXTRA * 1e6:g}")
            elif row["share_of_ceiling"] < goal:
                missed.append(f"{row['share_of_ceiling']:.0%} of the copy rate < {goal:.0%}")
        elif name not in row["ratios"]:
            missed.append(f"{name} not measured")
        elif row["ratios"][name] < goal:
            missed.append(f"{row['ratios'][name]:.2f}x {name} < {goal:g}")
    host = row.get("host_seconds", {}).get(row.get("chosen"))
    most = row["goals"].get("host", HOST_GOAL_WITH_GRADIENT if "+ backward" in row["op"] else HOST_GOAL)
    return [*missed, f"host {host * 1e6:.1f} us > {most * 1e6:g}"] if host is not None and host > most else missed


def figures(row: Row) -> dict[str, float]:
    """What the goals of a training step are about."""
    forms = row["forms"]
    plain, ours = forms.get("plain"), forms.get("d2v")
    result: dict[str, float] = {}
    if plain and ours:
        result["faster"] = plain["minimum"] / ours["minimum"]
        # The profiler's share of the measured time: its own cost falls on both parts.
        spent = {
            name: form["minimum"] * form["outside"] / max(form["outside"] + form["products"], 1e-12)
            for name, form in (("plain", plain), ("d2v", ours))
        }
        result["removed"] = 1.0 - spent["d2v"] / spent["plain"]
        result["outside_plain"] = spent["plain"] / plain["minimum"]
        if "memory" in plain:
            result["memory"] = ours["memory"] / plain["memory"]
    if "plain compiled" in forms and "d2v all" in forms:
        result["compiled"] = forms["plain compiled"]["minimum"] / forms["d2v all"]["minimum"]
    best = min(f["minimum"] for name, f in forms.items() if name.startswith("d2v"))
    result["samples_per_second"] = row["samples"] / best
    if row.get("audio_seconds"):
        result["audio_per_second"] = row["audio_seconds"] / best
    if row.get("peak"):
        result["mfu"] = row["flops"] / best / row["peak"]
    return result


def _missed_by_step(row: Row) -> list[str]:
    found, missed = figures(row), []
    if found.get("removed", 1.0) < STEP_GOALS["removed"]:
        missed.append(f"removed {found['removed']:.0%} < 80%")
    if found.get("compiled", 1.0) < STEP_GOALS["compiled"]:
        missed.append(f"{found['compiled']:.2f}x compiled < 1")
    limit = STEP_GOALS.get(f"memory {row['modality']}")
    if limit is not None and found.get("memory", 0.0) > limit:
        missed.append(f"memory {found['memory']:.2f} > {limit}")
    return missed


# ---- tables and terminal lines: a column is a head and what a row has under it


def _ratios(row: Row) -> str:
    return ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items())


def _of_chosen(value: Callable[[Row, str], str]) -> Callable[[Row], str]:
    return lambda row: "" if row["chosen"] is None else value(row, row["chosen"])


def _share(row: Row, chosen: str) -> str:
    if row["flops"]:
        return f"{row['flops'] / row['seconds'][chosen]['median'] / 1e12:.0f} TFLOP/s"
    return f"{row['share_of_ceiling']:.0%}"


def _host(row: Row, chosen: str) -> str:
    return f"{row['host_seconds'][chosen] * 1e6:.1f}" if chosen in row["host_seconds"] else ""


def _missed(row: Row) -> str:
    if row.get("chosen", "") is None:
        return "; ".join(f"{name}: {reason}" for name, reason in row["not_run"].items())
    return "; ".join(missed_goals(row))


def _figure(name: str, form: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        found = figures(row)
        return format(found[name], form) + ("x" if name in ("faster", "compiled") else "") if name in found else ""

    return show


def _time_of(form: str) -> Callable[[Row], str]:
    return lambda row: f"{row['forms'][form]['minimum'] * 1e3:.1f}" if form in row["forms"] else ""


_OPERATOR: dict[str, Callable[[Row], object]] = {
    "operator": lambda row: f"`{row['op']}`",
    "case": lambda row: row["case"],
    "dtype": lambda row: row["dtype"],
}
COLUMNS: dict[str, dict[str, Callable[[Row], object]]] = {
    "operator": {
        **_OPERATOR,
        "threads": lambda row: row["threads"],
        "MB": lambda row: f"{row['bytes'] / 1e6:.1f}",
        "ms": lambda row: f"{row['seconds']['d2v']['minimum'] * 1e3:.3f}",
        "time / floor": lambda row: f"{row['over_floor']:.2f}" if row["over_floor"] else "",
        "faster than": _ratios,
        "missed goals": _missed,
    },
    "measurement": {
        **_OPERATOR,
        "MB": lambda row: f"{row['bytes'] / 1e6:.1f}",
        "us": _of_chosen(lambda row, chosen: f"{row['seconds'][chosen]['median'] * 1e6:.1f}"),
        "% of copy rate": _of_chosen(_share),
        "ratios to ours": _of_chosen(lambda row, _: _ratios(row)),
        "backend": _of_chosen(lambda _, chosen: chosen.removeprefix("d2v ")),
        "host us": _of_chosen(_host),
        "missed goals": _missed,
    },
    "step": {
        "step": lambda row: row["case"],
        "threads": lambda row: row["threads"],
        "samples/s": _figure("samples_per_second", ".1f"),
        "plain / d2v": _figure("faster", ".2f"),
        "compiled plain / d2v all": _figure("compiled", ".2f"),
        "time outside products": _figure("outside_plain", ".0%"),
        "of it removed": _figure("removed", ".0%"),
        "memory / plain": _figure("memory", ".2f"),
        "s of audio/s": _figure("audio_per_second", ".1f"),
        "MFU": _figure("mfu", ".0%"),
        **{f"ms: {form}": _time_of(form) for form in FORMS},
        "missed goals": _missed,
    },
}


def table(rows: list[Row]) -> str:
    """Markdown of rows of one kind, without columns that are empty."""
    columns = COLUMNS[kind_of(rows[0])] if rows else {}
    cells = {head: [show(row) for row in rows] for head, show in columns.items()}
    cells = {head: column for head, column in cells.items() if any(cell != "" for cell in column)}
    return markdown(list(cells), zip(*cells.values(), strict=True))


def text_row(row: Row) -> str:
    """One line for the terminal."""
    cells = [(head, str(show(row))) for head, show in COLUMNS[kind_of(row)].items()]
    return "  ".join(cell if head in ("operator", "case", "dtype", "step") else f"{head} {cell}"
                     for head, cell in cells if cell)  # fmt: skip


def summary(rows: list[Row]) -> str:
    """Last line of a run: goals reached, and where the numbers come from."""
    with_goals = [row for row in rows if row.get("goals", True)]
    reached = sum(not missed_goals(row) for row in with_goals)
    backends = sorted({row["backend"] for row in rows if "backend" in row})
    words = f"backend {', '.join(backends)}, " if backends else ""
    return f"all goals reached in {reached} of {len(with_goals)} rows; {words}{origin(rows[0]['machine'])}"


def operators_table(rows: list[Row]) -> str:
    """One line an operator: rows at their goals, median ratios to eager, compiled and all other rivals."""
    lines, rivals = [], ("eager", "compile")
    for op in dict.fromkeys(r["op"] for r in rows):
        own = [r for r in rows if r["op"] == op]
        with_goals = [r for r in own if r["goals"]]
        reached = sum(not missed_goals(r) for r in with_goals)
        names = sorted({name for r in own for name in r["ratios"]})
        median = {n: f"{statistics.median(r['ratios'][n] for r in own if n in r['ratios']):.2f}x" for n in names}
        others = ", ".join(f"{n} {value}" for n, value in median.items() if n not in rivals)
        lines.append((f"`{op}`", f"{reached} of {len(with_goals)}", *(median.get(n, "") for n in rivals), others))
    return markdown(("operator", "rows at their goals", "eager / ours", "compile / ours", "others / ours"), lines)


# ---- growth


def fit_exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Exponent e of the power law y = a x^e by least squares of the logarithms; None for fewer than two positive x."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0]
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def growth_row(row: Row) -> str:
    """One line for the terminal."""
    if row["kind"] == "stop":
        return f"{row['curve']:<11}{row['x']:>10g}  stopped ({', '.join(row['forms'])}): {row['reason']}"
    parts = []
    for name, form in row["forms"].items():
        memory = f", {form['memory'] / 1e6:.0f} MB" if "memory" in form else ""
        rate = f"{form['samples_per_second']:.1f} samples/s" if "samples_per_second" in form else ""
        parts.append(rate or f"{name} {form['minimum'] * 1e3:.2f} ms{memory}")
        if "exposed_share" in form:
            parts[-1] += f", exposed exchange of gradients {form['exposed_share']:.0%}"
    return f"{row['curve']:<11}{row['x']:>10g}  {'; '.join(parts)}   {row['case']}"


def series(rows: list[Row], curve: str, form: str, value: str) -> tuple[list[float], list[float]]:
    """Places and values of a curve, in ascending order.

    value: "time" (seconds of a step), "row" (seconds of a step over student rows), "memory" (bytes) or "rate" (samples
    a second).
    """
    key = {"rate": "samples_per_second", "memory": "memory"}.get(value, "minimum")
    points = sorted((float(r["x"]), r["forms"][form][key] / (r["rows"] if value == "row" else 1)) for r in rows
                    if r["kind"] == "point" and r["curve"] == curve and key in r["forms"].get(form, {}))  # fmt: skip
    return [x for x, _ in points], [y for _, y in points]


def curves_of(rows: list[Row]) -> list[tuple[str, int, list[Row]]]:
    """Name, threads and records of every curve, in the order they were measured."""
    names = dict.fromkeys((r["curve"], r["threads"]) for r in rows)
    return [(c, t, [r for r in rows if (r["curve"], r["threads"]) == (c, t)]) for c, t in names]


def curve_line(own: list[Row], curve: str, threads: int) -> str:
    """A curve in one line: its range, exponents of time and memory, the ratio of the forms, where it stopped."""
    points = sorted((r for r in own if r["kind"] == "point"), key=lambda r: r["x"])
    parts = []
    if points:
        low, high = points[0]["x"], points[-1]["x"]
        parts.append(f"{points[0]['label']} {low:g} to {high:g}")
        if any("samples_per_second" in r["forms"]["d2v"] for r in points):
            parts += [f"{r['forms']['d2v']['samples_per_second']:.1f} samples/s at {r['x']:g}" for r in points]
            last = points[-1]["forms"]["d2v"]
            if "exposed_share" in last:
                parts.append(f"exposed exchange of gradients {last['exposed_share']:.0%} at {high:g}")
        else:
            fits = {(v, f): fit_exponent(*series(own, curve, f, v)) for v in ("time", "memory") for f in FORMS}
            parts += [f"{f} {value} ~ x^{e:.2f}" for (value, f), e in fits.items() if e is not None]
            both = [r["forms"]["plain"]["minimum"] / r["forms"]["d2v"]["minimum"]
                    for r in points if {"plain", "d2v"} <= set(r["forms"])]  # fmt: skip
            if both:
                parts.append(f"plain/d2v {min(both):.2f} to {max(both):.2f}")
    parts += [f"{', '.join(r['forms'])} stopped before {r['x']:g}: {r['reason']}" for r in own if r["kind"] == "stop"]
    return f"{curve:<11}{threads} thread(s): {'; '.join(parts)}"


def growth_table(rows: list[Row]) -> str:
    """One line a curve, in the order they were measured."""
    return "\n".join(f"- {curve_line(own, curve, threads)}" for curve, threads, own in curves_of(rows))


# ---- a whole run of `benchmarks.gpu`


def stage_lines(rows: list[Row]) -> list[str]:
    """The last record of every stage, as a list."""
    last = {r["stage"]: r for r in rows if r.get("kind") == "stage"}
    lines = []
    for name, record in last.items():
        counts = ", ".join(f"{n} {word}" for word, n in record.get("counts", {}).items() if n)
        more = "; ".join(text for text in (counts, record.get("reason", "")) if text)
        lines.append(f"- {name}: {record['status']} in {record['seconds']:.0f} s{f' ({more})' if more else ''}")
        lines += [f"  - failed: `{test}`" for test in record.get("failed", [])]
    missing = {k: v for record in last.values() for k, v in record.get("missing", {}).items()}
    return lines + [f"- missing: {what}; left out: {use}" for what, use in missing.items()]


def document(rows: list[Row]) -> str:
    """The whole report of one run."""
    emulated = any(r.get("emulated") for r in rows)
    latest = max((r for r in rows if "machine" in r), key=lambda r: r["machine"]["date"], default={"machine": {}})
    machine = latest["machine"]
    measured, state = measurements(rows), machine.get("gpu_state", {})
    title = "# Emulated GPU run: no measurement" if emulated else f"# GPU run on {machine.get('gpu')}"
    lines = [
        title, "",
        f"{machine.get('date')}, commit {machine.get('commit')} (sources {machine.get('sources')}), torch "
        f"{machine.get('torch')}, triton {machine.get('triton')}, CUDA {machine.get('torch_cuda')}, driver "
        f"{state.get('driver_version', '-')}, clocks {state.get('clocks.sm', '-')} / {state.get('clocks.mem', '-')}.",
        "",
        *stage_lines(rows), "",
    ]  # fmt: skip
    others = sum(r.get("key") != latest.get("key") for r in rows)
    if others:
        lines += [f"Of {len(rows)} rows {others} are of other sources or another machine, kept from earlier runs.", ""]
    copies = [r for r in rows if r.get("kind") == "copy" and not r.get("emulated")]
    if copies:
        best = max(copies[-1]["bytes_per_second"].values())
        lines += [f"Copy rate of this run: {best / 1e12:.2f} TB/s, bytes read plus written.", ""]
    if measured:
        lines += ["Medians; L2-cold, graph-replayed, interleaved. `us` and the ratios are of the backend chosen.", "",
                  table(measured), ""]  # fmt: skip
    steps = [r for r in rows if r.get("kind") == "step"]
    if steps:
        lines += ["Whole training steps:", "", *[f"- {text_row(r)}" for r in steps], ""]
    if emulated:
        names = [f"{r['op']} ({', '.join(r['seconds'])})" for r in measurements(rows, emulated=True)]
        lines += ["Contenders that ran and agreed:", "", *[f"- {name}" for name in names], ""]
    reasons = [f"- {r['op']} {r['case']}: {name}: {why}" for r in measurements(rows, emulated)
               for name, why in r["not_run"].items()]  # fmt: skip
    reasons += [f"- {r['op']} {r['case']}: {r['reason']}" for r in rows if r.get("kind") == "failure"]
    return "\n".join(lines + (["Did not take part:", "", *reasons, ""] if reasons else []))
