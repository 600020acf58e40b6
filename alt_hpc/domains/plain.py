"""plain: any text as a prompt; where it is too long its end is lost."""

from typing import Literal

from alt_hpc.domains.domain import Domain
from alt_hpc.settings import GIVES_KIND


class Settings(Domain):
    """Where feedback stands around a prompt."""

    model_config = GIVES_KIND

    kind: Literal["plain"] = "plain"
