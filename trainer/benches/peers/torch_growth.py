#!/usr/bin/env python3
"""Growth steps in PyTorch, as one would write them: load the file, build the new weights, save the file.

    torch_growth.py make --to DIR --layers 8 --hidden 1024          random weights of a LLaMA
    torch_growth.py grow --operator Stack --factor 2 --from DIR --to DIR2
    torch_growth.py compare --from DIR --to DIR2                    do two folders hold the same weights?
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"
VOCABULARY, HEAD = 32_000, 64
# Shares of the two copies of a channel in our uneven split.
SHARES = (0.7, 0.3)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["make", "grow", "compare"])
    parser.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--to", dest="target", type=Path, required=True)
    parser.add_argument("--operator", choices=["Stack", "DirectWidth"])
    parser.add_argument("--factor", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int)
    return parser.parse_args()


def config(layers, hidden):
    """A LLaMA with two queries to a key."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers, "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD // 2, "head_dim": HEAD, "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
    }


def shapes(c):
    """Name -> shape of every weight."""
    hidden, inner, keys = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * HEAD
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }
    weights = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for index in range(c["num_hidden_layers"]):
        weights |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return weights | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def save(folder, weights, c):
    """A Hugging Face folder."""
    folder.mkdir(parents=True)
    save_file(weights, folder / FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c, indent=2))


def stack(weights, layers, factor):
    """Target layer i is source layer i mod L. The format wants every tensor in memory of its own."""
    grown = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            grown[name] = tensor
            continue
        for copy in range(factor):
            parts[2] = str(int(name.split(".")[2]) + copy * layers)
            grown[".".join(parts)] = tensor if copy == 0 else tensor.clone()
    return grown


def widen(weights):
    """Every channel twice; what reads it is divided."""
    grown = {}
    for name, tensor in weights.items():
        if tensor.dim() == 1:
            grown[name] = tensor.repeat(2)
        elif "embed_tokens" in name:
            grown[name] = tensor.repeat(1, 2)
        else:
            divided = torch.cat([share * tensor for share in SHARES], dim=1)
            grown[name] = divided if "lm_head" in name else divided.repeat(2, 1)
    return grown


def grow(a):
    """One growth step."""
    weights = load_file(a.source / FILE)
    c = json.loads((a.source / "config.json").read_text())
    if a.operator == "Stack":
        grown = stack(weights, c["num_hidden_layers"], a.factor)
        c["num_hidden_layers"] *= a.factor
    else:
        grown = widen(weights)
        for size in "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads":
            c[size] *= 2
    save(a.target, grown, c)


def read(folder):
    """Every weight of a folder, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def compare(a):
    """Divided weights may differ by rounding, all others not at all."""
    with safe_open(a.target / FILE, "pt") as theirs:
        names = set(theirs.keys())
        for name, ours in read(a.source):
            names.remove(name)
            if not torch.allclose(ours, theirs.get_tensor(name), rtol=1e-6, atol=0.0):
                sys.exit(f"{name} differs")
    if names:
        sys.exit(f"only in {a.target}: {sorted(names)}")


def main():
    """Does what was asked."""
    a = arguments()
    if a.command == "grow":
        return grow(a)
    if a.command == "compare":
        return compare(a)
    torch.manual_seed(1)
    c = config(a.layers, a.hidden)
    return save(a.target, {name: 0.02 * torch.randn(shape) for name, shape in shapes(c).items()}, c)


if __name__ == "__main__":
    main()
