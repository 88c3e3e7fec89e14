"""The teacher's forward: a causal model of `transformers` without its head, one request at a time.

Shapes: T tokens of a request, S what the teacher sees (T and the BOS that were put in), d hidden
size, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.engine import RequestError
from megatron_mlr1.teacher.forms import arrays_of, as_numpy
from megatron_mlr1.teacher.identity import DTYPES, identify, weight_files
from megatron_mlr1.teacher.spec import TargetRequest, Targets, TargetSpec, TeacherIdentity
from megatron_mlr1.teacher.wire import Code

PROBE_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class View:
    """What the teacher sees of a request."""

    tokens: NDArray[np.int32]
    """(S,): the request's tokens, with BOS put in where the policy says so."""
    bounds: NDArray[np.int32]
    """(D + 1,): the documents' bounds in `tokens`."""
    rows: NDArray[np.int64]
    """(T,): where the request's tokens stand in `tokens`."""


def view(request: TargetRequest, bos_id: int | None) -> View:
    """Apply the BOS policy.

    Raises:
        RequestError: the policy needs a BOS that the teacher or a document does not have.
    """
    tokens, bounds, policy = request.tokens, request.bounds, request.spec.bos
    if policy == "as_is":
        return View(tokens, bounds, np.arange(tokens.size))
    if bos_id is None:
        raise RequestError(
            Code.WRONG_REQUEST,
            f"BOS policy {policy}, and the teacher's tokenizer has no BOS. Ask with as_is.",
        )
    begins = bounds[:-1]
    lacks_bos = tokens[begins] != bos_id
    if policy == "require" and lacks_bos.any():
        begin = int(begins[np.argmax(lacks_bos)])
        raise RequestError(
            Code.WRONG_REQUEST,
            f"BOS policy require, and the document at token {begin} begins with id "
            f"{int(tokens[begin])}, not with the teacher's BOS {bos_id}. Put BOS into the corpus, "
            "or ask with inject.",
        )
    seen = np.insert(tokens, begins[lacks_bos], bos_id)
    put_in_before = np.concatenate([[0], np.cumsum(lacks_bos)])
    extra_by_token = np.repeat(put_in_before[1:], np.diff(bounds))
    return View(
        seen.astype(np.int32),
        (bounds + put_in_before).astype(np.int32),
        np.arange(tokens.size) + extra_by_token,
    )


class TeacherModel:
    """A frozen causal model on one device; an `engine.Engine`."""

    def __init__(
        self, identity: TeacherIdentity, model: Any, max_tokens: int, window: int | None
    ) -> None:
        """Take a loaded model; `load_teacher` makes one from a folder.

        Args:
            identity: of the folder, device and type.
            model: a causal model of `transformers`, on its device.
            max_tokens: positions that it knows.
            window: tokens that its narrowest attention sees; None where all see everything.
        """
        self.identity = identity
        self.max_tokens = max_tokens
        self.body = model.base_model
        self.head: Tensor = model.get_output_embeddings().weight.detach()
        """(V, d), on the device."""
        self._window = window
        self._device = self.head.device

    def refuse(self, request: TargetRequest) -> None:
        """See `Engine.refuse`."""
        highest = int(request.tokens.max())
        if highest >= self.identity.vocab_size:
            raise RequestError(
                Code.WRONG_REQUEST,
                f"a request holds the token {highest}; the teacher's vocabulary has "
                f"{self.identity.vocab_size}. Student and teacher must share one tokenizer.",
            )
        if request.spec.k + request.spec.m > self.identity.vocab_size:
            raise RequestError(
                Code.WRONG_REQUEST,
                f"k={request.spec.k} and m={request.spec.m} are asked for; the vocabulary has "
                f"{self.identity.vocab_size}. Ask for fewer.",
            )
        seen = view(request, self.identity.bos_id)
        if seen.tokens.size > self.max_tokens:
            raise RequestError(
                Code.WRONG_REQUEST,
                f"a request makes the teacher see {seen.tokens.size} tokens; it knows "
                f"{self.max_tokens} positions. Send shorter sequences.",
            )
        is_cut = request.spec.attention == "documents" and request.bounds.size > 2
        if is_cut and self._window is not None and seen.tokens.size > self._window:
            raise RequestError(
                Code.WRONG_REQUEST,
                f"several documents in {seen.tokens.size} tokens, and a layer of this teacher sees "
                f"{self._window} tokens only; one mask cannot say both. Send each document alone.",
            )

    def targets(self, request: TargetRequest, key: bytes) -> Targets:
        """See `Engine.targets`."""
        with torch.inference_mode():
            hidden_TD = self.hidden(request)
            if not bool(torch.isfinite(hidden_TD).all()):
                raise RequestError(
                    Code.NOT_FINITE,
                    "the teacher's states hold NaN or Inf; they are not sent. Check the weights, "
                    "or serve with --dtype float32.",
                )
            return Targets(request.spec, arrays_of(hidden_TD, self.head, request.spec, key))

    def hidden(self, request: TargetRequest) -> Tensor:
        """Compute the states after the final norm, (T, d), on the device."""
        seen = view(request, self.identity.bos_id)
        tokens_1S = self._on_device(seen.tokens.astype(np.int64))[None]
        mask, positions_1S = self._places(seen, request.spec)
        output_1SD = self.body(
            input_ids=tokens_1S, attention_mask=mask, position_ids=positions_1S, use_cache=False
        ).last_hidden_state
        hidden_SD: Tensor = output_1SD[0]
        if seen.rows.size == seen.tokens.size:
            return hidden_SD
        return hidden_SD[self._on_device(seen.rows)]

    def head_rows(self, begin: int, end: int) -> NDArray[Any]:
        """See `Engine.head_rows`."""
        return as_numpy(self.head[begin:end])

    def _places(self, seen: View, spec: TargetSpec) -> tuple[Tensor | None, Tensor]:
        """Give the mask (1, 1, S, S), True where a token looks, and the positions (1, S)."""
        positions_S = np.arange(seen.tokens.size)
        if spec.attention == "full" or seen.bounds.size == 2:
            # Without a mask SDPA takes its causal kernel.
            return None, self._on_device(positions_S)[None]
        lengths = np.diff(seen.bounds)
        document_S = self._on_device(np.repeat(np.arange(lengths.size), lengths))
        positions_S = positions_S - np.repeat(seen.bounds[:-1], lengths)
        mask_SS = (document_S[:, None] == document_S[None, :]).tril_()
        return mask_SS[None, None], self._on_device(positions_S)[None]

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def load_teacher(folder: Path, device: torch.device, dtype: str) -> TeacherModel:
    """Load a Hugging Face folder (*.safetensors alone, no remote code) for forward passes.

    Args:
        folder: config.json, *.safetensors, tokenizer.
        device: `cpu` or `cuda:N`.
        dtype: of weights and states, `bfloat16` or `float32`.

    Raises:
        TeacherError: the folder is no causal model, does not fit the device, or its logits are not
            the product of its head and its last states.
    """
    weight_files(folder)
    identity = identify(folder, device, dtype)
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        model = model.to(device).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TeacherError(
            f"{folder} cannot be loaded on {device} ({error}). It must be a causal model that this "
            "transformers knows, with SDPA attention, and fit into the device's memory."
        ) from error
    # transformers fills what it does not find with random numbers.
    lacking = sorted([*loading["missing_keys"], *loading["mismatched_keys"]], key=str)
    if lacking:
        raise TeacherError(
            f"{folder} holds no weights for {lacking[0]} and {len(lacking) - 1} others of this "
            "model, or in another shape. Config and weights are not of one model; copy both again."
        )
    config = model.config
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    window = min((size for size in windows if isinstance(size, int)), default=None)
    teacher = TeacherModel(identity, model, int(config.max_position_embeddings), window)
    _require_plain_head(model, teacher)
    return teacher


def _require_plain_head(model: Any, teacher: TeacherModel) -> None:
    """Refuse a model whose logits are no numbers, or not the product of head and causal states.

    A bias, a scale or a soft cap would be lost on the way to the student, unseen.
    """
    head = teacher.head
    ids = torch.arange(PROBE_TOKENS, device=head.device)[None] % head.shape[0]
    with torch.inference_mode():
        hidden, earlier = (
            teacher.body(input_ids=tokens, use_cache=False).last_hidden_state.float()
            for tokens in (ids, ids[:, :-1])
        )
        logits = model(input_ids=ids, use_cache=False).logits.float()
    if not bool(torch.isfinite(logits).all()):
        raise TeacherError(
            f"the weights of {teacher.identity.name} give NaN or Inf on a short text; a teacher's "
            "numbers must be finite. Check the weights (the model's page has their hashes), or "
            "serve with --dtype float32."
        )
    is_plain = head.shape == (teacher.identity.vocab_size, hidden.shape[-1])
    # bf16 keeps 8 bits.
    room = 2.0**-6 if head.dtype == torch.bfloat16 else 1e-4
    if not is_plain or not _are_close(hidden @ head.float().T, logits, room):
        raise TeacherError(
            f"the logits of {teacher.identity.name} are not the product of its head and its last "
            "states (a bias, a scale, a soft cap or another width is between); students could not "
            "rebuild them. Serve a model with a plain head."
        )
    if not _are_close(hidden[:, :-1], earlier, room):
        raise TeacherError(
            f"the states of {teacher.identity.name} depend on later tokens, so it tells what it is "
            "asked to predict. Serve a causal model."
        )


def _are_close(one: Tensor, other: Tensor, room: float) -> bool:
    return bool((one - other).abs().max() <= room * other.abs().max())
