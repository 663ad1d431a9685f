"""Interpreted launches in other program orders than 0, 1, 2, ...

    with shuffled(seed): ...        one program after another, in a random order
    with interleaved(seed): ...     several programs at once, switching before each memory access
    with only(program): ...         one program of each launch, to reach the end of a grid too large to interpret

A GPU promises no order. A kernel whose answer changes under `shuffled` relies on one; under `interleaved` a lost update
(two programs load, both add, both store) loses for real. Same seed, same schedule. Both can be nested with
`races.checked`.
"""

import contextlib
import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import triton.runtime.interpreter as triton_interpreter

Builder = triton_interpreter.InterpreterBuilder
MEMORY_OPERATIONS = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Run the programs of each launch one after another, in an order drawn from `seed`."""
    original_set_dim, original_set_idx = Builder.set_grid_dim, Builder.set_grid_idx
    place: dict[tuple[int, int, int], tuple[int, int, int]] = {}

    def set_grid_dim(self, *sizes):
        original_set_dim(self, *sizes)
        programs = list(itertools.product(*map(range, sizes)))
        place.clear()
        place.update(zip(programs, random.Random(seed).sample(programs, len(programs)), strict=True))

    def set_grid_idx(self, *program):
        original_set_idx(self, *place[program])

    with mock.patch.multiple(Builder, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx):
        yield


@contextlib.contextmanager
def only(choose: Callable[[int], int]) -> Iterator[None]:
    """Run one program of each launch: number `choose(size)` of a grid with `size` programs, all on axis 0.

    Reaches offsets at the end of a grid that would take hours to interpret. The kernel sees the size of the whole grid.
    """
    original_call = triton_interpreter.GridExecutor.__call__
    original_set_dim, original_set_idx = Builder.set_grid_dim, Builder.set_grid_idx
    sizes: list[int] = []

    def call(self, *args, **kwargs):
        whole = self.grid
        if callable(whole) or len(whole) != 1:
            raise NotImplementedError("only() takes launches with a grid of one number")
        sizes.append(whole[0])
        self.grid = (1,)
        try:
            original_call(self, *args, **kwargs)
        finally:
            self.grid = whole
            sizes.pop()

    def set_grid_dim(self, *_):
        original_set_dim(self, sizes[-1], 1, 1)

    def set_grid_idx(self, *_):
        original_set_idx(self, choose(sizes[-1]), 0, 0)

    with (
        mock.patch.multiple(Builder, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx),
        mock.patch.multiple(triton_interpreter.GridExecutor, __call__=call),
    ):
        yield


class _Program:
    """One running program: a thread that holds the interpreter only between `resume` and its next switch."""

    def __init__(self, body: Callable[[], None], scheduler: "_Scheduler", index: tuple[int, int, int]) -> None:
        self.turn = threading.Semaphore(0)
        self.index = index
        self.thread = threading.Thread(target=self._run, args=(body, scheduler), daemon=True)

    def _run(self, body: Callable[[], None], scheduler: "_Scheduler") -> None:
        self.turn.acquire()
        triton_interpreter.interpreter_builder.grid_idx = self.index
        try:
            body()
        except BaseException as error:
            scheduler.errors.append(error)
        scheduler.finished(self)


class _Scheduler:
    """Runs queued programs, at most `resident` at a time, exactly one of them between two memory accesses."""

    def __init__(self, rng: random.Random, resident: int) -> None:
        self.rng = rng
        self.resident = resident
        self.waiting: list[tuple[tuple[int, int, int], Callable[[], None]]] = []
        self.live: list[_Program] = []
        self.errors: list[BaseException] = []
        self.all_done = threading.Semaphore(0)

    def run(self) -> None:
        self.rng.shuffle(self.waiting)
        for _ in range(self.resident):
            self._admit()
        self._resume_one()
        self.all_done.acquire()
        if self.errors:
            raise self.errors[0]

    def switch(self) -> None:
        """Called by the running program before each access: hand over to a random one, maybe itself."""
        me = next((program for program in self.live if program.thread is threading.current_thread()), None)
        chosen = self.rng.choice(self.live) if me else None
        if chosen is not me:
            chosen.turn.release()
            me.turn.acquire()
            triton_interpreter.interpreter_builder.grid_idx = me.index

    def finished(self, program: _Program) -> None:
        self.live.remove(program)
        # After an error the rest is not started: its result would be thrown away.
        if not self.errors:
            self._admit()
        if self.live:
            self._resume_one()
        else:
            self.all_done.release()

    def _admit(self) -> None:
        if self.waiting:
            index, body = self.waiting.pop()
            program = _Program(body, self, index)
            self.live.append(program)
            program.thread.start()

    def _resume_one(self) -> None:
        self.rng.choice(self.live).turn.release()


class _Collector:
    """Stands in for a kernel's function: queues the programs of the grid, and runs them all when the last one comes."""

    def __init__(self, function: Callable, rng: random.Random, resident: int, running: list[_Scheduler]) -> None:
        self.function, self.rng, self.resident, self.running = function, rng, resident, running
        self.scheduler = _Scheduler(rng, resident)
        # The grid executor reads these off the function.
        self.__globals__, self.__name__ = function.__globals__, function.__name__
        self.__signature__ = inspect.signature(function)

    def __call__(self, **arguments: Any) -> None:
        builder = triton_interpreter.interpreter_builder
        self.scheduler.waiting.append((builder.grid_idx, lambda: self.function(**arguments)))
        x, y, z = builder.grid_dim
        if len(self.scheduler.waiting) == x * y * z:
            self.running.append(self.scheduler)
            try:
                self.scheduler.run()
            finally:
                self.running.pop()


@contextlib.contextmanager
def interleaved(seed: int, resident: int = 4) -> Iterator[None]:
    """Run up to `resident` programs of each launch at once, switching at random (`seed`) before each memory access."""
    running: list[_Scheduler] = []
    rng = random.Random(seed)
    original_call = triton_interpreter.GridExecutor.__call__

    def switching(original: Callable) -> Callable:
        def operation(self, *args, **kwargs):
            if running:
                running[-1].switch()
            return original(self, *args, **kwargs)

        return operation

    def call(self, *args, **kwargs):
        function = self.fn
        self.fn = _Collector(function, rng, resident, running)
        try:
            original_call(self, *args, **kwargs)
        finally:
            self.fn = function

    with (
        mock.patch.multiple(Builder, **{name: switching(getattr(Builder, name)) for name in MEMORY_OPERATIONS}),
        mock.patch.multiple(triton_interpreter.GridExecutor, __call__=call),
    ):
        yield
