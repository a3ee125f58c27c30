"""The digest: equal for equal contents only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_absa.checkpoint import Content, Group
from tests.checkpoint.contents import content

# Characters of which paths are made: contents that differ only in where a name ends.
NAMES = st.text("a@/", min_size=1, max_size=3)
VALUES = st.sampled_from([0, 1, False, True, 0.0, 1.0, "", "1"])
ARRAYS = st.sampled_from(
    [np.zeros(2, np.float32), np.zeros(1), np.zeros((1, 1)), np.array(0.0), np.zeros(0)]
)
GROUPS = st.builds(
    Group, st.dictionaries(NAMES, VALUES, max_size=2), st.dictionaries(NAMES, ARRAYS, max_size=2)
)
CONTENTS = st.builds(
    Content,
    st.dictionaries(NAMES, VALUES, max_size=1),
    st.dictionaries(NAMES, GROUPS, max_size=2),
)


def comparable(of):
    """Everything in a content, as something to compare."""

    def scalars(values):
        return {key: (type(value), value) for key, value in values.items()}

    return scalars(of.attributes), {
        name: (
            scalars(group.attributes),
            {k: (a.dtype.str, a.shape, a.tobytes()) for k, a in group.arrays.items()},
        )
        for name, group in of.groups.items()
    }


@given(CONTENTS, CONTENTS)
def test_equal_digests_mean_equal_contents(one, other):
    assert (one.digest() == other.digest()) == (comparable(one) == comparable(other))


def test_order_of_names_does_not_matter():
    plain = content()
    reordered = Content(
        dict(reversed(plain.attributes.items())),
        {
            name: Group(
                dict(reversed(group.attributes.items())), dict(reversed(group.arrays.items()))
            )
            for name, group in reversed(plain.groups.items())
        },
    )
    assert reordered.digest() == plain.digest()


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3).T, np.arange(12.0)[::2], np.asfortranarray(np.eye(3))],
    ids=["transposed", "strided", "fortran"],
)
def test_memory_layout_does_not_matter(array):
    def digest(of):
        return Content({}, {"model": Group({}, {"w": of})}).digest()

    assert digest(array) == digest(np.ascontiguousarray(array))


def test_nbytes_counts_all_arrays():
    assert content().nbytes() == 4 * 108 + 8 + 8 * 108
