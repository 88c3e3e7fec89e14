"""RMSNorm for where Transformer Engine is not."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x * rsqrt(mean(x^2) + eps) * weight over the last dimension.

    The statistics are taken in fp32. Under sequence parallelism each rank sees a part of the
    tokens; the mark on the weight has the engine sum its gradient over the tensor-parallel group.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size] to the same shape and dtype."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
