import numpy as np
import pytest

from pluribus.core.errors import InputError
from pluribus.core.registry import MERGERS
from pluribus.merge.task_arithmetic import TaskArithmetic

from .conftest import merged


def test_worked_by_hand():
    out = merged(TaskArithmetic(weight=(1.0, 0.5), scale=2.0), [1, 1], [2, 1], [1, 5])
    np.testing.assert_array_equal(out, np.array([3, 5], np.float32))


def test_normalised():
    out = merged(TaskArithmetic(weight=(1.0, 3.0), normalize=True), [0, 0], [4, 0], [0, 4])
    np.testing.assert_array_equal(out, np.array([1, 3], np.float32))


def test_forgetting_by_negation():
    out = merged(TaskArithmetic(weight=-1.0), [1.0], [3.0])
    assert out == -1


def test_mergekits_unused_parameters_are_accepted_and_lambda_is_scale():
    given = {"lambda": 0.3, "density": 0.2, "rescale": True, "int8_mask": True}
    method = MERGERS.build("task_arithmetic", given)
    assert method.scale == 0.3
    np.testing.assert_allclose(merged(method, [1, 2], [2, 4]), [1.3, 2.6], rtol=1e-6)


def test_weights_that_cancel():
    method = TaskArithmetic(weight=(1.0, -1.0), normalize=True)
    with pytest.raises(InputError, match="sum to zero and can't be normalised"):
        merged(method, [0.0], [1.0], [2.0])
    assert merged(TaskArithmetic(weight=(1.0, -1.0)), [0.0], [1.0], [2.0]) == -1
