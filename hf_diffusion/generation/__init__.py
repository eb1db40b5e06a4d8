"""How text is drawn from a masked-diffusion model: what comes next, which token, and what is seen of it on the way."""
