"""First stage of the base model: the vision tower learns to see.

The real Qwen2-VL starts from a vision tower that was trained before. Ours gets the same
start: every merged image token has to tell what is on its patch of the picture (kind,
color, and the box with the digits of its coordinates). The heads that read this off are
discarded afterwards.
"""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss

from univg_nb.base_model.architecture import MAX_PIXELS, MERGE, PATCH
from univg_nb.data.boxes import Box
from univg_nb.minimig.pictograms import COLORS, KINDS
from univg_nb.minimig.scenes import CANVAS, PLACES, Scene, render

SIDE = round(MAX_PIXELS**0.5)  # pixels a side as the model sees a picture
CELLS = SIDE // (PATCH * MERGE)  # merged tokens a side
MEAN = (0.48145466, 0.4578275, 0.40821073)  # the processor's normalization
STD = (0.26862954, 0.26130258, 0.27577711)


def render_small(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return the scene at the size the model sees, (SIDE, SIDE, 3) uint8.

    Three pictures of four are first rendered at half size, which looks the same at this
    resolution and is three times faster.

    Args:
        scene: what to render.
        rng: source of random numbers.
    """
    pixels = CANVAS if rng.random() < 0.25 else CANVAS // 2
    image = render(scene, pixels)
    how = Image.Resampling.BICUBIC if pixels == CANVAS else Image.Resampling.BOX
    return np.asarray(image.resize((SIDE, SIDE), how))


def patchify(images: Tensor) -> Tensor:
    """Return `pixel_values` (N * patches, C * T * P * P) as the processor's.

    Args:
        images: (N, SIDE, SIDE, 3) uint8.
    """
    n = images.shape[0]
    x = images.float().permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    x = x.reshape(n, 3, CELLS, MERGE, PATCH, CELLS, MERGE, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (N, cells, cells, merge, merge, C, P, P)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(n * (CELLS * MERGE) ** 2, -1)


def make_image_grid_thw(n: int) -> Tensor:
    """Return `image_grid_thw` of `n` pictures, (n, 3)."""
    side = CELLS * MERGE
    return torch.tensor([[1, side, side]]).expand(n, 3)


def compute_cover(box: Box) -> np.ndarray:
    """Return the share of every cell that `box` covers, (cells, cells) in 0..1."""
    edge = 1000 / CELLS
    low = np.arange(CELLS) * edge
    x1, y1, x2, y2 = box
    wide = np.clip(np.minimum(low + edge, x2) - np.maximum(low, x1), 0, None)
    high = np.clip(np.minimum(low + edge, y2) - np.maximum(low, y1), 0, None)
    return high[:, None] * wide[None, :] / edge**2


@lru_cache(maxsize=4096)
def find_covered_cells(box: Box) -> np.ndarray:
    """Return the flat indices of the cells that show a box.

    These are the cells of which it covers a third, or else the one it covers most of.
    """
    cover = compute_cover(box).reshape(-1)
    return np.flatnonzero(cover >= min(1 / 3, cover.max()))


def make_cell_targets(scene: Scene) -> np.ndarray:
    """Return what each merged token should tell: (cells * cells, 6) integers.

    The columns are kind and color (0 = ground), then the box x1, y1, x2, y2 in 0..999.
    A cell belongs to the thing whose box covers most of it.
    """
    kinds, colors = list(KINDS), list(COLORS)
    targets = np.zeros((CELLS, CELLS, 6), dtype=np.int64)
    most = np.full((CELLS, CELLS), 0.15)
    for thing in scene.things:
        covered = compute_cover(thing.box)
        better = covered > most
        most[better] = covered[better]
        row = [kinds.index(thing.kind) + 1, colors.index(thing.color) + 1]
        targets[better] = [*row, *(min(v, 999) for v in thing.box)]
    return targets.reshape(-1, 6)


class CellHeads(nn.Module):
    """Read kind, color, place and box digits off the merged tokens.

    Args:
        width: of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, len(KINDS) + 1)
        self.color = nn.Linear(width, len(COLORS) + 1)
        self.place = nn.Linear(width, len(PLACES))
        self.box = nn.Linear(width, 4)
        self.digits = nn.Linear(width, 4 * 20)  # hundreds and tens of each edge

    def loss(self, tokens: Tensor, targets: Tensor, place: Tensor) -> dict[str, Tensor]:
        """Return the losses by name.

        Args:
            tokens: (N, cells * cells, width).
            targets: (N, cells * cells, 6), as from `make_cell_targets`.
            place: (N,) index of each scene's place.
        """
        thing = targets[..., 0] > 0
        box = targets[thing][:, 2:]  # (things, 4) on 0..999
        on = tokens[thing]
        digits = self.digits(on).view(-1, 20)  # (things * 4, 20)
        edges = box.reshape(-1)
        return {
            "kind": cross_entropy(
                self.kind(tokens).flatten(0, 1), targets[..., 0].flatten()
            ),
            "color": cross_entropy(
                self.color(tokens).flatten(0, 1), targets[..., 1].flatten()
            ),
            "place": 0.2 * cross_entropy(self.place(tokens.mean(1)), place),
            "box": 4 * l1_loss(self.box(on), box / 1000),
            "hundreds": 0.5 * cross_entropy(digits[:, :10], edges // 100),
            "tens": 0.25 * cross_entropy(digits[:, 10:], edges // 10 % 10),
        }
