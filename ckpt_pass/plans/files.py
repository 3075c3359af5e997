"""Values that are written to files as JSON, and read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

from ckpt_pass.plans.reading import read_plan_text


class PlanFile(ABC):
    """What has a text can be saved and loaded."""

    @abstractmethod
    def to_json(self) -> str:
        """It as JSON: the same text for the same value."""

    @classmethod
    @abstractmethod
    def from_json(cls, text: str) -> Self:
        """What a JSON text describes; nothing in it is evaluated.

        Raises:
            PlanFileError: the text is none of these, or was changed after it was written.
        """

    def save(self, path: str | Path) -> Path:
        """Write it to a file; return its path."""
        path = Path(path)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read it from a file.

        Raises:
            PlanFileError: the file is none of these, or was changed after it was written.
            OSError: the file cannot be read.
        """
        return cls.from_json(read_plan_text(Path(path)))
