"""UniVG-R1 as a course of executable notebooks: the small helper package."""

__version__ = "0.1.0"
