#!/usr/bin/env python3
"""What a checkpoint costs a training: the same job with a checkpoint every four steps, and with one at its end only.

A round trains both, in turns, for each number of ranks; the ranks share two threads. The time of the steps is what the
attempt's record says: computing, waiting for other ranks, and standing still for checkpoints. All checkpoints are on the
disk (fsync) when the training ends, and hold the whole state whatever the number of ranks. Medians over the rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from restart import JOB, REPOSITORY

STEPS, INTERVAL, STEP_TOKENS, THREADS = 49, 4, 2048, 2


def train(folder, ranks, text, interval):
    """Seconds of all steps, and of standing still."""
    job = JOB.replace("TEXT", str(text)).replace("FOLDER", str(folder)).replace("MICRO", str(STEP_TOKENS // 2))
    job = job.replace("RANKS", str(ranks)).replace("tokens: 100M", f"tokens: {STEPS * STEP_TOKENS}")
    job = job.replace("checkpoint: {everyTokens: 1B}", f"checkpoint: {{everyTokens: {interval * STEP_TOKENS}}}")
    (folder / "job.yaml").write_text(job)
    command = [os.environ["GROWTH_TRAINER"], "run", folder / "job.yaml", "--threads", str(THREADS), "--quiet"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    (record,) = (folder / "storage/restart/attempts/only").iterdir()
    seconds = json.loads(record.read_text())["seconds"]
    return seconds["stepping"] + seconds["waiting"] + seconds["checkpointing"], seconds["checkpointing"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--text", default="docs/*.md", help="what is read")
    parser.add_argument("--json", help="write the result here, too")
    a = parser.parse_args()
    text = Path(a.text).resolve()
    results = {ranks: [] for ranks in a.ranks}
    for number in range(a.rounds):
        for ranks in a.ranks:
            pair = {}
            for name, interval in [("with", INTERVAL), ("without", 10**6)]:
                print(f"round {number + 1} of {a.rounds}, {ranks} ranks, {name} checkpoints", file=sys.stderr)
                with tempfile.TemporaryDirectory() as folder:
                    pair[name] = train(Path(folder), ranks, text, interval)
            step = pair["without"][0] / STEPS
            stall = (pair["with"][0] - pair["without"][0]) / (STEPS // INTERVAL)
            still = (pair["with"][1] - pair["without"][1]) / (STEPS // INTERVAL)
            results[ranks].append({"step_seconds": step, "stall_seconds": stall, "still_seconds": still,
                                   "stall_of_a_step": stall / step})
    rows = [{"ranks": ranks} | {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
            for ranks, rounds in results.items()]
    print(f"{'ranks':>5} {'a step':>9} {'a checkpoint costs':>20} {'of a step':>10} {'standing still':>15}")
    for row in rows:
        print(f"{row['ranks']:>5} {row['step_seconds']:>7.3f} s {row['stall_seconds']:>18.3f} s "
              f"{100 * row['stall_of_a_step']:>8.1f} % {row['still_seconds']:>13.3f} s")
    if a.json:
        Path(a.json).write_text(json.dumps({"rows": rows, "rounds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
