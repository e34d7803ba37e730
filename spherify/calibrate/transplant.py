"""Closed-form transplantation: layer by layer, the angular filters that answer most like the donor's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spherify.calibrate.absorb import write_direction_, write_scale_
from spherify.calibrate.pair import Gatherer, Pair, angular_call, rows_wanted
from spherify.calibrate.parts import Part, in_working_order, parts_of, unit
from spherify.calibrate.regression import fitted, scale_and_shift
from spherify.calibrate.slopes import row_weights


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a transplantation is done.

    Attributes:
        ridges: tried for each layer, relative to the mean square of an input; held-out images choose.
        rounds: how often one-sided targets are moved; 0 takes the plain ones.
        rows: at most so many rows a layer.
        corrects_sums: the last layer of a residual branch makes up for the error of the sum.
        refits_kept: plain layers whose inputs changed are fitted too.
        weighs_rows: the more the donor's outputs depend on a position, the more it counts.
        output_solves: at most so many linear solves of the network's outputs at the end; 0 for none.
        seed: of the sample of positions.
    """

    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    rounds: int = 3
    rows: int = 40_000
    corrects_sums: bool = True
    refits_kept: bool = True
    weighs_rows: bool = True
    output_solves: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """How near a layer's outputs are to the donor's, over the sampled positions."""

    name: str
    relative_error: float
    cosine: float


@torch.no_grad()
def transplant_(pair: Pair, settings: Settings, progress: Callable[[str], None] = lambda name: None) -> list[Fit]:
    """Fit every part in graph order, each on what the fitted ones before it give it."""
    run = pair.student.recorded
    every = parts_of(run, kept=True)
    for part in every:
        if part.is_angular:
            for call in part.calls:
                pair.student.overrides[call] = angular_call(part, run.nodes[call].target)
    changed = 0
    chosen = []
    for part in every:
        if part.is_angular:
            changed |= sum(1 << call for call in part.calls)
            chosen.append(part)
        elif settings.refits_kept and any(run.ancestors[call] & changed for call in part.calls):
            chosen.append(part)
    ordered = in_working_order(run, chosen)
    pair.student.want([len(run.nodes) - 1])
    pair.donor.want([len(pair.donor.recorded.nodes) - 1])
    weights = row_weights(pair, ordered, settings.seed, progress) if settings.weighs_rows else None
    fits = []
    for number, part in enumerate(ordered):
        progress(part.name)
        gatherer = Gatherer(
            pair,
            part,
            rows_wanted=rows_wanted(part, settings.rows),
            corrects=settings.corrects_sums,
            weights=weights,
            seed=settings.seed + number,
        )
        gatherer.gather()
        fits.append(fit_(part, gatherer, settings))
    return fits


def fit_(part: Part, gatherer: Gatherer, settings: Settings) -> Fit:
    """Fit the direction as for the cosine, then scale and offset to the response that it really has.

    Angles to the fitted filters are mostly near a right one, where every response is nearly its slope times the cosine.
    """
    samples, truths = gatherer.samples(settings.rounds > 0)
    run = gatherer.pair.student.recorded
    centred, weights = part.can_shift(run), samples.weights
    groups = samples.rows.shape[0]
    old = part.filters.detach().flatten(1).float().unflatten(0, (groups, -1))
    directions, _ = unit(old)
    scale, _ = scale_and_shift(samples.rows @ directions.mT, samples.targets, centred=centred, weights=weights)
    prior = directions * scale[:, :, None]
    line, targets = fitted(samples, prior, ridges=settings.ridges, rounds=settings.rounds, centred=centred)
    new, _ = unit(line.weight)
    response = part.response(samples.rows @ new.mT)
    scale, shift = scale_and_shift(response, targets, centred=centred, weights=weights)
    write_(part, new, scale, shift, response)
    answers = response * scale[:, None] + shift[:, None]
    return fit_of(part.name, answers, truths)


def write_(part: Part, new: Tensor, scale: Tensor, shift: Tensor, response: Tensor) -> None:
    lengths = write_direction_(part, new)
    flat = response.transpose(1, 2).flatten(0, 1)  # (O, R)
    scale, shift = scale.flatten(), shift.flatten()
    if part.is_angular:
        write_scale_(part, scale, shift, flat.mean(1), flat.var(1, correction=0))
    elif part.norm is not None:
        z = flat * lengths[:, None]
        write_scale_(part, scale / lengths, shift, z.mean(1), z.var(1, correction=0))
    else:
        part.filters.data.copy_((new.flatten(0, 1) * scale[:, None]).view_as(part.filters))
        if part.bias is not None:
            part.bias.data[part.rows] = shift


def fit_of(name: str, answers: Tensor, truths: Tensor) -> Fit:
    error = (answers - truths).norm() / truths.norm().clamp_min(1e-20)
    cosine = (answers * truths).sum() / (answers.norm() * truths.norm()).clamp_min(1e-20)
    return Fit(name, float(error), float(cosine))
