"""What our worker does around vLLM's, on stand-ins for vLLM: the engine itself is in ``test_vllm.py``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from models.attention_layers import HIDDEN, Layers

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

MOST = 16


class TensorMetadata(NamedTuple):
    device: str
    dtype: torch.dtype
    size: torch.Size


class Workspaces:
    """As vLLM's manager: scratch memory that grows."""

    def __init__(self) -> None:
        self._current_workspaces: list[Tensor | None] = [None, torch.zeros(4)]
        self.is_locked = False

    def grow(self) -> None:
        self._current_workspaces[0] = torch.zeros(64)


class VllmLayers(Layers):
    def make_empty_intermediate_tensors(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        tensors = {"hidden_states": torch.empty(batch_size, HIDDEN, dtype=dtype, device=device)}
        return SimpleNamespace(tensors=tensors)


class Runner:
    """As vLLM's model runner: compiles at its first run, by the backend that vLLM looks up."""

    def __init__(self, calls: list[tuple[int, dict[str, Any]]]) -> None:
        self.max_num_tokens, self.model, self.compiled = MOST, VllmLayers(), None
        self.intermediate_tensors: Any = None
        self.calls = calls

    def get_model(self) -> VllmLayers:
        return self.model

    def _dummy_run(self, num_tokens: int, **how: Any) -> None:
        self.calls.append((num_tokens, how))
        self.run(num_tokens)

    def run(self, num_tokens: int) -> Tensor:
        if self.compiled is None:
            from pp_piecewise_backend.integrations.vllm import backend

            self.compiled = torch.compile(self.model, backend=backend)
        x = self.intermediate_tensors["hidden_states"][:num_tokens]
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return self.compiled(hidden_states=x)


class VllmWorker:
    """As vLLM's worker."""

    def __init__(self, kv_cache_memory_bytes: int | None, v2: bool, when_warm: Callable[[], None]) -> None:
        self.cache_config = SimpleNamespace(kv_cache_memory_bytes=kv_cache_memory_bytes)
        compilation = SimpleNamespace(inductor_compile_config={"combo_kernels": True})
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.float32), compilation_config=compilation
        )
        self.use_v2_model_runner, self.rank, self.device = v2, 1, torch.device("cpu")
        self.when_warm = when_warm

    def load_model(self) -> None:
        self.calls: list[tuple[int, dict[str, Any]]] = []
        self.model_runner = Runner(self.calls)

    def determine_available_memory(self) -> int:
        self.model_runner.run(MOST)
        return 1 << 20

    def compile_or_warm_up_model(self) -> str:
        self.when_warm()
        self.landing.in_place += 2  # a warm-up may go through the pipeline
        return "times"


def group(world_size: int, rank: int, **more: Any) -> Any:
    members = {"world_size": world_size, "rank_in_group": rank, "device_communicator": None, "ranks": [0, 1]}
    members |= {"is_first_rank": rank == 0, "use_cpu_custom_send_recv": True}
    return SimpleNamespace(**members, cpu_group="cpu", device_group="device", **more)


class Stand(NamedTuple):
    """What stands in for vLLM."""

    worker_class: type
    pipeline: Any
    workspaces: Workspaces


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    pipeline, workspaces = group(2, 1), Workspaces()
    members: dict[str, dict[str, Any]] = {
        "vllm.distributed.parallel_state": {
            "get_pp_group": lambda: pipeline,
            "get_tp_group": lambda: group(1, 0),
            "TensorMetadata": TensorMetadata,
        },
        "vllm.logger": {"init_logger": __import__("logging").getLogger},
        "vllm.sequence": {"IntermediateTensors": dict},
        "vllm.v1.worker.workspace": {
            "current_workspace_manager": lambda: workspaces,
            "is_workspace_manager_initialized": lambda: True,
            "lock_workspace": lambda: setattr(workspaces, "is_locked", True),
        },
    }
    parents = {name.rpartition(".")[0] for name in members} | {"vllm", "vllm.v1"}
    for name in sorted({*members, *parents}):
        made = ModuleType(name)
        made.__path__ = []
        vars(made).update(members.get(name, {}))
        monkeypatch.setitem(sys.modules, name, made)
    ours = "pp_piecewise_backend.integrations.vllm"
    for name in ("worker", "landing"):
        monkeypatch.delitem(sys.modules, f"{ours}.{name}", raising=False)
    monkeypatch.setenv("PP_PIECEWISE_GRAPHS", "emulate")
    monkeypatch.setenv("PP_PIECEWISE_COMPILER", "eager")
    monkeypatch.setenv("PP_PIECEWISE_CAPTURE_SIZES", "4,8")
    worker = importlib.import_module(f"{ours}.worker")
    yield Stand(type("Ours", (worker.PiecewiseWorker, VllmWorker), {}), pipeline, workspaces)
    for name in ("worker", "landing"):
        sys.modules.pop(f"{ours}.{name}", None)


def started(stand: Stand, kv_cache_memory_bytes: int | None = None, v2: bool = False, grows: bool = False) -> Any:
    worker = stand.worker_class(kv_cache_memory_bytes, v2, stand.workspaces.grow if grows else lambda: None)
    worker.load_model()
    worker.available = worker.determine_available_memory()
    assert worker.compile_or_warm_up_model() == "times"
    return worker


@pytest.mark.parametrize("v2", [False, True])
def test_all_buckets_are_captured_at_start_and_the_kv_cache_gets_less(v2: bool, stand: Stand) -> None:
    worker = started(stand, v2=v2)
    held = ppb.stats().graph_bytes + ppb.stats().static_bytes
    assert held > 0 and worker.available == (1 << 20) - held
    assert {num_tokens for num_tokens, _ in worker.calls} >= {1, 4, 8, MOST}
    how = {"is_profile": True, "skip_attn": True} if v2 else {"is_profile": True}
    assert all(given == how for _, given in worker.calls)  # attention does nothing, and no graph of vLLM's runs
    with ppb.expect(graph_misses=0, captures=0, stage_input_copies=0, output_copies=0):
        for num_tokens in (3, 4, 7, MOST):
            worker.model_runner.run(num_tokens)
    report = worker.pp_piecewise_report()
    assert report["since_warm_up"]["calls"] == 4 and report["since_warm_up"]["miss_reasons"] == {}
    assert (report["pipeline_rank"], report["tensor_rank"], report["rank"]) == (1, 0, 1)


def test_settings_of_inductor_come_from_vllms_config(stand: Stand) -> None:
    worker = started(stand)
    integration = importlib.import_module("pp_piecewise_backend.integrations.vllm")
    assert integration._inductor_settings == worker.vllm_config.compilation_config.inductor_compile_config != {}


def test_what_the_user_says_of_the_kv_cache_stays(stand: Stand) -> None:
    assert started(stand, kv_cache_memory_bytes=5).available == 1 << 20


@pytest.mark.parametrize("grows", [False, True])
def test_graphs_do_not_outlive_the_workspaces_that_ops_find_for_themselves(grows: bool, stand: Stand) -> None:
    worker = started(stand, grows=grows)
    held = sum(len(bucket.graphs) for program in ppb.programs() for bucket, _ in program.all_buckets)
    assert ppb.stats().captures == (2 if grows else 1) * held
    assert stand.workspaces.is_locked
    with ppb.expect(graph_misses=0, captures=0):
        worker.model_runner.run(3)


def test_proxies_are_received_in_landing_memory(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = started(stand)
    landing = sys.modules["pp_piecewise_backend.integrations.vllm.landing"]
    received: list[tuple[Tensor, int, str]] = []
    monkeypatch.setattr(landing.dist, "irecv", lambda tensor, src, group: received.append((tensor, src, group)))
    gathered: list[tuple[Tensor, Tensor, str]] = []
    monkeypatch.setattr(landing, "gather", lambda *given: gathered.append(given))
    described = TensorMetadata("cpu", torch.float32, torch.Size([6, HIDDEN]))
    messages = [("hidden_states", described), ("other", described), ("number", 3)]
    messages.append(("empty", TensorMetadata("cpu", torch.float32, torch.Size([0, HIDDEN]))))
    stand.pipeline.recv_object = lambda src: messages
    stand.pipeline._should_use_all_gather = lambda name, *rest: name == "hidden_states"
    ranks = group(2, 1)
    found, pending, afterwards = stand.pipeline.irecv_tensor_dict(all_gather_group=ranks, all_gather_tensors=None)
    view = worker.landing.stage.views(6)["hidden_states"]
    assert found["hidden_states"].data_ptr() == view.data_ptr() and found["number"] == 3
    assert found["empty"].shape == (0, HIDDEN) and len(pending) == len(received) == 2
    share, source, over = received[0]
    assert (source, over) == (0, "cpu") and share.numel() == view.numel() // 2  # from the stage before
    assert share.data_ptr() == view.data_ptr() + share.numel() * share.element_size()  # rank 1's part, in its place
    (gather,) = afterwards
    gather()
    ((whole, part, over),) = gathered
    assert whole.data_ptr() == view.data_ptr() and part is share and over == "device"
    assert (worker.landing.in_place, worker.landing.elsewhere) == (1, 1)
    assert stand.pipeline.use_cpu_custom_send_recv is False
