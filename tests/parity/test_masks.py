"""RandomDepth and RandomWidth against masks in PyTorch that are written from their definition.

The trainer scales weights. Here forward hooks on the model of transformers multiply outputs, as MSG (arXiv 2305.02869)
has it: of the embedding, of every matrix but the head, of norms, and of both parts of a new layer.
"""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_forward import make_model, open_model, relative, trainer
from test_growth import SHAPE
from test_training import job, write_job

# Logits, relative to the largest: the order of summation alone gives about 1e-6.
LOGIT_TOLERANCE = 1e-5
# Losses of single steps, as in test_training.
LOSS_TOLERANCE = 1e-5

RATE, BETAS, EPSILON, DECAY, CLIP = 0.003, (0.9, 0.95), 1e-8, 0.1, 1.0
STEPS, RAMP_STEPS, STEP_TOKENS = 15, 12, 1024

# What --operator is given, and new channels of the residual stream, query heads, key heads and neurons, new layers.
GROWTHS = {
    "depth": (["--operator", "RandomDepth", "--num-hidden-layers", "6"], {"layers": [4, 5]}),
    "width": (["--operator", "RandomWidth", "--factor", "2"], {
        "hidden": range(48, 96), "heads": range(4, 8), "keys": range(2, 4), "inner": range(80, 160),
    }),
    "stream": (["--operator", "RandomWidth", "--hidden-size", "60"], {"hidden": range(48, 60)}),
    "queries": (["--operator", "RandomWidth", "--num-attention-heads", "8", "--num-key-value-heads", "2"],
                {"heads": [2, 3, 6, 7]}),
}


def hook_masks(model, new, masks):
    """Masks the outputs of `model`. `new` names what is new, `masks()` gives the mask of each kind at that moment."""
    config = model.config

    def vector(kind, size, width=1):
        mask = torch.ones(size)
        mask[list(new.get(kind, []))] = masks().get({"keys": "heads"}.get(kind, kind), 1.0)
        return mask.repeat_interleave(width)

    def hidden():
        return vector("hidden", config.hidden_size)

    def heads():
        return vector("heads", config.num_attention_heads, config.head_dim)

    def keys():
        return vector("keys", config.num_key_value_heads, config.head_dim)

    def inner():
        return vector("inner", config.intermediate_size)

    def norm():
        return hidden() * (hidden().sum() / config.hidden_size).sqrt()

    def on(module, mask):
        module.register_forward_hook(lambda _module, _inputs, output: output * mask())

    def context(_module, inputs):
        """A new query head whose keys and values are old ones is masked itself."""
        group = config.num_attention_heads // config.num_key_value_heads
        loose = [head for head in new.get("heads", []) if head // group not in new.get("keys", [])]
        mask = torch.ones(config.num_attention_heads)
        mask[loose] = masks().get("heads", 1.0)
        return (inputs[0] * mask.repeat_interleave(config.head_dim),)

    on(model.model.embed_tokens, hidden)
    on(model.model.norm, norm)
    for index, layer in enumerate(model.model.layers):
        def output(index=index):
            return hidden() * (masks()["layers"] if index in new.get("layers", []) else 1.0)

        attention, mlp = layer.self_attn, layer.mlp
        for module, mask in [
            (layer.input_layernorm, norm), (layer.post_attention_layernorm, norm),
            (attention.q_proj, heads), (attention.k_proj, keys), (attention.v_proj, keys),
            (attention.o_proj, output), (mlp.gate_proj, inner), (mlp.up_proj, inner), (mlp.down_proj, output),
        ]:
            on(module, mask)
        attention.o_proj.register_forward_pre_hook(context)
    return model


@torch.no_grad()
def our_logits(folder, name, tokens):
    """Logits of the folder, as `growth-trainer eval` computes them."""
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    trainer("eval", "--checkpoint", name, "--token-ids", "tokens.json", "--logits-out", "logits.safetensors",
            folder=folder)
    return load_file(folder / "logits.safetensors")["logits"]


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", GROWTHS)
def test_logits(case, tied, tmp_path):
    arguments, new = GROWTHS[case]
    source = make_model(1, **SHAPE, tie_word_embeddings=tied)
    source.save_pretrained(tmp_path / "source")
    trainer("grow", "--from", "source", "--to", "grown", *arguments, folder=tmp_path)
    tokens = torch.randint(SHAPE["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(5))
    record = json.loads((tmp_path / "grown/growth_mask.json").read_text())
    assert all(record["masks"][kind] == 1 or set(new) & {kind, {"intermediate": "inner"}.get(kind)}
               for kind in record["masks"])
    before = source(input_ids=tokens).logits
    for mask in [0.0, 0.3, 1.0]:
        # A folder that is no checkpoint, so that its masks can be changed.
        shutil.copytree(tmp_path / "grown", tmp_path / "masked", ignore=shutil.ignore_patterns("manifest.json"))
        kinds = {kind: mask for kind in record["masks"]}
        (tmp_path / "masked/growth_mask.json").write_text(json.dumps({**record, "masks": kinds}))
        ours = our_logits(tmp_path, "masked", tokens)
        model = hook_masks(open_model(tmp_path / "masked"), new, lambda: {**kinds, "inner": mask})
        theirs = model(input_ids=tokens).logits
        assert relative(ours, theirs) < LOGIT_TOLERANCE, mask
        changed = relative(ours, before)
        assert changed < LOGIT_TOLERANCE if mask == 0 else changed > 1e-4, mask
        shutil.rmtree(tmp_path / "masked")
    plain = open_model(tmp_path / "grown")(input_ids=tokens).logits
    assert relative(ours, plain) < LOGIT_TOLERANCE, "with masks of 1 it is the plain model"


# The growth of the stage, what is new, and the masks after a share of the ramp.
TRAINED = {
    "depth": ({"operator": "RandomDepth", "factor": 2}, {"layers": [2, 3]}, lambda share: {"layers": share}),
    "width": (
        {"operator": "RandomWidth", "factor": 2},
        {"hidden": range(64, 128), "heads": range(4, 8), "keys": range(2, 4), "inner": range(160, 320)},
        # Neurons, then the residual stream, then heads.
        lambda share: {kind: min(max(3 * share - turn, 0.0), 1.0)
                       for turn, kind in enumerate(["inner", "hidden", "heads"])},
    ),
}


def masked_history(folder, stage, new, masks):
    """Losses and gradient norms of the stage's steps, from its first weights and on its batches."""
    trainer("data", "batches", "job.yaml", "--stage", "large", "--out", "batches.safetensors", folder=folder)
    batches = load_file(folder / "batches.safetensors")
    now = {}
    model = hook_masks(open_model(stage / "00000000-1"), new, lambda: now)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    model.train()
    history = []
    for step, (inputs, targets) in enumerate(zip(batches["inputs"].long(), batches["targets"].long())):
        now.update(masks(min(step / RAMP_STEPS, 1.0)))
        loss = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", TRAINED)
def test_training_through_the_ramp(case, tied, tmp_path):
    growth, new, masks = TRAINED[case]
    content = job(steps=10, model={"tieWordEmbeddings": tied})
    content["spec"]["training"]["schedule"] = {"constant": {}}
    content["spec"]["checkpoint"] = {"everyTokens": STEP_TOKENS, "keepLast": 100}
    name = growth["operator"][0].lower() + growth["operator"][1:]
    options = {name: {"rampTokens": RAMP_STEPS * STEP_TOKENS}}
    large = {"name": "large", "growth": {**growth, **options}, "tokens": STEPS * STEP_TOKENS}
    content["spec"]["stages"].append(large)
    write_job(tmp_path, content)
    trainer("run", "job.yaml", "--json", folder=tmp_path)
    stage = tmp_path / "runs/parity/checkpoints/large"
    last = max(path for path in stage.iterdir() if path.is_dir())
    assert last.name.startswith(f"{STEPS:08}") and not (last / "growth_mask.json").exists()
    steps = json.loads((last / "history.json").read_text())["steps"]
    history = masked_history(tmp_path, stage, new, masks)
    assert len(steps) == len(history) == STEPS
    losses, norms = zip(*history)
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    assert [step["gradientNorm"] for step in steps] == pytest.approx(norms, rel=1e-3)
    # The weights inside the ramp are the ones that are trained, not those that the model runs with.
    inside = json.loads((max(stage.glob("00000006-*")) / "growth_mask.json").read_text())["masks"]
    expected = masks(6 / RAMP_STEPS)
    assert inside["intermediate"] == pytest.approx(expected.get("inner", 1.0))
    assert {kind: inside[kind] for kind in ("hidden", "heads", "layers")} == pytest.approx(
        {kind: expected.get(kind, 1.0) for kind in ("hidden", "heads", "layers")})
