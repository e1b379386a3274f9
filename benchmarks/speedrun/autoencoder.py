"""What data2vec is compared with: the same student, trained to reconstruct its input at the masked positions.

Images: the pixels of each masked patch, normalised patch by patch (He et al. 2022, masked autoencoders). Speech: the
log-mel frames of each masked token, normalised token by token. Text: the token itself, by cross entropy (BERT's loss
with data2vec 2.0's encoder, which does not see the masked places). Stem, encoder, decoder and masks are data2vec 2.0's;
the decoder's last layer has the target's width, and there is no teacher.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v.config import Config
from d2v.data.dataset import Batch
from d2v.model.data2vec import Data2Vec, Output
from d2v.train.objective import Step
from d2v.train.pretraining import Pretraining

from ..training.cases import change


class MaskedAutoencoder(Data2Vec):
    """`Data2Vec` of version 2 with the input as its target."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert self.decoder is not None
        last = self.decoder.proj[-1] if isinstance(self.decoder.proj, nn.Sequential) else self.decoder.proj
        assert isinstance(last, nn.Linear)
        own = nn.Linear(last.in_features, target_width(config))
        if isinstance(self.decoder.proj, nn.Sequential):
            self.decoder.proj[-1] = own
        else:
            self.decoder.proj = own

    def _compute_targets(self, inputs: Tensor, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B,T,D): patches or frames, each with mean 0 and variance 1; text: token ids (B,T,1)."""
        config = self.config.stem
        if config.modality == "text":
            return inputs[..., None].float()
        if config.modality == "vision":
            patches = F.unfold(inputs, config.patch_size, stride=config.patch_size).transpose(1, 2)
            return F.layer_norm(patches, patches.shape[-1:])
        bands = inputs.reshape(len(inputs), features.shape[1], -1)  # as `LogMelStem.prepare` made them
        return F.layer_norm(bands, bands.shape[-1:])

    def compute_loss(
        self, prediction: Tensor, encoded: Tensor, targets: Tensor, features: Tensor, rows: Tensor, copies: int,
        lengths: Tensor | None,
    ) -> Output:  # fmt: skip
        if self.config.stem.modality != "text":
            return super().compute_loss(prediction, encoded, targets, features, rows, copies, lengths)
        batch, tokens, _ = targets.shape
        row = rows // tokens
        target_rows = rows - (row - row // copies) * tokens
        wanted = targets.flatten().index_select(0, target_rows).long()
        loss = F.cross_entropy(prediction.float(), wanted, reduction="sum")
        still = torch.zeros((), device=loss.device)
        return Output(
            loss=loss / max(len(rows), 1), losses={"regression": loss}, sample_size=len(rows), prediction=prediction,
            targets=targets, target_rows=target_rows, prediction_std=still, target_std=still,
            features=features.detach()[:: features.shape[0] // batch],
        )  # fmt: skip


def target_width(config: Config) -> int:
    """Numbers that a masked token is reconstructed by."""
    stem = config.stem
    if stem.modality == "text":
        return stem.vocabulary
    if stem.modality == "vision":
        return stem.channels * stem.patch_size**2
    if stem.kind != "log-mel":
        raise ValueError(f"stem.kind: expected log-mel for an autoencoder of speech, got {stem.kind}")
    return stem.mel_bins * stem.mel_frames


class Autoencoding(Pretraining):
    """The objective: `Pretraining` without a moving average."""

    def __init__(self, config: Config, *args: Any) -> None:
        config = change(config, loss={"class_weight": 0.0, "scale": 1.0 / target_width(config)})
        super().__init__(config, *args)
        torch.manual_seed(config.run.seed)
        self.model = MaskedAutoencoder(config).to(next(self.model.parameters()).device)

    def end_update(self, update: int, applied: Tensor | None) -> None:
        """No teacher."""

    def monitor(self, step: Step, batch: Batch) -> dict[str, float]:
        """Nothing: the monitors of data2vec look at its targets."""
        return {"content_spread": float("nan")}

    def find_failure(self, line: Any, batch: Batch | None) -> str | None:
        """A loss that is not finite; collapse there is none."""
        return super().find_failure(line, None)


def to_data2vec(model: MaskedAutoencoder, config: Config) -> Data2Vec:
    """A `Data2Vec` with the trained encoder, as student and teacher alike, for probes and fine-tuning."""
    result = Data2Vec(config)
    own = result.state_dict()
    trained = {n: t for n, t in model.state_dict().items() if n in own and t.shape == own[n].shape}
    result.load_state_dict({**own, **trained})
    result.teacher.copy_student()
    return result
