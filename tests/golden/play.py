"""Plays a scenario file on the simulated fleet and writes down what happened.

A file opens with its story, then commands, one per line, then ---- and the trace that must come out. `python tests/golden/play.py FILE...`
writes the trace anew: read the difference before you commit it.

Commands:
    fleet [nodes=1] [slots=2] ...   the world: fields of sim.world.Spec, and seed=N
    run SECONDS                     let time pass
    until TEXT                      let time pass until a line of the trace contains TEXT (60 s at most)
    kill NODE/RANK | NODE/standby | NODE        SIGKILL a rank's process, a standby, a whole node
    done NODE/RANK                  let time pass until this rank is past its loop
    stop | spin | torn NODE/RANK    SIGSTOP; an endless loop; tracked state changed by hand
    raise NODE/RANK TEXT            an uncaught exception
    store | zygote NODE             the store process dies; a zygote dies
    cut NODE SECONDS                the control link is silent
    start NODE                      the node comes back
    ask | warn NODE                 somebody wants a checkpoint; a scheduler's warning
    term NODE                       SIGTERM to its agent
    damage STEP                     the persistent copies of a step are damaged
    saw NODE KEY=VALUE ... TEXT     a probe's finding (fields of Finding; times=N: so many, each of another text)
    devices NODE DEVICE=LOCAL_RANK  which local rank uses which device
    admit NODE [WHY]                its pre-flight checks have passed, or (with a reason) not
    dies NODE/RANK CODE             exit code of a rank's process, negative: by that signal
    finish                          let time pass until the run is over (120 s at most)
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import msgspec

from resilient.core.machine import Admitted, Asked, Devices, Probed, Stop, Warned
from resilient.core.messages import Finding
from resilient.rulebook import shipped
from resilient.sim.faults import seated, standbys
from resilient.sim.world import Host, Spec, World


class Player:
    def __init__(self) -> None:
        self.world = World(Spec())

    def do(self, command: str) -> None:
        verb, *words = command.split()
        getattr(self, verb)(*words)

    def fleet(self, *pairs: str) -> None:
        given = dict(pair.split("=", 1) for pair in pairs)
        seed = int(given.pop("seed", "1"))
        self.world = World(Spec(**{name: ast.literal_eval(value) for name, value in given.items()}, rules=shipped()), seed)

    def run(self, seconds: str) -> None:
        self.world.run(float(seconds))

    def until(self, *words: str) -> None:
        text = " ".join(words)
        start = len(self.world.trace.lines)
        assert self.world.run(60.0, lambda: any(text in line for _, line in self.world.trace.lines[start:])), f"never seen: {text}"

    def _one(self, where: str):
        node, _, which = where.partition("/")
        among = standbys(self.world) if which == "standby" else [s for s in seated(self.world) if s.rank == int(which)]
        found = [s for s in among if s.host.name == node]
        assert found, f"nobody at {where}\n{self.world.trace.tail()}"
        return found[0]

    def kill(self, *where: str) -> None:
        targets = [self._one(w) if "/" in w else self.world.hosts[w] for w in where]
        for target in targets:
            if isinstance(target, Host):
                target.kill()
            else:
                target.exit(-9)

    def stop(self, where: str) -> None:
        self._one(where).stop()

    def spin(self, where: str) -> None:
        script = self._one(where)
        assert self.world.run(5.0, lambda: script.phase == "running")
        script.spin()

    def done(self, where: str) -> None:
        script = self._one(where)
        assert self.world.run(60.0, lambda: script.phase == "done")

    def torn(self, where: str) -> None:
        self._one(where).torn = True

    def throw(self, where: str, *words: str) -> None:
        text = " ".join(words)
        self._one(where).throw(text, text)

    def store(self) -> None:
        self.world.kill_store()

    def zygote(self, node: str) -> None:
        self.world.kill_zygote(node)

    def cut(self, node: str, seconds: str) -> None:
        self.world.cut(node, float(seconds), reset=False)

    def start(self, node: str) -> None:
        self.world.start_node(node)

    def ask(self) -> None:
        self.world.decide(Asked())

    def warn(self, node: str) -> None:
        self.world.hosts[node].step(Warned(text="SIGUSR1"))

    def term(self, node: str) -> None:
        self.world.hosts[node].step(Stop(signal=15))

    def damage(self, *steps: str) -> None:
        self.world.damaged.update(int(s) for s in steps)

    def saw(self, node: str, *words: str) -> None:
        given = {"kind": "", "class": ""} | dict(w.split("=", 1) for w in words if "=" in w)
        text, times = " ".join(w for w in words if "=" not in w), int(given.pop("times", "1"))
        facts = {**given, "seq": 0, "clears": "clears" in given}
        many = [
            msgspec.convert(
                {**facts, "text": f"{text} ({i})" if times > 1 else text, "code": facts.get("code", "") or str(i) * (times > 1)}, Finding
            )
            for i in range(times)
        ]
        self.world.hosts[node].step(Probed(findings=tuple(many)))

    def devices(self, node: str, *pairs: str) -> None:
        local_ranks = {name: int(rank) for name, _, rank in (pair.rpartition("=") for pair in pairs)}
        self.world.hosts[node].step(Devices(local_ranks=local_ranks))

    def admit(self, node: str, *why: str) -> None:
        self.world.hosts[node].step(Admitted(passed=not why, why=" ".join(why)))

    def dies(self, where: str, code: str) -> None:
        self._one(where).exit(int(code))

    def finish(self) -> None:
        assert self.world.run(120.0, self.world.over), f"not over\n{self.world.trace.tail()}"


def play(path: Path) -> tuple[str, list[str], list[str]]:
    """(head of the file, trace that it expects, trace that came out)."""
    head, _, expected = path.read_text().partition("----\n")
    player = Player()
    for row in head.splitlines():
        if row.strip() and not row.startswith("#"):
            player.do(row.replace("raise ", "throw ", 1))
    return head, expected.splitlines(), [text.replace("\n", " | ") for _, text in player.world.trace.lines]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        head, _, found = play(Path(name))
        Path(name).write_text(head + "----\n" + "\n".join(found) + "\n")
