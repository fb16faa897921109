"""Figures: boxes on images, plots, the paper's figures and tables, the report page.

Everything is drawn from what a run wrote. `publish`, `report` and `demo` are commands.
"""
