"""What a student asks of a teacher, what comes back, and who the teacher is. No torch here.

Letters: T tokens of one sequence, D its documents, R rows of targets (one for each token), d the
teacher's hidden size, V its vocabulary, k and m the ids of a sparse form.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.errors import TeacherError

FORMS: Final = ("hidden", "hidden_int8", "hybrid", "top_k")
ATTENTIONS: Final = ("documents", "full")
BOS_POLICIES: Final = ("as_is", "require", "inject")
STATE_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
}
"""How a teacher's states lie in memory; bfloat16, which numpy lacks, as its 16 bits."""

_SPEC: Final = struct.Struct("<BBBxIIQd")
_BF16_INF: Final = 0x7F80
_BF16_MINUS_INF: Final = 0xFF80
_BLOCK: Final = 2**17
"""Numbers that are looked at together: their copies stay in the cache of a core."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherIdentity:
    """Who answers; two replicas with the same fingerprint must give the same bits."""

    fingerprint: str
    """32 hex digits, BLAKE2b-128 of config, checksum of every tensor, tokenizer and `numerics`."""

    name: str
    """The model folder's name, for people."""

    tokenizer_sha256: str
    """64 hex digits over the pairs of id and token; the student's must be equal."""

    vocab_size: int
    """V: rows of the head, padded rows too; ids are below it."""

    hidden_size: int
    """d: width of a row of hidden states, and of a row of the head."""

    dtype: str
    """Type of hidden states and head: `bfloat16` or `float32`."""

    numerics: str
    """What else decides the bits: type, kind of device, attention kernel, versions."""

    bos_id: int | None = None
    """The id that begins a document; None where the tokenizer has none."""

    @property
    def short(self) -> bytes:
        """The first 8 bytes of the fingerprint, which every message carries."""
        return bytes.fromhex(self.fingerprint)[:8]

    @property
    def state_dtype(self) -> np.dtype[Any]:
        """How one number of a state or of the head lies in memory."""
        return STATE_DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetSpec:
    """In which form the targets of a sequence come, and what the teacher sees."""

    form: str = "hidden"
    """`hidden`: last states after the final norm, in the teacher's type, exact. `hidden_int8`: the
    same, rotated by a randomized Hadamard transform, as int8 with one scale for a row. `hybrid`:
    the k most likely ids and m systematic draws of the rest, unbiased. `top_k`: the k most likely
    ids and the mass of the rest in one bucket."""

    attention: str = "documents"
    """`documents`: a document sees itself alone and its positions start at 0. `full`: one causal
    sequence."""

    bos: str = "as_is"
    """`as_is`: the teacher sees the tokens. `require`: an error where a document does not begin
    with the teacher's BOS. `inject`: the teacher sees a BOS before each document that has none;
    the row of the extra token is dropped."""

    k: int = 0
    """Ids kept exactly; 0 unless the form is sparse."""

    m: int = 0
    """Draws from the rest; 0 unless the form is `hybrid`."""

    seed: int = 0
    """Of the rotation or the draws; 0 for the forms that have neither. Draws depend on the seed and
    the content key alone, so every replica makes the same ones."""

    temperature: float = 1.0
    """Of the distribution that a sparse form keeps; 1 for the others, whose logits the student
    rebuilds and divides itself."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("form", self.form, FORMS),
            ("attention", self.attention, ATTENTIONS),
            ("bos", self.bos, BOS_POLICIES),
        ):
            if value not in known:
                raise TeacherError(
                    f"target {name} is {value!r}; it must be one of {', '.join(known)}. Correct it."
                )
        if not (0 <= self.k < 2**16 and 0 <= self.m < 2**16 and 0 <= self.seed < 2**64):
            raise TeacherError(
                f"targets with k={self.k}, m={self.m}, seed={self.seed}: k and m must be below "
                "2^16, the seed below 2^64, and none below 0. Correct them."
            )
        is_plain = self.k == self.m == 0 and self.temperature == 1.0
        is_right = (
            1e-3 <= self.temperature <= 1e3
            and {
                "hidden": is_plain and self.seed == 0,
                "hidden_int8": is_plain,
                "hybrid": self.k > 0 and self.m > 0,
                "top_k": self.k > 0 and self.m == self.seed == 0,
            }[self.form]
        )
        if not is_right:
            raise TeacherError(
                f"targets of form {self.form} with k={self.k}, m={self.m}, seed={self.seed}, "
                f"temperature={self.temperature}: hidden takes none of them, hidden_int8 a seed, "
                "top_k a k, hybrid k and m (1 or more) and a seed; the last two also a temperature "
                "from 0.001 to 1000. Leave the others at 0, the temperature at 1."
            )

    @property
    def is_sparse(self) -> bool:
        """Whether the teacher must compute its head."""
        return self.form in ("hybrid", "top_k")

    def pack(self) -> bytes:
        """Give the 28 bytes that stand for this spec on the wire and in a content key."""
        return _SPEC.pack(
            FORMS.index(self.form),
            ATTENTIONS.index(self.attention),
            BOS_POLICIES.index(self.bos),
            self.k,
            self.m,
            self.seed,
            self.temperature,
        )

    @classmethod
    def unpack(cls, packed: bytes) -> "TargetSpec":
        """Read what `pack` wrote.

        Raises:
            TeacherError: wrong length, an unknown form, attention or policy, or numbers that do not
                fit the form.
        """
        if len(packed) != _SPEC.size:
            raise TeacherError(f"a spec has {len(packed)} bytes; it must have {_SPEC.size}.")
        form, attention, bos, k, m, seed, temperature = _SPEC.unpack(packed)
        if form >= len(FORMS) or attention >= len(ATTENTIONS) or bos >= len(BOS_POLICIES):
            raise TeacherError(
                f"a spec names form {form}, attention {attention}, policy {bos}; this version "
                f"knows {len(FORMS)}, {len(ATTENTIONS)} and {len(BOS_POLICIES)} of them. Run the "
                "same version on both sides."
            )
        return cls(
            form=FORMS[form],
            attention=ATTENTIONS[attention],
            bos=BOS_POLICIES[bos],
            k=k,
            m=m,
            seed=seed,
            temperature=temperature,
        )


SPEC_BYTES: Final = _SPEC.size


@dataclass(frozen=True, slots=True, eq=False)
class TargetRequest:
    """One sequence: the smallest thing that is asked for, computed, kept and sent again."""

    tokens: NDArray[np.int32]
    """(T,), little-endian: ids in [0, V)."""

    bounds: NDArray[np.int32]
    """(D + 1,), little-endian: 0, then the end of each document; the last is T."""

    spec: TargetSpec

    def __post_init__(self) -> None:
        for name in ("tokens", "bounds"):
            array = getattr(self, name)
            if array.dtype != np.dtype("<i4") or array.ndim != 1 or not array.flags.c_contiguous:
                raise TeacherError(
                    f"{name} of a request are {array.dtype} of shape {array.shape}; they must be "
                    "one contiguous row of little-endian int32. Convert them."
                )
        bounds, num_tokens = self.bounds, self.tokens.size
        if (
            num_tokens == 0
            or bounds.size < 2
            or bounds[0] != 0
            or bounds[-1] != num_tokens
            or not (bounds[1:] > bounds[:-1]).all()
        ):
            raise TeacherError(
                f"a request of {num_tokens} tokens has {bounds.size} bounds from "
                f"{bounds[0] if bounds.size else 'nothing'}; they must rise from 0 to the number "
                "of tokens, at least 1, without an empty document. Correct them."
            )
        if int(self.tokens.min()) < 0:
            raise TeacherError(
                f"a request holds the token {int(self.tokens.min())}; ids are 0 or more. Mask the "
                "padding in the loss, not in the tokens."
            )

    @property
    def rows(self) -> int:
        """R: one row of targets for each token, in order."""
        return self.tokens.size


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """One array of targets: its name, type and shape."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def layout(spec: TargetSpec, identity: TeacherIdentity, rows: int) -> tuple[ArrayLayout, ...]:
    """Say which arrays targets of this form have, in the order in which they are sent.

    hidden       hidden (R, d), the teacher's type (`TeacherIdentity.state_dtype`)
    hidden_int8  hidden (R, d) int8; scale (R,) fp32: rotated state = hidden * scale
    top_k        ids (R, k) int32, most likely first; weights (R, k) fp32, their probabilities;
                 tail (R,) fp32, probability of all other ids together; entropy (R,) fp32, in nats,
                 of the k + 1 events
    hybrid       ids (R, k + m) int32: behind the k likeliest, m systematic draws of the others,
                 repeated where drawn repeatedly; weights (R, k) fp32 of the former; tail (R,)
                 fp32, the weight of each draw; entropy (R,) fp32, in nats, of all V ids

    `ops.sparse_targets` defines the sparse forms; `forms.sparse_of` gives its tensors back.
    """
    fp32, int32 = np.dtype("<f4"), np.dtype("<i4")
    if spec.form == "hidden":
        return (ArrayLayout("hidden", identity.state_dtype, (rows, identity.hidden_size)),)
    if spec.form == "hidden_int8":
        return (
            ArrayLayout("hidden", np.dtype("i1"), (rows, identity.hidden_size)),
            ArrayLayout("scale", fp32, (rows,)),
        )
    return (
        ArrayLayout("ids", int32, (rows, spec.k + spec.m)),
        ArrayLayout("weights", fp32, (rows, spec.k)),
        ArrayLayout("tail", fp32, (rows,)),
        ArrayLayout("entropy", fp32, (rows,)),
    )


def bytes_per_token(spec: TargetSpec, identity: TeacherIdentity) -> int:
    """Count the bytes that one row of targets has on the wire."""
    return sum(array.num_bytes for array in layout(spec, identity, 1))


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What a teacher says of one sequence; row i belongs to token i (it predicts token i + 1)."""

    spec: TargetSpec
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)
    """By name, as `layout` says; they may be read-only views of received bytes."""

    @property
    def rows(self) -> int:
        """R."""
        return int(next(iter(self.arrays.values())).shape[0])

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def part(self, begin: int, end: int) -> "Targets":
        """Give the rows [begin, end) as views."""
        return Targets(self.spec, {name: array[begin:end] for name, array in self.arrays.items()})

    def check(self, identity: TeacherIdentity, rows: int) -> None:
        """Refuse targets that are not what the form says, or that hold what is no number.

        Raises:
            TeacherError: an array is missing or has another type or shape, an id is outside the
                vocabulary, a probability is none, or a number is not finite.
        """
        wanted = layout(self.spec, identity, rows)
        found = {name: (array.dtype, array.shape) for name, array in self.arrays.items()}
        must_be = {array.name: (array.dtype, array.shape) for array in wanted}
        if found != must_be:
            raise TeacherError(
                f"targets of form {self.spec.form} are {found}; they must be {must_be}. The "
                "replica answers wrongly; stop it."
            )
        for name, array in self.arrays.items():
            if not _is_sound(name, array, identity.vocab_size):
                raise TeacherError(
                    f"targets of form {self.spec.form} hold {name} that are not finite or outside "
                    "of their range; the teacher is broken or its weights are. Check the model "
                    "folder and the replica."
                )


def _is_sound(name: str, array: NDArray[Any], vocab_size: int) -> bool:
    if name == "ids":
        return int(array.min()) >= 0 and int(array.max()) < vocab_size
    if array.dtype == np.dtype("i1"):
        return True
    flat = array.reshape(-1)
    blocks = (flat[begin : begin + _BLOCK] for begin in range(0, flat.size, _BLOCK))
    if array.dtype == np.dtype("<u2"):
        # bfloat16: as signed integers the positive ones are the largest, as unsigned the negative
        # ones, and NaN and Inf, all bits of whose exponent are set, are the largest of their sign.
        return all(
            block.view("<i2").max() < _BF16_INF and block.max() < _BF16_MINUS_INF
            for block in blocks
        )
    # Sums of softmax terms in fp32 may leave their range by their rounding.
    high = 1.001 if name in ("weights", "tail") else np.finfo(np.float32).max
    low = -1e-3 if name in ("weights", "tail", "entropy", "scale") else -np.finfo(np.float32).max
    # A comparison with NaN, which is the least and the greatest of its block, is false.
    return all(low <= block.min() and block.max() <= high for block in blocks)
