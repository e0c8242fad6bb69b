"""Noise of stochastic rounding: the hash that is documented, uniform, and the same in whatever pieces it is drawn."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.numerics.noise import _mix64, derive_keys, draw_noise, draw_noise_at


def draw_one(seed: int, number: int, step: int, element: int) -> int:
    """The noise as the module's docstring states it, in whole numbers."""
    key = 0
    for word in (seed, number, step):
        key = ((key ^ word) + 0x9E3779B97F4A7C15) % 2**64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
        key ^= key >> 31
    x = (element // 2 + key % 2**32) % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = ((x ^ x >> 15) + (key >> 32)) * 0x846CA68B % 2**32
    x ^= x >> 16
    half = x >> 16 if element % 2 else x % 2**16
    return half - 2**16 if half >= 2**15 else half


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20), st.integers(0, 2**40), st.integers(0, 2**34))
def test_noise_is_the_hash_that_is_documented(seed: int, number: int, step: int, element: int) -> None:
    keys = derive_keys(seed, number, step)
    expected = [draw_one(seed, number, step, element + i) for i in range(5)]
    assert draw_noise_at(keys, torch.arange(element, element + 5)).tolist() == expected
    if element < 2**30:
        assert draw_noise(keys, element, 5).tolist() == expected


def test_splitmix64_gives_its_published_numbers() -> None:
    state, found = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        found.append(_mix64(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_is_the_same_in_whatever_pieces_it_is_drawn() -> None:
    keys = derive_keys(3, 1, 4)
    whole = draw_noise(keys, 0, 1000)
    assert torch.equal(whole, draw_noise_at(keys, torch.arange(1000)))
    for cuts in ([0, 1, 2, 999, 1000], [0, 512, 1000], [0, 7, 7, 333, 1000]):
        pieces = [draw_noise(keys, a, b - a) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole)


COUNT = 1 << 20


def test_noise_is_uniform_and_so_is_each_of_its_bits() -> None:
    noise = draw_noise(derive_keys(0, 0, 1), 0, COUNT).to(torch.int64)
    assert abs(noise.to(torch.float64).mean().item() + 0.5) < 4 * 2**16 / math.sqrt(12 * COUNT)
    for place in range(16):
        ones = int((noise >> place & 1).sum())
        assert abs(ones - COUNT / 2) < 4 * math.sqrt(COUNT) / 2, place
    cells = torch.bincount((noise + (1 << 15)) >> 8, minlength=256).to(torch.float64)
    chi_squared = ((cells - COUNT / 256) ** 2 / (COUNT / 256)).sum().item()
    assert abs(chi_squared - 255) < 4 * math.sqrt(2 * 255)


NEIGHBOURS: dict[
    str, tuple[tuple[int, int, int], int]
] = {  # seed, number, step of the other draw; shift of its elements
    "next seed": ((1, 0, 1), 0),
    "next parameter": ((0, 1, 1), 0),
    "next step": ((0, 0, 2), 0),
    "parameter and step swapped": ((0, 1, 0), 0),
    "other half of the hash": ((0, 0, 1), 1),
    "next element of that half": ((0, 0, 1), 2),
    "256 elements on": ((0, 0, 1), 256),
    "1024 elements on": ((0, 0, 1), 1024),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_noise_of_neighbours_is_not_correlated(name: str) -> None:
    words_of_other, shift = NEIGHBOURS[name]
    one = draw_noise(derive_keys(0, 0, 1), 0, COUNT)
    other = draw_noise(derive_keys(*words_of_other), shift, COUNT)
    product = (one.to(torch.float64) + 0.5) * (other.to(torch.float64) + 0.5) / ((1 << 32) / 12)
    assert abs(product.mean().item()) < 4 / math.sqrt(COUNT)
    for place in range(16):
        alike = int((~(one ^ other) >> place & 1).to(torch.int64).sum())
        assert abs(alike - COUNT / 2) < 4 * math.sqrt(COUNT) / 2, place


def test_steps_of_one_element_are_uniform_too() -> None:
    draws = torch.stack([draw_noise(derive_keys(0, 0, step), 0, 64) for step in range(4096)]).to(torch.float64)
    sigma = (1 << 16) / math.sqrt(12 * 4096)
    assert bool(((draws.mean(0) + 0.5).abs() < 4.5 * sigma).all())  # 64 of them: 4.5 sigma is one in 2,300
    pairs = ((draws[1:] + 0.5) * (draws[:-1] + 0.5)).mean(0) / ((1 << 32) / 12)
    assert bool((pairs.abs() < 4.5 / math.sqrt(4095)).all())
