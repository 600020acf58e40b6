"""plain: any text as a prompt; where it is too long its end is lost."""

from typing import Literal

from alt_hpc.domains.domain import Domain


class Settings(Domain):
    """Where feedback stands around a prompt."""

    kind: Literal["plain"] = "plain"
