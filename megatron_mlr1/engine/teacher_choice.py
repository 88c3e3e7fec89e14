"""From the flags of a run to what the client of a teacher must know."""

from argparse import Namespace
from pathlib import Path

from megatron_mlr1 import cpu
from megatron_mlr1.distillation_options import DistillationOptions
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.ops.linear_kl import Objective
from megatron_mlr1.teacher.addresses import TeacherOptions
from megatron_mlr1.teacher.agreement import Policy
from megatron_mlr1.teacher.client import ClientOptions
from megatron_mlr1.teacher.connection import Wanted
from megatron_mlr1.teacher.dispatch import DispatchOptions
from megatron_mlr1.teacher.spec import TargetSpec

START_TIMEOUT_S = 60.0
"""The first replica must have answered by then, or in the time of --kd-hold-limit if shorter."""


def target_spec(args: Namespace, options: DistillationOptions) -> TargetSpec:
    """Say in which form targets are asked for, and what the teacher sees of a sequence.

    Args:
        args: the engine's, validated.
        options: of the run.
    """
    is_sparse = options.form in ("hybrid", "top_k")
    return TargetSpec(
        form=options.form,
        attention="documents" if args.dataloader_inter_document_masking else "full",
        bos=options.bos,
        k=options.k,
        m=options.m,
        temperature=options.temperature if is_sparse else 1.0,
    )


def objective(options: DistillationOptions) -> Objective:
    """Say how the student is to follow the teacher."""
    return Objective(
        direction=options.divergence, temperature=options.temperature, beta=options.beta
    )


def policy(options: DistillationOptions) -> Policy:
    """Say what all ranks do when targets do not come."""
    if options.without_teacher == "hold":
        return Policy(limit_s=options.hold_limit_s)
    return Policy(
        limit_s=options.hold_limit_s,
        ce_only_after_s=options.ce_only_after_s,
        ce_only_steps=options.ce_only_budget,
    )


def teacher_options(
    args: Namespace, options: DistillationOptions, *, fingerprint: str, student: str
) -> TeacherOptions:
    """Say which teacher this process asks, and by which keys.

    Args:
        args: the engine's, validated.
        options: of the run; it has a teacher.
        fingerprint: of the teacher that the run learned from before, or "" where any will do.
        student: this process's name, for people who look at the replicas.

    Raises:
        ConfigError: no tokenizer to compare with the teacher's, or keys that are not one student's.
        TeacherError: the tokenizer cannot be read.
    """
    assert options.teacher is not None, "asked only where there is a teacher"
    key, pool_key = (None, None) if options.keys is None else find_keys(options.keys)
    return TeacherOptions(
        address=options.teacher,
        spec=target_spec(args, options),
        wanted=Wanted(fingerprint=fingerprint, tokenizer_sha256=_tokenizer(args, options.teacher)),
        student=student,
        key=key,
        pool_key=pool_key,
        device="cpu" if cpu.is_active() else _device(),
        dtype="bfloat16" if args.bf16 else "float32",
        client=ClientOptions(
            dispatch=DispatchOptions(buffer_bytes=int(options.buffer_gb * 1e9)),
            audit_every=options.audit_every,
            start_timeout_s=min(START_TIMEOUT_S, options.hold_limit_s),
            pinned=not cpu.is_active(),
        ),
    )


def _device() -> str:
    import torch

    return f"cuda:{torch.cuda.current_device()}"


def _tokenizer(args: Namespace, teacher: str) -> str:
    """Hash the student's tokenizer; "" for the teacher that is none."""
    if teacher.startswith("null:"):
        return ""
    if args.tokenizer_type != "HuggingFaceTokenizer":
        raise ConfigError(
            f"--teacher compares the student's tokenizer with the teacher's, and --tokenizer-type "
            f"is {args.tokenizer_type}; it must be HuggingFaceTokenizer. Give the folder of the "
            "teacher's tokenizer by --tokenizer-model."
        )
    from megatron_mlr1.teacher.identity import tokenizer_sha256  # transformers, slow to import

    return tokenizer_sha256(Path(args.tokenizer_model))


def find_keys(path: Path) -> tuple[Path, Path]:
    """Find the key of one student and the pool's public key.

    Args:
        path: the folder of `tools/teacher_keys.py`, or a `.key_secret` of a student in it.

    Raises:
        ConfigError: there is none, or more than one to choose from.
    """
    if path.is_dir():
        found = [*path.glob("students/*.key_secret"), *path.glob("*.key_secret")]
        students = sorted(one for one in found if one.name != "pool.key_secret")
        if len(students) != 1:
            names = ", ".join(str(one.relative_to(path)) for one in students) or "none"
            raise ConfigError(
                f"--teacher-keys {path} holds the secret keys of {len(students)} students "
                f"({names}); there must be one. Name this run's: --teacher-keys "
                f"{path}/students/NAME.key_secret; tools/teacher_keys.py makes it."
            )
        path = students[0]
    if not path.is_file():
        raise ConfigError(
            f"--teacher-keys {path} is not there; it must be the folder that tools/teacher_keys.py "
            "wrote, or a student's .key_secret in it. Name the right one."
        )
    for folder in (path.parent, path.parent.parent):
        if (folder / "pool.key").is_file():
            return path, folder / "pool.key"
    raise ConfigError(
        f"--teacher-keys {path} has no pool.key beside or above it; the public key of the pool "
        "tells true replicas from others. Copy pool.key of the pool's folder of keys there."
    )
