#!/usr/bin/env python3
"""A forward pass of LLaMA in float64, from a Hugging Face folder, with numpy alone.

    python3 tests/reference/llama_numpy.py FOLDER ids.json [--out logits.npy]

ids.json is a list of token lists of equal length. Prints {"loss": ...}: the mean next-token cross entropy in nats.
Written to be read next to the formulas, not to be fast: no cache, no fusion, one obvious line for each operation.
"""

import argparse
import json
from pathlib import Path

import numpy as np


def bf16(raw):
    """Bytes of bfloat16 -> float32: a bfloat16 is the upper half of a float32."""
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)


DECODERS = {
    "F64": lambda raw: np.frombuffer(raw, "<f8"),
    "F32": lambda raw: np.frombuffer(raw, "<f4"),
    "F16": lambda raw: np.frombuffer(raw, "<f2"),
    "BF16": bf16,
}


def read_safetensors(path):
    """Name -> array, in the precision of the file (bfloat16 as float32).

    A file is the length of its header in 8 bytes (little endian), the header in JSON, then the data; offsets count
    from the end of the header.
    """
    raw = Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = DECODERS[entry["dtype"]](raw[start + begin : start + end]).reshape(entry["shape"])
    return tensors


def read_weights(folder):
    """All tensors of a checkpoint in float64, from one file or from the shards of its index."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    weights = {}
    for file in files:
        weights.update(read_safetensors(folder / file))
    return {name: tensor.astype(np.float64) for name, tensor in weights.items()}


def rope_theta(config):
    """The base of the rotary frequencies: transformers moved it into `rope_parameters` in version 5."""
    parameters = config.get("rope_parameters") or {}
    return parameters.get("rope_theta") or config.get("rope_theta") or 10000.0


def softmax(x):
    """Over the last dimension."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    """x sigmoid(x); the sigmoid by tanh, which does not overflow."""
    return x * 0.5 * (1 + np.tanh(0.5 * x))


class Llama:
    """A checkpoint, ready for forward passes."""

    def __init__(self, folder):
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        self.weights = read_weights(folder)
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head = config.get("head_dim") or config["hidden_size"] // self.heads
        self.epsilon = config["rms_norm_eps"]
        self.theta = rope_theta(config)
        self.tied = config.get("tie_word_embeddings", False)

    def linear(self, x, name):
        """[..., in] -> [..., out] by a weight [out, in]."""
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, x, name):
        """RMSNorm over the last dimension."""
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weights[f"{name}.weight"]

    def split(self, x, heads):
        """[sequences, length, heads * head] -> [sequences, heads, length, head]"""
        return x.reshape(*x.shape[:2], heads, self.head).transpose(0, 2, 1, 3)

    def rotate(self, x):
        """Rotary positions on [sequences, heads, length, head]; channel i turns with channel i + head / 2."""
        frequency = self.theta ** (-np.arange(0, self.head, 2) / self.head)
        angle = np.arange(x.shape[2])[:, None] * frequency
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate(
            (low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)), axis=-1
        )

    def attention(self, x, name):
        """Causal attention, [sequences, length, hidden] -> the same."""
        query = self.rotate(self.split(self.linear(x, f"{name}.q_proj"), self.heads))
        key = self.rotate(self.split(self.linear(x, f"{name}.k_proj"), self.kv_heads))
        value = self.split(self.linear(x, f"{name}.v_proj"), self.kv_heads)
        # Query heads g * i to g * i + g - 1 share key and value head i.
        group = self.heads // self.kv_heads
        key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
        scores = query @ key.swapaxes(-1, -2) / np.sqrt(self.head)
        future = np.triu(np.ones(scores.shape[-2:], bool), 1)
        mixed = softmax(np.where(future, -np.inf, scores)) @ value
        return self.linear(mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1), f"{name}.o_proj")

    def mlp(self, x, name):
        """SwiGLU, [..., hidden] -> the same."""
        gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        return self.linear(silu(gate) * up, f"{name}.down_proj")

    def logits(self, tokens):
        """[sequences, length] -> [sequences, length, vocabulary]"""
        x = self.weights["model.embed_tokens.weight"][tokens]
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            x = x + self.attention(self.norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
            x = x + self.mlp(self.norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
        return self.linear(self.norm(x, "model.norm"), "model.embed_tokens" if self.tied else "lm_head")


def loss(logits, tokens):
    """Mean cross entropy in nats of every token but the first of each sequence."""
    shifted = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
    logarithms = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(logarithms, tokens[:, 1:, None], axis=-1).mean()


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--out", type=Path, help="writes the logits there, float64, in numpy's format")
    arguments = parser.parse_args()
    tokens = np.array(json.loads(arguments.ids.read_text()))
    logits = Llama(arguments.folder).logits(tokens)
    if arguments.out:
        np.save(arguments.out, logits)
    print(json.dumps({"loss": loss(logits, tokens)}))


if __name__ == "__main__":
    main()
