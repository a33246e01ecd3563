"""What a run says at its start and at its end: losses by how much came before, a sample of its text, the next steps."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import jax

from lss_jax.config.schema import Config, ConfigError
from lss_jax.config.units import shown_size
from lss_jax.generation.decode import Generation
from lss_jax.generation.generate import beginnings
from lss_jax.generation.request import task_and_text
from lss_jax.generation.sampling import Sampling
from lss_jax.models import shown_count
from lss_jax.parallel.layout import layout_on
from lss_jax.parallel.mesh import has_host_memory
from lss_jax.reports.by_position import binned, shown_bin, sums_by_position
from lss_jax.storage.metrics import read_records
from lss_jax.storage.workdir import IMPORTED
from lss_jax.training.host import host_bytes
from lss_jax.training.trainer import Trainer

TOKENS = 200  # of the sample
SAMPLING = Sampling(temperature=0.5, top_k=None, top_p=0.95, seed=0)
BINS = 9  # the last ones: a line of a terminal
MORE = 16  # times as many batches as an evaluation, since each bin has few of their tokens


def learned(trainer: Trainer) -> list[str]:
    """What the model has learned, in lines; every process must ask, since the devices of all compute them."""
    return [*(by_position(trainer) if trainer.task.by_position else ()), *sample(trainer)]


def by_position(trainer: Trainer) -> list[str]:
    """The task's headline metric over the start of the validation split, in bins of what came before."""
    task, split, batches = trainer.task, trainer.splits["valid"], MORE * trainer.config.eval_batches
    sums = sums_by_position(trainer.model, trainer.mesh, trainer.state.params, split, "valid", batches)
    bins = binned(task, sums)[-BINS:]
    heads = [shown_bin(of_bin["before"]) for of_bin in bins]
    cells = [f"{of_bin[task.headline.name]:.2f}" for of_bin in bins]
    widths = [max(map(len, column)) + 2 for column in zip(heads, cells, strict=True)]
    rows = ["".join(map(str.rjust, row, widths)) for row in (heads, cells)]
    return [f"  valid  {task.headline.label} by {task.items} before", *(f"       {row}" for row in rows)]


def sample(trainer: Trainer) -> list[str]:
    """How the model continues the config's prompt; nothing without one, or where it cannot be continued."""
    prompt = trainer.config.sample_prompt.encode()
    if not prompt:
        return []
    if trainer.config.optim.offload and has_host_memory(trainer.mesh):
        return [
            "  no sample: the weights are in the host's memory; `python -m lss_jax.generate` moves them to the devices"
        ]
    try:
        generation = Generation(
            trainer.config, trainer.mesh, trainer.state.params, prompts=[prompt], tokens=TOKENS, sampling=SAMPLING
        )
    except ConfigError as error:
        return [f"  no sample: {error}"]
    text = b"".join([*beginnings(trainer.config, [prompt]), *(new for (new,) in generation)]).decode(errors="replace")
    return ["  sample", *(f"    | {line.rstrip()}" for line in text.splitlines())]


def _generates(config: Config) -> bool:
    """Whether there is a command that continues a prompt."""
    try:
        task_and_text(config)
    except ConfigError:
        return False
    return True


def introduction(trainer: Trainer) -> str:
    """What is about to run: devices, model, data and folder."""
    config, devices = trainer.config, trainer.mesh.devices.flat
    sizes = " x ".join(f"{axis}={size}" for axis, size in trainer.mesh.shape.items())
    layout, attention = layout_on(config, trainer.mesh), config.attention
    part = layout.padded(config.data.seq_len) // layout.devices // layout.parts
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    train = trainer.splits["train"]
    return "\n".join(
        [
            f"devices  {trainer.mesh.size} {devices[0].device_kind}{processes}, mesh {sizes}",
            f"model    {config.model.family}, {shown_count(trainer.model)}, {config.model.dtype}, "
            f"attention {attention.strategy} ({attention.layout}, {trainer.kernel})",
            f"data     {config.data.source}, {len(train):,} {trainer.task.items} to train on; "
            f"a step is {config.data.batch_size} sequences of {config.data.seq_len:,} tokens, {part:,} per device",
            *trainer.task.introduction(train),
            *_start(trainer),
            *_offload(trainer),
            f"workdir  {trainer.workdir}" + (f", going on after step {trainer.step}" if trainer.step else ""),
            *(f"changed  {key} from {then!r} to {now!r}" for key, (then, now) in trainer.changes.items()),
        ]
    )


def _start(trainer: Trainer) -> Iterator[str]:
    """Whose parameters a run at step 0 starts with, if not its own."""
    start = trainer.config.start_from or trainer.workdir / IMPORTED
    if not trainer.step and Path(start).is_dir():
        yield f"start    with the parameters in {start}"


def _offload(trainer: Trainer) -> Iterator[str]:
    """What is to be in the host's memory."""
    sizes = host_bytes(trainer.model, trainer.mesh, trainer.like)
    if sizes and has_host_memory(trainer.mesh):
        parts = " and ".join(f"{shown_size(size)} of {what}" for what, size in sizes.items())
        yield f"offload  asks for {parts} per device in the host's memory"
    elif sizes:
        kind = trainer.mesh.devices.flat[0].device_kind
        yield f"offload  does nothing here: {kind} devices have no memory but the host's"


def conclusion(trainer: Trainer, learned: list[str], again: str) -> str:
    """The last losses and the speed, what was `learned`, the files of the run, and the commands to try next.

    `again` is the command of this run.
    """
    config, workdir = trainer.config, trainer.workdir
    last = {record["split"]: record for record in read_records(workdir / "metrics.jsonl")}
    lines = ["", f"done after {trainer.step} of {config.optim.steps} steps"]
    loss, metric = trainer.task.metrics[0], trainer.task.headline
    for split, note in (("train", "last step"), ("valid", f"first {config.eval_batches} batches")):
        if split in last:
            values = f"{last[split][metric.name]:.4f} {metric.unit}, {last[split][loss.name]:.4f} {loss.unit}"
            lines.append(f"  {split}  {values}  ({note})")
    if "train" in last:
        lines.append(f"  speed  {last['train']['tokens_per_second']:,.0f} tokens/s")
    profile = ", profile/" if (workdir / "profile").is_dir() else ""
    folder, prompt = shlex.quote(str(workdir)), config.sample_prompt
    continues = bool(prompt) and _generates(config)
    lines += [
        *learned,
        f"  files  {workdir}/: checkpoints/, metrics.jsonl, tensorboard/, config.json{profile}",
        "next:",
        *[f"  python -m lss_jax.generate --workdir {folder} --prompt {shlex.quote(prompt)}"] * continues,
        f"  python -m lss_jax.evaluate --workdir {folder} --split test" + " --by-position" * trainer.task.by_position,
        f"  {again} --config.optim.steps={2 * trainer.step}   # train on",
        f"  pip install tensorboard && tensorboard --logdir {folder}",
    ]
    return "\n".join(lines)
