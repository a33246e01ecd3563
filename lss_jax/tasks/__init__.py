"""Tasks: what is learned from what. A new one is one file, and one line in `TASKS`."""

from lss_jax.config.schema import Config, ConfigError
from lss_jax.tasks.language_model import LanguageModel
from lss_jax.tasks.task import Task

TASKS: dict[str, type[Task]] = {"language_model": LanguageModel}


def make_task(config: Config) -> Task:
    """The task of a config.

    Raises:
      ConfigError: no task has that name.
    """
    if config.task not in TASKS:
        raise ConfigError(f"task={config.task!r} is not known; choose one of {', '.join(map(repr, TASKS))}")
    return TASKS[config.task](config)
