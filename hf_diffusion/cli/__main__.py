"""`python -m hf_diffusion.cli`, for launchers of modules (`accelerate launch -m hf_diffusion.cli train ...`)."""

import sys

from . import main


sys.exit(main())
