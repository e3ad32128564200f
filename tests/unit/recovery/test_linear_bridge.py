"""Linear bridges against activations stacked by hooks and an ordinary least-squares solver."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from actors.contracts import ModelRef, ModelSpec, RecoverySpec, TextSpec
from actors.data import TokenBatch
from actors.errors import RequestError
from actors.models import build_model, load_model, remove_layers
from actors.recovery.distillation.linear_bridge import (
    Bridge,
    NormalEquations,
    find_bridges,
    find_output_projection,
    insert_bridges,
    solve_bridges,
)
from actors.recovery.training.local import recover_locally
from tests.support.packed_data import packed_blocks
from tests.support.tiny_models import save_tiny, tiny_ids, tiny_llama, tiny_model
from tests.support.tiny_recovery import tiny_recovery_spec


def _spec(path: str, dropped: tuple[int, ...]) -> RecoverySpec:
    return RecoverySpec(model=ModelRef(ModelSpec(path), dropped), data=TextSpec(), objective="linear_bridge")


def _stacked(model: nn.Module, ids_BT: Tensor, modules: list[nn.Module]) -> list[Tensor]:
    """What each module gives on all tokens, [N, D] in float64."""
    taken: dict[int, Tensor] = {}

    def take(module: nn.Module, _inputs: object, output: Tensor) -> None:
        taken[id(module)] = output.flatten(0, 1).double()

    hooks = [module.register_forward_hook(take) for module in modules]
    with torch.no_grad():
        model(ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [taken[id(module)] for module in modules]


def test_normal_equations_are_least_squares_whatever_the_portions() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, wanted = (torch.randn(90, 6, generator=generator) for _ in range(2))
    equations = NormalEquations(6, torch.device("cpu"))
    for some, goal in zip(rows.split(17), wanted.split(17), strict=True):
        equations.add(some, goal)
    want = torch.linalg.lstsq(rows.double(), wanted.double()).solution
    torch.testing.assert_close(equations.solve(), want, rtol=1e-6, atol=1e-6)


def test_directions_without_data_stay_as_they_were() -> None:
    equations = NormalEquations(3, torch.device("cpu"))
    rows = torch.tensor([[1.0, 0, 0], [2.0, 0, 0]])
    equations.add(rows, 3 * rows)
    torch.testing.assert_close(equations.solve(), torch.diag(torch.tensor([3.0, 1, 1]).double()))


def test_a_bridge_for_every_run_of_removed_layers() -> None:
    assert find_bridges((0, 1, 4, 6), 8) == [Bridge(1, 3), Bridge(2, 5), Bridge(3, 7)]
    with pytest.raises(RequestError, match="layer 0"):
        find_bridges((1, 2), 3)
    with pytest.raises(RequestError, match="none were dropped"):
        find_bridges((0, 1), 2)


def test_bridges_are_those_of_stacked_activations(tmp_path: Path) -> None:
    """Two runs; the second one's MLP output comes from the student with the first bridge in it."""
    path = save_tiny(tmp_path / "model", num_layers=6)
    ids_BT = tiny_ids(24, 16)
    reported: list[tuple[int, int]] = []
    spec = _spec(path, (2, 3, 5))
    solved = solve_bridges(
        spec, packed_blocks(ids_BT), lambda done, all, _="": reported.append((done, all))
    ).tensors
    total = 2 * -(-24 // spec.micro_batch_size)
    assert reported == [(done, total) for done in range(1, total + 1)]
    assert set(solved) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 4)}

    source, _ = load_model(path)
    student, _ = build_model(ModelRef(ModelSpec(path), (2, 3, 5)))
    for block, kept, last in ((1, 1, 3), (2, 4, 5)):
        down = student.model.layers[block].mlp.down_proj
        mlp, after = _stacked(student, ids_BT, [down, student.model.layers[block]])
        (target,) = _stacked(source, ids_BT, [source.model.layers[last]])
        transform = torch.linalg.lstsq(mlp, target - (after - mlp)).solution
        want = (down.weight.double().T @ transform).T.float()
        got = solved[f"model.layers.{kept}.mlp.down_proj.weight"]
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
        with torch.no_grad():
            down.weight.copy_(got)


class _LinearInTheMLP(nn.Module):
    """A block that turns what the MLP before it gave, M + Y, into M B + Y."""

    def __init__(self, down: nn.Module, transform_DD: Tensor):
        super().__init__()
        self.transform_DD = transform_DD
        down.register_forward_hook(lambda _module, _inputs, output: setattr(self, "mlp", output))

    def forward(self, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return hidden_states - self.mlp + self.mlp @ self.transform_DD


def test_a_removed_block_that_is_linear_is_replaced_exactly() -> None:
    source, student = tiny_llama(4)[0], tiny_llama(4)[0]
    transform_DD = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 4
    source.model.layers[2] = _LinearInTheMLP(source.model.layers[1].mlp.down_proj, transform_DD)
    remove_layers(student, [2])
    insert_bridges(source, student, (0, 1, 3), lambda: [TokenBatch(tiny_ids(24, 16))])
    with torch.no_grad():
        unseen_BT = tiny_ids(2, 16, seed=1)
        got, want = (model(unseen_BT, use_cache=False).logits for model in (student, source))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unchanged", [False, True])
def test_every_block_is_computed_once_however_many_bridges_there_are(unchanged: bool) -> None:
    source, student = tiny_llama(8)[0], tiny_llama(8)[0]
    remove_layers(student, [2, 3, 5, 6])
    ran: list[tuple[str, int]] = []
    batches = [TokenBatch(tiny_ids(2, 16)), TokenBatch(tiny_ids(2, 16, seed=1))]

    def count(whose: str, block: int) -> None:
        if counting:
            ran.append((whose, block))

    counting = False

    def each_time() -> list[TokenBatch]:
        nonlocal counting
        counting = True  # the search for the layer to fold into is over
        return batches

    for whose, model in (("source", source), ("student", student)):
        for block, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.register_forward_hook(lambda *_, w=whose, b=block: count(w, b))
    insert_bridges(source, student, (0, 1, 4, 7), each_time, unchanged)
    # The bridge is taken from the block before the gap, which runs again with the bridge in it.
    want = [("source", block) for block in range(7)] + [("student", block) for block in (1, 1, 2)]
    want += [] if unchanged else [("student", 0)]
    assert sorted(ran) == sorted(want * 2)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "mlp.down_proj"),
        ("gpt2", "mlp.c_proj"),
        ("bloom", "mlp.dense_4h_to_h"),
        ("gptj", "mlp.fc_out"),
    ],
)
def test_the_mlps_last_layer_is_found_in_every_plain_family(family: str, name: str) -> None:
    with torch.no_grad():
        assert find_output_projection(tiny_model(family), 1)[0] == name


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_a_norm_or_a_gate_behind_the_last_layer_is_refused(family: str) -> None:
    with torch.no_grad(), pytest.raises(RequestError, match=family):
        find_output_projection(tiny_model(family), 1)


def test_recovery_by_bridge_then_by_distillation(tmp_path: Path) -> None:
    """The bridged model is closer to the source; training goes on from it, with the source as teacher."""
    spec = tiny_recovery_spec(tmp_path)
    spec = replace(spec, adapter=replace(spec.adapter, dropout=0.0))
    result = recover_locally(replace(spec, objective="linear_bridge"), str(tmp_path / "bridge"), tmp_path)
    assert result.artifact is not None
    bridged = replace(spec, objective="linear_bridge").with_recovery(result.artifact)
    assert bridged.weights == result.artifact
    ids_BT = tiny_ids(4, 16)
    source, _ = load_model(spec.model.source.path)
    with torch.no_grad():
        want = source(ids_BT, use_cache=False).logits
        errors = [
            float((build_model(ref)[0](ids_BT, use_cache=False).logits - want).square().mean())
            for ref in (spec.model, bridged)
        ]
    assert errors[1] < errors[0]

    started = recover_locally(replace(spec, model=bridged), str(tmp_path / "kd"), tmp_path)
    plain = recover_locally(spec, str(tmp_path / "plain"), tmp_path)
    # The block that took the bridge in is further from its own layer of the teacher, as it is meant to be.
    assert dict(started.steps[0].terms)["logits"] < dict(plain.steps[0].terms)["logits"]
