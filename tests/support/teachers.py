"""Small teachers made on the spot, replicas that serve them, and a student that speaks raw wire."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from megatron_mlr1.teacher import payloads
from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.engine import Engine, RequestError
from megatron_mlr1.teacher.keys import KeyPair, PoolKeys, make_pair, read_pair, read_pool_keys
from megatron_mlr1.teacher.replica import Replica, ReplicaOptions
from megatron_mlr1.teacher.spec import TargetRequest, Targets, TargetSpec, TeacherIdentity
from megatron_mlr1.teacher.wire import NO_TEACHER, Code, Kind, Limits, Message, decode, encode

VOCABULARY = 256
BOS = 1
MANY_BYTES = 2**30
PATIENCE_S = 60
"""What comes is waited for so long; a busy machine must not end a test."""


def make_teacher_folder(
    folder: Path, *, seed: int = 0, tokenizer: Path | None = None, **changes: Any
) -> Path:
    """Write a Llama of two layers, and give its folder.

    Its tokenizer has 256 words; another folder's is copied where one is given.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    if tokenizer is not None:
        shared = AutoTokenizer.from_pretrained(tokenizer)
        sizes |= {"vocab_size": len(shared), "bos_token_id": None, "eos_token_id": None}
        shared.save_pretrained(folder)
    else:
        _save_words(folder)
    LlamaForCausalLM(LlamaConfig(**(sizes | changes))).save_pretrained(folder)
    return folder


def _save_words(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": BOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<pad>"
    ).save_pretrained(folder)


def make_request(lengths: tuple[int, ...], spec: TargetSpec, seed: int = 0) -> TargetRequest:
    """Make a request of random tokens in documents of these lengths, without BOS among them."""
    tokens = np.random.default_rng(seed).integers(2, VOCABULARY, sum(lengths)).astype("<i4")
    return TargetRequest(tokens, np.cumsum([0, *lengths]).astype("<i4"), spec)


def make_keys(folder: Path) -> tuple[PoolKeys, KeyPair]:
    """Make a pool's keys and those of one student it knows."""
    make_pair(folder, "pool")
    secret = make_pair(folder / "students", "student")
    return read_pool_keys(folder), read_pair(secret)


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[Replica]:
    """Run a replica in a thread; drain it at the end, and raise what it raised."""
    options = {"name": "replica", "bind": "tcp://127.0.0.1:*"} | options
    replica = Replica(engine, ReplicaOptions(**options))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            replica.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield replica
    finally:
        replica.drain()
        thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the replica did not drain"
    if errors:
        raise errors[0]


class TableTeacher:
    """A teacher whose state of a token is a row of a table: an engine that needs no torch."""

    max_tokens = 512

    def __init__(self, seed: int = 0, hidden_size: int = 8) -> None:
        random = np.random.default_rng(seed)
        self.table = random.standard_normal((VOCABULARY, hidden_size)).astype("<f4")
        self.head = random.standard_normal((VOCABULARY, hidden_size)).astype("<f4")
        self.identity = TeacherIdentity(
            fingerprint=f"{seed:032x}",
            name="table",
            tokenizer_sha256="ab" * 32,
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            dtype="float32",
            numerics="numpy",
            bos_id=BOS,
        )
        self.gate = threading.Event()
        """Computing waits for it."""
        self.gate.set()
        self.answered: list[bytes] = []
        """Content keys in the order in which they were computed."""

    def refuse(self, request: TargetRequest) -> None:
        if request.tokens.max() >= VOCABULARY:
            raise RequestError(Code.WRONG_REQUEST, "a token outside the vocabulary")
        if request.spec.form != "hidden":
            raise RequestError(Code.WRONG_REQUEST, "a table has hidden states alone")

    def targets(self, request: TargetRequest, key: bytes) -> Targets:
        assert self.gate.wait(PATIENCE_S), "the test never opened the gate"
        self.answered.append(key)
        hidden = self.table[request.tokens]
        if not np.isfinite(hidden).all():
            raise RequestError(Code.NOT_FINITE, "a row of the table is not finite")
        return Targets(request.spec, {"hidden": hidden})

    def head_rows(self, begin: int, end: int) -> Any:
        return self.head[begin:end]


class RawStudent:
    """Sends and receives messages as they are, so that tests can also send wrong ones."""

    def __init__(
        self,
        endpoint: str,
        keys: KeyPair | None = None,
        pool_key: bytes | None = None,
    ) -> None:
        self._context = zmq.Context()
        self.socket = self._open()
        if keys is not None:
            self.socket.curve_publickey, self.socket.curve_secretkey = keys.public, keys.secret
            self.socket.curve_serverkey = pool_key
        self.socket.connect(endpoint)
        self.limits = Limits()
        self.identity: TeacherIdentity | None = None
        self.data_socket: zmq.Socket[bytes] | None = None
        self.session_key: bytes | None = None

    def _open(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.rcvtimeo = PATIENCE_S * 1000
        return socket

    def __enter__(self) -> "RawStudent":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(0)

    def send(self, kind: Kind, *frames: Any, **fields: Any) -> None:
        teacher = NO_TEACHER if self.identity is None else self.identity.short
        message = Message(kind=kind, frames=frames, **({"teacher": teacher} | fields))
        self.socket.send_multipart(encode(message))

    def receive(self) -> Message:
        return decode(self.socket.recv_multipart(), self.limits)

    def hears(self, within_s: float = 0.3) -> bool:
        """Say whether anything comes."""
        return self.socket.poll(within_s * 1000) != 0

    def receive_data(self) -> Message:
        assert self.data_socket is not None
        return decode(self.data_socket.recv_multipart(), self.limits, self.session_key)

    def greet(self, credit: int = MANY_BYTES, **wanted: Any) -> None:
        fields = {"student": "test", "fingerprint": "", "tokenizer_sha256": "", "vocab_size": 0}
        self.send(Kind.HELLO, payloads.text_frame(fields | wanted), value=credit)

    def hello(self, credit: int = MANY_BYTES, **wanted: Any) -> Message:
        self.greet(credit, **wanted)
        answer = self.receive()
        if answer.kind is Kind.HELLO_ACK:
            ack = payloads.read_fields(answer, payloads.HELLO_ACK_FIELDS)
            self.identity = payloads.read_identity(ack)
        return answer

    def attach(self, ack: Message) -> None:
        fields = payloads.read_fields(ack, payloads.HELLO_ACK_FIELDS)
        self.session_key = bytes.fromhex(fields["session_key"])
        self.data_socket = self._open()
        self.data_socket.connect(fields["data_endpoint"])
        message = Message(kind=Kind.ATTACH, frames=(bytes.fromhex(fields["session"]),))
        self.data_socket.send_multipart(encode(message, self.session_key))
        assert self.receive_data().kind is Kind.ATTACH

    def submit(
        self,
        request: TargetRequest,
        number: int = 1,
        deadline_ms: int = 1000,
        credit: int = MANY_BYTES,
    ) -> bytes:
        assert self.identity is not None
        key = content_key(self.identity, request)
        frames = payloads.submit_frames(request, deadline_ms)
        self.send(Kind.SUBMIT, *frames, request=number, key=key, value=credit)
        return key

    def stats(self) -> dict[str, Any]:
        self.send(Kind.STATS)
        return payloads.read_fields(self.receive(), payloads.STATS_FIELDS)
