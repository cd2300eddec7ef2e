"""What a run computes, and the length that its budget leaves it.

Compute is counted in FLOPs and given in *forward_backward tokens*: tokens that a run's model is trained on. A forward
pass of a token is a third of one. What an arm prepares (a reference model's training, its pass over the corpus) and the
passes of `score: rescored` are taken off its budget, and the steps that remain are trained: the arms of a cell then
have computed the same, up to a step. Evaluations are the same for all arms, and not counted; nor is what no model
computes, such as commonness, whose seconds of CPU are reported beside it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from megatron_lfr.config import RunConfig, run_schedule
from megatron_lfr.data.corpus.blocks import BlockDataset
from megatron_lfr.lfr import Plan
from megatron_lfr.lfr.phase import Phase, largest_remainder
from megatron_lfr.planning import make_blend, make_new_plan
from megatron_lfr.study.definition import Arm, Settings

FORWARD = 1 / 3
"""What a forward pass computes of a forward and a backward one, whose backward has two products for each of its own."""


@dataclass(frozen=True)
class Compute:
    """What a run computes, in forward_backward tokens of its model. budget: what it was given."""

    budget: float
    training: float
    rescoring: float
    preparation: float

    @property
    def total(self) -> float:
        return self.training + self.rescoring + self.preparation


def fit_budget(
    arm: Arm, config: RunConfig, corpus: BlockDataset, budget: float, preparation: float, where: str, at_most: bool
) -> tuple[Compute, Settings, Plan]:
    """Return what a run computes within `budget`, the settings that give it that length, and its plan. at_most: the run
    trains on a part of the corpus that is yet to be made."""
    schedule = run_schedule(config.lfr)
    step_tokens = config.training.blocks_per_step(1) * config.data.seq_length
    rescored = sum(phase.is_rescored for phase in schedule.phases) * corpus.train.num_blocks * corpus.seq_length
    rescoring = FORWARD * rescored
    if at_most and rescored:
        raise ValueError(f"{where}: score: rescored after clean: how many blocks that passes is known after cleaning")
    if at_most and arm.length == "schedule" and any(phase.unit in ("epochs", "passes") for phase in schedule.phases):
        raise ValueError(
            f"{where}: length: schedule after clean: how long an epoch is, is known after cleaning; say length: scaled"
        )
    if schedule.in_shares and arm.length == "schedule":
        raise ValueError(
            f"{where}: length: schedule: its schedule is in shares of the budget, and has no length of its own; leave"
            " length out"
        )
    if not schedule.in_shares and arm.length == "budget":
        plan = plan_run(config, corpus, where, at_most)
        raise ValueError(
            f"{where}: its schedule has a length of its own ({plan.total_steps} steps), the budget another: say length:"
            " scaled (its phases in these proportions) or length: schedule (as it is, whatever it costs)"
        )
    if arm.length == "schedule":
        plan = plan_run(config, corpus, where, at_most)
        steps, lfr = plan.total_steps, {}
        training = float(plan.total_samples * plan.seq_length)
    else:
        steps = int((budget - preparation - rescoring) // step_tokens)
        if steps < len(schedule.phases):
            raise ValueError(
                f"{where}: a budget of {budget:.4g} tokens leaves {steps} steps after {preparation:.4g} for what it "
                f"prepares and {rescoring:.4g} for rescoring; its schedule has {len(schedule.phases)} phases"
            )
        lfr = {} if schedule.in_shares else {"lfr_schedule": _scaled(plan_run(config, corpus, where, at_most), steps)}
        training = float(steps * step_tokens)
    sized = {**lfr, "train_iters": steps}
    plan = plan_run(_with_length(config, lfr, steps), corpus, where, at_most)
    if plan.total_samples * plan.seq_length != training:
        raise ValueError(f"{where}: --rampup-batch-size: not in a study, whose steps are all of one size")
    return Compute(budget, training, rescoring, preparation), sized, plan


def _with_length(config: RunConfig, lfr: Settings, steps: int) -> RunConfig:
    schedule = json.dumps(lfr["lfr_schedule"]) if lfr else config.lfr.lfr_schedule
    return dataclasses.replace(config, lfr=dataclasses.replace(config.lfr, lfr_schedule=schedule, train_iters=steps))


def _scaled(plan: Plan, steps: int) -> list[dict[str, Any]]:
    """Return the phases of a plan in the same proportions over so many steps."""
    shares = [planned.samples / plan.total_samples for planned in plan.phases]
    lengths = largest_remainder(shares, steps, at_least=1)
    return [
        plain_phase(dataclasses.replace(planned.phase, duration=length, unit="steps"))
        for planned, length in zip(plan.phases, lengths, strict=True)
    ]


def plain_phase(phase: Phase) -> dict[str, Any]:
    """Return a phase as YAML gives it, without what is as by default."""
    plain = dataclasses.asdict(Phase(phase.kind, phase.duration))
    return {k: v for k, v in dataclasses.asdict(phase).items() if k in ("kind", "duration") or v != plain[k]}


def rescored_blocks(plan: Plan) -> int:
    """Return how many blocks a run passes forward to rescore them."""
    return plan.n_blocks * sum(planned.phase.is_rescored for planned in plan.phases)


def plan_run(config: RunConfig, corpus: BlockDataset, where: str, at_most: bool = False) -> Plan:
    """Lay out a run over its corpus, or over `at_most` that; a ValueError begins with `where`."""
    try:
        blend = make_blend(config, corpus)
        return make_new_plan(config, corpus.train.num_blocks, 1, blend, corpus.train.domains, at_most)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
