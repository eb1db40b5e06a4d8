"""The layout of published MDLM weights, and how transformers renames it to ours when it loads them.

The reference implementation and its siblings share one set of names (`backbone.blocks.0.attn_qkv.weight`, ...). They go
through transformers' own hook, so `from_pretrained` reads published files as they are.
"""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming


def register_published_layout(model_type: str) -> None:
    """Make transformers read published weights into models of `model_type`; safe to call twice."""
    register_checkpoint_conversion_mapping(model_type, _renamings(), overwrite=True)


def _renamings() -> list[WeightRenaming | WeightConverter]:
    # One after the other; patterns further down see what those above have made of a name.
    return [
        WeightRenaming(r"^backbone\.vocab_embed\.embedding", "model.embed_tokens.weight"),
        WeightRenaming(r"^backbone\.sigma_map\.mlp\.0\.", "model.noise_embedding.in_proj."),
        WeightRenaming(r"^backbone\.sigma_map\.mlp\.2\.", "model.noise_embedding.out_proj."),
        WeightRenaming(r"^backbone\.output_layer\.norm_final\.", "model.norm."),
        WeightRenaming(r"^backbone\.output_layer\.adaLN_modulation\.", "model.final_shift_scale."),
        WeightRenaming(r"^backbone\.output_layer\.linear\.", "lm_head."),
        WeightRenaming(r"^backbone\.rotary_emb\.", "model.rotary_emb."),
        WeightRenaming(r"^backbone\.blocks\.", "model.layers."),
        WeightRenaming(r"\.norm1\.", ".input_layernorm."),
        WeightRenaming(r"\.norm2\.", ".post_attention_layernorm."),
        WeightRenaming(r"\.adaLN_modulation\.", ".modulation."),
        WeightRenaming(r"\.attn_out\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.mlp\.0\.", ".mlp.up_proj."),
        WeightRenaming(r"\.mlp\.2\.", ".mlp.down_proj."),
        WeightConverter(
            r"\.attn_qkv\.weight",
            [".self_attn.q_proj.weight", ".self_attn.k_proj.weight", ".self_attn.v_proj.weight"],
            operations=[Chunk(dim=0)],
        ),
    ]
