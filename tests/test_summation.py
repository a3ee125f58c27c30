"""The fixed tree: lists of numbers, divided among simulated ranks."""

import pytest
import torch

from hpc_absa.summation import LANES, Tree, fits, lanes


def tree_sum(terms, size):
    """The sum of `size` ranks: each rank's part, then pairs of ranks."""
    parts = []
    for rank in range(size):
        tree = Tree()
        for lane in lanes(range(len(terms)), rank, size):
            part = torch.zeros_like(terms[0])
            for index in lane:
                part += terms[index]
            tree.add(part if lane else None)
        total = tree.total()
        parts.append(torch.zeros_like(terms[0]) if total is None else total)
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@pytest.mark.parametrize("count", [1, 2, 5, 63, 64, 200])
def test_any_number_of_ranks_gets_the_same_bits(count):
    generator = torch.Generator().manual_seed(count)
    scale = 10 ** torch.randn(count, 1, generator=generator, dtype=torch.float64)
    terms = scale * torch.randn(count, 50, generator=generator, dtype=torch.float64)
    one_rank = tree_sum(terms, 1)
    assert torch.allclose(one_rank, terms.sum(0))
    for size in (2, 4, 8, LANES):
        assert torch.equal(tree_sum(terms, size), one_rank)


def test_sums_of_halves_differ():
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(200, 50, generator=generator, dtype=torch.float64)
    whole, halves = torch.zeros(50).double(), [torch.zeros(50).double() for _ in range(2)]
    for index, term in enumerate(terms):
        whole += term
        halves[index // 100] += term
    assert not torch.equal(whole, halves[0] + halves[1])


@pytest.mark.parametrize(("size", "expected"), [(1, True), (3, False), (64, True), (128, False)])
def test_numbers_of_ranks_that_fit_the_tree(size, expected):
    assert fits(size) == expected
