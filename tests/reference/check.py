#!/usr/bin/env python3
"""Compares `growth-trainer eval` with the numpy reference on small random checkpoints.

    python3 tests/reference/check.py [path of growth-trainer]

Needs python3 and numpy only. Prints one line a case; exits with 1 if one of them differs.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from llama_numpy import Llama, loss, read_safetensors

# Largest difference over largest value: fp32 with another order of summation stays near 1e-6.
TOLERANCE = 1e-5

BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
    "attention_bias": False, "mlp_bias": False, "vocab_size": 211, "hidden_size": 48, "intermediate_size": 100,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}

# Name -> (changes to the configuration, number of files, dtype of the file).
CASES = {
    "MHA": ({}, 1, "F32"),
    "GQA": ({"num_key_value_heads": 2}, 1, "F32"),
    "MQA": ({"num_key_value_heads": 1}, 1, "F32"),
    "tied": ({"tie_word_embeddings": True}, 1, "F32"),
    "rope_theta": ({"rope_theta": 500000.0}, 1, "F32"),
    # As transformers writes it since version 5.
    "rope_parameters": ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 1, "F32"),
    "head_dim": ({"head_dim": 20, "num_key_value_heads": 2}, 1, "F32"),
    "two files": ({"num_key_value_heads": 2}, 2, "F32"),
    "bf16": ({}, 1, "BF16"),
}


def shapes(config):
    """Name -> shape of every tensor of the checkpoint."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    result = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (vocabulary, hidden)
    layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }
    for number in range(config["num_hidden_layers"]):
        result.update({f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()})
    return result


def random_weights(config, source):
    """Random fp32 tensors: matrices around 0, norm gains around 1."""
    return {
        name: source.normal(0.0, 0.1, shape).astype("<f4")
        if len(shape) == 2
        else source.uniform(0.5, 1.5, shape).astype("<f4")
        for name, shape in shapes(config).items()
    }


def encode(tensor, dtype):
    """Bytes of an fp32 tensor; bfloat16 by cutting, which is good enough for random weights."""
    return tensor.tobytes() if dtype == "F32" else (tensor.view("<u4") >> 16).astype("<u2").tobytes()


def write_safetensors(path, tensors, dtype):
    """Header length (8 bytes), header (JSON, padded to 8 bytes), data."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = encode(tensor, dtype)
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_checkpoint(folder, config, weights, files, dtype):
    """A Hugging Face folder of one file, or of several with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if files == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    names, weight_map = sorted(weights), {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = names[number::files]
        write_safetensors(folder / file, {name: weights[name] for name in part}, dtype)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.size * (4 if dtype == "F32" else 2) for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def evaluate(trainer, checkpoint, tokens, folder):
    """Logits [sequences, length, vocabulary] and loss by the trainer."""
    ids, out = folder / "ids.json", folder / "logits.safetensors"
    ids.write_text(json.dumps(tokens.tolist()))
    command = [trainer, "eval", "--checkpoint", checkpoint, "--token-ids", ids, "--logits-out", out, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return read_safetensors(out)["logits"], json.loads(done.stdout)["loss"]


def check(trainer, name, source):
    """Runs one case, prints its line and says whether it passed."""
    changes, files, dtype = CASES[name]
    config = {**BASE, **changes}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "model", config, random_weights(config, source), files, dtype)
        tokens = source.integers(config["vocab_size"], size=(3, 29))
        ours, our_loss = evaluate(trainer, folder / "model", tokens, folder)
        logits = Llama(folder / "model").logits(tokens)
    assert ours.shape == logits.shape, f"{name}: logits {ours.shape} instead of {logits.shape}"
    difference = np.abs(ours - logits).max() / np.abs(logits).max()
    of_loss = abs(our_loss / loss(logits, tokens) - 1)
    passed = bool(difference < TOLERANCE and of_loss < TOLERANCE)
    print(f"{'ok  ' if passed else 'FAIL'} {name}: logits {difference:.1e}, loss {of_loss:.1e}")
    return passed


def main():
    """Runs all cases; the path of the trainer may be given."""
    built = Path(__file__).resolve().parents[2] / "target/release/growth-trainer"
    trainer = sys.argv[1] if len(sys.argv) > 1 else built
    source = np.random.default_rng(1)
    results = [check(trainer, name, source) for name in CASES]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
