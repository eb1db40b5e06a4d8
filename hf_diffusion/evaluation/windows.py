"""A long text in windows that a model can read, each token scored once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` of a text, those before `scored_from` given."""

    start: int
    scored_from: int
    end: int


def cut_windows(num_tokens: int, length: int, stride: int | None = None) -> list[Window]:
    """
    Args:
        num_tokens: of the text, 1 at least.
        length: most tokens in a window.
        stride: tokens scored in every window but the first, which scores all of its own; the tokens before them are
            given, `length` - `stride` or more. None for windows that do not overlap, of which nothing is given.

    Returns:
        Windows that score every token once. All but the first and the last score `stride`; the last one is as long as
        the others if they overlap. `stride` = `length` - 1 is the rolling likelihood of lm-eval.

    Raises:
        ValueError: for numbers out of range.
    """
    if num_tokens < 1:
        raise ValueError("`text` holds no token: there is nothing to score.")
    if length < 1:
        raise ValueError(f"`window` must be at least 1, got {length}.")
    if stride is None:
        return [Window(start, start, min(start + length, num_tokens)) for start in range(0, num_tokens, length)]
    if not 1 <= stride < length:
        raise ValueError(
            f"`stride` must be at least 1 and less than the window of {length} tokens, got {stride}. Leave it out for "
            "windows that do not overlap."
        )
    windows = [Window(0, 0, min(length, num_tokens))]
    while windows[-1].end < num_tokens:
        scored_from = windows[-1].end
        end = min(scored_from + stride, num_tokens)
        windows.append(Window(end - length, scored_from, end))
    return windows
