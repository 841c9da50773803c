"""CUDA graphs on a processor that plays the device: what was recorded is computed again where it lay, and no more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anamorph import DiffusionPipeline
from anamorph.backends import cuda_graphs
from anamorph.backends.cuda_graphs import BEFORE, Recorded
from anamorph.errors import BackendError

CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
ON = {"cuda_graphs": "on"}


def storages(values: Any) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


class Graph:
    """Operations with the tensors that they read and wrote; a replay computes them into the same memory."""

    every: list["Graph"] = []  # noqa: RUF012 - one list for the whole device

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.replays = 0
        Graph.every.append(self)

    def replay(self) -> None:
        self.replays += 1
        for function, given, named, written in self.calls:
            made = [each for each in tree_leaves(function(*given, **named)) if isinstance(each, torch.Tensor)]
            for place, value in zip(written, made, strict=True):
                if not storages(place) & storages(value):
                    place.copy_(value)


class Recording(TorchDispatchMode):
    """Stream capture: remembers operations, forbids those that ask the device for a value, and computes nothing."""

    def __init__(self, graph: Graph, capture_error_mode: str) -> None:
        super().__init__()
        assert capture_error_mode == "thread_local"
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **named)
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        views = storages((args, named))
        for each in made:
            if each.is_floating_point() and not storages(each) & views:
                each.fill_(torch.nan)
        self.graph.calls.append((func, args, named, made))
        return result


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """The processor as a device with CUDA graphs, and without a compiler; the graphs that were recorded."""
    stream = SimpleNamespace(wait_stream=lambda _: None)
    chosen: list[torch.device] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        chosen.append(device)
        yield
        chosen.pop()

    def recording(graph: Graph, capture_error_mode: str) -> Recording:
        assert chosen == [torch.device("cpu")], "the recording is another device's"
        return Recording(graph, capture_error_mode)

    monkeypatch.setattr(cuda_graphs, "KIND", "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    Graph.every.clear()
    yield Graph.every
    Graph.every.clear()


def counted(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    calls: list[int] = []

    def call(*values: Any) -> Any:
        calls.append(len(values))
        return function(*values)

    return call, calls


def test_the_host_computes_until_it_is_recorded_and_results_stay(device: list[Graph]) -> None:
    function, calls = counted(lambda x, y: (x * 2 + (0 if y is None else y),))
    recorded = Recorded(function, "compiled")
    with torch.inference_mode():
        results = [recorded(torch.full((2,), float(n)), torch.ones(2))[0] for n in range(3)]
    assert [result.tolist() for result in results] == [[1.0, 1.0], [3.0, 3.0], [5.0, 5.0]]
    assert (len(calls), len(device), device[0].replays) == (BEFORE + 1, 1, 3)


def test_what_was_left_out_stays_so(device: list[Graph]) -> None:
    recorded = Recorded(lambda x, y: (x if y is None else x + y,), "compiled")
    assert recorded(torch.ones(2), None)[0].tolist() == [1.0, 1.0]
    assert device[0].replays == 1


def test_who_asks_the_device_for_a_value_cannot_be_recorded(device: list[Graph]) -> None:
    with pytest.raises(RuntimeError, match="not permitted"):
        Recorded(lambda x: (x * x.sum().item(),), "compiled")(torch.ones(2))
    assert device[0].replays == 0


def test_weights_are_read_where_they_lay(device: list[Graph]) -> None:
    weight = torch.ones(2)
    recorded = Recorded(lambda x: (x * weight,), "compiled")
    assert recorded(torch.ones(2))[0].tolist() == [1.0, 1.0]
    weight.fill_(3.0)
    assert recorded(torch.ones(2))[0].tolist() == [3.0, 3.0]
    assert len(device) == 1


@pytest.mark.parametrize("rewrites", [None, "none", "default,step-scope"])
def test_pictures_are_eager_s(sd1: Path, device: list[Graph], rewrites: str | None) -> None:
    eager = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    wish = {"unet": "compile", "default": "eager"}
    pipe = DiffusionPipeline.from_pretrained(
        sd1, backend=wish, rewrites=rewrites, backend_options={"unet": ON, "default": {}}
    )
    assert pipe.placement["unet"].details["cuda_graphs"] == "on"
    for prompt, seed in (("a cat", 3), ("a dog", 4)):
        expected = eager(prompt, seed=seed, **CALL).images
        assert np.abs(pipe(prompt, seed=seed, **CALL).images - expected).max() <= 1e-5  # sums in another order, at most
    job = pipe.job("a cat", num_inference_steps=4, guidance_scale=5.0, seed=0)
    rows = len(pipe.plan(job).table.rows)
    # A step that computes the next samples is another graph where nothing is remembered yet.
    assert len(device) == (2 if rewrites == "default,step-scope" else 1)
    assert sum(graph.replays for graph in device) == 2 * rows


def test_threads_do_not_meet_in_a_recording(sd1: Path, device: list[Graph]) -> None:
    pipe = DiffusionPipeline.from_pretrained(sd1, backend="compile", backend_options=ON)
    alone = [pipe("a cat", seed=seed, **CALL).images for seed in (1, 2)]
    found: dict[int, Any] = {}
    threads = [
        Thread(target=lambda seed=seed: found.update({seed: pipe("a cat", seed=seed, **CALL).images}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(device) == len({"text_encoder", "unet", "vae_decoder"})  # each once, for both threads
    assert np.array_equal(found[1], alone[0])
    assert np.array_equal(found[2], alone[1])


def test_recordings_keep_the_layout_of_weights(sd1: Path, device: list[Graph]) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(sd1, backend="compile", backend_options=ON)
    with pytest.warns(UserWarning, match="memory_format does not apply"):
        pipe.unet.to(memory_format=torch.channels_last)
    assert not device


@pytest.mark.parametrize(
    ("wish", "why"), [("on", "needs a CUDA device; this is cpu; leave the option away"), ("yes", "expected on or off")]
)
def test_a_wish_that_cannot_be_met_is_refused(sd1: Path, wish: str, why: str) -> None:
    with pytest.raises(BackendError, match=why):
        DiffusionPipeline.from_pretrained(sd1, backend="compile", backend_options={"cuda_graphs": wish})
