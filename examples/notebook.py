# Cells for VS Code, PyCharm, Spyder, and Jupyter with jupytext; `python examples/notebook.py` runs them, too.

# %% [markdown]
# # data2vec 2.0 in minutes
# Pre-train a small model on crops of photographs without their labels, look at its curves and features, and ask a
# linear classifier what they know.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import d2v
from d2v.evaluate.probe import probe
from d2v.tools.textures import write_textures
from d2v.train.logging import read_metrics
from d2v.train.pretraining import pretrain

FOLDER, STEPS, CROPS = Path("runs/notebook"), 600, {"pretrain": 200, "train": 50, "test": 50}

# %% [markdown]
# ## Data
# Grey 32 x 32 crops of eight photographs that ship with scikit-image; or any folder of images of your own.

# %%
data = FOLDER / "data"
if not data.exists():
    print(write_textures(data, seed=0, size=32, counts=CROPS))

# %% [markdown]
# ## Pre-training
# A recipe is a dataclass; `change` gives it other values. Running the cell again resumes the run or finds it finished.

# %%
config = d2v.recipes.vision_tiny().change(
    data=dict(path=str(data / "pretrain"), workers=0),
    optim=dict(warmup_steps=STEPS // 10),
    run=dict(dir=str(FOLDER / "run"), steps=STEPS, log_every=max(1, STEPS // 30), checkpoint_every=STEPS),
)
run = pretrain(config)

# %%
metrics = read_metrics(run / "metrics.jsonl")
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot([line["step"] for line in metrics], [line["loss"] for line in metrics])
left.set(xlabel="update", title="loss")
for name in ("target_std", "prediction_std"):
    right.plot([line["step"] for line in metrics], [line[name] for line in metrics], label=name)
right.set(xlabel="update", title="0 is collapse")
right.legend()
figure.savefig(FOLDER / "curves.png")

# %% [markdown]
# ## Features
# One vector a patch, by the weights of the student; `model.teacher.encode(images).features` has the averaged ones.

# %%
model = d2v.Data2Vec.from_checkpoint(run)
print(model)
images = torch.rand(4, 3, 32, 32)
print(model.features(images).shape)

# %% [markdown]
# ## What they know
# From which photograph does a crop come? Pre-trained features, those of the untrained network, and the pixels.

# %%
result = probe(str(run), str(data / "train"), str(data / "test"), baselines=["random_init", "pixels"])
scores = result["linear_probe"]
plt.figure(figsize=(4, 3), layout="constrained")
plt.bar(list(scores), list(scores.values()))
plt.title("accuracy of a linear classifier")
plt.savefig(FOLDER / "probe.png")
