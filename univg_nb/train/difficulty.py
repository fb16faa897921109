"""Weights that make hard groups count more: the paper's difficulty-aware GRPO.

A group is the G replies to one sample; its difficulty is the mean IoU m of the replies.
The normalization of advantages within a group hides m: a group at 0.8 and one at 0.2
push equally hard. The weight phi(m) puts the difference back
(docs/paper_facts.md#weight).

phi multiplies the policy-gradient term and leaves the KL term alone. For phi > 0 this
equals multiplying the group's advantages, which is how the trainer does it:
phi * min(r A, clip(r) A) = min(r phi A, clip(r) phi A).
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from univg_nb import io
from univg_nb.config import OWN_WEIGHTS, WEIGHTS, suggestion
from univg_nb.runs import repo_root

Form = Callable[..., Tensor]
# phi as a function of m, any shape, and of those of the options power, constant and
# box_share that it names. "exp" (1 to 2.72) is what the released script runs;
# "log_released" is negative above m = 0.98, where it pushes towards worse answers
# (docs/paper_facts.md#t3). The rest is not in the paper. "peak" favors groups that
# succeed half of the time. "constant" is a control: e^(1-m) is above 1 nearly
# everywhere, so it also raises the step size. "softmax" has the mean 1 over the groups
# of an update (arXiv 2601.20614). "box_size" is static: the smaller the true box, the
# larger the weight, whatever the replies.
FORMS: dict[str, Form] = {
    "none": lambda m: torch.ones_like(m),
    "exp": lambda m: torch.exp(1 - m),
    "power": lambda m, power: (1.05 - m) ** power,
    "log": lambda m: (-torch.log(0.02 + m)).clamp(min=0),
    "log_released": lambda m: -torch.log(0.02 + m),
    "peak": lambda m: 4 * m * (1 - m),
    "constant": lambda m, constant: torch.full_like(m, constant),
    "softmax": lambda m, power: (
        (-power * m).flatten().softmax(0).view_as(m) * m.numel()
    ),
    "box_size": lambda m, box_share: torch.exp(1 - box_share.sqrt()).to(m),
}
RESCALED = ("none", "mad", "drop_silent")
BINS = ("hard", "medium", "easy")
HARD_BELOW = 0.3
EASY_ABOVE = 0.7
STD_FLOOR = 1e-4  # GRPO adds it to a group's standard deviation


def register_weight(name: str) -> Callable[[Form], Form]:
    """Return a decorator that adds a weight under a name, or replaces one of yours.

        @register_weight("square")
        def square(m):
            return (1 - m) ** 2

    The function gets the mean IoU of each group, any shape, and of the options of
    `difficulty_weight` those that it names. The name then works wherever this process
    takes one. For another process (a command, a notebook that is run, several GPUs) put
    the function into a file and name that: `grpo.weight: my_weights.py:square`.

    Raises:
        ValueError: the name is that of a weight of this package, or has a colon.
    """
    if name in WEIGHTS or ":" in name:
        raise ValueError(f"weight {name!r} is taken; choose another name")

    def add(form: Form) -> Form:
        FORMS[name] = form
        OWN_WEIGHTS.add(name)
        return form

    return add


def find_form(weight: str) -> Form:
    """Return the weight of a name, or the one of a file or a module.

    "my_weights.py:square" is the weight that the file registers as "square", else its
    function of that name; "package.module:square" that of a module. A relative path
    counts from the repository, as paths of a scale do.

    Raises:
        ValueError: there is no such name, file, module or function.
    """
    place, colon, name = weight.rpartition(":")
    if not colon:
        if weight not in FORMS:
            raise ValueError(f"unknown weight {weight!r}{suggestion(weight, FORMS)}")
        return FORMS[weight]
    try:
        if place.endswith(".py"):
            path = _find_file(place)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(place)
    except (OSError, ImportError) as error:
        raise ValueError(
            f"weight {weight!r}: {error}; write FILE.py:FUNCTION, with a path from "
            f"{repo_root()}, or MODULE:FUNCTION"
        ) from error
    form = FORMS[name] if name in OWN_WEIGHTS else getattr(module, name, None)
    if not callable(form):
        raise ValueError(f"weight {weight!r}: {place} has no function {name!r}")
    return form


def identify_weight(weight: str) -> str:
    """Return the hash of the code of a weight of yours, "" for one of this package."""
    if weight in WEIGHTS:
        return ""
    place = weight.rpartition(":")[0]
    if place.endswith(".py"):
        return io.sha256_of(_find_file(place))
    return io.config_hash(inspect.getsource(find_form(weight)))


def _find_file(place: str) -> Path:
    return repo_root() / Path(place).expanduser()


def get_weight_name(weight: str) -> str:
    """Return the part of a weight that names folders: that after the colon."""
    return weight.rpartition(":")[2]


def difficulty_weight(
    group_iou: Tensor,
    form: str | Form = "exp",
    power: float = 1.0,
    unit_mean: bool = False,
    constant: float = 1.0,
    box_share: Tensor | None = None,
) -> Tensor:
    """Compute phi for each group, in the shape of `group_iou`.

    Args:
        group_iou: mean IoU of each group, in 0..1, any shape.
        form: a name, as `find_form` takes it, or the function itself.
        power: exponent of "power", where 1 is the linear form, and of "softmax".
        unit_mean: whether to divide by the mean over the groups given, so that only
            the difference between groups remains, another control. With several
            processes, give the groups of all. If all weights are 0 they stay 0.
        constant: value of "constant".
        box_share: share of the image that each group's true box covers, for "box_size".

    Raises:
        ValueError: for an unknown form, one that does not return a weight for each
            group, or a mean IoU outside 0..1.
    """
    m = group_iou
    if not ((m >= 0) & (m <= 1)).all():  # written so that NaN fails too
        raise ValueError(
            f"group mean IoU must lie in 0..1, got {m.tolist()}: pass the IoU reward "
            "alone, without the format reward"
        )
    if box_share is None:
        box_share = torch.ones_like(m)
    phi = find_form(form) if isinstance(form, str) else form
    options = {"power": power, "constant": constant, "box_share": box_share}
    named = inspect.signature(phi).parameters
    weight = phi(m, **{key: options[key] for key in options.keys() & named.keys()})
    if weight.shape != m.shape:
        raise ValueError(
            f"weight {form!r} made {tuple(weight.shape)} values of {tuple(m.shape)} "
            "groups: return one for each"
        )
    if unit_mean and weight.mean() > 0:
        weight = weight / weight.mean()
    return weight


def rescale_factor(rewards: Tensor, how: str = "none") -> Tensor:
    """Compute a factor for the advantages of each group, (groups,).

    These ways to size a group are for comparison with the weights; none is the paper's.

    Args:
        rewards: (groups, G).
        how: "none", 1: advantages stay divided by the group's standard deviation;
            "mad", divided by the mean absolute deviation instead, so that the sum of
            |A| is G for every group that is not silent; "drop_silent", groups whose
            rewards are all equal leave the mean over groups, so the others grow by
            groups / groups kept.

    Raises:
        ValueError: for an unknown `how`.
    """
    if how == "none":
        return torch.ones_like(rewards[:, 0])
    if how == "mad":
        deviation = (rewards - rewards.mean(dim=1, keepdim=True)).abs().mean(dim=1)
        return (rewards.std(dim=1) + STD_FLOOR) / (deviation + STD_FLOOR)
    if how == "drop_silent":
        kept = (~is_silent(rewards)).to(rewards.dtype)
        return kept * len(kept) / kept.sum().clamp(min=1)
    raise ValueError(f"unknown rescale {how!r}{suggestion(how, RESCALED)}")


def is_silent(rewards: Tensor) -> Tensor:
    """Return which groups (groups, G) teach nothing, all rewards being equal."""
    return rewards.amax(dim=1) - rewards.amin(dim=1) < 1e-8


def group_mean_iou(ious: Tensor, num_generations: int) -> Tensor:
    """Compute the mean IoU of groups: (N,) -> (N / G,), replies of a group adjacent.

    The released code took it over the local micro-batch, which is a group only when
    their sizes agree (docs/paper_facts.md#t2). ValueError if N is no multiple of G.
    """
    if len(ious) % num_generations:
        raise ValueError(
            f"{len(ious)} IoUs do not split into groups of {num_generations}: gather "
            "the rewards of all processes first"
        )
    return ious.view(-1, num_generations).mean(dim=1)


def difficulty_bin(mean_iou: float) -> str:
    """Return "hard" below 0.3, "easy" above 0.7, else "medium", as in Figure 3."""
    if mean_iou < HARD_BELOW:
        return "hard"
    return "easy" if mean_iou > EASY_ABOVE else "medium"
