"""Logistic regression on features, its weight decay chosen by cross-validation; L-BFGS for it.

`cross_validated` is the linear probe without settings. `fit` trains the heads of many weight decays
and folds at once on the rows of all processes: one matrix product serves them all. Rows are
standardised and turned to their principal axes before, so that the curvature along each coordinate
is known.

Letters: N rows, H heads, C classes, D feature size, P = (D + 1) C.
"""

import numpy as np
import torch
from torch import Tensor

from common import distributed as comm, features, labelled, whitening

LOGITS_AT_A_TIME = 2**25
MANY_ROWS = 20_000  # from here on, one fold left out tells enough
P_SPREAD = 0.05  # p (1 - p) of a usual probability p: the curvature that a logit is taken to have


def cross_validated(train, labels, test, truth, *, decays: list[float], folds: int,
                    num_classes: int, seed: int, world: comm.World, also=()) -> dict:
    """Choose a weight decay on the training rows, train on all of them, count on the test rows.

    Args:
        train: (N, D) and test: (M, D) on the CPU; every process has them and takes its part.
        labels: int64 (N,). truth: int64 (M,).
        decays: rising.
        also: further (rows, truth, classes) to count on; no class but these is predicted.

    Returns:
        "top1", "top5" (NaN of five classes or fewer), "mean_per_class", "validation",
        "weight_decay"; and in "also" the first three of each of the further ones.
    """
    # 1. Standardise; on the CPU in float64, so that no sum's order decides near a border
    dtype = torch.float64 if world.device.type == "cpu" else torch.float32
    mean, scale = standardisation(train)

    def local(rows, numbers):
        """This process's part, its standardised rows and its labels."""
        part = world.part(len(rows))
        x = rows[part].to(world.device, dtype, copy=True)
        x.sub_(mean.to(x)).mul_(scale.to(x))
        return part, x, torch.from_numpy(numbers[part]).to(world.device)

    part, x, y = local(train, labels)
    axes, variances = principal_axes(x, len(labels))
    x = x @ axes.to(x)

    # 2. Many heads: every weight decay, with every fold left out
    folds = min(folds, len(labels))
    fold = torch.from_numpy(assign_folds(labels, folds, seed))
    held_out = range(1 if len(labels) > MANY_ROWS else folds)
    used = torch.stack([fold != out for _ in decays for out in held_out], dim=1)  # (N, H)
    shares = (used.double() / used.sum(0))[part].to(x)
    points = fit(x, y, shares, x.new_tensor(decays).repeat_interleave(len(held_out)),
                 variances, num_classes)

    # 3. The best of them; once more on all training images
    correct = count_correct(points, x, y, ~used[part].to(world.device), 1, num_classes)
    accuracy = correct.view(len(decays), -1).sum(1) / (~used).sum(0)[: len(held_out)].sum().item()
    validation, decay = max(zip(accuracy.tolist(), decays, strict=True))  # a tie: the largest decay
    shares = x.new_full((len(x), 1), 1 / len(labels))
    points = fit(x, y, shares, x.new_tensor([decay]), variances, num_classes)

    def accuracies(points, rows, truth, count) -> dict:
        _, x, y = local(rows, truth)
        x, every = x @ axes.to(x), torch.ones(len(y), 1, device=world.device)
        by_class = torch.zeros(num_classes, dtype=torch.float64, device=world.device)
        top1, top5 = (
            (count_correct(points, x, y, every, k, num_classes, right) / len(truth)).item()
            for k, right in ((1, by_class), (5, None)))
        per_class = labelled.mean_per_class(comm.sum_over_processes(by_class), truth)
        return {"top1": top1, "top5": top5 if count > 5 else np.nan, "mean_per_class": per_class}

    found = []
    for rows, theirs, present in also:
        masked = points.clone().view(-1, num_classes)
        masked[-1, labelled.absent(present, num_classes)] = -torch.inf  # the offsets
        found.append(accuracies(masked.view_as(points), rows, theirs, len(present)))
    return {**accuracies(points, test, truth, num_classes), "validation": validation,
            "weight_decay": decay, "also": found}


def assign_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """A fold (N,) for every image; each has equally many of every class, or one more."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


def count_correct(points: Tensor, x, y, rows: Tensor, k: int, num_classes: int,
                  by_class: Tensor | None = None) -> Tensor:
    """On how many of its rows (N, H) each head has the true class among its best k: (H,).

    To `by_class` (C,) are added this process's correct rows of each class, of the first head.
    """
    heads = points.view(len(points), -1, num_classes)
    weights, offsets = heads[:, :-1], heads[:, -1:]
    count = torch.zeros(len(points), dtype=torch.float64, device=x.device)
    step = max(1, LOGITS_AT_A_TIME // offsets.numel())
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        logits = (x[part] @ weights + offsets).transpose(0, 1)  # (n, H, C)
        truth = y[part, None].expand(-1, len(points))
        hits = features.share_right(logits, truth, min(k, num_classes))
        count += (hits * rows[part]).sum(0)
        if by_class is not None:
            by_class.index_add_(0, y[part], hits[:, 0])
    return comm.sum_over_processes(count)


def standardisation(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and one over the deviation of features; 0 for a feature that does not vary."""
    mean, square, n = 0, 0, len(rows)
    for part in rows.split(2**16):
        mean = mean + part.double().sum(0) / n
    for part in rows.split(2**16):
        square = square + (part.double() - mean).square().sum(0) / n
    deviation = square.sqrt()
    varies = deviation > 1e-6 * deviation.max()
    return mean, torch.where(varies, 1 / deviation, 0)


def principal_axes(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Principal axes (D, R) and variances (R,) of n centred rows, of which x are this process's.

    In these coordinates the functions to minimise are curved along the axes, and the weight decay
    is what it was. Axes along which nothing varies are left out: their weights would stay 0.
    """
    if x.shape[1] > 4096:  # would take longer than what it saves
        variances = comm.sum_over_processes(x.square().sum(0).double()) / n
        return torch.eye(len(variances), dtype=x.dtype, device=x.device), variances
    _, variances, axes = whitening.principal_axes(x)
    varies = variances > 1e-12 * variances[0]
    return axes[:, varies], variances[varies]


def fit(x: Tensor, y: Tensor, shares: Tensor, decays: Tensor, variances: Tensor, num_classes: int):
    """Train the heads (H, P) of decays (H,) and shares (N, H), all of them together.

    Args:
        x: (N, D), standardised and along principal axes of these variances (D,). y: (N,).
    """
    function = cross_entropies(x, y, shares, decays, num_classes)
    points = x.new_zeros(len(decays), (x.shape[1] + 1) * num_classes)
    spread = torch.full_like(decays, P_SPREAD)[:, None]
    for tolerance in (1.0, 1e-2, 1e-6 if x.dtype == torch.float64 else 1e-3):
        curvatures = torch.cat([spread * variances.to(x) + decays[:, None], spread], dim=1)
        points = minimise(function, points, curvatures.repeat_interleave(num_classes, dim=1),
                          least=decays, tolerance=tolerance, iterations=10_000)
        # Where the loss is small, so are p (1 - p) and the curvature.
        losses, _ = function(points, torch.arange(len(points), device=x.device))
        spread = (0.3 * losses).clamp(max=P_SPREAD)[:, None]
    return points


def cross_entropies(rows, labels, shares, decays, num_classes: int):
    """The functions to minimise: sum of share x cross-entropy + decay / 2 |W|^2 of every head.

    Their value and gradient are of the rows of all processes.

    Args:
        rows: (N, D), this process's. labels: (N,).
        shares: (N, H), weight of a row's loss in each head.
        decays: (H,), of the weights, not of the offsets.

    Returns:
        A function of points (n, (D + 1) C), the weights and offsets of some heads, and which heads
        they are (n,); it gives values (n,) and gradients (n, (D + 1) C).
    """
    d = rows.shape[1]

    def function(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        n = len(which)
        heads = points.view(n, d + 1, num_classes)
        weights = heads[:, :d].transpose(0, 1).reshape(d, n * num_classes)
        offsets = heads[:, d].reshape(-1)
        total = points.new_zeros(n + points.numel())  # values and gradients, to sum in one go
        values, gradient = total[:n], total[n:].view(d + 1, n * num_classes)
        step = max(1, LOGITS_AT_A_TIME // (n * num_classes))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            x, share = rows[part], shares[part, which]
            truth = labels[part, None, None].expand(-1, n, 1)
            logits = torch.addmm(offsets, x, weights).view(len(x), n, num_classes)
            logits.sub_(logits.gather(2, truth))  # so that a small loss is no small difference
            log_sum = logits.logsumexp(2, keepdim=True)
            values += (share * log_sum[:, :, 0]).sum(0)
            error = (logits - log_sum).exp_()
            error.scatter_add_(2, truth, error.new_full((1, 1, 1), -1).expand_as(truth))
            error = error.mul_(share[:, :, None]).view(len(x), -1)
            gradient[:d] += x.T @ error
            gradient[d] += error.sum(0)
        total = comm.sum_over_processes(total)
        values = total[:n] + decays[which] / 2 * heads[:, :d].square().sum((1, 2))
        gradient = total[n:].view(d + 1, n, num_classes).transpose(0, 1).contiguous()
        gradient[:, :d] += decays[which, None, None] * heads[:, :d]
        return values, gradient.view(n, -1)

    return function


def minimise(function, points: Tensor, curvatures: Tensor, *, least: Tensor, tolerance: float,
             iterations: int, memory: int = 10) -> Tensor:
    """Minimise several smooth convex functions at once by L-BFGS with backtracking.

    Warns if some do not converge within the iterations or within rounding.

    Args:
        function: of points (n, P) and which functions they are for (n,), to values (n,) and
            gradients (n, P).
        points: where to start, (H, P).
        curvatures: (H, P), above 0: about how strongly each function is curved along each
            coordinate. Right ones save most of the steps.
        least: (H,), above 0: how strongly each function is curved at the least. It tells how far
            above its least value a function is, at most: |gradient|^2 / 2 over it.
        tolerance: the share of its value, or of 0.1 where it is more, that this may be.

    Returns:
        Where the functions are least, (H, P).

    Reference: Liu and Nocedal, 1989; Nocedal and Wright, algorithms 7.4 and 3.1.
    """
    unit = curvatures.rsqrt()  # coordinates in which the curvature is about 1

    def function_of(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = function(x * unit[which], which)
        return value, gradient * unit[which]

    solution = points / unit
    remaining = torch.arange(len(points), device=points.device)  # functions that are not done
    x, (value, gradient) = solution.clone(), function_of(solution, remaining)
    steps, changes = x.new_zeros(2, memory, *x.shape)
    rho = x.new_zeros(memory, len(x))  # 1 / (step . change), 0 where there is none
    stalled, failed = torch.zeros_like(remaining, dtype=torch.bool), 0
    for iteration in range(iterations):
        above = (gradient / unit[remaining]).square().sum(1) / 2 / least[remaining]
        unsolved = ~(above <= tolerance * value.clamp(max=0.1))  # also where they are not numbers
        active = unsolved & ~stalled
        if not active.all():
            solution[remaining] = x
            failed += int((unsolved & stalled).sum())
            remaining, x = remaining[active], x[active]
            value, gradient = value[active], gradient[active]
            if not len(remaining):
                break
            steps, changes, rho = steps[:, active], changes[:, active], rho[:, active]

        # Direction: minus the gradient times the inverse of the Hessian as the last steps show it
        direction, weights = -gradient, {}
        recent = [(iteration - 1 - age) % memory for age in range(min(iteration, memory))]
        for at in recent:
            weights[at] = rho[at] * (steps[at] * direction).sum(1)
            direction = direction - weights[at][:, None] * changes[at]
        if recent:
            squares = changes[recent[0]].square().sum(1) * rho[recent[0]]
            direction = direction / torch.where(squares > 0, squares, 1)[:, None]
        for at in reversed(recent):
            correction = rho[at] * (changes[at] * direction).sum(1)
            direction = direction + (weights[at] - correction)[:, None] * steps[at]

        # Length: halved, for those functions that need it, until they decrease enough
        slope = (gradient * direction).sum(1)
        length = torch.ones_like(value)
        new_x, new_value, new_gradient = x.clone(), value.clone(), gradient.clone()
        searching = torch.arange(len(x), device=x.device)
        for _ in range(30):
            trial_x = x[searching] + length[searching, None] * direction[searching]
            trial_value, trial_gradient = function_of(trial_x, remaining[searching])
            bound = value[searching] + 1e-4 * length[searching] * slope[searching]
            decreased = trial_value <= bound
            accepted = searching[decreased]
            new_x[accepted], new_value[accepted] = trial_x[decreased], trial_value[decreased]
            new_gradient[accepted] = trial_gradient[decreased]
            searching = searching[~decreased]
            if not len(searching):
                break
            length[searching] /= 2
        stalled = torch.zeros_like(remaining, dtype=torch.bool)
        stalled[searching] = True  # no step decreases: the limit of rounding

        at = iteration % memory
        steps[at], changes[at] = new_x - x, new_gradient - gradient
        curvature = (steps[at] * changes[at]).sum(1)
        rho[at] = torch.where(curvature > 0, 1 / curvature, 0)
        x, value, gradient = new_x, new_value, new_gradient
    solution[remaining] = x
    failed += len(remaining)
    if failed:
        comm.print_main(f"warning: {failed} of {len(points)} heads have not converged (within "
                        f"{iterations} steps, or within rounding)")
    return solution * unit
