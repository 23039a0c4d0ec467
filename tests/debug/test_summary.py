"""Questions that someone who never saw the model answers from ``summary.json`` alone, for five prepared cases.

Only JSON is read here: no class of the package, as a reader with other tools would do it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from dumping import EAGER, Small, program_folders, run_small, run_toy_stage
from models.hf import greedy_decode, make_model, make_prompts
from pp_piecewise_backend.backend import backend
from pp_piecewise_backend.debug import describe
from pp_piecewise_backend.debug.summary import SCHEMA_VERSION, Graphs, Summary

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")


def read(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert summary["schema_version"] == SCHEMA_VERSION
    return summary


def inputs_of(summary: dict[str, Any], kind: str) -> set[str]:
    return {entry["source"] for entry in summary["inputs"] if entry["kind"] == kind}


def distinct_files(summary: dict[str, Any]) -> dict[str, list[int]]:
    """File -> indices of the compute pieces that it stands for."""
    found: dict[str, list[int]] = {}
    for piece in summary["pieces"]:
        if piece["kind"] == "compute":
            found.setdefault(piece["file"], []).append(piece["index"])
    return found


# Where was it split and why; which inputs are proxies, state, parameters; which pieces are distinct?


@pytest.mark.compat
def test_case_1_a_stage_of_an_engine(tmp_path: Path) -> None:
    run_toy_stage(tmp_path, num_layers=3)
    summary = read(program_folders(tmp_path)[1])
    assert summary["split_matches"] == {"toy::attention*": 3}
    assert [(p["index"], p["reason"]) for p in summary["pieces"] if p["kind"] == "eager"] == [
        (index, "split op toy::attention_with_output") for index in (1, 3, 5)
    ]
    assert inputs_of(summary, "stage-input") == {"hidden_states", "residual"}
    assert inputs_of(summary, "state") == {
        f"self.layers.{layer}.attention.{cache}" for layer in range(3) for cache in ("k_cache", "v_cache")
    }
    assert {"self.cos_sin", "self.layers.0.mlp.down.weight"} <= inputs_of(summary, "parameter")
    assert inputs_of(summary, "per-token") == {"positions"}
    assert summary["token_count"] in summary["token_reason"] and "float32[" in summary["token_reason"]
    assert distinct_files(summary) == {
        "piece_00_compute.py": [0], "piece_02_compute.py": [2, 4], "piece_06_compute.py": [6],
    }  # fmt: skip
    assert sorted(summary["pieces"][0]["reads_stage_inputs"]) == ["hidden_states", "residual"]
    assert [p["index"] for p in summary["pieces"] if p["writes_stage_outputs"]] == [6]


@pytest.mark.compat
def test_case_2_a_llama_with_a_static_cache(tmp_path: Path) -> None:
    model = make_model("llama", 2)
    run = torch.compile(model, backend="pp_piecewise", options={**EAGER, "dump_dir": tmp_path})
    greedy_decode(run, model.config, make_prompts([5]), cache_kind="static", steps=2)
    backend.dumps.finish()
    summary = read(program_folders(tmp_path)[-1])
    assert summary["split_matches"] == {"scaled_dot_product_attention": 2}
    reasons = [piece["reason"] for piece in summary["pieces"] if piece["kind"] == "eager"]
    assert len(reasons) == 2
    for reason in reasons:  # why it is cut there: not only attention
        assert "index_copy_ writes graph input keys" in reason and "split op scaled_dot_product_attention" in reason
    assert {source.rpartition(".")[2] for source in inputs_of(summary, "state")} == {
        "keys", "values", "cumulative_length",
    }  # fmt: skip
    assert not inputs_of(summary, "stage-input")
    assert summary["unmatched_stage_inputs"] == ["hidden_states", "residual"]
    assert len(distinct_files(summary)) == 3
    assert summary["token_count"] == "1" and "input_ids" in summary["token_reason"]


# Why did call k of bucket b not replay?


def test_case_3_a_call_that_did_not_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_small(tmp_path)
    told = {
        "mode": "emulate",
        "buckets": [{"tokens": 8, "bytes": 4096, "seconds": 0.01, "pieces": 2}],
        "misses": [
            {"reason": "first-call", "sentence": "first call of bucket 8", "pieces": 2, "tokens": 8, "call": 1},
            {"reason": "address", "sentence": "input weight moved", "pieces": 1, "tokens": 8, "call": 7},
        ],
        "addresses": [{"input": "weight", "arrival": "parameter"}],
    }
    monkeypatch.setattr(describe, "describe_graphs", lambda program: Graphs.model_validate(told))
    backend.dumps.finish()
    (folder,) = program_folders(tmp_path)
    graphs = read(folder)["graphs"]
    (why,) = [miss for miss in graphs["misses"] if miss["call"] == 7 and miss["tokens"] == 8]
    assert why == {
        "reason": "address", "sentence": "input weight moved", "pieces": 1, "tokens": 8, "calls": 1, "call": 7,
    }  # fmt: skip
    assert [bucket["tokens"] for bucket in graphs["buckets"]] == [8]
    assert not [miss for miss in graphs["misses"] if miss["call"] == 8]  # that one replayed


def test_case_4_a_graph_that_nothing_can_replay(tmp_path: Path) -> None:
    with torch.enable_grad(), pytest.warns(ppb.errors.PPPiecewiseWarning):
        run_small(tmp_path)
    (folder,) = program_folders(tmp_path)
    summary = read(folder)
    assert summary["progress"] == "not split" and summary["pieces"] == []
    assert "gradients are required" in summary["not_split"] and "torch.no_grad()" in summary["not_split"]
    assert summary["counters"]["grad_fallbacks"] == 1


# What changed since the previous dump?


def test_case_5_what_changed_since_the_previous_dump(tmp_path: Path) -> None:
    summaries = []
    for name, module, options in (("before", Small(2.0), {}), ("after", Small(3.0), {"stage_inputs": "none"})):
        torch._dynamo.reset()
        ppb.reset()
        run_small(tmp_path / name, module, **options)
        (folder,) = program_folders(tmp_path / name)
        summaries.append(read(folder))
    before, after = summaries
    keys = [[piece["key"] for piece in summary["pieces"]] for summary in summaries]
    assert keys[0][0] == keys[1][0]  # the first piece is the same
    assert keys[0][-1] != keys[1][-1]  # the last one has another factor in it
    config = [{o["option"]: (o["value"], o["source"]) for o in summary["config"]} for summary in summaries]
    changed = {option for option in config[0] if config[0][option] != config[1][option]}
    assert changed == {"dump_dir", "stage_inputs"}
    assert config[1]["stage_inputs"] == ("none", "option")
    assert inputs_of(before, "stage-input") == {"hidden_states"} == inputs_of(after, "per-token")


# ------------------------------------------------------------------------------------- the schema


SELF_EVIDENT = {
    "buckets", "compile_seconds", "config", "device", "extras", "files", "graphs", "index", "input_types", "inputs",
    "kind", "misses", "mode", "name", "option", "output_types", "outputs", "pieces", "process_id", "progress", "rank",
    "reason", "schema_version", "source", "token_reason", "tokens", "unmatched_stage_inputs", "value", "versions",
}  # fmt: skip


def test_fields_have_a_description_or_a_name_that_says_it_all() -> None:
    schema = Summary.model_json_schema()
    for name, entry in {"Summary": schema, **schema["$defs"]}.items():
        for field, details in entry["properties"].items():
            assert details.get("description") or field in SELF_EVIDENT, (name, field)


def test_a_summary_reads_back_as_it_was(tmp_path: Path) -> None:
    run_small(tmp_path)
    text = (program_folders(tmp_path)[0] / "summary.json").read_text()
    assert Summary.model_validate_json(text).model_dump_json(indent=1) + "\n" == text
