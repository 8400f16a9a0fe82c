"""``torch.compile(model, backend="dwconv_ext")``: whole models on this package's kernels, captured by Dynamo.

Dynamo's guards keep the graph true to the model; the backend puts fused ops into it (patterns.py) and leaves the rest to another
backend.
"""

from .backend import backend
from .freeze import freeze
from .report import Refusal, Report, last_report, reports

__all__ = ["Refusal", "Report", "backend", "freeze", "last_report", "reports"]
