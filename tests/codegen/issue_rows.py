"""The kernels of codegen.issue at the settings that matter, and kernels of which none is needed."""

from __future__ import annotations

from dataclasses import dataclass

SHARE, FLIGHT = 0.85, 30 * 1024
TILE = 2 * 7 * 256 * 16  # dynamic shared memory of average_instance_kernel: two layers, 7 slots of 256 threads
RARE = "UTMALDG|UCGABAR_ARV"  # one thread requests a layer; clusters are for few and long samples
STAGES = 3 * 8 * 256 * 16  # of average_bulk_kernel: three layers, 8 slots of 256 threads


@dataclass(frozen=True)
class Row:
    """A kernel at a setting that the recipes use.

    `source` is the .cu file or the case of support.triton_compile; `pattern` finds one kernel in it. `turn` is what
    is counted: the loop with the most bytes ("loop") or instructions ("longest"), or the whole kernel ("whole").
    `moved`: bytes that a warp moves in it by other means than its own accesses; `without`: blocks with such an
    instruction are gone around, because few warps or launches pass them; `cached`: bytes of its accesses that come
    from a cache. `flight` and `shared`: bytes on the way in an SM, and dynamic shared memory, where the launch
    decides. `share` is the most of the issue budget, `least` the least in flight; a row that is beyond 85 % or below
    30 KiB says why.
    """

    kernel: str
    source: str
    pattern: str
    share: float = SHARE
    turn: str = "loop"
    without: str = ""
    moved: int = 0
    cached: int = 0
    flight: int = 0
    shared: int = 0
    least: float = FLIGHT
    why: str = ""


BF16 = "13__nv_bfloat16"
ROWS = [
    Row("update_ema_", "ema.cu", "17update_ema_kernelIffNS0_7EmaListE"),
    Row("update_ema_, many tensors", "ema.cu", "17update_ema_kernelIffNS0_8EmaTableE"),
    Row("update_ema_ in two halves", "ema.cu", f"23update_split_ema_kernelI{BF16}NS0_8EmaTableE"),
    Row("average_layers, bulk copies, bf16", "layers.cu", f"19average_bulk_kernelI{BF16}Li8E",
        moved=8 * 512, without=RARE, shared=STAGES, flight=2 * STAGES // 3 * 2),
    Row("average_layers, bulk copies, 64 bytes, bf16", "layers.cu", f"19average_bulk_kernelI{BF16}Li4E",
        moved=8 * 512, without=RARE, shared=STAGES, flight=2 * STAGES // 3 * 2),
    Row("average_layers, bulk copies, fp32", "layers.cu", "19average_bulk_kernelIfLi8E",
        moved=8 * 512, without=RARE, shared=STAGES, flight=2 * STAGES // 3 * 2),
    Row("average_layers, tile, bf16", "layers.cu", f"23average_instance_kernelI{BF16}Li8ELi256E", shared=TILE),
    Row("average_layers, tile, fp32", "layers.cu", "23average_instance_kernelIfLi8ELi256E", shared=TILE),
    Row("average_layers, rows, bf16", "layers.cu", f"19average_rows_kernelI{BF16}Li1E"),
    Row("average_layers, rows of four warps, bf16", "layers.cu", f"19average_rows_kernelI{BF16}Li4E"),
    Row("average_layers, rows, fp32", "layers.cu", "19average_rows_kernelIfLi1E"),
    Row("average_layers, channel statistics, bf16", "layers.cu", f"20channel_stats_kernelI{BF16}Li8E"),
    Row("average_layers, channel statistics, fp32", "layers.cu", "20channel_stats_kernelIfLi4E"),
    Row("average_layers, second pass, bf16", "layers.cu", f"23combine_channels_kernelI{BF16}Li8E"),
    Row("average_layers, merge", "layers.cu", "19merge_pieces_kernelIfE", least=10 * 1024,
        why="moments, a hundredth of the layers' bytes"),
    Row("gather_tokens, restore_tokens", "tokens.cu", "16copy_rows_kernelI5uint4E"),
    Row("restore_tokens, noise, bf16", "tokens.cu", f"20restore_noise_kernelI{BF16}Li8E", turn="longest", share=1.4,
        why="ten rounds of Philox are 74 of 172 instructions for 8 numbers; fewer change all bits"),
    Row("restore_tokens, noise, fp32", "tokens.cu", "20restore_noise_kernelIfLi4E", turn="longest", share=1.7,
        why="logarithm, root and angle as exact as the CPU's"),
    Row("gather_tokens backward, bf16", "tokens.cu", f"16sum_slots_kernelI{BF16}Li8E"),
    Row("gather_tokens backward, fp32", "tokens.cu", "16sum_slots_kernelIfLi4E"),
    Row("restore_tokens backward, fill, bf16", "tokens.cu", f"17sum_filled_kernelI{BF16}fLi8E", least=20 * 1024,
        why="rows of the index stand before those of the gradient; microseconds a step"),
    Row("gelu, bf16", "GELU", "_gelu_kernel"),
    Row("gelu backward, bf16", "GELU", "_gelu_backward_kernel"),
    Row("gelu, fp32", "GELU, float32", "_gelu_kernel"),
    Row("gelu backward, fp32", "GELU, float32", "_gelu_backward_kernel"),
    Row("layer_norm_gelu, bf16", "speech front-end", "_forward_kernel", cached=4096),
    Row("layer_norm_gelu backward, bf16", "speech front-end", "_backward_kernel"),
    Row("layer_norm_gelu and residual, bf16", "decoder, bias and residual", "_forward_kernel"),
    Row("layer_norm_gelu backward with the bias' sums, bf16", "decoder, bias and residual", "_backward_kernel"),
    Row("layer_norm_gelu, fp32", "decoder, no affine", "_forward_kernel"),
    Row("layer_norm_gelu backward, fp32", "decoder, no affine", "_backward_kernel"),
    Row("loss", "loss", "_partial_loss_kernel", least=12 * 1024,
        why="0.2 % of a step"),
    Row("loss, selected rows", "loss, selected rows", "_partial_loss_kernel", share=0.9, least=20 * 1024,
        why="0.2 % of a step"),
    Row("loss backward", "loss", "_loss_backward_kernel"),
    Row("update_ema_ (Triton)", "ema, float32 student", "_update_ema_kernel"),
    Row("average_layers, one read, bf16 (Triton)", "text: instance", "_one_read_kernel", share=1.6,
        why="a thread has four time steps, so sums are lanes and barriers; CUDA is preferred"),
    Row("average_layers, rows, bf16 (Triton)", "text: layer", "_row_kernel"),
    Row("average_layers, statistics, bf16 (Triton)", "speech: instance", "_statistics_kernel", least=24 * 1024,
        why="CUDA is preferred"),
    Row("average_layers, second pass, bf16 (Triton)", "speech: instance", "_combine_kernel"),
    Row("gather_tokens (Triton)", "gather", "_gather_kernel"),
    Row("restore_tokens (Triton)", "restore with rows", "_restore_kernel"),
    Row("restore_tokens, noise, bf16 (Triton)", "restore with noise", "_restore_noise_kernel", turn="longest",
        share=2.05, why="as in CUDA, and keys of the rounds are made for every call; CUDA is preferred"),
    Row("gather_tokens backward, bf16 (Triton)", "gather backward", "_inverse_gather_kernel", least=14 * 1024,
        why="one matching row at a time; CUDA is preferred"),
    Row("restore_tokens backward, fill, bf16 (Triton)", "restore with noise", "_fill_sums_kernel", least=24 * 1024,
        why="CUDA is preferred"),
    *(
        Row(f"dropout_add_layer_norm{of}{part} (Triton)", case, kernel)
        for of, case in (
            (", mixed", "blocks under autocast"), (", bf16", "blocks, bfloat16"), (", fp32", "blocks, float32"),
        )
        for part, kernel in (("", "_norm_kernel"), (" backward", "_norm_backward_kernel"))
    ),
    Row("sums over rows (Triton)", "restore with noise", "_column_sums_kernel"),
]  # fmt: skip
PAIRS = {
    ("speech", "attention_kernel"): 31,
    ("speech", "attention_dq_kernel"): 40,
    ("speech", "attention_dkdv_kernel"): 43,
    ("huge", "attention_kernel"): 31,
    ("huge", "attention_dq_kernel"): 47,
    ("huge", "attention_dkdv_kernel"): 37,
    ("positions", "convolution_kernel"): 3.7,
    ("positions", "convolution_weights_kernel"): 3.9,
    ("images", "convolution_kernel"): 4,
    ("images", "convolution_weights_kernel"): 4.9,
    ("decoder's first", "convolution_kernel"): 3.4,
    ("decoder's first", "convolution_weights_kernel"): 3.5,
    ("decoder", "convolution_kernel"): 3.05,
    ("decoder", "convolution_weights_kernel"): 3.5,
    ("large images", "convolution_kernel"): 3.1,
    ("large images", "convolution_weights_kernel"): 4.75,
}
"""Most instructions of a thread for a number of the left operand, a pair of query and key or of a row and a column of
the windows, by case of triton_kernels.products_compile. Products bound these kernels, so bytes are no measure."""
SMALL = {
    "invert_index_kernel": "reads an index, 4 bytes a row",
    "average_long_rows_kernel": "only rows of more than 3072 channels, of float64 or not aligned to 16 bytes",
    "merge_kernel": "moments of samples, a hundredth of the layers",
    "merge_loss_kernel": "partial sums",
    "finish_loss_kernel": "a number a column",
}
"""Kernels of which no row is needed, with the reason."""
