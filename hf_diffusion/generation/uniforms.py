"""The random numbers of a generation: drawn before the first pass, and bound to rows and positions."""

import torch


def draw_uniforms(
    to_fill: torch.Tensor, num_planes: int, generator: torch.Generator | None, seeds: list[int] | None
) -> torch.Tensor:
    """Float64 [batch, planes, length] in [0, 1); 0 where nothing is to be filled.

    Row after row and plane after plane, the positions to fill take their numbers from left to right. So a row has the
    same numbers whatever it is batched with, if it has a seed of its own; and with one generator, however the rows are
    split over calls.

    Args:
        to_fill: bool [batch, length].
        generator: torch's global one if not given.
        seeds: one for each row, in place of a generator.
    """
    counts = (num_planes * to_fill.sum(dim=1)).tolist()
    if seeds is None:
        drawn = torch.rand(sum(counts), dtype=torch.float64, generator=generator)
    else:
        of_rows = [
            torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for count, seed in zip(counts, seeds, strict=True)
        ]
        drawn = torch.cat(of_rows)
    where = to_fill[:, None].expand(-1, num_planes, -1)
    return torch.zeros(where.shape, dtype=torch.float64, device=where.device).masked_scatter(
        where, drawn.to(where.device)
    )


def seeds_of_rows(seed: int | list[int] | None, num_rows: int) -> list[int] | None:
    """A seed for each row: `seed`, `seed` + 1, ...; or the given ones.

    Raises:
        ValueError: unless it is an integer, or as many as there are rows.
    """
    if seed is None:
        return None
    seeds = list(range(seed, seed + num_rows)) if isinstance(seed, int) else seed
    valid = isinstance(seeds, list | tuple) and all(isinstance(one, int) and 0 <= one < 2**63 for one in seeds)
    if isinstance(seed, bool) or not valid or len(seeds) != num_rows:
        raise ValueError(
            f"`seed` must be an integer from 0 to 2^63 - 1, or a list of one for each of the {num_rows} texts; got "
            f"{seed!r}."
        )
    return list(seeds)
