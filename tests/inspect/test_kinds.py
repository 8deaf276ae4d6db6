import pytest

from pluribus.inspect.kinds import ORDER, kind_of

NAMES = {
    "model.embed_tokens.weight": ((320, 64), "embedding"),
    "model.layers.3.self_attn.q_proj.weight": ((64, 64), "attention q"),
    "model.layers.3.self_attn.k_proj.bias": ((64,), "attention k"),
    "model.layers.3.self_attn.v_proj.weight": ((64, 64), "attention v"),
    "model.layers.3.self_attn.o_proj.weight": ((64, 64), "attention o"),
    "model.layers.3.self_attn.q_norm.weight": ((16,), "norm"),
    "model.layers.3.mlp.gate_proj.weight": ((96, 64), "mlp"),
    "model.layers.3.mlp.experts.5.down_proj.weight": ((64, 96), "mlp"),
    "model.layers.3.input_layernorm.weight": ((64,), "norm"),
    "model.layers.3.post_attention_layernorm.weight": ((64,), "norm"),
    "model.norm.weight": ((64,), "norm"),
    "lm_head.weight": ((320, 64), "head"),
    "bert.embeddings.word_embeddings.weight": ((320, 64), "embedding"),
    "bert.embeddings.LayerNorm.weight": ((64,), "norm"),
    "bert.encoder.layer.0.attention.self.query.weight": ((64, 64), "attention q"),
    "bert.encoder.layer.0.attention.self.value.bias": ((64,), "attention v"),
    "bert.encoder.layer.0.attention.output.dense.weight": ((64, 64), "attention o"),
    "bert.encoder.layer.0.attention.output.LayerNorm.bias": ((64,), "norm"),
    "bert.encoder.layer.0.intermediate.dense.weight": ((96, 64), "mlp"),
    "bert.encoder.layer.0.output.dense.weight": ((64, 96), "mlp"),
    "transformer.wte.weight": ((320, 64), "embedding"),
    "transformer.h.0.ln_1.weight": ((64,), "norm"),
    "transformer.h.0.attn.c_attn.weight": ((64, 192), "attention qkv"),
    "transformer.h.0.attn.c_proj.weight": ((64, 64), "attention o"),
    "transformer.h.0.mlp.c_proj.weight": ((96, 64), "mlp"),
    "encoder.block.0.layer.0.SelfAttention.k.weight": ((64, 64), "attention k"),
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": ((64, 96), "mlp"),
    "visual.conv1.weight": ((64, 3, 8, 8), "conv"),
    "visual.transformer.resblocks.0.attn.in_proj_weight": ((192, 64), "attention qkv"),
    "visual.transformer.resblocks.0.attn.out_proj.bias": ((64,), "attention o"),
    "blocks.1.2.conv_dw.weight": ((32, 1, 3, 3), "conv"),
    "layer1.0.bn2.running_mean": ((32,), "norm"),
    "layer1.0.downsample.0.weight": ((32, 16, 1, 1), "conv"),
    "fc.weight": ((10, 64), "head"),
    "0.weight": ((10, 64), "other"),
    "temperature": ((), "other"),
}


@pytest.mark.parametrize("name", NAMES)
def test_kinds(name):
    shape, kind = NAMES[name]
    assert kind_of(name, shape) == kind
    assert kind in ORDER
