"""The parts of the quickstart, on small pieces of what the demo reads; `make demo` is the whole."""

import ast
import hashlib
import inspect
import json
import random
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_mlr1.data.mixture import resolve
from megatron_mlr1.errors import DataError
from megatron_mlr1.recipes.sheet import mixture

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def program(name):
    return runpy.run_path(str(QUICKSTART / name))


@pytest.fixture(scope="module")
def corpora():
    return program("make_corpora.py")


def run(name, *words):
    return subprocess.run(
        [sys.executable, QUICKSTART / name, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_module_is_parted_into_code_that_compiles_and_docstrings_under_their_names(corpora):
    source = inspect.getsource(textwrap)
    code, docs = corpora["split"]("textwrap", source)
    assert docs.startswith("textwrap\n\nText wrapping and filling.")
    assert "\n\n\ntextwrap.TextWrapper.wrap\n\nwrap(text : string) -> [string]" in docs
    assert "wrap(text : string)" not in code
    with_names = [node.name for node in ast.walk(ast.parse(source)) if hasattr(node, "name")]
    assert [n.name for n in ast.walk(ast.parse(code)) if hasattr(n, "name")] == with_names


def test_a_body_that_is_a_docstring_alone_keeps_it(corpora):
    code, docs = corpora["split"]("m", 'class Stop(Exception):\n    """It stops."""\n')
    assert "It stops." in code
    assert docs == "m.Stop\n\nIt stops."


def test_no_paragraph_of_the_licences_comes_twice(corpora):
    documents = list(corpora["licences"]())
    paragraphs = [p for d in documents for p in (" ".join(q.split()) for q in d.split("\n\n")) if p]
    assert len(paragraphs) > 100
    assert len(set(paragraphs)) == len(paragraphs)


def test_a_corpus_is_the_same_file_whatever_order_its_texts_come_in(corpora, tmp_path):
    texts = [f"text {number} " * 100 for number in range(100)]
    digests = set()
    for seed in range(2):
        shuffled = random.Random(seed).sample(texts, len(texts))
        corpora["write"](tmp_path / "corpus.jsonl", shuffled)
        digests.add(hashlib.sha256((tmp_path / "corpus.jsonl").read_bytes()).hexdigest())
    assert len(digests) == 1
    lines = (tmp_path / "corpus.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["text"] for line in lines) == sorted(texts)


def test_a_python_without_its_library_as_files_is_refused(corpora, tmp_path):
    with pytest.raises(DataError, match="has 0 characters of it"):
        corpora["write"](tmp_path / "code.jsonl", [])
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_is_loaded_by_transformers_and_gives_every_text_back(tmp_path):
    source = inspect.getsource(textwrap)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": source}) + "\n")
    words = ("--input", tmp_path / "text.jsonl", "--output", tmp_path / "t", "--vocab-size", 600)
    made = run("make_tokenizer.py", *words)
    assert made.returncode == 0, made.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t", local_files_only=True)
    assert len(tokenizer) == 600
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|python_tag|>"]) == [592, 599]
    assert len(tokenizer.encode("<|eot_id|>")) == 1
    for text in (source, "naïve → 数\t\r\n  x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_mixture_names_what_the_program_writes(tmp_path):
    blend = mixture(str(QUICKSTART / "mixture.yaml"))
    assert [corpus.name for corpus in blend.corpora] == ["code", "docs", "licences"]
    for corpus in blend.corpora:
        for end in ("bin", "idx"):
            (tmp_path / f"{corpus.name}_text_document.{end}").write_bytes(b"12")
    assert sum(corpus.weight for corpus in resolve(blend, tmp_path)) == pytest.approx(1)


LOG = """\
tiny pretrain_phase1 starts from random weights
 [now] iteration       20/      40 | consumed samples: 1 | lm loss: 7.000000E+00 | loss scale: 1.0
 iteration       20 | tokens seen: 82k | tokens/s: 5.55k | tokens/s/GPU: 2.78k
 validation loss at iteration 20 | lm loss value: 6.900000E+00 | lm loss PPL: 9.9E+02 |
 validation loss at iteration 40 | lm loss value: {last} | lm loss PPL: 2.4E+02 |
 validation loss at iteration 40 on validation set | lm loss value: 9.9E+00 | lm loss PPL: 2.4E+02 |
"""
"""Lines as the engine and our metrics print them."""


def follow(tmp_path, command, *words):
    files = ("--log", tmp_path / "log", "--record", tmp_path / "record")
    return run("follow.py", *files, *words, "--", sys.executable, "-c", command)


@pytest.mark.parametrize(("last", "status"), [("5.899E+00", 0), ("5.901E+00", 1)])
def test_training_fails_where_the_validation_loss_does_not_fall_far_enough(tmp_path, last, status):
    log = LOG.format(last=last)
    followed = follow(tmp_path, f"print({log!r}, end='')", "--must-fall", "1.0")
    assert followed.returncode == status, followed.stderr
    assert "        20           7.000      5.55k             6.900\n" in followed.stdout
    assert ("It must fall by 1.0" in followed.stderr) == (status == 1)
    assert (tmp_path / "log").read_text() == log


def test_a_training_that_fails_ends_with_its_status_and_its_error(tmp_path):
    followed = follow(tmp_path, "import sys; sys.exit(print('error: no corpus') or 3)")
    assert followed.returncode == 3
    assert "error: no corpus" in followed.stderr


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    refused = subprocess.run(
        ["bash", QUICKSTART / "run.sh", tmp_path], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "name another folder" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
