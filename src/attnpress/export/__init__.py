"""export: a compressed model for other runtimes (ONNX, OpenVINO), or its exact integers for hardware designers."""

from attnpress.export.errors import ExportError
from attnpress.export.run import KINDS, export_run

__all__ = ["KINDS", "ExportError", "export_run"]
