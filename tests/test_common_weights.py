import argparse
import io
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision

from common import backbones
from common.checkpoint import described
from common.distributed import RunError
from common.weights import load_backbone, load_tensors

# ------------------------------------------------------------------------------------ load_backbone


def tiny(seed=0, arch="resnet_tiny"):
    torch.manual_seed(seed)
    return backbones.build_backbone(arch, stem="small", in_chans=3, zero_init_residual=False)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_every_tensor_is_loaded(tmp_path):
    weights = {k: torch.randn(v.shape).to(v.dtype) for k, v in tiny(1).state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    backbone = tiny(2)
    load_backbone(backbone, str(tmp_path / "weights.pth"))
    assert same(backbone.state_dict(), weights)


def renamed(weights):
    weights["layer1.0.conv9.weight"] = weights.pop("layer1.0.conv1.weight")


def missing(weights):
    del weights["bn1.running_mean"]


def unknown(weights):
    weights["projector.weight"] = torch.zeros(3)


def reshaped(weights):
    weights["layer4.0.conv2.weight"] = weights["layer4.0.conv2.weight"].transpose(0, 1)[:5]


def not_a_tensor(weights):
    weights["bn1.bias"] = 3


def not_a_number(weights):
    weights["layer4.0.bn2.running_var"][3] = float("nan")


def infinite(weights):
    weights["bn1.weight"] = torch.full_like(weights["bn1.weight"], -float("inf"))


@pytest.mark.parametrize(
    "spoil, named",
    [
        (renamed, "layer1.0.conv"),
        (missing, "bn1.running_mean"),
        (unknown, "projector.weight"),
        (reshaped, "layer4.0.conv2.weight"),
        (not_a_tensor, "bn1.bias"),
        (not_a_number, "layer4.0.bn2.running_var is not finite (1 of 128 values)"),
        (infinite, "bn1.weight is not finite (16 of 16 values)"),
    ],
)
def test_a_tensor_that_does_not_match_is_named_and_nothing_is_loaded(spoil, named, tmp_path):
    path, backbone = tmp_path / "weights.pth", tiny(2)
    weights = dict(tiny(1).state_dict())
    spoil(weights)
    torch.save(weights, path)
    with pytest.raises(RunError) as error:
        load_backbone(backbone, str(path))
    assert str(path) in str(error.value) and named in str(error.value)
    assert "\n" not in str(error.value)
    assert same(backbone.state_dict(), tiny(2).state_dict())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no weights at all",
        saved(tiny().state_dict())[:5000],
        saved(tiny().state_dict())[:-50],
        saved([1, 2, 3]),
        saved(torch.zeros(3)),
        saved({1: torch.zeros(3)}),
    ],
    ids=["empty", "text", "half", "torn", "list", "tensor", "numbers"],
)
def test_a_file_that_is_no_state_dict_is_one_line_with_its_name(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(RunError) as error:
        load_backbone(tiny(), str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def zipped(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def scripted():
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), file)
    return file.getvalue()


@pytest.mark.parametrize("content, named", [
    (b"", "it is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    (b"\n<!DOCTYPE html><html lang=en>" + 80 * b" " + b"</html>", "web page"),
    (b'{"error": "Entry not found"}', "it is text"),
    (b"Access denied. Please log in to see this file, which is not for everybody.", "it is text"),
    (b"\x1f\x8b\x08\x00rest", "unpack it"),
    (b"\x89HDF\r\n\x1a\nrest", "Keras"),
    (zipped(**{"weights.npy": b"1", "b": b"2"}), "an archive of weights.npy b"),
    (saved({"a": torch.zeros(99)})[:-50], "breaks off before its end"),
    (struct.pack("<Q", 80) + b'{"a": {"dtype": "F32"', "breaks off before its end"),
    (struct.pack("<Q", 57) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}   ' + b"1234",
     "breaks off before its end"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_that_is_no_weights_is_named_as_what_it_is(content, named, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path} does not load: .*{named}") as error:
        load_backbone(tiny(), str(path))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_named_as_what_it_is(tmp_path):
    (tmp_path / "model.pt").write_bytes(scripted())
    with pytest.raises(RunError, match="it is TorchScript; torch.jit.load"):
        load_backbone(tiny(), str(tmp_path / "model.pt"))


def as_safetensors(weights):
    """The bytes of a safetensors file, tensors one behind the other."""
    names = {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.bool: "BOOL"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in weights.items():
        own = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape),
                        "data_offsets": [len(data), len(data) + len(own)]}
        data += own
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_safetensors_are_read(tmp_path):
    path, backbone = tmp_path / "model.safetensors", tiny(2)
    path.write_bytes(as_safetensors({**tiny(1).state_dict(), "fc.bias": torch.zeros(3)}))
    load_backbone(backbone, str(path))
    assert same(backbone.state_dict(), tiny(1).state_dict())
    odd = {"flag": torch.tensor([True, False, True]), "half": torch.rand(2, 3).half(),
           "brain": torch.rand(1).bfloat16(), "none": torch.zeros(0, 4), "one": torch.tensor(7)}
    path.write_bytes(as_safetensors(odd))  # beginning at odd places
    assert same(load_tensors(str(path)), odd)


class Payload:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(params=["zipped", "plain"])
def code_file(request, tmp_path):
    """A file that would make the folder `ran` beside it if its pickle were trusted."""
    path, payload = tmp_path / "weights.pth", Payload(tmp_path / "ran")
    zipped = saved({**tiny().state_dict(), "bn1.bias": payload})
    path.write_bytes(zipped if request.param == "zipped" else pickle.dumps(payload, protocol=2))
    return path


def test_code_in_a_file_is_not_run(code_file):
    with pytest.raises(RunError) as error:
        load_backbone(tiny(), str(code_file))
    assert not (code_file.parent / "ran").exists()
    assert str(code_file) in str(error.value) and "\n" not in str(error.value)


def test_code_in_a_file_is_refused_by_its_name_without_advice_to_run_it(code_file):
    with pytest.raises(RunError) as error:
        load_backbone(tiny(), str(code_file))
    assert f"{os.mkdir.__module__}.mkdir" in str(error.value)
    assert "weights_only" not in str(error.value)


def test_a_classifier_is_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    extra = {"fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}
    torch.save({**tiny(1).state_dict(), **extra}, path)
    backbone = tiny(2)
    load_backbone(backbone, str(path))
    assert same(backbone.state_dict(), tiny(1).state_dict())
    printed = capsys.readouterr().out
    assert str(path) in printed and "fc.weight" in printed and "fc.bias" in printed


def test_torchvisions_weights_give_torchvisions_pooled_features(tmp_path):
    model = torchvision.models.resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    backbone = backbones.build_backbone(
        "resnet18", stem="imagenet", in_chans=3, zero_init_residual=False
    )
    load_backbone(backbone, str(tmp_path / "resnet18.pth"))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        logits = backbone.eval()(images) @ model.fc.weight.T + model.fc.bias
        torch.testing.assert_close(logits, model(images))


# ---------------------------------------------------------------------- layouts of other code bases


def under(prefix, weights):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def head(*names):
    return {name: torch.zeros(3) for name in names}


def as_children(weights):
    """Names in a Sequential of a torchvision ResNet's children."""
    number = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    parts = [(key.partition("."), value) for key, value in weights.items()]
    return {f"{number[first]}.{rest}": value for (first, _, rest), value in parts}


def as_openmmlab(weights):
    """Names in OpenMMLab's vision transformer."""
    changes = {"patch_embed.proj.": "patch_embed.projection.", "blocks.": "layers.",
               ".norm1.": ".ln1.", ".norm2.": ".ln2.", ".mlp.fc1.": ".ffn.layers.0.0.",
               ".mlp.fc2.": ".ffn.layers.1."}
    renamed = {}
    for key, value in weights.items():
        key = key.replace("norm.", "ln1.") if key.startswith("norm.") else key
        for ours, theirs in changes.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


def teacher_beside_student(weights):
    other = {key: torch.zeros_like(value) for key, value in weights.items()}
    return {"student": {**under("module.backbone.", other), **head("module.head.mlp.0.weight")},
            "teacher": {**under("backbone.", weights), **head("head.mlp.0.weight")},
            "optimizer": {"param_groups": []}, "epoch": 3}


RESNET_FILES = {  # words printed, and the file with a ResNet's weights in it
    "MoCo": lambda w: {"epoch": 200, "arch": "resnet50", "state_dict": {
        **under("module.encoder_q.", w), **under("module.encoder_k.", zeros(w)),
        **head("module.encoder_q.fc.0.weight", "module.encoder_q.fc.0.bias", "module.queue",
               "module.queue_ptr")}},
    "MoCo v3": lambda w: {"state_dict": {
        **under("module.base_encoder.", w), **under("module.momentum_encoder.", zeros(w)),
        **head("module.base_encoder.fc.0.weight", "module.predictor.0.weight")}},
    "SimSiam or an older solo-learn": lambda w: {"state_dict": {
        **under("module.encoder.", w),
        **head("module.encoder.fc.0.weight", "module.predictor.0.weight")}},
    "plain state dict": lambda w: {  # SwAV, DeepCluster v2
        **under("module.", w), **head("module.projection_head.0.weight",
                                      "module.prototypes.weight", "module.prototypes0.weight")},
    "state_dict with a head, as SwAV's or lemniscate's": lambda w: {"state_dict": {
        **under("module.", w), **head("module.projection_head.0.weight", "module.fc.weight",
                                      "module.prototypes.prototypes0.weight")}, "epoch": 1},
    "DINO, teacher": teacher_beside_student,
    "Barlow Twins": lambda w: {"epoch": 1, "model": {
        **under("module.backbone.", w), **head("module.projector.0.weight", "module.bn.weight")}},
    "VISSL": lambda w: {"classy_state_dict": {"base_model": {"model": {
        "trunk": under("_feature_blocks.", w), "heads": head("0.clf.0.weight")}, "meta": {}}}},
    "VISSL, converted": lambda w: {"model_state_dict": {
        **under("_feature_blocks.", w), **head("heads.0.clf.0.weight")}},
    "VISSL, teacher of DINO": lambda w: {
        "classy_state_dict": {"base_model": {"model": {
            "trunk": under("_feature_blocks.", zeros(w)), "heads": {}}}},
        "loss": {**under("momentum_teacher.module.trunk._feature_blocks.", w),
                 **head("momentum_teacher.module.heads.0.mlp.0.weight", "center")}},
    "MMSelfSup, lightly or solo-learn": lambda w: {"meta": {"epoch": 1}, "state_dict": {
        **under("backbone.", w), **under("backbone_momentum.", zeros(w)),
        **head("neck.fc0.weight", "head.fc_cls.weight", "projection_head.layers.0.weight")}},
    "lightly, teacher": lambda w: {"state_dict": {
        **under("student_backbone.", zeros(w)), **under("teacher_backbone.", as_children(w)),
        **head("student_head.layers.0.weight", "teacher_head.layers.0.weight")}},
    "lightly's Sequential": lambda w: {"state_dict": {
        **under("backbone.", as_children(w)), **head("projection_head.layers.0.weight")}},
    "plain state dict, torchvision": lambda w: {**w, **head("fc.weight", "fc.bias")},
}
VIT_FILES = {
    "MAE": lambda w: {"model": {**w, **head("mask_token", "decoder_embed.weight",
                                            "decoder_pos_embed", "decoder_blocks.0.norm1.weight")},
                      "epoch": 1, "scaler": {}},
    "MAE, fc_norm taken for norm": lambda w: {"model": {
        **{key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: value
           for key, value in w.items()}, **head("head.weight", "head.bias")}},
    "DINO, teacher": teacher_beside_student,
    "MoCo v3": lambda w: {"state_dict": {**under("module.base_encoder.", w),
                                         **head("module.base_encoder.head.0.weight")}},
    "MMSelfSup, lightly or solo-learn": lambda w: {"state_dict": {
        **under("backbone.", as_openmmlab(w)), **head("neck.mask_token", "head.weight")}},
    "lightly, teacher": lambda w: {"state_dict": {
        **under("student_backbone.vit.", zeros(w)), **under("teacher_backbone.vit.", w),
        **head("teacher_backbone.mask_token", "teacher_backbone.vit.head.weight")}},
    "VISSL, teacher of DINO": lambda w: {"loss": {
        "teacher": {**under("trunk.", w), **head("heads.0.mlp.0.weight")}}},
    "plain state dict, timm": lambda w: {**w, **head("head.weight", "head.bias")},
}


def zeros(weights):
    return {key: torch.zeros_like(value) for key, value in weights.items()}


def micro(seed=0, image_size=16):
    torch.manual_seed(seed)
    return backbones.build_backbone("vit_micro", in_chans=3, image_size=image_size, patch_size=4,
                                    positions="learned", drop_path=0.0)


every_layout = pytest.mark.parametrize(
    "build, name, wrap",
    [(tiny, *item) for item in RESNET_FILES.items()]
    + [(micro, *item) for item in VIT_FILES.items()],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)


@every_layout
def test_every_tensor_of_a_foreign_layout_is_loaded(build, name, wrap, tmp_path, capsys):
    weights, path, backbone = build(1).state_dict(), tmp_path / "foreign.pth", build(2)
    torch.save(wrap(weights), path)
    load_backbone(backbone, str(path))
    assert same(backbone.state_dict(), weights)
    printed = capsys.readouterr().out
    assert str(path) in printed and f"{len(weights)} of {len(weights)} tensors" in printed
    if not name.startswith("lightly's"):
        assert name.partition(", t")[0] in printed


def test_the_heads_of_moco_v3s_small_transformer_are_not_taken_for_six(tmp_path):
    def small(arch):
        return backbones.build_backbone(arch, in_chans=3, image_size=16, patch_size=16,
                                        positions="sincos", drop_path=0.0)

    twelve, path = small("vit_small_12heads"), str(tmp_path / "vit-s-300ep.pth.tar")
    torch.save({"state_dict": under("module.base_encoder.", twelve.state_dict())}, path)
    load_backbone(small("vit_small_12heads"), path)
    with pytest.raises(RunError, match="has 12 attention heads.*--arch vit_small_12heads"):
        load_backbone(small("vit_small"), path)


def innermost(content):
    """The dictionaries of tensors in a file, with the backbone's last key."""
    if any(isinstance(value, torch.Tensor) for value in content.values()):
        yield content
    for value in content.values():
        if isinstance(value, dict):
            yield from innermost(value)


@every_layout
def test_one_renamed_tensor_stops_the_run_and_is_named(build, name, wrap, tmp_path):
    path, backbone = tmp_path / "foreign.pth", build(2)
    key = "layer3.0.conv2.weight" if build is tiny else "blocks.2.mlp.fc1.weight"
    weights = build(1).state_dict()
    content, spoiled = wrap(weights), 0
    for tensors in innermost(content):
        for theirs in [k for k, v in tensors.items() if v is weights[key]]:
            tensors[f"{theirs}_"] = tensors.pop(theirs)
            spoiled += 1
    assert spoiled == 1
    torch.save(content, path)
    with pytest.raises(RunError) as error:
        load_backbone(backbone, str(path))
    assert f"tensor {key}" in str(error.value) and "\n" not in str(error.value)
    assert same(backbone.state_dict(), build(2).state_dict())


@pytest.mark.parametrize("wrap", [
    lambda key: f"_orig_mod.{key}",
    lambda key: f"module._orig_mod.{key}",
    lambda key: f"_orig_mod.module.{key}",
    lambda key: key.replace("layer1.0.", "layer1._orig_mod.0.module."),
    lambda key: f"_fsdp_wrapped_module.{key}".replace(".conv", "._checkpoint_wrapped_module.conv"),
])
@pytest.mark.parametrize("name", ["plain state dict", "MoCo", "DINO, teacher"])
def test_wrappers_in_names_are_left_out_wherever_they_stand(name, wrap, tmp_path, capsys):
    weights, backbone = tiny(1).state_dict(), tiny(2)
    content = RESNET_FILES[name](weights)
    for tensors in list(innermost(content)):
        for key in list(tensors):
            tensors[wrap(key)] = tensors.pop(key)
    torch.save(content, tmp_path / "compiled.pth")
    load_backbone(backbone, str(tmp_path / "compiled.pth"))
    assert same(backbone.state_dict(), weights)
    assert len(capsys.readouterr().out.partition("left out: ")[2].split()) < 12


def test_a_tensor_that_is_there_with_and_without_a_wrapper_is_refused(tmp_path):
    weights = tiny(1).state_dict()
    torch.save({**weights, "_orig_mod.bn1.bias": weights["bn1.bias"] + 1}, tmp_path / "two.pth")
    with pytest.raises(RunError, match="two tensors bn1.bias"):
        load_backbone(tiny(), str(tmp_path / "two.pth"))


def test_heads_and_other_networks_are_listed_as_left_out(tmp_path, capsys):
    torch.save(RESNET_FILES["MoCo"](tiny(1).state_dict()), tmp_path / "moco.pth")
    load_backbone(tiny(), str(tmp_path / "moco.pth"))
    left_out = capsys.readouterr().out.partition("left out: ")[2].split()
    assert {"module.encoder_q.fc.0.weight", "module.queue", "arch", "epoch"} < set(left_out)
    assert "module.encoder_k.*" in left_out and len(left_out) < 12


def test_an_alexnet_is_refused_by_its_name(tmp_path):
    torch.save({"state_dict": head("features.module.0.weight", "top_layer.weight")},
               tmp_path / "deepcluster.pth")
    with pytest.raises(RunError, match="AlexNet or a VGG"):
        load_backbone(tiny(), str(tmp_path / "deepcluster.pth"))


def test_an_unknown_layout_shows_some_of_its_keys(tmp_path):
    torch.save({"network": head("one.weight"), "epoch": 1}, tmp_path / "other.pth")
    with pytest.raises(RunError, match="no known layout.*holds network epoch"):
        load_backbone(tiny(), str(tmp_path / "other.pth"))


def test_positions_of_another_image_size_are_kept_and_interpolated(tmp_path):
    large = micro(1, image_size=24).eval()
    torch.save(large.state_dict(), tmp_path / "vit.pth")
    backbone, images = micro(2).eval(), torch.rand(2, 3, 16, 16)
    load_backbone(backbone, str(tmp_path / "vit.pth"))
    with torch.no_grad():
        assert torch.equal(backbone(images), large(images))


def test_namespaces_and_numpy_scalars_are_read(tmp_path):
    extra = {"args": argparse.Namespace(lr=0.1, names=["a"], best=np.float64(0.5)),
             "best": np.float32(0.25), "epoch": np.int64(3), "done": np.bool_(True)}
    path = tmp_path / "weights.pth"
    for zipped in (True, False):
        backbone = tiny(2)
        torch.save({"state_dict": tiny(1).state_dict(), **extra}, path,
                   _use_new_zipfile_serialization=zipped)
        load_backbone(backbone, str(path))
        assert same(backbone.state_dict(), tiny(1).state_dict())
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    path.write_bytes(old)  # as NumPy 1 wrote it
    load_backbone(tiny(), str(path))


class Stranger:
    """A harmless class of somebody else's code, such as a logger in a checkpoint."""


@pytest.mark.parametrize("value", [Stranger(), np.arange(3), print, Stranger])
def test_other_objects_are_refused_by_name(value, tmp_path):
    torch.save({"state_dict": tiny(1).state_dict(), "other": value}, tmp_path / "odd.pth")
    with pytest.raises(RunError, match="asks to run [a-z_.A-Z]+, which is refused") as error:
        load_backbone(tiny(), str(tmp_path / "odd.pth"))
    assert "\n" not in str(error.value)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # beyond the call


@pytest.fixture
def history_buffer():
    """The log of OpenMMLab's engine, as far as a pickle of it goes."""

    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.arange(3.0)
            self.methods = {"min": Attribute("min")}

    class Attribute:
        def __init__(self, name):
            self.name = name

        def __reduce__(self):
            return getattr, (HistoryBuffer, self.name)

    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = names[-1], "HistoryBuffer"
    sys.modules.update({name: ModuleType(name) for name in names})
    sys.modules[names[-1]].HistoryBuffer = HistoryBuffer
    yield HistoryBuffer
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize("as_zip", [True, False])
def test_the_log_of_openmmlabs_engine_is_passed_over(history_buffer, as_zip, tmp_path, capsys,
                                                      monkeypatch):
    content = {"meta": {"epoch": 1}, "message_hub": {"log_scalars": {"loss": history_buffer()}},
               "state_dict": under("backbone.", tiny(1).state_dict())}
    torch.save(content, tmp_path / "mm.pth", _use_new_zipfile_serialization=as_zip)
    monkeypatch.setattr(history_buffer, "__setstate__", lambda *_: 1 / 0, raising=False)
    backbone = tiny(2)
    load_backbone(backbone, str(tmp_path / "mm.pth"))
    assert same(backbone.state_dict(), tiny(1).state_dict())
    assert "left out: message_hub meta" in capsys.readouterr().out


def test_code_beside_such_a_log_is_refused(history_buffer, tmp_path):
    torch.save({"message_hub": history_buffer(), "state_dict": tiny(1).state_dict(),
                "other": Payload(tmp_path / "ran")}, tmp_path / "mm.pth")
    with pytest.raises(RunError, match="asks to run [a-z]+.mkdir, which is refused"):
        load_backbone(tiny(), str(tmp_path / "mm.pth"))
    assert not (tmp_path / "ran").exists()


def test_files_without_batch_counters_load(tmp_path):
    model = tiny()
    kept = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(kept, tmp_path / "old.pth")
    load_backbone(tiny(), str(tmp_path / "old.pth"))


# ------------------------------------------------------------------ DINOv2's names, other libraries


def chunked(weights):
    """Blocks in chunks of two, numbered on through them, as the released training code has them."""
    return {re.sub(r"blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", key): value
            for key, value in weights.items()}


@pytest.mark.parametrize("wrap", [
    lambda w: w, chunked,
    lambda w: {"teacher": {**under("backbone.", chunked(w)), **head("dino_head.mlp.0.weight")}},
], ids=["released", "in chunks", "teacher"])
@pytest.mark.parametrize("registers", [0, 4])
def test_metas_names_of_dinov2(registers, wrap, tmp_path, capsys):
    trained = micro_of(registers=registers, layer_scale=1e-5)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(std=0.2)
    weights = {key.replace("reg_token", "register_tokens"): value
               for key, value in trained.state_dict().items()}
    torch.save(wrap({**weights, **head("mask_token")}), tmp_path / "dinov2.pth")
    backbone, images = micro_of(), torch.rand(2, 3, 16, 16)
    load_backbone(backbone, str(tmp_path / "dinov2.pth"))
    assert "mask_token" in capsys.readouterr().out
    with torch.no_grad():
        assert torch.equal(backbone(images), trained(images))
    assert backbone.antialias == (registers > 0)  # as its authors use them
    for said, antialias in (({"mean": [0.5]}, False), ({}, registers > 0)):  # ours, converted
        torch.save(described(trained.state_dict(), said), tmp_path / "again.pth")
        load_backbone(backbone, str(tmp_path / "again.pth"))
        assert backbone.antialias == antialias  # as it was trained


def micro_of(**parts):
    return backbones.build_backbone("vit_micro", in_chans=3, image_size=16, patch_size=4,
                                    positions="learned", drop_path=0.0, **parts)


@pytest.mark.parametrize("side, parts", [
    (4, dict(class_token=False)), ((8, 20), dict(class_token=False)), ((8, 20), {}),
])
def test_few_positions_are_not_taken_for_a_class_tokens(side, parts, tmp_path):
    """One patch, or ten, which might be a class token's and nine of a square."""
    make = dict(in_chans=3, image_size=side, patch_size=4, positions="learned", drop_path=0.0)
    trained = backbones.build_backbone("vit_micro", **make, **parts)
    torch.save(trained.state_dict(), tmp_path / "few.pth")
    backbone = backbones.build_backbone("vit_micro", **make)
    load_backbone(backbone, str(tmp_path / "few.pth"))
    images = torch.rand(2, 3, *((side, side) if isinstance(side, int) else side))
    with torch.no_grad():
        assert torch.equal(backbone(images), trained(images))


def test_the_classifier_of_another_librarys_file_is_left_out_and_nothing_else(tmp_path, capsys):
    whole = torchvision.models.mnasnet0_5()
    path, state = str(tmp_path / "released.pth"), whole.state_dict()
    trunk = backbones.build_backbone("torchvision:mnasnet0_5", in_chans=3, image_size=32)
    torch.save(state, path)
    load_backbone(trunk, path)
    assert "left out: classifier" in capsys.readouterr().out
    assert all(torch.equal(value, state[key]) for key, value in trunk.state_dict().items())
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, path)
    with pytest.raises(RunError, match=r"unknown tensor classifier\.0\.weight"):
        load_backbone(trunk, path)
    del state["layers.3.weight"]
    torch.save(state, path)
    with pytest.raises(RunError, match=r"no tensor layers\.3\.weight"):
        load_backbone(trunk, path)
