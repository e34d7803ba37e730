"""A classifier for as many classes as the data have."""

from __future__ import annotations

from torch import nn

from spherify.errors import OptionError

LAST_LAYERS = ("fc", "head", "heads.head", "classifier", "classifier.6", "classifier.3", "classifier.2", "classifier.1")


def classes_of(model: nn.Module) -> int | None:
    """How many classes a model answers for, as far as it says so."""
    count = getattr(model, "num_classes", None)
    if isinstance(count, int):
        return count
    last = last_linear(model)
    return None if last is None else last[1].out_features


def last_linear(model: nn.Module) -> tuple[str, nn.Linear] | None:
    """The classifier of torchvision's networks, by the names they use."""
    for name in LAST_LAYERS:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            return name, layer
    return None


def fit_classifier(model: nn.Module, classes: int) -> bool:
    """Give the model a new classifier where it answers for another number of classes; whether it did.

    Raises:
        OptionError: the model does not say where its classifier is.
    """
    if classes_of(model) in (classes, None):
        return False
    reset = getattr(model, "reset_classifier", None)
    if callable(reset):
        reset(classes)
        return True
    found = last_linear(model)
    if found is None:
        raise OptionError(
            f"{type(model).__name__} answers for {classes_of(model)} classes and not for {classes}, and does not "
            "say where its classifier is; convert it with --num-classes first."
        )
    name, layer = found
    owner, _, key = name.rpartition(".")
    fresh = nn.Linear(layer.in_features, classes, bias=layer.bias is not None)
    setattr(model.get_submodule(owner), key, fresh)
    return True
