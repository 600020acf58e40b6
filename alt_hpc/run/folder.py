"""A run: made, opened, frozen, ended. Its other rooms take it as their first argument."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alt_hpc import config as configs
from alt_hpc.config import Config
from alt_hpc.errors import InputError
from alt_hpc.graph import EVALUATE, JUDGE, OF_SETS, SAMPLE, Graph, Shard, Sharding
from alt_hpc.run import files
from alt_hpc.run.journal import Journal
from alt_hpc.run.layout import DATA, Layout
from alt_hpc.run.manifests import Manifests
from alt_hpc.settings import digest

PROBE = ".probe-"
FORMAT = 7  # of a run folder: another one is read by no other version


class RunFolder:
    """A run on disk. Cheap to construct: nothing is read before it is asked for, or twice."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.layout = Layout(self.path)
        self.journal = Journal(self.layout.journal)
        self.facts = functools.cache(self._facts)
        self.config = functools.cache(self._config)
        self.graph = functools.cache(self._graph)
        self.manifests = Manifests(self.layout, self.graph)

    @classmethod
    def create(cls, config: Config) -> "RunFolder":
        """Make the run folder, or open it; InputError where it is not ours, or another config's."""
        path, problem = Path(config.run).absolute(), "cannot make the run folder"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (owner := path.stat().st_uid) != os.getuid():
                belongs = f"belongs to user {owner}, not to you; choose another"
                raise InputError(f"{path}: the folder {belongs}", "run")
            problem = "the run folder cannot be written"
            with tempfile.NamedTemporaryFile(prefix=PROBE, dir=path):
                pass
        except OSError as error:
            raise InputError(f"{path}: {problem} ({error.strerror})", "run") from error
        folder = cls.preview(config)
        if not folder.exists() and (strange := folder._strange()):
            problem = f"the folder is not empty and holds no run (found {strange[0]})"
            raise InputError(f"{path}: {problem}", "run")
        os.chmod(path, files.PRIVATE)  # only now is it known to be a run's
        folder.check_owner()  # a file system may keep no modes: then no job would start
        return folder

    @classmethod
    def preview(cls, config: Config) -> "RunFolder":
        """The run folder as it would be with this config; nothing is written."""
        folder = cls(config.run)
        if os.pathsep in str(folder.path):
            problem = f"a folder with '{os.pathsep}' in its path cannot be on PYTHONPATH"
            raise InputError(f"{folder.path}: {problem}; choose another", "run")
        if not folder.exists():
            if any(p.exists() and not p.is_dir() for p in (folder.path, *folder.path.parents)):
                raise InputError(f"{folder.path}: a file is in the way of the run folder", "run")
        elif folder.facts()["fingerprint"] != config.fingerprint():
            now, frozen = flat(config.frozen()), flat(folder.facts()["frozen"])
            differing = sorted(name for name in now | frozen if now.get(name) != frozen.get(name))
            problem = "what decides content is frozen: choose another run folder"
            another = f"{folder.path}: the folder belongs to a run with another"
            raise InputError(f"{another} {', '.join(differing[:3])}; {problem}", "run")
        folder.config = functools.cache(lambda: config)
        return folder

    def exists(self) -> bool:
        return self.layout.run.exists()

    def _strange(self) -> list[str]:
        """What a folder without run.json holds that freezing data has not put there."""
        layout = self.layout
        ours = {layout.data, layout.tensorboard, layout.code, layout.models, layout.lock}
        outer = sorted({*self.path.iterdir()} - ours - {*self._half_written()})
        inner = sorted(p for p in layout.data.glob("*") if not p.name.lstrip(".").startswith(DATA))
        return [str(path.relative_to(self.path)) for path in [*outer, *inner]]

    def _half_written(self) -> list[Path]:
        """What a submission that was killed may have left."""
        of_files = [files.half_written(file) for file in (self.layout.run, self.layout.models)]
        return [*self.path.glob(f"{PROBE}*"), *itertools.chain(*of_files)]

    def abandon(self) -> None:
        """Wrong input was found before the run was frozen: leave nothing half made."""
        if self.exists() or self._strange():
            return
        for folder in (self.layout.data, self.layout.code):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.layout.models, self.layout.lock, *self._half_written()):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def check_owner(self) -> None:
        """Stop where the folder is not ours alone: jobs unpickle what lies in it."""
        files.check_private(self.path, "run")

    def freeze(self, config: Config, deepspeed: Mapping[str, Any]) -> None:
        """Write down the run: config, fingerprint, DeepSpeed JSONs (once); and what may change."""
        if not self.exists():
            own = {"format": FORMAT, "run_id": self.run_id, "inode": self.path.stat().st_ino}
            content = {"fingerprint": config.fingerprint(), "frozen": config.frozen()}
            facts = {**own, **content, "deepspeed": dict(deepspeed), "created": time.time()}
            files.write_atomically(self.layout.run, json.dumps(facts, indent=1))
        files.write_atomically(
            self.layout.config, json.dumps(config.model_dump(mode="json"), indent=1)
        )
        self.facts.cache_clear()
        self.config = functools.cache(self._config)
        self.graph.cache_clear()

    def _facts(self) -> dict[str, Any]:
        """run.json."""
        if not self.exists():
            raise InputError(f"{self.path}: not a run folder (run.json is missing)")
        facts = files.read_json(self.layout.run)
        found = facts.get("format", 1) if isinstance(facts, dict) else None
        if found != FORMAT:
            advice = "go on with the version that the run began with, or choose another folder"
            problem = f"of format {found}, but this version reads format {FORMAT}: {advice}"
            raise InputError(f"{self.layout.run}: {problem}")
        return dict(facts)

    @property
    def run_id(self) -> str:
        """Names the run to Slurm: by its place, so that a plan can show it; a copy is another."""
        if self.exists() and self.facts().get("inode") == self.path.stat().st_ino:
            return str(self.facts()["run_id"])
        return digest(os.path.realpath(self.path))[:8]  # however the path is spelt

    def _config(self) -> Config:
        """The config as last submitted."""
        self.facts()  # or it is no run folder, or of another format
        path = self.layout.config
        try:
            return configs.from_json(json.loads(path.read_text(encoding="utf-8")), path.name)
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from error

    def begin(self, iteration: int, draw: Mapping[str, Any], sharding: Sharding) -> None:
        """Write down an iteration's draw, unless it has begun, and how it is cut by now."""
        path = self.layout.draw(iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            draw = self.draw(iteration)
        values = {**draw, SAMPLE: sharding.sample}
        for cut, shards in ((EVALUATE, sharding.evaluate), (JUDGE, sharding.judge)):
            known = draw.get(cut, [])
            fresh = [dataclasses.astuple(shard) for shard in shards[len(known) :] if shard]
            values[cut] = [*known, *fresh]
            values[_asked(cut)] = [number for number, shard in enumerate(shards) if shard]
        files.write_atomically(path, json.dumps(values))
        self.graph.cache_clear()

    def draw(self, iteration: int) -> dict[str, Any]:
        """The draw: `rows` (indices into the frozen prompts, in order), and how it is cut."""
        return dict(files.read_json(self.layout.draw(iteration)))

    def _graph(self) -> Graph:
        """The pieces of all iterations that have begun."""
        begun = {}
        for k, draw in ((k, self.draw(k)) for k in self.layout.draws()):
            kept = [
                tuple(Shard(*about) if i in draw[_asked(cut)] else None for i, about in shards)
                for cut, shards in ((cut, enumerate(draw.get(cut, []))) for cut in OF_SETS)
            ]
            begun[k] = Sharding(tuple((a, b) for a, b in draw[SAMPLE]), *kept)
        return Graph(self.config(), begun)

    @contextlib.contextmanager
    def only_one(self, lock: Path | None = None, within_s: float = 1.0) -> Iterator[None]:
        """One process at a time. The kernel frees the lock when its holder dies."""
        try:
            with files.locked(lock or self.layout.lock, within_s):
                yield
        except files.Locked:
            raise InputError(f"{self.path}: is being run by another process", "run") from None

    def in_use(self) -> bool:
        """Whether `alt-hpc run` works in this folder now."""
        if not self.layout.lock.exists():
            return False
        with contextlib.suppress(files.Locked), files.locked(self.layout.lock, within_s=0.0):
            return False
        return True

    def end(self, how: str, sentence: str) -> None:
        """Write STOPPED or FINISHED."""
        files.write_atomically(self.layout.ends[how], sentence + "\n")

    def ended(self) -> tuple[str, str] | None:
        """How the run ended and the sentence, if it has."""
        ends = self.layout.ends.items()
        return next(
            (
                (how, file.read_text(encoding="utf-8").strip())
                for how, file in ends
                if file.exists()
            ),
            None,
        )

    def reopen(self) -> None:
        """A person submits again: an earlier end no longer holds."""
        for file in self.layout.ends.values():
            file.unlink(missing_ok=True)


def _asked(cut: str) -> str:
    """The key of a draw with the numbers of the shards that are still asked for."""
    return "asked" if cut == EVALUATE else f"{cut} asked"


def flat(values: Any, name: str = "") -> dict[str, str]:
    """A nested dict as dotted names."""
    if not isinstance(values, dict):
        return {name: json.dumps(values)}
    parts = [flat(value, f"{name}.{key}".lstrip(".")) for key, value in values.items()]
    return {name: text for part in parts for name, text in part.items()}
