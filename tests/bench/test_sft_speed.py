"""Stage 1's data path against a plain SFTTrainer, in samples per second.

Samples of MiniMIG and the shipped model, as at scale tiny. Both trainings make the same
number of updates with the same options. Printed: samples per second, padding share.
"""

import time

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from univg_nb import models
from univg_nb.config import load_scale
from univg_nb.data import files, prompts
from univg_nb.data.images import open_image
from univg_nb.minimig import export
from univg_nb.train import checkpoints, sft

UPDATES, BATCH = 6, 32
PADDING_BAR = 0.15  # share of all tokens of a batch


def config(**options):
    scale = load_scale("tiny")
    scale["sft"] |= {"max_steps": UPDATES, "per_device_train_batch_size": BATCH}
    scale["sft"] |= {"disable_tqdm": True, **options}
    return scale


class Counted:
    """TRL's own collator, counting real and padding tokens."""

    def __init__(self, collate):
        self.collate, self.tokens, self.padding = collate, 0, 0

    def __call__(self, rows):
        batch = self.collate(rows)
        mask = batch["attention_mask"]
        self.tokens += mask.numel()
        self.padding += int((mask == 0).sum())
        return batch


def plain(scale, rows, out):
    """SFTTrainer as its documentation has it: prompt, completion and images."""
    section = scale["sft"]
    model, processor = models.load_for_training(scale["model"])
    models.freeze_vision(model)
    model = models.add_lora(model, section["lora"])
    data = Dataset.from_list(
        [
            {
                "prompt": prompts.messages(row),
                "completion": [
                    {"role": "assistant", "content": prompts.reply_text(row)}
                ],
                "images": list(row.images),
            }
            for row in rows
        ]
    ).with_transform(
        lambda batch: {
            **batch,
            "images": [[open_image(path) for path in row] for row in batch["images"]],
        }
    )
    options = checkpoints.make_trainer_options(scale, "sft", out)
    arguments = SFTConfig(**options | {"max_length": None, "save_strategy": "no"})
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=processor
    )
    trainer.data_collator = counted = Counted(trainer.data_collator)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    return UPDATES * BATCH / seconds, counted.padding / counted.tokens


@pytest.mark.bench
def test_samples_per_second_and_padding(tmp_path):
    sizes = dict.fromkeys(export.SIZES, 0) | {"stage1": 512}
    made = export.build(tmp_path / "data", sizes)
    rows = files.read(made["stage1"], image_root=tmp_path / "data")
    speeds = {}
    for name, options in {
        "ours": {},
        "ours, random order": {"train_sampling_strategy": "random"},
    }.items():
        summary = sft.train(config(**options), tmp_path / name, rows)
        speeds[name] = summary["samples_per_second"], summary["padding_share"]
    speeds["plain SFTTrainer"] = plain(config(), rows, tmp_path / "plain")
    print()
    for name, (speed, padding) in speeds.items():
        print(f"{name:>20}: {speed:6.1f} samples/s, padding {padding:.1%} of tokens")
    assert speeds["ours"][1] < PADDING_BAR
    assert speeds["ours"][0] > speeds["plain SFTTrainer"][0]
