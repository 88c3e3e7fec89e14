#!/usr/bin/env bash
# From text to a model that transformers loads, with the commands that a large run uses.
#
#   examples/quickstart/run.sh [OUT]      OUT: where everything goes (default examples/quickstart/out)
#
# Starts anew each time. Wants this package installed (`make setup`) and its Python first on PATH.
set -euo pipefail

OUT=${1:-examples/quickstart/out}
if [[ $# -gt 0 && $OUT != /* ]]; then OUT=$PWD/$OUT; fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
STEPS=240
INTERVAL=20 # steps from one evaluation to the next
STEP_SAMPLES=16 # the tiny model's batch
MUST_FALL=1.0             # nats of validation loss

if [[ -d $OUT && ! -f $OUT/seconds.tsv && -n $(ls -A "$OUT") ]]; then
    echo "$OUT holds something that is not this demo's; name another folder." >&2
    exit 2
fi
rm -rf "${OUT:?}"/{raw,corpora,run,hugging-face,train.log,validation.jsonl,export.log,sample.txt}
mkdir -p "$OUT"
: >"$OUT/seconds.tsv"

part=preparation
trap 'status=$?; [[ $status == 0 ]] || echo "The demo stopped in: $part (status $status)." >&2' EXIT

begin() { # name for the table, sentence
    part=$1
    printf '\n== %s\n' "$2"
    SECONDS=0
}
finish() { printf '%s\t%s\n' "$part" "$SECONDS" >>"$OUT/seconds.tsv"; }
show() { # a command, as one would type it
    local word
    printf '$'
    for word in "$@"; do
        if [[ $word =~ ^[a-zA-Z0-9_./=:,+-]+$ ]]; then printf ' %s' "$word"; else printf " '%s'" "$word"; fi
    done
    printf '\n'
}
run() {
    show "$@"
    "$@"
}

# One thread for each process: two processes share the cores. On a GPU machine one process a GPU.
export OMP_NUM_THREADS=1
processes=$(python -c 'import torch; print(min(torch.cuda.device_count(), 2) or 2)')
train=(torchrun --standalone --nproc-per-node "$processes" -m megatron_mlr1.train
    --model tiny --stage pretrain_phase1 --train-iters "$STEPS"
    --data-root "$OUT/corpora" --mixture examples/quickstart/mixture.yaml --save "$OUT/run"
    --log-interval "$INTERVAL" --eval-interval "$INTERVAL")
follow=(python examples/quickstart/follow.py
    --log "$OUT/train.log" --record "$OUT/validation.jsonl")

begin corpora "Three corpora of text that comes with Python"
run python examples/quickstart/make_corpora.py --output "$OUT/raw"
finish

begin tokenizer "A tokenizer of 4,096 tokens"
run python examples/quickstart/make_tokenizer.py --vocab-size 4096 \
    --input "$OUT"/raw/{code,docs,licences}.jsonl --output "$OUT/corpora/tokenizer"
finish

begin preprocess "Tokens in Megatron's format"
run cp examples/quickstart/corpora.yaml "$OUT/raw/"
run python tools/preprocess_data.py --manifest "$OUT/raw/corpora.yaml" \
    --output-root "$OUT/corpora"
run python tools/mixture.py show examples/quickstart/mixture.yaml --data-root "$OUT/corpora" \
    --model tiny --stage pretrain_phase1 --train-samples $((STEPS * STEP_SAMPLES))
finish

begin train "Training with $processes process(es), stopped half way by SIGTERM (log: $OUT/train.log)"
show "${train[@]}"
"${follow[@]}" --terminate-after $((STEPS / 2)) -- "${train[@]}"
finish

begin resume "The same command goes on"
show "${train[@]}"
"${follow[@]}" --must-fall "$MUST_FALL" -- "${train[@]}"
finish

begin export "A Hugging Face folder, compared with the checkpoint"
run python tools/convert_checkpoint.py megatron-to-hf \
    --load "$OUT/run" --save "$OUT/hugging-face" --verify | tee "$OUT/export.log"
finish

begin text "Text, by transformers alone"
run python examples/quickstart/write_text.py --model "$OUT/hugging-face" --output "$OUT/sample.txt" \
    --prompts "    def __init__(self" "Return the " "Permission is hereby granted"
finish

begin summary "Summary"
python examples/quickstart/summarise.py "$OUT"
