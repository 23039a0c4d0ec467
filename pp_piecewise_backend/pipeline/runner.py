"""One rank of a pipeline: receive, run the compiled stage, send, with the next receive and the last send overlapping.

Note [order of one micro-batch]
    1. take: the header has come.
    2. announce: the next stage learns what comes before the work for it begins.
    3. ``make_inputs``, of which nothing waits for proxies; then land: they are in the memory that captured pieces read.
    4. forward. After the last step that reads the proxies the landing memory is free, and the next receive is posted
       (``landing_was_read``; of a full graph once it is launched, ``mark_landing_read``). Before the first step that
       writes results, the previous send must have left (``results_are_written``); steps before it overlap with it.
    5. send the results from where the last pieces wrote them; what else of them is kept gets memory of its own.
The module is compiled with ``static_outputs``, unless its graph breaks, and inside a wrapper that clones each proxy in
the graph, so that landing memory is only read, by the first step as a rule, and no result lies in it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .. import errors
from ..backend import graph_input_sources, release_stage, warmed_up_tokens, warmup
from ..config import Config
from ..runtime.cudagraphs.ladder import Ladder
from ..runtime.ownership import own_what_is_kept
from ..runtime.stage import Stage
from ..runtime.tracing import Timeline, profiler_is_running, wrap, write_trace
from ..runtime.warmup import BucketTime, time_buckets
from ..utils import torch_compat
from ..utils.counters import TOTALS, Amounts, Snapshot, Stats
from ..utils.dynamo_entrance import Entrance, cloning
from ..utils.versions import versions
from . import checks
from .checks import MakeInputs, Proxies
from .connect import make_links, pick_transport
from .header import Answer, Header, MicroBatch
from .inbox import Inbox, Views
from .plan import Schema, StagePlan
from .positions import Step
from .report import PipelineReport, StepClock, WaitKind
from .results import WAITED_SECONDS, Answers, Finish, Sent, chosen, lies_in
from .transports.base import Patience, Transport
from .watchdog import Watchdog

_LOG = logging.getLogger(__name__)

_ONE_MICRO_BATCH = Amounts({"microbatches": 1})
_NOT_NOTED = contextlib.nullcontext()


class StageRunner:
    """Drives one stage of a pipeline; every rank makes one, with the same plan.

    Args:
        module: takes what ``make_inputs`` gives and the proxies, all by name, and returns a dict with the names in
            ``outputs``, each contiguous ``[num_tokens, *shape]``; on the last stage anything, with the names in
            ``feedback`` among it if there is feedback and no ``finish``.
        make_inputs: ``(num_tokens, tag)`` -> this stage's own keyword arguments; also asked at warm-up, with tag b"".
        max_tokens: rows of the landing memory, and the largest micro-batch.
        inputs: the proxies that the previous stage sends; None on the first stage.
        outputs: those that go to the next one; None on the last stage.
        feedback: tensors that the last stage sends to the first; given on these two only. Each is ``[rows, *shape]``
            with 1 to ``max_tokens`` rows, which may be fewer than those of the micro-batch.
        feedback_rows: "tokens": all feedback has as many rows as its micro-batch. It is announced before the forward
            then, so that with ``feedback(confirmed=False)`` the hosts of the first and last stage work at once.
        finish: on the last stage only: ``(output of the module, tag)`` -> the feedback, such as sampled tokens, with
            exactly the names in ``feedback``. It runs eagerly after the module, without gradients, on the thread and
            stream of ``run``, for each micro-batch that has feedback; not at warm-up. ``run`` gives the module's
            output all the same.
        group: process group of the pipeline's ranks in stage order, which alone take part; all ranks by default. Where
            several hold one stage together (tensor parallel), a pair: that group, and that of the ranks of this stage.
        mesh: ``DeviceMesh`` instead of ``group``, with a dimension "pp" and, for tensor parallel stages, one "tp".
        transport: "p2p" (``torch.distributed``: gloo for tensors on the CPU, NCCL on GPUs); "shared_memory" for ranks
            of one Linux machine whose tensors lie on the CPU, "cuda_ipc" for those whose tensors lie on one GPU or on
            peers: each writes into the landing memory of the next one itself; "auto": link by link what works, and the
            faster of two; or a transport of ``pipeline.transports``.
        receive: "early" posts the next receive as soon as the landing memory is free, "step" in its step, after the
            forward before; "auto": "step" over NCCL, whose kernels compute while they wait, and "early" elsewhere.
        max_in_flight: micro-batches that the first stage starts before the last one has ended the oldest; as many as
            the stages hold by default. Give it on all ranks alike.
        timeout_s: seconds without a sign of life after which a neighbour is lost. Idle ranks give signs of life.
        step_timeout_s: seconds that one step of this rank may take in its own code: ``make_inputs``, the forward,
            also on the device, ``finish``, but no waits for other ranks. A longer one raises `PeerLost` on all others,
            which names this rank and the micro-batch, and its Python stack goes to its log. None: as long as it takes.
        setup_timeout_s: seconds that ranks wait for one another at set-up, and for data of a rank that lives.
        options: of the backend, but for ``stage``, ``static_outputs`` and ``max_tokens``.

    Raises:
        ConfigError: an argument that cannot be used.
        PlanMismatch: on every rank, when the ranks were set up differently.
        PeerLost: a rank did not come within ``setup_timeout_s``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        make_inputs: MakeInputs,
        max_tokens: int,
        inputs: Proxies | None = None,
        outputs: Proxies | None = None,
        feedback: Proxies | None = None,
        feedback_rows: Literal["any", "tokens"] = "any",
        finish: Finish | None = None,
        group: Any = None,
        mesh: Any = None,
        transport: Transport | Literal["auto", "p2p", "shared_memory", "cuda_ipc"] = "auto",
        receive: Literal["auto", "early", "step"] = "auto",
        max_in_flight: int | None = None,
        timeout_s: float = 60,
        step_timeout_s: float | None = None,
        setup_timeout_s: float = 1800,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        ends = {"inputs": inputs, "outputs": outputs, "feedback": feedback}
        checks.arguments(module, make_inputs, max_tokens, ends, feedback_rows, receive, max_in_flight, options)
        patience = Patience(timeout_s, setup_timeout_s, step_timeout_s)
        device = next((tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())), None)
        self._stage = Stage(inputs or {}, max_tokens, device)
        self._stage.listener = self
        config = Config.resolve(options)
        self._is_enabled = config.enabled
        way, siblings = pick_transport(transport, group, mesh, self._stage, setup_timeout_s)
        self.stage, self.stage_count, self._exchange = way.stage, way.stage_count, way.exchange
        self.is_first, self.is_last = self.stage == 0, self.stage == self.stage_count - 1
        checks.ends(self.stage, self.stage_count, inputs, outputs, feedback, finish)
        if feedback is None and max_in_flight is not None and self.stage_count > 1 and (self.is_first or self.is_last):
            feedback = {}  # carries no tensors: only the notice that a micro-batch has ended
        plan = StagePlan(
            package_version=versions().get("pp_piecewise_backend", "not installed"),
            stage_count=self.stage_count,
            ladder=Ladder.from_ranges(config.capture_sizes, max_tokens),
            inputs=None if self.is_first else Schema(self._stage.inputs),
            outputs=None if self.is_last else Schema(dict(outputs or {})),
            feedback=None if feedback is None else Schema(dict(feedback)),
        )
        self._stats = self._stage.stats = Stats(parent=TOTALS)
        self._clock = StepClock(self._stage.device, watches_device=step_timeout_s is not None)
        self._patience = patience
        self.timeline: Timeline | None = None
        self._links = make_links(way, plan, patience, self._stats, siblings, self._clock.place)
        with self._links.closed_on_error():
            self._stage.links = [str(link) for link in self._links.choices if link.times_us or link.failed]
            self._inbox: Inbox | None = None
            self._feedback: Inbox | None = None
            if self._links.incoming is not None:
                self._inbox = Inbox(
                    self._links.incoming,
                    self._stage,
                    self._stats,
                    hands_out=self.is_last,
                    early=receive == "early" or (receive == "auto" and not self._links.incoming.takes_the_device),
                    timeline=lambda: self.timeline,
                    on_header=self._clock.header_came,
                )
            if self._links.feedback_in is not None:
                spares = max_in_flight or 2 * self.stage_count  # besides what is lent to the caller of ``feedback``
                slot = Stage(feedback or {}, max_tokens, self._stage.device)
                self._feedback = Inbox(self._links.feedback_in, slot, self._stats, spare_count=spares, hands_out=True)
                self._feedback.release()  # nobody reads yet
            self._answers: Answers | None = None
            if (link := self._links.feedback_out) is not None:
                as_tokens = feedback_rows == "tokens"
                self._answers = Answers(link, feedback or {}, self._stage, self.stage, finish, as_tokens, self._stats)
            self._watchdog = Watchdog(self._clock, self._links, patience.step_seconds)
        self._make_inputs = make_inputs
        self._max_in_flight = max_in_flight
        self._asked_feedback = self._read_feedback = 0
        """Micro-batches with feedback that were taken up, and those of which the caller of ``feedback`` got it."""
        self._output_names, self._feedback_names = tuple(outputs or ()), tuple(feedback or ())
        self._options = {**(options or {}), "stage": self._stage}
        self._module = cloning(module, tuple(inputs or ()))
        self._compiled: Any = None
        self._entrance: Entrance | None = None
        self._bucket_times: tuple[BucketTime, ...] = ()
        self._trace_path: Path | None = None
        self._sent: Sent | None = None
        self._is_whole_graph = True
        self._turn = checks.Turn()
        self._in_forward = self._has_run = self._is_closed = False
        self._confirms_outputs = True
        self._has_failed = False
        """Whether this rank has raised, so that ``close`` has nothing more to say."""

    # ------------------------------------------------------------------------------ warm-up

    def warmup(self, progress: bool | None = None) -> None:
        """Compile the stage and capture its graphs for every bucket; later micro-batches compile nothing.

        State that graphs write, proxies and random generators are then as before. ``make_inputs`` must give inputs of
        the kinds of serving. Ranks warm up independently; the first micro-batch waits for the slowest. It may be called
        again between two micro-batches, such as after weights were replaced: what the previous stage has announced by
        then lands before, and what it sends meanwhile lands after.

        Args:
            progress: whether to show a bar; by default on a terminal only.

        Raises:
            PPPiecewiseError: called while a micro-batch is under way, or from within a warm-up.
        """
        with self._turn, self._failing(), self._links.busy(), self._memory_at_rest(), torch_compat.serving():
            self._clock.begins(Step.WARMING_UP)
            self._compile(whole=self._is_enabled)
            if self._is_enabled:  # what plain Inductor runs writes state that nobody could restore
                try:
                    warmup(self._compiled, self._warmup_inputs, progress=progress)
                except torch_compat.GRAPH_BREAK_ERRORS as error:
                    first_line = str(error).strip().partition("\n")[0]
                    _LOG.warning("%s", errors.graph_breaks_in_stage(self.stage, first_line))
                    self._compile(whole=False)
                    warmup(self._compiled, self._warmup_inputs, progress=progress)
                buckets = warmed_up_tokens(self._stage)
                self._bucket_times = time_buckets(self._compiled, self._warmup_inputs, buckets)
                self._learn_entrance({1, 2, self._stage.max_tokens, *buckets})
            self._clock.begins(Step.CALLER)

    @contextlib.contextmanager
    def _memory_at_rest(self) -> Iterator[None]:
        """While the body runs, nothing is sent from where results lie, and nothing lands."""
        self._enqueue_sends()
        self._wait_for_send(in_step=False)
        with contextlib.nullcontext() if self._inbox is None else self._inbox.held():
            yield
        own_what_is_kept(self._stage.memory.lent)

    def _learn_entrance(self, sizes: Iterable[int]) -> None:
        """Let micro-batches of these and other sizes enter without Dynamo, see Note [no second entrance]."""
        if not self._is_whole_graph:
            return
        self._entrance = Entrance(self._module, self._compiled, graph_input_sources, self._stats)
        self._stage.entrance = self._entrance.summary
        for num_tokens in sorted(sizes):
            if num_tokens <= self._stage.max_tokens:
                _, arguments = self._warmup_inputs(num_tokens)
                if not self._entrance.knows(arguments):
                    self._entrance.learn(arguments)
                if self._entrance.why_not:
                    _LOG.info("%s", errors.entered_through_dynamo(self.stage, num_tokens, self._entrance.why_not))

    def bucket_times(self) -> tuple[BucketTime, ...]:
        """How long this stage's forward takes per bucket, ``(tokens, forward_us)``, the smallest bucket first.

        The warm-up measures it on its inputs, with the bucket's graphs or, where it was dropped, without. Empty before
        it, and where there are no graphs.
        """
        return self._bucket_times

    def _warmup_inputs(self, num_tokens: int) -> tuple[tuple[()], dict[str, Any]]:
        own_what_is_kept(self._stage.memory.lent)  # of the call before
        proxies = self._stage.views(num_tokens) if self._stage.inputs else {}
        return (), self._arguments(num_tokens, b"", None, proxies)

    def _arguments(
        self, num_tokens: int, tag: bytes, given: Mapping[str, Any] | None, proxies: Views
    ) -> dict[str, Any]:
        own = self._make_inputs(num_tokens, tag) if given is None else given
        return {**checks.own_arguments("make_inputs", own, proxies.keys()), **proxies}

    def _compile(self, whole: bool) -> None:
        self._is_whole_graph, self._entrance = whole, None
        # Results of a last stage are the caller's; those of the others are sent from where pieces write them.
        self._options["static_outputs"] = whole and not self.is_last
        self._stage.entrance = str if whole else lambda: "through Dynamo, since the graph breaks"
        self._compiled = torch.compile(self._module, backend="pp_piecewise", options=self._options, fullgraph=whole)

    # --------------------------------------------------------------------------------- run

    def run(self, microbatches: Iterable[MicroBatch] | None = None, *, confirmed: bool = True) -> Iterator[Any]:
        """Run micro-batches: those given on the first stage, on the others what the stage before announces.

        One item comes for each micro-batch: the module's output on the last stage, None elsewhere. The output belongs
        to the caller. Leaving the iterator early stops all ranks in order, as its end does; where several ranks hold
        one stage together, only the first stage can do so, and another one that leaves early breaks the pipeline.

        Args:
            microbatches: on the first stage only.
            confirmed: whether the last stage waits, on the host, until what its output is made of has landed. Without,
                it can enqueue the next micro-batch while the stages before still compute this one. But the output
                holds anything when the pipeline breaks meanwhile: call ``confirm_output`` before it is read on the
                host. When the iterator ends, all is there.

        Raises:
            PeerLost: a rank died, stopped, failed or does not keep to the plan.
            PPPiecewiseError: called twice, or with micro-batches on a stage that takes none.
            Whatever the module or ``make_inputs`` raises; the other ranks then raise `PeerLost`.
        """
        self._turn.check_open()
        if (microbatches is not None) != self.is_first:
            sentence = errors.NO_MICRO_BATCHES if self.is_first else errors.micro_batches_on_later_stage(self.stage)
            raise errors.PPPiecewiseError(sentence)
        given = None if microbatches is None else checks.micro_batches(microbatches)
        if self._has_run:
            raise errors.PPPiecewiseError(errors.RAN_ALREADY)
        self._has_run, self._confirms_outputs = True, confirmed
        if self._compiled is None:
            self.warmup()
        self._watchdog.start()
        return self._run(given)

    def _run(self, microbatches: Iterable[MicroBatch] | None) -> Iterator[Any]:
        with self._failing():
            steps = self._own_steps(microbatches) if microbatches is not None else self._following_steps()
            try:
                yield from steps
            except GeneratorExit as left:
                if self._links.siblings and not self.is_first:
                    # The ranks of the first stage would hear of it at different micro-batches, and hang apart.
                    self._fail(left)
                    raise
                self._finish()
                raise
            self._confirm()
            self._finish()

    def _own_steps(self, microbatches: Iterable[MicroBatch]) -> Iterator[Any]:
        for sequence, microbatch in enumerate(microbatches):
            if self._is_closed or (self._links.outgoing is not None and self._links.outgoing.stop_requested):
                return
            if self._max_in_flight is not None and self._feedback is not None:
                ended = sequence + 1 - self._max_in_flight
                if not self._feedback.has_heard(ended):
                    self._waiting("feedback", "wait for room", self._feedback.wait_for, ended)
            answer = self._answer_to(microbatch)
            self._asked_feedback += answer is Answer.FEEDBACK
            with self._turn:
                output = self._step(sequence, microbatch.num_tokens, microbatch.tag, answer, microbatch.inputs, {})
            yield output

    def _answer_to(self, microbatch: MicroBatch) -> Answer:
        if self._feedback_names and microbatch.feedback:
            return Answer.FEEDBACK
        return Answer.NOTHING if self._max_in_flight is None else Answer.NOTICE

    def _following_steps(self) -> Iterator[Any]:
        assert self._inbox is not None
        self._release()  # warm-up has used the memory until now
        while not self._is_closed:
            with self._turn:
                taken = self._take()
                if taken is None:
                    return
                header, proxies = taken
                output = self._step(header.sequence, header.num_tokens, header.tag, header.answer, None, proxies)
            yield output
            outgoing = self._links.outgoing
            if outgoing is not None and outgoing.stop_requested and self._links.incoming is not None:
                self._links.incoming.say_stop()

    def _take(self) -> tuple[Header, Views] | None:
        assert self._inbox is not None
        self._enqueue_sends()
        begin_ns = self._clock.wait_begins("receive")
        taken = self._inbox.take(lands=False)
        self._clock.waited("receive", begin_ns)
        return taken

    def _land(self) -> None:
        """The proxies of the micro-batch that was taken are there."""
        if self._inbox is not None:
            land = wrap(self._inbox.land, "ppb.handoff.recv") if profiler_is_running() else self._inbox.land
            begin_ns = self._clock.wait_begins("receive")
            land(self._confirms_outputs or (self._answers is not None and self._answers.are_finished_here))
            self._clock.waited("receive", begin_ns)

    def _step(
        self,
        sequence: int,
        num_tokens: int,
        tag: bytes,
        answer: Answer,
        given: Mapping[str, Any] | None,
        proxies: Views,
    ) -> Any:
        """One micro-batch, whose header has come; see Note [order of one micro-batch]."""
        outgoing = self._links.outgoing
        self._clock.step_begins(sequence)
        if self.timeline is not None:
            self.timeline.micro_batch = sequence
        header = None if outgoing is None else outgoing.announce(num_tokens, tag, answer)
        if self._answers is not None and answer is Answer.FEEDBACK:
            self._answers.announce(num_tokens, tag)
        with torch_compat.serving():
            output = self._forward(num_tokens, tag, given, proxies)
            if outgoing is not None and header is not None:
                self._send(header, output)
                output = None
                own_what_is_kept(self._stage.memory.lent)
            elif self._answers is not None and answer is not Answer.NOTHING:
                if self._answers.are_finished_here:
                    self._confirm()
                    self._clock.begins(Step.FINISH)
                with self._spanning("steps", "answer"):
                    self._answers.send(answer, tag, output)
        _ONE_MICRO_BATCH.add_to(self._stats)
        if self._confirms_outputs:
            self._confirm()
        self._clock.step_ends()
        return output

    def _confirm(self) -> None:
        """On the last stage: what is computed of proxies up to those of this step may be read on the host."""
        if self._inbox is not None and self._inbox.is_unconfirmed:
            self._waiting("receive", "confirm", self._inbox.confirm)

    def _forward(self, num_tokens: int, tag: bytes, given: Mapping[str, Any] | None, proxies: Views) -> Any:
        arguments = self._arguments(num_tokens, tag, given, proxies)
        self._land()
        if not self._is_whole_graph:
            self._wait_for_send()
        self._in_forward = self._is_whole_graph
        self._clock.forward_begins()
        try:
            with contextlib.nullcontext() if self._is_enabled else self._links.busy():  # it compiles when it likes
                output = self._compiled(**arguments) if self._entrance is None else self._entrance(arguments)
        finally:
            self._in_forward = False
        self._clock.forward_ends()
        if self._uses_landing_memory and not lies_in(self._stage.landing_spans, output):
            self._release()
        return output

    def landing_was_read(self) -> None:
        """For programs, see ``StageListener``: nothing reads landing memory any more in the call under way."""
        self.mark_landing_read()
        if self._in_forward:
            self._release()

    def mark_landing_read(self) -> None:
        """For programs: the same, amid launches of a device, which the host shall not hold up."""
        if self._in_forward and self._inbox is not None and self._inbox.mark_read():
            self._stats.add("early_releases")
            if self._stage.device.type == "cpu":
                self._release()

    def results_are_written(self) -> None:
        """For programs: the next step of the call under way overwrites the results of the last one."""
        if self._in_forward:
            self._wait_for_send()

    @property
    def _uses_landing_memory(self) -> bool:
        return self._inbox is not None and self._inbox.is_lent

    def _release(self) -> None:
        """Let the next proxies land."""
        if self._inbox is not None and self._inbox.is_lent:
            with self._spanning("steps", "release"):
                self._inbox.release()

    # --------------------------------------------------------------------------------- send

    def _send(self, header: Header, output: Any) -> None:
        assert self._links.outgoing is not None
        tensors = chosen(output, self._output_names, f"the module of stage {self.stage}", self._stats)
        self._wait_for_send()
        transfer = self._links.outgoing.send(header, tensors)
        self._sent = Sent(transfer, header.sequence, time.time_ns())
        if self._uses_landing_memory:  # what is sent lies in landing memory
            self._wait_for_send()
            self._release()

    def _wait_for_send(self, in_step: bool = True) -> None:
        """Return when the last results have left, so that their memory may be written."""
        sent, self._sent = self._sent, None
        if sent is None:
            return
        begin, begin_ns = self._clock.wait_begins("send"), time.time_ns()
        sent.transfer.wait()
        self._clock.waited("send", begin)
        if in_step and time.perf_counter_ns() - begin > 1e9 * WAITED_SECONDS:
            self._stats.add("send_waits")
            if self.timeline is not None:
                self.timeline.add("steps", "wait for send", begin_ns)
        if self.timeline is not None:
            self.timeline.add("send", "send", sent.begin_ns, micro_batch=sent.sequence)

    def _enqueue_sends(self) -> None:
        """Before a stream waits for another rank, see Note [no wait but for what was enqueued]."""
        results, feedback = self._sent, self._answers
        for sent in (results and results.transfer, None if feedback is None else feedback.sent):
            if sent is not None and sent.enqueued is not None:
                begin_ns = self._clock.wait_begins("send")
                sent.enqueued()
                self._clock.waited("send", begin_ns)

    def feedback(self, *, confirmed: bool = True) -> tuple[bytes, Mapping[str, torch.Tensor]]:
        """On the first stage: the oldest unread ``(tag, {name: [rows, *shape]})`` from the last stage, once it came.

        The tensors are the runner's, and valid until the next ``feedback``. There is none of micro-batches with
        ``feedback=False``.

        Args:
            confirmed: whether to wait, on the host, until they are there. Without, what uses them on the device can be
                enqueued while the last stage still computes them. But they hold anything when the pipeline breaks
                meanwhile: call ``confirm_feedback`` before they are read on the host.

        Raises:
            PeerLost: the pipeline broke.
            PPPiecewiseError: none can come here, or none yet: that of all micro-batches taken so far was read.
        """
        self._turn.check_open()
        if self._feedback is None or not self._feedback_names:
            raise errors.PPPiecewiseError(errors.no_feedback_here(self.stage))
        if self._read_feedback == self._asked_feedback:
            raise errors.PPPiecewiseError(errors.NO_FEEDBACK_OUTSTANDING)
        self._feedback.release()
        self._enqueue_sends()
        take = partial(self._feedback.take, confirms=confirmed)
        taken = self._waiting("feedback", "wait for feedback", take)
        if confirmed and taken is not None:
            self.confirm_feedback()
        if taken is None:
            raise errors.PPPiecewiseError(errors.NO_MORE_FEEDBACK)
        self._read_feedback += 1
        return taken[0].tag, taken[1]

    def confirm_feedback(self) -> None:
        """Return once what ``feedback(confirmed=False)`` returned last is there.

        Raises:
            PeerLost: the pipeline broke, and it is worthless.
        """
        self._turn.check_open()
        if self._feedback is not None and self._feedback.is_unconfirmed:
            self._waiting("feedback", "confirm feedback", self._feedback.confirm)

    def confirm_output(self) -> None:
        """Return once what all outputs of ``run(confirmed=False)`` are made of, up to the last one, has landed.

        Raises:
            PeerLost: the pipeline broke, and the last outputs are worthless.
        """
        self._turn.check_open()
        self._confirm()

    # --------------------------------------------------------------------------------- end

    @property
    def stats(self) -> Snapshot:
        """What this runner counted: see the counters in docs/pipeline.md."""
        return self._stats.snapshot()

    def report(self) -> PipelineReport:
        """Where the time of each rank went, and which is the slowest; its text has a table and the verdict.

        While ``run`` goes on, of this rank alone. After it, of all: they tell one another when their runs end, for
        which this waits no longer than ``timeout_s``; ``missing`` names ranks that were lost or are late.
        """
        own = self._clock.times(self._links.rank)
        seconds, links = self._patience.silence_seconds, self._links
        return links.times.report(own, seconds, lambda: self._is_closed or links.is_broken, links.choices)

    def trace(self, path: str) -> None:
        """Note what happens when; ``close`` on all ranks writes one Chrome trace of all of them, from the first rank.

        Call it on every rank, before ``run``. Times are those of the hosts: on a GPU, a replay is its launch.
        """
        self._turn.check_open()
        if self._has_run:
            raise errors.PPPiecewiseError(errors.TRACE_AFTER_RUN)
        if not isinstance(path, str | Path):
            raise errors.ConfigError(errors.runner_argument("path", path, "a file to trace into"))
        self._trace_path = Path(path)
        self.timeline = Timeline()

    def _write_trace(self) -> None:
        if self.timeline is not None and self._trace_path is not None:
            exchange = None if self._links.is_broken else self._exchange
            try:
                write_trace(self._trace_path, self.timeline, self.stage, exchange)
            except errors.PeerLost:
                self._links.check()  # says who was lost
                raise

    def _spanning(self, lane: str, name: str) -> contextlib.AbstractContextManager[None]:
        return _NOT_NOTED if self.timeline is None else self.timeline.span(lane, name)

    def _waiting(self, kind: WaitKind, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """What ``call`` returns, which waits for another rank."""
        begin_ns = self._clock.wait_begins(kind)
        with self._spanning("steps", name):
            result = call(*arguments)
        self._clock.waited(kind, begin_ns)
        return result

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """The other ranks are notified of an exception inside."""
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        self._has_failed = True
        self._links.fail(type(error).__name__, self._clock.micro_batch)

    def _finish(self) -> None:
        """Stop in order: nothing more is sent, and what was announced to this stage is received and dropped."""
        if self._links.is_broken or self._turn.is_over:
            return
        self._clock.begins(Step.CLOSING)
        self._wait_for_send()
        if self._answers is not None:
            self._answers.wait()
        self._links.times.publish(self._clock.times(self._links.rank))
        for sender in (self._links.outgoing, self._links.feedback_out):
            if sender is not None:
                sender.say_stop()
        if self._inbox is not None and self._links.incoming is not None:
            self._links.incoming.say_stop()
            self._release()
            while self._inbox.take() is not None:
                self._inbox.release()

    def close(self) -> None:
        """Stop all ranks in order, if ``run`` has not, and release everything; a second call does nothing.

        It returns once all ranks close, so that no rank reports success when another one failed at the very end; it
        waits no longer than ``timeout_s`` for a rank that has stopped and does not close.

        Of this runner's calls, ``close``, ``stats``, ``report`` and ``bucket_times`` work after it.

        Raises:
            PeerLost: the pipeline broke before all had stopped.
            PPPiecewiseError: called while a micro-batch is under way in this thread, as from ``make_inputs``.
        """
        if self._is_closed:
            return
        self._turn.check_free()
        self._is_closed = True
        self._watchdog.close()
        with contextlib.ExitStack() as stack:
            stack.callback(self._let_go)
            stack.callback(self._links.close)
            stack.callback(self._write_trace)
            with self._failing():
                self._finish()
        if not self._has_failed:
            self._links.check()

    def _let_go(self) -> None:
        """Whoever keeps a closed runner, as tracebacks do, keeps no weights, memory or descriptors with it."""
        if not self._turn.end(self._patience.silence_seconds):
            return  # a thread still hangs in a step
        for inbox in (self._inbox, self._feedback):
            if inbox is not None:
                inbox.close()
        release_stage(self._stage)
        self._options.clear()  # Dynamo keeps each backend that it was given, with its options
        if self._entrance is not None:
            self._entrance.forget()
        for name in ("_inbox", "_feedback", "_answers", "_sent", "_entrance"):
            setattr(self, name, None)
        del self._stage, self._module, self._compiled, self._make_inputs, self._exchange

    def __enter__(self) -> StageRunner:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._fail(error)
        try:
            self.close()
        except errors.PeerLost:
            if error is None:
                raise
