"""The published data2vec 2.0 image step, EAT's on spectrograms too, in plain torch, from the text of the golden cases.

Independent of the package: tensors by their published names, no operators, any dtype. For tests that vary options
beyond the golden case.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE = "modality_encoders.IMAGE."

DEFAULTS: dict[str, Any] = {
    "loss_beta": 0, "loss_scale": None, "depth": 2, "start_drop_path_rate": 0, "end_drop_path_rate": 0, "num_heads": 2,
    "norm_eps": 1e-6, "norm_affine": True, "encoder_dropout": 0.0, "post_mlp_drop": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "dropout_input": 0.0, "layerdrop": 0.0, "embed_dim": 16, "mlp_ratio": 4,
    "layer_norm_first": False, "average_top_k_layers": 2, "end_of_block_targets": False, "clone_batch": 2,
    "layer_norm_target_layer": False, "batch_norm_target_layer": False, "instance_norm_target_layer": True,
    "instance_norm_targets": False, "layer_norm_targets": True, "ema_decay": 0.9, "ema_end_decay": 0.99,
    "ema_anneal_end_step": 10, "ema_encoder_only": False, "max_update": 1000, "shared_decoder": None,
    "cls_loss": 0.01, "recon_loss": 0, "d2v_loss": 1, "mae_init": False, "skip_ema": False,
}  # fmt: skip
IMAGE_DEFAULTS: dict[str, Any] = {
    "keep_masked_pct": 0, "learned_alibi": False, "alibi_max_pos": None,
    "prenet_depth": 1, "num_extra_tokens": 1, "mask_noise_std": 0.01, "mask_prob": 0.75, "inverse_mask": True,
    "mask_prob_adjust": 0.07, "mask_length": 2, "ema_local_encoder": True, "input_size": 16, "in_chans": 3,
    "patch_size": 4, "embed_dim": 16, "fixed_positions": True, "prenet_dropout": 0,
    "use_alibi_encoder": False, "alibi_dims": 2, "alibi_distance": "manhattan", "alibi_scale": 1.0,
    "learned_alibi_scale": True, "learned_alibi_scale_per_head": True, "learned_alibi_scale_per_layer": False,
    "num_alibi_heads": 2, "transformer_decoder": False, "enc_dec_transformer": False,
}  # fmt: skip
DECODER_DEFAULTS: dict[str, Any] = {
    "decoder_dim": 16, "decoder_groups": 4, "decoder_kernel": 3, "decoder_layers": 2, "input_dropout": 0.0,
    "decoder_residual": True, "add_positions_masked": False, "add_positions_all": False,
}  # fmt: skip


EAT: dict[str, Any] = {
    "utterance_level": False, "init_center_token_zero": False, "center_exp": 0.9, "softmax_temperature_student": 0.1,
    "softmax_temperature_teacher": 0.05, "ema_same_dtype": True, "log_norms": True, "min_target_var": 0,
    "min_pred_var": 0, "seed": "${common.seed}", "decoder_group": False, "_name": "data2vec_multi",
    "supported_modality": "IMAGE",
}  # fmt: skip
EAT_IMAGE: dict[str, Any] = {
    "target_length": 128, "type": "IMAGE", "prenet_layerdrop": 0, "start_drop_path_rate": 0, "end_drop_path_rate": 0,
    "init_extra_token_zero": False, "mask_prob_min": None, "keep_masked_pct": 0, "add_masks": False,
    "remove_masks": False, "mask_dropout": 0.0, "encoder_zero_mask": True, "mask_channel_prob": 0.0,
    "mask_channel_length": 64, "local_grad_mult": 1.0, "learned_alibi": False, "alibi_max_pos": None,
    "num_alibi_heads": "${model.num_heads}", "model_depth": "${model.depth}", "transformer_decoder": False,
    "enc_dec_transformer": False,
}  # fmt: skip
"""What EAT's published files have beside what the step needs."""


def make_eat_config(**options: Any) -> dict[str, Any]:
    """EAT's published configuration (`pretraining_AS2M`) with its defaults written out, and a smaller model."""
    config = make_config(
        in_chans=1, patch_size=16, mask_length=5, mask_prob=0.8, mask_prob_adjust=0.07, prenet_depth=0, depth=3,
        average_top_k_layers=3, num_heads=2, cls_loss=1, input_size=224, learned_alibi_scale=False,
        learned_alibi_scale_per_head=False, num_alibi_heads=2, decoder_kernel=3, **options,
    )  # fmt: skip
    config["modalities"]["image"] |= EAT_IMAGE
    return {**config, **EAT}


def grid_of(image: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches; of one channel time and 128 bands in EAT."""
    height = width = image["input_size"]
    if image["in_chans"] == 1 and "target_length" in image:
        height, width = image["target_length"], 128
    return height // image["patch_size"], width // image["patch_size"]


def make_config(local_dim: int | None = None, **options: Any) -> dict[str, Any]:
    """A small configuration; each option replaces the default of its name in whichever section has it; `local_dim`:
    the embed_dim of the images alone."""
    config, image, decoder = copy.deepcopy(DEFAULTS), copy.deepcopy(IMAGE_DEFAULTS), copy.deepcopy(DECODER_DEFAULTS)
    for name, value in options.items():
        sections = [s for s in (config, image, decoder) if name in s]
        assert sections, name
        for section in sections:
            section[name] = value
    image["embed_dim"] = image["embed_dim"] if local_dim is None else local_dim
    config["modalities"] = {"image": {**image, "decoder": decoder}}
    return config


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of tensors by their published names, in the order in which they are drawn."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.image, self.width = config, config["modalities"]["image"], config["embed_dim"]

    def norm(self, name: str, size: int) -> None:
        if self.config["norm_affine"]:
            self.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    def layer(self, name: str, *shape: int) -> None:
        self.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def block(self, block: str, size: int) -> None:
        hidden = int(size * self.config["mlp_ratio"])
        self.norm(block + "norm1", size)
        self.norm(block + "norm2", size)
        self.layer(block + "attn.qkv", 3 * size, size)
        self.layer(block + "attn.proj", size, size)
        self.layer(block + "mlp.fc1", hidden, size)
        self.layer(block + "mlp.fc2", size, hidden)

    def cross_block(self, block: str, size: int) -> None:
        for name, shape in {
            "norm1": (size,), "norm2": (size,), "attn.q_proj": (size, size), "attn.kv_proj": (2 * size, self.width),
            "attn.proj": (size, size), "mlp.fc1": (4 * size, size), "mlp.fc2": (size, 4 * size),
        }.items():  # fmt: skip
            self.layer(block + name, *shape)

    def local_encoder(self) -> None:
        local, patch = self.image["embed_dim"], self.image["patch_size"]
        at = IMAGE + ("local_encoder.proj" if local == self.width else "local_encoder.0.proj")
        self.layer(at, local, self.image["in_chans"], patch, patch)
        if local != self.width:
            self.layer(IMAGE + "local_encoder.1", self.width, local)

    def decoders(self) -> None:
        """That of the images, and the shared one."""
        decoder = self.image["decoder"]
        inputs, inner, kernel = self.width, decoder["decoder_dim"], decoder["decoder_kernel"]
        for i in range(decoder["decoder_layers"]):
            if not self.image["transformer_decoder"]:
                groups = decoder["decoder_groups"]
                self.layer(f"{IMAGE}decoder.blocks.{i}.0", inner, inputs // groups, kernel, kernel)
            elif self.image["enc_dec_transformer"]:
                self.cross_block(f"{IMAGE}decoder.blocks.{i}.", inner)
            else:
                self.block(f"{IMAGE}decoder.encoder.blocks.{i}.", inner)
            inputs = inner
        if self.image["transformer_decoder"]:
            self.layer(IMAGE + "decoder.input_proj", inner, self.width)
        self.layer(IMAGE + "decoder.proj", self.width, inputs)
        if shared := self.config["shared_decoder"]:
            inner, kernel = shared["decoder_dim"], shared["decoder_kernel"]
            for i in range(shared["decoder_layers"]):
                inputs = inner if i else self.width
                self.layer(f"shared_decoder.blocks.{i}.0", inner, inputs // shared["decoder_groups"], kernel)
            self.layer("shared_decoder.proj", self.width, inner)

    def positions(self) -> None:
        """Biases, extra tokens, positions."""
        image = self.image
        if image["use_alibi_encoder"]:
            rows = image["prenet_depth"] + self.config["depth"] if image["learned_alibi_scale_per_layer"] else 1
            self[IMAGE + "alibi_scale"] = (rows, 1, image["num_alibi_heads"], 1, 1)
            if image["learned_alibi"]:
                self[IMAGE + "alibi_bias"] = (1, image["num_alibi_heads"], *[image["alibi_max_pos"]] * 2)
        if image["num_extra_tokens"]:
            self[IMAGE + "extra_tokens"] = (1, image["num_extra_tokens"], self.width)
        if image["fixed_positions"]:
            self[IMAGE + "fixed_positional_encoder.positions"] = (1, math.prod(grid_of(image)), self.width)


def make_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random student tensors (float64) under their published names."""
    shapes = Shapes(config)
    blocks = [f"{IMAGE}context_encoder.blocks.{i}." for i in range(shapes.image["prenet_depth"])]
    for block in [*blocks, *(f"blocks.{i}." for i in range(config["depth"]))]:
        shapes.block(block, shapes.width)
    shapes.norm("norm" if config["layer_norm_first"] else IMAGE + "context_encoder.norm", shapes.width)
    shapes.local_encoder()
    if config["recon_loss"]:
        shapes.layer("recon_proj", shapes.width, shapes.width)
    shapes.decoders()
    shapes.positions()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        gain = name.endswith("weight") and "norm" in name
        tensors[name] = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64) + float(gain)
    return tensors


def make_teacher(config: dict[str, Any], student: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A teacher near the student, under the names of the published `_ema` entry."""
    image = config["modalities"]["image"]
    if config["ema_encoder_only"]:
        names = {n: n.removeprefix("blocks.") for n in student if n.startswith("blocks.")}
    else:
        names = {n: n for n in student if not n.startswith((IMAGE + "decoder", "recon_proj", "shared_decoder"))}
        if not image["ema_local_encoder"]:
            names = {n: n for n in names if not n.startswith(IMAGE + "local_encoder")}
    generator = torch.Generator().manual_seed(seed)
    return {
        theirs: student[ours] if "positions" in ours
        else student[ours] + 0.05 * torch.randn(student[ours].shape, generator=generator, dtype=torch.float64)
        for ours, theirs in names.items()
    }  # fmt: skip


class PublishedStep:
    """One training forward of the published code."""

    def __init__(self, config: dict[str, Any], student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        self.config, self.image = config, config["modalities"]["image"]
        self.decoder = self.image["decoder"]
        self.student = student
        blocks_only = config["ema_encoder_only"]
        self.teacher = {**student, **({f"blocks.{n}": t for n, t in teacher.items()} if blocks_only else teacher)}

    def norm(self, p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p.get(name + ".weight"), p.get(name + ".bias"), self.config["norm_eps"])

    def bias(self, p: dict[str, Tensor], layer: int, keep: Tensor | None, rows: int) -> Tensor | float:
        """ALiBi of one block, for the kept patches; zero for extra tokens."""
        image = self.image
        if not image["use_alibi_encoder"]:
            return 0.0
        side, heads, extra = (
            image["input_size"] // image["patch_size"],
            image["num_alibi_heads"],
            image["num_extra_tokens"],
        )
        place = torch.arange(side * side).expand(rows, -1) if keep is None else keep
        down = (place[:, :, None] // side - place[:, None, :] // side).abs().double()
        across = (place[:, :, None] % side - place[:, None, :] % side).abs().double()
        distance = down + across if image["alibi_distance"] == "manhattan" else (down**2 + across**2).sqrt()
        if image["alibi_dims"] == 1:
            distance = (place[:, :, None] - place[:, None, :]).abs().double()
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64)
        scale = p[IMAGE + "alibi_scale"].clamp_min(0)
        scale = scale[layer if len(scale) > 1 else 0]
        if image["learned_alibi"]:
            pairs = [p[IMAGE + "alibi_bias"][0][:, row][:, :, row] for row in place]
            return F.pad(torch.stack(pairs) * scale, (extra, 0, extra, 0))
        bias = -slopes.view(1, -1, 1, 1) * distance[:, None] * scale
        return F.pad(bias, (extra, 0, extra, 0))

    def block(
        self, p: dict[str, Tensor], name: str, x: Tensor, bias: Tensor | float = 0.0, heads: int | None = None
    ) -> tuple[Tensor, Tensor]:
        heads = heads or self.config["num_heads"]

        def linear(part: str, x: Tensor) -> Tensor:
            return F.linear(x, p[f"{name}{part}.weight"], p[f"{name}{part}.bias"])

        def attend(x: Tensor) -> Tensor:
            n, t, c = x.shape
            q, k, v = (y.view(n, t, heads, c // heads).transpose(1, 2) for y in linear("attn.qkv", x).split(c, dim=2))
            weights = (q * (c // heads) ** -0.5 @ k.transpose(2, 3) + bias).softmax(dim=3)
            return linear("attn.proj", (weights @ v).transpose(1, 2).reshape(n, t, c))

        def mlp(x: Tensor) -> Tensor:
            return linear("mlp.fc2", F.gelu(linear("mlp.fc1", x)))

        if self.config["layer_norm_first"]:
            x = x + attend(self.norm(p, name + "norm1", x))
            f = mlp(self.norm(p, name + "norm2", x))
            out = f + f
        else:
            x = self.norm(p, name + "norm1", x + attend(x))
            f = mlp(x)
            out = self.norm(p, name + "norm2", x + f)
        return out, out if self.config["end_of_block_targets"] else f

    def context(self, p: dict[str, Tensor], images: Tensor, keep: Tensor | None, clones: int) -> Tensor:
        projected = self.image["embed_dim"] != self.config["embed_dim"]
        name = IMAGE + ("local_encoder.0.proj" if projected else "local_encoder.proj")
        x = F.conv2d(images, p[name + ".weight"], p[name + ".bias"], stride=self.image["patch_size"])
        x = x.flatten(2).transpose(1, 2)
        if projected:
            x = F.linear(x, p[IMAGE + "local_encoder.1.weight"], p[IMAGE + "local_encoder.1.bias"])
        if self.image["fixed_positions"]:
            x = x + p[IMAGE + "fixed_positional_encoder.positions"]
        x = x.repeat_interleave(clones, dim=0)
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        if self.image["num_extra_tokens"]:
            x = torch.cat([p[IMAGE + "extra_tokens"].expand(len(x), -1, -1), x], dim=1)
        if not self.config["layer_norm_first"]:
            x = self.norm(p, IMAGE + "context_encoder.norm", x)
        for i in range(self.image["prenet_depth"]):
            x, _ = self.block(p, f"{IMAGE}context_encoder.blocks.{i}.", x, self.bias(p, i, keep, len(x)))
        return x

    def encode(self, p: dict[str, Tensor], images: Tensor) -> Tensor:
        """(B,E+T,C) of whole images."""
        x = self.context(p, images, None, 1)
        for i in range(self.config["depth"]):
            x, _ = self.block(p, f"blocks.{i}.", x, self.bias(p, self.image["prenet_depth"] + i, None, len(x)))
        return x

    def targets(self, images: Tensor) -> Tensor:
        x = self.context(self.teacher, images, None, 1)
        tensors = []
        for i in range(self.config["depth"]):
            bias = self.bias(self.teacher, self.image["prenet_depth"] + i, None, len(x))
            x, target = self.block(self.teacher, f"blocks.{i}.", x, bias)
            tensors.append(target[:, self.image["num_extra_tokens"] :])
        tensors = tensors[-self.config["average_top_k_layers"] :]
        if self.config["batch_norm_target_layer"]:
            tensors = [_standardise(t, (0, 1)) for t in tensors]
        if self.config["instance_norm_target_layer"]:
            tensors = [_standardise(t, (1,)) for t in tensors]
        if self.config["layer_norm_target_layer"]:
            tensors = [_standardise(t, (2,)) for t in tensors]
        y = torch.stack(tensors).mean(dim=0)
        if self.config["layer_norm_targets"]:
            y = _standardise(y, (2,))
        return _standardise(y, (1,)) if self.config["instance_norm_targets"] else y

    def cross(self, x: Tensor, y: Tensor) -> Tensor:
        """Predictions of masked positions x that attend to visible tokens y."""
        p, at = self.student, IMAGE + "decoder."

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, p[f"{at}{name}.weight"], p[f"{at}{name}.bias"])

        x = linear("input_proj", x)
        for i in range(self.decoder["decoder_layers"]):
            width = x.shape[2] // 8
            q, kv = linear(f"blocks.{i}.attn.q_proj", x), linear(f"blocks.{i}.attn.kv_proj", y)
            heads = []
            for head in range(8):
                part = slice(head * width, (head + 1) * width)
                key, value = kv[..., : x.shape[2]][..., part], kv[..., x.shape[2] :][..., part]
                heads.append((q[..., part] @ key.transpose(1, 2) / width**0.5).softmax(dim=2) @ value)
            mixed = linear(f"blocks.{i}.attn.proj", torch.cat(heads, dim=2))
            norms = [(p[f"{at}blocks.{i}.norm{n}.weight"], p[f"{at}blocks.{i}.norm{n}.bias"]) for n in (1, 2)]
            u = F.layer_norm(x + mixed if i else mixed, x.shape[2:], *norms[0])
            f = linear(f"blocks.{i}.mlp.fc2", F.gelu(linear(f"blocks.{i}.mlp.fc1", u)))
            x = F.layer_norm(u + f, x.shape[2:], *norms[1])
        return linear("proj", x)

    def decode(self, x: Tensor) -> Tensor:
        if self.image["transformer_decoder"]:
            p, at = self.student, IMAGE + "decoder."
            x = F.linear(x, p[at + "input_proj.weight"], p[at + "input_proj.bias"])
            for i in range(self.decoder["decoder_layers"]):
                x, _ = self.block(p, f"{at}encoder.blocks.{i}.", x, heads=8)
            return F.linear(x, p[at + "proj.weight"], p[at + "proj.bias"])
        return self.convolve(x)

    def share(self, x: Tensor) -> Tensor:
        p, decoder = self.student, self.config["shared_decoder"]
        x = x.transpose(1, 2)
        for i in range(decoder["decoder_layers"]):
            weight, bias = (p[f"shared_decoder.blocks.{i}.0.{leaf}"] for leaf in ("weight", "bias"))
            y = F.conv1d(x, weight, bias, padding=weight.shape[2] // 2, groups=decoder["decoder_groups"])
            y = F.gelu(_standardise(y, (1,)))
            x = x + y if x.shape == y.shape else y
        return F.linear(x.transpose(1, 2), p["shared_decoder.proj.weight"], p["shared_decoder.proj.bias"])

    def convolve(self, x: Tensor) -> Tensor:
        p, (rows, columns) = self.student, grid_of(self.image)
        n, _, c = x.shape
        x = x.transpose(1, 2).reshape(n, c, rows, columns)
        kernel = self.decoder["decoder_kernel"]
        for i in range(self.decoder["decoder_layers"]):
            name = f"{IMAGE}decoder.blocks.{i}.0"
            y = F.conv2d(
                x, p[name + ".weight"], p[name + ".bias"], padding=kernel // 2, groups=self.decoder["decoder_groups"]
            )
            y = y[:, :, :rows, :columns]
            y = F.gelu(_standardise(y, (1,)))
            x = x + y if self.decoder["decoder_residual"] and x.shape == y.shape else y
        x = x.flatten(2).transpose(1, 2)
        return F.linear(x, p[IMAGE + "decoder.proj.weight"], p[IMAGE + "decoder.proj.bias"])

    def run(self, images: Tensor, mask: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Predictions, targets and losses; noise rows in ascending order of row 0's rule (see `order`)."""
        config, p = self.config, self.student
        clones = config["clone_batch"]
        visible = int((~mask[0]).sum())
        visible += round(int(mask[0].sum()) * self.image["keep_masked_pct"])
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        x = self.context(p, images, order[:, :visible], clones)
        for i in range(config["depth"]):
            bias = self.bias(p, self.image["prenet_depth"] + i, order[:, :visible], len(x))
            x, _ = self.block(p, f"blocks.{i}.", x, bias)
        if config["layer_norm_first"]:
            x = self.norm(p, "norm", x)
        extra = self.image["num_extra_tokens"]
        full = torch.cat([x[:, extra:], noise], dim=1)
        full = full.gather(1, order.argsort(dim=1)[..., None].expand_as(full))
        places = p.get(IMAGE + "fixed_positional_encoder.positions")
        if self.decoder["add_positions_masked"]:
            full = full + mask[..., None] * places
        if self.decoder["add_positions_all"]:
            full = full + places
        if self.image["transformer_decoder"] and self.image["enc_dec_transformer"]:
            assert places is not None
            queries = torch.stack([places[0][row] for row in mask])
            kept = x[:, extra:]
            if self.decoder["add_positions_all"]:
                kept = kept + torch.stack([places[0][~row] for row in mask])
            prediction = self.cross(queries, kept).flatten(0, 1)
        else:
            prediction = self.decode(full)[mask]
        with torch.no_grad():
            y = self.targets(images)
        target = y.repeat_interleave(clones, dim=0)[mask]
        scale = config["loss_scale"] if config["loss_scale"] is not None else x.shape[2] ** -0.5
        count = int(mask.sum())
        result = {"prediction": prediction, "target": target, "targets": y}
        result["regression"] = self.error(prediction, target) * scale * config["d2v_loss"]
        first = prediction
        if config["shared_decoder"]:
            first = self.share(full)[mask]
            result["shared"] = self.error(first, target) * scale * config["d2v_loss"]
        if config["cls_loss"]:
            result["class_prediction"] = x[:, extra - 1]
            result["class_target"] = y.mean(dim=1).repeat_interleave(clones, dim=0)
            error = self.error(result["class_prediction"], result["class_target"])
            result["cls"] = error * scale * config["cls_loss"] * count
        if config["recon_loss"]:
            patch, pixels = self.image["patch_size"], []
            for image in images:
                for row in range(0, image.shape[1], patch):
                    for column in range(0, image.shape[2], patch):
                        square = image[:, row : row + patch, column : column + patch]
                        values = square.permute(1, 2, 0).reshape(-1)
                        deviation = ((values - values.mean()).square().sum() / (len(values) - 1) + 1e-6).sqrt()
                        pixels.append((values - values.mean()) / deviation)
            wanted = torch.stack(pixels).view(len(images), mask.shape[1], -1).repeat_interleave(clones, dim=0)[mask]
            made = F.linear(first, p["recon_proj.weight"], p["recon_proj.bias"])
            result["reconstruction"] = self.error(made, wanted) * scale * config["recon_loss"]
        result["loss"] = sum(result.get(n, 0.0) for n in ("regression", "cls", "shared", "reconstruction")) / count
        return result

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        beta = self.config["loss_beta"]
        return F.mse_loss(x, y, reduction="sum") if beta == 0 else F.smooth_l1_loss(x, y, reduction="sum", beta=beta)


def _standardise(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    variance, mean = torch.var_mean(x, dim=axes, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()
