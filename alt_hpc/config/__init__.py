"""What a run is: its sections (`schema`), read strictly (`reader`), with rules between the keys."""

from alt_hpc.config.reader import from_json, load, located
from alt_hpc.config.schema import (
    Cluster,
    Config,
    Data,
    HeldOut,
    Policy,
    Sample,
    Source,
    StageCluster,
)

__all__ = [
    "Cluster",
    "Config",
    "Data",
    "HeldOut",
    "Policy",
    "Sample",
    "Source",
    "StageCluster",
    "from_json",
    "load",
    "located",
]
