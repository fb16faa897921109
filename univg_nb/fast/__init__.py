"""The GRPO step that computes the prompt of a group once.

`trainer.SharedPrefixGRPOTrainer` takes TRL's rows and any reward functions, see
docs/fast_example.py. `sampling` also serves evaluation, `vision_features` stage 1.
Nothing is imported here: the trainer loads torch and TRL.
"""
