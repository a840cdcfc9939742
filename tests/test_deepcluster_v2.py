import math
from pathlib import Path

import numpy as np
import pytest
import torch

import deepcluster_v2
import helpers
import swav
from common import distributed as comm
from helpers import check_joined, own_gradients, own_rows

# --------------------------------------------------------------------------------------- parse_args


def test_the_imagenet_recipe_is_the_papers():
    args = deepcluster_v2.parse_args(["--recipe", "imagenet"])
    assert (args.num_crops, args.crop_sizes) == ([2, 6], [224, 96])
    assert args.crop_scales == [0.14, 1.0, 0.05, 0.14] and args.image_size == 224
    assert (args.num_clusters, args.temperature) == ([3000] * 3, 0.1)
    assert (args.kmeans_iterations, args.weight_decay) == (10, 1e-6)
    scale = args.batch_size / 256
    assert args.lr * scale == pytest.approx(4.8)
    assert args.start_lr * scale == pytest.approx(0.3)
    assert args.final_lr * scale == pytest.approx(0.0048)


RUN = ["--limit", "72", "--epochs", "2", "--num-clusters", "6", "4"]


def test_more_clusters_than_images_are_refused_with_a_number_that_works(tmp_path):
    with pytest.raises(comm.RunError, match="--num-clusters 65 is more than the 64 images"):
        helpers.train(deepcluster_v2, tmp_path, *RUN, "--num-clusters", "65")


# -------------------------------------------------------------------------------------------- views


def test_crops_come_global_ones_first():
    views = deepcluster_v2.build_views(deepcluster_v2.parse_args(["--recipe", "imagenet"]))
    assert [view.size[0] for view in views] == [224] * 2 + [96] * 6
    assert [view.geometry[0].scale for view in views[1:3]] == [(0.14, 1), (0.05, 0.14)]
    swavs = swav.build_views(swav.parse_args(["--recipe", "imagenet"]))  # as the authors'
    assert [repr(v.geometry + v.colour) for v in views] == [
        repr(v.geometry + v.colour) for v in swavs]


# -------------------------------------------------------------------------------------------- model


def test_the_backbone_is_called_once_per_resolution():
    backbone = deepcluster_v2.backbones.build_backbone("resnet_tiny", stem="small", in_chans=3,
                                                       zero_init_residual=False)
    model, sizes = deepcluster_v2.DeepCluster(backbone, 32, 8), []
    model.backbone.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape))
    z = model([torch.rand(4, 3, side, side) for side in (16, 16, 8, 8, 8)])
    assert [tuple(shape) for shape in sizes] == [(8, 3, 16, 16), (12, 3, 8, 8)]
    assert z.shape == (5, 4, 8) and torch.allclose(z.norm(dim=2), torch.ones(5, 4))


# --------------------------------------------------------------------------------------------- loss


def loss_loops(scores, assignment, temperature):
    terms = []
    for crop in scores:
        for row, label in zip(crop, assignment, strict=True):
            if label != -100:
                p = np.exp(row / temperature)
                terms.append(-math.log(p[label] / p.sum()))
    return np.mean(terms) if terms else 0.0


def examples():
    rng = np.random.default_rng(1)
    return rng.uniform(-1, 1, (3, 8, 5)), np.array([0, -100, 4, 2, -100, 1, -100, -100])


def test_the_loss_equals_loops_over_labelled_crops():
    scores, labels = examples()
    loss = deepcluster_v2.cluster_loss(torch.from_numpy(scores), torch.from_numpy(labels), 0.1)
    assert loss.item() == pytest.approx(loss_loops(scores, labels, 0.1), rel=1e-12)


def test_zero_scores_give_ln_k_and_no_labels_give_zero():
    zeros = torch.zeros(2, 4, 9, requires_grad=True)
    chance = deepcluster_v2.cluster_loss(zeros, torch.tensor([0, 1, 8, -100]), 0.1)
    assert chance.item() == pytest.approx(math.log(9), rel=1e-6)
    nothing = deepcluster_v2.cluster_loss(zeros, torch.full((4,), -100), 0.1)
    nothing.backward()
    assert nothing.item() == 0 and not zeros.grad.any()


def test_the_gradient_of_the_loss_is_that_of_its_value():
    scores, labels = map(torch.from_numpy, examples())
    scores.requires_grad_()
    loss = deepcluster_v2.cluster_loss
    assert torch.autograd.gradcheck(lambda scores: loss(scores, labels, 0.5), (scores,))


def own_gradient(scores, labels):
    own = own_rows(labels)
    return own_gradients(lambda x: deepcluster_v2.cluster_loss(x, own, 0.1), scores, dim=1)


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size):
    # Two labels at most on any of four processes, none on the last.
    check_joined(pool, size, own_gradient, *examples(), dim=1)


# ------------------------------------------------------------------------------------------ k-means


def unit_rows(n, d, seed=2):
    x = np.random.default_rng(seed).normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def kmeans_loops(x, centroids, iterations):
    """Assign, average, scale to unit norm, one row at a time; an empty cluster stays."""
    centroids = [c.copy() for c in centroids]

    def nearest(row):
        dots = [float(row @ c) for c in centroids]
        return dots.index(max(dots))

    for _ in range(iterations):
        assignment = [nearest(row) for row in x]
        for k in range(len(centroids)):
            members = [row for row, a in zip(x, assignment, strict=True) if a == k]
            if members:
                total = sum(members)
                centroids[k] = total / math.sqrt((total**2).sum())
    return np.array(centroids), np.array([nearest(row) for row in x])


def clustered(x, k, iterations, seed, init=None):
    """This process's share of x clustered: centroids and clusters."""
    parts = np.array_split(x, comm.size())  # shares of different sizes
    own = torch.from_numpy(parts[comm.rank()])
    init = None if init is None else torch.from_numpy(init)
    generator = torch.Generator().manual_seed(seed)
    found = deepcluster_v2.spherical_kmeans(own, k, iterations, generator, init)
    return [part.numpy() for part in found]


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_kmeans_equals_loops(iterations):
    x = unit_rows(60, 4)
    centroids, assignment = clustered(x, 5, iterations, 0, x[:5])
    wanted = kmeans_loops(x, x[:5], iterations)
    np.testing.assert_allclose(centroids, wanted[0], rtol=1e-9)
    np.testing.assert_array_equal(assignment, wanted[1])


def test_an_empty_cluster_keeps_its_centroid_and_ties_go_to_the_lowest():
    x = np.array([[1.0, 0.0], [0.8, 0.6]])
    init = np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    for dtype in (np.float64, np.float32):
        first = clustered(x.astype(dtype), 3, 0, 0, init.astype(dtype))
        assert first[1].tolist() == [0, 0]
        centroids, assignment = clustered(x.astype(dtype), 3, 1, 0, init.astype(dtype))
        np.testing.assert_array_equal(centroids[1:], init[1:])
        assert np.abs(centroids[0] - init[0]).max() > 0.1 and assignment.tolist() == [1, 0]


def test_of_many_equal_centroids_the_lowest_counts():
    x = unit_rows(4000, 16).astype(np.float32)
    centroids = unit_rows(64, 16, seed=5).astype(np.float32)
    centroids[40:] = centroids[:24]
    nearest = deepcluster_v2.nearest_centroids(*map(torch.from_numpy, (x, centroids)))
    assert nearest.max() < 40
    np.testing.assert_array_equal(nearest, (x.astype(np.float64) @ centroids.T).argmax(1))


def test_the_start_is_of_different_rows_and_a_function_of_the_generator():
    x = unit_rows(50, 3)
    one, other = clustered(x, 20, 0, 1)[0], clustered(x, 20, 0, 2)[0]
    rows = {x.tolist().index(row) for row in one.tolist()}
    assert len(rows) == 20
    np.testing.assert_array_equal(one, clustered(x, 20, 0, 1)[0])
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("size", [2, 4])
def test_clusters_are_the_same_on_any_number_of_processes(pool, size):
    x = unit_rows(403, 6)
    alone = clustered(x, 17, 10, 3)
    parts = pool.run(size, clustered, x, 17, 10, 3)
    for centroids, _ in parts:
        np.testing.assert_allclose(centroids, alone[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(np.concatenate([a for _, a in parts]), alone[1])


def test_fewer_rows_than_clusters_are_refused():
    with pytest.raises(ValueError, match="3 rows do not make 4 clusters"):
        clustered(unit_rows(3, 2), 4, 1, 0)


def objective(x, centroids, assignment):
    return (x * centroids[assignment]).sum(dtype=np.float64)


def test_the_objective_never_worsens_and_ends_near_that_of_faiss():
    import faiss

    x = unit_rows(20_000, 64).astype(np.float32)
    found, centroids = [], None
    for _ in range(10):
        centroids, assignment = clustered(x, 50, 1, 0, centroids if found else x[:50])
        found.append(objective(x, centroids, assignment))
    assert all(b >= a * (1 - 1e-6) for a, b in zip(found, found[1:], strict=False))
    assert found[-1] > found[0] * 1.001
    peer = faiss.Kmeans(64, 50, niter=10, spherical=True)
    peer.train(x, init_centroids=x[:50])
    best = peer.index.search(x, 1)[0].sum(dtype=np.float64)
    assert found[-1] > 0.99 * best


def test_float32_and_float64_agree_but_for_rounding():
    x = unit_rows(500, 8)
    wide, narrow = clustered(x, 10, 10, 0), clustered(x.astype(np.float32), 10, 10, 0)
    np.testing.assert_allclose(narrow[0], wide[0], atol=1e-5)
    np.testing.assert_array_equal(narrow[1], wide[1])


# ------------------------------------------------------------------------------------------- memory


def memory_after(steps):
    """Two steps of four images each; image i has the embedding (i, i) and (-i, i)."""
    memory = torch.zeros(2, 10, 2)
    for index in steps:
        own = torch.tensor(np.array_split(index, comm.size())[comm.rank()])
        z = torch.stack([torch.stack([own, own], 1), torch.stack([-own, own], 1)]).float()
        deepcluster_v2.update_memory(memory, own, z)
    return memory.numpy()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_embeddings_are_written_to_the_rows_of_their_images(pool, size):
    for memory in pool.run(size, memory_after, [[3, 9, 1, 5], [8, 2, 7, 4]]):
        np.testing.assert_array_equal(memory[0, :, 1], [0, 1, 2, 3, 4, 5, 0, 7, 8, 9])
        np.testing.assert_array_equal(memory[1, :, 0], [0, -1, -2, -3, -4, -5, 0, -7, -8, -9])


def labels_of(x, seen):
    memory = torch.from_numpy(x * seen[:, None])
    generator = torch.Generator().manual_seed(0)
    return [part.numpy() for part in deepcluster_v2.cluster_memory(memory, 5, 10, generator)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_images_that_were_not_seen_get_no_label(pool, size):
    x, seen = unit_rows(41, 3), np.arange(41) % 7 != 2
    alone = kmeans_of(x[seen])
    for centroids, assignment in pool.run(size, labels_of, x, seen):
        assert (assignment[~seen] == -100).all()
        np.testing.assert_array_equal(assignment[seen], alone[1])
        np.testing.assert_allclose(centroids, alone[0], rtol=1e-9)


def kmeans_of(x):
    generator = torch.Generator().manual_seed(0)
    found = deepcluster_v2.spherical_kmeans(torch.from_numpy(x), 5, 10, generator)
    return [part.numpy() for part in found]


# --------------------------------------------------------------------------------------------- main


def labels_of_run(folder, *flags):
    losses = helpers.train(deepcluster_v2, folder, *RUN, *flags)
    return losses, np.load(Path(folder) / "assignments.npy")


def test_two_processes_compute_what_one_does(pool, tmp_path):
    losses, labels = pool.run(1, labels_of_run, tmp_path / "one")[0]
    assert labels.shape == (2, 72) and len(losses) == 8
    assert (labels == -100).sum(1).tolist() == [8, 8]  # 4 steps of 16 leave 8 images out
    assert labels[0].max() == 5 and labels[1].max() == 3
    for other in pool.run(2, labels_of_run, tmp_path / "two"):
        np.testing.assert_allclose(other[0], losses, atol=1e-9)
        np.testing.assert_array_equal(other[1], labels)


def test_heads_take_turns_with_the_crops_and_cluster_the_epoch_before(tmp_path, monkeypatch):
    written, clustered_rows = [], []
    update, cluster = deepcluster_v2.update_memory, deepcluster_v2.cluster_memory

    def watch_update(memory, index, z):
        update(memory, index, z)
        written.append((memory, index.tolist(), z.clone()))

    def watch_cluster(memory, *rest):
        rows = memory.any(1).nonzero()[:, 0].tolist()
        crop = next(c for c in range(2) if torch.equal(memory, written[-1][0][c]))
        clustered_rows.append((crop, rows, len(written)))
        return cluster(memory, *rest)

    monkeypatch.setattr(deepcluster_v2, "update_memory", watch_update)
    monkeypatch.setattr(deepcluster_v2, "cluster_memory", watch_cluster)
    flags = ["--epochs", "3", "--num-clusters", "6", "4", "5"]
    helpers.train(deepcluster_v2, tmp_path, *RUN, *flags, dtype="float32")
    assert [crop for crop, _, _ in clustered_rows] == [0, 1, 0] * 3
    epochs = [sorted(i for _, index, _ in written[4 * e : 4 * e + 4] for i in index)
              for e in range(4)]  # the pass that fills the bank, and three epochs
    for call, (_, rows, done) in enumerate(clustered_rows):
        assert done == 4 * (call // 3 + 1) and rows == epochs[call // 3]
    assert epochs[0] == epochs[1] != epochs[2]  # as the authors' first bank
    labels = np.load(tmp_path / "assignments.npy")
    assert np.flatnonzero(labels[0] >= 0).tolist() == epochs[2]
    assert not torch.equal(written[0][2], written[4][2])  # of other crops


def test_collapsed_features_raise_the_named_warning_within_an_epoch(tmp_path, capsys, monkeypatch):
    def collapsed(model, views):
        still = 0 * sum(p.sum() for p in model.parameters())
        z = torch.nn.functional.normalize(torch.ones(len(views), len(views[0]), 64), dim=2)
        return z + still

    monkeypatch.setattr(deepcluster_v2.DeepCluster, "forward", collapsed)
    helpers.train(deepcluster_v2, tmp_path, *RUN, "--epochs", "1", dtype="float32")
    said = capsys.readouterr().out
    assert "warning: cluster_entropy is 0" in said and "warning: z_std is 0" in said
