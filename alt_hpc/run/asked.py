"""What judges of a run were asked: their replies, kept at once, and the dollars that they cost."""

import contextlib
import json
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path

from alt_hpc.errors import InputError
from alt_hpc.judges import Judge, Question, Reply
from alt_hpc.run import files
from alt_hpc.run.folder import RunFolder
from alt_hpc.settings import digest

WITHIN_S = 600.0  # how long one task waits for others that write down what they spend


class Replies:
    """Replies to the questions of a piece: of all its attempts, by what was asked."""

    def __init__(self, judge: Judge, before: Iterable[Path], mine: Path) -> None:
        """`before`: files of earlier attempts; `mine`: where those of this one go."""
        self.content, self.mine, self.lock = judge.content, mine, threading.Lock()
        self.found = dict[str, Reply]()
        for line in (line for file in before for line in files.read_lines(file)):
            whole = line.pop("sha256", None) == digest(line)
            if whole:  # no torn or changed one counts
                self.found[line["question"]] = Reply(*json.loads(line["reply"]))

    def known(self, question: Question) -> Reply | None:
        """What was said before, which costs nothing now."""
        return self.found.get(self._name(question))

    def keep(self, question: Question, reply: Reply) -> None:
        """Write a reply down, from any thread, before it is used."""
        text = json.dumps(reply, ensure_ascii=False)
        line = {"question": self._name(question), "reply": text}
        with self.lock:
            files.append_line(self.mine, {**line, "sha256": digest(line)})

    def _name(self, question: Question) -> str:
        return digest([self.content, *question])


class Ledger:
    """The purse of a judge (`at`, the key where it stands): dollars, over all tasks of a run.

    A file to which each request adds what it may cost, before it is made, and then what it did.
    """

    def __init__(self, run: RunFolder, at: str, budget: float) -> None:
        self.file, self.lock = run.layout.spent(at), threading.Lock()
        self.at, self.budget = at, budget
        self.read, self.of = 0, dict[str, float]()  # bytes; dollars by request

    def spent(self) -> float:
        """What has been spent, or may have been, so far."""
        if self.file.exists():
            with self.file.open("rb") as file:
                file.seek(self.read)
                for line in file:
                    if line.endswith(b"\n"):  # another may be writing it
                        self.read += len(line)
                        with contextlib.suppress(ValueError):  # a torn line: nothing was asked
                            self.of |= json.loads(line)
        return sum(self.of.values())

    def hold(self, dollars: float) -> str:
        name = secrets.token_hex(6)
        self.file.parent.mkdir(exist_ok=True)
        with self.lock, files.locked(self.file.with_suffix(".lock"), WITHIN_S):
            spent = self.spent()
            if spent + dollars > self.budget:
                words = (
                    f"{spent:.4f} of {self.budget:g} dollars are spent, or may be, and a request"
                )
                more = f"may cost {dollars:.4f}: give more ({self.at}.budget) and submit again"
                raise InputError(f"{words} {more}", f"{self.at}.budget")
            files.append_line(self.file, {name: dollars})
        return name

    def settle(self, held: str, dollars: float) -> None:
        with self.lock, files.locked(self.file.with_suffix(".lock"), WITHIN_S):
            files.append_line(self.file, {held: dollars})
