import jax.numpy as jnp
import numpy as np

from kernels import masks

# Typed by hand from the definition: sink 2, recent 3, eight tokens.
STREAMING_2_3 = """
1 0 0 0 0 0 0 0
1 1 0 0 0 0 0 0
1 1 1 0 0 0 0 0
1 1 1 1 0 0 0 0
1 1 1 1 1 0 0 0
1 1 0 1 1 1 0 0
1 1 0 0 1 1 1 0
1 1 0 0 0 1 1 1
"""


def table(text: str) -> np.ndarray:
    return np.array([[int(x) for x in row.split()] for row in text.strip().splitlines()], bool)


def test_streaming_mask_is_the_hand_written_table():
    positions = jnp.arange(8)
    mask = masks.streaming(positions, positions, sink_size=2, recent_size=3)
    np.testing.assert_array_equal(mask, table(STREAMING_2_3))


def test_masks_take_absolute_positions_in_any_order():
    order = jnp.array([5, 0, 7, 1, 6])
    mask = masks.streaming(jnp.array([7, 6]), order, sink_size=2, recent_size=3)
    np.testing.assert_array_equal(mask, table(STREAMING_2_3)[np.ix_([7, 6], np.asarray(order))])


def test_docstring_table_of_streaming():
    rows = [r.split(":")[1] for r in masks.streaming.__doc__.splitlines() if "i = " in r]
    positions = jnp.arange(5)
    mask = masks.streaming(positions, positions, sink_size=1, recent_size=2)
    np.testing.assert_array_equal(mask, table("\n".join(rows)))


def test_recent_as_long_as_the_text_is_causal():
    positions = jnp.arange(9)
    mask = masks.streaming(positions, positions, sink_size=0, recent_size=9)
    np.testing.assert_array_equal(mask, masks.causal(positions, positions))
    np.testing.assert_array_equal(mask, np.tril(np.ones((9, 9), bool)))
