"""Reports: what a run found, as Markdown with figures and as one page."""

from .sections import make_report

__all__ = ["make_report"]
