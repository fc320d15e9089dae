"""Steps that are recorded once an arm and then replayed: one launch instead of thousands by the host.

A CUDA graph is the work of a step with every address in it. So what a step reads has to lie where it lay when it was
recorded (a batch is copied there), and the learning rate has to be a tensor. A recorded step runs nothing; the first
steps of an arm run as they are, so that kernels are compiled and the optimiser has its state by then.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from optima_core.errors import OptimaError
from optima_core.objective import Gates, LossVector
from optima_core.step import Batch, Part, Step, Weigh

WARM_UP = 3
"""Steps of an arm before it is recorded."""

Work = Callable[[], LossVector]


class Recorder(Protocol):
    """What steps are recorded with."""

    def warm(self, work: Work) -> LossVector:
        """Runs the work, as it will be recorded."""

    def record(self, work: Work) -> tuple[Callable[[], None], LossVector]:
        """Records the work without running it: what runs it, and where its losses will lie."""


class CudaRecorder:
    """CUDA graphs that share their memory, since they are replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Work) -> LossVector:
        """On the stream of the recording, whose libraries take their workspaces then."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            found = work()
        current.wait_stream(self.stream)
        return found

    def record(self, work: Work) -> tuple[Callable[[], None], LossVector]:
        """See `Recorder`. Other threads, such as a loader's, may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            found = work()
        return graph.replay, found


class _Recording(NamedTuple):
    """signature: of the batches. inputs: the tensors to copy a step's batches to."""

    signature: "_Signature"
    inputs: list[Tensor]
    replay: Callable[[], None]
    losses: LossVector


class _Signature(NamedTuple):
    """What batches must have in common to be read by one recording. leaves: of tensors, shape, strides and dtype."""

    structure: Any
    leaves: tuple[Any, ...]


class ReplayedStep(Generic[Batch]):
    """A step that is recorded for each set of modules.

    Args:
        step: What to record. Its models must do what shapes alone decide; batches must be structures (tuples, lists,
            dicts) of tensors on its device, of the same shapes in every step. Batches that are not are learnt from
            without a recording, and a warning says so.
        recorder: `CudaRecorder`; another one in tests.
    """

    def __init__(self, step: Step[Batch], recorder: Recorder) -> None:
        self.step = step
        self.recorder = recorder
        self._rate = torch.zeros((), device=step.device)
        self._warned = False
        self.forget()

    def forget(self) -> None:
        """To be called when the optimiser's state has been replaced: the recordings are of what was there before."""
        self._recordings: dict[tuple[str, ...], _Recording] = {}
        self._warmed: Counter[tuple[str, ...]] = Counter()

    def run(self, batches: Iterable[Batch], gates: Gates) -> LossVector:
        """`Step.run`, for modules that the host knows to be distilled."""
        self._rate.fill_(self.step.schedule.get_last_lr()[0])
        found = self._learn(list(islice(batches, self.step.config.accumulate)), gates)
        self.step.advance()
        return found

    def run_apart(self, batches: Iterable[Batch], gates: Gates, parts: Sequence[Part], weigh: Weigh) -> LossVector:
        """`Step.run_apart`, which is launched and never recorded."""
        self._rate.fill_(self.step.schedule.get_last_lr()[0])
        with self._rate_on_device():
            found = self.step.learn_apart(batches, gates, parts, weigh)
        self.step.advance()
        return found

    def _learn(self, batches: Sequence[Batch], gates: Gates) -> LossVector:
        modules = tuple(gates)
        signature, tensors = self._look_at(batches)
        if signature is None:
            return self._unrecorded(batches, gates)
        if modules not in self._recordings:
            if self._warmed[modules] < WARM_UP:
                self._warmed[modules] += 1
                return self.recorder.warm(lambda: self._unrecorded(batches, gates))
            self._recordings[modules] = self._record(signature, batches, gates)
        recording = self._recordings[modules]
        if recording.signature != signature:
            self._warn("batches differ in shape")
            return self._unrecorded(batches, gates)
        for place, given in zip(recording.inputs, tensors, strict=True):
            place.copy_(given)
        recording.replay()
        return LossVector(recording.losses.terms, recording.losses.values.clone())

    def _unrecorded(self, batches: Iterable[Batch], gates: Gates) -> LossVector:
        with self._rate_on_device():
            return self.step.learn(batches, gates)

    def _record(self, signature: _Signature, batches: Sequence[Batch], gates: Gates) -> _Recording:
        inputs = tree_map_only(Tensor, torch.clone, list(batches))
        places = [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]
        try:
            with self._rate_on_device(capturable=True):
                replay, losses = self.recorder.record(lambda: self.step.learn(inputs, gates))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise OptimaError(
                f"cuda_graphs: the step of {'+'.join(gates)} cannot be recorded ({reason}); take cuda_graphs: false"
            ) from error
        return _Recording(signature, places, replay, losses)

    @contextlib.contextmanager
    def _rate_on_device(self, **options: Any) -> Iterator[None]:
        """While entered, the optimiser reads its learning rate from the tensor; for the schedule it stays a number."""
        groups = self.step.optimiser.param_groups
        before = [{name: group[name] for name in ("lr", *options)} for group in groups]
        for group in groups:
            group.update(options, lr=self._rate)
        try:
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)

    def _look_at(self, batches: Sequence[Batch]) -> tuple[_Signature | None, list[Tensor]]:
        """The batches' signature, None if no recording could read them, and their tensors."""
        leaves, structure = tree_flatten(list(batches))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device != self.step.device:
                    self._warn(f"a batch has a tensor on {leaf.device}, and the student is on {self.step.device}")
                    return None, tensors
            elif not isinstance(leaf, bool | int | float | str | None):
                self._warn(f"a batch holds a {type(leaf).__name__}, which is no tensor and no structure of tensors")
                return None, tensors
        told = tuple((leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return _Signature(structure, told), tensors

    def _warn(self, reason: str) -> None:
        if not self._warned:
            warnings.warn(f"cuda_graphs: {reason}; steps on such batches are not replayed", stacklevel=2)
        self._warned = True
