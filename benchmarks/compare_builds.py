"""Two or more builds of the native module, taking turns: what is faster in which, case by case as in ``quire bench kernels``.

    python benchmarks/compare_builds.py OLD.so NEW.so [--kernel linear --model llama-160m --dtype float32 --rows 1,8,64] [--rounds 5]

A shared machine changes from minute to minute, so builds are compared within seconds: each has a process of its own with its own weights,
and one measures while the others wait; every other round goes in reverse order. The best round counts. The Python around the builds is
that of this tree: they must take the same arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NAME = "quire.backends.cpu._native"


def work(build: str, selection: Sequence[str | None]) -> None:
    """Answers a line with the next case's name, or with the seconds of a call, until there is no case left."""
    spec = importlib.util.spec_from_file_location(NAME, build)
    assert spec is not None, build
    assert spec.loader is not None, build
    native = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    from quire.backends.cpu.kernel_bench import Limits, measure, select
    from quire.backends.cpu.kernel_cases import cases

    any_limits = Limits("", 0, 1.0, {1 << 62: 1.0}, 1.0, 1.0, 1.0)
    models, dtypes, kernels, rows, group_size = selection
    for case in cases(select(models, dtypes, kernels, rows, None if group_size is None else int(group_size)), lambda skipped: None):
        print(f"{case.kernel} {case.model} {case.name} {case.dtype} {case.rows}", flush=True)
        while sys.stdin.readline() == "time\n":
            print(measure(case, 2, any_limits).seconds, flush=True)
    print(flush=True)


def ask(worker: subprocess.Popen[str], question: str) -> str:
    assert worker.stdin is not None
    worker.stdin.write(question + "\n")
    worker.stdin.flush()
    return answer(worker)


def answer(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().rstrip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="*", metavar="BUILD", help="a compiled module: _native.cpython-....so, by any name")
    lists = ("--model", "--dtype", "--kernel", "--rows", "--group-size")
    for name in lists:
        parser.add_argument(name, metavar="LIST", help="as in quire bench kernels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    selection = [args.model, args.dtype, args.kernel, args.rows, args.group_size]
    if args.work:
        work(args.work, selection)
        return
    if len(args.builds) < 2:
        parser.error("name two builds at least")
    options = [part for name, value in zip(lists, selection, strict=True) if value for part in (name, value)]
    workers = []
    for build in args.builds:
        command = [sys.executable, str(Path(__file__).resolve()), "--work", build, *options]
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    print("µs of a call in each build; the first one's time by that of each other")
    names = [answer(worker) for worker in workers]
    while names[0]:
        assert len(set(names)) == 1, f"the builds are at different cases: {names}"
        best = [float("inf")] * len(workers)
        for number in range(args.rounds):
            for i in range(len(workers))[:: 1 if number % 2 == 0 else -1]:
                best[i] = min(best[i], float(ask(workers[i], "time")))
        times = "".join(f"{1e6 * seconds:12,.1f}" for seconds in best)
        print(f"{names[0]:<60}{times}  " + " ".join(f"{best[0] / seconds:6.2f}" for seconds in best[1:]), flush=True)
        names = [ask(worker, "next") for worker in workers]


if __name__ == "__main__":
    main()
