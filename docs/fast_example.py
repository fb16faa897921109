"""GRPO with shared prompts on rows of your own, with a reward function of your own.

    python docs/fast_example.py OUTPUT_FOLDER

`SharedPrefixGRPOTrainer` takes TRL's rows: `prompt` (messages or a string), `images`
(pictures or paths) and any columns for the rewards. A reward function gets the replies
and the columns by name, and returns a number for each reply. All options are those of
TRL's GRPOConfig. Here the model that ships with this package makes two updates on a
CPU; Qwen2-VL and Qwen2.5-VL of any size work in its place, with or without an adapter.
"""

import sys

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import GRPOConfig

from univg_nb import models
from univg_nb.fast.trainer import SharedPrefixGRPOTrainer


def length_reward(completions, wanted, **_):
    """Reward replies whose number of characters is near the column `wanted`."""
    lengths = [len(messages[-1]["content"]) for messages in completions]
    return [-abs(n - goal) / goal for n, goal in zip(lengths, wanted, strict=True)]


def main(folder):
    """Train the shipped model for two updates, and return the trainer."""
    model, processor = models.load_for_training({"name_or_path": "tiny"})
    models.freeze_vision(model)  # its features are then computed once for an image
    pictures = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    question = [{"role": "user", "content": "What is in these images?"}]
    row = {"prompt": question, "images": pictures, "wanted": 20}
    options = {"num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 2}
    options |= {"max_completion_length": 16, "use_cpu": True, "bf16": False}
    trainer = SharedPrefixGRPOTrainer(
        model,
        GRPOConfig(folder, report_to="none", gradient_checkpointing=False, **options),
        processing_class=processor,
        reward_funcs=length_reward,
        train_dataset=Dataset.from_list([row] * 4),
        peft_config=LoraConfig(target_modules=models.LANGUAGE_LINEARS),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
