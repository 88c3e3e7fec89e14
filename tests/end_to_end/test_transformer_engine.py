"""Runs with Transformer Engine's layers, optimizer and FP8, its kernels by torch on the CPU.

What is held here is all that is Python: how its layers are put together, what a checkpoint has,
where the FP8 of an activation goes. `test_gpu.py` and `test_fp8.py` run its own kernels.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.end_to_end.conftest import FIRST, LAST, checkpoint_of, exact, record
from tests.support.te_on_cpu import ROOT, SOURCES

pytestmark = pytest.mark.skipif(
    not (SOURCES / ".installed").exists(),
    reason="needs the sources of Transformer Engine (make te-sources)",
)

STOP, END, SHORT = 8, 10, 7
"""Steps: of a checkpoint in the middle, of the longer runs' end, of the others'."""
DELAYED = ("--bf16", "--fp8-format", "hybrid", "--fp8-amax-history-len", "4")
DELAYED += ("--fp8-amax-compute-algo", "max")
OURS = ("--mlr1-kernels", "swiglu=mlr1_fp8")
WHOLE = ("--save-interval", str(STOP), "--exit-interval", str(END))
BRIEF = ("--exit-interval", str(SHORT))
RUNS = {
    "plain": WHOLE,
    "activation": ("--mlr1-kernels", "swiglu=te", *BRIEF),
    "fp8": (*DELAYED, *WHOLE),
    "fp8-ours": (*DELAYED, *OURS, *WHOLE),
    "fp8-resumed": (*DELAYED, *OURS, *WHOLE),
    "fp8-split": (
        *(*DELAYED, *OURS, *BRIEF, "--tensor-model-parallel-size", "2"),
        "--sequence-parallel",
    ),
    "current": (
        *("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"),
        *("--first-last-layers-bf16", *BRIEF),
    ),
}
FROM = {"fp8-resumed": ("fp8-ours", STOP)}


@pytest.fixture(scope="module")
def done(corpora, single, tmp_path_factory):
    """The folders of all runs, by name; they start from step 5 of a run of torch's modules."""
    root = tmp_path_factory.mktemp("te")
    common = ["--model", "tiny", "--stage", "pretrain_phase1", "--data-root", str(corpora.root)]
    common += ["--mixture", str(corpora.mixture), "--seq-length", "64", "--eval-iters", "0"]
    common += ["--train-iters", str(LAST), "--lr-warmup-iters", "4", "--log-interval", "5"]
    common += ["--use-distributed-optimizer"]

    def entry(name):
        save = root / name
        words = [*common, "--save", str(save), *RUNS[name]]
        ranks = 2 if "--sequence-parallel" in words else 1
        return {"words": words, "log": str(save.with_suffix(".log")), "ranks": ranks}

    for name in RUNS.keys() - FROM.keys():
        checkpoint_of(single, FIRST, root / name)
    follow(root / "first.json", [entry(name) for name in RUNS if name not in FROM])
    for name, (former, step) in FROM.items():
        checkpoint_of(root / former, step, root / name)
    follow(root / "second.json", [entry(name) for name in FROM])
    return root


def follow(plan, entries):
    plan.write_text(json.dumps(entries))
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.support.te_on_cpu", str(plan)]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    logs = [path.read_text() for path in plan.parent.glob("*.log")]
    ends = [log[-2000:] for log in logs if "Traceback" in log or "error: " in log]
    assert ended.returncode == 0, "\n".join([ended.stderr[-3000:], *ends])


def difference(save, reference):
    """The largest relative difference of a loss, over the steps of the first folder."""
    ours, theirs = record(save), record(reference)
    steps = [step for step in ours if step > FIRST]
    assert steps
    return max(abs(ours[n]["lm loss"] / theirs[n]["lm loss"] - 1) for n in steps)


def calls(save):
    return json.loads(save.with_suffix(".calls").read_text())


def test_it_goes_on_from_what_torchs_modules_wrote_and_computes_the_same(done, single):
    assert calls(done / "plain")["multi_tensor_adam"] > 0
    assert calls(done / "plain")["rmsnorm_bwd"] > 0
    assert set(exact(done / "plain")) == set(range(FIRST + 1, END + 1))
    assert difference(done / "plain", single) < 1e-5


def test_torchs_modules_go_on_from_what_it_wrote(train, done, single, tmp_path):
    save = checkpoint_of(done / "plain", STOP, tmp_path / "back")
    ended = train(save, "--exit-interval", str(END))
    assert ended.code == 0, ended.output[-3000:]
    assert difference(save, single) < 1e-5


def test_its_activation_goes_on_where_ours_has_been(done, single):
    assert calls(done / "activation")["swiglu"] > 0
    assert difference(done / "activation", single) < 1e-5


def test_fp8_trains_near_to_fp32(done, single):
    for name in ("fp8", "fp8-split", "current"):
        assert calls(done / name)["create_empty_quantized_tensor"] > 0
        assert difference(done / name, single) < 5e-3


def test_an_activation_that_is_quantised_in_its_own_pass_changes_no_bit(done):
    # In the first pass of a run the layer behind has no scale yet, and quantises by itself.
    passes = (END - FIRST) * 4 - 4
    assert calls(done / "fp8")["quantize"] - calls(done / "fp8-ours")["quantize"] >= passes
    assert exact(done / "fp8") == exact(done / "fp8-ours")


def test_a_run_in_fp8_goes_on_from_its_own_checkpoint_bit_by_bit(done):
    whole, resumed = exact(done / "fp8-ours"), exact(done / "fp8-resumed")
    assert set(resumed) == set(range(STOP + 1, END + 1))
    assert all(resumed[step] == whole[step] for step in resumed)
