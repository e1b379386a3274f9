"""A model of data2vec 2.0 where `AutoModel` has no such architecture: `python examples/load_model.py FOLDER_OR_REPO`.

A folder of `d2v export` or `d2v import`, or a Hugging Face repository that holds its config.json and model.safetensors
(`hf upload REPO FOLDER`): no code comes with it, and nothing in it is executed.
"""

import sys
from pathlib import Path

import d2v
from d2v.interop.program import make_example


def load_model(name: str, device: str = "cpu") -> d2v.Data2Vec:
    """The pre-trained model of a folder, or of a repository of the hub at this name."""
    if not Path(name).is_dir():
        from huggingface_hub import snapshot_download

        name = snapshot_download(name, allow_patterns=["config.json", "model.safetensors"])
    return d2v.Data2Vec.from_checkpoint(name, device)


if __name__ == "__main__":
    model = load_model(sys.argv[1])
    inputs = make_example(model.config)  # as the README.md in the folder says
    print(model, tuple(inputs.shape), tuple(model.teacher.encode(inputs).features.shape), sep="\n")
