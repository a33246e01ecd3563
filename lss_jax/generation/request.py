"""What can be asked of a model: prompts or sources, how many tokens, and how they are chosen."""

from collections.abc import Iterator, Sequence

from lss_jax.attention.strategies import EXACT
from lss_jax.config.schema import Config, ConfigError
from lss_jax.data.text import Tokenizer
from lss_jax.generation.beams import Beams
from lss_jax.generation.programs import reads_source
from lss_jax.generation.sampling import Sampling
from lss_jax.models import FAMILIES
from lss_jax.parallel.layout import SOURCE
from lss_jax.tasks import make_task
from lss_jax.tasks.task import Task


def task_and_text(config: Config) -> tuple[Task, Tokenizer]:
    """The config's task and what its tokens stand for, if it and the model's family can generate.

    Raises:
      ConfigError: one of them cannot, or the tokenizer cannot be read or has more tokens than the model.
    """
    task, family = make_task(config), config.model.family
    text = task.text
    if text is None:
        raise ConfigError(
            f"task={config.task!r} with data.source={config.data.source!r} has no text to generate; give a run on text"
        )
    if not FAMILIES[family].generates:
        able = ", ".join(repr(name) for name, one in FAMILIES.items() if one.generates)
        raise ConfigError(f"model.family={family!r} cannot generate; give a run of one that can: {able}")
    if config.attention.strategy not in EXACT:
        able = ", ".join(map(repr, EXACT))
        raise ConfigError(
            f"attention.strategy={config.attention.strategy!r} cannot generate: a step attends exactly to cached "
            f"keys and values, and so would continue another model than was trained; give a run of one that can: {able}"
        )
    if config.model.vocab < text.vocab:
        raise ConfigError(
            f"data.tokenizer={text.name!r} has {text.vocab} tokens, but the model model.vocab={config.model.vocab}; "
            f"give the tokenizer that the model was trained with"
        )
    return task, text


def check_request(config: Config, prompts: Sequence[bytes], tokens: int, choice: Sampling | Beams) -> None:
    """Raises a ConfigError, with a line per problem, for a request that no text can come from."""
    problems, (_, text) = [*choice.problems()], task_and_text(config)
    if isinstance(choice, Beams) and not reads_source(config):
        able = ", ".join(repr(name) for name, one in FAMILIES.items() if SOURCE in one.sequences)
        problems.append(
            f"--beams={choice.beams} is for models that answer a source, and model.family={config.model.family!r} goes "
            f"on with its prompt; leave it out, or give a run of one of these: {able}"
        )
    if tokens < 1:
        problems.append(f"--tokens={tokens} must be at least 1")
    if not prompts:
        problems.append("there is no prompt; give --prompt TEXT or --prompt-file FILE, several times if you like")
    problems += _problems_of_target(config, tokens) if reads_source(config) else ()
    problems_of = _problems_of_source if reads_source(config) else _problems_of_prompt
    for number, prompt in enumerate(prompts, start=1):
        name = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        problems += _problems_of_text(prompt, name, text) or problems_of(prompt, name, text, config, tokens)
    if problems:
        raise ConfigError("\n".join(problems))


def _problems_of_text(prompt: bytes, name: str, text: Tokenizer) -> list[str]:
    """Whether the tokenizer cannot read a prompt, or makes nothing of it."""
    try:
        length = len(text.tokens_of(prompt))
    except ConfigError as error:
        return [f"{name}: {error}"]
    if prompt and length:
        return []
    return [f"{name} is empty, and there must be something to continue; give at least one byte"]


def _problems_of_source(source: bytes, name: str, text: Tokenizer, config: Config, _: int) -> Iterator[str]:
    length, room = len(text.tokens_of(source)), config.data.source_len
    if config.model.positions == "learned" and length > room:
        yield (
            f"{name} has {length} tokens, more than data.source_len={room} learned positions; cut it, or train with a "
            f'longer data.source_len, or with model.positions="rope", which has no end'
        )


def _problems_of_target(config: Config, tokens: int) -> Iterator[str]:
    if config.model.positions == "learned" and tokens > config.data.seq_len:
        yield (
            f"--tokens={tokens} is more than data.seq_len={config.data.seq_len} learned positions; ask for less, or "
            f'train with a longer data.seq_len, or with model.positions="rope", which has no end'
        )


def _problems_of_prompt(prompt: bytes, name: str, text: Tokenizer, config: Config, tokens: int) -> Iterator[str]:
    separator, prefix, seq_len = config.data.separator, config.attention.prefix, config.data.seq_len
    items, length = make_task(config).items, len(text.tokens_of(prompt))
    if separator and separator.encode() in prompt:
        yield (
            f"{name} has data.separator={separator!r} in it, after which a new document starts that does not attend to "
            f"anything before; give only what follows the last one"
        )
    if length < prefix:
        yield (
            f"{name} has {length} {items}, less than attention.prefix={prefix}, and the model was not trained to "
            f"predict {items} of the prefix; give at least {prefix}"
        )
    if config.model.positions != "learned":
        return
    longer = 'train with a longer data.seq_len, or with model.positions="rope", which has no end'
    if length > seq_len:
        yield f"{name} has {length} {items}, more than data.seq_len={seq_len} learned positions; cut it, or {longer}"
    elif length + tokens - 1 > seq_len:
        yield (
            f"{name} has {length} {items}, and data.seq_len={seq_len} learned positions leave room for "
            f"--tokens={seq_len + 1 - length}, not {tokens}; ask for less, or {longer}"
        )
