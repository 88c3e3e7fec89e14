"""The numbers that make a MobileLLM-R1, and what follows from them: parameters and FLOPs.

No torch: recipes, converters and metrics ask these questions before any model exists.
"""

from dataclasses import dataclass

from megatron_mlr1.recipes.sheet import packaged


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a decoder with grouped-query attention, SwiGLU and tied embeddings."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of gate and up each, not of both together."""
    num_attention_heads: int
    num_query_groups: int
    """Key and value heads; each serves `num_attention_heads / num_query_groups` query heads."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Rows of the embedding that are tokens, without padding."""

    @property
    def attention_parameters(self) -> int:
        """Weights of one layer's query, key, value and output projections."""
        heads = 2 * self.num_attention_heads + 2 * self.num_query_groups
        return self.hidden_size * self.kv_channels * heads

    @property
    def mlp_parameters(self) -> int:
        """Weights of one layer's gate, up and down projections."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def head_parameters(self) -> int:
        """Weights of the tied embedding and output head."""
        return self.vocab_size * self.hidden_size

    def num_parameters(self) -> int:
        """Count all parameters; QK-norm has none and the head is the embedding."""
        norms = 2 * self.hidden_size
        layer = self.attention_parameters + self.mlp_parameters + norms
        return self.head_parameters + self.num_layers * layer + self.hidden_size

    def matmul_flops_per_token(self) -> int:
        """Count the forward FLOPs of all linear layers and the head for one token.

        Two for each weight (one multiplication, one addition); the embedding look-up is free.
        """
        body = self.num_layers * (self.attention_parameters + self.mlp_parameters)
        return 2 * (body + self.head_parameters)

    def attention_flops(self, sum_squared_lengths: float) -> float:
        """Count the forward FLOPs of the attention cores.

        Args:
            sum_squared_lengths: sum over the documents (or whole sequences) of length^2, in
                tokens^2.

        A causal document of n tokens has n^2 / 2 query-key pairs; each costs 2 * kv_channels for
        QK^T and as much for the product with V, in each query head.
        """
        pairs = sum_squared_lengths / 2
        return 4 * pairs * self.num_attention_heads * self.kv_channels * self.num_layers

    def training_flops(self, tokens: float, sum_squared_lengths: float) -> float:
        """Count the FLOPs of forward and backward; backward is twice forward, recompute is none.

        Args:
            tokens: tokens trained on.
            sum_squared_lengths: see `attention_flops`.
        """
        forward = tokens * self.matmul_flops_per_token() + self.attention_flops(sum_squared_lengths)
        return 3 * forward


def named_shape(model: str) -> ModelShape:
    """Give the sizes of a model that has a recipe: 140m, 360m or 950m.

    Raises:
        ConfigError: there is no recipe of that name.
        KeyError: the recipe leaves a size open, as `tiny` leaves the vocabulary to its tokenizer.
    """
    flags = {flag.name: flag.values for flag in packaged("models", model).flags}

    def size(name: str) -> int:
        return int(flags[name][0])

    return ModelShape(
        num_layers=size("num-layers"),
        hidden_size=size("hidden-size"),
        ffn_hidden_size=size("ffn-hidden-size"),
        num_attention_heads=size("num-attention-heads"),
        num_query_groups=size("num-query-groups"),
        kv_channels=size("kv-channels"),
        vocab_size=size("padded-vocab-size"),
    )
