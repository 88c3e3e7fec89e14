"""The replicas that a student knows: who is there, who may be asked, and who is gone."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Final

import zmq

from megatron_mlr1.errors import MachineError
from megatron_mlr1.teacher.connection import Address, Connection, Phase, Wanted
from megatron_mlr1.teacher.keys import KeyPair
from megatron_mlr1.teacher.pool import RESCAN_S, Pool
from megatron_mlr1.teacher.scheduling import Breaker, Load
from megatron_mlr1.teacher.spec import TeacherIdentity
from megatron_mlr1.teacher.tickets import Work

IO_THREADS: Final = 4
"""Replicas are spread over so many threads, which receive, and decrypt, at the same time."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StudentKeys:
    """What a student needs of a folder of keys."""

    pair: KeyPair
    """Its own."""
    pool_public: bytes
    """The pool's public key, 40 characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How a student comes to its teacher."""

    pool: Pool
    keys: StudentKeys | None = None
    """None reaches only a pool that has no keys either."""
    wanted: Wanted = field(default_factory=Wanted)
    """What the teacher must be."""
    student: str = ""
    """The student's name, for people who look at the replicas."""


@dataclass(slots=True)
class Flight:
    """One request on its way to one replica and back."""

    work: Work
    sent_at: float


class Replica:
    """A living replica, what it was asked, and how it does."""

    def __init__(self, connection: Connection) -> None:
        """Take a connection that has just been opened."""
        self.connection = connection
        self.load = Load()
        self.flights: dict[int, Flight] = {}
        """By the number of the request, the oldest first."""
        self.busy_until = 0.0

    @property
    def name(self) -> str:
        """Name this life of the replica."""
        return self.connection.address.replica

    def is_free(self, in_flight: int, now: float) -> bool:
        """Say whether it may be asked one thing more."""
        return (
            self.connection.phase is Phase.SERVING
            and len(self.flights) < in_flight
            and now >= self.busy_until
        )


class Replicas:
    """Keeps connections to all members of the pool; runs in the client's thread."""

    def __init__(self, access: Access, random: Random) -> None:
        """Take who may be asked; nothing is opened yet."""
        self._access, self._random = access, random
        self._context = zmq.Context(IO_THREADS)
        self._context.max_sockets = 16_384
        self._known: dict[str, Address] = {}
        self._breakers: dict[str, Breaker] = {}
        self._rescan_at = 0.0
        self.living: dict[str, Replica] = {}
        self.ejected: dict[str, str] = {}
        """Replicas that answered wrongly, and in what; they are not asked again."""
        self.reasons: dict[str, str] = {}
        """Why each replica that is not there is not, by its endpoint."""
        self.refused: set[str] = set()
        """Names of replicas that do not fit this student."""
        self.identity: TeacherIdentity | None = None
        """Of the first replica that answered; the others must be the same teacher."""

    @property
    def num_possible(self) -> int:
        """Count the replicas that answer or may yet: members that were not ejected, and guests."""
        return len((self._known.keys() | self.living.keys()) - self.ejected.keys())

    @property
    def all_refused(self) -> bool:
        """Whether the pool has members and none of them fits."""
        return bool(self._known) and self._known.keys() <= self.refused

    def remarks(self) -> str:
        """Say to a person why the pool may have fewer members than are expected."""
        try:
            return self._access.pool.remarks()
        except MachineError as error:
            return str(error)

    def serving(self) -> list[Replica]:
        """List the replicas that take requests."""
        return [one for one in self.living.values() if one.connection.phase is Phase.SERVING]

    def rescan(self, now: float) -> None:
        """Look at the members from time to time, and open what is new or may be tried again."""
        if now >= self._rescan_at:
            self._rescan_at = now + RESCAN_S
            self._look()
        for name, address in self._known.items():
            breaker = self._breakers.setdefault(address.endpoint, Breaker())
            if name not in self.living and name not in self.ejected and breaker.may_try(now):
                self._connect(address, now)

    def _look(self) -> None:
        try:
            leases = self._access.pool.leases()
        except MachineError as error:  # shared storage may hang for a while; connections live on
            _log.warning("the members of the pool cannot be read, the known ones stay: %s", error)
            return
        keys = self._access.keys
        public_key = None if keys is None else keys.pool_public
        # A replica that was started again at the same address left its old lease behind.
        newest = {lease.endpoint: lease for lease in sorted(leases, key=lambda one: one.expires)}
        self._known = {
            lease.name: Address(lease.name, lease.endpoint, public_key) for lease in newest.values()
        }
        for endpoint in self._breakers.keys() - newest.keys():
            del self._breakers[endpoint]
            self.reasons.pop(endpoint, None)

    def _connect(self, address: Address, now: float) -> None:
        access, wanted = self._access, self._access.wanted
        if self.identity is not None:
            identity = self.identity
            wanted = Wanted(
                fingerprint=identity.fingerprint,
                tokenizer_sha256=identity.tokenizer_sha256,
                vocab_size=identity.vocab_size,
            )
        keys = None if access.keys is None else access.keys.pair
        try:
            connection = Connection(self._context, address, keys, wanted, access.student, now)
        except zmq.ZMQError as error:
            self.reasons[address.endpoint] = f"no socket for it ({error}; ulimit -n must be higher)"
            self._breakers[address.endpoint].failed(now, self._random)
            return
        self.living[address.replica] = Replica(connection)

    def sockets(self) -> Iterator[tuple[zmq.Socket[bytes], Replica]]:
        """Give what must be watched, and whose it is."""
        for replica in self.living.values():
            for socket in replica.connection.sockets():
                yield socket, replica

    def greeted(self, replica: Replica) -> None:
        """Learn who answers; refuse a replica of another teacher than the first one's."""
        connection = replica.connection
        if connection.identity is None or connection.phase is not Phase.SERVING:
            return
        if self.identity is None:
            self.identity = connection.identity
        if connection.identity != self.identity:
            connection.is_refused = True
            connection.die(
                f"it serves the teacher {connection.identity.fingerprint}, the others serve "
                f"{self.identity.fingerprint}"
            )
            return
        self.refused.discard(replica.name)
        self.reasons.pop(connection.address.endpoint, None)

    def answered(self, replica: Replica) -> None:
        """Trust a replica that has given an answer."""
        breaker = self._breakers.get(replica.connection.address.endpoint)
        if breaker is not None:
            breaker.worked()

    def eject(self, name: str, reason: str) -> None:
        """Never ask a replica again, because its answers are wrong."""
        self.ejected[name] = reason
        _log.error("teacher replica %s is ejected: %s", name, reason)
        replica = self.living.get(name)
        if replica is not None:
            replica.connection.die(reason)

    def take_dead(self, now: float) -> list[Replica]:
        """Give those that have died since the last call; they are not among the living then."""
        dead = [one for one in self.living.values() if one.connection.is_dead]
        for replica in dead:
            del self.living[replica.name]
            address, reason = replica.connection.address, replica.connection.reason
            if replica.connection.identity is not None and replica.name not in self.ejected:
                _log.warning("teacher replica %s is gone: %s", replica.name, reason)
            self.reasons[address.endpoint] = reason
            if replica.connection.is_refused:
                self.refused.add(replica.name)
            self._breakers.setdefault(address.endpoint, Breaker()).failed(now, self._random)
        return dead

    def close(self) -> None:
        """Close all connections."""
        for replica in self.living.values():
            replica.connection.die("this student leaves")
        self.living.clear()
        self._context.term()
