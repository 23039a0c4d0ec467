"""The ways of running a pipeline that `gpu_pipeline.py` compares, behind one interface.

The first rank starts micro-batches and asks for the chosen tokens of the oldest one; the others follow.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import slot_attention
import torch
import torch.distributed as dist
from decoder import MODELS, PROXIES, DecoderStage
from pickled_messages import PickledMessages
from slot_attention import MAX_SEQUENCES
from step_schedule import Call, Schedule, usual_kind
from torch import Tensor

import pp_piecewise_backend as ppb


class Skipped(Exception):
    """This method cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What all methods of one rank share."""

    rank: int
    """Of its pipeline: the number of the stage."""
    count: int
    lane: int
    """Which of the ranks that hold the stage together; each has a pipeline with those of its number."""
    lanes: int
    mesh: Any
    """Of all ranks, by "pp" and "tp"; None without lanes."""
    device: torch.device
    data_backend: str
    """Of the groups over which engine-style tensors go: "nccl", or "gloo", through the host."""
    model: str
    stage: DecoderStage
    schedule: Schedule
    tokens: Sequence[int]
    compiler: str

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.count - 1

    def rank_of(self, stage: int) -> int:
        """Among all, of the rank in this pipeline that has the stage."""
        return stage * self.lanes + self.lane

    def fill(self, call: Call) -> Tensor:
        """The positions of the call, whose other numbers are where attention reads them from now on."""
        return self.stage.step.fill(self.schedule.batch(call))


class Method(Protocol):
    def begin(self, tokens: int) -> None:
        """Calls of this many tokens follow; nothing is in flight."""

    def start(self, call: Call, ids: Tensor) -> None:
        """On the first rank: run the micro-batch and hand it on."""

    def finish(self) -> Tensor:
        """On the first rank: the tokens that the oldest micro-batch chose, valid until asked again."""

    def follow(self) -> None:
        """On the other ranks: one micro-batch."""

    def counters(self) -> dict[str, float]:
        """What was counted up to now."""

    def waited_us(self) -> float | None:
        """How long the host has waited for other ranks up to now, if that is known."""

    def close(self) -> None: ...


# ------------------------------------------------------------------------------------ engine style


class Wires:
    """Where tensors of engine-style methods travel: a group of its own for each hop and direction."""

    def __init__(self, setting: Setting) -> None:
        self.messages = PickledMessages(
            setting.rank, setting.count, object_count=1, lane=setting.lane, lane_count=setting.lanes
        )
        self._setting = setting
        self._through_host = setting.data_backend == "gloo"
        hops = [(source, source + 1) for source in range(setting.count - 1)] + [(setting.count - 1, 0)]
        self._groups = {}
        for source, target in hops:
            for lane in range(setting.lanes):
                pair = sorted((source * setting.lanes + lane, target * setting.lanes + lane))
                group = dist.new_group(pair, backend=setting.data_backend)
                if lane == setting.lane:
                    self._groups[source, target] = group

    def send(self, tensors: Sequence[Tensor], target: int) -> list[tuple[Any, Tensor]]:
        group = self._groups[self._setting.rank, target]
        sent = []
        for tensor in tensors:
            sent_from = tensor.cpu() if self._through_host else tensor
            sent.append((dist.isend(sent_from, self._setting.rank_of(target), group=group), sent_from))
        return sent

    def receive(self, shapes: Sequence[tuple[torch.dtype, tuple[int, ...]]], source: int) -> Callable[[], list[Tensor]]:
        """Fresh tensors, once they are asked for."""
        group = self._groups[source, self._setting.rank]
        device = torch.device("cpu") if self._through_host else self._setting.device
        tensors = [torch.empty(shape, dtype=dtype, device=device) for dtype, shape in shapes]
        works = [dist.irecv(tensor, self._setting.rank_of(source), group=group) for tensor in tensors]

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return [tensor.to(self._setting.device, non_blocking=True) for tensor in tensors]

        return wait


class EngineStyle:
    """Pickled metadata, fresh tensors, NCCL; a rank waits for its last sends before it runs again."""

    def __init__(self, setting: Setting, wires: Wires, function: Callable[..., dict[str, Tensor]]) -> None:
        self._setting, self._wires, self._function = setting, wires, function
        self._sent: list[tuple[Any, Tensor]] = []
        self._coming: deque[Callable[[], list[Tensor]]] = deque()
        hidden, dtype = setting.stage.hidden, setting.stage.dtype
        with torch.inference_mode():
            for tokens in setting.tokens:
                for _ in range(3):  # compiles, warms up, records
                    positions = setting.fill(Call(tokens, usual_kind(tokens), 0, 0))
                    if setting.is_first:
                        given = {"input_ids": torch.zeros(tokens, dtype=torch.int64, device=setting.device)}
                    else:
                        given = {
                            name: torch.randn(tokens, hidden, dtype=dtype, device=setting.device) for name in PROXIES
                        }
                    self._function(positions, **given)

    def begin(self, tokens: int) -> None:
        pass

    def start(self, call: Call, ids: Tensor) -> None:
        self._run(call, {"input_ids": ids})
        self._coming.append(self._wires.receive([(torch.int64, (call.tokens,))], self._setting.count - 1))

    def finish(self) -> Tensor:
        (tokens,) = self._coming.popleft()()
        return tokens

    def follow(self) -> None:
        tokens, tag, metadata = self._wires.messages.hear()
        received = self._wires.receive(list(metadata.values()), self._setting.rank - 1)()
        self._run(Call.from_tag(tokens, tag), dict(zip(metadata, received, strict=True)))

    @torch.inference_mode()
    def _run(self, call: Call, given: dict[str, Tensor]) -> None:
        positions = self._setting.fill(call)
        for work, _ in self._sent:
            work.wait()
        results = self._function(positions, **given)
        if self._setting.is_last:
            self._sent = self._wires.send([results["tokens"]], 0)
        else:
            self._wires.messages.tell(call.tokens, call.to_tag(), results)
            self._sent = self._wires.send(list(results.values()), self._setting.rank + 1)

    def counters(self) -> dict[str, float]:
        return {}

    def waited_us(self) -> None:
        return None

    def close(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent = []


def reduce_overhead(setting: Setting) -> Callable[..., dict[str, Tensor]]:
    if setting.device.type != "cuda":
        raise Skipped("needs CUDA")
    compiled = torch.compile(setting.stage, mode="reduce-overhead", dynamic=False)

    def call(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        found: dict[str, Tensor] = compiled(*arguments, **named)
        return found

    return call


# -------------------------------------------------------------------------------------------- ours


class Ours:
    """`StageRunner`, by mode and transport; mode "auto" is left out, as by who leaves all options alone."""

    def __init__(self, setting: Setting, mode: str, transport: str) -> None:
        is_cuda = setting.device.type == "cuda"
        proxies = {name: ppb.Proxy((setting.stage.hidden,), setting.stage.dtype) for name in PROXIES}
        at_an_end = setting.is_first or setting.is_last
        self._setting = setting
        self._warm_up_calls = 0
        self._next: ppb.MicroBatch | None = None
        self.runner = ppb.StageRunner(
            setting.stage,
            make_inputs=self._make_inputs,
            max_tokens=max(setting.tokens),
            inputs=None if setting.is_first else proxies,
            outputs=None if setting.is_last else proxies,
            feedback={"tokens": ppb.Proxy((), torch.int64)} if at_an_end else None,
            feedback_rows="tokens",
            transport=transport,  # type: ignore[arg-type]
            mesh=setting.mesh,
            max_in_flight=setting.schedule.in_flight,
            options={
                **slot_attention.OPTIONS,
                **({} if mode == "auto" else {"mode": mode}),
                "graphs": "cuda" if is_cuda else "emulate",
                "compiler": setting.compiler,
                "capture_sizes": ",".join(map(str, sorted(setting.tokens))),
            },
        )
        self.runner.warmup(progress=False)
        # As with the other methods, no host waits for a device here, nor in ``finish``.
        self._steps = self.runner.run(self._micro_batches() if setting.is_first else None, confirmed=False)

    def _micro_batches(self) -> Iterator[ppb.MicroBatch]:
        while self._next is not None:
            yield self._next

    def _make_inputs(self, tokens: int, tag: bytes) -> dict[str, Tensor]:
        if tag:
            return {"positions": self._setting.fill(Call.from_tag(tokens, tag))}
        self._warm_up_calls += 1  # other lengths in each call: a full graph is compared under different ones
        kind = "jumps" if tokens <= MAX_SEQUENCES else "prompts"
        own = {"positions": self._setting.fill(Call(tokens, kind, 0, self._warm_up_calls))}
        if self._setting.is_first:
            own["input_ids"] = torch.zeros(tokens, dtype=torch.int64, device=self._setting.device)
        return own

    def begin(self, tokens: int) -> None:
        pass

    def start(self, call: Call, ids: Tensor) -> None:
        given = {"positions": self._setting.fill(call), "input_ids": ids}
        self._next = ppb.MicroBatch(call.tokens, call.to_tag(), given)
        next(self._steps)

    def finish(self) -> Tensor:
        return self.runner.feedback(confirmed=False)[1]["tokens"]

    def follow(self) -> None:
        next(self._steps)

    def counters(self) -> dict[str, float]:
        totals = ppb.stats()  # of the process, but no other method of ours runs meanwhile
        return {name: totals[name] for name in totals if isinstance(totals[name], int)}

    def waited_us(self) -> float:
        own = next(iter(self.runner.report().ranks))  # while it runs, of this rank alone
        return own.micro_batches * (own.receive_us + own.send_us + own.feedback_us)

    def close(self) -> None:
        self._next = None
        self._steps.close()  # type: ignore[attr-defined]
        self.runner.close()


# ------------------------------------------------------------------------------------ transformers


class Transformers:
    """transformers' own pipeline: one forward at a time, whose logits the last rank broadcasts to all."""

    def __init__(self, setting: Setting) -> None:
        if setting.lanes > 1:
            raise Skipped("transformers' pipeline is measured without tensor parallel")
        if setting.device.type == "cuda" and setting.data_backend != "nccl":
            raise Skipped("transformers' pipeline goes over NCCL, which takes one rank per GPU")
        try:
            import transformers
            from transformers.distributed import DistributedConfig

            distributed = DistributedConfig(pp_size=setting.count)
        except (ImportError, TypeError) as error:
            raise Skipped(f"this transformers has no DistributedConfig(pp_size=...): {error}") from None
        shape = MODELS[setting.model].shape
        own = {"attention_bias": False, "head_dim": shape.head_dim} if not shape.qkv_bias else {}
        config_class = transformers.Qwen2Config if shape.qkv_bias else transformers.LlamaConfig
        config = config_class(
            vocab_size=MODELS[setting.model].vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=max(8192, setting.schedule.slots.longest),
            tie_word_embeddings=False,
            **own,
        )
        model_class = transformers.Qwen2ForCausalLM if shape.qkv_bias else transformers.LlamaForCausalLM
        os.environ.setdefault("LOCAL_RANK", str(setting.rank))
        # What from_pretrained does, which would need a checkpoint.
        distributed, _, mesh = model_class.prepare_distribute_model(distributed)
        with torch.device("meta"):
            model = model_class(config).to(setting.stage.dtype)
        model = model_class.maybe_distribute_model(model, distributed, mesh).to_empty(device=setting.device)
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(setting.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        self._model, self._setting = model.eval(), setting
        self._cache: Any = None
        self._tokens = 0
        self._chosen = torch.zeros(0, dtype=torch.int64)

    def begin(self, tokens: int) -> None:
        """In decode, all sequences have the context already."""
        self._tokens, self._cache = tokens, None
        self._chosen = torch.zeros(tokens, dtype=torch.int64, device=self._setting.device)
        if tokens <= MAX_SEQUENCES:
            context = torch.zeros(
                tokens, self._setting.schedule.context_tokens, dtype=torch.int64, device=self._setting.device
            )
            self._cache = self._forward(context, 0).past_key_values

    def start(self, call: Call, ids: Tensor) -> None:
        self._step(call, ids)

    def finish(self) -> Tensor:
        return self._chosen

    def follow(self) -> None:
        self._step(Call(self._tokens, usual_kind(self._tokens), 0, 0), self._chosen)

    def _step(self, call: Call, ids: Tensor) -> None:
        if call.tokens > MAX_SEQUENCES:
            last = self._forward(ids[None], 0).logits[0, -1:]
            self._chosen = torch.zeros_like(ids)
            self._chosen[:1] = last.argmax(-1)
            return
        layers = getattr(self._cache, "layers", [])
        length = max((layer.get_seq_length() for layer in layers), default=0)
        self._chosen = self._forward(ids[:, None], length).logits[:, -1].argmax(-1)

    @torch.inference_mode()
    def _forward(self, ids: Tensor, start: int) -> Any:
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        return self._model(
            input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )

    def counters(self) -> dict[str, float]:
        return {}

    def waited_us(self) -> None:
        return None

    def close(self) -> None:
        self._cache = None


# ---------------------------------------------------------------------------------------------- all

TRANSPORT_NAMES = {"nccl": "p2p", "gloo": "p2p", "ipc": "cuda_ipc", "shm": "shared_memory", "auto": "auto"}


def variant_names(modes: Sequence[str], device: str, one_gpu: bool) -> list[str]:
    """All variants for these modes of ours, those that the others are compared with first."""
    transports = ("gloo", "shm") if device == "cpu" else ("ipc",) if one_gpu else ("nccl", "ipc")
    ours = [f"ours_{mode}_{transport}" for mode in modes for transport in transports]
    return ["eager", "reduce_overhead", "transformers", *ours, "ours_auto_auto"]


def make_method(name: str, setting: Setting, wires: Callable[[], Wires], known_modes: Sequence[str]) -> Method:
    """The method of this name, compiled and warm.

    Raises:
        Skipped: it cannot run here.
    """
    if name == "eager":
        return EngineStyle(setting, wires(), setting.stage)
    if name == "reduce_overhead":
        return EngineStyle(setting, wires(), reduce_overhead(setting))
    if name == "transformers":
        return Transformers(setting)
    mode, transport = name.removeprefix("ours_").rsplit("_", 1)
    if mode not in known_modes:
        raise Skipped(f"mode {mode!r} is unknown here; the package has {', '.join(known_modes)}")
    if transport == "nccl" and setting.data_backend != "nccl":
        raise Skipped("NCCL takes one rank per GPU")
    return Ours(setting, mode, TRANSPORT_NAMES[transport])


def most_in_flight(name: str) -> int | None:
    """How many micro-batches a method can have in flight, if that is limited."""
    return 1 if name == "transformers" else None
