"""The published data2vec 1.0 step of speech, text and vision written out in plain torch; see `published`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.published import _standardise
from support.published_second import norm_channels, norm_of

_TARGETS: dict[str, Any] = {
    "loss_beta": 0, "loss_scale": None, "average_top_k_layers": 2, "layer_norm_target_layer": False,
    "instance_norm_target_layer": True, "batch_norm_target_layer": False, "instance_norm_targets": False,
    "layer_norm_targets": False, "ema_decay": 0.9, "ema_end_decay": 0.99, "ema_anneal_end_step": 10,
}  # fmt: skip
AUDIO: dict[str, Any] = {
    **_TARGETS, "extractor_mode": "layer_norm", "encoder_layers": 3, "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24, "encoder_attention_heads": 4, "activation_fn": "gelu", "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "dropout_input": 0.0,
    "layer_norm_first": False, "conv_feature_layers": "[(12, 10, 5)] + [(12, 3, 2)] * 2", "conv_bias": False,
    "feature_grad_mult": 1.0, "conv_pos": 15, "conv_pos_groups": 4, "pos_conv_depth": 3,
    "group_norm_target_layer": False, "ema_layers_only": True, "ema_transformer_only": True,
    "required_seq_len_multiple": 2,
}  # fmt: skip
TEXT: dict[str, Any] = {
    **_TARGETS, "head_layers": 2,
    "transformer": {
        "activation_fn": "gelu", "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
        "encoder": {
            "embed_dim": 16, "ffn_embed_dim": 24, "layers": 3, "attention_heads": 4, "normalize_before": False,
            "learned_pos": True, "layerdrop": 0,
        },
        "max_source_positions": 40, "no_token_positional_embeddings": False, "layernorm_embedding": True,
        "no_scale_embedding": True,
    },
    "ema_transformer_layers_only": True,
}  # fmt: skip
VISION: dict[str, Any] = {
    **_TARGETS, "instance_norm_target_layer": False, "layer_norm_targets": True, "end_of_block_targets": True,
    "layer_scale_init_value": 1e-4, "image_size": 16, "patch_size": 4, "in_channels": 3, "drop_path": 0.0,
    "attention_dropout": 0.0, "depth": 3, "embed_dim": 16, "num_heads": 4, "mlp_ratio": 4,
    "shared_rel_pos_bias": True, "ema_transformer_only": True,
}  # fmt: skip
VOCABULARY, MASK = 30, 29


def make_config(name: str, **options: Any) -> dict[str, Any]:
    """A small configuration of "audio", "text" or "vision"; options as in the 2.0 module."""
    config = copy.deepcopy({"audio": AUDIO, "text": TEXT, "vision": VISION}[name])
    sections = [config]
    if name == "text":
        sections += [config["transformer"], config["transformer"]["encoder"]]
    for option, value in options.items():
        found = [s for s in sections if option in s]
        assert found, option
        for section in found:
            section[option] = value
    return config


def make_shapes(config: dict[str, Any], name: str) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of the student."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(at: str, *shape: int) -> None:
        shapes.update({f"{at}.weight": shape, f"{at}.bias": shape[:1]})

    def sentence_blocks(p: str, depth: int, width: int, hidden: int) -> None:
        for i in range(depth):
            for letter in ("q", "k", "v", "out"):
                layer(f"{p}layers.{i}.self_attn.{letter}_proj", width, width)
            layer(f"{p}layers.{i}.fc1", hidden, width)
            layer(f"{p}layers.{i}.fc2", width, hidden)
            layer(f"{p}layers.{i}.self_attn_layer_norm", width)
            layer(f"{p}layers.{i}.final_layer_norm", width)

    if name == "text":
        transformer, p = config["transformer"], "encoder.sentence_encoder."
        encoder = transformer["encoder"]
        width = encoder["embed_dim"]
        shapes[p + "embed_tokens.weight"] = (VOCABULARY, width)
        shapes[p + "embed_positions.weight"] = (transformer["max_source_positions"] + 2, width)
        if transformer["layernorm_embedding"]:
            layer(p + "layernorm_embedding", width)
        sentence_blocks(p, encoder["layers"], width, encoder["ffn_embed_dim"])
        if encoder["normalize_before"]:
            layer(p + "layer_norm", width)
        count = config["head_layers"]
        for i in range(count):
            inputs, outputs = width * (2 if i else 1), width * (2 if i < count - 1 else 1)
            layer(f"encoder.regression_head.{2 * i}", outputs, inputs)
    elif name == "audio":
        width, inputs = config["encoder_embed_dim"], 1
        shapes["mask_emb"] = (width,)
        for i, (size, kernel, _) in enumerate(eval(config["conv_feature_layers"])):
            at = f"feature_extractor.conv_layers.{i}."
            shapes[at + "0.weight"] = (size, inputs, kernel)
            if config["conv_bias"]:
                shapes[at + "0.bias"] = (size,)
            if norm := norm_of(config["extractor_mode"], i):
                layer(at + norm, size)
            inputs = size
        layer("layer_norm", inputs)
        layer("post_extract_proj", width, inputs)
        kernel = max(3, config["conv_pos"] // config["pos_conv_depth"])
        for i in range(config["pos_conv_depth"]):
            layer(f"encoder.pos_conv.{i}.0", width, width // config["conv_pos_groups"], kernel)
        sentence_blocks("encoder.", config["encoder_layers"], width, config["encoder_ffn_embed_dim"])
        layer("encoder.layer_norm", width)
        layer("final_proj", width, width)
    else:
        width, side = config["embed_dim"], config["image_size"] // config["patch_size"]
        shapes |= {"cls_emb": (1, 1, width), "mask_emb": (1, 1, width)}
        layer("patch_embed.conv", width, config["in_channels"], config["patch_size"], config["patch_size"])
        table = ((2 * side - 1) ** 2 + 3, config["num_heads"])
        shapes["encoder.rel_pos_bias.relative_position_bias_table"] = table
        for i in range(config["depth"]):
            p = f"encoder.blocks.{i}."
            for at in ("norm1", "norm2"):
                layer(p + at, width)
            shapes |= {p + "attn.qkv.weight": (3 * width, width), p + "attn.q_bias": (width,)}
            shapes[p + "attn.v_bias"] = (width,)
            layer(p + "attn.proj", width, width)
            layer(p + "mlp.0", 4 * width, width)  # whatever mlp_ratio says
            layer(p + "mlp.2", width, 4 * width)
            if config["layer_scale_init_value"] > 0:
                shapes |= {p + "gamma_1": (width,), p + "gamma_2": (width,)}
        layer("encoder.norm", width)
        layer("final_proj", width, width)
    return shapes


def teacher_names(
    config: dict[str, Any], name: str, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, str], set[str]]:
    """Student's names to the teacher's, and those of them that are copied instead of averaged."""
    prefix = "encoder.sentence_encoder." if name == "text" else "encoder."
    if not config.get("ema_transformer_only", True):
        return {n: n for n in shapes}, {n for n in shapes if n.startswith(("mask_emb", "final_proj"))}
    names = {n: n.removeprefix(prefix) for n in shapes if n.startswith(prefix)}
    copied: set[str] = set()
    if name == "audio" and config["ema_layers_only"]:
        copied = {n for n in names if "pos_conv" in n}
    if name == "text" and config["ema_transformer_layers_only"]:
        copied = {n for n in names if "embed" in n}
    return names, copied


class PublishedStep:
    """One training forward of the published code."""

    def __init__(
        self, config: dict[str, Any], name: str, student: dict[str, Tensor], teacher: dict[str, Tensor]
    ) -> None:
        """`teacher`: averages under the student's names."""
        self.config, self.name, self.student, self.teacher = config, name, student, {**student, **teacher}

    def norm(self, w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[at + ".weight"], w[at + ".bias"], 1e-5)

    def linear(self, w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
        return F.linear(x, w[at + ".weight"], w[at + ".bias"])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        n, t, c = q.shape
        q, k, v = (y.view(n, t, heads, c // heads).transpose(1, 2) for y in (q, k, v))
        logits = (c // heads) ** -0.5 * q @ k.transpose(2, 3)
        logits = logits if bias is None else logits + bias
        if padding is not None:
            logits = logits.masked_fill(padding[:, None, None], -torch.inf)
        return (logits.softmax(dim=3) @ v).transpose(1, 2).reshape(n, t, c)

    # ---- speech and text: post- or pre-norm blocks

    def sentence(
        self, w: dict[str, Tensor], p: str, x: Tensor, padding: Tensor | None, depth: int, heads: int, first: bool
    ) -> tuple[Tensor, list[Tensor]]:
        tensors = []
        for i in range(depth):
            at = f"{p}layers.{i}."
            y = self.norm(w, at + "self_attn_layer_norm", x) if first else x
            q, k, v = (self.linear(w, f"{at}self_attn.{letter}_proj", y) for letter in "qkv")
            x = x + self.linear(w, at + "self_attn.out_proj", self.attend(q, k, v, heads, None, padding))
            x = x if first else self.norm(w, at + "self_attn_layer_norm", x)
            y = self.norm(w, at + "final_layer_norm", x) if first else x
            f = self.linear(w, at + "fc2", F.gelu(self.linear(w, at + "fc1", y)))
            tensors.append(f)
            x = x + f
            x = x if first else self.norm(w, at + "final_layer_norm", x)
        return (self.norm(w, p + "layer_norm", x) if first else x), tensors

    def speech(self, w: dict[str, Tensor], x: Tensor, padding: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        config = self.config
        if padding is not None:
            x = x * ~padding[..., None]
        y = x.transpose(1, 2)
        for i in range(config["pos_conv_depth"]):
            weight, bias = w[f"encoder.pos_conv.{i}.0.weight"], w[f"encoder.pos_conv.{i}.0.bias"]
            z = F.conv1d(y, weight, bias, padding=weight.shape[2] // 2, groups=config["conv_pos_groups"])
            y = F.gelu(_standardise(z[:, :, : y.shape[2]], (1,)))
        x = x + y.transpose(1, 2)
        first = config["layer_norm_first"]
        x = x if first else self.norm(w, "encoder.layer_norm", x)
        return self.sentence(
            w, "encoder.", x, padding, config["encoder_layers"], config["encoder_attention_heads"], first
        )

    def extract(self, w: dict[str, Tensor], waves: Tensor) -> Tensor:
        x = waves[:, None]
        for i, (_, _, stride) in enumerate(eval(self.config["conv_feature_layers"])):
            at = f"feature_extractor.conv_layers.{i}."
            x = F.conv1d(x, w[at + "0.weight"], w.get(at + "0.bias"), stride=stride)
            x = F.gelu(norm_channels(w, at, self.config["extractor_mode"], i, x))
        return self.linear(w, "post_extract_proj", self.norm(w, "layer_norm", x.transpose(1, 2)))

    def text(self, w: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        transformer, p = self.config["transformer"], "encoder.sentence_encoder."
        encoder = transformer["encoder"]
        x = F.embedding(tokens, w[p + "embed_tokens.weight"], padding_idx=1)
        x = x if transformer["no_scale_embedding"] else x * x.shape[2] ** 0.5
        real = (tokens != 1).long()
        x = x + F.embedding(real.cumsum(1) * real + 1, w[p + "embed_positions.weight"], padding_idx=1)
        if transformer["layernorm_embedding"]:
            x = self.norm(w, p + "layernorm_embedding", x)
        x = x * real[..., None]
        padding = tokens == 1 if bool((tokens == 1).any()) else None
        return self.sentence(
            w, p, x, padding, encoder["layers"], encoder["attention_heads"], encoder["normalize_before"]
        )

    # ---- vision

    def vision(self, w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        config = self.config
        side, heads = config["image_size"] // config["patch_size"], config["num_heads"]
        index = torch.zeros(side * side + 1, side * side + 1, dtype=torch.int64)
        for i in range(side * side):
            for j in range(side * side):
                rows, columns = i // side - j // side + side - 1, i % side - j % side + side - 1
                index[1 + i, 1 + j] = rows * (2 * side - 1) + columns
        count = (2 * side - 1) ** 2
        index[0, :], index[:, 0], index[0, 0] = count, count + 1, count + 2
        bias = w["encoder.rel_pos_bias.relative_position_bias_table"][index].permute(2, 0, 1)
        tensors = []
        for i in range(config["depth"]):
            p = f"encoder.blocks.{i}."
            y = F.linear(self.norm(w, p + "norm1", x), w[p + "attn.qkv.weight"])
            q, k, v = y.split(x.shape[2], dim=2)
            y = self.attend(q + w[p + "attn.q_bias"], k, v + w[p + "attn.v_bias"], heads, bias, None)
            one: Tensor | float = w.get(p + "gamma_1", torch.ones(()))
            x = x + one * self.linear(w, p + "attn.proj", y)
            f = self.linear(w, p + "mlp.2", F.gelu(self.linear(w, p + "mlp.0", self.norm(w, p + "norm2", x))))
            f = w.get(p + "gamma_2", torch.ones(())) * f
            x = x + f
            tensors.append((x if config["end_of_block_targets"] else f)[:, 1:])
        return self.norm(w, "encoder.norm", x)[:, 1:], tensors

    def embed(self, w: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """Patches and class tokens."""
        patch = self.config["patch_size"]
        x = F.conv2d(images, w["patch_embed.conv.weight"], w["patch_embed.conv.bias"], stride=patch)
        return x.flatten(2).transpose(1, 2), w["cls_emb"].expand(len(x), -1, -1)

    # ---- all

    def targets(self, tensors: list[Tensor]) -> Tensor:
        config = self.config
        if self.name != "audio" or config["ema_transformer_only"]:  # else all layers, whatever the option says
            tensors = tensors[-config["average_top_k_layers"] :]
        permuted = config["instance_norm_target_layer"] or config["batch_norm_target_layer"]
        # Speech keeps (T,B,C) where nothing permuted it, and then norms over the wrong axes.
        time_first = self.name == "audio" and not permuted
        if config["batch_norm_target_layer"]:
            tensors = [_standardise(t, (0, 1)) for t in tensors]
        if config["instance_norm_target_layer"]:
            tensors = [_standardise(t, (1,)) for t in tensors]
        tensors = [t.transpose(0, 1) for t in tensors] if time_first else tensors
        if config.get("group_norm_target_layer"):
            tensors = [_standardise(t, (1, 2)) for t in tensors]
        if config["layer_norm_target_layer"]:
            tensors = [_standardise(t, (2,)) for t in tensors]
        y = torch.stack(tensors).mean(dim=0)
        if config["layer_norm_targets"]:
            y = _standardise(y, (2,))
        if config["instance_norm_targets"]:
            y = _standardise(y, (1,))
        return y.transpose(0, 1) if time_first else y

    def run(self, inputs: Tensor, padding: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
        """Prediction, target, loss; padding (B,T) True at padded frames of speech."""
        s = self.student
        if self.name == "audio":
            features = self.extract(s, inputs)
            x, _ = self.speech(s, torch.where(mask[..., None], s["mask_emb"], features), padding)
            with torch.no_grad():
                whole = not self.config["ema_transformer_only"]
                clean = self.extract(self.teacher, inputs) if whole else features
                _, tensors = self.speech(self.teacher, clean, padding)
            prediction = self.linear(s, "final_proj", x[mask])
        elif self.name == "text":
            x, _ = self.text(s, inputs.masked_fill(mask, MASK))
            with torch.no_grad():
                _, tensors = self.text(self.teacher, inputs)
            prediction = x[mask]
            for i in range(self.config["head_layers"]):
                at = f"encoder.regression_head.{2 * i}"
                prediction = self.linear(s, at, F.gelu(prediction) if i else prediction)
        else:
            x, token = self.embed(s, inputs)
            with torch.no_grad():
                patches, own = self.embed(s if self.config["ema_transformer_only"] else self.teacher, inputs)
                _, tensors = self.vision(self.teacher, torch.cat([own, patches], dim=1))
            x = torch.where(mask[..., None], s["mask_emb"], x)
            prediction = self.vision(s, torch.cat([token, x], dim=1))[0][mask]  # final_proj is not called
        with torch.no_grad():
            y = self.targets(tensors)
        target, beta, scale = y[mask], self.config["loss_beta"], self.config["loss_scale"]
        scale = prediction.shape[1] ** -0.5 if scale is None or scale <= 0 else scale
        error = (
            F.mse_loss(prediction, target, reduction="sum")
            if beta == 0
            else F.smooth_l1_loss(prediction, target, reduction="sum", beta=beta)
        )
        total = error * scale
        result = {"prediction": prediction, "target": target, "targets": y, "regression": total}
        return result | {"loss": total / len(prediction)}
