#!/usr/bin/env python3
"""Our training step against PyTorch's, eager and compiled: speed, peak memory, distance from the GEMM limit.

Every measurement is a process of its own, and the three take turns in rounds, so that a slow minute of the machine
hits all of them. Ratios are taken within a round; the median over the rounds is shown.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

OURS_DEFAULT = "cargo bench -q -p growth-trainer --bench step --"
PEER = Path(__file__).resolve().parent / "peers/torch_step.py"
REPOSITORY = PEER.parents[3]

SHAPES = {
    "reference": {"hidden": 256, "layers": 8, "heads": 4, "kv-heads": 4, "intermediate": 688,
                  "vocab": 4096, "sequence": 256, "batch": 8},
    "deeper": {"hidden": 192, "layers": 16, "heads": 6, "kv-heads": 2, "intermediate": 512,
               "vocab": 4096, "sequence": 256, "batch": 8},
    "wider": {"hidden": 512, "layers": 4, "heads": 8, "kv-heads": 8, "intermediate": 1376,
              "vocab": 4096, "sequence": 256, "batch": 4},
}
CONTENDERS = {"ours": "growth-trainer", "eager": "PyTorch eager", "compile": "PyTorch compile"}
RANKS = {"ours": "growth-trainer, 1 rank", "ranks": "growth-trainer", "ddp": "PyTorch DDP, gloo",
         "ddp-compile": "PyTorch DDP, gloo, compile"}


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="a comma between names")
    parser.add_argument("--contenders", help="a comma between names")
    parser.add_argument("--ranks", type=int, default=1,
                        help="compares so many ranks of threads/N threads with one rank and with PyTorch DDP")
    parser.add_argument("--json", type=Path, help="writes every measurement there")
    parsed = parser.parse_args()
    parsed.names = RANKS if parsed.ranks > 1 else CONTENDERS
    parsed.contenders = parsed.contenders or ",".join(parsed.names)
    for names, known in (parsed.shapes, SHAPES), (parsed.contenders, parsed.names):
        if unknown := set(names.split(",")) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return parsed


def command(contender, shape, a):
    """The command of one measurement."""
    sizes = {**SHAPES[shape], "threads": a.threads, "warmup": a.warmup, "steps": a.steps}
    if a.ranks > 1:
        sizes["micro-batches"] = a.ranks
    if a.ranks > 1 and contender != "ours":
        sizes.update(ranks=a.ranks, threads=max(1, a.threads // a.ranks))
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    if contender in ("ours", "ranks"):
        return shlex.split(os.environ.get("GROWTH_BENCH_STEP", OURS_DEFAULT)) + flags
    mode = "compile" if contender.endswith("compile") else "eager"
    return [sys.executable, str(PEER), "--mode", mode, *flags]


def measure(contender, shape, a):
    """Runs one process; returns its JSON line."""
    begin = time.monotonic()
    done = subprocess.run(
        command(contender, shape, a), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{contender} on {shape} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    # With --warmup 0 --steps 1 that is the time from a process's start to its first step.
    return {**json.loads(line), "process_seconds": time.monotonic() - begin}


def run_rounds(shape, a):
    """Contender -> its measurements, one a round."""
    results = {contender: [] for contender in a.contenders.split(",")}
    for number in range(a.rounds):
        for contender, measurements in results.items():
            measurements.append(measure(contender, shape, a))
            rate = measurements[-1]["tokens_per_second"]
            print(f"{shape} round {number + 1}: {contender} {rate:.0f} tokens/s", file=sys.stderr)
    return results


def ratio(measurements, base, key):
    """Median over the rounds of key relative to the contender `base`, as text."""
    if base is None:
        return "-"
    return f"{statistics.median(mine[key] / theirs[key] for mine, theirs in zip(measurements, base)):.2f}"


def limit_share(measurements):
    """Median share of the GEMM limit that was measured in the same process, as text."""
    shares = [m["tokens_per_second"] / m["gemm_limit_tokens_per_second"] for m in measurements
              if m.get("gemm_limit_tokens_per_second")]
    return f"{statistics.median(shares):.0%}" if shares else "-"


def row(shape, contender, results, names):
    """One line of the table."""
    measurements, base = results[contender], results.get("ddp", results.get("compile"))
    rates = [m["tokens_per_second"] for m in measurements]
    memory = statistics.median(m["peak_rss_bytes"] for m in measurements)
    cells = [
        shape, names[contender],
        f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})",
        ratio(measurements, base, "tokens_per_second"),
        f"{memory / 1e9:.2f} GB", ratio(measurements, base, "peak_rss_bytes"), limit_share(measurements),
    ]
    return "| " + " | ".join(cells) + " |"


def main():
    """Measures, prints the table, writes the JSON file."""
    a = arguments()
    everything = {shape: run_rounds(shape, a) for shape in a.shapes.split(",")}
    base = "DDP" if a.ranks > 1 else "compile"
    print(f"| shape | trainer | tokens/s, median (min-max) | speed / {base} | peak memory | memory / {base} "
          "| of GEMM limit |")
    print("|---|---|---|---|---|---|---|")
    for shape, results in everything.items():
        for contender in results:
            print(row(shape, contender, results, a.names))
    if a.ranks > 1:
        for shape, results in everything.items():
            for name in "waited_seconds", "wire_seconds", "copy_seconds":
                print(f"{shape}, {a.ranks} ranks: {name} {statistics.median(m[name] for m in results['ranks']):.4f}")
    for shape, results in everything.items():
        for name, measurements in results.items():
            seconds = statistics.median(m["process_seconds"] for m in measurements)
            print(f"{shape}: {a.names[name]}: {seconds:.2f} s from the start of the process to its end")
    if a.json:
        settings = {"rounds": a.rounds, "warmup": a.warmup, "steps": a.steps, "threads": a.threads}
        a.json.write_text(json.dumps({"settings": settings, "shapes": SHAPES, "results": everything}, indent=1) + "\n")


if __name__ == "__main__":
    main()
