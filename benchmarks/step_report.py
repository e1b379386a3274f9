"""Tables and plots of measured training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tables import markdown, origin

Row = dict[str, Any]
GOALS = {"removed": 0.8, "compiled": 1.0, "memory speech": 0.6, "memory vision": 0.8}
"""Share of the time outside products that is removed; all options against the compiled plain form; peak memory."""


def figures(row: Row) -> dict[str, float]:
    """What the goals are about."""
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


def missed_goals(row: Row) -> list[str]:
    """Goals that a row does not reach, as text."""
    found = figures(row)
    missed = []
    if found.get("removed", 1.0) < GOALS["removed"]:
        missed.append(f"removed {found['removed']:.0%} < 80%")
    if found.get("compiled", 1.0) < GOALS["compiled"]:
        missed.append(f"{found['compiled']:.2f}x compiled < 1")
    limit = GOALS.get(f"memory {row['modality']}")
    if limit is not None and found.get("memory", 0.0) > limit:
        missed.append(f"memory {found['memory']:.2f} > {limit}")
    return missed


def text_row(row: Row) -> str:
    """One line for the terminal."""
    found = figures(row)
    times = "  ".join(f"{name} {form['minimum'] * 1e3:.1f}" for name, form in row["forms"].items())
    extra = f", memory {found['memory']:.2f}" if "memory" in found else ""
    goals = "; ".join(missed_goals(row))
    faster = f"{found['faster']:.2f}x plain, " if "faster" in found else ""
    compiled = f"all/compiled {found['compiled']:.2f}x, " if "compiled" in found else ""
    removed = f"outside products {found['outside_plain']:.0%}, removed {found['removed']:.0%}" if faster else ""
    return f"{row['case']:<30} {row['device']} {row['threads']}t  ms: {times}   {faster}{compiled}{removed}{extra}" + (
        f"   missed: {goals}" if goals else ""
    )


def summary(rows: list[Row]) -> str:
    """Last line of a run."""
    reached = sum(not missed_goals(row) for row in rows)
    return f"all goals reached in {reached} of {len(rows)} rows; {origin(rows[0]['machine'])}"


def markdown_table(rows: list[Row]) -> str:
    """The README's table."""
    head = ("step", "threads", "samples/s", "ms: plain", "plain, compiled", "d2v", "d2v, all options", "memory / plain")
    return markdown(head, map(_cells, rows))


def _cells(row: Row) -> tuple[object, ...]:
    found, forms = figures(row), row["forms"]
    times = [f"{forms[n]['minimum'] * 1e3:.1f}" if n in forms else "" for n in
             ("plain", "plain compiled", "d2v", "d2v all")]  # fmt: skip
    memory = f"{found['memory']:.2f}" if "memory" in found else ""
    return row["case"], row["threads"], f"{found['samples_per_second']:.1f}", *times, memory


def draw(rows: list[Row], path: Path) -> None:
    """Phases of every form, samples a second and memory, for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from .step_forms import FORMS, PHASES

    figure, axes = plt.subplots(1, 3, figsize=(17, 0.7 + 0.75 * len(rows)), sharey=True)
    names = [n for n in FORMS if any(n in row["forms"] for row in rows)]
    height = 0.8 / len(names)
    for i, row in enumerate(rows):
        plain = row["forms"].get("plain") or next(iter(row["forms"].values()))
        for j, name in enumerate(names):
            if name not in row["forms"]:
                continue
            form, place, left = row["forms"][name], i + (j - (len(names) - 1) / 2) * height, 0.0
            total = sum(form["phases"].values())
            for k, phase in enumerate(PHASES):
                width = form["phases"][phase] / total * form["minimum"] / plain["minimum"]
                axes[0].barh(place, width, height * 0.92, left=left, color=f"C{k}", alpha=1.0 - 0.18 * j)
                left += width
            axes[1].barh(place, plain["minimum"] / form["minimum"], height * 0.92, color=f"C{j}")
            if "memory" in form:
                axes[2].barh(place, form["memory"] / plain["memory"], height * 0.92, color=f"C{j}")
    axes[0].set_yticks(range(len(rows)), [f"{row['case']}, {row['threads']} thread(s)" for row in rows])
    axes[0].invert_yaxis()
    axes[0].set(xlabel="time of a step over the plain form's (top to bottom: " + ", ".join(names) + ")")
    axes[0].legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=f"C{k}", label=p) for k, p in enumerate(PHASES)], fontsize=8
    )
    axes[1].set(xlabel="samples a second over the plain form's")
    axes[1].legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=f"C{j}", label=n) for j, n in enumerate(names)], fontsize=8
    )
    axes[2].set(xlabel="peak memory over the plain form's")
    for axis in axes:
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.grid(axis="x", alpha=0.25)
    figure.suptitle(f"training steps on {rows[0]['device']}: {origin(rows[0]['machine'])}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
