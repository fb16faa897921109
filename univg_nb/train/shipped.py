"""The stage-1 model that ships with the package, as a stage of a run.

It is the tiny model after a long stage 1 (`make stage1`, docs/model_card.md), as the
authors released theirs. Stage 2 starts from it unless another start is named.
"""

import shutil

from univg_nb import io, models
from univg_nb.runs import Run

STAGE = "shipped"
FOLDER = models.ASSETS.with_name("tiny-stage1")


def find_start(run: Run, name: str = STAGE) -> str:
    """Return the name of the stage that stage 2 starts from, and make it if it ships.

    Args:
        run: a run.
        name: "shipped", or the name of a finished stage-1 training of the run. At a
            scale whose base is not the tiny model "shipped" means sft_lora.
    """
    if name != STAGE:
        return name
    if run.config["model"]["name_or_path"] != "tiny":
        return "sft_lora"
    weights = io.sha256_of(FOLDER / "model.safetensors")
    stage = run.stage(STAGE, {"weights": weights})
    if not stage.done:
        shutil.copytree(FOLDER, stage.dir / "adapter", dirs_exist_ok=True)
        shutil.copy(FOLDER / "config.yaml", stage.dir)
        stage.finish(**io.read_json(FOLDER / "evaluation.json"))
    return STAGE
