"""endpoint: a model behind an OpenAI-compatible endpoint; the key comes from the environment."""

import email.utils
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from alt_hpc import interrupt
from alt_hpc.errors import InputError, said
from alt_hpc.judges.judge import Asker, Given, Judge, Purse, Question, Reply
from alt_hpc.settings import GIVES_KIND, Count, NotNegative, Positive, key

if TYPE_CHECKING:
    from openai import OpenAI

# openai is imported where an endpoint is asked: it takes a second or two.

LONGEST_WAIT_S = 120.0  # before another try
SILENT = 3  # so many questions in a row without an answer: nobody is there
OVERHEAD = 16  # tokens that a request has beside its text
UNSENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")  # of the client's transport
LOST_IN_TRANSIT = (408, 409, 425, 429)  # statuses that may go away, as those from 500 on


class Settings(Judge):
    """Asked by the `openai` client. The key stands in no file: only its variable's name does."""

    model_config = GIVES_KIND

    kind: Literal["endpoint"] = "endpoint"
    model: str
    base_url: str = key("https://api.openai.com/v1", "Of the endpoint, up to `/v1`.")
    key_from: str | None = key("OPENAI_API_KEY", "The environment's variable; null: no key.")
    dollars_in: NotNegative
    """For a million tokens that are read; 0 for a server of your own."""
    dollars_out: NotNegative
    """For a million tokens that are written."""
    budget: Positive | None = key(None, "Dollars, over all tries of the whole run.")
    timeout_s: Positive = key(60.0, "For one request.")
    tries: Count = key(6, "For one request: time-outs, rate limits, errors of the server.")
    requests_per_minute: Count | None = key(None, "Of the whole run; none: as the server allows.")
    at_once: Count = key(4, "Requests in flight, per task.")
    request: dict[str, str | int | float | bool | None] = Field({})
    """Further parameters of a request, as the endpoint has them; null leaves out one of ours
    (`temperature`, `max_tokens`, `seed`), which some models refuse."""

    @property
    def content(self) -> dict[str, Any]:
        where = {"kind": self.kind, "model": self.model, "base_url": self.base_url}
        return {**where, "request": self.request}

    @property
    def most(self) -> float | None:
        return self.budget

    def check_keys(self) -> None:
        if not self.base_url.startswith(("http://", "https://")) or {*"@?#"} & {*self.base_url}:
            raise InputError("expected http(s)://HOST/v1, without a key in it", ".base_url")
        if self.key_from is not None and not self.key_from.isidentifier():
            problem = "expected the name of a variable of the environment, not the key itself"
            raise InputError(problem, ".key_from")
        if (self.dollars_in or self.dollars_out) and self.budget is None:
            raise InputError("say how many dollars may be spent in all", ".budget")

    def check(self, place: Callable[[str], Path]) -> None:
        """Asks which models the endpoint has, which costs nothing."""
        import openai

        try:
            there = [one.id for one in self.client().models.list().data or ()]
        except openai.APIConnectionError as error:
            problem = f"{self.base_url}: no endpoint answers ({_why(error)})"
            raise InputError(problem, ".base_url") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self.refused(error) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError):
            return  # it may not tell
        if there and self.model not in there:
            some = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
            raise InputError(f"{self.base_url} has no model {self.model} ({some})", ".model")

    def client(self) -> "OpenAI":
        """The client; InputError where the environment has no key."""
        import openai

        if not (secret := self.secret()):
            problem = f"the environment has no {self.key_from}, the endpoint's key"
            raise InputError(problem, ".key_from")
        return openai.OpenAI(
            api_key=secret, base_url=self.base_url, timeout=self.timeout_s, max_retries=0
        )

    def secret(self) -> str:
        """The key, empty where the environment has none."""
        return os.environ.get(self.key_from, "").strip() if self.key_from else "none"

    def refused(self, error: Exception) -> InputError:
        """What is said where the key is no good."""
        status = getattr(error, "status_code", "")
        problem = f"{self.base_url} refuses the key (HTTP {status})"
        return InputError(problem, ".key_from" if self.key_from else ".base_url")

    def cost(self, questions: int, size: int, max_tokens: int) -> float:
        """Two bytes a token, which is more tokens than nearly all texts have; full answers."""
        others = [self.request.get(name) for name in ("max_tokens", "max_completion_tokens")]
        max_tokens = max([max_tokens, *(most for most in others if isinstance(most, int))])
        return self.priced(size / 2 + OVERHEAD * questions, max_tokens * questions)

    def priced(self, read: float, written: float) -> float:
        """Dollars for so many tokens."""
        return (read * self.dollars_in + written * self.dollars_out) / 1e6

    def ready(self, given: Given) -> Asker:
        return _Loaded(self, self.client(), given)


class _Failed(NamedTuple):
    """A request that was not answered."""

    why: str
    wait: float = 0.0  # seconds before another try, as the server says
    stays: bool = False  # it would be refused again


class _Loaded:
    """The asker of kind `endpoint`."""

    def __init__(self, settings: Settings, client: "OpenAI", given: Given) -> None:
        self.settings, self.client = settings, client
        self.keep, self.purse = given.keep, _free if settings.budget is None else given.purse
        pace = settings.requests_per_minute
        self.pace = _Pace(60.0 * given.tasks / pace if pace else 0.0)
        self.silent = 0  # questions without an answer, in a row

    def ask(self, questions: Iterable[Question]) -> Iterator[Reply]:
        """As many in flight as the settings say; each reply is kept as it comes."""
        waiting: deque[Future[Reply]] = deque()
        pool, over = ThreadPoolExecutor(self.settings.at_once), threading.Event()
        try:
            for question in questions:
                waiting.append(pool.submit(self._one, question, over))
                if len(waiting) >= self.settings.at_once:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            over.set()  # nobody waits for more
            pool.shutdown(wait=True, cancel_futures=True)

    def lost(self, question: Question) -> int:
        return 0

    def _one(self, question: Question, over: threading.Event) -> Reply:
        """The reply to a question, within the tries that a request has."""
        spent, failed = 0.0, _Failed("asked to stop")
        for number in range(self.settings.tries):
            if number and over.wait(_wait(number, failed.wait)):
                break
            made, lost = self._try(question)
            spent += lost
            if isinstance(made, Reply):
                self.silent = 0
                reply = made._replace(dollars=made.dollars + spent)
                self.keep(question, reply)
                return reply
            failed = made
            if failed.stays:
                break
        self.silent += 1
        url = self.settings.base_url
        if self.silent >= SILENT and failed.stays:
            raise InputError(f"{url} refuses what it is asked ({failed.why})", ".request")
        if self.silent >= SILENT or over.is_set():
            raise RuntimeError(f"{url} does not answer: {failed.why}")
        # Not kept: another attempt may have more luck.
        return Reply(None, failed.why, dollars=spent)

    def _try(self, question: Question) -> "tuple[Reply | _Failed, float]":
        """A reply, or why there is none, and then what it may have cost all the same."""
        import openai

        self.pace.wait()
        most = self.settings.cost(1, len(question.text.encode()), question.max_tokens)
        held = self.purse.hold(most)
        try:
            made = self.client.chat.completions.create(
                model=self.settings.model,
                messages=[{"role": "user", "content": question.text}],
                extra_body=self._parameters(question),
            )
            reply = self._read(made, question)
        except openai.APIStatusError as error:
            self.purse.settle(held, 0.0)
            status, wait = error.status_code, error.response.headers.get("retry-after", "")
            if status in (401, 403):
                raise self.settings.refused(error) from None
            if status == 404:
                problem = f"{self.settings.base_url} has no model {self.settings.model} (HTTP 404)"
                raise InputError(problem, ".model") from None
            why = self._hidden(f"HTTP {status}: {_why(error)}")
            stays = status not in LOST_IN_TRANSIT and status < 500
            return _Failed(why, _seconds(wait), stays), 0.0
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
            if type(error.__cause__).__name__ in UNSENT:
                self.purse.settle(held, 0.0)
                return _Failed(self._hidden(_why(error))), 0.0
            # It may have been made, and paid: what was held is never given back.
            return _Failed(self._hidden(_why(error))), most
        self.purse.settle(held, reply.dollars)
        return reply, 0.0

    def _parameters(self, question: Question) -> dict[str, Any]:
        ours = {"temperature": question.temperature, "max_tokens": question.max_tokens}
        ours["seed"] = question.seed % 2**31
        return {k: v for k, v in {**ours, **self.settings.request}.items() if v is not None}

    def _read(self, made: Any, question: Question) -> Reply:
        """What a completion says; an error of Python's where it is none."""
        message, usage = made.choices[0].message, made.usage
        text, refusal = message.content, getattr(message, "refusal", None)
        text = self._hidden(text) if isinstance(text, str) else ""
        read = getattr(usage, "prompt_tokens", None) or len(question.text.encode()) // 2
        written = getattr(usage, "completion_tokens", None) or len(text.encode()) // 2
        why = "" if text else "refused" if refusal else "said nothing"
        return Reply(text, why, read, written, self.settings.priced(read, written))

    def _hidden(self, text: str) -> str:
        """A text without the key, should the server repeat it."""
        secret = self.settings.secret()
        return text.replace(secret, "(key)") if self.settings.key_from and secret else text


def _result(future: "Future[Reply]") -> Reply:
    """What a thread has made; Interrupted where the task is asked to stop meanwhile."""
    while True:
        try:
            return future.result(timeout=1.0)
        except TimeoutError:
            interrupt.check()


class _Pace:
    """Requests keep this far apart, in seconds, whichever thread makes them."""

    def __init__(self, apart: float) -> None:
        self.apart, self.next, self.lock = apart, 0.0, threading.Lock()

    def wait(self) -> None:
        with self.lock:
            now = time.monotonic()
            mine = max(now, self.next)
            self.next = mine + self.apart
        time.sleep(mine - now)


class _Free:
    """The purse of a judge that costs nothing."""

    def hold(self, dollars: float) -> str:
        return ""

    def settle(self, held: str, dollars: float) -> None: ...


_free: Purse = _Free()


def _wait(number: int, told: float) -> float:
    """Seconds before a further try: as the server told, else twice as long each time, by chance."""
    grown = min(2.0 ** (number - 1), LONGEST_WAIT_S)
    return min(told, LONGEST_WAIT_S) + grown * random.uniform(0.5, 1.0) * (0.1 if told else 1.0)


def _seconds(text: str) -> float:
    """What Retry-After says: a number of seconds, or a date."""
    try:
        return max(float(text), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _why(error: Exception) -> str:
    """What the client says; a connection's error says no more than that, its cause does."""
    return said(error.__cause__ or error)
