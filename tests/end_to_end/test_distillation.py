"""A student learns from a pool that is disturbed, and nothing of it is seen in what it learns."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mlr1.teacher.in_process import InProcessTeacher
from megatron_mlr1.teacher.model import load_teacher
from megatron_mlr1.teacher.spec import TargetRequest, TargetSpec
from megatron_mlr1.teacher.store import make_store
from tests.end_to_end.conftest import checkpoint_of, exact, record
from tests.support.teacher_pool import Nursery, pool_of
from tests.support.teachers import make_keys, make_teacher_folder

STEPS, FIRST = 12, 4
KD = ("--from-scratch", "--train-iters", str(STEPS), "--save-interval", str(FIRST))
PARTS = ("lm loss", "kd loss", "grad_norm", "teacher entropy")
LAYOUTS = {
    "data": (),
    "tensor-and-sequence": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "pipeline": ("--pipeline-model-parallel-size", "2"),
}
SLOW = ("data", "pipeline")
LIMIT = 1e-4
LIES_AFTER = 30
"""Answers of a replica before it begins to lie."""


@pytest.fixture(scope="module")
def teacher(corpora, tmp_path_factory):
    """A Llama of random weights with the corpora's tokenizer."""
    return llama(tmp_path_factory.mktemp("teacher"), corpora)


def llama(folder, corpora, **changes):
    return make_teacher_folder(folder, tokenizer=corpora.root / "tokenizer", **changes)


@pytest.fixture(scope="module")
def nursery(teacher):
    nursery = Nursery(teacher)
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def distil(train):
    def run(save, address, *words, **how):
        words = ("--teacher", str(address), *KD, *words)
        return train(save, *words, stage="midtrain_phase1", **how)

    return run


@pytest.fixture(scope="module")
def learned(distil, teacher, tmp_path_factory):
    """One process with the teacher in it, never disturbed."""
    save = tmp_path_factory.mktemp("learned") / "save"
    done = distil(save, f"inprocess:{teacher}")
    assert done.code == 0, done.output[-3000:]
    return save


def ledger(save):
    return (save / "teacher.jsonl").read_text()


def parts(save):
    return {step: [row[name] for name in PARTS] for step, row in record(save).items()}


def test_a_served_teacher_one_of_whose_replicas_is_killed_is_bitwise_the_one_in_the_process(
    distil, learned, nursery, tmp_path
):
    with pool_of(nursery, tmp_path / "pool", 3, delay_s=0.01) as pool:
        disturbed = (3, lambda run: pool.kill("r0"))
        done = distil(tmp_path / "save", pool.folder, at_step=disturbed)
    assert done.code == 0, done.output[-3000:]
    rows = record(tmp_path / "save")
    assert rows[STEPS]["teacher replicas"] == 2
    assert parts(tmp_path / "save") == parts(learned)
    assert ledger(tmp_path / "save") == ledger(learned)
    assert "kd_wait_ms" in done.output
    assert all(row["kd wait ms"] >= 0 and row["kd alpha"] == 1 for row in rows.values())


def hang_join_and_drain(pool):
    """One replica hangs, one comes, one is drained and one more comes."""
    pool.signal("r0", signal.SIGSTOP)
    pool.start(delay_s=0.01)
    pool.signal("r1", signal.SIGTERM)
    pool.start(delay_s=0.01)


def all_down_and_back(pool):
    """All replicas die at once; others come when the run has waited for a while."""
    for name in list(pool.processes):
        pool.kill(name)
    time.sleep(5)
    for _ in range(2):
        pool.start(delay_s=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [hang_join_and_drain, all_down_and_back])
def test_whatever_happens_to_the_pool_losses_and_ledger_are_the_same(
    disturb, distil, learned, nursery, tmp_path
):
    save = tmp_path / "save"
    with pool_of(nursery, tmp_path / "pool", 3, delay_s=0.01) as pool:
        done = distil(
            save, pool.folder, "--kd-lookahead", "2", at_step=(3, lambda run: disturb(pool))
        )
    assert done.code == 0, done.output[-3000:]
    assert parts(save) == parts(learned)
    assert ledger(save) == ledger(learned)


def test_a_killed_student_goes_on_bitwise_and_its_ledger_too(distil, learned, teacher, tmp_path):
    save, address = tmp_path / "save", f"inprocess:{teacher}"
    distil(save, address, signal_at=(FIRST + 2, signal.SIGKILL))
    done = distil(save, address)
    assert done.code == 0, done.output[-3000:]
    assert "goes on from its last checkpoint" in done.output
    assert exact(save) == exact(learned)
    assert ledger(save) == ledger(learned)


@pytest.mark.parametrize(
    "layout",
    ["tensor-and-sequence", *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)],
)
def test_every_layout_learns_what_one_process_learns(layout, distil, learned, nursery, tmp_path):
    save = checkpoint_of(learned, FIRST, tmp_path / "save")
    with pool_of(nursery, tmp_path / "pool", 1) as pool:
        done = distil(save, pool.folder, *LAYOUTS[layout], processes=2)
    assert done.code == 0, done.output[-3000:]
    ours, theirs = parts(save), parts(learned)
    assert set(ours) == set(range(FIRST + 1, STEPS + 1))
    worst = max(
        abs(a - b) / abs(b)
        for step, row in ours.items()
        for a, b in zip(row, theirs[step], strict=True)
    )
    assert worst < LIMIT


def test_without_teachers_all_ranks_take_one_branch_then_save_and_end(distil, nursery, tmp_path):
    save, pool_folder = tmp_path / "save", tmp_path / "pool"
    words = ("--kd-without-teacher", "ce_only", "--kd-ce-only-budget", "2")
    words += ("--kd-lookahead", "1", "--kd-ce-only-after")
    with pool_of(nursery, pool_folder, 1) as pool:
        alone = (*words, "4", "--kd-hold-limit", "8")
        done = distil(
            save, pool.folder, *alone, processes=2, at_step=(2, lambda run: pool.kill("r0"))
        )
    assert re.search(r"exitcode +: 75", done.output), done.output[-3000:]
    assert done.output.count("this step goes on without the teacher") == 2
    branches = [json.loads(line)["branch"] for line in ledger(save).splitlines()]
    last = len(branches)
    assert branches == ["kd"] * (last - 2) + ["ce_only"] * 2
    rows = record(save)
    assert [("kd loss" in rows[step]) for step in (last - 2, last - 1, last)] == [
        True,
        False,
        False,
    ]
    assert rows[last]["kd alpha"] == 0
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert saved == last, "what was learned is saved"

    pool_folder.rename(tmp_path / "former")
    with pool_of(nursery, pool_folder, 1) as pool:
        done = distil(save, pool.folder, *words, "200", processes=2)
    assert done.code == 0, done.output[-3000:]
    branches = [json.loads(line)["branch"] for line in ledger(save).splitlines()]
    assert len(branches) == STEPS
    assert branches.count("ce_only") == 2


@pytest.mark.slow
def test_a_replica_that_begins_to_lie_is_ejected_while_training_goes_on(
    distil, learned, nursery, tmp_path
):
    keys, save = tmp_path / "keys", tmp_path / "save"
    make_keys(keys)
    with pool_of(nursery, tmp_path / "pool", 2, keys=str(keys)) as pool:
        liar = pool.start(keys=str(keys), damage=1e-2, damage_after=LIES_AFTER)
        # One request in one: only then is it certain that no lie is believed.
        words = ("--teacher-keys", str(keys), "--kd-audit-every", "1", "--kd-lookahead", "1")
        done = distil(save, pool.folder, *words)
    assert done.code == 0, done.output[-3000:]
    assert f"teacher replica {liar} is ejected" in done.output
    ejected = [row["teacher ejected"] for row in record(save).values()]
    assert (ejected[0], ejected[-1]) == (0, 1)
    assert parts(save) == parts(learned)
    assert ledger(save) == ledger(learned)


def test_a_store_alone_teaches_what_its_teacher_did_and_where_it_is_broken_nothing_is_lost(
    distil, nursery, tmp_path
):
    writer, reader, store = tmp_path / "writer", tmp_path / "reader", tmp_path / "store"
    with pool_of(nursery, tmp_path / "pool", 1) as pool:
        done = distil(writer, f"tiered:{store},+{pool.folder}", processes=2)
    assert done.code == 0, done.output[-3000:]

    whole = shutil.copytree(store, tmp_path / "whole")
    break_a_record(store, at=0.6)
    done = distil(reader, f"store:{store}", processes=2)
    refused(done, 2, "does not fit its checksum")
    saved = int((reader / "latest_checkpointed_iteration.txt").read_text())
    assert FIRST < saved < STEPS
    assert max(record(reader)) == saved, "the last completed step is saved"
    assert f"The run is saved at step {saved}" in done.output

    shutil.rmtree(store)
    whole.rename(store)
    done = distil(reader, f"store:{store}", processes=2)
    assert done.code == 0, done.output[-3000:]
    assert exact(reader) == exact(writer)
    assert parts(reader) == parts(writer)
    assert ledger(reader) == ledger(writer)


def break_a_record(store: Path, at: float) -> None:
    """Turn some bits in the middle of what one process wrote."""
    shard = next(path for path in store.glob("*.arrow") if path.name != "head.arrow")
    data = bytearray(shard.read_bytes())
    place = int(len(data) * at)
    data[place : place + 64] = bytes(255 - byte for byte in data[place : place + 64])
    shard.write_bytes(data)


@pytest.mark.slow
def test_a_share_of_zero_is_the_cross_entropy_alone(train, single, corpora, tmp_path):
    # As many ids as the student's table has rows, so that none of them is left out.
    padded = llama(tmp_path / "padded", corpora, vocab_size=512)
    save = tmp_path / "save"
    words = ("--teacher", f"inprocess:{padded}", "--kd-alpha", "0", "--exit-interval", "5")
    done = train(save, *words, "--save-interval", "5")
    assert done.code == 0, done.output[-3000:]
    plain = record(single)
    for step, row in record(save).items():
        for name in ("lm loss", "grad_norm", "learning_rate"):
            assert row[name] == pytest.approx(plain[step][name], rel=1e-5)
        assert row["kd loss"] > 0


def test_what_does_not_fit_ends_in_one_error_before_training(
    distil, corpora, learned, nursery, tmp_path
):
    other = llama(tmp_path / "other", corpora, seed=1)
    short = llama(tmp_path / "short", corpora, max_position_embeddings=32)
    foreign = make_teacher_folder(tmp_path / "foreign")
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "empty"): (75, "no teacher answers"),
        f"inprocess:{foreign}": (2, "tokenizer_sha256"),
        f"inprocess:{short}": (2, "it knows 32 positions"),
    }
    for number, (address, (code, message)) in enumerate(cases.items()):
        save = tmp_path / f"save{number}"
        done = distil(save, address, "--kd-hold-limit", "2")
        refused(done, code, message)
        assert record(save) == {}
    save = checkpoint_of(learned, FIRST, tmp_path / "again")
    refused(distil(save, f"inprocess:{other}"), 2, "its fingerprint is")


@pytest.mark.slow
def test_a_store_that_does_not_fit_ends_in_one_error_before_training(
    distil, corpora, learned, teacher, tmp_path
):
    other = llama(tmp_path / "other", corpora, seed=1)
    foreign, little = (
        store_of(engine_of(folder), tmp_path / name)
        for folder, name in ((other, "foreign"), (teacher, "little"))
    )
    save = checkpoint_of(learned, FIRST, tmp_path / "again")
    refused(distil(save, f"store:{foreign}"), 2, "holds targets of another teacher")
    save = tmp_path / "new"
    refused(distil(save, f"store:{little}"), 2, "has no targets for a sequence of 64 tokens")
    assert record(save) == {}


def engine_of(folder):
    return InProcessTeacher(load_teacher(folder, torch.device("cpu"), "float32"))


def store_of(teacher, folder):
    """A store with the targets of one sequence that no corpus holds."""
    store = make_store(folder, teacher.identity, TargetSpec(attention="full"))
    store.keep_head(teacher.head)
    tokens = np.zeros(64, "<i4")
    request = TargetRequest(tokens, np.array([0, 64], "<i4"), store.spec)
    ticket = teacher.submit(request, 0)
    store.add(ticket.key, teacher.fetch(ticket, 0))
    store.flush()
    return folder


@pytest.mark.parametrize("student", ["stranger", pytest.param("nobody", marks=pytest.mark.slow)])
def test_a_student_whom_the_pool_does_not_know_is_refused(student, distil, nursery, tmp_path):
    make_keys(tmp_path / "keys")
    make_keys(tmp_path / "stranger")
    # It knows the pool, and the pool does not know it.
    shutil.copy(tmp_path / "keys" / "pool.key", tmp_path / "stranger" / "pool.key")
    words = ("--teacher-keys", str(tmp_path / "stranger")) if student == "stranger" else ()
    with pool_of(nursery, tmp_path / "pool", 1, keys=str(tmp_path / "keys")) as pool:
        done = distil(tmp_path / "save", pool.folder, *words)
    refused(done, 2, "no teacher answers")
    assert record(tmp_path / "save") == {}


def refused(done, code: int, message: str) -> None:
    assert re.search(rf"exitcode +: {code}\b", done.output), done.output[-3000:]
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.output.split("torch/distributed/elastic")[0]


def test_the_record_remembers_the_teacher(learned: Path) -> None:
    run = json.loads((learned / "run.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{32}", run["teacher"])
