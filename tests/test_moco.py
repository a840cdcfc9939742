import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import helpers
import moco
from common import backbones, distributed as comm, rng
from common.images import open_images
from common.loader import Loader
from helpers import check_joined, own_gradients, own_rows

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_that_of_the_papers():
    args = moco.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.queue_length, args.momentum) == ("resnet50", 65536, 0.999)
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (256, 200, 0.03, 1e-4)
    assert (args.bn_groups, args.symmetric, args.crop_scale) == (8, False, [0.2, 1.0])
    assert (args.mlp_head, args.temperature) == (True, 0.2)
    assert (args.schedule, args.views) == ("cosine", "v2")


def test_version_one_is_the_first_paper():
    args = moco.parse_args(["--recipe", "imagenet", "--version", "1"])
    assert (args.mlp_head, args.temperature, args.blur) == (False, 0.07, False)
    assert (args.schedule, args.views) == ("step", "v1")
    assert moco.parse_args(["--recipe", "imagenet", "--version", "1", "--mlp-head"]).mlp_head


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--queue-length", "100"], "512 keys"),
        (["--bn-groups", "3"], "--bn-groups 3"),
        (["--batch-size", "4"], "two images or more"),
        (["--sync-bn"], "pass --bn-groups 1"),
        (["--version", "3"], "3"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        moco.parse_args(flags)
    assert named in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- views


def test_the_views_of_both_versions():
    for version, order, jitter in (
        (1, ["Grayscale", "ColorJitter", "GaussianBlur", "Normalize"], (0.4, 0.4, 0.4, 0.4, 1.0)),
        (2, ["ColorJitter", "Grayscale", "GaussianBlur", "Normalize"], (0.4, 0.4, 0.4, 0.1, 0.8)),
    ):
        args = moco.parse_args(["--recipe", "imagenet", "--version", str(version)])
        view, _ = moco.build_views(args)
        assert [type(step).__name__ for step in view.colour] == order
        found = view.colour[order.index("ColorJitter")]
        strengths = (found.brightness, found.contrast, found.saturation, found.hue, found.p)
        assert strengths == jitter
        assert view.geometry[0].interpolation == "bilinear"
        assert view.colour[order.index("GaussianBlur")].p == (0.5 if version == 2 else 0)


# -------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_batch_norm_is_a_batch_norm_for_every_part(groups):
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    plain = [nn.BatchNorm2d(3).double() for _ in range(groups)]
    grouped = moco.group_batchnorm(nn.Sequential(nn.BatchNorm2d(3).double()), groups)
    expected = torch.cat([bn(part) for bn, part in zip(plain, x.chunk(groups), strict=True)])
    torch.testing.assert_close(grouped(x), expected)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(bn, name) for bn in plain]).mean(0)
        torch.testing.assert_close(getattr(grouped[0], name), mean)
    grouped.eval()
    assert grouped(x).shape == x.shape


# --------------------------------------------------------------------------------- loss and updates


def tensors(n=6, d=5, length=9):
    rng = np.random.default_rng(1)
    queue = rng.normal(size=(length, d))
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    return rng.normal(size=(n, d)), rng.normal(size=(n, d)), queue


def loops(q, k, queue, temperature):
    """Algorithm 1 of the paper, one number at a time."""
    total = 0.0
    for i in range(len(q)):
        query, key = q[i] / math.sqrt((q[i] ** 2).sum()), k[i] / math.sqrt((k[i] ** 2).sum())
        scores = [math.exp(query @ other / temperature) for other in [key, *queue]]
        total -= math.log(scores[0] / sum(scores))
    return total / len(q)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_equals_the_papers_loops(temperature):
    q, k, queue = tensors()
    loss = moco.info_nce(*map(torch.from_numpy, (q, k, queue)), temperature)
    assert loss.item() == pytest.approx(loops(q, k, queue, temperature), rel=1e-12)


def test_info_nce_of_embeddings_that_are_all_alike_is_chance():
    ones = torch.ones(4, 3)
    queue = nn.functional.normalize(torch.ones(7, 3), dim=1)
    assert moco.info_nce(ones, ones, queue, 0.1).item() == pytest.approx(math.log(8), rel=1e-6)


def test_no_gradient_reaches_keys_and_queue():
    q, k, queue = (torch.from_numpy(x).requires_grad_() for x in tensors())
    moco.info_nce(q, k, queue, 0.2).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None and queue.grad is None


def test_the_gradient_of_info_nce_is_that_of_its_value():
    q, k, queue = map(torch.from_numpy, tensors(n=3))
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: moco.info_nce(q, k, queue, 0.5), (q,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_info_nce_computes_in_float32_at_least(dtype):
    q, k, queue = map(torch.from_numpy, tensors())
    q, k = q.to(dtype), k.to(dtype)
    loss = moco.info_nce(q, k, queue.float(), 0.07)
    expected = loops(q.double().numpy(), k.double().numpy(), queue.numpy(), 0.07)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def own_gradient(q, k, queue):
    keys, queue = own_rows(k), torch.from_numpy(queue)
    return own_gradients(lambda q: moco.info_nce(q, keys, queue, 0.2), q)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *tensors(n=8))


def filled_queue(length, batches, batch_size):
    """The queue after batches whose keys are numbered through; each process gives its share."""
    queue, pointer = torch.full((length, 1), -1.0), 0
    share = batch_size // comm.size()
    for number in range(batches):
        first = number * batch_size + comm.rank() * share
        keys = torch.arange(first, first + share)[:, None].float()
        pointer = moco.update_queue(queue, pointer, keys)
    return queue[:, 0].tolist(), pointer


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("length, batches", [(16, 3), (16, 2), (10, 5), (8, 1)])
def test_the_queue_holds_the_last_keys_of_all_processes_in_order(pool, size, length, batches):
    expected, pointer = [-1.0] * length, 0
    for key in range(8 * batches):
        expected[pointer] = float(key)
        pointer = (pointer + 1) % length
    for found in pool.run(size, filled_queue, length, batches, 8):
        assert found == (expected, pointer)


def test_a_queue_shorter_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="5 keys do not fit into a queue of 4"):
        moco.update_queue(torch.zeros(4, 2), 0, torch.zeros(5, 2))


def test_ema_moves_parameters_only():
    student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    teacher = copy.deepcopy(student)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    student(torch.randn(5, 2))
    moco.update_ema(teacher, student, 0.9)
    for name, value in teacher.state_dict().items():
        moved = 0.9 * before[name] + 0.1 * student.state_dict()[name]
        parameter = name in dict(teacher.named_parameters())
        torch.testing.assert_close(value, moved if parameter else before[name])


class Marked(nn.Module):
    """Gives back its images, and remembers which it was given together."""

    def forward(self, views):
        self.seen = [view.flatten(1)[:, 0].tolist() for view in views]
        return [view.flatten(1) for view in views]


def shuffled_keys(images, order):
    encoder, own = Marked(), own_rows(images)
    views = [own, 1 - own]
    keys = moco.encode_keys(encoder, views, torch.from_numpy(order))
    return [key.numpy() for key in keys], encoder.seen


@pytest.mark.parametrize("size", [1, 2, 4])
def test_keys_are_encoded_in_drawn_groups_and_come_back_in_order(pool, size):
    rng = np.random.default_rng(0)
    images, order = rng.normal(size=(8, 1, 1, 3)), rng.permutation(8)
    parts = pool.run(size, shuffled_keys, images, order)
    for view, whole in enumerate((images, 1 - images)):
        whole = whole.reshape(8, 3)
        wanted = whole / np.linalg.norm(whole, axis=1, keepdims=True)
        np.testing.assert_allclose(np.concatenate([p[0][view] for p in parts]), wanted)
        seen = sum((p[1][view] for p in parts), [])
        assert seen == whole[order][:, 0].tolist()


# --------------------------------------------------------------------------------------------- main


FLAGS = ["--bn-groups", "4", "--queue-length", "40"]


def queue_of_run(folder, steps, *flags):
    """Losses of a run in float64, and its queue at the end."""
    losses = helpers.train(moco, folder, *FLAGS, "--limit", 16 * steps, *flags)
    return losses, helpers.state_of(folder)["queue"].numpy()


def test_the_steps_of_the_paper_one_by_one(tmp_path):
    """Queries, EMA, shuffled keys, loss, SGD and queue, written out, against the loop of `main`."""
    flags = ["--momentum", "0.8", "--no-symmetric", "--weight-decay", "0.01"]
    losses, queue = queue_of_run(tmp_path, 4, *flags)
    args = moco.parse_args([*helpers.TINY, *FLAGS, "--limit", "64", *flags])
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        zero_init_residual=False)
    model = moco.MoCo(backbone, args.mlp_head, args.embedding_dim)
    key_model = copy.deepcopy(model)
    bank = [row / row.norm() for row in torch.randn(args.queue_length, args.embedding_dim)]
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    images = open_images("digits", "pretrain", 3, limit=64)
    loader = Loader(images, moco.build_views(args), batch_size=16, epochs=1,
                    seed=args.seed, workers=0, world=comm.World(0, 1, torch.device("cpu")))
    for step, batch in enumerate(loader.epoch(0)):
        first, second = batch.views
        q = torch.cat([model([group])[0] for group in first.split(4)])  # 4 groups of batch norm
        order = rng.philox(args.seed, rng.SHUFFLE, step).permutation(16).tolist()
        assert order != sorted(order)
        keys = {}
        with torch.no_grad():
            for old, new in zip(key_model.parameters(), model.parameters(), strict=True):
                old.copy_(0.8 * old + 0.2 * new)
            for start in range(0, 16, 4):
                group = order[start : start + 4]
                keys |= dict(zip(group, key_model([second[group]])[0], strict=True))
        loss = 0
        for row in range(16):
            query, key = q[row] / q[row].norm(), keys[row] / keys[row].norm()
            weights = [math.e ** (query @ other / args.temperature) for other in [key, *bank]]
            loss = loss - (weights[0] / sum(weights)).log() / 16
        assert loss.item() == pytest.approx(losses[step], rel=1e-9)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p, v in zip(model.parameters(), velocity, strict=True):
                v.copy_(0.9 * v + p.grad + 0.01 * p)
                p -= args.lr * 16 / 256 * v
        for row in range(16):
            bank[(16 * step + row) % len(bank)] = keys[row] / keys[row].norm()
    np.testing.assert_allclose(torch.stack(bank).numpy(), queue, atol=1e-9)


def test_any_number_of_processes_computes_the_same(pool, tmp_path):
    losses, queue = pool.run(1, queue_of_run, tmp_path / "1", 8)[0]
    for size in (2, 4):
        other_losses, other_queue = pool.run(size, queue_of_run, tmp_path / str(size), 8)[0]
        np.testing.assert_allclose(other_losses, losses, atol=1e-9)
        np.testing.assert_allclose(other_queue, queue, atol=1e-9)
