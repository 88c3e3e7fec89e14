"""Ask an exported model questions through its chat template, with `transformers` alone."""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load the folder, and print each question with the model's answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--questions", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer, at most")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, local_files_only=True).eval()
    for question in options.questions:
        print(f"  {question}  ->  {answer(model, tokenizer, question, options.tokens)}")


def answer(model: Any, tokenizer: Any, question: str, num_tokens: int) -> str:
    """Let the model answer until it ends its turn."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        written = model.generate(**asked, max_new_tokens=num_tokens, do_sample=False)
    text: str = tokenizer.decode(
        written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


if __name__ == "__main__":
    main()
