import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zmq

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.audit import bits
from megatron_mlr1.teacher.backend import TeacherUnavailable
from megatron_mlr1.teacher.client import ClientOptions, ServedTeacher
from megatron_mlr1.teacher.connection import Wanted
from megatron_mlr1.teacher.dispatch import DispatchOptions
from megatron_mlr1.teacher.keys import read_pair, read_public
from megatron_mlr1.teacher.pool import AddressPool, FolderPool
from megatron_mlr1.teacher.replicas import Access, StudentKeys
from megatron_mlr1.teacher.spec import TargetSpec, bytes_per_token
from tests.support.teacher_pool import (
    client_of,
    learn,
    pool_of,
    reference,
    sequence,
    shared_nursery,
    wait_until,
)
from tests.support.teachers import PATIENCE_S, make_keys

FORMS = (
    TargetSpec(),
    TargetSpec(form="hidden_int8", seed=3),
    TargetSpec(form="top_k", k=4),
    TargetSpec(form="hybrid", k=4, m=4, seed=9),
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with pool_of(shared_nursery(), tmp_path_factory.mktemp("client") / "pool", 2) as pool:
        yield pool


@contextmanager
def student(access, **options):
    client = ServedTeacher(access, ClientOptions(**options))
    try:
        yield client
    finally:
        client.close()


def test_a_pool_answers_as_one_replica_does(pool):
    with client_of(pool) as client:
        assert learn(client, range(40)) == reference(40)
        assert client.statistics()["audits"] == 1
        assert client.identity == shared_nursery().identity


@pytest.mark.parametrize("spec", FORMS, ids=lambda spec: spec.form)
def test_every_form_comes_with_its_arrays(pool, spec):
    with client_of(pool, audit_every=1) as client:
        request = sequence(1, spec=spec)
        targets = client.fetch(client.submit(request, 0), PATIENCE_S)
        targets.check(client.identity, request.rows)
        assert targets.spec == spec
        assert targets.num_bytes == request.rows * bytes_per_token(spec, client.identity)


def test_a_ticket_is_ready_when_its_targets_are_there_and_is_fetched_once(pool):
    with client_of(pool) as client:
        ticket = client.submit(sequence(1), 0)
        wait_until(lambda: client.ready(ticket))
        client.fetch(ticket, 0)
        with pytest.raises(AssertionError, match="once"):
            client.fetch(ticket, 0)


def test_a_sequence_that_comes_twice_is_computed_once_and_delivered_twice(pool):
    with client_of(pool, audit_every=0) as client:
        tickets = [client.submit(sequence(7), deadline) for deadline in range(2)]
        one, other = (client.fetch(ticket, PATIENCE_S) for ticket in tickets)
        assert bits(one) == bits(other)
        assert client.statistics()["asked"] == 1


def test_the_head_comes_in_parts_and_whole(pool):
    with client_of(pool) as client:
        rows = client.identity.vocab_size
        whole = client.head(0, rows)
        assert whole.shape == (rows, client.identity.hidden_size)
        assert np.array_equal(client.head(100, 117), whole[100:117])
        with pytest.raises(TeacherError, match=f"it has {rows} rows"):
            client.head(0, rows + 1)


def test_the_buffer_is_never_exceeded_and_what_is_needed_first_comes_first(pool):
    one = 48 * bytes_per_token(TargetSpec(), shared_nursery().identity)
    options = DispatchOptions(buffer_bytes=3 * one)
    with client_of(pool, audit_every=0, dispatch=options) as client:
        # The last ones first: they fill the buffer, and must give way.
        tickets = {seed: client.submit(sequence(seed), seed) for seed in (29, 28, 27)}
        wait_until(lambda: all(client.ready(ticket) for ticket in tickets.values()))
        tickets |= {seed: client.submit(sequence(seed), seed) for seed in reversed(range(27))}
        hashes = tuple(bits(client.fetch(tickets[seed], PATIENCE_S)) for seed in range(30))
        assert hashes == reference(40)[:30]
        figures = client.statistics()
        assert figures["peak_bytes"] <= 3 * one
        assert figures["taken_back"] > 0
        wait_until(lambda: client.statistics()["in_flight_bytes"] == 0)


def test_dropped_tickets_leave_nothing_behind(pool):
    with client_of(pool) as client:
        tickets = [client.submit(sequence(seed), seed) for seed in range(20)]
        for ticket in tickets:
            client.drop(ticket)
        wait_until(lambda: client.statistics()["in_flight_bytes"] == 0)
        assert learn(client, range(5)) == reference(40)[:5]


def test_two_students_share_a_pool(pool):
    with client_of(pool) as one, client_of(pool) as other:
        assert learn(one, range(20)) == learn(other, range(20)) == reference(40)[:20]


def test_a_full_queue_only_takes_longer(tmp_path):
    how = {"max_queue_tokens": 50, "delay_s": 0.02}
    with (
        pool_of(shared_nursery(), tmp_path / "pool", 1, **how) as pool,
        client_of(pool, dispatch=DispatchOptions(in_flight=8)) as client,
    ):
        assert learn(client, range(20)) == reference(40)[:20]
        assert client.statistics()["busy"] > 0


def test_targets_come_over_an_open_port_too(tmp_path):
    how = {"data_bind": "tcp://127.0.0.1:*"}
    with pool_of(shared_nursery(), tmp_path / "pool", 2, **how) as pool, client_of(pool) as client:
        assert learn(client, range(20)) == reference(40)[:20]


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda: sequence(1, length=600), "takes 512|knows 512"),
        (lambda: sequence(1, spec=TargetSpec(bos="require")), "BOS"),
    ],
    ids=["too long", "without BOS"],
)
def test_a_request_that_no_replica_can_answer_is_an_error(pool, request_of, message):
    with client_of(pool, audit_every=0) as client:
        ticket = client.submit(request_of(), 0)
        with pytest.raises(TeacherError, match=message):
            client.fetch(ticket, PATIENCE_S)


def test_a_token_outside_of_the_vocabulary_is_refused_before_it_is_sent(pool):
    request = sequence(1)
    request.tokens[5] = 256
    with client_of(pool) as client, pytest.raises(TeacherError, match="256 ids"):
        client.submit(request, 0)


def test_a_buffer_that_is_too_small_is_refused(pool):
    options = DispatchOptions(buffer_bytes=1000)
    with client_of(pool, dispatch=options) as client, pytest.raises(TeacherError, match="buffer"):
        client.submit(sequence(1), 0)


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(fingerprint="0" * 32),
        Wanted(tokenizer_sha256="0" * 64),
        Wanted(vocab_size=128_256),
    ],
    ids=["fingerprint", "tokenizer", "vocabulary"],
)
def test_another_teacher_than_the_wanted_one_is_refused_at_once(pool, wanted):
    access = Access(pool=FolderPool(pool.folder), wanted=wanted)
    with pytest.raises(TeacherError, match="wants") as caught:
        ServedTeacher(access, ClientOptions())
    assert not isinstance(caught.value, TeacherUnavailable)


def test_no_replica_at_the_start_is_an_error_that_names_the_addresses():
    nobody = Access(pool=AddressPool(("tcp://127.0.0.1:9",)))
    with pytest.raises(TeacherUnavailable, match=r"127\.0\.0\.1:9: nobody listens"):
        ServedTeacher(nobody, ClientOptions(start_timeout_s=2))


LIMITED = """
import os, resource, sys
from megatron_mlr1.teacher.client import ClientOptions, ServedTeacher
from megatron_mlr1.teacher.pool import AddressPool
from megatron_mlr1.teacher.replicas import Access
from tests.support.teacher_pool import sequence
asked = sequence(1)
# Beyond those open by now ZeroMQ's threads need 13, and each of the eight replicas four or five.
limit = len(os.listdir("/proc/self/fd")) + 28
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
access = Access(pool=AddressPool(tuple(sys.argv[1:])))
client = ServedTeacher(access, ClientOptions())
ticket = client.submit(asked, 0)
print(client.fetch(ticket, 60).rows == asked.rows)
client.close()
"""


def test_replicas_beyond_the_limit_of_open_files_do_not_stop_the_others(pool, pytestconfig):
    ports = [lease.endpoint.rsplit(":", 1)[1] for lease in FolderPool(pool.folder).leases()]
    hosts = ("127.0.0.1", "localhost", "127.0.0.2", "127.0.0.3")
    served = [f"tcp://{host}:{port}" for host in hosts for port in ports]
    words = [sys.executable, "-c", LIMITED, *served]
    done = subprocess.run(words, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert done.stdout.strip() == "True", done.stderr


def test_targets_that_do_not_come_leave_the_ticket_good(tmp_path):
    with pool_of(shared_nursery(), tmp_path / "pool", 1) as pool, client_of(pool) as client:
        pool.signal("r0", signal.SIGSTOP)
        ticket = client.submit(sequence(1), 0)
        with pytest.raises(TeacherUnavailable, match="no replica gave"):
            client.fetch(ticket, 0.1)
        pool.signal("r0", signal.SIGCONT)
        assert bits(client.fetch(ticket, PATIENCE_S)) == reference(40)[1]


def test_only_a_student_with_the_right_keys_is_answered(tmp_path):
    pool_keys, own = make_keys(tmp_path / "keys")
    how = {"keys": str(tmp_path / "keys")}
    with pool_of(shared_nursery(), tmp_path / "pool", 1, **how) as pool:
        public = read_public(Path(tmp_path / "keys" / "pool.key"))
        assert public == pool_keys.pair.public
        right = StudentKeys(read_pair(tmp_path / "keys/students/student.key_secret"), public)
        assert right.pair == own
        folder = FolderPool(pool.folder)
        with student(Access(pool=folder, keys=right)) as client:
            assert learn(client, range(5)) == reference(40)[:5]
        _, stranger = make_keys(tmp_path / "others")
        for wrong in (
            StudentKeys(stranger, public),
            StudentKeys(own, zmq.curve_keypair()[0]),
            None,
        ):
            with pytest.raises(TeacherError, match="no teacher answers"):
                ServedTeacher(Access(pool=folder, keys=wrong), ClientOptions(start_timeout_s=4))
