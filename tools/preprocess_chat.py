#!/usr/bin/env python
"""Make a corpus for fine-tuning: chats through the model's template into packs of one length."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_mlr1.data.chat_corpus import ChatPlan, ChatSummary, make_packs
from megatron_mlr1.data.chat_encode import ChatEncoding
from megatron_mlr1.data.chat_layouts import LAYOUTS
from megatron_mlr1.data.chat_template import TRAIN_ON
from megatron_mlr1.ending import clean_exit


def main() -> None:
    """Make the corpus and print what it holds."""
    args = _parser().parse_args()
    with clean_exit():
        plan = ChatPlan(
            inputs=tuple(args.input),
            output_prefix=args.output_prefix,
            encoding=ChatEncoding(
                tokenizer_model=args.tokenizer_model,
                train_on=args.train_on,
                pack_length=args.pack_length,
                truncate=args.truncate,
                questions=args.questions,
            ),
            workers=args.workers,
            layout=args.layout,
            skip_bad=args.on_error == "skip",
            seed=args.seed,
            overwrite=args.overwrite,
        )
        with tqdm(unit=" records", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            summary = make_packs(plan, lambda records, stored_bytes: bar.update(records))
        _print(summary, plan.rejected_path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="JSON lines (.gz, .zst) or Parquet: files, folders of them, or patterns in quotes",
    )
    add("--output-prefix", required=True, help="writes PREFIX_chat_document.{bin,idx,loss.bin}")
    add("--tokenizer-model", required=True, help="folder of a Hugging Face tokenizer")
    add("--pack-length", type=int, required=True, help="tokens of a pack: --seq-length of training")
    add("--layout", choices=tuple(LAYOUTS), help="default: as the first record of each file shows")
    add("--questions", type=Path, metavar="FILE", help="questions of OpenCodeReasoning-2")
    add("--train-on", choices=TRAIN_ON, default=TRAIN_ON[0], help="default: %(default)s")
    add("--truncate", action="store_true", help="cut chats that are longer than a pack")
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a record that is no chat: stop (default), or keep it in PREFIX.rejected.jsonl",
    )
    add("--seed", type=int, default=1234, help="of the order of chats; default: %(default)s")
    add("--workers", type=int, default=1, help="processes that tokenize; default: %(default)s")
    add("--overwrite", action="store_true", help="replace a corpus that is there")
    return parser


def _print(done: ChatSummary, rejected_path: Path) -> None:
    print(
        f"{done.prefix}: {_counted(done.chats, 'chat')} in {_counted(done.packs, 'pack')} of "
        f"{done.pack_length:,} "
        f"({done.chats / done.packs:.2f} to a pack, {done.fill:.2%} full), "
        f"{done.tokens:,} tokens, {done.trained_tokens:,} of them trained"
    )
    if not done.is_fast:
        print("  gigatoken does not give the ids of this tokenizer, so `tokenizers` did (slower)")
    if done.cut:
        print(f"  cut to {done.pack_length:,} tokens: {done.cut:,}")
    if done.too_long:
        print(f"  left out, too long: {done.too_long:,}, the longest of {done.longest:,} tokens")
    for reason, count in done.reasons.most_common():
        print(f"  rejected: {count:,} x {reason}")
    if done.too_long or done.rejected:
        print(f"  they are in {rejected_path}")


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


if __name__ == "__main__":
    main()
