"""`FunctionReward`: a plain Python function as a reward."""

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from itertools import dropwhile
from typing import Any, ClassVar

from hybrid_lightning.errors import ConfigError, DataError, RewardError, shorten
from hybrid_lightning.rewards.reward_function import RewardFunction
from hybrid_lightning.rewards.terms import name_completion
from hybrid_lightning.shared.user_calls import await_all, run_async
from hybrid_lightning.shared.user_code import describe_error, load_function
from hybrid_lightning.types import Prompt

logger = logging.getLogger(__name__)
_KINDS = {"bool": "true or false", "int": "a number", "float": "a number", "str": "text"}
_BATCH, _SINGLE = ("completions", "prompts"), ("completion", "prompt")


class FunctionReward(RewardFunction):
    """Scores completions with a Python function of your own.

    For example

        def brevity(completions, **columns): return [float(len(text) < 200) for text in completions]
        def close(completion, answer, tolerance): return float(abs(float(completion) - float(answer)) < tolerance)

    A function with a parameter `completions` gets all B completions at once and returns B numbers; a function with a parameter
    `completion` is called for each completion. Other parameters are filled by name: `prompts` or `prompt` (objects of class
    `Prompt`), `answer` (the reference answer), `set_name`, and any column of the data. In a function of `completions` they are
    lists of length B, as in TRL, and `**columns` receives all columns. A parameter with a default may be missing from the data,
    and `arguments` may give a value to any parameter that is not a column. Completions are texts, even if prompts are messages.

    A function may be `async`. A function of one `completion` then runs for several completions at the same time, starting when
    the first completion has ended, while the policy still generates others (see `overlap`).

    Args:
        function: `package.module.function` or `path/to/file.py:function`; in Python also the function itself, or any other
            callable object. A checkpoint stores only the path.
        timeout_s: Longest wall time of a call in seconds (one call per batch, or per completion); None for no limit. After a
            timeout an asynchronous function is cancelled; an ordinary one continues in its thread, and may still use a processor.
        on_timeout: Reward of a completion if its call takes too long; None stops training with an error that names the row.
        concurrency: Number of asynchronous calls, or with `overlap` calls of any kind, in progress at the same time.
        measures_correctness: Whether a value of 1.0 means that the answer is right; accuracy is computed from such rewards.
        name: Name in logs; None for the function's name.
        arguments: Parameter of the function -> its value, the same for all completions, such as `{tolerance: 0.2}`.
        overlap: Whether completions are scored as they arrive, while the policy still generates others. Each then gets its own
            call, in a thread, at the same time as others and in any order; a function of `completions` gets one at a time. true
            suits slow functions, such as calls over HTTP; they must be thread-safe. false scores all completions together at the
            end. null is true for asynchronous functions of one `completion`, and false for others.

    Raises:
        ConfigError: If the function does not exist, it has neither `completions` nor `completion`, or `arguments` do not fit it.
    """

    batches_only: ClassVar[bool] = False

    def __init__(
        self,
        function: str | Callable[..., Any],
        timeout_s: float | None = None,
        on_timeout: float | None = None,
        concurrency: int = 64,
        measures_correctness: bool = True,
        name: str | None = None,
        arguments: dict[str, Any] | None = None,
        overlap: bool | None = None,
    ) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"FunctionReward: timeout_s={timeout_s}; give a positive number of seconds, or null for no limit")
        if on_timeout is not None and timeout_s is None:
            raise ConfigError(f"FunctionReward: on_timeout={on_timeout} has no effect without a limit; set timeout_s")
        if concurrency < 1:
            raise ConfigError(f"FunctionReward: concurrency={concurrency}; give at least 1")
        self._given = None if isinstance(function, str) else function
        self.function = function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__name__)
        self.timeout_s, self.on_timeout, self.concurrency = timeout_s, on_timeout, concurrency
        self.measures_correctness = measures_correctness
        loaded = self._loaded()
        self._name = name or getattr(loaded, "__name__", None)
        if isinstance(loaded, type):
            raise ConfigError(f"function={self.function!r} is a class; to use your own reward class, set class_path instead")
        parameters = inspect.signature(loaded).parameters
        self.batched = "completions" in parameters
        if self.batched == ("completion" in parameters):
            raise ConfigError(
                f"function={self.function!r} has the parameters {', '.join(parameters) or 'none'}; name one of them completions "
                "to receive a whole batch, or completion to be called for each"
            )
        if self.batches_only and not self.batched:
            raise ConfigError(f"{type(self).__name__}: {self.function} has no parameter completions; use FunctionReward")
        self._own = _BATCH if self.batched else _SINGLE
        named = {
            name: entry for name, entry in parameters.items() if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)
        }
        own = parameters[self._own[0]]
        if own.name not in named:
            raise ConfigError(f"function={self.function!r} takes {own} only by position; write the parameter as {own.name}")
        self.arguments = dict(arguments or {})
        free = {name: entry for name, entry in named.items() if name not in self._own}
        self.wanted = [name for name in free if name not in self.arguments]  # facts about a prompt
        self.needed = [name for name in self.wanted if free[name].default is inspect.Parameter.empty]
        self.takes_prompts = self._own[1] in parameters
        self.takes_all = any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
        self._check_arguments(free)
        call = loaded if inspect.isroutine(loaded) else type(loaded).__call__
        self.asynchronous = inspect.iscoroutinefunction(call)
        self.overlap = self.asynchronous and not self.batched if overlap is None else overlap

    def overlaps(self, prompt: Prompt) -> int:
        """`concurrency` with `overlap`, else 0."""
        return self.concurrency if self.overlap else 0

    def to_config(self) -> dict[str, Any]:
        """As for other rewards; a callable object is described by its class, which cannot be loaded again."""
        config = super().to_config()
        function = config["init_args"]["function"]
        if not isinstance(function, str):
            config["init_args"]["function"] = f"{type(function).__module__}.<{type(function).__qualname__}>"
        return config

    def _loaded(self) -> Callable[..., Any]:
        return load_function(self.function) if self._given is None else self._given

    def _check_arguments(self, free: dict[str, inspect.Parameter]) -> None:
        for name, value in self.arguments.items():
            if name in (*_BATCH, *_SINGLE, "answer", "set_name"):
                raise ConfigError(
                    f"arguments.{name}={shorten(value)}: the run itself passes {name} to {self.function}; leave it out"
                )
            if name not in free and not self.takes_all:
                raise ConfigError(
                    f"arguments.{name}={shorten(value)}: {self.function} has no such parameter to set; it has "
                    f"{', '.join(free) or 'none'}"
                )
            kind = _kind(free[name]) if name in free else None
            if kind is not None and value is not None and _KINDS.get(type(value).__name__) != kind:
                raise ConfigError(f"arguments.{name}={shorten(value)}; give {kind}, as {self.function} expects")

    def check_prompt(self, prompt: Prompt) -> None:
        """Check that the row has every column that the function needs, and no column that is also in `arguments`."""
        values = _values(prompt)
        for name in self.arguments.keys() & values.keys():
            raise DataError(
                f"arguments.{name} of reward function {self.function} is also a column of {prompt.place}; leave it out, or "
                "rename the parameter"
            )
        for name in self.needed:
            if name not in values:
                raise DataError(
                    f"reward function {self.function} needs {name!r}, but {prompt.place} has no such column; it has "
                    f"{', '.join(values) or 'none'}; rename the parameter, or give it a default"
                )

    def decided_by_time(self) -> str | None:
        """A warning if `on_timeout` is set: the machine's load then affects rewards. If not, a timeout is an error."""
        if self.on_timeout is None:
            return None
        return (
            f"a call of {self.function} earns on_timeout={self.on_timeout:g} if it takes more than timeout_s={self.timeout_s:g}, "
            "even if the machine is busy; leave out on_timeout, so that a timeout is an error, or raise timeout_s"
        )

    def __call__(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Any:
        """Call the function for B completions. `evaluate_reward` checks its result."""
        for prompt in prompts:
            self.check_prompt(prompt)
        return self._batch(completions, prompts) if self.batched else self._each(completions, prompts)

    def _batch(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> Any:
        """Call a function of `completions` once for all of them."""
        rows = [_values(prompt) for prompt in prompts]
        names = self._asked(name for row in rows for name in row)
        call = self._call(list(completions), list(prompts), {name: [row.get(name) for row in rows] for name in names})
        (value,) = self._outcomes([call])
        if isinstance(value, TimeoutError) and self.timeout_s is not None and completions:
            where = f"for a batch of {len(completions)} completions, the first {name_completion(completions[0], prompts[0])}"
            return [self._late(where, value)] * len(completions)
        if isinstance(value, TypeError) and not self.batches_only and prompts[0].messages is not None:
            value = TypeError(f"{value}; completions are texts; for messages use TRLReward(function)").with_traceback(
                value.__traceback__
            )
        if isinstance(value, BaseException):
            raise value
        return value

    def _each(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[Any]:
        """Call a function of `completion` for each of them."""
        calls = []
        for completion, prompt in zip(completions, prompts, strict=True):
            row = _values(prompt)
            calls.append(self._call(completion, prompt, {name: row[name] for name in self._asked(row)}))
        return [self._checked(*row) for row in zip(self._outcomes(calls), completions, prompts, strict=True)]

    def _asked(self, names: Iterable[str]) -> list[str]:
        """The subset of the names that the function takes."""
        return [name for name in dict.fromkeys(names) if name in self.wanted or self.takes_all]

    def _outcomes(self, calls: list[Callable[[], Any]]) -> list[Any]:
        """The result of each call, or the exception that it raises."""
        if self.asynchronous or self.timeout_s is not None:
            together = self.concurrency if self.asynchronous else 1
            return run_async(await_all(calls, self.timeout_s, together))  # type: ignore[no-any-return]
        values: list[Any] = []
        for call in calls:
            try:
                values.append(call())
            except Exception as error:
                values.append(error)
        return values

    def _call(self, completions: Any, prompts: Any, arguments: dict[str, Any]) -> Callable[[], Any]:
        """The function with all its arguments bound."""
        own = {self._own[0]: completions, **({self._own[1]: prompts} if self.takes_prompts or self.takes_all else {})}
        return partial(self._loaded(), **{**arguments, **deepcopy(self.arguments), **own})

    def _checked(self, value: Any, completion: str, prompt: Prompt) -> Any:
        """The value of one call; raises its exception again, with the row and the completion."""
        if isinstance(value, TimeoutError) and self.timeout_s is not None:
            return self._late(name_completion(completion, prompt), value)
        if isinstance(value, BaseException):
            raise RewardError(
                f"reward function {self.function} raised {describe_error(value)} {name_completion(completion, prompt)}"
            ) from value
        return value

    def _late(self, where: str, error: BaseException) -> float:
        """The reward for a call that took too long; raises the error if there is none."""
        late = f"reward function {self.function} took more than timeout_s={self.timeout_s:g} s {where}"
        if self.on_timeout is None:
            raise RewardError(f"{late}; raise timeout_s, or set on_timeout to the reward of such a completion") from error
        logger.warning("%s; it earns on_timeout=%g", late, self.on_timeout)
        return self.on_timeout


class TRLReward(FunctionReward):
    """Scores completions with an unchanged TRL reward function: `f(prompts, completions, answer, **kwargs)`.

    It differs from `FunctionReward` only if prompts are messages. Each of `prompts` is then a list of messages, and each of
    `completions` is the list of messages after the prompt: one from the policy, and in episodes also messages from tools and
    environments. Columns of the data are passed by name. TRL also passes `completion_ids`, `trainer_state` and functions for
    logging; these are not available here.

    Raises:
        ConfigError: As for `FunctionReward`, or if the function has no parameter `completions`.
    """

    batches_only = True

    def _call(self, completions: Any, prompts: Any, arguments: dict[str, Any]) -> Callable[[], Any]:
        theirs = [_messages(completion, prompt) for completion, prompt in zip(completions, prompts, strict=True)]
        asked = [prompt.text if prompt.messages is None else deepcopy(list(prompt.messages)) for prompt in prompts]
        return super()._call(theirs, asked, arguments)


def _messages(completion: str, prompt: Prompt) -> Any:
    """A completion as TRL passes it to reward functions."""
    if prompt.messages is None:
        return completion
    episode = getattr(completion, "episode", None)
    if episode is not None:
        return [dict(message) for message in dropwhile(lambda message: message["role"] != "assistant", episode.messages)]
    return [{"role": "assistant", "content": str(completion)}]


def _kind(parameter: inspect.Parameter) -> str | None:
    """A parameter's type in words, from its annotation or else its default; None if neither is a plain type."""
    wanted = parameter.annotation
    if wanted is parameter.empty:
        wanted = type(parameter.default)
    return _KINDS.get(wanted if isinstance(wanted, str) else getattr(wanted, "__name__", ""))


def _values(prompt: Prompt) -> dict[str, Any]:
    """Name -> value of everything about a prompt that a function can receive as a parameter."""
    answer = {} if prompt.answer is None else {"answer": prompt.answer}
    return {**prompt.columns, **answer, "set_name": prompt.set_name}
