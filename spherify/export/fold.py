"""``fold``: the inference form of a converted model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from spherify.errors import ModelError
from spherify.functional.folded import SharedNorms
from spherify.graph.folding import FOLD, FoldPlan, plan_fold
from spherify.graph.record import Inputs, copy_without_data, map_tree, one_line, record
from spherify.layers.angular import AngularLayer
from spherify.layers.folded import FOLDED, Folded, fold_angular_, fold_plain_, take_away_, takes_in
from spherify.models.inputs import candidate_inputs

PLAIN_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, timm.layers.Conv2dSame, timm.layers.Linear)


def fold(model: nn.Module, *, example_input: Any = None, inplace: bool = False) -> nn.Module:
    """The inference form of a converted model: the same outputs up to rounding, with less to compute.

    Filters are normalised once. Response scale, gain, bias and the BatchNorm behind a layer become one factor and one
    summand a filter; for the cosine the factor is in the weight. Layers that read the same tensor compute its patch
    norm once. BatchNorms behind layers that stayed plain are folded too.

    Args:
        model: what ``spherify`` or ``load`` returned. Its mode does not matter: the running statistics are used.
        example_input: as in ``spherify``; guessed where it is None.
        inplace: fold ``model`` itself, at no second copy of its weights.

    Returns:
        A model of the same class in eval mode. It cannot be trained, and ``unspherify`` cannot take it back.

    Raises:
        ModelError: the model has no converted layer or is folded already, cannot be copied, or does not run on the
            example input.
    """
    parts = list(model.modules())
    if any(isinstance(part, Folded) for part in parts):
        raise ModelError(f"{type(model).__name__} is folded already.")
    if not any(isinstance(part, AngularLayer) for part in parts):
        raise ModelError(f"{type(model).__name__} has no converted layer to fold; convert it with spherify(model).")
    return fold_any(model, example_input=example_input, inplace=inplace)


def fold_any(model: nn.Module, *, example_input: Any = None, inplace: bool = False) -> nn.Module:
    """``fold``, also of a plain network: then it is its BatchNorms that are folded."""
    plan = what_to_fold(model, example_input)
    try:
        folded = model if inplace else copy.deepcopy(model)
    except Exception as error:  # a model's own attributes may raise anything
        raise ModelError(f"{type(model).__name__} cannot be copied ({one_line(error)}); pass inplace=True.") from error
    apply_fold_(folded, plan)
    return folded


def can_be_folded(module: nn.Module) -> bool:
    if type(module) in FOLDED:
        assert isinstance(module, AngularLayer)
        return module.operator != "identity"
    return type(module) in PLAIN_LAYERS


def what_to_fold(model: nn.Module, example_input: Any = None) -> FoldPlan:
    """What a run shows of a copy without data in which every angular layer multiplies plainly."""
    trial = copy_without_data(model, "meta").eval()
    for part in trial.modules():
        if isinstance(part, AngularLayer):
            part.operator, part.fixed_k, part.k_logit = "identity", None, None
    if example_input is not None:
        candidates = [as_inputs(example_input)]
    else:
        dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
        candidates = [Inputs(in_type(args, dtype)) for args in candidate_inputs(model)]
    failure: ModelError | None = None
    for inputs in candidates:
        try:
            recording = record(trial, inputs, training=False)
        except ModelError as error:
            failure = failure or error
        else:
            return plan_fold(model, recording, can_be_folded, takes_in)
    raise failure or ModelError(f"{type(model).__name__}: no input can be guessed; pass example_input=... .")


def in_type(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Guessed inputs in the type of the model's weights."""
    return map_tree(lambda value: value.to(dtype) if isinstance(value, Tensor) else value, args)


def as_inputs(example: Any) -> Inputs:
    if isinstance(example, Mapping):
        return Inputs((), example)
    return Inputs(tuple(example)) if isinstance(example, tuple) else Inputs((example,))


def apply_fold_(model: nn.Module, plan: FoldPlan) -> None:
    """Fold in place, layer by layer, and note it on the model."""
    model.eval()
    modules = dict(model.named_modules())
    stores = {path: store for group in plan.shared for store in [SharedNorms()] for path in group}
    for path, module in modules.items():
        if not can_be_folded(module):
            continue
        norm = modules[plan.norms[path]] if path in plan.norms else None
        activation = modules[plan.activations[path]] if path in plan.activations else None
        if isinstance(module, AngularLayer):
            fold_angular_(module, norm, activation, stores.get(path))
        elif norm is not None:
            fold_plain_(module, norm)
        for part in (norm, activation):
            if part is not None:
                take_away_(part)
    setattr(model, FOLD, plan)
    refuse_training_of_what_holds_folded_layers_(model)


def refuse_training_of_what_holds_folded_layers_(model: nn.Module) -> None:
    """``train()`` is refused by the first module that it reaches, before any mode is changed."""
    for part in model.modules():
        if not isinstance(part, Folded) and any(isinstance(below, Folded) for below in part.modules()):
            part.__dict__["train"] = functools.partial(train_unless_folded, part)


def train_unless_folded(model: nn.Module, mode: bool = True) -> nn.Module:
    """``model.train(mode)`` where no folded layer is in it; such a layer refuses the mode itself."""
    for part in model.modules():
        if mode and isinstance(part, Folded):
            part.train()
    return type(model).train(model, mode)
