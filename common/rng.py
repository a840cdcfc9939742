"""Random numbers as functions of (seed, stream, key), equal on every process and after a resume."""

import functools

import numpy as np

# Streams of random numbers that never meet.
(SAMPLE, ORDER, FAKE, SHUFFLE, CLUSTERS, MASK, NEGATIVES, DEPTH, DIRECTIONS, PUZZLES, PERMUTATIONS,
 MIX, SUBSET) = range(1, 14)


def philox(seed: int, stream: int, *key: int) -> np.random.Generator:
    """A random generator that is a function of its arguments; up to three numbers in the key."""
    counter = [0, *key, *[0] * (3 - len(key))]
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=counter))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The permutation of the data-set indices that an epoch goes through."""
    return philox(seed, ORDER, epoch).permutation(num_images)
