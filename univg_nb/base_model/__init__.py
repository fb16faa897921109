"""The workshop: how the shipped base model was made. Nothing imports this room.

`lessons` and `albums` draw what it is taught, `architecture` builds the model and its
tokenizer, `training` trains it, and `evaluate` measures what it can do.
"""

__all__: list[str] = []
