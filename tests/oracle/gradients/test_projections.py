"""Random projections keep inner products, and follow from seed, name and place alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle.gradients import projections
from oracle.gradients.projections import RademacherProjection


def test_signs_are_balanced_and_independent_between_rows_and_columns():
    signs = RademacherProjection(dim=100, seed=1).signs("a", (1000,), start=0, stop=1000)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.01
    columns = signs.T @ signs / 1000 - torch.eye(100)
    rows = signs @ signs.T / 100 - torch.eye(1000)
    assert float(columns.abs().max()) < 6 / 1000**0.5
    assert float(rows.abs().max()) < 6 / 100**0.5
    assert float(rows.square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)


def test_the_signs_of_a_place_follow_from_seed_name_and_shape_only():
    projection = RademacherProjection(dim=70, seed=3)
    whole = projection.signs("layer.weight", (20, 50), start=0, stop=1000)
    assert torch.equal(projection.signs("layer.weight", (20, 50), start=990, stop=1000), whole[990:])
    assert torch.equal(RademacherProjection(dim=30, seed=3).signs("layer.weight", (20, 50), start=0, stop=1000), whole[:, :30])
    others = [
        RademacherProjection(dim=70, seed=4).signs("layer.weight", (20, 50), start=0, stop=1000),
        projection.signs("layer.bias", (20, 50), start=0, stop=1000),
        projection.signs("layer.weight", (50, 20), start=0, stop=1000),
    ]
    for other in others:
        assert abs(float((other * whole).mean())) < 0.02


def test_signs_are_the_same_in_every_version():
    """Stored projections would otherwise no longer fit: SplitMix64 in Python's integers, bit by bit."""

    def finalise(state: int) -> int:
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return state ^ state >> 31

    projection = RademacherProjection(dim=130, seed=5)
    key = projection._key("w", (4, 3)) % 2**64
    expected = [
        [
            2 * (finalise(((row << 20 | column // 64) * 0x9E3779B97F4A7C15 + key) % 2**64) >> column % 64 & 1) - 1
            for column in range(130)
        ]
        for row in range(12)
    ]
    assert projection.signs("w", (4, 3), start=0, stop=12).tolist() == expected


def test_blocks_change_nothing_and_the_dense_product_is_the_same(monkeypatch):
    projection, vectors = RademacherProjection(dim=64), torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    whole = projection.project("w", vectors, shape=(500,))
    dense = vectors.double() @ projection.signs("w", (500,), start=0, stop=500).double() / 8
    np.testing.assert_allclose(whole, dense, atol=1e-5)
    monkeypatch.setattr(projections, "BLOCK_ELEMENTS", 64 * 7)
    np.testing.assert_allclose(projection.project("w", vectors, shape=(500,)), whole, atol=1e-5)


def test_the_error_of_an_inner_product_falls_with_the_root_of_the_dimensions():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 1, 3000, generator=generator)
    exact = float((left * right).sum()) / float(left.norm() * right.norm())
    errors = []
    for dim in (64, 1024):
        found = []
        for seed in range(20):
            projection = RademacherProjection(dim=dim, seed=seed)
            a, b = (projection.project("w", vector, shape=(3000,))[0] for vector in (left, right))
            found.append(float(a @ b) / float(left.norm() * right.norm()))
        assert abs(np.mean(found) - exact) < 4 / (20 * dim) ** 0.5
        errors.append(np.sqrt(np.mean((np.array(found) - exact) ** 2)))
    assert errors[0] == pytest.approx(64**-0.5, rel=0.5)
    assert errors[1] == pytest.approx(1024**-0.5, rel=0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_signs_are_the_same_on_a_gpu():
    projection = RademacherProjection(dim=130, seed=2)
    on_cpu = projection.signs("w", (40, 50), start=0, stop=2000)
    assert torch.equal(projection.signs("w", (40, 50), start=0, stop=2000, device="cuda").cpu(), on_cpu)
