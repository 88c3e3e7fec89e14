#!/usr/bin/env bash
# A student learns from a pool of teachers of which one is killed, beside one that learns alone.
#
#   examples/distillation/run.sh [OUT]    OUT: where everything goes (default examples/distillation/out)
#
# Starts anew each time. Wants this package installed (`make setup`) and its Python first on PATH.
set -euo pipefail

OUT=${1:-examples/distillation/out}
if [[ $# -gt 0 && $OUT != /* ]]; then OUT=$PWD/$OUT; fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
QUICKSTART=examples/quickstart
STEPS=80
INTERVAL=20 # steps from one evaluation to the next
TEACHER_STEPS=200

if [[ -d $OUT && ! -f $OUT/distillation-demo && -n $(ls -A "$OUT") ]]; then
    echo "$OUT holds something that is not this demo's; name another folder." >&2
    exit 2
fi
rm -rf "${OUT:?}"/{raw,corpora,teacher,keys,pool,alone,taught,pool.log} "$OUT"/{alone,taught}.{log,jsonl}
mkdir -p "$OUT/pool"
: >"$OUT/distillation-demo"

part=preparation
pool=
finish() {
    status=$?
    if [[ -n $pool ]]; then kill -TERM "$pool" 2>/dev/null && wait "$pool" || true; fi
    [[ $status == 0 ]] || echo "The demo stopped in: $part (status $status)." >&2
}
trap finish EXIT

begin() { part=$1; printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }
run() {
    printf '$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

begin "Corpora and a tokenizer, as in the quickstart"
run python $QUICKSTART/make_corpora.py --output "$OUT/raw"
run python $QUICKSTART/make_tokenizer.py --vocab-size 4096 \
    --input "$OUT"/raw/{code,docs,licences}.jsonl --output "$OUT/corpora/tokenizer"
run cp $QUICKSTART/corpora.yaml "$OUT/raw/"
run python tools/preprocess_data.py --manifest "$OUT/raw/corpora.yaml" --output-root "$OUT/corpora"

begin "A teacher: a Llama of $TEACHER_STEPS steps, by transformers"
run env OMP_WAIT_POLICY=passive python examples/distillation/make_teacher.py --data-root "$OUT/corpora" \
    --mixture $QUICKSTART/mixture.yaml --output "$OUT/teacher" --steps "$TEACHER_STEPS"

# One thread for each process: students and replicas share the cores.
export OMP_NUM_THREADS=1
processes=$(python -c 'import torch; print(min(torch.cuda.device_count(), 2) or 2)')
train=(torchrun --standalone --nproc-per-node "$processes" -m megatron_mlr1.train
    --model tiny --stage pretrain_phase1 --seq-length 128 --train-iters "$STEPS"
    --data-root "$OUT/corpora" --mixture $QUICKSTART/mixture.yaml --save-interval "$STEPS"
    --log-interval "$INTERVAL" --eval-interval "$INTERVAL")

begin "A student that learns from the corpora alone (log: $OUT/alone.log)"
run python $QUICKSTART/follow.py --log "$OUT/alone.log" --record "$OUT/alone.jsonl" -- \
    "${train[@]}" --save "$OUT/alone"

begin "Keys, and three replicas of the teacher (log: $OUT/pool.log)"
run python tools/teacher_keys.py "$OUT/keys" --pool --student student
serve=(python tools/serve_teacher.py --model "$OUT/teacher" --devices cpu:3 --dtype float32
    --bind "tcp://127.0.0.1:*" --pool "$OUT/pool" --keys "$OUT/keys")
printf '$'
printf ' %q' "${serve[@]}"
printf ' &\n'
"${serve[@]}" >"$OUT/pool.log" 2>&1 &
pool=$!

begin "The same student with the teacher; one replica is killed on the way (log: $OUT/taught.log)"
kill_one=(python examples/distillation/kill_replica.py --pool "$pool"
    --record "$OUT/taught/metrics.jsonl" --after $((STEPS / 2)))
"${kill_one[@]}" &
killer=$!
run python $QUICKSTART/follow.py --log "$OUT/taught.log" --record "$OUT/taught.jsonl" -- \
    "${train[@]}" --save "$OUT/taught" --teacher "$OUT/pool" --teacher-keys "$OUT/keys"
wait "$killer"

begin "Side by side"
python examples/distillation/compare.py "$OUT"
