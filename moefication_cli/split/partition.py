"""Which expert every FFN neuron belongs to: the `Partition` and the ways to get one without any data.

Source: MoEfication (arXiv 2110.01786), section 3.2, "random splitting".
Shapes: `expert_F` int64 [F]; -1 marks a shared (always-on) neuron, the rest is exactly balanced over E experts of
N neurons, F = F_shared + E*N. This module reads no file (see `partition_files`) and repairs no balance (`metis.repair_balance`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moefication_cli.errors import ConfigError

SHARED = -1


@dataclass(frozen=True, eq=False)
class Partition:
    """An exactly balanced assignment of F neurons: `expert_F[n]` is neuron n's expert, or -1 when it is shared.

    Raises ConfigError when the tensor is not a one-dimensional integer tensor, numbers experts with gaps or below
    -1, or gives experts different sizes.
    """

    expert_F: Tensor

    def __post_init__(self) -> None:
        e_F = self.expert_F
        if not isinstance(e_F, Tensor) or e_F.dim() != 1 or e_F.is_floating_point() or e_F.is_complex():
            raise ConfigError("a partition is a one-dimensional integer tensor of expert numbers")
        if e_F.dtype != torch.int64:
            object.__setattr__(self, "expert_F", e_F.to(torch.int64))
            e_F = self.expert_F
        if e_F.numel() == 0 or int(e_F.max()) < 0:
            raise ConfigError(
                "a partition needs at least one expert with at least one neuron",
                "leave some neurons unshared",
            )
        if int(e_F.min()) < SHARED:
            raise ConfigError(
                f"expert number {int(e_F.min())} in a partition; only -1 (shared) and 0, 1, ... are allowed"
            )
        sizes_E = torch.bincount(e_F[e_F >= 0])
        if int(sizes_E.min()) != int(sizes_E.max()):
            small, large = int(sizes_E.argmin()), int(sizes_E.argmax())
            raise ConfigError(
                f"experts are not equally large: expert {small} has {int(sizes_E[small])} neurons, "
                f"expert {large} has {int(sizes_E[large])}",
                "repair the balance first, or split again with `moefication split`",
            )

    @property
    def num_neurons(self) -> int:
        return self.expert_F.numel()

    @property
    def num_experts(self) -> int:
        return int(self.expert_F.max()) + 1

    @property
    def num_shared(self) -> int:
        return int((self.expert_F < 0).sum())

    @property
    def expert_size(self) -> int:
        return (self.num_neurons - self.num_shared) // self.num_experts

    def order_F(self) -> Tensor:
        """The permutation int64 [F] that puts shared neurons first, then expert after expert.

        `w_up_FD[order_F]` is the layer in expert order; within a group neurons keep their order (stable).
        """
        return torch.argsort(self.expert_F, stable=True)


def divisors(num_neurons: int) -> list[int]:
    """All divisors of `num_neurons`, ascending: the expert counts that split it evenly."""
    low = [n for n in range(1, int(num_neurons**0.5) + 1) if num_neurons % n == 0]
    return low + [num_neurons // n for n in reversed(low) if n * n != num_neurons]


def nearest_divisor(num_neurons: int, wished: int) -> int:
    """The divisor of `num_neurons` closest to `wished`; the smaller of two at the same distance."""
    return min(divisors(num_neurons), key=lambda d: (abs(d - wished), d))


def check_divides(num_neurons: int, num_experts: int, num_shared: int = 0) -> None:
    """Raise ConfigError unless `num_experts` equal experts can be made of the neurons that are not shared.

    The message lists the expert counts that can.
    """
    rest = num_neurons - num_shared
    if num_shared < 0 or rest < 1:
        raise ConfigError(f"{num_shared} shared neurons of {num_neurons} leave none for experts", "share fewer neurons")
    if num_experts < 1 or rest % num_experts:
        of = f"{num_neurons} neurons" if num_shared == 0 else f"the {rest} neurons beside {num_shared} shared ones"
        raise ConfigError(
            f"{num_experts} experts do not divide {of}; expert counts that do: "
            + ", ".join(str(n) for n in divisors(rest)),
            "choose one of these with --num-experts",
        )


def with_shared(rest: Partition, shared_idx: Tensor, num_neurons: int) -> Partition:
    """The partition of all `num_neurons` whose `shared_idx` (int64 [S]) are shared and whose others follow `rest`.

    `rest` numbers the other neurons in ascending order. Raises ConfigError when the counts do not add up or an
    index is repeated or out of range.
    """
    shared_idx = shared_idx.to(torch.int64)
    outside = shared_idx.numel() > 0 and (int(shared_idx.min()) < 0 or int(shared_idx.max()) >= num_neurons)
    if outside or torch.bincount(shared_idx, minlength=1).max() > 1:
        raise ConfigError(f"shared neurons must be distinct and in 0..{num_neurons - 1}")
    if rest.num_shared or rest.num_neurons + shared_idx.numel() != num_neurons:
        raise ConfigError(
            f"{rest.num_neurons} split neurons and {shared_idx.numel()} shared ones do not make {num_neurons}"
        )
    routed_F = torch.ones(num_neurons, dtype=torch.bool)
    routed_F[shared_idx.cpu()] = False
    expert_F = torch.full((num_neurons,), SHARED, dtype=torch.int64)
    expert_F[routed_F] = rest.expert_F.cpu()
    return Partition(expert_F)


def random_partition(num_neurons: int, num_experts: int, seed: int, shared_F: Tensor | None = None) -> Partition:
    """A uniformly random balanced partition (MoEfication's baseline); the same for the same seed.

    `shared_F`: bool [F], True for neurons that stay always on. Raises ConfigError when the experts do not divide
    what is left.
    """
    if shared_F is None:
        shared_F = torch.zeros(num_neurons, dtype=torch.bool)
    if shared_F.shape != (num_neurons,) or shared_F.dtype != torch.bool:
        raise ConfigError(f"shared_F must be a bool tensor of {num_neurons} entries")
    shared_idx = shared_F.cpu().nonzero().squeeze(1)
    check_divides(num_neurons, num_experts, shared_idx.numel())
    count = num_neurons - shared_idx.numel()
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    expert_F = torch.empty(count, dtype=torch.int64)
    expert_F[shuffled] = torch.arange(count) % num_experts
    return with_shared(Partition(expert_F), shared_idx, num_neurons)
