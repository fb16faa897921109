"""The grounding data layer: boxes, samples, images, prompts and files.

`files.read` gives `GroundingSample`s from every released format, `prompts.messages`
turns one into a chat, `boxes.parse_box` reads the reply. Importing this is cheap.
"""

from univg_nb.data.boxes import iou, parse_box
from univg_nb.data.sample import GroundingSample, find_target_image

__all__ = ["GroundingSample", "find_target_image", "iou", "parse_box"]
