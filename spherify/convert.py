"""The route on one page: ``plan``, ``spherify``, ``unspherify``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spherify.errors import ModelError, OptionError
from spherify.functional.cosine import DEFAULT_EPS
from spherify.graph.adapters import with_adapters
from spherify.graph.after_heads import changes_after
from spherify.graph.loose import loose_parameters
from spherify.graph.record import Inputs, Recording, one_line, record_both
from spherify.graph.site import Site
from spherify.graph.survey import survey
from spherify.graph.uses import runs_after
from spherify.models.checkpoint import load_checkpoint_
from spherify.models.effort import modest_settings
from spherify.models.inputs import candidate_inputs
from spherify.models.resolve import SOURCE, Source, build, resolve
from spherify.plan.heads import plan_heads
from spherify.plan.notes import in_words
from spherify.plan.options import Options
from spherify.plan.plan import Plan, draft
from spherify.rewrite.apply import apply_, undo_
from spherify.rewrite.classifiers import becomes_head
from spherify.rewrite.refusals import check_model
from spherify.rewrite.swaps import SWAPS
from spherify.rewrite.verify import check_that_something_is_converted, verify


def spherify(
    model: str | nn.Module,
    *,
    operator: str = "cosine",
    k: float | None = None,
    k_shared: str = "filter",
    eps: float = DEFAULT_EPS,
    skip_shortcuts: bool = False,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    linear: bool = True,
    head: str = "keep",
    head_operator: str | None = None,
    head_k: float | None = None,
    margin: float | None = None,
    scale: float | None = None,
    norm: str = "keep",
    activation: str = "keep",
    gain: str = "auto",
    bias: str = "keep",
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    example_input: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """Rebuild a network on angles: its conv and linear layers become SphereConv layers.

    The result is of the same class, with the same API, the same Parameters and the same state-dict keys, to which
    operator parameters (``gain``, ``bias``, ``k_logit``) are added where the plan says so. The conversion is
    verified by a recorded run before it is returned.

    Args:
        model: a name (``resnet18``, ``timm:...``, ``torchvision:...``) or any ``nn.Module``.
        operator, k, k_shared, eps, skip_shortcuts, include, exclude, linear, head, head_operator, head_k, margin,
            scale, norm, activation, gain, bias: see ``spherify.Options``.
        num_classes: the size of the classifier; a module that has another size gets new class weights.
        pretrained: for a name, with the library's weights.
        checkpoint: for a name, a file whose weights are loaded before the conversion.
        seed: for a name, of the initial weights.
        example_input: what the model is called with: a tensor, a tuple of positional or a dict of keyword
            arguments. Guessed where it is None.
        inplace: convert ``model`` itself instead of a copy.

    Returns:
        The converted model.

    Raises:
        OptionError: an option is wrong, or a selector matches no layer.
        ModelError: the model cannot be converted in this form, or does not run on the example input.
        FileError: the checkpoint does not fit.
        SpherifyError: nothing would be converted, or pretrained weights cannot be had.
        RewriteError: the converted model fails its verification; with ``inplace`` it has been restored.
    """
    report = plan(
        model,
        operator=operator,
        k=k,
        k_shared=k_shared,
        eps=eps,
        skip_shortcuts=skip_shortcuts,
        include=include,
        exclude=exclude,
        linear=linear,
        head=head,
        head_operator=head_operator,
        head_k=head_k,
        margin=margin,
        scale=scale,
        norm=norm,
        activation=activation,
        gain=gain,
        bias=bias,
        num_classes=num_classes,
        pretrained=pretrained,
        checkpoint=checkpoint,
        seed=seed,
        example_input=example_input,
    )
    return report.apply(inplace=inplace or isinstance(model, str))


def plan(
    model: str | nn.Module,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    example_input: Any = None,
    **options: Any,
) -> Plan:
    """What ``spherify`` would do with a model, and why; nothing is changed.

    Args:
        options: the fields of ``spherify.Options``.
        The others are as in ``spherify``.

    Returns:
        A plan that prints as a table, has ``summary()``, ``to_dict()``, and ``apply()``.

    Raises:
        As ``spherify``, but for the verification.
    """
    chosen = Options(**options)
    classes = chosen.num_classes
    source: Source | None = None
    if isinstance(model, str):
        source = resolve(model, {} if classes is None else {"num_classes": classes})
        model = build_plain(source, pretrained, checkpoint, seed)
    elif pretrained or checkpoint is not None or seed is not None:
        raise OptionError("pretrained, checkpoint and seed go with a model's name, not with a module.")
    check_model(model)
    inputs, recordings = first_run(model, example_input)
    sites = with_adapters(model, survey(model, recordings))
    label = type(model).__name__ if source is None else source.label
    removes = "remove" in (chosen.norm, chosen.activation) or chosen.has_angular_head
    others = runs_after(model, recordings, sites) if removes else {}
    heads = plan_heads(
        sites,
        chosen,
        model=label,
        becomes_head=becomes_head,
        changes=changes_after(model, recordings, sites) if chosen.has_angular_head else {},
        runs_after=others,
        resizes=source is None,
    )
    report = draft(sites, chosen, model=label, converts=SWAPS.converts, runs_after=others, heads=heads)
    report = replace(report, notes=(*report.notes, *notes_on_run(model, recordings, sites)))
    return bound(report, model, source, recordings, inputs)


def notes_on_run(model: nn.Module, recordings: Sequence[Recording], sites: Sequence[Site]) -> list[str]:
    notes = []
    if len(recordings) == 1:
        untrained = "Train mode could not be recorded (it may need targets)"
        notes.append(f"{untrained}: layers that run in it alone count as unused.")
    if loose := loose_parameters(model, recordings, sites):
        outside = "multiplied with an activation outside any conv or linear layer"
        notes.append(f"Not converted: {in_words(loose)}, {outside}.")
    return notes


def build_plain(source: Source, pretrained: bool, checkpoint: str | Path | None, seed: int | None) -> nn.Module:
    if seed is not None:
        if not 0 <= seed < 2**63:
            raise OptionError(f"seed={seed} is out of range; choose a number from 0 to 2**63 - 1.")
        torch.manual_seed(seed)
    model = build(source, pretrained=pretrained)
    if checkpoint is not None:
        load_checkpoint_(model, checkpoint)
    return model


def first_run(model: nn.Module, example_input: Any) -> tuple[Inputs, tuple[Recording, ...]]:
    """Record the model on the user's input, or on the first guess that it runs on.

    A guess on which it also trains goes before one on which it does not: Inception's auxiliary head needs 299 pixels.
    """
    settings = modest_settings(model)
    if example_input is not None:
        inputs = replace(as_inputs(example_input), settings=settings)
        return inputs, record_both(model, inputs)
    candidates = [Inputs(args, settings=settings) for args in candidate_inputs(model)]
    if not candidates:
        raise ModelError(f"{type(model).__name__}: no input can be guessed; pass example_input=... .")
    failures = []
    for device in ("meta", "cpu"):
        untrained = None
        for inputs in candidates:
            try:
                recordings = record_both(model, inputs, devices=(device,))
            except ModelError as error:
                failures.append(error)
                continue
            if len(recordings) == 2 or device == "cpu":
                return inputs, recordings
            untrained = untrained or (inputs, recordings)
        if untrained is not None:
            return untrained
    raise failures[0]


def as_inputs(example: Any) -> Inputs:
    if isinstance(example, Mapping):
        return Inputs((), example)
    return Inputs(tuple(example)) if isinstance(example, tuple) else Inputs((example,))


def bound(
    report: Plan, model: nn.Module, source: Source | None, recordings: tuple[Recording, ...], inputs: Inputs
) -> Plan:
    """The plan with the hand that carries it out on its model."""

    def carry_out(target: nn.Module | None = None, *, inplace: bool = False) -> nn.Module:
        check_that_something_is_converted(report)
        target = check_model(model if target is None else target)
        converted = target if inplace else copy_of(target)
        try:
            apply_(converted, report)
            verify(converted, report, recordings, inputs)
        except Exception:
            undo_(converted)
            raise
        if source is not None:
            setattr(converted, SOURCE, source)
        return converted

    return replace(report, carry_out=carry_out)


def copy_of(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a model's own attributes may raise anything
        raise ModelError(f"{type(model).__name__} cannot be copied ({one_line(error)}); pass inplace=True.") from error


def unspherify(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Take a conversion back: plain layers with the same Parameters, outputs as before bit for bit.

    Trained weights stay as they are; gains and learned k, which a plain layer has no place for, are dropped.

    Args:
        inplace: restore ``model`` itself instead of a copy.

    Raises:
        ModelError: nothing in the model was converted, or it cannot be copied.
        RewriteError: a bias or norm that the conversion removed was not saved with the folder it was loaded from.
    """
    restored = model if inplace else copy_of(model)
    if undo_(restored) == 0:
        raise ModelError(f"{type(model).__name__} has no converted layer, so there is nothing to take back.")
    restored.__dict__.pop(SOURCE, None)
    return restored
