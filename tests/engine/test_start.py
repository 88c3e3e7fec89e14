"""Where a run starts."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.errors import CheckpointError, ConfigError

cpu.activate()

from megatron_mlr1.engine.start import (  # noqa: E402
    RUN,
    TRACKER,
    Run,
    decide,
    former_teacher,
    remember_teacher,
    without,
)


def a_run(stage: str = "pretrain_phase2", model: str = "tiny") -> Run:
    return Run(
        model=model, stage=stage, dataset="mlr1", words=("--lr", "1"), versions={"torch": "2"}
    )


def checkpoint(folder: Path, run: Run | None) -> Path:
    folder.mkdir()
    (folder / TRACKER).write_text("5")
    if run is not None:
        run.write(folder)
    return folder


def start(run: Run, **given):
    plain = {"save": None, "load": None, "from_scratch": False, "needs_load": None}
    plain["new_data_order"] = False
    return decide(run=run, **(plain | given))


def test_a_run_goes_on_from_its_own_last_checkpoint(tmp_path):
    save = checkpoint(tmp_path / "save", a_run())
    former = checkpoint(tmp_path / "former", a_run("pretrain_phase1"))
    found = start(a_run(), save=save, load=former, needs_load="pretrain_phase1")
    assert found.words == ("--load", str(save))


def test_another_length_of_samples_is_refused_unless_it_is_meant(tmp_path):
    of_2048, of_4096 = (replace(a_run(), words=("--seq-length", n)) for n in ("2048", "4096"))
    save = checkpoint(tmp_path / "save", of_2048)
    with pytest.raises(ConfigError, match=r"--seq-length 2048, and this one has 4096"):
        start(of_4096, save=save)
    assert start(of_4096, save=save, new_data_order=True).words == ("--load", str(save))
    assert start(of_2048, save=save).words == ("--load", str(save))


@pytest.mark.parametrize("flag", ["--lr", "--min-lr"])
def test_another_learning_rate_is_refused_where_the_optimizer_goes_on(tmp_path, flag):
    was, same, now = (replace(a_run(), words=(flag, rate)) for rate in ("4e-3", "0.004", "3e-3"))
    save = checkpoint(tmp_path / "save", was)
    assert start(same, save=save).words == ("--load", str(save))
    with pytest.raises(ConfigError, match=f"{flag} 4e-3, and this one has 3e-3"):
        start(now, save=save)
    anew = replace(now, words=(*now.words, "--no-load-optim"))
    assert start(anew, save=save).words == ("--load", str(save))


def written_over(folder: Path, backend: str) -> None:
    """Let a folder's checkpoint say over which backend its run spoke."""
    iteration = folder / "iter_0000005"
    iteration.mkdir()
    (iteration / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    torch.save({"args": Namespace(distributed_backend=backend)}, iteration / "common.pt")


@pytest.mark.parametrize("given", ["save", "load"])
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_random_numbers_of_another_kind_of_device_are_left_behind(tmp_path, backend, given):
    folder = checkpoint(tmp_path / "run", a_run())
    written_over(folder, backend)
    found = start(a_run(), **{given: folder})
    fits = (backend == "gloo") == cpu.is_active()
    assert found.words == ("--load", str(folder), *([] if fits else ["--no-load-rng"]))
    assert ("random numbers start anew" in found.reason) == (not fits)


def test_a_damaged_checkpoint_is_left_to_the_engine_to_name(tmp_path):
    folder = checkpoint(tmp_path / "run", a_run())
    written_over(folder, "gloo")
    (folder / "iter_0000005" / "common.pt").write_bytes(b"no pickle")
    assert start(a_run(), save=folder).words == ("--load", str(folder))


def test_a_stage_starts_from_the_weights_of_the_former_alone(tmp_path):
    former = checkpoint(tmp_path / "former", a_run("pretrain_phase1"))
    found = start(a_run(), save=tmp_path / "new", load=former, needs_load="pretrain_phase1")
    assert found.words == ("--pretrained-checkpoint", str(former))
    assert "pretrain_phase1" in found.reason


def test_a_converted_checkpoint_gives_weights_alone(tmp_path):
    converted = checkpoint(tmp_path / "converted", None)
    assert start(a_run(), load=converted).words == ("--pretrained-checkpoint", str(converted))


def test_the_same_stage_is_continued_elsewhere(tmp_path):
    other = checkpoint(tmp_path / "other", a_run())
    assert start(a_run(), save=tmp_path / "new", load=other).words == ("--load", str(other))


def test_load_and_save_may_be_one_empty_folder(tmp_path):
    assert start(a_run(), save=tmp_path, load=tmp_path).words == ()


def test_a_first_stage_starts_from_random_weights():
    assert start(a_run("pretrain_phase1")).words == ()


def test_a_later_stage_without_weights_is_refused():
    with pytest.raises(ConfigError, match="starts from the weights of pretrain_phase1"):
        start(a_run(), needs_load="pretrain_phase1")


def test_a_later_stage_starts_from_random_weights_when_told_to():
    assert start(a_run(), needs_load="pretrain_phase1", from_scratch=True).words == ()


def test_a_folder_without_a_checkpoint_is_refused_and_not_passed_over(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        start(a_run(), load=tmp_path)


def test_another_stage_is_not_saved_over(tmp_path):
    save = checkpoint(tmp_path / "save", a_run("pretrain_phase1"))
    with pytest.raises(ConfigError, match="folder of its own"):
        start(a_run(), save=save)


def test_converted_weights_are_not_saved_over(tmp_path):
    converted = checkpoint(tmp_path / "converted", None)
    (converted / TRACKER).write_text("release")
    with pytest.raises(ConfigError, match="converted weights"):
        start(a_run(), save=converted, load=converted)


def test_weights_of_another_model_are_refused(tmp_path):
    other = checkpoint(tmp_path / "other", a_run(model="140m"))
    with pytest.raises(ConfigError, match="holds a 140m"):
        start(a_run(), load=other)


@pytest.mark.parametrize("given", ["save", "load"])
def test_another_order_of_the_samples_is_refused_unless_asked_for(tmp_path, given):
    folder = checkpoint(tmp_path / "run", replace(a_run(), dataset="megatron"))
    with pytest.raises(ConfigError, match=r"by --mlr1-dataset megatron, .* reads by mlr1"):
        start(a_run(), **{given: folder})
    found = start(a_run(), **{given: folder}, new_data_order=True)
    assert found.words == ("--load", str(folder))


def test_weights_of_a_former_stage_may_have_seen_any_order(tmp_path):
    former = replace(a_run("pretrain_phase1"), dataset="megatron")
    folder = checkpoint(tmp_path / "former", former)
    assert start(a_run(), load=folder).words == ("--pretrained-checkpoint", str(folder))


def test_a_record_from_before_there_was_a_choice_is_of_megatrons_order(tmp_path):
    a_run().write(tmp_path)
    fields = json.loads((tmp_path / RUN).read_text())
    del fields["dataset"]
    (tmp_path / RUN).write_text(json.dumps(fields))
    assert Run.read(tmp_path) == replace(a_run(), dataset="megatron")


def test_the_record_of_a_run_comes_back_as_it_was_written(tmp_path):
    a_run().write(tmp_path)
    assert Run.read(tmp_path) == a_run()
    assert Run.read(tmp_path / "nowhere") is None


def test_a_broken_record_is_named(tmp_path):
    (tmp_path / RUN).write_text("{")
    with pytest.raises(CheckpointError, match=RUN):
        Run.read(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        a_run().write(tmp_path / "file")


def test_a_flag_with_a_value_is_taken_out_in_both_spellings():
    words = ("--a", "1", "--load", "x", "--b", "--load=y")
    assert without(words, "--load") == (("--a", "1", "--b"), "y")
    assert without(words, "--c") == (words, None)


def test_a_stage_remembers_its_teacher_and_another_stage_does_not_inherit_it(tmp_path):
    save = checkpoint(tmp_path / "save", a_run())
    assert former_teacher("tiny", "pretrain_phase2", save, None) == ""
    remember_teacher(save, "ab" * 16)
    assert former_teacher("tiny", "pretrain_phase2", save, None) == "ab" * 16
    assert former_teacher("tiny", "pretrain_phase2", tmp_path / "new", save) == "ab" * 16
    assert former_teacher("tiny", "midtrain_phase1", tmp_path / "new", save) == ""
    assert former_teacher("tiny", "pretrain_phase2", tmp_path / "new", None) == ""
    assert Run.read(save) == replace(a_run(), teacher="ab" * 16)


def test_a_record_of_a_run_without_a_teacher_is_read_as_before(tmp_path):
    save = checkpoint(tmp_path / "save", a_run())
    fields = json.loads((save / RUN).read_text())
    del fields["teacher"]
    (save / RUN).write_text(json.dumps(fields))
    assert Run.read(save) == a_run()
