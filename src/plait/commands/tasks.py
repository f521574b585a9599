"""`plait tasks check`, `plait.check_tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.tasks.checking import TaskCheck, check_task
from plait.tasks.loading import load_tasks
from plait.tasks.tokenizers import load_task_processor, load_task_tokenizer


@dataclass(frozen=True)
class CheckTasksOrder:
    """A look at tasks that is asked for; see `plait.check_tasks`."""

    tasks: Sequence[str | Path]
    model: str | None = None
    trust_remote_code: bool = False

    def run(self) -> list[TaskCheck]:
        """Describe every task.

        Raises:
            PlaitError: files or data that cannot be read, rows that do not fit; or the model has no tokenizer.
        """
        loaded = load_tasks(self.tasks)
        perceived = [getattr(task, "file_column", None) is not None for task in loaded]
        chats = [files and getattr(task, "messages", None) is not None for task, files in zip(loaded, perceived, strict=True)]
        tokenizer = processor = None
        if self.model is not None and not all(perceived):
            tokenizer = load_task_tokenizer(self.model, trust_remote_code=self.trust_remote_code)
        if self.model is not None and any(chats):
            processor = load_task_processor(self.model, trust_remote_code=self.trust_remote_code)
        return [
            check_task(task, None if files else tokenizer, processor if chat else None)
            for task, files, chat in zip(loaded, perceived, chats, strict=True)
        ]
