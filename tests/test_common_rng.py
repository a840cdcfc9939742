import numpy as np

from common import rng


def drawn(*arguments):
    return tuple(rng.philox(*arguments).integers(2**63, size=4))


def test_numbers_are_a_function_of_seed_stream_and_key():
    asked = [(seed, stream, *key) for seed in (0, 1) for stream in (rng.SAMPLE, rng.ORDER)
             for key in ((), (1,), (0, 1), (0, 0, 1), (1, 1))]
    assert len({drawn(*one) for one in asked}) == len(asked)
    assert [drawn(*one) for one in asked] == [drawn(*one) for one in asked]


def test_streams_of_neighbouring_keys_do_not_overlap():
    first, second = (rng.philox(0, rng.SAMPLE, epoch).random(100_000) for epoch in (0, 1))
    assert len(np.intersect1d(first, second)) == 0


def test_streams_have_numbers_of_their_own():
    named = [value for name, value in vars(rng).items() if name.isupper()]
    assert len(set(named)) == len(named) >= 8


def test_an_epoch_is_a_permutation_drawn_from_seed_and_epoch():
    orders = [rng.epoch_order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
