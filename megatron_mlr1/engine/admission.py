"""Corpora are checked before a run trains on them, by all of its processes together."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Literal

import torch.distributed

from megatron_mlr1.data.admission import RunTokenizer, admit, never_shuffled
from megatron_mlr1.data.feed import are_packs
from megatron_mlr1.data.index import meta_path
from megatron_mlr1.data.provenance import Level, read_record
from megatron_mlr1.data.tokenizers import LOADERS, TokenizerPlan
from megatron_mlr1.errors import DataError
from megatron_mlr1.options import Mlr1Options


def admit_all(
    prefixes: Sequence[str], args: Namespace, level: Level | Literal["off"], tokenizer: Any
) -> None:
    """Check this process's share of the corpora; all of them together check all.

    Sizes and ends are compared on every node, since each may have files of its own; whole files
    are read once in the run.

    Args:
        prefixes: the corpora.
        args: the engine's.
        level: one of `options.VERIFY`.
        tokenizer: the engine's.

    Raises:
        DataError: a corpus is not what its record says, or of another tokenizer.
    """
    if level == "off":
        return
    if level == "full":
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:
        rank, size = (int(os.environ.get(name, n)) for name, n in _NODE.items())
    mine = prefixes[rank::size]
    if any(meta_path(prefix).exists() for prefix in mine):
        run = _run_tokenizer(args, tokenizer)
        for prefix in mine:
            admit(prefix, level, run)


CHAT_STAGES = ("sft_general", "sft_reasoning")
"""Stages of which a sample is chats with a loss mask."""


def refuse_documents(prefixes: Sequence[str], options: Mlr1Options) -> None:
    """Keep plain documents out of fine-tuning, which would learn the prompts with the answers.

    Args:
        prefixes: the corpora.
        options: with the stage; `--verify-data off` lets all pass.

    Raises:
        DataError: a corpus has no loss mask, or its record cannot be read.
    """
    if options.stage not in CHAT_STAGES or options.verify_data == "off":
        return
    plain = [prefix for prefix in prefixes if not are_packs(read_record(prefix))]
    if plain:
        raise DataError(
            f"Stage {options.stage} fine-tunes on packed chats, and these are plain documents: "
            f"{', '.join(plain)}. The loss would count every token, prompts included. Make packs "
            "of the chats with tools/preprocess_chat.py, or give --verify-data off to train on "
            "the documents all the same."
        )


_NODE = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
"""torchrun's words for a process's place on its node, and what holds without it."""


def _run_tokenizer(args: Namespace, tokenizer: Any) -> RunTokenizer:
    # What makes corpora takes a second to import, and is needed for corpora with a record alone.
    from megatron_mlr1.data.encode import describe_tokenizer

    plan = TokenizerPlan(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        vocab_size=args.vocab_size,
        include_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
        trust_remote_code=args.trust_remote_code,
    )
    known = args.tokenizer_type in LOADERS
    return RunTokenizer(
        name=str(args.tokenizer_model or args.tokenizer_type),
        num_ids=tokenizer.vocab_size,
        eod=tokenizer.eod,
        sha256=describe_tokenizer(plan)["sha256"] if known else None,
        num_rows=args.padded_vocab_size,
    )


def warn_of_order(prefixes: Sequence[str]) -> None:
    """Say once which corpora may stand in the order of their input."""
    names = never_shuffled(prefixes)
    if names:
        print(
            f"warning: never shuffled, as far as is known: {', '.join(names)}. Samples are runs of "
            "neighbouring documents, so documents should stand in random order: "
            "tools/shuffle_data.py.",
            file=sys.stderr,
            flush=True,
        )
