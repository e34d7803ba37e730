"""The folder of a converted model: what comes back is what went in, and what does not fit is told in one line."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from spherify import Options, load, save, spherify, unspherify
from spherify.errors import FileError, ModelError, OptionError, RewriteError, SpherifyError
from spherify.export import folder as folder_format
from spherify.export.folder import CONFIG, WEIGHTS, digest_of, fingerprint_of

SMALL_SWIN = dict(img_size=56, embed_dim=16, depths=[2, 2], num_heads=[2, 2], num_classes=5)
SMALL_COAT = dict(img_size=32, serial_depths=[1, 1, 1, 1], parallel_depth=1, num_classes=5)


@torch.no_grad()
def answer(model: nn.Module, side: int = 64, channels: int = 3) -> Tensor:
    """In eval mode, to two seeded images, in the type of the model."""
    images = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))
    return model.eval()(images.to(next(model.parameters()).dtype))


def brought_back(model: nn.Module, folder: Path, **arguments) -> nn.Module:
    return load(save(model, folder), **arguments)


def config_in(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def edit(folder: Path, change: Callable[[dict], object], *, sign: bool = False) -> None:
    """Change the config by hand; ``sign`` gives it the fingerprint of the changed one."""
    config = config_in(folder)
    change(config)
    if sign:
        config["fingerprint"] = fingerprint_of(config)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


class Own(nn.Module):
    """A network that no library builds."""

    def __init__(self, filters: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, filters, 3)
        self.norm = nn.BatchNorm2d(filters)
        self.fc = nn.Linear(filters, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """timm's smallest ResNet, converted; not to be changed."""
    return spherify("test_resnet", seed=0)


@pytest.fixture(scope="module")
def saved_once(resnet, tmp_path_factory) -> Path:
    return save(resnet, tmp_path_factory.mktemp("saved") / "resnet")


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    """A saved model of one's own to damage."""
    return shutil.copytree(saved_once, tmp_path / "resnet")


# ---------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("test_resnet", 64),
        ("test_vit", 160),
        ("test_convnext", 64),
        ("test_nfnet", 64),
        ("resnet18", 64),
        ("torchvision:squeezenet1_0", 64),
        ("torchvision:regnet_y_400mf", 64),
    ],
)
def test_a_named_model_answers_bit_for_bit_as_before(name, side, tmp_path):
    model = spherify(name, seed=0)
    assert torch.equal(answer(brought_back(model, tmp_path / "saved"), side), answer(model, side))


def test_loaded_tensors_are_aligned_as_new_ones(saved_once):
    """In the file they lie at any byte, and CPU kernels add unaligned numbers in another order: other last bits."""
    tensors = list(load(saved_once).state_dict().values())
    assert {tensor.data_ptr() % 64 for tensor in tensors} == {torch.empty(1000).data_ptr() % 64} == {0}


@pytest.mark.parametrize("operator", ["cosine", "linear", "sigmoid", "learnable"])
@pytest.mark.parametrize("gain", ["none", "learned"])
def test_a_model_of_every_operator_answers_bit_for_bit_as_before(operator, gain, tmp_path):
    model = spherify(Own(), operator=operator, gain=gain, eps=3e-4)
    assert torch.equal(answer(brought_back(model, tmp_path / "saved", base=Own())), answer(model))


@pytest.mark.parametrize("operator", ["sigmoid", "learnable"])
def test_k_and_eps_come_back(operator, tmp_path):
    back = brought_back(spherify(Own(), operator=operator, k=0.07, eps=3e-4), tmp_path / "saved", base=Own())
    assert torch.as_tensor(back.conv.k).detach().flatten()[0].item() == pytest.approx(0.07, rel=1e-5)
    assert back.conv.eps == 3e-4


@pytest.mark.parametrize(
    "options",
    [
        dict(norm="remove"),
        dict(activation="remove"),
        dict(norm="remove", activation="remove", bias="drop"),
        dict(bias="drop", gain="learned"),
        dict(head="convert"),
        dict(skip_shortcuts=True, exclude=["@stem"]),
        dict(include=["layer3.*"]),
    ],
    ids=str,
)
def test_every_option_comes_back(options, tmp_path):
    model = spherify("test_resnet", seed=0, **options)
    back = brought_back(model, tmp_path / "saved")
    assert torch.equal(answer(back), answer(model))
    assert [(name, type(module)) for name, module in back.named_modules()] == [
        (name, type(module)) for name, module in model.named_modules()
    ]


def test_buffers_that_no_state_dict_holds_are_computed_again(tmp_path):
    model = spherify(timm.create_model("swin_tiny_patch4_window7_224", **SMALL_SWIN))
    hidden = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    assert any("relative_position_index" in name for name in hidden)
    back = load(save(model, tmp_path / "swin", arguments=SMALL_SWIN))
    assert torch.equal(answer(back, 56), answer(model, 56))


def test_a_module_under_two_names_is_stored_once_and_stays_one(tmp_path):
    model = spherify(timm.create_model("coat_tiny", **SMALL_COAT))
    back = load(save(model, tmp_path / "coat", arguments=SMALL_COAT))
    names = config_in(tmp_path / "coat")["weights"]["ties"]
    assert names
    assert not names.keys() & safetensors.torch.load_file(tmp_path / "coat" / WEIGHTS).keys()
    assert all(back.get_parameter(name) is back.get_parameter(stored) for name, stored in names.items())
    assert torch.equal(answer(back, 32), answer(model, 32))


def test_a_weight_tied_between_two_layers_stays_one_parameter(tmp_path):
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
        model[2].weight = model[0].weight
        return model

    back = brought_back(spherify(tied(), head="convert"), tmp_path / "saved", base=tied())
    assert back[2].weight is back[0].weight
    assert config_in(tmp_path / "saved")["weights"]["ties"] == {"2.weight": "0.weight"}


def test_a_k_shared_by_the_network_stays_one_parameter(tmp_path):
    back = brought_back(spherify("test_resnet", operator="learnable", k_shared="network"), tmp_path / "saved")
    logits = [module.k_logit for module in back.modules() if getattr(module, "k_logit", None) is not None]
    assert len(logits) > 5
    assert all(logit is logits[0] for logit in logits)
    assert sum(name.endswith("k_logit") for name, _ in back.named_parameters()) == 1


def test_trained_gains_and_k_survive(tmp_path):
    model = spherify(Own(), operator="learnable", gain="learned", head="convert")
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    back = brought_back(model, tmp_path / "saved", base=Own())
    for name in ("conv.gain", "conv.k_logit", "fc.gain", "fc.k_logit", "fc.bias", "norm.running_mean"):
        assert not torch.equal(model.state_dict()[name], before[name]), name
        assert torch.equal(back.state_dict()[name], model.state_dict()[name]), name
    assert torch.equal(answer(back), answer(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_keep_it(dtype, tmp_path):
    model = spherify("test_resnet", seed=0, operator="learnable").to(dtype)
    back = brought_back(model, tmp_path / "saved")
    assert {tensor.dtype for tensor in back.parameters()} == {dtype}
    assert torch.equal(answer(back), answer(model))


def test_weights_in_channels_last_order_come_back_with_the_same_values(resnet, tmp_path):
    model = copy.deepcopy(resnet).to(memory_format=torch.channels_last)
    assert not model.layer1[0].conv1.weight.is_contiguous()
    save(model, tmp_path / "saved")
    back = load(tmp_path / "saved")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())
    # equal values in another memory order; the kernel for that order may round otherwise
    torch.testing.assert_close(answer(back), answer(model))


def test_frozen_layers_are_saved(tmp_path):
    model = spherify("test_resnet", seed=0).requires_grad_(False)
    assert torch.equal(answer(brought_back(model, tmp_path / "saved")), answer(model))


@pytest.mark.parametrize("classes", [7, 0])
@pytest.mark.parametrize("head", ["keep", "convert"])
def test_a_classifier_changed_after_the_conversion_survives(classes, head, tmp_path):
    model = spherify("test_resnet", seed=0, head=head)
    model.reset_classifier(classes)
    back = brought_back(model, tmp_path / "saved")
    assert back.num_classes == classes
    assert answer(back).shape == (2, classes or 96)  # 96 features before the classifier
    assert torch.equal(answer(back), answer(model))


def test_a_converted_classifier_that_was_replaced_by_a_plain_one_comes_back_plain(tmp_path):
    model = spherify("test_resnet", seed=0, head="convert", gain="none")
    model.reset_classifier(1000)  # of the same shape as before
    back = brought_back(model, tmp_path / "saved")
    assert type(back.fc) is nn.Linear
    assert torch.equal(answer(back), answer(model))
    entry = next(layer for layer in config_in(tmp_path / "saved")["layers"] if layer["name"] == "fc")
    assert (entry["action"], entry["rule"]) == ("keep", "replaced")


def test_a_model_built_with_fewer_classes_comes_back_with_them(tmp_path):
    for name in ("test_resnet", "torchvision:squeezenet1_0"):
        back = brought_back(spherify(name, num_classes=3), tmp_path / "saved")
        assert answer(back).shape == (2, 3)


def test_a_loaded_model_is_in_train_mode_and_can_be_trained(saved_once):
    model = load(saved_once)
    assert model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_loaded_model_is_saved_again_to_the_same_bytes(saved_once, tmp_path):
    again = save(load(saved_once), tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (again / name).read_bytes() == (saved_once / name).read_bytes()


def test_a_loaded_model_can_be_taken_back(tmp_path):
    plain = timm.create_model("test_resnet")
    back = unspherify(brought_back(spherify(plain), tmp_path / "saved"))
    assert torch.equal(answer(back), answer(plain))


def test_another_process_gets_the_same_answers(saved_once, resnet, tmp_path):
    script = (
        "import sys, torch, spherify; m = spherify.load(sys.argv[1]).eval(); "
        "x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)); "
        "torch.save(m(x).detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, saved_once, tmp_path / "answer.pt"], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "answer.pt"), answer(resnet))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrappers_are_looked_through(wrap, resnet, saved_once, tmp_path):
    save(wrap(copy.deepcopy(resnet)), tmp_path / "saved")
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == (saved_once / WEIGHTS).read_bytes()


def test_a_models_own_part_called_module_is_no_wrapper(tmp_path):
    model = nn.Module()
    model.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.forward = model.module.forward
    save(spherify(model, head="convert"), tmp_path / "saved")
    assert [layer["name"] for layer in config_in(tmp_path / "saved")["layers"]] == ["module.0"]


# ---------------------------------------------------------------------------------------------- models of one's own


def test_a_model_of_ones_own_needs_a_base(tmp_path):
    save(spherify(Own()), tmp_path / "own")
    kind = f"{Own.__module__}.Own"
    with pytest.raises(OptionError, match=rf"holds a {re.escape(kind)}, which no library builds; pass .* base="):
        load(tmp_path / "own")


def test_the_base_given_is_not_changed(tmp_path):
    base = Own()
    before = copy.deepcopy(base.state_dict())
    brought_back(spherify(Own()), tmp_path / "own", base=base)
    assert type(base.conv) is nn.Conv2d
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_base_of_another_shape_is_refused(tmp_path):
    save(spherify(Own()), tmp_path / "own")
    with pytest.raises(FileError, match=r"does not fit Own .*conv has shape \(9, 3, 3, 3\), not \(8, 3, 3, 3\)"):
        load(tmp_path / "own", base=Own(9))


def test_a_torchvision_model_that_was_given_as_a_module_is_ones_own(tmp_path):
    import torchvision

    model = spherify(torchvision.models.squeezenet1_0(weights=None))
    save(model, tmp_path / "saved")
    assert config_in(tmp_path / "saved")["base"]["library"] == "custom"
    back = load(tmp_path / "saved", base=torchvision.models.squeezenet1_0(weights=None))
    assert torch.equal(answer(back), answer(model))


def test_a_structure_that_the_name_does_not_build_is_saved_with_a_warning(tmp_path):
    model = spherify(timm.create_model("test_resnet", act_layer=nn.SiLU))
    with pytest.warns(UserWarning, match=r"^timm:test_resnet.* is not this model: .* is SiLU.*, not ReLU.*arguments="):
        save(model, tmp_path / "saved")
    assert config_in(tmp_path / "saved")["base"]["library"] == "custom"
    back = load(tmp_path / "saved", base=timm.create_model("test_resnet", act_layer=nn.SiLU))
    assert torch.equal(answer(back), answer(model))


def test_the_warning_points_at_the_callers_line(tmp_path):
    model = spherify(timm.create_model("test_resnet", act_layer=nn.SiLU))
    with pytest.warns(UserWarning) as caught:
        save(model, tmp_path / "saved")
    assert caught[0].filename == __file__


def test_a_layer_put_in_after_the_conversion_is_saved_with_a_warning(tmp_path):
    model = spherify("test_resnet", seed=0)
    model.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(96, 3))
    with pytest.warns(UserWarning, match=r"fc is Sequential\(\), not Linear"):
        save(model, tmp_path / "saved")
    base = timm.create_model("test_resnet")
    base.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(96, 3))
    assert torch.equal(answer(load(tmp_path / "saved", base=base)), answer(model))


def test_arguments_rebuild_a_model_that_cannot_tell_them(tmp_path):
    model = spherify(timm.create_model("test_resnet", in_chans=1, num_classes=5))
    save(model, tmp_path / "saved", arguments=dict(in_chans=1, num_classes=5))
    assert torch.equal(answer(load(tmp_path / "saved"), channels=1), answer(model, channels=1))


def test_wrong_arguments_are_not_believed(tmp_path):
    model = spherify(timm.create_model("test_resnet", in_chans=1))
    with pytest.warns(UserWarning, match=r"in_chans.* is not this model: conv1\.0 is Conv2d\(1, .* not Conv2d\(4, "):
        save(model, tmp_path / "saved", arguments=dict(in_chans=4))


def test_arguments_that_are_no_plain_values_are_refused(resnet, tmp_path):
    with pytest.raises(OptionError, match=r"cannot be written to config\.json \(.*\); give plain values\."):
        save(resnet, tmp_path / "saved", arguments=dict(act_layer=nn.SiLU))
    assert not (tmp_path / "saved").exists()


# ---------------------------------------------------------------------------------------------- what is on disk


def test_the_folder_holds_weights_and_a_config_and_no_pickle(saved_once):
    assert sorted(file.name for file in saved_once.iterdir()) == [CONFIG, WEIGHTS]
    assert safetensors.torch.load_file(saved_once / WEIGHTS)


def test_the_config_says_what_design_asks_for(saved_once):
    config = config_in(saved_once)
    assert config["library_name"] == "spherify"
    assert config["format_version"] == 1
    assert config["base"] == {
        "library": "timm",
        "name": "test_resnet",
        "version": timm.__version__,
        "arguments": {"num_classes": 1000},
    }
    assert config["options"].keys() == Options().to_dict().keys()
    assert config["head"] == {"kind": "keep", "layers": ["fc"]}
    weights = config["weights"]
    assert weights["bytes"] == (saved_once / WEIGHTS).stat().st_size
    assert weights["sha256"] == digest_of(saved_once / WEIGHTS)


def test_the_config_has_no_architecture_at_its_root(saved_once):
    assert "architecture" not in config_in(saved_once)


def test_timm_refuses_the_folder_instead_of_building_the_plain_network(saved_once):
    with pytest.raises(Exception, match="architecture"):
        timm.create_model(f"local-dir:{saved_once}", pretrained=True)


def test_timm_would_build_the_plain_network_from_a_config_with_an_architecture(saved):
    """The two tests above protect from this."""
    edit(saved, lambda config: config.update(architecture="test_resnet", pretrained_cfg={}))
    assert type(timm.create_model(f"local-dir:{saved}", pretrained=True).conv1[0]) is nn.Conv2d


@pytest.mark.parametrize(("operator", "k"), [("cosine", None), ("linear", None), ("sigmoid", 0.3), ("learnable", 0.5)])
def test_every_operator_parameter_is_a_number(operator, k, tmp_path):
    save(spherify(Own(), operator=operator), tmp_path / "saved")
    options = config_in(tmp_path / "saved")["options"]
    assert (options["operator"], options["k"], options["eps"]) == (operator, k, 1e-4)  # the defaults, spelt out


def test_the_list_of_layers_is_resolved(saved_once, resnet):
    layers = config_in(saved_once)["layers"]
    converted = [layer["name"] for layer in layers if layer["action"] == "convert"]
    assert converted == [name for name, module in resnet.named_modules() if type(module).__name__ == "SphereConv2d"]
    assert {"name", "type", "shape", "rule", "reason", "has_gain"} <= layers[0].keys()


def test_the_same_model_gives_the_same_bytes(saved_once, tmp_path):
    again = save(spherify("test_resnet", seed=0), tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (again / name).read_bytes() == (saved_once / name).read_bytes()


def test_other_weights_give_other_bytes(saved_once, tmp_path):
    other = save(spherify("test_resnet", seed=1), tmp_path / "other")
    assert (other / WEIGHTS).read_bytes() != (saved_once / WEIGHTS).read_bytes()


def test_both_files_can_be_read_by_whom_the_umask_lets(resnet, tmp_path):
    before = os.umask(0o027)
    try:
        save(resnet, tmp_path / "saved")
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "saved").iterdir()}
    assert modes == {0o640}


def test_other_files_in_the_folder_are_kept(saved):
    (saved / "README.md").write_text("mine")
    (saved / "logs" / "deep").mkdir(parents=True)
    (saved / "logs" / "deep" / "loss.csv").write_text("1,2")
    (saved / "link").symlink_to("README.md")
    save(spherify("test_resnet", seed=1), saved)
    assert (saved / "README.md").read_text() == "mine"
    assert (saved / "logs" / "deep" / "loss.csv").read_text() == "1,2"
    assert (saved / "link").is_symlink()
    assert torch.equal(answer(load(saved)), answer(spherify("test_resnet", seed=1)))


def test_a_link_to_a_folder_stays_a_link(saved, tmp_path):
    (tmp_path / "latest").symlink_to(saved, target_is_directory=True)
    model = spherify("test_resnet", seed=1)
    save(model, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert torch.equal(answer(load(saved)), answer(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "resnet"]


def test_folders_above_are_made(resnet, tmp_path):
    assert save(resnet, tmp_path / "a" / "b" / "c").is_dir()


def test_the_folder_may_be_given_as_text_and_is_returned(resnet, tmp_path):
    assert save(resnet, str(tmp_path / "saved")) == tmp_path / "saved"
    assert isinstance(load(str(tmp_path / "saved")), type(resnet))


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = spherify("test_resnet", seed=0).eval()
    before, keys = answer(model), list(model.__dict__)
    save(model, tmp_path / "saved")
    assert torch.equal(answer(model), before)
    assert not model.training
    assert list(model.__dict__) == keys


# ---------------------------------------------------------------------------------------------- what is not written


@pytest.mark.parametrize(
    "content",
    [
        {"notes.txt": "mine"},
        {"config.json": '{"architecture": "resnet18"}'},  # timm's
        {"config.json": "not json"},
        {"config.json": '["a", "list"]'},
    ],
    ids=["notes", "timm", "not json", "list"],
)
def test_a_folder_of_something_else_is_refused_and_left_alone(resnet, tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match="holds something else than a converted model; give a new folder"):
        save(resnet, tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == content


def test_a_file_is_refused_and_left_alone(resnet, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="file is a file; give a folder"):
        save(resnet, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_is_written_to(resnet, tmp_path):
    assert load(save(resnet, tmp_path))


def test_a_name_that_the_disk_does_not_take_is_one_line(resnet, tmp_path):
    with pytest.raises(OptionError, match=r"cannot be written to \(File name too long\); give another folder\."):
        save(resnet, tmp_path / ("a" * 300))


def test_a_file_in_the_way_of_the_folders_above_is_one_line(resnet, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SpherifyError, match=r"(could not be|cannot be) written"):
        save(resnet, tmp_path / "file" / "saved")


def test_a_plain_model_is_refused(tmp_path):
    with pytest.raises(
        RewriteError, match=r"^Own is not a converted model; convert it with spherify\(model\) first\.$"
    ):
        save(Own(), tmp_path / "saved")


def test_a_model_without_data_is_refused(tmp_path):
    model = spherify(Own())
    model.fc.to("meta")
    with pytest.raises(FileError, match=r"^fc\.weight has no data \(it is on meta\); load or initialise"):
        save(model, tmp_path / "saved")


class Talkative(Own):
    def get_extra_state(self) -> str:
        return "some words"

    def set_extra_state(self, state: object) -> None:
        pass


def test_state_that_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(FileError, match=r"_extra_state is state of type str, which safetensors cannot hold"):
        save(spherify(Talkative()), tmp_path / "saved")


def test_a_disk_that_refuses_is_one_line_and_leaves_the_old_model(saved, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    before = answer(load(saved))
    model = spherify("test_resnet", seed=1)
    monkeypatch.setattr(folder_format.safetensors.torch, "save_file", full)
    with pytest.raises(FileError, match=r"resnet could not be written \(No space left on device\); what was there is"):
        save(model, saved)
    monkeypatch.undo()
    assert torch.equal(answer(load(saved)), before)
    assert [path.name for path in saved.parent.iterdir()] == ["resnet"]


def test_a_file_larger_than_the_system_allows_is_one_line_and_leaves_the_old_model(saved):
    """A true refusal, of the library that writes the weights."""
    resource = pytest.importorskip("resource")
    before = answer(load(saved))
    model = spherify("test_resnet", seed=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            FileError, match=r"could not be written \(.*File too large.*\); what was there is unchanged"
        ):
            save(model, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(answer(load(saved)), before)
    assert [path.name for path in saved.parent.iterdir()] == ["resnet"]


# ---------------------------------------------------------------------------------------------- what is not read


def test_a_folder_that_does_not_exist_is_a_wrong_call(tmp_path):
    with pytest.raises(OptionError, match=r"nowhere holds no config\.json, so it is not a saved model\.$"):
        load(tmp_path / "nowhere")


def test_a_copy_that_a_killed_process_left_is_pointed_at(saved):
    saved.rename(saved.with_name(".resnet.new-123-0123abcd"))
    with pytest.raises(OptionError, match=r"a whole copy may stand in .*\.resnet\.new-123-0123abcd\.$"):
        load(saved)
    assert load(saved.with_name(".resnet.new-123-0123abcd"))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (CONFIG, OptionError, r"holds no config\.json, so it is not a saved model"),
        (WEIGHTS, FileError, r"model\.safetensors is missing; save the model again\."),
    ],
)
def test_a_missing_file_is_named(saved, name, error, message):
    (saved / name).unlink()
    with pytest.raises(error, match=message):
        load(saved)


@pytest.mark.parametrize("missing", [1, 1000])
def test_truncated_weights_are_refused(saved, missing):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:-missing])
    size = len(content)
    with pytest.raises(FileError, match=rf"has {size - missing} bytes, not the {size} saved; it was cut short"):
        load(saved)


@pytest.mark.parametrize("place", [0, 100, -1, -100_000])
def test_one_flipped_bit_in_the_weights_is_seen(saved, place):
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[place] ^= 1
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(FileError, match=r"model\.safetensors is damaged: its contents are not those saved\."):
        load(saved)


CHANGES: dict[str, Callable[[dict], object]] = {
    "operator": lambda config: config["options"].update(operator="linear"),
    "eps": lambda config: config["options"].update(eps=1e-3),
    "a layer's action": lambda config: config["layers"][0].update(action="keep"),
    "a layer less": lambda config: config["layers"].pop(),
    "base": lambda config: config["base"].update(name="test_resnet2"),
    "digest": lambda config: config["weights"].update(sha256="0" * 64),
    "one more key": lambda config: config.update(comment="mine"),
    "no fingerprint": lambda config: config.pop("fingerprint"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_config_is_seen(saved, change):
    edit(saved, change)
    with pytest.raises(FileError, match=r"config\.json was changed after it was saved; restore it, or save"):
        load(saved)


def test_another_layout_of_the_same_config_is_no_change(saved, resnet):
    text = json.dumps(dict(reversed(config_in(saved).items())), indent=4)
    (saved / CONFIG).write_text(text)
    assert torch.equal(answer(load(saved)), answer(resnet))


@pytest.mark.parametrize("content", [b"", b"not json", b'{"library_name": "spherify",', b"\xff\xfe\x00bad"])
def test_a_config_that_is_no_json_is_damaged(saved, content):
    (saved / CONFIG).write_bytes(content)
    with pytest.raises(FileError, match=r"config\.json is damaged \(.*\); save the model again\.") as caught:
        load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ['{"architecture": "resnet18"}', "[]", "3", '{"library_name": "timm", "format_version": 1}']
)
def test_someone_elses_config_is_refused(saved, content):
    (saved / CONFIG).write_text(content)
    with pytest.raises(FileError, match=r"config\.json is not spherify's; give a folder that spherify\.save wrote\."):
        load(saved)


@pytest.mark.parametrize("version", [2, 99, "1", None])
def test_a_newer_format_asks_for_a_newer_spherify(saved, version):
    edit(saved, lambda config: config.update(format_version=version), sign=True)
    with pytest.raises(FileError, match=rf"has format version {version}, and this spherify .* reads up to 1; update"):
        load(saved)


def test_a_newer_format_is_told_before_its_unknown_contents(saved):
    (saved / CONFIG).write_text('{"library_name": "spherify", "format_version": 2, "all": "different"}')
    with pytest.raises(FileError, match="update spherify"):
        load(saved)


def rename_first(config: dict) -> None:
    config["layers"][0]["name"] = "conv9"


def reshape_first(config: dict) -> None:
    config["layers"][0]["shape"] = [16, 3, 5, 5]


def retype_first(config: dict) -> None:
    config["layers"][0]["type"] = "Conv3d"


def alias_first(config: dict) -> None:
    config["layers"][0]["aliases"] = ["conv9"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_first, r"does not fit ResNet as it is built now: conv9 is missing"),
        (reshape_first, r"conv1\.0 has shape \(16, 3, 3, 3\), not \(16, 3, 5, 5\)"),
        (retype_first, r"conv1\.0 is a Conv2d, not a Conv3d"),
        (alias_first, r"conv1\.0 is missing"),
        (lambda config: config.update(removed_norms=["bn9"]), "bn9 is missing"),
    ],
)
def test_a_list_of_layers_that_does_not_fit_the_base_is_refused(saved, change, message):
    edit(saved, change, sign=True)
    with pytest.raises(FileError, match=message):
        load(saved)


@pytest.mark.parametrize(
    ("library", "version"), [("timm", timm.__version__), ("torchvision", __import__("torchvision").__version__)]
)
def test_a_model_that_the_library_no_longer_has_is_named_with_both_versions(saved, library, version):
    edit(saved, lambda c: c["base"].update(library=library, name="resnet_of_the_past", version="0.1"), sign=True)
    message = (
        rf"was made from {library}:resnet_of_the_past of {library} 0\.1, which {library} {re.escape(version)} does not"
    )
    with pytest.raises(FileError, match=message):
        load(saved)


def test_an_option_this_version_does_not_know_is_refused(saved):
    edit(saved, lambda config: config["options"].update(wings=2), sign=True)
    with pytest.raises(OptionError, match="option 'wings' is unknown"):
        load(saved)


def test_another_range_of_k_is_refused(saved):
    edit(saved, lambda config: config.update(k_range=[0.1, 10.0]), sign=True)
    with pytest.raises(FileError, match=r"has learned k in \[0\.1, 10\.0\], this version in \[0\.001, 1000\.0\]"):
        load(saved)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fill_the_model_are_refused(saved, change):
    tensors = safetensors.torch.load_file(saved / WEIGHTS)
    if change == "missing":
        del tensors["fc.bias"]
    else:
        tensors["fc.gain"] = torch.ones(1000)
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    new = dict(bytes=(saved / WEIGHTS).stat().st_size, sha256=digest_of(saved / WEIGHTS))
    edit(saved, lambda config: config["weights"].update(new), sign=True)
    with pytest.raises(FileError, match=r"model\.safetensors does not fit the model that config\.json describes"):
        load(saved)


def test_a_loaded_model_is_not_converted_twice(saved_once):
    with pytest.raises(ModelError, match="is already converted"):
        spherify(load(saved_once))
