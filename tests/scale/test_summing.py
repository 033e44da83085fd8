"""DDP over more than two processes: the first step after a start sums as all later ones do."""

from __future__ import annotations

from pair import Pair


def test_a_gradient_does_not_depend_on_its_place_in_a_bucket(three: Pair) -> None:
    """As DDP itself sums, the two differ: if they no longer do, `sum_in_order` has become superfluous."""
    for found in three.run("summing_runs.steps", ordered=True):
        assert found["same"] and found["apart"] < 1e-7
    assert not all(found["same"] for found in three.run("summing_runs.steps", ordered=False))
