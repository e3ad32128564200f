"""Ways to compute a distillation's loss and gradients: `benchmarks/distillation.py` says what each is."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import actors.recovery.adapters.fused_lora as fused_lora
import actors.recovery.distillation.student as student_module
from actors.contracts import AdapterSpec, BelowCut, LossSpec, ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.data import TokenBatch
from actors.models import Deltas, LayerwisePass, device, find_layers, load_model, remove_layers
from actors.models.adapter_deltas import add_deltas
from actors.recovery.adapters import lora
from actors.recovery.distillation.lockstep_distiller import LockstepDistiller
from actors.recovery.distillation.teacher_student import TeacherStudent, shared_teacher_student

FIRST_DROPPED = 12
BELOW_CUT = 3
RANK = 32
CACHE_DTYPE = torch.bfloat16
OBJECTIVES = {
    "paper": LossSpec(1.0, 0.0, 1.0, "mse"),
    "paper+attention": LossSpec(1.0, 1.0, 1.0, "mse"),
    "kl": LossSpec(0.0, 0.0, 1.0, "forward_kl"),
}
ADDING = ("plain", "shared", "lockstep", "gram", "fused", "ours")
WAYS = (*ADDING, "ckpt", "cut", "cached", "cut+cached")

Loss = Callable[[Tensor], Tensor]
"""From token ids [B, T] to the loss."""


@dataclass(frozen=True)
class Case:
    """What is trained: a model at an iteration, in a type, by an objective."""

    model: str
    dtype: str
    objective: str
    iteration: int
    cut: int = FIRST_DROPPED

    @property
    def loss(self) -> LossSpec:
        """The weights of the objective's terms."""
        return OBJECTIVES[self.objective]

    @property
    def dropped(self) -> tuple[int, ...]:
        """The layers removed so far."""
        return tuple(range(self.cut, self.cut + self.iteration))

    def spec(self, way: str) -> RecoverySpec:
        """LoRA on all linear layers of the layers that are kept, or of those from below the cut on."""
        layers = BelowCut(BELOW_CUT) if "cut" in way.split("+") else "all"
        adapter = AdapterSpec(rank=RANK, layers=layers)
        return RecoverySpec(
            model=ModelRef(ModelSpec(self.model), self.dropped), data=TextSpec(), adapter=adapter
        )

    def source(self) -> tuple[PreTrainedModel, tuple[int, ...]]:
        """The unpruned model, and which of its layers the student has."""
        model, _ = load_model(self.model, dtype=self.dtype)
        kept = tuple(i for i in range(len(find_layers(model).modules)) if i not in self.dropped)
        return model.to(device()), kept

    def earlier(self, model: PreTrainedModel, first: int) -> Deltas | None:
        """What i - 1 earlier recoveries left on the student's blocks from `first` on, small and random."""
        generator, rank = torch.Generator().manual_seed(1), RANK * (self.iteration - 1)
        if not rank:
            return None
        kept = [i for i in range(len(find_layers(model).modules)) if i not in self.dropped]
        factors = {
            (position, f"{path}.weight"): (
                torch.randn(rank, linear.in_features, generator=generator) * 1e-3,
                torch.randn(linear.out_features, rank, generator=generator) * 1e-3,
            )
            for position in range(len(kept))
            for path, linear in find_layers(model).modules[kept[position]].named_modules()
            if isinstance(linear, nn.Linear)
        }
        # All are drawn, so that every way has the same.
        return Deltas({place: both for place, both in factors.items() if place[0] >= first}, 1.0, False)


def pruned_student(case: Case, first: int = 0) -> PreTrainedModel:
    """The pruned model by itself, earlier adapters merged into its weights."""
    student, _ = case.source()
    earlier = case.earlier(student, first)
    remove_layers(student, list(case.dropped))
    blocks = find_layers(student).modules
    for position, name in earlier.factors if earlier else ():
        weight = blocks[position].get_submodule(name.removesuffix(".weight")).weight
        add_deltas(weight.data, [earlier], position, name)
    return student


def side_by_side(case: Case) -> Loss:
    """The plain way: teacher and student are two models."""
    (teacher, kept), student = case.source(), pruned_student(case)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(student, config).train()
    if case.loss.attention:
        for model in (teacher, student):
            model.set_attn_implementation("eager")

    def loss(ids_BT: Tensor) -> Tensor:
        with torch.no_grad():
            of_teacher = teacher(ids_BT, **wanted_outputs(case))
        return plain_loss(case, adapted(ids_BT, **wanted_outputs(case)), of_teacher, kept)

    return loss


def adapted_source(case: Case, way: str) -> tuple[TeacherStudent, int]:
    """Teacher and student in the unpruned model, earlier adapters as a frozen one; and its depth."""
    (model, kept), spec = case.source(), case.spec(way)
    num_layers, path = len(find_layers(model).modules), find_layers(model).path
    earlier = case.earlier(model, spec.first_trainable)
    adapted = lora.new_adapter(model, spec, kept)
    names = [lora.CURRENT]
    if earlier:
        lora._add_frozen(adapted, "earlier", earlier, [f"{path}.{layer}" for layer in kept])
        names = ["earlier", *names]
    adapted.base_model.set_adapter(names)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(f".{lora.CURRENT}." in name)
    return shared_teacher_student(adapted, kept), num_layers


def shared_weights(case: Case) -> Loss:
    """As the plain way, but the teacher is the student with all layers and adapters off."""
    pair, num_layers = adapted_source(case, "shared")
    model, adapted = pair.student, pair.adapted.train()
    if case.loss.attention:
        model.set_attn_implementation("eager")
    layers = model.model.layers
    pruned = nn.ModuleList(layers[i] for i in pair.student_layers)

    def loss(ids_BT: Tensor) -> Tensor:
        with torch.no_grad(), adapted.disable_adapter():
            of_teacher = model(ids_BT, **wanted_outputs(case))
        model.model.layers, model.config.num_hidden_layers = pruned, len(pruned)
        of_student = model(ids_BT, **wanted_outputs(case))
        model.model.layers, model.config.num_hidden_layers = layers, num_layers
        return plain_loss(case, of_student, of_teacher, pair.student_layers)

    return loss


def wanted_outputs(case: Case) -> dict[str, bool]:
    """What the loss needs of a whole model."""
    hidden, attention = bool(case.loss.hidden), bool(case.loss.attention)
    return {"output_hidden_states": hidden, "output_attentions": attention, "use_cache": False}


def plain_loss(case: Case, of_student: object, of_teacher: object, kept: tuple[int, ...]) -> Tensor:
    """The terms from outputs of whole models; `hidden_states[0]` are the embeddings."""
    student_NV, teacher_NV = of_student.logits.flatten(0, 1), of_teacher.logits.flatten(0, 1)
    if case.loss.logit_loss == "mse":
        total = nn.functional.mse_loss(student_NV, teacher_NV)
    else:
        of_both = (z_NV.float().log_softmax(-1) for z_NV in (student_NV, teacher_NV))
        total = nn.functional.kl_div(*of_both, log_target=True, reduction="batchmean")
    for layer, of_source in enumerate(kept):
        if case.loss.hidden:
            states = of_student.hidden_states[layer + 1], of_teacher.hidden_states[of_source + 1]
            total = total + nn.functional.mse_loss(*(state.float() for state in states))
        if case.loss.attention:
            matrices = of_student.attentions[layer], of_teacher.attentions[of_source]
            total = total + nn.functional.mse_loss(*matrices)
    return total


def lockstep(case: Case, way: str) -> Loss:
    """The module of recovery, without what `way` does not have yet, or with more."""
    pair, _ = adapted_source(case, way)
    with ExitStack() as without:
        if way in ("lockstep", "gram"):
            without.enter_context(replaced(student_module, "use_fused_forward", lambda _layers: None))
        distiller = LockstepDistiller(pair, case.loss, gradient_checkpointing=way == "ckpt").train()
    if way == "lockstep":
        distiller._gram_DD = None
    keeps_factors = way == "fused"

    def loss(ids_BT: Tensor) -> Tensor:
        with ExitStack() as without:
            if keeps_factors:
                without.enter_context(replaced(fused_lora, "_frozen", factors_kept))
            return distiller(TokenBatch(ids_BT))["loss"]

    return loss


def from_cache(case: Case, way: str, directory: Path) -> Loss:
    """A student alone, earlier adapters merged; the teacher's states are read from the file each step."""
    spec = case.spec(way)
    student = pruned_student(case, spec.first_trainable)
    layers = tuple(range(len(find_layers(student).modules)))
    adapted = lora.new_adapter(student, spec, layers)
    pair = TeacherStudent(student, layers, None, None, adapted)
    distiller = LockstepDistiller(pair, case.loss).train()

    def loss(ids_BT: Tensor) -> Tensor:
        with safe_open(directory / "states.safetensors", "pt") as states:
            batch = TokenBatch(ids_BT, teacher_BTD=states.get_tensor("last"))
            if "cut" in way.split("+"):
                batch = replace(batch, entering_BTD=states.get_tensor("entering"))
        return distiller(batch.to(ids_BT.device))["loss"]

    return loss


def fill_cache(case: Case, ids_BT: Tensor, directory: Path) -> float:
    """Run the unpruned model over the tokens and store its states in bfloat16; return the seconds."""
    model, _ = case.source()
    entered = case.spec("cut").first_trainable
    for warm in (True, False):
        started = time.perf_counter()
        with torch.no_grad():
            layerwise = LayerwisePass(model, ids_BT)
            hidden_BTD = layerwise.hidden_BTD
            stored = {}
            for layer in range(len(find_layers(model).modules)):
                if layer == entered:
                    stored["entering"] = hidden_BTD
                hidden_BTD = layerwise.block(layer, hidden_BTD)
            stored["last"] = layerwise.finish(hidden_BTD)
        if not warm:
            break
    on_disk = {name: state.to(CACHE_DTYPE).cpu().contiguous() for name, state in stored.items()}
    save_file(on_disk, directory / "states.safetensors")
    return time.perf_counter() - started


def factors_kept(layer: nn.Module, names: list[str]) -> fused_lora._Frozen:
    """As before they were summed: the factors of all frozen adapters of a layer."""
    down_FI, up_OF = fused_lora._factors(layer, names)
    weight_OI = layer.base_layer.weight
    return fused_lora._Frozen(weight_OI, (down_FI.to(weight_OI.dtype), up_OF.to(weight_OI.dtype)))


@contextmanager
def replaced(module: object, name: str, value: object) -> Iterator[None]:
    """Have a module's function be another one, meanwhile."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def build(way: str, case: Case, directory: Path) -> Loss:
    """That way of computing the loss."""
    if "cached" in way.split("+"):
        return from_cache(case, way, directory)
    builders = {"plain": side_by_side, "shared": shared_weights}
    return builders[way](case) if way in builders else lockstep(case, way)


def ways_of(objective: str, ways: list[str]) -> list[str]:
    """Those that the objective has: a gram matrix for the MSE of logits, a cache for last states alone."""
    no_use = "cached" if OBJECTIVES[objective].hidden else "gram"
    return [way for way in ways if no_use not in way.split("+")]
