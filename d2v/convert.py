"""`d2v import` and `d2v export`: checkpoints of other programs in, ours out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from d2v.checkpoint import CONFIG, MODEL, find_checkpoint, load_json
from d2v.config import Config
from d2v.data2vec import Data2Vec
from d2v.evaluate import find_tokenizer, load_any
from d2v.files import write_atomically
from d2v.finetune.config import FineTune, FineTuneConfig, read_config
from d2v.finetuned import FineTuned
from d2v.interop import fairseq, huggingface
from d2v.interop.fairseq_file import Origin

ORIGIN = "origin.json"
FORMATS = ("safetensors", "huggingface", "fairseq")
LICENCES = """Published weights have the licence of their source, not of this project. fairseq states the MIT licence
for its code and says that it applies to its pre-trained models as well; model cards of other sources state their own.
Read it before you use or pass on what was imported."""

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

from d2v.evaluate import find_tokenizer, load_any

model, config, device = load_any("{folder}", "cpu", takes_data=False)

{inputs}
with torch.no_grad():
    logits = model(inputs)
print(tuple(logits.shape), "{task}")
print([model.labels[i] for i in logits[0].argmax(-1).flatten().tolist()])
```

The same from the command line: `d2v evaluate model --checkpoint {folder} --test DATA`.
"""
_EXAMPLES = {
    "speech": (
        "inputs = torch.randn(1, 16_000)  # waveform at 16 kHz, zero mean and unit variance",
        "a frame each 20 ms",
    ),
    "vision": ("inputs = torch.randn(1, {channels}, {size}, {size})  # normalised pixels", "patches row by row"),
    "text": ("inputs = torch.tensor([[0, 5, 6, 7, 2]])  # token ids: <s> ... </s>", "a token each"),
}


def import_checkpoint(source: str, output: str) -> str:
    """Reads a fairseq file or a transformers folder and writes an exported folder; returns a summary.

    Raises `ValueError` or `NotImplementedError` for what cannot be read, before anything is written.
    """
    path, folder = Path(source), _new_folder(output)
    if not path.exists():
        raise ValueError(f"from: expected a checkpoint file or a transformers folder, found none at {source!r}")
    model = huggingface.load(path) if path.is_dir() else fairseq.load(path)
    write_folder(model, folder)
    encoder = model.encoder if isinstance(model, FineTuned) else model
    count = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    stem = model.config.stem
    head = ""
    if isinstance(model, FineTuned):
        settings = model.head.settings
        shown = ", ".join(model.labels[:6]) + (", ..." if len(model.labels) > 6 else "")
        head = f", fine-tuned: {settings.task}, {settings.outputs} outputs ({shown})"
    note = "\nText needs its tokenizer beside the weights: `d2v data tokenizer --help` says how to make that folder."
    return (
        f"{folder}: data2vec {model.config.version}.0, {stem.modality}, {count / 1e6:.1f} M parameters of the student"
        f"{head}{note if stem.modality == 'text' else ''}\n{LICENCES}"
    )


def export_checkpoint(checkpoint: str, format: str, output: str) -> str:
    """Writes the model of a checkpoint in another format; returns a summary.

    safetensors: a folder with config and a loading example. huggingface: a folder for transformers (1.0). fairseq: a
    file, or `model.pt` in a folder where `output` has no suffix .pt.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    model = _load_with_origin(checkpoint)
    if format == "fairseq":
        path = Path(output) if output.endswith(".pt") else _new_folder(output) / "model.pt"
        if path.exists():
            raise ValueError(f"output: expected a new file, got {str(path)!r}, which exists")
        return f"{fairseq.save(model, path)}: fairseq checkpoint"
    folder = _new_folder(output)
    if format == "huggingface":
        return f"{huggingface.save(model, folder)}: transformers folder"
    write_folder(model, folder)
    if model.config.stem.modality == "text" and (tokenizer := _find_tokenizer(checkpoint)) is not None:
        shutil.copytree(tokenizer, folder / "tokenizer")
    return f"{folder}: safetensors with {CONFIG} and README.md, which shows how to load them"


def write_folder(model: Data2Vec | FineTuned, folder: Path, config: Config | None = None) -> None:
    """config.json, model.safetensors, README.md and, for models that came from a fairseq file, origin.json.

    The folder appears whole or not at all. config: what is written; None: the model's.
    """
    if config is None:
        config = model.config
        if isinstance(model, FineTuned) and not isinstance(config, FineTuneConfig):
            config = FineTuneConfig.of(config, finetune=FineTune(head=model.head.settings, labels=model.labels))
    from safetensors.torch import save_file

    temporary = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
        save_file(tensors, temporary / MODEL)
        write_atomically(temporary / CONFIG, config.to_json())
        write_atomically(temporary / "README.md", _write_readme(model, folder))
        if isinstance(model.origin, Origin):
            write_atomically(temporary / ORIGIN, json.dumps(_origin_to_json(model.origin), indent=1))
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_readme(model: Data2Vec | FineTuned, folder: Path) -> str:
    stem = model.config.stem
    inputs, features = _EXAMPLES[stem.modality]
    inputs = inputs.replace("{channels}", str(stem.channels)).replace("{size}", str(stem.image_size))
    if isinstance(model, FineTuned):
        return TUNED.format(folder=folder, inputs=inputs, task=model.head.settings.task)
    return README.format(folder=folder, inputs=inputs, features=features)


def _new_folder(output: str) -> Path:
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output: expected an absent or empty folder, got {output!r}")
    return folder


def _origin_to_json(origin: Origin) -> dict[str, Any]:
    dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in origin.dtypes.items()}
    return {"config": origin.config, "dtypes": dtypes, "heads": list(origin.heads), "key": origin.key}


def _find_tokenizer(checkpoint: str) -> str | None:
    folder = find_checkpoint(checkpoint)
    try:
        return find_tokenizer(folder, read_config(folder / CONFIG))
    except ValueError:
        return None  # an imported model that nobody gave one


def _load_with_origin(checkpoint: str) -> Data2Vec | FineTuned:
    model, _, _ = load_any(checkpoint, "cpu", takes_data=False)
    file = find_checkpoint(checkpoint) / ORIGIN
    if file.is_file():
        value = load_json(file)
        dtypes = {name: getattr(torch, dtype) for name, dtype in value["dtypes"].items()}
        model.origin = Origin(value["config"], dtypes, tuple(value["heads"]), value.get("key", "model"))
    return model
