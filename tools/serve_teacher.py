#!/usr/bin/env python
"""Serve a teacher's targets to training runs, one replica on each device; or plan and watch it."""

import argparse
import signal
import time
from pathlib import Path

from megatron_mlr1.ending import clean_exit
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.teacher import planner, status
from megatron_mlr1.teacher.backend import TeacherUnavailable
from megatron_mlr1.teacher.fp8_gate import MAX_KL, MIN_AGREEMENT, Gate
from megatron_mlr1.teacher.keys import read_student_keys
from megatron_mlr1.teacher.pool import RESCAN_S, open_pool
from megatron_mlr1.teacher.serving import ServePlan, parse_devices, pool_folder
from megatron_mlr1.teacher.spec import FORMS, STATE_DTYPES, TargetSpec
from megatron_mlr1.teacher.supervisor import Supervisor


def main() -> None:
    """Do what the words say."""
    args = _parser().parse_args()
    with clean_exit():
        if args.plan is not None:
            _plan(args)
        elif args.status:
            _status(args)
        else:
            _serve(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="Hugging Face folder of the teacher")
    add(
        "--pool",
        metavar="DIR",
        help="folder that replicas and students share; for --status also tcp://HOST:PORT,...",
    )
    add("--keys", type=Path, metavar="DIR", help="folder of keys of tools/teacher_keys.py")

    group = parser.add_argument_group("serve").add_argument
    group("--devices", default="cpu", help="0-7, 0,2,5, cpu, or cpu:3 for three (default: cpu)")
    group(
        "--bind",
        metavar="ADDRESS",
        help="tcp://INTERFACE:PORT of the first replica, the others "
        "take the next ports; port * takes free ones; or ipc://PATH",
    )
    group(
        "--open-data-bind",
        metavar="ADDRESS",
        help="tcp://INTERFACE:PORT for replies that are "
        "sealed but not encrypted, several times faster; for a network whose readers you trust",
    )
    group("--advertise", metavar="HOST", help="host that students connect to, if not --bind's")
    group("--bind-any", action="store_true", help="allow to listen on every interface")
    group("--insecure-loopback", action="store_true", help="no keys, on this machine alone")
    group("--dtype", choices=STATE_DTYPES, default="bfloat16", help="of weights and states")
    group(
        "--precision",
        choices=("dtype", "fp8"),
        default="dtype",
        help="of the products: --dtype's (the default), or FP8 (E4M3) in the linear layers but not "
        "in the head, which must pass a gate and is another teacher than the same in bfloat16",
    )
    group(
        "--fp8-max-kl",
        type=float,
        default=MAX_KL,
        metavar="NATS",
        help=f"the gate: FP8 may move the distribution so far, a token (default: {MAX_KL:g})",
    )
    group(
        "--fp8-min-agreement",
        type=float,
        default=MIN_AGREEMENT,
        metavar="SHARE",
        help="the gate: so many of the tokens must keep their likeliest id "
        f"(default: {MIN_AGREEMENT:g})",
    )
    group("--fp8-text", type=Path, metavar="FILE", help="the gate's text, if not the built-in one")
    group("--max-queue-tokens", type=int, default=262_144, help="of one replica; then BUSY")
    group(
        "--held-gb",
        type=float,
        default=2.0,
        help="memory of one replica for replies that wait, "
        "and as much again for kept results (default: 2)",
    )
    group("--drain-s", type=float, default=120.0, help="longest wait for the last answers")

    group = parser.add_argument_group("watch").add_argument
    group("--status", action="store_true", help="show the pool's replicas every 2 s")
    group("--once", action="store_true", help="show them once; status 75 if none answers")
    group("--student", metavar="NAME", help="whose keys of --keys to use")

    group = parser.add_argument_group("plan").add_argument
    group("--plan", metavar="STUDENT", help="140m, 360m or 950m: replicas, network and waiting")
    group("--student-gpus", type=int, default=8)
    group("--replicas", type=int, help="replicas there are")
    group("--form", choices=FORMS, default="hidden", help="form of the targets (default: hidden)")
    group("--k", type=int, default=0, help="ids that a sparse form keeps")
    group("--m", type=int, default=0, help="draws of the form hybrid")
    group("--student-tokens-per-s", type=float, help="measured, on one GPU")
    group("--teacher-tokens-per-s", type=float, help="measured, on one GPU")
    return parser


def _serve(args: argparse.Namespace) -> None:
    for flag in ("model", "bind"):
        if getattr(args, flag) is None:
            raise ConfigError(
                f"--{flag} is missing; a teacher is served from a folder at an "
                "address. Give both, or say --status or --plan."
            )
    gate = Gate(max_kl=args.fp8_max_kl, min_agreement=args.fp8_min_agreement, text=args.fp8_text)
    if args.precision != "fp8" and gate != Gate():
        raise ConfigError(
            "a flag of the FP8 gate is given and --precision fp8 is not, so it would do nothing. "
            "Give --precision fp8, or leave the flag out."
        )
    plan = ServePlan(
        model=args.model,
        devices=parse_devices(args.devices),
        bind=args.bind,
        pool=pool_folder(args.pool),
        keys=args.keys,
        dtype=args.dtype,
        fp8=gate if args.precision == "fp8" else None,
        data_bind=args.open_data_bind,
        advertise=args.advertise,
        max_queue_tokens=args.max_queue_tokens,
        held_gb=args.held_gb,
        drain_s=args.drain_s,
        insecure_loopback=args.insecure_loopback,
        bind_any=args.bind_any,
    )
    supervisor = Supervisor(plan, lambda line: print(line, flush=True))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.drain())
    supervisor.run()


def _status(args: argparse.Namespace) -> None:
    if args.pool is None:
        raise ConfigError("--status needs the pool; give --pool.")
    if (args.keys is None) != (args.student is None):
        raise ConfigError("--keys DIR and --student NAME belong together; give both or neither.")
    keys = None if args.keys is None else read_student_keys(args.keys, args.student)
    pool = open_pool(args.pool)
    while True:
        text, num_answers = status.show(pool, keys)
        if args.once:
            print(text)
            if num_answers == 0:
                raise TeacherUnavailable(
                    f"No replica of {args.pool} answers; a run needs one. The reasons are above: "
                    "mend them, or start tools/serve_teacher.py."
                )
            return
        # Clears the screen and goes to its top.
        print(f"\033[2J\033[H{text}", flush=True)
        time.sleep(RESCAN_S)


def _plan(args: argparse.Namespace) -> None:
    teacher = planner.LLAMA_31_8B if args.model is None else planner.shape_of_folder(args.model)
    question = planner.Question(
        model=args.plan,
        student_gpus=args.student_gpus,
        replicas=args.replicas,
        teacher=teacher,
        spec=TargetSpec(form=args.form, k=args.k, m=args.m),
        student_tokens_per_s=args.student_tokens_per_s,
        teacher_tokens_per_s=args.teacher_tokens_per_s,
    )
    print(planner.report(planner.plan(question)))


if __name__ == "__main__":
    main()
