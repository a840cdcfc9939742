import copy
import math

import numpy as np
import pytest
import torch

import densecl
import helpers
from common import backbones, distributed as comm, rng
from common.images import open_images
from common.loader import Loader
from helpers import check_joined, own_gradients, own_rows

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_moco_v2s_with_half_of_the_loss_dense():
    args = densecl.parse_args(["--recipe", "imagenet"])
    assert (args.arch, args.queue_length, args.momentum) == ("resnet50", 65536, 0.999)
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay) == (256, 200, 0.03, 1e-4)
    assert (args.bn_groups, args.symmetric, args.crop_scale) == (8, False, [0.2, 1.0])
    assert (args.temperature, args.blur, args.views) == (0.2, True, "photo")
    assert (args.dense_weight, args.dense_warmup_steps) == (0.5, 1000)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--queue-length", "100"], "512 keys"),
        (["--bn-groups", "3"], "--bn-groups 3"),
        (["--batch-size", "4"], "two images or more"),
        (["--sync-bn"], "pass --bn-groups 1"),
        (["--dense-weight", "1.5"], "1.5"),
        (["--dense-warmup-steps", "-1"], "-1"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        densecl.parse_args(flags)
    assert named in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- model


def test_the_cells_are_the_backbones_last_map_row_by_row():
    backbone = backbones.build_backbone("resnet_tiny", stem="small", in_chans=3,
                                        zero_init_residual=False)
    model = densecl.DenseCL(backbone, 5).eval()
    images = torch.randn(2, 3, 16, 24)
    (cells, z, dense), = model([images])
    assert cells.shape == (2, 6, 128) and z.shape == (2, 5) and dense.shape == (2, 6, 5)
    maps = backbone.layer4(backbone.layer3(backbone.layer2(backbone.layer1(
        backbone.relu(backbone.bn1(backbone.conv1(images)))))))
    assert maps.shape[2:] == (2, 3)
    torch.testing.assert_close(cells[:, 4], maps[:, :, 1, 1])
    torch.testing.assert_close(z, model.head(backbone(images)))
    torch.testing.assert_close(dense[1, 2], model.dense_head(maps[1, :, 0, 2]))


# --------------------------------------------------------------------------------------------- loss


def cells(n=3, places=4, d=5, length=9):
    rng = np.random.default_rng(1)
    queue = rng.normal(size=(length, d))
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    match = rng.integers(0, places, (n, places))
    return rng.normal(size=(n, places, d)), rng.normal(size=(n, places, d)), match, queue


def loops(q, k, match, queue, temperature):
    """The dense loss of section 3.3, one number at a time."""
    total = 0.0
    for i in range(q.shape[0]):
        for s in range(q.shape[1]):
            query, key = q[i, s], k[i, match[i, s]]
            query, key = query / math.sqrt(query @ query), key / math.sqrt(key @ key)
            scores = [math.exp(query @ other / temperature) for other in [key, *queue]]
            total -= math.log(scores[0] / sum(scores))
    return total / (q.shape[0] * q.shape[1])


def cosine(a, b):
    norms = math.sqrt(a @ a) * math.sqrt(b @ b)
    return a @ b / norms if norms else 0.0


def test_every_cell_is_matched_with_the_one_most_like_it():
    rng = np.random.default_rng(3)
    q, k = rng.normal(size=(4, 6, 7)), rng.normal(size=(4, 6, 7)) * rng.uniform(0.1, 9, (4, 6, 1))
    q[0, 2] = k[1, 3] = 0  # cosine 0 with all
    k[2] = -abs(k[2])
    q[2], k[2, 4:] = abs(q[2]), 0  # where the best there is is 0, at two places
    found = densecl.match_cells(torch.from_numpy(q), torch.from_numpy(k))
    wanted = [[max(range(6), key=lambda j: (cosine(a, k[n, j]), -j)) for a in q[n]]
              for n in range(4)]
    assert found.dtype == torch.int64 and found.tolist() == wanted
    assert found[0, 2] == 0 and (found[2] == 4).all()


@pytest.mark.parametrize("places, width", [(4, 8), (9, 128), (49, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_of_key_cells_that_are_alike_the_first_is_taken(places, width, dtype):
    """Whichever sum of a matrix product rounds up."""
    cell = torch.randn(2, 1, width)
    k = torch.cat([-cell, cell.expand(-1, places - 1, -1)], dim=1).to(dtype)
    q = (cell + 0.5 * torch.randn(2, places, width)).to(dtype)
    assert (densecl.match_cells(q, k) == 1).all()


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_dense_info_nce_equals_the_papers_loops(temperature):
    q, k, match, queue = cells()
    loss = densecl.dense_info_nce(*map(torch.from_numpy, (q, k, match, queue)), temperature)
    assert loss.item() == pytest.approx(loops(q, k, match, queue, temperature), rel=1e-12)


def test_the_image_term_is_that_of_one_cell():
    q, k, _, queue = map(torch.from_numpy, cells(places=1))
    wanted = loops(*(x.numpy() for x in (q, k, torch.zeros(3, 1, dtype=int), queue)), 0.2)
    assert densecl.info_nce(q[:, 0], k[:, 0], queue, 0.2).item() == pytest.approx(wanted, rel=1e-12)


def test_cells_that_are_all_alike_are_at_chance():
    ones, match = torch.ones(2, 4, 3), torch.zeros(2, 4, dtype=torch.long)
    queue = torch.nn.functional.normalize(torch.ones(7, 3), dim=1)
    loss = densecl.dense_info_nce(ones, ones, match, queue, 0.1)
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)


def test_gradient_reaches_the_queries_alone_and_is_that_of_the_value():
    q, k, match, queue = map(torch.from_numpy, cells(n=2, places=3))
    for x in (q, k, queue):
        x.requires_grad_()
    densecl.dense_info_nce(q, k, match, queue, 0.2).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None and queue.grad is None
    assert torch.autograd.gradcheck(
        lambda q: densecl.dense_info_nce(q, k, match, queue, 0.5), (q,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised(dtype):
    q, k, match, queue = map(torch.from_numpy, cells())
    q, k = q.to(dtype), k.to(dtype)
    loss = densecl.dense_info_nce(q, k, match, queue.float(), 0.07)
    wanted = loops(q.double().numpy(), k.double().numpy(), match.numpy(), queue.numpy(), 0.07)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted, rel=1e-5)
    exact = densecl.match_cells(q.double(), k.double())
    assert torch.equal(densecl.match_cells(q, k), exact)


def own_gradient(q, k, match, queue):
    k, match, queue = own_rows(k), own_rows(match), torch.from_numpy(queue)
    return own_gradients(lambda q: densecl.dense_info_nce(q, k, match, queue, 0.2), q)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    check_joined(pool, size, own_gradient, *cells(n=8))


# ------------------------------------------------------------------------------------------- queues


def filled_queue(length, batches, batch_size):
    """The queue after batches whose keys are numbered through; each process gives its share."""
    queue, pointer = torch.full((length, 1), -1.0), 0
    share = batch_size // comm.size()
    for number in range(batches):
        first = number * batch_size + comm.rank() * share
        keys = torch.arange(first, first + share)[:, None].float()
        pointer = densecl.update_queue(queue, pointer, keys)
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


class Marked(torch.nn.Module):
    """Gives back cells, an embedding and cells of its images; remembers which came together."""

    def forward(self, views):
        self.seen = [view.flatten(1)[:, 0].tolist() for view in views]
        return [(view.flatten(2), view.flatten(1), -view.flatten(2)) for view in views]


def shuffled_keys(images, order):
    encoder, own = Marked(), own_rows(images)
    keys = densecl.encode_keys(encoder, [own, 1 - own], torch.from_numpy(order))
    return [[part.numpy() for part in parts] for parts in keys], encoder.seen


@pytest.mark.parametrize("size", [1, 2, 4])
def test_keys_are_encoded_in_drawn_groups_and_their_maps_come_back_in_order(pool, size):
    rng = np.random.default_rng(0)
    images, order = rng.normal(size=(8, 1, 1, 3)), rng.permutation(8)
    parts = pool.run(size, shuffled_keys, images, order)
    for view, whole in enumerate((images, 1 - images)):
        wanted = (whole.reshape(8, 1, 3), whole.reshape(8, 3), -whole.reshape(8, 1, 3))
        for number, each in enumerate(wanted):
            found = np.concatenate([p[0][view][number] for p in parts])
            np.testing.assert_array_equal(found, each)
        seen = sum((p[1][view] for p in parts), [])
        assert seen == whole.reshape(8, 3)[order][:, 0].tolist()


# --------------------------------------------------------------------------------------------- main


FLAGS = ["--bn-groups", "4", "--queue-length", "40", "--dense-warmup-steps", "1"]


def queues_of_run(folder, steps, *flags):
    """Losses of a run in float64, and its queues at the end."""
    losses = helpers.train(densecl, folder, *FLAGS, "--limit", 16 * steps, *flags)
    state = helpers.state_of(folder)
    return losses, state["queue"].numpy(), state["dense_queue"].numpy()


def term(query, key, bank, temperature):
    """Of one query: its key against a bank."""
    query, key = query / query.norm(), key / key.norm()
    weights = [math.e ** (query @ other / temperature) for other in [key, *bank]]
    return -(weights[0] / sum(weights)).log()


def test_the_steps_of_the_paper_one_by_one(tmp_path):
    """Queries, EMA, shuffled keys, both terms, SGD and queues, against the loop of `main`."""
    flags = ["--momentum", "0.8", "--no-symmetric", "--weight-decay", "0.01",
             "--dense-weight", "0.3"]
    losses, *queues = queues_of_run(tmp_path, 4, *flags)
    args = densecl.parse_args([*helpers.TINY, *FLAGS, "--limit", "64", *flags])
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)
    backbone = backbones.build_backbone(args.arch, stem=args.stem, in_chans=args.in_chans,
                                        zero_init_residual=False)
    model = densecl.DenseCL(backbone, args.embedding_dim)
    key_model = copy.deepcopy(model)
    start = torch.randn(2, args.queue_length, args.embedding_dim)
    bank, dense_bank = ([row / row.norm() for row in rows] for rows in start)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    images = open_images("digits", "pretrain", 3, limit=64)
    loader = Loader(images, densecl.build_views(args), batch_size=16, epochs=1,
                    seed=args.seed, workers=0, world=comm.World(0, 1, torch.device("cpu")))
    for step, batch in enumerate(loader.epoch(0)):
        first, second = batch.views
        groups = [model([group])[0] for group in first.split(4)]  # 4 groups of batch norm
        q_cells, q, q_dense = map(torch.cat, zip(*groups, strict=True))
        order = rng.philox(args.seed, rng.SHUFFLE, step).permutation(16).tolist()
        assert order != sorted(order)
        keys = {}
        with torch.no_grad():
            for old, new in zip(key_model.parameters(), model.parameters(), strict=True):
                old.copy_(0.8 * old + 0.2 * new)
            for start in range(0, 16, 4):
                group = order[start : start + 4]
                found = zip(*key_model([second[group]])[0], strict=True)
                keys |= dict(zip(group, found, strict=True))
        image, dense, places = 0, 0, q_cells.shape[1]
        for row in range(16):
            k_cells, key, k_dense = keys[row]
            image = image + term(q[row], key, bank, args.temperature) / 16
            for place in range(places):
                best = max(range(places), key=lambda j: cosine(
                    q_cells[row, place].detach().numpy(), k_cells[j].numpy()))
                one = term(q_dense[row, place], k_dense[best], dense_bank, args.temperature)
                dense = dense + one / (16 * places)
        loss = 0.7 * image + 0.3 * dense if step >= 1 else image + 0 * dense
        assert loss.item() == pytest.approx(losses[step], rel=1e-9)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p, v in zip(model.parameters(), velocity, strict=True):
                v.copy_(0.9 * v + p.grad + 0.01 * p)
                p -= args.lr * 16 / 256 * v
        for row in range(16):
            _, key, k_dense = keys[row]
            mean = sum(k_dense) / places
            bank[(16 * step + row) % len(bank)] = key / key.norm()
            dense_bank[(16 * step + row) % len(bank)] = mean / mean.norm()
    np.testing.assert_allclose(torch.stack(bank).numpy(), queues[0], atol=1e-9)
    np.testing.assert_allclose(torch.stack(dense_bank).numpy(), queues[1], atol=1e-9)


def test_any_number_of_processes_computes_the_same(pool, tmp_path):
    whole = pool.run(1, queues_of_run, tmp_path / "1", 8)[0]
    for size in (2, 4):
        for found, wanted in zip(pool.run(size, queues_of_run, tmp_path / str(size), 8)[0], whole,
                                 strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-9)


@pytest.mark.parametrize("flags, warned", [
    (["--dense-warmup-steps", "2"], True), (["--dense-warmup-steps", "1"], False),
    (["--dense-warmup-steps", "2", "--dense-weight", "0"], False),
])
def test_a_warm_up_that_leaves_no_dense_step_is_named(flags, warned, tmp_path, capsys):
    helpers.train(densecl, tmp_path, "--bn-groups", "2", *flags)
    said = "warning: --dense-warmup-steps 2 leaves none of the 2 steps" in capsys.readouterr().out
    assert said == warned
