#!/usr/bin/env bash
# From chats to a model that answers, with the commands that a large run uses.
#
#   examples/finetune/run.sh [OUT]      OUT: where everything goes (default examples/finetune/out)
#
# Goes on from the model of examples/quickstart where its folder is there, else pre-trains a short one.
# Starts anew each time. Wants this package installed (`make setup`) and its Python first on PATH.
set -euo pipefail

OUT=${1:-examples/finetune/out}
if [[ $# -gt 0 && $OUT != /* ]]; then OUT=$PWD/$OUT; fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
QUICKSTART=examples/quickstart/out
STEPS=120
INTERVAL=30   # steps from one evaluation to the next
MUST_FALL=0.2 # nats of the assistant's loss, from the first evaluation to the last

if [[ -d $OUT && ! -f $OUT/finetune-demo && -n $(ls -A "$OUT") ]]; then
    echo "$OUT holds something that is not this demo's; name another folder." >&2
    exit 2
fi
rm -rf "${OUT:?}"/{raw,corpora,pretrained,chats,packs,run,hugging-face,train.log,validation.jsonl}
mkdir -p "$OUT/packs"
: >"$OUT/finetune-demo"
trap 'status=$?; [[ $status == 0 ]] || echo "The demo stopped in: $part (status $status)." >&2' EXIT

begin() { part=$1; printf '\n== %s\n' "$1"; }
show() { printf '$'; printf ' %q' "$@"; printf '\n'; }
run() { show "$@"; "$@"; }

# One thread for each process: two processes share the cores. On a GPU machine one process a GPU.
export OMP_NUM_THREADS=1
processes=$(python -c 'import torch; print(min(torch.cuda.device_count(), 2) or 2)')
torchrun=(torchrun --standalone --nproc-per-node "$processes" -m megatron_mlr1.train --model tiny)

if [[ -f $QUICKSTART/run/latest_checkpointed_iteration.txt && -d $QUICKSTART/corpora/tokenizer ]]; then
    begin "The model of the quickstart, $QUICKSTART/run"
    pretrained=$QUICKSTART/run
    tokenizer=$QUICKSTART/corpora/tokenizer
else
    begin "A short pre-training (examples/quickstart does it longer; log: $OUT/train.log)"
    pretrained=$OUT/pretrained
    tokenizer=$OUT/corpora/tokenizer
    run python examples/quickstart/make_corpora.py --output "$OUT/raw"
    run python examples/quickstart/make_tokenizer.py --vocab-size 4096 \
        --input "$OUT"/raw/{code,docs,licences}.jsonl --output "$tokenizer"
    run cp examples/quickstart/corpora.yaml "$OUT/raw/"
    run python tools/preprocess_data.py --manifest "$OUT/raw/corpora.yaml" \
        --output-root "$OUT/corpora"
    first=("${torchrun[@]}" --stage pretrain_phase1 --train-iters 60 --eval-iters 0
        --data-root "$OUT/corpora" --mixture examples/quickstart/mixture.yaml --save "$pretrained")
    show "${first[@]}"
    "${first[@]}" >"$OUT/train.log" 2>&1
fi

begin "Chats in four layouts"
run python examples/finetune/make_chats.py --output "$OUT/chats"

begin "Packs of 256 tokens, the assistant's tokens marked"
run python tools/preprocess_chat.py --input "$OUT/chats" --output-prefix "$OUT/packs/chats" \
    --tokenizer-model "$tokenizer" --pack-length 256 --workers 2

begin "Fine-tuning with $processes process(es) (log: $OUT/train.log)"
run python examples/quickstart/follow.py --log "$OUT/train.log" --record "$OUT/validation.jsonl" \
    --must-fall "$MUST_FALL" -- \
    "${torchrun[@]}" --stage sft_general --train-iters "$STEPS" --lr 2e-3 \
    --load "$pretrained" --save "$OUT/run" --tokenizer-model "$tokenizer" \
    --data-root "$OUT/packs" --mixture examples/finetune/mixture.yaml \
    --log-interval "$INTERVAL" --eval-interval "$INTERVAL"
python - "$OUT" <<'END'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
last = json.loads((folder / "validation.jsonl").read_text().splitlines()[-1])
print(f"the assistant's loss: {steps[0]['lm loss']:.3f} before the first step, "
      f"{last['validation_loss']:.3f} at last on chats that were held out")
END

begin "A Hugging Face folder"
run python tools/convert_checkpoint.py megatron-to-hf --load "$OUT/run" --save "$OUT/hugging-face" \
    --verify

begin "Answers, by transformers' chat template alone"
run python examples/finetune/ask.py --model "$OUT/hugging-face" --questions \
    "What is 3 + 4?" "What is 7 times 8?" "How many letters has river?" "Write stone backwards."
