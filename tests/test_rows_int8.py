"""int8 rows with one scale each: how far they are from what was stored, and that rankings survive."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from service.errors import Invalid
from service.rows import dequantise, quantise
from tests.exact import spearman

TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)
numbers = st.floats(-float(np.float32(1e36)), float(np.float32(1e36)), width=32, allow_subnormal=False)
matrices = stn.arrays(np.float32, stn.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=numbers)


@given(matrices)
def test_an_entry_is_off_by_at_most_half_a_step_of_its_row(rows):
    packed, scale = quantise(rows)
    assert (packed.dtype, scale.dtype) == (np.int8, np.float32)
    assert (packed.shape, scale.shape) == (rows.shape, (len(rows),))
    assert np.abs(packed.astype(int)).max(initial=0) <= 127
    found = dequantise(packed, scale)
    assert found.dtype == np.float32
    largest = np.abs(rows.astype(np.float64)).max(axis=1, initial=0)
    bound = np.maximum(largest / 254, TINY / 2) * (1 + 1e-5)
    assert (np.abs(found.astype(np.float64) - rows) <= bound[:, None]).all()


@given(matrices)
def test_the_largest_entry_of_a_row_is_kept_to_float32(rows):
    largest = np.abs(rows).max(axis=1)
    rows = rows[largest > 254 * TINY]
    found = dequantise(*quantise(rows))
    where = np.abs(rows).argmax(axis=1)
    each = np.arange(len(rows))
    np.testing.assert_allclose(found[each, where], rows[each, where], rtol=1e-6)


@given(matrices)
def test_signs_are_kept_and_the_negative_is_the_negative(rows):
    packed, scale = quantise(rows)
    assert (packed * np.sign(rows) >= 0).all()
    negative, same = quantise(-rows)
    np.testing.assert_array_equal(negative, -packed)
    np.testing.assert_array_equal(same, scale)


@given(matrices, st.integers(-40, 40))
def test_a_row_depends_on_no_other_row_and_powers_of_two_change_the_scale_only(rows, power):
    packed, scale = quantise(rows)
    for number in range(len(rows)):
        alone, own = quantise(rows[number : number + 1])
        np.testing.assert_array_equal(alone[0], packed[number])
        assert own[0] == scale[number]
    kept = (np.abs(rows).max(axis=1) > 1e-18) & (np.abs(rows).max(axis=1) < 1e24)
    scaled, other = quantise(np.ldexp(rows[kept], power))
    np.testing.assert_array_equal(scaled, packed[kept])
    np.testing.assert_array_equal(other, np.ldexp(scale[kept], power))


@given(matrices)
def test_what_was_stored_is_stored_again_as_it_is(rows):
    packed, scale = quantise(rows)
    again, same = quantise(dequantise(packed, scale))
    np.testing.assert_array_equal(again, packed)
    np.testing.assert_allclose(same, scale, rtol=1e-6)


def test_zero_rows_stay_exactly_zero_among_others():
    rows = np.zeros((3, 4), dtype=np.float32)
    rows[1] = [1, -2, 0, 127]
    found = dequantise(*quantise(rows))
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_is_something_that_can_be_stored(shape):
    packed, scale = quantise(np.zeros(shape, dtype=np.float32))
    assert dequantise(packed, scale).shape == shape


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    rows = np.ones((2, 3), dtype=np.float32)
    rows[1, 2] = bad
    with pytest.raises(Invalid) as refused:
        quantise(rows)
    assert refused.value.code == "not_finite"


@pytest.mark.parametrize("size", [1e-34, 1e-20, 1e20, 1e38])
def test_extreme_scales_keep_their_precision_and_stay_finite(size):
    generator = np.random.default_rng(0)
    rows = generator.uniform(-1, 1, (4, 50)).astype(np.float32)
    rows = (rows / np.abs(rows).max(axis=1, keepdims=True)).astype(np.float64) * size
    found = dequantise(*quantise(rows.astype(np.float32))).astype(np.float64)
    assert np.isfinite(found).all()
    assert np.abs(found - rows).max() <= size / 254 * (1 + 1e-5)


def test_the_largest_float32_comes_back_finite():
    assert np.isfinite(dequantise(*quantise(np.array([[LARGEST, -LARGEST / 2]], dtype=np.float32)))).all()


@pytest.mark.parametrize("sigma", [0.5, 1.5, 2.0])
def test_rankings_survive_heavy_tailed_rows(sigma):
    """Row norms over many orders of magnitude, as gradients have them: one scale per dimension fails here."""
    generator = np.random.default_rng(7)
    rows = generator.standard_normal((2000, 64)) * np.exp(sigma * generator.standard_normal((2000, 1)))
    v = generator.standard_normal((64, 32))
    packed, scale = quantise(rows.astype(np.float32))
    rho = spearman(dequantise(packed, scale).astype(np.float64) @ v, rows @ v)
    assert rho.min() >= 0.999
    columns = np.abs(rows).max(axis=0) / 127
    per_dimension = spearman(np.rint(rows / columns) * columns @ v, rows @ v)
    assert sigma < 1 or per_dimension.mean() < 0.95  # else the bound above would say nothing
