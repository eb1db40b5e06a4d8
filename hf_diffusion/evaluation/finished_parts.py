"""What an interrupted evaluation has finished, in a file from which the next run goes on."""

import json
from pathlib import Path
from typing import Any


class FinishedParts:
    """JSON lines: the settings, then one line for each part as soon as it is finished.

    Args:
        path: of the file; None keeps nothing.
        settings: what the parts depend on, fit for JSON.

    Attributes:
        parts: the finished parts by number.

    Raises:
        ValueError: if the file holds parts of other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.parts: dict[int, dict[str, Any]] = {}
        if path is None:
            return
        # What was cut off while it was written is done again.
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole_lines = text[: text.rfind("\n") + 1]
        if whole_lines:
            self._read(whole_lines, settings)
        path.write_text(whole_lines or json.dumps(settings) + "\n", encoding="utf-8")

    def add(self, number: int, part: dict[str, Any]) -> None:
        """Keep a part."""
        self.parts[number] = part
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, part]) + "\n")

    def remove_file(self) -> None:
        """Once everything is finished."""
        if self.path is not None:
            self.path.unlink()

    def _read(self, whole_lines: str, settings: dict[str, Any]) -> None:
        first, *lines = whole_lines.splitlines()
        found = json.loads(first)
        if found != json.loads(json.dumps(settings)):
            other = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
            raise ValueError(
                f"{str(self.path)!r} holds parts of an evaluation with other settings ({', '.join(sorted(other))}). "
                "Delete it, or name another output."
            )
        self.parts = dict(json.loads(line) for line in lines)
