"""What naming the backend does to vLLM's config, on a stand-in for vLLM: the engine itself is in ``test_vllm.py``."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pp_piecewise_backend import errors
from pp_piecewise_backend.integrations import vllm as integration
from pp_piecewise_backend.integrations.vllm.settings import capture_options

CompilationMode = Enum("CompilationMode", "NONE STOCK_TORCH_COMPILE DYNAMO_TRACE_ONCE VLLM_COMPILE")
CUDAGraphMode = Enum("CUDAGraphMode", "NONE PIECEWISE FULL FULL_DECODE_ONLY FULL_AND_PIECEWISE")


@dataclass
class Priority:
    """Which kernels are tried first, for each op that has several."""

    rms_norm: list[str] = field(default_factory=list)
    fused_add_rms_norm: list[str] = field(default_factory=list)


class Platform:
    """As vLLM's: one object, whose class is everybody's."""

    def __init__(self, device: str) -> None:
        self._device = device

    def is_cpu(self) -> bool:
        return self._device == "cpu"

    def is_cuda_alike(self) -> bool:
        return self._device == "cuda"

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        vllm_config.platform_was_asked = True

    def get_default_ir_op_priority(self, vllm_config: Any) -> Priority:
        """As on CUDA: by the name of the backend."""
        compilation = vllm_config.compilation_config
        is_own = compilation.backend == "inductor" and compilation.mode is not CompilationMode.NONE
        kernels = ["native"] if is_own else ["vllm_c", "native"]
        return Priority(list(kernels), list(kernels))


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


@pytest.fixture(params=["cpu", "cuda"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Platform:
    found = Platform(request.param)
    modules = {
        "vllm": module("vllm", __version__=integration.TESTED_VERSIONS[-1]),
        "vllm.platforms": module("vllm.platforms", current_platform=found),
        "vllm.config": module("vllm.config", CompilationMode=CompilationMode, CUDAGraphMode=CUDAGraphMode),
    }
    for name, stub in modules.items():
        monkeypatch.setitem(sys.modules, name, stub)
    return found


def config(backend: str = "pp_piecewise", mode: Any = None, **changed: Any) -> Any:
    """What vLLM has read from the command line when it asks the platform."""
    compilation = {"backend": backend, "mode": mode, "cudagraph_mode": changed.pop("cudagraph_mode", None)}
    compilation["custom_ops"] = list(changed.pop("custom_ops", ()))
    kernels = SimpleNamespace(ir_op_priority=Priority(**changed.pop("ir_op_priority", {})))
    parallel = {"worker_cls": changed.pop("worker_cls", "auto"), "enable_dbo": changed.pop("enable_dbo", False)}
    others = {"lora_config": None, "speculative_config": None, **changed}
    return SimpleNamespace(
        compilation_config=SimpleNamespace(**compilation),
        parallel_config=SimpleNamespace(**parallel),
        kernel_config=kernels,
        **others,
    )


def asked(platform: Platform, given: Any) -> Any:
    integration.register()
    platform.apply_config_platform_defaults(given)
    assert given.platform_was_asked
    del given.platform_was_asked
    return given


@pytest.mark.parametrize("backend", ["", "inductor", "eager", "my.backend"])
def test_nothing_happens_unless_the_backend_is_named(backend: str, platform: Platform) -> None:
    assert asked(platform, config(backend, enable_dbo=True)) == config(backend, enable_dbo=True)


def test_no_class_of_vllm_is_changed_and_registering_twice_changes_nothing_more(platform: Platform) -> None:
    before = dict(vars(Platform))
    integration.register()
    once = platform.apply_config_platform_defaults
    integration.register()
    assert platform.apply_config_platform_defaults is once
    assert dict(vars(Platform)) == before
    assert not hasattr(Platform("cpu").apply_config_platform_defaults, "__wrapped__")


def test_the_backend_is_found_by_name_in_the_mode_that_traces_once(platform: Platform) -> None:
    given = asked(platform, config())
    assert given.compilation_config.mode is CompilationMode.DYNAMO_TRACE_ONCE
    module_name, _, function = given.compilation_config.backend.rpartition(".")
    assert getattr(sys.modules[module_name], function) is integration.backend
    kind = "cpu_worker.PiecewiseCPUWorker" if platform.is_cpu() else "gpu_worker.PiecewiseGPUWorker"
    assert given.parallel_config.worker_cls == f"pp_piecewise_backend.integrations.vllm.{kind}"
    again = asked(platform, given)  # vLLM makes configs from configs
    assert again.parallel_config.worker_cls.endswith(kind) and again.compilation_config.backend == integration.BACKEND


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        (None, "FULL_DECODE_ONLY"),
        ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"),
        ("PIECEWISE", "NONE"),
        ("NONE", "NONE"),
        ("FULL", "FULL"),
    ],
)
def test_pieces_are_the_backends_and_full_graphs_vllms(given: str | None, becomes: str, platform: Platform) -> None:
    mode = None if given is None else CUDAGraphMode[given]
    assert asked(platform, config(cudagraph_mode=mode)).compilation_config.cudagraph_mode is CUDAGraphMode[becomes]


NATIVE = {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}
OPEN: dict[str, list[str]] = {"rms_norm": [], "fused_add_rms_norm": []}


@pytest.mark.parametrize(
    ("custom_ops", "priority", "get", "order"),
    [
        ([], {}, ["none"], NATIVE),
        (["+rms_norm"], {}, ["+rms_norm", "none"], NATIVE),
        (["all"], {}, ["all"], NATIVE),
        (["none", "+rms_norm"], {}, ["none", "+rms_norm"], NATIVE),
        ([], {"rms_norm": ["vllm_c"]}, ["none"], {**NATIVE, "rms_norm": ["vllm_c"]}),
    ],
)
def test_inductor_writes_what_the_user_left_open(
    custom_ops: Sequence[str],
    priority: Mapping[str, list[str]],
    get: Sequence[str],
    order: Mapping[str, list[str]],
    platform: Platform,
) -> None:
    """Only on GPUs: on the CPU all stays as it was given."""
    given = asked(platform, config(custom_ops=custom_ops, ir_op_priority=priority))
    again = asked(platform, given)  # vLLM makes configs from configs
    found = again.compilation_config.custom_ops, asdict(again.kernel_config.ir_op_priority)
    assert found == ((custom_ops, {**OPEN, **priority}) if platform.is_cpu() else (get, order))
    assert again.compilation_config.backend == integration.BACKEND
    assert again.compilation_config.mode is CompilationMode.DYNAMO_TRACE_ONCE


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_vllms_own_kernels_stay_where_inductor_compiles_nothing(
    compiler: str, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PP_PIECEWISE_COMPILER", compiler)
    given = asked(platform, config())
    assert (given.compilation_config.custom_ops, asdict(given.kernel_config.ir_op_priority)) == ([], OPEN)


def test_enforce_eager_stays_eager(platform: Platform) -> None:
    given = config(mode=CompilationMode.NONE, enable_dbo=True)
    assert asked(platform, given) == config(mode=CompilationMode.NONE, enable_dbo=True)


@pytest.mark.parametrize(
    ("changed", "flag"),
    [
        ({"lora_config": object()}, "--enable-lora"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"enable_dbo": True}, "--enable-dbo"),
    ],
)
def test_what_is_not_tested_is_refused_with_what_to_do(changed: Any, flag: str, platform: Platform) -> None:
    with pytest.raises(errors.ConfigError, match=f"Leave out {flag}, or leave out -cc.backend"):
        asked(platform, config(**changed))


def test_a_worker_class_of_the_users_stays_and_what_it_costs_is_logged(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    given = asked(platform, config(worker_cls="my.Worker"))
    assert given.parallel_config.worker_cls == "my.Worker"
    assert "worker_cls is 'my.Worker'" in caplog.text and "proxies are copied" in caplog.text


def test_another_version_of_vllm_gives_one_warning_that_names_those_tested(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.1.0+cpu")
    with pytest.warns(errors.PPPiecewiseWarning, match=r"made for vLLM 0.26.0, 0.32.0, not for 0.1.0") as caught:
        asked(platform, config())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(sys.modules["vllm"], "__version__", integration.TESTED_VERSIONS[0] + "+cu130")
        asked(platform, config())


@pytest.mark.parametrize(
    ("world_size", "communicator", "splits"),
    [
        (2, SimpleNamespace(ca_comm=SimpleNamespace(disabled=False)), True),
        (2, SimpleNamespace(ca_comm=SimpleNamespace(disabled=True)), False),
        (2, SimpleNamespace(ca_comm=None), False),
        (2, SimpleNamespace(), False),  # the CPU's
        (1, None, False),
    ],
)
def test_all_reduces_of_vllms_own_run_between_the_pieces(world_size: int, communicator: Any, splits: bool) -> None:
    """They are captured in vLLM's graphs only, which register the addresses that they read."""
    found = capture_options(SimpleNamespace(world_size=world_size, device_communicator=communicator))
    assert found == ({"split_ops": "+vllm::all_reduce"} if splits else {})


def test_options_of_the_worker_reach_the_backend_but_where_the_environment_has_its_own(
    monkeypatch: pytest.MonkeyPatch, fresh_backend: None
) -> None:
    import pp_piecewise_backend as ppb

    monkeypatch.setattr(integration, "_worker_options", {})
    monkeypatch.setenv("PP_PIECEWISE_CAPTURE", "lazy")
    integration.set_worker_options(static_outputs=True, capture="warmup", max_tokens=16)
    with torch.no_grad():
        doubled = torch.compile(lambda x: 2 * x, backend=integration.backend)
        assert torch.equal(doubled(torch.ones(3)), 2 * torch.ones(3))
    (program,) = ppb.programs()
    assert (program.config.static_outputs, program.config.capture, program.config.max_tokens) == (True, "lazy", 16)
    monkeypatch.setenv("PP_PIECEWISE_MAX_TOKENS", "8")
    with pytest.raises(errors.ConfigError, match="unset it and use --max-num-batched-tokens"):
        integration.set_worker_options(max_tokens=16)


def test_settings_of_inductor_in_vllms_config_hold_for_pieces_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor_config

    ours = importlib.import_module("pp_piecewise_backend.backend")
    monkeypatch.setattr(integration, "_worker_options", {})
    monkeypatch.setattr(integration, "_inductor_settings", {})
    found: list[bool] = []
    monkeypatch.setattr(ours, "backend", lambda graph, inputs, options: found.append(inductor_config.combo_kernels))
    before = inductor_config.combo_kernels
    integration.set_worker_options({"combo_kernels": not before})
    integration.backend(None, [])
    found.append(inductor_config.combo_kernels)
    integration.set_worker_options()  # of another engine in the same process
    integration.backend(None, [])
    assert found == [not before, before, before]


@pytest.mark.parametrize("environment", [None, "full_and_piecewise"])
def test_full_graphs_are_left_to_vllm(environment: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the default is, and whether or not the worker is ours."""
    given: list[dict[str, Any]] = []
    ours = importlib.import_module("pp_piecewise_backend.backend")
    monkeypatch.setattr(ours, "backend", lambda graph, inputs, options: given.append(options))
    monkeypatch.setattr(integration, "_worker_options", {})
    if environment is not None:
        monkeypatch.setenv("PP_PIECEWISE_MODE", environment)
    integration.backend(None, [])
    integration.set_worker_options(capture="warmup")
    integration.backend(None, [])
    own = {} if environment else {"mode": "piecewise"}
    assert given == [own, {**own, "capture": "warmup"}]
