import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import dino
import dinov2
import helpers
from common import backbones, distributed as comm
from common.distributed import RunError
from helpers import check_joined, own_gradients, own_rows

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_dinov2s_short_one():
    args = dinov2.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.patch_size, args.drop_path) == ("vit_large", 16, 0.3)
    assert (args.layer_scale, args.registers) == (1e-5, 0)
    assert (args.num_crops, args.crop_sizes) == ([2, 8], [224, 96])
    assert args.crop_scales == [0.32, 1.0, 0.05, 0.32]
    assert (args.mask_probability, args.mask_ratio) == (0.5, [0.1, 0.5])
    assert (args.hidden_dim, args.bottleneck_dim, args.num_outputs) == (2048, 256, 65536)
    assert (args.patch_head, args.targets, args.head_std) == ([], "centering", 0.02)
    assert (args.koleo_weight, args.patch_weight, args.norm_last_layer) == (0.1, 1.0, False)
    for name in ("teacher", "patch"):
        assert getattr(args, f"{name}_temperature") == 0.07
        assert getattr(args, f"warmup_{name}_temperature") == 0.04
    assert (args.momentum, args.layer_decay, args.patch_embed_lr) == (0.992, 0.9, 0.2)
    assert (args.weight_decay, args.final_weight_decay, args.clip_norm) == (0.04, 0.4, 3.0)
    assert args.lr * args.batch_size / 256 == pytest.approx(0.004 * math.sqrt(2048 / 1024))
    assert args.final_lr * args.batch_size / 256 == pytest.approx(1e-6)
    steps = 1281167 // args.batch_size  # of an epoch; theirs has 1250
    for name, theirs in (("epochs", 100), ("warmup_epochs", 10), ("freeze_last_layer_epochs", 1),
                         ("warmup_teacher_temperature_epochs", 30)):
        assert getattr(args, name) * steps == theirs * 1250


def test_the_large_recipe_has_two_heads_and_sinkhorn():
    args = dinov2.parse_args(["--recipe", "dinov2_large"])
    assert (args.patch_size, args.crop_sizes, args.targets) == (14, [224, 98], "sinkhorn")
    assert (args.bottleneck_dim, args.num_outputs) == (384, 131072)
    assert args.patch_head == [2048, 256, 131072]
    assert args.lr * args.batch_size / 256 == pytest.approx(2e-4 * math.sqrt(3072 / 1024))
    assert args.epochs * (14197122 // 3072) == pytest.approx(500 * 1250, rel=0.01)


def test_the_ibot_recipe_is_its_readmes():
    args = dinov2.parse_args(["--recipe", "ibot_imagenet"])
    assert (args.method, args.arch, args.num_outputs, args.patch_head) == (
        "ibot", "vit_small", 8192, [])
    assert (args.num_crops, args.crop_scales) == ([2, 10], [0.25, 1.0, 0.05, 0.25])
    assert (args.koleo_weight, args.layer_decay, args.layer_scale) == (0.0, 1.0, 0.0)
    assert (args.batch_size, args.epochs, args.lr, args.momentum) == (1024, 800, 5e-4, 0.996)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--crop-sizes", "18"], "--crop-sizes 18 are not all multiples of --patch-size"),
        (["--mask-ratio", "0.5", "0.1"], "--mask-ratio 0.5 0.1"),
        (["--patch-size", "16"], "--mask-ratio 0.5 masks none of 1 x 1 patches"),
        (["--mask-ratio", "0", "0.06"], "--mask-ratio 0.06 masks none of 4 x 4 patches"),
        (["--center-momentum", "0.5"], "--center-momentum 0.5 is of --targets centering"),
        (["--patch-head", "8", "8"], "--patch-head has 2 values"),
        (["--koleo-weight", "0.1", "--batch-size", "1"], "--batch-size 1 gives one image"),
        (["--arch", "resnet18"], "resnet18"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        dinov2.parse_args(flags)
    assert named in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 2), (4, 4), (14, 14), (16, 7)])
def test_a_mask_has_at_most_the_patches_asked_for(grid):
    generator, most = np.random.default_rng(0), grid[0] * grid[1]
    for count in range(0, most + 1, max(1, most // 8)):
        mask = dinov2.block_mask(generator, *grid, count)
        assert mask.shape == grid and mask.dtype == bool and mask.sum() <= count
        assert count or not mask.any()


def test_masks_are_blocks_and_nearly_as_large_as_asked_for():
    generator = np.random.default_rng(0)
    masks = [dinov2.block_mask(generator, 14, 14, 60) for _ in range(200)]
    assert 55 < np.mean([mask.sum() for mask in masks]) <= 60
    neighbours = np.mean([(mask[:, 1:] & mask[:, :-1]).sum() / mask.sum() for mask in masks])
    assert neighbours > 0.6  # 0.3 if they were drawn one by one
    assert np.mean(masks, 0).min() > 0  # every place is masked now and then


def blocks_by_the_book(generator, rows, columns, count):
    """BEiT's algorithm 1 on sets of patches, with DINOv2's sizes."""
    masked = set()
    while len(masked) < count:
        for _ in range(10):
            left = count - len(masked)
            area = generator.random() * (min(left, 0.5 * rows * columns) - 4) + 4
            aspect = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = int(round((area * aspect) ** 0.5)), int(round((area / aspect) ** 0.5))
            if h < rows and w < columns:
                top = generator.integers(0, rows - h, endpoint=True)
                first = generator.integers(0, columns - w, endpoint=True)
                block = {(top + i, first + j) for i in range(h) for j in range(w)}
                if 0 < len(block - masked) <= left:
                    masked |= block
                    break
        else:
            return masked
    return masked


def test_masks_follow_the_algorithm():
    for count in (3, 20, 98):
        mask = dinov2.block_mask(np.random.default_rng(count), 14, 12, count)
        wanted = blocks_by_the_book(np.random.default_rng(count), 14, 12, count)
        assert set(zip(*mask.nonzero(), strict=True)) == wanted


def test_half_of_a_batch_has_evenly_spread_ratios_in_random_order():
    ratios = dinov2.batch_ratios(np.random.default_rng(0), 17, 0.5, 0.1, 0.5)
    masked = np.sort(ratios[ratios > 0])
    assert len(ratios) == 17 and len(masked) == 8
    assert (np.floor((masked - 0.1) / 0.05 + 1e-9) == np.arange(8)).all()
    assert (ratios[ratios > 0] != masked).any()
    assert not dinov2.batch_ratios(np.random.default_rng(0), 3, 0.2, 0.1, 0.5).any()


def drawn(index, step=5, rank=0, size=1, method="dinov2", length=10):
    """Masks (2, N, length, length) of a batch."""
    index = torch.as_tensor(index)
    places = dinov2.draw_masks(
        index, step, steps_per_epoch=3, seed=1, rank=rank, size=size, method=method, num_global=2,
        grid=(length, length), probability=0.5, ratio=[0.1, 0.5])
    masks = torch.zeros(2 * len(index) * length**2, dtype=torch.bool)
    masks[places] = True
    assert masks.sum() == len(places)
    return masks.view(2, len(index), length, length)


@pytest.mark.parametrize("method", ["dinov2", "ibot"])
def test_masks_do_not_depend_on_the_processes(method):
    index = torch.arange(100, 116)
    whole = drawn(index, method=method)
    for size in (2, 4):
        parts = [drawn(part, rank=rank, size=size, method=method)
                 for rank, part in enumerate(index.chunk(size))]
        assert torch.equal(torch.cat(parts, 1), whole)
    assert not torch.equal(drawn(index, step=6, method=method), whole)


def test_ibots_masks_are_functions_of_image_epoch_and_crop():
    whole = drawn(range(40), method="ibot")
    assert torch.equal(drawn(range(39, -1, -1), step=3, method="ibot"), whole.flip(1))
    assert not torch.equal(drawn(range(40), step=2, method="ibot"), whole)
    assert not torch.equal(*whole)
    some = whole.flatten(2).any(2).float().mean()
    assert 0.35 < some < 0.65


def test_dinov2_masks_exactly_half_of_the_crops():
    masks = drawn(range(40)).flatten(2)
    assert masks.any(2).sum() == 40
    ratios = masks.float().mean(2)[masks.any(2)]
    assert ratios.max() <= 0.5 and 0.25 < ratios.mean() < 0.31


def test_places_become_a_mask_and_weights():
    mask, weights = dinov2.spread_masks(torch.tensor([1, 3, 8]), 3, 4)
    assert mask.tolist() == [[False, True, False, True], [False] * 4, [True] + [False] * 3]
    assert weights.tolist() == [0.5, 0.5, 1.0]
    mask, weights = dinov2.spread_masks(torch.zeros(0, dtype=torch.int64), 2, 4)
    assert not mask.any() and weights.shape == (0,)


# -------------------------------------------------------------------------------------------- model


def small_model(patch_sizes=(), drop_path=0.0, norm_last_layer=False):
    torch.manual_seed(0)
    backbone = backbones.build_backbone(
        "vit_micro", in_chans=3, image_size=16, patch_size=4, positions="learned",
        drop_path=drop_path, layer_scale=1.0, registers=2)
    return dinov2.DINOv2(backbone, (32, 8, 20), patch_sizes, 0.02, norm_last_layer)


VIEWS = [torch.rand(3, 3, 16, 16) for _ in range(2)]
MASKED = torch.tensor([0, 5, 16 + 3, 5 * 16 + 15])  # of 2 x 3 x 16 patches


@pytest.mark.parametrize("sizes, outputs, inputs", [((), 20, [6 + 3, 4]), ((12,), 12, [6 + 3, 4]),
                                                    ((24, 6, 12), 12, [6 + 3])])
def test_patches_go_through_the_head_where_they_are_masked(sizes, outputs, inputs):
    model, seen = small_model(sizes), []
    model.head.projector.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, -2).shape[0]))
    mask, _ = dinov2.spread_masks(MASKED, 6, 16)
    h, z, logits, patches, rows = model(VIEWS, [torch.rand(3, 3, 8, 8)], MASKED, mask)
    assert (h.shape, z.shape, logits.shape) == ((3, 3, 96), (3, 3, 8), (3, 3, 20))
    assert patches.shape == (4, outputs) and rows is patches and seen == inputs
    torch.testing.assert_close(z.norm(dim=2), torch.ones(3, 3))
    nothing = torch.zeros(0, dtype=torch.int64)
    assert model(VIEWS, [], nothing)[3].shape == (0, outputs)


@pytest.mark.parametrize("sizes", [(), (12,), (24, 6, 12)])
def test_the_mean_of_all_patches_is_the_mean_of_their_logits(sizes):
    model = small_model(sizes).double()
    views = [view.double() for view in VIEWS]
    everything = model(views, [], torch.arange(6 * 16))[3]
    *_, patches, rows = model(views, [], MASKED, mean_of_all=True)
    torch.testing.assert_close(rows, everything.mean(0, keepdim=True))
    torch.testing.assert_close(patches, everything[MASKED])


def test_the_mask_token_hides_patches_from_the_student_alone():
    model = small_model()
    nn.init.normal_(model.mask_token)
    mask, _ = dinov2.spread_masks(MASKED, 6, 16)
    changed = [view.clone() for view in VIEWS]
    changed[0][0, :, :4, :4] += 1  # the first patch, which is masked
    for given, same in ((mask, True), (None, False)):
        one, other = (model(views, [], MASKED, given)[2] for views in (VIEWS, changed))
        assert torch.equal(one[0, 0], other[0, 0]) == same
    changed[0][0, :, 4:8, 4:8] += 1  # one that is not
    assert not torch.equal(model(changed, [], MASKED, mask)[2][0, 0], one[0, 0])


def test_the_heads_start_and_count_as_dinos():
    model, theirs = small_model(), dino.DINO(small_model().backbone, 32, 8, 20, False, False)
    ours = dict(model.head.last_layer.named_parameters())
    for name, value in theirs.last_layer.named_parameters():
        assert ours[name].shape == value.shape
    assert (ours["directions"].abs() <= 8**-0.5).all() and (ours["scales"] == 1).all()
    assert not small_model(norm_last_layer=True).head.last_layer["scales"].requires_grad
    assert len([*small_model((12,)).patch_head.parameters()]) == 2
    assert len([*small_model((24, 6, 12)).patch_head.parameters()]) == 8
    layers = {"0": "0", "3": "2", "6": "4"}
    model.head.projector.load_state_dict(
        {layers[k[0]] + k[1:]: v for k, v in theirs.projector.state_dict().items()})
    model.head.last_layer.load_state_dict(theirs.last_layer.state_dict())
    model.backbone.load_state_dict(theirs.backbone.state_dict())
    mine = model(VIEWS, [], MASKED)
    torch.testing.assert_close(mine[2], theirs(VIEWS)[1])


def test_logits_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        _, z, logits, patches, rows = small_model()(VIEWS, [], MASKED, mean_of_all=True)
    assert {x.dtype for x in (z, logits, patches, rows)} == {torch.float32}


def test_the_teacher_is_in_eval_mode_and_never_trained():
    student = small_model(drop_path=0.9)
    teacher = dinov2.make_teacher(student)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher(VIEWS, [], MASKED)[2], teacher(VIEWS, [], MASKED)[2])
    assert not torch.equal(student(VIEWS, [], MASKED)[2], student(VIEWS, [], MASKED)[2])


# ------------------------------------------------------------------------------------------- losses


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [x / sum(powers) for x in powers]


def cross_entropy(target, logits, temperature):
    predicted = softmax([x / temperature for x in logits])
    return -sum(t * math.log(p) for t, p in zip(target, predicted, strict=True))


def logits(*shape, seed=3):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("v, g", [(2, 2), (4, 2), (5, 3)])
def test_the_class_loss_equals_the_papers_loops(v, g):
    student, teacher, center = logits(v, 3, 5), logits(g, 3, 5, seed=4), logits(5, seed=5)
    targets = dinov2.centered_targets(*map(torch.from_numpy, (teacher, center)), 0.5)
    terms = [cross_entropy(softmax((teacher[q, n] - center) / 0.5), student[p, n], 0.1)
             for q in range(g) for p in range(v) for n in range(3) if p != q]
    loss = dinov2.dino_loss(torch.from_numpy(student), targets, 0.1)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)
    theirs = dino.dino_loss(*map(torch.from_numpy, (student, teacher, center)), 0.1, 0.5)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-12)


CROPS = [0, 0, 0, 2, 3, 3]  # the crop of each masked patch, of 4 crops
WEIGHTS = np.array([1 / 3, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 2])


def test_the_patch_loss_equals_the_papers_loops():
    student, targets = logits(6, 5), np.array([softmax(row) for row in logits(6, 5, seed=4)])
    crops = []
    for crop in range(4):
        rows = [row for row in range(6) if CROPS[row] == crop]
        losses = [cross_entropy(targets[row], student[row], 0.1) for row in rows]
        crops.append(np.mean(losses) if rows else 0.0)
    given = map(torch.from_numpy, (student, targets, WEIGHTS))
    assert dinov2.patch_loss(*given, 4, 0.1).item() == pytest.approx(np.mean(crops), rel=1e-12)
    empty = dinov2.patch_loss(torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 5),
                              torch.zeros(0), 4, 0.1)
    assert empty.item() == 0 and empty.requires_grad


def patches_of_this_process(x, bounds):
    """Rows of this process, whose crops are a contiguous share."""
    return torch.from_numpy(x[bounds[comm.rank()] : bounds[comm.rank() + 1]].copy())


BOUNDS = {1: [0, 6], 2: [0, 3, 6], 4: [0, 3, 3, 4, 6]}  # of four, one has no masked patch


def patch_gradient(student, teacher, targets_of=None):
    bounds = BOUNDS[comm.size()]
    targets = dinov2.sinkhorn_targets(patches_of_this_process(teacher, bounds), 0.3, 3)
    mine = patches_of_this_process(student, bounds).requires_grad_()
    loss = dinov2.patch_loss(mine, targets, patches_of_this_process(WEIGHTS, bounds),
                             4 // comm.size(), 0.1)
    loss.backward()
    return loss.item(), targets.numpy(), (mine.grad / comm.size()).numpy()


@pytest.mark.parametrize("size", [2, 4])
def test_patches_have_the_joined_batchs_targets_loss_and_gradient(pool, size):
    student, teacher = logits(6, 5), logits(6, 5, seed=4)
    wanted = patch_gradient(student, teacher)
    found = list(zip(*pool.run(size, patch_gradient, student, teacher), strict=True))
    assert np.mean(found[0]) == pytest.approx(wanted[0], rel=1e-9)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(np.concatenate(got), want, rtol=1e-6, atol=1e-12)
    alone = dinov2.sinkhorn_targets(torch.from_numpy(teacher[:3]), 0.3, 3)  # the process's own
    assert (abs(alone.numpy() - wanted[1][:3]) > 1e-3).any()


def class_gradient(student, teacher):
    teacher = own_rows(teacher, dim=1)
    targets = dinov2.sinkhorn_targets(teacher.flatten(0, 1), 0.3, 3).view_as(teacher)
    return own_gradients(lambda x: dinov2.dino_loss(x, targets, 0.1), student, dim=1)


@pytest.mark.parametrize("size", [2, 4])
def test_the_class_loss_is_that_of_the_joined_batch(pool, size):
    check_joined(pool, size, class_gradient, logits(4, 8, 5), logits(2, 8, 5, seed=4), dim=1)


def sinkhorn_by_the_book(given, temperature, iterations):
    """Algorithm of SwAV's appendix in the order of DINOv2: outputs, then rows."""
    q = [[math.exp(x / temperature) for x in row] for row in given]
    m, k = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        for column in range(k):
            mass = sum(row[column] for row in q)
            for row in q:
                row[column] /= mass * k
        for row in q:
            mass = sum(row)
            row[:] = [x / (mass * m) for x in row]
    return np.array(q) * m


@pytest.mark.parametrize("temperature, iterations", [(0.5, 1), (0.3, 3), (1.0, 50)])
def test_sinkhorn_equals_the_loops(temperature, iterations):
    given = logits(7, 4)
    found = dinov2.sinkhorn_targets(torch.from_numpy(given), temperature, iterations)
    np.testing.assert_allclose(found, sinkhorn_by_the_book(given, temperature, iterations),
                               rtol=1e-9)
    torch.testing.assert_close(found.sum(1), torch.ones(7, dtype=torch.float64))
    if iterations == 50:
        torch.testing.assert_close(found.sum(0), torch.full((4,), 7 / 4, dtype=torch.float64))


def test_sinkhorn_keeps_its_input_and_needs_no_rows_and_no_small_numbers():
    given = torch.randn(6, 4) * 100
    kept = given.clone()
    found = dinov2.sinkhorn_targets(given.requires_grad_(), 0.04, 3)
    assert torch.equal(given, kept) and not found.requires_grad and found.isfinite().all()
    assert dinov2.sinkhorn_targets(torch.zeros(0, 4), 0.1, 3).shape == (0, 4)
    assert dinov2.sinkhorn_targets(given.bfloat16(), 0.1, 3).dtype == torch.float32


def koleo_by_the_book(z):
    z = [row / max(np.linalg.norm(row), 1e-8) for row in z]
    terms = []
    for i, row in enumerate(z):
        others = [j for j in range(len(z)) if j != i]
        nearest = max(others, key=lambda j: (row @ z[j], -j))
        terms.append(-math.log(np.linalg.norm(row - z[nearest] + 1e-8) + 1e-8))
    return np.mean(terms)


def test_koleo_equals_the_papers_loops():
    for given in (logits(7, 4), np.array([[1.0, 0], [-2.0, 0]]), logits(9, 2)):
        z = torch.from_numpy(given)
        assert dinov2.koleo_loss(z).item() == pytest.approx(koleo_by_the_book(given), rel=1e-9)
    z = torch.from_numpy(logits(5, 3)).requires_grad_()
    assert torch.autograd.gradcheck(dinov2.koleo_loss, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_koleo_of_equal_rows_is_finite_with_a_finite_gradient(dtype):
    for rows in (torch.ones(4, 3), torch.zeros(3, 3), torch.eye(3).repeat(2, 1)):
        z = rows.to(dtype).requires_grad_()
        loss = dinov2.koleo_loss(z)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()
        assert loss.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_float32(dtype):
    student, targets = torch.randn(6, 5).to(dtype), torch.rand(6, 5).softmax(1).to(dtype)
    weights = torch.from_numpy(WEIGHTS)
    loss = dinov2.patch_loss(student, targets, weights, 4, 0.1)
    exact = dinov2.patch_loss(student.double(), targets.double(), weights, 4, 0.1)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)
    loss = dinov2.dino_loss(student.view(2, 3, 5), targets.view(2, 3, 5), 0.1)
    assert loss.dtype == torch.float32


# --------------------------------------------------------------------------------- state, schedules


def moved_center(teacher, center):
    center = torch.from_numpy(center.copy())
    dinov2.update_center(center, patches_of_this_process(teacher, BOUNDS[comm.size()]), 0.9)
    return center.numpy()


def test_a_center_moves_to_the_mean_of_all_processes_rows(pool):
    teacher, center = logits(6, 5), logits(5, seed=4)
    wanted = 0.9 * center + 0.1 * sum(teacher) / 6
    for size in (1, 2, 4):
        for found in pool.run(size, moved_center, teacher, center):
            np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_a_center_without_rows_stays():
    center = torch.rand(5)
    kept = center.clone()
    dinov2.update_center(center, torch.zeros(0, 5), 0.9)
    assert torch.equal(center, kept)


def test_gradients_are_clipped_together_or_one_by_one():
    module, without = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    for max_norm, together, wanted in ((10.0, True, (3.0, 4.0)), (1.0, True, (0.6, 0.8)),
                                       (3.5, False, (3.0, 3.5))):
        module.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
        module.bias.grad = torch.tensor([0.0, 4.0])  # together 5
        dinov2.clip_gradients([*module.parameters(), without], max_norm, together)
        found = module.weight.grad.norm().item(), module.bias.grad.norm().item()
        assert found == pytest.approx(wanted, rel=1e-5)


def test_rates_fall_from_block_to_block_and_decay_is_for_weights():
    model = small_model((24, 6, 12))
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: (group["lr_scale"], group["decays"], group["last_layer"])
             for group in dinov2.parameter_groups(model, 0.5, 0.2) for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, (scale, decays, last) in found.items():
        wanted = 1.0  # heads and the last norm
        if name.startswith("backbone.blocks."):
            wanted = 0.5 ** (4 - int(name.split(".")[2]))
        elif not name.startswith(("backbone.norm", "head", "patch_head")):
            wanted = 0.5**5 * (0.2 if "patch_embed" in name else 1)
        assert scale == pytest.approx(wanted), name
        assert decays == (not name.endswith((".bias", ".gamma")) and "norm" not in name), name
        assert last == (".last_layer." in name), name


def test_the_temperature_rises_to_its_last_value():
    table = dinov2.temperature_schedule(0.04, 0.07, 4, 6)
    assert table == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert dinov2.temperature_schedule(0.04, 0.07, 0, 3) == [0.07] * 3


# --------------------------------------------------------------------------------------------- main

RUN = ["--limit", "48", "--epochs", "2", "--num-crops", "2", "2", "--crop-sizes", "16", "8",
       "--crop-scales", "0.6", "1", "0.3", "0.6"]
IBOT = ["--method", "ibot", "--targets", "centering", "--patch-head", "64"]


def train(folder, *flags, dtype="float64"):
    return helpers.train(dinov2, folder, *RUN, *flags, dtype=dtype)


@pytest.mark.parametrize("flags", [["--patch-head", "32", "16", "64"], IBOT])
def test_any_number_of_processes_computes_the_same(pool, tmp_path, flags):
    flags = ["--koleo-weight", "0", "--freeze-last-layer-epochs", "1", *flags]
    losses = pool.run(1, train, tmp_path / "1", *flags)[0]
    for size in (2, 4):
        other = pool.run(size, train, tmp_path / str(size), *flags)[0]
        np.testing.assert_allclose(other, losses, rtol=1e-6)


def test_recomputed_blocks_change_nothing(tmp_path):
    flags = ["--drop-path", "0.5", "--epochs", "1"]
    losses = train(tmp_path / "kept", *flags)
    assert train(tmp_path / "twice", *flags, "--grad-checkpoint") == losses


def last_layers(folder, *flags):
    """After each step the last layer and whether it had no gradient; counts of Adam's moments."""
    seen, ema_of = [], dinov2.update_ema

    def watch(teacher, student, momentum):
        layer = student.head.last_layer.directions
        seen.append((layer.detach().clone(), layer.grad is None))
        assert all(p.grad is None for p in teacher.parameters())
        ema_of(teacher, student, momentum)

    with mock.patch.object(dinov2, "update_ema", watch):
        train(folder, "--freeze-last-layer-epochs", "1", *flags)
    moments = helpers.state_of(folder)["optimizer"]["state"].values()
    return seen, {int(each["step"]) for each in moments}


@pytest.mark.parametrize("flags, frozen_steps", [([], {6}), (IBOT, {3, 6})])
def test_the_last_layers_rest_as_their_papers_have_it(flags, frozen_steps, tmp_path):
    seen, steps = last_layers(tmp_path, *flags)
    layers = [layer for layer, _ in seen]
    assert all(torch.equal(layer, layers[0]) for layer in layers[:3])
    assert not torch.equal(layers[3], layers[0])
    assert [none for _, none in seen] == [bool(flags)] * 3 + [False] * 3
    assert steps == frozen_steps  # DINOv2's moments go on, iBOT's start later


def test_the_teacher_sees_whole_images_and_is_the_export(tmp_path):
    seen = []

    def watch(self, images, mask=None, mask_token=None):
        seen.append(None if mask is None else int(mask.sum()))
        return embed(self, images, mask, mask_token)

    embed = backbones.VisionTransformer.embed
    with mock.patch.object(backbones.VisionTransformer, "embed", watch):
        train(tmp_path, "--epochs", "1", dtype="float32")
    assert [x is None for x in seen] == [True, False, True] * 3  # teacher, student: both sizes
    assert all(x > 0 for x in seen if x is not None)
    state = helpers.state_of(tmp_path)
    assert state.keys() == {"model", "teacher", "optimizer", "scaler"}  # no centres for Sinkhorn
    exported = torch.load(tmp_path / "backbone.pth", weights_only=True)
    for name, value in exported.items():
        assert torch.equal(value, state["teacher"][f"backbone.{name}"])
    assert not torch.equal(exported["norm.weight"], state["model"]["backbone.norm.weight"])


def test_init_starts_student_and_teacher(tmp_path):
    train(tmp_path / "first", "--layer-scale", "0.1", "--registers", "1", dtype="float32")
    given = torch.load(tmp_path / "first" / "backbone.pth", weights_only=True)
    starts, run = [], dinov2.Training.resume

    def remember(self, **state):
        run(self, **state)
        starts.append({name: {k: v.clone() for k, v in part.backbone.state_dict().items()}
                       for name, part in state.items() if hasattr(part, "backbone")})

    flags = ["--init", tmp_path / "first", "--layer-scale", "0.1"]
    with mock.patch.object(dinov2.Training, "resume", remember):
        train(tmp_path / "second", *flags, "--registers", "1", dtype="float32")
    assert starts[0].keys() == {"model", "teacher"}
    for start in starts[0].values():
        assert all(torch.equal(start[name], value) for name, value in given.items())
    with pytest.raises(RunError, match="reg_token.*--registers"):
        train(tmp_path / "third", *flags, dtype="float32")
