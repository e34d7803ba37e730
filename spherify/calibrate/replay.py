"""Whether a recorded run, played back on other images, is what the model itself computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spherify.calibrate.pair import Pair, Runs, angular_call
from spherify.calibrate.parts import layer_positions, parts_of
from spherify.calibrate.world import World
from spherify.graph.record import tensors_in
from spherify.layers.angular import AngularLayer

IMAGES_PLAYED = 8
ROUNDING = 1e-3  # relative; the very same functions run in the very same order
ROUNDING_OF_HALF = 3e-2  # for models in float16 and bfloat16
PLAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def ends_of(parts: Sequence[Tensor]) -> list[Tensor]:
    """The first few and the last few images, as many of both and none in both."""
    count = min(IMAGES_PLAYED, len(parts[0]), sum(map(len, parts)) // 2)
    last = parts[-1] if len(parts[-1]) >= count else parts[-2]
    return [parts[0][:count], last[-count:]]


@torch.no_grad()
def departure(model: nn.Module, donor: nn.Module, parts: Sequence[Tensor], runs: Runs | None = None) -> str | None:
    """Where the run recorded on the first few images is not the model's own on them, or on the last few.

    Returns:
        In words, the network and its first layer that departs; None where replay and model agree.
    """
    with Pair(model, donor, ends_of(parts), half=False, runs=runs) as pair:
        for part in parts_of(pair.student.recorded, kept=False):
            for call in part.calls:
                pair.student.overrides[call] = angular_call(part, pair.student.recorded.nodes[call].target)
        for name, world in (("the donor", pair.donor), ("the converted model", pair.student)):
            modes = [(module, module.training) for module in world.recorded.model.modules()]
            try:
                world.recorded.model.eval()
                place = first_difference(world)
            finally:
                for module, mode in modes:
                    module.training = mode
            if place is not None:
                return f"{name} does not do for all images what was recorded for the first ({place})"
    return None


def first_difference(world: World) -> str | None:
    """In words, the first layer whose replayed output is not its own; the output where no layer shows it."""
    recorded = world.recorded
    calls = recorded.layer_calls()
    outputs = [recorded.position[node] for node in recorded.nodes[-1].args[0]]  # type: ignore[index,union-attr]
    places = [position for position in outputs if recorded.is_activation(position)]
    world.want([len(recorded.nodes) - 1, *calls])
    found: list[str] = []

    def compare(number: int, values: list[Tensor]) -> None:
        if found:
            return
        own, answers = run_of(recorded.model, world.batches[number])
        if len(answers) != len(outputs):
            found.append(f"{len(answers)} outputs, {len(outputs)} when recorded")
            return
        theirs = dict(zip([*calls, *places], values, strict=True))
        for position, answer in zip(outputs, answers, strict=True):
            if position in theirs and (error := distance(theirs[position], answer)) is not None:
                found.append(layer_that_departs(world, own, theirs) or f"its output differs by {error}")
                return

    world.advance([*calls, *places], compare)
    return found[0] if found else None


def run_of(model: nn.Module, batch: Tensor) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
    """The outputs of conv and linear layers in the order of their calls, and of the model."""
    own: list[tuple[str, Tensor]] = []
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, (nn.Linear, _ConvNd))]

    def listening(path: str) -> object:
        return lambda module, inputs, output: own.append((path, output.clone()))  # an activation may write into it

    hooks = [module.register_forward_hook(listening(path)) for path, module in layers]  # type: ignore[arg-type]
    try:
        answers = list(tensors_in(model(batch)))
    finally:
        for hook in hooks:
            hook.remove()
    return own, answers


def layer_that_departs(world: World, own: list[tuple[str, Tensor]], theirs: dict[int, Tensor]) -> str | None:
    recorded = world.recorded
    waiting: dict[str, list[int]] = {}
    for position in layer_positions(recorded):
        waiting.setdefault(recorded.path(position), []).append(position)
    for path, output in own:
        if not waiting.get(path):
            return f"{path} runs, which it did not then"
        position = waiting[path].pop(0)
        module = recorded.model.get_submodule(path)
        is_the_call = isinstance(module, AngularLayer) or type(module) in PLAIN_LAYERS  # others may compute more
        if position in theirs and is_the_call and (error := distance(theirs[position], output)) is not None:
            return f"the output of {path} differs by {error}"
    ran = Counter(path for path, _ in own)
    return next((f"{path} does not run" for path, left in waiting.items() if left and ran[path]), None)


def distance(replayed: Tensor, own: Tensor) -> str | None:
    """Relative, in words, where it is more than rounding; NaN and infinity agree with themselves."""
    if replayed.shape != own.shape:
        return f"its shape, {tuple(replayed.shape)} for {tuple(own.shape)}"
    few_bits = own.is_floating_point() and torch.finfo(own.dtype).bits < 32
    first, second = replayed.double().flatten(), own.double().flatten()
    if bool((first.isfinite() != second.isfinite()).any()):
        return "numbers that are not finite in one of the two"
    first, second = first[first.isfinite()], second[second.isfinite()]
    error = float((first - second).norm() / second.norm().clamp_min(1e-12))
    return f"{100 * error:.2g} %" if error > (ROUNDING_OF_HALF if few_bits else ROUNDING) else None
