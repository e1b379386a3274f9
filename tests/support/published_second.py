"""The published data2vec 2.0 step of speech and text written out in plain torch; see `published`."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.published import DEFAULTS as MODEL_DEFAULTS
from support.published import _standardise

MODEL: dict[str, Any] = {
    **MODEL_DEFAULTS, "num_heads": 4, "cls_loss": 0, "layer_norm_targets": False, "norm_eps": 1e-5, "mlp_ratio": 2,
}  # fmt: skip
AUDIO: dict[str, Any] = {
    "keep_masked_pct": 0, "learned_alibi": False, "alibi_max_pos": None,
    "prenet_depth": 1, "num_extra_tokens": 0, "mask_noise_std": 0.01, "mask_prob": 0.5, "inverse_mask": False,
    "mask_prob_adjust": 0.05, "mask_length": 3, "ema_local_encoder": False, "local_grad_mult": 1.0,
    "use_alibi_encoder": True, "alibi_scale": 1.0, "learned_alibi_scale": True, "learned_alibi_scale_per_head": True,
    "learned_alibi_scale_per_layer": False, "num_alibi_heads": 4, "extractor_mode": "layer_norm", "prenet_dropout": 0,
    "feature_encoder_spec": "[(12, 10, 5)] + [(12, 3, 2)] * 2", "conv_pos_width": 15, "conv_pos_groups": 4,
    "conv_pos_depth": 3, "conv_pos_pre_ln": False,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "keep_masked_pct": 0, "learned_alibi": False, "alibi_max_pos": None,
    "prenet_depth": 0, "num_extra_tokens": 0, "mask_noise_std": 0.01, "mask_prob": 0.5, "mask_length": 1,
    "ema_local_encoder": False, "max_source_positions": 40, "dropout": 0.0, "no_scale_embedding": True,
    "layernorm_embedding": True, "no_token_positional_embeddings": False, "learned_pos": True, "prenet_dropout": 0,
    "use_alibi_encoder": False, "alibi_scale": 1.0, "learned_alibi_scale": True, "learned_alibi_scale_per_head": True,
    "learned_alibi_scale_per_layer": False, "num_alibi_heads": 4,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "decoder_dim": 16, "decoder_groups": 4, "decoder_kernel": 3, "decoder_layers": 2, "input_dropout": 0.0,
    "decoder_residual": True, "projection_layers": 1, "projection_ratio": 2.0,
}  # fmt: skip
VOCABULARY = 30


def make_config(name: str, **options: Any) -> dict[str, Any]:
    """A small configuration of "audio" or "text"; each option replaces the default of its name wherever it stands."""
    config, modality = copy.deepcopy(MODEL), copy.deepcopy(AUDIO if name == "audio" else TEXT)
    decoder = copy.deepcopy(DECODER)
    for option, value in options.items():
        sections = [s for s in (config, modality, decoder) if option in s]
        assert sections, option
        for section in sections:
            section[option] = value
    config["modalities"] = {name: {**modality, "decoder": decoder}}
    return config


def convolutions(config: dict[str, Any]) -> list[tuple[int, int, int]]:
    spec: list[tuple[int, int, int]] = eval(config["modalities"]["audio"]["feature_encoder_spec"])
    return spec


def make_shapes(config: dict[str, Any], name: str) -> dict[str, tuple[int, ...]]:
    """Published names and shapes."""
    part, width = config["modalities"][name], config["embed_dim"]
    decoder, p = part["decoder"], f"modality_encoders.{name.upper()}."
    hidden, prenet = int(width * config["mlp_ratio"]), part["prenet_depth"]
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(at: str, *shape: int) -> None:
        shapes.update({f"{at}.weight": shape, f"{at}.bias": shape[:1]})

    for i in range(prenet + config["depth"]):
        block = f"{p}context_encoder.blocks.{i}." if i < prenet else f"blocks.{i - prenet}."
        layer(block + "norm1", width)
        layer(block + "norm2", width)
        layer(block + "attn.qkv", 3 * width, width)
        layer(block + "attn.proj", width, width)
        layer(block + "mlp.fc1", hidden, width)
        layer(block + "mlp.fc2", width, hidden)
    if config["layer_norm_first"]:
        layer("norm", width)
    elif name == "audio" or prenet:
        layer(p + "context_encoder.norm", width)
    if part["num_extra_tokens"]:
        shapes[p + "extra_tokens"] = (1, part["num_extra_tokens"], width)
    if part["use_alibi_encoder"]:
        rows = prenet + config["depth"] if part["learned_alibi_scale_per_layer"] else 1
        heads = part["num_alibi_heads"] if part["learned_alibi_scale_per_head"] else 1
        shapes[p + "alibi_scale"] = (rows, 1, heads, 1, 1)
        if part["learned_alibi"]:
            shapes[p + "alibi_bias"] = (1, part["num_alibi_heads"], *[part["alibi_max_pos"]] * 2)
    inputs = width
    for i in range(decoder["decoder_layers"]):
        size = decoder["decoder_dim"]
        layer(f"{p}decoder.blocks.{i}.0", size, inputs // decoder["decoder_groups"], decoder["decoder_kernel"])
        inputs = size
    for i in range(decoder["projection_layers"] - 1):
        size = int(inputs * decoder["projection_ratio"]) if i == 0 else inputs
        layer(f"{p}decoder.proj.{2 * i}", size, inputs)
        inputs = size
    last = f"{p}decoder.proj" + (f".{2 * decoder['projection_layers'] - 2}" if decoder["projection_layers"] > 1 else "")
    layer(last, width, inputs)
    return shapes | (_audio_shapes(config, p) if name == "audio" else _text_shapes(part, p, width))


def _audio_shapes(config: dict[str, Any], p: str) -> dict[str, tuple[int, ...]]:
    part, width = config["modalities"]["audio"], config["embed_dim"]
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = 1
    for i, (size, kernel, _) in enumerate(convolutions(config)):
        shapes[f"{p}local_encoder.conv_layers.{i}.0.weight"] = (size, inputs, kernel)
        if at := norm_of(part["extractor_mode"], i):
            shapes |= {f"{p}local_encoder.conv_layers.{i}.{at}.{leaf}": (size,) for leaf in ("weight", "bias")}
        inputs = size
    shapes |= {f"{p}project_features.1.{leaf}": (inputs,) for leaf in ("weight", "bias")}
    shapes |= {f"{p}project_features.2.weight": (width, inputs), f"{p}project_features.2.bias": (width,)}
    kernel = max(3, part["conv_pos_width"] // part["conv_pos_depth"])
    deeper = "1." if part["conv_pos_pre_ln"] else ""
    for i in range(part["conv_pos_depth"]):
        at = f"{p}relative_positional_encoder.{deeper}{i + 1}.0"
        shapes |= {f"{at}.weight": (width, width // part["conv_pos_groups"], kernel), f"{at}.bias": (width,)}
    if deeper:
        shapes |= {f"{p}relative_positional_encoder.0.{leaf}": (width,) for leaf in ("weight", "bias")}
    return shapes


def norm_of(mode: str, layer: int) -> str:
    """Where the norm stands in a layer of the waveform extractor, or "": it has none."""
    return "2.1" if mode == "layer_norm" else "" if layer else "2"


def norm_channels(w: dict[str, Tensor], at: str, mode: str, layer: int, x: Tensor) -> Tensor:
    """What the extractor does between convolution and GELU, of (B,C,T); the norm of a channel counts padding."""
    name = at + norm_of(mode, layer)
    if mode == "layer_norm":
        x = _standardise(x, (1,))
    elif layer == 0:
        x = _standardise(x, (2,))
    else:
        return x
    return x * w[name + ".weight"][:, None] + w[name + ".bias"][:, None]


def _text_shapes(part: dict[str, Any], p: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {p + "local_encoder.embed_tokens.weight": (VOCABULARY, width)}
    if not part["no_token_positional_embeddings"]:
        shapes[p + "local_encoder.embed_positions.weight"] = (part["max_source_positions"] + 2, width)
    if part["layernorm_embedding"]:
        shapes |= {f"{p}local_encoder.layernorm_embedding.{leaf}": (width,) for leaf in ("weight", "bias")}
    return shapes


def make_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random float64 tensors; padding rows of embeddings are 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        gain = len(shape) == 1 and name.endswith("weight")
        tensors[name] = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64) + float(gain)
        if "embed_" in name:
            tensors[name][1] = 0.0
        if name.endswith("alibi_scale"):
            tensors[name] = tensors[name] * 3.0 + 0.5  # some factors below 0
    return tensors


def teacher_names(config: dict[str, Any], name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Names of the student's tensors that are averaged, and the names that the averages have."""
    part, p = config["modalities"][name], f"modality_encoders.{name.upper()}."
    if config["ema_encoder_only"]:
        return {n: n.removeprefix("blocks.") for n in shapes if n.startswith("blocks.")}
    local = () if part["ema_local_encoder"] else (p + "local_encoder", p + "project_features")
    return {n: n for n in shapes if not n.startswith((p + "decoder", *local))}


class PublishedStep:
    """One training forward of the published code."""

    def __init__(
        self, config: dict[str, Any], name: str, student: dict[str, Tensor], teacher: dict[str, Tensor]
    ) -> None:
        """`teacher`: averages under the student's names."""
        self.config, self.name, self.part = config, name, config["modalities"][name]
        self.p, self.student, self.teacher = f"modality_encoders.{name.upper()}.", student, {**student, **teacher}

    def norm(self, w: dict[str, Tensor], at: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[at + ".weight"], w[at + ".bias"], eps)

    def local(self, w: dict[str, Tensor], inputs: Tensor) -> Tensor:
        p = self.p + "local_encoder."
        if self.name == "text":
            x = F.embedding(inputs, w[p + "embed_tokens.weight"], padding_idx=1)
            if not self.part["no_scale_embedding"]:
                x = x * math.sqrt(x.shape[2])
            if not self.part["no_token_positional_embeddings"]:
                real = (inputs != 1).long()
                x = x + F.embedding(real.cumsum(1) * real + 1, w[p + "embed_positions.weight"], padding_idx=1)
            return self.norm(w, p + "layernorm_embedding", x, 1e-5) if self.part["layernorm_embedding"] else x
        x = inputs[:, None]
        for i, (_, _, stride) in enumerate(convolutions(self.config)):
            x = F.conv1d(x, w[f"{p}conv_layers.{i}.0.weight"], stride=stride)
            x = F.gelu(norm_channels(w, f"{p}conv_layers.{i}.", self.part["extractor_mode"], i, x))
        x = self.norm(w, self.p + "project_features.1", x.transpose(1, 2), 1e-5)
        return F.linear(x, w[self.p + "project_features.2.weight"], w[self.p + "project_features.2.bias"])

    def visible(self, mask: Tensor) -> int:
        masked = int(mask[0].sum())
        more = round(masked * self.part["keep_masked_pct"]) if self.part["mask_length"] > 1 else 0
        return mask.shape[1] - masked + more

    def relative(self, w: dict[str, Tensor], x: Tensor) -> Tensor:
        p = self.p + "relative_positional_encoder."
        if self.part["conv_pos_pre_ln"]:
            x, p = self.norm(w, p + "0", x, 1e-5), p + "1."
        x = x.transpose(1, 2)
        for i in range(self.part["conv_pos_depth"]):
            weight = w[f"{p}{i + 1}.0.weight"]
            groups, kernel = self.part["conv_pos_groups"], weight.shape[2]
            y = F.conv1d(x, weight, w[f"{p}{i + 1}.0.bias"], padding=kernel // 2, groups=groups)[:, :, : x.shape[2]]
            x = F.gelu(_standardise(y, (1,)))
        return x.transpose(1, 2)

    def bias(self, w: dict[str, Tensor], layer: int, places: Tensor, extra: int) -> Tensor | None:
        """(N,H',T,T) of one block, zero for extra tokens."""
        if not self.part["use_alibi_encoder"]:
            return None
        heads = self.part["num_alibi_heads"]
        power = 2 ** math.floor(math.log2(heads))
        slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
        slopes += [2.0 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)][: heads - power]
        distance = (places[:, None, :, None] - places[:, None, None, :]).abs()
        bias = -torch.tensor(slopes, dtype=torch.float64).view(1, -1, 1, 1) * distance
        scale = w[self.p + "alibi_scale"].clamp_min(0)
        if self.part["learned_alibi"]:
            bias = torch.stack([w[self.p + "alibi_bias"][0][:, row][:, :, row] for row in places])
        return F.pad(bias * scale[layer if len(scale) > 1 else 0], (extra, 0, extra, 0))

    def block(
        self, w: dict[str, Tensor], at: str, x: Tensor, bias: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        eps = self.config["norm_eps"]

        def linear(part: str, x: Tensor) -> Tensor:
            return F.linear(x, w[f"{at}{part}.weight"], w[f"{at}{part}.bias"])

        def attend(x: Tensor) -> Tensor:
            n, t, c = x.shape
            heads = self.config["num_heads"]
            q, k, v = (y.view(n, t, heads, c // heads).transpose(1, 2) for y in linear("attn.qkv", x).split(c, dim=2))
            logits = (c // heads) ** -0.5 * q @ k.transpose(2, 3)
            if bias is not None:
                logits = torch.cat([logits[:, : bias.shape[1]] + bias, logits[:, bias.shape[1] :]], dim=1)
            if padding is not None:
                logits = logits.masked_fill(padding[:, None, None], -torch.inf)
            return linear("attn.proj", (logits.softmax(dim=3) @ v).transpose(1, 2).reshape(n, t, c))

        def mlp(x: Tensor) -> Tensor:
            return linear("mlp.fc2", F.gelu(linear("mlp.fc1", x)))

        if self.config["layer_norm_first"]:
            x = x + attend(self.norm(w, at + "norm1", x, eps))
            f = mlp(self.norm(w, at + "norm2", x, eps))
            out = f + f
        else:
            x = self.norm(w, at + "norm1", x + attend(x), eps)
            f = mlp(x)
            out = self.norm(w, at + "norm2", x + f, eps)
        return out, out if self.config["end_of_block_targets"] else f

    def encode(
        self, w: dict[str, Tensor], x: Tensor, mask: Tensor | None, padding: Tensor | None, blocks: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Output of the main blocks and their target tensors; with a mask, of visible tokens only."""
        extra, prenet = self.part["num_extra_tokens"], self.part["prenet_depth"]
        places = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        if self.name == "audio":
            shown = x if mask is None else x * ~mask[..., None]
            x = x + self.relative(w, shown)
        if mask is not None:
            visible = self.visible(mask)
            places = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :visible]
            x = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
            padding = None if padding is None else padding.gather(1, places)
        if extra:
            x = torch.cat([w[self.p + "extra_tokens"].expand(len(x), -1, -1), x], dim=1)
            padding = None if padding is None else F.pad(padding, (extra, 0))
        if (at := self.p + "context_encoder.norm") + ".weight" in w:
            x = self.norm(w, at, x, self.config["norm_eps"])
        for i in range(prenet):
            bias = self.bias(w, i, places, extra)
            x, _ = self.block(w, f"{self.p}context_encoder.blocks.{i}.", x, bias, padding)
        tensors = []
        for i in range(self.config["depth"]):
            bias = self.bias(w, prenet + i, places, extra)
            x, target = self.block(blocks, f"blocks.{i}.", x, bias, padding)
            tensors.append(target[:, extra:])
        if self.config["layer_norm_first"]:
            x = self.norm(w, "norm", x, self.config["norm_eps"])
        return x, tensors

    def targets(self, tensors: list[Tensor]) -> Tensor:
        config = self.config
        tensors = tensors[-config["average_top_k_layers"] :]
        for flag, axes in (("batch", (0, 1)), ("instance", (1,)), ("layer", (2,))):
            if config[f"{flag}_norm_target_layer"]:
                tensors = [_standardise(t, axes) for t in tensors]
        y = torch.stack(tensors).mean(dim=0)
        if config["layer_norm_targets"]:
            y = _standardise(y, (2,))
        return _standardise(y, (1,)) if config["instance_norm_targets"] else y

    def decode(self, x: Tensor) -> Tensor:
        decoder, p, w = self.part["decoder"], self.p + "decoder.", self.student
        x = x.transpose(1, 2)
        kernel = decoder["decoder_kernel"]
        for i in range(decoder["decoder_layers"]):
            weight, bias = w[f"{p}blocks.{i}.0.weight"], w[f"{p}blocks.{i}.0.bias"]
            y = F.conv1d(x, weight, bias, padding=kernel // 2, groups=decoder["decoder_groups"])[:, :, : x.shape[2]]
            y = F.gelu(_standardise(y, (1,)))
            x = x + y if decoder["decoder_residual"] and x.shape == y.shape else y
        x = x.transpose(1, 2)
        if decoder["projection_layers"] == 1:
            return F.linear(x, w[p + "proj.weight"], w[p + "proj.bias"])
        for i in range(decoder["projection_layers"]):
            x = F.linear(F.gelu(x) if i else x, w[f"{p}proj.{2 * i}.weight"], w[f"{p}proj.{2 * i}.bias"])
        return x

    def run(self, inputs: Tensor, padding: Tensor | None, mask: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Predictions, targets, losses; noise rows by ascending masked position; padding (B,T) True at pads."""
        config, clones = self.config, self.config["clone_batch"]
        features = self.local(self.student, inputs)
        rows = features.repeat_interleave(clones, dim=0)
        padded = None if padding is None else padding.repeat_interleave(clones, dim=0)
        x, _ = self.encode(self.student, rows, mask, padded, self.student)
        extra, visible = self.part["num_extra_tokens"], self.visible(mask)
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        full = torch.cat([x[:, extra:], noise], dim=1)
        assert full.shape[1] == order.shape[1] == visible + noise.shape[1]
        prediction = self.decode(full.gather(1, order.argsort(dim=1)[..., None].expand_as(full)))[mask]
        with torch.no_grad():
            own = config["ema_encoder_only"]
            w = self.student if own else self.teacher
            clean = self.local(w, inputs) if self.part["ema_local_encoder"] and not own else features
            _, tensors = self.encode(w, clean, None, padding, self.teacher)
            y = self.targets(tensors)
        target = y.repeat_interleave(clones, dim=0)[mask]
        scale = config["loss_scale"] if config["loss_scale"] is not None else x.shape[2] ** -0.5
        count = int(mask.sum())
        result = {"prediction": prediction, "target": target, "targets": y}
        result["regression"] = self.error(prediction, target) * scale * config["d2v_loss"]
        if config["cls_loss"]:
            result["class_prediction"] = x[:, extra - 1]
            result["class_target"] = y.mean(dim=1).repeat_interleave(clones, dim=0)
            error = self.error(result["class_prediction"], result["class_target"])
            result["cls"] = error * scale * config["cls_loss"] * count
        result["loss"] = (result["regression"] + result.get("cls", 0.0)) / count
        return result

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        beta = self.config["loss_beta"]
        return F.mse_loss(x, y, reduction="sum") if beta == 0 else F.smooth_l1_loss(x, y, reduction="sum", beta=beta)
