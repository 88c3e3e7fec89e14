"""Train a small Llama with transformers on the corpora's training part, and save its folder."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.mixture import ResolvedCorpus, resolve
from megatron_mlr1.errors import Mlr1Error
from megatron_mlr1.recipes.sheet import mixture

TRAINING_SHARE = 0.95
"""Of each corpus's documents; the student is judged on the rest."""
BATCH, LENGTH = 16, 128
PEAK_LR, WARMUP = 4e-3, 20
ROWS_SHOWN = 5


def main() -> int:
    """Train, say how it goes, and save; give the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mixture", required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    if options.steps <= WARMUP:
        parser.error(f"--steps is {options.steps}; it must be above the {WARMUP} of the warm-up")
    try:
        corpora = resolve(mixture(options.mixture), options.data_root)
        tokens = [training_tokens(corpus) for corpus in corpora]
    except Mlr1Error as error:
        print(error, file=sys.stderr)
        return error.exit_code
    tokenizer = AutoTokenizer.from_pretrained(options.data_root / "tokenizer")
    model = llama(len(tokenizer))
    weights = np.array([corpus.weight for corpus in corpora])
    train(model, tokens, weights / weights.sum(), options.steps)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    return 0


def training_tokens(corpus: ResolvedCorpus) -> NDArray[Any]:
    """Give the tokens of a corpus that the student trains on too."""
    whole = open_corpus(str(corpus.prefix))
    last = round(TRAINING_SHARE * whole.num_documents)
    return whole.tokens[: int(whole.lengths[:last].sum())]


def llama(vocab_size: int) -> LlamaForCausalLM:
    """Make the model, which starts from seed 0."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def train(
    model: LlamaForCausalLM, tokens: Sequence[NDArray[Any]], weights: NDArray[Any], steps: int
) -> None:
    """Train by the cross-entropy: AdamW, warm-up, then linear to zero."""
    random, began = np.random.default_rng(0), time.monotonic()
    adam = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        batch = torch.stack([sample(tokens, weights, random) for _ in range(BATCH)])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
        adam.step()
        adam.zero_grad()
        if (step + 1) % (steps // ROWS_SHOWN) == 0:
            seconds = time.monotonic() - began
            print(f"step {step + 1}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def sample(
    tokens: Sequence[NDArray[Any]], weights: NDArray[Any], random: np.random.Generator
) -> torch.Tensor:
    """Take a sequence from anywhere in one of the corpora."""
    corpus = tokens[random.choice(len(tokens), p=weights)]
    begin = random.integers(corpus.size - LENGTH)
    return torch.from_numpy(corpus[begin : begin + LENGTH].astype(np.int64))


if __name__ == "__main__":
    sys.exit(main())
