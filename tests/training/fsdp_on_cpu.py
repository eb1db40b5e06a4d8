"""Runs `hf-diffusion` as `accelerate launch --use_fsdp` does on GPUs, on CPU processes.

Accelerate 1.15 leaves FSDP out where it finds CPUs only, and says nothing; the rest of it, and PyTorch's FSDP2 on gloo,
do work there. So the one decision is taken for it.
"""

import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from hf_diffusion.cli import main


initialize = AcceleratorState.__init__


def initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = initialize_with_fsdp
sys.exit(main(sys.argv[1:]))
