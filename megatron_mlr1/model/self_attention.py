"""The engine's self-attention with the fused QKV taken apart, normalised and rotated in one pass.

The engine norms Q and K where it splits the projection, and rotates them later. Here the layer
keeps the rotary embedding for the split, and the engine's own code gets none, so that it rotates
nothing again. Weights and their names are the engine's.
"""

from typing import Any, NamedTuple

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.torch_norm import L2Norm
from torch import Tensor

from megatron_mlr1.ops.qk_norm_rope import MAX_WIDTH, qk_norm_rope


class Rotation(NamedTuple):
    """What the tokens of one forward are rotated by."""

    angles: Tensor
    """[positions, D / 2], fp32."""

    bounds: Tensor | None
    """Where each packed document begins, and the end of the last; None for whole sequences."""


class FusedSelfAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention through `megatron_mlr1.ops.qk_norm_rope`.

    The engine's own path is taken for what the op has no formula for: inference with a cache of
    keys, layers without rotary embedding or with a part of each head rotated, a rotary embedding
    of several axes, an output gate, more tensor-parallel ranks than query groups, packed documents
    under context parallelism, and where the engine releases Q and K after attention (offloading
    of "core_attn"), which this op's gradient needs.
    """

    def __init__(self, *args: Any, **words: Any) -> None:
        super().__init__(*args, **words)
        config = self.config
        self._rotation: Rotation | None = None
        no_rope = config.no_rope_freq and config.no_rope_freq[self.layer_number - 1]
        self._has_formula = (
            isinstance(self.q_layernorm, L2Norm)
            and isinstance(self.k_layernorm, L2Norm)
            and config.rotary_interleaved
            and config.num_query_groups >= self.world_size
            and self.hidden_size_per_attention_head <= MAX_WIDTH
            and self._yarn_concentration_factor == 1.0
            and not any(
                (no_rope, config.attention_output_gate, config.flash_decode, config.test_mode)
            )
            and not self.offload_core_attention
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **words: Any) -> Any:
        """Attend as the engine's layer does, with the same arguments, by keyword."""
        self._rotation = self._rotation_of(**words)
        if self._rotation is not None:
            words["rotary_pos_emb"] = None
        try:
            return super().forward(hidden_states, attention_mask, **words)
        finally:
            self._rotation = None

    def _rotation_of(
        self,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: object = None,
        inference_params: object = None,
        **_: object,
    ) -> Rotation | None:
        """Give what this forward is rotated by, or None where the engine must do it.

        The engine's rotary embedding is [positions of this rank, 1, 1, D] and has every angle
        twice, once for each number of a pair.
        """
        if not (self._has_formula and isinstance(rotary_pos_emb, Tensor)):
            return None
        if inference_context is not None or inference_params is not None:
            return None
        if rotary_pos_emb.shape[1:] != (1, 1, self.hidden_size_per_attention_head):
            return None
        bounds = None
        if packed_seq_params is not None:
            if packed_seq_params.qkv_format != "thd" or self.pg_collection.cp.size() > 1:
                return None
            bounds = packed_seq_params.cu_seqlens_q_padded
            bounds = packed_seq_params.cu_seqlens_q if bounds is None else bounds
        return Rotation(rotary_pos_emb[:, 0, 0, ::2], bounds)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **words: Any
    ) -> Any:
        """Give Q [S, B, H, D], and K and V [S, B, G, D], of this rank's heads.

        Rotated too, within `forward` and where there is a formula; else as the engine gives them.
        """
        if self._rotation is None:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, **words)
        qkv, _ = self.linear_qkv(hidden_states)
        return qk_norm_rope(
            qkv,
            self._rotation.angles,
            num_groups=self.num_query_groups_per_partition,
            eps=self.config.layernorm_epsilon,
            bounds=self._rotation.bounds,
        )
