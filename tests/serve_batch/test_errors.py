"""What a person is told who has to go on from a failure."""

import pytest

from core.errors import CheckpointError
from serve_batch import errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError("no\nmemory"), f"MemoryError: no memory; {errors.KEPT}"),
        (errors.Unreachable("cannot reach x"), f"cannot reach x; {errors.KEPT}"),
        (errors.JobError("give --overwrite"), "give --overwrite"),
        (CheckpointError("convert it"), "convert it"),
    ],
)
def test_advice_is_given_once_and_to_run_again_only_where_that_helps(error, line):
    assert errors.told("shard 3", error) == f"shard 3 failed: {line}"
