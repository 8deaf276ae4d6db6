"""What a tensor does in its network, read from its name and shape: `kind_of(name, shape)`.

Names are conventions, and many: a rule here is a pattern on the components of a name, the first
rule that fits decides, and what fits none is "other". A bias is of its layer's kind. Projections
that a checkpoint fuses (`qkv_proj`, `c_attn`, `in_proj_weight`) are "attention qkv".
"""

import re
from collections.abc import Sequence

ORDER = (
    "embedding", "attention q", "attention k", "attention v", "attention qkv", "attention o",
    "attention", "mlp", "conv", "norm", "head", "other",
)  # fmt: skip

_ATTENTION = re.compile(
    r"^(self_?attn|self_?attention|cross_?attn|cross_?attention|encoder_?attn|encdecattention"
    r"|attn\d?|attention\d?|mha|multihead_attn|mixer_attn|linear_attn)$"
)
_NORM = re.compile(
    r"(^|_)(norm|ln|bn|layernorm|layer_norm|rmsnorm|batchnorm|groupnorm)(_|\d|$)|norm\d*$"
    r"|^(running_mean|running_var|num_batches_tracked)$"
)
_EMBEDDING = re.compile(
    r"embed|^(wte|wpe|word_embeddings|shared|tok_emb|pos_emb|position|positions|pos|cls|cls_token"
    r"|class_token|token_type|relative_attention_bias|rotary|inv_freq)$"
)
_HEAD = re.compile(
    r"^(lm_head|embed_out|head|heads|classifier|score|qa_outputs|output_projection|proj_out"
    r"|cls_head|logits)$"
)
_MLP = re.compile(
    r"^(mlp\d?|ffn|ff|feed_?forward|feedforward|block_sparse_moe|moe|experts|shared_experts?"
    r"|densereludense|gate_proj|up_proj|down_proj|gate_up_proj|fc_?\d|c_fc|fc_in|fc_out|linear_?\d"
    r"|w[123]|wi|wi_\d|wo|up|down|intermediate|dense_h_to_4h|dense_4h_to_h|lin\d)$"
)
_CONV = re.compile(r"(^|_)conv\d*(d|_|$)")
_PARTS = {
    "attention q": re.compile(r"^(q|wq|q_proj|query|q_lin|q_[ab]_proj|to_q|query_proj)$"),
    "attention k": re.compile(r"^(k|wk|k_proj|key|k_lin|to_k|key_proj)$"),
    "attention v": re.compile(r"^(v|wv|v_proj|value|v_lin|to_v|value_proj)$"),
    "attention qkv": re.compile(
        r"^(qkv|qkv_proj|wqkv|query_key_value|c_attn|in_proj|in_proj_weight|in_proj_bias"
        r"|kv_[ab]_proj.*|to_qkv|to_kv|kv)$"
    ),
    "attention o": re.compile(
        r"^(o|o_proj|out_proj|output|dense|c_proj|out_lin|proj|out|to_out|wo|attn_out)$"
    ),
}
# Unmistakable even where no component says "attention".
_ALONE = re.compile(
    r"^([qkv]_proj|qkv_proj|qkv|c_attn|query_key_value|wqkv|in_proj_(weight|bias))$"
)


def kind_of(name: str, shape: Sequence[int] = ()) -> str:
    """Return one of `ORDER` for a tensor: `model.layers.3.self_attn.q_proj.weight` is
    "attention q"."""
    parts = [part.lower() for part in name.split(".")]
    inner = parts[:-1] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts
    words = [part for part in inner if not part.isdigit()]
    if not words:
        return "conv" if len(shape) == 4 else "other"
    if any(_NORM.search(word) for word in words[-2:]):
        return "norm"
    if len(shape) == 4 or any(_CONV.search(word) for word in words[-2:]):
        return "conv"
    attention = [i for i, word in enumerate(words) if _ATTENTION.match(word)]
    if attention or any(_ALONE.match(word) for word in words[-2:]):
        after = words[attention[0] + 1 :] if attention else words[-2:]
        for kind, pattern in _PARTS.items():
            if any(pattern.match(word) for word in after):
                return kind
        if not any(_MLP.match(word) for word in after):
            return "embedding" if any(_EMBEDDING.search(word) for word in after) else "attention"
    if any(_MLP.match(word) for word in words):
        return "mlp"
    if any(_EMBEDDING.search(word) for word in words):
        return "embedding"
    if any(_HEAD.match(word) for word in words) or words in (["fc"], ["output", "dense"]):
        return "head"
    # BERT's feed-forward block ends in `layer.N.output.dense`.
    if len(words) > 2 and words[-2:] == ["output", "dense"]:
        return "mlp"
    return "other"
