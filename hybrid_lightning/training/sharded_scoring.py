"""Scoring by all ranks of FSDP2 together, none of which has the whole model on its device but to sample.

Each rank has the model as it was loaded, in the memory of the host. For scoring, a copy of its structure that shares those
weights is split over the devices, as the adapted model is afterwards. The ranks run the passes of different losses at a time.
Each gets the gradients of the modules that it scores from all of them, adds them up in the order of the losses, and so has the
sums of one process to the bit. When all modules have a score, the copy is given up.
"""

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hybrid_lightning.adapters.scoring_process import CalibrationState, ScoringProcess
from hybrid_lightning.adapters.scoring_progress import ScoringProgress
from hybrid_lightning.errors import CheckpointError, ConfigError
from hybrid_lightning.sharding.fsdp2 import FSDP2Strategy
from hybrid_lightning.sharding.ranks import deal, gather_objects, on_all_ranks, world_size
from hybrid_lightning.stopping import StopSignals
from hybrid_lightning.training.language import LanguageModule

Result = TypeVar("Result")
_PURPOSE = "score the modules"


@runtime_checkable
class _Dealable(CalibrationState, Sized, Protocol):
    """Losses of which any can be computed, whose number is known."""


@contextmanager
def scored_together(
    module: LanguageModule,
    strategy: FSDP2Strategy,
    candidates: Mapping[str, nn.Module],
    progress: ScoringProgress,
) -> Iterator["ShardedScoring"]:
    """Within this context of all ranks the module, whose model is not adapted, computes with a split copy of it."""
    from hybrid_lightning.engine import use_fused_layers  # with PEFT, which is slow to import

    whole, backend = module.model, module.engine.backend
    split = _same_weights(whole, backend)
    use_fused_layers(split, backend)  # as in training, since the passes of scoring are as large as those of training
    with module.signals.deferred():
        module.set_model(strategy.shard(split), is_copy=True)
        process = ShardedScoring(split, candidates, strategy.root_device, progress)
        try:
            module.on_sharded()
            yield process
        finally:
            module.set_model(whole, is_copy=True)
            process.forget()
            del split
            if strategy.root_device.type != "cpu":
                gc.collect()  # of FSDP's circles, so that the device has its memory back; it takes some tenths of a second


def _same_weights(model: nn.Module, shared: object) -> nn.Module:
    """A copy of a model with the same memory for its weights; `shared` is what both have beside them."""
    memo: dict[int, Any] = {id(shared): shared}
    memo |= {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}  # another tensor, which may go to another device
    return copy.deepcopy(model, memo)


class ShardedScoring(ScoringProcess):
    """One of the ranks of FSDP2 that score together the candidates of the whole model, which are in the memory of the host."""

    def __init__(
        self, model: nn.Module, candidates: Mapping[str, nn.Module], device: torch.device, progress: ScoringProgress
    ) -> None:
        super().__init__(progress)
        self._modules = dict(model.named_modules())
        self._device, self._signals = device, progress.signals
        self._rank, self._ranks = dist.get_rank(), world_size()
        self._owners = _owners({name: module.weight.numel() for name, module in candidates.items()}, self._ranks)  # type: ignore[operator, union-attr]
        self.is_first = self._rank == 0

    def forget(self) -> None:
        """Let go of the model."""
        self._modules.clear()

    def modules(self, candidates: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Those of the split model."""
        return {name: self._modules[name] for name in candidates}

    def weight(self, name: str, module: nn.Module) -> Tensor:
        """That of the host, on the device."""
        return module.weight.detach().to(self._device)  # type: ignore[operator, union-attr]

    def own(self, names: Iterable[str]) -> list[str]:
        """Those of this rank."""
        return [name for name in names if self._owners[name] == self._rank]

    def rounds(self, names: Iterable[str]) -> list[list[str]]:
        """One module of each rank at a time, so that no rank waits for longer than one takes."""
        names = list(names)
        by_rank = [[name for name in names if self._owners[name] == rank] for rank in range(self._ranks)]
        return [[name for name in some if name is not None] for some in zip_longest(*by_rank)]

    def together(self, function: Callable[[], Mapping[str, Result]]) -> dict[str, Result]:
        """See `ScoringProcess`; a signal ends the function at once, and then stops all ranks."""

        def one() -> dict[str, Result]:
            with self._signals.interruptible():
                return dict(function())

        parts = on_all_ranks(one, self._signals, _PURPOSE)
        return {name: value for part in parts for name, value in part.items()}

    def finish(self, function: Callable[[], dict[str, Result]]) -> dict[str, Result]:
        """See `ScoringProcess`."""
        made: dict[str, Result] = {}
        on_all_ranks(lambda: made.update(function()), self._signals, _PURPOSE)
        return made

    def any(self, value: bool) -> bool:
        """See `ScoringProcess`."""
        return any(gather_objects(value))

    def measure(
        self,
        name: str,
        module: nn.Module,
        function: Callable[[Tensor, Callable[[], float]], Result],
        losses: Iterable[Tensor],
    ) -> dict[str, Result]:
        """See `ScoringProcess`. The rank that scores the candidate asks the others, each time, to measure with it."""
        dealt, owner = self._dealable(losses), self._owners[name]
        mine, weight = self._rank == owner, self._modules[name].weight
        assert isinstance(weight, DTensor)
        start = weight.to_local().clone()
        changed = module.weight.detach().to(self._device, copy=True)  # type: ignore[operator, union-attr]
        found: dict[str, Result] = {}
        failure: Exception | None = None

        def ask() -> float:
            gather_objects(True)
            return self._mean_loss(weight, changed, owner, dealt)

        with torch.no_grad():
            try:
                if mine:
                    try:
                        found[name] = function(changed, ask)
                    except Exception as error:
                        failure = error
                    gather_objects(False)
                else:
                    while gather_objects(None)[owner]:
                        self._mean_loss(weight, changed, owner, dealt)
            finally:
                weight.to_local().copy_(start)

        def result() -> dict[str, Result]:
            if failure is not None:
                raise failure
            return found

        return self.together(result)

    def _mean_loss(self, weight: DTensor, changed: Tensor, owner: int, losses: "_Dealable") -> float:
        """The mean of all losses, of which each rank computes some, with a weight as its owner has changed it."""
        dist.broadcast(changed, src=owner)
        whole = distribute_tensor(changed.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
        weight.to_local().copy_(whole.to_local())
        values: list[float] = []
        while len(values) < len(losses):
            rest = len(losses) - len(values)
            values += gather_objects(float(self._own_loss(losses, len(values))))[:rest]
        return sum(values) / len(values)

    def _own_loss(self, losses: "_Dealable", seen: int) -> Tensor:
        """This rank's of the next losses. A rank without one computes the last one, since all ranks gather weights together."""
        passes = losses.since(min(seen + self._rank, len(losses) - 1))
        loss = next(passes)
        passes.close()  # type: ignore[attr-defined]
        return loss

    def _dealable(self, losses: Iterable[Tensor]) -> "_Dealable":
        if not isinstance(losses, _Dealable):
            raise ConfigError(
                f"under FSDP2 ranks score with different losses, and calibration_losses returned {type(losses).__name__}, which "
                "cannot be dealt to them; return a CalibrationLosses (hybrid_lightning.training.calibration), or an object with "
                "__len__, since, state_dict and load_state_dict, or use trainer.strategy=ddp"
            )
        return losses

    def backward_all(
        self,
        candidates: Mapping[str, nn.Module],
        take: Callable[[str, Tensor, int], None],
        losses: Iterable[Tensor],
        seen: int,
        some: bool = False,
    ) -> Iterator[int]:
        """See `ScoringProcess`."""
        dealt = self._dealable(losses)
        total, modules = len(dealt), self.modules(candidates)
        held: dict[str, Tensor] = {}

        def hold(name: str) -> Callable[[Tensor], None]:
            def hook(weight: Tensor) -> None:
                assert weight.grad is not None
                held[name] = weight.grad.detach().to("cpu")
                weight.grad = None  # FSDP then has nothing to reduce

            return hook

        handles = []
        for block, names in self._by_part(modules).items():
            block.unshard()  # hooks are of whole weights, which FSDP2 makes once and fills at each pass
            handles += [
                modules[name].weight.register_post_accumulate_grad_hook(hold(name))  # type: ignore[operator, union-attr]
                for name in names
            ]
            block.reshard()
        try:
            while seen < total:
                mine = seen + self._rank
                loss = self._own_loss(dealt, seen)
                used = loss.requires_grad or not some
                on_all_ranks(partial(self.check_loss, loss, mine) if used else dict, self._signals, _PURPOSE)
                if used:
                    self._differentiate(loss)
                parts_of = self._dealt(modules, held if mine < total else {})
                held.clear()
                for offset in range(min(self._ranks, total - seen)):
                    with torch.autocast(self._device.type, enabled=False):
                        for name, parts in parts_of.items():
                            if (part := parts[offset]) is not None:
                                # Where this rank's part of the weight is, and so what its gradients are added to.
                                take(name, self._unscaled(part.to(modules[name].weight.device)), seen)  # type: ignore[arg-type]
                    seen += 1
                    yield seen
                self.together(dict)  # a signal stops all of them here
            dealt.load_state_dict(_united(dealt.state_dict()))
        finally:
            for handle in handles:
                handle.remove()

    def _by_part(self, names: Iterable[str]) -> dict[FSDPModule, list[str]]:
        """The part of the model whose weights are gathered together -> those of some modules that are in it."""
        found: dict[FSDPModule, list[str]] = {}
        for name in names:
            places = [".".join(name.split(".")[:count]) for count in range(name.count(".") + 1, -1, -1)]
            parts = [self._modules[place] for place in places]
            found.setdefault(next(part for part in parts if isinstance(part, FSDPModule)), []).append(name)
        return found

    def _dealt(self, modules: Mapping[str, nn.Module], held: Mapping[str, Tensor]) -> dict[str, list[Tensor | None]]:
        """For each module of this rank its gradients of all ranks, in the memory of the host; None where a rank has none."""
        found: dict[str, list[Tensor | None]] = {}
        there = gather_objects([name in held for name in modules])
        for number, (name, module) in enumerate(modules.items()):
            has = [of_rank[number] for of_rank in there]
            if not any(has):
                continue
            weight: Tensor = module.weight  # type: ignore[assignment]
            like = torch.empty(weight.shape, dtype=weight.dtype, device=self._device)
            parts = deal(held.get(name), like, self._owners[name], has)
            if parts is not None:
                found[name] = [None if part is None else part.to("cpu") for part in parts]
        return found


class SharedProgress(ScoringProgress):
    """Progress of scoring by several ranks, of which the first one writes and has a `folder`. All ranks have to call `keep_sums`.

    A run that goes on reads the files of the earlier run on every rank, as it does with a checkpoint.

    Raises:
        CheckpointError: If ranks find different files in `earlier`, or one cannot be read.
    """

    def __init__(self, folder: Path | None = None, earlier: Path | None = None, signals: StopSignals | None = None) -> None:
        found = gather_objects(sorted(path.name for path in earlier.glob("*")) if earlier is not None else None)
        if any(of_rank != found[0] for of_rank in found):
            raise CheckpointError(
                f"ranks find different files in {earlier}: scoring that was stopped goes on from a folder that all can read"
            )
        super().__init__(folder, earlier, signals)

    def keep_sums(self, make: Callable[[], dict[str, Any]], stopped: bool = False) -> None:
        """See `ScoringProgress`."""
        if not gather_objects(stopped or self.is_due)[0]:
            return
        state = make()
        whole = {"seen": state["seen"], "sums": _sums_on_first(state["sums"]), "losses": _united(state["losses"])}
        super().keep_sums(lambda: whole, stopped=True)


def _united(state: Any) -> Any:
    """Plain data and tensors of this rank, united with those of all others: entries of dicts, and those of lists one by one."""
    return _merged(gather_objects(move_data_to_device(state, torch.device("cpu"))))


def _merged(values: list[Any]) -> Any:
    if all(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _merged([value[key] for value in values if key in value]) for key in keys}
    if all(isinstance(value, (list, tuple)) for value in values):
        return [_merged(list(entries)) for entries in zip(*values, strict=True)]
    return values[0]


def _sums_on_first(sums: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The sums of all ranks on the first one, tensor by tensor; on the others nothing."""
    first, whole = dist.get_rank() == 0, dict[str, list[Tensor]]()
    for rank, sizes in enumerate(gather_objects({name: [tensor.shape for tensor in tensors] for name, tensors in sums.items()})):
        for name, shapes in sizes.items():
            own = sums[name] if rank == dist.get_rank() else [None] * len(shapes)
            for shape, tensor in zip(shapes, own, strict=True):
                value = _sent(tensor, shape, rank)
                if first:
                    whole.setdefault(name, []).append(value)
    return whole


def _sent(tensor: Tensor | None, shape: torch.Size, source: int) -> Tensor:
    """A float32 tensor of one rank, in the memory of the host."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    value = torch.empty(shape, device=device) if tensor is None else tensor.to(device, torch.float32).contiguous()
    dist.broadcast(value, src=source)
    return value.cpu()


def _owners(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank scores each module: the next largest one is given to whichever has least."""
    loads = [0] * ranks
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # stable, so that all ranks agree
        rank = loads.index(min(loads))
        owners[name] = rank
        loads[rank] += sizes[name]
    return owners
