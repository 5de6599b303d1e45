"""Every growth operator against one in PyTorch that is written from its definition.

Copies are compared bit by bit, divided weights to rounding, random weights by their statistics, and what a growth does
to the function by the logits of transformers.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_forward import make_model, open_model, relative, trainer

SHAPE = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
}

# Standard deviation of the weights that ZeroWidth draws, and how far a sample of some thousand may be off.
RANDOM_STD, STD_TOLERANCE = 0.02, 0.1


def grow(folder, model, *arguments):
    """Saves `model`, grows it, and returns the grown weights, the grown model and what was reported."""
    model.save_pretrained(folder / "source")
    report = trainer("grow", "--from", "source", "--to", "grown", "--json", *arguments, folder=folder)
    return open_model(folder / "grown").state_dict(), open_model(folder / "grown"), json.loads(report)["growth"]


def layer_of(name):
    """The layer in a tensor's name, or None."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def with_layer(name, layer):
    """The same tensor of another layer."""
    parts = name.split(".")
    parts[2] = str(layer)
    return ".".join(parts)


def writes_residual(name):
    return name.endswith(("o_proj.weight", "down_proj.weight"))


def take_layers(state, layers, zero=()):
    """Target layer i is source layer layers[i]; layers in `zero` add nothing."""
    grown = {name: tensor for name, tensor in state.items() if layer_of(name) is None}
    for target, source in enumerate(layers):
        for name, tensor in state.items():
            if layer_of(name) == source:
                new = with_layer(name, target)
                grown[new] = torch.zeros_like(tensor) if target in zero and writes_residual(name) else tensor
    return grown


@torch.no_grad()
def logits(model):
    torch.manual_seed(5)
    return model(input_ids=torch.randint(SHAPE["vocab_size"], (2, 40))).logits


def assert_same_state(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        assert torch.allclose(ours[name], tensor, rtol=tolerance, atol=tolerance), name


# Arguments -> list of layers, and those that are zeroed.
DEPTH = {
    "stack": (["--operator", "Stack", "--factor", "3"], [0, 1, 2, 3] * 3, []),
    "interleave": (["--operator", "Interleave", "--factor", "2"], [0, 0, 1, 1, 2, 2, 3, 3], []),
    "list": (["--operator", "LayerMap", "--layers", "3,0,0"], [3, 0, 0], []),
    "pattern": (["--operator", "LayerMap", "--pattern", "12-34*2-4"], [0, 1, 2, 3, 2, 3, 3], []),
    "solar": (["--operator", "LayerMap", "--solar", "1"], [0, 1, 2, 1, 2, 3], []),
    "midas": (["--operator", "LayerMap", "--midas", "2"], [0, 1, 0, 1, 2, 3], []),
    "lidas": (["--operator", "LayerMap", "--lidas", "2"], [0, 1, 1, 2, 2, 3], []),
    "llama-pro": (["--operator", "LayerMap", "--llama-pro", "2"], [0, 1, 1, 2, 3, 3], [2, 5]),
    "zero": (["--operator", "ZeroDepth", "--factor", "2"], [0, 0, 1, 1, 2, 2, 3, 3], [1, 3, 5, 7]),
    "zero-stacked": (["--operator", "ZeroDepth", "--factor", "2", "--order", "Stacked"],
                     [0, 1, 2, 3] * 2, [4, 5, 6, 7]),
    "interleave-any": (["--operator", "Interleave", "--num-hidden-layers", "6"], [0, 0, 1, 2, 2, 3], []),
    "zero-any": (["--operator", "ZeroDepth", "--num-hidden-layers", "6"], [0, 0, 1, 2, 2, 3], [1, 4]),
    "zero-any-stacked": (["--operator", "ZeroDepth", "--num-hidden-layers", "6", "--order", "Stacked"],
                         [0, 1, 2, 3, 0, 1], [4, 5]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", DEPTH)
def test_depth(case, tied, tmp_path):
    arguments, layers, zero = DEPTH[case]
    source = make_model(1, **SHAPE, tie_word_embeddings=tied)
    ours, grown, report = grow(tmp_path, source, *arguments)
    assert_same_state(ours, take_layers(source.state_dict(), layers, zero))
    same = torch.equal(logits(source), logits(grown))
    assert same == bool(zero)
    assert report["expected"] == ("Preserving" if zero else "Spike")


def head_rows(heads, width):
    """Channels of the heads in a list."""
    return torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])


def shares(sources, ratios):
    """A weight per target channel: copies of one source share it as `ratios` says for that many copies."""
    result, seen = torch.empty(len(sources), dtype=torch.float64), {}
    for index, source in enumerate(sources.tolist()):
        copies = int((sources == source).sum())
        copy = seen.get(source, 0)
        seen[source] = copy + 1
        result[index] = ratios(copies)[copy]
    return result


def even(copies):
    return [1 / copies] * copies


def uneven(copies):
    weights = [(3 / 7) ** copy for copy in range(copies)]
    return [weight / sum(weights) for weight in weights]


def direct_width(state, tied, hidden, query, key, inner, ratios):
    """W' = W[rows][:, columns] times the columns' shares; embedding and gains are copied."""
    share = {id(axis): shares(axis, ratios) for axis in (hidden, query, inner)}
    grown = {}
    for name, tensor in state.items():
        tensor = tensor.double()
        part = name.split(".")[-2]
        if "norm" in part:
            scale = share[id(hidden)] if name == "model.norm.weight" and tied else 1.0
            grown[name] = tensor[hidden] * scale
            continue
        rows = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": hidden, "gate_proj": inner,
                "up_proj": inner, "down_proj": hidden}.get(part)
        columns = {"o_proj": query, "down_proj": inner}.get(part, hidden)
        tensor = tensor if rows is None else tensor[rows]
        keeps = part == "embed_tokens" or (part == "lm_head" and tied)
        grown[name] = tensor[:, columns] * (1.0 if keeps else share[id(columns)])
    return {name: tensor.float() for name, tensor in grown.items()}


# Arguments -> sources of hidden channels, query heads, key heads and neurons.
DIRECT = {
    "twice": (["--factor", "2"], list(range(48)) * 2, [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1], list(range(80)) * 2),
    "queries": (["--num-attention-heads", "8", "--num-key-value-heads", "2"],
                list(range(48)), [0, 1, 0, 1, 2, 3, 2, 3], [0, 1], list(range(80))),
    "keys": (["--num-key-value-heads", "4"], list(range(48)), [0, 1, 2, 3], [0, 0, 1, 1], list(range(80))),
    "any": (["--hidden-size", "144", "--num-attention-heads", "6", "--intermediate-size", "93"],
            list(range(48)) * 3, [0, 1, 2, 3, 0, 1], [0, 1, 0], list(range(80)) + list(range(13))),
    "broken": (["--hidden-size", "60"], list(range(48)) + list(range(12)), [0, 1, 2, 3], [0, 1], list(range(80))),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("split", ["Even", "Uneven", "Noisy"])
@pytest.mark.parametrize("case", DIRECT)
def test_direct_width(case, split, tied, tmp_path):
    arguments, hidden, heads, keys, inner = DIRECT[case]
    source = make_model(2, **SHAPE, tie_word_embeddings=tied)
    ours, grown, report = grow(tmp_path, source, "--operator", "DirectWidth", "--split", split, *arguments)
    width = SHAPE["head_dim"]
    axes = [torch.tensor(hidden), head_rows(heads, width), head_rows(keys, width), torch.tensor(inner)]
    ratios = uneven if split == "Uneven" else even
    theirs = direct_width(source.state_dict(), tied, *axes, ratios)
    if split == "Noisy":
        assert_sums(ours, theirs, axes)
    else:
        assert_same_state(ours, theirs, 1e-6)
    difference = relative(logits(grown), logits(source))
    if case == "broken":
        assert difference > 1e-2 and report["expected"] == "Spike"
    else:
        assert difference < 1e-5 and report["expected"] == "Preserving"


def assert_sums(ours, theirs, axes):
    """Noise differs, but copies of a channel sum to the same."""
    hidden, query, _, inner = axes
    for name, tensor in theirs.items():
        part = name.split(".")[-2]
        columns = {"o_proj": query, "down_proj": inner}.get(part, hidden)
        if tensor.dim() == 1 or part == "embed_tokens" or len(columns.unique()) == len(columns):
            assert torch.allclose(ours[name], tensor, rtol=1e-6, atol=1e-6), name
            continue
        if part == "lm_head" and torch.equal(ours[name], tensor):
            continue  # tied
        assert not torch.allclose(ours[name], tensor, atol=1e-4), f"{name} has no noise"
        sums = [torch.zeros(len(tensor), int(columns.max()) + 1, dtype=torch.float64) for _ in range(2)]
        for total, weights in zip(sums, (ours[name], tensor)):
            total.index_add_(1, columns, weights.double())
        assert torch.allclose(*sums, atol=1e-6), name


def test_zero_width(tmp_path):
    """[[W, A], [0, C]], gains sqrt(d/D), eps d/D; A and C random."""
    source = make_model(3, **SHAPE)
    ours, grown, report = grow(tmp_path, source, "--operator", "ZeroWidth", "--factor", "2")
    assert grown.config.rms_norm_eps == pytest.approx(source.config.rms_norm_eps / 2)
    assert relative(logits(grown), logits(source)) < 1e-5 and report["expected"] == "Preserving"
    for name, old in source.state_dict().items():
        new = ours[name]
        if old.dim() == 1:
            assert torch.allclose(new[:len(old)], old * 0.5 ** 0.5, rtol=1e-6) and (new[len(old):] == 1).all()
            continue
        rows, columns = old.shape
        assert torch.equal(new[:rows, :columns], old), name
        if "embed_tokens" in name:
            assert (new[:, columns:] == 0).all()
            continue
        assert (new[rows:, :columns] == 0).all(), name
        for block in (new[:rows, columns:], new[rows:, columns:]):
            if block.numel():
                assert block.std().item() == pytest.approx(RANDOM_STD, rel=STD_TOLERANCE), name
                assert abs(block.mean().item()) < 5 * RANDOM_STD / block.numel() ** 0.5, name


@pytest.mark.parametrize("sizes", [
    ["--hidden-size", "52"], ["--intermediate-size", "99"], ["--num-attention-heads", "12"],
    ["--num-attention-heads", "8", "--num-key-value-heads", "2"],
    ["--hidden-size", "63", "--num-attention-heads", "9", "--num-key-value-heads", "3"],
], ids=" ".join)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_zero_width_of_a_part(sizes, tied, tmp_path):
    """The function stays, and with autograd every new weight of a layer learns within three steps."""
    source = make_model(4, **SHAPE, tie_word_embeddings=tied)
    _, grown, _ = grow(tmp_path, source, "--operator", "ZeroWidth", *sizes)
    assert relative(logits(grown), logits(source)) < 1e-5
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3)
    ids = torch.randint(SHAPE["vocab_size"], (8, 40))
    seen = {name: torch.zeros_like(weight) for name, weight in grown.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        grown(input_ids=ids, labels=ids).loss.backward()
        for name, weight in grown.named_parameters():
            seen[name] = torch.maximum(seen[name], weight.grad.abs())
        optimizer.step()
    for name, gradient in seen.items():
        if ".layers." in name:
            assert (gradient > 0).all(), name


def test_width_and_depth(tmp_path):
    """bert2BERT: wider, then the wider layers stacked."""
    source = make_model(5, **SHAPE)
    ours, _, report = grow(tmp_path, source, "--operator", "DirectWidth", "--split", "Even", "--factor", "2",
                           "--depth-operator", "Stack", "--depth-factor", "2")
    hidden, inner = torch.arange(48).repeat(2), torch.arange(80).repeat(2)
    query, key = head_rows([0, 1, 2, 3] * 2, 12), head_rows([0, 1] * 2, 12)
    wide = direct_width(source.state_dict(), False, hidden, query, key, inner, even)
    assert_same_state(ours, take_layers(wide, [0, 1, 2, 3] * 2), 1e-6)
    assert report["connectionRate"] == {"kept": 6, "pairs": 7}


def test_noise(tmp_path):
    """W = (1 - a) W + a E, with the variances of the paper's ablation."""
    source = make_model(6, **SHAPE)
    ours, _, _ = grow(tmp_path, source, "--operator", "Stack", "--factor", "2", "--noise", "0.2")
    theirs = take_layers(source.state_dict(), [0, 1, 2, 3] * 2)
    hidden, layers = SHAPE["hidden_size"], 2 * SHAPE["num_hidden_layers"]
    for name, tensor in theirs.items():
        if tensor.dim() == 1:
            assert torch.equal(ours[name], tensor)
            continue
        noise = (ours[name] - 0.8 * tensor) / 0.2
        variance = 1 / (hidden * layers ** 2) if writes_residual(name) else 2 / (5 * hidden)
        assert noise.var().item() == pytest.approx(variance, rel=0.2), name


def test_report(tmp_path):
    """What is measured in the report is what transformers measures; the record in the folder says the same."""
    source = make_model(7, **SHAPE)
    _, _, report = grow(tmp_path, source, "--operator", "Interleave", "--factor", "2", "--measure-tokens", "100")
    assert json.loads((tmp_path / "grown/growth.json").read_text()) == report
    measured = report["measured"]
    assert measured["sample"] == "Random" and measured["tokens"] == 64
    assert measured["maxLogitDifference"] > 0 and measured["lossBefore"] > 0
    assert load_file(tmp_path / "grown/model-00001-of-00001.safetensors")
