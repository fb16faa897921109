"""A merged folder is the model with its adapter."""

import torch
from peft import LoraConfig, get_peft_model

from univg_nb import models
from univg_nb.__main__ import main as run_command
from univg_nb.train import merge


def test_a_merged_folder_is_the_model_with_its_adapter(tmp_path, capsys):
    model, _ = models.load_for_inference({"name_or_path": "tiny"})
    kept = {name: weight.clone() for name, weight in model.named_parameters()}
    lora = LoraConfig(
        r=2, target_modules=models.LANGUAGE_LINEARS, init_lora_weights=False
    )
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "merged"
    arguments = ["--model", "tiny", "--scale", "tiny", "--out", str(out)]
    arguments += ["--adapter", str(tmp_path / "adapter")]
    assert run_command(["merge", *arguments]) == 0
    expected, _ = models.load_for_training(
        {"name_or_path": "tiny"}, tmp_path / "adapter"
    )
    expected = expected.merge_and_unload()
    found, processor = models.load_for_inference({"name_or_path": str(out)})
    weights = dict(expected.named_parameters())
    changed = 0
    for name, weight in found.named_parameters():
        assert torch.equal(weight, weights[name]), name
        changed += not torch.equal(weight, kept[name])
    assert changed == 4 * 7  # the linear layers of four blocks
    assert processor.image_processor.size["longest_edge"] == 4096
    assert run_command(["merge", *arguments]) == 2
    assert "exists" in capsys.readouterr().err
    # a fully trained model, whose processor has the limits it was trained under
    processor.image_processor.size["longest_edge"] = 1024
    processor.save_pretrained(out)
    saved = models.load_processor({"name_or_path": str(out)}).image_processor
    assert saved.size["longest_edge"] == 1024
    again = merge.write_merged({"name_or_path": "tiny"}, [out], tmp_path / "again")
    copy, processor = models.load_for_inference({"name_or_path": str(again)})
    assert processor.image_processor.size["longest_edge"] == 4096
    for name, weight in copy.named_parameters():
        assert torch.equal(weight, weights[name]), name
    assert [path.name for path in tmp_path.iterdir()].count("merged") == 1
