"""A run that crashes ends: no loader worker keeps it or its terminal."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
    import sys
    import d2v.train.report
    import d2v.train.trainer
    from d2v.cli import main

    place, folder, run = sys.argv[1:]
    original = d2v.train.trainer.Trainer.run_update

    def crash(self, batches):
        if self.update == 2:
            raise AttributeError("planted")
        return original(self, batches)

    if place == "update":
        d2v.train.trainer.Trainer.run_update = crash
    else:
        d2v.train.report.MetricsFile.write = lambda *_: 1 / 0
    main(["pretrain", "vision-tiny", "--data.path", folder, "--run.dir", run, "--run.threads", "1",
          "--run.log-every", "3", "--data.workers", "2"])
"""


@pytest.mark.parametrize(("place", "words"), [("update", "planted"), ("metrics", "ZeroDivisionError")])
def test_crash_ends_the_process(place: str, words: str, images: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), place, str(images), str(tmp_path / "run")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert words in run.stderr
