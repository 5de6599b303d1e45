"""LearnDepth and LearnWidth against LiGO in PyTorch, written from its equations, with autograd and torch.optim.AdamW.

Both learn on the batches of the grown stage, from the same first matrices; the source is a stage that was trained.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_forward import open_model, trainer
from test_training import BETAS, CLIP, DECAY, EPSILON, job, write_job
from torch.func import functional_call

STEPS, RATE = 20, 3e-3
# Both are fp32 and sum in another order. Adam divides a gradient by its own size, so where one is little more than
# rounding (new channels have many such), it moves a matrix all the same: the first steps are closer than the last.
# Seen: 1e-7 in the first ten steps, 1.1e-5 in the last.
FIRST_LOSS_TOLERANCE, LOSS_TOLERANCE = 1e-6, 1e-4
# The matrices themselves, relative to the largest of each; seen: 3.5e-4.
MATRIX_TOLERANCE = 2e-3

# What is learned -> (growth, the same as arguments, model of the stage).
CASES = {
    "depth": ({"operator": "LearnDepth", "factor": 2}, ["--factor", "2"], {}),
    "any-depth": ({"operator": "LearnDepth"}, ["--num-hidden-layers", "5"], {"numHiddenLayers": 5}),
    "width": ({"operator": "LearnWidth", "factor": 2}, ["--factor", "2"], {}),
    "groups": ({"operator": "LearnWidth"},
               ["--hidden-size", "90", "--num-attention-heads", "9", "--num-key-value-heads", "3"],
               {"hiddenSize": 90, "numAttentionHeads": 9, "numKeyValueHeads": 3}),
    "keys": ({"operator": "LearnWidth"}, ["--num-key-value-heads", "4"], {"numKeyValueHeads": 4}),
    "both": ({"operator": "LearnWidth", "factor": 2, "depth": {"operator": "LearnDepth", "factor": 2}},
             ["--factor", "2", "--depth-operator", "LearnDepth", "--depth-factor", "2"], {}),
    "width-of-a-stack": ({"operator": "LearnWidth", "factor": 2, "depth": {"operator": "Stack", "factor": 2}},
                         ["--factor", "2", "--depth-operator", "Stack", "--depth-factor", "2"], {}),
}


def context_matrix(value, config, target):
    """B_V for the attention output: a block for each pair of query heads at the same place of their groups."""
    width = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    target_group = target.num_attention_heads // target.num_key_value_heads
    # A group that is smaller than the source's is one of its parts.
    parts = max(group // target_group, 1)
    place = [head % target_group + head // target_group % parts * (group // parts)
             if head % target_group < group // parts else None for head in range(target.num_attention_heads)]
    blocks = value.unflatten(1, (-1, width)).unflatten(0, (-1, width))
    rows = []
    for head in range(target.num_attention_heads):
        row = [blocks[head // target_group, :, source // group] if place[head] == source % group
               else torch.zeros(width, width) for source in range(config.num_attention_heads)]
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)


def widen(name, weight, learned, context):
    """Equations 37 to 42 of the paper."""
    if "width.hidden" not in learned:
        return weight
    hidden, inner = learned["width.hidden"], learned["width.intermediate"]
    part = name.split(".")[-2]
    if "norm" in part:
        return hidden @ weight
    sides = {
        "q_proj": (learned["width.query"], hidden), "k_proj": (learned["width.key"], hidden),
        "v_proj": (learned["width.value"], hidden), "o_proj": (hidden, context), "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }
    rows, columns = sides.get(part, (None, hidden))
    weight = weight @ columns.T
    return weight if rows is None else rows @ weight


def generate(source, config, target, learned):
    """The weights of the target from those of the source and the learned matrices."""
    context = None
    if "width.value" in learned:
        context = context_matrix(learned["width.value"], config, target)
    wide = {name: widen(name, weight, learned, context) for name, weight in source.items()}
    grown = {name: weight for name, weight in wide.items() if not name.startswith("model.layers.")}
    for name in [name for name in wide if name.startswith("model.layers.0.")]:
        kind = name.removeprefix("model.layers.0.")
        layers = torch.stack([wide[f"model.layers.{layer}.{kind}"] for layer in range(config.num_hidden_layers)])
        mix = learned.get("depth." + kind.removesuffix(".weight"))
        for layer in range(target.num_hidden_layers):
            weight = layers[layer % config.num_hidden_layers]
            if mix is not None:
                weight = torch.einsum("j,j...->...", mix[layer], layers)
            grown[f"model.layers.{layer}.{kind}"] = weight
    return grown


def learn(source, model, first, batches):
    """LiGO: trains the matrices through the model that they generate; the loss of every step, and the last matrices."""
    learned = {name: matrix.clone().requires_grad_() for name, matrix in first.items()}
    optimizer = torch.optim.AdamW(learned.values(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    weights = {name: weight for name, weight in source.state_dict().items()}
    tied = model.config.tie_word_embeddings
    if tied:
        del weights["lm_head.weight"]
    losses = []
    for inputs, targets in zip(batches["inputs"].long(), batches["targets"].long()):
        grown = generate(weights, source.config, model.config, learned)
        if tied:
            grown["lm_head.weight"] = grown["model.embed_tokens.weight"]
        logits = functional_call(model, grown, kwargs={"input_ids": inputs}, tie_weights=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: matrix.detach() for name, matrix in learned.items()}, grown


def content(growth, model, tied):
    growth = {**growth, "learn": {"steps": STEPS, "learningRate": RATE}}
    spec = job(steps=30, model={"tieWordEmbeddings": tied})
    spec["spec"]["checkpoint"] = {"everySeconds": 3600, "keepLast": 10}
    spec["spec"]["stages"].append({"name": "large", "growth": growth, "model": model, "tokens": STEPS * 1024})
    return spec


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_learning(case, tied, tmp_path):
    """The same losses in every step, and the same matrices in the end."""
    growth, arguments, model = CASES[case]
    write_job(tmp_path, content(growth, model, tied))
    trainer("run", "job.yaml", "--json", folder=tmp_path)
    checkpoints = tmp_path / "runs/parity/checkpoints"
    small = max((checkpoints / "small").iterdir())
    grown = min((checkpoints / "large").iterdir())
    assert grown.name.startswith("00000000-")

    # Before the first step: ones for old channels, random rows for new ones.
    trainer("grow", "--from", small, "--to", "first", "--operator", growth["operator"], "--learn-steps", "0",
            "--seed", "1", *arguments, folder=tmp_path)
    first = load_file(tmp_path / "first/learned.safetensors")
    for name, matrix in first.items():
        is_one = (matrix == 1).any(dim=1)
        assert (matrix[is_one].sum(dim=1) == 1).all(), name
        if name.startswith("depth"):
            assert torch.equal(matrix, torch.eye(2).repeat(3, 1)[: len(matrix)])
        elif not is_one.all():
            assert matrix[~is_one].std().item() == pytest.approx(len(matrix) ** -0.5, rel=0.1), name

    trainer("data", "batches", "job.yaml", "--stage", "large", "--out", "batches.safetensors", folder=tmp_path)
    batches = load_file(tmp_path / "batches.safetensors")
    theirs, matrices, _ = learn(open_model(small), open_model(grown), first, batches)
    ours = json.loads((grown / "growth.json").read_text())["learned"]
    worst = [abs(a / b - 1) for a, b in zip(ours["losses"], theirs)]
    print(f"losses: {max(worst[:10]):.1e} in the first ten steps, {max(worst):.1e} in all")
    assert ours["steps"] == STEPS and ours["tokens"] == STEPS * 1024
    assert ours["losses"][:10] == pytest.approx(theirs[:10], rel=FIRST_LOSS_TOLERANCE)
    assert ours["losses"] == pytest.approx(theirs, rel=LOSS_TOLERANCE)
    assert theirs[-1] < theirs[0] - 0.01, "nothing was learned: the comparison would say little"

    learned = load_file(grown / "learned.safetensors")
    assert learned.keys() == matrices.keys()
    for name, matrix in matrices.items():
        difference = ((learned[name] - matrix).abs().max() / matrix.abs().max()).item()
        print(f"{name}: {difference:.1e}")
        assert difference < MATRIX_TOLERANCE, f"{name}: {difference}"
    # What was written is what the matrices generate.
    source, target = open_model(small), open_model(grown)
    weights = source.state_dict()
    made = generate(weights, source.config, target.config, learned)
    for name, weight in target.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            assert torch.allclose(made[name], weight, rtol=1e-5, atol=1e-6), name
