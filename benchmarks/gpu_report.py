"""Tables and the roofline plot of GPU records; emulated records are never shown as measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import step_report
from .gpu_record import read_records

if TYPE_CHECKING:
    from .gpu_stages import Run

Row = dict[str, Any]
SHORT_FLOOR = 20e-6  # below this floor, launch and tail count: the goal is the floor plus SHORT_EXTRA
SHORT_EXTRA = 4e-6
HOST_GOAL, HOST_GOAL_WITH_GRADIENT = 10e-6, 30e-6
HEAD = "| operator | case | dtype | MB | us | % of copy rate | ratios to ours | backend | host us | missed goals |"


def measurements(records: list[Row], emulated: bool = False) -> list[Row]:
    """Rows of measured cases; of the emulated ones only where they are asked for."""
    return [r for r in records if r.get("kind") == "measurement" and bool(r.get("emulated")) == emulated]


def missed_goals(row: Row) -> list[str]:
    """Goals of a measured row that were not reached, as text; a rival that did not run counts as not measured."""
    if row["chosen"] is None:
        return ["none of ours ran"]
    missed, ours = [], row["seconds"][row["chosen"]]["median"]
    for name, goal in row["goals"].items():
        if name == "host":
            continue
        if name == "ceiling":
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
    host = row["host_seconds"].get(row["chosen"])
    most = row["goals"].get("host", HOST_GOAL_WITH_GRADIENT if "+ backward" in row["op"] else HOST_GOAL)
    if host is not None and host > most:
        missed.append(f"host {host * 1e6:.1f} us > {most * 1e6:g}")
    return missed


def table_row(row: Row) -> str:
    """One line of the Markdown table."""
    label = f"| `{row['op']}` | {row['case']} | {row['dtype']} | {row['bytes'] / 1e6:.1f} "
    if row["chosen"] is None:
        return f"{label}| | | | | | {'; '.join(f'{n}: {r}' for n, r in row['not_run'].items())} |"
    ours = row["seconds"][row["chosen"]]["median"]
    ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items())
    share = f"{row['share_of_ceiling']:.0%}" if not row["flops"] else f"{row['flops'] / ours / 1e12:.0f} TFLOP/s"
    host = row["host_seconds"].get(row["chosen"])
    backend = row["chosen"].removeprefix("d2v ")
    return (
        f"{label}| {ours * 1e6:.1f} | {share} | {ratios} | {backend} | {'' if host is None else f'{host * 1e6:.1f}'} "
        f"| {'; '.join(missed_goals(row))} |"
    )


def table(rows: list[Row]) -> str:
    """Markdown: op, case, bytes, time, share of the copy rate, ratios (rival's time over ours)."""
    return "\n".join([HEAD, "|" + "---|" * (HEAD.count("|") - 1), *map(table_row, rows)])


def stage_lines(records: list[Row]) -> list[str]:
    """The last record of every stage, as a list."""
    last = {r["stage"]: r for r in records if r.get("kind") == "stage"}
    lines = []
    for name, record in last.items():
        more = record.get("reason", "")
        if counts := record.get("counts"):
            more = ", ".join(f"{n} {word}" for word, n in counts.items() if n) + (f"; {more}" if more else "")
        lines.append(f"- {name}: {record['status']} in {record['seconds']:.0f} s{f' ({more})' if more else ''}")
        lines += [f"  - failed: `{test}`" for test in record.get("failed", [])]
    missing = {k: v for record in last.values() for k, v in record.get("missing", {}).items()}
    return lines + [f"- missing: {what}; left out: {use}" for what, use in missing.items()]


def document(records: list[Row]) -> str:
    """The whole report of one run."""
    emulated = any(r.get("emulated") for r in records)
    machine = records[-1]["machine"] if records else {}
    rows = measurements(records)
    title = "# Emulated GPU run: no measurement" if emulated else f"# GPU run on {machine.get('gpu')}"
    state = machine.get("gpu_state", {})
    lines = [
        title, "",
        f"{machine.get('date')}, commit {machine.get('commit')} (sources {machine.get('sources')}), torch "
        f"{machine.get('torch')}, triton {machine.get('triton')}, CUDA {machine.get('torch_cuda')}, driver "
        f"{state.get('driver_version', '-')}, clocks {state.get('clocks.sm', '-')} / {state.get('clocks.mem', '-')}.",
        "",
        *stage_lines(records), "",
    ]  # fmt: skip
    copies = [r for r in records if r.get("kind") == "copy" and not r.get("emulated")]
    if copies:
        best = max(copies[-1]["bytes_per_second"].values())
        lines += [f"Copy rate of this run: {best / 1e12:.2f} TB/s, bytes read plus written.", ""]
    if rows:
        lines += ["Medians; L2-cold, graph-replayed, interleaved. `us` and the ratios are of the backend chosen.", "",
                  table(rows), ""]  # fmt: skip
    measured_steps = [r for r in records if r.get("kind") == "step"]
    if measured_steps:
        lines += ["Whole training steps:", "", *[f"- {step_report.text_row(r)}" for r in measured_steps], ""]
    if emulated:
        names = [f"{r['op']} ({', '.join(r['seconds'])})" for r in measurements(records, emulated=True)]
        lines += ["Contenders that ran and agreed:", "", *[f"- {name}" for name in names], ""]
    reasons = [f"- {r['op']} {r['case']}: {name}: {why}" for r in measurements(records, emulated)
               for name, why in r["not_run"].items()]  # fmt: skip
    reasons += [f"- {r['op']} {r['case']}: {r['reason']}" for r in records if r.get("kind") == "failure"]
    return "\n".join(lines + (["Did not take part:", "", *reasons, ""] if reasons else []))


def roofline_plot(records: list[Row], path: Path) -> None:
    """Bytes per second of each case against its size, under the copy rate of the same run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in measurements(records) if r["chosen"] and not r["flops"]]
    figure, axis = plt.subplots(figsize=(8.0, 5.0))
    for r in [r for r in records if r.get("kind") == "copy" and not r.get("emulated")][-1:]:
        points = sorted((int(size) / 1e6, rate / 1e9) for size, rate in r["bytes_per_second"].items())
        axis.plot(*zip(*points, strict=True), color="black", linewidth=1, label="copy of the same run")
    for i, op in enumerate(sorted({r["op"] for r in rows})):
        own = [r for r in rows if r["op"] == op]
        sizes = [r["bytes"] / 1e6 for r in own]
        axis.plot(
            sizes, [r["bytes"] / r["seconds"][r["chosen"]]["median"] / 1e9 for r in own], "o", color=f"C{i}", label=op
        )
        eager = [
            (r["bytes"] / 1e6, r["bytes"] / r["seconds"]["eager"]["median"] / 1e9)
            for r in own
            if "eager" in r["seconds"]
        ]
        if eager:
            axis.plot(*zip(*eager, strict=True), "x", color=f"C{i}", alpha=0.6)
    axis.set(xscale="log", yscale="log", xlabel="bytes read once + written once (MB)", ylabel="GB/s (x: eager)")
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(fontsize=8)
    machine = rows[-1]["machine"] if rows else {}
    axis.set_title(f"{machine.get('gpu')}, torch {machine.get('torch')}, {str(machine.get('date'))[:10]}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(run: Run, limit_s: float) -> Row:
    """Stage: the document, and the plot where there is something measured to plot."""
    records = read_records(run.records)
    (run.folder / f"{run.stem}.md").write_text(document(records))
    if measurements(records) and "matplotlib" not in run.missing:
        roofline_plot(records, run.folder / f"{run.stem}.png")
    return {"status": "done", "rows": len(measurements(records, run.emulated))}
