"""First-level checkpoints: on each node's own memory or disk, more often than on storage that all nodes share.

Layout: `DIR/ID/step-00001000/`, ID being that of the run folder. Each node's folder is a whole checkpoint as
`d2v.train.checkpoint` writes it, made by the ranks of that node alone.
"""

from __future__ import annotations

import re
import shutil
import socket
import sys
import uuid
from pathlib import Path

from d2v.folder import STATE, clean_folder, damaged, list_checkpoints, load_json, read_index, read_piece, step_of
from d2v.train.distributed import Ranks

RUN_ID = "run-id"
"""File of the run folder that names the run's local folders: those of a run that was there before are not its own."""


class LocalCheckpoints:
    """The local checkpoints of one node."""

    def __init__(self, place: str, run: Path, ranks: Ranks) -> None:
        """place: `run.local_checkpoint`; run: the run folder. `ValueError` for a file of the run folder that is none of
        this library's. Every rank calls; nothing is written."""
        found = None
        with ranks.first_before_others():
            if ranks.is_first:
                file = run / RUN_ID
                found = file.read_text(encoding="utf-8") if file.is_file() else uuid.uuid4().hex
                if not re.fullmatch("[0-9a-f]{32}", found):
                    raise ValueError(f"run.dir: expected 32 hexadecimal digits in {str(file)!r}, got others")
        self.id: str = ranks.share(found or "")
        self.folder, self.ranks = Path(place).absolute() / self.id, ranks

    def find(self, after: int) -> Path | None:
        """The newest checkpoint behind update `after` that all ranks can read, each its node's; says why one is not."""
        newer = [c for c in list_checkpoints(self.folder) if step_of(c) > after]
        problems = {step_of(c): self._find_problem(c) for c in newer}
        told = self.ranks.gather((socket.gethostname(), problems))
        steps = sorted({step for _, found in told for step in found}, reverse=True)
        for step in steps:
            lacking = [f"rank {r} on {host}: {p}" for r, (host, found) in enumerate(told)
                       if (p := found.get(step, "it has none")) is not None]  # fmt: skip
            if not lacking:
                return self.folder / f"step-{step:08d}"
            if self.ranks.is_first:
                print(f"note: run.local_checkpoint: update {step} is not taken, {lacking[0]}", file=sys.stderr)
        return None

    def _find_problem(self, checkpoint: Path) -> str | None:
        """Why this rank cannot go on from a checkpoint; it reads again what it wrote itself."""
        own = f"shard-{self.ranks.rank:05d}.safetensors"
        try:
            index, ranks = read_index(checkpoint), load_json(checkpoint / STATE).get("ranks")
            if ranks != self.ranks.size or f"rng.cpu.{self.ranks.rank}" not in index:
                raise damaged(checkpoint, f"expected the state of {self.ranks.size} ranks, got that of {ranks} others")
            for entry in index.values():
                for chunk in (chunk for chunk in entry["chunks"] if chunk["file"] == own):
                    read_piece(checkpoint, chunk, entry["dtype"])
        except ValueError as error:
            return str(error)
        return None

    def begin(self, run: Path, step: int) -> None:
        """Makes the folder; removes what is behind update `step`, where the run goes on. Every rank calls."""
        if self.ranks.is_first and not (run / RUN_ID).exists():
            (run / RUN_ID).write_text(self.id, encoding="utf-8")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.ranks.wait()
        clean_folder(self.folder)
        for checkpoint in list_checkpoints(self.folder):
            if step_of(checkpoint) > step:
                shutil.rmtree(checkpoint, ignore_errors=True)
        self.ranks.wait()

    def remove(self) -> None:
        """The run has ended, or saved in its folder: nothing stays behind on the nodes. Every rank calls."""
        self.ranks.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
