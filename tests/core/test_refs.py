"""References to models, and what is said of things that are none."""

import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.core.refs import ModelRef


def test_what_is_no_model_is_told_briefly():
    """A tensor where a model was wanted: its shape, and not its numbers."""
    with pytest.raises(InputError, match=r"^ndarray of shape \[30, 40\] is not a model: give"):
        ModelRef.of(np.zeros((30, 40)))
    with pytest.raises(InputError, match=r"\.\.\. is not a model"):
        ModelRef.of(list(range(1000)))
