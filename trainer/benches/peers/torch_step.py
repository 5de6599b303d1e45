#!/usr/bin/env python3
"""Times one LLaMA training step in PyTorch on the CPU: the peer that our own step is measured against.

A step is forward, backward, gradient clipping to norm 1 and AdamW, in fp32, on random tokens. The model is
written for speed, not for teaching: one GEMM for query, key and value, one for gate and up, fused attention,
fused norm and cross entropy where PyTorch has them.

With --ranks N it starts N processes that share the batch through DistributedDataParallel over gloo.

Prints one JSON line: tokens_per_second (median over the timed steps), step_seconds, peak_rss_bytes.

With --checkpoint FILE it goes on from that file and trains until SIGTERM, then writes it and ends; every rank is started by
the caller, as torchrun does. Prints a line `step N` after each step.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time


def arguments():
    """The command line; shapes are named as in the other benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["eager", "compile"], default="eager")
    parser.add_argument("--threads", type=int, default=2, help="of each rank")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=1, help="as in our benchmark: one a rank")
    parser.add_argument("--checkpoint", help="train until SIGTERM, from and to this file")
    for name, value in [
        ("hidden", 256), ("layers", 8), ("heads", 4), ("kv-heads", 4), ("intermediate", 688),
        ("vocab", 4096), ("sequence", 256), ("batch", 8), ("warmup", 3), ("steps", 10),
    ]:
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def tune_allocator():
    """Starts this program again with a glibc that keeps freed memory.

    Without it every step returns the activations to the kernel and pays for fresh zeroed pages.
    """
    if os.environ.get("MALLOC_TRIM_THRESHOLD_"):
        return
    keep = str(1 << 40)
    os.environ.update(MALLOC_TRIM_THRESHOLD_=keep, MALLOC_MMAP_THRESHOLD_=str(1 << 32), MALLOC_TOP_PAD_=str(64 << 20))
    os.execv(sys.executable, [sys.executable, *sys.argv])


ARGS = arguments()
tune_allocator()

import torch  # noqa: E402  (the allocator must be settled before)
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402


class Norm(nn.Module):
    """RMSNorm of [..., width]."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.gain.shape, self.gain, 1e-5)


def rotate(x, cos, sin):
    """Rotary embedding of x [batch, heads, length, head]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention with grouped heads, [batch, length, hidden] to the same."""

    def __init__(self, hidden, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, hidden // heads
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * self.head, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x, cos, sin):
        batch, length, hidden = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.head).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))


class Mlp(nn.Module):
    """SwiGLU, [batch, length, hidden] to the same."""

    def __init__(self, hidden, intermediate):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.norm1, self.norm2 = Norm(a.hidden), Norm(a.hidden)
        self.attention = Attention(a.hidden, a.heads, a.kv_heads)
        self.mlp = Mlp(a.hidden, a.intermediate)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


def rotary_tables(head, length, theta=10000.0):
    inverse = theta ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().float(), angle.sin().float()


class Llama(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.embedding = nn.Embedding(a.vocab, a.hidden)
        self.blocks = nn.ModuleList(Block(a) for _ in range(a.layers))
        self.norm = Norm(a.hidden)
        self.head = nn.Linear(a.hidden, a.vocab, bias=False)
        cos, sin = rotary_tables(a.hidden // a.heads, a.sequence)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, inputs, targets):
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def peak_rss_bytes():
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def build(a):
    model = Llama(a)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    if a.ranks > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    return torch.compile(model) if a.mode == "compile" else model, parameters, optimizer


def join(ranks):
    """Starts the other ranks, unless this is one of them, and meets them; returns them."""
    if ranks == 1:
        return []
    others = []
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(ranks), RANK="0")
        for rank in range(1, ranks):
            environment = {**os.environ, "RANK": str(rank)}
            others.append(subprocess.Popen([sys.executable, *sys.argv], env=environment, stdout=subprocess.DEVNULL))
    dist.init_process_group("gloo")
    return others


def train_step(loss_of, parameters, optimizer):
    """One step on random tokens."""
    tokens = torch.randint(ARGS.vocab, (ARGS.batch // ARGS.ranks, ARGS.sequence + 1))
    loss = loss_of(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()


def train_until_terminated():
    """Goes on from the checkpoint; after SIGTERM to all ranks, all stop at the same step and rank 0 writes it."""
    stop = torch.zeros(1)
    signal.signal(signal.SIGTERM, lambda *_: stop.fill_(1))
    dist.init_process_group("gloo")
    model, parameters, optimizer = build(ARGS)
    step = 0
    if os.path.exists(ARGS.checkpoint):
        state = torch.load(ARGS.checkpoint, mmap=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while True:
        train_step(model, parameters, optimizer)
        step += 1
        print(f"step {step}", flush=True)
        stop_now = stop.clone()
        dist.all_reduce(stop_now)
        if stop_now.item():
            break
    if dist.get_rank() == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, ARGS.checkpoint + ".new")
        os.replace(ARGS.checkpoint + ".new", ARGS.checkpoint)
    dist.destroy_process_group()


def main():
    """Times the steps and prints the JSON line."""
    torch.set_num_threads(ARGS.threads)
    torch.manual_seed(1)
    if ARGS.checkpoint:
        train_until_terminated()
        return
    others = join(ARGS.ranks)
    loss_of, parameters, optimizer = build(ARGS)
    seconds = []
    for _ in range(ARGS.warmup + ARGS.steps):
        start = time.perf_counter()
        train_step(loss_of, parameters, optimizer)
        seconds.append(time.perf_counter() - start)
    if ARGS.ranks > 1:
        dist.destroy_process_group()
    for other in others:
        other.wait()
    timed = seconds[ARGS.warmup:]
    rate = ARGS.batch * ARGS.sequence / statistics.median(timed)
    print(json.dumps({"tokens_per_second": rate, "step_seconds": timed, "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
