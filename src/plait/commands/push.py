"""`plait push`, `plait.push`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plait.verification.publish import PushResult, push_result


@dataclass(frozen=True)
class PushOrder:
    """An upload that is asked for; see `plait.push`."""

    folder: Path
    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None

    def run(self) -> PushResult:
        """Upload the folder.

        Raises:
            PlaitError: the folder is not a complete result, or the Hub refuses.
        """
        return push_result(
            self.folder,
            self.repo,
            private=self.private,
            revision=self.revision,
            create_pr=self.create_pr,
            message=self.message,
        )
