"""Options of published configurations: which behaviours a family has, which options do nothing, and a reader."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

# Behaviours that the published code of a family has; "masked-tokens-only-teacher" of 1.0 text is left to the user.
PUBLISHED: dict[str, frozenset[str]] = {
    "d2v1_audio": frozenset(
        {"statistics-over-padding", "positions-see-padding", "equal-mask-counts", "norms-over-batch"}
    ),
    "d2v1_text": frozenset({"statistics-over-padding"}),
    "d2v1_vision": frozenset({"no-head-1.0-vision"}),
    "d2v2_image": frozenset({"class-loss-per-micro-batch", "pre-norm-without-residual", "visible-count-of-row-0"}),
}
PUBLISHED["d2v2_audio"] = PUBLISHED["d2v2_image"] | {"statistics-over-padding", "positions-see-padding"}
PUBLISHED["d2v2_text"] = PUBLISHED["d2v2_audio"] | {"loss-on-padding"}

# Options that change nothing that a model computes: of logging, of precision, of other models, of fine-tuning, of
# initial weights, or read by no code. By section of the configuration.
_NAMES = {
    "": """
        _name ema_same_dtype log_norms min_target_var min_pred_var supported_modality seed decoder_group
        init_center_token_zero center_exp softmax_temperature_student softmax_temperature_teacher
        adversarial_hidden_dim adversarial_weight
    """,
    "modality": """
        type init_extra_token_zero mask_channel_length model_depth alibi_dims alibi_distance enc_dec_transformer
    """,
    "decoder": "",
    "shared decoder": "input_dropout add_positions_masked add_positions_all",
    "audio1": """
        _name dropout_features final_dim logit_temp quantize_targets quantize_input same_quantizer target_glu
        quantizer_depth quantizer_factor latent_vars latent_groups latent_dim latent_temp mask_min_space
        mask_channel_length mask_channel_before mask_channel_selection mask_channel_other no_mask_channel_overlap
        mask_channel_min_space num_negatives negatives_from_everywhere cross_sample_negatives codebook_negatives
        max_positions checkpoint_activations required_seq_len_multiple crop_seq_to_multiple
        depthwise_conv_kernel_size attn_type fp16 adp_num adp_dim adp_act_fn adp_trf_idx min_target_var min_pred_var
        log_norms
    """,
    "text1": "_name max_positions load_checkpoint_heads pooler_dropout pooler_activation_fn",
    "transformer": """
        _name decoder max_target_positions share_decoder_input_output_embed share_all_embeddings merge_src_tgt_embed
        adaptive_softmax_cutoff adaptive_softmax_dropout adaptive_softmax_factor tie_adaptive_weights
        tie_adaptive_proj checkpoint_activations offload_activations no_cross_attention cross_self_attention
        min_params_to_wrap char_inputs base_layers base_sublayers base_shuffle export no_decoder_final_norm
    """,
    "transformer.encoder": "_name embed_path layers_to_keep",
    "vision1": "_name mlp_ratio max_mask_patches_per_block",
    "speech head": """
        _name w2v_path model_path no_pretrained_weights dropout_input dropout attention_dropout activation_dropout
        conv_feature_layers encoder_embed_dim apply_mask mask_length mask_prob mask_selection mask_other no_mask_overlap
        mask_min_space require_same_masks mask_dropout mask_channel_length mask_channel_prob mask_channel_selection
        mask_channel_other no_mask_channel_overlap mask_channel_min_space mask_channel_before freeze_finetune_updates
        feature_grad_mult layerdrop drop_path data w2v_args d2v_args offload_activations min_params_to_wrap
        checkpoint_activations ddp_backend zero_mask load_ema layer_decay inverse_mask update_alibi blank_mode
        mixup_prob source_mixup same_mixup label_mixup gain_mode extreme_factor conv_stride two_convs
        required_seq_len_multiple layer_type adp_num adp_dim adp_act_fn adp_trf_idx freeze_regex
    """,
    "image head": """
        _name model_path no_pretrained_weights linear_classifier num_classes mixup cutmix label_smoothing drop_path_rate
        layer_decay mixup_prob mixup_switch_prob mixup_mode pretrained_model_args data encoder_dropout post_mlp_drop
        attention_dropout activation_dropout dropout_input layerdrop prenet_layerdrop prenet_dropout no_decay_blocks
        audio_mae esc50_eval spcv2_eval target_length specaug freqm timem mask_ratio
    """,
    "text head": "_name model_path no_pretrained_weights pretrained_model_args quant_noise_pq_block_size",
}
NO_EFFECT = {section: frozenset(names.split()) for section, names in _NAMES.items()}
_warned: set[str] = set()


class Section:
    """A section of a configuration that remembers which options were read."""

    def __init__(self, values: Mapping[str, Any], where: str, kind: str) -> None:
        """
        Args:
            where: dotted prefix of its options, for messages.
            kind: its key in `NO_EFFECT`.
        """
        self.values, self.where, self.kind = values, where, kind
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """An option, or its default where it is absent or refers to another section."""
        self.read.add(name)
        value = self.values.get(name, default)
        return default if isinstance(value, str) and value.startswith("${") else value

    def only(self, name: str, *built: Any) -> None:
        """Refuses an option unless it is absent or has one of the values that are built."""
        self.read.add(name)
        if name in self.values and self.values[name] not in built:
            raise NotImplementedError(f"{self.where}{name}: expected {built[0]}, got {self.values[name]!r}")

    def section(self, name: str, kind: str) -> Section:
        """A subsection; absent: an empty one."""
        self.read.add(name)
        values = self.values.get(name)
        return Section({} if values is None else values, f"{self.where}{name}.", kind)

    def close(self) -> None:
        """Warns of options that are unknown, once each."""
        for name in sorted(set(self.values) - self.read - NO_EFFECT[self.kind]):
            if self.where + name not in _warned:
                _warned.add(self.where + name)
                warnings.warn(f"{self.where}{name}: unknown option, ignored", stacklevel=2)
