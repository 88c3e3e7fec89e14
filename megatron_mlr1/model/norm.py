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
        """Normalise [..., hidden_size] to the same shape, in the weight's dtype.

        An fp32 residual of a bf16 model is wider than what the linear layer behind takes.
        """
        weight = self.weight.to(x.dtype)
        return nn.functional.rms_norm(x, weight.shape, weight, self.eps).to(self.weight.dtype)


class FinalRMSNorm(RMSNorm):
    """The norm behind the last layer, with the empty state that Transformer Engine's would have.

    The other norms are stored as parts of the linear layers behind them, which have that state with
    either implementation. Without this one a checkpoint that torch's modules wrote would not load
    into Transformer Engine's.
    """

    def get_extra_state(self) -> None:
        """Give what is stored under `_extra_state`: nothing."""

    def set_extra_state(self, state: object) -> None:
        """Take what was stored, by either implementation; there is nothing to keep."""
