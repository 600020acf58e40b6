"""The core of the fault tests over hosts that see the run folder through caches of their own.

As on NFS a host may not see for a while what another has written: attributes, names, and that there
was nothing of a name are kept for 20 s (bindfs). Only with `--faults`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_faults
from test_faults import FULL, STUB, Site, client, interpreter, queue, settings, stub_expected
from test_hosts import of_hosts

from alt_hpc.run.folder import RunFolder

__all__ = ["stub_expected"]
pytestmark = FULL


@dataclass
class Stale(Site):
    """A site whose hosts see the run through caches."""

    def tell(self, fault: str, happened: str, since: float | None = None) -> None:
        super().tell(f"{fault}; hosts with stale caches", happened, since)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that four hosts see through caches; what else the tests read they see as it is."""
    folder, place = tmp_path_factory.mktemp("cached"), Path("/tmp") / f"alt-hpc-stale-{os.getpid()}"
    seen = ["--shared", str(tmp_path_factory.getbasetemp()), "--cached", str(folder)]
    spread = ["--conf", "SelectTypeParameters=CR_Core_Memory,CR_LLN"]  # over hosts, not on n1
    for _ in of_hosts(place, "--nodes", "4", *spread, *seen):
        yield folder


def _ended(site: Site) -> None:
    subprocess.run(["scancel", "--user", os.environ.get("USER", "root")], timeout=60)
    for node in ("n1", "n2", "n3", "n4"):
        resume = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
        subprocess.run(resume, timeout=60, capture_output=True)
    idle = lambda: set(client("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}  # noqa: E731
    site.wait("idle hosts", lambda: not queue() and idle(), 60)


@pytest.fixture
def site(
    cached: Path, tiny_config: Path, tmp_path: Path, stub_expected: dict[int, bytes]
) -> Iterator[Site]:
    """A run of two iterations with stub stages."""
    chosen = [*settings(interpreter(tmp_path, stubs=True)), *STUB]
    name = str(cached / tmp_path.name / "run")
    one = Stale(tmp_path, tiny_config, stub_expected, settings=chosen, name=name)
    yield one
    _ended(one)


@pytest.fixture
def real(cached: Path, tiny_config: Path, tmp_path: Path, undisturbed: RunFolder) -> Iterator[Site]:
    """One iteration with real stages; training is 2 hosts x 2 ranks."""
    expected = {1: (undisturbed.layout.policy(1) / "model.safetensors").read_bytes()}
    chosen = ["iterations=1", "cluster.sample.shards=1", "keep=9"]
    chosen += settings(interpreter(tmp_path, stubs=False), ("train",))
    name = str(cached / tmp_path.name / "run")
    one = Stale(tmp_path, tiny_config, expected, "real", chosen, name=name)
    yield one
    _ended(one)


CORE: dict[str, Callable[[Site], None]] = {
    "nothing": test_faults.test_nothing_is_broken,
    "a task dies": lambda site: test_faults.test_a_task_dies_once(
        site, "a task: SIGKILL in the middle of a shard", "sample-1-1", "group1 kill"
    ),
    "a shard goes on": test_faults.test_a_shard_goes_on_after_its_last_whole_group,
    "a bad node": test_faults.test_a_node_on_which_every_task_fails_at_once,
    "preempted": test_faults.test_preempted_tasks_go_on,
    "a node down": test_faults.test_a_node_set_down,
    "a damaged shard": lambda site: test_faults.test_a_damaged_shard_is_made_again(
        site, "one byte flipped"
    ),
    "many at once": lambda site: test_faults.test_random_sequences_of_faults(site, 1),
}


@pytest.mark.parametrize("fault", CORE)
def test_the_fault_core_under_stale_caches(site: Site, fault: str) -> None:
    CORE[fault](site)


def test_real_training_is_killed_under_stale_caches(real: Site) -> None:
    fault = "training: rank 1 killed at step 3"
    more = ["train.checkpoint_minutes=0"]
    test_faults.test_real_training_is_killed(real, fault, "step3-rank1 kill", more)
