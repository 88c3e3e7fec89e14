import json

import pytest

from megatron_mlr1.errors import ConfigError, TeacherError
from megatron_mlr1.teacher.fp8_gate import Gate
from megatron_mlr1.teacher.serving import (
    ServePlan,
    address_of,
    host_of,
    is_local,
    parse_devices,
    place_of,
    pool_folder,
    read_gate,
)
from tests.support.teachers import make_keys

LOCAL = {"bind": "tcp://127.0.0.1:5555", "insecure_loopback": True}


def plan(tmp_path, **changes):
    fields = {"model": tmp_path, "devices": ("cpu",), "pool": None, "keys": None}
    return ServePlan(**(fields | changes))


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        ("cpu", ("cpu",)),
        ("cpu:3", ("cpu",) * 3),
        ("0", ("cuda:0",)),
        ("0-2,5", ("cuda:0", "cuda:1", "cuda:2", "cuda:5")),
    ],
)
def test_devices_are_read_by_torchs_names(words, devices):
    assert parse_devices(words) == devices


@pytest.mark.parametrize("words", ["", "gpu", "cpu:0", "3-1", "0,0", "0-2,1", "1,", "-1", "0..7"])
def test_devices_that_are_none_are_refused(words):
    with pytest.raises(ConfigError, match="--devices"):
        parse_devices(words)


def test_every_replica_has_an_address_of_its_own():
    assert address_of("tcp://eth0:5555", 3) == "tcp://eth0:5558"
    assert address_of("tcp://eth0:*", 3) == "tcp://eth0:*"
    assert address_of("ipc:///run/teacher", 0) == "ipc:///run/teacher"
    assert address_of("ipc:///run/teacher", 2) == "ipc:///run/teacher.2"


@pytest.mark.parametrize("address", ["", "eth0:5555", "tcp://eth0", "tcp://a:b:1", "tcp://a:70000"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="address"):
        host_of(address)


def test_ports_that_would_be_taken_twice_are_refused(tmp_path):
    make_keys(tmp_path / "keys")
    four = {"devices": ("cpu",) * 4, "keys": tmp_path / "keys", "bind": "tcp://lo:5600"}
    with pytest.raises(ConfigError, match=r"tcp://lo:5602 would be the address of two ports"):
        plan(tmp_path, data_bind="tcp://lo:5602", **four)
    plan(tmp_path, data_bind="tcp://lo:5604", **four)
    plan(tmp_path, data_bind="tcp://lo:*", **(four | {"bind": "tcp://lo:*"}))
    with pytest.raises(ConfigError, match="tcp://lo:65536"):
        plan(tmp_path, **(four | {"bind": "tcp://lo:65534"}))


@pytest.mark.parametrize("host", ["", "::1", "host:5600", "tcp://host", "a b", "[host]"])
def test_a_host_that_is_none_is_not_advertised(tmp_path, host):
    with pytest.raises(ConfigError, match="--advertise"):
        plan(tmp_path, **LOCAL, advertise=host)
    for good in ("host.domain", "10.0.0.1", "[fe80::1]"):
        plan(tmp_path, **LOCAL, advertise=good)


@pytest.mark.parametrize("words", ["", "tcp://10.0.0.1:5600", "tcp://a:1,b:2"])
def test_replicas_join_a_folder_alone(words):
    with pytest.raises(ConfigError, match="Name a folder"):
        pool_folder(words)


def test_only_loopback_and_ipc_are_this_machine_alone():
    local = ("tcp://127.0.0.1:1", "tcp://localhost:1", "tcp://lo:1", "tcp://[::1]:1", "ipc:///x")
    assert all(map(is_local, local))
    assert not any(map(is_local, ("tcp://eth0:1", "tcp://10.0.0.1:1", "tcp://127.0.0.2.example:1")))


@pytest.mark.parametrize("address", ["tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://[::]:5555"])
def test_every_interface_at_once_is_refused_unless_it_is_asked_for(tmp_path, address):
    make_keys(tmp_path / "keys")
    keys = tmp_path / "keys"
    for flags in ({}, {"bind_any": True}, {"advertise": "host"}):
        with pytest.raises(ConfigError, match="every interface"):
            plan(tmp_path, bind=address, keys=keys, **flags)
        with pytest.raises(ConfigError, match="every interface"):
            plan(tmp_path, bind="tcp://eth0:1", data_bind=address, keys=keys, **flags)
    plan(tmp_path, bind=address, keys=keys, bind_any=True, advertise="host")


@pytest.mark.parametrize(
    "fields",
    [
        {"bind": "tcp://127.0.0.1:5555"},
        {"bind": "tcp://eth0:5555", "insecure_loopback": True},
        {"bind": "tcp://10.0.0.1:5555"},
    ],
    ids=str,
)
def test_serving_without_keys_is_refused_but_on_this_machine_when_asked_for(tmp_path, fields):
    with pytest.raises(ConfigError, match="without keys"):
        plan(tmp_path, **fields)
    plan(tmp_path, **LOCAL)
    plan(tmp_path, bind=f"ipc://{tmp_path}/x", insecure_loopback=True)


def test_flags_that_contradict_each_other_are_refused(tmp_path):
    make_keys(tmp_path / "keys")
    with pytest.raises(ConfigError, match="contradict"):
        plan(tmp_path, **LOCAL, keys=tmp_path / "keys")
    with pytest.raises(ConfigError, match="open-data-bind"):
        plan(tmp_path, **LOCAL, data_bind="tcp://127.0.0.1:6000")


@pytest.mark.parametrize(
    "limits",
    [
        {"max_queue_tokens": 0},
        {"held_gb": 0.0},
        {"held_gb": float("nan")},
        {"held_gb": float("inf")},
        {"drain_s": -1.0},
        {"drain_s": float("inf")},
    ],
    ids=str,
)
def test_limits_that_are_none_are_refused(tmp_path, limits):
    with pytest.raises(ConfigError, match="positive"):
        plan(tmp_path, **LOCAL, **limits)


def test_keys_are_looked_at_before_anything_starts(tmp_path):
    with pytest.raises(TeacherError):
        plan(tmp_path, bind="tcp://eth0:1", keys=tmp_path / "missing")


def test_a_replica_that_starts_again_has_another_name(tmp_path):
    served = plan(tmp_path, **LOCAL)
    assert place_of(served, 0)["name"] != place_of(served, 0)["name"]


@pytest.mark.parametrize("text", [None, "rows.txt"])
def test_the_gate_of_fp8_comes_to_the_replica_as_it_was(tmp_path, text):
    gate = Gate(max_kl=0.01, min_agreement=0.9, text=None if text is None else tmp_path / text)
    place = json.loads(json.dumps(place_of(plan(tmp_path, fp8=gate, **LOCAL), 0)))
    assert read_gate(place["fp8"]) == gate
    assert place_of(plan(tmp_path, **LOCAL), 0)["fp8"] is None


def test_fp8_gives_bfloat16_alone(tmp_path):
    with pytest.raises(ConfigError, match="--dtype float32"):
        plan(tmp_path, fp8=Gate(), dtype="float32", **LOCAL)


@pytest.mark.parametrize(
    "limits", [{"max_kl": 0.0}, {"max_kl": float("nan")}, {"min_agreement": 1.5}], ids=str
)
def test_a_gate_that_cannot_be_is_refused(limits):
    with pytest.raises(ConfigError, match="--fp8-max-kl"):
        Gate(**limits)
