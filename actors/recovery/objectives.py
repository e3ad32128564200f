"""The objectives of recovery: one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from actors.contracts import Progress, RecoverySpec
from actors.data import TrainingData
from actors.plugins import find_row
from actors.recovery.distillation.auxiliary_healing import AuxiliaryHealing
from actors.recovery.distillation.causal_lm import CausalLM
from actors.recovery.distillation.linear_bridge import Solution, solve_bridges
from actors.recovery.distillation.lockstep_distiller import LockstepDistiller
from actors.recovery.distillation.student import Student
from actors.recovery.distillation.teacher_student import TeacherStudent
from actors.recovery.training.document_isolation import check_document_isolation

BuildModule = Callable[[TeacherStudent, RecoverySpec], nn.Module]
"""Builds the module to train: forward(batch: TokenBatch) → dict of scalar terms, their weighted sum
under `loss`, each the sum over the batch's tokens divided by `batch.denominator`."""


Solve = Callable[[RecoverySpec, TrainingData, Progress], Solution]
"""Solves for tensors that replace the model's own, in closed form."""


@dataclass(frozen=True)
class Objective:
    """`build` gives what is trained, `solve` what is found in closed form; both None where nothing is done.

    `weights` names what of `LossSpec` weighs its terms. `trains_on` is running `text`,
    the `answers` of conversations, `responses` that the unpruned model gives to prompts
    before, or `anything`. `has_teacher` if the student is compared with another model.
    """

    build: BuildModule | None
    paper: str
    weights: tuple[str, ...] = ()
    trains_on: Literal["text", "answers", "responses", "anything"] = "text"
    has_teacher: bool = False
    solve: Solve | None = None

    @property
    def applies_recovery(self) -> bool:
        """True if anything is done to the pruned model."""
        return self.build is not None or self.solve is not None


def build_lockstep(pair: TeacherStudent, spec: RecoverySpec) -> nn.Module:
    """Build knowledge distillation from the unpruned model, or from the teacher that is named."""
    return _checked_for_packing(LockstepDistiller(pair, spec.loss, spec.gradient_checkpointing), spec)


def build_causal_lm(pair: TeacherStudent, spec: RecoverySpec) -> nn.Module:
    """Build next-token prediction on the targets of the data."""
    return _checked_for_packing(CausalLM(pair, spec.gradient_checkpointing), spec)


def build_auxiliary_healing(pair: TeacherStudent, spec: RecoverySpec) -> nn.Module:
    """Build next-token prediction with the mismatch at the cuts; without its weight, the former alone."""
    if not spec.loss.auxiliary:
        return build_causal_lm(pair, spec)
    return _checked_for_packing(
        AuxiliaryHealing(pair, spec.loss.auxiliary, spec.gradient_checkpointing), spec
    )


def _checked_for_packing(module: Student, spec: RecoverySpec) -> Student:
    """Check that the models isolate documents, where rows hold several, and return the module."""
    if spec.packing == "documents":
        check_document_isolation(module.pair.student)
        if module.pair.teacher is not None:
            check_document_isolation(module.pair.teacher)
    return module


OBJECTIVES: dict[str, Objective] = {
    "kd": Objective(
        build_lockstep,
        "IteRABRe §3.2",
        weights=("hidden", "attention", "logits", "next_token"),
        has_teacher=True,
    ),
    "healing": Objective(build_causal_lm, "Gromov et al. (arXiv 2403.17887) §3.2, App. A.1"),
    "healing_aux": Objective(
        build_auxiliary_healing, "Gromov et al. (arXiv 2403.17887) §5, Eq. 8", has_teacher=True
    ),
    "sft": Objective(
        build_causal_lm,
        "Limits of Layer Pruning §2: fine-tuning on the data set's answers",
        trains_on="answers",
    ),
    "sgr": Objective(
        build_causal_lm,
        "Limits of Layer Pruning §2: fine-tuning on the unpruned model's answers",
        trains_on="responses",
    ),
    "linear_bridge": Objective(
        None, "ReplaceMe (arXiv 2505.02819) §2.2", trains_on="anything", solve=solve_bridges
    ),
    "none": Objective(None, "pruning without recovery, the control of every paper"),
}


def find_objective(name: str) -> Objective:
    """Return the objective of that name, ours or of another installed package.

    Raises:
        RequestError: there is none, or another package's cannot be used.
    """
    return find_row("recovery objective", name, OBJECTIVES, Objective)
