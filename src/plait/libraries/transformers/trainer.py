"""The steps of transformers' `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


class _NoStepsLeft(Exception):
    """A run was ended after its last step, before its result was written."""


class CheckpointError(Exception):
    """A checkpoint could not be loaded; its cause says why."""


def take_steps(trainer: Any, checkpoint: str | None) -> None:
    """Train from a checkpoint on. From that of the last step transformers would take one more; here none is left to take.

    Args:
        trainer: a `Trainer`, at whose end is the state that it has at the end of a training.
        checkpoint: its folder; None for the beginning.

    Raises:
        CheckpointError: anything went wrong between the checkpoint and the first step.
    """
    begun = checkpoint is None

    class ResumeGuard(_callback_class()):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal begun
            begun = True

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= state.max_steps:
                raise _NoStepsLeft  # weights and state are loaded

    trainer.add_callback(ResumeGuard())
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except _NoStepsLeft:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        if begun or isinstance(error, import_module("torch").OutOfMemoryError):
            raise
        raise CheckpointError from error


def report_steps(
    trainer: Any, start: Callable[[int, int], object], step: Callable[[], object], end: Callable[[], object]
) -> None:
    """Call functions as a `Trainer` takes its steps, in place of its own bar and lines.

    Args:
        trainer: a `Trainer`.
        start: takes the number of steps in all, and of those that are done already.
        step: called after each.
        end: called after the last.
    """
    callbacks = import_module("transformers")

    class Steps(_callback_class()):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            start(state.max_steps, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            end()

    for shown in (callbacks.ProgressCallback, callbacks.PrinterCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(Steps())


def _callback_class() -> Any:
    return import_module("transformers").TrainerCallback
