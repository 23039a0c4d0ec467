"""Which file each figure of README and of docs/benchmarks.md comes from, with the command and the machine that made it.

    python bench/claims.py

prints them, and exits with 1 where a page says something else than its file. When files have changed, it says which
figures of the pages are to be brought up to date.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from common import REPOSITORY, RESULTS

README, BENCHMARKS = "README.md", "docs/benchmarks.md"
Value = Callable[[Any, Any], float]
"""Of the contents of a file, in a column of a table."""


@dataclass(frozen=True)
class Table:
    """Figures in a table of a page, each rounded as it is written there."""

    page: str
    corner: str
    """The first cell, by which the table is found."""
    result: str
    """The file in bench/results, without its suffix."""
    columns: Sequence[Any]
    rows: Mapping[str, Value]
    """First cells of the rows, without marks, up to a colon."""

    @property
    def name(self) -> str:
        return f"table {self.corner!r}"

    def differences(self, text: str, data: Any) -> Iterator[str]:
        found = dict(table_rows(text, self.corner))
        for label in dict.fromkeys((*self.rows, *found)):
            if label not in found or label not in self.rows:
                yield f"row {label!r} is only {'in the page' if label in found else 'expected'}"
            elif len(found[label]) != len(self.columns):
                yield f"row {label!r} has {len(found[label])} figures, {len(self.columns)} are expected"
            else:
                for column, written in zip(self.columns, found[label], strict=True):
                    right = rounded_as(written, self.rows[label](data, column))
                    if written != right:
                        yield f"row {label!r}, column {column}: {written}, and {right} in the file"


@dataclass(frozen=True)
class Sentence:
    """Figures in a sentence of a page."""

    page: str
    template: str
    """The words of the page, with a replacement field for each figure."""
    result: str
    values: Callable[[Any], Sequence[object]]

    @property
    def name(self) -> str:
        return f"{self.template[:50]!r} ..."

    def differences(self, text: str, data: Any) -> Iterator[str]:
        right = self.template.format(*self.values(data))
        if right not in " ".join(text.split()):
            yield f"by the file it is {right!r}"


def table_rows(text: str, corner: str) -> Iterator[tuple[str, list[str]]]:
    """Label and cells of each row of the table with this first cell."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {corner} |"):
            next(lines)
            for row in lines:
                if not row.startswith("|"):
                    return
                label, *cells = (re.sub(r"[*`]", "", cell).strip() for cell in row.strip("|").split("|"))
                yield label.partition(":")[0] if ": " in label and label[0] == "p" else label, cells


def corners(text: str) -> list[str]:
    """First cells of the tables in a page that have figures."""
    heads = re.findall(r"^\| ([^|]+) \|.*\n\|[-|]+\|\n(\|.*)$", text, flags=re.MULTILINE)
    return [corner for corner, row in heads if re.search(r"\| \d[\d.]* ", row)]


def rounded_as(written: str, value: float) -> str:
    """With as many digits after the point."""
    return f"{value:.{len(written.partition('.')[2])}f}"


# -------------------------------------------------------------------------------- how to find them


def cell(cells: Sequence[Mapping[str, Any]], **wanted: Any) -> Any:
    """The one with these values."""
    (found,) = (each for each in cells if all(each[name] == value for name, value in wanted.items()))
    return found


def latency(method: str, clock: str = "steady_us") -> Value:
    return lambda data, tokens: cell(data["summary"], tokens=tokens)["medians_us"][method][clock] / 1e3


def startup(method: str) -> Value:
    return lambda data, part: cell(data["runs"], method=method)["seconds"][part]


def gap(way: str) -> Value:
    return lambda data, tokens: cell(data["cells"], tokens=tokens)["gap_us"][way]["median"]


def rate(how: str) -> Value:
    return lambda data, tokens: cell(data["cells"], tokens=tokens)["micro_batches_per_second"][how]


def overhead(what: str) -> Value:
    return lambda data, layers: cell(data["runs"], layers=layers)["microseconds"][what]["processor"]["median"]


def per_hop(method: str) -> Value:
    def value(data: Any, column: tuple[int, str]) -> float:
        stages, situation = column
        return float(cell(data["host"], stages=stages)["handoff_us_per_hop"][situation][method]["wall"]["median"])

    return value


def compiling(method: str, part: str, caches: str = "cold") -> Value:
    return lambda data, layers: cell(data["summary"], method=method, layers=layers, caches=caches)["seconds"][part][
        "median"
    ]


def pipeline_ms(variant: str) -> Value:
    def value(data: Any, column: tuple[int, int]) -> float:
        tokens, in_flight = column
        return float(cell(data["cells"], variant=variant, tokens=tokens, in_flight=in_flight)["ms"]["median"])

    return value


def decode_ratios(data: Any, baseline: str, variant: str = "ours_auto_auto") -> list[float]:
    """Time of a micro-batch of a variant, of all defaults, over that of a baseline, of up to 64 tokens."""
    return [each["ms_over"][baseline][variant] for each in data["ratios"] if each["tokens"] <= 64]


def over_reduce_overhead(data: Any, column: tuple[int, int]) -> float:
    """The same of one cell."""
    tokens, in_flight = column
    found = cell(data["ratios"], tokens=tokens, in_flight=in_flight)
    return float(found["ms_over"]["reduce_overhead"]["ours_auto_auto"])


def overlapping(data: Any) -> list[Mapping[str, Any]]:
    """Cells of all defaults with more than one micro-batch in flight."""
    return [c for c in data["cells"] if c["variant"] == "ours_auto_auto" and c["in_flight"] > 1]


def extremes(values: Iterable[float]) -> tuple[float, float]:
    listed = list(values)
    return min(listed), max(listed)


def of_engine(engine: str) -> Value:
    def value(data: Any, column: str) -> float:
        run = cell(data["runs"], engine=engine, caches="cold")
        return float(run["ms_per_token"][column] if column in run["ms_per_token"] else run[column])

    return value


def prefill_and_ready(data: Any, engine: str) -> tuple[float, float]:
    """Speed of prefill, and time until ready, over those of vLLM's default."""
    found = cell(data["ratios"], engine=engine)
    return found["prefill"], found["ready"]


def differences_from_default(data: Any, engine: str) -> list[float]:
    """Between the log probabilities of the tokens of a prompt."""
    of = {name: cell(data["runs"], engine=name, caches="cold") for name in ("default", engine)}
    pairs = zip(*(of[name]["prompt_log_probabilities"] for name in ("default", engine)), strict=True)
    return [abs(ours - theirs) for theirs, ours in pairs]


DECODE_CELLS = tuple((tokens, in_flight) for tokens in (1, 8, 64) for in_flight in (1, 2, 4))
"""Tokens and micro-batches in flight."""
OVER_NCCL, OVER_IPC = "ours_full_and_piecewise_nccl", "ours_full_and_piecewise_ipc"
TOKENS = (1, 8, 64, 512, 2048)
EARLY = {
    "eager": latency("eager"),
    "torch.compile": latency("default"),
    'mode="reduce-overhead"': latency("reduce_overhead"),
}
LIMIT = {"limit: one graph captured by hand": latency("limit")}


def over(data: Any, name: str, **wanted: Any) -> tuple[float, float]:
    """Least and greatest share of the time of ``name``, of targets with these values."""
    shares = [t[name] for t in data["targets"] if t["target"] == "host" and all(t[k] == v for k, v in wanted.items())]
    return min(shares), max(shares)


WORDS = ("none", "one", "two", "three", "four", "five")

CLAIMS: Sequence[Table | Sentence] = (
    Table(
        README,
        "two GPUs",
        "gpu_pipeline_7b_in_parts",
        tuple(column for column in DECODE_CELLS if column[1] != 2),
        {
            'mode="reduce-overhead"': pipeline_ms("reduce_overhead"),
            "pp_piecewise": pipeline_ms("ours_auto_auto"),
        },
    ),
    Table(
        BENCHMARKS,
        "ms per call",
        "gpu_latency",
        TOKENS,
        {
            **EARLY,
            "piecewise-cuda-graphs, breaks by hand": latency("piecewise_cuda_graphs"),
            "pp_piecewise, compiler=eager": latency("ours_eager"),
            "pp_piecewise": latency("ours"),
            "pp_piecewise, mode=full": latency("ours_full"),
            **LIMIT,
        },
    ),
    Sentence(
        BENCHMARKS,
        "it reaches {:.2f} of the limit's speed at 8 tokens and {:.2f} at 2048, and with `mode=full` 0.99 or more "
        "at all sizes but 512 ({:.3f})",
        "gpu_latency",
        lambda data: [
            latency("limit")(data, tokens) / latency(method)(data, tokens)
            for method, tokens in (("ours", 8), ("ours", 2048), ("ours_full", 512))
        ],
    ),
    Sentence(
        BENCHMARKS,
        "A call takes the host {:.1f} to {:.1f} ms, most of it for 14 eager attentions, where `reduce-overhead`, "
        "which has them in its graph, takes {:.1f} to {:.1f} ms",
        "gpu_latency",
        lambda data: [
            *extremes(latency("ours", "host_us")(data, tokens) for tokens in TOKENS),
            *extremes(latency("reduce_overhead", "host_us")(data, tokens) for tokens in TOKENS),
        ],
    ),
    *(
        Table(
            BENCHMARKS,
            f"ms, {model}",
            f"gpu_pipeline_{model.lower()}_in_parts",
            DECODE_CELLS,
            {
                'mode="reduce-overhead"': pipeline_ms("reduce_overhead"),
                "pp_piecewise, all defaults": pipeline_ms("ours_auto_auto"),
                "the same over NCCL": pipeline_ms(OVER_NCCL),
                "the same over CUDA IPC": pipeline_ms(OVER_IPC),
                "all defaults / reduce-overhead": over_reduce_overhead,
            },
        )
        for model in ("7B", "8B", "0.5B")
    ),
    *(
        Sentence(
            BENCHMARKS,
            f"At {model} it takes {{:.3f}} to {{:.3f}} of the time of `reduce-overhead`{how}, over NCCL {{:.3f}} to "
            "{:.3f} and over CUDA IPC {:.3f} to {:.3f}",
            f"gpu_pipeline_{model.lower()}_in_parts",
            lambda data: [
                *extremes(decode_ratios(data, "reduce_overhead")),
                *extremes(decode_ratios(data, "reduce_overhead", OVER_NCCL)),
                *extremes(decode_ratios(data, "reduce_overhead", OVER_IPC)),
            ],
        )
        for model, how in (("7B", " with the engine-style hand-off"), ("8B", ""))
    ),
    Sentence(
        BENCHMARKS,
        "two rows are the same way twice: they differ by up to {:.1f} %",
        "gpu_pipeline_7b_in_parts",
        lambda data: [
            max(
                100 * abs(pipeline_ms("ours_auto_auto")(data, c) / pipeline_ms(OVER_IPC)(data, c) - 1)
                for c in DECODE_CELLS
            )
        ],
    ),
    Sentence(
        BENCHMARKS,
        "Here it takes {:.3f} to {:.3f} of the time of `reduce-overhead`, over CUDA IPC {:.3f} to {:.3f}, and over "
        'NCCL, which `transport="auto"` takes only where it is clearly faster, {:.3f} to {:.3f}. Blocks of the same '
        "cell differ by up to {:.2f} times",
        "gpu_pipeline_0.5b_in_parts",
        lambda data: [
            *extremes(decode_ratios(data, "reduce_overhead")),
            *extremes(decode_ratios(data, "reduce_overhead", OVER_IPC)),
            *extremes(decode_ratios(data, "reduce_overhead", OVER_NCCL)),
            max(c["ms"]["max"] / c["ms"]["min"] for c in data["cells"]),
        ],
    ),
    Sentence(
        BENCHMARKS,
        "with all defaults the busier one works (`host_work_us`) for {:.2f} to {:.2f} of the time of a micro-batch",
        "gpu_pipeline_0.5b_in_parts",
        lambda data: extremes(
            max(rank["host_work_us"] for rank in c["ranks"]) / 1e3 / c["ms"]["median"] for c in overlapping(data)
        ),
    ),
    Table(
        BENCHMARKS,
        "ms, 0.5B, slower host",
        "gpu_pipeline_0.5b_slow_host",
        (*DECODE_CELLS, (512, 4), (2048, 4)),
        {
            'mode="reduce-overhead"': pipeline_ms("reduce_overhead"),
            "pp_piecewise, all defaults": pipeline_ms("ours_auto_auto"),
        },
    ),
    Sentence(
        BENCHMARKS,
        "There it took {:.3f} to {:.3f} of the time of `reduce-overhead` up to 512 tokens. At 2048 tokens it "
        "took {:.2f} to {:.2f} of it",
        "gpu_pipeline_0.5b_slow_host",
        lambda data: [
            bound
            for is_long in (False, True)
            for bound in extremes(
                each["ms_over"]["reduce_overhead"]["ours_auto_auto"]
                for each in data["ratios"]
                if (each["tokens"] > 512) == is_long
            )
        ],
    ),
    *(
        Table(
            BENCHMARKS,
            f"ms, {model}, older",
            f"gpu_pipeline_{model.lower()}",
            (*DECODE_CELLS, (512, 4)),
            {
                "eager": pipeline_ms("eager"),
                'mode="reduce-overhead"': pipeline_ms("reduce_overhead"),
                "pp_piecewise, all defaults": pipeline_ms("ours_auto_auto"),
                **more,
            },
        )
        for model, more in (
            ("7B", {}),
            ("0.5B", {"the same, pieces only, over CUDA IPC": pipeline_ms("ours_piecewise_ipc")}),
        )
    ),
    Sentence(
        BENCHMARKS,
        "In decode it took {:.2f} to {:.2f} of the time of eager at 7B",
        "gpu_pipeline_7b",
        lambda data: extremes(decode_ratios(data, "eager")),
    ),
    Sentence(
        BENCHMARKS,
        "of the time of eager at 7B and {:.2f} to {:.2f} at 0.5B",
        "gpu_pipeline_0.5b",
        lambda data: extremes(decode_ratios(data, "eager")),
    ),
    Sentence(
        BENCHMARKS,
        "Against `reduce-overhead` it was {:.3f} to {:.3f} at 7B, the upper end with {} in flight",
        "gpu_pipeline_7b",
        lambda data: [
            *extremes(decode_ratios(data, "reduce_overhead")),
            WORDS[max(DECODE_CELLS, key=lambda column: over_reduce_overhead(data, column))[1]],
        ],
    ),
    Sentence(
        BENCHMARKS,
        "the upper end with four in flight, and {:.2f} to {:.2f} at 0.5B, 512 tokens included",
        "gpu_pipeline_0.5b",
        lambda data: extremes(each["ms_over"]["reduce_overhead"]["ours_auto_auto"] for each in data["ratios"]),
    ),
    Sentence(
        BENCHMARKS,
        "transformers' own pipeline, which has one micro-batch in flight, took {:.0f} to {:.0f} ms at 7B, medians of "
        "two blocks that differ by up to {:.1f} times",
        "gpu_pipeline_7b",
        lambda data: [
            *extremes(c["ms"]["median"] for c in data["cells"] if c["variant"] == "transformers"),
            max(c["ms"]["max"] / c["ms"]["min"] for c in data["cells"] if c["variant"] == "transformers"),
        ],
    ),
    Table(
        BENCHMARKS,
        "engine, two GPUs",
        "gpu_vllm_two_gpus",
        ("1", "8", "64", "128", "prefill_tokens_per_s", "ready_s"),
        {
            "vLLM, its default": of_engine("default"),
            "-cc.backend=pp_piecewise": of_engine("ours"),
        },
    ),
    Sentence(
        BENCHMARKS,
        "A token takes {:.3f} of the time of vLLM's default at one sequence, {:.3f} at 8, {:.3f} at 64 and {:.3f} at "
        "128, prefill has {:.3f} of its speed, and the engine is ready in {:.2f} of its time",
        "gpu_vllm_two_gpus",
        lambda data: [
            *(cell(data["ratios"], engine="ours")["time_per_token"][count] for count in ("1", "8", "64", "128")),
            *prefill_and_ready(data, "ours"),
        ],
    ),
    Sentence(
        BENCHMARKS,
        "After the warm-up {} pieces missed their graphs, and of the proxies of the second stage {} were received in "
        "place and {} elsewhere; {} were copied",
        "gpu_vllm_two_gpus",
        lambda data: [
            sum(count)
            for count in zip(
                *(
                    (
                        worker["since_warm_up"]["graph_misses"],
                        worker["received_in_place"],
                        worker["received_elsewhere"],
                        worker["since_warm_up"]["stage_input_copies"],
                    )
                    for worker in cell(data["runs"], engine="ours", caches="cold")["workers"]
                ),
                strict=True,
            )
        ],
    ),
    Sentence(
        BENCHMARKS,
        "Log probabilities of a prompt differ from the default's by at most {:.3f}, by {:.3f} on average",
        "gpu_vllm_two_gpus",
        lambda data: [figure(differences_from_default(data, "ours")) for figure in (max, statistics.mean)],
    ),
    Table(
        BENCHMARKS,
        "engine",
        "gpu_vllm_one_gpu",
        ("1", "8", "64", "prefill_tokens_per_s", "ready_s"),
        {
            "vLLM, its default": of_engine("default"),
            "-cc.backend=pp_piecewise, with vLLM's own kernels": of_engine("ours"),
            "--enforce-eager": of_engine("eager"),
        },
    ),
    Sentence(
        BENCHMARKS,
        "A token takes {:.2f} to {:.2f} of the time of vLLM's default, prefill {:.3f} of its speed, and the engine is "
        "ready in {:.2f} of its time",
        "gpu_vllm_one_gpu",
        lambda data: [
            *extremes(cell(data["ratios"], engine="ours")["time_per_token"].values()),
            *prefill_and_ready(data, "ours"),
        ],
    ),
    Table(
        BENCHMARKS,
        "seconds | compile | capture",
        "gpu_startup",
        ("compile", "capture", "total"),
        {
            "pp_piecewise": startup("ours"),
            "the same with one compile per piece": startup("unshared"),
            'mode="reduce-overhead"': startup("reduce_overhead"),
        },
    ),
    Sentence(
        BENCHMARKS,
        "{} distinct pieces of {} compiled, {} graphs captured",
        "gpu_startup",
        lambda data: [
            cell(data["runs"], method="ours")["counts"][name] for name in ("pieces_compiled", "pieces", "captures")
        ],
    ),
    Table(
        BENCHMARKS,
        "tokens",
        "gpu_handoff",
        (*TOKENS, 8192),
        {
            "us, landing in place": gap("in_place"),
            "us, fresh memory and a copy (as engines)": gap("copy_in"),
            "micro-batches/s, one stream": rate("one_stream"),
            "micro-batches/s, 1 in flight": rate("1"),
            "micro-batches/s, 4 in flight": rate("4"),
        },
    ),
    Sentence(
        BENCHMARKS,
        "up to {:.0f} % from 2048 tokens on, and below that the two threads of one Python process hold each other up "
        "({:.0f} to {:.0f} % slower than one stream)",
        "gpu_handoff",
        lambda data: [
            max(100 * (rate("4")(data, tokens) / rate("one_stream")(data, tokens) - 1) for tokens in (2048, 8192)),
            *extremes(100 * (1 - rate("4")(data, tokens) / rate("one_stream")(data, tokens)) for tokens in TOKENS[:4]),
        ],
    ),
    Sentence(
        BENCHMARKS,
        "no synchronisation and no allocation; all {} copies between the stages land while the second stage runs",
        "gpu_profile",
        lambda data: [
            data["hand_over_copies"]
            if data["landing_in_a_forward"] == data["hand_over_copies"]
            and not data["synchronisations"]
            and not data["allocations"]
            else "not"
        ],
    ),
    Table(
        BENCHMARKS,
        "microseconds per call",
        "host_overhead",
        (4, 32, 80),
        {
            "bare loop over the same callables": overhead("bare_loop"),
            "CUDAGraphSequence.replay of piecewise-cuda-graphs": overhead("piecewise_cuda_graphs"),
            "dispatch without address checks": overhead("unchecked"),
            "dispatch": overhead("dispatch"),
            "whole call: inputs staged, results copied out": overhead("program"),
            "the same with dumps on": overhead("dumping"),
            "through Dynamo without guards": overhead("dynamo_unguarded"),
            "through Dynamo with guards": overhead("dynamo"),
        },
    ),
    Sentence(
        BENCHMARKS,
        "At 32 layers {} addresses are checked",
        "host_overhead",
        lambda data: [cell(data["runs"], layers=32)["counts"]["addresses_checked"]],
    ),
    Table(
        BENCHMARKS,
        "microseconds",
        "handoff",
        ((2, "saturated"), (4, "saturated"), (2, "single"), (4, "single")),
        {
            "two pickled objects, fresh tensors, copies, over gloo (as SGLang)": per_hop("engine"),
            "one pickled object, fresh tensors, copies, over gloo (as vLLM)": per_hop("engine_one_object"),
            "a header, fresh tensors, copies, over gloo": per_hop("copy_in"),
            "StageRunner over gloo": per_hop("ours_early_p2p"),
            "StageRunner, through shared memory": per_hop("ours_early"),
        },
    ),
    Sentence(
        BENCHMARKS,
        "`StageRunner` through shared memory takes {:.2f} to {:.2f} of the time of two pickled objects, and {:.2f} "
        "to {:.2f} of that of one",
        "handoff",
        lambda data: [
            *over(data, "over_engine", method="ours_early", clock="wall"),
            *over(data, "over_engine_one_object", method="ours_early", clock="wall"),
        ],
    ),
    Sentence(
        BENCHMARKS,
        "By processor time of all ranks and threads it is {:.2f} to {:.2f} of two pickled objects when full; with one "
        "in flight {:.2f} (2 stages) and {:.2f} (4 stages",
        "handoff",
        lambda data: [
            *over(data, "over_engine", method="ours_early", clock="processor", situation="saturated"),
            *over(data, "over_engine", method="ours_early", clock="processor", situation="single"),
        ],
    ),
    Sentence(
        BENCHMARKS,
        "the gain is smaller: {:.2f} to {:.2f} of the time of two pickled objects",
        "handoff",
        lambda data: over(data, "over_engine", method="ours_early_p2p", clock="wall"),
    ),
    Sentence(
        BENCHMARKS,
        "early release reaches {:.2f} times the throughput of release at the end. The prediction is {:.0f} points "
        "lower",
        "handoff",
        lambda data: [
            cell(data["targets"], target="gain")["gain"],
            cell(data["targets"], target="early_near_predicted_with_host")["points"],
        ],
    ),
    Table(
        BENCHMARKS,
        "seconds | 4 layers",
        "all_methods/compile_time",
        (4, 16, 64),
        {
            "pp_piecewise, in all": compiling("pp_piecewise", "total"),
            "one compile per piece, in all": compiling("unshared", "total"),
            "stock Inductor, in all": compiling("stock", "total"),
            "pp_piecewise, compiling pieces only": compiling("pp_piecewise", "compile"),
        },
    ),
    Sentence(
        BENCHMARKS,
        "What grows with depth is Dynamo's tracing ({:.0f} s of the {:.1f}) and the split ({:.0f} s)",
        "all_methods/compile_time",
        lambda data: [compiling("pp_piecewise", part)(data, 64) for part in ("dynamo", "total", "split")],
    ),
    Sentence(
        BENCHMARKS,
        "at 64 layers is {:.2f} times that at 4 with cold caches and {:.2f} times with warm ones",
        "compile_time",
        lambda data: [cell(data["ratios"], caches=caches)["compile_seconds_ratio"] for caches in ("cold", "warm")],
    ),
    Sentence(
        BENCHMARKS,
        "it takes {:.2f} s and {:.1f} MB without depyf, and depyf {:.2f} s; a call takes {:.2f} ms with dumping on and "
        "{:.2f} ms with it off",
        "dump_cost",
        lambda data: [
            data["summary"]["dump_seconds"],
            data["summary"]["dump_bytes"] / 1e6,
            data["summary"]["depyf_seconds"],
            *(1e3 * data["summary"]["call_seconds"][which]["median"] for which in ("dumping", "not dumping")),
        ],
    ),
)


# ----------------------------------------------------------------------------------- the command


@cache
def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


@cache
def page(name: str) -> str:
    return (REPOSITORY / name).read_text()


def differences(claim: Table | Sentence) -> list[str]:
    """What the page says otherwise than the file."""
    return list(claim.differences(page(claim.page), result(claim.result)))


def machine(data: Any) -> str:
    found = data["environment"]
    gpu = "" if found["device"] == "cpu" else f"{found['device']}, CUDA {found['cuda']}, "
    return f"{gpu}{found['processor']}, {found['logical_cores']} cores, torch {found['packages']['torch']}"


def main() -> int:
    wrong = 0
    for claim in CLAIMS:
        data, found = result(claim.result), differences(claim)
        wrong += len(found)
        print(f"{claim.page}, {claim.name}: {'as in the file' if not found else 'DIFFERENT'}")
        print(
            f"  bench/results/{claim.result}.json, of {data['finished'][:10]}\n  {data['command']}\n  {machine(data)}"
        )
        for difference in found:
            print(f"  {difference}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
