"""The trainer against a plain loop, and against kills: real DeepSpeed processes on the CPU.

A test process starts this very file as ranks (see `_work`), which run a list of jobs in one
process group and leave their results in a folder.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from alt_hpc.errors import InputError, TrainingDiverged
from alt_hpc.interrupt import Interrupted
from alt_hpc.lm.blocks import train_top
from alt_hpc.process import for_a_task
from alt_hpc.run.manifests import Checkpoints
from alt_hpc.training import deepspeed, examples, moments
from alt_hpc.training.examples import Example, FeaturePair, Pair
from alt_hpc.training.loop import global_batches, learning_rate, order, prepare, train
from alt_hpc.training.losses import alt_loss, feature_loss, pair_loss
from alt_hpc.training.ranks import Ranks, connect, disconnect, from_environment
from alt_hpc.training.reference import share_trunk
from alt_hpc.training.settings import Training

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 97
BASE = Training(
    epochs=1, global_batch=8, micro_batch=2, lr=1e-2, eps=1e-4, weight_decay=0.1, clip=0.5,
    warmup=0.4, trained_blocks=0.7, train_embeddings=False, precision="float32",
    checkpoint_minutes=1e6,
)  # fmt: skip


# --- The ranks ------------------------------------------------------------------------------------


def _llama(dropout: float) -> nn.Module:
    config = LlamaConfig(
        hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, attention_dropout=dropout,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _gpt2(dropout: float) -> nn.Module:
    """With a tied head, and sizes that two ranks do not divide."""
    config = GPT2Config(
        n_embd=15, n_layer=3, n_head=3, vocab_size=VOCABULARY, n_positions=32,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class _Scorer(nn.Module):
    """A trunk with a value head, as AutoModelForSequenceClassification."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = _llama(0.0).base_model
        self.score = nn.Linear(40, 1, bias=False)

    @property
    def base_model(self) -> Any:
        return self.model


def _model(kind: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(5)
    if kind == "scorer":
        return _Scorer()
    if kind == "head":
        return nn.Linear(13, 1, bias=False)
    model = _gpt2(dropout) if kind == "gpt2" else _llama(dropout)
    train_top(model, BASE.trained_blocks, embeddings=kind == "gpt2")
    return model


def _examples(kind: str) -> list[Any]:
    """17: the third global batch of 8 has a single example, so most ranks idle there."""
    rng = np.random.default_rng(1)

    def text() -> list[int]:
        return [int(token) for token in rng.integers(0, VOCABULARY, rng.integers(8, 20))]

    if kind == "scorer":
        return [Pair(text(), text()) for _ in range(17)]
    if kind == "head":
        return [FeaturePair(torch.from_numpy(rng.random((2, 13), "float32"))) for _ in range(17)]
    return [Example(text(), int(rng.integers(1, 8))) for _ in range(17)]


def _alt_loss_with_kl(model: nn.Module, batch: Any) -> Any:
    return alt_loss(model, batch, kl=0.5, reference=_model("llama").eval())


LOSSES: dict[str, Callable[..., Any]] = {
    "scorer": pair_loss,
    "head": feature_loss,
    "kl": _alt_loss_with_kl,
}


def _explode(model: nn.Module, batch: Any) -> Any:
    """A loss that is infinite where token 96 comes up."""
    loss, parts = alt_loss(model, batch)
    return loss / (0.0 if (batch.targets == 96).any() else 1.0), parts


def _work(job: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    """Run one job on this rank; rank 0 leaves weights, records and error in a file NAME."""
    examples.CHUNK = job.get("chunk", 512)
    settings = BASE.model_copy(update=job.get("settings", {}))
    kind = job.get("model", "llama")
    model, loss = _model(kind, job.get("dropout", 0.0)), LOSSES.get(kind, alt_loss)
    before: dict[str, Any] = {}
    if "after" in job:
        torch.distributed.barrier()  # the first rank has written it
        before = torch.load(folder / job["after"])
        model.load_state_dict(before["weights"])
    if job.get("explode"):
        loss = _explode
    if job.get("share"):
        reference = _model("llama").eval()
        assert share_trunk(model, reference) == 1
        loss = partial(alt_loss, kl=0.5, reference=reference)
    if settings.checkpoint_activations:
        prepare(model, settings)
    records: list[Any] = []

    def log(record: Any) -> None:
        records.append(record)
        (folder / f"{job['name']}.step").write_text(str(record.step))
        time.sleep(job.get("pause", 0.0))

    def stop() -> bool:  # only the last rank is asked to
        asked.append(True)
        return ranks.rank == ranks.world - 1 and len(asked) == job.get("stop")

    asked: list[bool] = []
    error, result = "", None
    try:
        result = train(
            model,
            _examples(kind),
            loss,
            settings,
            deepspeed_config=job.get("deepspeed", {"zero_optimization": {"stage": 2}}),
            seed=job.get("seed", 3),
            ranks=ranks,
            checkpoints=Checkpoints(folder / job.get("checkpoints", f"{job['name']}.checkpoints")),
            log=log,
            stop=stop,
            carried=before.get("moments", {}) if job.get("carry") else None,
        )
    except (Interrupted, TrainingDiverged) as caught:
        error = f"{type(caught).__name__}: {caught}"
    if ranks.first:
        weights = result.weights if result else None
        steps = [dataclasses.asdict(record) for record in records]
        found = {"weights": weights, "records": steps, "error": error}
        found |= {"moments": result.moments if result else None}
        torch.save(found | {"resumed": result.resumed_at if result else 0}, folder / job["name"])
    elif result is not None:
        assert (result.weights, result.moments) == (None, None)
    for command in job.get("then", []):
        if ranks.first:
            subprocess.run(command, shell=True, check=True, cwd=folder)


def _main(folder: Path) -> None:
    ranks = from_environment()
    connect(ranks)
    for job in json.loads((folder / "jobs.json").read_text()):
        _work(job, folder, ranks)
    disconnect()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))


# --- Starting them --------------------------------------------------------------------------------


def _start(folder: Path, world: int, jobs: list[dict[str, Any]]) -> list[subprocess.Popen[bytes]]:
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    common = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "OMPI_COMM_WORLD_LOCAL_RANK": "7",  # as srun with PMIx would leave behind
    }
    start = f"{folder} {time.time()}"
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=for_a_task(rank, world, rank, start, None) | common,
            stdout=(folder / f"log-{rank}").open("ab"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]


def _finish(folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    codes = [process.wait(300) for process in processes]
    assert not any(codes), (folder / "log-0").read_text()[-4000:]


def _found(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / name)
    return found


def _zero(stage: int, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000, **more}
    if stage == 3:  # small parameters, so all of ours, would not be partitioned otherwise
        zero |= {"stage3_param_persistence_threshold": 0}
    return {"zero_optimization": zero}


ACCUMULATE = {"data_types": {"grad_accum_dtype": "fp32"}}
HALF: dict[str, Any] = {"precision": "bfloat16"}
# All examples twice, at a rate of 0: the gradients of every step are the same.
STILL = HALF | {"epochs": 2, "global_batch": 18, "micro_batch": 3, "lr": 0.0}
SAVING: dict[str, Any] = {"epochs": 2, "checkpoint_minutes": 0.0}  # at each of six steps

ONE_RANK: list[dict[str, Any]] = [
    {"name": "micro 8", "settings": {"micro_batch": 8}},
    {"name": "micro 2"},
    {"name": "gpt2", "model": "gpt2"},
    {"name": "pairs", "model": "scorer"},
    {"name": "features", "model": "head"},
    {"name": "first 2", "model": "gpt2", "carry": True},
    {"name": "carried 2", "model": "gpt2", "carry": True, "after": "first 2", "seed": 4},
]
TWO_RANKS: list[dict[str, Any]] = [
    *({"name": f"stage {stage}", "deepspeed": _zero(stage)} for stage in (0, 1, 2, 3)),
    {"name": "again", "deepspeed": _zero(2)},
    {"name": "micro 4", "settings": {"micro_batch": 4}, "deepspeed": _zero(2)},
    {"name": "gpt2", "model": "gpt2", "deepspeed": _zero(2)},
    {"name": "gpt2 stage 3", "model": "gpt2", "deepspeed": _zero(3)},
    {"name": "chunks", "chunk": 4, "deepspeed": _zero(3)},
    {"name": "kl", "model": "kl", "deepspeed": _zero(3)},
    {"name": "kl, shared", "share": True, "deepspeed": _zero(2)},
    {"name": "kl, shared 3", "share": True, "deepspeed": _zero(3)},
    {"name": "recomputed", "settings": {"checkpoint_activations": True}, "deepspeed": _zero(3)},
    {"name": "pairs", "model": "scorer", "deepspeed": _zero(3)},
    {"name": "features", "model": "head", "deepspeed": _zero(2)},
    {"name": "offload", "deepspeed": _zero(2, offload_optimizer={"device": "cpu"})},
    {"name": "float16", "settings": {"precision": "float16"}},
    {"name": "lr 0", "model": "gpt2", "settings": HALF | {"lr": 0.0}, "deepspeed": _zero(2)},
    {
        "name": "lr 0 stage 3",
        "model": "gpt2",
        "settings": HALF | {"lr": 0.0},
        "deepspeed": _zero(3),
    },
    {"name": "explode", "explode": True, "settings": HALF, "deepspeed": _zero(2)},
]
STAGES = {"1": _zero(1) | ACCUMULATE, "2": _zero(2) | ACCUMULATE, "3": _zero(3) | ACCUMULATE}
for _stage, _config in STAGES.items():
    _job = {"model": "gpt2", "dropout": 0.2, "settings": HALF | SAVING, "deepspeed": _config}
    TWO_RANKS += [
        {**_job, "name": f"whole {_stage}"},
        {**_job, "name": f"stopped {_stage}", "stop": 3, "checkpoints": f"c{_stage}"},
        {**_job, "name": f"resumed {_stage}", "checkpoints": f"c{_stage}"},
    ]
    _first = {"model": "gpt2", "deepspeed": _zero(int(_stage)), "carry": True}
    TWO_RANKS += [
        {**_first, "name": f"first {_stage}"},
        {**_first, "name": f"carried {_stage}", "after": f"first {_stage}", "seed": 4},
    ]
    _first |= {"settings": STILL, "deepspeed": _config, "name": f"still {_stage}"}
    _second = {**_first, "after": f"still {_stage}"}
    TWO_RANKS += [
        _first,
        {**_second, "name": f"still, carried {_stage}"},
        {**_second, "name": f"still, stopped {_stage}", "stop": 2, "checkpoints": f"s{_stage}"},
        {**_second, "name": f"still, resumed {_stage}", "checkpoints": f"s{_stage}"},
    ]
TWO_RANKS += [{"name": "anew", "model": "gpt2", "after": "first 2", "seed": 4}]
_job |= {"deepspeed": STAGES["2"]}
_BREAK = "truncate -s -1 broken/step-000003/*_model_states.pt; mkdir broken/step-000004"
TWO_RANKS += [
    {**_job, "name": "left", "stop": 3, "checkpoints": "broken", "then": [_BREAK]},
    {**_job, "name": "half-written", "checkpoints": "broken"},
    {**_job, "name": "other seed", "seed": 4, "checkpoints": "broken"},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Any]:
    """Results of all jobs above, by number of ranks and name."""
    folder = tmp_path_factory.mktemp("runs")
    both = [(folder / "1", 1, ONE_RANK), (folder / "2", 2, TWO_RANKS)]
    for where, started in [(where, _start(where, n, jobs)) for where, n, jobs in both]:
        _finish(where, started)
    return lambda world, name: _found(folder / str(world), name)


# --- The same steps as a plain loop ---------------------------------------------------------------


def _plain_text_loss(model: Any, rows: list[Example]) -> Tensor:
    """The mean loss with nothing shared, one sequence at a time, no padding."""
    each = []
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0, row.start - 1 : -1]
        targets = torch.tensor(row.ids[row.start :])
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        each.append(functional.cross_entropy(logits, targets, reduction="none") - 0.06 * entropy)
    return torch.cat(each).mean()


def _plain_kl_loss(model: Any, rows: list[Example]) -> Tensor:
    reference, kls = _model("llama").eval(), []
    for row in rows:
        ids = torch.tensor([row.ids])
        p, q = (m(ids).logits[0, row.start - 1 : -1].log_softmax(-1) for m in (model, reference))
        kls.append(functional.kl_div(p, q.detach(), log_target=True, reduction="none").sum(-1))
    return _plain_text_loss(model, rows) + 0.5 * torch.cat(kls).mean()


def _plain_pair_loss(model: Any, rows: list[Pair]) -> Tensor:
    def reward(ids: list[int]) -> Tensor:
        states = model.base_model(torch.tensor([ids])).last_hidden_state
        return model.score(states)[0, -1, 0]  # type: ignore[no-any-return]

    pairs = [reward(row.chosen) - reward(row.rejected) for row in rows]
    return -functional.logsigmoid(torch.stack(pairs)).mean()


def _plain_feature_loss(head: Any, rows: list[FeaturePair]) -> Tensor:
    rewards = torch.stack([head(row.features)[:, 0] for row in rows])
    return -functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()


PLAIN: dict[str, Callable[..., Tensor]] = {
    "scorer": _plain_pair_loss,
    "head": _plain_feature_loss,
    "kl": _plain_kl_loss,
}


def _plain_adam(trained: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        trained, lr=1.0, betas=(0.8, 0.999), eps=1e-4, weight_decay=0.1, foreach=False
    )


def _plain_training(
    kind: str, seeds: tuple[int, ...] = (3,), carry: bool = True
) -> dict[str, Tensor]:
    """A training for each seed, of the model that the one before left; its Adam goes on."""
    model, examples = _model(kind), _examples(kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _plain_adam(trained)
    plain: Callable[..., Tensor] = PLAIN.get(kind, _plain_text_loss)
    rates = (0.5e-2, 1e-2, 0.5e-2)  # W = ceil(0.4 * 3) = 2
    orders = [np.random.default_rng([seed, 0]).permutation(17) for seed in seeds]
    steps = [(rows[at : at + 8], at // 8) for rows in orders for at in (0, 8, 16)]
    for batch, step in steps:
        if step == 0 and not carry:
            optimizer = _plain_adam(trained)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.zero_grad()
        plain(model, [examples[row] for row in batch]).backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("world", "name", "kind"),
    [
        (1, "micro 8", "llama"),
        (1, "micro 2", "llama"),
        (2, "stage 0", "llama"),
        (2, "stage 1", "llama"),
        (2, "stage 2", "llama"),
        (2, "stage 3", "llama"),
        (2, "micro 4", "llama"),
        (2, "offload", "llama"),
        (2, "float16", "llama"),  # in float32, as this is a CPU
        (1, "gpt2", "gpt2"),
        (2, "gpt2", "gpt2"),
        (2, "gpt2 stage 3", "gpt2"),
        (2, "chunks", "llama"),
        (2, "kl", "kl"),
        (2, "kl, shared", "kl"),
        (2, "kl, shared 3", "kl"),
        (2, "recomputed", "llama"),
        (1, "pairs", "scorer"),
        (2, "pairs", "scorer"),
        (1, "features", "head"),
        (2, "features", "head"),
    ],
)
def test_same_weights_as_plain_loop(
    runs: Callable[[int, str], Any], world: int, name: str, kind: str
) -> None:
    weights = runs(world, name)["weights"]
    plain = _plain_training(kind)
    assert list(weights) == list(plain)
    for key, value in plain.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("world", "name", "carry"),
    [
        (1, "carried 2", True),
        *((2, f"carried {stage}", True) for stage in STAGES),
        (2, "anew", False),
    ],
)
def test_moments_go_on_where_they_are_carried(
    runs: Callable[[int, str], Any], world: int, name: str, carry: bool
) -> None:
    found, plain = runs(world, name), _plain_training("gpt2", (3, 4), carry)
    for key, value in plain.items():
        torch.testing.assert_close(found["weights"][key], value, rtol=1e-5, atol=1e-6, msg=key)
    rates = [record["lr"] for record in found["records"]]
    assert rates == pytest.approx([0.5e-2, 1e-2, 0.5e-2])
    assert (found["moments"] or {}).get("step") == (6 if carry else None)


@pytest.mark.parametrize("stage", STAGES)
def test_moments_go_on_in_half_precision(runs: Callable[[int, str], Any], stage: str) -> None:
    """With the same gradients in four steps they are as much larger than after two."""
    two, four = (runs(2, name)["moments"] for name in (f"still {stage}", f"still, carried {stage}"))
    assert {tensor.dtype for tensor in four.values()} == {torch.float32}
    assert list(two) == list(four)
    assert (two["step"], four["step"]) == (2, 4)
    for name, tensor in two.items():
        if name != "step":
            beta = 0.999 if name.endswith("_sq") else 0.8
            more = tensor * (1 - beta**4) / (1 - beta**2)
            torch.testing.assert_close(four[name], more, rtol=0, atol=0.02 * float(more.max()))
            assert tensor.any(), name


@pytest.mark.parametrize("stage", STAGES)
def test_moments_of_a_checkpoint_come_before_those_carried(
    runs: Callable[[int, str], Any], stage: str
) -> None:
    """Stopped after the last step: resumed, no step is taken."""
    resumed, whole = runs(2, f"still, resumed {stage}"), runs(2, f"still, carried {stage}")
    assert resumed["resumed"] == 2
    _assert_same_bytes(resumed["moments"], whole["moments"])


def test_same_bytes_twice(runs: Callable[[int, str], Any]) -> None:
    _assert_same_bytes(runs(2, "stage 2")["weights"], runs(2, "again")["weights"])


def test_records(runs: Callable[[int, str], Any]) -> None:
    one, two = runs(1, "micro 8")["records"], runs(2, "stage 2")["records"]
    examples = _examples("llama")
    rows = global_batches(17, BASE, 3)[0]
    assert [record["step"] for record in two] == [1, 2, 3]
    assert (two[0]["steps"], two[0]["lr"]) == (3, 0.5e-2)
    assert two[0]["loss_tokens"] == sum(examples[row].weight for row in rows)
    assert two[0]["tokens"] == sum(len(examples[row].ids) for row in rows)
    parts = two[0]["parts"]
    assert two[0]["loss"] == pytest.approx(parts["ce"] - 0.06 * parts["entropy"], rel=1e-6)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert 0 <= runs(2, "pairs")["records"][0]["parts"]["accuracy"] <= 1


@pytest.mark.parametrize("name", ["lr 0", "lr 0 stage 3"])
def test_masters_begin_unrounded(runs: Callable[[int, str], Any], name: str) -> None:
    """Under bfloat16 with a rate of 0 the float32 weights come back bit for bit."""
    _assert_same_bytes(runs(2, name)["weights"], _model("gpt2").state_dict())


def test_divergence_names_step_and_examples(runs: Callable[[int, str], Any]) -> None:
    found = runs(2, "explode")
    targets = [96 in row.ids[row.start :] for row in _examples("llama")]
    batches = global_batches(17, BASE, 3)
    step = next(step for step, rows in enumerate(batches) if any(targets[row] for row in rows))
    rows = ", ".join(str(row) for row in batches[step])
    assert found["weights"] is None
    assert len(found["records"]) == step
    expected = f"TrainingDiverged: step {step + 1} of 3 (examples {rows}): the loss is "
    assert found["error"].startswith(expected)


# --- Stopping, dying, resuming --------------------------------------------------------------------


def _assert_same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for key in a:
        assert a[key].numpy().tobytes() == b[key].numpy().tobytes(), key


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_resumed_ends_in_same_bytes(
    runs: Callable[[int, str], Any], stage: str
) -> None:
    stopped, resumed = runs(2, f"stopped {stage}"), runs(2, f"resumed {stage}")
    assert stopped["error"] == "Interrupted: asked to stop after step 3 of 6"
    assert resumed["resumed"] == 3
    _assert_same_bytes(resumed["weights"], runs(2, f"whole {stage}")["weights"])


def test_half_written_checkpoint_is_not_used(runs: Callable[[int, str], Any]) -> None:
    assert runs(2, "half-written")["resumed"] == 2
    _assert_same_bytes(runs(2, "half-written")["weights"], runs(2, "whole 2")["weights"])


def test_checkpoint_of_another_training_is_not_used(runs: Callable[[int, str], Any]) -> None:
    assert runs(2, "other seed")["resumed"] == 0


def test_killed_and_restarted_ends_in_same_bytes(
    runs: Callable[[int, str], Any], tmp_path: Path
) -> None:
    job = next(job for job in TWO_RANKS if job["name"] == "whole 2") | {"name": "killed"}
    folder = tmp_path / "run"
    processes = _start(folder, 2, [job | {"pause": 0.3}])
    deadline = time.monotonic() + 120
    while not (folder / "killed.step").exists() or (folder / "killed.step").read_text() < "4":
        assert time.monotonic() < deadline, (folder / "log-0").read_text()
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _finish(folder, _start(folder, 2, [job]))
    found = _found(folder, "killed")
    assert found["resumed"] >= 3
    _assert_same_bytes(found["weights"], runs(2, "whole 2")["weights"])
    kept = sorted(path.name for path in (folder / "killed.checkpoints").glob("step-*"))
    assert kept == ["step-000004", "step-000005"]


# --- Without processes ----------------------------------------------------------------------------


def test_order_is_a_function_of_its_arguments() -> None:
    first, second = order(10, 2, seed=1)
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert [list(epoch) for epoch in order(10, 2, seed=1)] == [list(first), list(second)]
    assert list(order(10, 1, seed=2)[0]) != list(first)


def test_epochs_end_with_a_smaller_batch() -> None:
    batches = global_batches(17, BASE.model_copy(update={"epochs": 2}), seed=0)
    assert [len(batch) for batch in batches] == [8, 8, 1, 8, 8, 1]
    assert sorted(np.concatenate(batches[:3])) == list(range(17))


def test_learning_rate() -> None:
    settings = BASE.model_copy(update={"lr": 1.0, "warmup": 0.05})
    rates = [learning_rate(step, 100, settings) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(1 / 96)
    assert np.allclose(np.diff(rates[4:]), -1 / 96)
    assert learning_rate(1, 1, settings) == 1.0


def test_deepspeed_config_is_filled() -> None:
    config = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {}}
    filled = deepspeed.filled(config, BASE.model_copy(update=HALF), Ranks(0, 2, 0))
    assert filled["train_batch_size"] == 8
    assert filled["train_micro_batch_size_per_gpu"] == 2
    assert filled["gradient_accumulation_steps"] == 2
    assert (filled["bf16"]["enabled"], filled["fp16"]["enabled"]) == (True, False)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"train_batch_size": 4}, "train_batch_size"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
    ],
)
def test_deepspeed_config_must_not_decide(config: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}'"):
        deepspeed.filled(config, BASE, Ranks())


@pytest.mark.parametrize("path", sorted((ROOT / "configs/deepspeed").glob("*.json")), ids=str)
def test_our_deepspeed_configs_can_be_filled(path: Path) -> None:
    filled = deepspeed.filled(json.loads(path.read_text()), BASE, Ranks())
    assert filled["zero_optimization"]["stage"] in (2, 3)


@pytest.mark.parametrize(
    ("settings", "ranks", "examples", "words"),
    [
        ({}, Ranks(), [], "no examples"),
        ({}, Ranks(), [Example([1, 2], 1), Example([1, 2], 2)], "training example 1 has no tokens"),
        ({}, Ranks(0, 3, 0), [Example([1, 2], 1)], "cannot be divided among 3"),
        ({"micro_batch": 3}, Ranks(), [Example([1, 2], 1)], "micro_batch"),
    ],
)
def test_wrong_input_stops_before_the_start(
    tmp_path: Path, settings: dict[str, Any], ranks: Ranks, examples: list[Any], words: str
) -> None:
    run = partial(train, nn.Linear(1, 1), examples, alt_loss)
    with pytest.raises(InputError, match=words):
        run(
            BASE.model_copy(update=settings),
            deepspeed_config={},
            seed=0,
            ranks=ranks,
            checkpoints=Checkpoints(tmp_path),
            log=print,
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight.exp_avg_sq": None}, "have no 'weight.exp_avg_sq'"),
        ({"weight.exp_avg": torch.zeros(2, 13)}, r"a 'weight.exp_avg' of \[2, 13\], not \[1, 13\]"),
        ({"step": None}, "have no 'step'"),
    ],
)
def test_moments_of_other_parameters_are_refused(change: dict[str, Any], words: str) -> None:
    zeros = torch.zeros(1, 13)
    right = {"step": torch.tensor(3.0), "weight.exp_avg": zeros, "weight.exp_avg_sq": zeros}
    check = partial(moments.check, _model("head"), config={"zero_optimization": {}})
    check(right)
    with pytest.raises(InputError, match=words):
        check({name: t for name, t in (right | change).items() if t is not None})


def test_ranks_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert from_environment() == Ranks(0, 1, 0)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(InputError, match="RANK=3"):
        from_environment()
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(InputError, match="'three'"):
        from_environment()
