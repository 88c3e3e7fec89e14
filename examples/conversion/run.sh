#!/usr/bin/env bash
# Export a run, try it, and make a checkpoint from which another run can start. See README.md here.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 3 ]]; then
    echo "usage: $0 RUN [TOKENIZER] [OUT]" >&2
    exit 2
fi
run=$(realpath "$1")
tokenizer=()
[[ -n ${2:-} ]] && tokenizer=(--tokenizer "$(realpath "$2")")
out=$(realpath -m "${3:-$run/export}")
if [[ -e $out ]]; then
    echo "$out exists; it must be a new folder. Remove it, or name another one as OUT." >&2
    exit 2
fi

cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
[[ -x $(command -v "$python") ]] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

say() { printf '\n$ %s\n' "$*"; "$@"; }

say "$python" tools/convert_checkpoint.py megatron-to-hf --load "$run" --save "$out/hf" "${tokenizer[@]}" --verify

if [[ -f $out/hf/tokenizer.json ]]; then
    printf '\n# transformers alone continues a text\n'
    "$python" - "$out/hf" <<'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=30, do_sample=False)[0]))
PYTHON
fi

say "$python" tools/convert_checkpoint.py hf-to-megatron --load "$out/hf" --save "$out/megatron" --verify
say "$python" tools/convert_checkpoint.py megatron-to-hf --load "$out/megatron" --save "$out/again" "${tokenizer[@]}"
say cmp "$out/hf/model.safetensors" "$out/again/model.safetensors"

cat <<END

Done. Every weight came back with the same bytes.
  for transformers   $out/hf
  for another run    --pretrained-checkpoint $out/megatron
END
