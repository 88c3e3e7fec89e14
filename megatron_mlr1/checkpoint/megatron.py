"""A run's checkpoints as the engine lays them out, and what its arguments say about the model."""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from megatron_mlr1.checkpoint.architecture import (
    MISSING,
    Architecture,
    check_fields,
    integer,
    number,
)
from megatron_mlr1.checkpoint.distributed import (
    COMMON,
    DistributedReader,
    empty_state_names,
    write_distributed,
)
from megatron_mlr1.checkpoint.folder import write_text
from megatron_mlr1.checkpoint.names import EMPTY_STATES, ROWS, Place, check_megatron_names, places
from megatron_mlr1.checkpoint.tensors import check_shape, megatron_shape
from megatron_mlr1.errors import CheckpointError
from megatron_mlr1.model.shape import ModelShape

TRACKER: Final = "latest_checkpointed_iteration.txt"
RELEASE: Final = "release"
"""The engine's word for a checkpoint of weights alone: it starts from iteration 0."""

FIXED: Final[dict[str, object]] = {
    "position_embedding_type": "rope",
    "rotary_interleaved": True,
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "qk_l2_norm": True,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": False,
}
"""What the architecture fixes, by the names of the engine's arguments."""

_OFF: Final = (
    "add_qkv_bias",
    "apply_residual_connection_post_layernorm",
    "attention_output_gate",
    "heterogeneous_layers_config_path",
    "layernorm_zero_centered_gamma",
    "mtp_num_layers",
    "multi_latent_attention",
    "no_rope_freq",
    "num_experts",
    "qk_layernorm",
    "quick_geglu",
    "rotary_seq_len_interpolation_factor",
    "squared_relu",
    "use_rope_scaling",
    "window_size",
)
"""Arguments that would make another architecture; absent in checkpoints of other versions."""

_PADDING: Final = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")

REQUIRED: Final = {
    **{name: (value,) for name, value in FIXED.items()},
    **{name: (MISSING, None, False) for name in _OFF},
    "softmax_type": (MISSING, "vanilla"),
}


class MegatronCheckpoint:
    """One saved iteration of a run."""

    def __init__(self, root: Path, iteration: int | None) -> None:
        """Find an iteration and read what it says about itself.

        Args:
            root: the folder that the run was given as `--save`.
            iteration: which one; None is the latest.

        Raises:
            CheckpointError: it is not there, damaged, or not of this architecture.
        """
        self.folder = _iteration_folder(root, iteration)
        self.reader = DistributedReader(self.folder)
        args = self.reader.common().get("args")
        if args is None:
            raise CheckpointError(
                f"{self.folder} holds no arguments of a run, so its sizes are not known. Convert a "
                "checkpoint that the trainer saved."
            )
        self.args: Mapping[str, Any] = vars(args)
        where = str(self.folder)
        check_fields(self.args, REQUIRED, where=where)
        check_megatron_names(self.reader.names, where=where)

    @property
    def embedding_rows(self) -> int:
        """Count the rows of the embedding, padding included."""
        return self.reader.shape(ROWS[0].megatron)[0]

    @property
    def recorded_vocabulary(self) -> int | None:
        """Give the vocabulary that the run was told by hand, if it was."""
        size = self.args.get("vocab_size")
        return size if isinstance(size, int) and size > 0 else None

    @property
    def padding_multiple(self) -> int:
        """Give the number of rows that the run rounded its vocabulary up to a multiple of."""
        factors = (self.args.get(name) for name in _PADDING)
        return math.prod(factor for factor in factors if isinstance(factor, int))

    @property
    def tokenizer(self) -> Path | None:
        """Give the folder of the run's tokenizer, where it is one and still there."""
        name = self.args.get("tokenizer_model")
        return Path(name) if isinstance(name, str) and Path(name).is_dir() else None

    def architecture(self, vocab_size: int) -> Architecture:
        """Read the sizes, and check every tensor against them.

        Raises:
            CheckpointError: a size is not there or a tensor has another shape.
        """
        where, args = str(self.folder), self.args
        num_heads = integer(args, "num_attention_heads", where=where)
        is_grouped = bool(args.get("group_query_attention"))
        shape = ModelShape(
            num_layers=integer(args, "num_layers", where=where),
            hidden_size=integer(args, "hidden_size", where=where),
            ffn_hidden_size=integer(args, "ffn_hidden_size", where=where),
            num_attention_heads=num_heads,
            num_query_groups=integer(args, "num_query_groups", where=where)
            if is_grouped
            else num_heads,
            kv_channels=integer(args, "kv_channels", where=where),
            vocab_size=vocab_size,
        )
        self._check_shapes(shape)
        return Architecture(
            shape=shape,
            rotary_base=number(args, "rotary_base", where=where),
            max_positions=integer(args, "max_position_embeddings", where=where),
            norm_epsilon=number(args, "layernorm_epsilon", where=where),
        )

    def _check_shapes(self, shape: ModelShape) -> None:
        for row in ROWS:
            expected = megatron_shape(row, shape)
            if row.layout == "vocabulary":
                expected = (self.embedding_rows, *expected[1:])
            elif row.is_layered:
                expected = (shape.num_layers, *expected)
            what = f"{self.folder}: {row.megatron}"
            check_shape(self.reader.shape(row.megatron), expected, what=what)
            if not self.reader.dtype(row.megatron).is_floating_point:
                raise CheckpointError(
                    f"{what} has type {self.reader.dtype(row.megatron)}; weights must be "
                    "floating-point numbers. Dequantise the checkpoint first."
                )


def _iteration_folder(root: Path, iteration: int | None) -> Path:
    tracker = root / TRACKER
    if iteration is not None:
        folder = root / f"iter_{iteration:07d}"
    elif tracker.is_file():
        word = tracker.read_text("utf-8").strip()
        if word != RELEASE and not word.isdecimal():
            raise CheckpointError(
                f"{tracker} says {word!r}; it must hold an iteration or the word {RELEASE!r}. Name "
                "the iteration with --iteration."
            )
        folder = root / (word if word == RELEASE else f"iter_{int(word):07d}")
    else:
        raise CheckpointError(
            f"{root} has no {TRACKER}; it must be the folder that a run was given as --save. Name "
            "that folder, not one of its iterations."
        )
    if not folder.is_dir():
        saved = ", ".join(sorted(path.name for path in root.glob("iter_*"))) or "none"
        raise CheckpointError(f"{folder} is not there. Iterations that are: {saved}.")
    return folder


def write_release(
    root: Path,
    architecture: Architecture,
    make: Callable[[Place], Tensor],
    *,
    dtype: torch.dtype,
    tokenizer: Path | None,
) -> Path:
    """Write weights as a checkpoint from which any run of this architecture can start.

    Args:
        root: an existing folder; the engine takes it as `--load` or `--pretrained-checkpoint`.
        architecture: the model's numbers.
        make: gives the tensor of each weight, one at a time.
        dtype: the type of all weights.
        tokenizer: folder of the tokenizer, to be recorded.

    Returns:
        The folder of the weights themselves.
    """
    shape = architecture.shape
    folder = root / RELEASE
    folder.mkdir()
    common = {
        "args": _arguments(architecture, tokenizer),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    empty = dict.fromkeys(empty_state_names(EMPTY_STATES, shape.num_layers))
    write_distributed(
        folder,
        ((place, megatron_shape(place.row, shape)) for place in places(shape.num_layers)),
        make,
        dtype=dtype,
        num_layers=shape.num_layers,
        objects={**empty, COMMON: common},
    )
    write_text(root / TRACKER, RELEASE)
    return folder


def _arguments(architecture: Architecture, tokenizer: Path | None) -> Namespace:
    """Give what the engine compares with a run's own arguments, and what `architecture` reads."""
    shape, base = architecture.shape, architecture.rotary_base
    return Namespace(
        **FIXED,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        group_query_attention=True,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        vocab_size=shape.vocab_size,
        max_position_embeddings=architecture.max_positions,
        # The engine's flag takes whole numbers only.
        rotary_base=int(base) if base.is_integer() else base,
        layernorm_epsilon=architecture.norm_epsilon,
        add_position_embedding=True,
        tokenizer_type="HuggingFaceTokenizer" if tokenizer else None,
        tokenizer_model=str(tokenizer.absolute()) if tokenizer else None,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )
