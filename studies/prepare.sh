#!/usr/bin/env bash
# Makes the corpora of the studies in FOLDER: text, a tokenizer of the clean text, and indexed datasets in FOLDER/data.
# usage: prepare.sh FOLDER [flags of make_corpora.py]. What stands in FOLDER already is not made again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: prepare.sh FOLDER [flags]}
shift
mkdir -p "$out/data"
[ -f "$out/redundant.labels" ] || python "$here/make_corpora.py" "$out" "$@"
[ -f "$out/tokenizer.json" ] ||
    megatron-lfr tokenizer --input "$out/clean.jsonl" --output "$out/tokenizer.json" --vocab-size 2048
for corpus in clean redundant held_out trusted; do
    [ -n "$(ls "$out/data/$corpus"_*.idx 2>/dev/null)" ] ||
        megatron-lfr preprocess --input "$out/$corpus.jsonl" --output-prefix "$out/data/$corpus" \
            --tokenizer "$out/tokenizer.json" --domain-key domain --workers 1
done
