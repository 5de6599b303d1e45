#!/usr/bin/env python3
"""Growth steps beside `cp` of the grown model's bytes and beside the same step in PyTorch: time and peak memory.

Every measurement is a process of its own, ends with its files on the disk (fsync), and begins with nothing left to be
written; the contenders take turns in rounds. Ratios are taken within a round; the median over the rounds is shown.
Before the first round, PyTorch's result is compared with ours.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PEER = Path(__file__).resolve().parent / "peers/torch_growth.py"

# All grow into the same model: 16 layers, 1,024 wide, 254 M parameters, 1.02 GB.
GROWTHS = {
    "stack2": {"operator": "Stack", "factor": 2, "source": {"layers": 8, "hidden": 1024}},
    "stack4": {"operator": "Stack", "factor": 4, "source": {"layers": 4, "hidden": 1024}},
    "width2": {"operator": "DirectWidth", "factor": 2, "source": {"layers": 16, "hidden": 512}},
}
NAMES = {"ours": "growth-trainer", "measured": "growth-trainer, measured", "cp": "cp, fsync", "torch": "PyTorch"}


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--growths", default=",".join(GROWTHS), help="a comma between names")
    parser.add_argument("--contenders", default=",".join(NAMES), help="a comma between names")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "target/growth-bench")
    parser.add_argument("--json", type=Path, help="writes every measurement there")
    parsed = parser.parse_args()
    for names, known in (parsed.growths, GROWTHS), (parsed.contenders, NAMES):
        if unknown := set(names.split(",")) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return parsed


def torch_peer(*words):
    """A command of the peer."""
    return [sys.executable, str(PEER), *map(str, words)]


def command(contender, growth, source, target, grown):
    """The command of one measurement; `grown` holds what cp copies."""
    if contender == "cp":
        # --reflink=never: a clone of the blocks is no copy of the bytes.
        return ["cp", "--recursive", "--reflink=never", "--sparse=never", str(grown), str(target)]
    if contender == "torch":
        return torch_peer("grow", "--operator", growth["operator"], "--factor", growth["factor"],
                          "--from", source, "--to", target)
    measure = [] if contender == "measured" else ["--measure-tokens", "0"]
    return [os.environ["GROWTH_TRAINER"], "grow", "--from", str(source), "--to", str(target), "--quiet",
            "--operator", growth["operator"], "--factor", str(growth["factor"]), *measure]


def flush(folder):
    """The files of a folder on the disk; ours are there already, and then this costs nothing."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(words, target):
    """Runs a process; returns its seconds, those of flushing included, and its peak memory."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    begin = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    ended = time.monotonic() - begin
    if process.returncode != 0:
        sys.exit(f"{' '.join(words)} ended with {process.returncode}")
    flush(target)
    return {"seconds": time.monotonic() - begin, "process_seconds": ended,
            "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_rss_bytes": usage.ru_maxrss * 1024}


def run(name, a):
    """Contender -> its measurements of one growth, one a round; and the bytes of the grown model."""
    growth = GROWTHS[name]
    folder = a.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source, grown, target = folder / "source", folder / "grown", folder / "target"
    shape = [text for key, value in growth["source"].items() for text in (f"--{key}", value)]
    subprocess.run(torch_peer("make", "--to", source, *shape), check=True)
    subprocess.run(command("ours", growth, source, grown, grown), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command("torch", growth, source, target, grown), check=True)
    subprocess.run(torch_peer("compare", "--from", grown, "--to", target), check=True)
    size = sum(path.stat().st_size for path in grown.iterdir())
    results = {contender: [] for contender in a.contenders.split(",")}
    for number in range(a.rounds):
        for contender, measurements in results.items():
            measurements.append(measure(command(contender, growth, source, target, grown), target))
            seconds, cpu = measurements[-1]["seconds"], measurements[-1]["cpu_seconds"]
            print(f"{name} round {number + 1}: {contender} {seconds:.2f} s, {cpu:.2f} s of CPU", file=sys.stderr)
    shutil.rmtree(folder)
    return size, results


def row(name, size, contender, results):
    """One line of the table."""
    measurements = results[contender]
    seconds = [m["seconds"] for m in measurements]
    ratio = "-"
    if copies := results.get("cp"):
        ratio = f"{statistics.median(c['seconds'] / m['seconds'] for c, m in zip(copies, measurements)):.2f}"
    memory = statistics.median(m["peak_rss_bytes"] for m in measurements)
    cells = [
        name, NAMES[contender], f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})",
        f"{size / statistics.median(seconds) / 1e9:.2f} GB/s", ratio, f"{memory / 1e6:,.0f} MB",
    ]
    return "| " + " | ".join(cells) + " |"


def main():
    """Measures, prints the table, writes the JSON file."""
    a = arguments()
    everything = {name: run(name, a) for name in a.growths.split(",")}
    print("| growth | by | seconds, median (min-max) | of the target's bytes | speed / cp | peak memory |")
    print("|---|---|---|---|---|---|")
    for name, (size, results) in everything.items():
        for contender in results:
            print(row(name, size, contender, results))
    if a.json:
        content = {name: {"bytes": size, "results": results} for name, (size, results) in everything.items()}
        a.json.write_text(json.dumps({"growths": GROWTHS, "measured": content}, indent=1) + "\n")


if __name__ == "__main__":
    main()
