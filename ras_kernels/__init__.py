"""Token-sparse building blocks of diffusion transformers: gather, scatter, attend, select.

Each function checks its arguments, then runs: by a Triton kernel on GPUs, by the PyTorch definition
in `ras_kernels.reference` elsewhere (`backend` tells which). Shapes: B batch, N tokens, K rows out
of them, S cached rows, H query heads, G heads of keys and values, D head size, C channels.
Floating-point tensors are float32, float16 or bfloat16 and of one device per call; any strides do.
An `index` is `(B, K)`, or `(1, K)` for all samples, int32 or int64, of rows in `[0, N)`, each row
once per sample. All raise `ValueError` for a wrong shape, dtype, device, value or index, and
`TypeError` for what is no tensor or no number, before anything is written (an index's range is
checked on the CPU alone, since reading it would stall a GPU; RAS_KERNELS_CHECK_INDICES=1 in the
environment has it checked there, too).
"""

from ._codes import CODES
from ._triton import backend, supports
from .attention import sparse_attention
from .changes import carry_keys_and_values, carry_tokens, update_tokens_
from .drift import drift_scores, update_drift_
from .linear import linear_scatter_, qkv_scatter_
from .norm import NORMS, norm_rotary, norm_rotary_scatter_
from .quantized import dequantize_tokens, quantize_tokens_
from .regions import METRICS, region_scores, select_regions
from .rows import gather_tokens, scatter_tokens_
from .states import merge_states

__version__ = "0.1.0"
__all__ = [
    "CODES",
    "METRICS",
    "NORMS",
    "backend",
    "carry_keys_and_values",
    "carry_tokens",
    "dequantize_tokens",
    "drift_scores",
    "gather_tokens",
    "linear_scatter_",
    "merge_states",
    "norm_rotary",
    "norm_rotary_scatter_",
    "qkv_scatter_",
    "quantize_tokens_",
    "region_scores",
    "scatter_tokens_",
    "select_regions",
    "sparse_attention",
    "supports",
    "update_drift_",
    "update_tokens_",
]
