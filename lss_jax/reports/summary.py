"""What a finished run has learned: its headline metric by how much came before, and a sample of its text."""

from lss_jax.config.schema import ConfigError
from lss_jax.generation.decode import Generation
from lss_jax.generation.sampling import Sampling
from lss_jax.reports.by_position import binned, shown_bin, sums_by_position
from lss_jax.training.trainer import Trainer

TOKENS = 200  # of the sample
SAMPLING = Sampling(temperature=0.5, top_k=None, top_p=0.95, seed=0)
BINS = 9  # the last ones: a line of a terminal
MORE = 16  # times as many batches as an evaluation, since each bin has few of their tokens


def lines_of(trainer: Trainer) -> list[str]:
    """The lines; every process must ask, since the devices of all compute them."""
    return [*by_position(trainer), *sample(trainer)]


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
    try:
        generation = Generation(
            trainer.config, trainer.mesh, trainer.state.params, prompts=[prompt], tokens=TOKENS, sampling=SAMPLING
        )
    except ConfigError as error:
        return [f"  no sample: {error}"]
    text = b"".join([prompt, *(new for (new,) in generation)]).decode(errors="replace")
    return ["  sample", *(f"    | {line.rstrip()}" for line in text.splitlines())]
