"""Weights that only pass through the trainer stay bit-equal."""

import pytest
import torch
from test_forward import make_model, open_model, trainer
from test_training import job, run

SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}


def save(folder, **changes):
    """Writes a random checkpoint of SHAPE into folder/source; returns the model."""
    model = make_model(3, **SHAPE, **changes)
    model.save_pretrained(folder / "source")
    return model


def assert_same_bits(ours, theirs):
    """Both are fp32 and equal bit by bit, the sign of zero included."""
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours.detach().view(torch.int32), theirs.detach().view(torch.int32))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_training_at_rate_zero(tied, tmp_path):
    """initFrom, two steps of learning rate 0 (weight decay is times the rate), checkpoint: nothing changed."""
    source = save(tmp_path, tie_word_embeddings=tied)
    content = job(2, {"tieWordEmbeddings": tied}, {"initFrom": {"uri": f"file://{tmp_path}/source"}})
    training = content["spec"]["training"]
    training["optimizer"]["adamW"]["learningRate"] = 0.0
    training["schedule"]["cosine"]["warmupTokens"] = 0
    result = open_model(run(tmp_path, content)).state_dict()
    assert result.keys() == source.state_dict().keys()
    for name, tensor in source.state_dict().items():
        assert_same_bits(result[name], tensor)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_stack(tied, tmp_path):
    """Layer i of the grown checkpoint is layer i mod L of the source; the rest is the source's."""
    source = save(tmp_path, tie_word_embeddings=tied).state_dict()
    layers = SHAPE["num_hidden_layers"]
    trainer("grow", "--from", "source", "--operator", "Stack", "--factor", 2, "--to", "grown", folder=tmp_path)
    grown = open_model(tmp_path / "grown")
    assert grown.config.num_hidden_layers == 2 * layers
    state = grown.state_dict()
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(int(parts[2]) % layers)
        assert_same_bits(tensor, source[".".join(parts)])
    assert len(state) == len(source) + sum(".layers." in name for name in source)
