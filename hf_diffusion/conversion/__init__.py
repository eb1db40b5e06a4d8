"""Foreign checkpoints in: one file per source, and a reader of pickled files that runs nothing in them."""

from .causal_lm import from_causal_lm
from .checkpoint_reader import CheckpointError, read_checkpoint
from .imported_checkpoint import CheckpointInfo, ImportedCheckpoint
from .lomdm import convert_lomdm_checkpoint, load_lomdm_checkpoint
from .mdlm import convert_mdlm_checkpoint, load_mdlm_checkpoint


__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "ImportedCheckpoint",
    "convert_lomdm_checkpoint",
    "convert_mdlm_checkpoint",
    "from_causal_lm",
    "load_lomdm_checkpoint",
    "load_mdlm_checkpoint",
    "read_checkpoint",
]
