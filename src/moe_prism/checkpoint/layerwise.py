"""Run many forwards through a model a decoder layer at a time, so that every weight is read from disk once, whatever the text.

Each forward is a thread that waits before every decoder layer. One thread runs at any moment: all of them pass a layer, one after the
other, then the layer leaves. What lies between two layers, of whatever family, is the model's own code and stays in the threads' frames;
what is held beside a layer is therefore one hidden state per forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import torch

from .stream import LayerStream

THREAD = "forward by layers"
"""The name of every forward's thread."""
Forward = Callable[[Any], object]
"""Gets the model, and runs it once."""
Visit = Callable[[str, Callable[[int], None]], None]
"""visit(layer, pass_through): the layer's weights are there. pass_through(i) runs forward i through it; it has to be called for all."""


def run_layerwise(stream: LayerStream, forwards: Sequence[Forward], visit: Visit) -> None:
    """Run every forward to its end under `visit`, which is called once per decoder layer. Gradients are off.

    An error of a forward, or of `visit`, ends all of them and is raised here. Layers that the model does not call are not visited.
    """
    with torch.no_grad(), stream.resident() as model, _gates(stream) as gates:
        runs = [_Run(forward, model) for forward in forwards]
        try:
            for run in runs:
                gates.go_on(run)
            while any(run.layer for run in runs):
                name = min((run.layer for run in runs if run.layer), key=stream.layer_names().index)
                with stream.module(name):
                    visit(name, partial(_pass, gates, runs, name))
                waiting = next((i for i, run in enumerate(runs) if run.layer == name), None)
                if waiting is not None:
                    raise RuntimeError(f"forward {waiting} was not run through '{name}'")
        finally:
            for run in runs:
                gates.stop(run)


def _pass(gates: _Gates, runs: Sequence[_Run], name: str, number: int) -> None:
    gates.go_on(runs[number], name)


class _Stopped(BaseException):
    """A forward that is not wanted any more unwinds with it."""


class _Run:
    """One forward. layer: before which it waits; empty before the start and after the end."""

    def __init__(self, forward: Forward, model: Any) -> None:
        self.layer, self.unwanted, self.begun = "", False, False
        self.error: BaseException | None = None
        self.turn, self.back = threading.Semaphore(0), threading.Semaphore(0)
        context = copy_context()  # a thread has none of its caller's settings by itself
        self.thread = threading.Thread(target=lambda: context.run(self._work, forward, model), name=THREAD, daemon=True)

    def _work(self, forward: Forward, model: Any) -> None:
        self.turn.acquire()
        try:
            with torch.no_grad():
                forward(model)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where `run_layerwise` was called
            self.error = error
        finally:
            self.layer = ""
            self.back.release()


class _Gates:
    """Who may run. before(name) is the hook of a decoder layer."""

    def __init__(self) -> None:
        self.running: _Run | None = None

    def before(self, name: str) -> Callable[..., None]:
        def wait(*_: Any) -> None:
            run = self.running
            if run is None or threading.current_thread() is not run.thread:
                return
            run.layer = name
            run.back.release()
            run.turn.acquire()
            if run.unwanted:
                raise _Stopped

        return wait

    def go_on(self, run: _Run, name: str = "") -> None:
        """Let a forward run until it waits before its next layer, or ends. Nothing where it waits before another one than `name`."""
        if name and run.layer != name:
            return
        if not run.begun:
            run.begun = True
            run.thread.start()
        self.running = run
        run.turn.release()
        run.back.acquire()
        self.running = None
        if run.error is not None:
            error, run.error = run.error, None
            raise error

    def stop(self, run: _Run) -> None:
        if run.begun and run.layer:
            run.unwanted = True
            self.running = run
            run.turn.release()
            run.back.acquire()
            self.running = None
        if run.begun:
            run.thread.join()


@contextmanager
def _gates(stream: LayerStream) -> Iterator[_Gates]:
    gates = _Gates()
    handles = [
        stream.model.get_submodule(name).register_forward_pre_hook(gates.before(name), prepend=True)
        for name in stream.layer_names()
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()
