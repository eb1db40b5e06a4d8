"""What the papers report at their own scale, to be read beside a comparison's rows and not against them.

Models of 110 to 170 million parameters, OpenWebText or LM1B, 10^11 tokens and more.
"""

PERPLEXITY = {
    "autoregressive": "LM1B 22.83",
    "mdlm": "LM1B ≤ 31.78 (1M steps)",
    "lomdm": "LM1B ≤ 27.2",
    "armd": "not in the paper",
    "armd_strided": "not reported",
    "armd_paper": "LM1B 23.64 (300K steps), 22.36 (1M)",
}
"""Test perplexity per token on LM1B, packed texts of 128 (arXiv 2601.16971, Table 3; arXiv 2602.02112)."""

GENERATION = {
    "autoregressive": "~36 (5.6)",
    "armd, S=1": "36.5 (5.5)",
    "armd, S=2": "37.8 (5.5)",
    "armd, S=4": "39.4 (5.5)",
    "mdlm": "~103 (5.6), 1024 steps; 79.4 at 256 passes",
    "lomdm": "74.0 at 256 passes",
}
"""Generative perplexity under GPT-2 large (unigram entropy in nats), OpenWebText, texts of 1024 tokens.

ARMD, AR and MDLM: arXiv 2601.16971, Table 2, 80K steps of strided training, whose entropies of 8 are taken to be bits.
At 256 passes: arXiv 2602.02112.
"""

TRAINING = {
    "armd": "300K steps against 1M of MDLM",
    "lomdm": "180K steps to where MDLM is after 1M",
}
"""Claims about steps of training."""
