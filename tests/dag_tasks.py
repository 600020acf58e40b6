"""What the jobs of the random DAGs do: end well or badly."""

from __future__ import annotations


def end(fail: str) -> None:
    """Fail where asked to."""
    if fail == "1":
        raise RuntimeError("told to fail")
