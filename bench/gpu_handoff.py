"""What handing over between two stages that share one GPU costs: landing in place against copying in.

    python bench/gpu_handoff.py --stage qwen2.5-7b --tokens 1 8 64 256 512 2048 8192

Two stages of `gpu_stage.py`, each on a stream of its own, replay their graphs; a third stream carries the proxies of
one to the other, as the `local` transport does. The ways of handing over:

- `in_place`: proxies land in the memory that the graphs of the second stage read.
- `copy_in`: they arrive in fresh memory, as with engines, and are copied from there into the graphs' input.

Figures, per number of tokens:

- `gap_us`: from the end of the first stage's last kernel to the start of the second one's first, on the device.
- `copy_us`: one copy of both proxies from memory to memory, of many that follow one another.
- `micro_batches_per_second`: by number of micro-batches in flight, through `StageRunner` in two threads. `one_stream`
  runs both stages in turn on one stream, without hand-off and without overlap. Two stages can only overlap as far as
  the device has room beside one of them.

`--device cpu --stage tiny` runs the same code with emulated graphs and the clock of the host, for its function only.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import RESULTS, plotted, spread, write_result

if TYPE_CHECKING:
    import torch

    import pp_piecewise_backend as ppb

NAME = "gpu_handoff"
WAYS = ("in_place", "copy_in")
NAMES = ("hidden_states", "residual")


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    cells = []
    parameters = {name: value for name, value in vars(options).items() if name != "output"}
    json_path = options.output / f"{NAME}.json"
    for cell in measure(options):
        cells.append(cell)
        print(line(cell), flush=True)
        # Written after every cell: an interrupt loses nothing.
        json_path = write_result(options.output, NAME, parameters, {"cells": cells})
    plot_path = plotted(plot, cells, options.output / f"{NAME}.png")
    print(f"\n{json_path}\n{plot_path}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    from gpu_stage import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 512, 2048, 8192])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--repeats", type=int, default=30, help="hand-overs whose gap is measured; fewer of more than 512 tokens"
    )
    parser.add_argument(
        "--micro-batches", type=int, default=60, help="for each throughput; fewer of more than 512 tokens"
    )
    parser.add_argument("--context-tokens", type=int, default=512)
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


# -------------------------------------------------------------------------------------------- device


class Clock:
    """Moments on the device's timeline, or on the host's where there is no device."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"

    def now(self) -> Any:
        import torch

        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) * 1e3 if self._is_cuda else (end - begin) * 1e6)

    def wait(self) -> None:
        import torch

        if self._is_cuda:
            torch.cuda.synchronize()


class Lane:
    """A stream, or nothing where there is no device."""

    def __init__(self, device: str) -> None:
        import torch

        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def __enter__(self) -> Lane:
        import torch

        self._entered: Any = contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        self._entered.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def wait_for(self, other: Lane) -> None:
        if self.stream is not None:
            self.stream.wait_stream(other.stream)


# -------------------------------------------------------------------------------------------- stages


class Pair:
    """The two stages, compiled and captured, and the memory in which proxies lie."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from gpu_stage import NAMED_OPS, SHAPES, GPUStage

        import pp_piecewise_backend as ppb

        self.options = options
        self.max_tokens = max(options.tokens)
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        shape = SHAPES[options.stage]
        self.proxies = {name: ppb.Proxy((shape.hidden,), dtype) for name in NAMES}
        self.modules = [
            GPUStage(
                shape,
                self.max_tokens,
                context_tokens=options.context_tokens,
                device=options.device,
                dtype=dtype,
                seed=seed,
            )
            for seed in range(2)
        ]
        self.settings = {
            "compiler": options.compiler,
            **NAMED_OPS,
            "mode": "piecewise",
            "graphs": "cuda" if options.device == "cuda" else "emulate",
            "capture_sizes": ",".join(map(str, sorted(set(options.tokens)))),
        }
        self._inputs: dict[int, dict[str, torch.Tensor]] = {}
        self.landing = [ppb.Stage(self.proxies, self.max_tokens, options.device) for _ in range(2)]
        self.compiled = [
            self._compiled(module, stage) for module, stage in zip(self.modules, self.landing, strict=True)
        ]

    def _compiled(self, module: Any, stage: ppb.Stage) -> Callable[..., Mapping[str, torch.Tensor]]:
        import torch

        import pp_piecewise_backend as ppb

        own = torch.compile(
            named_results(module),
            backend="pp_piecewise",
            options={**self.settings, "stage": stage, "static_outputs": True},
        )
        with torch.no_grad():
            ppb.warmup(
                own,
                lambda tokens: ((), {"positions": self.positions(tokens), **stage.views(tokens)}),
                sizes=self.options.tokens,
                progress=False,
            )
        return own

    def inputs(self, tokens: int) -> dict[str, torch.Tensor]:
        """What the first stage is called with, always the same memory for a number of tokens."""
        if tokens not in self._inputs:
            self._inputs[tokens] = self.modules[0].make_inputs(tokens)
        return self._inputs[tokens]

    def start(self, tokens: int) -> dict[str, torch.Tensor]:
        """The proxies that the first stage begins with."""
        return {name: self.inputs(tokens)[name] for name in NAMES}

    def positions(self, tokens: int) -> torch.Tensor:
        """Those of this number of tokens, whose attention is to come next."""
        import torch
        from gpu_stage import set_metadata

        set_metadata(self.modules[0].metadata(tokens))
        positions = self.inputs(tokens)["positions"]
        if tokens > 1:
            torch._dynamo.maybe_mark_dynamic(positions, 0)  # with a single size, nothing is
        return positions

    def run(self, number: int, tokens: int, proxies: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return self.compiled[number](positions=self.positions(tokens), **proxies)


def named_results(module: Any) -> Any:
    """The module with its proxies by name, and with code of its own: Dynamo keeps its limits by code."""
    from torch import nn

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = module

        def forward(self, positions: Any, hidden_states: Any, residual: Any) -> dict[str, Any]:
            return dict(zip(NAMES, self.stage(positions, hidden_states, residual), strict=True))

    Named.forward.__code__ = Named.forward.__code__.replace(co_name=f"stage_{id(module)}")
    return Named()


# ----------------------------------------------------------------------------------------- measuring


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu with --stage tiny runs the same code")
    torch._dynamo.config.recompile_limit = 64
    pair = Pair(options)
    with torch.no_grad():
        speeds = throughputs(pair)
        for tokens in options.tokens:
            check(pair, tokens)
            gaps, copy_us = hand_overs(pair, tokens)
            yield {
                "stage": options.stage,
                "tokens": tokens,
                "proxy_bytes": tokens * sum(proxy.bytes_per_token for proxy in pair.proxies.values()),
                "gap_us": gaps,
                "copy_us": copy_us,
                "micro_batches_per_second": speeds[tokens],
            }


def check(pair: Pair, tokens: int) -> None:
    """Both ways give what the second stage gives for the results of the first, bit for bit."""
    import torch

    clock = Clock(pair.options.device)
    results = {name: tensor.clone() for name, tensor in pair.run(0, tokens, pair.start(tokens)).items()}
    expected = {name: tensor.clone() for name, tensor in pair.run(1, tokens, results).items()}
    lanes = [Lane(pair.options.device) for _ in range(3)]
    clock.wait()  # the lanes do not wait for the stream of these calls
    for way in WAYS:
        _, _, outputs = hand_over(pair, way, tokens, lanes, clock)
        clock.wait()
        for name in NAMES:
            assert torch.equal(outputs[name], expected[name]), f"{way} at {tokens} tokens gives other {name}"


def hand_over(
    pair: Pair, way: str, tokens: int, lanes: Sequence[Lane], clock: Clock
) -> tuple[Any, Any, Mapping[str, torch.Tensor]]:
    """One micro-batch through both stages: the moments at both ends of the gap, and the results."""
    import torch

    first, wire, second = lanes
    with first:
        results = pair.run(0, tokens, pair.start(tokens))
        left_at = clock.now()
    views = pair.landing[1].views(tokens)
    with wire:
        wire.wait_for(first)
        wire.wait_for(second)
        arrived = views if way == "in_place" else {name: torch.empty_like(view) for name, view in views.items()}
        for name, tensor in arrived.items():
            tensor.copy_(results[name], non_blocking=True)
    with second:
        second.wait_for(wire)
        if way == "copy_in":
            for name, view in views.items():
                view.copy_(arrived[name], non_blocking=True)
        begun_at = clock.now()
        outputs = pair.run(1, tokens, views)
    first.wait_for(wire)
    return left_at, begun_at, outputs


def hand_overs(pair: Pair, tokens: int) -> tuple[dict[str, Any], dict[str, float]]:
    """`gap_us` by way, and `copy_us`; the ways take turns."""
    clock = Clock(pair.options.device)
    lanes = [Lane(pair.options.device) for _ in range(3)]
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(3 + fewer(pair.options.repeats, tokens)):
        for way in WAYS:
            clock.wait()
            left_at, begun_at, _ = hand_over(pair, way, tokens, lanes, clock)
            clock.wait()
            if repeat >= 3:
                found[way].append(clock.microseconds(left_at, begun_at))
    source, target = (pair.landing[number].views(tokens) for number in (0, 1))
    copies: list[float] = []
    count = 20
    for _ in range(1 + pair.options.repeats):
        begin = clock.now()
        for _ in range(count):
            for name in NAMES:
                target[name].copy_(source[name], non_blocking=True)
        end = clock.now()
        clock.wait()
        copies.append(clock.microseconds(begin, end) / count)
    return {way: spread(values) for way, values in found.items()}, spread(copies[1:])


def throughputs(pair: Pair) -> dict[int, dict[str, float]]:
    """Tokens -> micro-batches per second: on one stream, and by how many may be in flight."""
    tokens, in_flight = pair.options.tokens, pair.options.in_flight
    found = {number: {"one_stream": one_stream(pair, number)} for number in tokens}
    phases = [(number, most) for number in tokens for most in in_flight]
    for (number, most), speed in zip(phases, two_threads(pair, phases), strict=True):
        found[number][str(most)] = speed
    return {number: {name: round(value, 2) for name, value in speeds.items()} for number, speeds in found.items()}


def fewer(count: int, tokens: int) -> int:
    """Of something that takes longer with more tokens."""
    return max(min(count, 12), count * 512 // max(tokens, 512))


def one_stream(pair: Pair, tokens: int) -> float:
    clock = Clock(pair.options.device)
    count = fewer(pair.options.micro_batches, tokens)
    start, views = pair.start(tokens), pair.landing[1].views(tokens)
    begin = 0.0
    for number in range(-3, count):
        if number == 0:
            clock.wait()
            begin = time.perf_counter()
        results = pair.run(0, tokens, start)
        for name in NAMES:
            views[name].copy_(results[name], non_blocking=True)
        pair.run(1, tokens, views)
    clock.wait()
    return count / (time.perf_counter() - begin)


def two_threads(pair: Pair, phases: Sequence[tuple[int, int]], profiler: Any = None) -> list[float]:
    """Through `StageRunner` and the `local` transport, each stage in a thread and on a stream of its own.

    Args:
        phases: numbers of tokens, and of micro-batches in flight; micro-batches per second come back for each.
        profiler: a `torch.profiler.profile`; nothing is timed then, but the steady state of the first phase is
            profiled, and nobody waits for the device.
    """
    import torch
    from torch import nn

    import pp_piecewise_backend as ppb
    from pp_piecewise_backend.pipeline.transports.local import LocalHub

    options, skipped = pair.options, 5
    counts = [skipped + fewer(options.micro_batches, tokens) for tokens, _ in phases]
    ended: list[float] = []
    has_ended, failed = threading.Condition(), []
    hub = LocalHub(2, device=options.device)
    # What attention is to do is set for the whole process, so warm-up has it to itself.
    warming_up, all_warm = threading.Lock(), threading.Barrier(2)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = pair.modules[0]

        def forward(self, positions: Any, first_states: Any, first_residual: Any) -> dict[str, Any]:
            return dict(zip(NAMES, self.stage(positions, first_states, first_residual), strict=True))

    def make_inputs(number: int, num_tokens: int) -> dict[str, Any]:
        start = pair.start(num_tokens)
        own = {"first_states": start["hidden_states"], "first_residual": start["residual"]} if number == 0 else {}
        return {"positions": pair.positions(num_tokens), **own}

    def micro_batches() -> Iterator[Any]:
        """Those of each phase once all of the phase before have ended: attention is set for one size at a time."""
        begun = 0
        for (tokens, in_flight), count in zip(phases, counts, strict=True):
            first = begun
            while begun < first + count:
                wanted = first if begun == first else max(first, begun + 1 - in_flight)
                with has_ended:
                    has_ended.wait_for(lambda wanted=wanted: len(ended) >= wanted or failed)
                begun += 1
                yield ppb.MicroBatch(tokens)

    def play(number: int) -> None:
        runner = ppb.StageRunner(
            First() if number == 0 else named_results(pair.modules[1]),
            make_inputs=lambda num_tokens, tag: make_inputs(number, num_tokens),
            max_tokens=pair.max_tokens,
            inputs=pair.proxies if number == 1 else None,
            outputs=pair.proxies if number == 0 else None,
            transport=hub.transport(number),
            options=pair.settings,
        )
        with Lane(options.device), torch.no_grad(), runner:
            with warming_up:
                runner.warmup(progress=False)
            all_warm.wait()
            for _ in runner.run(micro_batches() if number == 0 else None):
                if number == 0:
                    continue
                if profiler is None and options.device == "cuda":
                    torch.cuda.current_stream().synchronize()
                with has_ended:
                    ended.append(time.perf_counter())
                    has_ended.notify_all()
                if profiler is not None and len(ended) in (skipped, counts[0]):
                    profiler.start() if len(ended) == skipped else profiler.stop()

    def guarded(number: int) -> None:
        try:
            play(number)
        except BaseException as error:
            with has_ended:
                failed.append(error)
                has_ended.notify_all()
            all_warm.abort()

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    speeds, first = [], 0
    for count in counts:
        times = ended[first + skipped - 1 : first + count]
        speeds.append((len(times) - 1) / (times[-1] - times[0]))
        first += count
    return speeds


# ------------------------------------------------------------------------------------------- showing


def line(cell: Mapping[str, Any]) -> str:
    gaps = ", ".join(f"{way} {cell['gap_us'][way]['median']:.1f}" for way in WAYS)
    speeds = ", ".join(f"{name}: {value:.1f}" for name, value in cell["micro_batches_per_second"].items())
    return (
        f"{cell['stage']}, {cell['tokens']} tokens ({cell['proxy_bytes']} bytes): gap us {gaps}; "
        f"copy us {cell['copy_us']['median']:.1f}; micro-batches/s {speeds}"
    )


def plot(cells: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Left: the gap by number of tokens. Right: throughput over that on one stream."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (gaps, speeds) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    tokens = [cell["tokens"] for cell in cells]
    for way in WAYS:
        gaps.plot(tokens, [cell["gap_us"][way]["median"] for cell in cells], "o-", label=way.replace("_", " "))
    gaps.plot(tokens, [cell["copy_us"]["median"] for cell in cells], "k:", label="one copy")
    gaps.set_xscale("log", base=2)
    gaps.set_xlabel("tokens")
    gaps.set_ylabel("us between the stages")
    gaps.legend()
    for cell in cells:
        values = dict(cell["micro_batches_per_second"])
        alone = values.pop("one_stream")
        speeds.plot([*map(int, values)], [value / alone for value in values.values()], "o-", label=f"{cell['tokens']}")
    speeds.set_xlabel("micro-batches in flight")
    speeds.set_ylabel("throughput over one stream")
    speeds.legend(title="tokens", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
