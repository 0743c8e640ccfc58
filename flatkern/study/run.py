"""`flatkern study`: from the arms to the tables, going on from what is done."""

import argparse
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from flatkern.study import arms, report, tasks, train
from flatkern.study.arms import Cell
from flatkern.study.store import Store


def main(arguments: argparse.Namespace) -> int:
    """Run what is not done yet, and write the report."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quick = arguments.quick
    sizes = tasks.QUICK if quick else tasks.FULL
    conditions = {"quick": quick} | dataclasses.asdict(sizes)
    store = Store(arguments.out, conditions)
    some = arms.quick_arms() if quick else arms.all_arms()
    chosen = arms.TASKS if arguments.task == "all" else (arguments.task,)
    labels = list(arms.LABELS)[1:] if quick else list(arms.LABELS)
    seeds = arguments.seeds or (arms.QUICK_SEEDS if quick else arms.SEEDS)
    todo = [
        cell for cell in arms.cells(some, list(chosen), labels, seeds) if cell.key not in store.rows
    ]
    try:
        if not arguments.report:
            _run(todo, store, quick, arguments.jobs)
    except KeyboardInterrupt:
        print(
            f"flatkern: interrupted; {len(store.rows)} cells are in {store.path}, and the same "
            "command goes on from there",
            file=sys.stderr,
        )
        return 130
    if not store.rows:
        print(f"flatkern: error: no cell is done in {store.path}", file=sys.stderr)
        return 1
    command = "flatkern study" + " --quick" * quick
    paths, table = report.write(arguments.out, store, conditions, command)
    print(table)
    print("written: " + ", ".join(map(str, [store.path, *paths])))
    changed = sum(row["weights_changed"] for row in store.rows.values())
    if changed:
        print(f"ERROR: {changed} frozen weights do not have the bits they had before training")
    return int(bool(changed))


def _run(todo: list[Cell], store: Store, quick: bool, jobs: int) -> None:
    with tqdm(total=len(todo), unit="cell", disable=None) as bar:
        for rows in _results(todo, quick, jobs):
            store.add(rows)
            bar.update()
            if bar.disable:
                print(f"{len(store.rows)} cells: {rows[0]['key']}", file=sys.stderr, flush=True)


def _results(todo: list[Cell], quick: bool, jobs: int) -> Iterator[list[dict[str, Any]]]:
    """In the order in which they are done."""
    task = functools.partial(train.run, quick=quick)
    if jobs == 1 or len(todo) < 2:
        yield from map(task, todo)
        return
    # Leaving it, by Ctrl-C too, ends the processes.
    with multiprocessing.get_context("spawn").Pool(jobs, _start_worker) as pool:
        yield from pool.imap_unordered(task, todo)


def _start_worker() -> None:
    # The first process tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
