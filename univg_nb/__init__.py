"""UniVG-R1, multi-image visual grounding, as a course of executable notebooks."""

__version__ = "0.2.0"
