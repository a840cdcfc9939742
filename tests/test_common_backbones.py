import math
import sys

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from common import backbones, trunks
from common.distributed import RunError

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


# ------------------------------------------------------------------------------------ every ResNet


@every_stem
@pytest.mark.parametrize("arch", backbones.RESNETS)
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


def test_the_stem_of_padding_2_has_a_border_of_one_place_more():
    theirs = torchvision.models.resnet18()
    theirs.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    theirs.maxpool = theirs.fc = torch.nn.Identity()
    ours, images = build("resnet18", "small-pad2"), torch.rand(2, 3, 32, 32)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))
        assert ours.relu(ours.bn1(ours.conv1(images))).shape == (2, 64, 34, 34)


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


# ----------------------------------------------------------------------------- vision transformers

TIMM_VIT_SMALL = {  # vit_small_patch16_224 without its head
    "cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "patch_embed.proj.weight":
    (384, 3, 16, 16), "patch_embed.proj.bias": (384,), "norm.weight": (384,), "norm.bias": (384,),
}
for _n in range(12):
    for _name, _shape in {
        "norm1.weight": (384,), "norm1.bias": (384,), "attn.qkv.weight": (1152, 384),
        "attn.qkv.bias": (1152,), "attn.proj.weight": (384, 384), "attn.proj.bias": (384,),
        "norm2.weight": (384,), "norm2.bias": (384,), "mlp.fc1.weight": (1536, 384),
        "mlp.fc1.bias": (1536,), "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,),
    }.items():
        TIMM_VIT_SMALL[f"blocks.{_n}.{_name}"] = _shape


def vit(arch="vit_micro", image_size=16, patch_size=4, in_chans=3, positions="learned",
        drop_path=0.0, **parts):
    return backbones.build_backbone(
        arch, in_chans=in_chans, image_size=image_size, patch_size=patch_size, positions=positions,
        drop_path=drop_path, **parts,
    )


def test_the_keys_and_shapes_of_a_small_transformer_are_timms():
    with META:
        assert shapes(vit("vit_small", 224, 16).state_dict()) == TIMM_VIT_SMALL


@pytest.mark.parametrize(
    "arch, patch, count",
    [("vit_small", 16, 21_665_664), ("vit_small", 8, 21_670_272), ("vit_base", 16, 85_798_656),
     ("vit_large", 16, 303_301_632), ("vit_huge", 14, 630_764_800)],
)
def test_the_parameter_counts_are_timms(arch, patch, count):
    with META:
        net = vit(arch, 224, patch)
    dim, depth, length = net.num_features, len(net.blocks), (224 // patch) ** 2
    patches = 3 * patch**2 * dim + dim + dim + (1 + length) * dim
    block = 4 * dim + (3 * dim * dim + 3 * dim) + (dim * dim + dim) + (8 * dim * dim + 5 * dim)
    assert sum(p.numel() for p in net.parameters()) == count
    assert count == patches + depth * block + 2 * dim


def by_hand(net, image):
    """Tokens (1 + L, D) of one image (C, H, W): one token, one head and one weight at a time."""
    weights = {name: value.numpy() for name, value in net.state_dict().items()}
    image, patch = image.numpy(), net.patch_size

    def norm(x, name):
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-6)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    tokens = [weights["cls_token"][0, 0]]
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            window = image[:, top : top + patch, left : left + patch]
            kernel = weights["patch_embed.proj.weight"]
            tokens.append((kernel * window).sum((1, 2, 3)) + weights["patch_embed.proj.bias"])
    tokens = [t + p for t, p in zip(tokens, weights["pos_embed"][0], strict=True)]
    for number, block in enumerate(net.blocks):
        name, heads = f"blocks.{number}", block.attn.num_heads
        size = len(tokens[0]) // heads
        qkv = [linear(norm(t, f"{name}.norm1"), f"{name}.attn.qkv") for t in tokens]
        mixed = []
        for one in qkv:
            out = []
            for head in range(heads):
                q, k, v = (slice((part * heads + head) * size, (part * heads + head + 1) * size)
                           for part in range(3))
                scores = [math.exp(one[q] @ other[k] / math.sqrt(size)) for other in qkv]
                out.append(sum(s * other[v] for s, other in zip(scores, qkv, strict=True))
                           / sum(scores))
            mixed.append(linear(np.concatenate(out), f"{name}.attn.proj"))
        tokens = [t + m for t, m in zip(tokens, mixed, strict=True)]
        for place, t in enumerate(tokens):
            hidden = linear(norm(t, f"{name}.norm2"), f"{name}.mlp.fc1")
            hidden = np.array([h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in hidden])
            tokens[place] = t + linear(hidden, f"{name}.mlp.fc2")
    return np.stack([norm(t, "norm") for t in tokens])


def test_the_forward_is_that_of_loops():
    torch.set_default_dtype(torch.float64)
    net = shuffled(backbones.VisionTransformer(
        12, 2, 3, image_size=(4, 6), patch_size=2, in_chans=2, positions="learned", drop_path=0.0
    ))
    images = torch.randn(2, 2, 4, 6)
    with torch.no_grad():
        tokens, pooled = net.tokens(images)[0], net(images)
    for image, found, feature in zip(images, tokens, pooled, strict=True):
        expected = by_hand(net, image)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(feature, expected[0], rtol=1e-9, atol=1e-9)


def test_the_forward_is_that_of_torchvisions_transformer():
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=192
    )
    theirs.heads = nn.Identity()
    state = {}
    for name, value in shuffled(theirs).state_dict().items():
        for old, new in {
            "class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj":
            "patch_embed.proj", "encoder.layers.encoder_layer_": "blocks.", "ln_1": "norm1",
            "ln_2": "norm2", "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj":
            "attn.proj", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "encoder.ln": "norm",
        }.items():
            name = name.replace(old, new)
        state[name] = value
    ours = backbones.VisionTransformer(48, 2, 3, image_size=32, patch_size=8, in_chans=3,
                                       positions="learned", drop_path=0.0)
    ours.load_state_dict(state)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_the_last_blocks_are_given_in_order_and_normalised():
    net, images = vit().eval(), torch.rand(2, 3, 16, 16)
    outputs = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
    found = net.tokens(images, last=3)
    assert len(found) == 3
    for got, raw in zip(found, outputs[-3:], strict=True):
        assert torch.equal(got, net.norm(raw)) and got.shape == (2, 17, 96)


@pytest.mark.parametrize("relative", [False, True])
def test_the_attention_is_what_the_last_block_mixes_with(relative):
    net = vit(relative_positions=relative).double().eval()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    if relative:
        nn.init.normal_(net.shared_rel_pos.relative_position_bias_table)
    attention = net.attention(images)
    assert attention.shape == (2, 3, 17)
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 3, dtype=torch.float64))
    seen, last = {}, net.blocks[-1].attn
    last.register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0]))
    last.proj.register_forward_hook(lambda _, inputs, __: seen.update(mixed=inputs[0]))
    net(images)
    values = last.heads_of(seen["x"])[2]
    mixed = torch.einsum("nhl,nhld->nhd", attention, values).flatten(1)
    torch.testing.assert_close(mixed, seen["mixed"][:, 0])


@pytest.mark.parametrize("channels", [1, 4, 10])
def test_a_transformer_takes_any_channels_patches_and_sides(channels):
    net = vit(image_size=(20, 35), patch_size=5, in_chans=channels)
    assert net.grid == (4, 7) and net.pos_embed.shape == (1, 29, 96)
    assert net(torch.rand(2, channels, 20, 35)).shape == (2, 96)
    assert net.tokens(torch.rand(2, channels, 35, 10))[0].shape == (2, 15, 96)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="images of 16 x 18 do not divide into patches of 4"):
        vit(image_size=(16, 18))
    with pytest.raises(ValueError, match="images of 10 x 16 .* patches of 4"):
        vit().embed(torch.rand(1, 3, 10, 16))
    with pytest.raises(ValueError, match="vit_small needs image_size, patch_size, positions"):
        build("vit_small")
    with pytest.raises(ValueError, match="resnet18 needs stem, zero_init_residual"):
        vit("resnet18")


def test_a_transformer_starts_with_small_truncated_normal_weights():
    net = vit("vit_tiny")
    for name, value in net.state_dict().items():
        if "norm" in name:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        elif name in ("cls_token", "pos_embed") or name.endswith("weight") and value.ndim == 2:
            assert value.std().item() == pytest.approx(0.02, rel=0.2), name
        elif not name.startswith("patch_embed"):
            assert (value == 0).all(), name
    bound = 1 / math.sqrt(3 * 4 * 4)
    assert bound * 0.95 < net.patch_embed.proj.weight.abs().max() <= bound


# positions


def test_fixed_positions_are_those_of_loops():
    dim, rows, columns = 16, 3, 5
    found = backbones.sincos_positions(dim, rows, columns)
    for row in range(rows):
        for column in range(columns):
            for i in range(dim // 4):
                frequency = 1 / 10000 ** (i / (dim / 4))
                for half, at in ((0, column), (dim // 2, row)):
                    value = found[row * columns + column]
                    assert value[half + i] == pytest.approx(math.sin(at * frequency), abs=1e-7)
                    cosine = value[half + dim // 4 + i]
                    assert cosine == pytest.approx(math.cos(at * frequency), abs=1e-7)
    with pytest.raises(ValueError, match="not 18"):
        backbones.sincos_positions(18, 2, 2)


def test_fixed_positions_have_no_gradient_and_leave_the_class_token_at_0():
    net = vit(positions="sincos")
    assert not net.pos_embed.requires_grad and (net.pos_embed[0, 0] == 0).all()
    assert torch.equal(net.pos_embed[0, 1:], backbones.sincos_positions(96, 4, 4))
    assert vit().pos_embed.requires_grad


def test_positions_at_their_own_size_are_used_as_they_are():
    positions = torch.randn(1, 24, 8)
    assert backbones.resample_positions(positions, (4, 6), (4, 6)) is positions


@pytest.mark.parametrize("wanted", [(6, 6), (7, 28), (16, 14), (1, 3)])
def test_positions_are_interpolated_bicubically_with_their_gradient(wanted):
    positions = torch.randn(1, 14 * 14, 8, dtype=torch.float64, requires_grad=True)
    found = backbones.resample_positions(positions, (14, 14), wanted)
    image = positions.detach().view(1, 14, 14, 8).permute(0, 3, 1, 2).requires_grad_()
    expected = nn.functional.interpolate(image, size=wanted, mode="bicubic")
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2))
    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    (expected.flatten(2).transpose(1, 2) * direction).sum().backward()
    torch.testing.assert_close(positions.grad.view(1, 14, 14, 8).permute(0, 3, 1, 2), image.grad)


def test_interpolated_positions_stay_float32_under_autocast():
    positions = torch.randn(1, 16, 8)
    expected = backbones.resample_positions(positions, (4, 4), (3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backbones.resample_positions(positions, (4, 4), (3, 5)), expected)


# stochastic depth


def test_the_rate_of_dropped_branches_rises_linearly():
    rates = [block.drop_path for block in vit(drop_path=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_branches_are_dropped_for_whole_samples_and_kept_in_the_mean():
    block = backbones.Block(8, 2, drop_path=0.25).double()
    out = block.dropped(torch.ones(4000, 3, 8, dtype=torch.float64))
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert set(out.unique().tolist()) == {0, 1 / 0.75}
    assert out.mean().item() == pytest.approx(1, abs=4 * math.sqrt(0.25 / 0.75 / 4000))
    torch.manual_seed(3)
    one = block.dropped(out)
    torch.manual_seed(3)
    assert torch.equal(one, block.dropped(out))


def test_nothing_is_dropped_outside_training():
    net, images = vit(drop_path=0.5), torch.rand(8, 3, 16, 16)
    plain = vit()
    plain.load_state_dict(net.state_dict())
    assert not torch.equal(net(images), plain(images))
    assert torch.equal(net.eval()(images), plain(images))


def test_blocks_computed_twice_give_the_same_gradients_and_keep_less():
    images = torch.rand(3, 3, 16, 16)
    found, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = vit(drop_path=0.5)
        net.recompute = recompute
        calls = []
        net.blocks[1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        out = net(images)
        kept.append(len(calls))
        out.square().sum().backward()
        kept.append(len(calls))
        found.append([out, *(p.grad for p in net.parameters())])
    assert kept == [1, 1, 1, 2]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---------------------------------------------------------------- parts that not every one has


@pytest.mark.parametrize("parts", (
    dict(layer_scale=1e-5), dict(registers=2), dict(class_token=False),
    dict(uniform_drop_path=True),
))
def test_a_transformer_with_other_parts_in_timms_layout(parts):
    """Same features as timm's of the same parts, from timm's state dict."""
    made = backbones.build_backbone("vit_micro", in_chans=1, image_size=16, patch_size=4,
                                    positions="learned", drop_path=0.2, **parts).eval()
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, embed_dim=96, depth=4, num_heads=3, num_classes=0,
        init_values=parts.get("layer_scale"), reg_tokens=parts.get("registers", 0),
        class_token=parts.get("class_token", True), fc_norm=False,
        no_embed_class="registers" in parts,
        global_pool="token" if parts.get("class_token", True) else "avg").eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) / 10)
    state = made.state_dict()
    if "registers" in parts:  # timm adds the class token's position to the token
        first, state["pos_embed"] = state["pos_embed"].split([1, 16], dim=1)
        state["cls_token"] = state["cls_token"] + first
    theirs.load_state_dict(state)
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(made(images), theirs(images), rtol=1e-5, atol=1e-5)
    rates = [block.drop_path for block in made.blocks]
    rising = [0, 0.2 / 3, 0.4 / 3, 0.2]
    assert rates == pytest.approx([0.2] * 4 if "uniform_drop_path" in parts else rising)


def relative_positions(grid, heads=3):
    made = backbones.RelativePositions(heads, grid)
    nn.init.normal_(made.relative_position_bias_table)
    return made


def test_relative_positions_are_those_of_loops():
    made = relative_positions((2, 3))
    table, found = made.relative_position_bias_table, made((2, 3))
    assert table.shape == (3 * 5 + 3, 3) and found.shape == (1, 3, 7, 7)
    for query in range(7):
        for key in range(7):
            if query and key:
                down = (query - 1) // 3 - (key - 1) // 3
                across = (query - 1) % 3 - (key - 1) % 3
                row = (down + 1) * 5 + across + 2
            else:
                row = 17 if query == key else 16 if query else 15
            assert torch.equal(found[0, :, query, key], table[row]), (query, key)


def test_relative_positions_for_another_grid_are_interpolated():
    made, other = relative_positions((2, 3)), relative_positions((4, 2))
    with torch.no_grad():
        patches, others = made.relative_position_bias_table.split([15, 3])
        patches = patches.T.view(1, 3, 3, 5)
        patches = nn.functional.interpolate(patches, (7, 3), mode="bicubic").flatten(2)[0].T
        other.relative_position_bias_table.copy_(torch.cat([patches, others]))
        torch.testing.assert_close(made((4, 2)), other((4, 2)))


def test_a_transformer_with_relative_positions_in_timms_layout():
    """Same features, patches and gradients as timm's, also where blocks are computed anew."""
    timm = pytest.importorskip("timm.models.vision_transformer_relpos")
    made = vit(image_size=(8, 12), relative_positions=True, layer_scale=0.1).double()
    theirs = timm.VisionTransformerRelPos(
        img_size=(8, 12), patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=0,
        init_values=0.1, class_token=True, rel_pos_type="bias", shared_rel_pos=True,
        global_pool="token").double()
    table = made.shared_rel_pos.relative_position_bias_table
    assert made.pos_embed is None and (table == 0).all()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) / 10)
    theirs.load_state_dict(made.state_dict())
    images = torch.randn(3, 3, 8, 12, dtype=torch.float64)
    tokens = theirs.forward_features(images)
    tokens.square().sum().backward()
    for made.recompute in (False, True):
        made.zero_grad()
        found = made.tokens(images)[0]
        torch.testing.assert_close(found, tokens)
        found.square().sum().backward()
        torch.testing.assert_close(
            table.grad, theirs.shared_rel_pos.relative_position_bias_table.grad)


def test_a_mask_token_replaces_patches_before_positions():
    vit = backbones.build_backbone("vit_micro", in_chans=1, image_size=8, patch_size=4,
                                   positions="learned", drop_path=0.0)
    images, token = torch.randn(2, 1, 8, 8), torch.randn(1, 1, 96)
    mask = torch.tensor([[True, False, False, True], [False] * 4])
    found, plain = vit.embed(images, mask, token), vit.embed(images)
    assert torch.equal(found[0, 0], token[0, 0] + vit.pos_embed[0, 1])
    assert torch.equal(found[0, 3], token[0, 0] + vit.pos_embed[0, 4])
    assert torch.equal(found[0, 1:3], plain[0, 1:3])
    assert torch.equal(found[1], plain[1])


# ------------------------------------------------------------------------------- other libraries


def foreign(arch, in_chans=3, image_size=32):
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    return backbones.build_backbone(arch, in_chans=in_chans, image_size=image_size)


@pytest.mark.parametrize("arch, channels", [
    ("torchvision:regnet_y_400mf", 3), ("torchvision:mnasnet0_5", 1),
    ("torchvision:mobilenet_v3_small", 4), ("timm:xcit_nano_12_p8_224", 1),
    ("timm:vit_tiny_patch16_224", 4), ("timm:mobilenetv3_small_050", 1),
])
def test_another_librarys_trunk_has_its_names_and_names_its_width(arch, channels):
    library, name = arch.split(":")
    ours = foreign(arch, channels).eval()
    with torch.no_grad():
        found = ours(torch.rand(2, channels, 32, 32))
    assert found.shape == (2, ours.num_features) and found.std() > 0
    make = torchvision.models.get_model
    if library == "timm":
        make = pytest.importorskip("timm").create_model
    theirs = make(name)
    missing = theirs.state_dict().keys() - ours.state_dict().keys()
    assert {key.rpartition(".")[0] for key in missing} == set(ours.classifier_names)
    assert ours.state_dict().keys() <= theirs.state_dict().keys()


def test_the_features_are_what_the_classifier_sees():
    ours = foreign("torchvision:mnasnet0_5").eval()
    theirs = torchvision.models.mnasnet0_5().eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        weight, bias = theirs.classifier[1].weight, theirs.classifier[1].bias
        torch.testing.assert_close(ours(images) @ weight.T + bias, theirs(images))
    assert not any(layer.p for layer in ours.modules() if isinstance(layer, nn.Dropout))


def test_timms_activations_inside_of_batch_norms_are_behind_plain_ones():
    ours = foreign("timm:mobilenetv3_small_050").train()
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=0).train()
    theirs.load_state_dict(shuffled(ours).state_dict())
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))
    norms = [x for x in ours.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    assert {type(x) for x in norms} == {nn.BatchNorm2d} and len(norms) > 20


def test_a_first_convolution_for_other_channels_keeps_the_spread_of_its_weights():
    old, new = foreign("torchvision:mnasnet0_5").layers[0], foreign("torchvision:mnasnet0_5", 10)
    assert new.layers[0].weight.shape[1] == 10 and new.layers[0].stride == old.stride
    assert new.layers[0].weight.std().item() == pytest.approx(old.weight.std().item(), rel=0.15)


@pytest.mark.parametrize("arch, archs, named", [
    ("resnet51", backbones.POOLED, "did you mean resnet50"),
    ("mnasnet0_5", backbones.POOLED, "did you mean torchvision:mnasnet0_5"),
    ("torchvision:NAME", backbones.POOLED, "is not a backbone"),
    ("torchvision:mnasnet0_5", backbones.VITS, "needs what is inside of a backbone; choose"),
    ("xyz", backbones.VITS, "choose from vit_micro"),
    ("vit_micro", backbones.POOLED, "is not a backbone"),
])
def test_a_name_that_is_none_is_answered_with_names_alike(arch, archs, named):
    with pytest.raises(RunError, match=named):
        backbones.check_name(arch, archs)


def test_names_of_timm_and_a_line_without_it(monkeypatch):
    pytest.importorskip("timm")
    assert backbones.check_name("timm:convit_small") == "timm:convit_small"
    with pytest.raises(RunError, match="did you mean timm:convit_small"):
        backbones.check_name("timm:convit_smal")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RunError, match="pip install timm"):
        backbones.check_name("timm:convit_small")


@pytest.mark.parametrize("arch, size, named", [
    ("torchvision:alexnet", 32, "does not take images of 32 px .*output size"),
    ("torchvision:squeezenet1_1", 32, "does not end in a linear classifier"),
    ("timm:vit_tiny_patch16_224", 30, "does not take images of 30 px"),
])
def test_a_trunk_or_size_that_does_not_fit_is_one_line(arch, size, named):
    with pytest.raises(RunError, match=named) as error:
        foreign(arch, image_size=size)
    assert "\n" not in str(error.value)


def test_sizes_of_further_crops_are_checked():
    trunk = foreign("torchvision:alexnet", image_size=64)
    assert trunks.check_sizes(trunk, 3, {(64, 64), 96}) == 4096
    with pytest.raises(RunError, match="does not take images of 32x32 px"):
        trunks.check_sizes(trunk, 3, {(64, 64), (32, 32)})
    assert trunks.check_sizes(build("resnet18"), 3, {1}) == 512  # ours take what they take


def test_a_teacher_leaves_nothing_out():
    trunk = backbones.without_dropping(foreign("torchvision:efficientnet_b0").train())
    ours = backbones.without_dropping(vit(drop_path=0.5).train())
    timms = pytest.importorskip("timm").layers.DropPath(0.5)  # as in its Swin transformers
    for net in (trunk, ours, backbones.without_dropping(nn.Sequential(timms).train())):
        for layer in net.modules():  # whose statistics would differ by the rounding
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.0
        with torch.no_grad():
            images = torch.rand(4, 3, 32, 32)
            assert torch.equal(net(images), net(images))


def test_positions_are_resampled_with_antialiasing_where_it_is_set():
    plain, beside = vit(), vit(registers=1)
    beside.antialias = True
    wanted = {}
    for antialias in (False, True):
        table = plain.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        table = nn.functional.interpolate(table, (2, 3), mode="bicubic", antialias=antialias)
        wanted[antialias] = table.flatten(2).transpose(1, 2)
    beside.pos_embed = plain.pos_embed
    for net, antialias in ((plain, False), (beside, True)):
        for parameter in net.patch_embed.parameters():
            nn.init.zeros_(parameter)
        torch.testing.assert_close(net.embed(torch.rand(1, 3, 8, 12)), wanted[antialias])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sobel_stem_sees_the_slopes_of_the_mean_channel(channels):
    conv = backbones.SobelConv2d(2, 1, 1, 0)
    conv.weight.data = torch.eye(2)[:, :, None, None]  # shows the two maps
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    gray = 3 * columns - 2 * rows
    offsets = torch.arange(channels) - (channels - 1) / 2  # of mean 0
    maps = conv((gray + offsets[:, None, None])[None])
    inner = maps[0, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner[0], torch.full_like(inner[0], 8 * 3.0))
    torch.testing.assert_close(inner[1], torch.full_like(inner[1], 8 * -2.0))
    for stem, side in (("imagenet-sobel", 7), ("small-sobel", 3)):
        model = backbones.build_backbone("resnet_tiny", stem=stem, in_chans=channels,
                                         zero_init_residual=False)
        assert model.state_dict()["conv1.weight"].shape == (16, 2, side, side)
        assert "conv1.sobel" not in model.state_dict()
        assert isinstance(model.maxpool, torch.nn.Identity) == (stem == "small-sobel")
        assert model(torch.rand(2, channels, 32, 32)).shape == (2, 128)
