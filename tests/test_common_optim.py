import math

import numpy as np
import pytest
import torch
from torch import nn

from common import optim

CPU = torch.device("cpu")
SETTINGS = dict(momentum=0.9, weight_decay=0.1, trust_coefficient=0.02)
RATES = [0.5, 0.05, 2.0, 0.3, 0.0, 1.0]


# ------------------------------------------------------------------------------------ LARS and LARC


def lars_by_hand(p, grads, rates, momentum, weight_decay, trust_coefficient, adapt=True):
    buffer = np.zeros_like(p)
    for g, lr in zip(grads, rates, strict=True):
        d = g + weight_decay * p
        p_norm, d_norm = math.sqrt((p**2).sum()), math.sqrt((d**2).sum())
        ratio = trust_coefficient * p_norm / d_norm if adapt and p_norm and d_norm else 1.0
        buffer = momentum * buffer + ratio * d
        p = p - lr * buffer
    return p


def larc_by_hand(p, grads, rates, momentum, weight_decay, trust_coefficient, adapt=True):
    buffer = np.zeros_like(p)
    for g, lr in zip(grads, rates, strict=True):
        p_norm, g_norm = math.sqrt((p**2).sum()), math.sqrt((g**2).sum())
        if not adapt:
            d = g + weight_decay * p
        elif p_norm and g_norm:
            ratio = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + 1e-8)
            d = ratio * (g + weight_decay * p)
        else:
            d = g
        buffer = momentum * buffer + d
        p = p - lr * buffer
    return p


BOTH = pytest.mark.parametrize(
    "optimizer, by_hand", [(optim.LARS, lars_by_hand), (optim.LARC, larc_by_hand)]
)


def start_and_gradients(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=(len(RATES), *shape))


def parameter(values):
    return nn.Parameter(torch.from_numpy(np.array(values, dtype=np.float64)))


def run(optimizer, params, grads, rates=RATES):
    """Step through the gradients of each parameter: one sequence each, None for a missing one."""
    for lr, *own in zip(rates, *grads, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(params, own, strict=True):
            p.grad = None if g is None else torch.as_tensor(g)
        optimizer.step()


@BOTH
def test_steps_equal_the_formula_while_the_rate_changes(optimizer, by_hand):
    shapes = [(4, 3), (2, 3, 3, 3), (5,), ()]
    drawn = [start_and_gradients(*shape, seed=i) for i, shape in enumerate(shapes)]
    starts, grads = zip(*drawn, strict=True)
    params = [parameter(p) for p in starts]
    run(optimizer(params, lr=9.0, **SETTINGS), params, grads)
    for p, start, own in zip(params, starts, grads, strict=True):
        wanted = by_hand(start, own, RATES, **SETTINGS)
        np.testing.assert_allclose(p.detach(), wanted, rtol=1e-12)


@BOTH
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("adapt", [True, False])
def test_a_group_switches_decay_and_adaptation_off(optimizer, by_hand, decay, adapt):
    (first, first_grads), (second, second_grads) = (start_and_gradients(4, seed=i) for i in (1, 2))
    params = [parameter(first), parameter(second)]
    groups = [{"params": params[:1], "decay": decay, "adapt": adapt}, {"params": params[1:]}]
    run(optimizer(groups, lr=1.0, **SETTINGS), params, [first_grads, second_grads])
    switched = SETTINGS | {"weight_decay": 0.1 if decay else 0.0}
    wanted = by_hand(first, first_grads, RATES, **switched, adapt=adapt)
    np.testing.assert_allclose(params[0].detach(), wanted, rtol=1e-12)
    wanted = by_hand(second, second_grads, RATES, **SETTINGS)
    np.testing.assert_allclose(params[1].detach(), wanted, rtol=1e-12)


@BOTH
def test_without_adaptation_it_is_torchs_sgd(optimizer, by_hand):
    start, grads = start_and_gradients(4, 3)
    ours, theirs = parameter(start), parameter(start)
    group = {"params": [ours], "adapt": False}
    run(optimizer([group], lr=1.0, **SETTINGS), [ours], [grads])
    sgd = torch.optim.SGD([theirs], lr=1.0, momentum=0.9, weight_decay=0.1)
    run(sgd, [theirs], [grads])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@BOTH
def test_a_parameter_of_zeros_takes_the_raw_gradient(optimizer, by_hand):
    p, (_, grads) = parameter(np.zeros(4)), start_and_gradients(4)
    run(optimizer([p], lr=1.0, **SETTINGS), [p], [grads[:1]], rates=[0.5])
    np.testing.assert_allclose(p.detach(), -0.5 * grads[0], rtol=1e-12)


def test_with_a_zero_gradient_lars_follows_the_decay_and_larc_stays():
    start, _ = start_and_gradients(4, 3)
    for optimizer, share in ((optim.LARS, 0.5 * 0.02), (optim.LARC, 0.0)):
        p = parameter(start)
        run(optimizer([p], lr=1.0, **SETTINGS), [p], [np.zeros((1, 4, 3))], rates=[0.5])
        np.testing.assert_allclose(p.detach(), (1 - share) * start, rtol=1e-12)


@BOTH
def test_without_gradient_and_decay_a_parameter_stays(optimizer, by_hand):
    start, _ = start_and_gradients(4, 3)
    p, without_decay = parameter(start), SETTINGS | {"weight_decay": 0.0}
    run(optimizer([p], lr=1.0, **without_decay), [p], [np.zeros((len(RATES), 4, 3))])
    np.testing.assert_array_equal(p.detach(), start)


def test_larc_damps_gradients_shorter_than_its_epsilon():
    start, grads = start_and_gradients(4, 3)
    p, without_decay = parameter(start), SETTINGS | {"weight_decay": 0.0}
    run(optim.LARC([p], lr=1.0, **without_decay), [p], [1e-8 * grads])
    wanted = larc_by_hand(start, 1e-8 * grads, RATES, **without_decay)
    np.testing.assert_allclose(p.detach(), wanted, rtol=1e-12)


@BOTH
def test_zeros_everywhere_stay_zeros(optimizer, by_hand):
    p = parameter(np.zeros(3))
    run(optimizer([p], lr=1.0, **SETTINGS), [p], [np.zeros((len(RATES), 3))])
    assert torch.equal(p, torch.zeros(3, dtype=torch.float64))


@BOTH
def test_a_parameter_without_gradient_waits(optimizer, by_hand):
    (first, first_grads), (second, second_grads) = (start_and_gradients(4, seed=i) for i in (3, 4))
    params = [parameter(first), parameter(second)]
    given = [g if step not in (0, 3) else None for step, g in enumerate(first_grads)]
    run(optimizer(params, lr=1.0, **SETTINGS), params, [given, second_grads])
    steps = [1, 2, 4, 5]
    wanted = by_hand(first, first_grads[steps], [RATES[s] for s in steps], **SETTINGS)
    np.testing.assert_allclose(params[0].detach(), wanted, rtol=1e-12)
    wanted = by_hand(second, second_grads, RATES, **SETTINGS)
    np.testing.assert_allclose(params[1].detach(), wanted, rtol=1e-12)


@BOTH
def test_a_lower_rate_shortens_the_very_next_step(optimizer, by_hand):
    p = parameter([3.0, 4.0])
    without_decay = SETTINGS | {"weight_decay": 0.0}
    taken = []
    steps = optimizer([p], lr=1.0, **without_decay)
    for lr in (0.5, 0.05):
        before = p.detach().clone()
        run(steps, [p], [np.array([[0.6, 0.8]])], rates=[lr])
        taken.append((before - p.detach()).norm().item())
    # The ratio makes a gradient of length 1 as long as 0.02 ||p||; p shrinks from 5 along itself.
    shrunk = 5 - 0.5 * 0.02 * 5
    assert taken[0] == pytest.approx(0.5 * 0.02 * 5, rel=1e-6)
    assert taken[1] == pytest.approx(0.05 * (0.9 * 0.02 * 5 + 0.02 * shrunk), rel=1e-6)


def test_lars_does_not_see_the_scale_of_the_gradient():
    start, grads = start_and_gradients(4, 3)
    params = [parameter(start), parameter(start)]
    without_decay = SETTINGS | {"weight_decay": 0.0}
    run(optim.LARS(params, lr=1.0, **without_decay), params, [grads, 1e6 * grads])
    torch.testing.assert_close(params[0], params[1], rtol=1e-9, atol=0)


@BOTH
def test_a_saved_optimiser_goes_on_as_if_it_had_not_stopped(optimizer, by_hand, tmp_path):
    (first, first_grads), (second, second_grads) = (start_and_gradients(4, seed=i) for i in (5, 6))
    params = [parameter(first), parameter(second)]

    def build(params):
        groups = [{"params": params[:1]}, {"params": params[1:], "decay": False, "adapt": False}]
        return optimizer(groups, lr=1.0, **SETTINGS)

    steps = build(params)
    run(steps, params, [first_grads[:3], second_grads[:3]], RATES[:3])
    torch.save(steps.state_dict(), tmp_path / "optimizer.pt")
    resumed = [parameter(p.detach().numpy().copy()) for p in params]
    resumed_steps = build(resumed)
    resumed_steps.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for some, taken in ((params, steps), (resumed, resumed_steps)):
        run(taken, some, [first_grads[3:], second_grads[3:]], RATES[3:])
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


@BOTH
def test_a_step_evaluates_the_closure_with_gradient_and_returns_its_loss(optimizer, by_hand):
    p = parameter([1.0, 2.0])
    steps = optimizer([p], lr=1.0, **SETTINGS)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert steps.step(closure).item() == 5 and p.detach().tolist() != [1.0, 2.0]


# --------------------------------------------------------------------------------- parameter groups


def test_parameters_are_split_by_dimension_and_frozen_ones_left_out():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.Linear(2, 2))
    net.temperature = nn.Parameter(torch.tensor(0.1))
    net[2].weight.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    matrices, others = optim.split_by_dimension(net)
    assert {id(p) for p in matrices} == {id(net[0].weight), id(net[3].weight)}
    wanted = [net.temperature, net[0].bias, net[1].weight, net[2].bias, net[3].bias]
    assert {id(p) for p in others} == {id(p) for p in wanted} and len(others) == len(wanted)


# ---------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "endpoint, table",
    [
        (True, [0, 0.2, 0.8, 1, 1, 0.9875, 0.0495, 0.0125]),
        (False, [0, 0.1667, 0.6667, 0.8333, 1, 0.9875, 0.0495, 0.0125]),
    ],
)
def test_warm_up_and_cosine_equal_the_table(endpoint, table):
    values = optim.warmup_cosine(
        start=0, base=1, final=0, warmup_steps=6, total_steps=20, warmup_endpoint=endpoint
    )
    assert [values[s] for s in (0, 1, 4, 5, 6, 7, 18, 19)] == pytest.approx(table, abs=5e-5)


@pytest.mark.parametrize("endpoint", [True, False])
@pytest.mark.parametrize("warmup, total", [(0, 10), (1, 10), (4, 10), (9, 10), (10, 10), (0, 1)])
def test_a_schedule_has_a_python_float_for_every_step(endpoint, warmup, total):
    values = optim.warmup_cosine(
        start=0.3, base=4.8, final=0.0048, warmup_steps=warmup, total_steps=total,
        warmup_endpoint=endpoint,
    )
    assert len(values) == total and all(type(v) is float for v in values)
    for step, value in enumerate(values):
        if step < warmup:
            steps_to_base = max(warmup - 1, 1) if endpoint else warmup
            wanted = 0.3 + (4.8 - 0.3) * step / steps_to_base
        else:
            turn = math.pi * (step - warmup) / (total - warmup)
            wanted = 0.0048 + (4.8 - 0.0048) * 0.5 * (1 + math.cos(turn))
        assert value == pytest.approx(wanted, rel=1e-12)


def test_half_a_cosine_can_rise():
    values = optim.cosine(0.99, 1.0, 20)
    assert [values[s] for s in (0, 10, 19)] == pytest.approx([0.99, 0.995, 0.999938], abs=5e-7)


def test_rates_by_epoch_change_once_an_epoch_but_in_the_warm_up():
    for final in (0.0, 0.001):
        rates = optim.lr_by_epoch(0.12, "cosine", 4, 0, 2, final)
        low = 0.12 * final
        expected = [low + (0.12 - low) * (1 + math.cos(math.pi * epoch / 4)) / 2
                    for epoch in (0, 0, 1, 1, 2, 2, 3, 3)]
        assert rates == pytest.approx(expected)
    warm = optim.lr_by_epoch(1.0, "cosine", 5, 2, 2)
    assert warm[:4] == [0, 0.25, 0.5, 0.75]


def test_rates_fall_at_given_epochs():
    step = optim.lr_by_epoch(1.0, [6.0, 8.0], epochs=10, warmup_epochs=0, steps_per_epoch=2)
    assert step == pytest.approx([1] * 12 + [0.1] * 4 + [0.01] * 4)
    warm = optim.lr_by_epoch(0.4, [2, 4], 7, 1, 2, start=0.1, gamma=0.1)
    assert warm == pytest.approx([0.1, 0.25] + [0.4] * 2 + [0.04] * 4 + [0.004] * 6)
    assert optim.lr_by_epoch(0.4, [1, 2], 1, 0, 2) == [0.4, 0.4]
    assert optim.lr_by_epoch(0.4, [1, 2], 4, 3, 2)[6:] == pytest.approx([0.004] * 2)


def test_a_rate_is_set_in_every_group_times_its_scale():
    groups = [{"params": [nn.Parameter(torch.ones(1))], **own} for own in ({}, {"lr_scale": 0.25})]
    optimizer = optim.LARS(groups, lr=9.0, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3)
    for lr in (2.0, 8.0):
        optim.set_lr(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, lr / 4]


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "amp, dtype",
    [
        ("none", torch.float32),
        ("auto", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    ],
)
def test_matrix_products_on_the_cpu_have_the_dtype_asked_for(amp, dtype):
    compute, scaler = optim.precision(amp, CPU)
    for _ in range(2):  # a context for every step
        with compute():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert scaler.is_enabled() == (amp == "fp16")
