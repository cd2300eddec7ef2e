"""The adapter for lm-eval, where that is installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_lfr.cli import main
from megatron_lfr.evaluation.continuations import encode_pairs
from megatron_lfr.evaluation.trained import TrainedModel
from support.continuation_samples import PAIRS, Merging
from support.peers import peer
from support.text_run_oracle import SEQ, WORDS, Oracle

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when lm_eval is imported
TemplateLM: Any = peer("lm_eval.api.model").TemplateLM
MegatronLFR: Any = peer("megatron_lfr.evaluation.lm_eval_adapter").MegatronLFR


@pytest.fixture(scope="module")
def model(trained: TrainedModel) -> Any:
    return MegatronLFR(trained)


@pytest.mark.parametrize("delimiter", [None, "", "\n"])
def test_a_local_task_gives_what_our_scorer_gives(
    delimiter: str | None, run: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Without a delimiter of its own, lm-eval puts a space there: our items then have it before their choices."""
    rows, own_rows = [], []
    for _ in range(80):
        context = " ".join(rng.choice(WORDS, int(rng.integers(1, 9))))
        choices = [" " * int(rng.integers(0, 2)) + " ".join(rng.choice(WORDS, int(rng.integers(1, 4)))) for _ in "abc"]
        if delimiter is None:
            choices = [choice.strip() for choice in choices]
        rows.append({"context": context, "choices": choices, "answer": int(rng.integers(0, 3))})
        given = {"target_delimiter": delimiter} if delimiter is not None else {"choices": [" " + c for c in choices]}
        own_rows.append({**rows[-1], **given})
    items, theirs_items = tmp_path / "items.jsonl", tmp_path / "theirs.jsonl"
    tasks, out = tmp_path / "tasks", tmp_path / "out.json"
    items.write_text("".join(json.dumps(row) + "\n" for row in own_rows))
    theirs_items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks.mkdir()
    task = {
        "task": "local_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(theirs_items)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        **({} if delimiter is None else {"target_delimiter": delimiter}),
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    }
    (tasks / "local.yaml").write_text(yaml.safe_dump(task))
    words = ["--split", "none", "--tasks", str(items), "--json", str(out)]
    lm_eval = ["--lm-eval-tasks", "local_choices", "--lm-eval-include-path", str(tasks)]
    assert main(["evaluate", "--run", str(run), *words, *lm_eval]) == 0
    results = json.loads(out.read_text())
    theirs, ours = results["lm_eval"]["local_choices"], results["tasks"][str(items)]
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert theirs[f"{name},none"] == pytest.approx(ours[name], abs=1e-12)
        assert theirs[f"{name}_stderr,none"] == pytest.approx(ours[f"{name}_stderr"], abs=1e-12)
    assert 0 < ours["acc"] < 1


def test_a_task_that_lm_eval_does_not_know_is_named_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--run", str(tmp_path), "--lm-eval-tasks", "lambada_opnai"]) == 2
    assert "--lm-eval-tasks lambada_opnai: lm-eval knows no such task" in capsys.readouterr().err


@pytest.mark.parametrize("bos", [None, 300])
def test_tokens_are_cut_as_theirs(bos: int | None) -> None:
    start = [] if bos is None else [bos]

    class Theirs(TemplateLM):  # type: ignore[misc]
        eot_token_id = 256
        prefix_token_id = 256 if bos is None else bos

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return [*start, *Merging().encode_batch([string])[0]]

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            return [(context, target) for _, context, target in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any: ...

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any: ...

    pairs = PAIRS[:-1]  # of a context of white space alone, lm-eval makes one without tokens
    expected = Theirs().loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    assert [(list(i.context), list(i.target)) for i in encode_pairs(Merging(), pairs, bos)] == expected


@pytest.mark.parametrize("bos", [None, 7])
def test_rolling_likelihood(model: Any, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, bos: int | None) -> None:
    monkeypatch.setattr(model, "_bos", bos)
    texts = ["the sun shines", " ".join(WORDS * 3)]
    values = model.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts])
    for text, value in zip(texts, values, strict=True):
        ids = [256 if bos is None else bos, *text.encode()]
        expected, at = 0.0, 1
        while at < len(ids):  # windows of SEQ predictions; the last one reaches back for a full context
            last = min(at + SEQ, len(ids))
            logprobs = oracle.logprobs(ids[max(0, last - 1 - SEQ) : last - 1])
            expected += sum(float(logprobs[i - last][ids[i]]) for i in range(at, last))
            at = last
        assert value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("bos", [None, 7])
def test_generation_is_greedy_and_stops(
    model: Any, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, bos: int | None
) -> None:
    monkeypatch.setattr(model, "_bos", bos)

    def greedy(text: str, count: int) -> str:
        ids = [*([] if bos is None else [bos]), *text.encode()] or [256]
        start = len(ids)
        while len(ids) - start < count and ids[-1] != 256:
            ids.append(int(oracle.logprobs(ids[-SEQ:])[-1].argmax()))
        return bytes(i for i in ids[start:] if i < 256).decode(errors="replace")

    texts = ["the sun ", "rain falls on the hills again and again and", "w"]
    requests = [SimpleNamespace(args=(text, {"until": [], "max_gen_toks": 40})) for text in texts]
    unlimited = model.generate_until(requests)
    assert unlimited == [greedy(text, 40) for text in texts]
    stop = unlimited[0][3:5]
    cut = SimpleNamespace(args=(texts[0], {"until": ["never this", stop], "max_gen_toks": 40}))
    assert model.generate_until([cut, requests[2]]) == [unlimited[0][: unlimited[0].index(stop)], unlimited[2]]
    short = SimpleNamespace(args=(texts[0], {"max_new_tokens": 2, "temperature": 0.0, "num_beams": 1}))
    assert model.generate_until([short]) == [greedy(texts[0], 2)]
    sampling: list[dict[str, Any]] = [{"do_sample": True, "temperature": 0.7}, {"do_sample": True}]
    for options in (*sampling, {"temperature": 0.7}, {"num_beams": 4}):
        with pytest.raises(ValueError, match="generates greedily alone"):
            model.generate_until([SimpleNamespace(args=("x", options))])


def test_contexts_that_are_cut_are_reported(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    long, short = "wind " * SEQ, "wind"
    model.loglikelihood([SimpleNamespace(args=(text, " falls")) for text in (long, short)])
    model.generate_until([SimpleNamespace(args=(text, {"max_gen_toks": 1})) for text in (short, long, long)])
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "1 of 2 contexts lost their beginning",
        "2 of 3 contexts lost their beginning",
    ]
