"""A run as a model of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), which has to be installed.

    python -m megatron_lfr.evaluation.lm_eval_adapter --model megatron_lfr --model_args run=runs/mine --tasks ...

takes the flags of lm_eval, which cannot find the models of other packages by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_lfr.evaluation.continuations import Continuation, Continuations, encode_pairs
from megatron_lfr.evaluation.trained import TrainedModel, load_trained

_DEFAULT_GENERATED = 256
"""Number of tokens to generate where a task gives none, as in lm-eval."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which tasks give that number; the first one given counts, as in lm-eval."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_new_tokens": (0,),
}
"""Values of options with which greedy decoding stays as it is."""
_LEFT_OUT = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", "seed", "use_cache")
"""Options that are read elsewhere, or that concern only sampling or speed."""

_LOG = logging.getLogger(__name__)


@register_model("megatron_lfr")
class MegatronLFR(LM):  # type: ignore[misc]  # Any where lm-eval is not installed
    """A run as a model of lm-eval, in one process; it generates greedily, without a cache.

    run: the run folder. iteration: that of the checkpoint, by default the newest. batch_size: texts at a time.
    tokenizer_model: where the run's tokenizer is now, if it was moved. device: ignored, as lm-eval always gives one;
    the model goes to the GPU where there is one.
    """

    def __init__(
        self,
        run: str | TrainedModel,
        iteration: int | None = None,
        batch_size: int | str | None = None,
        tokenizer_model: str | None = None,
        device: str | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        if unused:
            raise ValueError(f"--model_args {', '.join(unused)}: unknown; run, iteration and tokenizer_model are known")
        if isinstance(run, TrainedModel):
            trained = run
        else:
            if batch_size is not None and not str(batch_size).isdecimal():
                raise ValueError(f"--batch_size {batch_size}: must be a number")
            trained = load_trained(Path(run), iteration, int(batch_size) if batch_size else None, tokenizer_model)
        self._tokenizer = trained.text_tokenizer
        self._bos = trained.bos
        self._model = Continuations(trained)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Score each request's continuation after its context: (log-probability, whether greedy decoding gives it)."""
        scores = self._model.score(encode_pairs(self._tokenizer, [request.args for request in requests], self._bos))
        self._warn_cut(sum(score.is_cut for score in scores), len(scores))
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Compute the log-probability of each whole text in windows of --seq-length, after the token that starts a
        document, or where there is none, the token that ends one."""
        prefix = self._tokenizer.eod if self._bos is None else self._bos
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self._tokenizer.encode_batch([request.args[0]])[0]
            for pair in get_rolling_token_windows(tokens, prefix, self._model.max_length, 1):
                windows.append(Continuation(*make_disjoint_window(pair)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._model.score(windows), strict=True):
            sums[owner] += score.logprob
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generate greedily after each request's context, up to its first stop text or the end of the document."""
        texts = [""] * len(requests)
        prompts = self._tokenizer.encode_batch([request.args[0] for request in requests])
        start = [] if self._bos is None else [self._bos]
        rows = [[*start, *prompt] or [self._tokenizer.eod] for prompt in prompts]
        starts = list(map(len, rows))
        rules = [_rules(request.args[1]) for request in requests]
        self._warn_cut(sum(start > self._model.max_length for start in starts), len(starts))
        active = [i for i, (_, length) in enumerate(rules) if length > 0]
        while active:
            for i, token in zip(active, self._model.likeliest_next([rows[i] for i in active]), strict=True):
                rows[i].append(token)
            active = [i for i in active if not self._finish(i, rows[i][starts[i] :], rules[i], texts)]
        return texts

    def _warn_cut(self, cut: int, total: int) -> None:
        if cut:
            longest = self._model.max_length
            _LOG.warning(f"{cut} of {total} contexts lost their beginning: --seq-length of the run is {longest}")

    def _finish(self, index: int, generated: list[int], rules: tuple[list[str], int], texts: list[str]) -> bool:
        """Update the text of a request, and return whether it has ended."""
        stops, length = rules
        ended = generated[-1] == self._tokenizer.eod
        text = self._tokenizer.decode(generated[:-1] if ended else generated)
        stop_starts = [start for start in map(text.find, stops) if start >= 0]
        texts[index] = text[: min(stop_starts)] if stop_starts else text
        return ended or bool(stop_starts) or len(generated) >= length


def _rules(options: Mapping[str, Any]) -> tuple[list[str], int]:
    """Read the options of a request: (texts that end the generation, its largest number of tokens). Raises ValueError
    for a task that requires anything but greedy decoding."""
    temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
    if options.get("do_sample") is not False and temperature != 0:
        raise ValueError("the task asks for sampling (do_sample, temperature); this model generates greedily alone")
    for name, value in options.items():
        if name not in _LENGTHS and name not in _LEFT_OUT and value is not None and value not in _NEUTRAL.get(name, ()):
            raise ValueError(f"the task asks for {name} {value!r}; this model generates greedily alone")
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    lengths = [options[name] for name in _LENGTHS if options.get(name) is not None]
    return [stop for stop in stops if stop], int([*lengths, _DEFAULT_GENERATED][0])


def find_tasks(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """Return what knows lm-eval's tasks, and those of YAML files in the folder `include_path`; ValueError names a task
    that is not among them."""
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = sorted(set(tasks) - set(manager.match_tasks(list(tasks))))
    if unknown:
        raise ValueError(f"--lm-eval-tasks {unknown[0]}: lm-eval knows no such task")
    return manager


def evaluate_tasks(trained: TrainedModel, tasks: Sequence[str], manager: TaskManager) -> dict[str, Any]:
    """Return lm-eval's results by task."""
    report = simple_evaluate(model=MegatronLFR(trained), tasks=list(tasks), task_manager=manager, log_samples=False)
    results: dict[str, Any] = report["results"]
    return results


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
