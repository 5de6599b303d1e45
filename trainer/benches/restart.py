#!/usr/bin/env python3
"""How soon a training of several ranks works: from its start, and again after SIGTERM, beside PyTorch DDP.

Both train the reference model of `trainer/benches/compare`. A round of each: start with nothing, the first step; four
more steps; SIGTERM to all ranks; as soon as all have ended, start again; the first new step. The two take turns in
rounds; medians, and the median of the ratios within a round, are shown.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PEER = Path(__file__).resolve().parent / "peers/torch_step.py"
REPOSITORY = PEER.parents[3]
PATIENCE_SECONDS = 120
KEYS = {
    "start_seconds": "start to first step",
    "stop_seconds": "SIGTERM to the end of all ranks",
    "resume_seconds": "start to first step after a checkpoint",
    "restart_seconds": "SIGTERM to the first step after it",
    "step_seconds": "a step, for comparison",
    "begin_seconds": "start to training at work: without that step",
    "again_seconds": "SIGTERM to training at work again: without that step",
}
# The reference model of `compare`, the defaults of torch_step.py.
JOB = """
apiVersion: growth.dev/v1alpha1
kind: GrowthTrainingJob
metadata: {name: restart}
spec:
  model: {hiddenSize: 256, intermediateSize: 688, numAttentionHeads: 4, numKeyValueHeads: 4, vocabSize: 4096,
          maxPositionEmbeddings: 256}
  data:
    train: [{uri: "file://TEXT"}]
    holdOutPercent: 25
    tokenizer: {train: {vocabSize: 1024}}
  storage: {uri: "file://FOLDER/storage"}
  training: {sequenceLength: 256, globalBatchTokens: 2048, microBatchTokens: MICRO}
  evaluation: {everyTokens: 1B, tokens: 256}
  checkpoint: {everyTokens: 1B}
  stages: [{name: only, model: {numHiddenLayers: 8}, tokens: 100M, replicas: RANKS}]
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ours:
    """Ranks as pods run them: `growth-trainer train`."""

    def __init__(self, folder, a):
        self.folder, self.ranks, self.attempt = folder, a.ranks, 0
        self.program = os.environ["GROWTH_TRAINER"]
        job = JOB.replace("TEXT", str(Path(a.text).resolve())).replace("FOLDER", str(folder))
        job = job.replace("MICRO", str(2048 // a.ranks)).replace("RANKS", str(a.ranks))
        (folder / "job.yaml").write_text(job)
        self.run("data", "prepare", folder / "job.yaml")
        self.run("plan", folder / "job.yaml", "--stage", "only", "--output", folder / "plan.json")

    def run(self, *arguments):
        command = [self.program, *map(str, arguments)]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: {done.stderr}")

    def start(self):
        self.attempt += 1
        self.port, leader = free_port(), free_port()
        command = [self.program, "train", str(self.folder / "plan.json"), "--attempt", str(self.attempt),
                   "--replicas", str(self.ranks), "--leader", f"127.0.0.1:{leader}", "--threads", "1", "--quiet"]
        ranks = [[*command, "--rank", str(rank)] for rank in range(self.ranks)]
        ranks[0] += ["--listen", f"127.0.0.1:{self.port}"]
        return [subprocess.Popen(rank, cwd=REPOSITORY, stdout=subprocess.DEVNULL) for rank in ranks]

    def step(self):
        """The last step that rank 0 has done."""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
            connection.request("GET", "/progress")
            answer = connection.getresponse()
            return json.loads(answer.read())["step"] if answer.status == 200 else 0
        except (OSError, http.client.HTTPException):
            return 0


    def saved_step(self):
        """The step of the last checkpoint."""
        checkpoints = (self.folder / "storage/restart/checkpoints/only").iterdir()
        return max(int(checkpoint.name.split("-")[0]) for checkpoint in checkpoints)


class Ddp:
    """Ranks as torchrun starts them."""

    def __init__(self, folder, a):
        self.file, self.ranks, self.last = folder / "checkpoint.pt", a.ranks, 0

    def start(self):
        self.last = 0
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                       "WORLD_SIZE": str(self.ranks)}
        command = [sys.executable, str(PEER), "--ranks", str(self.ranks), "--threads", "1", "--checkpoint", str(self.file)]
        processes = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
                     for rank in range(self.ranks)]
        for process in processes:
            threading.Thread(target=self.read, args=[process], daemon=True).start()
        return processes

    def read(self, process):
        for line in process.stdout:
            self.last = max(self.last, int(line.removeprefix("step ")))

    def step(self):
        return self.last

    def saved_step(self):
        """It saves the last step that it prints."""
        return self.last


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        if time.monotonic() > deadline:
            sys.exit(f"{what} did not happen in {PATIENCE_SECONDS} s")
        time.sleep(0.005)
    return value


def reach(contender, processes, step):
    """Waits until that step is done; returns the last one."""
    def reached():
        if any(process.poll() is not None for process in processes):
            sys.exit(f"{type(contender).__name__}: a rank ended before step {step}")
        last = contender.step()
        return last if last >= step else 0
    return wait_for(reached, f"step {step}")


def end(processes):
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        if process.wait(PATIENCE_SECONDS) != 0:
            sys.exit(f"a rank ended with {process.returncode}")


def measure(kind, a):
    """One round of one contender."""
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        contender = kind(Path(folder), a)
        began = time.monotonic()
        processes = contender.start()
        first = reach(contender, processes, 1)
        started = time.monotonic()
        last = reach(contender, processes, first + 4)
        step_seconds = (time.monotonic() - started) / (last - first)
        terminated = time.monotonic()
        end(processes)
        ended = time.monotonic()
        saved = contender.saved_step()
        processes = contender.start()
        reach(contender, processes, saved + 1)
        resumed = time.monotonic()
        end(processes)
    return {
        "start_seconds": started - began,
        "stop_seconds": ended - terminated,
        "resume_seconds": resumed - ended,
        "restart_seconds": resumed - terminated,
        "step_seconds": step_seconds,
        "begin_seconds": started - began - step_seconds,
        "again_seconds": resumed - terminated - step_seconds,
    }


def main():
    """Measures, prints the table, writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--text", default="docs/*.md", help="what our side reads; the peer trains on random tokens")
    parser.add_argument("--folder", help="where checkpoints go; default: the system's folder for temporary files")
    parser.add_argument("--json", type=Path, help="writes every measurement there")
    a = parser.parse_args()
    results = {Ours: [], Ddp: []}
    for number in range(a.rounds):
        for kind, rounds in results.items():
            rounds.append(measure(kind, a))
            print(f"round {number + 1}: {kind.__name__} {rounds[-1]}", file=sys.stderr)
    ours, ddp = results.values()
    print(f"| {a.ranks} ranks of 1 thread | growth-trainer | PyTorch DDP, gloo | times as long |")
    print("|---|---|---|---|")
    for key, name in KEYS.items():
        medians = [statistics.median(one[key] for one in rounds) for rounds in (ours, ddp)]
        ratio = statistics.median(theirs[key] / mine[key] for mine, theirs in zip(ours, ddp))
        print(f"| {name} | {medians[0]:.2f} s | {medians[1]:.2f} s | {ratio:.1f} |")
    if a.json:
        everything = {kind.__name__: rounds for kind, rounds in results.items()}
        a.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
