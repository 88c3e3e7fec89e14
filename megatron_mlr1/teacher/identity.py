"""Who a teacher is: hashes of its folder, and what else decides the bits of its answers."""

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any, Final

import torch
import transformers
import xxhash
from safetensors import SafetensorError, safe_open

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.spec import TeacherIdentity

DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def identify(folder: Path, device: torch.device, dtype: str) -> TeacherIdentity:
    """Hash a Hugging Face folder; reads every weight once.

    Args:
        folder: config.json, *.safetensors and a tokenizer.
        device: where the teacher runs.
        dtype: of its weights and states, a key of `DTYPES`.

    Raises:
        TeacherError: something is missing in the folder or cannot be read.
    """
    config = _read_config(folder)
    tokenizer, bos_id = _tokenizer(folder, config)
    numerics = _numerics(device, dtype)
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(json.dumps(_without_notes(config), sort_keys=True).encode())
    for line in _tensor_lines(folder):
        hasher.update(line.encode())
    hasher.update(f"{tokenizer} {numerics}".encode())
    return TeacherIdentity(
        fingerprint=hasher.hexdigest(),
        name=folder.resolve().name,
        tokenizer_sha256=tokenizer,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        dtype=dtype,
        numerics=numerics,
        bos_id=bos_id,
    )


def tokenizer_sha256(folder: Path) -> str:
    """Hash what each id of a tokenizer stands for; 64 hex digits.

    Over the pairs of id and token in the order of the ids, added tokens too, and nothing else: the
    same tokenizer saved by another version, or with another chat template, has the same hash.

    Raises:
        TeacherError: the folder holds no tokenizer that `transformers` can read.
    """
    return _hash_tokens(load_tokenizer(folder).get_vocab())


def _hash_tokens(vocabulary: dict[str, int]) -> str:
    hasher = hashlib.sha256()
    for token, number in sorted(vocabulary.items(), key=lambda pair: (pair[1], pair[0])):
        hasher.update(json.dumps([number, token]).encode())
    return hasher.hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a Hugging Face folder; no remote code.

    Raises:
        TeacherError: the folder holds none that `transformers` can read.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"{folder} holds no tokenizer that can be read ({error}). Copy tokenizer.json and "
            "tokenizer_config.json of the model into it: ids are compared with the student's."
        ) from error


def _tokenizer(folder: Path, config: dict[str, Any]) -> tuple[str, int | None]:
    tokenizer = load_tokenizer(folder)
    bos = tokenizer.bos_token_id
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=-1)
    if highest >= config["vocab_size"]:
        raise TeacherError(
            f"{folder}: the tokenizer has the id {highest}, and config.json says vocab_size "
            f"{config['vocab_size']}. Tokenizer and model are not one; copy the folder again."
        )
    return _hash_tokens(vocabulary), bos if isinstance(bos, int) else config.get("bos_token_id")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        sizes = [config[name] for name in ("vocab_size", "hidden_size")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TeacherError(
            f"{path} is no config of a text model ({error!r}); --model must be a Hugging Face "
            "folder whose config.json has vocab_size and hidden_size. Name another folder."
        ) from error
    if any(type(size) is not int or size < 1 for size in sizes):
        raise TeacherError(f"{path}: vocab_size and hidden_size must be positive. Copy it again.")
    return dict(config)


def _without_notes(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out what does not decide an answer."""
    notes = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}
    return {name: value for name, value in config.items() if name not in notes}


def weight_files(folder: Path) -> list[Path]:
    """Name the files of the weights, by name.

    Raises:
        TeacherError: there is no folder, or none in it; weights in other formats are not read,
            because they can hold code.
    """
    if not os.path.isdir(folder):  # Path's raises where a name is too long
        raise TeacherError(f"{folder} is no folder; give the Hugging Face folder of the teacher.")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TeacherError(
            f"{folder} holds no *.safetensors file; other formats are not read. Convert the model "
            "with save_pretrained of transformers."
        )
    return files


def _tensor_lines(folder: Path) -> list[str]:
    """One line for each tensor: its name, type, shape and XXH3-128."""
    lines = []
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the file is no mapping
                    tensor = file.get_tensor(name)
                    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                    mark = xxhash.xxh3_128_hexdigest(flat.data)
                    lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {mark}\n")
        except (OSError, SafetensorError) as error:
            raise TeacherError(
                f"{path} cannot be read ({error}). Copy the file again; sizes and hashes stand on "
                "the model's page."
            ) from error
    return sorted(lines)


def _numerics(device: torch.device, dtype: str) -> str:
    """Name what may change the last bits of a result while the weights stay the same."""
    versions = f"torch-{torch.__version__} transformers-{transformers.__version__}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kind = f"{properties.name} sm{properties.major}{properties.minor} cuda-{torch.version.cuda}"
        return f"{dtype} sdpa {kind} {versions}"
    capability = torch.backends.cpu.get_cpu_capability()
    # The number of threads decides how a product of matrices is cut on the CPU.
    kind = f"{platform.machine()} {capability} threads-{torch.get_num_threads()}"
    return f"{dtype} sdpa {kind} {versions}"
