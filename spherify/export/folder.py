"""``save`` and ``load``: a converted model as a folder of weights and a config that rebuilds it."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from spherify.errors import FileError, OptionError
from spherify.export.atomic import replacing_folder
from spherify.export.describe import plan_as_it_stands, source_for
from spherify.export.fold import apply_fold_
from spherify.functional.responses import K_MAX, K_MIN
from spherify.graph.folding import FOLD, FoldPlan
from spherify.models.resolve import CUSTOM, SOURCE, Source, build, has_model, version_of
from spherify.plan.plan import Plan
from spherify.rewrite.apply import CONVERSION, apply_, conversion_of, in_short, misfits
from spherify.rewrite.classifiers import biases_taken, take_biases_
from spherify.version import __version__

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT_VERSION = 1
LIBRARY_NAME = "spherify"
TAKEN = "spherify.taken_bias:"  # before the path of a head: the bias that it had, which no state dict holds


def save(model: nn.Module, folder: str | Path, *, arguments: dict[str, Any] | None = None) -> Path:
    """Write a converted model: ``model.safetensors`` and ``config.json``, in one step.

    Args:
        model: what ``spherify`` returned, trained or not; a DDP or compiled wrapper is looked through.
        folder: replaced if it holds a converted model, made if it does not exist. Its other files stay.
        arguments: what the base model was built with beside its name, where the model cannot tell.

    Returns:
        The folder.

    Raises:
        RewriteError: the model is not a converted one.
        OptionError: the folder holds something else.
        FileError: the disk refused, or the model has state that is no tensor.
    """
    folder = Path(folder)
    model = unwrapped(model)
    plan = plan_as_it_stands(model, conversion_of(model))
    check_target(folder)
    source = source_for(model, arguments)
    tensors, ties = tensors_to_write(model)
    try:
        with replacing_folder(folder) as new:
            safetensors.torch.save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            config = config_of(plan, source, ties, new / WEIGHTS, model.__dict__.get(FOLD))
            (new / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode)  # safetensors lets nobody else read
    except (OSError, safetensors.SafetensorError) as error:
        text = getattr(error, "strerror", None) or error
        raise FileError(f"{folder} could not be written ({text}); what was there is unchanged.") from error
    return folder


def unwrapped(model: nn.Module) -> nn.Module:
    """The converted model inside DDP, torch.compile and the like; a model's own ``module`` is no wrapping."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        if CONVERSION in inner.__dict__:
            return inner
        inner = getattr(inner, "_orig_mod", getattr(inner, "module", None))
    return model


def check_target(folder: Path) -> None:
    """Raises OptionError unless the folder is new, empty, or a converted model."""
    try:
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"{folder} is a file; give a folder to write to.")
        if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
            raise OptionError(f"{folder} holds something else than a converted model; give a new folder.")
    except OSError as error:
        raise OptionError(f"{folder} cannot be written to ({error.strerror or error}); give another folder.") from None


def is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("library_name") == LIBRARY_NAME


def config_of(
    plan: Plan, source: Source, ties: dict[str, str], weights: Path, folded: FoldPlan | None = None
) -> dict[str, Any]:
    """No root-level ``architecture``: timm refuses the folder instead of building the plain network from it."""
    config = {
        "library_name": LIBRARY_NAME,
        "format_version": FORMAT_VERSION,
        "spherify_version": __version__,
        "base": {
            "library": source.library,
            "name": source.name,
            "version": source.version,
            "arguments": source.arguments,
        },
        **plan.to_record(),
        **({} if folded is None else {"folded": folded.to_record()}),
        "k_range": [K_MIN, K_MAX],
        "head": {
            "kind": plan.options.head,
            **({"settings": plan.heads[0].head.to_dict()} if plan.heads and plan.heads[0].head else {}),
            "layers": [decision.site.name for decision in plan.decisions if "@head" in decision.site.roles],
        },
        "weights": {"file": WEIGHTS, "bytes": weights.stat().st_size, "sha256": digest_of(weights), "ties": ties},
    }
    return {**config, "fingerprint": fingerprint_of(config)}


def fingerprint_of(config: dict[str, Any]) -> str:
    """Of everything else in the config, whatever its layout."""
    rest = {key: value for key, value in config.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_to_write(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors on the CPU, each once, and for every other name of a tensor the name it is stored by."""
    first_name: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise FileError(f"{name} is state of type {type(value).__name__}, which safetensors cannot hold.")
        if value.is_meta:
            raise FileError(f"{name} has no data (it is on meta); load or initialise the model before saving it.")
        if id(value) in first_name:
            ties[name] = first_name[id(value)]
            continue
        first_name[id(value)] = name
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    for name, bias in biases_taken(model).items():
        if not bias.is_meta:  # lost with an earlier folder, of a version that did not keep it
            tensors[TAKEN + name] = bias.detach().cpu().clone()
    return tensors, ties


def load(folder: str | Path, *, base: nn.Module | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Rebuild a saved model: the plain base, the recorded conversions, every weight.

    Args:
        base: the plain model, for one that is the user's own; a copy of it is converted.
        device: where the weights are put.

    Returns:
        The converted model, in train mode as a newly built one; a folded one in eval mode.

    Raises:
        OptionError: there is no such folder, or ``base`` is missing.
        FileError: a file is damaged or was changed, the format is newer, or the base model is another one now.
    """
    folder = Path(folder)
    config = read_config(folder)
    source = Source(**config["base"])
    tensors = read_weights(folder, config)
    for fresh in bases(source, base, folder):
        plan = plan_for(fresh, config, folder)
        apply_(fresh, plan)
        if "folded" in config:
            apply_fold_(fresh, FoldPlan.from_record(config["folded"]))
        assign_tensors_(fresh, tensors, config["weights"]["ties"], folder)
        if not has_meta_tensors(fresh):  # buffers that no state dict holds stay on meta; then it is built with data
            break
    if "folded" not in config:
        fresh.train()
    if source.library != CUSTOM:
        setattr(fresh, SOURCE, source)
    return fresh.to(device)


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        leftovers = sorted(folder.absolute().parent.glob(f".{folder.name}.new-*"))
        hint = f"; a whole copy may stand in {leftovers[0]}" if leftovers and not folder.exists() else ""
        raise OptionError(f"{folder} holds no {CONFIG}, so it is not a saved model{hint}.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{folder / CONFIG} is damaged ({error}); save the model again.") from error
    if not isinstance(config, dict) or config.get("library_name") != LIBRARY_NAME:
        raise FileError(f"{folder / CONFIG} is not spherify's; give a folder that spherify.save wrote.")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FileError(
            f"{folder} has format version {version}, and this spherify {__version__} reads up to {FORMAT_VERSION}; "
            "update spherify."
        )
    if config.get("fingerprint") != fingerprint_of(config):
        raise FileError(f"{folder / CONFIG} was changed after it was saved; restore it, or save the model again.")
    if config["k_range"] != [K_MIN, K_MAX]:
        raise FileError(f"{folder} has learned k in {config['k_range']}, this version in {[K_MIN, K_MAX]}.")
    return config


def read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    path, expected = folder / WEIGHTS, config["weights"]
    if not path.is_file():
        raise FileError(f"{path} is missing; save the model again.")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise FileError(f"{path} has {size} bytes, not the {expected['bytes']} saved; it was cut short or replaced.")
    if digest_of(path) != expected["sha256"]:
        raise FileError(f"{path} is damaged: its contents are not those saved.")
    packed = safetensors.torch.load_file(path)
    # In the file tensors lie at any byte, where CPU kernels add in another order; copies are aligned as any new tensor.
    return {name: packed.pop(name).clone() for name in list(packed)}


def bases(source: Source, base: nn.Module | None, folder: Path) -> Iterator[nn.Module]:
    """Plain models to convert: on meta first, then with data."""
    if base is not None:
        yield copy.deepcopy(base)
    elif source.library == CUSTOM:
        raise OptionError(
            f"{folder} holds a {source.name}, which no library builds; pass the plain model as base=... ."
        )
    elif not has_model(source.library, source.name):
        raise FileError(
            f"{folder} was made from {source.label} of {source.library} {source.version}, "
            f"which {source.library} {version_of(source.library)} does not have; install that version."
        )
    else:
        with contextlib.suppress(OptionError):  # some builders compute with tensors
            yield build(source, device="meta")
        yield build(source)


def plan_for(base: nn.Module, config: dict[str, Any], folder: Path) -> Plan:
    """The recorded plan, after a check that every layer of it stands in the base as it did.

    Raises:
        FileError: a layer is missing, or has another type or shape.
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    plan = Plan.from_record(config, lambda name: type(modules.get(name, nn.Module())))
    problems = misfits(base, plan)
    problems += [
        f"{layer['name']} is a {type(modules[layer['name']]).__name__}, not a {layer['type']}"
        for layer in config["layers"]
        if layer["name"] in modules and type(modules[layer["name"]]).__name__ != layer["type"]
    ]
    if problems:
        raise FileError(f"{folder} does not fit {type(base).__name__} as it is built now: {in_short(problems)}.")
    return plan


def assign_tensors_(model: nn.Module, tensors: dict[str, Tensor], ties: dict[str, str], folder: Path) -> None:
    """Every tensor under all its names, the names of one tensor tied again."""
    taken = {name.removeprefix(TAKEN): tensor for name, tensor in tensors.items() if name.startswith(TAKEN)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(TAKEN)}
    everything = {**tensors, **{name: tensors[stored] for name, stored in ties.items()}}
    try:
        model.load_state_dict(everything, strict=True, assign=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:200]
        raise FileError(f"{folder / WEIGHTS} does not fit the model that {CONFIG} describes ({text}).") from error
    for name, stored in ties.items():
        owner, _, key = stored.rpartition(".")
        target, _, alias = name.rpartition(".")
        table = "_parameters" if key in model.get_submodule(owner)._parameters else "_buffers"
        getattr(model.get_submodule(target), table)[alias] = getattr(model.get_submodule(owner), table)[key]
    take_biases_(model, taken)


def has_meta_tensors(model: nn.Module) -> bool:
    """Anything without data: Parameters, buffers, and tensors kept as plain attributes."""
    return any(
        isinstance(value, Tensor) and value.is_meta
        for module in model.modules()
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
    )
