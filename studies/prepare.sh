#!/usr/bin/env bash
# Makes the corpora of the studies in FOLDER: text, a tokenizer of the clean text, indexed datasets in FOLDER/data,
# clusters of the redundant corpus' blocks by content, and tasks of the held-out text.
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
indexes=("$out"/data/redundant_*.idx)
[ -f "$out/redundant_clusters.npy.json" ] ||  # which is written last
    python "$here/../examples/content_clusters.py" --data-path "${indexes[@]%.idx}" --split 100,0,0 --seq-length 128 \
        --clusters 64 --output "$out/redundant_clusters.npy"
[ -f "$out/last_word.jsonl" ] || python "$here/make_tasks.py" "$out/held_out.jsonl" "$out"
