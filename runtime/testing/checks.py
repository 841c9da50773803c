"""What is asked of an engine."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import InputError, NumericalError
from anamorph.guard import check_declared, open_parts, places_here
from anamorph.memory import AttentionSlices, ChannelsLast, Offload, OwnSizes
from anamorph.pipelines.describing import read_component
from anamorph.probes import probe_sizes
from anamorph.testing.subject import PARTS, Check, Subject, call, held, relative

HEAVY = ("torch", "jax", "onnxruntime", "openvino", "coremltools", "tensorflow", "transformers")
"""Packages that no plug-in may import before it opens something."""
ASKS = """
import sys
from anamorph.plugins import list_backends
list_backends()[sys.argv[1]].unavailable()
print(" ".join(set(sys.argv[2:]) & set(sys.modules)))
"""
PICTURE: dict[str, Any] = {"num_inference_steps": 3, "strength": 1.0, "guidance_scale": 5.0}


def declares(subject: Subject) -> None:
    check_declared(subject.backend)
    places_here(subject.backend)


def asked_cheaply(subject: Subject) -> None:
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", ASKS, subject.backend.name, *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=paths)
    held(done.returncode == 0, f"asking whether it can run fails: {done.stderr.strip()}")
    held(not done.stdout.strip(), f"asking whether it can run imports {done.stdout.strip()}")


def placed(subject: Subject) -> None:
    found = subject.pipe.placement
    held(set(PARTS) <= set(found), f"it opened {', '.join(found)}, expected {', '.join(PARTS)}")
    for part, one in found.items():
        asked = subject.backend.name, subject.target.precision, part
        held((one.engine, one.precision, one.part) == asked, f"asked for {asked}, it says {one}")


def values(subject: Subject) -> None:
    """At the smallest and at uneven sizes, and then at the smallest again, which the others must not have changed."""
    for part in PARTS:
        program, reference = subject.program(part), subject.reference.program(part)
        sizes = probe_sizes(program.interface)
        for size in (*sizes, sizes[0]):
            inputs = subject.inputs(part, size)
            found, expected = call(program, inputs), call(reference, inputs)
            for name, value in found.items():
                distance = relative(value, expected[name])
                where = f"{part}.{name} at {size}"
                held(distance <= subject.bound, f"{where} differs from eager by {distance:.1e} (relative L2)")


def batches(subject: Subject) -> None:
    program = subject.program("vae_decoder")
    sizes = {**probe_sizes(program.interface)[0], "batch": 3}
    three = subject.inputs("vae_decoder", sizes)
    together = call(program, three)["sample"]
    for n in range(3):
        alone = call(program, {name: value[n : n + 1] for name, value in three.items()})["sample"]
        distance = relative(alone, together[n : n + 1])
        held(distance <= subject.bound, f"picture {n} of a batch differs from itself alone by {distance:.1e}")


def shapes(subject: Subject) -> None:
    for part in PARTS:
        program = subject.program(part)
        inner: Any = getattr(program, "program", program)  # without the guard that the runtime puts before engines
        for size in probe_sizes(program.interface):
            inputs = subject.inputs(part, size)
            found = call(inner, inputs)
            for name, shape in program.interface.output_shapes(program.interface.check(inputs)).items():
                held(name in found, f"{part} returns no {name}")
                kind, got = str(found[name].dtype), found[name].shape
                held((got, kind) == (shape, "float32"), f"{part}.{name} is {kind} {list(got)}, expected {list(shape)}")


def optional_inputs(subject: Subject) -> None:
    """One opened part serves with and without what is optional, in any order."""
    for part in ("unet", "text_encoder"):
        program, reference = subject.program(part), subject.reference.program(part)
        size = probe_sizes(program.interface)[-1]
        plain, full = subject.inputs(part, size), subject.inputs(part, size, optional=True)
        for inputs in (plain, full, plain) if len(full) > len(plain) else (plain,):
            found, expected = call(program, inputs), call(reference, inputs)
            distance = max(relative(value, expected[name]) for name, value in found.items())
            held(distance <= subject.bound, f"{part} with {', '.join(inputs)} differs by {distance:.1e}")


def deterministic(subject: Subject) -> None:
    for part in PARTS:
        program = subject.program(part)
        inputs = subject.inputs(part, probe_sizes(program.interface)[0])
        session = program.session()
        first, second = call(program, inputs, session), call(program, inputs, session)
        changed = [name for name in first if not np.array_equal(first[name], second[name])]
        held(not changed, f"{part} returns another {', '.join(changed)} for the same inputs")


def inputs_untouched(subject: Subject) -> None:
    for part in PARTS:
        program = subject.program(part)
        given = subject.inputs(part, probe_sizes(program.interface)[0])
        put = {name: program.arrays.put(value.copy()) for name, value in given.items()}
        program.session()(put)
        changed = [name for name in given if not np.array_equal(program.arrays.get(put[name]), given[name])]
        held(not changed, f"{part} writes into its input {', '.join(changed)}")


def outputs_survive(subject: Subject) -> None:
    program = subject.program("text_encoder")
    session, arrays = program.session(), program.arrays
    ids = subject.inputs("text_encoder", probe_sizes(program.interface)[0])["input_ids"]
    first = session({"input_ids": arrays.put(ids)})["last_hidden_state"]
    kept = np.array(arrays.get(first))
    session({"input_ids": arrays.put(np.ones_like(ids))})
    held(np.array_equal(arrays.get(first), kept), "the outputs of a call change with the next one")


def threads(subject: Subject) -> None:
    program = subject.program("unet")
    calls = [subject.inputs("unet", size) for size in probe_sizes(program.interface)] * 2
    expected = [call(program, inputs)["out_sample"] for inputs in calls]
    found: dict[int, NDArray[Any]] = {}
    failures: list[Exception] = []

    def work(index: int) -> None:
        try:
            session = program.session()
            for _ in range(3):
                found[index] = call(program, calls[index], session)["out_sample"]
        except Exception as error:  # of whatever type: it is told by the thread that waits
            failures.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    held(not failures, f"a call beside another thread's fails: {failures[:1]}")
    for index, value in found.items():
        distance = relative(value, expected[index])
        held(distance <= subject.bound / 10, f"two threads get what differs by {distance:.1e} from what one gets")


def refuses(subject: Subject) -> None:
    """Wrong calls are InputError before they reach the engine."""
    program = subject.program("unet")
    good = subject.inputs("unet", probe_sizes(program.interface)[0])
    ids = subject.inputs("text_encoder", probe_sizes(subject.program("text_encoder").interface)[0])["input_ids"]
    wrong: list[tuple[str, dict[str, NDArray[Any]]]] = [
        ("unet", {name: value for name, value in good.items() if name != "sample"}),
        ("unet", {**good, "abacus": good["sample"]}),
        ("unet", {**good, "sample": good["sample"][0]}),
        ("unet", {**good, "sample": good["sample"][:, :3]}),
        ("text_encoder", {"input_ids": np.full_like(ids, 10**6)}),
    ]
    for part, inputs in wrong:
        try:
            call(subject.program(part), inputs)
        except InputError:
            continue
        held(part == "text_encoder" and subject.program(part).arrays.asynchronous, f"{part} takes a call that is wrong")


def shows_nan(subject: Subject) -> None:
    program = subject.program("unet")
    inputs = subject.inputs("unet", probe_sizes(program.interface)[0])
    inputs["sample"][:] = np.nan
    held(not np.isfinite(call(program, inputs)["out_sample"]).all(), "it hides that an input was NaN")
    image = np.zeros((1, 16, 32, 3), np.float32)

    def spoil(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * float("nan")}

    try:
        subject.pipe("a cat", image, callback_on_step_end=spoil, **PICTURE)
    except NumericalError as error:
        held(subject.backend.name in str(error), "the error on NaN does not name the engine")
    else:
        held(False, "a picture of NaN is drawn")


def gives_memory_back(subject: Subject) -> None:
    component = read_component(subject.opened, "vae", ("AutoencoderKL",))
    (held_program,) = open_parts(subject.backend, component, ["vae_decoder"], subject.target).values()
    call(held_program, subject.inputs("vae_decoder", probe_sizes(held_program.interface)[0]))
    gone = weakref.ref(getattr(held_program, "program", held_program))
    del held_program
    gc.collect()
    held(gone() is None, "an opened part that nobody holds any more stays in memory")


def answers_wishes(subject: Subject) -> None:
    for wish in (AttentionSlices("auto"), AttentionSlices(None), ChannelsLast(True), ChannelsLast(False),
                 Offload(None), OwnSizes(0)):  # fmt: skip
        said = subject.program("unet").spare(wish)
        sentence = isinstance(said, str) and " " in said
        held(said is None or sentence, f"it answers {said!r} to {wish}, neither None nor a sentence")


def _picture(pipe: Any, seeds: list[int]) -> NDArray[Any]:
    random = np.random.default_rng(0)
    image = random.random((1, 16, 32, 3), np.float32)
    prompts = ["a cat"] * len(seeds)
    drawn: NDArray[Any] = pipe(prompts, np.repeat(image, len(seeds), 0), seed=seeds, output_type="np", **PICTURE).images
    return drawn


def picture(subject: Subject) -> None:
    found, expected = (_picture(pipe, [0, 1]) for pipe in (subject.pipe, subject.reference))
    distance = float(np.abs(found - expected).max())
    held(distance <= subject.bound, f"a pixel of a picture differs from eager's by {distance:.1e} (of 0..1)")


def pictures_alone(subject: Subject) -> None:
    both, alone = _picture(subject.pipe, [0, 7]), _picture(subject.pipe, [7])
    distance = float(np.abs(both[1] - alone[0]).max())
    held(distance <= subject.bound, f"a picture depends on the batch that it is drawn in, by {distance:.1e}")


def stops(subject: Subject) -> None:
    expected = _picture(subject.pipe, [0])
    image = np.zeros((1, 16, 32, 3), np.float32)
    steps = iter(subject.pipe.steps("a cat", image, seed=[0], **PICTURE))
    next(steps)
    del steps
    distance = float(np.abs(_picture(subject.pipe, [0]) - expected).max())
    held(distance <= subject.bound / 10, f"a picture that was left unfinished changes the next, by {distance:.1e}")


ENGINE_CHECKS = (
    Check("declares", "what it declares is well formed, and what it finds here was declared", declares),
    Check("asked cheaply", "asking whether it can run imports no heavy package", asked_cheaply),
    Check("placed", "it opens every part, on the device and in the precision that were asked for", placed),
    Check("values", "outputs are eager's, at several sizes in turn", values),
    Check("batches", "a picture of a batch is what it is alone", batches),
    Check("shapes", "outputs have the declared names, shapes and types", shapes),
    Check("optional inputs", "one opened part serves with and without optional inputs", optional_inputs),
    Check("deterministic", "the same inputs give the same bits", deterministic),
    Check("inputs untouched", "it writes into no input", inputs_untouched),
    Check("outputs survive", "the outputs of a call outlive the next one", outputs_survive),
    Check("threads", "sessions of several threads do not disturb one another", threads),
    Check("refuses", "wrong names, ranks, sizes and tokens are errors of the caller", refuses),
    Check("shows NaN", "NaN is never hidden, and the error names the engine", shows_nan),
    Check("gives memory back", "a part that nobody holds is freed", gives_memory_back),
    Check("answers wishes", "wishes for less memory are obeyed or answered with a sentence", answers_wishes),
    Check("picture", "a whole picture is eager's", picture),
    Check("pictures alone", "a picture depends on its own seed alone", pictures_alone),
    Check("stops", "a picture may be left unfinished", stops),
)
