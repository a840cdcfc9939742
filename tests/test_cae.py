import math
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import cae
import mae
from common import discrete_vae
from common.distributed import RunError
from helpers import check_joined, lines, own_gradients, own_rows, parsed, state_of, train

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_official_script():
    args = cae.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.patch_size, args.image_size) == ("vit_base", 16, 224)
    assert (args.regressor_depth, args.decoder_depth, args.align_weight) == (4, 4, 2)
    assert (args.layer_scale, args.drop_path, args.min_block) == (0.1, 0.1, 16)
    assert (args.batch_size, args.epochs, args.warmup_epochs, args.clip) == (2048, 800, 20, 3)
    rates = [rate * 2048 / 256 for rate in (args.lr, args.final_lr)]
    assert rates == pytest.approx([1.5e-3, 1e-5]) and args.vocabulary_size == 8192
    visible, masked = cae.build_draw(args, 1)(torch.tensor([3]), 0)
    assert (visible.shape, masked.shape) == ((1, 98), (1, 98))


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--image-size", "17"], "--image-size 17 is not a multiple of --patch-size"),
        (["--mask-ratio", "1"], "--mask-ratio 1.0 masks 16 of 16 patches"),
        (["--mask-ratio", "0.05"], "--mask-ratio 0.05 masks 0 of 16 patches"),
        (["--tokenizer", "x.pth", "--in-chans", "1"], "--in-chans 1: the discrete VAE sees 3"),
        (["--tokenizer", "x.pth", "--vocabulary-size", "9"], "--vocabulary-size is of --tokenizer "
         "kmeans; the words of x.pth"),
        (["--vocabulary-size", "1"], "'1'"),
        (["--clip", "0"], "'0'"),
        (["--arch", "resnet18"], "resnet18"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        cae.parse_args(flags)
    assert named in capsys.readouterr().err


def test_more_words_than_patches_are_refused_before_anything_is_replaced(tmp_path):
    (tmp_path / "backbone.pth").write_text("of the run before")
    module, args = parsed("cae", "--vocabulary-size", 513, "--no-resume", "--output", tmp_path)
    with pytest.raises(RunError, match="--vocabulary-size 513 is more than the patches of 32 "
                                       "images, 512; lower it"):
        module.main(args)
    assert (tmp_path / "backbone.pth").exists()


# -------------------------------------------------------------------------------------------- masks


def plain_mask(draw, side, count, least):
    """Sets of cells, block by block, as BEiT's algorithm has it."""
    masked = set()
    while len(masked) < count:
        left = count - len(masked)
        area, aspect = least + (left - least) * draw.random(), math.exp(
            draw.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if max(height, width) >= side:
            continue
        top, at = draw.integers(side - height + 1), draw.integers(side - width + 1)
        block = {(top + i, at + j) for i in range(height) for j in range(width)} - masked
        if block and len(block) <= left:
            masked |= block
    return masked


@pytest.mark.parametrize("side, count, least", [(14, 98, 16), (4, 8, 2), (8, 20, 4)])
def test_masks_are_made_of_blocks_and_have_exactly_as_many_patches(side, count, least):
    for seed in range(20):
        mask = cae.block_mask(np.random.default_rng(seed), side, side, count, least)
        wanted = plain_mask(np.random.default_rng(seed), side, count, least)
        assert {tuple(cell) for cell in np.argwhere(mask)} == wanted and mask.sum() == count


@pytest.mark.parametrize("rows, columns, count, least", [(1, 1, 1, 1), (1, 9, 4, 16), (3, 2, 5, 9)])
def test_where_no_block_fits_single_patches_are_masked(rows, columns, count, least):
    masks = [cae.block_mask(np.random.default_rng(seed), rows, columns, count, least)
             for seed in range(20)]
    assert all(mask.shape == (rows, columns) and mask.sum() == count for mask in masks)
    assert rows * columns == count or len({mask.tobytes() for mask in masks}) > 3


def test_masks_belong_to_an_image_of_an_epoch():
    index, key = torch.tensor([7, 3, 1000]), dict(seed=0, steps_per_epoch=5, rows=6, columns=8,
                                                  count=20, min_block=4)
    visible, masked = cae.draw_masks(index, 12, **key)
    assert (visible.shape, masked.shape) == ((3, 28), (3, 20)) and masked.dtype == torch.int64
    for n in range(3):
        assert sorted(visible[n].tolist() + masked[n].tolist()) == list(range(48))
        assert (visible[n].diff() > 0).all() and (masked[n].diff() > 0).all()
    assert torch.equal(cae.draw_masks(index.flip(0), 10, **key)[1], masked.flip(0))
    for other in (cae.draw_masks(index, 12, **key | dict(seed=1))[1],
                  cae.draw_masks(index, 9, **key)[1], masked.roll(1, 0)):
        assert (other != masked).any(1).all()


def test_a_picture_shows_what_is_not_masked():
    args, index = cae.parse_args([]), torch.tensor([4, 9])
    ((view, seen),) = cae.visible_patches(args, index)
    assert view == 0 and seen.shape == (2, 4, 4) and (seen.sum((1, 2)) == 8).all()
    visible = cae.build_draw(args, 1)(index, 0)[0]
    assert [row.flatten().nonzero()[:, 0].tolist() for row in seen] == visible.tolist()


# -------------------------------------------------------------------------------------------- model


def model(image_size=16, patch_size=4, in_chans=3, num_words=7, layer_scale=0.5):
    backbone = cae.backbones.build_backbone(
        "vit_micro", in_chans=in_chans, image_size=image_size, patch_size=patch_size,
        positions="sincos", drop_path=0.0, layer_scale=layer_scale)
    return cae.CAE(backbone, num_words, 2, 1, 0.0, layer_scale)


def test_start_values_are_the_official_ones():
    net = model()
    for name, value in net.named_parameters():
        if "norm" in name or not value.requires_grad:
            continue
        if name.endswith("gamma"):
            assert (value == 0.5).all()
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        elif name.endswith(("token", "patch_embed.proj.weight")):
            assert 0.016 < value.abs().max() <= 0.02, name
        else:  # of one linear map each: those of queries, keys, values too
            parts = value.chunk(3) if name.endswith("in_proj_weight") else [value]
            for part in parts:
                bound = math.sqrt(6 / sum(part.shape))
                assert 0.98 * bound < part.abs().max() <= bound, name


def attend(attn, queries, keys, values):
    """Attention of rows (M, D), head by head, row by row."""
    weight, bias, size = attn.in_proj_weight, attn.in_proj_bias, attn.head_dim
    q, k, v = (rows @ w.T + b for rows, w, b in zip(
        (queries, keys, values), weight.chunk(3), bias.chunk(3), strict=True))
    out = torch.zeros_like(q)
    for row in range(len(q)):
        for head in range(attn.num_heads):
            part = slice(head * size, (head + 1) * size)
            scores = torch.stack([q[row, part] @ key[part] / math.sqrt(size) for key in k])
            out[row, part] = sum(s * value[part] for s, value in zip(
                scores.softmax(0), v, strict=True))
    return attn.out_proj(out)


def test_the_forward_is_that_of_loops():
    torch.set_default_dtype(torch.float64)
    net, images = model(image_size=(8, 12)), torch.rand(2, 3, 8, 12)
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    visible, masked = torch.tensor([[0, 3, 4], [1, 2, 5]]), torch.tensor([[1, 2, 5], [0, 3, 4]])
    with torch.no_grad():
        logits, latents, targets = net(images, visible, masked)
        vit = net.backbone
        places = vit.pos_embed[0, 1:]
        for n in range(2):
            patches = vit.embed(images[n : n + 1])[0]
            seen, wanted = (vit.encode(patches[rows[n]][None])[0][0, 1:]
                            for rows in (visible, masked))
            torch.testing.assert_close(targets[n], wanted)
            x = net.mask_token[0].expand(3, -1)
            at, everywhere = places[masked[n]], places[torch.cat([visible[n], masked[n]])]
            for block in net.regressor:
                tokens = torch.cat([seen, x])  # the visible latents stay as they are
                found = attend(block.attn, block.norm1(x + at),
                               block.norm_keys(tokens + everywhere), block.norm_values(tokens))
                x = block.norm2(x + block.ls1.gamma * found)
                x = x + block.ls2.gamma * block.mlp(x)
            x = net.regressor_norm(x)
            torch.testing.assert_close(latents[n], x)
            x = net.decoder[0]((x + at)[None])[0]  # sees no visible latent
            torch.testing.assert_close(logits[n], net.predict(net.decoder_norm(x)))


def test_masked_patches_reach_the_targets_alone_and_no_gradient_comes_through_them():
    net, images = model(), torch.rand(2, 3, 16, 16)
    visible, masked = cae.build_draw(cae.parse_args([]), 1)(torch.tensor([3, 8]), 0)
    hidden = torch.zeros(2, 16, 48).scatter(1, masked[:, :, None].expand(-1, -1, 48), 1.0)
    hidden = mae.unpatchify(hidden, 4, 3)
    logits, latents, targets = net(images, visible, masked)
    others = net(torch.where(hidden == 1, torch.rand_like(images), images), visible, masked)
    assert torch.equal(others[0], logits) and torch.equal(others[1], latents)
    assert not torch.equal(others[2], targets) and not targets.requires_grad
    seen = net(images + 0.1 * (1 - hidden), visible, masked)
    assert not torch.equal(seen[0], logits) and torch.equal(seen[2], targets)


# ---------------------------------------------------------------------------------------- tokenizer


def test_patches_are_normalised_one_by_one():
    images, found = torch.rand(2, 3, 8, 12), None
    images[1, :, :4, 4:8] = 0.3  # a flat patch
    found = cae.normalized_patches(images, 4)
    assert found.shape == (2, 6, 48) and (found[1, 1] == 0).all()
    for n, place in np.ndindex(2, 6):
        row, column = divmod(place, 3)
        patch = images[n, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
        wanted = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
        torch.testing.assert_close(found[n, place], wanted, rtol=1e-4, atol=1e-4)


def test_a_patchs_word_is_the_nearest_centroid():
    images, vocabulary = torch.rand(3, 1, 8, 8), torch.randn(9, 16)
    found = cae.kmeans_words(images, vocabulary, 4)
    patches = cae.normalized_patches(images, 4)
    for n, place in np.ndindex(3, 4):
        distances = [(patches[n, place] - word).square().sum().item() for word in vocabulary]
        assert found[n, place] == int(np.argmin(distances))


def learned(seed):
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(203, 6)).astype(np.float32))
    return cae.learn_words(rows, 5, 10, seed, torch.device("cpu")).numpy()


def test_words_are_a_function_of_the_seed_on_any_processes(pool):
    (wanted,) = pool.run(1, learned, 0)
    for found in (*pool.run(2, learned, 0), *pool.run(4, learned, 0)):
        assert np.array_equal(found, wanted)
    assert not np.array_equal(learned(1), wanted) and np.array_equal(learned(0), wanted)


def released(width=16, num_words=11, seed=0):
    """Tensors under the released names, with their shapes written out."""
    draw, shapes = np.random.default_rng(seed), {"input": (width, 3, 7, 7)}
    for group in range(1, 5):
        out = width * 2 ** (group - 1)
        for number in (1, 2):
            of = out // 2 if number == 1 and group > 1 else out
            name, quarter = f"group_{group}.block_{number}", out // 4
            if of != out:
                shapes[f"{name}.id_path"] = (out, of, 1, 1)
            for conv, shape in enumerate(((quarter, of, 3, 3), *[(quarter, quarter, 3, 3)] * 2,
                                          (out, quarter, 1, 1)), start=1):
                shapes[f"{name}.res_path.conv_{conv}"] = shape
    shapes["output.conv"] = (num_words, 8 * width, 1, 1)
    made = {}
    for name, shape in shapes.items():
        scale = math.prod(shape[1:]) ** -0.5
        made[f"blocks.{name}.w"] = torch.from_numpy(draw.normal(0, scale, shape)).float()
        made[f"blocks.{name}.b"] = torch.from_numpy(draw.normal(0, 0.1, shape[0])).float()
    return made


def convolve(x, weight, bias):
    """A convolution of (C, H, W) with zeros beyond the border, tap by tap."""
    reach = weight.shape[2] // 2
    wide = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
    out = np.zeros((len(weight), *x.shape[1:])) + bias[:, None, None]
    for i, j in np.ndindex(weight.shape[2:]):
        part = wide[:, i : i + x.shape[1], j : j + x.shape[2]]
        out += np.tensordot(weight[:, :, i, j], part, 1)
    return out


def plain_logits(pixels, made):
    """Logits (K, H / 8, W / 8) of one image (3, H, W), in float64."""
    made = {name: value.double().numpy() for name, value in made.items()}

    def conv(name, x):
        return convolve(x, made[f"blocks.{name}.w"], made[f"blocks.{name}.b"])

    x = conv("input", 0.8 * pixels + 0.1)
    for group in range(1, 5):
        for number in (1, 2):
            name, branch = f"group_{group}.block_{number}", x
            for layer in range(1, 5):
                branch = conv(f"{name}.res_path.conv_{layer}", np.maximum(branch, 0))
            kept = conv(f"{name}.id_path", x) if f"blocks.{name}.id_path.w" in made else x
            x = kept + branch / 8**2
        if group < 4:
            x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max((2, 4))
    return conv("output.conv", np.maximum(x, 0))


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_discrete_vae_is_read_by_the_released_names(wrapped, tmp_path):
    made, path = released(), tmp_path / "dalle_encoder.pth"
    torch.save({"state_dict": made} if wrapped else made, path)
    vae = discrete_vae.load_encoder(str(path), "--tokenizer")
    assert vae.num_words == 11 and not any(p.requires_grad for p in vae.parameters())
    images = torch.rand(2, 3, 16, 24)  # of the size that it takes
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    found = cae.vae_words(normalised, vae, mean, std, (2, 3))
    wanted = np.stack([plain_logits(image.double().numpy(), made) for image in images])
    np.testing.assert_allclose(vae.blocks(0.8 * images + 0.1), wanted, rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.int64
    assert np.array_equal(found, wanted.argmax(1).reshape(2, 6)) and len(found.unique()) > 1
    halves = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert vae(halves, 2, 3).shape == (2, 6)


def test_the_released_module_is_refused_by_its_name_with_a_remedy(tmp_path, monkeypatch):
    """As in dall_e's encoder.pkl: the whole module is pickled."""
    package, module = types.ModuleType("dall_e"), types.ModuleType("dall_e.encoder")
    module.Encoder = type("Encoder", (nn.Linear,), {"__module__": "dall_e.encoder"})
    monkeypatch.setitem(sys.modules, "dall_e", package)
    monkeypatch.setitem(sys.modules, "dall_e.encoder", module)
    path = tmp_path / "encoder.pkl"
    torch.save(module.Encoder(2, 2), path)
    with pytest.raises(RunError) as error:
        discrete_vae.load_encoder(str(path), "--tokenizer")
    message = str(error.value)
    assert message.startswith(f"--tokenizer {path} does not load: it asks to run "
                              "dall_e.encoder.Encoder, which is refused.")
    assert "Give the state dict" in message and ".state_dict()" in message and "\n" not in message


@pytest.mark.parametrize("change, named", [
    (lambda made: made.pop("blocks.input.w"), "is not the state dict of the discrete VAE"),
    (lambda made: made.pop("blocks.group_2.block_1.id_path.w"),
     "group_2.block_1.id_path.weight is missing, not (32, 16, 1, 1)"),
    (lambda made: made.update({"blocks.group_1.block_1.res_path.conv_2.b": torch.zeros(3)}),
     "group_1.block_1.res_path.conv_2.bias is (3,), not (4,)"),
    (lambda made: made.update(more=torch.zeros(2)), "more is (2,), not known"),
    (lambda made: made["blocks.output.conv.b"].fill_(math.nan), "conv.bias is not finite"),
])
def test_what_is_not_the_encoder_is_refused(change, named, tmp_path):
    made = released()
    change(made)
    torch.save(made, tmp_path / "file.pth")
    with pytest.raises(RunError) as error:
        discrete_vae.load_encoder(str(tmp_path / "file.pth"), "--tokenizer")
    assert named in str(error.value) and str(error.value).startswith("--tokenizer ")


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path):
    module, args = parsed("cae", "--tokenizer", tmp_path / "none.pth", "--output", tmp_path / "run")
    with pytest.raises(RunError, match=r"--tokenizer .*none\.pth does not load: No such file"):
        module.main(args)


# --------------------------------------------------------------------------------------------- loss


def tensors(n=4):
    draw = np.random.default_rng(1)
    return (draw.normal(size=(n, 3, 5)), draw.integers(0, 5, (n, 3)),
            draw.normal(size=(n, 3, 6)), draw.normal(size=(n, 3, 6)))


def plain_token_loss(logits, tokens):
    total = 0.0
    for row, word in zip(logits.reshape(-1, logits.shape[2]), tokens.ravel(), strict=True):
        total += math.log(math.fsum(math.exp(x) for x in row)) - row[word]
    return total / tokens.size


def plain_alignment(latents, targets):
    return math.fsum((a - b) ** 2 for a, b in zip(latents.ravel(), targets.ravel(), strict=True)
                     ) / latents.size


def test_the_losses_are_those_of_loops():
    logits, tokens, latents, targets = tensors()
    found = cae.token_loss(*map(torch.from_numpy, (logits, tokens)))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(plain_token_loss(logits, tokens), rel=1e-12)
    latents, targets = (torch.from_numpy(x).requires_grad_() for x in (latents, targets))
    found = cae.alignment_loss(latents, targets)
    wanted = plain_alignment(latents.detach().numpy(), targets.detach().numpy())
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    found.backward()
    assert targets.grad is None
    torch.testing.assert_close(latents.grad, 2 * (latents - targets).detach() / latents.numel())


def test_equal_logits_score_the_logarithm_of_the_vocabulary_and_equal_latents_nothing():
    tokens = torch.randint(9, (2, 3))
    assert cae.token_loss(torch.ones(2, 3, 9), tokens).item() == pytest.approx(math.log(9))
    latents = torch.rand(2, 3, 5)
    assert cae.alignment_loss(latents, latents) == 0
    assert cae.alignment_loss(latents, latents + 2).item() == pytest.approx(4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_losses_compute_in_float32_at_least(dtype):
    logits, tokens, latents, targets = map(torch.from_numpy, tensors())
    logits, latents, targets = (x.to(dtype) for x in (logits, latents, targets))
    found = cae.token_loss(logits, tokens), cae.alignment_loss(latents, targets)
    wanted = (plain_token_loss(logits.double().numpy(), tokens.numpy()),
              plain_alignment(latents.double().numpy(), targets.double().numpy()))
    assert {x.dtype for x in found} == {torch.float32}
    assert [x.item() for x in found] == pytest.approx(wanted, rel=1e-5)


def own_gradient(logits, tokens, latents, targets):
    tokens, targets = own_rows(tokens), own_rows(targets)
    return own_gradients(lambda x, z: cae.token_loss(x, tokens) + 2 * cae.alignment_loss(z, targets)
                         , logits, latents)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *tensors(n=8))


# --------------------------------------------------------------------------------------------- main


def traced(folder, *flags):
    """Losses of steps in float64, the words, and the weights at the end."""
    losses = train(cae, folder, "--limit", 64, *flags)
    found = torch.load(folder / "backbone.pth", weights_only=True)
    words = state_of(folder).get("vocabulary")
    return losses, words, {k: v.numpy() for k, v in found.items()}


def test_processes_change_nothing(pool, tmp_path):
    losses, words, found = pool.run(1, traced, tmp_path / "1")[0]
    for size in (2, 4):
        others = pool.run(size, traced, tmp_path / str(size))
        np.testing.assert_allclose(others[0][0], losses, rtol=1e-6)
        assert torch.equal(others[0][1], words) and len(words.unique(dim=0)) > 16
        for name, weight in found.items():
            np.testing.assert_allclose(others[0][2][name], weight, atol=1e-7, err_msg=name)


def test_words_are_made_once_and_go_on_from_the_checkpoint(tmp_path):
    train(cae, tmp_path, "--epochs", 2, dtype="float32")
    words = state_of(tmp_path)["vocabulary"]
    with mock.patch.object(cae, "learn_words", side_effect=AssertionError):
        (tmp_path / "checkpoint.pt").unlink()  # go on after the first epoch
        train(cae, tmp_path, "--epochs", 2, dtype="float32")
    assert torch.equal(state_of(tmp_path)["vocabulary"], words) and words.shape == (32, 48)


def test_the_step_weighs_alignment_and_clips_all_gradients_together(tmp_path):
    made, step = [], torch.optim.AdamW.step

    def look(self, *args):
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()
        made.append((self.param_groups, norm.item()))
        return step(self, *args)

    with mock.patch.object(torch.optim.AdamW, "step", look):
        train(cae, tmp_path, "--limit", 64, "--batch-size", 64, "--clip", 0.01, "--align-weight",
              3, dtype="float32")
    (line,), ((decayed, others), norm) = lines(tmp_path), made[0]
    assert line["loss"] == pytest.approx(line["token_loss"] + 3 * line["align_loss"], rel=1e-5)
    assert 0 < line["token_entropy"] < math.log(32) < line["token_loss"] + 1
    assert norm == pytest.approx(0.01, rel=1e-4)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim < 2 for p in others["params"])
    assert sum(p.shape[:2] == (1, 1) for p in decayed["params"]) == 2  # class and mask token


def test_a_run_with_the_discrete_vae_goes_on_with_the_same_tensors_alone(tmp_path):
    path, run = tmp_path / "dalle_encoder.pth", tmp_path / "run"
    torch.save(released(), path)
    flags = ["--tokenizer", path, "--output", run]
    module, args = parsed("cae", *flags, "--epochs", 2)
    module.main(args)
    assert state_of(run)["model"]["predict.bias"].shape == (11,)
    assert "vocabulary" not in state_of(run)
    (tmp_path / "elsewhere.pth").write_bytes(path.read_bytes())
    module.main(parsed("cae", "--tokenizer", tmp_path / "elsewhere.pth", "--output", run,
                       "--epochs", 2)[1])
    torch.save(released(seed=1), path)
    with pytest.raises(RunError, match=r"--tokenizer is \w{12} and was \w{12}"):
        module.main(args)
