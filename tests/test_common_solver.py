import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from common import solver
from common.distributed import World

ALONE = World(0, 1, torch.device("cpu"))
DECAYS = [float(f"{10 ** (half / 2 - 6):.1e}") for half in range(13)]


def problem(n=40, d=5, c=3, h=2):
    rng = np.random.default_rng(1)
    rows, labels = torch.tensor(rng.normal(size=(n, d))), torch.tensor(rng.integers(0, c, n))
    shares = torch.tensor(rng.random((n, h)))
    return rows, labels, shares, torch.tensor([0.1, 0.01][:h])


def written_out(point, rows, labels, shares, decay):
    weights, offsets = point[: rows.shape[1]], point[rows.shape[1]]
    losses = nn.functional.cross_entropy(rows @ weights + offsets, labels, reduction="none")
    return (shares * losses).sum() + decay / 2 * weights.square().sum()


@pytest.mark.parametrize("at_a_time", [7, 2**25])
def test_value_and_gradient_equal_autograds(at_a_time, monkeypatch):
    monkeypatch.setattr(solver, "LOGITS_AT_A_TIME", at_a_time)
    rows, labels, shares, decays = problem()
    points = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    function = solver.cross_entropies(rows, labels, shares, decays, 3)
    values, gradients = function(points.detach().view(2, -1), torch.arange(2))
    expected = [written_out(points[h], rows, labels, shares[:, h], decays[h]) for h in range(2)]
    torch.testing.assert_close(values, torch.stack(expected).detach(), rtol=1e-12, atol=0)
    sum(expected).backward()
    torch.testing.assert_close(gradients.view(2, 6, 3), points.grad, rtol=1e-10, atol=1e-12)
    one, gradient = function(points.detach().view(2, -1)[1:], torch.tensor([1]))  # one head alone
    torch.testing.assert_close(one, values[1:])
    torch.testing.assert_close(gradient, gradients[1:])


def quadratics(h=6, p=8):
    rng = np.random.default_rng(2)
    roots = torch.tensor(rng.normal(size=(h, p, p)))
    hessians = roots @ roots.transpose(1, 2) + 0.1 * torch.eye(p, dtype=torch.float64)
    hessians *= 10.0 ** torch.arange(h)[:, None, None]
    least = torch.tensor(rng.normal(size=(h, p)))

    def function(points, which):
        x = points - least[which]
        gradients = (hessians[which] @ x[:, :, None])[:, :, 0]
        return (x * gradients).sum(1) / 2, gradients

    return function, least, hessians


def test_several_functions_are_minimised_at_once_and_each_as_if_alone():
    function, least, hessians = quadratics()
    start, curvatures = torch.zeros_like(least) + 3, hessians.diagonal(dim1=1, dim2=2)
    options = dict(tolerance=1e-16, iterations=200)
    each = torch.linalg.eigvalsh(hessians)[:, 0]
    found = solver.minimise(function, start, curvatures, least=each, **options)
    torch.testing.assert_close(found, least, rtol=1e-6, atol=1e-6)
    found = solver.minimise(function, start, torch.ones_like(start), least=each, **options)
    torch.testing.assert_close(found, least, rtol=1e-6, atol=1e-6)
    for h in range(len(least)):
        alone = solver.minimise(lambda x, which, h=h: function(x, which + h), start[:1],
                                     curvatures[h : h + 1], least=each[h : h + 1], **options)
        torch.testing.assert_close(alone[0], found[h], rtol=1e-6, atol=1e-6)


def test_a_known_curvature_saves_the_steps():
    scales = torch.logspace(-4, 4, 40, dtype=torch.float64)[None]
    calls = []

    def function(points, which):
        calls.append(len(which))
        return 1 + (scales * (points - 1).square()).sum(1) / 2, scales * (points - 1)

    start = torch.zeros(1, 40, dtype=torch.float64)
    options = dict(least=scales[:, 0], tolerance=1e-12, iterations=500)
    found = solver.minimise(function, start, scales, **options)
    torch.testing.assert_close(found, start + 1)
    assert len(calls) == 2  # the start, and one step to the end
    calls.clear()
    solver.minimise(function, start, start + 1, **options)
    assert len(calls) > 40


def test_principal_axes_turn_the_rows_and_know_their_variances():
    x = torch.randn(50, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    x -= x.mean(0)
    axes, variances = solver.principal_axes(x, 50)
    torch.testing.assert_close(axes.T @ axes, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close((x @ axes).square().mean(0), variances)
    torch.testing.assert_close(((x @ axes).T @ (x @ axes)) / 50, variances.diag())
    axes, variances = solver.principal_axes(torch.cat([x, x, 0 * x], dim=1), 50)
    assert axes.shape == (21, 7) and variances.shape == (7,)  # what varies is in seven


def test_features_of_little_rank_are_fitted_to_the_end():
    """Nearly collinear features, as bad backbones have: the validation equals scikit-learn's."""
    rng = np.random.default_rng(0)
    labels = np.arange(150) % 3
    hidden = np.eye(3)[labels] + 0.7 * rng.normal(size=(150, 3))
    rows = hidden @ rng.normal(size=(3, 40)) * 10 + 0.05 * rng.normal(size=(150, 40)) + 7
    decay, fold = 1e-5, solver.assign_folds(labels, 5, 0)
    rows = torch.tensor(rows, dtype=torch.float32)
    got = auto(rows, labels, rows, labels, decays=[decay])
    x = rows.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    right = 0
    for out in range(5):
        model = LogisticRegression(C=1 / (decay * 120), tol=1e-10, max_iter=100_000)
        model.fit(x[fold != out], labels[fold != out])
        right += (model.predict(x[fold == out]) == labels[fold == out]).sum()
    assert got["validation"] == pytest.approx(right / 150, abs=1e-12)


@pytest.mark.parametrize("decay", [1e-7, 1e-5])
def test_separable_features_are_fitted_to_the_end(decay):
    """Where the loss falls far below the weight decay's, so that a small gradient means little."""
    rng = np.random.default_rng(1)
    labels, truth = np.arange(90) % 3, np.arange(3000) % 3
    scales = np.logspace(0, -2, 30)
    train, test = (np.eye(3, 30)[y] + rng.normal(size=(len(y), 30)) * scales
                   for y in (labels, truth))
    got = auto(torch.tensor(train), labels, torch.tensor(test), truth, decays=[decay])
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=1 / (decay * 90), tol=1e-10, max_iter=100_000)
    model.fit(scaler.transform(train), labels)
    assert abs(got["top1"] - model.score(scaler.transform(test), truth)) < 1.5 / 3000


def test_a_small_loss_is_exact_in_float32():
    row, one = torch.zeros(1, 1), torch.ones(1, 1)
    function = solver.cross_entropies(row, torch.tensor([0]), one, one[0], 2)
    values, _ = function(torch.tensor([[0.0, 0.0, 100.0, 91.0]]), torch.tensor([0]))
    assert values.item() == pytest.approx(math.log1p(math.exp(-9)), rel=1e-3)


def test_what_is_not_minimised_is_told_of(capsys):
    function, least, hessians = quadratics()
    start, each = torch.zeros_like(least) + 3, torch.linalg.eigvalsh(hessians)[:, 0]
    start[1] = least[1]  # one that is done from the start
    options = dict(least=each, tolerance=1e-6)

    def shifted(points, which):
        values, gradients = function(points, which)
        return values + 1, gradients

    solver.minimise(shifted, start, torch.ones_like(start), iterations=2, **options)
    assert "warning: 5 of 6 heads have not converged" in capsys.readouterr().out
    solver.minimise(shifted, start, torch.ones_like(start), iterations=200, **options)
    assert capsys.readouterr().out == ""

    def rising(points, which):
        values, gradients = shifted(points, which)
        return values, -gradients  # no step falls

    solver.minimise(rising, start, torch.ones_like(start), iterations=200, **options)
    assert "warning: 5 of 6 heads have not converged" in capsys.readouterr().out


def test_it_needs_few_passes_over_the_images():
    rows, _, _, _ = problem(n=200, d=20, c=4)
    labels = rows[:, :4].argmax(1)  # which a linear layer can tell: large weights, many steps
    decays = torch.tensor([1e-6, 1e-3, 1.0], dtype=torch.float64)
    function = solver.cross_entropies(rows, labels, rows.new_full((200, 3), 1 / 200), decays,
                                           4)
    calls = []

    def counted(points, which):
        calls.append(len(which))
        return function(points, which)

    solver.minimise(counted, rows.new_zeros(3, 84), rows.new_ones(3, 84), least=decays,
                         tolerance=1e-4, iterations=300)
    assert len(calls) < 150 and calls[0] == 3 and calls[-1] < 3  # what is done is left out


def test_every_head_is_scikit_learns_logistic_regression():
    """C = 1 / (decay n), offsets not decayed."""
    rows, labels, _, _ = problem(n=120, d=6, c=3)
    decays = torch.tensor([1e-3, 1e-1], dtype=torch.float64)
    used = torch.arange(120)[:, None] % 5 != torch.tensor([0, 3])
    shares = used / used.sum(0).double()
    function = solver.cross_entropies(rows, labels, shares, decays, 3)
    points = solver.minimise(function, rows.new_zeros(2, 21), rows.new_ones(2, 21),
                                  least=decays, tolerance=1e-12, iterations=500)
    for h in range(2):
        theirs = LogisticRegression(C=1 / (decays[h].item() * 96), tol=1e-10, max_iter=10_000)
        theirs.fit(rows[used[:, h]].numpy(), labels[used[:, h]].numpy())
        head = points[h].view(7, 3)
        np.testing.assert_allclose(head[:6].T, theirs.coef_, atol=1e-5)
        shift = head[6].numpy() - theirs.intercept_  # offsets are known up to one number
        np.testing.assert_allclose(shift, shift[0], atol=1e-5)


def test_features_are_standardised_and_constant_ones_left_out():
    rows = torch.tensor([[1.0, 5, 100], [3, 5, 300], [5, 5, 500]])
    center, scale = solver.standardisation(rows)
    assert center.tolist() == [3, 5, 300] and scale[1] == 0
    torch.testing.assert_close(scale[[0, 2]], 1 / rows.double().std(0, correction=0)[[0, 2]])
    many = torch.arange(70_000.0)[:, None]  # more than are raised to float64 at once
    center, scale = solver.standardisation(many)
    torch.testing.assert_close(center, many.double().mean(0))
    torch.testing.assert_close(scale, 1 / many.double().std(0, correction=0))


def test_folds_have_equally_many_of_every_class():
    labels = np.random.default_rng(0).integers(0, 4, 203)
    fold = solver.assign_folds(labels, 5, 0)
    for c in range(4):
        counts = np.bincount(fold[labels == c], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(fold, solver.assign_folds(labels, 5, 1))


@pytest.mark.parametrize("at_a_time", [7, 2**25])
def test_right_ones_are_counted_of_each_heads_rows(at_a_time, monkeypatch):
    monkeypatch.setattr(solver, "LOGITS_AT_A_TIME", at_a_time)
    rows, labels, shares, _ = problem()
    points, used = torch.randn(2, 18, dtype=torch.float64), shares > 0.5
    by_class, wanted = torch.zeros(3, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    found = solver.count_correct(points, rows, labels, used, 1, 3, by_class)
    for h, head in enumerate(points.view(2, 6, 3)):
        for row, label, counts in zip(rows, labels, used[:, h], strict=True):
            right = (row @ head[:5] + head[5]).argmax() == label
            wanted[h] += right & counts
            wanted[2 + label] += right & (h == 0)
    assert torch.equal(torch.cat([found, by_class]), wanted)


def auto(train, labels, test, truth, **options):
    options = dict(decays=DECAYS, folds=5, num_classes=3, seed=0, world=ALONE) | options
    return solver.cross_validated(train, labels, test, truth, **options)


def blobs(n, seed, noise=1.5):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    rows = np.eye(6)[labels] * 3 + noise * rng.normal(size=(n, 6))
    return torch.tensor(rows, dtype=torch.float32), labels


def test_the_decay_is_chosen_by_cross_validation_and_counted_by_hand():
    (train, labels), (test, truth) = blobs(90, 0), blobs(60, 1)
    got = auto(train, labels, test, truth)
    x = ((train.double() - train.double().mean(0)) / train.double().std(0, correction=0)).numpy()
    fold = solver.assign_folds(labels, 5, 0)
    shares = {}
    for decay in DECAYS:
        right = 0
        for out in range(5):
            model = LogisticRegression(C=1 / (decay * (fold != out).sum()), tol=1e-8,
                                       max_iter=10_000).fit(x[fold != out], labels[fold != out])
            right += (model.predict(x[fold == out]) == labels[fold == out]).sum()
        shares[decay] = right / 90
    assert got["validation"] == pytest.approx(max(shares.values()), abs=1e-12)
    assert got["weight_decay"] == max(d for d, s in shares.items() if s == max(shares.values()))
    assert math.isnan(got["top5"]) and 0.6 < got["top1"] < 1  # three classes


def test_the_test_images_choose_nothing():
    (train, labels), (test, truth) = blobs(90, 0), blobs(60, 1)
    one, two = auto(train, labels, test, truth), auto(train, labels, -test, truth)
    assert (one["weight_decay"], one["validation"]) == (two["weight_decay"], two["validation"])
    assert one["top1"] != two["top1"]


def test_many_images_leave_out_one_fifth_only(monkeypatch):
    heads, minimise = [], solver.minimise
    monkeypatch.setattr(solver, "minimise",
                        lambda f, x, c, **o: heads.append(len(x)) or minimise(f, x, c, **o))
    auto(*blobs(90, 0), *blobs(60, 1))
    monkeypatch.setattr(solver, "MANY_ROWS", 50)
    auto(*blobs(90, 0), *blobs(60, 1))
    assert heads[::3] == [65, 1, 13, 1]  # each in three rounds


def test_features_that_tell_nothing_are_right_by_chance():
    """Equally many images of seven classes, all alike: 1 in 7, and 5 in 7 among five."""
    rows = torch.ones(70, 3)
    for labels in (np.arange(70) % 7, np.arange(69, -1, -1) % 7):
        got = auto(rows, labels, rows[:14], labels[:14], num_classes=7)
        assert (got["top1"], got["top5"]) == (pytest.approx(1 / 7), pytest.approx(5 / 7))
        assert got["validation"] == pytest.approx(1 / 7)
