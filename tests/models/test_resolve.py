"""Names to models: whose name it is, what is built, and what is said where nothing can be."""

import logging
import urllib.error

import pytest
import timm
import torch
import torchvision
from torch import nn

from spherify.errors import ModelError, OptionError, SpherifyError
from spherify.models import resolve as resolver
from spherify.models.resolve import Source, build, list_models, resolve, source_of


def no_download(*arguments, **options):
    raise urllib.error.URLError("no network in this test")


@pytest.fixture
def offline(monkeypatch):
    """Every way in which timm and torchvision fetch weights ends here, with or without a network."""
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_download)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_download)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", no_download)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_download)


# ---------------------------------------------------------------------------------------------- whose name it is


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("resnet18", "timm:resnet18"),
        ("vgg11", "timm:vgg11"),  # both have it
        ("shufflenet_v2_x1_0", "torchvision:shufflenet_v2_x1_0"),  # torchvision alone
        ("timm:resnet18", "timm:resnet18"),
        ("torchvision:resnet18", "torchvision:resnet18"),
        ("resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
        ("timm:vit_base_patch16_224.augreg_in21k", "timm:vit_base_patch16_224.augreg_in21k"),
    ],
)
def test_a_bare_name_is_timms_if_timm_has_it_and_a_prefix_decides(name, label):
    assert resolve(name).label == label


def test_both_libraries_have_vgg11_and_timm_has_no_shufflenet():
    """What the cases above rest on."""
    assert timm.is_model("vgg11")
    assert "vgg11" in torchvision.models.list_models()
    assert not timm.is_model("shufflenet_v2_x1_0")


@pytest.mark.parametrize(("name", "version"), [("timm:resnet18", timm), ("torchvision:resnet18", torchvision)])
def test_the_source_knows_the_version_of_its_library(name, version):
    assert resolve(name).version == version.__version__


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", r"^model 'resnet81' is unknown; close are .*resnet18.*; `spherify list models` shows all\.$"),
        ("torchvision:resnet19", "close are .*torchvision:resnet18"),
        ("timm:shufflenet_v2_x1_0", r"^model 'timm:shufflenet_v2_x1_0' is unknown"),
        ("qqqqqqqqqqqq", r"^model 'qqqqqqqqqqqq' is unknown; `spherify list models`"),  # nothing is close
        ("", "^model '' is unknown"),
        ("keras:resnet18", r"^library 'keras' is unknown in 'keras:resnet18'; choose one of: timm, torchvision\.$"),
        ("hf_hub:timm/resnet18", "^library 'hf_hub' is unknown"),
    ],
)
def test_an_unknown_name_is_refused_with_what_would_be_known(name, message):
    with pytest.raises(OptionError, match=message):
        resolve(name)


def test_close_matches_of_a_bare_name_come_from_both_libraries():
    with pytest.raises(OptionError, match=r"close are .*torchvision:shufflenet_v2_x1_0"):
        resolve("shufflenet_v2_x1_1")


@pytest.mark.parametrize("name", ["weights.pth", "saved"])
def test_a_path_given_as_a_name_is_called_a_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").touch()
    (tmp_path / "saved").mkdir()
    with pytest.raises(OptionError, match=rf"^{name} is a file or folder, not a model's name; give a name"):
        resolve(name)


def test_a_folder_with_a_models_name_does_not_hide_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert resolve("resnet18").label == "timm:resnet18"


# ---------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5", "torchvision:googlenet"])
def test_a_named_model_is_built_with_the_number_of_classes_asked_for(name):
    model = build(resolve(name, {"num_classes": 7}), device="meta")
    assert model.eval()(torch.empty(2, 3, 160, 160, device="meta")).shape == (2, 7)


def test_a_model_on_meta_has_no_data_and_one_on_the_cpu_has():
    source = resolve("test_resnet")
    assert all(tensor.is_meta for tensor in build(source, device="meta").state_dict().values())
    assert not any(tensor.is_meta for tensor in build(source).state_dict().values())


def test_the_seed_decides_the_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(build(resolve("test_resnet")))
    assert torch.equal(models[0].conv1[0].weight, models[1].conv1[0].weight)


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_resnet50_fpn",
        "retinanet_resnet50_fpn",
        "ssdlite320_mobilenet_v3_large",
        "deeplabv3_mobilenet_v3_large",
    ],
)
def test_no_backbone_is_downloaded_for_a_model_without_weights(offline, name):
    model = build(resolve(f"torchvision:{name}"), device="meta")
    assert any(isinstance(module, nn.Conv2d) for module in model.modules())


def test_without_our_care_torchvision_would_download_a_backbone(offline):
    """The test above can fail."""
    with pytest.raises(urllib.error.URLError), torch.device("meta"):
        torchvision.models.get_model("fasterrcnn_resnet50_fpn", weights=None)


def test_a_backbone_asked_for_by_name_is_asked_for(offline):
    arguments = {"weights_backbone": "IMAGENET1K_V1"}
    with pytest.raises(OptionError, match="no network in this test"):
        build(Source("torchvision", "fasterrcnn_resnet50_fpn", "", arguments), device="meta")


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18"])
def test_weights_that_cannot_be_had_are_one_line_with_the_remedy(offline, name):
    with pytest.raises(SpherifyError, match="its pretrained weights could not be had") as caught:
        build(resolve(name), pretrained=True)
    message = str(caught.value)
    assert not isinstance(caught.value, OptionError)
    assert "no network in this test" in message
    assert message.endswith("check the network, or give a local file with --checkpoint.")
    assert "\n" not in message
    assert len(message) < 400


def test_a_model_whose_weights_nobody_published_says_so(offline):
    published = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}
    name = next(name for name in timm.list_models("resnet*") if name not in published)
    with pytest.raises(SpherifyError, match=r"could not be had .*No pretrained weights exist"):
        build(resolve(name), pretrained=True)


def test_the_retries_of_a_download_are_not_told(monkeypatch, caplog):
    def noisy(*arguments, **options):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("gone")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", noisy)
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(SpherifyError, match="gone"):
        build(resolve("test_resnet"), pretrained=True)
    assert "Retrying" not in caplog.text
    assert logging.getLogger("huggingface_hub").level == before


def test_arguments_that_exclude_weights_are_no_matter_of_the_network(offline):
    # torchvision's weights fix the number of classes; timm makes a new classifier instead
    with pytest.raises(OptionError, match=r"could not be built with {'num_classes': 5}"):
        build(resolve("torchvision:resnet18", {"num_classes": 5}), pretrained=True)


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:resnet18"])
def test_an_argument_that_no_builder_takes_is_one_line(name):
    with pytest.raises(OptionError, match=rf"^{name} could not be built with {{'wings': 2}} \(TypeError: ") as caught:
        build(resolve(name, {"wings": 2}))
    assert "\n" not in str(caught.value)


def test_an_unknown_tag_is_one_line():
    with pytest.raises(OptionError, match=r"^timm:resnet18\.no_such_tag could not be built .*Invalid pretrained tag"):
        build(resolve("resnet18.no_such_tag"))


def test_a_builder_that_says_more_than_a_line_is_cut_to_one(monkeypatch):
    def verbose(source, pretrained):
        raise RuntimeError("first\nsecond " + "x" * 5_000)

    monkeypatch.setitem(resolver.builders, "timm", verbose)
    with pytest.raises(OptionError, match="RuntimeError: first second xxx") as caught:
        build(resolve("test_resnet"))
    assert len(str(caught.value)) < 300


def test_a_model_of_ones_own_is_not_built():
    with pytest.raises(ModelError, match=r"^mine.Net is no model of timm or torchvision; .* base="):
        build(Source("custom", "mine.Net", ""))


# ---------------------------------------------------------------------------------------------- lists


def test_the_list_has_every_model_of_both_libraries_with_its_prefix():
    labels = list_models()
    assert "timm:resnet18" in labels
    assert "torchvision:resnet18" in labels
    assert len(labels) == len(timm.list_models()) + len(torchvision.models.list_models())


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("resnet18", ["timm:resnet18", "torchvision:resnet18"]),
        ("torchvision:squeezenet*", ["torchvision:squeezenet1_0", "torchvision:squeezenet1_1"]),
        ("timm:resnet1[08]", ["timm:resnet18"]),
        ("no_such_*", []),
        ("esnet18", []),  # a glob is of the whole name
    ],
)
def test_a_pattern_is_a_glob_with_or_without_the_prefix(pattern, expected):
    assert list_models(pattern) == expected


def test_every_listed_name_resolves_to_itself():
    for label in list_models("*resnet*"):
        assert resolve(label).label == label


# ---------------------------------------------------------------------------------------------- from model to source


def test_a_timm_model_says_what_it_is():
    assert source_of(timm.create_model("test_resnet")) == Source("timm", "test_resnet.r160_in1k", timm.__version__, {})


def test_a_timm_model_says_how_many_classes_it_was_given():
    assert source_of(timm.create_model("test_resnet", num_classes=3)).arguments == {"num_classes": 3}


def test_what_a_timm_model_says_builds_it_again():
    model = timm.create_model("test_vit", num_classes=3)
    again = build(source_of(model), device="meta")
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "model", [torchvision.models.squeezenet1_0(weights=None), nn.Sequential(nn.Conv2d(3, 4, 3))], ids=["vision", "own"]
)
def test_other_models_are_their_users_own(model):
    kind = type(model)
    assert source_of(model) == Source("custom", f"{kind.__module__}.{kind.__qualname__}", "")


def test_a_configuration_that_names_no_timm_model_is_not_believed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.pretrained_cfg = {"architecture": "resnet_of_the_future"}
    assert source_of(model).library == "custom"
