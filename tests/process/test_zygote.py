"""The zygote's children are what a cold start would have made, and belong to the agent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from outside import alive, environment, wait_for
from resilient_agents import kernel
from resilient_agents.nursery import DEATHS_MAX, Nursery, SpawnFailed, ZygoteLost
from resilient_agents.orders import Launch, Spawn

pytestmark = pytest.mark.timeout(120)

FACTS = """
import json, os, random, sys, threading
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "orig_argv": sys.orig_argv[1:],
    "flags": [sys.flags.safe_path],
    "main": sorted(name for name in vars(sys.modules["__main__"])),
    "file": __file__,
    "name": __name__,
    "spec": str(getattr(__spec__, "name", None)),
    "session": os.getsid(0) == os.getpid(),
    "threads": threading.active_count(),
    "write_through": sys.stdout.write_through,
    "cwd": os.getcwd(),
    "handlers": [str(__import__("signal").getsignal(n)) for n in (2, 13, 15)],
}))
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture(scope="module", autouse=True)
def subreaper() -> Iterator[None]:
    kernel.adopt_orphans()
    yield


def with_zygote(argv: list[str], scene: Callable[[Nursery, Launch], Coroutine[Any, Any, None]]) -> None:
    """Start a zygote, run the scene with it, end it."""

    async def whole() -> None:
        nursery = Nursery(argv)
        try:
            launch = await nursery.launch()
            assert isinstance(launch, Launch), launch
            ups: list[None] = []
            nursery.watch(lambda: ups.append(None), lambda reason: None, lambda reason: None)
            await scene(nursery, launch)
        finally:
            await nursery.close()
            assert not alive(nursery.pid)

    asyncio.run(whole())


async def born(nursery: Nursery, launch: Launch, out: Path, **more: Any) -> tuple[int, int]:
    """Fork the program; its pid and exit code."""
    order = Spawn(kind="worker", program=launch.program, env=more.pop("env", {}), stdout=str(out), stderr=str(out) + ".err", **more)
    pid = await nursery.spawn(order)
    code = await asyncio.to_thread(kernel.collect, pid, 60.0)
    assert code is not None
    return pid, code


def cold(*command: str | Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-u", *map(str, command)], capture_output=True, text=True, timeout=60, check=True, start_new_session=True
    )
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.mark.parametrize("way", ["script", "module", "directory"])
def test_a_child_is_what_a_cold_start_makes(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__main__.py").write_text(FACTS)
    (tmp_path / "facts.py").write_text(FACTS)
    words: list[str] = {"script": ["facts.py"], "module": ["-m", "pkg"], "directory": ["pkg"]}[way] + ["--lr", "3e-4"]
    expected = cold(*words)

    async def scene(nursery: Nursery, launch: Launch) -> None:
        _, code = await born(nursery, launch, tmp_path / "out")
        assert code == 0, (tmp_path / "out.err").read_text()
        found = json.loads((tmp_path / "out").read_text())
        assert found == expected

    with_zygote(["--standalone", *words], scene)


def test_forks_are_fast_and_have_seeds_of_their_own(tmp_path: Path) -> None:
    """The time is printed, not asserted: a busy machine is not a fault."""
    script = tmp_path / "s.py"
    script.write_text("import random, torch, numpy\nprint(random.random(), torch.rand(1).item(), numpy.random.rand())")

    async def scene(nursery: Nursery, launch: Launch) -> None:
        assert (await born(nursery, launch, tmp_path / "warm"))[1] == 0
        took, said = [], []
        for i in range(5):
            began = time.perf_counter()
            order = Spawn(kind="worker", program=launch.program, env={}, stdout=str(tmp_path / f"o{i}"))
            pid = await nursery.spawn(order)
            took.append(time.perf_counter() - began)
            assert await asyncio.to_thread(kernel.collect, pid, 60.0) == 0
            said.append((tmp_path / f"o{i}").read_text().split())
        print(f"fork: {sorted(took)[2] * 1e3:.1f} ms median, {max(took) * 1e3:.1f} ms maximum")
        assert all(len(set(column)) == 5 for column in zip(*said, strict=True))

    with_zygote(["--standalone", "--nproc-per-node", "1", str(script)], scene)


def test_more_than_one_thread_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    startup = tmp_path / "startup"
    startup.mkdir()
    (startup / "sitecustomize.py").write_text(
        "import sys, threading, time\nif '-c' in sys.orig_argv: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{startup}{os.pathsep}{os.environ['PYTHONPATH']}")
    script = tmp_path / "s.py"
    script.write_text("")

    async def scene(nursery: Nursery, launch: Launch) -> None:
        with pytest.raises(SpawnFailed, match=r"one thread expected before a fork, 2 found \(python"):
            await born(nursery, launch, tmp_path / "out")

    with_zygote(["--standalone", str(script)], scene)


def test_a_child_belongs_to_the_agent_and_dies_with_it(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("import time; print('up', flush=True); time.sleep(60)")
    agent = textwrap.dedent(
        """
        import asyncio, os, sys, time
        from resilient_agents import kernel
        from resilient_agents.nursery import Nursery
        from resilient_agents.orders import Spawn
        kernel.adopt_orphans()
        async def main():
            nursery = Nursery(["--standalone", sys.argv[1]])
            launch = await nursery.launch()
            nursery.watch(lambda: None, lambda reason: None, lambda reason: None)
            pid = await nursery.spawn(Spawn(kind="worker", program=launch.program, env={}, stdout=sys.argv[2]))
            print(pid, nursery.pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
        """,
    )
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", agent, str(script), str(out)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            child, zygote = map(int, process.stdout.readline().split())
            wait_for("the script to run", lambda: out.exists() and "up" in out.read_text())
            seen = kernel.stat(child)
            assert seen is not None
            assert (seen.parent, seen.session) == (process.pid, child)
        finally:
            process.kill()
    wait_for("zygote and child to die with the agent", lambda: not alive(child) and not alive(zygote), 5.0)


@pytest.mark.parametrize(("text", "code"), [("import sys; sys.exit(7)", 7), ("1/0", 1), ("import os, signal; os.kill(os.getpid(), 9)", -9)])
def test_wait_status_and_traceback(text: str, code: int, tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text(text)

    async def scene(nursery: Nursery, launch: Launch) -> None:
        error_file = tmp_path / "error.json"
        _, found = await born(nursery, launch, tmp_path / "out", env={"TORCHELASTIC_ERROR_FILE": str(error_file)})
        assert found == code
        said = (tmp_path / "out.err").read_text()
        assert "resilient" not in said
        if code == 1:
            assert said.splitlines()[1].strip() == f'File "{script}", line 1, in <module>'
            message = json.loads(error_file.read_text())["message"]
            assert message["message"] == "ZeroDivisionError: division by zero"
            assert message["extraInfo"]["py_callstack"] == said
        else:
            assert not error_file.exists()

    with_zygote(["--standalone", str(script)], scene)


def test_pickle_and_spawned_processes_find_the_scripts_main(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, pickle, sys
            class Thing:
                value = 3
            def work(queue, thing):
                queue.put((thing.value, __name__, sys.argv[1:]))
            if __name__ == "__main__":
                assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
                for method in ("spawn", "fork"):
                    context = multiprocessing.get_context(method)
                    queue = context.Queue()
                    process = context.Process(target=work, args=(queue, Thing()))
                    process.start()
                    print(method, *queue.get(timeout=60))
                    process.join()
                from torch.utils.data import DataLoader
                print("loaded", sum(DataLoader(list(range(10)), num_workers=1)).item())
            """,
        ),
    )

    async def scene(nursery: Nursery, launch: Launch) -> None:
        _, code = await born(nursery, launch, tmp_path / "out")
        assert code == 0, (tmp_path / "out.err").read_text()
        assert (tmp_path / "out").read_text().splitlines() == [
            "spawn 3 __mp_main__ ['a']",
            "fork 3 __main__ ['a']",
            "loaded 45",
        ]

    with_zygote(["--standalone", str(script), "a"], scene)


def test_threads_and_matrix_products_work_in_children(tmp_path: Path) -> None:
    """A parallel region in the parent would hang every child in its first one."""
    script = tmp_path / "s.py"
    script.write_text(
        "import torch, numpy\na = torch.randn(600, 600)\nprint((a @ a).shape, (numpy.ones((600, 600)) @ numpy.ones((600, 600))).sum())"
    )

    async def scene(nursery: Nursery, launch: Launch) -> None:
        for _ in range(2):
            assert (await born(nursery, launch, tmp_path / "out"))[1] == 0

    with_zygote(["--standalone", "--nproc-per-node", "1", str(script)], scene)


@pytest.mark.parametrize(
    ("flags", "set_by_user", "threads"),
    [
        (["--nproc-per-node", "2"], None, "1"),
        (["--nproc-per-node", "1"], None, "None"),
        (["--nproc-per-node", "cpu"], None, "1" if (os.cpu_count() or 1) > 1 else "None"),
        (["--role", "misleading.py", "--nproc-per-node", "2"], None, "1"),  # guessed wrong, so torch is loaded again
        (["--nproc-per-node", "01"], None, "None"),  # the same, the other way
        (["--nproc-per-node", "2"], "2", "2"),
    ],
)
def test_openmp_reads_what_torchrun_would_have_set(
    flags: list[str], set_by_user: str | None, threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if set_by_user is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    script = tmp_path / "s.py"
    script.write_text(
        "import os, torch\nprint(os.environ.get('OMP_NUM_THREADS'), torch.get_num_threads(), *[n for n in os.environ if 'RESILIENT' in n])"
    )

    async def scene(nursery: Nursery, launch: Launch) -> None:
        assert (await born(nursery, launch, tmp_path / "out"))[1] == 0
        said = (tmp_path / "out").read_text().split()
        assert said[0] == threads
        assert threads == "None" or said[1] == threads
        assert len(said) == 2

    with_zygote(["--standalone", *flags, str(script)], scene)


def test_stacks_on_sigusr2_also_while_the_gil_is_held(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("def stuck():\n    print('in', flush=True)\n    sum(range(10**12))\nstuck()")

    async def scene(nursery: Nursery, launch: Launch) -> None:
        stacks = tmp_path / "stacks"
        order = Spawn(kind="worker", program=launch.program, env={}, stdout=str(tmp_path / "out"), stacks=str(stacks))
        pid = await nursery.spawn(order)
        wait_for("the script to be stuck", lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text())
        assert kernel.catches(pid, signal.SIGUSR2)
        os.kill(pid, signal.SIGUSR2)
        wait_for("its stack", lambda: "in stuck" in stacks.read_text())
        os.kill(pid, signal.SIGKILL)
        assert kernel.collect(pid, 10.0) == -9

    with_zygote(["--standalone", str(script)], scene)


def test_other_programs_start_cold(tmp_path: Path) -> None:
    async def scene(nursery: Nursery, launch: Launch) -> None:
        assert launch.program.kind == "exec"
        _, code = await born(nursery, launch, tmp_path / "out", env={"RANK": "3"}, local_rank=3)
        assert code == 5
        assert (tmp_path / "out").read_text() == "rank 3 local 3\n"

    with_zygote(["--standalone", "--no-python", "sh", "-c", "echo rank $RANK local ${local_rank}; exit 5"], scene)


def test_a_program_that_cannot_be_started_says_so(tmp_path: Path) -> None:
    async def scene(nursery: Nursery, launch: Launch) -> None:
        assert (await born(nursery, launch, tmp_path / "out"))[1] == 127
        assert "cannot be started" in (tmp_path / "out.err").read_text()

    with_zygote(["--standalone", "--no-python", "no-such-program"], scene)


@pytest.mark.parametrize("deaths", [1, DEATHS_MAX])
def test_a_zygote_that_dies_while_it_starts_is_replaced_but_not_for_ever(tmp_path: Path, deaths: int) -> None:
    script = tmp_path / "s.py"
    script.write_text("print('well')")

    async def whole() -> None:
        nursery = Nursery(["--standalone", str(script)])
        launching = asyncio.create_task(nursery.launch())
        killed: set[int] = set()
        while len(killed) < deaths:
            if nursery.pid not in killed:
                killed.add(nursery.pid)
                os.kill(nursery.pid, signal.SIGKILL)
            await asyncio.sleep(0.001)
        try:
            if deaths == DEATHS_MAX:
                with pytest.raises(ZygoteLost, match="died while it was starting, exit code -9"):
                    await launching
            else:
                assert isinstance(await launching, Launch)
        finally:
            await nursery.close()

    asyncio.run(whole())


def test_a_zygote_that_dies_is_replaced(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("print('well')")

    async def whole() -> None:
        nursery = Nursery(["--standalone", str(script)])
        came: list[str] = []
        launch = await nursery.launch()
        assert isinstance(launch, Launch)
        up = asyncio.Event()
        nursery.watch(up.set, came.append, came.append)
        await up.wait()
        up.clear()
        first = nursery.pid
        waiting = asyncio.create_task(nursery.spawn(Spawn(kind="worker", program=launch.program, env={})))
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(ZygoteLost, match="exit code -9"):
            await waiting
        async with asyncio.timeout(60):
            await up.wait()
        assert nursery.pid != first
        assert len(came) == 1
        _, code = await born(nursery, launch, tmp_path / "out")
        assert code == 0
        await nursery.close()

    asyncio.run(whole())
