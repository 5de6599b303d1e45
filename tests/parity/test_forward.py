"""Logits and loss of `growth-trainer eval` against transformers, both in fp32.

The helpers that the other parity tests share are here too.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINER = os.environ.get("GROWTH_TRAINER") or str(REPOSITORY / "target/release/growth-trainer")

# Largest difference over largest value; the order of summation alone gives about 1e-6.
TOLERANCE = 1e-5


def trainer(*arguments, folder):
    """Runs the trainer in `folder` and returns what it wrote to stdout; shows its stderr when it fails."""
    command = [str(Path(TRAINER).absolute()), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_model(seed, **changes):
    """A random LLaMA in fp32 whose norm gains differ from 1, so that forgetting one is seen."""
    config = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "initializer_range": 0.1, "tie_word_embeddings": False, "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def open_model(folder):
    """The checkpoint in `folder` as transformers reads it, in fp32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def reference(model, tokens):
    """tokens [sequences, length] -> logits [sequences, length, vocabulary] and mean next-token loss in nats."""
    logits = model(input_ids=tokens).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return logits, loss.item()


def evaluate(checkpoint, tokens, folder):
    """What `growth-trainer eval` makes of tokens [sequences, length]: logits and its JSON object."""
    ids, out = folder / "ids.json", folder / "logits.safetensors"
    ids.write_text(json.dumps(tokens.tolist()))
    text = trainer(
        "eval", "--checkpoint", checkpoint, "--token-ids", ids, "--logits-out", out, "--json", folder=folder
    )
    return load_file(out)["logits"], json.loads(text)


def relative(ours, theirs):
    """Largest difference over largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_same_evaluation(checkpoint, tokens, folder):
    """Our logits, loss and perplexity on tokens [sequences, length] are those of transformers."""
    theirs, loss = reference(open_model(checkpoint), tokens)
    ours, report = evaluate(checkpoint, tokens, folder)
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    assert relative(ours, theirs) < TOLERANCE
    assert report["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert report["perplexity"] == pytest.approx(torch.tensor(loss).double().exp().item(), rel=10 * TOLERANCE)
    return report


def rope(theta):
    """Rotary parameters with another base."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


# Name -> (changes to the configuration, arguments of save_pretrained, dtype that is saved).
CASES = {
    "mha": ({"num_key_value_heads": 4}, {}, None),
    "gqa": ({"num_key_value_heads": 2}, {}, None),
    "mqa": ({"num_key_value_heads": 1}, {}, None),
    "tied": ({"num_key_value_heads": 4, "tie_word_embeddings": True}, {}, None),
    "tied-gqa": ({"num_key_value_heads": 2, "tie_word_embeddings": True}, {}, None),
    "rope-theta": ({"num_key_value_heads": 4, **rope(500000.0)}, {}, None),
    "small-rope-theta": ({"num_key_value_heads": 4, **rope(100.0)}, {}, None),
    "norm-eps": ({"num_key_value_heads": 4, "rms_norm_eps": 1e-2}, {}, None),
    "wide-heads": ({"num_key_value_heads": 2, "head_dim": 24}, {}, None),
    "narrow-heads": ({"num_key_value_heads": 4, "head_dim": 6}, {}, None),
    "odd-sizes": ({"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 50,
                   "intermediate_size": 77, "vocab_size": 131}, {}, None),
    "one-layer": ({"num_key_value_heads": 4, "num_hidden_layers": 1}, {}, None),
    "shards": ({"num_key_value_heads": 2}, {"max_shard_size": "100KB"}, None),
    "bf16": ({"num_key_value_heads": 2}, {}, torch.bfloat16),
    "bf16-shards-tied": ({"num_key_value_heads": 2, "tie_word_embeddings": True},
                         {"max_shard_size": "60KB"}, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_forward(case, tmp_path):
    """Random weights, random tokens: the same logits and loss."""
    changes, save, dtype = CASES[case]
    model = make_model(list(CASES).index(case), **changes)
    checkpoint = tmp_path / "model"
    (model if dtype is None else model.to(dtype)).save_pretrained(checkpoint, **save)
    if save:
        assert len(list(checkpoint.glob("model-*.safetensors"))) >= 2
    tokens = torch.randint(model.config.vocab_size, (3, 37))
    report = assert_same_evaluation(checkpoint, tokens, tmp_path)
    assert report["tokens"] == 3 * 36


@pytest.mark.parametrize("shape", [(1, 2), (1, 128), (9, 65)], ids=str)
def test_lengths(shape, tmp_path):
    """From the shortest sequence that has a loss to the longest that the model takes."""
    model = make_model(100, num_key_value_heads=2)
    model.save_pretrained(tmp_path / "model")
    assert_same_evaluation(tmp_path / "model", torch.randint(300, shape), tmp_path)
