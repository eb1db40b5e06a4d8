"""How text fills in, at every position at once, for the terminal: as it happens, or by colours afterwards."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import torch


PLACEHOLDER = "·"
COLOURS = (36, 33, 35, 32, 34, 31, 96, 93)
"""ANSI codes, taken in turn by the streams."""
EARLY_TO_LATE = (226, 220, 214, 208, 202, 197, 161, 125, 90, 55)
"""Codes of 256 colours from yellow to violet, for the first to the last pass."""


class LiveView:
    """Redraws the text in place after every step; a file or a pipe only gets the finished text.

    Args:
        tokenizer: decodes single tokens.
        mask_token_id: shown as a dot.
        stream_of: for each position of the canvas, the number that picks its colour; None for no colours.
        seconds_per_step: shortest time that a step stays on the screen.
        file: standard output if not given.
    """

    def __init__(
        self,
        tokenizer: Any,
        mask_token_id: int,
        stream_of: Sequence[int] | None = None,
        seconds_per_step: float = 0.0,
        file: TextIO | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.seconds_per_step = seconds_per_step
        self.file = file or sys.stdout
        self.live = self.file.isatty()
        self.stream_of = stream_of if "NO_COLOR" not in os.environ else None
        self.finished: list[int] = []
        self.lines_drawn = 0

    def put(self, value: torch.Tensor) -> None:
        """Text that will not change any more, [1, length] or [length]."""
        self.finished += _single_row(value)

    def put_draft(self, value: torch.Tensor, **kwargs: Any) -> None:
        """The rest of the canvas after a step, [1, length], with masks."""
        if self.live:
            self._draw(self.finished + _single_row(value))
            time.sleep(self.seconds_per_step)

    def end(self) -> None:
        self._draw(self.finished)
        self.finished, self.lines_drawn = [], 0

    def _draw(self, tokens: list[int]) -> None:
        width, height = shutil.get_terminal_size()
        lines = wrap(self._pieces(tokens), width)
        if self.live:
            # What has scrolled off the screen cannot be drawn over: show the end of a text that does not fit.
            lines = lines[-(height - 1) :]
            up = f"\033[{self.lines_drawn}A" if self.lines_drawn else ""
            self.file.write(f"{up}\r\033[J")
        self.file.write("\n".join(lines) + "\n")
        self.file.flush()
        self.lines_drawn = len(lines)

    def _pieces(self, tokens: list[int]) -> list[tuple[str, int | None]]:
        """Text and colour of every token."""
        pieces = []
        for position, token in enumerate(tokens):
            text = PLACEHOLDER if token == self.mask_token_id else self.tokenizer.decode([token])
            colour = None
            if self.live and self.stream_of is not None and position < len(self.stream_of):
                colour = COLOURS[self.stream_of[position] % len(COLOURS)]
            pieces.append((text, colour))
        return pieces


def colour_by_step(tokenizer: Any, drawn: list[tuple[int, int]]) -> str:
    """A text with every token in the colour of the pass it was drawn in, from yellow to violet; given ones plain.

    Where the environment variable NO_COLOR is set, tokens are followed by the number of their pass in place of it.

    Args:
        drawn: every token and its pass, -1 for a given one.
    """
    last = max((step for _, step in drawn), default=0)
    text, shown, tokens = "", "", []
    for index, (token, step) in enumerate(drawn):
        tokens.append(token)
        decoded = tokenizer.decode(tokens)
        if decoded.endswith("\N{REPLACEMENT CHARACTER}") and index < len(drawn) - 1:
            continue  # part of a character, which the next token ends
        piece, shown = decoded[len(shown) :], decoded
        if step < 0:
            text += piece
        elif "NO_COLOR" in os.environ:
            text += piece + str(step).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
        else:
            colour = EARLY_TO_LATE[step * (len(EARLY_TO_LATE) - 1) // max(last, 1)]
            text += f"\033[38;5;{colour}m{piece}\033[0m"
    return text


def wrap(pieces: list[tuple[str, int | None]], width: int) -> list[str]:
    """Lines of at most `width` characters; colour codes take no room."""
    lines, column = [""], 0
    for text, colour in pieces:
        for index, part in enumerate(text.split("\n")):
            if index:
                lines.append("")
                column = 0
            for start in range(0, len(part), width):
                chunk = part[start : start + width]
                if column + len(chunk) > width:
                    lines.append("")
                    column = 0
                lines[-1] += f"\033[{colour}m{chunk}\033[0m" if colour else chunk
                column += len(chunk)
    return lines


def _single_row(value: torch.Tensor) -> list[int]:
    if value.ndim > 1:
        if value.shape[0] > 1:
            raise ValueError(f"A live view shows one text, got a batch of {value.shape[0]}. Generate them one by one.")
        value = value[0]
    return value.tolist()
