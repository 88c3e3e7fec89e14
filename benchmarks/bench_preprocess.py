"""Measure `tools/preprocess_data.py` against the two tools of Megatron-LM that do the same.

Each program runs in a process of its own on the same files, start included, by turns; the bytes
that come out are compared. Wall time, user and system time of all its processes, and the peaks of
its memory: the largest sum of the resident memory of all its processes at one time (pages that
two of them share count twice), and the largest single process as the kernel counted it.

The peers need a checkout of Megatron-LM (`--megatron-lm DIR`); the wheel has no tools. Their fast
tool is newer than core_v0.19.0. Without a checkout only ours is measured.

The text is made by `installed_text.py`: documents that differ, no long line twice, and where there
is too little of it, rare words that change from one reading of the files to the next.
"""

import argparse
import filecmp
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import psutil

from megatron_mlr1.ending import clean_exit

ROOT: Final = Path(__file__).resolve().parent.parent
TEXT: Final = ROOT / "benchmarks" / "installed_text.py"
RESULT: Final = ROOT / "benchmarks" / "results" / "preprocess.md"
TRAINING_BYTES: Final = 8_000_000
"""Of text, for training a tokenizer."""
NUM_IDS: Final = 32_000
END: Final = "<|end_of_text|>"
SAMPLED_S: Final = 0.05
GOALS: Final = {"`preprocess_data.py`": (25.0, 100), "`preprocess_data_fast.py`": (2.5, 400)}
"""How many times faster by the wall clock ours should be, from how many MB on."""
PEAK_GB: Final = 0.8
START_S: Final = 2.0


def train(folder: Path, source: Path) -> None:
    """Train a BPE on the beginning of a file of records, quickly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_IDS,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with source.open("rb") as file:
        lines = file.readlines(TRAINING_BYTES)
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(words), "utf-8")


@dataclass(frozen=True, slots=True)
class Program:
    """One of the programs that are compared."""

    name: str
    root: Path
    """The checkout that it is part of."""
    script: str
    words: tuple[str, ...]
    up_to_mb: float
    """It is not run on more."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run took."""

    wall_s: float
    cpu_s: float
    tree_bytes: float
    """Largest sum over all its processes at one time."""
    process_bytes: float
    """Largest process."""
    load: float
    """Of the machine, before the start."""


def programs(options: argparse.Namespace) -> list[Program]:
    """Name what can be run: ours, and the peers that a checkout has."""
    workers = ("--workers", str(options.cores))
    found = [Program("ours", ROOT, "tools/preprocess_data.py", workers, float("inf"))]
    if options.megatron_lm is None:
        print("No --megatron-lm DIR names a checkout of Megatron-LM: only ours is measured.")
        return found
    checkout = options.megatron_lm.resolve()
    for script, words, limit in (
        ("preprocess_data.py", workers, options.default_mb),
        ("preprocess_data_fast.py", ("--use-gigatoken",), options.fast_mb),
    ):
        if (checkout / "tools" / script).is_file():
            found.append(Program(f"`{script}`", checkout, f"tools/{script}", words, limit))
        else:
            print(f"{checkout} has no tools/{script}; it is not measured.")
    return found


def measure(program: Program, source: Path, tokenizer: Path, output: Path) -> Run:
    """Run a program to files that are not there yet."""
    for old in output.parent.glob(f"{output.name}*"):
        old.unlink()
    command = [
        *(sys.executable, program.script, *program.words, "--append-eod"),
        *("--input", str(source), "--output-prefix", str(output)),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)),
        "--tokenizer-hf-no-include-special-tokens",
    ]
    path = os.pathsep.join(filter(None, (str(program.root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    os.sync()  # nobody waits for what another one wrote
    load = os.getloadavg()[0]
    log = output.with_suffix(".log")
    with log.open("wb") as file:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=program.root, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        tree_bytes = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            tree_bytes = max(tree_bytes, _tree_bytes(process.pid))
            time.sleep(SAMPLED_S)
        wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{program.name} failed:\n{log.read_text(errors='replace')[-3000:]}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(wall_s, cpu_s, tree_bytes, usage.ru_maxrss * 1024, load)


def _tree_bytes(pid: int) -> int:
    total = 0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # it ended just now
    return total


def compare(
    all_programs: list[Program], source: Path, tokenizer: Path, size: float, repeat: int
) -> dict[str, Run]:
    """Run the programs on one file by turns; medians. Ends everything where their bytes differ."""
    chosen = [program for program in all_programs if size <= program.up_to_mb]
    outputs = {program.name: source.with_name(f"out{i}") for i, program in enumerate(chosen)}
    runs: dict[str, list[Run]] = {program.name: [] for program in chosen}
    for _ in range(repeat):
        for program in chosen:
            run = measure(program, source, tokenizer, outputs[program.name])
            runs[program.name].append(run)
            print(f"{source.stem}: {program.name} {run.wall_s:.1f} s, CPU {run.cpu_s:.1f} s")
    ours = outputs[chosen[0].name]
    for name, output in outputs.items():
        for end in ("bin", "idx"):
            one, other = (f"{prefix}_text_document.{end}" for prefix in (ours, output))
            if not filecmp.cmp(one, other, shallow=False):
                raise SystemExit(f"{source.stem}: {name} gives other bytes than ours in .{end}")
    return {
        name: Run(*(statistics.median(column) for column in zip(*map(astuple, every), strict=True)))
        for name, every in runs.items()
    }


def rows(found: dict[str, dict[str, Run]]) -> list[str]:
    """Give the table of all runs."""
    lines = [
        "| input | program | wall s | CPU s | MB a CPU s | peak GB, all processes "
        "| peak GB, largest | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for source, runs in found.items():
        for name, run in runs.items():
            speed = f"{int(source) / run.cpu_s:.1f}" if source != "one" else ""
            lines.append(
                f"| {_input(source)} | {name} | {run.wall_s:.2f} | {run.cpu_s:.2f} | {speed} "
                f"| {run.tree_bytes / 1e9:.2f} | {run.process_bytes / 1e9:.2f} | {run.load:.1f} |"
            )
    return lines


def verdicts(found: dict[str, dict[str, Run]]) -> list[str]:
    """Give the table of what is claimed."""
    lines = ["| | wall | CPU | goal |", "|---|---|---|---|"]
    for source, runs in found.items():
        ours = runs["ours"]
        for name, run in runs.items():
            factor, least = GOALS.get(name, (None, 0))
            if factor is None or source == "one":
                continue
            goal = f"{factor:g}x by the wall clock" if int(source) >= least else "none at this size"
            lines.append(
                f"| {name} / ours, {_input(source)} | {run.wall_s / ours.wall_s:.1f}x "
                f"| {run.cpu_s / ours.cpu_s:.1f}x | {goal} |"
            )
    start = found["one"]["ours"]
    peak = max(runs["ours"].tree_bytes for runs in found.values()) / 1e9
    return [
        *lines,
        f"| ours, start to end of one document | {start.wall_s:.2f} s | {start.cpu_s:.2f} s "
        f"| {START_S:g} s |",
        f"| ours, largest peak of all | {peak:.2f} GB | | {PEAK_GB:g} GB |",
    ]


def _input(source: str) -> str:
    return "one document" if source == "one" else f"{int(source):,} MB"


def report(options: argparse.Namespace, engine: dict[str, Any], about: Any, found: Any) -> str:
    """Give all of it as Markdown, with the machine and the versions."""
    kind = "given by --tokenizer" if options.tokenizer else "a BPE trained here on the text"
    of_runs = "one run each" if options.repeat == 1 else f"medians of {options.repeat} runs each"
    same = ", by turns; all programs gave the same bytes" if options.megatron_lm else ""
    packages = ("gigatoken", "tokenizers", "transformers", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    of_peers = ""
    if options.megatron_lm:
        git = ["git", "-C", str(options.megatron_lm), "log", "-1", "--format=%h of %cs"]
        commit = subprocess.run(git, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
        of_peers = f", Megatron-LM {commit}" if commit else ""
    words = [f"--mb {' '.join(map(str, options.mb))} --repeat {options.repeat}"]
    words += [f"--default-mb {options.default_mb} --fast-mb {options.fast_mb}"]
    words += ["--megatron-lm DIR"] if options.megatron_lm else []
    words += ["--tokenizer DIR"] if options.tokenizer else []
    lines = [
        "# Preprocessing",
        "",
        f"JSON lines in, .bin and .idx out; {options.cores} cores and workers; start included; "
        f"{of_runs}{same}. "
        f"Tokenizer: {kind}, {engine['vocab_size']:,} ids; ours made them with "
        f"{engine['engine']}.",
        "",
        *rows(found),
        "",
        *verdicts(found),
        "",
        "The text:",
        "",
        *(f"- {int(size):,} MB: {what}." for size, what in about.items()),
        "",
        "Ours forces its files to the disk and writes a record with their checksums within this "
        "time; the others leave the disk to the system. Peak GB of all processes counts pages that "
        "two processes share twice.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"{versions}{of_peers}.",
        "",
        f"Measured by `python -m benchmarks.bench_preprocess {' '.join(words)} --save`.",
    ]
    return "\n".join(lines) + "\n"


def run_all(options: argparse.Namespace) -> None:
    """Make the text and the tokenizer, measure, and print."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    all_programs = programs(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        # In processes of their own: the kernel counts the memory of this one for those it starts.
        sizes = ["--mb", *map(str, options.mb)]
        make = [sys.executable, str(TEXT), "--folder", name, *sizes]
        done = subprocess.run(make, check=True, stdout=subprocess.PIPE)
        about = json.loads(done.stdout)
        tokenizer = options.tokenizer and options.tokenizer.resolve()
        if tokenizer is None:
            train_it = [sys.executable, __file__, "--folder", name, "--train", *sizes]
            subprocess.run(train_it, check=True)
            tokenizer = folder / "tokenizer"
        found = {}
        for source, size in [("one", 0), *((str(size), size) for size in sorted(options.mb))]:
            file = folder / f"{source}.jsonl"
            found[source] = compare(all_programs, file, tokenizer, size, options.repeat)
        record = json.loads((folder / "out0_text_document.meta.json").read_bytes())
    text = report(options, record["tokenizer"], about, found)
    print(text)
    if options.save:
        RESULT.write_text(text, "utf-8")


def main() -> None:
    """Compare, or be the process that trains the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megatron-lm", type=Path, metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="of Hugging Face's format")
    parser.add_argument("--mb", type=int, nargs="+", default=[16, 64], help="sizes of the input")
    parser.add_argument("--default-mb", type=int, default=150, help="most for preprocess_data.py")
    parser.add_argument("--fast-mb", type=int, default=500, help="most for preprocess_data_fast.py")
    parser.add_argument("--cores", type=int, default=2, help="that all programs may use")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each program")
    parser.add_argument("--folder", type=Path, help="where the files may lie for a while")
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULT.name}")
    # Of the child process that trains.
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.folder / "tokenizer", options.folder / f"{min(options.mb)}.jsonl")
    else:
        run_all(options)


if __name__ == "__main__":
    with clean_exit():
        main()
