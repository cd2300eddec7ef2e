#!/usr/bin/env bash
# The demo: a 1M-parameter Llama, pretrained with Learn-Focus-Review on text that every Python brings along.
# usage: run.sh FOLDER [flags of megatron-lfr train]. What stands in FOLDER already is not made again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: run.sh FOLDER [flags]}
shift
mkdir -p "$out/data"

step() { printf '\n== %s\n' "$*"; }

step "1. corpus: four domains from the Python standard library"
[ -f "$out/corpus.jsonl" ] || python "$here/make_corpus.py" "$out/corpus.jsonl"

step "2. megatron-lfr tokenizer: a byte-level BPE of 2048 tokens"
[ -f "$out/tokenizer.json" ] ||
    megatron-lfr tokenizer --input "$out/corpus.jsonl" --output "$out/tokenizer.json" --vocab-size 2048

step "3. megatron-lfr preprocess: one indexed dataset for each domain"
[ -n "$(ls "$out"/data/*.idx 2>/dev/null)" ] ||
    megatron-lfr preprocess --input "$out/corpus.jsonl" --output-prefix "$out/data/stdlib" \
        --tokenizer "$out/tokenizer.json" --domain-key domain --workers 2

step "4. megatron-lfr train: learn, focus, review, focus, review"
prefixes=("$out"/data/*.idx)
megatron-lfr train --config "$here/demo.yaml" --data-path "${prefixes[@]%.idx}" \
    --tokenizer-model "$out/tokenizer.json" --save "$out/run" "$@"

step "5. megatron-lfr report: open it in a browser"
megatron-lfr report "$out/run"
