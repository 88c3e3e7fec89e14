"""What a supervisor serves and where: devices, addresses, keys, and which of them are refused."""

import re
import secrets
import socket
from dataclasses import dataclass
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any, Final

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.teacher.fp8_gate import Gate
from megatron_mlr1.teacher.keys import read_pool_keys
from megatron_mlr1.teacher.pool import HOST

_TCP: Final = re.compile(r"tcp://(\[[0-9A-Fa-f:]+\]|[^:\[\]]+):(\d+|\*)")
_ANY: Final = frozenset({"*", "0.0.0.0", "[::]", "[0:0:0:0:0:0:0:0]"})
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "lo", "[::1]"})


def parse_devices(words: str) -> tuple[str, ...]:
    """Read `0-7`, `0,2,5`, `cpu` or `cpu:3` (three replicas on the CPU) as torch's names.

    Raises:
        ConfigError: it is none of them, or names a device twice.
    """
    match = re.fullmatch(r"cpu(?::([1-9]\d{0,2}))?", words)
    if match:
        return ("cpu",) * int(match[1] or 1)
    numbers: list[int] = []
    for part in words.split(","):
        match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(
                f"--devices is {words!r}; it must be like 0-7, 0,2,5, cpu or cpu:3. Correct it."
            )
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--devices {words} names a device twice; each has one replica.")
    return tuple(f"cuda:{number}" for number in numbers)


def host_of(address: str) -> str | None:
    """Give the host or interface of a tcp address, None for ipc.

    Raises:
        ConfigError: it is no address.
    """
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        return None
    match = _TCP.fullmatch(address)
    if match is None or (match[2] != "*" and int(match[2]) > 65535):
        raise ConfigError(
            f"{address!r} is no address to bind; write tcp://INTERFACE:PORT, with * for a free "
            "port, or ipc://PATH."
        )
    return match[1]


def is_local(address: str) -> bool:
    """Whether only this machine can reach the address."""
    return host_of(address) in (_LOOPBACK | {None})


def pool_folder(words: str | None) -> Path | None:
    """Read the pool that replicas join.

    Raises:
        ConfigError: it is an address, or nothing.
    """
    if words is not None and (not words or "://" in words):
        raise ConfigError(
            f"--pool is {words!r}; replicas keep their leases in a folder that the students can "
            "read. Name a folder, or leave --pool out and tell the students the addresses of "
            "--bind, --teacher tcp://HOST:PORT,HOST:PORT."
        )
    return None if words is None else Path(words)


def address_of(address: str, index: int) -> str:
    """Give the address of the replica of that index: the next port, or the next path."""
    match = _TCP.fullmatch(address)
    if match is None:
        return f"{address}.{index}" if index else address
    port = match[2] if match[2] in ("*", "0") else str(int(match[2]) + index)
    return f"tcp://{match[1]}:{port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServePlan:
    """One machine's replicas."""

    model: Path
    """Hugging Face folder."""
    devices: tuple[str, ...]
    """One replica for each, by torch's names."""
    bind: str
    """Address of the first replica; the others take the next ports."""
    pool: Path | None
    """Folder of leases; None lets students name the addresses."""
    keys: Path | None
    """Folder of keys; None needs `insecure_loopback`."""
    dtype: str = "bfloat16"
    fp8: Gate | None = None
    """Products in FP8, behind this gate; None for products in `dtype`."""
    data_bind: str | None = None
    """First address of the open ports for targets."""
    advertise: str | None = None
    """Host that students connect to, where it is not the one of `bind`."""
    max_queue_tokens: int = 262_144
    held_gb: float = 2.0
    """Memory in 2^30 bytes for replies that wait, and as much again for kept results."""
    drain_s: float = 120.0
    insecure_loopback: bool = False
    bind_any: bool = False

    def __post_init__(self) -> None:
        self._refuse_addresses()
        self._refuse_strangers()
        if self.fp8 is not None and self.dtype != "bfloat16":
            raise ConfigError(
                f"--precision fp8 with --dtype {self.dtype}: FP8 products give bfloat16 states. "
                "Leave --dtype at bfloat16, or --precision out."
            )
        is_positive = self.max_queue_tokens > 0 and self.held_gb > 0 and self.drain_s > 0
        if not (is_positive and isfinite(self.held_gb) and isfinite(self.drain_s)):
            raise ConfigError(
                f"--max-queue-tokens is {self.max_queue_tokens}, --held-gb {self.held_gb}, "
                f"--drain-s {self.drain_s}; all must be positive and finite. Correct them."
            )

    def _refuse_addresses(self) -> None:
        for address in filter(None, (self.bind, self.data_bind)):
            if host_of(address) in _ANY and not (self.bind_any and self.advertise):
                raise ConfigError(
                    f"{address} listens on every interface of this machine. Name the interface "
                    "that the students reach, tcp://INTERFACE:PORT, or say --bind-any and the "
                    "host that they connect to, --advertise HOST."
                )
        if self.advertise is not None and not HOST.fullmatch(self.advertise):
            raise ConfigError(
                f"--advertise is {self.advertise!r}; it must be the host alone that students "
                "connect to: a name, an IPv4 address, or an IPv6 address in brackets. The ports "
                "are those of --bind. Correct it."
            )
        for one, other in combinations(addresses(self), 2):
            if one == other and not one.endswith((":*", ":0")):
                raise ConfigError(
                    f"{one} would be the address of two ports: each of {len(self.devices)} "
                    "replicas takes the next port behind --bind, and behind --open-data-bind. Set "
                    "the two further apart."
                )

    def _refuse_strangers(self) -> None:
        if self.keys is None and self.data_bind is not None:
            raise ConfigError(
                "--open-data-bind without --keys: the key that seals replies travels over the "
                "encrypted port, and there is none. Give --keys DIR."
            )
        if self.keys is None and not (self.insecure_loopback and is_local(self.bind)):
            raise ConfigError(
                f"serving {self.bind} without keys: everyone who reaches the address could use and "
                "exhaust the teacher. Make keys with tools/teacher_keys.py and give --keys DIR; on "
                "this machine alone (127.0.0.1 or ipc) --insecure-loopback does without."
            )
        if self.keys is not None:
            if self.insecure_loopback:
                raise ConfigError("--keys and --insecure-loopback contradict each other. Drop one.")
            read_pool_keys(self.keys)


def addresses(plan: ServePlan) -> list[str]:
    """Give all addresses that the replicas of a plan bind.

    Raises:
        ConfigError: a port is too high.
    """
    found = [
        address_of(first, index)
        for first in filter(None, (plan.bind, plan.data_bind))
        for index in range(len(plan.devices))
    ]
    for address in found:
        host_of(address)
    return found


def place_of(plan: ServePlan, index: int) -> dict[str, Any]:
    """Give what one replica's process must know, as JSON can hold it.

    Its name is another one each time: a replica that starts again is not the one that ended, and
    in containers neither the host's name nor the process's number tells two of them apart.

    Args:
        plan: of the machine.
        index: which of its devices.
    """
    return {
        "name": f"{socket.gethostname()}-{index}-{secrets.token_hex(4)}",
        "model": str(plan.model),
        "device": plan.devices[index],
        "dtype": plan.dtype,
        "fp8": None if plan.fp8 is None else _fields(plan.fp8),
        "bind": address_of(plan.bind, index),
        "data_bind": None if plan.data_bind is None else address_of(plan.data_bind, index),
        "advertise": plan.advertise,
        "keys": None if plan.keys is None else str(plan.keys),
        "pool": None if plan.pool is None else str(plan.pool),
        "max_queue_tokens": plan.max_queue_tokens,
        "held_bytes": int(plan.held_gb * 2**30),
        "drain_s": plan.drain_s,
    }


def _fields(gate: Gate) -> dict[str, Any]:
    return {
        "max_kl": gate.max_kl,
        "min_agreement": gate.min_agreement,
        "text": None if gate.text is None else str(gate.text),
    }


def read_gate(fields: dict[str, Any]) -> Gate:
    """Read what `place_of` wrote of a gate."""
    text = fields["text"]
    return Gate(**(fields | {"text": None if text is None else Path(text)}))
