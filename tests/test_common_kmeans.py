import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from common import distributed as comm, kmeans as km, rng
from helpers import own_rows


def rows(n=60, d=6, seed=2):
    draws = np.random.default_rng(seed)
    return draws.normal(size=(n, d)) @ draws.normal(size=(d, d)) + draws.normal(size=d)


def part(x):
    """Of any length, also 0."""
    return torch.from_numpy(np.array_split(x, comm.size())[comm.rank()])


def started(x, k, seed=0):
    return km.first_centroids(part(x), k, rng.philox(seed, rng.CLUSTERS)).numpy()


def clustered(x, start, iterations):
    return [found.numpy() for found in km.kmeans(part(x), torch.from_numpy(start), iterations)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_start_is_different_rows_the_same_on_any_number_of_processes(pool, size):
    x = rows(7)
    alone = started(x, 6)
    assert len({x.tolist().index(row) for row in alone.tolist()}) == 6
    for found in pool.run(size, started, x, 6):
        assert np.array_equal(found, alone)
    assert not np.array_equal(started(x, 6, seed=1), alone)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("iterations", [0, 1, 3, 50])
def test_clusters_are_scikit_learns_from_the_same_start(iterations, dtype):
    x = (np.random.default_rng(0).normal(size=(500, 6)) * [30, 1, 1, 1, 1, 0.01]).astype(dtype)
    centroids, labels = clustered(x, x[:9], iterations)
    if iterations:
        theirs = KMeans(9, init=x[:9].astype(float), n_init=1, max_iter=iterations, tol=0,
                        algorithm="lloyd").fit(x.astype(float))
        tolerance = 1e-9 if dtype == np.float64 else 1e-4
        np.testing.assert_allclose(centroids, theirs.cluster_centers_, tolerance, tolerance)
    else:
        assert np.array_equal(centroids, x[:9])
    wide = centroids.astype(float)
    assert labels.tolist() == [np.argmin([((row - c) ** 2).sum() for c in wide]) for row in x]
    assert labels.dtype == np.int64


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_rows_and_change_no_bit(size, pool):
    x = rows(403).astype(np.float32)
    centroids, labels = clustered(x, x[:17], 20)
    found = pool.run(size, clustered, x, x[:17], 20)
    assert all(np.array_equal(own, centroids) for own, _ in found)
    assert np.array_equal(np.concatenate([own for _, own in found]), labels)


def test_a_process_may_have_no_rows(pool):
    x = rows(3)
    alone = clustered(x, x[:2], 5)
    for rank, (centroids, labels) in enumerate(pool.run(4, clustered, x, x[:2], 5)):
        assert np.array_equal(centroids, alone[0])
        assert np.array_equal(labels, alone[1][rank : rank + 1])


def means(x, labels, centroids):
    found = km.cluster_means(own_rows(x), own_rows(labels), torch.from_numpy(centroids))
    return [each.numpy() for each in found]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_means_and_sizes_are_over_all_processes_and_an_empty_cluster_stays(pool, size):
    x, labels, centroids = rows(24), np.arange(24) % 4, rows(4)
    labels[labels == 2] = 1
    for found, sizes in pool.run(size, means, x, labels, centroids):
        for k in (0, 1, 3):
            np.testing.assert_allclose(found[k], x[labels == k].mean(0), rtol=1e-12)
        assert np.array_equal(found[2], centroids[2]) and sizes.tolist() == [6, 12, 0, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_sums_of_whole_numbers_lose_nothing(size, dtype):
    x = (torch.randn(3000, 4, dtype=torch.float64) * size).to(dtype)
    labels = torch.zeros(3000, dtype=torch.int64)
    mean, _ = km.cluster_means(x, labels, x[:1])
    torch.testing.assert_close(mean, x.double().mean(0, keepdim=True).to(dtype), rtol=1e-6,
                               atol=1e-11 * size)
    order = torch.randperm(3000)
    assert torch.equal(km.cluster_means(x[order], labels, x[:1])[0], mean)


def test_empty_clusters_take_halves_of_the_largest():
    x = np.repeat(rows(4), 10, axis=0) + 1e-3 * np.random.default_rng(0).normal(size=(40, 6))
    x[:30] = x[0]  # 30 equal rows, from which five of the centroids start
    labels = clustered(x, x[[0, 1, 2, 3, 4, 39]], 20)[1]
    assert len(np.unique(labels[30:])) >= 2  # those of the cluster that can be split
    assert len(np.unique(labels[:30])) == 1
    groups = np.repeat([[0.0, 0], [9, 9]], 8, axis=0)
    labels = clustered(groups + np.random.default_rng(1).normal(size=(16, 2)),
                       np.array([[4.0, 4], [99, 99]]), 20)[1]
    assert labels[0] != labels[8] and len(set(labels[:8])) == len(set(labels[8:])) == 1


def joined(x):
    return km.join_parts(km.own_part(torch.from_numpy(x)), len(x)).numpy()


@pytest.mark.parametrize("size", [1, 3])
def test_parts_are_joined_in_order(pool, size):
    x = np.arange(14).reshape(7, 2)
    assert all(np.array_equal(found, x) for found in pool.run(size, joined, x))
