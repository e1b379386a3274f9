"""Folders of models: config.json, model.safetensors, README.md."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from d2v.config import Config
from d2v.config.finetune import FineTuneConfig
from d2v.config.inputs import find_kind
from d2v.files import write_atomically
from d2v.folder import CONFIG, MODEL, SUMS, checksum_of

ORIGIN = "origin.json"
README = """# An exported data2vec model

`model.safetensors` holds the tensors (student, decoder or head, and the averaged teacher under `teacher.`),
`config.json` every setting. Nothing in this folder is executed when it is read. With the d2v package:

```python
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import d2v
from d2v.config import Config

folder = Path("{folder}")
config = Config.from_json((folder / "config.json").read_text())
model = d2v.Data2Vec(config)
model.load_state_dict(load_file(folder / "model.safetensors"))
model.eval()

{inputs}
encoded = model.teacher.encode(inputs)  # or model.encode: the student
print(encoded.features.shape)  # (B, T, C): {features}
pooled = encoded.features.mean(dim=1)  # one vector a sample
```

The same from the command line: `d2v features --checkpoint {folder} --input DATA --output features.npy`.
"""
TUNED = """# An exported fine-tuned data2vec model

`model.safetensors` holds the tensors (`encoder.`, `head.`), `config.json` every setting, with the head and the names of
its outputs under `finetune`. Nothing in this folder is executed when it is read. With the d2v package:

```python
import torch

from d2v.saved import load_any

model, config, device = load_any("{folder}", "cpu", takes_data=False)

{inputs}
with torch.no_grad():
    logits = model(inputs)
print(tuple(logits.shape), "{task}")
print([model.labels[i] for i in logits[0].argmax(-1).flatten().tolist()])
```

The same from the command line: `d2v evaluate model --checkpoint {folder} --test DATA`.
"""


@dataclass(frozen=True)
class Origin:
    """Where a model came from: saving it again gives the same names, dtypes and options."""

    config: dict[str, Any]
    """Options of the file's model; of a fine-tuned file those of the pre-trained one lie inside."""
    dtypes: dict[str, torch.dtype]
    """By the names in the file, those of a pre-trained model without prefix."""
    heads: tuple[str, ...]
    """Tensors of heads, read or left out."""
    key: str = "model"
    """Entry of the file that holds the tensors."""


def write_folder(model: Any, folder: Path, config: Config | None = None) -> None:
    """config.json, model.safetensors, README.md and, for models that came from a fairseq file, origin.json.

    The folder appears whole or not at all. model: `Data2Vec` or `FineTuned`; config: what is written; None: its own.
    """
    config = model.saved_config if config is None else config
    temporary = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
        sums = json.dumps({name: checksum_of(t) for name, t in tensors.items()})
        save_file(tensors, temporary / MODEL, metadata={"format": "pt", SUMS: sums})
        write_atomically(temporary / CONFIG, config.to_json())
        write_atomically(temporary / "README.md", _write_readme(config, folder))
        if isinstance(model.origin, Origin):
            write_atomically(temporary / ORIGIN, json.dumps(_origin_to_json(model.origin), indent=1))
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_readme(config: Config, folder: Path) -> str:
    kind = find_kind(config.stem.modality)
    inputs = kind.example.format(**vars(config.stem))
    if isinstance(config, FineTuneConfig):
        return TUNED.format(folder=folder, inputs=inputs, task=config.finetune.head.task)
    return README.format(folder=folder, inputs=inputs, features=kind.tokens)


def _origin_to_json(origin: Origin) -> dict[str, Any]:
    dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in origin.dtypes.items()}
    return {"config": origin.config, "dtypes": dtypes, "heads": list(origin.heads), "key": origin.key}
