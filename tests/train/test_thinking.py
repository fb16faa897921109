"""Thinking editions, whose chat template ends a prompt with <think>: each tag once."""

import pytest
from PIL import Image
from transformers import AutoProcessor

from univg_nb import models
from univg_nb.data import prompts
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import replies
from univg_nb.train import collator, rewards

# What the templates of Qwen3-VL's thinking editions do: count images, write an
# assistant's thinking apart from its answer, and open the next thinking themselves.
TEMPLATE = """{%- set count = namespace(value=0) %}
{%- for m in messages %}
{%- set content = m.content %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- if '</think>' in content %}
{%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip() %}
{{- '<think>\\n' + thinking + '\\n</think>\\n\\n' }}
{%- set content = content.split('</think>')[-1].lstrip() %}
{%- endif %}
{{- content }}
{%- else %}
{%- for part in content %}
{%- if part.type == 'image' %}
{%- set count.value = count.value + 1 %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""
ASKED = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a processor with that template."""
    processor = models.load_processor({"name_or_path": "tiny"})
    processor.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("thinking")
    processor.save_pretrained(path)
    return path


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(path)
    box = (1, 2, 300, 400)
    return GroundingSample("s", "toy", (str(path),), "Find it.", box, chain="There.")


def test_the_prompt_leaves_the_tag_to_the_reply(folder, sample, tmp_path):
    raw = AutoProcessor.from_pretrained(folder)
    processor = models.load_processor({"name_or_path": str(folder)})
    prompt = replies.render_prompt(processor, sample, "univg")
    assert replies.render_prompt(raw, sample, "univg") == prompt + "<think>\n"
    assert prompt.endswith(f"<|im_end|>\n{ASKED}")
    told = [
        *prompts.messages(sample),
        {"role": "assistant", "content": "<think>a</think>b"},
    ]
    assert processor.apply_chat_template(told) == raw.apply_chat_template(told)
    processor.save_pretrained(tmp_path)  # as a merged model is
    again = models.load_processor({"name_or_path": str(tmp_path)})
    assert replies.render_prompt(again, sample, "univg") == prompt
    assert again.chat_template == processor.chat_template


@pytest.mark.parametrize("single", [False, True])
def test_targets_and_rewards_have_each_tag_once(folder, sample, single):
    processor = models.load_processor({"name_or_path": str(folder)})
    if single:
        sample = GroundingSample(
            *("s", "toy", sample.images, "Find it.", sample.answer), cot=False
        )
    (row,) = collator.tokenize([sample], processor)
    text = processor.tokenizer.decode(row["prompt_ids"] + row["completion_ids"])
    _, reply = text.split(ASKED)
    reply = reply.removesuffix(processor.tokenizer.eos_token)
    assert reply == prompts.reply_text(sample)
    assert reply.count("<think>") == reply.count("</think>") == (not single)
    assert rewards.format_reward([reply], [not single]) == [1.0]


def test_a_servers_template_begins_the_thinking_too():
    whole = "<think>a</think><answer>(1,2),(3,4)</answer>"
    assert prompts.open_thinking(whole.removeprefix("<think>")) == whole
    for text in (whole, "(1,2),(3,4)", "<think>cut off"):
        assert prompts.open_thinking(text) == text
