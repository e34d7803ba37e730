"""Weights from other programs' files: what is read, what is refused, and a real network that still sees."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from real_data import loaders, shared_data
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.cifar_resnet import CifarResNet
from spherify import load, save, spherify
from spherify.errors import FileError, OptionError
from spherify.models.checkpoint import load_checkpoint_, read_checkpoint


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))


def filled(value: float) -> dict[str, Tensor]:
    """A state dict for ``network`` in which every float is ``value``."""
    return {
        name: torch.full_like(tensor, value) if tensor.is_floating_point() else tensor
        for name, tensor in network().state_dict().items()
    }


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def written(content: object, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


class Wicked:
    """A pickle of this makes a file where it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


# ---------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".th", ".bin", ""])
def test_every_kind_of_file_is_read(tmp_path, suffix):
    path = written(filled(0.5), tmp_path / f"weights{suffix}")
    model = network()
    load_checkpoint_(model, path)
    assert_close(model.state_dict(), filled(0.5), rtol=0, atol=0)


def test_a_file_of_the_old_format_is_read(tmp_path):
    torch.save(filled(0.5), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    assert read_checkpoint(tmp_path / "old.pth").keys() == filled(0.5).keys()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module._orig_mod."]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix, suffix):
    path = written(prefixed(prefix, filled(0.5)), tmp_path / f"weights{suffix}")
    assert read_checkpoint(path).keys() == filled(0.5).keys()


def test_a_prefix_that_only_some_names_have_belongs_to_the_names(tmp_path):
    path = written({"module.weight": torch.ones(1), "bias": torch.ones(1)}, tmp_path / "weights.pth")
    assert read_checkpoint(path).keys() == {"module.weight", "bias"}


def test_a_model_whose_own_layers_stand_in_a_module_called_module_is_loaded(tmp_path):
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    written({"module.weight": torch.eye(2), "module.bias": torch.ones(2)}, tmp_path / "weights.pth")
    load_checkpoint_(model, tmp_path / "weights.pth")
    assert torch.equal(model.module.weight, torch.eye(2))


def test_a_plain_file_is_loaded_into_a_wrapped_model(tmp_path):
    model = nn.DataParallel(network())
    load_checkpoint_(model, written(filled(0.5), tmp_path / "weights.pth"))
    assert torch.equal(model.module[0].weight, torch.full((4, 3, 3, 3), 0.5))


@pytest.mark.parametrize("container", ["state_dict", "model", "model_ema", "state_dict_ema"])
def test_every_container_is_opened(tmp_path, container):
    path = written({"epoch": 3, container: prefixed("module.", filled(0.5))}, tmp_path / "weights.pth")
    assert read_checkpoint(path).keys() == filled(0.5).keys()


@pytest.mark.parametrize(
    ("order", "winner"),
    [
        (["model", "state_dict"], "state_dict"),
        (["state_dict", "model_ema"], "model_ema"),
        (["state_dict_ema", "model_ema", "state_dict", "model"], "state_dict_ema"),  # timm's own order
        (["model", "state_dict", "model_ema", "state_dict_ema"], "state_dict_ema"),
    ],
)
def test_averaged_weights_win_over_the_last_step(tmp_path, order, winner):
    values = {container: float(number) for number, container in enumerate(order)}
    path = written({name: filled(value) for name, value in values.items()}, tmp_path / "weights.pth")
    assert read_checkpoint(path)["0.weight"].unique().tolist() == [values[winner]]


def test_a_container_that_holds_no_tensors_by_name_is_not_opened(tmp_path):
    content = {"model": "resnet20", "state_dict_ema": None, "state_dict": filled(0.5)}
    assert read_checkpoint(written(content, tmp_path / "weights.pth")).keys() == filled(0.5).keys()


def test_a_file_of_timms_training_script_is_read(tmp_path):
    arguments = argparse.Namespace(model="resnet20", lr=0.1, nothing=None, sizes=[3, 32, 32])
    content = {"epoch": 7, "arch": "resnet20", "state_dict": filled(0.5), "args": arguments, "version": 2}
    assert read_checkpoint(written(content, tmp_path / "last.pth.tar")).keys() == filled(0.5).keys()


def test_counters_of_batch_norms_may_be_missing(tmp_path):
    old = {name: tensor for name, tensor in filled(0.5).items() if not name.endswith("num_batches_tracked")}
    model = network()
    model[1].num_batches_tracked.fill_(4)
    load_checkpoint_(model, written(old, tmp_path / "weights.pth"))
    assert model[1].num_batches_tracked == 4
    assert model[1].running_var.unique().tolist() == [0.5]


def test_weights_of_another_type_are_cast(tmp_path):
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in filled(0.5).items()}
    model = network()
    load_checkpoint_(model, written(half, tmp_path / "weights.safetensors"))
    assert model[0].weight.dtype == torch.float32
    assert model[0].weight.unique().tolist() == [0.5]


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_does_not_exist_is_a_wrong_call(tmp_path, suffix):
    with pytest.raises(OptionError, match=rf"^checkpoint .*nowhere{re.escape(suffix)} is not a file\.$"):
        read_checkpoint(tmp_path / f"nowhere{suffix}")


def test_a_folder_is_a_wrong_call(tmp_path):
    with pytest.raises(OptionError, match="is not a file"):
        read_checkpoint(tmp_path)


def test_the_wicked_pickle_does_its_work_where_it_is_trusted(tmp_path):
    """The next test can fail."""
    pickle.loads(pickle.dumps(Wicked(tmp_path / "victim")))
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_of_more_than_weights_is_refused_and_never_executed(tmp_path, new_format):
    content = {"state_dict": filled(0.5), "more": Wicked(tmp_path / "victim")}
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(FileError, match=r"weights\.pth cannot be read as weights .*; save it again as") as caught:
        read_checkpoint(tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "victim").exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    with pytest.raises(FileError, match="cannot be read as weights"):
        read_checkpoint(written(network(), tmp_path / "model.pth"))


def test_reading_a_file_trusts_no_more_than_before(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(written(filled(0.5), tmp_path / "weights.pth"))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.99])
def test_a_truncated_file_is_one_line(tmp_path, suffix, share):
    path = written(filled(0.5), tmp_path / f"weights{suffix}")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(FileError, match=rf"weights{re.escape(suffix)} cannot be read as weights \(") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["notes.pth", "notes.safetensors"])
def test_a_file_of_something_else_is_one_line(tmp_path, name):
    (tmp_path / name).write_text("These are not weights.\n" * 50)
    with pytest.raises(FileError, match="cannot be read as weights") as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], r"holds a list, not tensors by name\."),
        (torch.ones(2), r"holds a Tensor, not tensors by name\."),
        ({"epoch": 3, "lr": 0.1}, r"holds no tensors by name; it has epoch, lr\."),
        ({}, r"holds no tensors by name; it has nothing\."),
        ({"state_dict": {}}, r"holds no tensors by name; it has nothing\."),
    ],
)
def test_a_file_without_tensors_by_name_is_one_line(tmp_path, content, message):
    with pytest.raises(FileError, match=message):
        read_checkpoint(written(content, tmp_path / "weights.pth"))


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in filled(0.5).items() if key != name}


MISFITS = {
    "missing": (without("4.bias"), r"1 missing keys \(4\.bias\)\.$"),
    "unexpected": ({**filled(0.5), "5.weight": torch.ones(2)}, r"1 unexpected keys \(5\.weight\)\.$"),
    "unexpected counter": ({**filled(0.5), "9.num_batches_tracked": torch.tensor(1)}, "1 unexpected keys"),
    "misshapen": (
        {**filled(0.5), "4.weight": torch.ones(3, 4)},
        r"1 other shapes \(4\.weight is \(3, 4\), not \(2, 4\)\)\.$",
    ),
    "all three": (
        {**without("4.bias"), "4.weight": torch.ones(3, 4), "x": torch.ones(1)},
        r"1 missing keys \(4\.bias\); 1 unexpected keys \(x\); 1 other shapes \(4\.weight",
    ),
    "many": (
        {**filled(0.5), **{f"extra{number}": torch.ones(1) for number in range(9)}},
        r"9 unexpected keys \(extra0, extra1, extra2, \.\.\.\)\.$",
    ),
}


@pytest.mark.parametrize(("content", "message"), MISFITS.values(), ids=MISFITS)
def test_keys_that_do_not_fit_are_named_and_the_model_stays_as_it_was(tmp_path, content, message):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FileError, match=rf"^checkpoint .*weights\.pth does not fit Sequential: .*{message}"):
        load_checkpoint_(model, written(content, tmp_path / "weights.pth"))
    assert_close(model.state_dict(), before, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- a real network


@pytest.fixture(scope="module")
def pretrained() -> CifarResNet:
    model = CifarResNet(20)
    load_checkpoint_(model, shared_data() / "cifar10" / "resnet20-12fca82f.th")
    return model.eval()


@pytest.fixture(scope="module")
def test_images() -> tuple[Tensor, Tensor]:
    """The first 1,000 official test images of CIFAR-10, normalised as the network was trained."""
    images, labels, _ = loaders().load_pngpack(shared_data() / "cifar10" / "cifar10-lossless-4k1k.npz", "test")
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (torch.from_numpy(images).float() / 255 - mean) / deviation
    return x.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def test_real_weights_recognise_real_images_once_loaded(pretrained, test_images):
    assert len(test_images[1]) == 1000
    # 91.5 % in data/MANIFEST.md, 91.73 % on all 10,000 as published; 10 % without the weights
    assert accuracy(pretrained, *test_images) >= 0.91


def test_a_network_with_real_weights_is_converted_saved_and_loaded(pretrained, test_images, tmp_path):
    images = test_images[0][:50]
    converted = spherify(pretrained, operator="cosine", example_input=images[:2]).eval()
    assert torch.equal(converted.layer3[2].conv2.weight, pretrained.layer3[2].conv2.weight)
    loaded = load(save(converted, tmp_path / "resnet20"), base=CifarResNet(20)).eval()
    with torch.no_grad():
        outputs = converted(images)
        assert torch.equal(loaded(images), outputs)
        assert not torch.allclose(outputs, pretrained(images), atol=1e-2)  # something was converted
