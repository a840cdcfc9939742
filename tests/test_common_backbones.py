import math

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from common import backbones

META = torch.device("meta")  # shapes without numbers: the widest nets cost nothing
every_stem = pytest.mark.parametrize("stem", ["imagenet", "small"])


def build(arch, stem="imagenet", in_chans=3, zero_init_residual=False):
    return backbones.build_backbone(
        arch, stem=stem, in_chans=in_chans, zero_init_residual=zero_init_residual
    )


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def shuffled(net):
    """Give every tensor of a net, running statistics included, values that none starts with."""
    for name, tensor in net.state_dict().items():
        if tensor.ndim > 1:
            nn.init.normal_(tensor, std=0.1)
        elif not name.endswith("num_batches_tracked"):
            nn.init.uniform_(tensor, 0.5, 1.5)
    return net


# ----------------------------------------------------------------------------------- every backbone


@every_stem
@pytest.mark.parametrize("arch", backbones.NAMES)
def test_features_have_the_width_that_the_backbone_names(arch, stem):
    with META:
        net = build(arch, stem)
        features = net(torch.empty(2, 3, 64, 64))
    assert features.shape == (2, net.num_features)
    assert not any(name.startswith("fc") for name in net.state_dict())


@pytest.mark.parametrize("arch", backbones.TORCHVISION)
def test_with_the_imagenet_stem_the_keys_are_torchvisions(arch):
    with META:
        ours, theirs = build(arch), torchvision.models.get_model(arch)
    wanted = shapes(theirs.state_dict())
    del wanted["fc.weight"], wanted["fc.bias"]
    assert shapes(ours.state_dict()) == wanted


def test_a_resnet50_loads_into_torchvision_which_misses_its_classifier_alone():
    ours, theirs = shuffled(build("resnet50")).eval(), torchvision.models.resnet50().eval()
    answer = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert sorted(answer.missing_keys) == ["fc.bias", "fc.weight"] and not answer.unexpected_keys
    theirs.fc = nn.Identity()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("stem, side", [("imagenet", 16), ("small", 64)])
@pytest.mark.parametrize("arch", ["resnet_tiny", "resnet18", "resnet50"])
def test_the_small_stem_keeps_the_resolution(arch, stem, side):
    seen = []
    with META:
        net = build(arch, stem)
        net.layer1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[-2:]))
        net(torch.empty(1, 3, 64, 64))
    assert seen == [(side, side)]


@every_stem
@pytest.mark.parametrize("channels", [1, 2, 10])
@pytest.mark.parametrize("arch", ["resnet_tiny", "resnet50"])
def test_images_may_have_any_channel_count(arch, stem, channels):
    with META:
        net = build(arch, stem, in_chans=channels)
        assert net(torch.empty(2, channels, 32, 32)).shape == (2, net.num_features)


@every_stem
def test_the_stem_starts_as_torchvisions_convolutions(stem):
    weight = build("resnet18", stem, in_chans=2).conv1.weight
    fan_out = weight.shape[0] * weight[0, 0].numel()
    assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)


@pytest.mark.parametrize("arch", ["resnet_tiny", "resnet18", "resnet50"])
def test_zero_init_makes_every_residual_block_start_as_its_shortcut(arch):
    net = build(arch, "small", zero_init_residual=True).eval()
    for block in net.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            x = torch.rand(2, block.conv1.in_channels, 8, 8)
            shortcut = block.downsample(x) if block.downsample else x
            assert torch.equal(block(x), shortcut.relu())


@pytest.mark.parametrize("arch", ["resnet_tiny", "resnet18"])
def test_without_zero_init_every_scale_starts_at_one(arch):
    norms = [m for m in build(arch).modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


# ------------------------------------------------------------------------------------ small ResNets


def test_a_small_resnet_of_resnet18s_layout_is_torchvisions_resnet18():
    ours = backbones.SmallResNet((2, 2, 2, 2), (64, 128, 256, 512), zero_init_residual=False)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    ours.load_state_dict(shuffled(theirs).state_dict())
    images = torch.rand(2, 3, 64, 96)
    for training in (False, True):
        with torch.no_grad():
            one, other = (net.train(training)(images) for net in (ours, theirs))
        assert torch.equal(one, other)
    assert torch.equal(ours.bn1.running_mean, theirs.bn1.running_mean)


def test_a_small_resnet_starts_with_the_spread_of_torchvisions():
    ours = backbones.SmallResNet((2, 2, 2, 2), (64, 128, 256, 512), zero_init_residual=False)
    theirs = dict(torchvision.models.resnet18().named_parameters())
    for name, weight in ours.named_parameters():
        if weight.ndim > 1:
            assert weight.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name
