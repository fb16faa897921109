"""A merged folder is the model with its adapter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from univg_nb import io, models
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


@pytest.mark.parametrize("command", ["merge", "generate"])
def test_an_adapter_that_fits_nothing_leaves_nothing_behind(tmp_path, capsys, command):
    model, _ = models.load_for_inference({"name_or_path": "tiny"})
    folder, out = tmp_path / "adapter", tmp_path / "out"
    models.add_lora(model, {"r": 2}).save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {name.replace("layers", "blocks"): w for name, w in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    arguments = ["--model", "tiny", "--scale", "tiny", "--out", str(out)]
    if command == "generate":
        Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
        row = {"images": ["a.png"], "question": "<image> Find it."}
        io.write_json(tmp_path / "rec.json", [row | {"answer": [1, 2, 3, 4]}])
        arguments += ["--records", str(tmp_path / "rec.json")]
        arguments += ["--image-root", str(tmp_path)]
    before = sorted(tmp_path.iterdir())
    assert run_command([command, *arguments, "--adapter", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {folder}: 56 weights of the adapter fit none of ")
    assert f"its base {models.ASSETS}, give that as the model: base_model" in error
    assert sorted(tmp_path.iterdir()) == before
