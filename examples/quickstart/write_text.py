"""Let an exported model go on writing from a few prompts, with `transformers` alone."""

import argparse
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load the folder, and print and keep what the model writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=60, help="to write for each prompt")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, local_files_only=True).eval()
    torch.manual_seed(options.seed)
    texts = []
    for prompt in options.prompts:
        written = model.generate(
            **tokenizer(prompt, return_tensors="pt"),
            max_new_tokens=options.tokens,
            do_sample=True,
            temperature=0.7,
            top_k=40,
        )
        texts.append(tokenizer.decode(written[0], skip_special_tokens=True))
    options.output.write_text("\n---\n".join(texts) + "\n")
    print(options.output.read_text(), end="")


if __name__ == "__main__":
    main()
