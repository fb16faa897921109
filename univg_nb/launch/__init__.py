"""Running the course and its trainings.

Here are the notebook runner and its queue, the launcher that trains in several
processes, the plan of a long training (memory, cost, checks) and the downloads.
"""
