"""Figures: boxes on images, plots, the paper's figures and tables, the report page.

Everything is drawn from what a run wrote. `report`, `tables` and `demo` are commands.
"""
