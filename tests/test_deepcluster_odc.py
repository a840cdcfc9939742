import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score

import deepcluster_odc
import eval_knn
import helpers
from common import distributed as comm
from common.checkpoint import Run
from helpers import check_joined, lines, own_gradients, own_rows

# --------------------------------------------------------------------------------------- parse_args


def settings(*flags):
    args = deepcluster_odc.parse_args(flags)
    return lambda *names: tuple(getattr(args, name) for name in names)


def test_the_imagenet_recipes_are_those_of_papers_and_code():
    of = settings("--recipe", "imagenet")
    assert of("num_clusters", "pca_dim", "kmeans_iterations") == (10_000, 256, 20)
    assert of("epochs", "batch_size", "weight_decay", "sobel", "stem") == (
        200, 512, 1e-5, True, "imagenet-sobel")
    assert of("lr")[0] * 512 / 256 == pytest.approx(0.1)
    of = settings("--recipe", "imagenet", "--method", "odc")
    assert of("hidden_dim", "embedding_dim", "dropout", "memory_momentum") == (512, 256, 0.5, 0.5)
    assert of("centroid_steps", "min_cluster", "num_clusters") == (10, 20, 10_000)
    assert of("epochs", "batch_size", "sobel", "sync_bn") == (440, 512, False, True)
    assert of("lr")[0] * 512 / 256 == pytest.approx(0.06)
    assert [share * 440 for share in of("lr_drops")[0]] == pytest.approx([400])


def test_the_rate_falls_at_whole_epochs(tmp_path):
    """7 / 25 of 25 epochs are a little more than 7 in floating point."""
    flags = ["--epochs", "25", "--schedule", "step", "--lr-drops", "0.28"]
    helpers.train(deepcluster_odc, tmp_path, *flags, "--limit", "16", "--num-clusters", "4",
                  "--lr", "0.016")
    assert [line["lr"] for line in lines(tmp_path)] == pytest.approx([0.001] * 7 + [0.0004] * 18)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--min-cluster", "3"], "--min-cluster 3 needs --method odc"),
        (["--method", "odc", "--pca-dim", "8"], "--pca-dim 8 needs --method deepcluster"),
        (["--method", "odc", "--dropout", "1"], "--dropout 1"),
        (["--num-clusters", "1"], "'1'"),
        (["--lr-drops", "0.5"], "--lr-drops needs --schedule step"),
    ],
)
def test_combinations_that_cannot_be_are_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        deepcluster_odc.parse_args(flags)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    (["--num-clusters", "73"], "--num-clusters 73 is too many for the 72 images of --data; at "
     "most 72"),
    (["--method", "odc", "--num-clusters", "8"], "--num-clusters 8 with --min-cluster 10 .* most 7")
])
def test_more_clusters_than_images_are_refused_with_a_number_that_works(flags, said, tmp_path):
    with pytest.raises(comm.RunError, match=said):
        helpers.train(deepcluster_odc, tmp_path, "--limit", "72", *flags)


# -------------------------------------------------------------------------------------------- model


def test_a_new_top_layer_is_a_function_of_seed_and_epoch_and_dropout_of_step_and_image():
    layer = torch.nn.Linear(300, 40)
    found = []
    for key in ((0, 1), (0, 1), (0, 2), (1, 1)):
        deepcluster_odc.start_top(layer, *key)
        found.append(layer.weight.detach().clone())
        assert not layer.bias.any()
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])
    assert found[0].std().item() == pytest.approx(0.01, rel=0.03)
    index = torch.tensor([4, 9])
    kept = deepcluster_odc.draw_dropout(index, 3, width=4000, rate=0.25, seed=0)
    assert kept.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert kept.mean().item() == pytest.approx(1, abs=0.03) and not torch.equal(*kept)
    again = deepcluster_odc.draw_dropout(index.flip(0), 3, width=4000, rate=0.25, seed=0)
    assert torch.equal(again, kept.flip(0))
    other = deepcluster_odc.draw_dropout(index, 4, width=4000, rate=0.25, seed=0)
    assert not torch.equal(other, kept)


def test_the_neck_is_odcs():
    backbone = deepcluster_odc.backbones.build_backbone("resnet_tiny", stem="small", in_chans=1,
                                                        zero_init_residual=False)
    model = deepcluster_odc.ClusterClassifier(backbone, 6, 4, 3)
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if "backbone" not in n]
    assert shapes == [(6, 128), (6,), (4, 6), (4,), (3, 4), (3,)]  # batch norm without scales
    images, kept = torch.rand(5, 1, 16, 16), 2.0 * (torch.rand(5, 6) < 0.5)
    z, logits = model([images], kept)
    h = model.hidden(backbone(images)) * kept
    torch.testing.assert_close(z, model.neck[0](h).relu())
    torch.testing.assert_close(logits, model.top(z))
    plain = deepcluster_odc.ClusterClassifier(backbone, None, None, 3).eval()
    z, logits = plain([images], None)
    torch.testing.assert_close(z, backbone(images))
    assert logits.shape == (5, 3)


# --------------------------------------------------------------------------------------------- loss


def test_class_weights_are_the_inverse_roots_of_the_sizes():
    weights = deepcluster_odc.class_weights(torch.tensor([1, 4, 16]))
    torch.testing.assert_close(weights, torch.tensor([4.0, 2.0, 1.0]) / 7)
    weights = deepcluster_odc.class_weights(torch.tensor([0.0, 25.0]).double())
    assert weights.dtype == torch.float64 and weights.sum().item() == pytest.approx(1)
    assert (weights[0] / weights[1]).item() == pytest.approx(math.sqrt((25 + 1e-10) / 1e-10))


def examples():
    rng = np.random.default_rng(1)
    return rng.normal(size=(8, 5)), np.array([0, 3, 4, 2, 0, 1, 4, 4]), rng.uniform(0.1, 1, 5)


def own_gradient(logits, labels, weights):
    own, weights = own_rows(labels), None if weights is None else torch.from_numpy(weights)
    return own_gradients(lambda x: deepcluster_odc.cluster_loss(x, own, weights), logits)


def test_the_loss_equals_loops():
    logits, labels, weights = examples()
    total = norm = 0.0
    for row, label in zip(logits, labels, strict=True):
        p = np.exp(row)
        total -= weights[label] * math.log(p[label] / p.sum())
        norm += weights[label]
    loss, _ = own_gradient(logits, labels, weights)
    assert loss == pytest.approx(total / norm, rel=1e-12)
    half = deepcluster_odc.cluster_loss(torch.zeros(4, 9).half(), torch.arange(4), torch.ones(9))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(math.log(9), rel=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradient_are_those_of_the_joined_batch(pool, size, weighted):
    logits, labels, weights = examples()
    check_joined(pool, size, own_gradient, logits, labels, weights if weighted else None)


# ----------------------------------------------------------------------------------------- clusters


def rows(n=60, d=6, seed=2):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def whitened(x, dim):
    return deepcluster_odc.pca_whiten(deepcluster_odc.own_part(torch.from_numpy(x)), dim).numpy()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_whitening_is_scikit_learns_on_any_number_of_processes(pool, size):
    x = rows(n=61)
    wanted = PCA(4, whiten=True).fit_transform(x)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = np.concatenate(pool.run(size, whitened, x, 4))
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-9)  # signs are free
    signs = np.sign((found * wanted).sum(0))
    np.testing.assert_allclose(found * signs, wanted, atol=1e-9)


def test_axes_without_variance_and_beyond_the_last_are_zero():
    x = rows(50, 3)
    flat = np.concatenate([x, x[:, :1] - x[:, 1:2], np.full((50, 1), 0.1)], axis=1)  # rank 3
    for dtype in (np.float64, np.float32):
        found = whitened(flat.astype(dtype), 7)
        assert found.dtype == dtype and found.shape == (50, 7)
        assert not found[:, 5:].any() and np.isfinite(found).all()
    assert not whitened(flat, 7)[:, 3:].any()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert not whitened(np.full((7, 3), 0.1), 2).any()
    x = np.concatenate([x - x.mean(0), np.zeros((1, 3))])
    assert np.abs(whitened(x, 3)[-1]).max() < 1e-6  # at the mean


def test_an_epoch_takes_images_from_all_clusters_equally_often():
    assignment = np.repeat([0, 1, 3, 4], [60, 3, 1, 36])  # cluster 2 is empty
    order = deepcluster_odc.balanced_order(assignment, 0, 5)
    assert len(order) == 100 and np.all(np.bincount(assignment[order], minlength=5)[[0, 1, 3, 4]]
                                        >= 25 - 4 + 0)
    assert np.bincount(assignment[order]).max() <= 26
    assert len(set(order[assignment[order] == 0])) >= 25 - 4  # a large one repeats no image
    assert np.bincount(order[assignment[order] == 0]).max() == 1
    np.testing.assert_array_equal(order, deepcluster_odc.balanced_order(assignment, 0, 5))
    for seed, epoch in ((0, 6), (1, 5)):
        assert not np.array_equal(order, deepcluster_odc.balanced_order(assignment, seed, epoch))


# --------------------------------------------------------------------------------------- ODC, steps


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def bank(m=24, d=5, k=4):
    rng = np.random.default_rng(3)
    memory = unit(rng.normal(size=(m, d)))
    return memory, rng.integers(0, k, m), rng.normal(size=(k, d))


def updated(memory, assignment, centroids, index, z, momentum):
    memory, assignment = torch.from_numpy(memory.copy()), torch.from_numpy(assignment.copy())
    deepcluster_odc.update_memory(memory, assignment, torch.from_numpy(centroids), own_rows(index),
                                  own_rows(z), momentum)
    return memory.numpy(), assignment.numpy()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_move_and_take_the_label_of_the_largest_dot_product(pool, size):
    memory, assignment, centroids = bank()
    rng = np.random.default_rng(4)
    index, z = rng.permutation(24)[:8], 7 * rng.normal(size=(8, 5))
    wanted, labels = memory.copy(), assignment.copy()
    for image, row in zip(index, z, strict=True):
        wanted[image] = unit(0.3 * memory[image] + 0.7 * unit(row))
        dots = [wanted[image] @ c for c in centroids]
        labels[image] = dots.index(max(dots))
    assert not np.array_equal(labels, assignment)
    for found in pool.run(size, updated, memory, assignment, centroids, index, z, 0.3):
        np.testing.assert_allclose(found[0], wanted, rtol=1e-12)
        np.testing.assert_array_equal(found[1], labels)


def repaired(memory, assignment, centroids, least):
    memory, assignment, centroids = (torch.from_numpy(x.copy())
                                     for x in (memory, assignment, centroids))
    deepcluster_odc.repair_clusters(memory, assignment, centroids, least, seed=0, step=3)
    return assignment.numpy(), centroids.numpy()


def lopsided():
    """Cluster 0 of two far groups, cluster 1 near it, two images each in 2 and 3."""
    rng = np.random.default_rng(5)
    heads = unit(np.array([[1.0, 0.1, 0], [1, -1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0.2]]))
    groups = np.repeat([0, 1, 2, 3, 4], [12, 10, 8, 2, 2])
    memory = unit(heads[groups] + 0.02 * rng.normal(size=(34, 3)))
    assignment = np.array([0, 0, 1, 2, 3])[groups]
    centroids = np.stack([memory[assignment == k].mean(0) for k in range(4)])
    return memory, assignment, centroids, groups


@pytest.mark.parametrize("size", [1, 2, 4])
def test_small_clusters_are_dissolved_and_the_largest_split(pool, size):
    memory, assignment, centroids, groups = lopsided()
    found, moved = zip(*pool.run(size, repaired, memory, assignment, centroids, 3), strict=True)
    for labels, new in zip(found, moved, strict=True):
        np.testing.assert_array_equal(labels, found[0])
        np.testing.assert_array_equal(new, moved[0])
        assert np.bincount(labels).min() >= 1 and set(labels) == {0, 1, 2, 3}
        assert set(labels[groups == 2]) == {1}  # not the largest: untouched but for what came
        assert labels[groups == 0][0] != labels[groups == 1][0]  # 2-means found the two groups
        assert len(set(labels[groups == 0])) + len(set(labels[groups == 1])) <= 3
        for k in set(labels[np.isin(groups, (0, 1))]):
            np.testing.assert_allclose(new[k], memory[labels == k].mean(0), rtol=1e-12)
    alone = repaired(memory, assignment, centroids, 3)
    np.testing.assert_array_equal(found[0], alone[0])


def test_what_is_large_enough_stays_and_equal_rows_are_split_in_halves():
    memory, assignment, centroids, _ = lopsided()
    labels, same = repaired(memory, assignment, centroids, 2)
    assert np.array_equal(labels, assignment) and np.array_equal(same, centroids)
    memory = np.repeat([[0.6, 0.8]], 9, axis=0)
    labels, new = repaired(memory, np.array([0] * 8 + [1]), np.array([[0.6, 0.8], [0.0, 1.0]]), 2)
    assert sorted(np.bincount(labels)) == [4, 5]
    np.testing.assert_allclose(new, memory[:2])


# --------------------------------------------------------------------------------------------- main

RUN = ["--limit", "72", "--epochs", "3", "--num-clusters", "6", "--top-lr-scale", "1", "--sync-bn"]
METHODS = {
    "deepcluster": ["--pca-dim", "4"],
    "odc": ["--method", "odc", "--min-cluster", "5", "--dropout", "0.5", "--centroid-steps", "3"],
}


def train(folder, *flags, stop_at=None):
    """Train in float64; losses, and what the checkpoint holds. `stop_at`: a stop signal's step."""
    agree = Run.agree
    if stop_at:
        left = iter(range(stop_at - 1, -1, -1))
        Run.agree = lambda self, epoch_ends: (next(left) == 0,) * 2
    try:
        losses = helpers.train(deepcluster_odc, folder, *RUN, *flags)
    finally:
        Run.agree = agree
    saved = helpers.state_of(folder)
    return losses, {name: value.numpy() for name, value in saved.items()
                    if isinstance(value, torch.Tensor)} | {
        "top": saved["model"]["top.weight"].numpy()}


def until(stop_at, folder, *flags):
    return train(folder, *flags, stop_at=stop_at)


@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_processes_computes_the_same_and_resumes_exactly(pool, method, tmp_path):
    flags = METHODS[method]
    losses, state = pool.run(1, train, str(tmp_path / "1"), *flags)[0]
    assert len(losses) == 12 and set(state["assignment"]) == set(range(6))
    assert np.array_equal(np.load(tmp_path / "1" / "assignments.npy"), state["assignment"])
    cut = tmp_path / "cut"
    whole, kept = pool.run(2, train, str(tmp_path / "2"), *flags)[0]
    pool.run(2, until, 6, str(cut), *flags)
    assert len(lines(cut)) == 6  # in the middle of the second epoch
    again, resumed = pool.run(2, train, str(cut), *flags)[0]
    assert again == whole
    for name, value in state.items():
        np.testing.assert_allclose(kept[name], value, atol=1e-7, err_msg=name)
        np.testing.assert_array_equal(resumed[name], kept[name], err_msg=name)
    np.testing.assert_allclose(whole, losses, rtol=1e-7)
    if method == "odc":
        assert not np.array_equal(state["assignment"], state["before"])
        np.testing.assert_allclose(np.linalg.norm(state["memory"], axis=1), 1)


def test_an_epoch_trains_on_its_own_clusters_with_a_new_top_layer(tmp_path, monkeypatch):
    clusters, batches = [], []
    order, loss = deepcluster_odc.balanced_order, deepcluster_odc.cluster_loss

    def watch_order(assignment, seed, epoch):
        clusters.append((assignment.copy(), order(assignment, seed, epoch)))
        return clusters[-1][1]

    def watch_loss(logits, labels, weights):
        batches.append((logits.detach().abs().amax().item(), labels.tolist(), weights))
        return loss(logits, labels, weights)

    monkeypatch.setattr(deepcluster_odc, "balanced_order", watch_order)
    monkeypatch.setattr(deepcluster_odc, "cluster_loss", watch_loss)
    helpers.train(deepcluster_odc, tmp_path, *RUN, *METHODS["deepcluster"])
    assert len(clusters) == 3 and len(batches) == 12
    for step, (largest, labels, weights) in enumerate(batches):
        assignment, images = clusters[step // 4]
        at = step % 4 * 16
        assert labels == assignment[images[at : at + 16]].tolist() and weights is None
        if step % 4 == 0:
            assert largest < 0.5  # of a layer that has learned nothing
    seen = {line["epoch"]: line["nmi"] for line in lines(tmp_path)}
    assert seen[0] == 0
    for epoch in (1, 2):
        wanted = normalized_mutual_info_score(clusters[epoch - 1][0], clusters[epoch][0])
        assert 0 < wanted < 1 and seen[epoch] == pytest.approx(wanted)


def test_odc_keeps_its_classes_and_does_things_in_order(tmp_path, monkeypatch):
    events = []

    def note(name):
        function = getattr(deepcluster_odc, name)

        def call(*arguments):
            events.append(name)
            return function(*arguments)

        monkeypatch.setattr(deepcluster_odc, name, call)

    for name in ("cluster_images", "class_weights", "cluster_loss", "update_memory",
                 "update_centroids", "repair_clusters", "start_top"):
        note(name)
    monkeypatch.setattr(deepcluster_odc, "kmeans",
                        lambda x, start, _: (None, torch.arange(len(x)) % len(start)))
    flags = ["--epochs", "2", "--min-cluster", "1", "--lr", "1e-9"]
    helpers.train(deepcluster_odc, tmp_path, *RUN, *METHODS["odc"], *flags)
    step = ["class_weights", "cluster_loss", "update_memory", "repair_clusters"]
    assert "start_top" not in events
    assert events[:10] == ["cluster_images", "update_centroids", *step, *step]
    assert events[10:15] == [*step[:3], "update_centroids", step[3]]
    assert events.count("update_centroids") == 1 + 8 // 3


def test_the_backbone_is_clustered_as_it_stands_and_left_as_it_was(tmp_path, monkeypatch):
    """Eval mode, images seen whole, no gradient; batch norm goes on in the modes it had."""
    seen, forward = [], deepcluster_odc.ClusterClassifier.embed

    def watch(self, images, kept=None):
        bn = self.backbone.bn1
        seen.append((bn.training, len(images), torch.is_grad_enabled(), kept is None))
        return forward(self, images, kept)

    monkeypatch.setattr(deepcluster_odc.ClusterClassifier, "embed", watch)
    flags = ["--epochs", "2", "--freeze-backbone-epochs", "1"]
    helpers.train(deepcluster_odc, tmp_path, *RUN, *METHODS["deepcluster"], *flags)
    frozen, trained = [(False, 16, True, True)] * 4, [(True, 16, True, True)] * 4
    assert seen == [(False, 72, False, True), *frozen, (False, 72, False, True), *trained]


@pytest.mark.parametrize("method", METHODS)
def test_edges_train_and_their_backbone_is_evaluated_as_such(method, tmp_path, capsys):
    helpers.train(deepcluster_odc, tmp_path, *RUN, *METHODS[method], "--epochs", "1", "--sobel",
                  dtype="float32")
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert weights["conv1.weight"].shape[1] == 2
    capsys.readouterr()
    eval_knn.main(eval_knn.parse_args(["--checkpoint", str(tmp_path), "--limit", "100"]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < result["top1"] <= 1
    moved = tmp_path / "moved.pth"
    Path(tmp_path / "backbone.pth").rename(moved)  # without run.json, by what the file says
    (tmp_path / "run.json").unlink()
    eval_knn.main(eval_knn.parse_args(["--checkpoint", str(moved), "--data", "digits", "--limit",
                                       "100"]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == result["top1"]


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_cannot_be_read_ends_no_run(method, tmp_path, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{number:02}.png")
    (folder / "07.png").write_bytes(b"no picture")
    helpers.train(deepcluster_odc, tmp_path / "out", "--data", folder, *RUN, *METHODS[method],
                  "--limit", "40")
    assert "unreadable, replaced" in capsys.readouterr().out
    assert len(lines(tmp_path / "out")) == 6
