"""What the jobs of the random DAGs do: end well or badly."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class End:
    """Fails where it is told to."""

    fail: bool
    stage: str = "end"
    iteration: int = 0

    def command(self) -> list[str]:
        return ["-m", "dag_tasks", str(int(self.fail))]

    def __call__(self) -> None:
        if self.fail:
            raise RuntimeError("told to fail")


if __name__ == "__main__":
    End(bool(int(sys.argv[1])))()
