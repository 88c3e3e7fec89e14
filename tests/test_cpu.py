"""CPU mode: what it answers, when it refuses, and that it leaves a process with CUDA alone."""

import json
import os
import subprocess
import sys

import pytest

from megatron_mlr1 import cpu

FACTS = """
import json, sys, torch
from megatron_mlr1 import cpu
before = torch.cuda.is_available()
first, second = cpu.activate(), cpu.activate()
zeros = torch.zeros(3, device="cuda")
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    event = torch.cuda.Event(enable_timing=True)
    event.record()
later = stream.record_event()
state = torch.cuda.get_rng_state()
drawn = torch.rand(2, device="cuda:0")
torch.cuda.set_rng_state(state)
same_draw = torch.equal(drawn, torch.rand(2))
print(json.dumps({
    "before": before, "first": first, "second": second, "active": cpu.is_active(),
    "devices": sorted({str(x.device) for x in (
        zeros, zeros.cuda(), zeros.to("cuda:0"), zeros.to(torch.device("cuda")), zeros.to(0),
        torch.empty(1, device=torch.cuda.current_device()), torch.ones(2).pin_memory(),
        torch.tensor([1], device="cpu", pin_memory=True), zeros.new_empty(2, device="cuda"),
        torch.cuda.FloatTensor([1.0]), torch.nn.Linear(2, 2).cuda().weight)}),
    "type": zeros.type(),
    "cast": str(zeros.type("torch.cuda.HalfTensor").dtype),
    "dtype_kept": str(zeros.to(torch.float64).dtype),
    "count": torch.cuda.device_count(),
    "named": str(torch.device(f"cuda:{torch.cuda.current_device()}")),
    "elapsed": event.elapsed_time(later) >= 0,
    "same_draw": same_draw,
    "memory": torch.cuda.memory_allocated() > 0,
    "statistics": torch.cuda.memory_stats()["allocation.all.current"],
    "flags": len(cpu.FLAGS) > 0,
}))
"""


@pytest.fixture(scope="module")
def facts():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FACTS], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout) | {"said": done.stderr}


def test_it_says_so_in_one_line(facts):
    assert facts["said"].count("CPU mode") == 1


def test_a_second_call_changes_nothing(facts):
    assert (facts["before"], facts["first"], facts["second"]) == (False, True, True)
    assert facts["active"]


def test_every_way_to_ask_for_a_cuda_device_gives_the_cpu(facts):
    assert facts["devices"] == ["cpu"]


def test_types_are_named_as_the_engine_compares_them(facts):
    assert facts["type"] == "torch.cuda.FloatTensor"
    assert facts["cast"] == "torch.float16"
    assert facts["dtype_kept"] == "torch.float64"


def test_there_is_a_device_for_each_process_of_the_machine(facts):
    assert facts["count"] == 2
    assert facts["named"] == "cuda:0"


def test_streams_events_and_random_states_work(facts):
    assert facts["elapsed"]
    assert facts["same_draw"]


def test_memory_is_that_of_the_process(facts):
    assert facts["memory"]
    assert facts["statistics"] == 0


BROKEN = """
import sys, torch
from pathlib import Path
from megatron_mlr1 import cpu
from megatron_mlr1.errors import MachineError
torch.cuda.is_available = lambda: False  # a machine whose driver fails
try:
    cpu.activate(device_files=(Path(sys.argv[1]),))
except MachineError as error:
    print(error, cpu.is_active())
"""


def test_a_device_without_a_driver_is_an_error(tmp_path):
    device = tmp_path / "nvidia0"
    device.touch()
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(device)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "has an NVIDIA device" in done.stdout
    assert "mend the driver" in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_device_that_is_hidden_is_no_fault(tmp_path, monkeypatch):
    device = tmp_path / "nvidia0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cpu.device_fault((device,)) is None
    device.touch()
    assert str(device) in str(cpu.device_fault((device,)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cpu.device_fault((device,)) is None


@pytest.mark.gpu
def test_it_does_nothing_where_cuda_works():
    program = (
        "import torch; before = dict(vars(torch.cuda)); from megatron_mlr1 import cpu; "
        "assert not cpu.activate() and not cpu.is_active(); assert vars(torch.cuda) == before; "
        "assert torch.zeros(1, device='cuda').is_cuda"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
