"""Models for programs that have no vlm: StableHLO and ONNX.

A format is a module with `write(program, folder)`, `opened(program, folder)` and a few facts; what
all of them share is what they write (`programs`), what stands beside it (`contract`), and the proof
that the copy computes what the original does (`checking`).
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.exporting.bundle_export import Exported as Exported
    from vlm.exporting.bundle_export import export as export

del epy
