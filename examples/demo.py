"""The demo: a real training loses a rank, twice, and goes on.

    python examples/demo.py --verify

It starts `resilient-run` with `train_gpt.py` on two ranks and one warm standby, waits until the loss falls, and kills first the rank that
the standby shadows, then one that nobody shadows. What it tells it has read in the run directory (status.json and events.jsonl), as any
tool could. With --verify it trains once more undisturbed and compares weights and optimizer state, bit by bit.
Needs nothing but the standard library; every wait has a deadline.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
PATIENCE_S = 300.0
BARS = "▁▂▃▄▅▆▇█"


class Teller:
    """Prints our lines and the training's, never mixed; colour only on a terminal."""

    def __init__(self) -> None:
        """Writes to stdout."""
        self.recoveries = 0  # that the training's own output has told
        self._lock = threading.Lock()
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def say(self, text: str = "", style: str = "1") -> None:
        """One line of ours. `style`: of ANSI (1 bold, 31 red, 32 green)."""
        self._write(f"\033[{style}m{text}\033[0m" if self._colour and text else text)

    def pass_on(self, stream: IO[str]) -> None:
        """Lines of the training, until its end."""
        for line in stream:
            self.recoveries += line.startswith("resilient-run: recovered in ")
            self._write("    " + line.rstrip("\n"))

    def _write(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)


class Training:
    """One resilient-run, and what its run directory says."""

    def __init__(self, teller: Teller, run_dir: Path, flags: list[str], script_flags: list[str]) -> None:
        """Start it."""
        self.run_dir, self.digest = run_dir, run_dir / "digest"
        run_dir.mkdir(parents=True)
        launcher = Path(sys.executable).with_name("resilient-run")
        command = [str(launcher)] if launcher.exists() else [sys.executable, "-m", "resilient.run"]
        ours = [*flags, "--run-dir", str(run_dir), str(HERE / "train_gpt.py"), *script_flags, "--digest", str(self.digest)]
        shown = [word if " " not in word else repr(word) for word in ["resilient-run", *ours]]
        teller.say("$ " + " ".join(shown).replace(str(Path.cwd()) + os.sep, ""))
        self._process = subprocess.Popen(  # noqa: S603  our own command
            [*command, *ours], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=teller.pass_on, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def status(self) -> dict[str, Any]:
        """status.json; {} before there is one."""
        try:
            found: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Lines of events.jsonl of one kind."""
        try:
            text = (self.run_dir / "events.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        whole = text[: text.rfind("\n") + 1]
        return [event for event in map(json.loads, whole.splitlines()) if event["event"] == kind]

    def step(self) -> int:
        """Steps that every rank has completed."""
        return min((rank["step"] for rank in self.status().get("ranks", [])), default=-1)

    def until(self, what: str, true: Callable[[], bool]) -> None:
        """Wait. Ends the demo if the training ends before, or after PATIENCE_S."""
        end = time.monotonic() + PATIENCE_S
        while not true():
            if self._process.poll() is not None:
                self.finish()
                raise SystemExit(f"demo: the training ended before {what}; see {self.run_dir}")
            if time.monotonic() > end:
                self.stop()
                raise SystemExit(f"demo: {what} expected within {PATIENCE_S:.0f} s; see {self.run_dir}")
            time.sleep(0.05)

    def finish(self) -> int:
        """Wait for its end; gives the exit code."""
        code = self._process.wait()
        self._reader.join(timeout=5.0)
        return code

    def stop(self) -> None:
        """End it in order, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self.finish()


def kill_one(teller: Teller, training: Training, step: int, *, shadowed: bool) -> None:
    """After `step` steps SIGKILL a rank that a ready standby shadows, or one that none does, and tell what followed."""
    training.until("a standby is ready", lambda: any(standby["ready"] for standby in training.status().get("standbys", [])))
    training.until(f"{step} steps are done", lambda: training.step() >= step)
    before = training.status()
    shadows = {standby["shadow"] for standby in before["standbys"] if standby["ready"]}
    victim = next(rank for rank in reversed(before["ranks"]) if (rank["rank"] in shadows) == shadowed)
    closed, told = len(training.events("incident_closed")), teller.recoveries
    how = "a standby that knows its part is waiting" if shadowed else "nobody shadows it: its successor starts the script anew"
    teller.say(f"\n>>> kill -9 {victim['pid']}   rank {victim['rank']}   ({how})", "1;31")
    os.kill(victim["pid"], signal.SIGKILL)
    training.until("the recovery", lambda: len(training.events("incident_closed")) > closed)
    incident = training.events("incident_closed")[closed]
    training.until("the next status", lambda: training.status()["round"] > before["round"] and teller.recoveries > told)
    tell_recovery(teller, incident, before, training.status())


def tell_recovery(teller: Teller, incident: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    """The recovery line, and who sits where now."""
    phases = "   ".join(f"{name} {incident[name] * 1000:.0f}" for name in ("detect", "decide", "regroup", "restore", "replay"))
    teller.say(f"<<< recovered in {incident['downtime_s']:.3f} s, {incident['steps_lost']} steps lost", "1;32")
    teller.say(f"    {phases}   (milliseconds)   state from: {incident['restored_from']}", "32")
    pids = {rank["rank"]: rank["pid"] for rank in before["ranks"]}
    for rank in after["ranks"]:
        was, now = pids[rank["rank"]], rank["pid"]
        teller.say(f"    rank {rank['rank']}: " + (f"still pid {now}" if was == now else f"pid {was} -> {now}"), "32")
    teller.say()


def tell_losses(teller: Teller, training: Training) -> None:
    """The falling loss, as a row of bars."""
    by_step = {event["step"]: event["scalars"]["loss"] for event in training.events("log") if event["rank"] == 0}
    losses = [by_step[step] for step in sorted(by_step)]
    if not losses:
        return
    width = min(60, len(losses))
    cuts = [i * len(losses) // width for i in range(width + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    bars = "".join(BARS[round((mean - low) / (high - low or 1.0) * (len(BARS) - 1))] for mean in means)
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        bars = f"({len(losses)} steps)"
    teller.say(f"loss of rank 0   {means[0]:.2f} {bars} {means[-1]:.2f}")


def main() -> int:
    """Run it; gives the exit code."""
    parser = argparse.ArgumentParser(description="Train a small GPT, kill ranks while it runs, and see it go on.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--small", action="store_true", help="1 M parameters instead of 10 M")
    parser.add_argument("--data", default="", metavar="PATH", help="text to train on (default: Python's own sources)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S"), metavar="DIR")
    parser.add_argument("--verify", action="store_true", help="train once more undisturbed, and compare bit by bit")
    args = parser.parse_args()
    script_flags = ["--steps", str(args.steps), *(["--small"] if args.small else []), *(["--data", args.data] if args.data else [])]
    flags = ["--standalone", "--nproc-per-node", "2"]
    teller = Teller()

    teller.say("A GPT learns to write Python. Two ranks train it, a standby waits; each rank will be killed once.\n")
    training = Training(teller, args.run_dir / "killed", [*flags, "--standbys", "1"], script_flags)
    try:
        kill_one(teller, training, args.steps // 4, shadowed=True)
        kill_one(teller, training, args.steps // 2, shadowed=False)
        code = training.finish()
    finally:
        training.stop()
    teller.say()
    tell_losses(teller, training)
    if code or not args.verify:
        return code

    teller.say("\nThe same training, undisturbed, to compare:\n")
    calm = Training(teller, args.run_dir / "calm", flags, script_flags)
    try:
        code = calm.finish()
    finally:
        calm.stop()
    if code:
        return code
    ours, theirs = (run.digest.read_text(encoding="utf-8").strip() for run in (training, calm))
    teller.say(f"\nweights and optimizer state   killed {ours[:16]}...   undisturbed {theirs[:16]}...")
    if ours == theirs:
        teller.say("bitwise equal: the kills left no trace.", "1;32")
    else:
        teller.say("DIFFERENT: the kills changed the outcome.", "1;31")
    return int(ours != theirs)


if __name__ == "__main__":
    sys.exit(main())
