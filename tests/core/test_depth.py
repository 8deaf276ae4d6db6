import numpy as np
import pytest

from pluribus.core.depth import depth_map, is_tail
from pluribus.core.errors import InputError


def shapes(*names, size=4):
    return dict.fromkeys(names, (size, size))


def test_the_block_number_counts_and_not_an_inner_one():
    names = [f"blocks.{i}.mlp.{j}.weight" for i in range(5) for j in (0, 2)]
    depth = depth_map(shapes(*names))
    assert depth.layers["blocks.3.mlp.0.weight"] == 3
    assert depth.count == 5


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.{}.self_attn.q_proj.weight", 4),
        ("bert.encoder.layer.{}.attention.self.query.weight", 12),
        ("transformer.h.{}.mlp.c_fc.weight", 3),
        ("visual.transformer.resblocks.{}.attn.in_proj_weight", 12),
        ("vit.blocks.{}.mlp.fc1.weight", 12),
        ("features.{}.weight", 5),
    ],
)
def test_common_names(pattern, count):
    depth = depth_map(
        {**shapes(*(pattern.format(i) for i in range(count))), "embed.weight": (9, 4)}
    )
    assert depth.count == count
    assert [depth.layers[pattern.format(i)] for i in range(count)] == list(range(count))
    assert depth.outside == ["embed.weight"]


def test_resnet_stages_are_blocks():
    names = [f"layer{k}.{i}.conv{j}.weight" for k in range(1, 5) for i in range(2) for j in (1, 2)]
    depth = depth_map({"conv1.weight": (3, 3), **shapes(*names), "fc.weight": (10, 4)})
    assert depth.count == 4
    assert depth.layers["layer1.1.conv2.weight"] == 0
    assert depth.layers["layer4.0.conv1.weight"] == 3
    assert depth.layers["fc.weight"] is None


def test_gaps_in_the_numbers_close():
    depth = depth_map(shapes("net.0.weight", "net.2.weight", "net.5.weight"))
    assert list(depth.layers.values()) == [0, 1, 2]


def test_an_outer_list_of_unlike_parts_is_not_the_blocks():
    inner = [f"1.layers.{i}.w" for i in range(6)]
    depth = depth_map({"0.weight": (50, 50), **shapes(*inner), "2.weight": (50, 50)})
    assert depth.count == 6
    assert depth.labels[0] == "1.layers.0"


def test_experts_of_a_mixture_are_not_blocks():
    names = [f"model.layers.{i}.mlp.experts.{j}.w" for i in range(2) for j in range(16)]
    assert depth_map(shapes(*names)).count == 2


def test_decoder_follows_encoder():
    names = [f"encoder.block.{i}.layer.0.w" for i in range(3)]
    names += [f"decoder.block.{i}.layer.{j}.w" for i in range(3) for j in range(2)]
    depth = depth_map(shapes(*reversed(names)))  # whatever the order in the file
    assert depth.count == 6
    assert depth.layers["encoder.block.2.layer.0.w"] == 2
    assert depth.layers["decoder.block.0.layer.1.w"] == 3
    again = depth_map(shapes(*names), decoder="restart")
    assert again.count == 3
    assert again.layers["decoder.block.2.layer.0.w"] == 2


def test_the_larger_of_two_towers_has_the_blocks():
    vision = [f"vision_model.encoder.layers.{i}.w" for i in range(4)]
    texts = [f"text_model.encoder.layers.{i}.w" for i in range(3)]
    depth = depth_map({**dict.fromkeys(texts, (4, 4)), **dict.fromkeys(vision, (8, 8))})
    assert depth.count == 4
    assert depth.layers[texts[0]] is None


def test_explicit_prefixes():
    names = ["stem.w", "a.0.w", "a.1.w", "a.10.w", "tail.w"]
    depth = depth_map(shapes(*names), ["stem", "a.{}", "tail"])
    assert list(depth.layers.values()) == [0, 1, 2, 3, 4]
    assert depth.labels == ("stem", "a.0", "a.1", "a.10", "tail")
    one = depth_map(shapes(*names), ["a.1"])  # not a.10
    assert [name for name, at in one.layers.items() if at == 0] == ["a.1.w"]
    with pytest.raises(InputError, match="Did you mean 'stem'"):
        depth_map(shapes(*names), ["stam"])
    with pytest.raises(InputError, match="more than one"):
        depth_map(shapes(*names), ["{}.{}"])
    with pytest.raises(InputError, match="'auto'"):
        depth_map(shapes(*names), "model.layers")


def test_callable():
    depth = depth_map(shapes("a", "b", "c"), {"a": 0, "b": 2, "c": None}.get)
    assert depth.count == 3
    assert depth.layers == {"a": 0, "b": 2, "c": None}
    with pytest.raises(InputError, match="numbered from 0"):
        depth_map(shapes("a"), lambda name: -1)
    with pytest.raises(InputError, match="numbered from 0"):
        depth_map(shapes("a"), lambda name: 0.5)


def test_require():
    flat = depth_map(shapes("stem.weight", "head.weight"))
    assert flat.count == 0
    with pytest.raises(InputError, match=r"lines needs two .* stem, head"):
        flat.require("lines")
    one = depth_map(shapes("layers.0.w"))
    with pytest.raises(InputError):
        one.require("lines")
    few = depth_map({**shapes("layers.0.w", "layers.1.w"), "embed.weight": (100, 100)})
    with pytest.warns(UserWarning, match=r"0% of the parameters .* embed.weight"):
        few.require("lines")
    good = depth_map(shapes("layers.0.w", "layers.1.w"))
    assert good.require("lines") is good


def test_table():
    depth = depth_map(
        {
            "embed.weight": (9, 4),
            **shapes("layers.0.w", "layers.1.w", "layers.1.b"),
            "norm.weight": (4,),
        }
    )
    assert depth.table().splitlines() == [
        "block  name                         tensors  elements",
        "0      layers.0                           1        16",
        "1      layers.1                           2        32",
        "-      outside: embed.weight              1        36",
        "-      outside (tail): norm.weight        1         4",
    ]


def test_arrays_and_empty_models_are_mapped():
    assert depth_map({"layers.0.w": np.zeros(3), "layers.1.w": np.zeros(3)}).count == 2
    assert depth_map({}).count == 0


def test_tail():
    for name in (
        "lm_head.weight",
        "model.norm.weight",
        "ln_f.bias",
        "visual.ln_post.weight",
        "fc.bias",
    ):
        assert is_tail(name)
    for name in (
        "model.embed_tokens.weight",
        "patch_embed.norm.weight",
        "conv1.weight",
        "cls_token",
    ):
        assert not is_tail(name)
