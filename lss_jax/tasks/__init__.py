"""Tasks: what is learned from what. A new one is one file, and one line in `TASKS`."""

from collections.abc import Iterator

from lss_jax.config.schema import Config, ConfigError, unknown_choice
from lss_jax.tasks.language_model import LanguageModel
from lss_jax.tasks.masked_language_model import MaskedLanguageModel
from lss_jax.tasks.sequence_label import SequenceLabel
from lss_jax.tasks.task import Task
from lss_jax.tasks.token_labels import TokenLabels

TASKS: dict[str, type[Task]] = {
    "language_model": LanguageModel,
    "masked_language_model": MaskedLanguageModel,
    "token_labels": TokenLabels,
    "sequence_label": SequenceLabel,
}


def make_task(config: Config) -> Task:
    """The task of a config.

    Raises:
      ConfigError: no task has that name.
    """
    if config.task not in TASKS:
        raise ConfigError(unknown_choice("task", config.task, TASKS))
    return TASKS[config.task](config)


def task_problems(config: Config) -> Iterator[str]:
    """What of the config its task cannot work with, a line each."""
    yield from make_task(config).problems() if config.task in TASKS else [unknown_choice("task", config.task, TASKS)]
