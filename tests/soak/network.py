"""Two hosts and the cable between them, cut in mid-run."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from soak.faults import Fault, wait_for_survivor
from soak.jobs import LOST, has_reached, rank_environment, running, wait_until
from soak.namespaces import open_hosts


def cut_link(folder: Path, *, launcher: str = "none", parallel: str = "ddp") -> dict[str, float]:
    """Rank 0 on node-0, rank 1 on node-1; the cable is pulled: both end in time, each naming the other's host; on one
    host the run goes on to its end.

    Args:
        folder: for everything.
        launcher: "torchrun": one on each host, which meet by c10d rendezvous; "none": the ranks alone.
        parallel: `run.parallel`.
    """
    fault = Fault(folder, ranks=2, steps=150, more=["--run.parallel", parallel])
    run = folder / "run"
    with open_hosts() as hosts, contextlib.ExitStack() as stack:
        jobs = []
        for number, host in enumerate(hosts):
            meeting = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29512", "--rdzv-id=soak"]
            conf = f"--rdzv-conf=is_host={1 - number},join_timeout=60"
            start = running(
                fault.command(run), fault.log(f"node-{number}"), launcher=launcher, launch=[*meeting, conf],
                prefix=host.prefix,
                environment=rank_environment(number, 2, 29_511, "10.77.0.1") if launcher == "none" else {},
            )  # fmt: skip
            jobs.append(stack.enter_context(start))
        wait_until(has_reached(run, 12), jobs[0], "update 12")
        ranks = [next(iter(job.trainers())) for job in jobs]  # torchrun deals them out as it likes
        begun = time.monotonic()
        hosts[0].run("ip", "link", "set", "cable", "down")
        # torchrun itself waits for the other host longer than the ranks do: it is not waited for.
        seconds = [wait_for_survivor(j, ranks[n], [f"node-{1 - n}"], begun) for n, j in enumerate(jobs)]
        if launcher == "none":
            assert [job.codes(10) for job in jobs] == [[LOST], [LOST]]
    fault.resume(run)
    return {"seconds": round(max(seconds), 1)}
