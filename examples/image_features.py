"""Which images look alike to a pre-trained model: `python examples/image_features.py CHECKPOINT FOLDER`."""

import sys

import torch
from torch.nn.functional import normalize

from d2v.data import make_modality
from d2v.data.loader import evaluation_batches
from d2v.evaluate.probe import encode_batch
from d2v.saved import load_model

model, config, device = load_model(sys.argv[1])
modality = make_modality(config)
images = modality.open_whole(sys.argv[2], option="folder")
batches = evaluation_batches(config, images, device)
features = torch.cat([encode_batch(model.teacher, modality, batch, device) for batch in batches])  # (n, C)
nearest = (normalize(features) @ normalize(features).T).fill_diagonal_(-1).argmax(1)
for i, j in enumerate(nearest.tolist()):
    print(images.describe(i), images.describe(j), sep="\t")
