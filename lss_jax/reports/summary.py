"""What a finished run has learned: its headline metric by how much came before, and a sample of its text."""

import numpy as np

from lss_jax.config.schema import ConfigError
from lss_jax.generation.decode import Generation, task_of
from lss_jax.generation.sampling import Sampling
from lss_jax.reports.by_position import binned, shown_bin, sums_by_position
from lss_jax.training.trainer import Trainer

PROMPT = 32  # items at the start of the validation split
SAMPLING = Sampling(temperature=0.7, top_k=None, top_p=0.95, seed=0)
BINS = 9  # the last ones: a line of a terminal


def lines_of(trainer: Trainer) -> list[str]:
    """The lines; every process must ask, since the devices of all compute them."""
    return [*by_position(trainer), *sample(trainer)]


def by_position(trainer: Trainer) -> list[str]:
    """The task's headline metric over the first `eval_batches` of the validation split, in bins of what came before."""
    task, split, batches = trainer.task, trainer.splits["valid"], trainer.config.eval_batches
    sums = sums_by_position(trainer.model, trainer.mesh, trainer.state.params, split, "valid", batches)
    bins = binned(task, sums)[-BINS:]
    heads = [shown_bin(of_bin["before"]) for of_bin in bins]
    cells = [f"{of_bin[task.headline.name]:.2f}" for of_bin in bins]
    widths = [max(map(len, column)) + 2 for column in zip(heads, cells, strict=True)]
    rows = ["".join(map(str.rjust, row, widths)) for row in (heads, cells)]
    return [f"  valid  {task.headline.label} by {task.items} before", *(f"       {row}" for row in rows)]


def sample(trainer: Trainer) -> list[str]:
    """How the model goes on from the start of the validation split; nothing where there is no text to generate."""
    config, count = trainer.config, trainer.config.sample_tokens
    if not count:
        return []
    try:
        task_of(config)
        prompt = bytes(np.asarray(trainer.splits["valid"].data[:PROMPT]))
        generation = Generation(config, trainer.mesh, trainer.state.params, [prompt], count, SAMPLING)
    except ConfigError:  # another task or family, or a prompt that this config cannot go on from
        return []
    text = b"".join([prompt, *(new for (new,) in generation)]).decode(errors="replace")
    return [
        f"  sample  {count} {trainer.task.items} behind the first {PROMPT} of the validation split",
        *indented(text),
    ]


def indented(text: str) -> list[str]:
    """The lines of a text, set off from what is said of it."""
    return [f"    | {line}" for line in text.splitlines()]
