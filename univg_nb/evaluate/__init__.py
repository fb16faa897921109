"""Evaluation: replies of a model to a benchmark, and their scores.

`generate` records replies, `score` and `compare` turn them into numbers with
intervals, `benchmarks` does both for the models of a run.
"""
