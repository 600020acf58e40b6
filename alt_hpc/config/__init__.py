"""What a run is: its sections (`schema`), read strictly (`reader`), with rules between the keys."""

from alt_hpc.config.reader import from_json, load, located
from alt_hpc.config.schema import (
    BestOf,
    Cluster,
    Config,
    External,
    Judging,
    StageCluster,
)
from alt_hpc.config.sources import HeldOut, Learned, Source

__all__ = [
    "BestOf",
    "Cluster",
    "Config",
    "External",
    "HeldOut",
    "Judging",
    "Learned",
    "Source",
    "StageCluster",
    "from_json",
    "load",
    "located",
]
